"""The step: what a graph may contain, on any machine; on a GPU, that graphs change no number."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simsiam import kernels, methods
from simsiam.compute import Compute
from simsiam.data.loader import Batch
from simsiam.data.views import ViewSettings
from simsiam.encoders import ResNet
from simsiam.step import Captured, Step
from test_methods import BATCH, SIZE, begin, make, optimiser

pytestmark = pytest.mark.usefixtures("one_thread")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
CPU = torch.device("cpu")
WAITS = ("_local_scalar_dense", "nonzero", "item", "equal.default", "masked_select", "unique")
"""Operations that copy a value from the device to Python, or whose output size depends on values."""


class Operations(TorchDispatchMode):
    """Records every operation with its arguments: shapes of tensors, values of numbers, which a graph would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.sent = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        given = [tuple(each.shape) if isinstance(each, Tensor) else each for each in leaves]
        self.seen.append(f"{function} {[each for each in given if not isinstance(each, torch.Generator)]}")
        # x[index] = True: the value comes from Python.
        self.sent |= "index_put" in str(function) and args[2].ndim == 0
        return function(*args, **(kwargs or {}))


def views(name: str) -> list[ViewSettings]:
    return ViewSettings(size=SIZE, count=methods.get(name).VIEWS[0], solarize_p=0.2).each()


def batch(number: int, device: torch.device = CPU, side: int = SIZE) -> Batch:
    draws = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=draws)
    return Batch(images.to(device), None, ((torch.arange(BATCH) + number * BATCH) % 64).to(device))


def started(
    name: str, device: torch.device = CPU, settings: dict[str, Any] | None = None, **ways: Any
) -> tuple[nn.Module, Step]:
    ways.setdefault("say", pytest.fail)  # without a graph a step runs as it is, and every comparison below would hold
    method = make(name, **(settings or {})).train()
    begin(name, method)
    compute = Compute(device, "fp32")
    compute.place(method)
    step = Step(method, optimiser(method), views(name), compute, **ways)
    method.before_epoch(0)
    return method, step


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in methods.names()),
    ("simsiam", {"predictor": False, "target_momentum": 0.8}),
    ("simsiam", {"target_steps": 2}),
    ("simsiam", {"target_steps": 0}),
    ("simsiam", {"stop_gradient": False, "similarity": "softmax", "symmetric": False}),
    ("swav", {"stop_gradient": False, "queue": 0, "predictor": True}),
    ("simclr", {"predictor": True, "stop_gradient": True}),
]
every_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}-{len(more)}" for name, more in CASES])


@pytest.fixture
def by_torch() -> Iterator[None]:
    """By torch's operations, as on a GPU: what our kernels for a CPU do is not recorded."""
    with kernels.off():
        yield


@pytest.mark.usefixtures("by_torch")
@every_case
def test_what_is_captured_once_holds_for_every_step(name: str, settings: dict[str, Any]) -> None:
    """A graph repeats the kernels of one step on the memory of that step. So every step of a `fixed` method must do the
    same operations, without waiting for the device, on buffers that do not move."""
    method, step = started(name, settings=settings)
    for number in range(4):  # while SwAV's queue fills
        step(batch(number), 0, number)
        method.after_step(number / 10)
    method.before_epoch(1)
    step(batch(4), 0, 4)
    if not method.fixed:
        pytest.skip("its steps are launched kernel by kernel")
    places = [value.data_ptr() for value in method.state_dict().values()]
    records = []
    for number in range(5, 8):
        drawn, index = step.views(batch(number), 0, number), batch(number).index
        with Operations() as operations:
            step._differentiate(*drawn, index)
        records.append(operations.seen)
        assert not operations.sent
        step.optimizer.step()  # type: ignore[union-attr]
        method.after_step(number / 10)
    assert records[0] == records[1] == records[2]
    assert not [each for each in records[0] if each.split()[0].removeprefix("aten.").startswith(WAITS)]
    assert places == [value.data_ptr() for value in method.state_dict().values()]


def test_a_number_that_changes_is_seen() -> None:
    """For example a temperature that follows a schedule in Python: a graph would keep its first value."""
    records = []
    for temperature in (0.1, 0.2):
        with Operations() as operations:
            torch.ones(2) / temperature
        records.append(operations.seen)
    assert records[0] != records[1]


def test_swavs_step_is_not_fixed_before_its_queue_is_in_use() -> None:
    method, step = started("swav")
    assert not method.fixed
    for number in range(4):
        step(batch(number), 0, number)
        assert not method.fixed
    method.before_epoch(1)
    step(batch(4), 0, 4)
    assert method.fixed
    assert make("swav", queue=0).fixed


@pytest.mark.usefixtures("by_torch")
def test_views_wait_for_nothing() -> None:
    """On a GPU, where small and large images take the same path."""
    _, step = started("simsiam")
    records = []
    for number in range(3):
        images = batch(number)
        with Operations() as operations:
            step.views(images, 0, number)
        records.append(operations.seen)
    assert records[1] == records[2]  # the first step also creates constants
    assert not [each for each in records[0] if each.split()[0].removeprefix("aten.").startswith(WAITS)]


def test_a_step_has_the_gradients_of_its_own_batch_and_views() -> None:
    found = []
    for numbers in ((1,), (0, 1), (1, 2)):
        method, step = started("simsiam")
        step.optimizer = None
        for number in numbers:
            step(batch(number), 0, number)
        found.append([parameter.grad for parameter in method.parameters()])
    alone, after_another, another = found
    assert all(torch.equal(a, b) for a, b in zip(alone, after_another, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, another, strict=True))


def test_compiling_changes_rounding_only_and_leaves_the_encoder_as_it_was() -> None:
    """BYOL has two encoders. Their backbone has one block, because torch takes about a second to compile a layer."""
    found, buffers = [], []
    torch._dynamo.utils.counters.clear()
    for compiles in (False, True):
        method, step = started("byol", compiles=compiles)
        step.optimizer = None
        for encoder in step.encoders:
            torch.manual_seed(0)
            encoder.backbone = ResNet((1, 1, 1, 1), encoder.dim, 2, zero_init_residual=False)
            for stage in (encoder.backbone.layer2, encoder.backbone.layer3, encoder.backbone.layer4):
                del stage[0]
        method.double()
        loss, _ = step.update([view.double() for view in step.views(batch(0), 0, 0)], batch(0).index)
        gradients = {key: value.grad.clone() for key, value in method.named_parameters() if value.grad is not None}
        found.append((loss, gradients))
        assert not any("together" in vars(module) for module in method.modules())
        buffers.append([value.clone() for value in method.buffers()])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for one, other in zip(*buffers, strict=True):  # BN has seen two views, one after the other
        torch.testing.assert_close(one, other)
    (plain_loss, plain), (fused_loss, fused) = found
    torch.testing.assert_close(fused_loss, plain_loss)
    assert plain.keys() == fused.keys()
    difference = sum((fused[key] - value).square().sum() for key, value in plain.items())
    assert difference < 1e-20 * sum(value.square().sum() for value in plain.values())


class Graph:
    """Stands in for a CUDA graph without a GPU: `replay` calls the function on the captured memory."""

    def __init__(self) -> None:
        self.registered: list[torch.Generator] = []
        self.captured: Captured | None = None

    def register_generator_state(self, draws: torch.Generator) -> None:
        self.registered.append(draws)

    def replay(self) -> None:
        assert self.captured is not None
        results = self.captured._function(*self.captured._inputs)
        for own, new in zip(self.captured._outputs, results, strict=True):
            own.copy_(new)


class Graphs(list[Graph]):
    """The graphs that were made. Capturing runs nothing, so any changes it makes here are undone, also in `methods`."""

    methods: list[nn.Module]
    freed: list[str]
    """States restored to generators that waited for the end of a capture."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Replace the parts of torch.cuda that `Captured` uses."""
    made = Graphs()
    made.methods, made.freed = [], []

    @contextlib.contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    def graph() -> Graph:
        made.append(Graph())
        return made[-1]

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    waiting = types.SimpleNamespace(
        clone_state=lambda: "as it was", graphsafe_set_state=made.freed.append, manual_seed=lambda seed: None
    )
    monkeypatch.setattr(torch.cuda, "default_generators", (waiting,))
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    capture = Captured._capture

    def known(captured: Captured, inputs: tuple[Tensor, ...]) -> None:
        tensors = [value for method in made.methods for value in method.state_dict().values()]
        before = [value.clone() for value in tensors]
        generators = [torch.default_generator, *([captured._draws] if captured._draws else [])]
        states = [each.get_state() for each in generators]
        capture(captured, inputs)
        made[-1].captured = captured
        for value, old in zip(tensors, before, strict=True):
            value.copy_(old)
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)

    monkeypatch.setattr(Captured, "_capture", known)
    return made


def test_a_graph_is_made_once_and_reads_what_it_is_given(cuda: Graphs) -> None:
    calls = []

    def double(x: Tensor) -> tuple[Tensor]:
        calls.append(x.data_ptr())
        return (2 * x,)

    draws = torch.Generator()
    captured = Captured(double, draws=draws)
    results = []
    for number in range(7):
        given = torch.full((3,), float(number))
        results.append(captured(given)[0].clone())
    assert [float(each[0]) for each in results] == [0, 2, 4, 6, 8, 10, 12]
    assert len(cuda) == 1 and cuda[0].registered == [draws]
    assert len(set(calls[4:])) == 1  # always in the same memory
    assert captured.takes(torch.ones(3)) and not captured.takes(torch.ones(4))


def test_where_no_graph_can_be_made_it_is_said_once(cuda: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = []

    @contextlib.contextmanager
    def refused(*_: Any, **__: Any) -> Iterator[None]:
        capturing.append(True)
        try:
            yield
        finally:
            capturing.clear()

    def looks_at_values(x: Tensor) -> tuple[Tensor]:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        return (2 * x,)

    monkeypatch.setattr(torch.cuda, "graph", refused)
    told: list[str] = []
    captured = Captured(looks_at_values, told.append)
    assert [float(captured(torch.tensor(float(number)))[0]) for number in range(8)] == [2.0 * n for n in range(8)]
    assert len(told) == 1 and len(cuda) == 1 and "not permitted when stream is capturing)" in told[0]
    assert cuda.freed == ["as it was"]


def test_too_little_memory_for_a_graph_is_no_reason_to_go_on(cuda: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def full(*_: Any, **__: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(torch.cuda, "graph", full)
    captured = Captured(lambda x: (x,))
    for _ in range(3):
        captured(torch.ones(1))
    with pytest.raises(torch.OutOfMemoryError):
        captured(torch.ones(1))
    assert cuda.freed == ["as it was"]  # if the run continues with less memory, it can draw again


@every_case
def test_a_step_of_graphs_takes_the_same_steps(name: str, settings: dict[str, Any], cuda: Graphs) -> None:
    """Everything around the graphs, with simulated graphs: bit-identical losses and weights."""
    runs = []
    for captures in (False, True):
        method, step = started(name, settings=settings, captures=captures)
        cuda.methods[:] = [method]
        losses = []
        for number in range(8):
            if number == 5:
                method.before_epoch(1)
            losses.append(step(batch(number), 0, number)[0])
            method.after_step(number / 10)
        runs.append((losses, method.state_dict()))
    assert cuda
    assert [float(each) for each in runs[0][0]] == [float(each) for each in runs[1][0]]
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


@gpu
@every_case
def test_graphs_give_the_numbers_of_single_kernels(name: str, settings: dict[str, Any]) -> None:
    """Losses and weights, with new views and images in each step; the first steps run without graphs."""
    device = torch.device("cuda")
    runs = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        for captures in (False, True):
            method, step = started(name, device, settings, captures=captures)
            losses = []
            for number in range(10):
                if number == 5:
                    method.before_epoch(1)
                losses.append(step(batch(number, device), 0, number)[0])
                method.after_step(number / 10)
            runs.append((torch.stack(losses), method.state_dict()))
    (one_by_one, weights), (at_once, others) = runs
    assert len(set(at_once.tolist())) == 10
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@gpu
def test_a_captured_view_is_the_view() -> None:
    device = torch.device("cuda")
    (_, single), (_, graphs) = (started("simsiam", device, captures=captures) for captures in (False, True))
    for number in range(6):
        for one, other in zip(
            single.views(batch(number, device), 0, number), graphs.views(batch(number, device), 0, number), strict=True
        ):
            assert torch.equal(one, other), number


@gpu
def test_dropout_in_a_graph_is_a_function_of_the_key() -> None:
    device = torch.device("cuda")
    losses = []
    for _ in range(2):
        method, step = started("simsiam", device, captures=True)
        method.projector.insert(0, nn.Dropout(0.5))  # type: ignore[operator]
        step.optimizer = None
        losses.append([float(step(batch(0, device), 0, key)[0]) for key in (0, 1, 2, 3, 4, 5, 4)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][4] == pytest.approx(losses[0][6], abs=1e-6) and losses[0][4] != pytest.approx(
        losses[0][5], abs=1e-4
    )


@gpu
def test_batches_of_other_shapes_are_taken_too() -> None:
    device = torch.device("cuda")
    _, step = started("simsiam", device, captures=True)
    for number in range(12):
        loss, _ = step(batch(number, device, SIZE + 8 * (number % 3 == 2)), 0, number)
        assert torch.isfinite(loss)


@gpu
@pytest.mark.parametrize("name", ["simsiam", "moco"])  # MoCo draws in its forward pass
def test_what_cannot_be_captured_runs_as_it_is(name: str) -> None:
    device = torch.device("cuda")
    told: list[str] = []
    method, step = started(name, device, captures=True, say=told.append)
    method.encoder.register_forward_hook(lambda *_: float(torch.ones((), device=device)) and None)  # type: ignore[union-attr]
    losses = [float(step(batch(number, device), 0, number)[0]) for number in range(8)]
    assert len(told) == 1 and "No CUDA graph" in told[0] and len(set(losses)) == 8
