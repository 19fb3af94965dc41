"""The cache: same pixels as decoding, each image decoded once, whatever happens in between."""

from __future__ import annotations

import dataclasses
import errno
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simsiam.config import UserError
from simsiam.data import cache as cache_module
from simsiam.data.cache import META, PIXELS, REASONS, RECORDS, Cache, build_cache, open_cache
from simsiam.data.decode import decode
from simsiam.data.imageset import ImageSet, numbered
from simsiam.data.sources import open_images
from simsiam.runs import cache_folder
from test_decode import encode, scene, write_nasty_folder

CIFAR = Path(__file__).parents[2] / "shared/data/cifar10"


def flat_set(count: int = 50, side: int = 8, **changes: object) -> ImageSet:
    """In-memory PNGs of noise, labelled by their number modulo 4."""
    files = [encode(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)) for i in range(count)]
    fields: dict[str, object] = {
        "name": "flat",
        "ids": [f"{i}.png" for i in range(count)],
        "read": files.__getitem__,
        "labels": np.arange(count, dtype=np.int64) % 4,
        "classes": ("a", "b", "c", "d"),
        "root": "/flat",
        "keys": numbered(f"{count:4}{side:4}".encode(), count),
        "test": np.arange(count - 10, count),
    }
    return ImageSet(**(fields | changes))  # type: ignore[arg-type]


def refuse(*_: object) -> bytes:
    raise AssertionError("the images are read again")


@pytest.mark.parametrize("short_side", [None, 32])
def test_batches_are_the_pixels_of_the_good_images(tmp_path: Path, short_side: int | None) -> None:
    good, bad = write_nasty_folder(tmp_path / "data")
    (tmp_path / "data/wide.png").write_bytes(encode(scene(40, 150)))
    images = open_images(tmp_path / "data")
    calls: list[tuple[int, int, int]] = []
    cache = build_cache(images, short_side, tmp_path / "cache", workers=2, progress=lambda *a: calls.append(a))
    every = np.arange(len(cache))
    assert [cache.ids[row] for row in cache.decoded(every)] == sorted([*good, "wide.png"])
    assert cache.uniform(every) is None and len(cache.missing(every)) == 0
    assert {path for path, _ in cache.bad} == set(bad) and all(bad[path] in reason for path, reason in cache.bad)
    assert [call[0] for call in calls] == list(range(1, len(images) + 1)) and calls[-1] == (
        len(images),
        len(images),
        len(bad),
    )
    rows = np.random.default_rng(0).permutation(cache.decoded(every))
    batch, sizes = cache.batch(rows)
    assert batch.dtype == torch.uint8 and sizes.dtype == torch.int32
    assert batch.shape == (len(rows), 3, int(sizes[:, 0].max()), int(sizes[:, 1].max()))
    for row, image, (h, w) in zip(rows, batch, sizes.tolist(), strict=True):
        expected = decode((tmp_path / "data" / cache.ids[row]).read_bytes(), short_side)
        assert np.array_equal(image[:, :h, :w].permute(1, 2, 0).numpy(), expected)
        assert image[:, h:].sum() == 0 and image[:, :, w:].sum() == 0
    with pytest.raises(AssertionError, match="has no pixels"):
        cache.batch(every)


def test_uniform_sizes_and_splits_without_bad_images(tmp_path: Path) -> None:
    whole = flat_set()
    images = flat_set(read=lambda i: b"" if i in (0, 7, 45) else whole.read(i))
    cache = build_cache(images, None, tmp_path)
    assert cache.uniform(np.arange(50)) == (8, 8) and len(cache) == 50
    assert cache.labels is images.labels and cache.ids == images.ids
    train, test = cache.split()
    assert train.tolist() == [i for i in range(40) if i not in (0, 7)]
    assert test.tolist() == [i for i in range(40, 50) if i != 45]
    assert [part.tolist() for part in images.split()] == [list(range(40)), list(range(40, 50))]
    batch, sizes = cache.batch(np.array([6, 6, 49]))
    for image, i in zip(batch, (6, 6, 49), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(whole.read(i)))
    assert sizes.tolist() == [[8, 8]] * 3
    batch.zero_()  # a batch is a copy: the cache is not affected
    assert cache.batch(np.array([6]))[0].any()


def test_a_set_that_grows_holds_out_what_it_held_out_before() -> None:
    sets = [flat_set(1, ids=[f"{i}.png" for i in range(n)], test=np.arange(0)) for n in (2_000, 2_400, 12_000)]
    few, more, many = [[set(part.tolist()) for part in images.split()] for images in sets]
    assert [len(held_out) for _, held_out in (few, more, many)] == [200, 240, 1_000]
    for images, (rows, held_out) in zip(sets, (few, more, many), strict=True):
        assert not rows & held_out and rows | held_out == set(range(len(images)))
        assert abs(np.mean([*held_out]) / len(images) - 0.5) < 0.06, "drawn from all over the set"
    assert len(more[1] & few[0]) < 0.01 * len(few[0]), "held out now, trained on before"
    assert not many[1] & few[0]


def test_an_image_is_decoded_when_it_is_asked_for_and_never_again(tmp_path: Path) -> None:
    whole, read = flat_set(), []
    images = flat_set(read=lambda i: (read.append(i), b"" if i == 7 else whole.read(i))[1])
    cache = open_cache(images, 8, tmp_path, workers=1)
    assert read == [] and len(cache.missing(np.arange(50))) == 50 and cache.uniform(np.arange(50)) is None
    asked = np.array([30, 7, 2, 30])
    assert cache.usable(asked).tolist() == [True, False, True, True]
    assert read == [2, 7, 30] and cache.decoded(np.arange(50)).tolist() == [2, 30]
    assert cache.bad == [("7.png", "empty file (0 bytes)")] and cache.seconds_left(np.arange(50)) > 0
    again = open_cache(images, 8, tmp_path, workers=1)  # as in a later run
    assert again.usable(asked).tolist() == [True, False, True, True] and again.bad == cache.bad
    for row, image in zip((30, 1, 2), again.batch(np.array([30, 1, 2]))[0], strict=True):  # 1 is decoded on the fly
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(whole.read(row), 8))
    assert read == [2, 7, 30, 1]
    assert cache.usable(np.array([1])).all() and read == [
        2,
        7,
        30,
        1,
        1,
    ]  # `cache` did not know of 1 and decoded it again, but it is stored once
    assert len((cache.directory / RECORDS).read_bytes()) == 4 * 24


def test_reused_until_something_changes(tmp_path: Path) -> None:
    first = build_cache(flat_set(), 8, tmp_path)
    again = build_cache(flat_set(read=refuse), 8, tmp_path)
    every = np.arange(50)
    assert again.directory == first.directory and torch.equal(again.batch(every)[0], first.batch(every)[0])
    assert build_cache(flat_set(), 4, tmp_path).uniform(every) == (4, 4)
    assert (
        build_cache(flat_set(root="/elsewhere", keys=first.images.keys + np.uint64(1)), 8, tmp_path).directory
        != first.directory
    )


def files(folder: Path, sides: dict[str, int]) -> ImageSet:
    """Make a folder contain PNG files of exactly these names and sides in pixels; unchanged files are not touched."""
    folder.mkdir(exist_ok=True, parents=True)
    for path in folder.iterdir():
        if path.stem not in sides:
            path.unlink()
    for name, side in sides.items():
        noise = np.random.default_rng([side, *name.encode()]).integers(0, 256, (side, side, 3), dtype=np.uint8)
        path = folder / f"{name}.png"
        if not path.exists() or path.read_bytes() != encode(noise):
            path.write_bytes(encode(noise))
    return open_images(folder)


def spied(images: ImageSet) -> tuple[ImageSet, list[str]]:
    read: list[str] = []
    return dataclasses.replace(images, read=lambda i: (read.append(images.ids[i]), images.read(i))[1]), read


def assert_whole(cache: Cache) -> None:
    """Assert that batches of one image and of all images have the pixels of the files."""
    expected = [decode(cache.images.read(row), cache.short_side).transpose(2, 0, 1) for row in range(len(cache))]
    for pixels, row in zip(expected, range(len(cache)), strict=True):
        assert np.array_equal(cache.batch(np.array([row]))[0][0], pixels)
    batch, sizes = cache.batch(np.arange(len(cache)))
    for image, (h, w), pixels in zip(batch, sizes.tolist(), expected, strict=True):
        assert np.array_equal(image[:, :h, :w], pixels)


def test_images_that_come_go_and_change(tmp_path: Path) -> None:
    """Only new images are decoded; rows that shift because of others keep their pixels."""
    data, place = tmp_path / "data", tmp_path / "cache"
    assert_whole(build_cache(files(data, {"b": 8, "d": 8, "f": 8}), None, place))
    for sides, expected in [
        ({"a": 8, "b": 8, "d": 8, "f": 8}, ["a"]),
        ({"a": 8, "b": 8, "c": 8, "f": 8}, ["c"]),
        ({"a": 8, "b": 12, "c": 8, "e": 8}, ["b", "e"]),
        ({"a": 8, "c": 8, "e": 8}, []),
        ({"a": 8, "c": 8, "e": 8, "f": 8}, ["f"]),  # rewritten
    ]:
        images, read = spied(files(data, sides))
        cache = build_cache(images, None, place, workers=1)
        assert sorted(read) == [f"{name}.png" for name in expected]
        assert_whole(cache)
    assert len(list(place.iterdir())) == 1
    assert_whole(build_cache(files(data, {"a": 8, "z": 8}), 4, place))  # another short side: another folder
    assert len(list(place.iterdir())) == 2


def test_two_versions_of_a_set_fill_one_cache_together(tmp_path: Path) -> None:
    """A run that continues while images are added and a later run share each other's decoded images."""
    data, place = tmp_path / "data", tmp_path / "cache"
    contents = {f"{i:02}": 8 + i % 3 for i in range(1, 40, 2)}
    old = open_cache(files(data, contents), None, place, workers=1)
    old.usable(np.arange(0, 20, 4))
    images, read = spied(files(data, contents | {f"{i:02}": 9 for i in range(0, 40, 2)}))
    new = open_cache(images, None, place, workers=1)
    assert new.directory == old.directory and len(new.decoded(np.arange(40))) == 5
    new.usable(np.arange(0, 40, 3))
    old.usable(np.arange(20))
    assert_whole(old)
    before = len(read)
    assert_whole(new)
    assert len(read) - before - 40 == sum(i % 3 != 0 for i in range(0, 40, 2))
    assert (place / old.directory.name / RECORDS).stat().st_size == 40 * 24


def test_a_bad_image_that_is_mended_is_decoded(tmp_path: Path) -> None:
    data, place = tmp_path / "data", tmp_path / "cache"
    files(data, {"a": 8, "b": 8})
    (data / "b.png").write_bytes(b"")
    (data / "c.png").write_bytes(b"text")
    cache = build_cache(open_images(data), None, place)
    assert [path for path, _ in cache.bad] == ["b.png", "c.png"]
    (data / "b.png").write_bytes((data / "a.png").read_bytes())
    (data / "0.png").write_bytes(b"more text")
    cache = build_cache(open_images(data), None, place)
    assert cache.bad == [("0.png", "text, not an image"), ("c.png", "text, not an image")]
    assert torch.equal(*cache.batch(np.array([1, 2]))[0])
    for path in data.iterdir():
        path.write_bytes(b"all are text now")
    with pytest.raises(UserError, match="None of the 4 images"):
        build_cache(open_images(data), None, place)
    assert (cache.directory / PIXELS).stat().st_size  # the images already cached are kept


def test_a_set_that_was_moved_is_found_again(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    images = files(tmp_path / "data", {"a": 8, "b": 8})
    first = build_cache(images, None, place)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").rename(tmp_path / "elsewhere/data")
    moved, read = spied(open_images(tmp_path / "elsewhere/data"))
    assert moved.root != images.root and build_cache(moved, None, place).directory == first.directory and not read
    assert_whole(build_cache(files(tmp_path / "data", {"a": 8, "c": 8}), None, place))  # other images in its old place
    assert len(list(place.iterdir())) == 2


def test_a_set_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    """It loses an image before the move and gains one after it: still one cache, and each image is decoded once."""
    place = tmp_path / "cache"
    build_cache(files(tmp_path / "data", {"a": 8, "b": 8, "c": 8}), None, place)
    build_cache(files(tmp_path / "data", {"a": 8, "b": 8}), None, place)
    (tmp_path / "data").rename(tmp_path / "renamed")
    images, read = spied(open_images(tmp_path / "renamed"))
    assert_whole(build_cache(images, None, place))
    assert len(read) == 2  # only by assert_whole
    images, read = spied(files(tmp_path / "renamed", {"a": 8, "b": 8, "d": 8}))
    build_cache(images, None, place)
    assert read == ["d.png"] and len(list(place.iterdir())) == 1


def test_a_copy_that_differs_only_in_its_pixels_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """Two versions of a set with equal names, sizes and times, as from archives: only their paths differ."""
    for version in (1, 2):
        for i in range(4):
            path = tmp_path / f"v{version}/images/{i}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(np.full((8, 8, 3), 40 * version + i, np.uint8), "BMP"))
            os.utime(path, (0, 0))
    first, second = (open_images(tmp_path / f"v{version}/images") for version in (1, 2))
    assert first.fingerprint == second.fingerprint
    for images in (first, second, first):
        assert_whole(build_cache(images, None, tmp_path / "cache"))
    (tmp_path / "v1").rename(tmp_path / "v3")  # also if one takes the place of the other
    assert_whole(build_cache(open_images(tmp_path / "v3/images"), None, tmp_path / "cache"))
    (tmp_path / "v2").rename(tmp_path / "v1")
    assert_whole(build_cache(open_images(tmp_path / "v1/images"), None, tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_of_which_more_can_be_read_later(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a plug-in is installed, new images appear between the known ones: each keeps its own pixels."""
    contents = {
        f"{name}.{end}": encode(scene(8, 9 + i)) for i, (name, end) in enumerate(["ap", "bg", "cp", "dg", "ep"])
    }
    contents = {name.replace(".p", ".png").replace(".g", ".gif"): content for name, content in contents.items()}
    if kind == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for name, content in contents.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    with monkeypatch.context() as before:
        before.setattr("simsiam.data.decode.ENDINGS", (".png",))
        assert len(build_cache(open_images(tmp_path / f"set.{kind}"), None, tmp_path / "cache")) == 3
    images, read = spied(open_images(tmp_path / f"set.{kind}"))
    cache = build_cache(images, None, tmp_path / "cache", workers=1)
    assert read == ["b.gif", "d.gif"]
    assert_whole(cache)


def test_what_another_version_called_bad_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = flat_set(), []
    images = flat_set(read=lambda i: (read.append(i), b"" if i in (7, 9) else whole.read(i))[1])
    build_cache(images, 8, tmp_path)
    read.clear()
    assert len(build_cache(images, 8, tmp_path).bad) == 2 and not read
    monkeypatch.setattr("simsiam.data.cache.VERSION", "another")
    for expected in ([7, 9], []):
        mended = dataclasses.replace(images, read=lambda i: (read.append(i), b"" if i == 7 else whole.read(i))[1])
        read.clear()
        cache = build_cache(mended, 8, tmp_path, workers=1)
        assert read == expected and cache.bad == [("7.png", "empty file (0 bytes)")]
        assert np.array_equal(cache.batch(np.array([9]))[0][0].permute(1, 2, 0).numpy(), decode(whole.read(9)))


def test_a_set_without_a_good_image_leaves_another_version_alone(tmp_path: Path) -> None:
    data, place = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    (data / "broken.png").write_bytes(b"")
    broken = dataclasses.replace(open_images(data), read=lambda i: b"")
    filling = open_cache(files(data, {"a": 8, "broken": 8}), None, place)
    with pytest.raises(UserError, match="None of the 1 image of data"):
        build_cache(broken, None, place)
    assert_whole(filling)


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        files(data, {"a": 8, "b": 8})
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert_whole(build_cache(open_images(data), None, tmp_path / "cache"))
    images, read = spied(open_images(data))
    assert len(build_cache(images, None, tmp_path / "cache")) == 2 and not read


def test_tar_files_that_are_added_to_others(tmp_path: Path) -> None:
    def shard(number: int, count: int) -> None:
        with tarfile.open(tmp_path / f"data/{number}.tar", "w") as tar:
            for i in range(count):
                info = tarfile.TarInfo(f"{i}.png")
                content = encode(np.full((8, 8, 3), 16 * number + i, np.uint8))
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    (tmp_path / "data").mkdir()
    shard(1, 3)
    shard(3, 2)
    build_cache(open_images(tmp_path / "data"), None, tmp_path / "cache")
    shard(2, 4)
    shard(3, 3)
    images, read = spied(open_images(tmp_path / "data"))
    cache = build_cache(images, None, tmp_path / "cache", workers=1)
    assert read == ["2.tar/0.png", "2.tar/1.png", "2.tar/2.png", "2.tar/3.png", *(f"3.tar/{i}.png" for i in range(3))]
    assert_whole(cache)


@pytest.mark.parametrize("damage", [PIXELS, RECORDS, REASONS, META])
@pytest.mark.parametrize("cut", [1, 5, 30, 500, 10**9])
def test_what_a_damaged_cache_has_lost_is_decoded_again(tmp_path: Path, damage: str, cut: int) -> None:
    whole = flat_set()
    images = flat_set(read=lambda i: b"" if i == 7 else whole.read(i))
    rows = np.array([i for i in range(50) if i != 7])
    first = build_cache(images, 8, tmp_path, workers=1)
    pixels = first.batch(rows)[0]
    path = first.directory / damage
    path.write_bytes(path.read_bytes()[:-cut])
    for _ in range(2):  # what was decoded again is kept
        half = open_cache(images, 8, tmp_path, workers=1)
        assert torch.equal(half.batch(rows[::-3].copy())[0], pixels.flip(0)[::3])
        found = build_cache(images, 8, tmp_path, workers=1)
        assert torch.equal(found.batch(rows)[0], pixels)
        assert [name for name, _ in found.bad] == ["7.png"]
    path.unlink()
    assert torch.equal(build_cache(images, 8, tmp_path).batch(rows)[0], pixels)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX only")
def test_a_killed_process_leaves_what_it_had_decoded(tmp_path: Path) -> None:
    code = f"""
import os, signal
from simsiam.data import cache
from test_cache import flat_set
cache._TOGETHER = 8
def die(done, total, bad):
    if done == 20: os.kill(os.getpid(), signal.SIGKILL)
cache.build_cache(flat_set(), 8, {str(tmp_path)!r}, progress=die)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    whole = flat_set()
    cache = open_cache(flat_set(read=lambda i: refuse() if i < 8 else whole.read(i)), 8, tmp_path)
    assert cache.decoded(np.arange(50)).tolist() in (list(range(8)), list(range(16)))  # as many as had been flushed
    pixels = cache.batch(np.arange(50))[0]
    assert all(np.array_equal(p.permute(1, 2, 0).numpy(), decode(whole.read(i))) for i, p in enumerate(pixels))


def fill(place: Path, number: int) -> None:
    """Request all images at two sizes, a few at a time, in an order specific to this process."""
    images = mixed_set()
    cache = open_cache(images, None, place, workers=1)
    order = np.random.default_rng(number).permutation(60)
    for start in range(0, 60, 4):
        assert cache.usable(order[start : start + 4]).all()


def mixed_set() -> ImageSet:
    small, large = flat_set(30, 8), flat_set(30, 12)
    return flat_set(60, read=lambda i: (small if i < 30 else large).read(i % 30), ids=[str(i) for i in range(60)])


def test_processes_fill_it_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    images = mixed_set()
    cache = open_cache(dataclasses.replace(images, read=refuse), None, tmp_path)
    for row in range(60):
        (image,), ((h, w),) = cache.batch(np.array([row]))
        assert np.array_equal(image[:, :h, :w].permute(1, 2, 0).numpy(), decode(images.read(row)))
    assert (cache.directory / PIXELS).stat().st_size == 3 * 30 * (64 + 144)


@pytest.mark.parametrize(("side", "threads"), [(16, 1), (160, 3)])
def test_small_files_are_decoded_by_one_thread(side: int, threads: int, tmp_path: Path) -> None:
    """Several threads would contend for the GIL. The calling thread decodes the first few images to find out."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "jpeg")
    by: dict[int, str] = {}

    def read(row: int) -> bytes:
        by[row] = threading.current_thread().name
        time.sleep(0.01)
        return content.getvalue()

    build_cache(dataclasses.replace(mixed_set(), read=read), 16, tmp_path, workers=3)
    assert len(by) == 60 and {by[row] for row in range(4)} == {threading.current_thread().name}
    assert len({by[row] for row in range(4, 60)}) == threads


def test_a_few_small_files_do_not_speak_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Icons that sort first do not keep the photographs after them from being decoded by several threads."""
    monkeypatch.setattr(cache_module, "_TOGETHER", 8)
    small, large = encode(scene(8, 8)), encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    by: dict[int, str] = {}

    def read(row: int) -> bytes:
        by[row] = threading.current_thread().name
        time.sleep(0.01)
        return small if row < 4 else large

    build_cache(dataclasses.replace(mixed_set(), read=read), 16, tmp_path, workers=3)
    assert len({by[row] for row in range(4, 12)}) == 1 and len({by[row] for row in range(12, 60)}) == 3


def test_threads_fill_it_together(tmp_path: Path) -> None:
    images = mixed_set()
    cache = open_cache(images, None, tmp_path, workers=2)
    orders = [np.random.default_rng(number).permutation(60).reshape(-1, 5) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda order: [cache.batch(rows) for rows in order], orders))
    for order, got in zip(orders, batches, strict=True):
        for rows, (pixels, sizes) in zip(order, got, strict=True):
            for row, image, (h, w) in zip(rows, pixels, sizes.tolist(), strict=True):
                assert np.array_equal(image[:, :h, :w].permute(1, 2, 0).numpy(), decode(images.read(row)))
    assert (cache.directory / PIXELS).stat().st_size == 3 * 30 * (64 + 144)


def test_an_image_that_cannot_be_read_is_bad_until_the_next_run(tmp_path: Path) -> None:
    """A temporary network failure must not exclude images permanently."""
    whole, gone = flat_set(), {3, 4}
    images = flat_set(read=lambda i: (_ for _ in ()).throw(OSError("no answer")) if i in gone else whole.read(i))
    cache = build_cache(images, 8, tmp_path)
    assert cache.bad == [(f"{i}.png", "cannot be read: no answer") for i in (3, 4)]
    gone.remove(3)
    assert not cache.usable(np.array([3])).any()  # unchanged within a run
    assert build_cache(images, 8, tmp_path).bad == [("4.png", "cannot be read: no answer")]


def test_too_little_memory_is_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Pillow or torch runs out of memory: the next run, which may have more, decodes the image."""
    errors = iter([MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")])
    with monkeypatch.context() as patch:
        patch.setattr("simsiam.data.decode.orientation", lambda _: (_ for _ in ()).throw(next(errors)))
        cache = open_cache(flat_set(), 8, tmp_path, workers=1)
        assert not cache.usable(np.arange(2)).any()
    assert cache.bad == [(f"{i}.png", "cannot be read: not enough memory to decode it") for i in (0, 1)]
    assert open_cache(flat_set(), 8, tmp_path).usable(np.arange(2)).all()


def test_nothing_decodable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"None of the 50 images of flat can be decoded \(0.png: empty file"):
        build_cache(flat_set(read=lambda i: b""), 8, tmp_path)
    with pytest.raises(UserError, match="None of the 50 images of flat"):
        build_cache(flat_set(read=refuse), 8, tmp_path)


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


def test_the_next_images_are_decoded_while_the_disk_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images are used at once; a record is written only after its pixels are on the disk."""
    whole, busy, idle, synced = flat_set(), threading.Event(), threading.Event(), os.fsync

    def fsync(file: int) -> None:
        busy.set()
        assert idle.wait(60)
        synced(file)

    cache = open_cache(whole, 8, tmp_path, workers=1)
    records = cache.directory / RECORDS
    monkeypatch.setattr(cache_module.os, "fsync", fsync)
    assert cache.usable(np.arange(8)).all() and busy.wait(60)
    for row, image in enumerate(cache.batch(np.arange(8))[0]):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode(whole.read(row), 8))
    assert records.stat().st_size == 0
    idle.set()
    cache.flush()
    assert records.stat().st_size == 8 * 24
    cache.usable(np.arange(50))
    assert records.stat().st_size == 50 * 24, "after the last image it waits for the disk"


@pytest.mark.parametrize("more", [1, 42])
def test_a_disk_that_is_found_full_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Some file systems report it only at fsync: the error is raised for the next images, or after the last ones."""

    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    cache = open_cache(flat_set(), 8, tmp_path, workers=1)
    with monkeypatch.context() as full:
        full.setattr(cache_module.os, "fsync", fsync)
        assert cache.usable(np.arange(8)).all()
        with pytest.raises(UserError, match="is full: the cache of flat needs"):
            cache.usable(np.arange(8, 8 + more))
    assert (cache.directory / RECORDS).stat().st_size == 0
    assert_whole(build_cache(flat_set(), 8, tmp_path))


def test_another_version_leaves_the_files_of_a_running_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update of this package during a run: what the run has mapped must not be cut off."""
    cache = build_cache(flat_set(), 8, tmp_path)
    before = cache.batch(np.arange(50))[0]
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    other = open_cache(flat_set(), 8, tmp_path)
    assert other.directory != cache.directory and len(other.missing(np.arange(50))) == 50
    assert torch.equal(cache.batch(np.arange(50))[0], before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second write on, pixels go to /dev/full, where every write fails as on a full disk."""
    real, opened = open, []

    def full(path: object, *arguments: object, **options: object) -> object:
        if str(path).endswith(PIXELS) and arguments == ("r+b",):
            opened.append(path)
        late = len(opened) > 1 and path is opened[-1]
        return real("/dev/full" if late else path, *arguments, **options)  # type: ignore[call-overload]

    cache = open_cache(flat_set(200, 64), 64, tmp_path)
    monkeypatch.setattr(cache_module, "open", full, raising=False)
    assert cache.usable(np.arange(10)).all()
    with pytest.raises(UserError, match=r"is full: the cache of flat needs about \S+ [kM]B.*SIMSIAM_CACHE"):
        cache.usable(np.arange(200))
    monkeypatch.undo()
    again = build_cache(flat_set(200, 64), 64, tmp_path)  # there is space now
    assert torch.equal(
        again.batch(np.arange(200))[0], build_cache(flat_set(200, 64), 64, tmp_path / "b").batch(np.arange(200))[0]
    )


def photographs(read: list[int], sizes: tuple[tuple[int, int], ...] = ((80, 64), (40, 64), (9, 100))) -> ImageSet:
    """50 images that cycle through these (height, width), one of them empty; `read` records which are read."""
    contents = [encode(np.zeros((*sizes[i % len(sizes)], 3), np.uint8)) if i != 7 else b"" for i in range(50)]
    return flat_set(read=lambda i: (read.append(i), contents[i])[1])


@pytest.mark.parametrize("opens", [open_cache, build_cache])
def test_a_disk_with_too_little_room_is_refused_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: Callable[..., Cache]
) -> None:
    read: list[int] = []
    images = photographs(read)
    needed = (build_cache(images, 16, tmp_path / "twin").directory / PIXELS).stat().st_size
    room: dict[str, object] = {"total": 10**9, "used": 0}
    asked: list[Path] = []
    usage = SimpleNamespace(**room, free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(Path(path)), usage)[1])

    def decode_some() -> Cache:
        cache = opens(images, 16, tmp_path / "place")
        cache.usable(np.arange(4))
        return cache

    with pytest.raises(
        UserError, match=r"flat needs about \S+ [kM]B in .*place, where \S+ ([kM]B|bytes) are free\. Set SIMSIAM_CACHE"
    ):
        decode_some()
    (folder,) = (tmp_path / "place").iterdir()
    assert not (folder / PIXELS).stat().st_size and asked and all(path.is_relative_to(folder) for path in asked)
    for change in ({"free": needed}, {"total": 0}):  # it fits exactly; the file system reports no size
        usage.__dict__.update(change)
        cache = decode_some()
        assert cache.usable(np.arange(50)).sum() == 49
    usage.__dict__.update(room, free=0)
    read.clear()
    assert len(open_cache(images, 16, tmp_path / "place").usable(np.arange(50))) == 50 and not read, "all is there"


def test_room_is_looked_at_by_few_headers_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    images = photographs(read, ((64, 64),))
    monkeypatch.setattr(cache_module, "_HEADERS", 5)
    usage = SimpleNamespace(total=10**9, used=0, free=50 * 3 * 4 * 16**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    build_cache(images, 16, tmp_path / "a", workers=1)
    assert read == [*range(50)], "there is room for 50 of the widest"
    read.clear()
    usage.free -= 1
    build_cache(images, 16, tmp_path / "b", workers=1)
    assert read == [0, 12, 24, 36, 49, *range(50)]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_full_cache_in_a_folder_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    cache = build_cache(flat_set(), 8, tmp_path)
    for path in (cache.directory, tmp_path):
        path.chmod(0o555)
    assert len(build_cache(flat_set(read=refuse), 8, tmp_path).batch(np.arange(50))[0]) == 50


def test_cifar10_prefix_matches_a_plain_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CIFAR.exists():
        pytest.skip(f"no CIFAR-10 at {CIFAR}")
    images = open_images(CIFAR / "test.parquet")
    cache = build_cache(images, 32, tmp_path)
    assert len(cache) == 10_000 and cache.uniform(np.arange(10_000)) == (32, 32) and not cache.bad
    mean = cache.batch(np.arange(10_000))[0].double().mean(dim=(0, 2, 3)) / 255
    assert np.allclose(mean, [0.494, 0.485, 0.450], atol=6e-4)  # from the README of the data
    monkeypatch.setattr("simsiam.data.cache.decode", lambda *_: pytest.fail("all are decoded already"))
    assert len(build_cache(open_images(CIFAR / "test.parquet"), 32, tmp_path)) == 10_000


def test_advice_to_the_system_cannot_fail(photos: Path, tmp_path: Path) -> None:
    """Network file systems fail now and then, and the memory map still holds the pixels."""
    cache = build_cache(open_images(photos), 16, tmp_path / "cache")
    rows = cache.decoded(np.arange(len(cache)))[:4]
    before = cache.batch(rows)[0]
    (cache.directory / PIXELS).unlink()
    cache.expect(rows)
    assert torch.equal(cache.batch(rows)[0], before)


def test_a_file_system_without_locks_is_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", lacking)
    with pytest.raises(UserError, match=r"The file system of .* has no locks: set SIMSIAM_CACHE to another folder"):
        build_cache(open_images(photos), 16, tmp_path / "cache")


def test_without_a_home_folder_the_cache_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SIMSIAM_CACHE")
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(UserError, match="set SIMSIAM_CACHE"):
        cache_folder()
