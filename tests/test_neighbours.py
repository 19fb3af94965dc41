"""top_k: exact, bounded in memory, and never returns a row as its own neighbour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simsiam import kernels, neighbours
from simsiam.config import UserError
from simsiam.neighbours import top_k, unit_rows


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def brute_force(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """All cosine similarities in float64; 0 where a row is 0."""
    queries, bank = queries.astype(np.float64), bank.astype(np.float64)
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(bank, axis=1)
    return np.divide(queries @ bank.T, norms, out=np.zeros_like(norms), where=norms > 0)


@pytest.mark.parametrize("bank_block", [1 << 25, 13 * 16])
@pytest.mark.parametrize(("block", "k"), [(512, 7), (10, 7), (33, 1), (1, 60), (512, 500)])
def test_brute_force(monkeypatch: pytest.MonkeyPatch, bank_block: int, block: int, k: int) -> None:
    monkeypatch.setattr(neighbours, "_BANK_BLOCK", bank_block)
    monkeypatch.setattr(neighbours, "_QUERIES", block)
    queries, bank = random(37, 16), random(101, 16, seed=1) * np.logspace(-3, 3, 101, dtype=np.float32)[:, None]
    scores, indices = top_k(queries, bank, k)
    truth = brute_force(queries, bank)
    order = np.argsort(-truth, axis=1)[:, :k]
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    assert scores.shape == indices.shape == (37, min(k, 101))
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(truth, order, 1), atol=1e-5)


@pytest.mark.parametrize("count", [1600, 1601, 3007])
@pytest.mark.parametrize("distinct", [10_000, 5])
def test_long_rows_go_by_the_maxima_of_groups(count: int, distinct: int) -> None:
    """Same values as a plain topk, also with many ties, and each index points to its value."""
    values = torch.from_numpy(np.random.default_rng(count).integers(distinct, size=(9, count))).float()
    with kernels.off():
        found, where = neighbours._largest(values, 20)
    assert torch.equal(found, values.topk(20, dim=1).values) and torch.equal(found, values.gather(1, where))
    assert all(len(set(row)) == 20 for row in where.tolist())


@pytest.mark.parametrize("bank_block", [1 << 25, 9 * 8])
@pytest.mark.parametrize("block", [512, 7])
def test_exclude_self_keeps_duplicates(monkeypatch: pytest.MonkeyPatch, bank_block: int, block: int) -> None:
    monkeypatch.setattr(neighbours, "_BANK_BLOCK", bank_block)
    monkeypatch.setattr(neighbours, "_QUERIES", block)
    bank = random(40, 8)
    bank[25] = 3 * bank[4]
    scores, indices = top_k(bank, bank, 39, exclude_self=True)
    rows = torch.arange(40)
    assert not (indices == rows[:, None]).any()
    assert all(sorted([*own.tolist(), row]) == list(range(40)) for row, own in enumerate(indices))
    assert indices[4, 0] == 25 and indices[25, 0] == 4
    assert scores[4, 0].item() == pytest.approx(1, abs=1e-6)
    assert (scores.diff(dim=1) <= 0).all()
    truth = brute_force(bank, bank)
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(truth, indices.numpy(), 1), atol=1e-5)


def test_the_only_row_has_no_neighbours() -> None:
    scores, indices = top_k(random(1, 4), random(1, 4), 5, exclude_self=True)
    assert scores.shape == indices.shape == (1, 0)


def test_every_kind_of_array_gives_the_same(tmp_path: Path) -> None:
    queries, bank = random(5, 8), random(30, 8, seed=1)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    expected = top_k(queries, bank, 3)[1]
    kept = bank.copy()
    for given in (mapped, torch.from_numpy(bank), bank.astype(np.float64), torch.from_numpy(bank).double()):
        assert torch.equal(top_k(queries, given, 3)[1], expected)
    wide = np.zeros((30, 16), np.float32)
    wide[:, ::2] = bank
    assert torch.equal(top_k(torch.from_numpy(queries), wide[:, ::2], 3)[1], expected)
    np.testing.assert_array_equal(bank, kept)


def test_zero_rows_score_zero() -> None:
    bank = random(6, 4)
    bank[2] = 0
    scores, indices = top_k(np.vstack([bank[:1], np.zeros((1, 4), np.float32)]), bank, 6)
    assert scores[0][indices[0] == 2].item() == 0
    assert (scores[1] == 0).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-10, 1e30, 3e38])
def test_scale_does_not_matter(scale: float) -> None:
    bank = np.array([[1, 0], [0.6, 0.8], [-1, 0]], np.float64)
    scores, indices = top_k(bank[:1] * scale, bank * scale, 3)
    assert indices.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(scores, [[1, 0.6, -1]], atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    broken = random(6, 4)
    broken[3, 1] = bad
    for queries, bank in ((broken, random(6, 4)), (random(6, 4), broken)):
        with pytest.raises(UserError, match="not finite"):
            top_k(queries, bank, 2)


def test_similarity_never_passes_one() -> None:
    rows = torch.from_numpy(random(500, 300))
    scores, _ = top_k(rows, torch.cat([rows, -rows]), 1000)
    assert scores.max() <= 1 and scores.min() >= -1
    assert unit_rows(rows).norm(dim=1).sub(1).abs().max() < 1e-6
