"""Collapse: every figure against a case with a known closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from simsiam.collapse import (
    COLLAPSED_RANK,
    COLLAPSED_STD,
    PARTIAL_SHARE,
    TOO_FEW,
    Guard,
    Name,
    Verdict,
    alignment,
    effective_rank,
    judge,
    normalised_std,
    retrieval,
    spectrum,
    suspicious,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: list[float], n: int = 200, d: int = 32) -> Tensor:
    """Return [n,d] with exactly these singular values after centring, and a non-zero mean."""
    left = torch.linalg.qr(noise(n, len(values)) - noise(n, len(values)).mean(0))[0]
    right = torch.linalg.qr(noise(d, len(values), seed=1))[0]
    return left @ torch.diag(torch.tensor(values)) @ right.T + noise(d, seed=2)


@pytest.mark.parametrize(("n", "d"), [(4096, 16), (4096, 256)])
def test_a_gaussian_is_healthy(n: int, d: int) -> None:
    z = noise(n, d)
    assert float(normalised_std(z)) == pytest.approx(1, abs=0.01)
    # N > d only: Marchenko-Pastur spreads the singular values by sqrt(d/N) about their mean.
    assert d * (1 - d / n) < effective_rank(z) < d


def test_std_and_rank_do_not_depend_on_scale_or_direction() -> None:
    z, turn = noise(500, 24), torch.linalg.qr(noise(24, 24, seed=1))[0]
    for other in (z * 1e-3, z * 1e3):
        assert float(normalised_std(other)) == pytest.approx(float(normalised_std(z)), rel=1e-4)
    for other in (z * 1e-3, z * 1e3, z + 5, z @ turn):
        assert effective_rank(other) == pytest.approx(effective_rank(z), rel=1e-4)
    assert normalised_std(z.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("vector", [torch.zeros(16), torch.ones(16), 100 * noise(16), 1e-3 * noise(16)])
def test_a_constant_is_collapsed(vector: Tensor) -> None:
    z = vector.repeat(300, 1)
    assert float(normalised_std(z)) == pytest.approx(0, abs=1e-5)
    assert retrieval(z, z) == 0
    assert effective_rank(z) == 0
    assert judge(-1.0, float(normalised_std(z)), effective_rank(z)).name == "collapsed"


@pytest.mark.parametrize("rank", [1, 2, 5, 32])
def test_rank_r_uses_r_directions(rank: int) -> None:
    assert effective_rank(with_spectrum([3.0] * rank)) == pytest.approx(rank, rel=1e-3)
    loose = noise(400, rank) @ noise(rank, 64, seed=1)
    assert (rank * 0.5 if rank > 1 else 0.99) < effective_rank(loose) <= rank + 1e-3


def test_effective_rank_of_a_known_spectrum() -> None:
    values = [8.0, 4.0, 2.0, 1.0, 1.0]
    shares = [value / sum(values) for value in values]
    assert effective_rank(with_spectrum(values)) == pytest.approx(math.prod(p**-p for p in shares), rel=1e-3)
    z = with_spectrum(values)
    np.testing.assert_allclose(spectrum(z)[:5], values, rtol=1e-4)
    centred = z.double().numpy() - z.double().numpy().mean(0)
    np.testing.assert_allclose(spectrum(z), np.linalg.svd(centred, compute_uv=False), atol=1e-4)
    assert spectrum(noise(7, 20)).shape == (7,) and 1 <= effective_rank(noise(7, 20)) <= 7


def test_partial_collapse_is_what_std_alone_does_not_see() -> None:
    z = with_spectrum([50.0, 50.0]) - with_spectrum([50.0, 50.0]).mean(0)
    # Two directions of 32: the std of z/|z| is spread over few channels, but not small.
    assert float(normalised_std(z)) > 3 * COLLAPSED_STD
    assert judge(-0.9, float(normalised_std(z)), effective_rank(z), most=200).name == "partial"
    assert judge(-0.9, float(normalised_std(z))).name == "healthy"
    two = judge(-0.9, 1.41, effective_rank(z[:2]), most=1)  # at most rank 1
    assert two.name == "healthy" and two.evidence.endswith(TOO_FEW)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_embedding_has_no_rank(value: float) -> None:
    z = noise(20, 4)
    z[3, 2] = value
    assert effective_rank(z) == 0


def test_alignment() -> None:
    z = noise(50, 8)
    assert alignment(z, 3 * z) == pytest.approx(1) and alignment(z, -z) == pytest.approx(-1)
    assert abs(alignment(noise(5000, 64), noise(5000, 64, seed=1))) < 0.01


def test_retrieval() -> None:
    z = noise(100, 16)
    assert retrieval(z, 2 * z) == 100 and retrieval(z, z.roll(1, 0)) == 0
    half = torch.cat([z[:50], z[50:].roll(1, 0)])
    assert retrieval(z, half) == 50
    assert retrieval(noise(2000, 16), noise(2000, 16, seed=1)) < 1
    twice = torch.cat([z[:10], z[:10]])  # every image twice: its own view always ties with another
    assert retrieval(twice, twice) == 0
    assert retrieval(torch.cat([z[:10], z[:5]]), torch.cat([z[:10], z[:5]])) == pytest.approx(100 * 5 / 15)


@pytest.mark.parametrize(
    ("figures", "name"),
    [
        ((-0.9, 0.98, 30.0, 1.0), "healthy"),
        ((-0.9, 0.98), "healthy"),
        ((-0.9, COLLAPSED_STD, 512 * PARTIAL_SHARE, None, 512), "healthy"),
        ((-0.9, 0.98, 512 * PARTIAL_SHARE - 0.01, None, 512), "partial"),
        ((-1.0, COLLAPSED_STD - 1e-6, 0.0), "collapsed"),
        ((-1.0, 0.0, 60.0), "collapsed"),
        ((-0.9, 0.16, 147.0, None, 512), "healthy"),  # no BN in the heads: a large mean, but many directions around it
        ((-0.9, 0.98, 1.0, None, 1), "healthy"),  # two images: only one direction
        ((-0.9, 0.98, 1.4, None, 3), "healthy"),  # four images
        ((-0.9, 0.98, 1.4, None, 4), "collapsed"),
        ((-0.9, 0.98, 1.8, None, 32), "partial"),  # although it is more than 2 % of the directions
        ((-0.98, 0.18, 1.01, None, 512), "collapsed"),  # with BN: one output opposite to the rest
        ((math.nan, 0.98), "diverged"),
        ((math.inf, 0.0), "diverged"),
        ((-0.5, math.nan, 1.0), "diverged"),
    ],
)
def test_verdicts(figures: tuple[float, ...], name: str) -> None:
    verdict = judge(*figures)
    assert verdict.name == name and str(verdict).startswith(f"{name}: ")
    assert "\n" not in str(verdict) and bool(verdict.advice) == (name != "healthy")


@pytest.mark.parametrize("count", [64, 128, 512])
def test_one_output_against_the_rest_is_suspicious(count: int) -> None:
    vector = noise(512).sign()  # as after BN: all channels have the same magnitude
    z = vector.repeat(count, 1)
    z[0] = -vector
    assert suspicious(float(normalised_std(z)), count) and effective_rank(z) < COLLAPSED_RANK
    assert not suspicious(float(normalised_std(noise(count, 512))), count)
    assert not suspicious(0.4, 4)  # with few images, a healthy std is no larger


def look(*sequence: Name, patience: int = 3) -> Name:
    guard = Guard(patience)
    for name in sequence:
        guard.look(Verdict(name, ""))
    return guard.verdict.name


def test_guard_waits_for_patience() -> None:
    assert look("collapsed") == look("collapsed", "collapsed") == "healthy"
    assert look("collapsed", "collapsed", "collapsed") == "collapsed"
    assert look("collapsed", "collapsed", "healthy", "collapsed", "collapsed") == "healthy"
    assert look("collapsed", "partial", "collapsed") == look("partial", "partial", "collapsed") == "collapsed"
    assert look("collapsed", "collapsed", "partial") == "partial"
    assert look("partial", "collapsed", "collapsed", "collapsed") == "collapsed"
    assert look("diverged") == "diverged"
    assert look("collapsed", patience=1) == "collapsed"


def test_guard_over_every_short_history() -> None:
    """The standing verdict is the latest that is healthy, diverged, or the third unhealthy one in a row."""
    kinds: tuple[Name, ...] = ("healthy", "partial", "collapsed", "diverged")
    for history in itertools.product(kinds, repeat=5):
        standing: Name = "healthy"
        for end in range(1, 6):
            newest = history[end - 1]
            if newest in ("healthy", "diverged") or (end >= 3 and "healthy" not in history[end - 3 : end]):
                standing = newest
        assert look(*history) == standing, history


def test_the_guard_suspects_until_it_is_sure() -> None:
    bad, good = judge(-1.0, 0.0), judge(-0.9, 1.0)
    guard = Guard(patience=3)
    assert not guard.suspects
    guard.look(bad)
    assert guard.suspects and guard.verdict.name == "healthy"
    guard.look(good)
    assert not guard.suspects
    for _ in range(3):
        guard.look(bad)
    assert not guard.suspects and guard.verdict.name == "collapsed"
