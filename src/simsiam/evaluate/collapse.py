"""Spread of the embeddings, without labels: std 1 and many directions are healthy, 0 is a constant output.

Training judges the projection z; this judges whatever was embedded, usually the backbone's features, whose healthy
figures differ (ReLU makes them non-negative, so their std is below 1).
"""

from __future__ import annotations

from typing import Any

import torch

from simsiam.collapse import effective_rank, judge, normalised_std
from simsiam.compute import generator
from simsiam.evaluate import Features, sample_rows

NEEDS_LABELS = False
BY_KIND = ("std", "effective_rank", "most_rank", "verdict", "dim")


def score(features: Features, *, seed: int = 0, rows: int = 2000) -> dict[str, Any]:
    """Return std (times sqrt(d)), effective rank (less than the number of rows) and the verdict, on at most `rows` test
    rows, or training rows if there are fewer than 16 test rows."""
    given = features.test if len(features.test) >= 16 else features.train
    assert len(given) > 1
    z = given[sample_rows(len(given), rows, generator(torch.device("cpu"), seed)).to(given.device)]
    std, rank = float(normalised_std(z)), effective_rank(z)
    # There is no loss here; with any finite value the verdict depends on std and rank only.
    most = min(len(z) - 1, z.shape[1])
    verdict = judge(0.0, std, rank, most=most).name
    figures = {"value": round(std, 4), "std": round(std, 4), "effective_rank": round(rank, 2), "verdict": verdict}
    return {**figures, "most_rank": most, "dim": z.shape[1], "rows": len(z)}
