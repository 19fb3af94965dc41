"""The probe: its figures fit together and fit what a run then does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import simsiam
from simsiam.config import UserError
from simsiam.plan import plan
from test_train import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_figures_fit_together(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    found = plan(photos, seconds=3, epochs=4.0, **SMALL)
    assert time.perf_counter() - start < 60 and not list(tmp_path.iterdir()), "it writes nothing"
    assert found["images"] == 97 and found["batch_size"] == 16 and found["epochs"] == 4
    assert found["seconds"] == pytest.approx(4 * found["seconds_per_epoch"] + found["decode_seconds"], abs=0.3)
    # The broken file costs time but is no image of the cache's.
    assert found["decode_seconds"] == pytest.approx(97 / found["decode_images_per_second"], abs=0.06)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.01) and found["bottleneck"] in found["shares"]
    assert found["images_per_second"] < found["views_images_per_second"]
    assert list(found["fits"]) == ["64"] and found["memory_available"] > found["fits"]["64"]


def test_a_budget_is_for_decoding_and_training_together(photos: Path) -> None:
    found = plan(photos, seconds=1, budget="1m", **SMALL)
    assert found["seconds"] == pytest.approx(60, abs=1)
    left = 60 - found["decode_seconds"]
    assert found["epochs"] * found["seconds_per_epoch"] == pytest.approx(left, rel=0.5)  # an epoch is shown to a tenth


def test_memory_grows_with_the_batch_and_the_views(photos: Path) -> None:
    small = plan(photos, seconds=0.5, **SMALL)
    overrides = [*SMALL["overrides"], "views.size=32"]
    large = plan(photos, seconds=0.5, overrides=overrides)
    per_image = [(each["fits"]["64"] - each["memory_bytes"]) / 48 for each in (small, large)]
    assert 2.5 < per_image[1] / per_image[0] < 4.5  # four times the pixels


def test_what_it_promises_is_what_a_run_does(photos: Path, tmp_path: Path) -> None:
    promised = plan(photos, seconds=3, **SMALL)["images_per_second"]
    kept = simsiam.train(photos, tmp_path / "run", budget="6s", **SMALL)["images_per_second"]
    assert promised / 4 < kept < promised * 4  # whatever else runs here; but not another order of magnitude


def test_mistakes_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError):
        plan(tmp_path, seconds=1)
