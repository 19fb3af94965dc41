"""The probe: its figures are consistent, and match those of the run."""

from __future__ import annotations

import itertools
import shutil
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

import simsiam
from simsiam import kernels
from simsiam.config import UserError, read_recipe
from simsiam.data.cache import open_cache
from simsiam.data.sources import open_images
from simsiam.plan import _decode, plan
from simsiam.recipe import Recipe
from test_train import SMALL, TINY

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_figures_fit_together(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kernels.compiled()  # where the caches are
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    start = time.perf_counter()
    found = plan(photos, seconds=3, epochs=4.0, **SMALL)
    assert time.perf_counter() - start < 60 and not list(tmp_path.iterdir()), "it writes nothing"
    assert found["images"] == 97 and found["batch_size"] == 16 and found["epochs"] == 4
    # The broken file takes time but is not an image in the cache.
    assert found["decode_seconds"] == pytest.approx(97 / found["decode_images_per_second"], abs=0.06)
    # 87 training images
    assert found["seconds_per_epoch"] == pytest.approx(5 * 16 / found["images_per_second"], rel=0.01)
    assert found["largest_batch"] == 22 and not found["fits"], "training would cut the batches that it tries"


def test_a_budget_is_for_decoding_and_training_together(photos: Path) -> None:
    found = plan(photos, seconds=1, budget="1m", **SMALL)
    assert found["seconds"] == pytest.approx(60, abs=1)
    left = 60 - found["decode_seconds"]
    assert found["epochs"] * found["seconds_per_epoch"] == pytest.approx(left, rel=0.5)  # rounded to a tenth


def test_a_batch_that_does_not_fit_is_measured_in_parts(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(recipe: Recipe, images: int, batch: Tensor, *_: object) -> tuple[str, float, float, dict[str, int]]:
        measured.append(len(batch))
        if len(batch) > 4:
            raise MemoryError
        return "fp32", 1.0, 3.0, {"fixed": 1000, "each": 10}

    monkeypatch.setattr(sys.modules["simsiam.plan"], "_measure", measure)
    found = plan(photos, seconds=0.1, **SMALL)
    assert measured == [16, 8, 4] and found["batch_size"] == 16
    assert (found["images_per_second"], found["views_images_per_second"]) == (1.0, 4.0)
    assert found["memory_bytes"] == 1160


def test_bad_files_take_time_too(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sorted(photos.rglob("*.png"))[:6]:
        shutil.copy(path, tmp_path)
        (tmp_path / f"{path.stem}.jpg").write_bytes(b"broken")
    clock = itertools.count()  # read before, after every file and at the end
    monkeypatch.setattr(sys.modules["simsiam.plan"], "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    found, rate = _decode(open_images(tmp_path), 16, 1, 100.0)
    assert len(found) == 6 and rate == 12 / 13


@pytest.mark.parametrize("in_order", [False, True])
def test_a_set_that_is_slow_out_of_order_is_decoded_in_order(photos: Path, in_order: bool) -> None:
    images, read = open_images(photos), []

    def spied(row: int) -> object:
        read.append(row)
        return images.read(row)

    _decode(replace(images, read=spied, in_order=in_order), 16, 1, 100.0)
    assert sorted(read) == list(range(97)) and (read == sorted(read)) == in_order


def test_what_is_decoded_already_takes_no_time(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    images = open_images(photos)
    decoded = [np.zeros((16, 16, 3), np.uint8)]
    monkeypatch.setattr(sys.modules["simsiam.plan"], "_decode", lambda *_: (decoded, 10.0))  # images per second
    assert plan(photos, seconds=0.2, **SMALL)["decode_seconds"] == 9.7 and not list(tmp_path.iterdir())
    cache = open_cache(images, 16)
    cache.usable(np.arange(40))
    before = sorted(tmp_path.rglob("*"))
    assert plan(photos, seconds=0.2, **SMALL)["decode_seconds"] == 5.7
    cache.usable(np.arange(97))
    assert plan(photos, seconds=0.2, **SMALL)["decode_seconds"] == 0
    assert sorted(tmp_path.rglob("*")) == before, "it writes nothing"


def test_a_budget_may_be_a_small_part_of_an_epoch(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    open_cache(open_images(photos), 16).usable(np.arange(97))
    monkeypatch.setattr(sys.modules["simsiam.plan"], "_measure", lambda *_: ("fp32", 3.0, 7.0, {"fixed": 1, "each": 1}))
    found = plan(photos, seconds=0.2, **{**SMALL, "overrides": [*SMALL["overrides"], "budget=1s"]})
    assert found["decode_seconds"] == 0 and found["epochs"] == 0.02 and found["seconds"] == 1
    assert found["shares"] == {"decoding": 0, "views": 0.3, "model": 0.7}


def test_what_a_method_remembers_of_each_image_takes_memory(tmp_path: Path) -> None:
    """DeepCluster keeps the projections of the views of all images."""
    sizes, overrides = {}, [text for text in TINY if "predictor" not in text]
    for count in (40, 400):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            Image.fromarray(np.full((20, 20, 3), i % 256, np.uint8)).save(folder / f"{i}.png")
        sizes[count] = plan(folder, seconds=0.2, method="deepcluster", batch_size=16, overrides=overrides)[
            "memory_bytes"
        ]
    trained = [len(open_images(tmp_path / str(count)).split()[0]) for count in (40, 400)]
    assert sizes[400] - sizes[40] >= 2 * 4 * 32 * (trained[1] - trained[0])


def test_threads_that_are_asked_for_are_measured(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sys.modules["simsiam.plan"], "set_threads", lambda threads=None: asked.append(threads))
    plan(photos, seconds=0.2, threads=1, **SMALL)
    assert asked == [None, 1]


def test_memory_grows_with_the_batch_and_the_views(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["simsiam.plan"], "largest_batch", lambda images: 64)
    small = plan(photos, seconds=0.5, **SMALL)
    overrides = [*SMALL["overrides"], "views.size=32"]
    large = plan(photos, seconds=0.5, overrides=overrides)
    per_image = [(each["fits"]["64"] - each["memory_bytes"]) / 48 for each in (small, large)]
    assert 2.5 < per_image[1] / per_image[0] < 4.5  # four times the pixels


@pytest.mark.slow
def test_what_it_promises_is_what_a_run_does(photos: Path, tmp_path: Path) -> None:
    promised = plan(photos, seconds=3, **SMALL)["images_per_second"]
    kept = simsiam.train(photos, tmp_path / "run", budget="6s", **SMALL)["images_per_second"]
    assert promised / 4 < kept < promised * 4  # within a factor of 4 on a busy machine


@pytest.mark.usefixtures("on_cpu")
def test_it_plans_the_run_that_is_trained(photos: Path, tmp_path: Path) -> None:
    """66 images, 6 of them held out: a quarter of 60 is less than 16, a quarter of 66 is not."""
    few = tmp_path / "few"
    few.mkdir()
    for path in [path for path in sorted(photos.rglob("*.png")) if path.stat().st_size > 100][:66]:
        (few / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    overrides = [text for text in SMALL["overrides"] if "batch_size" not in text]
    settings = {key: value for key, value in SMALL.items() if key not in ("overrides", "batch_size")}
    found = plan(few, seconds=0.5, overrides=overrides, epochs=1.0, **settings)
    summary = simsiam.train(few, tmp_path / "run", overrides=overrides, epochs=1.0, **settings)
    config = read_recipe(tmp_path / "run" / "config.toml")
    assert found["batch_size"] == config["train"]["batch_size"] == 8 and summary["steps"] == 60 // 8


def test_mistakes_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError):
        plan(tmp_path, seconds=1)
    monkeypatch.setattr(sys.modules["simsiam.plan"], "open_images", lambda _: pytest.fail("listed first"))
    with pytest.raises(UserError, match=r"batch_size is 1"):
        plan(tmp_path, seconds=1, overrides=["train.batch_size=1"])


def test_a_recipe_may_name_the_images(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(f'data = "{photos}"\n[encoder]\nname = "thin-resnet18"\nwidth = 8\n')
    assert plan(recipe=str(tmp_path / "own.toml"), size=16, seconds=0.5, epochs=1.0)["images"] == 97
