"""A uint8 batch -> random views, the whole batch at once, on the device, each sample with its own draw.

The paper's augmentation (appendix A) is: random resized crop, colour jitter, grayscale, Gaussian blur, horizontal flip,
normalisation. All of it but the clamping is linear in the pixels, so each sample's draw folds into

    view = clamp(C . (W_y @ image @ W_x^T) + t)

with two resampling matrices (crop, antialiased resize, flip and blur) and one 3x4 colour matrix [C | t] (brightness,
contrast, saturation, hue, grayscale, normalisation). Exact up to rounding, with three deviations from torchvision's
per-image pipeline, each bounded by a test against it:

* values are clamped to [0, 255] once, at the end, not after every step;
* hue turns the colour about the gray axis (a rotation in YIQ) where torchvision turns H in HSV;
* blur therefore sees colours before the clamp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it falls back to a central crop


@dataclass(frozen=True)
class ViewSettings:
    """How views are drawn. The defaults are the paper's for ImageNet (appendix A), but for the size."""

    size: int = 224
    """Side of the square view in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop as a share of the image."""
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
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"views.size is {self.size}: a view must be at least 8 pixels wide.")
        for name, (low, high) in {"scale": self.scale, "ratio": self.ratio, "blur_sigma": self.blur_sigma}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} is [{low}, {high}]: it must be two rising numbers above 0.")
        if self.scale[1] > 1:
            raise ValueError(f"scale is {list(self.scale)}: a crop cannot be larger than the image (1.0).")
        for name in ("jitter_p", "gray_p", "blur_p", "flip_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a probability lies between 0 and 1.")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5 or min(self.std) <= 0:
            raise ValueError("jitter must not be negative, its hue at most 0.5, and std above 0.")


def random_view(
    images: Tensor, settings: ViewSettings, generator: torch.Generator, sizes: Tensor | None = None
) -> Tensor:
    """One random view of every image.

    Args:
        images: uint8 or float [B,3,H,W] with values 0..255, on the device; padded at the bottom and right where `sizes`
            is given.
        sizes: int [B,2], each image's own (height, width); None where all fill the batch.
    Returns:
        float32 [B,3,size,size] in channels_last, normalised by mean and std.
    """
    batch, device = len(images), images.device
    if sizes is None:
        sizes = torch.tensor(images.shape[-2:], device=device).expand(batch, 2)
    top, left, height, width = crop_boxes(sizes, settings, generator)
    flip = torch.rand(batch, device=device, generator=generator) < settings.flip_p
    w_y = resampling(top, height, settings.size, images.shape[2])
    w_x = resampling(left, width, settings.size, images.shape[3], flip)
    if settings.blur_p > 0:
        low, high = settings.blur_sigma
        sigma = low + (high - low) * torch.rand(batch, device=device, generator=generator)
        blurred = torch.rand(batch, device=device, generator=generator) < settings.blur_p
        kernel = gaussian(torch.where(blurred, sigma, 0.0), settings.size)
        w_y, w_x = kernel @ w_y, kernel @ w_x
    view = resample(images, w_y, w_x)
    matrix, offset = colour_matrix(view.mean((2, 3)) / 255, settings, generator)
    return _colour(view, matrix, offset, settings)


def plain_view(
    images: Tensor,
    size: int,
    share: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    sizes: Tensor | None = None,
) -> Tensor:
    """The view for evaluation: the central square with `share` of the short side, resized and normalised.

    Shapes and ranges are those of `random_view`. share 0.875 is the usual 'resize to 256, crop 224'.
    """
    return normalise(plain_pixels(images, size, share, sizes), mean, std)


def plain_pixels(images: Tensor, size: int, share: float, sizes: Tensor | None = None) -> Tensor:
    """As `plain_view`, before normalisation: float32 [B,3,size,size] with values 0..255."""
    batch, device = len(images), images.device
    if sizes is None:
        if tuple(images.shape[-2:]) == (size, size) and share == 1:
            return images.float()
        sizes = torch.tensor(images.shape[-2:], device=device).expand(batch, 2)
    side = (sizes.amin(1) * share).round().clamp(min=1)
    top, left = ((sizes[:, 0] - side) / 2).floor(), ((sizes[:, 1] - side) / 2).floor()
    w_y = resampling(top, side, size, images.shape[2])
    w_x = resampling(left, side, size, images.shape[3])
    return resample(images, w_y, w_x).clamp_(0, 255)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[B,3,h,w] with values 0..255 -> (x / 255 - mean) / std, float32 in channels_last."""
    scale = 1 / (255 * torch.tensor(std, device=pixels.device))[:, None, None]
    shift = (torch.tensor(mean, device=pixels.device) / torch.tensor(std, device=pixels.device))[:, None, None]
    return (pixels.float() * scale - shift).contiguous(memory_format=torch.channels_last)


def crop_boxes(
    sizes: Tensor, settings: ViewSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchvision's RandomResizedCrop for a batch: whole-pixel (top, left, height, width), float32 [B] each."""
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
    # Too narrow or too wide for every attempt: the largest central box of an allowed ratio.
    central_w = torch.minimum(full_w, (full_h * settings.ratio[1]).round())[:, 0].clamp(min=1)
    central_h = torch.minimum(full_h, (full_w / settings.ratio[0]).round())[:, 0].clamp(min=1)
    height = torch.where(found, height.gather(1, first)[:, 0], central_h)
    width = torch.where(found, width.gather(1, first)[:, 0], central_w)
    u_top, u_left = torch.rand(2, batch, device=device, generator=generator)
    room_h, room_w = full_h[:, 0] - height, full_w[:, 0] - width
    top = torch.where(found, (u_top * (room_h + 1)).floor(), (room_h / 2).round()).minimum(room_h)
    left = torch.where(found, (u_left * (room_w + 1)).floor(), (room_w / 2).round()).minimum(room_w)
    return top, left, height, width


def resampling(start: Tensor, length: Tensor, out: int, source: int, flip: Tensor | None = None) -> Tensor:
    """Matrices [B,out,source] that cut [start, start+length) and resize it to `out`: antialiased bilinear.

    The weights are a triangle of half-width max(length/out, 1) source pixels (Pillow's and torchvision's `antialias`),
    cut to the box, as if the crop were made first, and renormalised to sum to 1. `flip` [B] reverses the rows.
    """
    device = start.device
    step = (length / out)[:, None, None]
    reach = step.clamp(min=1)
    centre = (torch.arange(out, device=device)[None, :, None] + 0.5) * step
    if flip is not None:
        centre = torch.where(flip[:, None, None], length[:, None, None] - centre, centre)
    # At most this many source pixels lie under one triangle; building only those keeps the cost of a matrix at O(out).
    taps = min(source, 2 * math.ceil(max(source / out, 1.0)) + 1)
    pixel = (centre - reach).floor() + torch.arange(taps, device=device)
    weight = (1 - (pixel + 0.5 - centre).abs() / reach).clamp_(min=0)
    weight *= (pixel >= 0) & (pixel < length[:, None, None])
    weight /= weight.sum(2, keepdim=True)
    column = (pixel + start[:, None, None]).long().clamp_(0, source - 1)
    # Clamped columns carry weight 0, so adding them where another tap already stands changes nothing.
    return torch.zeros(len(start), out, source, device=device).scatter_add_(2, column, weight)


def gaussian(sigma: Tensor, size: int) -> Tensor:
    """Matrices [B,size,size] that blur along one axis with reflected edges; sigma 0 is the identity.

    The kernel spans 23 pixels, as SimCLR's does at 224, or less where the view is smaller.
    """
    radius = min(size - 1, 11)
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + offset
    source = source.abs()
    source = torch.where(source > size - 1, 2 * (size - 1) - source, source)
    batch = len(sigma)
    kernel = torch.zeros(batch, size, size, device=sigma.device)
    return kernel.scatter_add_(2, source.expand(batch, -1, -1), weight[:, None].expand(-1, size, -1))


def resample(images: Tensor, w_y: Tensor, w_x: Tensor) -> Tensor:
    """W_y @ image @ W_x^T for every image and channel: [B,3,H,W] -> float32 [B,3,h,w]."""
    batch, channels, height, width = images.shape
    rows = torch.bmm(images.reshape(batch, channels * height, width).float(), w_x.transpose(1, 2))
    rows = rows.view(batch, channels, height, -1)
    return torch.stack([torch.bmm(w_y, rows[:, c]) for c in range(channels)], 1)


def colour_matrix(mean: Tensor, settings: ViewSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each sample's colour draw as one affine map: matrix [B,3,3] and offset [B,3] for values in [0, 1].

    `mean` [B,3] is the mean colour of the view, which contrast pulls towards (ITU-R 601 luma). The four jitters come in
    a random order per sample, as in torchvision's ColorJitter.
    """
    batch, device = len(mean), mean.device
    luma = torch.tensor(LUMA, device=device)
    eye = torch.eye(3, device=device)
    gray = luma.expand(3, 3)
    strength = torch.tensor(settings.jitter, device=device)
    draw = torch.rand(batch, 4, device=device, generator=generator) * 2 - 1
    low = (1 - strength).clamp(min=0)
    factor = torch.where(draw < 0, 1 + draw * (1 - low), 1 + draw * strength)
    brightness, contrast, saturation = (factor[:, i, None, None] for i in range(3))
    turn = _hue_rotation(draw[:, 3] * strength[3])
    linear = torch.stack([brightness * eye, contrast * eye, saturation * eye + (1 - saturation) * gray, turn], 1)

    order = torch.rand(batch, 4, device=device, generator=generator).argsort(1)
    sample = torch.arange(batch, device=device)
    matrix, offset = eye.expand(batch, 3, 3), torch.zeros(batch, 3, device=device)
    for position in range(4):
        which = order[:, position]
        op = linear[sample, which]
        current = torch.einsum("bij,bj->bi", matrix, mean) + offset
        pull = ((1 - factor[:, 1]) * (current @ luma))[:, None] * (which == 1)[:, None]
        matrix, offset = op @ matrix, torch.einsum("bij,bj->bi", op, offset) + pull
    jittered = torch.rand(batch, device=device, generator=generator) < settings.jitter_p
    matrix = torch.where(jittered[:, None, None], matrix, eye)
    offset = torch.where(jittered[:, None], offset, 0.0)

    grayed = torch.rand(batch, device=device, generator=generator) < settings.gray_p
    matrix = torch.where(grayed[:, None, None], gray @ matrix, matrix)
    offset = torch.where(grayed[:, None], (offset @ luma)[:, None], offset)
    return matrix, offset


def _hue_rotation(turns: Tensor) -> Tensor:
    """[B] turns -> [B,3,3] rotations of the chroma plane in YIQ; luma is kept."""
    to_yiq = torch.tensor(_YIQ, device=turns.device)
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    rotation = torch.zeros(len(turns), 3, 3, device=turns.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1], rotation[:, 1, 2] = cos, sin
    rotation[:, 2, 1], rotation[:, 2, 2] = -sin, cos
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq


def _colour(view: Tensor, matrix: Tensor, offset: Tensor, settings: ViewSettings) -> Tensor:
    """Colour map, clamp to what a pixel can be and normalisation, in one pass over the pixels."""
    mean, std = (torch.tensor(values, device=view.device) for values in (settings.mean, settings.std))
    matrix = matrix / (255 * std[:, None])
    offset = (offset - mean) / std
    low, high = (-mean / std)[:, None], ((1 - mean) / std)[:, None]
    flat = torch.baddbmm(offset[:, :, None], matrix, view.flatten(2))
    flat = torch.minimum(torch.maximum(flat, low, out=flat), high, out=flat)
    return flat.view_as(view).contiguous(memory_format=torch.channels_last)
