"""Decode images to upright RGB pixels. A file that cannot be decoded raises DecodeError; none is silently replaced."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import PIL
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, features

from simsiam import kernels
from simsiam.compute import cpu_quota, out_of_memory

T = TypeVar("T")

HEIC = (".heic", ".heif", ".hif")


def _further() -> Iterator[str]:
    """Further extensions, which depend on the build of Pillow and on its plug-in for iPhone photographs."""
    if "avif" in features.modules and features.check("avif"):  # Pillow before 11.3 warns about unknown names
        yield ".avif"
    if features.check("jpg_2000"):
        yield from (".jp2", ".j2k")
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
        yield from HEIC


ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *_further()),
)
"""Extensions of the files that are treated as images."""

_RAW = (".dng", ".cr2", ".nef", ".arw")
NOT_READ = (*HEIC, *_RAW, ".avif", ".jp2", ".j2k", ".jxl", ".ico", ".psd", ".svg", ".dcm")
"""Extensions of images that are named if they are left out. Those in `ENDINGS` are not."""

VERSION = f"2, Pillow {PIL.__version__}: {' '.join(ENDINGS)}"
"""Identifies what this installation can decode; another one may decode more. Since 2, of twice as many pixels."""

_BOMBS = "Pillow's limit against decompression bombs"
# `most_pixels` is the limit here; Pillow would warn from half of it on, of photographs of 108 megapixels too.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_ASPECT = 4
"""With `short_side`, the long side is centre-cropped to at most this many short sides, as batches are padded."""

_UPRIGHT = {  # EXIF tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """The image cannot be decoded; the message is the reason, ready for a list of bad files."""


def count_kinds(names: Iterable[str]) -> str:
    """The extensions of files in words, with their numbers."""
    endings = Counter(os.path.splitext(name)[1].lower() or "(no ending)" for name in names)
    first = endings.most_common(5)
    rest = endings.total() - sum(count for _, count in first)
    return ", ".join([*(f"{ending} {count}" for ending, count in first), *([f"others {rest}"] if rest else [])])


def hint(names: Iterable[str]) -> str:
    """A hint to install the HEIC plug-in, if the files include iPhone photographs and it is missing."""
    missing = any(name.lower().endswith(HEIC) for name in names) and ".heic" not in ENDINGS
    return " To read .heic: pip install pillow-heif." if missing else ""


def most_pixels() -> int | None:
    """The largest image that Pillow opens; from half of that on it warns. None: no limit."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def check_length(length: int) -> None:
    """Raises DecodeError if an encoded image of `length` bytes, not read yet, is larger than the largest image that is
    decoded, at 16 bits for each of four channels."""
    limit = most_pixels()
    if limit is not None and length > 8 * limit:
        raise DecodeError(f"{length / 1e6:,.0f} MB, more than {limit / 1e6:.0f} megapixels can take, {_BOMBS}")


def open_image(source: bytes | Image.Image) -> Image.Image:
    """Opens an image, reading only its header: size, mode and format, no pixels. Raises DecodeError."""
    if isinstance(source, Image.Image):
        image = source
    elif not source:
        raise DecodeError("empty file (0 bytes)")
    else:
        try:
            image = Image.open(io.BytesIO(source))
        except Image.UnidentifiedImageError:
            text = all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in source[:64])
            raise DecodeError("text, not an image" if text else "not an image that Pillow can read") from None
        except Image.DecompressionBombError:
            raise _too_large() from None
        except Exception as error:  # Pillow's plug-ins raise all kinds of errors on a broken header
            raise DecodeError(_reason(error)) from None
    limit = most_pixels()
    if limit is not None and image.width * image.height > limit:
        raise _too_large()
    return image


def _too_large() -> DecodeError:
    return DecodeError(f"more than {(most_pixels() or 0) / 1e6:.0f} megapixels, {_BOMBS}")


def decode(source: bytes | Image.Image, short_side: int | None = None) -> np.ndarray:
    """The image as uint8 [H, W, 3], RGB, upright (EXIF orientation applied); the first frame of an animation.

    Transparency is composited over white. Grey values of more than 8 bits are scaled, never clipped (`_to_8_bit`).

    Args:
        source: the encoded file, or an image opened by Pillow.
        short_side: pixels. A larger image is reduced, antialiased and keeping its aspect, to min(H, W) == short_side
            (`reduced_size`); a smaller one is never enlarged. A long side of more than `MAX_ASPECT` short sides is
            centre-cropped. A large JPEG is decoded at a reduced DCT scale, of at least twice the target.

    Raises DecodeError with the reason (empty, not an image, truncated, too many pixels), or MemoryError if the machine
    runs out of memory, which says nothing about the file.
    """
    image = open_image(source)
    size, drafted = (image.height, image.width), None
    try:
        if short_side is not None and min(image.size) > 2 * short_side:
            gap = 2 * short_side / min(image.size)
            drafted = image.draft(None, (round(image.width * gap), round(image.height * gap)))
        pixels = _jpeg(source, image)
        if pixels is None:
            image.load()
            pixels = np.array(_to_rgb(image))
        turn = orientation(image)  # after load(), which rotates a TIFF itself
        if short_side is not None:
            whole, scale = (size, size[1] / drafted[1][2]) if drafted else (pixels.shape[:2], 1.0)
            pixels = _reduce(pixels, short_side, whole, scale)
        if turn in _UPRIGHT:
            pixels = np.array(Image.fromarray(pixels).transpose(_UPRIGHT[turn]))
        return pixels
    except Exception as error:  # as above: broken files raise OSError, SyntaxError, ValueError, struct.error, ...
        if out_of_memory(error):  # which says nothing about the file
            raise MemoryError("not enough memory to decode it") from None
        raise DecodeError(_reason(error)) from None


def _jpeg(source: bytes | Image.Image, image: Image.Image) -> np.ndarray | None:
    """Decodes an intact colour JPEG, or the first image of a phone's multi-picture file (MPO), bit for bit like Pillow
    in as little as half the time; None if Pillow itself has to decode it."""
    if isinstance(source, bytes) and image.format in ("JPEG", "MPO") and image.mode == "RGB":
        with contextlib.suppress(ValueError):  # picks the least sufficient DCT scale, as Pillow does
            pixels: np.ndarray = simplejpeg.decode_jpeg(source, min_height=image.height, min_width=image.width)
            return pixels
    return None


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8: 1, also for unreadable EXIF, is upright; from 5 on, width and height are swapped."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block does not make the pixels bad
        return 1


def default_workers() -> int:
    """Number of decoding threads: the cores this process may use, at most 16."""
    return min(16, cpu_quota())


def in_order(
    work: Callable[[int], T], count: int, workers: int | None = None, chunk: int = 16
) -> Generator[T, None, None]:
    """work(0), work(1), ... computed by threads (Pillow releases the GIL) and yielded in order.

    At most `2 * workers * chunk` results are held, which bounds the memory if the consumer is slow.
    """
    workers = workers or default_workers()
    starts = iter(range(0, count, chunk))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="simsiam-decode")
    pending: deque[Future[list[T]]] = deque()

    def many(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + chunk, count))]

    try:
        for start in starts:
            pending.append(pool.submit(many, start))
            if len(pending) >= 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("1", "L", "RGB") and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()  # left over from a palette that Pillow converted; it does not apply to these pixels
        del image.info["transparency"]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Converts grey [H, W] of 16 or 32 bits, or float, to uint8, linearly.

    Pillow's own conversion clips at 255. Integers of up to 16 bits are divided by the full scale of the smallest usual
    depth (8, 10, 12, 14, 16 bits) that holds the image's maximum, because 12-bit cameras save 16-bit files that would
    come out black. Floats within 0..1 keep that scale; anything else is stretched from its minimum to its maximum.
    What is not finite is black.
    """
    values = pixels.astype(np.float64)
    finite = np.isfinite(values)
    known = values[finite] if finite.any() else np.zeros(1)
    low, high = float(known.min()), float(known.max())
    real = pixels.dtype.kind == "f"
    if real and low >= 0 and high <= 1:
        full = 1.0
    elif real or low < 0 or high > 65535:
        values, full = values - low, high - low
    else:
        full = next(float(2**bits - 1) for bits in (8, 10, 12, 14, 16) if high <= 2**bits - 1)
    scaled = values * (255 / full) if full else values
    return np.rint(np.where(finite, scaled, 0.0)).astype(np.uint8)


def reduced_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width that `decode` gives an image. The long side is rounded down, as torchvision's `Resize` does."""
    short = min(height, width)
    kept_h, kept_w = _kept(height, width)
    return min(short, short_side) * kept_h // short, min(short, short_side) * kept_w // short


def _kept(height: int, width: int) -> tuple[int, int]:
    """Height and width of the central part of an image that `decode` keeps."""
    most = MAX_ASPECT * min(height, width)
    return min(height, most), min(width, most)


def _reduce(pixels: np.ndarray, short_side: int, whole: tuple[int, ...], scale: float) -> np.ndarray:
    """whole: height and width of the image; pixels: the image at 1/scale, its sides rounded up."""
    lengths = _kept(whole[0], whole[1])
    starts = [(side - length) // 2 for side, length in zip(whole, lengths, strict=True)]
    # The image ends within its last pixel if a side is no multiple of the scale.
    (top, height), (left, width) = ((start / scale, n / scale) for start, n in zip(starts, lengths, strict=True))
    y, x = int(top), int(left)
    pixels = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
    if min(whole) <= short_side:
        return pixels
    size, box = reduced_size(whole[0], whole[1], short_side), (top - y, left - x, height, width)
    image = torch.from_numpy(np.ascontiguousarray(pixels))
    # Pillow's antialiased bicubic resize to within a level or two, in a third of the time.
    if kernels.usable(image):
        return kernels.reduced(image, *size, box).numpy()
    if box == (0, 0, *pixels.shape[:2]):  # torch takes no part of a pixel
        resized = F.interpolate(image.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
        return resized[0].permute(1, 2, 0).numpy()
    edges = (box[1], box[0], box[1] + width, box[0] + height)
    return np.array(Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BICUBIC, edges))
