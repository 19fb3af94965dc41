"""Linear classifier trained on a few labelled images per class, averaged over random draws of them.

The features are standardised with all labelled training images, not only with those drawn (`standardise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simsiam.compute import generator
from simsiam.evaluate import Labelled, sample_rows
from simsiam.evaluate.linear import accuracy, fit, standardise

NEEDS_LABELS = True
BY_KIND = ("std", "by_labels")
_AT_ONCE = 1 << 24
"""Values in the draws that are fitted together (64 MiB of float32)."""


def score(
    features: Labelled,
    *,
    seed: int = 0,
    labels_per_class: Sequence[int] = (1, 5, 10),
    draws: int = 20,
    C: float = 3.0,
    most_test: int = 5000,
) -> dict[str, Any]:
    """Return the mean top-1 accuracy at the largest usable number of labels per class, and the std over the draws.

    The draws depend on the seed and the labels only, so they are the same for every encoder. Test rows of classes
    without training images count as errors. A number of labels that some class does not have is skipped; if none is
    left, the value is None.

    Args:
        C: inverse strength of the L2 penalty. Fixed, because a handful of labels is too few to choose it; on CIFAR-10
            the accuracy varies by about a point between 1 and 30.
        most_test: maximum number of test rows; a random sample if there are more.
    """
    assert draws > 0
    labels, smallest = features.train_labels, int(features.train_labels.unique(return_counts=True)[1].min())
    train, test = standardise(features.train, features.test)
    rows = sample_rows(len(test), most_test, generator(torch.device("cpu"), seed, 0)).to(test.device)
    test, test_labels = test[rows], features.test_labels[rows]
    by_labels = {}
    for count in sorted(n for n in labels_per_class if n <= smallest):
        chosen = choose(labels.cpu(), count, draws, seed).to(train.device)
        together = max(1, _AT_ONCE // (chosen.shape[1] * train.shape[1]))
        values = torch.cat(
            [accuracy(fit(train[c], labels[c], features.classes, C), test, test_labels) for c in chosen.split(together)]
        )
        std = values.std(correction=min(1, draws - 1))
        by_labels[count] = {"mean": round(float(values.mean()), 2), "std": round(float(std), 2)}
    most = max(by_labels, default=0)
    figures = by_labels.get(most, {"mean": None, "std": None})
    return {
        "value": figures["mean"],
        "std": figures["std"],
        "labels_per_class": most,
        "draws": draws,
        "C": C,
        "by_labels": {str(count): value for count, value in by_labels.items()},
        "test": len(test),
    }


def choose(labels: Tensor, count: int, draws: int, seed: int) -> Tensor:
    """Draw `count` random rows of every class that occurs, without replacement: labels int64 [N] -> int64 [draws,n]."""
    members = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    random = generator(torch.device("cpu"), seed, 1, count)
    chosen = [[rows[torch.randperm(len(rows), generator=random)[:count]] for rows in members] for _ in range(draws)]
    return torch.stack([torch.cat(each) for each in chosen])
