"""What holds for every block: compiled, in half precision, deterministic, without waiting for the device, empty."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from oracles import value_and_grads
from strategies import Batch, convert, make_batch, map_batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import pixelss
from pixelss import (
    CAMHead,
    ClassRegionMask,
    MultiScaleAttentiveLoss,
    PrototypeBank,
    RegionalContrastiveLoss,
    attentive_target,
    class_prototypes,
    class_region_mask,
    direct_loss,
    msinf_cam,
    multi_scale_attentive_loss,
    multi_scale_cross_entropy,
    multi_scale_forward,
    normalize_cam,
    regional_contrastive_loss,
    scale_dissimilarity,
)

SIGNATURES = {
    "normalize_cam": "(cam, *, eps=1e-05)",
    "msinf_cam": "(cams, tags, *, size=None)",
    "CAMOutput": "(features, cam, logits)",
    "CAMHead": "(in_channels, num_classes, *, dim=256)",
    "multi_scale_forward": "(model, images, *, scales=(0.5, 1.0, 2.0))",
    "class_region_mask": "(cam, tags, *, threshold=0.2)",
    "ClassRegionMask": "(threshold=0.2)",
    "direct_loss": "(cam, mask, tags, *, ignore_index=255)",
    "class_prototypes": "(features, mask, num_classes, *, ignore_index=255)",
    "PrototypeBank": "(num_classes, dim=256, *, ignore_index=255)",
    "regional_contrastive_loss": "(features, mask, prototypes, filled=None, *, temperature=0.5, "
    "form='infonce', reduction='mean', ignore_index=255)",
    "RegionalContrastiveLoss": "(temperature=0.5, *, form='infonce', reduction='mean', ignore_index=255)",
    "scale_dissimilarity": "(student, teacher)",
    "attentive_target": "(student, teacher, *, attentive=True)",
    "multi_scale_attentive_loss": "(student_cams, teacher_cams, tags, *, attentive=True, reduction='mean')",
    "MultiScaleAttentiveLoss": "(*, attentive=True, reduction='mean')",
    "EMATeacher": "(student, momentum=0.997)",
    "pair_offsets": "(radius=5)",
    "AffinityHead": "(in_channels=(512, 1024, 4096), *, dims=(64, 128, 256), radius=5)",
    "affinity_labels": "(low, high, *, radius=5, ignore_index=255)",
    "affinity_loss": "(affinity, labels)",
    "random_walk": "(scores, affinity, *, beta=8.0, log_steps=8, radius=5)",
    "ConfusionMatrix": "(num_classes, *, ignore_index=255)",
    "SegmentationScores": "(miou, iou, precision, recall)",
    "ThresholdSweep": "(num_classes, *, thresholds=None, ignore_index=255)",
    "SweepScores": "(thresholds, miou, precision, recall, best)",
    "resnet38": "(weights=None)",
    "load_resnet38": "(model, path)",
    "LoadReport": "(loaded, skipped, missing)",
    "dense_crf": "(images, probs, *, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0))",
    "DenseCRF": "(*, iterations=10, gaussian=(3.0, 3.0), bilateral=(80.0, 13.0, 10.0))",
    "PermutohedralLattice": "(features)",
    "label_probs": "(mask, num_classes, *, gt_prob=0.7, ignore_index=255)",
    "background_score": "(cam, *, alpha)",
    "LargeFOV": "(in_channels, num_classes, *, norm=False)",
    "multi_scale_cross_entropy": "(logits, mask, *, ignore_index=255)",
    "multi_scale_inference": "(model, images, *, scales=(0.5, 0.75, 1.0, 1.25, 1.5), flip=True, tile=1024)",
    "timm_backbone": "(name, *, output_stride=8, pretrained=False, **kwargs)",
}

BLOCKS = {
    "normalize_cam": lambda b: normalize_cam(b.raw[2]),
    "msinf_cam": lambda b: msinf_cam(b.raw, b.tags, size=(6, 5)),
    "class_region_mask": lambda b: class_region_mask(b.student[0], b.tags),
    "direct_loss": lambda b: direct_loss(b.student[0], b.mask, b.tags),
    "class_prototypes": lambda b: class_prototypes(b.features, b.mask, len(b.filled) - 1)[0],
    "infonce": lambda b: regional_contrastive_loss(b.features, b.mask, b.prototypes, filled=b.filled),
    "ratio": lambda b: regional_contrastive_loss(b.features, b.mask, b.prototypes, filled=b.filled, form="ratio"),
    "scale_dissimilarity": lambda b: scale_dissimilarity(
        *(torch.stack(x).flatten(1, 2) for x in (b.student, b.teacher))
    ),
    "attentive_target": lambda b: attentive_target(*(torch.stack(x).flatten(1, 2) for x in (b.student, b.teacher))),
    "multi_scale_attentive_loss": lambda b: multi_scale_attentive_loss(b.student, b.teacher, b.tags),
    "multi_scale_cross_entropy": lambda b: multi_scale_cross_entropy(b.raw, b.mask),
}
LOSSES = ("direct_loss", "infonce", "ratio", "multi_scale_attentive_loss", "multi_scale_cross_entropy")
# The attentive loss gathers the present pairs: how many there are decides a shape.
FIXED_SHAPE = [name for name in BLOCKS if name != "multi_scale_attentive_loss"]

every_block = pytest.mark.parametrize("name", BLOCKS)


def run(block: Callable[[Batch], Tensor], batch: Batch) -> list[Tensor]:
    """Return the value of a block and its gradients with respect to each floating tensor of the batch."""
    flat = [*batch[:5], *batch.raw, *batch.student, *batch.teacher]
    return value_and_grads(lambda *x: block(Batch(*x[:5], x[5:8], x[8:11], x[11:14])), *flat)


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
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_contract(name):
    signature = inspect.signature(getattr(pixelss, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == SIGNATURES[name]


# inductor takes seconds a block: the three that a training step compiles, and the target
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in BLOCKS)]
    + [(name, "inductor") for name in ("class_region_mask", "class_prototypes", "infonce", "attentive_target")],
)
def test_compiled_equals_eager(name, backend, device):
    torch.compiler.reset()
    batch = convert(make_batch(dtype=torch.float32), device)
    compiled = torch.compile(BLOCKS[name], fullgraph=name in FIXED_SHAPE, backend=backend)
    torch.testing.assert_close(run(compiled, batch), run(BLOCKS[name], batch))


def under_autocast(name: str, dtype: torch.dtype) -> Callable[[Batch], Tensor]:
    def block(batch: Batch) -> Tensor:
        with torch.autocast(batch.mask.device.type, dtype):
            return BLOCKS[name](batch)

    return block


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@every_block
def test_half_precision_is_computed_in_float32(name, autocast, half, device):
    rounded = convert(make_batch(dtype=torch.float32), device)
    rounded = convert(rounded, half)
    actual = run(under_autocast(name, half) if autocast else BLOCKS[name], rounded)
    expected = run(BLOCKS[name], convert(rounded, torch.float32))
    torch.testing.assert_close(actual[0], expected[0])  # the dtype too
    for gradient, reference in zip(actual[1:], expected[1:], strict=True):
        assert gradient.dtype == half
        torch.testing.assert_close(gradient, reference.to(half))


@every_block
def test_autocast_changes_nothing_in_float32(name, device):
    batch = convert(make_batch(dtype=torch.float32), device)
    actual = run(under_autocast(name, torch.bfloat16), batch)
    torch.testing.assert_close(actual, run(BLOCKS[name], batch))


@every_block
def test_deterministic_algorithms_repeat_bit_for_bit(name, device):
    batch = convert(make_batch(dtype=torch.float32), device)
    with deterministic():
        first, second = run(BLOCKS[name], batch), run(BLOCKS[name], batch)
    assert all(map(torch.equal, first, second))


def bank_after(batch: Batch, bank: PrototypeBank | None = None) -> PrototypeBank:
    bank = bank or PrototypeBank(3, 5).to(batch.features)
    bank.update(batch.features, batch.mask)
    return bank


@pytest.mark.parametrize("name", FIXED_SHAPE)
def test_no_branch_on_values(name):
    with FakeTensorMode():  # tensors without values: whatever asks for one raises
        fakes = run(BLOCKS[name], make_batch())
    assert [x.shape for x in fakes] == [x.shape for x in run(BLOCKS[name], make_batch())]


def test_bank_does_not_branch_on_values():
    with FakeTensorMode():
        bank_after(make_batch())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: counts waits for the device")
@pytest.mark.parametrize("name", [*FIXED_SHAPE, "bank", "tags on the CPU"])
def test_no_wait_for_the_device(name):
    batch = convert(make_batch(dtype=torch.float32), "cuda")
    tags = batch.tags.cpu()
    if name == "bank":
        bank = bank_after(batch)
        with refuse_to_wait():
            bank_after(batch, bank)
        return
    block = BLOCKS.get(name, lambda b: multi_scale_attentive_loss(b.student, b.teacher, tags))
    run(block, batch)  # what is set up once may wait
    with refuse_to_wait():
        run(block, batch)


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.bool, torch.Tensor.byte, torch.Tensor.half, lambda tags: 3 * tags - 1],
    ids=["bool", "uint8", "float16", "signed"],
)
@every_block
def test_tags_of_any_dtype_are_present_where_positive(name, change):
    batch = make_batch()
    changed = batch._replace(tags=change(batch.tags))
    assert torch.equal(BLOCKS[name](changed), BLOCKS[name](batch))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@every_block
def test_masks_of_any_integer_dtype(name, dtype):
    batch = make_batch()
    void = -1 if dtype.is_signed else 255
    batch = batch._replace(mask=batch.mask.where((batch.mask >= 0) & (batch.mask < 128), void))
    assert torch.equal(BLOCKS[name](batch._replace(mask=batch.mask.to(dtype))), BLOCKS[name](batch))


@every_block
def test_inputs_are_left_as_they_are(name, device):
    batch = convert(make_batch(), device)
    BLOCKS[name](batch)
    torch.testing.assert_close(batch, convert(make_batch(), device), rtol=0, atol=0)


@every_block
def test_memory_format_does_not_matter(name, device):
    batch = convert(make_batch(), device)

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 1 else x

    other = map_batch(channels_last, batch)
    torch.testing.assert_close(run(BLOCKS[name], other), run(BLOCKS[name], batch))


@every_block
def test_empty_batch(name, device):
    value, *gradients = run(BLOCKS[name], convert(make_batch(images=0), device))
    full = BLOCKS[name](convert(make_batch(), device))
    assert value.dtype == full.dtype
    assert value.ndim == full.ndim
    if name in LOSSES:
        assert value == 0
    else:
        assert value.numel() == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_an_empty_or_void_batch_hangs_on_the_graph(name):
    for batch in (make_batch(images=0), make_batch()):
        batch = batch._replace(mask=batch.mask * 0 + 255, tags=batch.tags * 0)
        for x in (batch.features, batch.prototypes, *batch.raw, *batch.student):
            x.requires_grad_()
        loss = BLOCKS[name](batch)
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
