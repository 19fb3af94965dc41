"""Several processes training one run, started by torchrun: ranks, collective operations and agreement.

Each process (rank) trains on its part of every batch. Rank 0 alone writes, displays and evaluates; its clock counts. In
a single process every function here is a no-op or trivial.
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
"""Rank 0 may decode or evaluate for hours while the others wait; torchrun itself detects dead processes."""


def is_distributed() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank, even before it has joined the others."""
    return dist.get_rank() if is_distributed() else launched() or 0


def world_size() -> int:
    """Return the number of processes in this run."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the process that writes, displays and evaluates."""
    return rank() == 0


def rank_key() -> tuple[int, ...]:
    """Return the rank-specific part of a random key; empty in a single process."""
    return (rank(),) if is_distributed() else ()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes started by torchrun, if any, and yield this one's device.

    Raises UserError if a machine has fewer GPUs than processes.
    """
    if launched() is None or is_distributed():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UserError(
                f"torchrun started local rank {local}, but this machine has {gpus} GPUs: lower --nproc-per-node."
            )
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    # DDP imports this module, whose default arguments capture an existing process group for good: its threads then
    # outlive the interpreter and sometimes abort the process at exit. Imported this early, it finds no group.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def from_main(value: Callable[[], T]) -> T:
    """Return rank 0's result of `value()` on every rank, or raise its UserError there."""
    if not is_distributed():
        return value()
    answer: list[Any] = [None]
    if is_main():
        try:
            answer = [(value(), None)]
        except UserError as error:
            answer = [(None, str(error))]
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    result, mistake = answer[0]
    if mistake is not None:
        raise UserError(mistake)
    return result


def main_first(work: Callable[[], T]) -> T:
    """Run `work()` on rank 0, then on the others, which find the files it wrote."""
    done: list[T] = []
    from_main(lambda: done.append(work()))
    return done[0] if done else work()


def agree(seconds: float, *flags: bool) -> tuple[float, tuple[bool, ...]]:
    """Return rank 0's seconds and, for each flag, whether any rank raised it. On the CPU, so no device waits."""
    if not is_distributed():
        return seconds, flags
    said = torch.tensor([seconds if is_main() else 0.0, *map(float, flags)], dtype=torch.float64)
    dist.all_reduce(said)
    return float(said[0]), tuple(flag > 0 for flag in said[1:].tolist())


# --- tensors --------------------------------------------------------------------------------------------------------


def all_gather(z: Tensor) -> Tensor:
    """Concatenate [B,...] of all ranks in rank order: [R B,...]; gradients flow back to the rank that each row came
    from. In a single process, return z itself."""
    return cast(Tensor, _AllGather.apply(z)) if is_distributed() else z


def all_sum(x: Tensor) -> Tensor:
    """Return the sum of x over the ranks, differentiably; in a single process, x itself."""
    return cast(Tensor, _AllSum.apply(x)) if is_distributed() else x


# torch.distributed.nn.functional has both, but is deprecated.
class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_sum(gradient)[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_sum(gradient)


def all_reduce_(values: Iterable[Tensor], reduce: Literal["sum", "max"] = "sum") -> None:
    """Reduce each tensor over the ranks, in place."""
    if is_distributed():
        for value in values:
            dist.all_reduce(value, dist.ReduceOp.SUM if reduce == "sum" else dist.ReduceOp.MAX)


def broadcast_(values: Iterable[Tensor]) -> None:
    """Overwrite each tensor with rank 0's."""
    if is_distributed():
        for value in values:
            dist.broadcast(value, 0)


def data_parallel(method: nn.Module, sync_bn: bool = True) -> nn.Module:
    """Return the module to call in place of `method` in training: its gradients are averaged over the ranks (DDP), and
    its BN is synchronised, in place (paper, section 3), if `sync_bn`."""
    if not is_distributed():
        return method
    device = next(method.parameters()).device
    if sync_bn:
        _synchronise(method, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers; older ones have no other
        # The methods themselves keep buffers equal, but for the running statistics of BN that is not synchronised (MoCo):
        # of these, only rank 0's are used.
        return nn.parallel.DistributedDataParallel(
            method, device_ids=None if device.type == "cpu" else [device], broadcast_buffers=False
        )


def _synchronise(module: nn.Module, device: torch.device) -> None:
    on_cpu = device.type == "cpu"
    plain, activated = (_CPUSyncBatchNorm, _CPUSyncBatchNormAct) if on_cpu else (nn.SyncBatchNorm, _SyncBatchNormAct)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            # Only the class changes: the optimiser and checkpoints rely on the parameters, buffers and their names.
            norm.__class__ = activated if hasattr(norm, "act") else plain
            norm.process_group = None  # type: ignore[assignment]


class _CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """SyncBatchNorm for CPUs, which torch's does not support."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        rows = x.numel() // x.shape[1] * world_size()  # all ranks have equal parts of a batch
        mean = all_sum(x.sum(axes)) / rows
        variance = all_sum((x - mean.view(shape)).square().sum(axes)) / rows
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
    """BatchNormAct2d of timm (EfficientNets and others): BN that includes the activation."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[attr-defined, misc]


class _CPUSyncBatchNormAct(_Activated, _CPUSyncBatchNorm):
    pass


class _SyncBatchNormAct(_Activated, nn.SyncBatchNorm):
    pass
