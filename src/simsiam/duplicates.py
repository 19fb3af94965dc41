"""Find near-duplicates among stored embeddings: groups of images that show the same picture."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simsiam.compute import set_threads
from simsiam.config import UserError, coerce, counted
from simsiam.console import Listener
from simsiam.data.views import plain_pixels
from simsiam.embeddings import Embeddings, read_embeddings
from simsiam.kernels import Images, padded
from simsiam.neighbours import blocks, top_k, unit_rows
from simsiam.search import Vectors, make_index, nearest

PASS = 0.95
"""Share of altered copies that passes each of the two thresholds of `near_duplicates`."""

_NEIGHBOURS = 20
_OFF = 2e-3
"""Largest error of an index's scores, in float16."""
_SAMPLE = 256
_SIDE = 16
_FLAT = 3.0  # grey levels

Rows = NDArray[np.int64]


def near_duplicates(
    folder: str | Path, threshold: float | None = None, *, device: str = "auto", listener: Listener | None = None
) -> dict[str, Any]:
    """Find groups of images that show the same picture: identical pixels, or as similar as altered copies of an image.

    How similar copies are depends on the encoder and the images, so it is measured: a sample of the images is re-saved
    as JPEG, scaled, slightly cropped and mirrored. 95 % of these copies pass each of two thresholds: on the correlation
    of the pictures at 16 x 16 pixels without their mean colour, and on the cosine similarity of the embeddings. A pair
    must pass both. Pictures are compared first because many encoders rate thousands of images as similar as copies.

    Args:
        folder: embeddings written by `simsiam embed`.
        threshold: a cosine similarity in [-1, 1] as the only criterion, which needs neither the run nor the images.
        listener: receives a message before each slow stage.
    Returns {"images", "threshold", "pixel_threshold", "recall", "copies", "groups"}: `recall` is the share of copies
    found, for images that the thresholds were not measured on; `copies` is the number of images that could be removed.
    A group is a list of {"id", "score", "identical"}: first the image with the most links to others, then the rest by
    descending score, the similarity to the most similar linked image (1 if another image has the same pixels).
    `identical` tells whether an image has the same pixels as the first of its group. The largest groups come first.
    Every image is compared with its 20 nearest neighbours. Without `threshold`, nearly flat pictures (sky, blank
    pages), of which nothing is left without their mean colour, match only if their pixels are identical.
    Raises UserError if `threshold` is not given and the run or the images are missing or have changed.
    """
    set_threads()
    threshold = coerce(threshold, float | None, "threshold")
    if threshold is not None and not -1 <= threshold <= 1:
        raise UserError(f"The threshold is {threshold:g}: it is a cosine similarity, from -1 to 1.")
    stored = read_embeddings(folder, ("id", "pixels"))
    found = find_duplicates(stored, threshold, device=device, listener=listener)
    groups = [
        [{"id": stored.ids[each["row"]], "score": each["score"], "identical": each["identical"]} for each in group]
        for group in found["groups"]
    ]
    return {**found, "groups": groups}


def find_duplicates(
    stored: Embeddings, threshold: float | None = None, *, device: str = "auto", listener: Listener | None = None
) -> dict[str, Any]:
    """Like `near_duplicates`, but with "row" in place of "id"; `stored` must have the columns id and pixels."""
    listener = listener or Listener()
    rows, kind = _kinds(stored.items["pixels"])
    vectors: Any = _Picked(stored.vectors, rows)
    measured: dict[str, float] = {}
    if threshold is not None:
        listener.say(f"Comparing {counted(len(rows), 'image')} ...")
        similarity, found = nearest(vectors, _NEIGHBOURS, device=device)
        links, scores = _links(found, similarity)
        links = links[scores >= threshold - _OFF]  # beyond ALL_PAIRS they are the index's
        scores = _cosine(vectors, links)
        kept = scores >= threshold
    else:
        pictures, measured = _measured(stored, rows, device, listener)
        listener.say(f"Comparing {counted(len(rows), 'image')} ...")
        small = pictures.small()
        index = functools.cache(lambda: make_index(small))
        both = [
            nearest(small, _NEIGHBOURS, of, device=device, index=index)[1]
            for of in (None, pictures.small(mirrored=True))
        ]
        links, _ = _links(np.concatenate(both, 1))
        links = links[pictures.correlation(links) >= measured["pixel_threshold"]]
        scores = _cosine(vectors, links)  # of few: their vectors are read from all over the file
        kept = scores >= measured["threshold"]
    groups = [
        [{"row": row, "score": round(score, 6), "identical": same} for row, score, same in group]
        for group in _groups(kind, links[kept], scores[kept])
    ]
    return {
        "images": len(stored),
        "threshold": round(measured.get("threshold", threshold or 0.0), 6),
        "pixel_threshold": round(measured["pixel_threshold"], 6) if measured else None,
        "recall": round(measured["recall"], 4) if measured else None,
        "copies": sum(len(group) - 1 for group in groups),
        "groups": groups,
    }


class _Picked:
    """Some rows of memory-mapped vectors, read on access: selecting them up front would copy them into memory."""

    ndim = 2

    def __init__(self, vectors: NDArray[np.float32], rows: Rows) -> None:
        self.vectors, self.rows, self.shape = vectors, rows, (len(rows), vectors.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Rows) -> NDArray[np.float32]:
        return self.vectors[self.rows[which]]


def _kinds(pixels: Sequence[str]) -> tuple[Rows, Rows]:
    """The first row of each distinct `pixels` value, [U] in order of appearance, and each row's kind, [N] in 0..U-1."""
    number: dict[str, int] = {}
    kind = np.array([number.setdefault(each, len(number)) for each in pixels], np.int64)
    return np.unique(kind, return_index=True)[1], kind


def _links(found: Rows, scores: NDArray[np.float32] | None = None) -> tuple[Rows, NDArray[np.float64]]:
    """Turn every row's neighbours, [N,k], into unique pairs [L,2], the smaller row first, with their scores [L]."""
    rows, others = np.arange(len(found)).repeat(found.shape[1]), found.ravel()
    # Each pair is encoded as one number: sorting rows of two is several times slower.
    key, which = np.unique(np.minimum(rows, others) * len(found) + np.maximum(rows, others), return_index=True)
    pairs = np.stack(np.divmod(key, len(found)), 1) if len(key) else np.zeros((0, 2), np.int64)
    return pairs, np.zeros(len(pairs)) if scores is None else scores.ravel()[which].astype(np.float64)


def _cosine(vectors: Vectors, links: Rows) -> NDArray[np.float64]:
    """Cosine similarity of each pair of rows, [L]."""
    found = np.empty(len(links))
    for block in blocks(len(links), vectors.shape[1]):
        one, other = (unit_rows(vectors[links[block, side]]) for side in range(2))
        found[block] = (one * other).sum(1).clamp(-1, 1)  # rounding may exceed 1 slightly
    return found


def _groups(kind: Rows, links: Rows, scores: NDArray[np.float64]) -> list[list[tuple[int, float, bool]]]:
    """Group rows that are linked, directly or through others, or have the same pixels: lists of (row, score, same
    pixels as the first), the largest groups first.

    Args:
        kind: [N], every row's kind of pixels, 0..U-1.
        links: [L,2], pairs of kinds; scores: [L], their similarities.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = int(kind.max(initial=-1)) + 1
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(count, count))
    group = connected_components(graph, directed=False)[1]
    degree = np.bincount(links.ravel(), minlength=count)
    best = np.where(np.bincount(kind) > 1, 1.0, -np.inf)
    for side in range(2):
        np.maximum.at(best, links[:, side], scores)
    members: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.bincount(group[kind])[group[kind]] > 1).tolist():
        members.setdefault(int(group[kind[row]]), []).append(row)
    found = []
    for group_rows in members.values():
        first = max(group_rows, key=lambda row: (degree[kind[row]], -row))
        others = [(row, float(best[kind[row]]), bool(kind[row] == kind[first])) for row in group_rows if row != first]
        found.append([(first, 1.0, True), *sorted(others, key=lambda other: -other[1])])
    return sorted(found, key=lambda each: -len(each))


class _Pictures:
    """Images at 16 x 16 pixels, mean colour removed, of norm 1: float16 [N,3,16,16]; 0 for nearly flat images."""

    def __init__(self, count: int, parts: Iterable[tuple[Images, Tensor]]) -> None:
        """parts: batches of images, uint8 [B,3,H,W] or packed, with their sizes; `count` images in all."""
        self.looks, end = torch.empty(count, 3, _SIDE, _SIDE, dtype=torch.float16), 0
        for images, sizes in parts:
            small = plain_pixels(images, _SIDE, 1.0, sizes)
            small = small - small.mean((2, 3), keepdim=True)
            flat = small.square().mean((1, 2, 3)).sqrt() < _FLAT
            start, end = end, end + len(small)
            self.looks[start:end] = (unit_rows(small.flatten(1)) * ~flat[:, None]).view_as(small)
        assert end == count

    def small(self, mirrored: bool = False) -> Tensor:
        """Downsample to 8 x 8 pixels, float32 [N,192], for the candidate search."""
        found = torch.empty(len(self.looks), 3 * (_SIDE // 2) ** 2)
        for block in blocks(len(found), self.looks[:1].numel()):
            looks = self.looks[block].float()
            found[block] = F.avg_pool2d(looks.flip(3) if mirrored else looks, 2).flatten(1)
        return found

    def correlation(self, links: Rows) -> NDArray[np.float32]:
        """Correlation of each pair, [L]: the larger of the values with and without mirroring one image."""
        found = np.empty(len(links), np.float32)
        for block in blocks(len(links), self.looks[:1].numel()):
            one, other = (self.looks[links[block, side]].float() for side in range(2))
            found[block] = _correlation(one, other)
        return found


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum((a * b).flatten(1).sum(1), (a * b.flip(3)).flatten(1).sum(1))


def _measured(stored: Embeddings, rows: Rows, device: str, listener: Listener) -> tuple[_Pictures, dict[str, float]]:
    """Load the pictures of `rows`, and measure on altered copies of a sample the two thresholds and, on other images of
    the sample, the recall."""
    try:
        encoder, (cache, cached) = stored.encoder(device), stored.images()
    except UserError as error:
        raise UserError(f"{error} Or compare embeddings alone: --threshold 0.95.") from None
    listener.say(f"Measuring how similar copies of an image are, on {counted(min(_SAMPLE, len(rows)), 'image')} ...")
    cached = cached[rows]
    usable = cache.usable(cached, listener.decoding)  # all of them if the cache was deleted
    if not usable.all():
        gone = stored.ids[rows[np.flatnonzero(~usable)[0]]]
        raise UserError(f"{gone} can no longer be read ({dict(cache.bad).get(gone)}): run `simsiam embed` again.")
    pictures = _Pictures(len(rows), (cache.packed(cached[start : start + 1024]) for start in range(0, len(rows), 1024)))
    bank = pictures.small()
    shaped = np.flatnonzero(pictures.looks.flatten(1).any(1).numpy())
    if not len(shaped):
        return pictures, {"threshold": 1.0, "pixel_threshold": 1.0, "recall": 0.0}
    some = np.random.default_rng(0).permutation(shaped)[:_SAMPLE]
    of_image, look_of_image = unit_rows(stored.vectors[rows[some]]), pictures.looks[some].float()
    images, sizes = cache.batch(cached[some])
    plain = [image[:, :h, :w].permute(1, 2, 0).numpy() for image, (h, w) in zip(images, sizes.tolist(), strict=True)]
    similarity, correlation, candidate = [], [], []
    for alter in (_saved_anew, _scaled, _cropped, _mirrored):
        altered = [alter(image) for image in plain]
        looks = _Pictures(len(altered), [padded(altered)])
        similarity.append((unit_rows(encoder.embed(altered)) * of_image).sum(1).numpy())
        correlation.append(_correlation(looks.looks.float(), look_of_image).numpy())
        near = [top_k(looks.small(mirrored), bank, _NEIGHBOURS)[1].numpy() for mirrored in (False, True)]
        candidate.append((np.concatenate(near, 1) == some[:, None]).any(1))
    half = max(1, len(some) // 2)
    held = slice(half, None) if len(some) > 1 else slice(None)
    low, low_look = (float(np.quantile(np.stack(values)[:, :half], 1 - PASS)) for values in (similarity, correlation))
    found = (np.stack(similarity) >= low) & (np.stack(correlation) >= low_look) & np.stack(candidate)
    return pictures, {"threshold": low, "pixel_threshold": low_look, "recall": float(found[:, held].mean())}


def _saved_anew(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def _scaled(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(1, width * 3 // 4), max(1, height * 3 // 4)), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def _cropped(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    x, y = max(1, round(0.03 * width)), max(1, round(0.03 * height))
    if min(height - 2 * y, width - 2 * x) < 1:
        return image
    return np.asarray(Image.fromarray(image[y : height - y, x : width - x]).resize((width, height)))


def _mirrored(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image[:, ::-1])
