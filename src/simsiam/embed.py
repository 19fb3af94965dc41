"""Use a trained encoder: images in, one vector each out. On disk, in memory, inside scikit-learn."""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from torch import Tensor

from simsiam.compute import Compute, computes_bf16, out_of_memory, pick_device, probe_encoder, set_threads
from simsiam.config import UserError, fill, read_recipe
from simsiam.data.decode import DecodeError, decode
from simsiam.data.views import ViewSettings, plain_view
from simsiam.encoders import Encoder, EncoderSpec, build, in_use, to_table, view_dtype
from simsiam.kernels import Images, padded
from simsiam.runs import ENCODER, ENVIRONMENT, RECIPE, read_json, read_kept, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from simsiam.data.cache import Cache

Progress = Callable[[int, int], None]

BN_IMAGES = 1024
_BATCH = 256
_PIXEL_SIDE = 32  # a larger input would make the baseline slower, not better
_SMALL = 64


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to the encoder's input; stored with the weights, so that use can never differ from training."""

    size: int
    """Side of the encoder's input in pixels."""
    share: float
    """Side of the central crop as a fraction of the image's short side."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def short_side(self) -> int:
        """The short side to decode images to, which leaves `size` pixels after the central crop."""
        return round(self.size / self.share)

    def crops(self, scale: tuple[float, float]) -> ViewSettings:
        """Random crops with area fractions in `scale` and flips, to train a classifier on; no colour, no blur."""
        return ViewSettings(self.size, scale, jitter_p=0, gray_p=0, blur_p=0, mean=self.mean, std=self.std)

    def __call__(self, images: Images, sizes: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [B,3,H,W] or packed, and each image's (height, width) -> [B,3,size,size], float32 or bfloat16."""
        return plain_view(images, self.size, self.share, self.mean, self.std, sizes, dtype)


def preprocessing(size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Preprocessing:
    """The usual central crop of 7/8 for photographs; images of a few dozen pixels are used whole."""
    return Preprocessing(size, 1.0 if size <= _SMALL else 0.875, mean, std)


def embed_batches(
    encoder: Callable[[Tensor], Tensor],
    prepare: Callable[[Images, Tensor], Tensor],
    cache: Cache,
    rows: NDArray[np.int64],
    compute: Compute,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Yields the features of the given cache rows in order, batch by batch: float32 [B,D] on the CPU.

    The encoder must be in eval mode and on the device. `prepare` is a `Preprocessing` or another function that makes
    views from images and their sizes.
    """
    encoder = in_use(encoder, compute)
    for start in range(0, len(rows), _BATCH):
        yield _features(encoder, prepare, *cache.packed(rows[start : start + _BATCH]), compute)
        if progress is not None:
            progress(min(start + _BATCH, len(rows)), len(rows))


def _features(
    encoder: Callable[[Tensor], Tensor],
    prepare: Callable[[Images, Tensor], Tensor],
    images: Images,
    sizes: Tensor,
    compute: Compute,
) -> Tensor:
    """A batch's features, float32 [B,D] on the CPU; computed in halves if memory is too small for the whole batch.

    Raises UserError if it is too small for a single image.
    """
    try:
        given = images.to(compute.device), sizes.to(compute.device)
        x = prepare(*given, view_dtype(encoder)) if isinstance(prepare, Preprocessing) else prepare(*given)
        with torch.inference_mode(), compute.autocast():
            return encoder(x).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(images) == 1:
            where = "this machine's memory" if compute.device.type == "cpu" else f"the memory of {compute.device}"
            raise UserError(f"Not even a single image fits into {where}. Another --device may have more.") from None
    x = torch.empty(0)  # frees the memory of the larger batch
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(images) // 2
    parts = (slice(None, half), slice(half, None))
    return torch.cat([_features(encoder, prepare, images[part], sizes[part], compute) for part in parts])


def embed_rows(
    encoder: Callable[[Tensor], Tensor],
    prepare: Callable[[Images, Tensor], Tensor],
    cache: Cache,
    rows: NDArray[np.int64],
    compute: Compute,
    progress: Progress | None = None,
) -> Tensor:
    """Everything that `embed_batches` yields, as one tensor: float32 [N,D]."""
    features, done = torch.zeros(0, 0), 0
    for found in embed_batches(encoder, prepare, cache, rows, compute, progress):
        if not done:  # allocated at once: a list and its concatenation would take twice the memory
            features = torch.empty(len(rows), found.shape[1])
        features[done : done + len(found)] = found
        done += len(found)
    return features


def pixel_rows(prepare: Preprocessing, cache: Cache, rows: NDArray[np.int64]) -> Tensor:
    """The baseline without an encoder: the encoder's input, at most 32 pixels wide, as vectors [N,3*h*w].

    Normalised by mean and std like the encoder's input, which makes the baseline stronger than pixels in 0..1.
    """
    small = Preprocessing(min(prepare.size, _PIXEL_SIDE), prepare.share, prepare.mean, prepare.std)
    return embed_rows(lambda x: x.flatten(1), small, cache, rows, Compute(torch.device("cpu"), "fp32"))


def untrained(
    spec: EncoderSpec, seed: int, prepare: Preprocessing, cache: Cache, rows: NDArray[np.int64], compute: Compute
) -> Encoder:
    """The encoder as it was before training, with BN statistics measured on the given rows (`BN_IMAGES` are enough).

    With the initial statistics (mean 0, variance 1) its activations would drift from layer to layer, which would
    understate the baseline.
    """
    encoder = build(spec, seed)
    compute.place(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    encoder.eval()
    for norm in norms:  # BN only: dropout and stochastic depth would be random
        norm.train()
    # Full batches only, if there are any: a small last batch would count as much, and BN cannot compute the variance of
    # a single image.
    embed_rows(encoder, prepare, cache, rows[: len(rows) // _BATCH * _BATCH or None], compute)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return encoder.eval()


# --- the encoder on disk --------------------------------------------------------------------------------------------


def save_encoder(run: Path, encoder: Encoder, prepare: Preprocessing, seed: int, about: dict[str, Any]) -> None:
    """Writes `encoder.safetensors` with the backbone's own names and `encoder.json` with all that its use needs."""
    weights = run / f"{ENCODER}.safetensors"
    write_tensors(weights, encoder.backbone.state_dict())
    meta = {
        "format": 1,
        "encoder": to_table(encoder.spec),
        "seed": seed,
        "dim": encoder.dim,
        "preprocessing": asdict(prepare),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **about,
    }
    write_json(run / f"{ENCODER}.json", meta)


def read_encoder(run: Path) -> tuple[Encoder, Preprocessing, dict[str, Any]]:
    """A run's encoder in eval mode, its preprocessing and the contents of `encoder.json`.

    Raises UserError if `run` has none (yet), the two files do not belong together, or another version of timm or
    torchvision builds a different network.
    """
    description, weights = run / f"{ENCODER}.json", run / f"{ENCODER}.safetensors"
    if not description.exists():
        begun = (run / RECIPE).exists()
        resume = (
            f" Its training has not finished: `simsiam train --resume -o {shlex.quote(str(run))}`." if begun else ""
        )
        raise UserError(f"{run} holds no trained encoder.{resume or ' Name a folder that `simsiam train` wrote.'}")
    meta = read_json(description)
    try:
        spec = fill(EncoderSpec, meta["encoder"], "encoder")
        prepare = fill(Preprocessing, meta["preprocessing"], "preprocessing")
        _ = meta["seed"], meta["sha256"]
    except (KeyError, TypeError):
        raise UserError(f"{description} is damaged: it does not describe an encoder.") from None
    try:
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"Cannot read {weights}: {error.strerror}.") from None
    if sha256 != meta["sha256"]:
        raise UserError(f"{weights} is not the file that {description.name} describes: copy both from the same run.")
    encoder = build(spec, meta["seed"])
    try:
        encoder.backbone.load_state_dict(read_tensors(weights)[0])
    except RuntimeError:  # names or shapes differ from those in training
        raise UserError(
            f"{weights} does not fit {spec.name} as it is built here: install the versions listed in "
            f"{run / ENVIRONMENT}."
        ) from None
    return encoder.eval(), prepare, meta


def failure(run: str | Path, meta: dict[str, Any]) -> str | None:
    """What the user of a run's encoder, described by its `encoder.json`, has to know if training failed; None if not."""
    verdict, step = meta.get("verdict"), meta.get("step")
    return {
        "diverged": f"{run} diverged: this is the last encoder that was healthy, from step {step}.",
        "collapsed": f"{run} collapsed: its vectors are nearly the same for all images.",
        "partial": f"{run} collapsed partly: its vectors use few directions.",
    }.get(str(verdict))


def compute_of(run: Path, encoder: Encoder, prepare: Preprocessing, device: torch.device) -> Compute:
    """How to compute with a run's encoder on a device: in its training precision, so that results match those at the
    end of training and are the same every time. If that is unknown, was chosen on another kind of device or would be
    emulated here, the faster precision is measured and used."""
    found: Any = None
    if (run / RECIPE).exists() and (run / ENVIRONMENT).exists():
        same = str(read_kept(run / ENVIRONMENT).get("device")).partition(":")[0] == device.type
        found = read_recipe(run / RECIPE).get("train", {}).get("precision") if same else None
    emulated = found == "bf16" and not computes_bf16(device)
    if found not in ("bf16", "fp32") or emulated:
        found = probe_encoder(encoder, prepare.size, device)
    return Compute(device, found)


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
    return os.fspath(run)


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
            set_threads()
            device, run = pick_device(self.device), Path(_folder(self.run))
            self.encoder_, self.preprocessing_, self.meta_ = read_encoder(run)
            if self.precision not in ("auto", "bf16", "fp32"):
                raise UserError(f"precision is {self.precision!r}: it must be 'auto', 'bf16' or 'fp32'.")
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
        rest, rows = iter(images), []
        while batch := [_pixels(image, self.preprocessing_.short_side) for image in itertools.islice(rest, _BATCH)]:
            rows.append(self._embed(batch))
        return np.concatenate(rows) if rows else np.zeros((0, self.encoder_.dim), np.float32)

    def transform(self, images: Any) -> NDArray[np.float32]:
        """`embed` under the name that scikit-learn calls."""
        return self.embed(images)

    def _embed(self, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return _features(self._in_use, self.preprocessing_, *padded(images), self.compute_).numpy()


def _as_list(images: Any) -> str:
    """What to pass instead of something that is not a list of images."""
    shape: tuple[int, ...] = images.shape if isinstance(images, np.ndarray) else ()
    if len(shape) == 2 and images.dtype.kind in "OUS":
        return "for a column of paths, pass column.ravel()"
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        return "for gray images in one array, pass list(array)"
    return "put a single image into a list, [image]"


def _pixels(image: Any, short_side: int) -> NDArray[np.uint8]:
    if isinstance(image, str | os.PathLike):
        try:
            return decode(Path(image).read_bytes(), short_side)
        except (OSError, DecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"Cannot read the image {os.fspath(image)}: {reason}.") from None
    if isinstance(image, Image.Image):
        try:
            return decode(image.copy(), short_side)  # decoding modifies its input
        except (OSError, DecodeError) as error:  # a file that Pillow has opened but not read
            raise UserError(f"Cannot read the image {getattr(image, 'filename', '') or image}: {error}.") from None
    array = np.asarray(image)
    coloured = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not array.size or not (coloured or array.ndim == 2):
        turn = (
            " Transpose it: .transpose(1, 2, 0)."
            if array.ndim == 3 and array.shape[0] in (1, 3) and not coloured
            else ""
        )
        scale = " Pass values from 0 to 255 as uint8." if array.dtype.kind == "f" else ""
        what = f"{array.dtype} {list(array.shape)}" if hasattr(image, "shape") else type(image).__name__
        what += ": open it with PIL" if isinstance(image, bytes) else ""
        raise UserError(f"An image is a path, a PIL image or a uint8 array [H,W,3]; this is {what}.{turn}{scale}")
    return decode(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array), short_side)
