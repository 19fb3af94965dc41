"""Device, precision, memory format, threads and seeds: chosen once at the start, by measuring where it matters."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from simsiam.config import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Compute:
    """Where and how the network runs. `precision` is that of the convolutions; losses are always float32."""

    device: torch.device
    precision: Literal["bf16", "fp32"]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module on the device, convolution weights in channels_last."""
        import torch

        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def pick_device(name: str = "auto") -> torch.device:
    """'auto', 'cpu', 'cuda', 'cuda:1', 'mps' -> device. Raises UserError where it is not there."""
    import torch

    if name == "auto":
        cuda = torch.cuda.is_available()
        return torch.device("cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Device {name!r} cannot be used ({reason}). Try --device cpu.") from None
    return device


def cpu_quota() -> int:
    """Cores that this process may really use: affinity and the container's cgroup quota, not the machine's count."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def set_threads() -> int:
    """Gives torch the cores of the quota, unless OMP_NUM_THREADS says otherwise. Returns the number."""
    import torch

    _keep_memory()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cpu_quota():
        torch.set_num_threads(cpu_quota())
    return torch.get_num_threads()


def _keep_memory() -> None:
    """Tells glibc to keep freed memory for the next step. By default it gives large blocks back to the system, and every
    activation of every step is paged in anew: on a CPU that took up to a sixth of a step and a third of the views."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def probe_precision(device: torch.device, step: Callable[[Compute], None]) -> tuple[Literal["bf16", "fp32"], str]:
    """Times `step` in both precisions and returns the faster with the reason.

    Two timed repetitions after one warm-up each; the minimum counts, because noise only ever adds time.
    """
    import torch

    if device.type == "mps":
        return "fp32", "bf16 autocast is not used on mps"
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has bf16 units") if bf16 else ("fp32", "this GPU has no bf16 units")
    seconds = {}
    choices: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    for precision in choices:
        compute = Compute(device, precision)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            step(compute)
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times[1:])
    ratio = seconds["fp32"] / seconds["bf16"]
    if ratio > 1:
        return "bf16", f"measured {ratio:.1f}x faster than fp32 here"
    return "fp32", f"measured {1 / ratio:.1f}x faster than bf16 here"


def probe_encoder(encoder: torch.nn.Module, size: int, device: torch.device) -> Literal["bf16", "fp32"]:
    """The faster precision for the forward pass on images of this size."""
    import torch

    x = torch.zeros(32, 3, size, size).to(device, memory_format=torch.channels_last)

    def step(compute: Compute) -> None:
        with torch.inference_mode(), compute.autocast():
            encoder(x)

    Compute(device, "fp32").place(encoder)
    return probe_precision(device, step)[0]


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A random generator that is a function of its key (seed, step, ...), so that a resumed run draws the same numbers.

    The key is hashed: neighbouring seeds must not give correlated streams.
    """
    import hashlib

    import torch

    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def describe() -> dict[str, Any]:
    """Versions and hardware, for `environment.json`."""
    import torch
    import torchvision

    import simsiam

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "simsiam": simsiam.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": cpu_quota(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
