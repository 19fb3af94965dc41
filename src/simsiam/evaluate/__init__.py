"""Evaluations of embeddings: one module per evaluation, registered by its file name.

A module has a docstring, `NEEDS_LABELS`, optionally `BY_KIND` (the names of figures besides "value" that depend on the
features and not on the settings), and

    score(features, *, seed=0, **settings) -> dict     "value", the figure to compare, and the settings used

whose features are `Labelled` if it needs labels; tests/test_evaluate.py checks this for every module. Accuracies are in
percent.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simsiam.config import UserError, did_you_mean


@dataclass(frozen=True)
class Features:
    """The features of a data set from one encoder. Raises UserError if a value is NaN or infinite."""

    train: Tensor
    """float [N,D]"""
    train_labels: Tensor | None
    """int64 [N] in 0..classes-1, -1 if unknown; None for a data set without labels"""
    test: Tensor
    """float [M,D]; M may be 0"""
    test_labels: Tensor | None
    classes: int

    def __post_init__(self) -> None:
        assert self.train.ndim == self.test.ndim == 2 and self.train.shape[1] == self.test.shape[1]
        for rows, labels in ((self.train, self.train_labels), (self.test, self.test_labels)):
            assert labels is None or (labels.shape == rows.shape[:1] and bool((labels < self.classes).all()))
            check_finite(rows)

    def labelled(self) -> Labelled | None:
        """Return the rows with known labels; None without test rows or with fewer than two classes to train on."""
        if self.train_labels is None or self.test_labels is None:
            return None
        train, test = self.train_labels >= 0, self.test_labels >= 0
        if not test.any() or len(self.train_labels[train].unique()) < 2:
            return None
        if train.all() and test.all():  # without a copy
            return Labelled(self.train, self.train_labels, self.test, self.test_labels, self.classes)
        kept = self.train[train], self.train_labels[train], self.test[test], self.test_labels[test]
        return Labelled(*kept, self.classes)


@dataclass(frozen=True)
class Labelled(Features):
    """Features whose labels are all known, with test rows and at least two classes to train on."""

    train_labels: Tensor
    test_labels: Tensor


def labelled_rows(
    labels: NDArray[np.int64] | None, train: NDArray[np.int64], test: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """The test rows of known label, as `Features.labelled` has them, before there are features; None if that is None.

    labels: int64, of all rows, -1 if unknown; train, test: int64, positions in it.
    """
    if labels is None:
        return None
    test = test[labels[test] >= 0]
    classes = np.unique(labels[train][labels[train] >= 0])
    return test if len(test) and len(classes) >= 2 else None


def check_finite(rows: Tensor) -> None:
    """Raise UserError if an encoder's features contain NaN or infinity."""
    if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():  # isfinite() of all rows would copy them
        raise UserError(
            "The encoder's features are not finite: its training diverged. "
            "Evaluate an earlier checkpoint, or train again with a lower train.lr."
        )


def names() -> list[str]:
    """Return the names of all evaluations."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """Return the evaluation's module. Raises UserError if the name is unknown."""
    if name not in names():
        raise UserError(f"Unknown evaluation {name!r}.{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def compare(
    names: Iterable[str],
    by_kind: Mapping[str, Callable[[], Features]],
    *,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any] | None]:
    """Run every named evaluation on every kind of features ("trained", "untrained", "pixels") of the same images.

    Features are computed and released one kind at a time: for a million images, one kind takes 10 GB.

    Returns, ready for JSON, {name: {kind: value, ..., setting: value, ...}}; a figure in a module's `BY_KIND` is itself
    a table by kind. None for an evaluation that needs labels if there are too few.
    Raises UserError for an unknown evaluation, and for features that are not finite.
    """
    asked = {name: (get(name), dict((settings or {}).get(name, {}))) for name in names}
    scores: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in asked}

    def judge(kind: str, features: Features) -> None:
        labelled = functools.cache(features.labelled)  # copies the features if a label is unknown
        for name, (module, given) in asked.items():
            usable = labelled() if module.NEEDS_LABELS else features
            if usable is not None:
                scores[name][kind] = module.score(usable, seed=seed, **given)

    for kind, make in by_kind.items():
        judge(kind, make())
    return {name: _table(module, scores[name]) for name, (module, _) in asked.items()}


def _table(module: ModuleType, scores: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    if not scores:
        return None
    table: dict[str, Any] = {kind: score["value"] for kind, score in scores.items()}
    by_kind_too = getattr(module, "BY_KIND", ())
    first = next(iter(scores.values()))
    for key in first:
        if key in by_kind_too:
            table[key] = {kind: score[key] for kind, score in scores.items()}
        elif key != "value":
            table[key] = first[key]
    return table


def sample_rows(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return a random choice of `most` of `count` rows, ascending, or all rows if there are no more than that.

    int64 [min(count, most)] in 0..count-1.
    """
    chosen = torch.randperm(count, generator=generator)[:most]
    return chosen.sort().values
