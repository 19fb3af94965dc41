"""Optimisers and the learning-rate schedule of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def learning_rate(progress: float, base: float, warmup: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` share of training, then half a cosine to 0 (paper, section 4.1).

    progress in [0, 1]: the share of training that is done.
    """
    assert 0 <= warmup < 1
    if progress < warmup:
        return base * progress / warmup
    return base * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


class LARS(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rates (You et al. 2017), as the linear protocol of SimSiam and SimCLR uses it.

    Each parameter of two or more dimensions has its gradient (weight decay added) scaled by
    trust_coefficient * |w| / |g|; vectors (biases, BN) are left as in SGD.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        assert lr >= 0 and momentum >= 0 and weight_decay >= 0
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "LARS takes one gradient a step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update: Tensor = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    norm, update_norm = parameter.norm(), update.norm()
                    trust = group["trust_coefficient"] * norm / update_norm
                    update = update * torch.where((norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"]
                velocity.mul_(group["momentum"]).add_(update)
                parameter.sub_(velocity, alpha=group["lr"])
