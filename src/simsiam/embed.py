"""Use a trained encoder in memory and inside scikit-learn: images in, one vector each out."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

from simsiam.compute import Compute, out_of_memory, pick_device, set_threads
from simsiam.config import UserError, as_path
from simsiam.data.decode import DecodeError, decode, in_order
from simsiam.encoders import in_use
from simsiam.features import BATCH, features_of
from simsiam.kernels import padded
from simsiam.weights import compute_of, failure, read_encoder


def load(run: str | Path, device: str = "auto", precision: str = "auto") -> ImageEncoder:
    """Loads the trained encoder of a run: `simsiam.load("runs/demo").embed(["a.jpg", "b.jpg"])`.

    Raises UserError if `run` holds no encoder.
    """
    return ImageEncoder(_folder(run), device, precision).open()


def _folder(run: Any) -> str:
    """The run folder as a string. Raises UserError for anything but a path, such as a summary or None."""
    if not isinstance(run, str | os.PathLike):
        kept = " For train()'s summary, use summary['run']." if isinstance(run, dict) else ""
        raise UserError(f"A run is given by its folder, a string or a path, not {type(run).__name__}.{kept}")
    return os.path.expanduser(os.fspath(run))


class ImageEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A run's encoder as a scikit-learn transformer: images in, float32 [N,D] out; it works inside a `Pipeline`.

    Args:
        run: the run folder.
        device: 'auto', 'cpu', 'cuda', ...
        precision: 'bf16', 'fp32' or 'auto' (see `compute_of`).
    """

    def __init__(self, run: str, device: str = "auto", precision: str = "auto") -> None:
        self.run = run
        self.device = device
        self.precision = precision

    def open(self) -> Self:
        """Loads the weights now, not on first use. Raises UserError if there are none."""
        asked = (self.run, self.device, self.precision)
        if getattr(self, "opened_", None) != asked:  # not opened yet, or set_params was called since
            if self.precision not in ("auto", "bf16", "fp32"):
                raise UserError(f"precision is {self.precision!r}: it must be 'auto', 'bf16' or 'fp32'.")
            set_threads()
            device, run = pick_device(self.device), Path(_folder(self.run))
            self.opened_ = None  # until all of it is
            self.encoder_, self.preprocessing_, self.meta_ = read_encoder(run)
            if self.precision == "auto":
                self.compute_ = compute_of(run, self.encoder_, self.preprocessing_, device)
            else:
                precision: Any = self.precision
                self.compute_ = Compute(device, precision)
            self.compute_.place(self.encoder_)
            self._in_use = in_use(self.encoder_, self.compute_)
            self.opened_ = asked
            if failed := failure(self.run, self.meta_):
                warnings.warn(failed, stacklevel=2)
        return self

    def fit(self, images: Any = None, y: Any = None) -> Self:
        """Loads the weights and returns self; there is nothing left to learn."""
        return self.open()

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def _n_features_out(self) -> int:
        """`dim` under scikit-learn's name, for the column names imageencoder0, imageencoder1, ..."""
        return self.dim

    @property
    def dim(self) -> int:
        """Length of a vector."""
        self.open()
        return self.encoder_.dim

    def embed(self, images: Any) -> NDArray[np.float32]:
        """Returns one vector per image: float32 [N,D], in order, not normalised.

        Args:
            images: a list of paths, PIL images or uint8 arrays [H,W,3] or [H,W]; or one uint8 array [N,H,W,3].
        Raises:
            UserError if an image cannot be read; the message names it.
        """
        self.open()
        if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OUS":
            images = images.tolist()  # paths, as scikit-learn passes them
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            raise UserError(
                f"{os.fspath(images)} is a folder: give embed() a list of its files, or use `simsiam embed`."
            )
        one = getattr(images, "ndim", None) in (2, 3) or (isinstance(images, np.ndarray) and images.ndim < 2)
        if one or isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise UserError(f"embed() takes a list of images: {_as_list(images)}.")
        if not isinstance(images, Iterable):
            raise UserError(f"embed() takes a list of images, not {type(images).__name__}.")
        rest, rows = enumerate(images), []
        while batch := _decoded(itertools.islice(rest, BATCH), self.preprocessing_.short_side):
            rows.append(self._embed(batch))
        return np.concatenate(rows) if rows else np.zeros((0, self.encoder_.dim), np.float32)

    def transform(self, images: Any) -> NDArray[np.float32]:
        """`embed` under the name that scikit-learn calls."""
        return self.embed(images)

    def _embed(self, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return features_of(self._in_use, self.preprocessing_, *padded(images), self.compute_).numpy()


def _as_list(images: Any) -> str:
    """What to pass instead of something that is not a list of images."""
    if hasattr(images, "columns"):
        return "for a column of a table, pass table['path']; in a ColumnTransformer, name the column without brackets"
    shape: tuple[int, ...] = images.shape if isinstance(images, np.ndarray) else ()
    if len(shape) == 2 and images.dtype.kind in "OUS":
        return "for a column of paths, pass column.ravel()"
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        return "for gray images in one array, pass list(array)"
    return "put a single image into a list, [image]"


def _decoded(images: Iterable[tuple[int, Any]], short_side: int) -> list[NDArray[np.uint8]]:
    """The pixels of numbered images. Files are read by threads; the others are reduced as they come, since a generator
    may yield more than fits into memory, and by one thread, since several of Pillow's images may share a file."""
    pixels: list[Any] = []
    files: dict[int, str | os.PathLike[str]] = {}
    for number, image in images:
        if isinstance(image, str | os.PathLike):
            files[len(pixels)] = image
            pixels.append(None)
        else:
            pixels.append(_pixels(number, image, short_side))
    paths = list(files.values())
    found = in_order(lambda i: _read(paths[i], short_side), len(paths))
    for place, each in zip(files, found, strict=True):
        pixels[place] = each
    return pixels


def _read(path: str | os.PathLike[str], short_side: int) -> NDArray[np.uint8]:
    try:
        return decode(as_path(path).read_bytes(), short_side)
    except (OSError, DecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot read the image {os.fspath(path)}: {reason}.") from None


def _pixels(number: int, image: Any, short_side: int) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        try:
            return decode(image.copy(), short_side)  # decoding modifies its input
        except Exception as error:  # Pillow raises anything, of a file that it has opened but not read, or has closed
            if out_of_memory(error):
                raise
            raise UserError(f"Cannot read the image {getattr(image, 'filename', '') or image}: {error}.") from None
    array = np.asarray(image)
    coloured = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not array.size or not (coloured or array.ndim == 2):
        turn = (
            " Transpose it: .transpose(1, 2, 0)."
            if array.ndim == 3 and array.shape[0] in (1, 3) and not coloured
            else ""
        )
        scale = " Pass values from 0 to 255 as uint8." if array.dtype.kind == "f" and array.ndim else ""
        what = f"{array.dtype} {list(array.shape)}" if hasattr(image, "shape") else type(image).__name__
        if image is None or (array.ndim == 0 and str(image == image) != "True"):  # NaN, or pandas' NA
            what = f"missing ({image})"
        what += ": open it with PIL" if isinstance(image, bytes) else ""
        kinds = "An image is a path, a PIL image or a uint8 array [H,W,3]"
        raise UserError(f"{kinds}; image {number} (from 0) is {what}.{turn}{scale}")
    return decode(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array), short_side)
