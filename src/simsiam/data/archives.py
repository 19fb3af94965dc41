"""Images in tar files, zip files and WebDataset shards, read in place."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import posixpath
import shutil
import tarfile
import tempfile
import threading
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from simsiam.config import UserError
from simsiam.data import decode
from simsiam.data.imageset import (
    LABEL_COLUMNS,
    File,
    ImageSet,
    encode,
    layout,
    member_keys,
    one_line,
    split_by_name,
    visible,
)

_PACKED_TAR: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
ENDINGS = (".tar", *_PACKED_TAR, ".zip")
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    OSError,
    NotImplementedError,
    UnicodeError,
)
"""Raised while an archive is opened. NotImplementedError: a method of compression that Python lacks."""


def open_archives(name: str, root: str, files: list[File]) -> ImageSet:
    """The images of all archives as one image set. Raises UserError if one is damaged or there are no images."""
    ids: list[str] = []
    inner: list[str] = []
    archive: list[int] = []
    readers: list[Callable[[], bytes]] = []
    raw_labels: list[Any] = []
    left_out: list[str] = []
    single = not os.path.isdir(root)  # in a folder, ids stay the same if a second archive is added
    for a, file in enumerate(files):
        try:
            found = _zip_members(file) if file.id.lower().endswith(".zip") else _tar_members(file)
            members = {path: found[path] for path in visible(found, (*decode.ENDINGS, *decode.NOT_READ))}
            side = _side_labels(members)
        except _DAMAGED as error:
            raise UserError(f"Cannot read {file.path} ({one_line(error)}): copy or download it again.") from None
        for path, reader in members.items():
            if path.lower().endswith(decode.ENDINGS):
                ids.append(path if single else f"{file.id}/{path}")
                inner.append(path)
                archive.append(a)
                readers.append(reader)
                raw_labels.append(side.get(_key(path)))
            elif path.lower().endswith(decode.NOT_READ):
                left_out.append(path)
    place = f"{files[0].path}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
    told = f": {decode.count_kinds(left_out)} left out.{decode.hint(left_out)}" if left_out else "."
    if not ids:
        raise UserError(f"No images in {place}{told}")
    if left_out:
        warnings.warn(f"{place}{told}", stacklevel=4)
    labels, classes, test = layout(inner)
    given = encode(raw_labels)
    if given[0] is not None:
        labels, classes = given
    held_out = split_by_name([file.id for file in files])[archive]
    if held_out.any():
        test = np.flatnonzero(held_out)
    keys = member_keys((files[a], path) for a, path in zip(archive, inner, strict=True))
    return ImageSet(name, root, ids, lambda i: readers[i](), labels, classes, keys, test)


def _key(path: str) -> str:
    """WebDataset's sample key: the path up to the first dot of the file name."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.split(".")[0]


def _side_labels(members: dict[str, Callable[[], bytes]]) -> dict[str, Any]:
    """Maps sample keys to labels, from WebDataset's .cls or .json members."""
    labels: dict[str, Any] = {}
    samples = {_key(path) for path in members if path.lower().endswith(decode.ENDINGS)}
    for path, reader in members.items():
        if _key(path) not in samples:  # e.g. COCO's annotations, gigabytes once parsed
            continue
        try:
            if path.endswith(".cls"):
                labels[_key(path)] = reader().decode("utf-8", "replace").strip()
            elif path.endswith(".json"):
                record = json.loads(reader())
                value = (
                    next((record[key] for key in LABEL_COLUMNS if key in record), None)
                    if isinstance(record, dict)
                    else record
                )
                if isinstance(value, int | str):
                    labels.setdefault(_key(path), value)
        except ValueError:  # not JSON, or too large
            continue
    return labels


def _tar_members(file: File) -> dict[str, Callable[[], bytes]]:
    """Maps the path of each member to its reader, which seeks to the offset found here."""
    ending = next((ending for ending in _PACKED_TAR if file.id.lower().endswith(ending)), None)
    # A compressed stream has no random access, so it is unpacked once.
    source = _Unpacked(file.path, _PACKED_TAR[ending]) if ending else file
    path = source.path

    def reader(offset: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            decode.check_length(size)
            with open(source.path, "rb") as archive:  # `source`, not `path`: it keeps the unpacked copy alive
                archive.seek(offset)
                return archive.read(size)

        return read

    members: dict[str, Callable[[], bytes]] = {}
    links: dict[str, str] = {}
    with tarfile.open(path, "r:", errors="backslashreplace") as tar:
        while (member := tar.next()) is not None:
            inner = member.name.removeprefix("./")
            if member.isfile():
                members[inner] = reader(member.offset_data, member.size)  # as with tar, the last member of a name wins
            elif member.islnk() or member.issym():
                folder = posixpath.dirname(inner) if member.issym() else ""
                links[inner] = posixpath.normpath(posixpath.join(folder, member.linkname))
            tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
        # tarfile mistakes a broken header for the end of the archive.
        with open(path, "rb") as archive:
            archive.seek(tar.offset)
            if archive.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"broken header at byte {tar.offset}")
    for name, target in links.items():
        for _ in range(8):  # links to links; bounded, because they may form a cycle
            target = links.get(target, target)
        if target in members:
            members.setdefault(name, members[target])
    return members


class _Unpacked:
    """A temporary unpacked copy of a compressed file, deleted with this object."""

    def __init__(self, path: str, open_packed: Callable[..., Any]) -> None:
        handle, self.path = tempfile.mkstemp(prefix="simsiam-", suffix=".tar")
        weakref.finalize(self, os.unlink, self.path)
        try:
            with os.fdopen(handle, "wb") as out, open_packed(path, "rb") as packed:
                shutil.copyfileobj(packed, out, 1 << 20)
        except OSError as error:
            if error.errno is None:  # a broken stream, not a full disk
                raise
            raise UserError(
                f"Cannot unpack {path} to {self.path}: {error.strerror}. Unpack it yourself, or set TMPDIR."
            ) from None


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's path. Info-ZIP writes UTF-8 without the flag that says so, which zipfile reads as code page 437, and
    some Windows programs separate by \\, against the format (APPNOTE 4.4.17)."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _zip_members(file: File) -> dict[str, Callable[[], bytes]]:
    path = file.path
    lock = threading.Lock()
    held: list[zipfile.ZipFile] = []

    def reader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            decode.check_length(member.file_size)  # 1 MB may unpack to 1 GB
            with lock:
                if not held:
                    held.append(zipfile.ZipFile(path))
                with held[0].open(member) as opened:
                    return opened.read(member.file_size)  # without a length, it could unpack more than declared

        return read

    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            info.filename = _zip_name(info).removeprefix("./")
        infos = [info for info in archive.infolist() if not info.is_dir()]
    if any(info.flag_bits & 1 for info in infos):
        raise UserError(f"{path} is password-protected: unpack it and name the folder instead.")
    return {info.filename: reader(info) for info in infos}
