"""Inspect a data set before training on it: counts, sizes, modes, bad files, exact duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simsiam.console import Listener
from simsiam.data.decode import DecodeError, decode, in_order, open_image, orientation
from simsiam.data.imageset import ImageSet
from simsiam.data.sources import open_images

UNLABELLED = "(unlabelled)"
"""The key under "labels" for the number of images without one."""
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def check(data: str | Path | ImageSet, workers: int | None = None, listener: Listener | None = None) -> dict[str, Any]:
    """Reads and decodes every image in full, so that truncated files are found.

    Args:
        data: anything `open_images` accepts, or an opened set.
        workers: decoding threads; None: the available cores, at most 16.
    Returns a JSON-ready dict with
        name, images (count, bad ones included), bytes (encoded), splits {"train", "test"},
        bad_files: list of {"path", "reason"},
        duplicates: list of lists of ids whose content is byte-identical (without bad files),
        duplicates_across_splits: number of those groups with both training and test images,
        sizes: upright, {"min", "max": [width, height] of the images with the fewest and the most pixels, "median": of
            each side separately, "short_side": {"p5": pixels, ...}}, or None if no image is good,
        modes, formats: {Pillow's name: count}, labels: {class: count, UNLABELLED: count} or None.
    Raises UserError if there are no images.
    """
    images = data if isinstance(data, ImageSet) else open_images(data)
    listener = listener or Listener()

    def look(i: int) -> tuple[int, bytes, tuple[int, int], str, str] | str:
        try:
            source = images.read(i)
            content = source.tobytes() if isinstance(source, Image.Image) else source
            image = open_image(source)
            facts = image.mode, image.format or "raw"
            width, height = image.size
            # A JPEG is decoded at a reduced scale here: faster, and it still reads the file to its end.
            decode(source, short_side=32)
            size = (height, width) if orientation(image) >= 5 else (width, height)
            return len(content), hashlib.blake2b(content, digest_size=16).digest(), size, *facts
        except DecodeError as error:
            return str(error)
        except Exception as error:
            return f"cannot be read: {error}"

    bad: list[dict[str, str]] = []
    groups: dict[bytes, list[int]] = {}
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    total = 0
    for i, facts in enumerate(in_order(look, len(images), workers)):
        if isinstance(facts, str):
            bad.append({"path": images.ids[i], "reason": facts})
        else:
            length, digest, size, mode, kind = facts
            total += length
            groups.setdefault(digest, []).append(i)
            sizes.append(size)
            modes[mode] += 1
            formats[kind] += 1
        listener.checking(i + 1, len(images), len(bad))
    same = [group for group in groups.values() if len(group) > 1]
    in_test = np.zeros(len(images), dtype=bool)
    in_test[images.test] = True
    return {
        "name": images.name,
        "images": len(images),
        "bytes": total,
        "splits": {"train": int((~in_test).sum()), "test": int(in_test.sum())},
        "bad_files": bad,
        "duplicates": [[images.ids[i] for i in group] for group in same],
        "duplicates_across_splits": sum(len({bool(in_test[i]) for i in group}) == 2 for group in same),
        "sizes": _sizes(np.array(sizes)) if sizes else None,
        "modes": dict(modes.most_common()),
        "formats": dict(formats.most_common()),
        "labels": _labels(images),
    }


def _sizes(sizes: np.ndarray) -> dict[str, Any]:
    """The "sizes" that `check` returns, from [N,2] (width, height)."""
    short, pixels = sizes.min(axis=1), sizes.astype(np.int64).prod(axis=1)
    return {
        "min": sizes[pixels.argmin()].tolist(),
        "median": np.median(sizes, axis=0).astype(int).tolist(),
        "max": sizes[pixels.argmax()].tolist(),
        "short_side": {f"p{p}": int(np.percentile(short, p)) for p in _PERCENTILES},
    }


def _labels(images: ImageSet) -> dict[str, int] | None:
    if images.labels is None:
        return None
    assert images.classes is not None
    counts = np.bincount(images.labels + 1, minlength=len(images.classes) + 1).tolist()
    found: dict[str, int] = {}
    for name, count in zip(images.classes, counts[1:], strict=True):
        found[name] = found.get(name, 0) + count  # ImageNet has two classes named crane
    return found | ({UNLABELLED: counts[0]} if counts[0] else {})
