"""k-means clusters compared with the classes: one cluster per class, under the best one-to-one matching."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from simsiam.clusters import k_means
from simsiam.evaluate import Labelled

NEEDS_LABELS = True
BY_KIND = ("nmi", "ari")


def score(features: Labelled, *, seed: int = 0) -> dict[str, Any]:
    """Cluster the test rows and compare with the classes.

    Returns the accuracy in percent under the best one-to-one matching ("value"), normalised mutual information and
    adjusted Rand index, both at most 1.
    """
    labels = features.test_labels.cpu().numpy()
    count = len(np.unique(labels))
    found = k_means(features.test.cpu(), count, seed)
    table = contingency_matrix(labels, found)
    right = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "value": round(float(100 * right / len(labels)), 2),
        "nmi": round(float(normalized_mutual_info_score(labels, found)), 4),
        "ari": round(float(adjusted_rand_score(labels, found)), 4),
        "clusters": count,
        "test": len(labels),
    }
