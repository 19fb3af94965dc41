"""The MLP heads on top of an encoder, and the momentum (EMA) twins that some methods learn from."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.encoders import Encoder

Module = TypeVar("Module", bound=nn.Module)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Norm = Literal["none", "affine", "plain"]
HeadNorms = Literal["none", "hidden", "default", "all"]
"""Which layers of SimSiam's heads have BN (paper, table 3)."""


def mlp(widths: Sequence[int], *, hidden_norm: bool = True, output_norm: Norm = "none") -> nn.Sequential:
    """Build fully connected layers of widths[0] to widths[-1], with ReLU after all but the last.

    Args:
        hidden_norm: add BN after every hidden layer.
        output_norm: add BN after the last layer, with affine parameters or without ("plain").

    A layer followed by BN has no bias, because BN would cancel it.
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


def prediction_mlp(dim: int, hidden: int | None = None, bn: HeadNorms = "default") -> nn.Sequential:
    """Prediction MLP: a bottleneck (None: d/4) with BN and ReLU on the hidden layer and neither on the output (SimSiam
    paper, section 3)."""
    widths = [dim, hidden or max(1, dim // 4), dim]
    return mlp(widths, hidden_norm=bn != "none", output_norm="affine" if bn == "all" else "none")


class Siamese(nn.Module):
    """Base class of all methods: one encoder and one projection MLP with the same weights for every view.

    The contract of a method, hooks included, is documented in the package `methods`. Hooks run without gradient.
    """

    encoder: Encoder
    projector: nn.Module
    sweeps = False
    """Whether `before_training` has to see every image before the first step."""
    sync_bn = True
    """With several processes, BN takes its statistics from the whole batch (`ranks.data_parallel`)."""
    fixed = True
    """Whether every step from now on performs the same operations, never synchronises with the device, and changes
    buffers only in place: a GPU then launches them as one graph (`step.Captured`)."""

    def __init__(self, encoder: Encoder, settings: Any) -> None:
        super().__init__()
        self.encoder, self.settings = encoder, settings

    @property
    def network(self) -> nn.Sequential:
        """f: encoder and projection MLP in sequence; the same modules, not copies."""
        return nn.Sequential(self.encoder, self.projector)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features h [B,dim] and the projection z [B,d], not normalised, of x, float [B,3,h,w]."""
        h = self.encoder(x)
        return h, self.projector(h)

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for torch's optimisers: by default one of all trainable parameters."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def allocate(self, images: int) -> None:
        """Create buffers that hold something for each of the training images."""

    def before_training(self, batches: Iterable[tuple[list[Tensor], Tensor]]) -> None:
        """Called once, under autocast, if `sweeps`: with views and indices of whole batches, as `methods` describes."""

    def before_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch."""

    def after_step(self, progress: float) -> None:
        """Called after each step; progress in [0, 1] is the share of training completed before it."""


def project(network: nn.Sequential, views: Sequence[Tensor]) -> list[Tensor]:
    """Return z = f(x) of each view, [B,d]; each view has its own BN statistics."""
    encoder, projector = network
    assert isinstance(encoder, Encoder)
    return [projector(h) for h in encoder.each(views)]


def twin(module: Module) -> Module:
    """Return a copy that never receives gradients: a momentum encoder or target network."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Update slow <- m slow + (1 - m) fast, weights only: the twin's BN statistics come from its own forward passes."""
    ours: list[Tensor] = list(slow.parameters())
    theirs: list[Tensor] = list(fast.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - momentum)


def in_float32(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a loss to take its tensors, and lists of tensors, in float32 (float64 stays) and to run outside autocast: a
    product in bf16, divided by a temperature of 0.1, would be off by several percent."""

    @functools.wraps(function)
    def outside(*arguments: Arguments.args, **settings: Arguments.kwargs) -> Result:
        given = [_cast(each) for each in arguments]
        tensors = [
            each for one in given for each in (one if isinstance(one, list) else [one]) if isinstance(each, Tensor)
        ]
        assert tensors, "in_float32 decorates functions of tensors"
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*given, **settings)

    return outside


def _cast(value: Any) -> Any:
    if isinstance(value, list):
        return [_cast(each) for each in value]
    return at_least_float32(value) if isinstance(value, Tensor) and value.is_floating_point() else value


@in_float32
def similarities(z: Tensor, vectors: Tensor) -> Tensor:
    """Return (z/|z|) . v for every row and vector, in float32: [B,d], [K,d] -> [B,K]."""
    return unit(z) @ vectors.T


def at_least_float32(z: Tensor) -> Tensor:
    """Return z in float32, or float64 if it already is."""
    return z if z.dtype == torch.float64 else z.float()


def unit(z: Tensor) -> Tensor:
    """Return z/|z| in float32 for the rows of [B,d]."""
    return F.normalize(at_least_float32(z), dim=1)


def encoder_and_predictor(method: Siamese, predictor: nn.Module, fixed_lr: bool, lr: float) -> list[dict[str, Any]]:
    """Return the parameter groups of f = encoder + projector and, if it has trainable parameters, of the predictor h,
    which may keep the initial learning rate and whose rate is `lr` times that of f."""
    groups: list[dict[str, Any]] = [{"params": [*method.encoder.parameters(), *method.projector.parameters()]}]
    trained = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    return groups + ([{"params": trained, "fixed_lr": fixed_lr, "lr_scale": lr}] if trained else [])
