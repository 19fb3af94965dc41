"""Find images in a folder, Parquet, tar, zip, WebDataset shards or a torchvision set, without decoding them."""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
import shlex
import warnings
from pathlib import Path

from simsiam.config import UserError, counted
from simsiam.data import archives, decode, parquet
from simsiam.data.demo import demo_images
from simsiam.data.imageset import File, ImageSet, file_keys, junk, layout
from simsiam.data.torchvision_sets import open_torchvision, placed
from simsiam.runs import METRICS, RECIPE

_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_BRANDS = {b"ftypavif": ".avif", b"ftypheic": ".heic", b"ftypheix": ".heic", b"ftypmif1": ".heic"}
_MAGIC = re.compile(r"[*?\[{]")


def open_images(data: str | Path | None = None) -> ImageSet:
    """Finds the images of `data` and their labels, if it has any, without decoding the set.

    Args:
        data: None or "demo" for the bundled demo set ("./demo" for a folder of that name), or one of
            a folder of any depth: class folders give labels, train/ and test/ (or val/, train2017/, test_images/)
            folders the split, unlabeled/ beside them is trained on; if no file has a known extension, the files without
            one that begin like an image;
            a folder of Parquet files or archives only, read as those;
            Parquet: Hugging Face's image column, or raw bytes; file names like test-00000-of-00001 give the split;
            .tar, .tar.gz, .zip, shards by glob or braces, `shard-{000..009}.tar` (WebDataset's .cls, .json labels);
            `CIFAR10:/root` or `CIFAR10`: a torchvision set under that root, $SIMSIAM_DATA or ./data. Never downloaded.

    Raises UserError if no images are found.
    """
    text = "demo" if data is None else os.path.expanduser(os.fspath(data))
    path = Path(text)
    if not text.strip():
        raise UserError("The name of the data is empty. Name a folder that holds images.")
    if data in (None, "demo"):  # precedes a folder of that name, or no recipe could refer to the set
        if path.exists():
            warnings.warn("demo is the bundled set; write ./demo for the folder of that name.", stacklevel=2)
        return demo_images()
    if os.path.isfile(path / RECIPE) and os.path.isfile(path / METRICS):  # False if not accessible
        raise UserError(
            f"{data} is a run, not images. To start from its weights: simsiam train DATA --init {shlex.quote(str(data))}."
        )
    if os.path.isdir(text):
        return _from_files(path.resolve().name, str(path.resolve()), _walk(path), str(data))
    if os.path.isfile(text):
        return _from_files(path.name.split(".")[0], str(path.resolve()), [_file(path.name, path)], str(data))
    if _MAGIC.search(text):
        return _from_files(*_matching(text), str(data))
    return open_torchvision(text)


def exists(data: str) -> bool:
    """Whether there still is what `data`, as in `absolute`, names; of a torchvision set, its folder."""
    root = re.fullmatch(r"\w+:(.+)", data)
    there = data == "demo" or os.path.exists(data) or (root is not None and os.path.exists(root[1]))
    return there or any(map(_found, _braces(data)))


def absolute(data: str | Path) -> str:
    """`data` in a form that does not depend on the working directory."""
    text = os.path.expanduser(os.fspath(data))
    if data == "demo":  # a Path is the folder of that name
        return text
    if os.path.exists(text):
        return os.path.abspath(text)
    if _MAGIC.search(text):  # the working directory is no pattern
        return os.path.abspath(os.path.join(glob.escape(os.getcwd()), text))
    return placed(text) or text  # the latter: there is nothing of this name


# --- files ----------------------------------------------------------------------------------------------------------


def _file(id: str, path: str | Path) -> File:
    status = os.stat(path)
    if not id.isascii():  # a name that is not UTF-8 must survive JSON, Parquet and the terminal
        id = os.fsencode(id).decode("utf-8", "backslashreplace")
    id = id.replace(os.sep, "/")
    return File(id, os.fspath(path), status.st_size, status.st_mtime_ns)


def _walk(root: Path) -> list[File]:
    """All files below `root`, sorted by id, without hidden ones and __MACOSX. Links are followed, except to a file or
    folder that is already included, or to one that contains `root`: its images would be in the set twice, in training
    and held out, and a link would be taken for a copy of its file.

    Warns about what cannot be read; raises UserError if that is `root` itself.
    """
    files: list[File] = []
    linked: list[File] = []
    unread: list[str] = []
    seen = {_identity(folder) for folder in root.resolve().parents}

    def enter(folder: str, prefix: str) -> None:
        here = _identity(folder)
        if here in seen:
            return
        seen.add(here)
        links = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if junk(entry.name):
                    continue
                try:
                    if entry.is_dir() and entry.is_symlink():
                        links.append(entry)
                    elif entry.is_dir():
                        enter(entry.path, f"{prefix}{entry.name}/")
                    elif entry.is_file():
                        (linked if entry.is_symlink() else files).append(_file(prefix + entry.name, entry.path))
                    elif entry.is_symlink():  # as git-annex leaves if the content was not fetched
                        unread.append(f"{prefix}{entry.name} (broken link)")
                except OSError as error:
                    unread.append(f"{prefix}{entry.name} ({error.strerror})")
        pending.extend((entry.path, f"{prefix}{entry.name}/") for entry in links)

    pending: list[tuple[str, str]] = []
    try:
        enter(os.fspath(root), "")
    except OSError as error:
        raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from None
    while pending:  # links last, so that a folder inside `root` goes by its real name
        path, prefix = pending.pop()
        try:
            enter(path, prefix)
        except OSError as error:
            unread.append(f"{prefix[:-1]} ({error.strerror})")
    if unread:
        more = f" and {len(unread) - 3:,} more" if len(unread) > 3 else ""
        warnings.warn(f"{root}: cannot read {', '.join(unread[:3])}{more}: left out.", stacklevel=3)
    return sorted(files + _further_links(linked, files, root), key=lambda file: file.id)


def _further_links(linked: list[File], files: list[File], root: Path) -> list[File]:
    """The links without those to one of the files, which are warned about. Those that give a file its extension, as in
    Hugging Face's cache, are kept."""
    endings = {_ending(link.id) for link in linked}
    if not endings or endings.isdisjoint(_ending(file.id) for file in files):  # without a million lookups of targets
        return linked
    folder = functools.cache(os.path.realpath)
    real = {os.path.join(folder(os.path.dirname(file.path)), os.path.basename(file.path)) for file in files}

    def again(link: File) -> bool:
        target = os.path.realpath(link.path)
        return target in real and _ending(target) == _ending(link.id)

    kept = [link for link in linked if not again(link)]
    if len(kept) < len(linked):
        told = counted(len(linked) - len(kept), "link")
        warnings.warn(f"{root}: {told} to files that are in this folder anyway: left out.", stacklevel=4)
    return kept


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _matching(pattern: str) -> tuple[str, str, list[File]]:
    matching = [path for one in _braces(pattern) for path in (_found(one) if glob.has_magic(one) else [one])]
    paths = [path for path in matching if not os.path.isdir(path)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} files of {pattern} are missing; the first is {missing[0]}."
        )
    if matching and not paths:
        raise UserError(f"{pattern} matches folders only. For the files in them: '{pattern.rstrip('/')}/**'")
    if not paths:
        told = " A [ that belongs to a name is written [[]." if "[" in pattern else ""
        raise UserError(
            f"No file matches {pattern}. Check it, and quote it so that the shell does not expand it.{told}"
        )
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    files = {file.id: file for file in (_file(os.path.relpath(path, root), path) for path in paths)}
    return os.path.basename(root), os.path.realpath(root), list(files.values())


def _found(pattern: str) -> list[str]:
    """What matches a pattern, sorted. As in a shell, ** follows no links: glob would follow them in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    place, rest = Path(*parts[:fixed]), Path(*parts[fixed:], *(["*"] if parts[-1] == "**" else []))
    found = place.glob(str(rest))
    return sorted(str(path) for path in found if not junk(path.relative_to(place).as_posix()))


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


def _from_files(name: str, root: str, files: list[File], data: str) -> ImageSet:
    kinds = (
        (decode.ENDINGS, _from_images),
        (parquet.ENDINGS, parquet.open_parquet),
        (archives.ENDINGS, archives.open_archives),
    )
    for endings, open_kind in kinds:
        chosen = [file for file in files if file.id.lower().endswith(endings)]
        if chosen:
            others = tuple({*itertools.chain.from_iterable(e for e, _ in kinds), *decode.NOT_READ}.difference(endings))
            ignored = [file.id for file in files if file.id.lower().endswith(others)]
            ignored += [file.id for file in _unnamed(files, chosen)]
            if ignored:
                used = f"{data}: {counted(len(chosen), 'file')} used."
                warnings.warn(
                    f"{used} Left out, being of other kinds: {decode.count_kinds(ignored)}.{decode.hint(ignored)}",
                    stacklevel=3,
                )
            return open_kind(name, root, chosen)
    # Last: next to files with extensions, these may be the same ones under other names (Hugging Face's blobs).
    chosen = [file for file in files if _begins_like_an_image(file)]
    if chosen:
        return _from_images(name, root, chosen)
    if not files:
        raise UserError(f"{data} is empty. Name a folder that holds images.")
    names = [file.id for file in files]
    raise UserError(
        f"No images in {data}: {counted(len(files), 'file')}, none an image: {decode.count_kinds(names)}. "
        f"Supported: {' '.join(ending[1:] for ending in decode.ENDINGS)}, and parquet, tar, zip.{decode.hint(names)}"
    )


def _unnamed(files: list[File], chosen: list[File]) -> list[File]:
    """The images without an extension, except those that are in `chosen` under another name (Hugging Face's blobs)."""
    unnamed = [file for file in files if _begins_like_an_image(file)]
    linked = {os.path.realpath(file.path) for file in chosen} if unnamed else set()
    return [file for file in unnamed if os.path.realpath(file.path) not in linked]


def _begins_like_an_image(file: File) -> bool:
    """Whether a file without an extension, as in caches and backups, begins like an image."""
    if _ending(file.id) or not file.size:
        return False
    try:
        with open(file.path, "rb") as opened:
            first = opened.read(12)
    except OSError:
        return False
    webp = first[:4] == b"RIFF" and first[8:] == b"WEBP"
    return first.startswith(_FIRST_BYTES) or webp or _BRANDS.get(first[4:]) in decode.ENDINGS


def _from_images(name: str, root: str, files: list[File]) -> ImageSet:
    def read(i: int) -> bytes:
        decode.check_length(files[i].size)
        with open(files[i].path, "rb") as file:
            return file.read()

    ids = [file.id for file in files]
    labels, classes, test = layout(ids)
    return ImageSet(name, root, ids, read, labels, classes, file_keys(files), test)
