"""Optimisers and the learning-rate schedule of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def learning_rate(progress: float, base: float, warmup: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` share of training, then half a cosine to 0 (paper, sections 3 and 4.3).

    progress in [0, 1]: the share of training that is done.
    """
    assert 0 <= warmup < 1
    if progress < warmup:
        return base * progress / warmup
    return base * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


@dataclass(frozen=True)
class Schedule:
    """How far a run is, by its steps or by the clock, and the learning rate there."""

    peak: float
    """The learning rate after warm-up."""
    steps_per_epoch: int
    epochs: float | None
    seconds: float | None
    """One of the two is None: a run ends after so many epochs, or so many seconds."""
    warmup_epochs: float = 0.0
    """Linear from 0 to the peak; half of the run at most."""
    by_epoch: bool = False
    """The rate changes every epoch, as in the released code, not every step. By the clock it always changes."""

    @property
    def steps(self) -> int | None:
        """Of the whole run, at least one; None where the clock decides."""
        return None if self.epochs is None else max(1, round(self.epochs * self.steps_per_epoch))

    def progress(self, step: int, seconds: float) -> float:
        """The share that is done, in [0, 1], after so many steps and seconds."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.seconds is not None
        return min(seconds / self.seconds, 1.0)

    def over(self, step: int, seconds: float) -> bool:
        """Whether the run has had its steps or its time; it has one step at least."""
        return step > 0 and self.progress(step, seconds) >= 1

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of the step that comes after so many steps and seconds."""
        if self.warmup_epochs and not step:
            return 0.0
        if self.steps is not None:
            warmup = self.warmup_epochs * self.steps_per_epoch / self.steps
        else:
            assert self.seconds is not None
            warmup = self.warmup_epochs * self.steps_per_epoch * (seconds / step if step else 0.0) / self.seconds
        warmup = min(warmup, 0.5)
        progress = self.progress(step, seconds)
        if self.by_epoch and self.steps is not None and progress >= warmup:  # which may have ended within this epoch
            progress = max(warmup, self.progress(step - step % self.steps_per_epoch, seconds))
        return learning_rate(progress, self.peak, warmup)


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al. 2017).

    A parameter's gradient g, weight decay added, is scaled by trust_coefficient * |w| / |g + weight_decay * w|.

    vectors: True: every parameter's, by trust_coefficient * |w| / (|g| + weight_decay * |w|), and one without gradient
        stays as it is: apex's LARC, unclipped, as SwAV, DeepCluster v2 and SimSiam's linear protocol use it. False: biases
        and BN, of one dimension, have neither that nor weight decay, as in SimCLR, BYOL, Barlow Twins and VICReg. The
        rate multiplies the velocity, as in all of them but SimCLR, where it is in it.
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
        assert closure is None, "LARS takes one gradient a step"
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
