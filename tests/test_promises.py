"""What holds for every block: compiled, in half precision, deterministic, without waiting for the device, empty.

The blocks come from the entries of the test files, see `tests/blocks.py`; none is listed here.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from pixelss import (
    CAMHead,
    ClassRegionMask,
    MultiScaleAttentiveLoss,
    PrototypeBank,
    RegionalContrastiveLoss,
    msinf_cam,
    multi_scale_attentive_loss,
    multi_scale_forward,
    normalize_cam,
)
from tests.blocks import (
    PROMISES,
    PUBLIC,
    RESULTS,
    WRAPPERS,
    Block,
    blocks,
    collect,
    home,
    import_tests,
    modules,
    run_once,
)
from tests.oracles import value_and_grads
from tests.strategies import Batch, batches, convert, make_batch, map_batch

BLOCKS = {name: block for name, block in blocks().items() if name not in WRAPPERS}
LOSSES = [name for name in BLOCKS if run_once(name)[0].ndim == 0]
ORACLES = [name for name, block in BLOCKS.items() if block.oracle]
FIXED_SHAPE = [name for name, block in BLOCKS.items() if "no wait" not in block.but]
LOCALLY = [name for name, block in BLOCKS.items() if name in LOSSES or block.inductor or block.compiled_by]


def every_block(
    promise: str = "", *, reads: tuple[str, ...] = Batch._fields, among: Collection[str] = BLOCKS
) -> pytest.MarkDecorator:
    """Every block that reads one of these fields; one that is let off must break the promise, or its reason is none."""
    let_off = {name: block.but[promise] for name, block in BLOCKS.items() if promise in block.but}
    marks = {name: [pytest.mark.xfail(reason=reason, strict=True)] for name, reason in let_off.items()}
    concerned = [name for name in BLOCKS if name in let_off or (name in among and set(run_once(name)[1]) & set(reads))]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks.get(name, [])) for name in concerned])


def flow(block: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
    """Return the value of a block and its gradients with respect to each floating tensor of the batch."""
    leaves, spec = tree_flatten(batch)
    return value_and_grads(lambda *x: block(tree_unflatten(x, spec)), *leaves)


def run(name: str, batch: Batch) -> list[Tensor]:
    return flow(BLOCKS[name].on(batch), batch)


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def refuse_to_wait() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The entries are complete


def test_the_signatures_are_of_the_public_names():
    assert sorted(collect("SIGNATURES")) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_signature_is_the_contract(name):
    signature = inspect.signature(PUBLIC[name])
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    actual = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert import_tests(home(PUBLIC[name])).SIGNATURES.get(name) == actual


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - RESULTS))
def test_every_public_name_has_an_entry_in_its_test_file(name):
    own = {key: entry for key, entry in import_tests(home(PUBLIC[name])).BLOCKS.items() if key.split()[0] == name}
    assert own
    for entry in own.values():
        assert isinstance(entry, Block) or len(entry.split()) > 2, "a Block, or the reason why there is none"


def test_no_entry_is_of_something_else():
    assert {key.split()[0] for key in collect("BLOCKS")} == PUBLIC.keys() - RESULTS
    assert {promise for block in blocks().values() for promise in block.but} <= PROMISES.keys()


@pytest.mark.parametrize("module", modules())
def test_what_cites_an_equation_has_an_oracle(module):
    source = importlib.import_module(f"pixelss.{module}")
    own = {name: value for name, value in vars(source).items() if getattr(value, "__module__", "") == source.__name__}
    citing = {
        name
        for name, value in own.items()
        if re.search(r"\bEq\. \d", inspect.getdoc(value) or "") and not name.startswith("__")
    }
    assert citing <= {name.split()[0] for name in ORACLES}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_an_oracle(name):
    assert name in ORACLES


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=6)
@given(batch=batches(side=4))
def test_equals_its_oracle(name, batch):
    expected = flow(BLOCKS[name].on(batch, oracle=True), batch)
    torch.testing.assert_close(run(name, batch), expected, rtol=1e-7, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize(("module", "function"), WRAPPERS.items())
def test_module_equals_the_function_and_has_its_settings(module, function):
    entries, batch = blocks(), make_batch()
    assert torch.equal(entries[module].on(batch)(batch), BLOCKS[function].on(batch)(batch))
    ours, theirs, inputs = (
        inspect.signature(value).parameters for value in (PUBLIC[module], PUBLIC[function], PUBLIC[module].forward)
    )
    kept = {name: value.default for name, value in theirs.items() if name not in inputs}
    assert {name: value.default for name, value in ours.items()} == kept


# Gradients


def away_from_kinks() -> Batch:
    """A small batch without zeros, ones and ties."""
    batch = make_batch(images=2, classes=2, dim=3, feature_size=(2, 3), image_size=(3, 4), scales=(2, 2))
    g = torch.Generator().manual_seed(1)

    def draw(x: Tensor) -> Tensor:
        return 0.05 + 0.9 * torch.rand(x.shape, generator=g, dtype=x.dtype)

    cams = {"student": tuple(map(draw, batch.student)), "teacher": tuple(map(draw, batch.teacher))}
    return batch._replace(features=draw(batch.features), **cams)


@every_block("gradient")
def test_gradcheck(name, monkeypatch):
    if "gradient" in BLOCKS[name].but:  # a failure's message is made by a second, slow check
        module = importlib.import_module("torch.autograd.gradcheck")
        monkeypatch.setattr(module, "_run_slow_mode_and_get_error", lambda *_: "")
    leaves, spec = tree_flatten(away_from_kinks())
    block = BLOCKS[name].on(tree_unflatten(leaves, spec))
    if not block(tree_unflatten(leaves, spec)).is_floating_point():
        return
    fields = [field for field in Batch._fields for _ in tree_flatten(getattr(away_from_kinks(), field))[0]]
    places = [i for i, x in enumerate(leaves) if x.is_floating_point() and fields[i] in run_once(name)[1]]
    if not places:
        return

    def value(*floating: Tensor) -> Tensor:
        given = dict(zip(places, floating, strict=True))
        return block(tree_unflatten([given.get(i, x) for i, x in enumerate(leaves)], spec))

    assert torch.autograd.gradcheck(value, [leaves[i].clone().requires_grad_() for i in places], fast_mode=True)


# Compiled, and in any precision


@every_block("compile", among=LOCALLY)
def test_compiled_equals_eager(name, device):
    if other := BLOCKS[name].compiled_by:
        assert other.split()[0] == name.split()[0]
        assert not BLOCKS[other].compiled_by
        assert BLOCKS[name].but.get("compile") == BLOCKS[other].but.get("compile")
    else:
        check_compiled(name, "aot_eager" if BLOCKS[name].inductor else "eager", device)


@pytest.mark.slow  # the other blocks too, with their backward passes: four times the time above
@pytest.mark.parametrize(
    "name",
    [name for name, block in BLOCKS.items() if not (block.inductor or block.compiled_by or "compile" in block.but)],
)
def test_compiled_with_its_backward_pass_equals_eager(name, device):
    check_compiled(name, "aot_eager", device)


@pytest.mark.slow  # a C++ compiler's time, where the graphs are those of the tests above; .ci/run runs both
@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.inductor])
def test_compiled_to_machine_code_equals_eager(name, device):
    check_compiled(name, "inductor", device)


def check_compiled(name: str, backend: str, device: str) -> None:
    torch.compiler.reset()
    entry, fixed = BLOCKS[name], name in FIXED_SHAPE
    one = {} if fixed or entry.inductor else {"images": 1}  # what counts its inputs is compiled anew for each image
    batch = convert(make_batch(dtype=torch.float32, scales=(2, 2), **one), device)
    block = entry.on(batch)
    # What is let off need not fall into pieces first, of which a lattice has dozens
    compiled = torch.compile(block, fullgraph=fixed or "compile" in entry.but, backend=backend)
    torch.testing.assert_close(flow(lambda b: compiled(plain(b)), batch), flow(block, batch))


def plain(batch: Batch) -> SimpleNamespace:
    """Return a batch without properties: torch 2.4 traces none of a NamedTuple."""
    return SimpleNamespace(**batch._asdict(), cam=batch.cam, classes=batch.classes)


OF_ANY_SIZE = {
    "class_prototypes": lambda s: (torch.rand(2, 5, s // 8, s // 8), torch.randint(0, 5, (2, s, s)), 4),
    "direct_loss": lambda s: (torch.rand(2, 4, s, s), torch.randint(0, 5, (2, s, s)), torch.ones(2, 4)),
    "msinf_cam": lambda s: ([torch.rand(2, 4, s, s)] * 2, torch.ones(2, 4)),
    "regional_contrastive_loss": lambda s: (
        torch.rand(2, 5, s // 8, s // 8), torch.randint(0, 5, (2, s, s)), torch.rand(5, 5)
    ),
}  # fmt: skip


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize("name", OF_ANY_SIZE)
def test_two_graphs_compiled_are_enough_for_images_of_any_size(name):
    from torch._dynamo.testing import CompileCounter  # which takes a second, in a worker that compiles

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(PUBLIC[name], backend=counter, fullgraph=True)
    for side in (24, 32, 40, 48, 56, 64):
        compiled(*OF_ANY_SIZE[name](side))
    assert counter.frame_count <= 2, "one of the first size, one of any"


def under_autocast(block: Callable[[Batch], Tensor], dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    def rounded(batch: Batch) -> Tensor:
        with torch.autocast(batch.mask.device.type, dtype):
            return block(batch)

    return rounded


HALVES = [torch.bfloat16, torch.float16]
IN_FLOAT32 = [name for name, block in BLOCKS.items() if "half" not in block.but]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_half_precision_is_computed_in_float32(name, autocast, half, device):
    check_half(name, autocast, half, device)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_autocast_changes_nothing_in_float32(name, device):
    check_autocast(name, device)


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in IN_FLOAT32])
def test_half_precision_shows_where_it_is_let_off(name, device):
    kinds = [(check_autocast,), *product([check_half], (True, False), HALVES)]
    assert not all(holds(check, name, *kind, device) for check, *kind in kinds)  # of one, rounding may come out even


def holds(check: Callable[..., None], *arguments: object) -> bool:
    try:
        check(*arguments)
    except (AssertionError, RuntimeError):
        return False
    return True


def check_half(name: str, autocast: bool, half: torch.dtype, device: str) -> None:
    rounded = convert(convert(make_batch(dtype=torch.float32), device), half)
    block = BLOCKS[name].on(rounded)
    actual = flow(under_autocast(block, half) if autocast else block, rounded)
    expected = run(name, convert(rounded, torch.float32))
    torch.testing.assert_close(actual[0], expected[0])  # the dtype too
    for gradient, reference in zip(actual[1:], expected[1:], strict=True):
        assert gradient.dtype == half
        torch.testing.assert_close(gradient, reference.to(half))


def check_autocast(name: str, device: str) -> None:
    batch = convert(make_batch(dtype=torch.float32), device)
    actual = flow(under_autocast(BLOCKS[name].on(batch), torch.bfloat16), batch)
    torch.testing.assert_close(actual, run(name, batch))


@every_block("dtype")
def test_the_dtype_of_the_inputs_is_kept(name, device):
    batch = convert(away_from_kinks(), device)
    double, single = (BLOCKS[name].on(x)(x) for x in (batch, convert(batch, torch.float32)))
    assert (double.dtype, single.dtype) in ((torch.float64, torch.float32), (torch.int64, torch.int64))
    if BLOCKS[name].make is None:  # random weights of two dtypes are not the same
        torch.testing.assert_close(single, double, check_dtype=False, rtol=1e-4, atol=1e-4)


@every_block()
def test_deterministic_algorithms_repeat_bit_for_bit(name, device):
    batch = convert(make_batch(dtype=torch.float32), device)
    with deterministic():
        first, second = run(name, batch), run(name, batch)
    assert all(map(torch.equal, first, second))


def bank_after(batch: Batch, bank: PrototypeBank | None = None) -> PrototypeBank:
    bank = bank or PrototypeBank(3, 5).to(batch.features)
    bank.update(batch.features, batch.mask)
    return bank


@every_block("no wait")
def test_no_branch_on_values(name):
    batch = make_batch(images=2, scales=(2, 2))
    block = BLOCKS[name].on(batch)
    with FakeTensorMode(allow_non_fake_inputs=BLOCKS[name].make is not None) as mode:
        value = block(map_batch(lambda x: mode.from_tensor(x).requires_grad_(x.is_floating_point()), batch))
        if value.requires_grad:
            value.sum().backward()  # whatever asks for a value raises
    assert value.shape == block(batch).shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: counts waits for the device")
@pytest.mark.parametrize("name", [*FIXED_SHAPE, "tags on the CPU"])
def test_no_wait_for_the_device(name):
    batch = convert(make_batch(dtype=torch.float32), "cuda")
    tags = batch.tags.cpu()

    def loss(b: Batch) -> Tensor:
        return multi_scale_attentive_loss(b.student, b.teacher, tags)

    block = BLOCKS[name].on(batch) if name in BLOCKS else loss
    flow(block, batch)  # what is set up once may wait
    with refuse_to_wait():
        flow(block, batch)


# Inputs

OF_ONE_SIZE = [  # axis, and the fields that have the same size along it
    (0, [field for field in Batch._fields if field not in ("prototypes", "filled")]),
    (1, ["tags", "raw", "student", "teacher"]),
]


def map_some(change: Callable[[Tensor], Tensor], value: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)


@every_block(reads=("tags",))
def test_tags_of_any_dtype_are_present_where_positive(name):
    batch = make_batch()
    block = BLOCKS[name].on(batch)
    expected = block(batch)
    for change in (torch.Tensor.bool, torch.Tensor.byte, torch.Tensor.half, lambda tags: 3 * tags - 1):
        tags = change(batch.tags)
        assert torch.equal(block(batch._replace(tags=tags)), expected), tags


@every_block(reads=("mask",))
def test_masks_of_any_integer_dtype(name):
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        batch = make_batch()
        block, void = BLOCKS[name].on(batch), -1 if dtype.is_signed else 255
        batch = batch._replace(mask=batch.mask.where((batch.mask >= 0) & (batch.mask < 128), void))
        assert torch.equal(block(batch._replace(mask=batch.mask.to(dtype))), block(batch)), dtype


@every_block("void", reads=("mask",))
def test_mask_values_out_of_range_are_void(name):
    batch = make_batch()
    void = batch._replace(mask=batch.mask.where((batch.mask >= 0) & (batch.mask <= batch.classes), 255))
    assert not torch.equal(void.mask, batch.mask)
    assert all(map(torch.equal, run(name, void), run(name, batch)))


@every_block("finite", reads=("raw", "student", "teacher"))
def test_non_finite_cams_are_no_activation(name):
    def with_(x: float) -> Batch:
        batch = make_batch()
        for cam in (batch.raw[0], batch.raw[2], batch.student[0], batch.teacher[1]):
            cam[0, 0, 1, 2] = cam[2, 1] = x
        return batch

    expected = run(name, with_(0.0))[0]
    for value in (float("nan"), float("inf"), -float("inf")):
        actual = run(name, with_(value))
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=0)
        assert all(gradient.isfinite().all() for gradient in actual[1:])


@every_block("checks")
def test_a_tensor_of_another_rank_or_device_is_refused(name, device):
    batch = convert(make_batch(dtype=torch.float32), device)
    block = BLOCKS[name].on(batch)
    expected = block(batch)
    for field in run_once(name)[1]:
        for change in (lambda x: x[None], lambda x: x.to("meta")):
            try:
                result = block(batch._replace(**{field: map_some(change, getattr(batch, field))}))
            except (TypeError, ValueError) as error:
                assert " must " in str(error)  # noqa: PT017
            else:  # the block takes nothing else, or no values of it
                assert result.is_meta or torch.equal(result, expected)


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if "checks" not in block.but])
@pytest.mark.parametrize(("axis", "fields"), OF_ONE_SIZE, ids=["images", "classes"])
def test_a_tensor_of_fewer_images_or_classes_is_refused(name, axis, fields):
    batch = make_batch(dtype=torch.float32)
    block = BLOCKS[name].on(batch)
    expected = block(batch)

    def less(fields: list[str]) -> Batch:
        return batch._replace(
            **{field: map_some(lambda x: x.narrow(axis, 0, 2), getattr(batch, field)) for field in fields}
        )

    for field in [field for field in run_once(name)[1] if field in fields]:
        try:
            result = block(less([field]))
        except (TypeError, ValueError) as error:
            assert " must " in str(error)  # noqa: PT017
        else:  # the block takes nothing else, or no values of it
            assert torch.equal(result, expected) or torch.equal(
                block(less([f for f in fields if f != field])), expected
            )


@every_block()
def test_inputs_are_left_as_they_are(name, device):
    batch = convert(make_batch(), device)
    BLOCKS[name].on(batch)(batch)
    torch.testing.assert_close(batch, convert(make_batch(), device), rtol=0, atol=0)


@every_block()
def test_memory_format_does_not_matter(name, device):
    batch = convert(make_batch(), device)

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 1 else x

    torch.testing.assert_close(run(name, map_batch(channels_last, batch)), run(name, batch))


@every_block()
def test_empty_batch(name, device):
    empty, batch = (convert(make_batch(images=images), device) for images in (0, 3))
    (value, *gradients), full = run(name, empty), BLOCKS[name].on(batch)(batch)
    assert value.dtype == full.dtype
    assert value.ndim == full.ndim
    assert not value.any()  # no number at all, the zero of a loss, or a state that is as it was
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_an_empty_or_void_batch_hangs_on_the_graph(name):
    for batch in (make_batch(images=0), make_batch()):
        batch = batch._replace(mask=batch.mask * 0 + 255, tags=batch.tags * 0, pairs=batch.pairs * 0 + 255)
        for x in tree_flatten(batch)[0]:
            x.requires_grad_(x.is_floating_point())
        loss = BLOCKS[name].on(batch)(batch)
        assert loss == 0
        assert loss.requires_grad
        loss.backward()


def test_empty_batch_leaves_the_bank():
    bank = bank_after(make_batch())
    before = copy.deepcopy(bank.state_dict())
    bank_after(make_batch(images=0), bank)
    torch.testing.assert_close(bank.state_dict(), before, rtol=0, atol=0)


def test_empty_batch_passes_a_network():
    outs = multi_scale_forward(cam_network(), torch.rand(0, 3, 16, 24))
    assert [out.cam.shape for out in outs] == 3 * [(0, 2, 16, 24)]
    assert [tuple(out.logits.shape) for out in outs] == 3 * [(0, 2)]


# The step of a user's own trainer


def cam_network() -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Conv2d(3, 8, 3, stride=4, padding=1)
    return nn.Sequential(backbone, nn.ReLU(), CAMHead(8, 2, dim=6))


def train(
    device: str, dtype: torch.dtype | None = None, steps: int = 2
) -> tuple[list[float], nn.Module, PrototypeBank]:
    student, teacher = cam_network().to(device), cam_network().to(device).eval().requires_grad_(False)
    bank = PrototypeBank(2, 6).to(device)
    region, rcl, mal = ClassRegionMask(), RegionalContrastiveLoss(), MultiScaleAttentiveLoss()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 21, 18, generator=g).to(device)
    tags = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], device=device)
    losses = []
    for _ in range(steps):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            student_out, teacher_out = multi_scale_forward(student, images), multi_scale_forward(teacher, images)
            mask = region(msinf_cam([o.cam for o in teacher_out], tags), tags)
            bank.update(teacher_out[1].features, mask)
            loss = (
                sum(functional.binary_cross_entropy_with_logits(o.logits, tags.float()) for o in student_out) / 3
                + rcl(student_out[1].features, mask, bank.prototypes, bank.filled)
                + mal([normalize_cam(o.cam) for o in student_out], [normalize_cam(o.cam) for o in teacher_out], tags)
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, student, bank


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_training_step(dtype, device):
    losses, student, bank = train(device, dtype, steps=5)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in student.parameters())
    assert all(loss < float("inf") for loss in losses)
    assert bank.filled[0]


def test_training_repeats_bit_for_bit(device):
    with deterministic():
        (first, student, bank), (second, other, _) = train(device), train(device)
    assert first == second
    assert all(map(torch.equal, student.parameters(), other.parameters()))
    assert bank.prototypes.isfinite().all()
