"""Weighted nearest neighbours: the training images that are most similar vote on the class.

As InstDisc does it (Wu et al. 2018), by which the paper monitors training (figure 2): cosine similarity, k = 200, votes
weighted exp(similarity / T). T is 0.1 here, as in other projects (the paper tells neither; its authors take 0.2), so k and
T stand beside every figure. Where a class has fewer than 1,000 images, 200 neighbours would reach far into the others: k is
20 there unless it is given.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from simsiam.evaluate import Features
from simsiam.neighbours import top_k

NEEDS_LABELS = True

_MANY, _K, _SMALL_K = 1000, 200, 20


def usual_k(train_labels: Tensor) -> int:
    """k where nobody asks for another: by the median class's images among the labels, int64 [N], -1 where unknown."""
    counts = train_labels[train_labels >= 0].bincount()
    return _K if len(counts) and float(counts[counts > 0].double().median()) >= _MANY else _SMALL_K


def score(features: Features, *, seed: int = 0, k: int | None = None, T: float = 0.1) -> dict[str, Any]:
    """Top-1 accuracy; k is `usual_k` where it is None. Nothing is drawn, so the seed is not used."""
    data = features.labelled()
    assert data is not None and data.train_labels is not None and data.test_labels is not None
    if k is None:
        k = usual_k(data.train_labels)
    elif k > len(data.train):
        warnings.warn(f"k is {k}, but there are {len(data.train):,} labelled training images: all vote.", stacklevel=2)
    value = accuracy(data.train, data.train_labels, data.test, data.test_labels, k, T)
    rows = {"train": len(data.train), "test": len(data.test)}
    return {"value": round(value, 2), "k": min(k, len(data.train)), "T": T, **rows}


def accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, T: float = 0.1) -> float:
    """Percent of test rows whose neighbours vote for the right class, in 0..100; NaN where no test label is known.

    A constant output gives every test row the same votes, so it scores the share of one class: chance. Tied classes
    go to the lower number.

    Args:
        train, test: float [N,D] and [M,D], of any scale.
        train_labels, test_labels: int64 [N] and [M]; rows labelled -1 are left out.
        k: neighbours that vote, at most N.
        T: temperature; the lower, the more the nearest count.
    Raises UserError where a feature is not finite.
    """
    assert T > 0
    train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0].cpu()
    test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0].cpu()
    if not len(test) or not len(train):
        return float("nan")
    similarity, index = top_k(test, train, k)
    weight = ((similarity - similarity[:, :1]) / T).exp()
    votes = torch.zeros(len(test), int(train_labels.max()) + 1).scatter_add_(1, train_labels[index], weight)
    return float((votes.argmax(1) == test_labels).double().mean() * 100)
