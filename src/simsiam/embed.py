"""A trained encoder in use: images in, one vector each out. On disk, in memory, inside scikit-learn."""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
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
_PIXEL_SIDE = 32  # larger pixels would make the baseline slower, not better
_SMALL = 64


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to what the encoder takes; stored with the weights, so that use can never differ from training."""

    size: int
    """Side of the encoder's input in pixels."""
    share: float
    """Side of the central square that is cut out, as a share of the image's short side."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def short_side(self) -> int:
        """What images are decoded to: `size` pixels are left after the central crop."""
        return round(self.size / self.share)

    def crops(self, scale: tuple[float, float]) -> ViewSettings:
        """Random crops of such a share of the area, and flips, as a classifier is trained on; no colour, no blur."""
        return ViewSettings(self.size, scale, jitter_p=0, gray_p=0, blur_p=0, mean=self.mean, std=self.std)

    def __call__(self, images: Images, sizes: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [B,3,H,W], or packed, and each image's (height, width) -> [B,3,size,size], float32 or bfloat16."""
        return plain_view(images, self.size, self.share, self.mean, self.std, sizes, dtype)


def preprocessing(size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Preprocessing:
    """The usual central crop of 7/8 for photographs; images of a few dozen pixels are taken whole."""
    return Preprocessing(size, 1.0 if size <= _SMALL else 0.875, mean, std)


def embed_batches(
    encoder: Callable[[Tensor], Tensor],
    prepare: Callable[[Images, Tensor], Tensor],
    cache: Cache,
    rows: NDArray[np.int64],
    compute: Compute,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Features float32 [B,D], on the CPU, of the given rows of a cache, in order, a batch at a time. The encoder must be in
    eval mode and placed.

    `prepare` is a `Preprocessing`, or another view of images and their sizes.
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
    """A batch's features float32 [B,D], on the CPU; in halves where the memory is too small for all at once.

    Raises UserError where it is too small for a single image.
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
            raise UserError(
                f"Not even one image at a time fits into {where}. Another --device may have more."
            ) from None
    x = torch.empty(0)  # the larger batch lets go of its memory
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
    """What `embed_batches` yields as one: float32 [N,D]."""
    features, done = torch.zeros(0, 0), 0
    for found in embed_batches(encoder, prepare, cache, rows, compute, progress):
        if not done:  # all at once: a list and its concatenation would take twice the memory
            features = torch.empty(len(rows), found.shape[1])
        features[done : done + len(found)] = found
        done += len(found)
    return features


def pixel_rows(prepare: Preprocessing, cache: Cache, rows: NDArray[np.int64]) -> Tensor:
    """The baseline that needs no encoder: the encoder's own input, at most 32 pixels wide, as a vector [N,3*h*w].

    Normalised by mean and std, as the encoder sees it: that makes the baseline stronger than pixels in 0..1.
    """
    small = Preprocessing(min(prepare.size, _PIXEL_SIDE), prepare.share, prepare.mean, prepare.std)
    return embed_rows(lambda x: x.flatten(1), small, cache, rows, Compute(torch.device("cpu"), "fp32"))


def untrained(
    spec: EncoderSpec, seed: int, prepare: Preprocessing, cache: Cache, rows: NDArray[np.int64], compute: Compute
) -> Encoder:
    """The encoder as it was before training, with BN statistics measured on the given rows (`BN_IMAGES` are enough).

    With the initial statistics (mean 0, variance 1) its activations would drift from layer to layer, which would make
    the baseline weaker than it is.
    """
    encoder = build(spec, seed)
    compute.place(encoder)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    encoder.eval()
    for norm in norms:  # no other part: dropout and stochastic depth would draw
        norm.train()
    # Whole batches, where there are any: a last one of a few images would count as much, and of one alone BN refuses to
    # take a variance.
    embed_rows(encoder, prepare, cache, rows[: len(rows) // _BATCH * _BATCH or None], compute)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return encoder.eval()


# --- the encoder on disk --------------------------------------------------------------------------------------------


def save_encoder(run: Path, encoder: Encoder, prepare: Preprocessing, seed: int, about: dict[str, Any]) -> None:
    """`encoder.safetensors` with the backbone's own names, `encoder.json` with all that its use needs."""
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
    """The encoder of a run in eval mode, its preprocessing and all of `encoder.json`.

    Raises UserError where `run` has none (yet), where the two files do not belong together, or where another version of
    timm or torchvision builds another network.
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
        raise UserError(f"{weights} is not the file that {description.name} describes: copy both from one run.")
    encoder = build(spec, meta["seed"])
    try:
        encoder.backbone.load_state_dict(read_tensors(weights)[0])
    except RuntimeError:  # other names or shapes than where it was trained
        raise UserError(
            f"{weights} does not fit {spec.name} as it is built here: install the versions that "
            f"{run / ENVIRONMENT} names."
        ) from None
    return encoder.eval(), prepare, meta


def compute_of(run: Path, encoder: Encoder, prepare: Preprocessing, device: torch.device) -> Compute:
    """How a run's encoder is used on a device: in the precision of its training, so that the figures are those which
    training ended with, and the same every time. Where that is not known, was chosen on another kind of device or would be
    emulated here, the faster one, measured."""
    found: Any = None
    if (run / RECIPE).exists() and (run / ENVIRONMENT).exists():
        same = str(read_kept(run / ENVIRONMENT).get("device")).partition(":")[0] == device.type
        found = read_recipe(run / RECIPE).get("train", {}).get("precision") if same else None
    emulated = found == "bf16" and not computes_bf16(device)
    if found not in ("bf16", "fp32") or emulated:
        found = probe_encoder(encoder, prepare.size, device)
    return Compute(device, found)


def load(run: str | Path, device: str = "auto", precision: str = "auto") -> ImageEncoder:
    """The trained encoder of a run: `simsiam.load("runs/demo").embed(["a.jpg", "b.jpg"])`.

    Raises UserError where `run` holds no encoder.
    """
    return ImageEncoder(_folder(run), device, precision).open()


def _folder(run: Any) -> str:
    """The run folder's name as text. Raises UserError for what names none: a summary, None."""
    if not isinstance(run, str | os.PathLike):
        kept = " Of train()'s summary it is summary['run']." if isinstance(run, dict) else ""
        raise UserError(f"A run is named by its folder, as text or a path, not {type(run).__name__}.{kept}")
    return os.fspath(run)


class ImageEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A run's encoder as a scikit-learn transformer: images in, float32 [N,D] out; it works inside a `Pipeline`.

    Args:
        run: the run folder.
        device: 'auto', 'cpu', 'cuda', ...
        precision: 'bf16', 'fp32' or 'auto', as `compute_of` chooses.
    """

    def __init__(self, run: str, device: str = "auto", precision: str = "auto") -> None:
        self.run = run
        self.device = device
        self.precision = precision

    def open(self) -> Self:
        """Loads the weights now, not at the first use. Raises UserError where there are none."""
        asked = (self.run, self.device, self.precision)
        if getattr(self, "opened_", None) != asked:  # not yet, or set_params came in between
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
        return self

    def fit(self, images: Any = None, y: Any = None) -> Self:
        """Nothing is left to learn: loads the weights and returns itself."""
        return self.open()

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def _n_features_out(self) -> int:
        """scikit-learn's name for it: the columns are imageencoder0, imageencoder1, ..."""
        return self.dim

    @property
    def dim(self) -> int:
        """Length of a vector."""
        self.open()
        return self.encoder_.dim

    def embed(self, images: Any) -> NDArray[np.float32]:
        """One vector for every image: float32 [N,D], in order, not normalised.

        Args:
            images: a list of paths, PIL images or uint8 arrays [H,W,3] or [H,W]; or one uint8 array [N,H,W,3].
        Raises:
            UserError where an image cannot be read: it says which.
        """
        self.open()
        if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OUS":
            images = images.tolist()  # of paths, as scikit-learn hands them on
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            raise UserError(
                f"{os.fspath(images)} is a folder: embed() takes a list of its files. `simsiam embed` takes a folder."
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
    """What to give in place of something that is no list of images."""
    shape: tuple[int, ...] = images.shape if isinstance(images, np.ndarray) else ()
    if len(shape) == 2 and images.dtype.kind in "OUS":
        return "of a column of paths give column.ravel()"
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        return "of gray images in one array give list(array)"
    return "put the one image into a list, [image]"


def _pixels(image: Any, short_side: int) -> NDArray[np.uint8]:
    if isinstance(image, str | os.PathLike):
        try:
            return decode(Path(image).read_bytes(), short_side)
        except (OSError, DecodeError) as error:
            raise UserError(f"Cannot read the image {os.fspath(image)}: {error}.") from None
    if isinstance(image, Image.Image):
        try:
            return decode(image.copy(), short_side)  # decoding changes what it is given
        except (OSError, DecodeError) as error:  # a file that Pillow had opened and not read
            raise UserError(f"Cannot read the image {getattr(image, 'filename', '') or image}: {error}.") from None
    array = np.asarray(image)
    coloured = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not array.size or not (coloured or array.ndim == 2):
        turn = " Turn it: .transpose(1, 2, 0)." if array.ndim == 3 and array.shape[0] in (1, 3) and not coloured else ""
        scale = " Give values from 0 to 255 as uint8." if array.dtype.kind == "f" else ""
        what = f"{array.dtype} {list(array.shape)}" if hasattr(image, "shape") else type(image).__name__
        what += ": open it with PIL" if isinstance(image, bytes) else ""
        raise UserError(f"An image is a path, a PIL image or a uint8 array [H,W,3]; this is {what}.{turn}{scale}")
    return decode(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array), short_side)
