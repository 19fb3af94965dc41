"""A running session without training: what is recorded and when, with a simulated clock."""

from __future__ import annotations

import math
import shutil
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simsiam.collapse import Verdict
from simsiam.config import UserError
from simsiam.console import Listener
from simsiam.optim import Schedule
from simsiam.recipe import TrainSettings
from simsiam.runs import Checkpoints, read_metrics
from simsiam.session import Session, signals

HEALTHY = {
    "std_z": 1.0,
    "std_features": 0.8,
    "effective_rank": 20.0,
    "most_rank": 31,
    "alignment": 0.5,
    "retrieval": 9.0,
}


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class Watch:
    """A monitor that takes simulated time."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.takes, self.looks, self.figures = clock, 0.0, 0, dict(HEALTHY)

    def look(self, method: nn.Module, knn: bool = True) -> dict[str, Any]:
        self.looks += 1
        self.clock.now += self.takes
        return {**self.figures, **({"knn": 50.0} if knn else {})}

    def baselines(self, untrained: Any) -> dict[str, float]:
        return {"knn": 30.0, "knn_pixels": 20.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("simsiam.session.time", clock)
    return clock


def session(run: Path, clock: Clock, resume: bool = False, seconds: float | None = None, **train: Any) -> Session:
    """A started session. An epoch is 10 steps of 8 images; it lasts 5 epochs, or `seconds`."""
    method = nn.Linear(3, 2)
    length = {"epochs": None, "budget": f"{seconds}s"} if seconds else {"epochs": 5.0}
    settings = TrainSettings(**{**length, **train})
    s = Session(
        run=run,
        recipe=types.SimpleNamespace(data="photos", train=settings),  # type: ignore[arg-type]
        method=method,
        optimizer=torch.optim.SGD(method.parameters(), 0.1, momentum=0.9),
        schedule=Schedule(0.1, 10, settings.epochs, settings.seconds),
        loader=types.SimpleNamespace(
            steps_per_epoch=10, batch_size=8, cache=types.SimpleNamespace(fingerprint="these")
        ),  # type: ignore[arg-type]
        compute=None,  # type: ignore[arg-type]
        monitor=Watch(clock),  # type: ignore[arg-type]
        listener=Listener(),
    )
    s.claim(resume)
    s.open(resume)
    s.begin(nn.Identity)
    return s


def step(s: Session, clock: Clock, loss: float = -0.5, std: float = 1.0, seconds: float = 1.0) -> None:
    clock.now += seconds
    s.stepped(torch.tensor(loss), torch.tensor(std), seconds)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["kind"] == kind]


def test_a_folder_that_was_taken_meanwhile_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    first = session(tmp_path, clock)
    with pytest.raises(UserError, match="Another process is training"):
        session(tmp_path, clock)
    first.close()
    with pytest.raises(UserError, match="choose another -o"):  # no longer locked, but it contains a run now
        session(tmp_path, clock)
    assert len(read_metrics(tmp_path)) == 1


def test_figures_are_of_the_steps_since_the_last_ones(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock)
    assert not s.due
    for losses in ((-0.25,), (-0.5, -1.0)):
        for loss in losses:
            step(s, clock, loss, std=-loss, seconds=2.0)
        assert s.due
        s.flush(0.1)
    s.close()
    first, second = lines(tmp_path, "train")
    assert (first["loss"], first["std"], first["step"], first["epoch"]) == (-0.25, 0.25, 1, 0.1)
    assert (second["loss"], second["std"], second["step"], second["epoch"]) == (-0.75, 0.75, 3, 0.3)
    assert first["images_per_second"] == second["images_per_second"] == 4.0  # 8 images in 2 s
    assert (second["seconds"], second["progress"], second["lr"]) == (6.0, 0.06, 0.1)


def test_the_first_and_the_last_step_are_told_however_quick_they_are(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock)
    due = []
    while not s.over:
        step(s, clock, seconds=1e-6)
        due.append(s.due)
    s.close()
    assert [number for number, each in enumerate(due, 1) if each] == [1, 50]


def test_a_new_run_is_looked_at_and_saved_before_its_first_step(tmp_path: Path, clock: Clock) -> None:
    session(tmp_path, clock).close()
    (start,) = lines(tmp_path, "monitor")
    assert (start["step"], start["knn"], start["knn_pixels"]) == (0, 30.0, 20.0)
    for name in ("LAST", "HEALTHY"):
        found = Checkpoints(tmp_path).load(name)
        assert found is not None and found[1]["step"] == 0


def test_a_resumed_run_goes_on_with_its_clock_and_its_figures(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock)
    s.monitor.takes = 3.0  # type: ignore[attr-defined]
    for _ in range(4):
        step(s, clock)
        s.flush(0.1)
    s.look()
    s.optimizer.step()
    s.save()
    s.close()
    clock.now += 1e6  # time between the runs does not count
    resumed = session(tmp_path, clock, resume=True)
    assert resumed.step == 4 and resumed.monitor.looks == 0  # type: ignore[attr-defined]
    assert resumed.latest == s.latest and resumed.latest["effective_rank"] == 20.0
    assert resumed.training_seconds == s.training_seconds == 4.0
    step(resumed, clock)
    resumed.flush(0.1)
    assert resumed.seconds == s.seconds + 1 and resumed.training_seconds == 5.0
    assert lines(tmp_path, "train")[-1]["progress"] == 0.1
    resumed.close()


def test_a_run_that_was_killed_before_its_first_state_begins_anew(tmp_path: Path, clock: Clock) -> None:
    session(tmp_path, clock).close()
    shutil.rmtree(tmp_path / "checkpoints")
    session(tmp_path, clock, resume=True).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]


def test_a_budget_goes_on_where_it_stood(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock, seconds=60)
    step(s, clock, seconds=45.0)
    s.save()
    s.close()
    resumed = session(tmp_path, clock, resume=True, seconds=60)
    step(resumed, clock, seconds=14.0)
    assert not resumed.over
    step(resumed, clock, seconds=1.0)
    assert resumed.over
    resumed.close()


@pytest.mark.parametrize("takes", [0.1, 1.0])
def test_looks_take_a_twentieth_of_the_time_at_most(tmp_path: Path, clock: Clock, takes: float) -> None:
    s = session(tmp_path, clock, seconds=200)
    watch: Any = s.monitor
    watch.looks, watch.takes = 0, takes
    while not s.over:
        step(s, clock)
        s.flush(0.1)
    assert 5 <= watch.looks <= 21 and watch.looks * takes <= 0.05 * 200 + takes
    assert s.training_seconds == pytest.approx(s.seconds - watch.looks * takes)
    s.close()


def test_what_looks_like_a_collapse_is_looked_at_more_often(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock, seconds=10_000)
    watch: Any = s.monitor
    for std, each in ((1.0, 0), (0.2, 1)):  # a healthy run waits 500 s
        watch.looks = 0
        for _ in range(3):
            step(s, clock, std=std)
            s.flush(0.1)
        assert watch.looks == 3 * each
    watch.takes = 10.0
    s.look()
    watch.looks, watch.figures["effective_rank"] = 0, 1.0
    for number in (0, 0, 0):  # the last evaluation took 10 s, so the next waits 200 s
        step(s, clock, std=0.2)
        s.flush(0.1)
        assert watch.looks == number
    clock.now += 200
    for number in (1, 2, 3):  # but a suspicion is checked at once
        step(s, clock, std=0.2)
        s.flush(0.1)
        assert watch.looks == number
    assert s.verdict.name == "collapsed" and s.guard_stops
    s.close()


def test_a_state_is_saved_every_so_many_seconds(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock, checkpoint_seconds=10.0)
    saved = []
    for _ in range(40):
        step(s, clock)
        s.flush(0.1)
        saved.append(s.saved_step())
    assert max(number - last for number, last in enumerate(saved, 1)) == 9
    assert 4 <= len(set(saved)) - 1 <= 8  # saves by time, and as many by healthy evaluations
    s.close()


def test_healthy_is_what_a_look_has_found_so(tmp_path: Path, clock: Clock) -> None:
    """The rank collapses between two evaluations, while the std of the batches is unchanged."""
    s = session(tmp_path, clock, checkpoint_seconds=3.0)
    sound: list[int] = []
    for number in range(1, 41):
        if number == 20:
            s.monitor.figures["effective_rank"] = 1.8  # type: ignore[attr-defined]
        before = s.looked_at
        step(s, clock)
        s.flush(0.1)
        if s.looked_at != before and number < 20:
            sound.append(s.looked_at)
        healthy = s.checkpoints.load("HEALTHY")
        assert healthy is not None and healthy[1]["step"] in (0, *sound)
        assert s.saved_step() >= number - 3
    assert s.verdict.name == "partial" and healthy[1]["step"] > 10 and len(sound) > 5
    s.save()
    assert s.back_to_healthy() == healthy[1]["step"]
    s.close()


@pytest.mark.parametrize("on_collapse", ["stop", "continue"])
def test_the_guard_stops_where_it_was_asked_to(tmp_path: Path, clock: Clock, on_collapse: str) -> None:
    s = session(tmp_path, clock, on_collapse=on_collapse)
    step(s, clock, loss=math.nan)
    s.flush(0.1)
    assert s.verdict.name == "diverged" and s.guard_stops == (on_collapse == "stop")
    s.guards[1].verdict = Verdict("partial", "")  # verdicts on batches take precedence over those on held-out images
    assert s.verdict.name == "diverged"
    assert lines(tmp_path, "train")[0]["loss"] is None  # no NaN in JSON
    s.save()
    s.close()
    last, healthy = (Checkpoints(tmp_path).load(name) for name in ("LAST", "HEALTHY"))
    assert last is not None and last[1]["step"] == 1 and "loss" not in last[1]["latest"]
    assert healthy is not None and healthy[1]["step"] == 0


def test_weights_that_are_not_finite_are_not_the_healthy_ones(tmp_path: Path, clock: Clock) -> None:
    s = session(tmp_path, clock)
    step(s, clock)
    weight: Tensor = s.method.weight  # type: ignore[assignment]
    weight.data[0, 0] = math.inf
    s.save()
    assert s.back_to_healthy() == 0 and bool(weight.isfinite().all())
    s.close()


def test_signals_are_put_back_and_a_second_one_is_not_waited_for() -> None:
    number = signal.SIGTERM
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), signals() as stopped:
        signal.raise_signal(number)
        assert stopped == ["SIGTERM"]
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_among_several_a_late_signal_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks agree to stop before torchrun has signalled the last of them."""
    monkeypatch.setattr("simsiam.ranks.is_distributed", lambda: True)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with signals() as stopped:
            stopped.append("Another process was stopped")
        signal.raise_signal(signal.SIGTERM)  # would end the tests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
