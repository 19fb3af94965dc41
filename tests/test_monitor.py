"""Monitoring during training: the right figures of the right images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simsiam.collapse import alignment, effective_rank, normalised_std, retrieval
from simsiam.compute import Compute, draw
from simsiam.data.cache import Cache, build_cache, open_cache
from simsiam.data.sources import open_images
from simsiam.data.views import ViewSettings
from simsiam.features import preprocessing
from simsiam.monitor import _BANK, Monitor

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Method(nn.Module):
    """Records its outputs: [(features, projections)] of every batch, in order."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * 8 * 8, 4, generator=draws)
        self.head = torch.randn(4, width, generator=draws)
        self.given: list[tuple[Tensor, Tensor]] = []
        self.modes: list[bool] = []

    def encoder(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return (x.flatten(1) @ self.matrix).relu()

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        self.given.append((h, h @ self.head))
        return self.given[-1]


@pytest.fixture(scope="module")
def cache(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build_cache(open_images(photos), 16, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def parts(cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    """60 training rows and 24 held-out rows, of all classes."""
    rows = np.random.default_rng(0).permutation(cache.decoded(np.arange(len(cache))))
    return np.sort(rows[:60]), np.sort(rows[60:84])


def monitor(cache: Cache, train: np.ndarray, held_out: np.ndarray) -> Monitor:
    compute = Compute(torch.device("cpu"), "fp32")
    return Monitor(cache, train, held_out, ViewSettings(8), preprocessing(8, MEAN, STD), compute)


def test_the_bank_of_a_partly_labelled_set_is_of_images_with_labels(
    cache: Cache, parts: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """STL10 has 5,000 labels for 105,000 images."""
    assert cache.labels is not None
    train, held_out = parts
    known = train[::10]
    labels = np.full_like(cache.labels, -1)
    labels[known], labels[held_out] = cache.labels[known], cache.labels[held_out]
    monkeypatch.setattr(cache, "labels", labels)
    watch = monitor(cache, train, held_out)
    assert watch.bank.tolist() == known.tolist() and watch.labelled
    assert cache.labelled(train).tolist() == known.tolist()
    monkeypatch.setattr(cache, "labels", None)
    assert monitor(cache, train, held_out).bank.tolist() == draw(train, _BANK).tolist()


def test_every_figure_is_of_what_the_method_gave(
    cache: Cache, parts: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simsiam.monitor._VIEW_BATCH", 10)
    method = Method().train()
    watch = monitor(cache, *parts)
    before = torch.random.get_rng_state()
    figures = watch.look(method, knn=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert method.training and not any(method.modes)
    (h, z), (_, other) = ([torch.cat(parts) for parts in zip(*method.given[side::2], strict=True)] for side in range(2))
    assert len(z) == len(other) == 24 and not torch.allclose(z, other)
    assert figures == {
        "of": "held out",
        "std_z": float(normalised_std(z)),
        "std_features": float(normalised_std(h)),
        "effective_rank": effective_rank(z),
        "most_rank": 6,
        "effective_rank_features": effective_rank(h),
        "alignment": alignment(z, other),
        "retrieval": retrieval(z, other),
    }
    torch.manual_seed(1)
    assert watch.look(method.eval(), knn=False) == figures and not method.training  # the same images, the same views


def test_the_largest_rank_is_that_of_the_images_where_they_are_few(
    cache: Cache, parts: tuple[np.ndarray, np.ndarray]
) -> None:
    assert monitor(cache, parts[0], parts[1][:17]).look(Method(64))["most_rank"] == 16


class Knowing(nn.Module):
    """Embeds images by class, first the bank, then the queries, of which it gets the first `wrong` ones wrong."""

    def __init__(self, watch: Monitor, wrong: int = 0) -> None:
        super().__init__()
        assert watch.cache.labels is not None
        labels = [torch.from_numpy(watch.cache.labels[rows]) for rows in (watch.bank, watch.queries)]
        labels[1][:wrong] = (labels[1][:wrong] + 1) % 3
        self.given = iter(labels)

    def forward(self, x: Tensor) -> Tensor:
        labels = next(self.given)
        assert len(x) == len(labels)
        return torch.eye(3)[labels]


def test_knn_is_that_of_training_images_for_held_out_ones(cache: Cache, parts: tuple[np.ndarray, np.ndarray]) -> None:
    watch = monitor(cache, *parts)
    assert all(np.array_equal(own, part) for own, part in zip((watch.bank, watch.queries), parts, strict=True))
    assert [watch.knn(Knowing(watch, wrong)) for wrong in (0, 6, 24)] == [100, 75, 0]


def test_baselines_are_of_the_untrained_encoder_and_of_pixels(
    cache: Cache, parts: tuple[np.ndarray, np.ndarray]
) -> None:
    watch = monitor(cache, *parts)
    pixels = watch.baselines(nn.Flatten)
    assert pixels["knn"] == pixels["knn_pixels"] < 100
    assert watch.baselines(lambda: Knowing(watch)) == {"knn": 100, "knn_pixels": pixels["knn_pixels"]}


@pytest.mark.parametrize(("held_out", "watched"), [(16, "held out"), (15, "trained on")])
def test_few_held_out_images_are_not_watched(
    cache: Cache, parts: tuple[np.ndarray, np.ndarray], held_out: int, watched: str
) -> None:
    train, others = parts[0], parts[1][:held_out]
    watch = monitor(cache, train, others)
    assert set(watch.sample) == set(others if watched == "held out" else train)
    assert watch.look(Method())["of"] == watched


@pytest.mark.parametrize("readable", [0, 1, 15, 16])
def test_held_out_files_that_are_bad_do_not_count(photos: Path, tmp_path: Path, readable: int) -> None:
    paths = sorted(photos.rglob("*.png"))[:76]
    for i, path in enumerate(paths):
        shutil.copy(path, tmp_path / f"{i:03d}.png")
    for i in range(60 + readable, 80):
        (tmp_path / f"{i:03d}.png").write_bytes(b"a pointer")
    cache = open_cache(open_images(tmp_path), 16, tmp_path / "cache")
    watch = monitor(cache, np.arange(60), np.arange(60, 80))
    found = watch.look(Method())
    assert found["of"] == ("held out" if readable == 16 else "trained on") and found["std_z"] > 0
    assert len(watch.sample) == (16 if readable == 16 else 60)


def test_where_nearly_all_files_are_bad_the_others_are_found(photos: Path, tmp_path: Path) -> None:
    for i in range(600):
        (tmp_path / f"{i:03d}.png").write_bytes(b"a pointer")
    good = [i for i in range(600) if i not in draw(np.arange(600), 512)][:20]
    for i, path in zip(good, sorted(photos.rglob("*.png")), strict=False):
        shutil.copy(path, tmp_path / f"{i:03d}.png")
    cache = open_cache(open_images(tmp_path), 16, tmp_path / "cache")
    assert monitor(cache, np.arange(600), np.arange(0)).sample.tolist() == good


def test_a_method_that_is_not_finite_has_no_figures(cache: Cache, parts: tuple[np.ndarray, np.ndarray]) -> None:
    method = Method()
    method.head[:] = torch.nan
    assert monitor(cache, *parts).look(method) == {"of": "held out"}


def test_a_draw_is_some_of_the_rows_in_their_order() -> None:
    rows = np.arange(100, 300, 2)
    some = draw(rows, 30)
    assert len(set(some)) == 30 and set(some) < set(rows) and list(some) == sorted(some)
    assert np.array_equal(draw(rows, 30), some) and np.array_equal(draw(rows, 1000), rows)


def test_labels_of_the_held_out_images_alone_are_no_use(photos: Path, tmp_path: Path) -> None:
    images = open_images(photos)
    rows, held_out = images.split()
    compute = Compute(torch.device("cpu"), "fp32")
    assert images.labels is not None
    for unknown, labelled in ((held_out, False), (rows, False), (rows[1:], True)):
        labels = images.labels.copy()
        labels[unknown] = -1
        cache = build_cache(replace(images, labels=labels), 16, tmp_path / "cache")
        views = ViewSettings(16)
        monitor = Monitor(cache, rows, held_out, views, preprocessing(16, views.mean, views.std), compute)
        assert monitor.labelled == labelled
