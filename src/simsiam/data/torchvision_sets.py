"""torchvision's data sets as image sets, from files already on disk."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simsiam.config import UserError, did_you_mean
from simsiam.data.imageset import ImageSet, encode, numbered, one_line

if TYPE_CHECKING:
    from PIL import Image


def open_torchvision(text: str) -> ImageSet:
    """Opens `Name` or `Name:root`. CIFAR's files are pickles; torchvision checks their MD5 before reading them."""
    name, _, root = text.partition(":")
    if not re.fullmatch(r"[A-Za-z]\w+", name):
        raise UserError(
            f"There is no {text}. Name a folder of images, a Parquet, tar or zip file, or a torchvision data set."
        )
    from torchvision import datasets  # here, because it takes seconds

    known = {
        key: value
        for key, value in vars(datasets).items()
        if inspect.isclass(value)
        and issubclass(value, datasets.VisionDataset)
        and "root" in inspect.signature(value).parameters
    }
    if name not in known:
        by_case = next((key for key in known if key.lower() == name.lower()), None)
        hint = f" Did you mean {by_case!r}?" if by_case else did_you_mean(name, known)
        hint = hint if len(hint) < 60 else " Check the path."  # a list of all 60 would not help
        raise UserError(f"There is no {text}: no such file or folder, and no torchvision data set of that name.{hint}")
    root = os.path.expanduser(root or os.environ.get("SIMSIAM_DATA") or "data")
    train, test = _splits(known[name], name, root)
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
        labels, classes = encode(list(itertools.chain(*raw)), getattr(train, "classes", None))  # type: ignore[arg-type]
    digest = hashlib.sha256(f"{name} {lengths}".encode())
    if labels is not None:
        digest.update(labels.tobytes())
    for i in np.linspace(0, len(ids) - 1, min(64, len(ids))).astype(int).tolist():
        image = read(i)
        digest.update(image.tobytes() if hasattr(image, "tobytes") else repr(image).encode())
    keys = numbered(digest.digest(), len(ids))
    place = f"{name}:{os.path.abspath(root)}"
    return ImageSet(name, place, ids, read, labels, classes, keys, np.arange(lengths[0], len(ids)))


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
            except (RuntimeError, OSError, TypeError) as error:
                reason = one_line(error)
        if part is None and not found:
            raise UserError(
                f"torchvision's {name} is not in {root}, or needs more than a folder ({reason}). "
                f"Put its files there, or name their folder: {name}:FOLDER."
            )
        found.append(part)
    return found[0], found[1]


def _targets(part: Any) -> Sequence[Any] | None:
    for key in ("targets", "labels", "_labels", "y"):
        values = getattr(part, key, None)
        if values is not None and np.ndim(values) == 1:
            return np.asarray(values).tolist()
    samples = getattr(part, "_samples", None) or getattr(part, "samples", None)
    return [sample[1] for sample in samples] if samples and len(samples[0]) == 2 else None
