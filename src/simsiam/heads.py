"""The small networks on top of an encoder, and the slowly moving twins that some methods learn from."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.encoders import Encoder

Module = TypeVar("Module", bound=nn.Module)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Norm = Literal["none", "affine", "plain"]


def mlp(widths: Sequence[int], *, hidden_norm: bool = True, output_norm: Norm = "none") -> nn.Sequential:
    """Fully connected layers from widths[0] to widths[-1], ReLU after all but the last.

    Args:
        hidden_norm: BN after every hidden layer.
        output_norm: BN after the last one, with or without ("plain") affine.
    A layer that BN follows has no bias: BN would cancel it.
    """
    modules: list[nn.Module] = []
    last = len(widths) - 2
    for layer, (inner, outer) in enumerate(itertools.pairwise(widths)):
        norm = output_norm if layer == last else "affine" if hidden_norm else "none"
        modules.append(nn.Linear(inner, outer, bias=norm == "none"))
        if norm != "none":
            modules.append(nn.BatchNorm1d(outer, affine=norm == "affine"))
        if layer < last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


class Siamese(nn.Module):
    """What all methods share: one encoder and one projection MLP, the same weights for every view."""

    encoder: Encoder
    projector: nn.Module
    sync_bn = True
    """Over several processes, BN takes its statistics from the whole batch (`ranks.parallel`)."""
    fixed = True
    """From now on every step does the same operations, waits for nothing, and changes buffers in place: on a GPU they are
    launched as one graph (`step.Captured`)."""

    @property
    def network(self) -> nn.Sequential:
        """f: encoder and projection MLP in a row; the same modules, not copies."""
        return nn.Sequential(self.encoder, self.projector)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [B,3,h,w] -> features h [B,dim] and projection z [B,d], not normalised."""
        h = self.encoder(x)
        return h, self.projector(h)


def project(network: nn.Sequential, views: Sequence[Tensor]) -> list[Tensor]:
    """z = f(x) of each view, [B,d]; each has BN statistics of its own."""
    encoder, projector = network
    assert isinstance(encoder, Encoder)
    return [projector(h) for h in encoder.each(views)]


def twin(module: Module) -> Module:
    """A copy that gradients never reach: a momentum encoder, a target network."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow <- m slow + (1 - m) fast, for weights; BN's statistics are the twin's own, from its own forward passes."""
    ours: list[Tensor] = list(slow.parameters())
    theirs: list[Tensor] = list(fast.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def in_float32(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A loss computed outside autocast: a product in bf16, divided by a temperature of 0.1, would be off by several
    percent. The first argument is a tensor, or a list of them."""

    @functools.wraps(function)
    def outside(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
        first = arguments[0]
        tensor = first[0] if isinstance(first, list) else first
        assert isinstance(tensor, Tensor)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*arguments, **settings)

    return outside


@in_float32
def similarities(z: Tensor, vectors: Tensor) -> Tensor:
    """(z/|z|) . v for every row and vector, in float32: [B,d], [K,d] -> [B,K]."""
    return unit(z) @ wide(vectors).T


def wide(z: Tensor) -> Tensor:
    """z in float32, where it was narrower."""
    return z if z.dtype == torch.float64 else z.float()


def unit(z: Tensor) -> Tensor:
    """z/|z| in float32, rows of [B,d]."""
    return F.normalize(wide(z), dim=1)
