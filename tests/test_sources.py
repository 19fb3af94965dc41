"""open_images: data sets as users have them on disk."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import math
import os
import shutil
import struct
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simsiam.config import UserError
from simsiam.console import Listener
from simsiam.data.check import check
from simsiam.data.imageset import File, member_keys
from simsiam.data.imageset import encode as encode_labels
from simsiam.data.sources import ImageSet, _braces, absolute, open_images
from test_decode import encode, scene, write_nasty_folder

CIFAR = Path(__file__).parents[2] / "shared/data/cifar10"


def png(value: int) -> bytes:
    return encode(np.full((4, 4, 3), value, dtype=np.uint8))


def write(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return root


def named(images: ImageSet) -> dict[str, str | None]:
    """Map ids to class names."""
    if images.labels is None:
        return dict.fromkeys(images.ids)
    assert images.classes is not None
    return {i: images.classes[k] if k >= 0 else None for i, k in zip(images.ids, images.labels.tolist(), strict=True)}


def held_out(images: ImageSet) -> list[str]:
    return [images.ids[i] for i in images.test]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_nasty_folder(tmp_path: Path) -> None:
    good, bad = write_nasty_folder(tmp_path)
    images = open_images(tmp_path)
    assert images.ids == sorted([*good, *bad])
    assert all(images.read(i) == (tmp_path / name).read_bytes() for i, name in enumerate(images.ids))
    assert images.labels is None and len(images.test) == 0
    assert np.array_equal(images.train, np.arange(len(images)))


def test_check_reports_a_nasty_folder(tmp_path: Path) -> None:
    good, bad = write_nasty_folder(tmp_path)
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "plain.jpg").read_bytes())
    calls: list[tuple[int, int, int]] = []
    listener = Listener()
    listener.checking = lambda *a: calls.append(a)  # type: ignore[method-assign]
    found = json.loads(json.dumps(check(tmp_path, workers=2, listener=listener)))
    assert {entry["path"] for entry in found["bad_files"]} == set(bad)
    assert all(bad[entry["path"]] in entry["reason"] for entry in found["bad_files"])
    assert found["duplicates"] == [["copy.jpg", "plain.jpg"]] and found["duplicates_across_splits"] == 0
    assert found["images"] == len(good) + len(bad) + 1 == calls[-1][1] and calls[-1][2] == len(bad)
    # The rotated one is stored 60 wide and 80 high; its size is that after rotation.
    assert found["sizes"]["min"] == found["sizes"]["max"] == [80, 60] and found["sizes"]["short_side"]["p50"] == 60
    assert found["modes"]["CMYK"] == 1 and found["modes"]["1"] == 1 and found["formats"]["GIF"] == 2
    assert found["labels"] is None and found["splits"] == {"train": found["images"], "test": 0}


def test_the_smallest_and_the_largest_image_are_images_that_there_are(tmp_path: Path) -> None:
    for width, height in ((200, 10), (10, 100), (40, 60)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{width}.png")
    sizes = check(tmp_path)["sizes"]
    assert (sizes["min"], sizes["max"]) == ([10, 100], [40, 60])


def test_sizes_are_those_of_upright_images_and_empty_classes_are_counted(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20), (9 * orientation, 0, 0)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    images = open_images(tmp_path)
    found = check(replace(images, labels=np.array([0, 1, 1, 0, 1, -1, 1, 1]), classes=("a", "b", "c")))
    assert (found["sizes"]["min"], found["sizes"]["max"]) == ([30, 20],) * 2 and found["sizes"]["median"] == [25, 25]
    for orientation in range(1, 9):
        one = check(tmp_path / f"{orientation}.jpg")["sizes"]["min"]
        assert one == ([20, 30] if orientation >= 5 else [30, 20])
    assert found["labels"] == {"a": 2, "b": 5, "c": 0, "(unlabelled)": 1}


def test_files_without_an_ending_are_images_if_they_begin_like_one(tmp_path: Path) -> None:
    kinds = ("JPEG", "PNG", "GIF", "TIFF", "WEBP")
    for kind in kinds:
        Image.fromarray(scene(20, 30)).save(tmp_path / f"1.{kind}", kind)
        (tmp_path / f"1.{kind}").rename(tmp_path / f"blob{kind}")
    (tmp_path / "Makefile").write_text("all:\n")
    (tmp_path / "empty").touch()
    (tmp_path / "sound").write_bytes(b"RIFF\0\0\0\0WAVE")
    (tmp_path / "data.bin").write_bytes((tmp_path / "blobPNG").read_bytes())  # a misleading suffix
    found = check(tmp_path)
    assert found["images"] == 5 and not found["bad_files"] and set(found["formats"]) == set(kinds)
    (tmp_path / "snapshot").mkdir()  # as in the Hugging Face cache: names that link to blobs
    (tmp_path / "snapshot/i.png").symlink_to(tmp_path / "blobPNG")
    with pytest.warns(UserWarning, match=r"1 file used\. Left out, .* \(no ending\) 4\.$"):  # all but the one linked to
        assert open_images(tmp_path).ids == ["snapshot/i.png"]


def test_class_folders(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, "dog/1.png", "cat/1.png", "cat/deep/2.png", "dog/2.JPG"))
    assert images.classes == ("cat", "dog")
    assert named(images) == {"cat/1.png": "cat", "cat/deep/2.png": "cat", "dog/1.png": "dog", "dog/2.JPG": "dog"}


def test_wrapped_class_folders_and_a_stray_image(tmp_path: Path) -> None:
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(20)]
    images = open_images(write(tmp_path, *(f"images/all/{name}" for name in names)))
    assert images.classes == ("cat", "dog")
    images = open_images(write(tmp_path / "images/all", *names, "stray.png").parents[1])
    assert images.classes == ("cat", "dog") and named(images)["images/all/stray.png"] is None


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png", "a/3.png", "b/4.png"],  # as many outside folders as inside
        ["only/1.png", "only/2.png"],
        [f"{i}/image.png" for i in range(9)],  # one folder per image
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, names: list[str]) -> None:
    images = open_images(write(tmp_path, *names))
    assert images.labels is None and images.classes is None and len(images) == len(names)


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("Train", "Val"), ("training", "validation")])
def test_split_folders(tmp_path: Path, first: str, second: str) -> None:
    names = [f"{split}/{kind}/{i}.png" for split in (first, second) for kind in ("cat", "dog") for i in range(3)]
    images = open_images(write(tmp_path, *names, f"{second}/unheard/1.png"))
    assert images.classes == ("cat", "dog")
    assert held_out(images) == sorted(i for i in images.ids if i.startswith(second))
    assert named(images)[f"{second}/unheard/1.png"] is None  # not among the training classes
    assert named(images)[f"{second}/cat/0.png"] == "cat"


@pytest.mark.parametrize(
    ("first", "second"),
    [("train_images", "test_images"), ("train2017", "val2017"), ("seg_train", "seg_test"), ("trainval", "test"),
     ("train images", "test images"), ("train", "eval"), ("train", "dev")],
)  # fmt: skip
def test_split_folders_of_longer_names(tmp_path: Path, first: str, second: str) -> None:
    names = [f"{split}/{kind}/{i}.png" for split in (first, second) for kind in ("cat", "dog") for i in range(3)]
    images = open_images(write(tmp_path, *names))
    assert images.classes == ("cat", "dog") and held_out(images) == [i for i in images.ids if i.startswith(second)]
    plain = open_images(write(tmp_path / "plain", *(f"{split}/{i}.png" for split in (first, second) for i in range(3))))
    assert plain.labels is None and len(plain.test) == 3


def test_what_is_not_labelled_is_trained_on(tmp_path: Path) -> None:
    """As STL-10 lies in folders."""
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("cat", "dog") for i in range(3)]
    images = open_images(write(tmp_path, *names, *(f"unlabeled/{i}.png" for i in range(50))))
    assert images.classes == ("cat", "dog") and len(images.test) == 6 and len(images.train) == 56
    assert sum(kind is None for kind in named(images).values()) == 50
    for path in list((tmp_path / "test").rglob("*.png")):
        path.unlink()
    images = open_images(tmp_path)
    assert images.classes == ("cat", "dog") and len(images.test) == 0 and len(images.train) == 56


def test_an_image_above_the_folders_changes_nothing(tmp_path: Path) -> None:
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("cat", "dog") for i in range(20)]
    images = open_images(write(tmp_path, *(f"deep/set/{name}" for name in names), "deep/cover.png", "logo.png"))
    assert images.classes == ("cat", "dog") and len(images.test) == 40
    assert [i for i, kind in named(images).items() if kind is None] == ["deep/cover.png", "logo.png"]


def test_split_folders_without_classes(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, "train/1.png", "train/2.png", "valid/1.png", "test/1.png"))
    assert images.labels is None and held_out(images) == ["test/1.png", "valid/1.png"]
    # One of the two alone is only a name: a folder of trains is not a split.
    assert len(open_images(tmp_path / "train").test) == 0
    rail = open_images(write(tmp_path / "rail", "train/1.png", "train/2.png", "bus/1.png", "bus/2.png"))
    assert rail.classes == ("bus", "train") and len(rail.test) == 0
    for name in ("val", "train"):
        few = open_images(write(tmp_path / f"only-{name}", *(f"{name}/{i}.png" for i in range(30)), "others/1.png"))
        assert len(few.test) == 0  # else only the others would be trained on


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "real", "1.png", "sub/2.png")
    (tmp_path / "real/sub/up").symlink_to(tmp_path / "real")
    (tmp_path / "real/linked").symlink_to(write(tmp_path / "elsewhere", "3.png"))
    assert open_images(tmp_path / "real").ids == ["1.png", "linked/3.png", "sub/2.png"]


def test_a_pattern_takes_every_file_once(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/b/2.png")
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    assert open_images(f"{tmp_path}/**/*.png").ids == ["1.png", "b/2.png"]


def test_links_to_nothing_are_named(tmp_path: Path) -> None:
    """As git-annex has them for files not fetched."""
    write(tmp_path, "0.png", "a/1.png")
    for i in range(5):
        (tmp_path / f"a/gone{i}.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"cannot read a/gone\d.png \(broken link\), .* and 2 more: left out"):
        assert open_images(tmp_path).ids == ["0.png", "a/1.png"]


def test_a_link_to_an_image_of_the_folder_is_no_copy_of_it(tmp_path: Path) -> None:
    """Else `duplicates` would offer to remove the file and keep the link."""
    write(tmp_path / "set", "b.png", "sub/c.png")
    (tmp_path / "set/a.png").symlink_to("b.png")
    (tmp_path / "set/sub/d.png").symlink_to("../a.png")
    (tmp_path / "set/named.png").symlink_to(write(tmp_path / "set", "blob") / "blob")
    (tmp_path / "set/outside.png").symlink_to(write(tmp_path / "elsewhere", "e.png") / "e.png")
    os.link(tmp_path / "set/b.png", tmp_path / "set/hard.png")
    with pytest.warns(UserWarning, match=r"2 links to files that are in this folder anyway: left out\.$"):
        images = open_images(tmp_path / "set")
    assert images.ids == ["b.png", "hard.png", "named.png", "outside.png", "sub/c.png"]
    (tmp_path / "linked").symlink_to("set")
    with pytest.warns(UserWarning, match="2 links"):
        assert open_images(tmp_path / "linked").ids == images.ids


@pytest.mark.parametrize("backwards", [False, True])
def test_links_never_put_an_image_in_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool) -> None:
    """In whichever order the disk lists them."""
    scan = os.scandir

    def scandir(folder: str) -> contextlib.AbstractContextManager[list[os.DirEntry[str]]]:
        with scan(folder) as entries:
            return contextlib.nullcontext(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

    monkeypatch.setattr(os, "scandir", scandir)
    write(tmp_path / "all", "0.png", "real/1.png", "real/b/2.png")
    for name in ("a", "c"):
        (tmp_path / "all/real" / name).symlink_to(tmp_path / "all/real/b")
    (tmp_path / "all/real/d").symlink_to(tmp_path / "all")
    assert open_images(tmp_path / "all/real").ids == ["1.png", "b/2.png"], "nor what lies above the folder"


def test_what_cannot_be_read_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1.png", "closed/2.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    scan = os.scandir

    def scandir(folder: str) -> Iterator[os.DirEntry[str]]:  # root has all permissions
        if folder.endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match=r"cannot read .*closed \(Permission denied\)"):
        assert open_images(tmp_path).ids == ["1.png"]
    with pytest.raises(UserError, match=r"Cannot read .*closed: Permission denied"):
        open_images(tmp_path / "closed")


def test_a_run_and_an_empty_name_are_no_images(tmp_path: Path) -> None:
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"is a run, not images.*--init"):
        open_images(tmp_path)
    with pytest.raises(UserError, match="empty"):
        open_images("")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
            file.write(png(7))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    images = open_images(tmp_path)
    assert images.ids == ["caf\\xe9.png"] and json.dumps(images.ids[0]).encode() and images.read(0) == png(7)


def test_fingerprint_changes_with_the_files_only(tmp_path: Path) -> None:
    write(tmp_path / "a", "1.png", "2.png")
    first = open_images(tmp_path / "a").fingerprint
    assert open_images(tmp_path / "a").fingerprint == first
    (tmp_path / "a").rename(tmp_path / "b")  # moved: the same images
    assert open_images(tmp_path / "b").fingerprint == first
    os.utime(tmp_path / "b/1.png", (1, 1))
    second = open_images(tmp_path / "b").fingerprint
    write(tmp_path / "b", "3.png")
    third = open_images(tmp_path / "b").fingerprint
    with open(tmp_path / "b/1.png", "ab") as file:
        file.write(b"more")
    os.utime(tmp_path / "b/1.png", (1, 1))  # as after a tool that preserves times
    assert len({first, second, third, open_images(tmp_path / "b").fingerprint}) == 4


def test_one_file_and_a_glob(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    assert open_images(tmp_path / "a/1.png").ids == ["1.png"]
    assert open_images(f"{tmp_path}/*/*.png").ids == ["a/1.png", "a/2.png", "b/3.png"]
    assert open_images(f"{tmp_path}/{{a,./a,*}}/1.png").ids == ["1.png"]  # one file, three spellings


def test_the_demo_set_is_not_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "demo", "1.png", "2.png")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"write \./demo for the folder of that name"):
        assert len(open_images("demo")) > 9000
    assert absolute("demo") == "demo" and absolute("./demo") == str(tmp_path / "demo")
    assert len(open_images("./demo")) == len(open_images(tmp_path / "demo")) == 2


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "pictures/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert open_images("~/pictures").ids == ["1.png"]


def test_ignored_kinds_are_warned_about(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.psd", "3.PSD", "more.zip", "notes.txt", "old.ico")
    (tmp_path / "no-ending").write_bytes(encode(scene()))
    (tmp_path / "README").write_text("no image")
    left_out = r"\.psd 2, \.zip 1, \.ico 1, \(no ending\) 1\.$"
    with pytest.warns(UserWarning, match=rf"1 file used\. Left out, being of other kinds: {left_out}"):
        assert open_images(tmp_path).ids == ["1.png"]


def test_photographs_of_iphones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with the plug-in; without it, the message says what to install."""
    pytest.importorskip("pillow_heif")
    (tmp_path / "photos").mkdir()
    for name in ("IMG_1.HEIC", "IMG_2.heif", "blob"):
        Image.fromarray(scene()).save(tmp_path / "photos" / name, "HEIF")
    write_tar(tmp_path / "photos.tar", {"1.heic": (tmp_path / "photos/blob").read_bytes()})
    assert len(open_images(tmp_path / "photos.tar")) == 1
    with pytest.warns(UserWarning, match=r"2 files used\. Left out, .* \(no ending\) 1\.$"):
        found = check(tmp_path / "photos")
    assert found["images"] == 2 and found["formats"] == {"HEIF": 2} and not found["bad_files"]
    (tmp_path / "backup").mkdir()
    shutil.copy(tmp_path / "photos/blob", tmp_path / "backup/00a1")
    assert open_images(tmp_path / "backup").ids == ["00a1"]
    monkeypatch.setattr("simsiam.data.decode.ENDINGS", (".jpg", ".png"))
    with pytest.raises(UserError, match=r"none an image: .*\.heic 1.* pip install pillow-heif"):
        open_images(tmp_path / "photos")
    write(tmp_path / "photos", "1.png")
    with pytest.warns(UserWarning, match=r"1 file used\. Left out, .* \.heic 1, \.heif 1\. .*pip install pillow-heif"):
        assert open_images(tmp_path / "photos").ids == ["1.png"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text", *(f"{i}.txt" for i in range(10)), "a.csv", "b.csv")
    cases = {
        str(tmp_path / "nowhere"): "There is no .*nowhere",
        str(tmp_path / "empty"): "empty",
        str(tmp_path / "text"): r"12 files, none an image: \.txt 10, \.csv 2",
        str(tmp_path / "text/0.txt"): "1 file, none an image",
        f"{tmp_path}/*.tar": "No file matches",
        "CIFAR01": "no torchvision data set.* Did you mean 'CIFAR10'",
        "cifar10": "Did you mean 'CIFAR10'",
        f"CIFAR10:{tmp_path}": "CIFAR10 is not in .*",
        f"ImageFolder:{tmp_path}/empty": "ImageFolder",
        f"CocoDetection:{tmp_path}": "needs more than a folder",
        f"LSUN:{tmp_path}": "LSUN is not in .*, or needs more than a folder",
        f"VisionDataset:{tmp_path}": "no torchvision data set of that name",
    }
    for data, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            open_images(data)
        assert "\n" not in str(error.value), data


# --- Parquet ----------------------------------------------------------------------------------------------------------


def table(values: list[int], label: pa.Array | None = None, paths: list[str | None] | None = None) -> pa.Table:
    files = [{"bytes": png(v), "path": p} for v, p in zip(values, paths or [f"{v}.png" for v in values], strict=True)]
    columns = {"image": pa.array(files, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    return pa.table(columns | ({"label": label} if label is not None else {}))


def values_of(images: ImageSet) -> list[int]:
    """Read back the grey value given to `png` from every image."""
    return [np.asarray(Image.open(io.BytesIO(images.read(i))))[0, 0, 0].item() for i in range(len(images))]  # type: ignore[arg-type]


def test_parquet_with_hugging_face_names(tmp_path: Path) -> None:
    info = {
        "info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["x", "y", "z"], "_type": "ClassLabel"}}}
    }
    data = table([5, 6, 7, 8, 9], pa.array([0, 2, 2, -1, 0])).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(data, tmp_path / "a.parquet", row_group_size=2)
    images = open_images(tmp_path / "a.parquet")
    assert values_of(images) == [5, 6, 7, 8, 9] and images.classes == ("x", "y", "z")
    assert images.labels is not None and images.labels.tolist() == [0, 2, 2, -1, 0] and len(images.test) == 0
    assert images.ids == [f"{v}.png" for v in (5, 6, 7, 8, 9)]


def test_parquet_folder_with_splits_read_from_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More row groups than are kept in memory, several files, any order: images match their labels."""
    (tmp_path / "data").mkdir()
    value = iter(range(250))
    for name, count in (("test-00000-of-00001", 40), ("train-00000-of-00002", 100), ("train-00001-of-00002", 110)):
        values = [next(value) for _ in range(count)]
        labels = pa.array([f"class {v % 3}" for v in values])
        pq.write_table(
            table(values, labels, ["image.png"] * count), tmp_path / f"data/{name}.parquet", row_group_size=7
        )
    assert not open_images(tmp_path).in_order, "all of it is held"
    monkeypatch.setattr("simsiam.data.parquet._HELD_BYTES", 2000)
    images = open_images(tmp_path)
    assert images.in_order, "a row group is read anew for nearly every image"
    assert images.classes == ("class 0", "class 1", "class 2") and images.test.tolist() == list(range(40))
    assert images.labels is not None and images.labels.tolist() == [v % 3 for v in range(250)]
    assert len(set(images.ids)) == 250 and images.ids[40] == "data/train-00000-of-00002.parquet#0"
    wrong: list[int] = []

    def look(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(250).tolist():
            if np.asarray(Image.open(io.BytesIO(images.read(i))))[0, 0, 0] != i:  # type: ignore[arg-type]
                wrong.append(i)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    read: Any = images.read
    assert len(read._held) <= 3, "the others were let go"
    assert read._bytes == sum(column.nbytes for column in read._held.values())


def test_parquet_with_raw_bytes_and_odd_labels(tmp_path: Path) -> None:
    data = pa.table({"id": [1, 2, 3, 4], "picture": [png(v) for v in range(4)], "label": [7, 3, 7, 3]})
    pq.write_table(data, tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    assert values_of(images) == [0, 1, 2, 3] and images.ids[0] == "a.parquet#0"
    assert images.classes == ("3", "7") and images.labels is not None and images.labels.tolist() == [1, 0, 1, 0]


def test_numbers_are_classes_in_their_order() -> None:
    labels, classes = encode_labels([10, 9, 10, "9", None])
    assert classes == ("9", "10") and labels is not None and labels.tolist() == [1, 0, 1, 0, -1]
    labels, classes = encode_labels([1.0, 0.0, math.inf, 1.0, math.nan, 0.0, -math.inf])
    assert classes == ("0", "1") and labels is not None and labels.tolist() == [1, 0, -1, 1, -1, 0, -1]
    for unknown in (-1, -1.0, "-1", np.float64(-1)):
        labels, classes = encode_labels([0.0, 1.0, unknown] * 3)
        assert classes == ("0", "1") and labels is not None and labels.tolist() == [0, 1, -1] * 3


def test_images_of_one_name_in_two_archives_are_two() -> None:
    files = [File(name, f"/{name}", 10, 5) for name in ("a.tar", "b.tar")]
    assert len(set(member_keys((file, "1.png") for file in files).tolist())) == 2


@pytest.mark.parametrize("label", [[4, 4, 4], ["a", "b", "c"], [None, None, None]])
def test_labels_that_tell_nothing_are_none(tmp_path: Path, label: list[object]) -> None:
    pq.write_table(table([1, 2, 3], pa.array(label)), tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet")
    assert images.labels is None and images.classes is None


def test_parquet_of_test_data_alone_is_what_was_asked_for(tmp_path: Path) -> None:
    pq.write_table(table([1, 2, 3]), tmp_path / "test.parquet")
    assert len(open_images(tmp_path / "test.parquet").train) == 3


def test_bad_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "text.parquet")
    pq.write_table(table([]), tmp_path / "rows.parquet")
    whole = table(list(range(50)))
    pq.write_table(whole, tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-100])
    (tmp_path / "zero.parquet").write_bytes(b"")
    cases = {
        "text": r"no image column, only text \(string\)",
        "rows": "no rows",
        "cut": "Cannot read",
        "zero": "Cannot read",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            open_images(tmp_path / f"{name}.parquet")
        assert "\n" not in str(error.value)


def test_cifar10() -> None:
    if not CIFAR.exists():
        pytest.skip(f"no CIFAR-10 at {CIFAR}")
    images = open_images(CIFAR)
    assert images.classes is not None and images.labels is not None
    assert len(images.train) == 50_000 and len(images.test) == 10_000 and images.classes[0] == "airplane"
    assert all(images.ids[i].startswith("test/") for i in images.test)
    for i in (
        0,
        999,
        1000,
        9_999,
        10_000,
        10_999,
        11_000,
        59_999,
    ):  # the ids contain the class: row groups and files align
        assert images.ids[i].split("/")[1] == images.classes[images.labels[i]]
    rows = pq.read_table(CIFAR / "train.parquet", columns=["image"])["image"]
    assert images.read(10_000 + 31_415) == rows[31_415].as_py()["bytes"]


# --- archives ---------------------------------------------------------------------------------------------------------


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


LAYOUT = {
    f"set/{split}/{kind}/{i}.png": png(100 * a + 10 * b + i)
    for a, split in enumerate(("train", "test"))
    for b, kind in enumerate(("cat", "dog"))
    for i in range(3)
}


def test_links_in_a_tar_are_images(tmp_path: Path) -> None:
    """GNU tar stores the second name of a file as a link to the first."""
    folder = tmp_path / "set"
    write(folder, "a/1.png", "a/2.png")
    os.link(folder / "a" / "1.png", folder / "hard.png")
    (folder / "soft.png").symlink_to("a/2.png")
    (folder / "a" / "soft.png").symlink_to("../soft.png")
    (folder / "a" / "further.png").symlink_to("soft.png")
    (folder / "nothing.png").symlink_to("gone.png")
    (folder / "round.png").symlink_to("round.png")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, "set")
    images = open_images(tmp_path / "set.tar")
    assert sorted(images.ids) == [f"set/{name}.png" for name in ("a/1", "a/2", "a/further", "a/soft", "hard", "soft")]
    content = {name: images.read(i) for i, name in enumerate(images.ids)}
    assert content["set/hard.png"] == content["set/a/1.png"] == png(0)
    assert content["set/soft.png"] == content["set/a/soft.png"] == content["set/a/further.png"] == png(1)


def test_a_tar_of_names_that_are_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for i in range(8):
            info = tarfile.TarInfo(f"café/{i}.png")
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
    images = open_images(tmp_path / "old.tar")
    assert images.ids == [rf"caf\xe9/{i}.png" for i in range(8)] and images.read(7) == png(7)


def test_a_pattern_may_be_longer_than_a_name(tmp_path: Path) -> None:
    for i in range(100):
        write_tar(tmp_path / f"{i:03}.tar", {f"{i}.png": png(i)})
    pattern = f"{tmp_path}/{{{','.join(f'{i:03}' for i in range(100))}}}.tar"
    assert len(pattern) > 255 and len(open_images(pattern)) == 100
    with pytest.raises(UserError, match="x" * 300):
        open_images("x" * 300)


def test_the_name_of_the_data_means_the_same_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "photos", "1.png")
    assert absolute("photos/") == str(tmp_path / "photos") == absolute(tmp_path / "photos")
    assert absolute("shards/s-{000..009}.tar") == f"{tmp_path}/shards/s-{{000..009}}.tar"
    assert absolute("~/s-*.tar") == f"{tmp_path}/home/s-*.tar"
    assert absolute("CIFAR10:data") == f"CIFAR10:{tmp_path}/data" and absolute("CIFAR10:/data") == "CIFAR10:/data"
    assert absolute("demo") == "demo" and absolute("not there") == "not there"


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"])
def test_archives(tmp_path: Path, kind: str) -> None:
    files = LAYOUT | {"set/notes.txt": b"x", "__MACOSX/set/train/._1.png": b"x", "set/.hidden.png": b"x"}
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        packing = {"tar": "w", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(kind, "w:gz")
        write_tar(path, {f"./{name}": content for name, content in files.items()}, packing)
    images = open_images(path)
    assert images.name == "set" and images.ids == list(LAYOUT)
    assert [images.read(i) for i in reversed(range(12))] == list(LAYOUT.values())[::-1]
    assert images.classes == ("cat", "dog") and images.test.tolist() == list(range(6, 12))
    assert open_images(tmp_path).fingerprint == images.fingerprint  # a folder that contains only this


def test_a_zip_with_backslashes_has_classes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in LAYOUT.items():
            archive.writestr(name.replace("/", "\\"), content)
    images = open_images(tmp_path / "a.zip")
    assert images.ids == list(LAYOUT) and images.classes == ("cat", "dog")
    assert images.test.tolist() == list(range(6, 12))
    assert [images.read(i) for i in range(12)] == list(LAYOUT.values())


class Unflagged(zipfile.ZipInfo):
    """A member whose name is written in an encoding without a word about it."""

    def __init__(self, name: str, encoding: str = "utf-8") -> None:
        super().__init__(name)
        self.encoding = encoding

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.encoding), self.flag_bits


def test_a_zip_of_unicode_names_without_their_flag(tmp_path: Path) -> None:
    """As Info-ZIP writes them on Linux."""
    names = ["ünï 日本/emoji😀.png", "ünï 日本/b.png"]
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(Unflagged(name), png(i))
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert archive.namelist() != names
    images = open_images(tmp_path / "b.zip")
    assert images.ids == names and [images.read(i) for i in range(2)] == [png(0), png(1)]
    with zipfile.ZipFile(tmp_path / "dos.zip", "w") as archive:
        archive.writestr(Unflagged("é.png", "cp437"), png(0))
    assert open_images(tmp_path / "dos.zip").ids == ["é.png"]


def test_zip_is_thread_safe(tmp_path: Path) -> None:
    content = {f"{i}.png": png(i) for i in range(200)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    images = open_images(tmp_path / "a.zip")
    wrong: list[str] = []

    def look(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(200).tolist():
            if images.read(i) != content[images.ids[i]]:
                wrong.append(images.ids[i])

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_what_is_hidden_in_an_archive_lies_below_what_all_share(tmp_path: Path, kind: str) -> None:
    """As `tar cf a.tar ~/.keras/datasets/set` and macOS make them."""

    def packed(*names: str) -> list[str]:
        path, files = tmp_path / f"a.{kind}", {name: png(i) for i, name in enumerate(names)}
        if kind == "tar":
            write_tar(path, files)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        return sorted(open_images(path).ids)

    assert packed("home/.keras/set/1.png", "home/.keras/set/.thumbs/1.png", "__MACOSX/home/.keras/set/._1.png") == [
        "home/.keras/set/1.png"
    ]
    assert packed("cover.png", "notes.txt", *(f".h/set/{i}.png" for i in range(20))) == sorted(
        ["cover.png", *(f".h/set/{i}.png" for i in range(20))]
    )
    assert packed("./1.png", "./a/2.png", "./.trash/3.png") == ["1.png", "a/2.png"]
    assert packed("../set/1.png", "../set/2.png") == ["../set/1.png", "../set/2.png"]
    assert packed(".git/1.png", "2.png") == ["2.png"]


def test_images_that_cannot_be_read_are_named_in_archives_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.dng": b"raw", "3.dng": b"raw", "notes.txt": b""})
    with pytest.warns(UserWarning, match=r"a\.tar: \.dng 2 left out\.$"):
        assert open_images(tmp_path / "a.tar").ids == ["1.png"]
    write_tar(tmp_path / "b.tar", {"2.dng": b"raw"})
    with pytest.raises(UserError, match=r"^No images in .*b\.tar: \.dng 1 left out\.$"):
        open_images(tmp_path / "b.tar")


def test_a_label_file_that_tells_nothing_leaves_the_classes_of_the_folders(tmp_path: Path) -> None:
    files = {f"{kind}/{i}.png": png(i) for kind in ("cat", "dog") for i in range(4)}
    write_tar(tmp_path / "a.tar", {**files, "cat/0.json": b'{"label": "x"}'})
    assert open_images(tmp_path / "a.tar").classes == ("cat", "dog")


def test_ids_stay_when_another_archive_is_added(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": png(1)})
    before = open_images(tmp_path)
    write_tar(tmp_path / "b.tar", {"1.png": png(2)})
    after = open_images(tmp_path)
    assert before.ids == ["a.tar/1.png"] and after.ids == ["a.tar/1.png", "b.tar/1.png"]
    assert after.keys[0] == before.keys[0] and open_images(tmp_path / "a.tar").ids == ["1.png"]


def test_a_zip_of_a_method_that_python_lacks_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.cls", b"cat")
        archive.writestr("1.png", png(1))
    content = bytearray(path.read_bytes())
    for at in (content.index(b"PK\3\4") + 8, content.index(b"PK\1\2") + 10):
        content[at] = 9  # Deflate64
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^Cannot read .*a\.zip \(.*\): copy or download it again\.$"):
        open_images(path)


def test_unpacked_copy_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar.gz", {"1.png": png(1)}, "w:gz")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    images = open_images(tmp_path / "a.tar.gz")
    assert len(list((tmp_path / "tmp").iterdir())) == 1 and images.read(0) == png(1)
    del images
    assert not list((tmp_path / "tmp").iterdir())


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(12):
        files: dict[str, bytes] = {}
        for i in range(4):
            n = shard * 4 + i
            files |= {f"{n:04d}.png": png(n), f"{n:04d}.cls": str(n % 3).encode(), f"{n:04d}.txt": b"a caption"}
        write_tar(tmp_path / f"part-{shard:03d}.tar", files)
    images = open_images(f"{tmp_path}/part-{{000..011}}.tar")
    assert values_of(images) == list(range(48)) and images.classes == ("0", "1", "2")
    assert images.labels is not None and images.labels.tolist() == [n % 3 for n in range(48)]
    assert images.ids[5] == "part-001.tar/0005.png"
    assert open_images(f"{tmp_path}/part-*.tar").ids == images.ids == open_images(tmp_path).ids
    assert open_images(f"{tmp_path}/part-{{003,001}}.tar").ids[0] == "part-003.tar/0012.png"
    with pytest.raises(UserError, match=r"2 of the 3 files of .* are missing; the first is .*part-012\.tar"):
        open_images(f"{tmp_path}/part-{{011..013}}.tar")


def test_webdataset_json_labels_and_split_names(tmp_path: Path) -> None:
    for split, start in (("train", 0), ("val", 6)):
        files: dict[str, bytes] = {}
        for n in range(start, start + 6):
            record = json.dumps({"label": ("ape", "bee")[n % 2], "width": 4}).encode()
            files |= {f"a/{n}.seg.json": b"[1, 2", f"a/{n}.json": record, f"a/{n}.input.PNG": png(n)}
        write_tar(tmp_path / f"{split}-0.tar", files)
    images = open_images(tmp_path)
    assert images.classes == ("ape", "bee") and values_of(images) == list(range(12))
    assert images.labels is not None and images.labels.tolist() == [0, 1] * 6
    assert images.test.tolist() == list(range(6, 12))


def test_braces() -> None:
    assert _braces("a{08..10}{x,y}") == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]
    assert _braces("{9..11}") == ["9", "10", "11"] and _braces("plain") == ["plain"]


def test_bad_archives(tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", {f"{i}.png": png(i) for i in range(9)})
    whole = (tmp_path / "good.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 4 * 1024 + 700])
    (tmp_path / "damaged.tar").write_bytes(whole[:4096] + b"\xff" * 512 + whole[4608:])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-60])
    (tmp_path / "damaged.tgz").write_bytes(gzip.compress(whole)[:40] + bytes(99))
    (tmp_path / "text.tar.gz").write_bytes(b"not packed")
    (tmp_path / "text.zip").write_bytes(b"hello")
    (tmp_path / "zero.tar").write_bytes(b"")
    write_tar(tmp_path / "none.tar", {"readme.txt": b"x"})
    for path in sorted(tmp_path.iterdir()):
        if path.name == "good.tar":
            assert len(open_images(path)) == 9
            continue
        with pytest.raises(UserError, match="No images in" if path.name == "none.tar" else "Cannot read") as error:
            open_images(path)
        assert "\n" not in str(error.value)


def test_damage_inside_a_zip_is_one_bad_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", png(i))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"IDAT") + 5] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    bad = check(tmp_path / "a.zip")["bad_files"]
    assert [entry["path"] for entry in bad] == ["0.png"] and "CRC" in bad[0]["reason"]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    write(tmp_path, "a.png", "b.png")
    with open(tmp_path / "b.png", "r+b") as file:
        file.truncate(40_000_000)
    bad = check(tmp_path)["bad_files"]
    reason = "40 MB, more than 2 megapixels can take, Pillow's limit against decompression bombs"
    assert bad == [{"path": "b.png", "reason": reason}]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_of_an_archive_that_is_too_large_is_not_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    files = {f"{i}.png": png(i) for i in range(3)} | {"1.cls": bytes(17_000_000), "bomb.png": bytes(40_000_000)}
    if kind == "tar":
        write_tar(tmp_path / "a.tar", files)
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        assert (tmp_path / "a.zip").stat().st_size < 60_000
    tracemalloc.start()
    images = open_images(tmp_path / f"a.{kind}")
    bad = check(images)["bad_files"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.labels is None and len(images) == 4
    reason = "40 MB, more than 2 megapixels can take, Pillow's limit against decompression bombs"
    assert bad == [{"path": "bomb.png", "reason": reason}] and peak < 3_000_000


def test_a_zip_that_tells_too_small_a_size_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(40_000_000))
    told = struct.pack("<I", 40_000_000)
    content = (tmp_path / "a.zip").read_bytes()
    assert content.count(told) == 2  # in the local header and in the central directory
    (tmp_path / "a.zip").write_bytes(content.replace(told, struct.pack("<I", 1_000)))
    tracemalloc.start()
    bad = check(tmp_path / "a.zip")["bad_files"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [entry["path"] for entry in bad] == ["bomb.png"] and peak < 3_000_000


# --- torchvision ------------------------------------------------------------------------------------------------------


def write_mnist(root: Path) -> None:
    """Write MNIST files as torchvision stores them: all pixels of image n of a split are n."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())


def test_torchvision_with_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path)
    images = open_images(f"MNIST:{tmp_path}")
    assert len(images.train) == 30 and images.test.tolist() == list(range(30, 50)) and images.ids[30] == "test/000000"
    assert images.classes is not None and len(images.classes) == 10
    assert images.labels is not None and images.labels.tolist() == [
        *(n % 10 for n in range(30)),
        *(n % 10 for n in range(20)),
    ]
    assert np.asarray(images.read(42)).max() == 12
    monkeypatch.setenv("SIMSIAM_DATA", str(tmp_path))
    assert open_images("MNIST").fingerprint == images.fingerprint
    (pixels,) = tmp_path.rglob("train-images-idx3-ubyte")
    content = bytearray(pixels.read_bytes())
    content[-1] ^= 1  # label of the last training image
    pixels.write_bytes(content)
    assert open_images("MNIST").fingerprint != images.fingerprint


def test_torchvision_with_split(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / "country211" / split, *(f"{c}/{i}.jpg" for c in ("AT", "CH") for i in range(3)))
    images = open_images(f"Country211:{tmp_path}")
    assert len(images) == 12 and images.test.tolist() == list(range(6, 12)) and images.classes == ("AT", "CH")
    assert check(images)["bad_files"] == []


def test_files_of_a_torchvision_set_are_known_one_by_one(tmp_path: Path) -> None:
    write(tmp_path, *(f"{kind}/{i:03d}.png" for kind in ("cat", "dog") for i in range(100)))
    data = f"ImageFolder:{tmp_path}"
    before = open_images(data)
    (tmp_path / "cat" / "005.png").write_bytes(b"")
    (tmp_path / "dog" / "200.png").write_bytes(png(7))
    after = open_images(data)
    assert before.keys[5] != after.keys[5] and np.array_equal(np.delete(before.keys, 5), np.delete(after.keys[:200], 5))
    assert [entry["path"] for entry in check(data)["bad_files"]] == ["train/000005"]


def test_a_bad_file_of_a_torchvision_set_is_named_when_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(4)))
    (tmp_path / "cat" / "0.png").write_bytes(b"")
    monkeypatch.setattr("simsiam.data.torchvision_sets._file_keys", lambda *_: None)  # as of a set in one file
    assert [entry["path"] for entry in check(f"ImageFolder:{tmp_path}")["bad_files"]] == ["train/000000"]


def test_imagenets_classes_are_synonyms_and_two_have_one_name(tmp_path: Path) -> None:
    names = {"n1": ("tench", "Tinca tinca"), "n2": ("crane",), "n3": ("crane",)}
    for split in ("train", "val"):
        write(tmp_path / split, *(f"{name}/{i}.png" for name in names for i in range(3)))
    torch.save((names, []), tmp_path / "meta.bin")
    images = open_images(f"ImageNet:{tmp_path}")
    assert images.classes == ("tench, Tinca tinca", "crane", "crane") and images.test.tolist() == list(range(9, 18))
    assert json.loads(json.dumps(check(images)))["labels"] == {"tench, Tinca tinca": 6, "crane": 12}


def test_a_set_by_name_does_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIMSIAM_DATA", raising=False)
    assert absolute("MNIST") == f"MNIST:{tmp_path}/data" and absolute("MNIST:x") == f"MNIST:{tmp_path}/x"
    monkeypatch.setenv("SIMSIAM_DATA", "there")
    assert absolute("MNIST") == f"MNIST:{tmp_path}/there"
    assert absolute("demo") == "demo" and absolute("nothing") == "nothing"


def test_opening_warns_of_nothing(tmp_path: Path) -> None:
    write(tmp_path, "1.png", "2.png", "readme.md", "labels.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path)


# --- what black-box tests found -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_test_images_beside_unlabelled_ones_are_not_trained_on(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        write(tmp_path, *(f"unlabeled/{i}.png" for i in range(8)), *(f"test/{i}.png" for i in range(4)))
    else:
        for name, count in (("unlabeled.tar", 8), ("test.tar", 4)):
            write_tar(tmp_path / name, {f"{name}-{i}.png": png(i) for i in range(count)})
    images = open_images(tmp_path)
    assert len(images) == 12 and images.classes is None
    assert len(held_out(images)) == 4 and all("test" in name for name in held_out(images))


def test_splits_in_camel_case(tmp_path: Path) -> None:
    names = [f"{split}/{kind}/{i}.png" for split in ("trainingSet", "TestImages") for kind in "ab" for i in range(5)]
    images = open_images(write(tmp_path, *names))
    assert images.classes == ("a", "b") and len(held_out(images)) == 10
    trained = open_images(
        write(tmp_path / "more", *(f"trained/{i}.png" for i in range(5)), "tests/1.png", "tests/2.png")
    )
    assert len(trained.test) == 0, "words that only begin like a split's"


def test_thumbnails_and_bins_of_a_server_are_no_images(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "#recycle/b.png", "b/$RECYCLE.BIN/c.png", "b/#1.png")
    assert open_images(tmp_path).ids == ["a.png", "b/#1.png"]


def test_a_pattern_of_folders_is_told_how_to_name_their_files(tmp_path: Path) -> None:
    write(tmp_path, "2023-1/a.png", "2023-2/b.png")
    with pytest.raises(
        UserError, match=r"2023-\* matches folders only. For the files in them: '.*2023-\*/\*\*'"
    ) as told:
        open_images(f"{tmp_path}/2023-*")
    assert len(open_images(str(told.value).rpartition(" ")[2].strip("'"))) == 2


def test_the_working_directory_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "set [v2]", "shards/a.png", "shards/b.png")
    monkeypatch.chdir(folder)
    assert len(open_images("shards/*.png")) == len(open_images(absolute("shards/*.png"))) == 2


def test_a_path_called_demo_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "demo", "a.png", "b.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_images(Path("demo"))) == 2 and absolute(Path("./demo")) == str(tmp_path / "demo")


def test_json_that_belongs_to_no_image_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's annotations are half a gigabyte, and several as Python's objects."""
    files = {
        f"val/{i}.{kind}": png(i) if kind == "png" else b'{"label": 3}' for i in range(2) for kind in ("png", "json")
    }
    write_tar(tmp_path / "a.tar", files | {"annotations/instances.json": b"[1, 2, 3]"})
    parsed, loads = [], json.loads
    monkeypatch.setattr("simsiam.data.archives.json.loads", lambda text: parsed.append(text) or loads(text))
    assert len(open_images(tmp_path / "a.tar")) == 2 and parsed == [b'{"label": 3}'] * 2


def test_of_a_set_that_is_slow_out_of_order_the_first_are_looked_at() -> None:
    images = replace(open_images(None), in_order=True)
    assert images.some(200).tolist() == list(range(200)) and images.some(3, np.array([4, 7, 9, 11])).tolist() == [
        4,
        7,
        9,
    ]
    spread = replace(images, in_order=False).some(200)
    assert len(spread) == 200 and spread[0] == 0 and spread[-1] == len(images) - 1 and (np.diff(spread) > 0).all()
    assert replace(images, in_order=False).some(9, np.array([5, 6])).tolist() == [5, 6]
