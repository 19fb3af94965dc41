"""Linear classifier on the frozen features.

`score` is multinomial logistic regression, solved to the optimum; `sgd_probe` is the paper's protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.compute import generator
from simsiam.evaluate import Labelled, check_finite, sample_rows
from simsiam.optim import LARS, learning_rate

NEEDS_LABELS = True
BY_KIND = ("C",)
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Values of C that `score` tries, from the strongest penalty to the weakest."""
_PART = 1 << 22
"""Values, one per row and class, that `fit` holds at a time: all of them can take more memory than the features."""


def score(features: Labelled, *, seed: int = 0, C: float | None = None, tune_rows: int = 10_000) -> dict[str, Any]:
    """Return the top-1 accuracy of logistic regression on standardised features.

    C, the inverse strength of the L2 penalty as in scikit-learn, is the best of `STRENGTHS` on a random 80/20 split of
    at most `tune_rows` training rows; the test rows are not used. The final fit uses all training rows.
    """
    train, test = standardise(features.train, features.test)
    labels = features.train_labels
    if C is None:
        chosen = sample_rows(len(train), tune_rows, generator(torch.device("cpu"), seed, 0)).to(train.device)
        C = _choose(train[chosen], labels[chosen], features.classes, seed)
    value = accuracy(fit(train, labels, features.classes, C), test, features.test_labels)
    return {"value": round(float(value), 2), "C": C, "train": len(train), "test": len(test)}


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise every channel by the training rows' mean and std, then scale rows to length about 1, so that a
    penalty means the same at every width. A channel that is constant up to rounding becomes 0."""
    train, test = train.float(), test.float()
    mean, std = train.mean(0), train.std(0, correction=0)
    varies = std > (1e-5 * mean.abs()).clamp(min=1e-30)
    scale = torch.where(varies, 1 / std, 0.0) / train.shape[1] ** 0.5
    return train.sub(mean).mul_(scale), test.sub(mean).mul_(scale)


def fit(x: Tensor, labels: Tensor, classes: int, C: float, start: Tensor | None = None, steps: int = 200) -> Tensor:
    """Minimise |W|^2 / (2 C) + sum of cross-entropies, with an unpenalised intercept, by L-BFGS.

    Args:
        x: float32 [...,n,D]; leading dimensions are separate problems, solved together.
        labels: int64 [...,n].
        start: a nearby solution, in the format of the result.
    Returns:
        float32 [...,classes,D+1]: weights, then the intercept.
    """
    n, penalty = x.shape[-2], 1 / (C * x.shape[-2])
    rows = max(1, _PART // (classes * x.shape[:-2].numel()))
    parts = list(zip(x.split(rows, -2), labels[..., None].split(rows, -2), strict=True))
    theta = x.new_zeros(*x.shape[:-2], classes, x.shape[-1] + 1) if start is None else start.clone()
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=steps,
        tolerance_grad=1e-8,  # of the mean loss: it shrinks as classes and channels grow
        tolerance_change=1e-8,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        weight, gradient = theta[..., :-1], torch.zeros_like(theta)
        # In float64: near the optimum the line search compares losses that are equal in float32.
        cross_entropy = x.new_zeros((), dtype=torch.float64)
        # By hand: autograd would multiply x^T by the residual, four times slower than residual^T by x.
        for part, right in parts:
            log_p = F.log_softmax(_logits(theta, part), dim=-1)
            cross_entropy -= log_p.gather(-1, right).double().sum()
            residual = log_p.exp_()
            residual.scatter_(-1, right, residual.gather(-1, right) - 1)
            gradient[..., :-1] += residual.mT @ part
            gradient[..., -1] += residual.sum(-2)
        theta.grad = gradient.div_(n)
        theta.grad[..., :-1] += penalty * weight
        return float(cross_entropy / n + penalty / 2 * weight.double().square().sum())

    optimiser.step(closure)
    return theta.detach()


def accuracy(theta: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Return the percentage of the rows x [M,D] that each solution [...,classes,D+1] classifies correctly: [...]."""
    return (_logits(theta, x).argmax(-1) == labels).double().mean(-1) * 100


def _logits(theta: Tensor, x: Tensor) -> Tensor:
    return (x @ theta[..., :-1].mT).add_(theta[..., -1:].mT)


def _choose(x: Tensor, labels: Tensor, classes: int, seed: int) -> float:
    order = torch.randperm(len(x), generator=generator(torch.device("cpu"), seed, 1)).to(x.device)
    held_out, kept = order[: len(x) // 5], order[len(x) // 5 :]
    if not len(held_out):
        return 1.0
    best, value, theta = 1.0, (-1.0, 0.0), None
    for C in STRENGTHS:
        theta = fit(x[kept], labels[kept], classes, C, theta)
        loss = F.cross_entropy(_logits(theta, x[held_out]), labels[held_out])
        now = float(accuracy(theta, x[held_out], labels[held_out])), -float(loss)
        if now > value:  # with few rows ties are common; the loss breaks them
            best, value = C, now
        # Down by more than one standard error: weaker penalties would be no better, and they are the slow ones.
        if now[0] < value[0] - 50 / len(held_out) ** 0.5:
            break
    return best


def sgd_probe(
    views_of_epoch: Callable[[int], Tensor],
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    epochs: int = 90,
    batch_size: int = 4096,
    lr: float = 0.1,
) -> dict[str, Any]:
    """Train by the paper's linear protocol (appendix A; lr as in the released code); the value is the last epoch's.

    LARS (apex's LARC) on frozen features, cosine decay per epoch, no weight decay, no normalisation. It was designed
    for ImageNet: LARS moves the weights by a small share of their size, so with few steps (fewer than about 20,000 rows
    at these settings) they stay near their initial values.

    Args:
        views_of_epoch: epoch -> float [N,D], the pooled features of that epoch's random crops and flips, rows in the
            order of `labels`; the same tensor every time is the cheap variant.
        labels, test_labels: int64 [N] and [M]; rows labelled -1 are left out.
        test: float [M,D], features of the plain test view.
        batch_size: at most N.
        lr: per 256 samples; the rate is lr * batch_size / 256.

    Raises UserError if a feature is not finite.
    """
    device, known = test.device, labels >= 0
    labels = labels[known].to(device)
    test, test_labels = test[test_labels >= 0].float(), test_labels[test_labels >= 0].to(device)
    check_finite(test)
    assert len(labels) and len(test)
    batch_size = min(batch_size, len(labels))
    weight = torch.empty(classes, test.shape[1]).normal_(0, 0.01, generator=generator(torch.device("cpu"), seed))
    weight, bias = weight.to(device).requires_grad_(), torch.zeros(classes, device=device, requires_grad=True)
    optimiser = LARS([weight, bias], lr=0.0, vectors=True)
    for epoch in range(epochs):
        x = views_of_epoch(epoch)[known.to(device)].to(device, torch.float32)
        check_finite(x)
        optimiser.param_groups[0]["lr"] = learning_rate(epoch / epochs, lr * batch_size / 256)
        order = torch.randperm(len(x), generator=generator(torch.device("cpu"), seed, epoch)).to(device)
        for rows in order.split(batch_size):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(x[rows], weight, bias), labels[rows]).backward()
            optimiser.step()
    value = float(accuracy(torch.cat([weight, bias[:, None]], 1).detach(), test, test_labels))
    settings = {"optimiser": "lars", "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": 0.0}
    return {"value": round(value, 2), **settings, "train": len(labels), "test": len(test)}
