"""Retrieval precision: the share of a test image's nearest training images that have its class."""

from __future__ import annotations

from typing import Any

from simsiam.evaluate import Labelled
from simsiam.neighbours import top_k

NEEDS_LABELS = True
BY_KIND = ("nearest",)


def score(features: Labelled, *, seed: int = 0, k: int = 10) -> dict[str, Any]:
    """Return the precision among the k nearest by cosine similarity, in percent, averaged over the test rows ("value"),
    and that of the nearest alone. Chance is the share of a class. Nothing is random, so the seed is not used."""
    assert k >= 1
    _, index = top_k(features.test, features.train, k)
    same = features.train_labels.cpu()[index] == features.test_labels.cpu()[:, None]
    precision = 100 * same.double()
    found = {"value": round(float(precision.mean()), 2), "nearest": round(float(precision[:, 0].mean()), 2)}
    return {**found, "k": index.shape[1], "train": len(features.train), "test": len(features.test)}
