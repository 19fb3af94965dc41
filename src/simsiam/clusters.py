"""Cluster stored embeddings by k-means and find outliers: the images least similar to their nearest neighbours."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simsiam.compute import draw, set_threads
from simsiam.config import UserError, as_seed, coerce, counted
from simsiam.console import Listener
from simsiam.embeddings import CLUSTERS, Embeddings, read_embeddings
from simsiam.neighbours import blocks, unit_rows
from simsiam.runs import atomic, keep
from simsiam.search import Vectors, nearest, open_index

COUNT = 20
"""Default number of clusters, few enough to look through; at most a tenth of the images."""

_EXAMPLES, _ODD, _ODD_NEIGHBOURS = 9, 20, 10
_DIRECTIONS, _MANY = 64, 50_000

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Clusters:
    """The clusters of N images."""

    count: int
    seed: int
    label: Rows
    """[N], the cluster of each image, from 0, the largest, to count - 1."""
    similarity: NDArray[np.float32]
    """[N], cosine similarity of each image to the centre of its cluster."""
    odd: list[tuple[int, float]]
    """The images least similar to their 10 nearest neighbours, at most 20 and a tenth of all: row and mean cosine
    similarity to these."""


def clusters(
    folder: str | Path,
    count: int | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Cluster the directions of the embeddings by k-means and write the result to `clusters.parquet` in the folder.

    Args:
        folder: embeddings written by `simsiam embed`.
        count: number of clusters, at least 2; None: 20, or a tenth of the images if that is fewer.
    Returns {"images", "count", "file", "clusters", "odd", "agreement"}. A cluster is {"cluster", "images",
    "similarity", "examples", "classes"}: its number, its size, the mean cosine similarity to its centre, the ids
    nearest to the centre and, if labels are known, the shares of the three most frequent classes; the largest comes
    first. `odd` lists the images least similar to their 10 nearest neighbours, 20 or a tenth of all if that is fewer,
    as {"id", "similarity"}. `agreement` with the labels is {"nmi", "purity"} in [0, 1], or None with fewer than two
    classes. `file` is None if it could not be written.
    Raises UserError if `count` does not fit the images, or the seed is none.
    """
    set_threads()
    count, seed = coerce(count, int | None, "count"), as_seed(seed)
    stored = read_embeddings(folder, ("id", "class"))
    found = find_clusters(stored, count, seed=seed, device=device, listener=listener)
    kept = keep(lambda: write_clusters(stored, found))
    about = summary(stored, found)
    return {
        **about,
        "file": str(stored.folder / CLUSTERS) if kept else None,
        "clusters": [each | {"examples": [stored.ids[row] for row in each["examples"]]} for each in about["clusters"]],
        "odd": [{"id": stored.ids[each["row"]], "similarity": each["similarity"]} for each in about["odd"]],
    }


def find_clusters(
    stored: Embeddings,
    count: int | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    listener: Listener | None = None,
) -> Clusters:
    """Compute the arrays that `clusters` describes; same arguments and errors."""
    listener = listener or Listener()
    if len(stored) < 2:
        raise UserError(f"{stored.folder} has {counted(len(stored), 'image')}: clusters need at least 2.")
    if count is not None and not 2 <= count <= len(stored):
        raise UserError(f"{len(stored):,} images cannot form {count} clusters: choose 2 to the number of images.")
    count = count or max(2, min(COUNT, len(stored) // 10))
    listener.say(f"Forming {count} clusters of {len(stored):,} images ...")
    vectors = stored.vectors
    label = k_means(vectors, count, seed)
    order = np.argsort(-np.bincount(label, minlength=count), kind="stable")
    label = np.argsort(order)[label]
    parts = list(blocks(*vectors.shape))
    sums = torch.zeros(count, vectors.shape[1])
    for block in parts:
        sums.index_add_(0, torch.from_numpy(label[block]), unit_rows(vectors[block]))
    centres = unit_rows(sums)
    similarity = np.empty(len(label), np.float32)
    for block in parts:
        similarity[block] = (unit_rows(vectors[block]) * centres[label[block]]).sum(1)
    listener.say("Looking for outliers ...")
    near, _ = nearest(vectors, _ODD_NEIGHBOURS, device=device, index=lambda: open_index(stored, listener))
    alone = near.mean(1)
    most = max(1, min(_ODD, len(alone) // 10))
    odd = [(row, float(alone[row])) for row in np.argsort(alone, kind="stable")[:most].tolist()]
    return Clusters(count, seed, label, similarity, odd)


def write_clusters(stored: Embeddings, found: Clusters) -> None:
    """Write `clusters.parquet` into the folder: id, cluster, similarity and, as metadata, the settings. Raises
    UserError if it cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"id": stored.ids, "cluster": found.label, "similarity": found.similarity}
    about = {"count": str(found.count), "seed": str(found.seed)}
    with atomic(stored.folder / CLUSTERS) as temporary:
        pq.write_table(pa.table(columns, metadata=about), temporary)


def stored_settings(stored: Embeddings) -> dict[str, int]:
    """The `count` and `seed` of the stored clusters; empty if there are none or the number of images has changed."""
    import pyarrow.parquet as pq

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = pq.read_metadata(stored.folder / CLUSTERS)
        about = {name: int(kept.metadata[name.encode()]) for name in ("count", "seed")}
        return about if kept.num_rows == len(stored) and 2 <= about["count"] <= len(stored) else {}
    return {}


def summary(stored: Embeddings, found: Clusters) -> dict[str, Any]:
    """What `clusters` returns, without the file and with rows in place of ids; `stored` must have the column class."""
    classes = stored.items["class"]
    return {
        "images": len(stored),
        "count": found.count,
        "clusters": [
            _cluster(c, np.flatnonzero(found.label == c), found.similarity, classes) for c in range(found.count)
        ],
        "odd": [{"row": row, "similarity": round(similarity, 6)} for row, similarity in found.odd],
        "agreement": _agreement(found.label, classes),
    }


def k_means(vectors: Vectors, count: int, seed: int = 0) -> Rows:
    """Cluster vectors by direction, best of four starts: float [N,D] -> [N] in 0..count-1. With collapsed vectors,
    clusters may be empty."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning

    # Distances between unit vectors rank as cosine similarity does; a few principal directions preserve nearly all of
    # them, and a sample is enough to find these.
    some = draw(np.arange(len(vectors)), _MANY, seed)
    sample = np.empty((len(some), vectors.shape[1]), np.float32)
    for block in blocks(*sample.shape):
        sample[block] = unit_rows(vectors[some[block]])
    width = min(_DIRECTIONS, *sample.shape)
    kind = MiniBatchKMeans if len(vectors) > _MANY else KMeans
    with warnings.catch_warnings():  # collapsed features: no variance, and fewer distinct vectors than clusters
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        directions = PCA(width, random_state=seed, copy=False).fit(sample)
        del sample  # PCA may have centred it in place
        few = np.empty((len(vectors), width), np.float32)
        for block in blocks(*vectors.shape):
            few[block] = directions.transform(unit_rows(vectors[block]).numpy())
        label: Rows = kind(count, n_init=4, random_state=seed).fit_predict(np.nan_to_num(few)).astype(np.int64)
    return label


def _cluster(number: int, rows: Rows, similarity: NDArray[np.float32], classes: Sequence[str | None]) -> dict[str, Any]:
    names, counts = np.unique([classes[row] for row in rows if classes[row] is not None], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:3]
    best = rows[np.argsort(-similarity[rows], kind="stable")[:_EXAMPLES]]
    return {
        "cluster": number,
        "images": len(rows),
        "similarity": round(float(similarity[rows].mean()), 4) if len(rows) else None,
        "examples": best.tolist(),
        "classes": {str(names[i]): round(float(counts[i] / counts.sum()), 4) for i in most} if len(names) else None,
    }


def _agreement(label: Rows, classes: Sequence[str | None]) -> dict[str, float] | None:
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    known = np.array([name is not None for name in classes])
    names = [name for name in classes if name is not None]
    if len(set(names)) < 2:
        return None
    table = contingency_matrix(names, label[known])
    purity = table.max(0).sum() / table.sum()
    return {
        "nmi": round(float(normalized_mutual_info_score(names, label[known])), 4),
        "purity": round(float(purity), 4),
    }
