"""Images of a cache to feature vectors, batch by batch; and the two baselines, untrained encoder and raw pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simsiam.compute import Compute, out_of_memory
from simsiam.config import UserError
from simsiam.data.views import ViewSettings, plain_view
from simsiam.encoders import Encoder, EncoderSpec, build, in_use, view_dtype
from simsiam.kernels import Images

if TYPE_CHECKING:
    from simsiam.data.cache import Cache

Progress = Callable[[int, int], None]

BN_IMAGES = 1024
BATCH = 256
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
    for start in range(0, len(rows), BATCH):
        yield features_of(encoder, prepare, *cache.packed(rows[start : start + BATCH]), compute)
        if progress is not None:
            progress(min(start + BATCH, len(rows)), len(rows))


def features_of(
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
    return torch.cat([features_of(encoder, prepare, images[part], sizes[part], compute) for part in parts])


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
    embed_rows(encoder, prepare, cache, rows[: len(rows) // BATCH * BATCH or None], compute)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return encoder.eval()
