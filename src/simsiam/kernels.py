"""CPU kernels in C (kernels.c), compiled once by the machine's own compiler and run on torch's own threads.

Without a compiler, on systems other than Linux, or with SIMSIAM_KERNELS=0 in the environment, their callers fall back
to torch's operations, which take longer.
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
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simsiam.config import UserError
from simsiam.runs import atomic, cache_folder

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_off = False
_building = threading.Lock()


@dataclass(frozen=True)
class Packed:
    """Images of various sizes in a memory map, from which `views` reads them without copying."""

    pixels: NDArray[np.uint8]
    """[n]: the images, [H,W,3] each, at any offsets."""
    starts: NDArray[np.int64]
    """[B]: where each image begins."""
    sizes: NDArray[np.int32]
    """[B,2]: (height, width)."""

    device: ClassVar[torch.device] = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, part: slice) -> Packed:
        return Packed(self.pixels, self.starts[part], self.sizes[part])

    def to(self, device: torch.device) -> Images:
        """These images if there are kernels for the device, else `padded` on it."""
        return self if device.type == "cpu" and usable(self) else self.padded().to(device)

    def padded(self) -> Tensor:
        """A copy: uint8 [B,3,H,W] in channels_last, zero-padded at bottom and right to the largest height and width."""
        (height, width), (least_height, least_width) = self.sizes.max(0).tolist(), self.sizes.min(0).tolist()
        if (height, width) == (least_height, least_width):
            whole = np.lib.stride_tricks.sliding_window_view(self.pixels, 3 * height * width)
            images = whole[self.starts].reshape(-1, height, width, 3)
            return torch.from_numpy(images).permute(0, 3, 1, 2)
        sides = zip(self.starts.tolist(), self.sizes.tolist(), strict=True)
        return padded([self.pixels[start : start + 3 * h * w].reshape(h, w, 3) for start, (h, w) in sides])[0]


Images = Tensor | Packed


def padded(images: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Batches images, uint8 [h,w,3] of any sizes, zero-padded at the bottom and right: uint8 [B,3,H,W] in
    channels_last, and int64 [B,2] with each one's (height, width)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    batch = np.zeros((len(images), height, width, 3), np.uint8)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(batch).permute(0, 3, 1, 2), torch.tensor([image.shape[:2] for image in images])


def usable(x: Images) -> bool:
    """Whether the input is on a CPU and the kernels could be compiled."""
    return x.device.type == "cpu" and compiled() is not None


def views(
    images: Images,
    geometry: Tensor,
    colour: Tensor,
    bounds: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop, antialiased resize, flip, blur and colours of every view, in one pass.

    Args:
        images: B images: uint8 or float [B,3,H,W] on the CPU, or packed.
        geometry: [n B,10], in pixels: start and length of the crop along the height, and the limits of what it may
            read; the same along the width; 1 to flip; sigma of the blur, 0 for none. View i is of image i modulo B.
        colour: [n B,2,3,3]: a matrix for the pixels, and one for the view's mean colour, which is added.
        bounds: [3,3]: the offset added to each channel, its lowest and its highest value.
        dtype: float32 or bfloat16.
    Returns:
        [n B,3,size,size] of that dtype in channels_last.
    """
    assert dtype in (torch.float32, torch.bfloat16)
    if isinstance(images, Packed):
        address, real, (height, width) = images.pixels.ctypes.data, False, images.sizes.max(0).tolist()
        starts, widths = torch.from_numpy(images.starts), torch.from_numpy(images.sizes[:, 1].astype(np.int64))
    else:
        images = images if images.dtype == torch.uint8 else images.float()
        images = images.contiguous(memory_format=torch.channels_last)
        address, real, (height, width) = images.data_ptr(), images.is_floating_point(), images.shape[-2:]
        starts, widths = torch.arange(len(images)) * (3 * height * width), torch.full((len(images),), width)
    given = [each.to(torch.float32).contiguous() for each in (geometry, colour, bounds)]
    made = torch.empty(len(geometry), 3, size, size, dtype=dtype, memory_format=torch.channels_last)
    sides = (real, len(images), height, width, len(geometry), size, dtype == torch.float32)
    _call("views", address, *sides, *_places(starts, widths, *given, made))
    return made


def reduced(image: Tensor, height: int, width: int, box: tuple[float, float, float, float]) -> Tensor:
    """Pillow's bicubic resize of a part of an image, uint8 [H,W,3] on the CPU, to a smaller one, on the calling thread.

    box: the part in pixels: top, left, height, width.
    """
    assert image.dtype == torch.uint8 and image.is_contiguous() and image.shape[2] == 3
    made = torch.empty(height, width, 3, dtype=torch.uint8)
    _run("reduced", image.data_ptr(), *image.shape[:2], *box, height, width, made.data_ptr())
    return made


def norm(bn: nn.Module, x: Tensor, added: Tensor | None = None, relu: bool = True, views: int = 1) -> Tensor:
    """relu(bn(x) + added) in four passes over memory, forward and backward together, or in one at inference.

    bn: any kind of batch normalisation. Cases without a kernel, such as float64 or several processes, are left to `bn`
    and torch.
    x, added: float [B,C,h,w].
    views: number of batches that x concatenates, each normalised by its own statistics.
    """
    if torch.compiler.is_compiling() or type(bn) is not nn.BatchNorm2d or not _normalises(bn, x, added, views):
        if views > 1:
            more = [None] * views if added is None else added.chunk(views)
            return torch.cat([norm(bn, *each, relu) for each in zip(x.chunk(views), more, strict=True)])
        y: Tensor = bn(x) if added is None else bn(x) + added
        return F.relu(y, inplace=True) if relu else y
    x = x.contiguous(memory_format=torch.channels_last)
    added = None if added is None else added.contiguous(memory_format=torch.channels_last)
    parts = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    if not bn.training:
        in_use = torch.empty_like(x)
        _call("norm_in_use", *_kind(x, views), relu, *_places(x, added, in_use, *parts), bn.eps)
        return in_use
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(views)
    momentum = 1 / int(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
    normed: Tensor = _Norm.apply(x, added, *parts, momentum, bn.eps, relu, views)
    return normed


def norms_views(bn: nn.Module, x: Tensor) -> bool:
    """Whether `norm` takes several concatenated views as fast as one by one: it has a kernel for them."""
    return type(bn) is nn.BatchNorm2d and _normalises(bn, x, None, 2)


def _normalises(bn: nn.BatchNorm2d, x: Tensor, added: Tensor | None, views: int) -> bool:
    return (
        (bn.training or not torch.is_grad_enabled())
        and type(x) is Tensor  # not a stand-in, as during export
        and not torch.jit.is_tracing()
        and usable(x)
        and x.dtype in (torch.float32, torch.bfloat16)
        and (added is None or (added.dtype == x.dtype and added.shape == x.shape))
        and bn.affine
        and bn.weight.dtype == torch.float32
        and bn.track_running_stats
        and x.numel() > views * bn.training * x.shape[1]  # else torch raises: one value has no variance
        and (views == 1 or bn.momentum is not None)  # else the weight of each view's statistics differs
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        relu: bool,
        views: int,
    ) -> Tensor:
        y, saved = torch.empty_like(x), weight.new_empty(views, 4, len(weight))
        places = _places(x, added, y, weight, bias, running_mean, running_var)
        _call("norm_forward", *_kind(x, views), relu, *places, momentum, eps, saved.data_ptr())
        ctx.relu, ctx.adds, ctx.views = relu, added is not None, views
        # If nothing was added, the backward pass can tell from x what passed the ReLU.
        ctx.save_for_backward(x, y if relu and ctx.adds else None, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, saved = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        assert gradient.dtype == x.dtype
        of_x, of_added = torch.empty_like(x), torch.empty_like(x) if ctx.adds else None
        of_weight, of_bias = torch.empty_like(saved[0, :2]).unbind()
        places = _places(x, y, gradient, saved, of_x, of_added, of_weight, of_bias)
        _call("norm_backward", *_kind(x, ctx.views), ctx.relu, *places)
        return of_x, of_added, of_weight, of_bias, None, None, None, None, None, None


def weight_gradient(x: Tensor, gradient: Tensor, k: int, stride: int, padding: int) -> Tensor:
    """The gradient of the weight [outer,inner,k,k] of y = conv(x), float32 in channels_last, if `multiplies()`.

    Args:
        x: bfloat16 [B,inner,H,W] on the CPU.
        gradient: of y, bfloat16 [B,outer,h,w].
    """
    assert x.dtype == gradient.dtype == torch.bfloat16
    x, gradient = (each.contiguous(memory_format=torch.channels_last) for each in (x, gradient))
    batch, inner, height, width = x.shape
    outer, *sides = gradient.shape[1:]
    made = torch.empty(outer, k, k, inner)
    if not gradient.numel():
        return made.zero_().permute(0, 3, 1, 2)
    given = (batch, height, width, inner, outer, k, stride, padding, *sides)
    _call("weight_gradient", *given, *_places(x, gradient, made))
    return made.permute(0, 3, 1, 2)


def multiplies() -> bool:
    """Whether there is a kernel for `weight_gradient`, and the system lets this process use it."""
    return compiled() is not None and _may_multiply()


@functools.cache
def _may_multiply() -> bool:
    library = compiled()
    return library is not None and hasattr(library, "weight_gradient") and bool(library.may_multiply())


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k, dim=1)` of float32 [Q,N] on the CPU, 0 < k <= N, in one pass: sorted values, int64 columns."""
    assert values.dtype == torch.float32 and values.is_contiguous() and 0 < k <= values.shape[1]
    best, which = values.new_empty(len(values), k), torch.empty(len(values), k, dtype=torch.int64)
    if len(values):
        _call("largest", values.data_ptr(), *values.shape, k, *_places(best, which))
    return best, which


def _places(*tensors: Tensor | None) -> list[int | None]:
    return [None if each is None else each.data_ptr() for each in tensors]


def _kind(x: Tensor, views: int) -> tuple[bool, int, int, int]:
    return x.dtype == torch.float32, views, x.numel() // views // x.shape[1], x.shape[1]


def _call(name: str, *arguments: Any) -> None:
    """Runs a kernel that works on several threads."""
    _run(name, _parallel(), torch.get_num_threads(), *arguments)


def _run(name: str, *arguments: Any) -> None:
    library = compiled()
    assert library is not None
    if getattr(library, name)(*arguments):
        raise MemoryError


@functools.cache
def _parallel() -> int | None:
    """The address of GOMP_parallel, which runs torch's own threads: a second set would compete with them for cores."""
    # A library's handle also finds the symbols of its dependencies: on ARM nothing makes libgomp's global.
    for library in (str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"), None):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value
    return None


def wanted() -> bool:
    """Whether alternatives to torch's operations may be used: not with SIMSIAM_KERNELS=0, nor within `off`."""
    return not _off and os.environ.get("SIMSIAM_KERNELS") != "0"


def compiled() -> ctypes.CDLL | None:
    """The library, from the cache or compiled now, which takes a second; None if unavailable or turned off."""
    return _found()[0] if wanted() else None


def lacking() -> str:
    """Why there is no library, for the user; empty if there is one, or if none is expected."""
    return _found()[1] if wanted() else ""


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Uses torch's operations alone, as without a compiler, for comparison."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if sys.platform != "linux":
        return None, ""
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    compiler = next((found for found in map(shutil.which, names) if found), None)
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang)"
    if _parallel() is None:
        return None, "torch does not use GNU's OpenMP threads"
    try:
        library = _loaded(compiler)
    except (OSError, subprocess.SubprocessError, UserError, RuntimeError) as error:  # RuntimeError: no home folder
        told = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        return None, f"{compiler} failed ({(told or [str(error)])[0][:100]})"
    number, address, real = ctypes.c_long, ctypes.c_void_p, ctypes.c_double
    library.views.argtypes = [address, number, address, *[number] * 7, *[address] * 6]
    library.reduced.argtypes = [address, *[number] * 2, *[real] * 4, *[number] * 2, address]
    library.norm_forward.argtypes = [address, *[number] * 6, *[address] * 7, real, real, address]
    library.norm_in_use.argtypes = [address, *[number] * 6, *[address] * 7, real]
    library.norm_backward.argtypes = [address, *[number] * 6, *[address] * 8]
    library.largest.argtypes = [address, number, address, *[number] * 3, address, address]
    library.largest.restype = None
    if hasattr(library, "weight_gradient"):
        library.weight_gradient.argtypes = [address, *[number] * 11, *[address] * 3]
    return library, ""


def _loaded(compiler: str) -> ctypes.CDLL:
    built = _build(compiler)
    try:
        return ctypes.CDLL(str(built))
    except OSError:  # damaged since it was built
        built.unlink(missing_ok=True)
        return ctypes.CDLL(str(_build(compiler)))


def _build(compiler: str) -> Path:
    """Compiles the library if needed. Its name depends on the processor too, as machines may share a home folder."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    told = "\n".join([_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, *processor])
    key = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    built = cache_folder().resolve() / f"kernels-{key}.so"  # a bare name would be looked up in the system's paths
    with _building:
        if not built.exists():
            with atomic(built) as part:
                subprocess.run([compiler, *_FLAGS, "-o", part, _SOURCE, "-lm"], check=True, capture_output=True)
    return built
