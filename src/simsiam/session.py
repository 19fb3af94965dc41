"""A run under way: its clock and figures, its checkpoints, the guard, and what a signal does to it."""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simsiam import ranks
from simsiam.collapse import Guard, Verdict, judge, suspicious
from simsiam.compute import Compute, Pace
from simsiam.config import UserError
from simsiam.console import Listener
from simsiam.data.loader import Loader
from simsiam.monitor import Monitor
from simsiam.optim import Schedule
from simsiam.recipe import Recipe
from simsiam.runs import HEALTHY, LAST, Checkpoints, Metrics, check_unused, claim

if TYPE_CHECKING:
    from filelock import FileLock

_FLUSH_SECONDS = 1.0
_MONITOR_SHARE = 0.05
"""Of the time, that looks at the held-out images may take."""
_LOOKS = 20


@dataclass(kw_only=True)
class Session:
    """What the loop works on, and everything around a step that is not the step."""

    run: Path
    recipe: Recipe
    method: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Loader
    compute: Compute
    monitor: Monitor
    listener: Listener
    fingerprint: str
    """Of the data: a run is resumed on the same images only."""
    pace: Pace | None = None
    """None where the threads are the user's own choice, or the device is no CPU."""
    step: int = 0
    seconds: float = 0.0
    """Spent in the loop so far, looks and checkpoints included."""
    training_seconds: float = 0.0
    """Of these, those without looks and checkpoints."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest loss, std and effective rank."""
    looked_at: int = -1
    """The step of the last look."""

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.run)
        self.guards = Guard(patience=5), Guard(patience=3)  # on training batches, once a second; on held-out images
        self._losses: list[Tensor] = []
        self._stds: list[Tensor] = []
        self._lock: FileLock | None = None
        self.metrics: Metrics | None = None
        self.board: Any = None

    def claim(self, resume: bool) -> None:
        """Takes the run folder. Raises UserError where another process trains there, or has begun to in the meantime."""
        self._lock = claim(self.run)
        if not resume:
            check_unused(self.run)

    def open(self, resume: bool) -> None:
        """Loads the last checkpoint, where the run is resumed and has one, and opens the files that it writes."""
        found = self.checkpoints.load() if resume else None
        if found is not None:
            tensors, state = found
            if state["fingerprint"] != self.fingerprint:
                raise images_changed(self.recipe.data, self.run)
            self.step, self.seconds, self.latest = state["step"], state["seconds"], state["latest"]
            self.training_seconds = state["training_seconds"]
            for guard, verdict in zip(self.guards, state.get("verdicts", ()), strict=False):
                guard.verdict = Verdict(**verdict)
            self._load(tensors)
            _load_optimizer(self.optimizer, tensors)
        if not ranks.main():
            return
        # At step 0 nothing is kept: what a run begins with is looked at again.
        self.metrics = Metrics(self.run, (self.step or -1) if found else None)
        if self.recipe.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("train.tensorboard needs TensorBoard: pip install 'simsiam[tensorboard]'.") from None
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.step)

    def begin(self, untrained: Callable[[], torch.nn.Module]) -> None:
        """Starts the clock; a new run is first looked at and saved, so that there is a healthy state from the start."""
        now = time.perf_counter()
        self._origin = now - self.seconds
        self._look_seconds = 0.0
        if self.step == 0 and ranks.main():
            self.look(self.monitor.baselines(untrained))
            self.save()
        self._flushed = self._looked = self._saved = self._kept = time.perf_counter()

    def stepped(self, loss: Tensor, std: Tensor, took: float) -> None:
        """Counts a step, which took so many seconds; nothing here waits for the device."""
        line = self.pace.took(took) if self.pace is not None else None
        if line is not None:
            self.listener.say(line)
        self.step += 1
        if ranks.main():
            self._losses.append(loss)
            self._stds.append(std)
        self.seconds = time.perf_counter() - self._origin

    def agree(self, stopped: list[str]) -> bool:
        """Takes rank 0's clock and any rank's signal. Returns whether rank 0's guard stops the run."""
        own = bool(stopped)
        self.seconds, (signalled, guarded) = ranks.agree(self.seconds, own, ranks.main() and self.guard_stops)
        if signalled and not own:
            stopped.append("Another process was stopped")
        return guarded

    @property
    def over(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.schedule.over(self.step, self.seconds)

    @property
    def due(self) -> bool:
        """Reading a figure waits for the device, so it happens about once a second."""
        return self.step == 1 or self.over or time.perf_counter() - self._flushed >= _FLUSH_SECONDS

    def flush(self, rate: float) -> None:
        """Writes and shows the figures since the last flush, asks the guard, and looks and saves where it is time."""
        loss, std = float(torch.stack(self._losses).mean()), float(torch.stack(self._stds).mean())
        now = time.perf_counter()
        elapsed, self.seconds = now - self._flushed, now - self._origin
        self.training_seconds += elapsed
        self.latest |= {"loss": loss, "std": std}
        progress = self.schedule.progress(self.step, self.seconds)
        figures = {
            "step": self.step,
            "epoch": round(self.step / self.loader.steps_per_epoch, 4),
            "progress": round(progress, 5),
            "seconds": round(self.seconds, 3),
            "loss": loss,
            "std": std,
            "lr": rate,
            "images_per_second": round(len(self._losses) * self.loader.batch_size / elapsed, 1),
        }
        self._losses, self._stds = [], []
        self.record("train", figures)
        whole = self.seconds / progress if progress > 0.005 else None
        self.listener.step(figures, progress, None if whole is None else whole - self.seconds)
        before = self.verdict.name
        self.guards[0].look(judge(loss, std))
        pause = self._look_seconds / _MONITOR_SHARE
        if self.guards[1].suspects:  # settled by looking again at once
            pause = 0.0
        elif not suspicious(std, self.loader.batch_size // ranks.count()):
            pause = max(pause, (whole or math.inf) / _LOOKS)
        if self.verdict.name != before or (now - self._looked >= pause and not self.over):
            self.look()
            self._looked = time.perf_counter()
        every = self.recipe.train.checkpoint_seconds
        keep = self._sound and now - self._kept >= every
        if keep or now - self._saved >= every:
            self.save()
            self._saved = time.perf_counter()
        if keep:
            self._kept = self._saved
        self._flushed = time.perf_counter()
        self.seconds = self._flushed - self._origin

    def look(self, known: Mapping[str, float] | None = None) -> None:
        """Measures the held-out images; `known` figures take the place of measured ones."""
        start = time.perf_counter()
        figures = {**self.monitor.look(self.method, knn="knn" not in (known or {})), **(known or {})}
        if self.step:
            std, rank = figures.get("std_z", math.nan), figures.get("effective_rank")
            loss, most = self.latest.get("loss", math.nan), figures.get("most_rank", 0)
            self.guards[1].look(judge(loss, std, rank, figures.get("std_features"), most))
            self.latest |= {"effective_rank": rank, "most_rank": most or None}
        line = {"step": self.step, "seconds": round(self.seconds, 3), **figures, "verdict": self.verdict.name}
        self.record("monitor", line)
        self.listener.monitor(line)
        self.looked_at, self._look_seconds = self.step, time.perf_counter() - start

    @property
    def verdict(self) -> Verdict:
        """The standing one: what the training batches show first, then what the held-out images show."""
        batches, held_out = (guard.verdict for guard in self.guards)
        return batches if batches.name != "healthy" else held_out

    @property
    def _sound(self) -> bool:
        """Whether the weights of this very step were looked at, and neither that look nor the batches so far were bad."""
        return (
            self.looked_at == self.step and self.verdict.name == "healthy" and not any(g.suspects for g in self.guards)
        )

    @property
    def guard_stops(self) -> bool:
        """Whether the verdict ends the run."""
        return self.verdict.name != "healthy" and self.recipe.train.on_collapse == "stop"

    def record(self, kind: str, figures: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`. A figure that is not finite has no place in JSON; the verdict says so."""
        plain = {key: value if finite(value) else None for key, value in figures.items()}
        assert self.metrics is not None, "only rank 0 records, and after open()"
        self.metrics.write(kind=kind, **plain)
        if self.board is not None:
            for key, value in plain.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(f"{kind}/{key}", value, self.step)

    def save(self) -> None:
        """A checkpoint of all that the next step depends on, under `HEALTHY` too where a look has found the weights so:
        directions can vanish between two looks while the std of the batches stays what it was."""
        tensors = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "fingerprint": self.fingerprint,
            "latest": {key: value for key, value in self.latest.items() if finite(value)},
            "verdicts": [asdict(guard.verdict) for guard in self.guards],
        }
        # The loss is from before the last step: weights that this step destroyed would pass for healthy.
        healthy = self._sound and all(bool(value.isfinite().all()) for value in tensors.values())
        self.checkpoints.save(self.step, tensors, state, healthy=healthy)

    def saved_step(self) -> int:
        """The step of the newest checkpoint."""
        path = self.checkpoints.named(LAST)
        return 0 if path is None else int(path.stem.removeprefix("step-"))

    def back_to_healthy(self) -> int:
        """Puts the last healthy weights into the method; returns their step. There always is such a state: the first."""
        found = self.checkpoints.load(HEALTHY)
        assert found is not None
        self._load(found[0])
        step: int = found[1]["step"]
        return step

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        self.method.load_state_dict(method_tensors(tensors))

    def close(self) -> None:
        if ranks.main():
            if self.metrics is not None:
                self.metrics.close()
            if self._lock is not None:
                self._lock.release()
        if self.board is not None:
            self.board.close()


def images_changed(data: str, run: Path) -> UserError:
    """What to say where a run cannot be resumed on the images that are there."""
    return UserError(
        f"The images of {data} have changed since {run} began: bring them back, "
        f"or start a new run from its weights: --init {shlex.quote(str(run))}."
    )


def method_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The method's state dict out of a checkpoint's tensors."""
    return {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}


def finite(value: Any) -> bool:
    """False for NaN and infinity only."""
    return not isinstance(value, float) or math.isfinite(value)


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # A fused step walks both by address: in another memory format it would mix up the elements.
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def signals() -> Iterator[list[str]]:
    """SIGINT, SIGTERM and SIGHUP put their name into the list; a second one is not waited for. Only the main thread may
    ask."""
    stopped: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, _: Any) -> None:
        if ranks.several() and stopped:
            return  # torchrun passes on what the terminal has sent already
        if stopped:
            raise KeyboardInterrupt
        stopped.append(signal.Signals(number).name)

    # SIGHUP: the terminal was closed. Windows has none; nohup ignores it, and that stays.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
