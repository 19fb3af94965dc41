"""Device, precision, memory format, threads and seeds: chosen once at the start, by measuring if it matters."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simsiam.config import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Compute:
    """Where and in which precision the network runs.

    `precision` applies to convolutions; in fp32 they use TF32 on GPUs that support it, torch's default. Losses are
    always float32.
    """

    device: torch.device
    precision: Literal["bf16", "fp32"]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context manager for every forward pass."""
        import torch

        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move the module to the device, with convolution weights in channels_last."""
        import torch

        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def launched() -> int | None:
    """Return this process's rank if torchrun started several processes, else None. Does not import torch."""
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else None


def pick_device(name: str = "auto") -> torch.device:
    """Return the device for 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'. Raises UserError if it is not available."""
    import torch

    if name == "auto":
        cuda = torch.cuda.is_available()
        return torch.device("cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not among cpu, cuda and mps")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if len(reason) > 100:  # lists every device type, or what a driver would need
            known = name.partition(":")[0] in ("cuda", "mps")
            reason = "torch finds none on this machine" if known else "torch knows no such device"
        raise UserError(f"Device {name!r} cannot be used ({reason}). Try the device cpu.") from None
    return device


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Train with gradients, in float32 and with deterministic kernels of cuDNN, so that a resumed run ends with the same
    weights, whatever the caller has set; at exit, restore that and the random state. Those kernels were as fast as any
    (docs/results.md)."""
    import torch

    cuda = device.type == "cuda"
    before, dtype = torch.backends.cudnn.deterministic, torch.get_default_dtype()
    torch.backends.cudnn.deterministic = before or cuda
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng([device] if cuda else []):
            yield
    finally:
        torch.backends.cudnn.deterministic = before
        torch.set_default_dtype(dtype)


def draw(rows: NDArray[np.int64], most: int, seed: int = 0) -> NDArray[np.int64]:
    """Return at most `most` of the rows, always the same ones, in order."""
    import numpy as np

    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])]


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished its work, for example before reading a clock."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or numpy ran out of memory; on a CPU torch has no separate exception for that."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def enough_memory(otherwise: str) -> Iterator[None]:
    """Raise UserError with the text `otherwise` if memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(otherwise) from None


def cpu_quota() -> int:
    """Return the number of cores this process may use, given its affinity and the container's cgroup quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def set_threads(asked: int | None = None) -> int:
    """Let torch use all cores of the quota, or `asked` if that is fewer, unless OMP_NUM_THREADS is set. Returns the
    number of threads."""
    import torch

    _keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        most = min(torch.get_num_threads(), cpu_quota())
        torch.set_num_threads(most if asked is None else max(1, min(most, asked)))
    return torch.get_num_threads()


class Pace:
    """Keeps a run on a CPU from crawling while other programs use the cores.

    A step is a thousand parallel regions, each of which waits for its last thread. If another program occupies a core,
    that thread waits for its turn every time: on 2 cores beside one busy process, a step of 0.13 s took 13 s on two
    threads and 0.23 s on one. So if steps take far longer on all threads than on half of them, the run switches to
    half, and tries all of them again from time to time.

    Args:
        full: number of threads if nothing else runs.
        threads: the initial number: full, or half of it if that was faster.
        full_seconds, half_seconds: step time on all and on half of the threads, measured at the start.
        adapts: False if other load must not affect the last bits of the weights; the user is then only warned, once.
    """

    PATIENCE = 3
    """Slow steps in a row before it reacts."""
    FIRST_WAIT, LONGEST_WAIT, WORTH = 20.0, 600.0, 20.0
    """Seconds until all threads are tried again, doubled after each trial that failed; at least WORTH slow steps."""

    def __init__(self, full: int, threads: int, full_seconds: float, half_seconds: float, adapts: bool) -> None:
        self.full, self.half_seconds, self.adapts = full, half_seconds, adapts
        self.threads, self.warned = threads, threads < full
        self._slow, self._trial, self._since = 0, False, 0.0
        self._wait = self._until_worth(self.FIRST_WAIT, full_seconds)

    def took(self, seconds: float) -> str | None:
        """Record the duration of a step and set the threads of the next. Returns a message for the user, if any."""
        if self.threads < self.full:
            self._since += seconds
            if self.adapts and self._since > self._wait:
                self._trial = True
                self._use(self.full)
            return None
        if seconds <= 1.5 * self.half_seconds:
            self._slow, self._trial = 0, False
            return None
        self._slow += 1
        if self._slow < (1 if self._trial else self.PATIENCE):
            return None
        return self._give_way(seconds)

    def _give_way(self, seconds: float) -> str | None:
        said, self.warned = self.warned, True
        few = self.full // 2
        crawl = f"Other programs are using the CPU cores: a step takes {seconds:.1f} s on {self.full} threads"
        less = f"{self.half_seconds:.1f} s on {few}"
        if self.adapts:
            self._wait = self._until_worth(2 * self._wait if self._trial else self.FIRST_WAIT, seconds)
            self._trial = False
            self._use(few)
            line = f"{crawl}, {less}. Continuing with {few}; {self.full} are tried again later."
        else:
            again = f"OMP_NUM_THREADS={few}"
            line = f"{crawl}, and {less}. Stop those programs, or stop this run and resume it with {again} set."
        return None if said else line

    def _until_worth(self, wait: float, seconds: float) -> float:
        return min(max(wait, self.WORTH * seconds), self.LONGEST_WAIT)

    def _use(self, threads: int) -> None:
        import torch

        self.threads, self._slow, self._since = threads, 0, 0.0
        torch.set_num_threads(threads)


def _keep_memory() -> None:
    """Make glibc keep freed memory for the next step, in huge pages where Linux gives them to those who ask.

    By default it returns large blocks to the system, and every activation of every step is paged in again: on a CPU
    that took up to a sixth of a step and a third of the views. Looking up pages of 4 kB takes up to a fifth.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        # Older versions of glibc refuse more than 32 MiB. If both sizes are refused, the other threshold must stay too:
        # setting either one stops glibc from adapting them, and every block above 128 kB would be paged in again.
        most = next((size for size in (1 << 30, 32 << 20) if libc.mallopt(mmap_threshold, size)), None)
        if most is not None:
            libc.mallopt(trim_threshold, (1 << 31) - 1)
            if _may_reserve() and threading.current_thread() is threading.main_thread():  # others have small heaps
                _reserve_huge_pages(most)


def _may_reserve() -> bool:
    """Whether huge pages must be asked for, and address space that is not used costs nothing."""
    import resource

    limits = {resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA)}
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii")
    # Another allocator, or one that writes to what it frees: whoever sets these has plans for the memory.
    chosen = {"LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_PERTURB_"} & os.environ.keys()
    return "[madvise]" in pages and overcommit.strip() != "2" and limits == {resource.RLIM_INFINITY} and not chosen


@functools.cache
def _reserve_huge_pages(most: int) -> None:
    """Grow the heap by a quarter of the machine's memory, which stays untouched until it is used, in huge pages then.

    Advice for single blocks, as torch's THP_MEM_ALLOC_ENABLE gives it, gained nothing (docs/log.md). A disadvantage:
    calloc, and so np.zeros, clears memory that comes from there.

    most: larger blocks may not come from the heap.
    """
    import ctypes

    libc, address, size = ctypes.CDLL(None), ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.restype, libc.malloc.argtypes = address, [size]
    libc.free.restype, libc.free.argtypes = None, [address]
    libc.sbrk.restype, libc.sbrk.argtypes = address, [ctypes.c_ssize_t]
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    page, trim_threshold, huge_pages = os.sysconf("SC_PAGE_SIZE"), -1, 14
    reserve = min(os.sysconf("SC_PHYS_PAGES") * page // 4, 32 << 30)
    block = min(most - (1 << 20), reserve)
    libc.mallopt(trim_threshold, -1)  # never: the heap's unused end is larger than any other value
    start = libc.sbrk(0)
    blocks = [libc.malloc(block) for _ in range(reserve // block)]
    end = libc.sbrk(0)
    for each in blocks:
        libc.free(each)
    start = -(-start // page) * page
    libc.madvise(start, end - start, huge_pages)


_WORTH_BF16 = 1.1


def probe_precision(device: torch.device, step: Callable[[Compute], None]) -> tuple[Literal["bf16", "fp32"], str]:
    """Time `step` in both precisions and return the faster one, with the reason: bf16 only if it gains a tenth, so that
    noise does not decide, and a seed's weights are the same again, where both are about as fast.

    One warm-up and two timed repetitions each; the minimum counts, because noise only adds time.
    """
    if device.type == "mps":
        return "fp32", "bf16 autocast is not used on mps"
    if device.type == "cuda":
        bf16 = computes_bf16(device)
        return ("bf16", "this GPU has bf16 units") if bf16 else ("fp32", "this GPU has no bf16 units")
    if not computes_bf16(device):
        return "fp32", "this processor would have to emulate bf16"
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
    if ratio >= _WORTH_BF16:
        return "bf16", f"measured {ratio:.2f}x faster than fp32 here"
    if ratio > 1:
        return "fp32", f"bf16 was measured to be only {ratio:.2f}x faster here"
    return "fp32", f"measured {1 / ratio:.2f}x faster than bf16 here"


def computes_bf16(device: torch.device) -> bool:
    """False if the device emulates bf16. A CPU does so ten times slower than fp32: even trying takes too long."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # a private torch function
        return True


def probe_encoder(encoder: torch.nn.Module, size: int, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return the faster precision for a forward pass on images of this size."""
    import torch

    x = torch.zeros(32, 3, size, size).to(device, memory_format=torch.channels_last)

    def step(compute: Compute) -> None:
        with torch.inference_mode(), compute.autocast():
            encoder(x)

    Compute(device, "fp32").place(encoder)
    return probe_precision(device, step)[0]


def generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a random generator seeded by its key (seed, step, ...), so that a resumed run draws the same numbers."""
    import torch

    return torch.Generator(device).manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """Hash the key to one number: neighbouring seeds must not give correlated streams."""
    import hashlib

    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Return versions and hardware for `environment.json`; with several GPUs, the given or else the current one."""
    import importlib.metadata

    import torch
    import torchvision

    import simsiam

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    gpu = device if device is not None and device.type == "cuda" else None
    return {
        "simsiam": simsiam.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": importlib.metadata.version("timm"),
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": cpu_quota(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
    }
