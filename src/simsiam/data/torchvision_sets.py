"""torchvision's data sets as image sets, from files already on disk."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simsiam.config import UserError, did_you_mean
from simsiam.data.imageset import File, ImageSet, encode, file_keys, numbered, one_line

if TYPE_CHECKING:
    from PIL import Image

_NAME = re.compile(r"[A-Za-z]\w+")


def placed(text: str) -> str | None:
    """`Name` or `Name:root` as `Name:/absolute/root`; None if torchvision has no set of that name."""
    name, _, root = text.partition(":")
    if not _NAME.fullmatch(name) or name not in kinds():
        return None
    return f"{name}:{os.path.abspath(os.path.expanduser(root or os.environ.get('SIMSIAM_DATA') or 'data'))}"


@functools.cache
def kinds() -> dict[str, Any]:
    from torchvision import datasets  # here, because it takes seconds

    return {
        name: kind
        for name, kind in vars(datasets).items()
        if inspect.isclass(kind)
        and issubclass(kind, datasets.VisionDataset)
        and kind is not datasets.VisionDataset
        and "root" in inspect.signature(kind).parameters
    }


def open_torchvision(text: str) -> ImageSet:
    """Opens `Name` or `Name:root`. CIFAR's files are pickles; torchvision checks their MD5 before reading them."""
    name = text.partition(":")[0]
    if not _NAME.fullmatch(name):
        raise UserError(
            f"There is no {text}. Name a folder of images, a Parquet, tar or zip file, or a torchvision data set."
        )
    known, place = kinds(), placed(text)
    if place is None:
        by_case = next((key for key in known if key.lower() == name.lower()), None)
        hint = f" Did you mean {by_case!r}?" if by_case else did_you_mean(name, known)
        hint = hint if len(hint) < 60 else " Check the path."  # a list of all 60 would not help
        raise UserError(f"There is no {text}: no such file or folder, and no torchvision data set of that name.{hint}")
    train, test = _splits(known[name], name, place.partition(":")[2])
    parts = [("train", train)] + ([("test", test)] if test is not None else [])
    lengths = [len(part) for _, part in parts]
    ids = [f"{split}/{i:06d}" for (split, _), length in zip(parts, lengths, strict=True) for i in range(length)]

    def read(i: int) -> Image.Image:
        part, at = (train, i) if i < lengths[0] else (test, i - lengths[0])
        return part[at][0]

    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    raw = [_targets(part) for _, part in parts]
    if all(targets is not None and len(targets) == length for targets, length in zip(raw, lengths, strict=True)):
        labels, classes = encode(list(itertools.chain(*raw)), _classes(train))  # type: ignore[arg-type]
    keys = _file_keys(parts, place.partition(":")[2])
    if keys is None:
        digest = hashlib.sha256(f"{name} {lengths}".encode())
        if labels is not None:
            digest.update(labels.tobytes())
        for i in np.linspace(0, len(ids) - 1, min(64, len(ids))).astype(int).tolist():
            try:
                image = read(i)
                digest.update(image.tobytes() if hasattr(image, "tobytes") else repr(image).encode())
            except Exception as error:  # a bad file, which is named when it is decoded
                digest.update(type(error).__name__.encode())
        keys = numbered(digest.digest(), len(ids))
    return ImageSet(name, place, ids, read, labels, classes, keys, np.arange(lengths[0], len(ids)))


def _file_keys(parts: Sequence[tuple[str, Any]], root: str) -> np.ndarray | None:
    """The keys of a set whose images are files of their own, such as ImageFolder; None for others."""
    files = []
    for split, part in parts:
        names = ("samples", "_samples", "_image_files", "_images", "images")
        listed = next((values for name in names if isinstance(values := getattr(part, name, None), list)), [])
        paths = [each[0] if isinstance(each, tuple) else each for each in listed]
        if len(paths) != len(part) or not all(isinstance(path, str | os.PathLike) for path in paths):
            return None
        for path in paths:
            status = os.stat(path) if os.path.exists(path) else None
            size, changed = (0, 0) if status is None else (status.st_size, status.st_mtime_ns)
            files.append(File(f"{split}/{os.path.relpath(path, root)}", os.fspath(path), size, changed))
    keys = file_keys(files)
    return keys if len(np.unique(keys)) == len(keys) else None


def _splits(kind: Any, name: str, root: str) -> tuple[Any, Any]:
    """The training and test set of a torchvision class; the test set is None if it has none."""
    parameters = inspect.signature(kind).parameters
    if name == "EMNIST":
        choices: list[list[dict[str, Any]]] = [[{"split": "balanced", "train": flag}] for flag in (True, False)]
    elif "train" in parameters:
        choices = [[{"train": True}], [{"train": False}]]
    elif "background" in parameters:
        choices = [[{"background": True}], [{"background": False}]]
    else:
        option = next((key for key in ("split", "image_set") if key in parameters), None)
        names = ("train+unlabeled", "trainval", "train", "train-standard"), ("test", "val", "valid")
        choices = [[{option: split} for split in side] for side in names] if option else [[{}], []]
    found: list[Any] = []
    for side in choices:
        part, reason = None, ""
        for options in side:
            try:
                part = kind(root, **options)
                break
            except ValueError:  # no such split
                reason = reason or "it has no training split"
            except (RuntimeError, OSError, TypeError, ImportError) as error:
                reason = one_line(error)
        if part is None and not found:
            raise UserError(
                f"torchvision's {name} is not in {root}, or needs more than a folder ({reason}). "
                f"Put its files there, or name their folder: {name}:FOLDER."
            )
        found.append(part)
    return found[0], found[1]


def _classes(part: Any) -> list[str] | None:
    """The names of the classes; ImageNet's are tuples of synonyms."""
    names = getattr(part, "classes", None)
    return names and [name if isinstance(name, str) else ", ".join(name) for name in names]


def _targets(part: Any) -> Sequence[Any] | None:
    for key in ("targets", "labels", "_labels", "y"):
        values = getattr(part, key, None)
        if values is not None and np.ndim(values) == 1:
            return np.asarray(values).tolist()
    samples = getattr(part, "_samples", None) or getattr(part, "samples", None)
    return [sample[1] for sample in samples] if samples and len(samples[0]) == 2 else None
