"""Where images come from: a folder, Parquet, tar, zip, WebDataset shards or a torchvision set. None is decoded."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import threading
import warnings
import weakref
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simsiam.config import UserError, nearest

if TYPE_CHECKING:
    from PIL import Image

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
_PARQUET = (".parquet", ".pq")
_PACKED_TAR: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
_ARCHIVES = (".tar", *_PACKED_TAR, ".zip")
_NOT_READ = (".heic", ".heif", ".avif", ".jp2", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg", ".dcm")
_TRAIN = {"train", "training"}
_TEST = {"test", "testing", "val", "valid", "validation"}
_SPLIT = re.compile(rf"(?:^|[-_./])({'|'.join(sorted(_TRAIN | _TEST))})(?=[-_./\d]|$)", re.IGNORECASE)
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target", "category")
_ENOUGH = 0.95
"""A folder layout means classes or splits when at least this share of the images follows it."""


@dataclass(frozen=True)
class ImageSet:
    """N images that are not read yet."""

    name: str
    ids: Sequence[str]
    """Unique and stable: the path relative to the data set, or inside the archive."""
    read: Callable[[int], bytes | Image.Image]
    """Image i as its encoded file, or opened. Thread-safe; raises whatever reading raises."""
    labels: np.ndarray | None
    """int64 [N] into `classes`, -1 where unknown; None where there are none, or all are one."""
    classes: tuple[str, ...] | None
    fingerprint: str
    """Hex; changes when ids, sizes or modification times do."""
    test: np.ndarray
    """int64, the images of the data's own test and validation splits; empty where it has none."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def train(self) -> np.ndarray:
        """int64, the images that are not in `test`."""
        return np.setdiff1d(np.arange(len(self)), self.test)


@dataclass(frozen=True)
class _File:
    id: str
    path: str
    size: int
    mtime: int


def open_images(data: str | Path | None = None) -> ImageSet:
    """Finds the images of `data` and their labels, where the data has them; reads no pixels.

    Args:
        data: None or "demo" for the bundled demo set, or one of
            a folder, nested as it may be: class folders give labels, train/ and test/ (or val/) folders the split;
            a folder of Parquet files or archives only, read as those;
            Parquet: Hugging Face's image column, or raw bytes; file names like test-00000-of-00001 give the split;
            .tar, .tar.gz, .zip, shards by glob or braces, `shard-{000..009}.tar` (WebDataset's .cls, .json labels);
            `CIFAR10:/root` or `CIFAR10`: a torchvision set under that root, $SIMSIAM_DATA or ./data. Never downloaded.

    Raises UserError where there are no images to be found.
    """
    text = "demo" if data is None else os.path.expanduser(os.fspath(data))
    path = Path(text)
    if path.is_dir():
        return _from_files(path.resolve().name, _walk(path), str(data))
    if path.is_file():
        return _from_files(path.name.split(".")[0], [_file(path.name, path)], str(data))
    if text == "demo":
        from simsiam.data.demo import demo_images

        return demo_images()
    if re.search(r"[*?\[{]", text):
        return _from_files(*_matching(text), str(data))
    return _from_torchvision(text)


# --- files ----------------------------------------------------------------------------------------------------------


def _file(id: str, path: str | Path) -> _File:
    status = os.stat(path)
    # A name that is not UTF-8 must survive JSON, Parquet and the terminal.
    id = os.fsencode(id).decode("utf-8", "backslashreplace").replace(os.sep, "/")
    return _File(id, os.fspath(path), status.st_size, status.st_mtime_ns)


def _walk(root: Path) -> list[_File]:
    """All files below `root`, sorted by id; hidden ones and __MACOSX left out, links followed, but not in circles."""
    files: list[_File] = []

    def enter(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if _junk(entry.name):
                    continue
                if entry.is_dir():
                    enter(entry.path, f"{prefix}{entry.name}/", (*above, here))
                elif entry.is_file():  # false for a dangling link
                    files.append(_file(prefix + entry.name, entry.path))

    try:
        enter(os.fspath(root), "", ())
    except OSError as error:
        raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from None
    return sorted(files, key=lambda file: file.id)


def _junk(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _matching(pattern: str) -> tuple[str, list[_File]]:
    paths: list[str] = []
    for one in _braces(pattern):
        found = sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else [one]
        paths += [path for path in found if not os.path.isdir(path)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} files of {pattern} are missing, the first is {missing[0]}."
        )
    if not paths:
        raise UserError(f"No file matches {pattern}. Check it, and quote it so that the shell leaves it alone.")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    files = {path: _file(os.path.relpath(path, root), path) for path in paths}
    return os.path.basename(root), list(files.values())


def _braces(pattern: str) -> list[str]:
    """`a{08..10}{x,y}` -> a08x a08y a09x a09y a10x a10y."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        options = [str(n).zfill(width) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        options = match[1].split(",")
    head, tail = pattern[: match.start()], _braces(pattern[match.end() :])
    return [head + option + rest for option in options for rest in tail]


def _from_files(name: str, files: list[_File], data: str) -> ImageSet:
    kinds = (IMAGES, _from_images), (_PARQUET, _from_parquet), (_ARCHIVES, _from_archives)
    for endings, open_kind in kinds:
        chosen = [file for file in files if file.id.lower().endswith(endings)]
        if chosen:
            others = (*itertools.chain.from_iterable(e for e, _ in kinds if e != endings), *_NOT_READ)
            ignored = [file for file in files if file.id.lower().endswith(others)]
            if ignored:
                warnings.warn(
                    f"{data}: {len(ignored)} files are not read beside the {len(chosen)} that are: {_count(ignored)}.",
                    stacklevel=3,
                )
            return open_kind(name, chosen)
    if not files:
        raise UserError(f"{data} is empty. Name a folder that holds images.")
    one = "" if len(files) == 1 else "s"
    raise UserError(
        f"No images in {data}: {len(files)} file{one}, none an image: {_count(files)}. "
        f"Read are {' '.join(ending[1:] for ending in IMAGES)}, and parquet, tar, zip."
    )


def _count(files: list[_File]) -> str:
    endings = Counter(os.path.splitext(file.id)[1].lower() or "(no ending)" for file in files)
    rest = len(files) - sum(count for _, count in endings.most_common(5))
    first = [f"{ending} {count}" for ending, count in endings.most_common(5)]
    return ", ".join([*first, *([f"others {rest}"] if rest else [])])


def _fingerprint(files: Iterable[_File]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.id}\0{file.size}\0{file.mtime}\n".encode())
    return digest.hexdigest()


def _from_images(name: str, files: list[_File]) -> ImageSet:
    def read(i: int) -> bytes:
        with open(files[i].path, "rb") as file:
            return file.read()

    ids = [file.id for file in files]
    labels, classes, test = _layout(ids)
    return ImageSet(name, ids, read, labels, classes, _fingerprint(files), test)


# --- labels and splits ----------------------------------------------------------------------------------------------


def _layout(paths: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None, np.ndarray]:
    """Labels, classes and test images that the folders in `paths` spell out: [split/]class/.../image."""
    folders = [path.split("/")[:-1] for path in paths]
    depth = _shared(folders)
    tops = [parts[depth].lower() if len(parts) > depth else "" for parts in folders]
    is_test = np.array([top in _TEST for top in tops])
    is_train = np.array([top in _TRAIN for top in tops])
    split = is_test.any() and is_train.any() and (is_test | is_train).mean() >= _ENOUGH
    if not split:
        is_test = np.zeros(len(paths), dtype=bool)
    start = depth + bool(split)
    inner = [parts[start:] for parts in folders]
    training = [parts for parts, held_out in zip(inner, is_test, strict=True) if not held_out]
    level = _shared(training)
    counts = Counter(parts[level] for parts in training if len(parts) > level)
    test = np.flatnonzero(is_test)
    # One image a folder is a way to store images, not a class.
    if len(counts) < 2 or counts.total() < max(_ENOUGH * len(training), 2 * len(counts)):
        return None, None, test
    classes = tuple(sorted(counts))
    index = {label: i for i, label in enumerate(classes)}
    labels = [index.get(parts[level], -1) if len(parts) > level else -1 for parts in inner]
    return np.array(labels, dtype=np.int64), classes, test


def _shared(folders: list[list[str]]) -> int:
    """How many leading folders all of them share."""
    low, high = min(folders), max(folders)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _split_by_name(names: Sequence[str]) -> np.ndarray:
    """bool, which of the files are test data by their names; none unless some are training data."""
    found = [match[-1].lower() if (match := _SPLIT.findall(name)) else "" for name in names]
    is_test = np.array([split in _TEST for split in found], dtype=bool)
    return is_test if any(split in _TRAIN for split in found) else np.zeros(len(names), dtype=bool)


def _encode(
    values: Sequence[Any], names: Sequence[str] | None = None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Raw labels (ints or strings; None, NaN and negative: unknown) -> int64 labels and class names."""
    whole = [_whole(value) for value in values]
    if names and all(number is None or number < len(names) for number in whole):
        labels = np.array([-1 if number is None else number for number in whole], dtype=np.int64)
        return (labels, tuple(names)) if len(np.unique(labels[labels >= 0])) > 1 else (None, None)
    numbers = all(number is not None or _unknown(value) for number, value in zip(whole, values, strict=True))
    keys = whole if numbers else [None if _unknown(value) else str(value) for value in values]
    known: list[Any] = sorted({key for key in keys if key is not None})
    if not 2 <= len(known) <= len(values) / 2:  # a value an image is a name or a caption, not a class
        return None, None
    index = {key: i for i, key in enumerate(known)}
    return np.array([-1 if key is None else index[key] for key in keys], dtype=np.int64), tuple(
        str(key) for key in known
    )


def _unknown(value: Any) -> bool:
    return value is None or value in ("", "-1") or bool(value != value) or (isinstance(value, int) and value < 0)


def _whole(value: Any) -> int | None:
    try:
        return None if _unknown(value) or int(value) != float(value) else int(value)
    except (TypeError, ValueError):
        return None


# --- Parquet --------------------------------------------------------------------------------------------------------


def _from_parquet(name: str, files: list[_File]) -> ImageSet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata: list[Any] = []
    starts = [0]  # of every row group, and the end
    raw_labels: list[Any] = []
    paths: list[str] = []
    row_names: list[str] = []
    columns: tuple[str, str | None, bool, list[str] | None] | None = None
    for file in files:
        try:
            with pq.ParquetFile(file.path) as parquet:
                columns = columns or _columns(parquet.schema_arrow, file)
                image, label, has_path, _ = columns
                wanted = [*([label] if label else []), *([f"{image}.path"] if has_path else [])]
                table = parquet.read(columns=wanted) if wanted else None
                metadata.append(parquet.metadata)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"Cannot read {file.path} as Parquet, copy or download it again: {_line(error)}") from None
        rows = metadata[-1].num_rows
        row_names += [f"{file.id}#{row}" for row in range(rows)]
        if table is not None and set(wanted) - {label} and image in table.column_names:
            paths += table.column(image).combine_chunks().flatten()[0].to_pylist() if rows else []
        if table is not None and label:
            if label not in table.column_names:
                raise UserError(
                    f"{file.path} has no column {label!r}, which {files[0].path} has. Name one data set at a time."
                )
            raw_labels += table.column(label).to_pylist()
        group_rows = (metadata[-1].row_group(g).num_rows for g in range(metadata[-1].num_row_groups))
        starts += itertools.accumulate(group_rows, initial=starts.pop())
    assert columns is not None
    if not row_names:
        raise UserError(f"{files[0].path} has no rows. Name a data set that holds images.")
    ids = paths if len(paths) == len(row_names) == len(set(paths)) and all(paths) else row_names
    labels, classes = _encode(raw_labels, columns[3]) if raw_labels else (None, None)
    held_out = np.repeat(_split_by_name([file.id for file in files]), [each.num_rows for each in metadata])
    read = _RowGroups([file.path for file in files], metadata, columns[0], starts)
    return ImageSet(name, ids, read, labels, classes, _fingerprint(files), np.flatnonzero(held_out))


def _columns(schema: Any, file: _File) -> tuple[str, str | None, bool, list[str] | None]:
    """The image column, the label column, whether images have a path, and the class names."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def struct(kind: Any) -> bool:
        return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind.field("bytes").type)

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        features = {}

    def declared(kind: str) -> list[str]:
        return [key for key, value in features.items() if isinstance(value, dict) and value.get("_type") == kind]

    holds_image = [field.name for field in schema if struct(field.type) or binary(field.type)]
    image = next((column for column in [*declared("Image"), "image", *holds_image] if column in holds_image), None)
    if image is None:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"{file.path} has no image column, but {there}. Images are binary, or a struct with `bytes` (Hugging Face)."
        )
    label = next((column for column in [*_LABEL_COLUMNS, *declared("ClassLabel")] if column in schema.names), None)
    kind = schema.field(image).type
    names = features.get(label, {}).get("names") if label in declared("ClassLabel") else None
    return image, label, struct(kind) and kind.get_field_index("path") >= 0, names


class _RowGroups:
    """Row i of Parquet files. Threads share the row groups read last, because a build reads in order."""

    def __init__(self, paths: list[str], metadata: list[Any], column: str, starts: list[int]) -> None:
        self._paths, self._metadata, self._column, self._starts = paths, metadata, column, starts
        self._groups = [(f, g) for f, meta in enumerate(metadata) for g in range(meta.num_row_groups)]
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, i: int) -> bytes:
        group = bisect_right(self._starts, i) - 1
        with self._lock:
            column = self._held.pop(group, None)
            self._held[group] = column = self._load(group) if column is None else column
            while len(self._held) > 2 and (
                len(self._held) > 16 or sum(c.nbytes for c in self._held.values()) > 1 << 28
            ):
                self._held.popitem(last=False)
        return column[i - self._starts[group]].as_py() or b""

    def _load(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        f, g = self._groups[group]
        with pq.ParquetFile(self._paths[f], metadata=self._metadata[f]) as parquet:
            nested = pa.types.is_struct(parquet.schema_arrow.field(self._column).type)
            table = parquet.read_row_group(g, columns=[f"{self._column}.bytes" if nested else self._column])
        return (table.flatten() if nested else table).column(0)


# --- archives -------------------------------------------------------------------------------------------------------


def _from_archives(name: str, files: list[_File]) -> ImageSet:
    ids: list[str] = []
    inner: list[str] = []
    archive: list[int] = []
    readers: list[Callable[[], bytes]] = []
    raw_labels: list[Any] = []
    for a, file in enumerate(files):
        try:
            members = _zip_members(file) if file.id.lower().endswith(".zip") else _tar_members(file)
            side = _side_labels(members)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise UserError(f"Cannot read {file.path}, copy or download it again: {_line(error)}") from None
        for path, reader in members.items():
            if path.lower().endswith(IMAGES):
                ids.append(f"{file.id}/{path}" if len(files) > 1 else path)
                inner.append(path)
                archive.append(a)
                readers.append(reader)
                raw_labels.append(side.get(_key(path)))
    if not ids:
        raise UserError(f"No images in {files[0].path}{f' and {len(files) - 1} more' if len(files) > 1 else ''}.")
    labels, classes, test = _layout(inner)
    if any(label is not None for label in raw_labels):
        labels, classes = _encode(raw_labels)
    held_out = _split_by_name([file.id for file in files])[archive]
    if held_out.any():
        test = np.flatnonzero(held_out)
    return ImageSet(name, ids, lambda i: readers[i](), labels, classes, _fingerprint(files), test)


def _key(path: str) -> str:
    """WebDataset's sample key: the path up to the first dot of its last part."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.split(".")[0]


def _side_labels(members: dict[str, Callable[[], bytes]]) -> dict[str, Any]:
    """Sample key -> label, from WebDataset's .cls or .json members."""
    labels: dict[str, Any] = {}
    for path, reader in members.items():
        if path.endswith(".cls"):
            labels[_key(path)] = reader().decode("utf-8", "replace").strip()
        elif path.endswith(".json"):
            try:
                record = json.loads(reader())
            except ValueError:
                continue
            value = (
                next((record[key] for key in _LABEL_COLUMNS if key in record), None)
                if isinstance(record, dict)
                else record
            )
            if isinstance(value, int | str):
                labels.setdefault(_key(path), value)
    return labels


def _tar_members(file: _File) -> dict[str, Callable[[], bytes]]:
    """Path inside -> reader, by the offsets noted here once."""
    ending = next((ending for ending in _PACKED_TAR if file.id.lower().endswith(ending)), None)
    # A compressed stream has no random access: it is unpacked once.
    source = _Unpacked(file.path, _PACKED_TAR[ending]) if ending else file
    path = source.path

    def reader(offset: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with open(source.path, "rb") as archive:  # `source`, not `path`: it keeps the unpacked copy alive
                archive.seek(offset)
                return archive.read(size)

        return read

    members: dict[str, Callable[[], bytes]] = {}
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            inner = member.name.removeprefix("./")
            if member.isfile() and not _junk(inner):
                members[inner] = reader(member.offset_data, member.size)  # as tar does, the last of a name wins
            tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header
        # tarfile takes a broken header for the end of the archive.
        with open(path, "rb") as archive:
            archive.seek(tar.offset)
            if archive.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"broken header at byte {tar.offset}")
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


def _zip_members(file: _File) -> dict[str, Callable[[], bytes]]:
    path = file.path
    lock = threading.Lock()
    held: list[zipfile.ZipFile] = []

    def reader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            with lock:
                if not held:
                    held.append(zipfile.ZipFile(path))
                return held[0].read(member)

        return read

    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and not _junk(info.filename)]
    if any(info.flag_bits & 1 for info in infos):
        raise UserError(f"{path} is protected by a password: unpack it, and name the folder.")
    return {info.filename: reader(info) for info in infos}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- torchvision ----------------------------------------------------------------------------------------------------


def _from_torchvision(text: str) -> ImageSet:
    """`Name` or `Name:root`. CIFAR's own files are pickles; torchvision checks their MD5 before it reads one."""
    name, _, root = text.partition(":")
    if not re.fullmatch(r"[A-Za-z]\w+", name):
        raise UserError(
            f"There is no {text}. Name a folder of images, a Parquet, tar or zip file, or a torchvision data set."
        )
    from torchvision import datasets  # here: it takes seconds

    known = {
        key: value
        for key, value in vars(datasets).items()
        if inspect.isclass(value)
        and issubclass(value, datasets.VisionDataset)
        and "root" in inspect.signature(value).parameters
    }
    if name not in known:
        by_case = next((key for key in known if key.lower() == name.lower()), None)
        hint = f" Did you mean {by_case!r}?" if by_case else nearest(name, known)
        hint = hint if len(hint) < 60 else " Check the path."  # the list of all 60 helps nobody
        raise UserError(f"There is no {text}: no file or folder, and no torchvision data set of that name.{hint}")
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
        labels, classes = _encode(list(itertools.chain(*raw)), getattr(train, "classes", None))  # type: ignore[arg-type]
    digest = hashlib.sha256(f"{name} {lengths}".encode())
    if labels is not None:
        digest.update(labels.tobytes())
    for i in np.linspace(0, len(ids) - 1, min(64, len(ids))).astype(int).tolist():
        image = read(i)
        digest.update(image.tobytes() if hasattr(image, "tobytes") else repr(image).encode())
    return ImageSet(name, ids, read, labels, classes, digest.hexdigest(), np.arange(lengths[0], len(ids)))


def _splits(kind: Any, name: str, root: str) -> tuple[Any, Any]:
    """The training and test set of a torchvision class; the test set is None where it has none."""
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
                reason = _line(error)
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
