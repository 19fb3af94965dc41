"""Loops in C for a CPU (kernels.c), compiled once by the machine's own compiler and run on torch's own threads.

Where there is no compiler, or no Linux, their callers do the same by torch's operations, and take longer: so they do with
SIMSIAM_KERNELS=0 in the environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def usable(x: Tensor) -> bool:
    """Whether what is to be computed lies on a CPU that the kernels could be compiled for."""
    return x.device.type == "cpu" and compiled() is not None


def views(images: Tensor, geometry: Tensor, colour: Tensor, bounds: Tensor, size: int) -> Tensor:
    """Crop, antialiased resize, flip, blur and colours of every view, in one go.

    Args:
        images: uint8 or float32 [B,3,H,W] on the CPU.
        geometry: [n B,10], in pixels: of the height, start and length of the crop and between which limits it may look; the
            same of the width; 1 to flip; sigma of the blur, 0 for none. View i is one of image i modulo B.
        colour: [n B,2,3,3]: a matrix for the pixels, and one for the view's mean, which is added.
        bounds: [3,3]: what else is added to each channel, its lowest and its highest value.
    Returns:
        float32 [n B,3,size,size] in channels_last.
    """
    library = compiled()
    assert library is not None and images.dtype in (torch.uint8, torch.float32)
    images = images.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = images.shape
    given = [each.to(torch.float32).contiguous() for each in (geometry, colour, bounds)]
    made = torch.empty(len(geometry), 3, size, size, memory_format=torch.channels_last)
    sides = (images.is_floating_point(), batch, height, width, len(geometry), size)
    if library.views(*_team(), images.data_ptr(), *sides, *(each.data_ptr() for each in [*given, made])):
        raise MemoryError
    return made


def _team() -> tuple[ctypes.c_void_p, int]:
    """What starts torch's own threads, and how many. Others beside them would make all wait for the system's scheduler."""
    return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p), torch.get_num_threads()


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """The library, from the cache or made now, which takes a second; None where that cannot be done."""
    if sys.platform != "linux" or os.environ.get("SIMSIAM_KERNELS") == "0":
        return None
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    compiler = next((found for found in map(shutil.which, names) if found), None)
    if compiler is None or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        library = ctypes.CDLL(str(_build(compiler)))
        number, address = ctypes.c_long, ctypes.c_void_p
        library.views.argtypes = [address, number, address, *[number] * 6, *[address] * 4]
        return library
    return None


def _build(compiler: str) -> Path:
    """A home folder may be shared by machines: the file's name tells the processor, too."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    told = "\n".join([_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, *processor])
    key = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    built = Path(os.environ.get("SIMSIAM_CACHE") or "~/.cache/simsiam").expanduser() / f"kernels-{key}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        part = built.with_suffix(f".{os.getpid()}")  # renamed when whole: another process may look
        try:
            subprocess.run([compiler, *_FLAGS, "-o", part, _SOURCE, "-lm"], check=True, capture_output=True)
            part.rename(built)
        finally:
            part.unlink(missing_ok=True)
    return built
