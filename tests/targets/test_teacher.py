"""The EMA teacher against a loop over tensors, under every wrapper, and through what users do to modules."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pixelss.targets.teacher import EMATeacher
from tests.blocks import Block
from tests.distributed import run_processes

SIGNATURES = {
    "EMATeacher": "(student, momentum=0.997)",
}

BLOCKS = {
    "EMATeacher": Block(
        lambda b, teacher: teacher(b.features),
        make=lambda b: EMATeacher(nn.Conv2d(b.features.shape[1], 2, 1)),
        but={
            "half": "its network runs in the user's precision",
            "gradient": "a teacher carries none",
            "checks": "its network checks",
        },
    ),
}


class Block(nn.Module):
    """A child called "module", batch norm, dropout, a tied weight, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(3, 4)
        self.out.weight = self.module.weight
        self.register_buffer("scale", torch.rand(2), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("filled", torch.tensor([True, False]))
        self.register_buffer("unused", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.module(x))) + self.out(x)


def make_student(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), nn.Linear(4, 2))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def change(student: nn.Module, seed: int) -> None:
    """Give every tensor of a plain student other values, as training does."""
    other = make_student(seed)
    with torch.no_grad():
        for ours, theirs in zip(tensors(student).values(), tensors(other).values(), strict=True):
            ours.copy_(~ours if ours.dtype == torch.bool else theirs + 1)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a plain module, persistent or not."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def average(before: dict[str, Tensor], student: dict[str, Tensor], momentum: float) -> dict[str, Tensor]:
    """One update by the definition, a number at a time."""
    result = {}
    for name, theirs in student.items():
        if theirs.is_floating_point():
            pairs = zip(before[name].flatten().tolist(), theirs.flatten().tolist(), strict=True)
            mixed = [momentum * g + (1 - momentum) * f for g, f in pairs]
            result[name] = torch.tensor(mixed, dtype=before[name].dtype).view(theirs.shape)
        else:
            result[name] = theirs
    return result


def assert_same(actual: object, expected: object, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The average


@given(st.floats(0, 1, allow_subnormal=False), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_update_equals_the_loop_and_stays_between(momentum: float, seeds: list[int]) -> None:
    student = make_student()
    teacher = EMATeacher(student, momentum)
    for seed in seeds:
        before = snapshot(teacher.module)
        change(student, seed)
        teacher.update(student)
        after, target = snapshot(teacher.module), snapshot(student)
        assert_same(after, average(before, target, momentum), 1e-6)
        for name in after:
            if after[name].is_floating_point():
                low, high = torch.minimum(before[name], target[name]), torch.maximum(before[name], target[name])
                assert ((low - 1e-6 <= after[name]) & (after[name] <= high + 1e-6)).all(), name


@given(st.integers(0, 99))
def test_momentum_0_copies_and_1_keeps_exactly(seed: int) -> None:
    student = make_student()
    teacher = EMATeacher(student, momentum=1.0)
    start = snapshot(student)
    change(student, seed)
    teacher.update(student)
    floating = {name for name, tensor in start.items() if tensor.is_floating_point()}
    after = snapshot(teacher.module)
    assert_same({name: after[name] for name in floating}, {name: start[name] for name in floating})
    teacher.update(student, momentum=0.0)
    assert_same(snapshot(teacher.module), snapshot(student))
    assert teacher.momentum == 1.0


def test_momentum_1_keeps_and_0_heals_where_a_side_is_not_finite() -> None:
    student = nn.Linear(2, 2)
    teacher = EMATeacher(nn.Sequential(student), momentum=1.0)
    start = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        student.weight.fill_(math.nan)
    teacher.update(nn.Sequential(student))
    assert_same(teacher.state_dict(), start)
    teacher.update(nn.Sequential(student), momentum=0.5)
    assert teacher.module[0].weight.isnan().all()
    with torch.no_grad():
        student.weight.fill_(1.0)
    teacher.update(nn.Sequential(student), momentum=0.0)
    assert torch.equal(teacher.module[0].weight, student.weight)


def test_update_leaves_the_student_and_keeps_the_teachers_tensors() -> None:
    student = make_student()
    teacher = EMATeacher(student, 0.5)
    before, identity = snapshot(student), {name: t.data_ptr() for name, t in tensors(teacher).items()}
    view = teacher.module[1].weight.view(-1)
    teacher.update(student)
    change(student, 1)
    mine = snapshot(student)
    teacher.update(student)
    assert_same(snapshot(student), mine)
    assert {name: t.data_ptr() for name, t in tensors(teacher).items()} == identity
    assert_same(view, teacher.module[1].weight.view(-1))
    assert not torch.equal(view, before["1.weight"].view(-1))


def test_tied_weight_is_averaged_once_and_stays_tied() -> None:
    student = make_student()
    teacher = EMATeacher(student, 0.5)
    before = snapshot(teacher.module)
    change(student, 1)
    teacher.update(student)
    block = teacher.module[0]
    assert block.out.weight is block.module.weight
    assert_same(block.out.weight.detach(), (before["0.module.weight"] + student[0].out.weight.detach()) / 2, 1e-6)


def test_tied_modules() -> None:
    layer = nn.Linear(2, 2)
    teacher = EMATeacher(nn.Sequential(layer, layer), 0.5)
    other = nn.Linear(2, 2)
    expected = (layer.weight + other.weight) / 2
    teacher.update(nn.Sequential(other, other))
    assert teacher.module[0] is teacher.module[1]
    assert_same(teacher.module[1].weight, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_student_of_another_dtype_is_cast(dtype: torch.dtype) -> None:
    student = make_student().to(dtype)
    teacher = EMATeacher(student).float()
    before = snapshot(teacher.module)
    change(student, 1)
    teacher.update(student)
    target = {n: t.float() if t.is_floating_point() else t for n, t in snapshot(student).items()}
    assert_same(snapshot(teacher.module), average(before, target, 0.997), 1e-6)


# Eval mode and gradients


def test_output_is_that_of_the_student_in_eval_mode_without_gradient() -> None:
    student, x = make_student().train(), torch.rand(5, 3, requires_grad=True)
    teacher = EMATeacher(student)
    output = teacher(x)
    assert not output.requires_grad
    assert student.training
    assert all(module.training for module in student.modules())
    assert_same(output, student.eval()(x).detach())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_train_never_leaves_eval_mode() -> None:
    teacher = EMATeacher(make_student())
    parent = nn.ModuleDict({"teacher": teacher, "head": nn.Linear(1, 1)})
    assert teacher.train() is teacher
    assert teacher.eval() is teacher
    parent.train()
    assert parent["head"].training
    assert not any(module.training for module in teacher.modules())


def test_arguments_pass_through() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, *, by: float) -> tuple[Tensor, float]:
            return x * by, by

    assert EMATeacher(Scale())(torch.tensor(2.0), by=3.0) == (torch.tensor(6.0), 3.0)


# Wrappers


def wrap_backbone(student: nn.Sequential, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(student[0]), student[1])


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "plain": lambda student: student,
    "compile": compiled,
    "data parallel": DataParallel,
    "compile of data parallel": lambda student: compiled(DataParallel(student)),
    "data parallel of compile": lambda student: DataParallel(compiled(student)),
    "compiled backbone": lambda student: wrap_backbone(student, compiled),
    "data parallel of compiled backbone": lambda student: DataParallel(wrap_backbone(student, compiled)),
    "compile twice": lambda student: compiled(wrap_backbone(student, compiled)),
}


def check_wrapped(student: nn.Sequential, wrapped: nn.Module) -> None:
    """A teacher built from, and updated with, the plain or the wrapped student has the plain names and values."""
    reference = EMATeacher(student, 0.5)
    teachers = [EMATeacher(wrapped, 0.5), copy.deepcopy(reference)]
    change(student, 1)
    reference.update(student)
    for teacher in teachers:
        teacher.update(wrapped)
        assert list(teacher.state_dict()) == [f"module.{name}" for name in student.state_dict()]
        assert_same(snapshot(teacher), snapshot(reference))
        teacher.update(student, momentum=0.0)
        assert_same(snapshot(teacher.module), snapshot(student))
        assert [type(m) for m in teacher.module.modules()] == [type(m) for m in student.modules()]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap: Callable[[nn.Sequential], nn.Module]) -> None:
    student = make_student()
    check_wrapped(student, wrap(student))


def test_compiled_module_beside_its_own_original() -> None:
    layer = nn.Linear(2, 2)
    student = nn.Sequential(compiled(layer), layer)
    teacher = EMATeacher(student, 0.0)
    assert teacher.module[0] is teacher.module[1]
    with torch.no_grad():
        layer.weight.add_(1)
    teacher.update(student)
    assert_same(teacher.module[1].weight.detach(), layer.weight.detach())


def check_distributed(rank: int) -> Tensor:
    ddp = DistributedDataParallel
    wrappers: list[Callable[[nn.Sequential], nn.Module]] = [
        ddp,
        lambda student: compiled(ddp(student)),
        lambda student: ddp(compiled(student)),
        lambda student: wrap_backbone(student, ddp),
    ]
    for wrap in wrappers:
        student = make_student()
        check_wrapped(student, wrap(student))

    student = make_student()
    wrapped = ddp(student)
    teacher = EMATeacher(wrapped, 0.9)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for _ in range(2):
        wrapped(torch.rand(2 + rank, 3)).square().mean().backward()
        optimizer.step()
        teacher.update(wrapped)
    return torch.cat([p.flatten() for p in teacher.parameters()])


@pytest.mark.processes
def test_distributed_data_parallel() -> None:
    """Two processes that see different data keep the same teacher."""
    first, second = run_processes(check_distributed, 2)
    assert_same(first, second)
    assert not torch.allclose(first, torch.cat([p.detach().flatten() for p in make_student().parameters()]))


def test_compiled_teacher_follows_updates() -> None:
    student, x = make_student(), torch.rand(5, 3)
    teacher = EMATeacher(student, 0.5)
    fast = torch.compile(teacher, backend="eager", fullgraph=True)
    assert_same(fast(x), teacher(x))
    before = fast(x)
    change(student, 1)
    fast.update(student)
    assert_same(fast(x), teacher(x))
    assert not torch.allclose(fast(x), before)


# State


def test_state_dict_round_trip() -> None:
    """A resumed teacher goes on as the first one does; keys lie under "module."."""
    student = make_student()
    teacher, resumed = EMATeacher(student), EMATeacher(make_student(7))
    change(student, 1)
    teacher.update(student)
    resumed.load_state_dict(teacher.state_dict())
    assert list(teacher.state_dict()) == [f"module.{name}" for name in student.state_dict()]
    change(student, 2)
    for each in (teacher, resumed):
        each.update(student)
    assert_same(resumed.state_dict(), teacher.state_dict())


def test_student_weights_loaded_after_construction_are_taken_over() -> None:
    student, checkpoint = make_student(), make_student(5).state_dict()
    teacher = EMATeacher(student)
    student.load_state_dict(checkpoint)
    teacher.update(student, momentum=0)
    assert_same(dict(teacher.module.state_dict()), dict(checkpoint))


def test_copies_move_on_their_own() -> None:
    student, x = make_student(), torch.rand(5, 3)
    teacher = EMATeacher(student, 0.5)
    file = io.BytesIO()
    torch.save(teacher, file)
    file.seek(0)
    copies = [copy.deepcopy(teacher), torch.load(file, weights_only=False)]
    before = teacher(x)
    change(student, 1)
    teacher.update(student)
    for other in copies:
        assert_same(other(x), before)
        other.update(student)
        assert_same(other(x), teacher(x))
        assert not other.train().module.training


def test_teacher_moves_with_to(device: str) -> None:
    student = make_student().to(device)
    teacher = EMATeacher(make_student()).to(device)
    teacher.update(student, momentum=0.0)
    assert_same(snapshot(teacher.module), snapshot(student))


def test_student_without_tensors() -> None:
    teacher = EMATeacher(nn.ReLU())
    teacher.update(nn.ReLU())
    assert teacher(torch.tensor(-1.0)) == 0


# Errors


def check_refused(teacher: EMATeacher, student: nn.Module, match: str) -> None:
    before = snapshot(teacher)
    with pytest.raises(ValueError, match=match):
        teacher.update(student)
    assert_same(snapshot(teacher), before)


def test_another_students_names_are_refused() -> None:
    teacher = EMATeacher(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.0)
    check_refused(teacher, nn.Sequential(nn.Linear(2, 2)), r"student lacks \['1.bias', '1.weight'\] \(2\)")
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    check_refused(teacher, many, r"teacher lacks \['2.bias', '2.weight', '3.bias'\] \(14\)")


def test_a_module_called_module_is_no_wrapper() -> None:
    inner = nn.Linear(2, 2)
    check_refused(EMATeacher(inner), nn.ModuleDict({"module": inner}), r"student lacks \['bias', 'weight'\]")


def test_another_students_shape_is_refused_before_anything_changes() -> None:
    teacher = EMATeacher(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.0)
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    check_refused(teacher, student, r"1.weight must have the teacher's shape \(2, 2\), but has shape \(1, 2\)")


def test_another_device_is_refused() -> None:
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student)
    message = r"weight must lie on .* cpu, but lies on meta.* Build the teacher when the student has values"
    check_refused(teacher, student.to("meta"), message)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
def test_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
        EMATeacher(nn.Linear(1, 1), momentum)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
        EMATeacher(nn.Linear(1, 1)).update(nn.Linear(1, 1), momentum=momentum)


def test_what_is_no_module_is_refused() -> None:
    student = nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"student must be a torch.nn.Module, but is a OrderedDict"):
        EMATeacher(student.state_dict())
    with pytest.raises(TypeError, match=r"student must be a torch.nn.Module, but is a generator"):
        EMATeacher(student).update(student.parameters())


def test_repr_shows_the_momentum() -> None:
    assert "momentum=0.997" in repr(EMATeacher(nn.Linear(1, 1)))


class Deaf(nn.Module):
    """A network whose `train` neither recurses nor returns itself, as one public network's does."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


def test_eval_mode_does_not_depend_on_the_students_own_train() -> None:
    teacher = EMATeacher(Deaf())
    assert teacher.train() is teacher
    assert torch.equal(teacher(torch.ones(100)), torch.ones(100))


def test_nothing_has_changed_where_update_raises() -> None:
    student = nn.Sequential(nn.Linear(2, 2))
    student.register_buffer("steps", torch.zeros(1, dtype=torch.long))
    teacher = EMATeacher(student)
    teacher.module.to(torch.float8_e4m3fn)
    student.steps.fill_(7)
    with pytest.raises(ValueError, match=r"0\.weight must be of a dtype that can be averaged.* teacher\.float\(\)"):
        teacher.update(student)
    assert teacher.module.steps == 0


def test_a_buffer_that_shares_memory_with_itself() -> None:
    student = nn.Sequential(nn.Linear(2, 2))
    student.register_buffer("ids", torch.zeros(1, dtype=torch.long).expand(4))
    teacher = EMATeacher(student)
    student.ids = torch.arange(4)
    teacher.update(student)
    assert teacher.module.ids.tolist() == [0, 1, 2, 3]


def test_a_teacher_without_values_is_told_from_a_teacher_elsewhere() -> None:
    with torch.device("meta"):
        student = nn.Linear(2, 2)
    teacher = EMATeacher(student)
    check_refused(teacher, student.to_empty(device="cpu"), "Build the teacher when the student has values")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_part_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"plain modules, but 0 is scripted.* Build the teacher from the plain network"):
        EMATeacher(nn.Sequential(torch.jit.script(nn.Linear(2, 2))))


def check_sharded(rank: int) -> list[Tensor]:
    """A sharded student's teacher against a whole one's, by FSDP2 and by tensor parallelism; and the refusals."""
    # Whose import takes a second
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))

    def sharded_data_parallel(network: nn.Module) -> None:
        fully_shard(network, mesh=mesh)

    def tensor_parallel(network: nn.Module) -> None:
        parallelize_module(network, mesh, {"0": ColwiseParallel()})

    results = []
    for shard in (sharded_data_parallel, tensor_parallel):
        torch.manual_seed(0)
        student, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.rand(3, 4)
        whole = copy.deepcopy(student)
        teacher, reference = EMATeacher(student), EMATeacher(whole)
        shard(student)
        with pytest.raises(ValueError, match=r"0\.weight must be sharded as the teacher's, whole, but is"):
            teacher.update(student)
        with pytest.raises(ValueError, match=r"student must be whole .* 0\.weight is sharded.* same mesh"):
            EMATeacher(student)
        shard(teacher.module)
        for network, ema in ((student, teacher), (whole, reference)):
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            for _ in range(2):
                ema(x)  # gathers the teacher's shards
                network(x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                ema.update(network, momentum=0.5)
        results += [teacher(x), reference(x)]
    return results


@pytest.mark.processes
@pytest.mark.skipif(torch.__version__ < (2, 6), reason="needs a torch with fully_shard (2.6)")
def test_sharded_alike() -> None:
    for rank, (sharded, whole, parallel, same) in enumerate(run_processes(check_sharded, 2)):
        torch.testing.assert_close(sharded, whole)
        torch.testing.assert_close(parallel, same.chunk(2, 1)[rank])  # its own columns
