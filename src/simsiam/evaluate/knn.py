"""Weighted kNN classifier: the most similar training images vote on the class.

As in InstDisc (Wu et al. 2018), which the paper uses to monitor training (figure 2): cosine similarity, k = 200, votes
weighted by exp(similarity / T). T is 0.1 here, as in other projects (the paper states neither k nor T; its authors use
0.2), so every figure is reported with its k and T. If classes have fewer than 1,000 images, 200 neighbours would reach
far into other classes: k is then 20 by default.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from simsiam.evaluate import Labelled
from simsiam.neighbours import top_k

NEEDS_LABELS = True

_MANY, _K, _SMALL_K = 1000, 200, 20
_ROWS = 4096
"""Test rows whose votes, one value per class, are counted at a time."""


def usual_k(train_labels: Tensor) -> int:
    """Return the default k, by the median number of images per class. Labels: int64 [N], -1 if unknown."""
    counts = train_labels[train_labels >= 0].bincount()
    return _K if len(counts) and float(counts[counts > 0].double().median()) >= _MANY else _SMALL_K


def score(features: Labelled, *, seed: int = 0, k: int | None = None, T: float = 0.1) -> dict[str, Any]:
    """Return the top-1 accuracy; k = None means `usual_k`. Nothing is random, so the seed is not used."""
    if k is None:
        k = usual_k(features.train_labels)
    elif k > len(features.train):
        warnings.warn(
            f"k is {k}, but there are {len(features.train):,} labelled training images: all vote.", stacklevel=2
        )
    value = accuracy(features.train, features.train_labels, features.test, features.test_labels, k, T)
    rows = {"train": len(features.train), "test": len(features.test)}
    return {"value": round(value, 2), "k": min(k, len(features.train)), "T": T, **rows}


def accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, T: float = 0.1) -> float:
    """Return the percentage of test rows whose neighbours vote for the right class.

    NaN without known training labels or without known test labels.

    A constant output gives every test row the same votes, so it scores the share of one class: chance. Ties go to the
    lower class number.

    Args:
        train, test: float [N,D] and [M,D], of any scale.
        train_labels, test_labels: int64 [N] and [M]; rows labelled -1 are left out.
        k: number of neighbours that vote, at most N.
        T: temperature; the lower, the more weight the nearest get.

    Raises UserError if a feature is not finite.
    """
    assert T > 0
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0].cpu()
    test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0].cpu()
    if not len(test) or not len(train):
        return float("nan")
    similarity, index = top_k(test, train, k)
    weight = ((similarity - similarity[:, :1]) / T).exp()
    classes, right = int(train_labels.max()) + 1, 0
    for near, by, labels in zip(index.split(_ROWS), weight.split(_ROWS), test_labels.split(_ROWS), strict=True):
        votes = torch.zeros(len(near), classes).scatter_add_(1, train_labels[near], by)
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(test)
