"""Decode once: a data set's images in one memory-mapped uint8 file, filled on demand."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from simsiam.config import UserError, counted, show_bytes
from simsiam.data.decode import (
    MAX_ASPECT,
    VERSION,
    DecodeError,
    decode,
    default_workers,
    in_order,
    open_image,
    reduced_size,
)
from simsiam.data.imageset import ImageSet
from simsiam.data.sources import exists
from simsiam.kernels import Packed
from simsiam.runs import cache_folder, write_json

FORMAT = 8
"""In the name and the meta.json of every cache: raise it when the files or the output of `decode` change."""

PIXELS, RECORDS, REASONS, META = "images.bin", "records.bin", "bad.jsonl", "meta.json"
_RECORD = np.dtype([("key", "<u8"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
_BAD = -1
_TOGETHER, _TOGETHER_BYTES = 1024, 16 << 20
"""Most decoded images, and bytes of them, that are written at once."""
_SETS = 100
"""Most versions of a set that a cache remembers, as fingerprints."""
_HEADERS = 64
"""Most images whose headers are read to estimate the disk space that the missing ones need."""
_FIRST, _SMALL = 4, 3000
"""Images decoded first to sample the file size, and the mean size in bytes below which one thread is faster than
several, which would contend for Python's lock."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
_REFUSED |= {errno.ENOLCK, errno.EOPNOTSUPP}  # by a file system without locks
_MORE_ROOM = "Set SIMSIAM_CACHE to a folder with more space, or choose a smaller --size."

Progress = Callable[[int, int, int], None]
Loaded = list[tuple[int, np.ndarray | Exception]]
"""Rows, each with its pixels, uint8 [H, W, 3], or the error that prevented decoding."""


class Cache:
    """The images of a set, rows 0..N-1 in its order, each decoded on first use. Created by `open_cache`.

    The folder is valid at any time: pixels reach the disk before the record that points to them, so a killed process
    loses only what it was about to write. The process itself can read them earlier: a thread waits for the disk while
    the next images are decoded. Threads and processes may fill a cache together, even if the set has grown in between:
    records identify images by key, and those of images that are not in this set are ignored.
    """

    def __init__(self, images: ImageSet, short_side: int | None, directory: Path, workers: int | None) -> None:
        self.images, self.short_side, self.directory = images, short_side, directory
        self.workers = workers or default_workers()
        self.name, self.ids, self.fingerprint = images.name, images.ids, images.fingerprint
        self.labels, self.classes = images.labels, images.classes
        self.heights, self.widths = np.zeros(len(images), np.int32), np.zeros(len(images), np.int32)
        """int32 [N], pixels; 0: not decoded yet, -1: cannot be decoded."""
        self._offsets = np.zeros(len(images), np.int64)
        self._sorted = np.argsort(images.keys)
        self._keys = images.keys[self._sorted]
        assert (self._keys[1:] != self._keys[:-1]).all(), "two images have one key"
        self._reasons: dict[int, str] = {}
        """Why an image cannot be decoded, by its key."""
        self._end = 0
        """Offset of the next pixels, in bytes."""
        self._read_bytes = {RECORDS: 0, REASONS: 0}
        self._mapped = np.zeros(0, np.uint8)
        self._decoded, self._decode_seconds = 0, 0.0
        self._files, self._file_bytes = 0, 0
        """Files read and their bytes (pixels, if opened by Pillow); approximate, because threads may add at once."""
        self._threads = threading.RLock()
        self._processes = FileLock(directory / "lock")
        self._told: Future[None] | None = None
        """Done when the images appended last, and their records, are on disk."""
        self._read()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(id, reason) of every image found so far that cannot be decoded, in the set's order."""
        rows = np.flatnonzero(self.heights == _BAD).tolist()
        keys = self.images.keys[rows].tolist()
        return [
            (self.ids[row], self._reasons.get(key, "cannot be decoded")) for row, key in zip(rows, keys, strict=True)
        ]

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows to train on and those held out (`ImageSet.split`), int64 each, without images known to be bad."""
        train, held_out = self.images.split()
        return train[self.heights[train] != _BAD], held_out[self.heights[held_out] != _BAD]

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """The subset of the rows, int64 [B], that has not been tried yet."""
        return rows[self.heights[rows] == 0]

    def decoded(self, rows: np.ndarray) -> np.ndarray:
        """The subset of the rows, int64 [B], that has been decoded."""
        return rows[self.heights[rows] > 0]

    def labelled(self, rows: np.ndarray) -> np.ndarray:
        """The subset of the rows, int64 [B], whose label is known; all of them if none is."""
        known = rows[:0] if self.labels is None else rows[self.labels[rows] >= 0]
        return known if len(known) else rows

    def uniform(self, rows: np.ndarray) -> tuple[int, int] | None:
        """(H, W) if none of the rows is missing and all good ones have the same size, else None."""
        there = self.decoded(rows)
        if not len(there) or len(self.missing(rows)):
            return None
        h, w = int(self.heights[there[0]]), int(self.widths[there[0]])
        return (h, w) if (self.heights[there] == h).all() and (self.widths[there] == w).all() else None

    def seconds_left(self, rows: np.ndarray) -> float:
        """Estimated seconds to decode the missing rows, from the speed so far; 0 if none has been decoded yet."""
        return len(self.missing(rows)) * self._decode_seconds / max(self._decoded, 1)

    def usable(self, rows: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """bool [B]: which of the rows, int64 [B], can be decoded. Decodes the missing ones now, with `workers` threads.

        progress: called as progress(done, total, bad) after every image that is decoded.

        Raises UserError if the folder cannot be written or the disk is full; before the first image is decoded, also if
        the images still missing from the set clearly do not fit on the disk.
        """
        missing = self.missing(rows)
        if len(missing):
            with _explained(self.directory.parent, self):
                if not self._decoded:
                    self._check_room()
                self._fill(np.unique(missing), progress)
        able: np.ndarray = self.heights[rows] > 0
        return able

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The pixels of the rows, int64 [B], B > 0, none of them bad, copied from the memory map. Thread-safe.

        Returns uint8 [B, 3, H, W] in channels_last, zero-padded at the bottom and right to the batch's largest height
        and width, and int32 [B, 2] with each image's own (height, width).
        """
        packed, sizes = self.packed(rows)
        return packed.padded(), sizes

    def packed(self, rows: np.ndarray) -> tuple[Packed, Tensor]:
        """Like `batch` without copying, for views drawn straight from the memory map."""
        rows = np.asarray(rows, dtype=np.int64)
        able = self.usable(rows)
        assert able.all(), "a bad image has no pixels: filter the rows with usable() first"
        sizes = np.stack([self.heights[rows], self.widths[rows]], axis=1)
        return Packed(self._map(), self._offsets[rows], sizes), torch.from_numpy(sizes)

    def expect(self, rows: np.ndarray) -> None:
        """Asks the operating system to prefetch the pixels of those rows, int64 [B], that are decoded."""
        if not hasattr(os, "posix_fadvise"):
            return
        # It is advice: whatever goes wrong, the memory map still holds the pixels.
        with contextlib.suppress(OSError), open(self.directory / PIXELS, "rb") as file:
            for row in self.decoded(rows).tolist():
                size = 3 * int(self.heights[row]) * int(self.widths[row])
                os.posix_fadvise(file.fileno(), int(self._offsets[row]), size, os.POSIX_FADV_WILLNEED)

    # --- the files ---

    def _check_room(self) -> None:
        """Raises UserError if the images still missing from the set need more space than the disk has free."""
        if self.short_side is None:  # image sizes are unbounded, and no command caches full-size images
            return
        missing, disk = self.missing(np.arange(len(self))), shutil.disk_usage(self.directory)
        most = 3 * MAX_ASPECT * self.short_side**2
        if len(missing) * most <= disk.free or not disk.total:  # some network file systems report neither
            return
        some = self.images.some(_HEADERS, missing).tolist()
        needed = len(missing) * float(np.mean([self._expected(row, self.short_side) for row in some]))
        if needed > disk.free:
            raise UserError(
                f"The cache of {self.name} needs about {show_bytes(needed)} in {self.directory.parent}, "
                f"where {show_bytes(disk.free)} are free. {_MORE_ROOM}"
            )

    def _expected(self, row: int, short_side: int) -> int:
        """Bytes that an image's pixels will take, from its header; 0 if that cannot be read."""
        try:
            width, height = open_image(self.images.read(row)).size
        except Exception:  # as in _load: the image will be bad and take no space
            return 0
        return 3 * math.prod(reduced_size(height, width, short_side))

    def _fill(self, rows: np.ndarray, progress: Progress | None) -> None:
        """Decodes the rows, which are in ascending order."""
        began, bad, size = time.perf_counter(), 0, 0
        waiting: Loaded = []
        with contextlib.closing(self._loaded(rows)) as results:
            for done, (row, pixels) in enumerate(zip(rows.tolist(), results, strict=True), 1):
                waiting.append((row, pixels))
                if isinstance(pixels, Exception):
                    bad += 1
                else:
                    size += pixels.nbytes
                if len(waiting) == _TOGETHER or size >= _TOGETHER_BYTES:
                    self._append(waiting)
                    waiting, size = [], 0
                if progress is not None:
                    progress(done, len(rows), bad)
        if waiting:
            self._append(waiting)
        if (self.heights != 0).all():
            self.flush()
        self._decoded += len(rows)
        self._decode_seconds += time.perf_counter() - began

    def _loaded(self, rows: np.ndarray) -> Generator[np.ndarray | Exception, None, None]:
        """The result of `_load` for each row, in order."""
        first = rows[: 0 if self._files else _FIRST]
        yield from map(self._load, first.tolist())
        for start in range(len(first), len(rows), _TOGETHER):
            yield from self._loaded_together(rows[start : start + _TOGETHER].tolist())

    def _loaded_together(self, rows: list[int]) -> Generator[np.ndarray | Exception, None, None]:
        """Loads with `workers` threads, or with one if the files so far are small."""
        workers = 1 if self._file_bytes < _SMALL * self._files else self.workers
        # Full-size photographs are tens of MB each, so fewer are held at once.
        chunk = max(1, min(16, -(-len(rows) // (4 * workers)))) if self.short_side else 1
        return in_order(lambda i: self._load(rows[i]), len(rows), workers, chunk)

    def _load(self, row: int) -> np.ndarray | Exception:
        """The pixels, uint8 [H, W, 3], or the error."""
        try:
            content = self.images.read(row)
            size = len(content) if isinstance(content, bytes) else content.width * content.height
            self._files, self._file_bytes = self._files + 1, self._file_bytes + size
            return np.ascontiguousarray(decode(content, self.short_side))
        except Exception as error:  # also: the file vanished, is not readable, has a bad checksum, ...
            return error

    def flush(self) -> None:
        """Waits until everything decoded is on disk. Raises OSError if it could not be written."""
        with self._threads:
            told, self._told = self._told, None
            if told is not None:
                told.result()

    def _append(self, loaded: Loaded) -> None:
        """Writes the pixels and marks the rows as decoded; a thread syncs the disk and then writes the records."""
        with self._threads:
            self.flush()
            taken: Future[None] = Future()
            disk = ThreadPoolExecutor(1, thread_name_prefix="simsiam-cache")  # new: a fork has no threads
            self._told = disk.submit(self._store, loaded, taken)
            disk.shutdown(wait=False)
            taken.result()

    def _store(self, loaded: Loaded, taken: Future[None]) -> None:
        try:
            with self._processes:
                self._read()
                with open(self.directory / PIXELS, "r+b") as file:
                    records, reasons = self._write(file, loaded)
                    taken.set_result(None)
                    os.fsync(file.fileno())
                if reasons:
                    _write_from(self.directory / REASONS, self._read_bytes[REASONS], "".join(reasons).encode())
                _write_from(self.directory / RECORDS, self._read_bytes[RECORDS], records.tobytes())
        except BaseException as error:
            if taken.done():
                raise  # surfaces in flush()
            taken.set_exception(error)

    def _write(self, file: BinaryIO, loaded: Loaded) -> tuple[np.ndarray, list[str]]:
        """Appends the pixels. Returns their records and the lines of reasons, both still to be written."""
        records, reasons, end = [], {}, self._end
        file.seek(end)
        for row, pixels in loaded:
            if self.heights[row]:  # another thread or process was first
                continue
            key = int(self.images.keys[row])
            if isinstance(pixels, DecodeError):
                records.append((key, 0, _BAD, _BAD))
                reasons[key] = str(pixels)
            elif isinstance(pixels, Exception):  # a disk or network error: the next run tries again
                self._reasons[key], self.heights[row] = f"cannot be read: {pixels}", _BAD
            else:
                records.append((key, end, *pixels.shape[:2]))
                end += file.write(pixels.data)
        file.truncate()
        file.flush()
        written = np.array(records, _RECORD)
        self._end = end
        self._reasons |= reasons
        self._take(written)
        return written, [json.dumps({"key": k, "reason": why, "by": VERSION}) + "\n" for k, why in reasons.items()]

    def _read(self) -> None:
        """Reads what this process or another has recorded since the last call.

        Stops at the first record that is torn or points to pixels that are not on disk.
        """
        lines = self._unread(REASONS)
        lines = lines[: lines.rfind(b"\n") + 1]
        content = self._unread(RECORDS)
        records = np.frombuffer(content, _RECORD, len(content) // _RECORD.itemsize)
        good = records["height"] > 0
        ends = records["offset"] + 3 * records["height"].astype(np.int64) * records["width"]
        with open(self.directory / PIXELS, "rb") as file:  # opened, because NFS may answer stat() from its memory
            on_disk = os.fstat(file.fileno()).st_size
        sound = (records["height"] == _BAD) | (good & (records["offset"] >= 0) & (ends <= on_disk))
        records = records[: len(records) if sound.all() else int(sound.argmin())]
        good, ends = good[: len(records)], ends[: len(records)]
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: only the reasons are lost
            found = [line for line in map(json.loads, lines.splitlines()) if line["by"] == VERSION]
            self._reasons |= {line["key"]: line["reason"] for line in found}
        self._read_bytes[REASONS] += len(lines)
        self._read_bytes[RECORDS] += records.nbytes
        self._end = max(self._end, int(ends[good].max(initial=0)))
        if not good.all():  # what another version of Pillow, or one without a plug-in, called bad is retried
            records = records[good | np.isin(records["key"], np.array(list(self._reasons), np.uint64))]
        self._take(records)

    def _take(self, records: np.ndarray) -> None:
        """Applies the records of images that are in this set."""
        order, at = np.argsort(records["key"]), np.empty(len(records), np.int64)
        at[order] = np.searchsorted(self._keys, records["key"][order])  # four times as fast as unsorted
        at = np.minimum(at, len(self) - 1)
        own = self._keys[at] == records["key"]
        rows, records = self._sorted[at[own]], records[own]
        self._offsets[rows], self.widths[rows] = records["offset"], records["width"]
        self.heights[rows] = records["height"]  # last: from here on other threads see the row as decoded

    def _unread(self, name: str) -> bytes:
        with open(self.directory / name, "rb") as file:
            file.seek(self._read_bytes[name])
            return file.read()

    def _map(self) -> np.ndarray:
        with self._threads:
            if len(self._mapped) < self._end:
                self._mapped = np.asarray(np.memmap(self.directory / PIXELS, dtype=np.uint8, mode="r"))
            return self._mapped


def open_cache(
    images: ImageSet, short_side: int | None, directory: str | Path | None = None, workers: int | None = None
) -> Cache:
    """Opens or creates the cache of `images` at `short_side` (pixels; see `decode`), with what earlier runs decoded.

    It has its own folder under `directory`, $SIMSIAM_CACHE or ~/.cache/simsiam. It is found again by the location of
    the images, even if some were added, removed or changed since; if the set was moved, by its fingerprint.

    Args:
        workers: decoding threads; None: the available cores, at most 16.

    Raises UserError if the folder cannot be written.
    """
    base = Path(directory).expanduser() if directory else cache_folder()
    with _explained(base):
        base.mkdir(parents=True, exist_ok=True)
        return Cache(images, short_side, _folder(base, images, short_side), workers)


def known_cache(images: ImageSet, short_side: int | None) -> Cache | None:
    """Like `open_cache`, but writes nothing: None if there is no cache yet or it cannot be read."""
    with contextlib.suppress(OSError):
        folder = _known(cache_folder(), images, short_side)
        return None if folder is None else Cache(images, short_side, folder, None)
    return None


def build_cache(
    images: ImageSet,
    short_side: int | None,
    directory: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Opens the cache and decodes every image; those that cannot be decoded are listed in `Cache.bad`.

    Raises UserError if no image can be decoded, the folder cannot be written or the disk is full.
    """
    cache = open_cache(images, short_side, directory, workers)
    if not cache.usable(np.arange(len(cache)), progress).any():
        first = "".join(f" ({path}: {reason})" for path, reason in cache.bad[:1])
        raise UserError(
            f"None of the {counted(len(cache), 'image')} of {images.name} can be decoded{first}. `simsiam check` lists them."
        )
    return cache


def _folder(base: Path, images: ImageSet, short_side: int | None) -> Path:
    """The cache folder of these images under `base`, created if needed; it remembers them from now on."""
    known, kind = _known(base, images, short_side), _kind(short_side)
    if known is not None:
        return _noted(known, images, short_side)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", images.name)[:40] + kind

    def free(folder: Path) -> bool:
        """Whether the folder is not in use by a set that was once here and has moved."""
        meta = _meta(folder, short_side)
        return meta is None or meta["root"] == images.root

    keys = (hashlib.sha256(os.fsencode(f"{images.root}\0{number}")).hexdigest() for number in itertools.count())
    folder = next(filter(free, (base / (name + key[:16]) for key in keys)))
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if _meta(folder, short_side) is None:  # another process may have been first
            (folder / META).unlink(missing_ok=True)
            for file in (RECORDS, REASONS, PIXELS):
                (folder / file).write_bytes(b"")
            about = {"format": FORMAT, "short_side": short_side, "root": images.root, "sets": [images.fingerprint]}
            write_json(folder / META, about)
    return folder


def _known(base: Path, images: ImageSet, short_side: int | None) -> Path | None:
    """The existing cache folder of these images under `base`, from here or before they were moved; None without one."""
    moved = None
    for folder in sorted(base.glob(f"*{_kind(short_side)}*")):
        meta = _meta(folder, short_side)
        if meta is None:
            continue
        if meta["root"] == images.root:
            return folder
        # Only if nothing is left at the old location: for a copy, equal file times and sizes prove too little.
        left = exists(meta["root"])
        if images.fingerprint in meta["sets"] and not left:
            moved = folder
    return moved


def _kind(short_side: int | None) -> str:
    return f"-{short_side or 'full'}-v{FORMAT}-"


def _meta(folder: Path, short_side: int | None) -> dict[str, Any] | None:
    """The folder's meta.json; None if the folder is not a complete cache of this size."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        there = all((folder / name).exists() for name in (PIXELS, REASONS, RECORDS))
        known = isinstance(meta["root"], str) and isinstance(meta["sets"], list)
        same = (meta["format"], meta["short_side"]) == (FORMAT, short_side)
        return meta if there and known and same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _noted(folder: Path, images: ImageSet, short_side: int | None) -> Path:
    """The folder, after recording this set in it, if writable, so that it is found again when the images move."""
    with contextlib.suppress(OSError, NotImplementedError, UserError), FileLock(folder / "lock"):
        meta = _meta(folder, short_side)
        if meta is not None and (meta["root"] != images.root or images.fingerprint not in meta["sets"]):
            sets = [*meta["sets"], images.fingerprint]
            write_json(folder / META, meta | {"root": images.root, "sets": sets[-_SETS:]})
    return folder


def _write_from(path: Path, start: int, content: bytes) -> None:
    """Overwrites the file from byte `start` on, truncates it there and syncs it to disk."""
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _explained(base: Path, cache: Cache | None = None) -> Iterator[None]:
    """Turns errors of an unwritable folder or a full disk into a UserError."""
    try:
        yield
    except NotImplementedError:
        raise UserError(f"The file system of {base} has no locks: set SIMSIAM_CACHE to another folder.") from None
    except OSError as error:
        if error.errno in _FULL and cache is not None:
            there = cache.decoded(np.arange(len(cache)))
            size = 3 * int((cache.heights[there].astype(np.int64) * cache.widths[there]).sum())
            needed = f"about {show_bytes(size / len(there) * len(cache))}" if len(there) else "more space"
            raise UserError(
                f"The disk of {base} is full: the cache of {cache.name} needs {needed}. {_MORE_ROOM}"
            ) from error
        if error.errno in _FULL | _REFUSED:
            raise UserError(
                f"Cannot write the image cache to {base} ({error.strerror}). "
                "Set SIMSIAM_CACHE to a folder you can write to."
            ) from error
        raise
