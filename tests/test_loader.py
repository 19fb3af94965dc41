"""The loader: every batch is a function of (seed, epoch, step), whichever way it gets to the device."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from simsiam import kernels
from simsiam.config import UserError
from simsiam.data import loader as loader_module
from simsiam.data.cache import Cache, build_cache, open_cache
from simsiam.data.loader import Batch, Loader
from simsiam.data.sources import open_images
from simsiam.kernels import Packed
from test_decode import encode

COUNT, BATCH = 50, 8
CPU = torch.device("cpu")


def make_cache(folder: Path, sizes: list[tuple[int, int]]) -> Cache:
    """A cache of noise images that cycle through the given (height, width)."""
    (folder / "data").mkdir()
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
        (folder / f"data/{i:02d}.png").write_bytes(encode(pixels))
    return build_cache(open_images(folder / "data"), None, folder / "cache")


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("uniform"), [(9, 12)])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("mixed"), [(9, 12), (7, 10), (16, 8)])


@pytest.fixture(params=["resident", "uniform, in place", "mixed, in place", "uniform, read ahead", "mixed, read ahead"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """A loader for each way to the device, over 45 of the 50 rows."""
    cache: Cache = request.getfixturevalue("mixed" if "mixed" in request.param else "uniform")
    if request.param != "resident":
        monkeypatch.setattr(loader_module, "_RESIDENT_BYTES", {})
    if "in place" in request.param and kernels.compiled() is None:
        pytest.skip("no kernels here")
    with kernels.off() if "read ahead" in request.param else contextlib.nullcontext():
        made = Loader(cache, np.arange(5, COUNT), BATCH, CPU, seed=3)
        assert (made._images is not None) == (request.param == "resident")
        yield made


def pixels(batch: Batch) -> torch.Tensor:
    return batch.images if isinstance(batch.images, torch.Tensor) else batch.images.padded()


def sides(batch: Batch) -> list[list[int]]:
    return batch.sizes.tolist() if batch.sizes is not None else [list(pixels(batch).shape[-2:])] * BATCH


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(pixels(a), pixels(b)) and torch.equal(a.index, b.index) and sides(a) == sides(b)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "simsiam-loader"]


def test_the_order_is_a_function_of_seed_and_epoch(uniform: Cache) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Loader(uniform, np.arange(COUNT), BATCH, CPU, seed).order(epoch).tolist()

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(sorted(found) == list(range(COUNT)) for found in orders.values())
    assert len({tuple(found) for found in orders.values()}) == 9
    assert orders == {key: order(*key) for key in reversed(orders)}


def test_batches_are_the_rows_in_that_order_and_the_last_incomplete_one_is_dropped(loader: Loader) -> None:
    batches = list(loader.epoch(4))
    assert len(batches) == loader.steps_per_epoch == 45 // BATCH
    index = torch.cat([batch.index for batch in batches])
    assert index.dtype == torch.int64 and index.tolist() == loader.order(4)[: 5 * BATCH].tolist()
    for batch in batches:
        assert pixels(batch).dtype == torch.uint8
        images, sizes = loader.cache.batch(loader.rows[batch.index.numpy()])
        assert torch.equal(pixels(batch), images) and sides(batch) == sizes.tolist()
        if loader.cache.uniform(loader.rows):
            assert batch.sizes is None or isinstance(batch.images, Packed)
        else:
            assert len(sizes.unique()) > 2


def test_every_way_gives_the_same_batches(uniform: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = Loader(uniform, np.arange(COUNT), BATCH, CPU, seed=1)
    monkeypatch.setattr(loader_module, "_RESIDENT_BYTES", {})
    ahead = Loader(uniform, np.arange(COUNT), BATCH, CPU, seed=1)
    assert resident._images is not None and ahead._images is None
    for epoch in range(2):
        assert all(same(a, b) for a, b in zip(resident.epoch(epoch), ahead.epoch(epoch), strict=True))


def test_a_batch_of_one_size_from_a_mixed_set_has_no_padding(mixed: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_RESIDENT_BYTES", {})
    rows = np.flatnonzero(mixed.heights == 9)
    with kernels.off():
        batch = next(iter(Loader(mixed, rows, BATCH, CPU, seed=0).epoch(0)))
    assert batch.sizes is None and pixels(batch).shape == (BATCH, 3, 9, 12)


@pytest.mark.parametrize("sizes", [[(9, 12)], [(9, 12), (7, 10), (16, 8)]])
@pytest.mark.parametrize("bad", [0, 12, 40])
@pytest.mark.parametrize("device", ["cpu", "reading ahead"])
def test_decoding_on_the_way_gives_the_batches_of_a_set_that_was_decoded_before(
    tmp_path: Path, sizes: list[tuple[int, int]], bad: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad images are skipped; if too few remain, the order starts again."""
    images = make_cache(tmp_path, sizes).images
    read = images.read
    images = dataclasses.replace(images, read=lambda i: b"" if i * bad % COUNT < bad else read(i), root="bad")
    rows = np.arange(2, COUNT)
    whole = Loader(build_cache(images, None, tmp_path / "whole"), rows, BATCH, CPU, seed=2)
    good = [i for i in range(len(rows)) if whole.cache.heights[rows[i]] > 0]
    assert len(rows) - len(good) >= bad - 2
    if device != "cpu":
        monkeypatch.setattr(Loader, "_reads_ahead", lambda self: True)
    for start in range(4):
        growing = Loader(open_cache(images, None, tmp_path / f"growing-{start}"), rows, BATCH, CPU, seed=2)
        for epoch in range(2):
            expected = list(whole.epoch(epoch, start))
            order = [i for i in whole.order(epoch).tolist() if i in set(good)] * COUNT
            assert torch.cat([b.index for b in expected]).tolist() == order[start * BATCH : len(rows) // BATCH * BATCH]
            assert all(same(a, b) for a, b in zip(expected, growing.epoch(epoch, start), strict=True))
        assert (growing._images is None) == (whole._images is None) == (whole.cache.uniform(rows) is None)


def test_training_does_not_wait_for_the_set(tmp_path: Path) -> None:
    images, read = make_cache(tmp_path, [(9, 12), (7, 10)]).images, []
    spied = dataclasses.replace(images, read=lambda i: (read.append(i), images.read(i))[1])
    loader = Loader(open_cache(spied, None, tmp_path / "new"), np.arange(COUNT), BATCH, CPU, seed=0)
    batches = loader.epoch(0)
    next(batches)
    assert sorted(read) == sorted(loader.order(0)[:BATCH].tolist())
    list(batches)
    assert len(read) == len(set(read)) == COUNT // BATCH * BATCH
    list(loader.epoch(1))
    assert len(read) == len(set(read))


@pytest.mark.parametrize("good", [0, 1])
def test_too_few_images_that_can_be_decoded_are_a_mistake_of_the_users(tmp_path: Path, good: int) -> None:
    images = make_cache(tmp_path, [(9, 12)]).images
    broken = dataclasses.replace(images, read=lambda i: images.read(i) if i < good else b"", root="broken")
    loader = Loader(open_cache(broken, None, tmp_path / "new"), np.arange(COUNT), BATCH, CPU, seed=0)
    with pytest.raises(UserError, match=f"has {good} usable images? to train on"):
        list(loader.epoch(0))


def test_an_epoch_goes_on_at_any_step(loader: Loader) -> None:
    whole = list(loader.epoch(2))
    for start in range(loader.steps_per_epoch + 1):
        tail = list(loader.epoch(2, start))
        assert len(tail) == loader.steps_per_epoch - start
        assert all(same(a, b) for a, b in zip(whole[start:], tail, strict=True))


def test_the_reading_thread_ends_with_the_epoch_and_when_it_is_left_early(
    mixed: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "_reads_ahead", lambda self: True)
    loader = Loader(mixed, np.arange(COUNT), 2, CPU, seed=0)
    batches = loader.epoch(0)
    assert readers() == []  # nothing is read before the first batch is requested
    list(batches)
    assert readers() == []
    batches = loader.epoch(1)
    next(batches)
    assert len(readers()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert readers() == []


def test_reading_runs_ahead_but_not_away(mixed: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loader, "_reads_ahead", lambda self: True)
    loader, read = Loader(mixed, np.arange(COUNT), 2, CPU, seed=0), []
    load = loader._load
    monkeypatch.setattr(loader, "_load", lambda chunk: read.append(chunk) or load(chunk))
    batches: Iterator[Batch] = loader.epoch(0)
    next(batches)
    bound = 2 + loader_module._AHEAD  # the current batch, the waiting ones, and the next one, which does not fit yet
    deadline = time.monotonic() + 10
    while len(read) < bound and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(read) == bound
    assert len(list(batches)) == loader.steps_per_epoch - 1


def test_an_error_while_reading_reaches_the_caller_in_its_place(mixed: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loader, "_reads_ahead", lambda self: True)
    loader = Loader(mixed, np.arange(COUNT), BATCH, CPU, seed=0)
    load, failing = loader._load, loader.order(0)[2 * BATCH]

    def broken(chunk: np.ndarray) -> Batch:
        if chunk[0] == failing:
            raise OSError("the disk is gone")
        return load(chunk)

    monkeypatch.setattr(loader, "_load", broken)
    batches = loader.epoch(0)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert readers() == []


@pytest.mark.skipif(kernels.compiled() is None, reason="no kernels here")
def test_where_views_are_drawn_in_place_nothing_is_copied_and_no_thread_reads(
    mixed: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is advised of the next batch's pixels before a batch is returned."""
    loader, told = Loader(mixed, np.arange(COUNT), BATCH, CPU, seed=0), []
    monkeypatch.setattr(mixed, "expect", lambda rows: told.append(rows.tolist()))
    for step, batch in enumerate(loader.epoch(0)):
        assert isinstance(batch.images, Packed) and np.shares_memory(batch.images.pixels, mixed._map())
        assert readers() == [] and len(told) == min(step + 1, loader.steps_per_epoch - 1)
    assert told == [loader.order(0)[i * BATCH :][:BATCH].tolist() for i in range(1, loader.steps_per_epoch)]


@pytest.mark.parametrize("batch_size", [0, COUNT + 1])
def test_a_batch_must_fit_the_data(uniform: Cache, batch_size: int) -> None:
    with pytest.raises(AssertionError):
        Loader(uniform, np.arange(COUNT), batch_size, CPU, seed=0)
