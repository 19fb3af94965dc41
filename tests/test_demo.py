"""The demo set: real photographs, a split without shared pixels, deterministic, without downloads."""

from __future__ import annotations

import importlib.util
import io
import sys

import numpy as np
import pytest
from PIL import Image

from simsiam.config import UserError
from simsiam.data import demo
from simsiam.data.sources import open_images


def test_open_images_without_a_path_is_the_demo_set() -> None:
    images = open_images(None)
    assert images.name == "demo" and images.classes is not None and images.labels is not None
    assert len(images.train) == pytest.approx(8000, abs=len(images.classes))
    assert len(images.test) == pytest.approx(2000, abs=len(images.classes))
    assert len(set(images.ids)) == len(images)
    for rows in (images.train, images.test):  # balanced
        assert len(set(np.bincount(images.labels[rows], minlength=len(images.classes)).tolist())) == 1
    assert open_images("demo").fingerprint == images.fingerprint


def test_training_and_test_patches_share_no_pixel() -> None:
    images = demo.demo_images()
    files = demo.photograph_files()
    photographs = [Image.open(io.BytesIO(content)).convert("RGB") for content in files.values()]
    patches = demo.draw(photographs, 8000, 2000)
    assert len(patches) == len(images)
    test = set(images.test.tolist())
    for p, photograph in enumerate(photographs):
        seen = np.zeros((2, photograph.height, photograph.width), dtype=bool)
        for i, (photo, left, top, side) in enumerate(patches):
            if photo == p:
                assert left >= 0 and top >= 0 and left + side <= photograph.width and top + side <= photograph.height
                seen[int(i in test), top : top + side, left : left + side] = True
        assert seen.any(axis=(1, 2)).all() and not (seen[0] & seen[1]).any()


def test_a_patch_is_the_reduced_crop_of_its_photograph() -> None:
    images, files = demo.demo_images(), demo.photograph_files()
    photographs = [Image.open(io.BytesIO(content)).convert("RGB") for content in files.values()]
    patches = demo.draw(photographs, 8000, 2000)
    for i in (0, 4321, len(patches) - 1):
        photo, left, top, side = patches[i]
        crop = photographs[photo].crop((left, top, left + side, top + side))
        twin = crop.resize((demo.SIDE, demo.SIDE), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(images.read(i)), np.asarray(twin))  # nothing from beyond the patch
        assert images.labels is not None and images.labels[i] == photo


def test_grey_has_no_colour_and_another_fingerprint() -> None:
    colour, grey = demo.demo_images(train=160, test=32), demo.demo_images(gray=True, train=160, test=32)
    pixels = np.stack([np.asarray(grey.read(i)) for i in range(len(grey))])
    assert (pixels == pixels[..., :1]).all() and grey.fingerprint != colour.fingerprint
    assert np.stack([np.asarray(colour.read(i)) for i in range(len(colour))]).std(axis=3).max() > 20
    assert pixels.reshape(len(grey), -1).std(axis=1).min() > 4  # no patch is constant


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(UserError, match="pip install --upgrade scikit-image"):
        demo.demo_images()


def test_neither_package_is_imported() -> None:
    """Importing scikit-image would cost a second, and its own loader may download."""
    import subprocess

    code = """
import sys
from simsiam.data.demo import demo_images
demo_images()
print(sorted({"skimage", "sklearn", "pooch", "torch"} & set(sys.modules)))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
