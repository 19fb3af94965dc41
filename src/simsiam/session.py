"""The state of a run in progress: clock, figures, checkpoints, collapse guard and signal handling."""

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
from simsiam.heads import Siamese
from simsiam.monitor import Monitor
from simsiam.optim import Schedule
from simsiam.recipe import Recipe
from simsiam.runs import HEALTHY, LAST, Checkpoints, Metrics, check_unused, claim

if TYPE_CHECKING:
    from filelock import FileLock

_FLUSH_SECONDS = 1.0
_MONITOR_SHARE = 0.05
"""Largest share of the time that evaluating held-out images may take."""
_LOOKS = 20


@dataclass(kw_only=True)
class Session:
    """Everything the training loop works on, and all that surrounds a step."""

    run: Path
    recipe: Recipe
    method: Siamese
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: Loader
    compute: Compute
    monitor: Monitor
    listener: Listener
    pace: Pace | None = None
    """None if half of the threads was not tried (`Probed.pace`) or the device is not a CPU."""
    step: int = 0
    seconds: float = 0.0
    """Time spent in the loop so far, including looks and checkpoints."""
    training_seconds: float = 0.0
    """The same without looks and checkpoints."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest loss, std, effective rank and largest possible rank."""
    looked_at: int = -1
    """The step of the last look at the held-out images."""

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.run)
        self.guards = Guard(patience=5), Guard(patience=3)  # on training batches, once a second; on held-out images
        self._losses: list[Tensor] = []
        self._stds: list[Tensor] = []
        self._lock: FileLock | None = None
        self.metrics: Metrics | None = None
        self.board: Any = None

    def claim(self, resume: bool) -> None:
        """Lock the run folder. Raises UserError if another process trains there, or has started to in the meantime."""
        self._lock = claim(self.run)
        if not resume:
            check_unused(self.run)

    def open(self, resume: bool) -> None:
        """Load the last checkpoint, if the run is resumed and has one, and open the output files."""
        found = self.checkpoints.load() if resume else None
        if found is not None:
            tensors, state = found
            self.step, self.seconds, self.latest = state["step"], state["seconds"], state["latest"]
            self.training_seconds = state["training_seconds"]
            for guard, verdict in zip(self.guards, state.get("verdicts", ()), strict=False):
                guard.verdict = Verdict(**verdict)
            self._load(tensors)
            _load_optimizer(self.optimizer, tensors)
        if not ranks.is_main():
            return
        # At step 0 no metrics are kept: the initial state is evaluated again.
        self.metrics = Metrics(self.run, self.step or None)
        if self.recipe.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # It drops events from that step on; the step of the checkpoint is kept, as in `Metrics`.
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.step + 1 if self.step else 0)

    def begin(self, untrained: Callable[[], torch.nn.Module]) -> None:
        """Start the clock; a new run is first evaluated and saved, so a healthy state exists from the start."""
        now = time.perf_counter()
        self._origin = now - self.seconds
        self._look_seconds = 0.0
        if self.step == 0 and ranks.is_main():
            self.look(self.monitor.baselines(untrained))
            self.save()
        self._flushed = self._looked = self._saved = self._kept = time.perf_counter()

    def stepped(self, loss: Tensor, std: Tensor, took: float) -> None:
        """Record a step and its duration in seconds, without waiting for the device."""
        line = self.pace.took(took) if self.pace is not None else None
        if line is not None:
            self.listener.say(line)
        self.step += 1
        if ranks.is_main():
            self._losses.append(loss)
            self._stds.append(std)
        self.seconds = time.perf_counter() - self._origin

    def tick(self) -> None:
        """Move the clock on. What has passed since the last flush does not count as training."""
        self._flushed = time.perf_counter()
        self.seconds = self._flushed - self._origin

    def agree(self, stopped: list[str]) -> bool:
        """Adopt rank 0's clock and any rank's signal. Returns whether rank 0's guard stops the run."""
        own = bool(stopped)
        self.seconds, (signalled, guarded) = ranks.agree(self.seconds, own, ranks.is_main() and self.guard_stops)
        if signalled and not own:
            stopped.append("Another process was stopped")
        return guarded

    @property
    def over(self) -> bool:
        """Whether the schedule has ended."""
        return self.schedule.over(self.step, self.seconds)

    @property
    def due(self) -> bool:
        """Whether to flush: about once a second, because reading a figure waits for the device."""
        return self.step == 1 or self.over or time.perf_counter() - self._flushed >= _FLUSH_SECONDS

    def flush(self, rate: float) -> None:
        """Write and display the figures since the last flush, update the guard, and evaluate and save if it is time."""
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
        if self.guards[1].suspects:  # another look settles it at once
            pause = 0.0
        elif not suspicious(std, self.loader.batch_size // ranks.world_size()):
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
        self.tick()

    def look(self, known: Mapping[str, float] | None = None) -> None:
        """Evaluate the held-out images; `known` figures replace measured ones."""
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
        """The current verdict: that of the training batches, or if it is healthy, that of the held-out images."""
        batches, held_out = (guard.verdict for guard in self.guards)
        return batches if batches.name != "healthy" else held_out

    @property
    def _sound(self) -> bool:
        """Whether the current weights were evaluated, and neither that look nor the batches so far were bad."""
        return (
            self.looked_at == self.step and self.verdict.name == "healthy" and not any(g.suspects for g in self.guards)
        )

    @property
    def guard_stops(self) -> bool:
        """Whether the verdict ends the run."""
        return self.verdict.name != "healthy" and self.recipe.train.on_collapse == "stop"

    def record(self, kind: str, figures: Mapping[str, Any]) -> None:
        """Write a line of `metrics.jsonl`. JSON has no NaN or infinity: such figures become null, and the verdict
        reports them."""
        plain = {key: value if finite(value) else None for key, value in figures.items()}
        assert self.metrics is not None, "only rank 0 records, and after open()"
        self.metrics.write(kind=kind, **plain)
        if self.board is not None:
            for key, value in plain.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(f"{kind}/{key}", value, self.step)

    def save(self) -> None:
        """Save a checkpoint of all that the next step depends on. It becomes `HEALTHY` too only if a look found these
        weights healthy: directions can vanish between two looks without changing the std of the batches."""
        tensors = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "fingerprint": self.loader.cache.fingerprint,
            "latest": {key: value for key, value in self.latest.items() if finite(value)},
            "verdicts": [asdict(guard.verdict) for guard in self.guards],
        }
        # The loss predates the last update: weights destroyed by that update would pass as healthy.
        healthy = self._sound and all(bool(value.isfinite().all()) for value in tensors.values())
        self.checkpoints.save(self.step, tensors, state, healthy=healthy)

    def saved_step(self) -> int | None:
        """Return the step of the newest checkpoint; None before the first."""
        path = self.checkpoints.named(LAST)
        return None if path is None else int(path.stem.removeprefix("step-"))

    def back_to_healthy(self) -> int:
        """Load the last healthy weights into the method and return their step. The initial state is always there."""
        found = self.checkpoints.load(HEALTHY)
        assert found is not None
        self._load(found[0])
        step: int = found[1]["step"]
        return step

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        self.method.load_state_dict(method_tensors(tensors))

    def close(self) -> None:
        if ranks.is_main():
            if self.metrics is not None:
                self.metrics.close()
            if self._lock is not None:
                self._lock.release()
        if self.board is not None:
            self.board.close()


def check_images(recipe: Recipe, run: Path, fingerprint: str, count: int) -> None:
    """Raise UserError if the images of a run that is to be resumed are not those of its checkpoint. count: the number to
    train on; without a checkpoint, all that is known is that they filled a batch."""
    state = Checkpoints(run).state()
    if count >= recipe.train.batch_size and (state is None or state["fingerprint"] == fingerprint):
        return
    raise UserError(
        f"The images in {recipe.data} have other names, sizes or times of change than when {run} started: restore them "
        f"(copy with cp -a or rsync -a), or start a new run from its weights with --init {shlex.quote(str(run))}."
    )


def method_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the method's state dict from a checkpoint's tensors."""
    return {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}


def finite(value: Any) -> bool:
    """False only for NaN and infinity."""
    return not isinstance(value, float) or math.isfinite(value)


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # A fused step pairs elements by address: different memory formats would mix them up.
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def signals() -> Iterator[list[str]]:
    """Yield a list that receives the names of SIGINT, SIGTERM and SIGHUP; in a single process a second
    signal interrupts at once. The list stays empty outside the main thread."""
    stopped: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, _: Any) -> None:
        if ranks.is_distributed() and stopped:
            return  # torchrun forwards what the terminal has already sent
        if stopped:
            raise KeyboardInterrupt
        stopped.append(signal.Signals(number).name)

    # SIGHUP: the terminal was closed. Windows lacks it; if nohup has it ignored, it stays ignored.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stopped
    finally:
        # torchrun signals one rank after the other, and these agree to stop in between: a signal that arrives only now
        # must not end this process before it has told that everything is saved.
        if not (ranks.is_distributed() and stopped):
            for number, handler in previous.items():
                signal.signal(number, handler)
