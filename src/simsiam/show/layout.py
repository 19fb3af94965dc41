"""Place images on a plane by their vectors, for the report and the viewer."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray


def layout(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
    """Positions [N,2], near if similar, and the name of the method: t-SNE, or PCA for few or collapsed vectors."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # Neighbours of unit vectors are the same under Euclidean distance and cosine; 50 components keep t-SNE quick.
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    width = min(50, *unit.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a collapsed embedding has no variance to explain
        unit = PCA(width, random_state=0).fit_transform(np.nan_to_num(unit - unit.mean(axis=0)))
        if len(unit) < 20 or unit.std() < 1e-6 or width < 2:
            return np.pad(unit, ((0, 0), (0, 2)))[:, :2], "PCA"
        tsne = TSNE(perplexity=min(30, len(unit) / 4), init="pca", random_state=0, n_jobs=1)
        return tsne.fit_transform(unit), "t-SNE"
