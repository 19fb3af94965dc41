"""A folder of embeddings: vectors and items in plain files, with a way back to their images."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simsiam.config import UserError, as_path, counted, fill
from simsiam.console import Listener
from simsiam.data.sources import absolute, exists, open_images
from simsiam.features import Preprocessing, embed_batches
from simsiam.runs import LOCK, atomic, claim, left_by_a_kill, make_writable, read_json, write_json

if TYPE_CHECKING:
    from simsiam.data.cache import Cache
    from simsiam.embed import ImageEncoder

VECTORS, ITEMS, META = "vectors.npy", "items.parquet", "meta.json"
CLUSTERS = "clusters.parquet"
"""Written by `simsiam clusters`."""


def embed_to(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Embeds a data set into a folder: `vectors.npy` [N,D] float32, `items.parquet`, `meta.json`.

    A folder already filled by this encoder is updated: images whose pixels are embedded already keep their vectors.

    Returns {"vectors", "dim", "new", "bad_files"}: rows, their length, the number computed now, and unreadable files.
    Raises UserError if `out` holds embeddings of another encoder or of other data, or something else, or if another
    process is writing there.
    """
    from simsiam.data.cache import build_cache
    from simsiam.embed import ImageEncoder

    listener = listener or Listener()
    encoder = ImageEncoder(os.fspath(run), device).open()
    out, named = as_path(out), absolute(data)
    _known(out, encoder.meta_, named)
    images = open_images(data)
    make_writable(out)  # or fail now, not after hours of embedding
    lock = claim(out, "embedding")
    try:
        known, before = _known(out, encoder.meta_, named)  # again: another process may have written meanwhile
        cache = build_cache(images, encoder.preprocessing_.short_side, workers=workers, progress=listener.decoding)
        rows = cache.decoded(np.arange(len(cache)))
        hashes = digests(cache, rows, listener.checking)
        row_before = np.array([known.get(each, -1) for each in hashes], np.int64)
        new, old = np.flatnonzero(row_before < 0), np.flatnonzero(row_before >= 0)
        vectors = np.empty((len(rows), encoder.dim), np.float32)
        vectors[old] = before[row_before[old]]
        done, network = 0, (encoder.encoder_, encoder.preprocessing_)
        for found in embed_batches(*network, cache, rows[new], encoder.compute_, listener.embedding):
            vectors[new[done : done + len(found)]] = found.numpy()
            done += len(found)
        write_embedding(out, vectors, cache, rows, origin(run, encoder.meta_, data, cache), hashes)
    except (UserError, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            if [*out.iterdir()] == [out / LOCK]:
                (out / LOCK).unlink()
                out.rmdir()
        raise
    finally:
        lock.release()
        listener.close()
    if (out / CLUSTERS).exists() and (
        known.keys() != set(hashes) or _outdated(out / CLUSTERS, {cache.ids[row] for row in rows.tolist()})
    ):
        listener.say(f"{out / CLUSTERS} still has the images of before: run `simsiam clusters` again.")
    bad = [{"path": path, "reason": reason} for path, reason in cache.bad]
    return {"vectors": len(vectors), "dim": encoder.dim, "new": len(new), "bad_files": bad}


def _outdated(clusters: Path, ids: set[str]) -> bool:
    """Whether the clusters are of other images than these."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return set(pq.read_table(clusters, columns=["id"])["id"].to_pylist()) != ids
    except (OSError, pa.ArrowException):
        return True  # damaged


def origin(run: str | Path, encoder: dict[str, Any], data: str | Path, cache: Cache) -> dict[str, Any]:
    """The fields of `meta.json` on the encoder and data of the vectors. encoder: the contents of `encoder.json`."""
    return {
        "format": 1,
        "run": os.path.abspath(as_path(run)),
        "encoder": encoder["sha256"],
        "preprocessing": encoder["preprocessing"],
        "dim": encoder["dim"],
        "data": absolute(data),
        "fingerprint": cache.fingerprint,
    }


def write_embedding(
    out: Path,
    vectors: NDArray[np.float32],
    cache: Cache,
    rows: NDArray[np.int64],
    meta: dict[str, Any],
    hashes: Sequence[str],
) -> None:
    """Writes an embedding's three files. `items.parquet` has a row per vector: id, label, class, pixel hash, key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = np.full(len(rows), -1) if cache.labels is None else cache.labels[rows]
    names = cache.classes or ()
    columns = {
        "id": pa.array([cache.ids[row] for row in rows], pa.string()),
        "label": pa.array(labels, pa.int64(), mask=labels < 0),
        "class": pa.array([names[label] if label >= 0 else None for label in labels.tolist()], pa.string()),
        "pixels": pa.array(hashes, pa.string()),
        "key": pa.array(cache.images.keys[rows], pa.uint64()),
    }
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / ITEMS) as items:
        pq.write_table(pa.table(columns), items)
        with atomic(out / VECTORS) as temporary:
            with open(temporary, "wb") as file:
                np.save(file, vectors)
            # meta.json is deleted before the other two are replaced and written last: without it, they are not trusted.
            # It is deleted only once both are written, so that a full disk leaves the folder as it was.
            (out / META).unlink(missing_ok=True)
    write_json(out / META, {**meta, "classes": list(names) or None, "vectors": len(vectors)})
    for left in _unfinished(out):
        left.unlink(missing_ok=True)


@dataclass(frozen=True, repr=False)
class Embeddings:
    """A folder written by `embed_to`."""

    folder: Path
    vectors: NDArray[np.float32]
    """[N,D], memory-mapped."""
    items: dict[str, list[Any]]
    """The requested columns, N values each."""
    meta: dict[str, Any]
    keys: NDArray[np.uint64]
    """[N], the keys of the images (`ImageSet.keys`); 0 if the file does not have them."""
    written: tuple[int, ...]
    """Identifies this version of the folder."""

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"Embeddings({str(self.folder)!r}: {' x '.join(map(str, self.vectors.shape))})"

    @property
    def ids(self) -> list[str]:
        return self.items["id"]

    def replaced(self) -> bool:
        """Whether the folder has been rewritten since; False while a write is in progress."""
        return _written(self.folder) not in (None, self.written)

    def encoder(self, device: str = "auto") -> ImageEncoder:
        """The encoder that made the vectors. Raises UserError if its run is gone or its encoder has changed."""
        from simsiam.embed import ImageEncoder  # brings scikit-learn, which training does not need

        run = Path(self.meta["run"])
        if not os.path.exists(run):  # Path's own raises if the folder above may not be entered
            raise UserError(
                f"The run that made {self.folder} is gone from {run}: put it back, or name its new place: "
                f"simsiam embed NEW_RUN {shlex.quote(str(self.meta.get('data', 'DATA')))} -o {shlex.quote(str(self.folder))}"
            )
        encoder = ImageEncoder(os.fspath(run), device).open()
        if not _made_by(encoder.meta_, self.meta):
            raise UserError(
                f"{run} has other weights or preprocessing than the encoder that made {self.folder}: "
                "run `simsiam embed` again."
            )
        return encoder

    def images(self) -> tuple[Cache, NDArray[np.int64]]:
        """The images of the vectors, at the size given to the encoder, and the row there of each vector: int64 [N].

        Others may have been added since. Raises UserError if one of these is gone or has changed.
        """
        from simsiam.data.cache import open_cache

        source = open_images(self.meta["data"])
        there = {key: row for row, key in enumerate(source.keys.tolist())}
        rows = np.array([there.get(key, -1) for key in self.keys.tolist()], np.int64)
        changed = int((rows < 0).sum())
        if changed:
            raise UserError(
                f"{changed:,} of the {counted(len(self), 'image')} in {self.folder} have changed or are gone from "
                f"{self.meta['data']} since: run `simsiam embed` again."
            )
        prepare = fill(Preprocessing, self.meta["preprocessing"], "preprocessing")
        return open_cache(source, prepare.short_side), rows


def read_embeddings(folder: str | Path, columns: Sequence[str] = ("id",)) -> Embeddings:
    """Reads embeddings. Raises UserError if the folder holds none, is incomplete, or its files do not match."""
    import pyarrow.parquet as pq

    folder = as_path(folder)
    written = _written(folder)
    if written is None:
        half = (
            " Its writing was interrupted: run the same `simsiam embed` again." if (folder / VECTORS).exists() else ""
        )
        raise UserError(f"{folder} holds no embeddings.{half or ' Make them: simsiam embed RUN DATA -o DIR.'}")
    meta = read_json(folder / META)
    try:
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
        table = pq.ParquetFile(folder / ITEMS).read([*columns, "key"])  # ignores missing columns
        items = {name: table[name].to_pylist() for name in columns}
    except (OSError, EOFError, ValueError, KeyError) as error:  # EOFError: of an empty file
        told = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"Cannot read the embeddings in {folder} ({told}): run `simsiam embed` again.") from None
    if not len(vectors) == len(table) == meta.get("vectors") or vectors.shape[1:] != (meta.get("dim"),):
        raise UserError(f"The files of {folder} do not belong together: run `simsiam embed` again, or copy all three.")
    if _written(folder) != written:  # with as many vectors as before, the check above would pass
        raise UserError(f"{folder} was rewritten while it was being read: run this again when `simsiam embed` is done.")
    keys = table["key"].to_numpy() if "key" in table.column_names else np.zeros(len(table), np.uint64)
    return Embeddings(folder, vectors, items, meta, keys, written)


def _written(folder: Path) -> tuple[int, ...] | None:
    """Changes with every write of the folder; None if it has no embeddings or a write is in progress."""
    try:
        found = (folder / META).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _made_by(encoder: dict[str, Any], meta: dict[str, Any]) -> bool:
    """Whether vectors, given by their `meta.json`, have the weights and preprocessing of an encoder (`encoder.json`)."""
    return (encoder["sha256"], encoder["preprocessing"]) == (meta.get("encoder"), meta.get("preprocessing"))


def _known(out: Path, encoder: dict[str, Any], data: str) -> tuple[dict[str, int], NDArray[np.float32]]:
    """The vectors in `out` that this encoder (given by its `encoder.json`) made before, and their rows by pixel hash.

    Raises UserError if it holds something else: vectors of another encoder, or of other data that still exists.
    """
    none: tuple[dict[str, int], NDArray[np.float32]] = {}, np.zeros((0, encoder["dim"]), np.float32)
    if not out.exists() or (out.is_dir() and {*out.iterdir()} <= _unfinished(out) | {out / LOCK}):
        return none
    if not (out / META).exists() and not (out / VECTORS).exists():
        raise UserError(f"{out} holds something other than embeddings: choose another -o.")
    if not (out / META).exists():  # a killed write
        return none
    try:
        meta = read_json(out / META)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}: delete {out}, or choose another -o.") from None
    if not _made_by(encoder, meta):
        raise UserError(f"{out} holds embeddings of another encoder: choose another -o, or delete it.")
    theirs = str(meta.get("data"))
    if theirs != data and exists(theirs):  # otherwise it was moved
        raise UserError(f"{out} holds embeddings of {theirs}: choose another -o, or delete it.")
    try:
        stored = read_embeddings(out, ["pixels"])
    except UserError:  # damaged: everything is embedded again
        return none
    return {pixels: row for row, pixels in enumerate(stored.items["pixels"])}, stored.vectors


def _unfinished(out: Path) -> set[Path]:
    """Temporary files that a killed write of embeddings left in the folder."""
    return {path for name in (VECTORS, ITEMS, META) for path in left_by_a_kill(out, name)}


def digests(
    cache: Cache, rows: NDArray[np.int64], progress: Callable[[int, int, int], None] | None = None
) -> list[str]:
    """A hash of each image's decoded pixels and their shape. For a large set this reads hundreds of gigabytes."""
    packed, sizes = cache.packed(rows)
    found = []
    for start, (h, w) in zip(packed.starts.tolist(), sizes.tolist(), strict=True):
        pixels: Any = packed.pixels[start : start + 3 * h * w]
        told = hashlib.sha256(pixels)  # in hardware, twice as fast as blake2b
        told.update(f"{h}x{w}".encode())
        found.append(told.hexdigest()[:32])
        if progress is not None and (len(found) % 256 == 0 or len(found) == len(rows)):
            progress(len(found), len(rows), 0)
    return found
