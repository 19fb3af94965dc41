"""Decode once: a data set's images as one memory-mapped uint8 file that every later run opens at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simsiam.config import UserError
from simsiam.data.decode import DecodeError, decode, in_order
from simsiam.data.imageset import ImageSet

FORMAT = 2
"""Part of every cache's key: raise it when the files or what `decode` returns change."""

_HELD_OUT = 1000
_ABANDONED_SECONDS = 3600
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}


@dataclass(frozen=True)
class Cache:
    """The images of a set that could be decoded, rows 0..N-1 in the set's order. Made by `build_cache`."""

    directory: Path
    name: str
    short_side: int | None
    fingerprint: str
    ids: Sequence[str]
    labels: np.ndarray | None
    """int64 [N], -1 where unknown."""
    classes: tuple[str, ...] | None
    test: np.ndarray
    """int64, the rows of the set's own test split; empty where it has none."""
    bad: list[tuple[str, str]]
    """(id, reason) of every image left out."""
    heights: np.ndarray
    widths: np.ndarray
    """int32 [N], pixels."""
    offsets: np.ndarray
    """int64 [N], where each image [3, H, W] starts in `images.bin`."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def train(self) -> np.ndarray:
        """int64, the rows that are not in `test`."""
        return np.setdiff1d(np.arange(len(self)), self.test)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows to train on and those held out for monitoring, int64 each: a function of the data alone.

        Held out is the data's own test split; where it has none, a tenth of the images, at most 1,000.
        """
        if len(self.test):
            return self.train, self.test
        order = np.random.default_rng(0).permutation(len(self))
        few = min(len(self) // 10, _HELD_OUT)
        return np.sort(order[few:]), np.sort(order[:few])

    @cached_property
    def uniform(self) -> tuple[int, int] | None:
        """(H, W) where all images have one size, else None."""
        same = (self.heights == self.heights[0]).all() and (self.widths == self.widths[0]).all()
        return (int(self.heights[0]), int(self.widths[0])) if same else None

    @property
    def memory_bytes(self) -> int:
        """Bytes of all pixels, unpadded."""
        return int((self.heights.astype(np.int64) * self.widths).sum()) * 3

    @cached_property
    def _pixels(self) -> np.ndarray:
        flat = np.asarray(np.memmap(self.directory / "images.bin", dtype=np.uint8, mode="r"))
        return flat.reshape(len(self), 3, *self.uniform) if self.uniform else flat

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Copies the images of `rows` (int64 [B], B > 0) out of the memory map. Thread-safe.

        Returns uint8 [B, 3, H, W], zero-padded at the bottom and right to the batch's largest height and width, and
        int32 [B, 2] with each image's own (height, width).
        """
        rows = np.asarray(rows, dtype=np.int64)
        heights, widths = self.heights[rows], self.widths[rows]
        sizes = torch.from_numpy(np.stack([heights, widths], axis=1))
        if self.uniform:
            return torch.from_numpy(np.take(self._pixels, rows, axis=0)), sizes  # take: the fastest of five ways
        images = np.zeros((len(rows), 3, heights.max(), widths.max()), dtype=np.uint8)
        starts = self.offsets[rows].tolist()
        for image, start, h, w in zip(images, starts, heights.tolist(), widths.tolist(), strict=True):
            image[:, :h, :w] = self._pixels[start : start + 3 * h * w].reshape(3, h, w)
        return torch.from_numpy(images), sizes


def build_cache(
    images: ImageSet,
    short_side: int | None,
    directory: str | Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Cache:
    """Opens the cache of `images` at `short_side` (pixels; see `decode`), after building it where there is none yet.

    It lives in a folder of its own under `directory`, or $SIMSIAM_CACHE, or ~/.cache/simsiam, found again by the set's
    fingerprint. A build happens in a temporary folder that is renamed at its end, so a killed build leaves no cache,
    and of two builds at once one wins. A bad image is left out and listed in `Cache.bad`.

    Args:
        workers: decoding threads; None: the cores there are, at most 16.
        progress: called as progress(done, total, bad) after every image of a build.

    Raises UserError where no image can be decoded, the folder cannot be written or the disk is full.
    """
    base = Path(directory or os.environ.get("SIMSIAM_CACHE") or "~/.cache/simsiam").expanduser()
    key = hashlib.sha256(f"{FORMAT} {short_side} {images.fingerprint}".encode()).hexdigest()[:16]
    final = base / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', images.name)[:40]}-{short_side or 'full'}-{key}"
    cache = _open(final, images, short_side)
    if cache is not None:
        return cache
    _remove_abandoned(base)
    building = base / f"{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    written = [0, 0]  # images, bytes
    try:
        building.mkdir(parents=True)
        _write(building, images, short_side, workers, progress, written)
        _publish(building, final, images, short_side)
    except OSError as error:
        if error.errno in _FULL:
            needed = written[1] / max(written[0], 1) * len(images)
            raise UserError(
                f"The disk of {base} is full: the cache of {images.name} needs about {needed / 1e9:.1f} GB. "
                "Set SIMSIAM_CACHE to a folder with room, or choose a smaller --size."
            ) from error
        if error.errno in _REFUSED:
            raise UserError(
                f"Cannot write the image cache to {base} ({error.strerror}). "
                "Set SIMSIAM_CACHE to a folder you can write to."
            ) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    cache = _open(final, images, short_side)
    assert cache is not None, final
    return cache


def _write(
    folder: Path,
    images: ImageSet,
    short_side: int | None,
    workers: int | None,
    progress: Callable[[int, int, int], None] | None,
    written: list[int],
) -> None:
    def load(i: int) -> np.ndarray | str:
        try:
            pixels = decode(images.read(i), short_side)
        except DecodeError as error:
            return str(error)
        except Exception as error:  # the file vanished, is not ours to read, has a bad checksum, ...
            return f"cannot be read: {error}"
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    total, rows, sizes = len(images), [], []
    bad: list[tuple[str, str]] = []
    # Full-size photographs are tens of MB each, so fewer are held at once.
    results = in_order(load, total, workers, chunk=16 if short_side else 1)
    with contextlib.closing(results), open(folder / "images.bin", "wb") as file:
        for i, pixels in enumerate(results):
            if isinstance(pixels, str):
                bad.append((images.ids[i], pixels))
            else:
                file.write(pixels.data)
                rows.append(i)
                sizes.append(pixels.shape[1:])
                written[0] += 1
                written[1] += pixels.nbytes
            if progress is not None:
                progress(i + 1, total, len(bad))
        file.flush()
        os.fsync(file.fileno())
    if not rows:
        first = f" ({bad[0][0]}: {bad[0][1]})" if bad else ""
        raise UserError(
            f"None of the {total} images of {images.name} can be decoded{first}. `simsiam check` lists them."
        )
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int32))
    meta = {
        "format": FORMAT,
        "name": images.name,
        "fingerprint": images.fingerprint,
        "short_side": short_side,
        "images": len(rows),
        "bytes": written[1],
        "bad": bad,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _publish(building: Path, final: Path, images: ImageSet, short_side: int | None) -> None:
    try:
        os.rename(building, final)
    except OSError:
        if _open(final, images, short_side) is not None:  # another process was first
            return
        broken = building.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, broken)
        os.rename(building, final)
        shutil.rmtree(broken, ignore_errors=True)


def _open(folder: Path, images: ImageSet, short_side: int | None) -> Cache | None:
    """The finished cache in `folder`; None where there is none, or not a whole one."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows, sizes = np.load(folder / "rows.npy"), np.load(folder / "sizes.npy")
        whole = (
            (meta["format"], meta["fingerprint"], meta["short_side"]) == (FORMAT, images.fingerprint, short_side)
            and len(rows) == len(sizes) == meta["images"] > 0
            and rows[-1] < len(images)
            and (folder / "images.bin").stat().st_size == meta["bytes"]
        )
    except (OSError, ValueError, KeyError):
        return None
    if not whole:
        return None
    lengths = 3 * sizes.astype(np.int64).prod(axis=1)
    return Cache(
        directory=folder,
        name=images.name,
        short_side=short_side,
        fingerprint=images.fingerprint,
        ids=[images.ids[i] for i in rows.tolist()],
        labels=None if images.labels is None else images.labels[rows],
        classes=images.classes,
        test=np.flatnonzero(np.isin(rows, images.test)),
        bad=[(path, reason) for path, reason in meta["bad"]],
        heights=np.ascontiguousarray(sizes[:, 0]),
        widths=np.ascontiguousarray(sizes[:, 1]),
        offsets=np.cumsum(lengths) - lengths,
    )


def _remove_abandoned(base: Path) -> None:
    """Deletes what killed builds left: temporary folders that nobody has written to for an hour."""
    for folder in base.glob("*.tmp"):
        with contextlib.suppress(OSError):
            newest = max(entry.stat().st_mtime for entry in [folder, *folder.iterdir()])
            if time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
