"""Find the most similar images in stored embeddings: exact up to a million vectors, with an index beyond."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from simsiam.compute import draw, pick_device, set_threads
from simsiam.config import UserError, as_path, coerce
from simsiam.console import Listener
from simsiam.embeddings import Embeddings, read_embeddings
from simsiam.neighbours import top_k, unit_rows
from simsiam.runs import atomic, keep, read_kept, write_json

EXACT = 1_000_000
"""Most vectors for an exact search: a second at 512 dimensions on 2 cores. Beyond, an index is built and kept."""
ALL_PAIRS = 100_000
"""Most images for an exact comparison of all pairs: a minute at 512 dimensions on 2 cores."""
RECALL = 0.95
"""The fraction of the true 10 nearest that the index must find, measured on stored vectors."""

INDEX, INDEX_META = "index.usearch", "index.json"
_FORMAT = 2
"""Version of the index: since 2, vectors have length 1, because float16 cannot represent every scale."""
_PROBES = 256
_QUERIES = 4096
_WIDEST = 4096

Vectors = NDArray[np.float32] | torch.Tensor


def search(
    folder: str | Path,
    queries: Any,
    k: int = 10,
    *,
    index: bool | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Returns the k stored images most similar to each query, by cosine similarity.

    Args:
        folder: embeddings, as `simsiam embed` writes them.
        queries: one or a list of image files, embedded by the run that made the embeddings; ids of stored images, which
            are left out of their own neighbours; or images as `ImageEncoder.embed` takes them, which are called "image
            0" and so on, by their place in the list. A file takes precedence over an id of the same name.
        index: True to use an index, False to compare all vectors; None: an index beyond a million vectors.
        listener: receives a message before each slow step.
    Returns [{"query", "neighbours": [{"id", "score"}, ...]}, ...], best first; the score is 1 for the same direction.
    Raises UserError for a query that is none of these, or if the run is gone or its encoder has changed.
    """
    set_threads()
    k = coerce(k, int, "k")
    if k < 1:
        raise UserError(f"-k is {k}: it must be at least 1.")
    stored = read_embeddings(folder)
    rows = {id_: row for row, id_ in enumerate(stored.ids)}
    names: list[str] = []
    images: dict[str, Any] = {}
    for number, query in enumerate(_listed(queries)):
        if isinstance(query, Image.Image | np.ndarray):
            names.append(f"image {number}")
            images[names[-1]] = query
            continue
        if not isinstance(query, str | os.PathLike):
            raise UserError(f"search() takes image files, ids of stored images and images, not {type(query).__name__}.")
        names.append(os.fspath(query))
        if os.path.isfile(as_path(query)):
            images[names[-1]] = query
        elif names[-1] not in rows:
            raise UserError(f"{names[-1]} is neither an image file nor an id in {folder}.")
    if not names:
        raise UserError("Name at least one image to search for.")
    own = {name: rows[name] for name in names if name not in images}
    embedded: dict[str, NDArray[np.float32]] = {}
    if images:
        embedded = dict(zip(images, stored.encoder(device).embed(list(images.values())), strict=True))
    vectors = np.stack([stored.vectors[own[name]] if name in own else embedded[name] for name in names])

    # One extra, because a stored query finds itself.
    scores, found = by_vectors(stored, vectors, k + 1, index=index, device=device, listener=listener)
    results = []
    for name, best, which in zip(names, scores, found, strict=True):
        near = [
            {"id": stored.ids[row], "score": round(score, 6)}
            for row, score in zip(which.tolist(), best.tolist(), strict=True)
            if row != own.get(name)
        ]
        results.append({"query": name, "neighbours": near[:k]})
    return results


def _listed(queries: Any) -> list[Any]:
    one = isinstance(queries, str | os.PathLike | Image.Image) or getattr(queries, "ndim", None) in (2, 3)
    return [queries] if one or not isinstance(queries, Iterable) else list(queries)


def by_vectors(
    stored: Embeddings,
    queries: NDArray[np.float32],
    k: int,
    *,
    index: bool | None = None,
    device: str = "auto",
    listener: Listener | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k stored vectors most similar to each query, [Q,D]: cosine similarities and rows, [Q,k] each, best first;
    `index` as in `search`."""
    k = min(k, len(stored))
    if index or (index is None and len(stored) > EXACT):
        return _by_index(stored, queries, k, listener)
    scores, found = top_k(queries, stored.vectors, k, device=pick_device(device))
    return scores.numpy(), found.numpy()


def nearest(
    vectors: Vectors,
    k: int,
    queries: Vectors | None = None,
    *,
    device: str = "auto",
    index: Callable[[], tuple[Any, dict[str, Any]]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest neighbours of every vector, without itself: cosine similarities and rows, [N,k] each.

    Args:
        vectors: float [N,D], or an object that returns rows of such an array when indexed.
        queries: float [N,D], vectors to search for instead: row i is another form of vector i.
        index: returns an index of the vectors, used for more than `ALL_PAIRS`; None: a temporary one is built.
    """
    queries = vectors if queries is None else queries
    if len(vectors) <= ALL_PAIRS:
        exact, which = top_k(queries, vectors, k, exclude_self=True, device=pick_device(device))
        return exact.numpy(), which.numpy()
    made, about = make_index(vectors) if index is None else index()
    made.expansion_search = max(about["expansion"], k + 1)
    scores, found = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
    for start in range(0, len(vectors), _QUERIES):
        rows = np.arange(start, min(start + _QUERIES, len(vectors)))
        near, keys = _through(made, vectors, np.asarray(queries[rows], np.float32), k + 1)
        # The vector itself is not always first: equal vectors come in any order, and an index may miss it.
        own = keys == rows[:, None]
        own[~own.any(1), -1] = True
        scores[rows] = near[~own].reshape(len(rows), k)
        found[rows] = keys[~own].reshape(len(rows), k)
    return scores, found


# --- the index ------------------------------------------------------------------------------------------------------


def _by_index(
    stored: Embeddings, queries: NDArray[np.float32], k: int, listener: Listener | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    index, about = open_index(stored, listener)
    index.expansion_search = max(about["expansion"], k)
    _, found = _through(index, stored.vectors, queries, k)
    # The index's own scores are in float16, off by 2e-4, and 1 for a vector of zeros.
    scores = np.empty(found.shape, np.float32)
    for i, rows in enumerate(found):
        near, which = top_k(queries[i : i + 1], stored.vectors[rows], k)
        scores[i], found[i] = near[0].numpy(), rows[which[0].numpy()]
    return scores, found


def _through(
    index: Any, vectors: Vectors, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest vectors of each query, found by their index: cosine similarities and rows, [Q,k] each."""
    found = index.search(unit_rows(queries).numpy(), k, threads=torch.get_num_threads())
    counts = getattr(found, "counts", [len(found.keys)])  # missing in the result of a single query
    if min(counts) < k:  # with many equal vectors the index finds fewer; entries it has not filled are garbage
        scores, which = top_k(queries, vectors, k)
        return scores.numpy(), which.numpy()
    return 1 - np.atleast_2d(found.distances), np.atleast_2d(found.keys).astype(np.int64)


def open_index(stored: Embeddings, listener: Listener | None = None) -> tuple[Any, dict[str, Any]]:
    """The usearch index (HNSW, cosine, float16) of the embeddings, built and kept beside them if there is none yet.

    Its search is widened until it reaches `RECALL` of the exact neighbours of stored vectors. Returns it with
    {"format", "vectors", "encoder", "fingerprint", "expansion", "recall_at_10"}.
    """
    from usearch.index import Index

    listener = listener or Listener()
    path, description = stored.folder / INDEX, stored.folder / INDEX_META
    key = {"format": _FORMAT} | {name: stored.meta.get(name) for name in ("vectors", "encoder", "fingerprint")}
    about = read_kept(description)
    if path.exists() and about.keys() >= {"expansion"} and all(about.get(name) == key[name] for name in key):
        with contextlib.suppress(RuntimeError, ValueError):  # damaged: it is built again
            return Index.restore(str(path), view=True), about
    listener.say(f"Building an index of {len(stored):,} vectors (once) ...")
    index, measured = make_index(stored.vectors)
    about = {**key, **measured}

    def write() -> None:
        with atomic(path) as temporary:
            try:
                index.save(str(temporary))
            except RuntimeError as error:
                raise OSError(str(error)) from None
        write_json(description, about)

    keep(write)
    listener.say(f"The index finds {100 * about['recall_at_10']:.1f} % of the true 10 nearest neighbours (measured).")
    return index, about


def make_index(vectors: Vectors) -> tuple[Any, dict[str, Any]]:
    """A usearch index (HNSW, cosine, float16) in memory, and {"expansion", "recall_at_10"}."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="cos", dtype="f16", connectivity=16, expansion_add=128)
    for start in range(0, len(vectors), _QUERIES):
        part = unit_rows(vectors[start : start + _QUERIES]).numpy()
        index.add(np.arange(start, start + len(part), dtype=np.uint64), part, threads=torch.get_num_threads())
    expansion, recall = _widen(index, vectors)
    return index, {"expansion": expansion, "recall_at_10": round(recall, 4)}


def _widen(index: Any, vectors: Vectors) -> tuple[int, float]:
    """The smallest search width, by doubling up to `_WIDEST`, that reaches `RECALL`, and its recall; or the width that
    doubling no longer helps, as with many equal vectors."""
    probes = unit_rows(vectors[draw(np.arange(len(vectors)), _PROBES)]).numpy()
    k = min(10, len(vectors))
    least = top_k(probes, vectors, k)[0][:, -1:].numpy() - 1e-6  # of equal vectors any may be found
    expansion, before = 64, -1.0
    while True:
        index.expansion_search = expansion
        found = index.search(probes, k, threads=torch.get_num_threads())
        filled = np.arange(k) < np.reshape(getattr(found, "counts", k), (-1, 1))
        rows = np.where(filled, np.atleast_2d(found.keys), 0).astype(np.int64)
        near = unit_rows(vectors[rows.ravel()]).numpy().reshape(*rows.shape, -1)
        hits = (np.einsum("pd,pkd->pk", probes, near) >= least) & filled
        recall = float(hits.mean())
        if recall <= before:
            return expansion // 2, before
        if recall >= RECALL or expansion >= _WIDEST:
            return expansion, recall
        expansion, before = 2 * expansion, recall
