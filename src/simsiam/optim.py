"""Optimisers and the paper's learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def learning_rate(progress: float, base: float, warmup: float = 0.0, end: float = 0.0) -> float:
    """Return the rate: linear warm-up for a `warmup` share of training, then half a cosine to `end` times the base (the
    paper's ends at 0; sections 3 and 4.3).

    progress in [0, 1]: the completed share of training.
    """
    assert 0 <= warmup < 1
    if progress < warmup:
        return base * progress / warmup
    falling = 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))
    return base * (end + (1 - end) * falling)


@dataclass(frozen=True)
class Schedule:
    """The progress of a run, by steps or by the clock, and its learning rate."""

    peak: float
    """The learning rate after warm-up."""
    steps_per_epoch: int
    epochs: float | None
    seconds: float | None
    """Exactly one of `epochs` and `seconds` is set; it is the length of the run."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0 to the peak; at most half of the run."""
    by_epoch: bool = False
    """Update the rate every epoch, as in the released code, not every step. Ignored if the clock decides."""
    end: float = 0.0
    """The learning rate at the end as a share of the peak, in [0, 1]."""

    @property
    def steps(self) -> int | None:
        """Number of steps in the whole run, at least one; None if the clock decides."""
        return None if self.epochs is None else max(1, round(self.epochs * self.steps_per_epoch))

    def progress(self, step: int, seconds: float) -> float:
        """Return the completed share of the run, in [0, 1], after the given steps and seconds."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.seconds is not None
        return min(seconds / self.seconds, 1.0)

    def over(self, step: int, seconds: float) -> bool:
        """Whether the run has used up its steps or time; a run has at least one step."""
        return step > 0 and self.progress(step, seconds) >= 1

    def rate(self, step: int, seconds: float) -> float:
        """Return the learning rate of the next step, after the given steps and seconds."""
        if self.warmup_epochs and not step:
            return 0.0
        if self.steps is not None:
            warmup = self.warmup_epochs * self.steps_per_epoch / self.steps
        else:
            assert self.seconds is not None
            warmup = self.warmup_epochs * self.steps_per_epoch * (seconds / step if step else 0.0) / self.seconds
        warmup = min(warmup, 0.5)
        progress = self.progress(step, seconds)
        if self.by_epoch and self.steps is not None and progress >= warmup:  # warm-up may end within an epoch
            progress = max(warmup, self.progress(step - step % self.steps_per_epoch, seconds))
        return learning_rate(progress, self.peak, warmup, self.end)


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al. 2017).

    A parameter's gradient g, weight decay added, is scaled by trust_coefficient * |w| / |g + weight_decay * w|. The
    learning rate multiplies the velocity, as in all of the methods below but SimCLR, whose velocity includes it.

    vectors: False: biases and BN, which are one-dimensional, get neither scaling nor weight decay, as in SimCLR, BYOL,
        Barlow Twins and VICReg. True: every parameter is scaled, by trust_coefficient * |w| / (|g| + weight_decay *
        |w|), and one with zero gradient gets no weight decay: apex's LARC, unclipped, as in SwAV, DeepCluster v2 and
        SimSiam's linear protocol.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        vectors: bool = False,
    ) -> None:
        assert lr >= 0 and momentum >= 0 and weight_decay >= 0
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        self.vectors = vectors
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "LARS does not support closures"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update: Tensor = parameter.grad
                decay, eta = group["weight_decay"], group["trust_coefficient"]
                if self.vectors:
                    norm, size = parameter.norm(), update.norm()
                    scaled = update.add(parameter, alpha=decay) * (eta * norm / (size + decay * norm))
                    update = torch.where((norm > 0) & (size > 0), scaled, update)
                elif parameter.ndim > 1:
                    update = update.add(parameter, alpha=decay)
                    norm, size = parameter.norm(), update.norm()
                    update = update * torch.where((norm > 0) & (size > 0), eta * norm / size, 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(update)
                parameter.sub_(velocity, alpha=group["lr"])
