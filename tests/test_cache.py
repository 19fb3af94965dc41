"""The cache: the same pixels as decoding, built once, whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from simsiam.config import UserError
from simsiam.data import cache as cache_module
from simsiam.data.cache import build_cache
from simsiam.data.decode import decode
from simsiam.data.sources import ImageSet, open_images
from test_decode import encode, scene, write_nasty_folder

CIFAR = Path(__file__).parents[2] / "shared/data/cifar10"


def flat_set(count: int = 50, side: int = 8, **changes: object) -> ImageSet:
    """Images that are PNGs of noise in memory, labelled by their number modulo 4."""
    files = [encode(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)) for i in range(count)]
    fields: dict[str, object] = {
        "name": "flat",
        "ids": [f"{i}.png" for i in range(count)],
        "read": files.__getitem__,
        "labels": np.arange(count, dtype=np.int64) % 4,
        "classes": ("a", "b", "c", "d"),
        "fingerprint": f"{count}-{side}",
        "test": np.arange(count - 10, count),
    }
    return ImageSet(**(fields | changes))  # type: ignore[arg-type]


def refuse(*_: object) -> bytes:
    raise AssertionError("the images are read again")


@pytest.mark.parametrize("short_side", [None, 32])
def test_rows_are_the_good_images_and_batches_their_pixels(tmp_path: Path, short_side: int | None) -> None:
    good, bad = write_nasty_folder(tmp_path / "data")
    (tmp_path / "data/wide.png").write_bytes(encode(scene(40, 150)))
    images = open_images(tmp_path / "data")
    calls: list[tuple[int, int, int]] = []
    cache = build_cache(images, short_side, tmp_path / "cache", workers=2, progress=lambda *a: calls.append(a))
    assert cache.ids == sorted([*good, "wide.png"]) and cache.uniform is None
    assert {path for path, _ in cache.bad} == set(bad) and all(bad[path] in reason for path, reason in cache.bad)
    assert [call[0] for call in calls] == list(range(1, len(images) + 1)) and calls[-1] == (
        len(images),
        len(images),
        len(bad),
    )
    rows = np.random.default_rng(0).permutation(len(cache))
    batch, sizes = cache.batch(rows)
    assert batch.dtype == torch.uint8 and sizes.dtype == torch.int32
    assert batch.shape == (len(rows), 3, int(sizes[:, 0].max()), int(sizes[:, 1].max()))
    for row, image, (h, w) in zip(rows, batch, sizes.tolist(), strict=True):
        expected = decode((tmp_path / "data" / cache.ids[row]).read_bytes(), short_side)
        assert np.array_equal(image[:, :h, :w].permute(1, 2, 0).numpy(), expected)
        assert image[:, h:].sum() == 0 and image[:, :, w:].sum() == 0
    assert cache.memory_bytes == (cache.directory / "images.bin").stat().st_size


def test_uniform_sizes_labels_and_splits_are_remapped(tmp_path: Path) -> None:
    whole = flat_set()
    images = flat_set(read=lambda i: b"" if i in (0, 7, 45) else whole.read(i))
    cache = build_cache(images, None, tmp_path)
    kept = [i for i in range(50) if i not in (0, 7, 45)]
    assert cache.ids == [f"{i}.png" for i in kept] and cache.uniform == (8, 8) and len(cache) == 47
    assert cache.labels is not None and cache.labels.tolist() == [i % 4 for i in kept]
    assert [cache.ids[i] for i in cache.test] == [f"{i}.png" for i in range(40, 50) if i != 45]
    assert sorted([*cache.test, *cache.train]) == list(range(47))
    batch, sizes = cache.batch(np.array([5, 5, 46]))
    for image, i in zip(batch, (kept[5], kept[5], kept[46]), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(whole.read(i)))
    assert sizes.tolist() == [[8, 8]] * 3
    batch.zero_()  # a batch is a copy: the cache stays as it is
    assert cache.batch(np.array([5]))[0].any()


def test_reused_until_something_changes(tmp_path: Path) -> None:
    first = build_cache(flat_set(), 8, tmp_path)
    again = build_cache(flat_set(read=refuse), 8, tmp_path)
    assert again.directory == first.directory and torch.equal(again.batch(again.train)[0], first.batch(first.train)[0])
    assert build_cache(flat_set(), 4, tmp_path).uniform == (4, 4)
    assert build_cache(flat_set(fingerprint="other"), 8, tmp_path).directory != first.directory
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")) == []


@pytest.mark.parametrize("damage", ["images.bin", "meta.json", "rows.npy", "sizes.npy"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    first = build_cache(flat_set(), 8, tmp_path)
    pixels = first.batch(np.arange(50))[0]
    path = first.directory / damage
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(build_cache(flat_set(), 8, tmp_path).batch(np.arange(50))[0], pixels)
    path.unlink()
    assert torch.equal(build_cache(flat_set(), 8, tmp_path).batch(np.arange(50))[0], pixels)
    assert [p.name for p in tmp_path.iterdir()] == [first.directory.name]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int, bad: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(flat_set(), 8, tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_a_killed_build_is_no_cache_and_is_swept_away_later(tmp_path: Path) -> None:
    code = f"""
import os, signal
from simsiam.data.cache import build_cache
from test_cache import flat_set
def die(done, total, bad):
    if done == 20: os.kill(os.getpid(), signal.SIGKILL)
build_cache(flat_set(), 8, {str(tmp_path)!r}, progress=die)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    assert len(build_cache(flat_set(), 8, tmp_path)) == 50
    assert left.exists()  # it might be another process at work
    for path in [*left.iterdir(), left]:
        os.utime(path, (time.time() - 7200,) * 2)
    build_cache(flat_set(), 4, tmp_path)
    assert not left.exists()


def test_two_builds_at_once(tmp_path: Path) -> None:
    """Both wait for each other in the middle, so both build and both publish."""
    barrier, caches = threading.Barrier(2, timeout=30), []

    def build() -> None:
        caches.append(build_cache(flat_set(), 8, tmp_path, progress=lambda i, *_: i == 25 and barrier.wait()))  # type: ignore[arg-type]

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caches) == 2 and torch.equal(*(cache.batch(np.arange(50))[0] for cache in caches))
    assert [p.name for p in tmp_path.iterdir()] == [caches[0].directory.name]


def test_reading_errors_are_bad_files(tmp_path: Path) -> None:
    write_nasty_folder(tmp_path / "data")
    images = open_images(tmp_path / "data")
    (tmp_path / "data/plain.jpg").unlink()
    assert ("plain.jpg" in dict(build_cache(images, 16, tmp_path / "cache").bad)) is True


def test_nothing_decodable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"None of the 50 images of flat can be decoded \(0.png: empty file"):
        build_cache(flat_set(read=lambda i: b""), 8, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "from environment"))
    assert build_cache(flat_set(), 8).directory.parent == tmp_path / "from environment"
    assert build_cache(flat_set(), 8, tmp_path / "given").directory.parent == tmp_path / "given"
    monkeypatch.delenv("SIMSIAM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert build_cache(flat_set(), 8).directory.parent == tmp_path / ".cache/simsiam"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for base in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="Set SIMSIAM_CACHE"):
            build_cache(flat_set(), 8, base)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match=r"Permission denied.*Set SIMSIAM_CACHE"):
        build_cache(flat_set(), 8, tmp_path / "closed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels go to /dev/full, where every write fails as on a full disk."""
    real = open

    def full(path: object, *arguments: object, **options: object) -> object:
        return real("/dev/full" if str(path).endswith("images.bin") else path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(cache_module, "open", full, raising=False)
    with pytest.raises(UserError, match=r"is full: the cache of flat needs about \S+ GB.*SIMSIAM_CACHE"):
        build_cache(flat_set(200, 64), 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cifar10_prefix_matches_a_plain_decode(tmp_path: Path) -> None:
    if not CIFAR.exists():
        pytest.skip(f"no CIFAR-10 at {CIFAR}")
    images = open_images(CIFAR / "test.parquet")
    cache = build_cache(images, 32, tmp_path)
    assert len(cache) == 10_000 and cache.uniform == (32, 32) and not cache.bad
    mean = cache.batch(np.arange(10_000))[0].double().mean(dim=(0, 2, 3)) / 255
    assert np.allclose(mean, [0.494, 0.485, 0.450], atol=6e-4)  # the data's README
    start = time.perf_counter()
    build_cache(open_images(CIFAR / "test.parquet"), 32, tmp_path)
    assert time.perf_counter() - start < 1
