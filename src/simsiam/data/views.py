"""Draw random views of a uint8 batch, the whole batch at once on the device, with a separate draw for each sample.

The paper's augmentation (appendix A) is: random resized crop, colour jitter, grayscale, Gaussian blur, horizontal flip,
normalisation. All of it except clamping is linear in the pixels, so each sample's draw folds into

    view = W_y @ image @ W_x^T
    result = clamp(C . view + P . mean(view) + t)

with two resampling matrices (crop, antialiased resize, flip and blur), a 3x3 colour matrix C (brightness, contrast,
saturation, hue, grayscale, normalisation) and another, P, for the view's mean colour, towards which contrast pulls.
Spatially, that is torchvision's result before rounding to 8 bits; on a GPU, which multiplies in float16, to within half
of one of 255 levels. On a CPU with a C compiler, `kernels` computes the same sums view by view, without the zeros.
In colour, the views deviate from torchvision in three ways, which `tests/test_views.py` bounds image by image:

* values are clamped to [0, 255] once, at the end, not after every step;
* blur therefore sees colours before the clamp;
* hue rotates the colour about the gray axis, while torchvision rotates H in HSV. The two agree at thirds of a turn.

On photographs with the paper's jitter, a value is off by 0.5 of 255 levels on average without hue (99 % are within 9)
and by 3.0 with it (99 % within 25); omitting hue would give 4.1 (99 % within 48).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simsiam import kernels
from simsiam.config import require_above_0, require_not_negative
from simsiam.kernels import Images, Packed

LUMA = (0.299, 0.587, 0.114)
_ATTEMPTS = 10  # of torchvision's RandomResizedCrop before it falls back to a central crop
_RADIUS = 11  # of the blur kernel: 23 taps, as in SimCLR at 224 pixels
_PIECE = 200_000  # pixels that a CPU processes at a time, so that they stay in its caches; measured

Box = tuple[Tensor, Tensor, Tensor, Tensor]
"""top, left, height and width in whole pixels, float32 [B] each."""


@dataclass(frozen=True)
class ViewSettings:
    """How views are drawn. The defaults are the paper's for ImageNet (appendix A)."""

    size: int = 224
    """Side of the square view in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the crop."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation and hue (hue in turns, at most 0.5)."""
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels of the view."""
    flip_p: float = 0.5
    solarize_p: float = 0.0
    """Probability of inverting pixels brighter than mid-gray (BYOL)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    count: int = 2
    """Number of views of this size per image."""
    second_blur_p: float | None = None
    """blur_p of every second view, if different (BYOL, Barlow Twins, VICReg)."""
    second_solarize_p: float | None = None
    """solarize_p of every second view, if different."""
    small_count: int = 0
    """Number of additional views, of small_size pixels and small_scale of the area (SwAV's multi-crop)."""
    small_size: int | None = None
    """None: 3/7 of size, as 96 is of 224."""
    small_scale: tuple[float, float] = (0.05, 0.14)

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"views.size is {self.size}: a view must be at least 8 pixels wide.")
        require_above_0(self, "count")
        require_not_negative(self, "small_count")
        if self.small_size is not None and self.small_size < 8:
            raise ValueError(f"views.small_size is {self.small_size}: a view must be at least 8 pixels wide.")
        for name in ("scale", "small_scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is [{low}, {high}]: it must be two positive numbers in ascending order.")
        for name in ("scale", "small_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(
                    f"{name} is {list(getattr(self, name))}: a crop cannot be larger than the image (1.0)."
                )
        for name in ("jitter_p", "gray_p", "blur_p", "flip_p", "solarize_p", "second_blur_p", "second_solarize_p"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a probability lies between 0 and 1.")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5 or min(self.std) <= 0:
            raise ValueError("jitter must not be negative, its hue at most 0.5, and std above 0.")

    def each(self) -> list[ViewSettings]:
        """The settings of each of an image's views: first the full-size ones, then the small ones."""
        second = replace(
            self,
            blur_p=self.blur_p if self.second_blur_p is None else self.second_blur_p,
            solarize_p=self.solarize_p if self.second_solarize_p is None else self.second_solarize_p,
        )
        small = replace(self, size=self.small_size or max(8, round(self.size * 3 / 7)), scale=self.small_scale)
        return [second if i % 2 else self for i in range(self.count)] + [small] * self.small_count


def random_views(
    images: Images, settings: Sequence[ViewSettings], generator: torch.Generator, sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    """A `random_view` of every image for each of the settings.

    Views with equal settings are drawn together, so that their two hundred small operations run once.
    """
    views: dict[int, Tensor] = {}
    for each in dict.fromkeys(settings):
        places = [place for place, other in enumerate(settings) if other == each]
        drawn = random_view(images, each, generator, sizes, len(places)).chunk(len(places))
        views |= dict(zip(places, drawn, strict=True))
    return tuple(views[place] for place in range(len(settings)))


def random_view(
    images: Images, settings: ViewSettings, generator: torch.Generator, sizes: Tensor | None = None, count: int = 1
) -> Tensor:
    """`count` random views of every image: the first of each, then the second of each, ...

    Args:
        images: uint8 or float32 [B,3,H,W] with values 0..255, on the device, in channels_last for speed; padded at the
            bottom and right if `sizes` is given. Or `Packed`.
        sizes: int [B,2], each image's own (height, width); None if all fill the batch, or are packed.
    Returns:
        float32 [count B,3,size,size] in channels_last, normalised by mean and std.
    """
    sizes = (_sides(images) if sizes is None else sizes).repeat(count, 1)
    box, flip, sigma = draw_geometry(sizes, settings, generator)
    top, left, height, width = box
    matrix, pull = colour_matrix(len(sizes), settings, generator)
    mean, std = (_constant(values, images.device) for values in (settings.mean, settings.std))
    matrix, pull = (each / (255 * std[:, None]) for each in (matrix, pull))
    offset, low, high = -mean / std, -mean / std, (1 - mean) / std
    if kernels.usable(images):
        sides = [top, height, top, top + height, left, width, left, left + width]
        geometry, colour = torch.stack([*sides, flip, sigma], 1), torch.stack([matrix, pull], 1)
        view = kernels.views(images, geometry, colour, torch.stack([offset, low, high]), settings.size)
    else:
        images = _padded(images)
        w_y = resampling(top, height, settings.size, images.shape[2])
        w_x = resampling(left, width, settings.size, images.shape[3], flip)
        if settings.blur_p > 0:
            kernel = gaussian(sigma, settings.size)
            w_y, w_x = kernel @ w_y, kernel @ w_x
        # float16 on a GPU uses its matrix units and halves the memory traffic; off by half a level at most.
        precision = torch.float16 if images.is_cuda else torch.float32
        images = torch.cat([images] * count) if count > 1 else images  # cat, unlike repeat, keeps channels_last
        view = resample(images, w_y.to(precision), w_x.to(precision)).float()
        offset = offset + (pull @ view.mean((2, 3))[:, :, None])[:, :, 0]
        view = _colour(view, matrix, offset, low, high)
    if settings.solarize_p > 0:
        solarized = torch.rand(len(view), device=view.device, generator=generator) < settings.solarize_p
        view = torch.where(solarized[:, None, None, None], solarize(view, settings), view)
    return view


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values on the device, copied once, since a copy to a GPU waits for all running work. Not to be modified."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _sides(images: Images) -> Tensor:
    """int [B,2], (height, width) of every image, packed or in a batch without padding."""
    if isinstance(images, Packed):
        return torch.from_numpy(images.sizes)
    return torch.stack([torch.full((len(images),), side, device=images.device) for side in images.shape[-2:]], 1)


def _padded(images: Images) -> Tensor:
    return images.padded() if isinstance(images, Packed) else images


def solarize(view: Tensor, settings: ViewSettings) -> Tensor:
    """Inverts pixel values from 128 of 255 on, in a normalised view. [B,3,h,w] -> the same shape."""
    mean, std = (_constant(values, view.device)[:, None, None] for values in (settings.mean, settings.std))
    # Half a level below 128, because torchvision compares rounded values.
    return torch.where(view >= (127.5 / 255 - mean) / std, (1 - 2 * mean) / std - view, view)


def plain_view(
    images: Images,
    size: int,
    share: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    sizes: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The view for evaluation: the short side resized to size / share, the central square cut out, normalised.

    Shapes and ranges are those of `random_view`. A share of 0.875 is the usual 'resize to 256, crop 224'. dtype:
    float32, or bfloat16 for the same values, rounded.
    """
    if kernels.usable(images):
        return _plain(images, size, share, sizes, *_scale_and_shift(mean, std, images.device), dtype)
    return normalise(plain_pixels(images, size, share, sizes), mean, std).to(dtype)


def plain_pixels(images: Images, size: int, share: float, sizes: Tensor | None = None) -> Tensor:
    """Like `plain_view`, before normalisation: float32 [B,3,size,size] with values 0..255."""
    if sizes is None and isinstance(images, Tensor) and tuple(images.shape[-2:]) == (size, size) and share == 1:
        return images.float()
    if kernels.usable(images):
        return _plain(images, size, share, sizes, torch.ones(3), torch.zeros(3))
    images, sizes = _padded(images), _sides(images) if sizes is None else sizes
    start, length, full = _central(sizes, size, share)
    w_y = resampling(start[:, 0], length[:, 0], size, images.shape[2], edge=full[:, 0])
    w_x = resampling(start[:, 1], length[:, 1], size, images.shape[3], edge=full[:, 1])
    return resample(images, w_y, w_x).clamp_(0, 255)


def _plain(
    images: Images,
    size: int,
    share: float,
    sizes: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale [3] * pixels + shift [3], by the kernels."""
    start, length, full = _central(_sides(images) if sizes is None else sizes, size, share)
    zero = torch.zeros_like(full)
    geometry = torch.cat([torch.stack([start, length, zero, full], 2).flatten(1), zero], 1)
    colour = torch.stack([scale.diag(), torch.zeros(3, 3)]).expand(len(images), 2, 3, 3)
    return kernels.views(images, geometry, colour, torch.stack([shift, shift, 255 * scale + shift]), size, dtype)


def _central(sizes: Tensor, size: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Start and length of every image's central square, and the image's sides: [B,2] each, in image pixels."""
    resized = round(size / share) * sizes // sizes.amin(1, keepdim=True)
    step = sizes / resized
    return ((resized - size) / 2).round() * step, size * step, sizes.float()


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[B,3,h,w] with values 0..255 -> (x / 255 - mean) / std, float32 in channels_last."""
    scale, shift = (each[:, None, None] for each in _scale_and_shift(mean, std, pixels.device))
    return torch.addcmul(shift, pixels.float(), scale).contiguous(memory_format=torch.channels_last)


def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """scale and shift, [3] each, so that (x / 255 - mean) / std = scale * x + shift."""
    spread = _constant(std, device)
    return 1 / (255 * spread), -_constant(mean, device) / spread


def draw_geometry(sizes: Tensor, settings: ViewSettings, generator: torch.Generator) -> tuple[Box, Tensor, Tensor]:
    """Draws each sample's geometry: the crop, whether it is flipped (bool [B]), and the standard deviation of its blur
    (float32 [B], 0: none)."""
    box = crop_boxes(sizes, settings, generator)
    u_flip, u_sigma, u_blur = torch.rand(3, len(sizes), device=sizes.device, generator=generator)
    low, high = settings.blur_sigma
    return box, u_flip < settings.flip_p, torch.where(u_blur < settings.blur_p, low + (high - low) * u_sigma, 0.0)


def draw_colour(batch: int, settings: ViewSettings, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws each sample's colour changes: factors of brightness, contrast and saturation and turns of hue (float32
    [B,4], [1,1,1,0] for no change), the order of these four (int64 [B,4]), and whether it is gray (bool [B])."""
    device = generator.device
    strength = _constant(settings.jitter, device)
    neutral = _constant((1.0, 1.0, 1.0, 0.0), device)
    low = torch.cat([(1 - strength[:3]).clamp(min=0), -strength[3:]])
    factor = low + (neutral + strength - low) * torch.rand(batch, 4, device=device, generator=generator)
    order = torch.rand(batch, 4, device=device, generator=generator).argsort(1)
    u_jitter, u_gray = torch.rand(2, batch, device=device, generator=generator)
    return torch.where(u_jitter[:, None] < settings.jitter_p, factor, neutral), order, u_gray < settings.gray_p


def crop_boxes(sizes: Tensor, settings: ViewSettings, generator: torch.Generator) -> Box:
    """torchvision's RandomResizedCrop for a batch of images with the given (height, width), int [B,2]."""
    batch, device = len(sizes), sizes.device
    full_h, full_w = sizes[:, :1].float(), sizes[:, 1:].float()
    u_area, u_ratio = torch.rand(2, batch, _ATTEMPTS, device=device, generator=generator)
    area = full_h * full_w * (settings.scale[0] + (settings.scale[1] - settings.scale[0]) * u_area)
    low, high = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    aspect = torch.exp(low + (high - low) * u_ratio)
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (width > 0) & (width <= full_w) & (height > 0) & (height <= full_h)
    first = fits.float().argmax(1, keepdim=True)
    found = fits.any(1)
    # If no attempt fits: the largest central box of an allowed ratio.
    central_w = torch.minimum(full_w, (full_h * settings.ratio[1]).round())[:, 0].clamp(min=1)
    central_h = torch.minimum(full_h, (full_w / settings.ratio[0]).round())[:, 0].clamp(min=1)
    height = torch.where(found, height.gather(1, first)[:, 0], central_h)
    width = torch.where(found, width.gather(1, first)[:, 0], central_w)
    u_top, u_left = torch.rand(2, batch, device=device, generator=generator)
    room_h, room_w = full_h[:, 0] - height, full_w[:, 0] - width
    top = torch.where(found, (u_top * (room_h + 1)).floor(), (room_h / 2).floor()).minimum(room_h)
    left = torch.where(found, (u_left * (room_w + 1)).floor(), (room_w / 2).floor()).minimum(room_w)
    return top, left, height, width


def resampling(
    start: Tensor, length: Tensor, out: int, source: int, flip: Tensor | None = None, edge: Tensor | None = None
) -> Tensor:
    """Matrices [B,out,source] that resize the pixels [start, start+length) to `out`: antialiased bilinear.

    The weights are a triangle of half-width max(length/out, 1) source pixels (Pillow's and torchvision's `antialias`),
    renormalised to sum to 1. They are cut to the box, as if the image were cropped first, or, if `edge` [B] is given,
    to [0, edge), as if the whole image were resized and then cropped. `flip` [B] reverses the rows.
    """
    device = start.device
    start, length = start[:, None, None], length[:, None, None]
    step = length / out
    reach = step.clamp(min=1)
    centre = (torch.arange(out, device=device)[:, None] + 0.5) * step
    if flip is not None:
        centre = torch.where(flip[:, None, None], length - centre, centre)
    centre = start + centre
    # No triangle covers more source pixels than this; building only those keeps the cost of a matrix at O(out).
    taps = 2 * math.ceil(max(source / out, 1.0)) + 1
    pixel = (centre - reach).floor() + torch.arange(taps, device=device)
    weight = (1 - (pixel + 0.5 - centre).abs() / reach).clamp_(min=0)
    low, high = (start, start + length) if edge is None else (torch.zeros_like(start), edge[:, None, None])
    weight *= (pixel >= low) & (pixel < high)
    weight /= weight.sum(2, keepdim=True)
    # Clamped columns carry weight 0, so adding them onto another tap changes nothing.
    column = pixel.long().clamp_(0, source - 1)
    return torch.zeros(len(start), out, source, device=device).scatter_add_(2, column, weight)


def gaussian(sigma: Tensor, size: int) -> Tensor:
    """Matrices [B,size,size] that blur along one axis with reflected edges; sigma 0 is the identity.

    The kernel spans 23 pixels, or fewer if the view is smaller.
    """
    radius = min(size - 1, _RADIUS)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weight /= weight.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + offset
    source = source.abs()
    source = torch.where(source > size - 1, 2 * (size - 1) - source, source)
    batch = len(sigma)
    kernel = torch.zeros(batch, size, size, device=sigma.device)
    return kernel.scatter_add_(2, source.expand(batch, -1, -1), weight[:, None].expand(-1, size, -1))


def resample(images: Tensor, w_y: Tensor, w_x: Tensor) -> Tensor:
    """W_y @ image @ W_x^T for every image and channel: [B,3,H,W] -> [B,3,h,w] in the matrices' precision."""
    views = w_y.new_empty(*images.shape[:2], w_y.shape[1], w_x.shape[1])
    for piece in _pieces(images):
        pixels = images[piece].permute(0, 2, 3, 1).to(w_y.dtype)  # [B,H,W,3]: two products for all three channels
        batch, height, width, channels = pixels.shape
        lines = torch.bmm(w_y[piece], pixels.reshape(batch, height, width * channels))
        lines = lines.view(batch, -1, width, channels).transpose(2, 3).contiguous()
        view = torch.bmm(lines.view(batch, -1, width), w_x[piece].mT)
        views[piece] = view.view(batch, -1, channels, w_x.shape[1]).transpose(1, 2)
    return views


def _pieces(images: Tensor) -> Iterator[slice]:
    """Slices of a batch [B,3,h,w] for a CPU; a GPU takes it whole."""
    step = max(1, _PIECE // (images.shape[2] * images.shape[3]) if images.device.type == "cpu" else len(images))
    return (slice(start, start + step) for start in range(0, len(images), step))


# --- colour ---------------------------------------------------------------------------------------------------------


def colour_matrix(batch: int, settings: ViewSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each sample's colour draw: C and P [B,3,3] of the new colour C . colour + P . mean colour of the view.

    The four jitters come in a random order per sample, as in torchvision's ColorJitter. Contrast pulls towards the mean
    (ITU-R 601 luma) that the view has at that point.
    """
    factor, order, gray = draw_colour(batch, settings, generator)
    device = factor.device
    luma = _constant(LUMA, device)
    eye, to_gray = torch.eye(3, device=device), luma.expand(3, 3)
    brightness, contrast, saturation = (factor[:, i, None, None] for i in range(3))
    steps = [
        brightness * eye,
        contrast * eye,
        saturation * eye + (1 - saturation) * to_gray,
        _hue_rotation(factor[:, 3]),
    ]
    linear = torch.stack(steps, 1)[torch.arange(batch, device=device)[:, None], order]
    matrix, pull = eye.expand(batch, 3, 3), torch.zeros(batch, 3, 3, device=device)
    for position in range(4):
        step, contrasts = linear[:, position], order[:, position, None, None] == 1
        pull = step @ pull + torch.where(contrasts, (1 - contrast) * (to_gray @ matrix), 0.0)
        matrix = step @ matrix
    gray = gray[:, None, None]
    return torch.where(gray, to_gray @ matrix, matrix), torch.where(gray, to_gray @ pull, pull)


def _hue_rotation(turns: Tensor) -> Tensor:
    """[B] turns -> [B,3,3] rotations of RGB about the gray axis; a third of a turn takes red to green, as in HSV."""
    thirds = _constant((0, 1 / 3, -1 / 3), turns.device)
    a, b, c = ((1 + 2 * torch.cos(2 * math.pi * (turns[:, None] + thirds))) / 3).unbind(1)
    return torch.stack([a, b, c, c, a, b, b, c, a], 1).view(-1, 3, 3)


def _colour(view: Tensor, matrix: Tensor, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """matrix [B,3,3] . pixel + offset [B,3], clamped between `low` and `high` [3]."""
    low, high = low[:, None], high[:, None]
    coloured = torch.empty(view.shape, device=view.device, memory_format=torch.channels_last)
    for piece in _pieces(view):
        flat = torch.baddbmm(offset[piece, :, None], matrix[piece], view[piece].flatten(2))
        torch.minimum(torch.maximum(flat, low, out=flat), high, out=flat)
        coloured[piece] = flat.view_as(view[piece])
    return coloured
