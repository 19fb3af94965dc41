"""Detect collapse and identify its kind.

A Siamese network can fail in three ways, all with chance-level accuracy (paper, section 4.1, footnote 4):

* complete collapse: every image gets the same output. The loss is at its minimum AND the std of z/|z| is 0. If z ends
  in BN, as in SimSiam, it looks different: BN gives every channel of a batch unit variance, so all images but one or a
  few get one output, and those few its opposite. The std then falls to about 2/sqrt(B), and z has a single direction.
* partial (dimensional) collapse: outputs differ, but only along a few directions. The std looks healthy; the spectrum
  of the embeddings does not (arXiv 2209.15007).
* divergence: the loss or the output is not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Name = Literal["healthy", "partial", "collapsed", "diverged"]

COLLAPSED_STD = 0.1
"""Complete collapse: std of z/|z| times sqrt(d) below this. A healthy run stays near 1."""
COLLAPSED_RANK = 1.5
"""Complete collapse: effective rank of z, on held-out images, below this. z/|z| then takes only two values."""
PARTIAL_SHARE = 0.02
"""Partial collapse: effective rank of z, on held-out images, below this share of min(N-1,d). Healthy runs on the demo
set and on CIFAR-10 stay above 0.04 (d = 512); without stop-gradient or predictor they fall below 0.015 within a
minute."""


def normalised_std(z: Tensor) -> Tensor:
    """Std over the batch of z/|z|, mean over the d channels, times sqrt(d) (paper, fig. 2, middle).

    z: float [B,d]. Returns a scalar: 1 for outputs spread over the sphere, 0 for a constant output.
    """
    return F.normalize(z.float(), dim=1).std(0).mean() * math.sqrt(z.shape[1])


@torch.no_grad()
def spread(*z: Tensor) -> Tensor:
    """Mean `normalised_std` over the views' z: the "std" in a method's stats."""
    return torch.stack([normalised_std(each) for each in z]).mean()


def spectrum(z: Tensor) -> Tensor:
    """Singular values of the centred embeddings, in descending order: float [N,d] -> float [min(N,d)]."""
    z = z.float()
    return torch.linalg.svdvals(z - z.mean(0))


def effective_rank(z: Tensor) -> float:
    """exp of the entropy of the normalised spectrum: the number of directions in use, in 1..min(N-1,d).

    Source: Roy & Vetterli 2007; as a monitor, RankMe (arXiv 2210.02885). 0 for a constant or non-finite output.
    """
    if not torch.isfinite(z).all():
        return 0.0
    values = spectrum(z).double()
    total = values.sum()
    if total <= 1e-5 * z.float().norm():  # a constant leaves only the rounding error of its mean
        return 0.0
    share = values / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean cosine similarity of the two views of each image, [N,d] each: 1 if they agree."""
    return float(F.cosine_similarity(first.float(), second.float(), dim=1).mean())


def retrieval(first: Tensor, second: Tensor) -> float:
    """Percent of images whose own second view is the nearest of all N second views; chance is 100/N."""
    first, second = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    similarity = first @ second.T
    own = similarity.diagonal()[:, None]
    # Ties count as misses: a constant output must score at chance or below, not 100.
    return float(((similarity >= own).sum(1) == 1).float().mean() * 100)


@dataclass(frozen=True)
class Verdict:
    """A diagnosis, the figures behind it, and what to try."""

    name: Name
    evidence: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}" + (f" {self.advice}" if self.advice else "")


TOO_SHORT = "the run was too short to tell."
"""Evidence when nothing has been measured yet, or not enough to call it a collapse."""
_PARTS = "SimSiam needs method.stop_gradient and method.predictor; with these, or with another method,"
TOO_FEW = "there are too few images to tell more."
"""End of the evidence when a rank is meaningless: with fewer than five images."""


def suspicious(std: float, count: int) -> bool:
    """Whether a std this low over `count` images may be a collapse under BN: one output against the rest has
    2/sqrt(count). A z with a large mean and many directions can have it too; only the rank distinguishes them."""
    return std < min(2.2 / math.sqrt(count), 0.3)


def judge(
    loss: float,
    std: float,
    rank: float | None = None,
    std_features: float | None = None,
    most: int = 0,
) -> Verdict:
    """Return the verdict on one set of figures.

    Args:
        loss: the training loss; the minimum of SimSiam's is -1.
        std: `normalised_std` of z.
        rank: effective rank of z on held-out images, if measured.
        std_features: `normalised_std` of the backbone's features, if measured.
        most: min(N-1,d), the largest measurable rank; below 4 the rank is ignored. 0: unknown.
    """
    few = 0 < most < 4
    if few:
        rank = None
    if not math.isfinite(loss) or not math.isfinite(std):
        return Verdict(
            "diverged",
            f"the loss is {loss}, the std {std}.",
            "Lower train.lr, or train with --precision fp32.",
        )
    line = rank is not None and rank < COLLAPSED_RANK
    if std < COLLAPSED_STD or line:
        seen = f", effective rank {rank:.1f}" if rank is not None and line else ""
        same = (
            "every image gets one of two opposite outputs"
            if line
            else "all images, or all but a few, get nearly the same output"
        )
        return Verdict(
            "collapsed",
            f"std of z/|z| times sqrt(d) is {std:.3f} (healthy: about 1){seen}, loss {loss:.3f}: {same}.",
            f"{_PARTS} lower train.lr or raise train.batch_size.",
        )
    if rank is not None and rank < max(2.0, PARTIAL_SHARE * most):
        return Verdict(
            "partial",
            f"std is {std:.2f}, but z uses only {rank:.1f} directions (effective rank), loss {loss:.3f}.",
            f"{_PARTS} lower train.lr or strengthen the views.",
        )
    if few:
        return Verdict("healthy", f"std {std:.2f} (times sqrt(d)); {TOO_FEW}")
    features = "" if std_features is None else f", features {std_features:.2f}"
    ranked = "" if rank is None else f", effective rank {rank:.1f}"
    return Verdict("healthy", f"std {std:.2f} (times sqrt(d)){features}{ranked}.")


@dataclass
class Guard:
    """Watches a run. Only divergence or `patience` bad verdicts in a row count: a healthy run may dip once, early."""

    patience: int = 3
    verdict: Verdict = field(default_factory=lambda: Verdict("healthy", TOO_SHORT))
    _bad: int = 0
    """Number of consecutive bad verdicts up to the newest."""

    @property
    def suspects(self) -> bool:
        """Whether the newest verdict was bad, but too few in a row were to count."""
        return self._bad > 0 and self.verdict.name == "healthy"

    def look(self, verdict: Verdict) -> Verdict:
        """Take the newest single verdict and return the standing one."""
        self._bad = 0 if verdict.name == "healthy" else self._bad + 1
        if self._bad == 0 or self._bad >= self.patience or verdict.name == "diverged":
            self.verdict = verdict
        return self.verdict
