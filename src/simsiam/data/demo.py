"""The demo set: patches of photographs bundled with scikit-image and scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from simsiam.config import UserError
from simsiam.data.imageset import ImageSet, numbered

PHOTOGRAPHS = {
    "skimage": (
        "data",
        "brick.png cell.png chelsea.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png moon.png "
        "motorcycle_left.png page.png retina.jpg text.png",
    ),
    "sklearn": ("datasets/images", "flower.jpg"),
}
SIDE = 32
"""Height and width of a patch as it is read, in pixels."""
_CROP = (32, 48)  # smallest and largest side of a patch, in source pixels
_LEFT = 0.7
_MIN_STD = 12.0  # grey levels; rejects plain sky and the black around a retina


class Patch(NamedTuple):
    """A square of a photograph, in source pixels."""

    photograph: int
    left: int
    top: int
    side: int


def demo_images(gray: bool = False, train: int = 8000, test: int = 2000) -> ImageSet:
    """About `train` + `test` patches of `SIDE` pixels, the same every time; the class is the photograph.

    Training patches come from the left 70 % of a photograph, test patches from the rest: they share no pixel.

    Args:
        gray: removes colour, which alone tells many of the photographs apart.

    Raises UserError if scikit-image or scikit-learn is missing.
    """
    files = photograph_files()
    opened = [Image.open(io.BytesIO(content)) for content in files.values()]
    photographs = [(image.convert("L") if gray else image).convert("RGB") for image in opened]
    patches = draw(photographs, train, test)
    digest = hashlib.sha256(f"{gray} {SIDE} {patches}".encode())
    for content in files.values():
        digest.update(hashlib.sha256(content).digest())

    def read(i: int) -> Image.Image:
        at = patches[i]
        box = (at.left, at.top, at.left + at.side, at.top + at.side)
        # Not resize(box=...): its filter crosses the box's edge and would mix training and test pixels.
        return photographs[at.photograph].crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)

    classes = tuple(files)
    each = train // len(classes)
    is_test = np.arange(len(patches)) >= each * len(classes)
    ids = [
        f"{'test' if t else 'train'}/{classes[p.photograph]}/{i:05d}"
        for i, (p, t) in enumerate(zip(patches, is_test, strict=True))
    ]
    labels = np.array([patch.photograph for patch in patches], dtype=np.int64)
    keys = numbered(digest.digest(), len(ids))
    return ImageSet("demo", "demo", ids, read, labels, classes, keys, np.flatnonzero(is_test))


def draw(photographs: list[Image.Image], train: int, test: int) -> list[Patch]:
    """train // P patches of each of the P photographs, then test // P of each; nearly constant ones are redrawn."""
    patches = []
    for split, count in enumerate((train // len(photographs), test // len(photographs))):
        for p, photograph in enumerate(photographs):
            rng = np.random.default_rng([split, p])
            grey = np.asarray(photograph.convert("L"))
            height, width = grey.shape
            edge = int(_LEFT * width)
            start, stop = ((0, edge), (edge, width))[split]
            kept = 0
            while kept < count:
                side = int(rng.integers(_CROP[0], _CROP[1] + 1))
                left, top = int(rng.integers(start, stop - side + 1)), int(rng.integers(0, height - side + 1))
                if grey[top : top + side : 2, left : left + side : 2].std() >= _MIN_STD:
                    patches.append(Patch(p, left, top, side))
                    kept += 1
    return patches


def photograph_files() -> dict[str, bytes]:
    """Maps each photograph to its encoded file in the installed packages, whose own loaders would download it."""
    found: dict[str, bytes] = {}
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        for name in names.split():
            try:
                assert spec is not None and spec.origin is not None
                found[name.split(".")[0]] = (Path(spec.origin).parent / folder / name).read_bytes()
            except (OSError, AssertionError):
                pip = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
                raise UserError(
                    f"The demo set needs {name} from {pip}: run `pip install --upgrade {pip}`, or use your own images."
                ) from None
    return found
