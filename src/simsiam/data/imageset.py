"""The image set that every source returns: images read lazily, with labels and splits from names and columns."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category")
_SPLITS = {
    **dict.fromkeys(("train", "training", "trainval", "labeled", "labelled"), "train"),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation", "dev", "eval"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsup", "extra", "pred"), "further"),
}
_SPLIT = re.compile(rf"(?:^|[-_. /])({'|'.join(_SPLITS)})(?:(?=[-_. /\d]|$)|(?-i:(?<=[a-z])(?=[A-Z])))", re.IGNORECASE)
_JUNK = re.compile(r"(?:^|/)(?:\.|(?:__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN)(?:/|$))")
"""Hidden files, and folders of macOS, Synology (thumbnails of every photograph) and Windows."""
_OF_MACOS = re.compile(r"(?:^|/)(?:\._|__MACOSX(?:/|$))")
_HELD_OUT = 1000
_ODD = 0x9E3779B97F4A7C15
_ENOUGH = 0.95
"""A folder layout is interpreted as classes or splits if at least this fraction of the images follows it."""


@dataclass(frozen=True)
class ImageSet:
    """N images, read lazily."""

    name: str
    root: str
    """Location: an absolute path, or a name. Does not change when images are added or removed."""
    ids: Sequence[str]
    """Unique and stable: the path relative to the data set, or inside the archive."""
    read: Callable[[int], bytes | Image.Image]
    """Returns image i as its encoded file, or opened by Pillow. Thread-safe; read errors propagate."""
    labels: np.ndarray | None
    """int64 [N], indices into `classes`, -1 if unknown; None without labels or with a single class."""
    classes: tuple[str, ...] | None
    keys: np.ndarray
    """uint64 [N], a unique key for each image: changes with its id, size or modification time, not when other images
    are added or removed."""
    test: np.ndarray
    """int64, indices of the images in the data's own test and validation splits; empty without any."""
    in_order: bool = False
    """Whether reading the images out of order takes many times as long."""

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, most: int, rows: np.ndarray | None = None) -> np.ndarray:
        """At most `most` of the rows, ascending (of all images, if None): int64, spread over the set, or the first ones if
        it is slow out of order."""
        rows = np.arange(len(self)) if rows is None else rows
        if self.in_order:
            return rows[:most]
        return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest; changes when an image is changed, added or removed."""
        return hashlib.sha256(self.keys.astype("<u8").tobytes()).hexdigest()

    @property
    def train(self) -> np.ndarray:
        """int64, indices of the images that are not in `test`."""
        return np.setdiff1d(np.arange(len(self)), self.test)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """The images to train on and those held out for monitoring, int64 each, whether they can be decoded or not.

        The held-out set is the data's own test split or, without one, a tenth of the images, at most 1,000. It is drawn
        by a hash of the ids: as a set grows, hardly any image that an earlier run (`--init`) trained on is held out.
        """
        if len(self.test):
            return self.train, self.test
        order = np.argsort(np.frombuffer(b"".join(map(_hash, self.ids)), np.uint64), kind="stable")
        few = min(len(self) // 10, _HELD_OUT)
        return np.sort(order[few:]), np.sort(order[:few])


class File(NamedTuple):
    """A file as found on disk; `mtime` in nanoseconds."""

    id: str
    path: str
    size: int
    mtime: int


def file_keys(files: Iterable[File]) -> np.ndarray:
    """uint64 [N]: a hash of each file's id, size and modification time."""
    return np.frombuffer(b"".join(_digest(file) for file in files), np.uint64)


def member_keys(files: Iterable[tuple[File, str]]) -> np.ndarray:
    """uint64 [N]: keys of images inside archives, from file and member name; they change with the file."""
    return file_keys(file._replace(id=f"{file.id}\0{name}") for file, name in files)


def row_keys(file: File, count: int) -> np.ndarray:
    """uint64 [count]: keys of images that are rows of a file; they change with the file."""
    return numbered(_digest(file), count)


def numbered(digest: bytes, count: int) -> np.ndarray:
    """uint64 [count], all different: keys for images that change only together, with their common `digest`."""
    start = np.frombuffer(digest[:8], np.uint64)
    return start + np.arange(count, dtype=np.uint64) * np.uint64(_ODD)  # odd, so all are distinct modulo 2^64


def _digest(file: File) -> bytes:
    return _hash(f"{file.id}\0{file.size}\0{file.mtime}")


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def junk(path: str) -> bool:
    """Whether part of the path is hidden or a __MACOSX folder, which macOS adds to archives."""
    return _JUNK.search(path) is not None


def visible(paths: Collection[str], endings: tuple[str, ...]) -> list[str]:
    """The paths of an archive that are not `junk` below the folder that nearly all images have in common:
    `.keras/datasets/...` is not hidden if everything lies there. endings: of images."""
    paths = [path for path in paths if not _OF_MACOS.search(path)]
    depth = _shared(Counter(tuple(path.split("/")[:-1]) for path in paths if path.lower().endswith(endings)))
    return [path for path in paths if not junk("/".join(path.split("/")[depth:]))]


def one_line(error: BaseException) -> str:
    """The text of an error on one line, for a UserError."""
    return " ".join(str(error).split()) or type(error).__name__


# --- labels and splits ----------------------------------------------------------------------------------------------


def layout(paths: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None, np.ndarray]:
    """Labels, classes and test images according to the folders in `paths`: [split/]class/.../image."""
    names = [path.rpartition("/")[0] for path in paths]
    # Millions of images are in few folders, so everything below works per folder.
    parts = {name: tuple(name.split("/")) if name else () for name in names}
    images = Counter(map(parts.__getitem__, names))
    depth = _shared(images)
    kinds = {folder: _kind(folder[depth]) if len(folder) > depth else "" for folder in images}

    def count(*wanted: str) -> int:
        return sum(images[folder] for folder, kind in kinds.items() if kind in wanted)

    both = (count("train") and count("test", "further")) or (count("further") and count("test"))
    split = both and count("train", "test", "further") >= _ENOUGH * len(paths)
    if not split:
        kinds = dict.fromkeys(images, "train")
    start = depth + bool(split)
    training = Counter({folder[start:]: images[folder] for folder, kind in kinds.items() if kind == "train"})
    level = _shared(training)
    classes_of: Counter[str] = Counter()
    for folder, number in training.items():
        if len(folder) > level:
            classes_of[folder[level]] += number
    test = np.flatnonzero([kinds[parts[name]] == "test" for name in names])
    # One image per folder is a way to store images, not a class.
    if len(classes_of) < 2 or classes_of.total() < max(_ENOUGH * training.total(), 2 * len(classes_of)):
        return None, None, test
    classes = tuple(sorted(classes_of))
    index = {label: i for i, label in enumerate(classes)}
    place = start + level
    label = {folder: index.get(folder[place], -1) if len(folder) > place else -1 for folder in images}
    return np.array([label[parts[name]] for name in names], dtype=np.int64), classes, test


def _shared(images: Mapping[tuple[str, ...], int]) -> int:
    """The number of leading folders that nearly all images have in common. images: their number in each folder."""
    left, total = dict(images), sum(images.values())
    while left:
        lowest, highest = min(left), max(left)
        pairs = zip(lowest, highest, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A few images above all others, such as a cover picture, do not count.
        if len(left) == 1 or len(lowest) > shared or sum(left.values()) - left[lowest] < _ENOUGH * total:
            return shared
        del left[lowest]
    return 0


def _kind(name: str) -> str:
    """ "train", "test", "further" (not labelled, to train on) or "": the split that a file's or folder's name gives."""
    found = [_SPLITS[word.lower()] for word in _SPLIT.findall(name)]
    if "further" in found and "test" not in found:
        return "further"
    return next((kind for kind in reversed(found) if kind != "further"), "")


def split_by_name(names: Sequence[str]) -> np.ndarray:
    """bool [N]: which files are test data according to their names; none unless some are training data."""
    kinds = np.array(list(map(_kind, names)), dtype=str)
    return (kinds == "test") & np.isin(kinds, ("train", "further")).any()


def encode(
    values: Sequence[Any], names: Sequence[str] | None = None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Encodes raw labels (ints or strings; None, NaN and negative: unknown) as int64 labels and class names."""
    whole = [_whole(value) for value in values]
    if names and all(number is None or number < len(names) for number in whole):
        labels = np.array([-1 if number is None else number for number in whole], dtype=np.int64)
        return (labels, tuple(names)) if len(np.unique(labels[labels >= 0])) > 1 else (None, None)
    numbers = all(number is not None or _unknown(value) for number, value in zip(whole, values, strict=True))
    keys = whole if numbers else [None if _unknown(value) else str(value) for value in values]
    known: list[Any] = sorted({key for key in keys if key is not None})
    if not 2 <= len(known) <= len(values) / 2:  # about one value per image: names or captions, not classes
        return None, None
    index = {key: i for i, key in enumerate(known)}
    return np.array([-1 if key is None else index[key] for key in keys], dtype=np.int64), tuple(
        str(key) for key in known
    )


def _unknown(value: Any) -> bool:
    number = isinstance(value, int | float)
    return value is None or value in ("", "-1") or (number and not 0 <= value < math.inf)  # NaN too


def _whole(value: Any) -> int | None:
    try:
        return None if _unknown(value) or int(value) != float(value) else int(value)
    except (TypeError, ValueError):
        return None
