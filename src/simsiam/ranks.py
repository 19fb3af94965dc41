"""Several processes on one run, as torchrun starts them: who is who, what they share, what they agree on.

Each process (rank) trains on its part of every batch. Rank 0 alone writes, shows and measures; its clock counts. In one
process every function here does nothing, or the obvious.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simsiam.compute import launched
from simsiam.config import UserError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=1)
"""Rank 0 may decode or evaluate for hours while the others wait; torchrun itself notices a process that died."""


def several() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0 on, before it has joined the others too."""
    return dist.get_rank() if several() else launched() or 0


def count() -> int:
    """Processes on this run."""
    return dist.get_world_size() if several() else 1


def main() -> bool:
    """Whether this is the process that writes, shows and measures."""
    return rank() == 0


def own_key() -> tuple[int, ...]:
    """What makes a random key this rank's own; nothing in one process."""
    return (rank(),) if several() else ()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, where it did, and yields this one's device.

    Raises UserError where a machine has fewer GPUs than processes.
    """
    if launched() is None or several():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UserError(
                f"torchrun started process {local} here, but there are {gpus} GPUs: lower --nproc-per-node."
            )
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # DDP imports this, and its default arguments then keep the group that they find, for good: threads which outlive
    # the interpreter and, now and then, abort the process at its end. Before there is a group they find none.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def same(value: Callable[[], T]) -> T:
    """What rank 0 gets from `value()`, on every rank; its UserError too."""
    if not several():
        return value()
    answer: list[Any] = [None]
    if main():
        try:
            answer = [(value(), None)]
        except UserError as error:
            answer = [(None, str(error))]
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    result, mistake = answer[0]
    if mistake is not None:
        raise UserError(mistake)
    return result


def first(work: Callable[[], T]) -> T:
    """`work()` on rank 0, and when that is done on the others: they find the files that it wrote."""
    if main():
        done = work()
        same(lambda: None)
        return done
    same(lambda: None)
    return work()


def agree(seconds: float, *flags: bool) -> tuple[float, tuple[bool, ...]]:
    """Rank 0's seconds, and each flag where any rank raised it. On the CPU: no device waits for it."""
    if not several():
        return seconds, flags
    said = torch.tensor([seconds if main() else 0.0, *map(float, flags)], dtype=torch.float64)
    dist.all_reduce(said)
    return float(said[0]), tuple(flag > 0 for flag in said[1:].tolist())


# --- tensors --------------------------------------------------------------------------------------------------------


def gather(z: Tensor) -> Tensor:
    """[B,...] of every rank, concatenated in rank order: [R B,...]; gradients flow back to the rank that each row came
    from. In one process, z itself."""
    return cast(Tensor, _Gather.apply(z)) if several() else z


def total(x: Tensor) -> Tensor:
    """The sum of x over the ranks, which gradients flow through; in one process, x itself."""
    return cast(Tensor, _Total.apply(x)) if several() else x


# torch.distributed.nn.functional has these two; it is deprecated.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(count())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def all_ranks(values: Iterable[Tensor], reduce: Literal["sum", "max"] = "sum") -> None:
    """Reduces each tensor over the ranks, in place."""
    if several():
        for value in values:
            dist.all_reduce(value, dist.ReduceOp.SUM if reduce == "sum" else dist.ReduceOp.MAX)


def as_on_rank_0(values: Iterable[Tensor]) -> None:
    """Overwrites each tensor with rank 0's."""
    if several():
        for value in values:
            dist.broadcast(value, 0)


def parallel(method: nn.Module) -> nn.Module:
    """What to call in place of `method` in training: its gradients are the mean over the ranks (DDP), and its BN is
    synchronised, in place (paper, section 3), where `method.sync_bn` does not say otherwise."""
    if not several():
        return method
    device = next(method.parameters()).device
    if getattr(method, "sync_bn", True):
        _synchronise(method, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers; older ones know no other
        # BN's running statistics and everything else a method remembers are made equal by the methods themselves.
        return nn.parallel.DistributedDataParallel(
            method, device_ids=None if device.type == "cpu" else [device], broadcast_buffers=False
        )


def _synchronise(module: nn.Module, device: torch.device) -> None:
    on_cpu = device.type == "cpu"
    plain, activated = (_CPUSyncBatchNorm, _CPUSyncBatchNormAct) if on_cpu else (nn.SyncBatchNorm, _SyncBatchNormAct)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            # The class alone is exchanged: parameters, buffers and their names stay what the optimiser and checkpoints know.
            norm.__class__ = activated if hasattr(norm, "act") else plain
            norm.process_group = None  # type: ignore[assignment]


class _CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's SyncBatchNorm has no CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        rows = x.numel() // x.shape[1] * count()  # parts of a batch are equal
        mean = total(x.sum(axes)) / rows
        variance = total((x - mean.view(shape)).square().sum(axes)) / rows
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * rows / (rows - 1), momentum)
        y = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


class _Activated:
    """timm's BatchNormAct2d, of EfficientNets and others, is BN with the activation in it."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[attr-defined, misc]


class _CPUSyncBatchNormAct(_Activated, _CPUSyncBatchNorm):
    pass


class _SyncBatchNormAct(_Activated, nn.SyncBatchNorm):
    pass
