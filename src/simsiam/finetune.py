"""Fine-tuning: the whole network is trained on a share of the labels, starting from self-supervised weights.

The semi-supervised protocol of SimCLR (arXiv 2002.05709, appendix B.5): random crops and flips, SGD with Nesterov
momentum, no weight decay. Differences: the learning rate is chosen on a part of the labels and decays along a cosine,
and crops cover at least a fifth of the area.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from simsiam.compute import Compute, generator, repeatable, seed_of
from simsiam.config import UserError
from simsiam.data.cache import Cache
from simsiam.data.views import random_view
from simsiam.encoders import Encoder
from simsiam.evaluate import labelled_rows
from simsiam.features import Preprocessing, embed_rows
from simsiam.optim import learning_rate

RATES = (0.05, 0.5)
"""Base learning rates (per 256 images) to try: which is better depends on the data more than on the weights."""
_BATCH = 64
_EPOCHS, _FEWEST_STEPS = 30, 400
_FEWEST_LABELS = 5

Rows = NDArray[np.int64]
Done = Callable[[float], None]


def finetune(
    encoder: Encoder,
    prepare: Preprocessing,
    cache: Cache,
    train: Rows,
    test: Rows,
    compute: Compute,
    *,
    share: float = 0.1,
    epochs: int | None = None,
    seed: int = 0,
    done: Done = lambda part: None,
) -> dict[str, Any] | None:
    """Return the top-1 accuracy, in percent, on the labelled rows of `test` after training on a share of `train`'s.

    The encoder itself is not changed. The rows are a function of the seed and the labels, so they are the same for
    every encoder. The learning rate is the one of `RATES` that is best on a fifth of the rows after training on the
    rest; the final training uses all of them.

    Args:
        share: of each class's labelled images, in (0, 1]; at least 5 per class, if there are as many.
        epochs: None: 30, or more if needed for 400 steps.
        done: called with the completed share of the work, in [0, 1].

    Returns {"value", "share", "lr", "epochs", "batch_size", "train", "test"}; None if fewer than two classes have
    labels or `test` has none.
    """
    check_share(share)
    labels, known = cache.labels, labelled_rows(cache.labels, train, test)
    if labels is None or known is None:
        return None
    test = known
    kept, held_out = choose(labels, train, share, seed)
    rows = np.concatenate([kept, held_out])
    batch_size = min(_BATCH, len(kept))
    if epochs is None:
        epochs = max(_EPOCHS, math.ceil(_FEWEST_STEPS / (len(rows) // batch_size)))
    tried = RATES if len(held_out) and len(RATES) > 1 else ()
    passes = len(rows) + len(tried) * len(kept)
    before = 0.0

    def accuracy(part: Rows, lr: float, judged: Rows) -> float:
        nonlocal before
        start, weight = before, len(part) / passes
        before += weight
        with repeatable(compute.device):
            network = fit(
                encoder, prepare, cache, part, compute, lr, epochs, batch_size, seed, lambda p: done(start + weight * p)
            )
        backbone, head = network
        h = embed_rows(backbone, prepare, cache, judged, compute)
        with torch.inference_mode():
            scores = head.cpu()(h)  # in float32: in bf16 two classes would often be equal
        return float((scores.argmax(1).numpy() == labels[judged]).mean() * 100)

    lr = max(tried, key=lambda rate: accuracy(kept, rate, held_out)) if tried else RATES[0]
    value = accuracy(rows, lr, test)
    settings = {"share": share, "lr": lr, "epochs": epochs, "batch_size": batch_size}
    return {"value": round(value, 2), **settings, "train": len(rows), "test": len(test)}


def check_share(share: float) -> None:
    """Raise UserError if the share of the labels is not in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"The share of the labels to fine-tune on is {share:g}: it must be above 0 and at most 1.")


def choose(labels: NDArray[np.int64], train: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Draw the share of each class's labelled rows in `train`, at least 5. Returns four fifths of them to train on, and
    a fifth to choose the learning rate on."""
    draws = np.random.default_rng([seed, 0xF17E])
    kept, held_out = [], []
    known = train[labels[train] >= 0]
    known = known[np.argsort(labels[known], kind="stable")]
    for members in np.split(known, np.flatnonzero(np.diff(labels[known])) + 1):
        members = draws.permutation(members)
        members = members[: max(round(share * len(members)), _FEWEST_LABELS)]
        kept.append(members[len(members) // 5 :])
        held_out.append(members[: len(members) // 5])
    return np.concatenate(kept), np.concatenate(held_out)


def fit(
    encoder: Encoder,
    prepare: Preprocessing,
    cache: Cache,
    rows: Rows,
    compute: Compute,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    done: Done,
) -> nn.Sequential:
    """Return a copy of the encoder, and a linear classifier, trained on the rows, in eval mode; depends on `seed`."""
    assert cache.labels is not None and cache.classes is not None
    head = nn.Linear(encoder.dim, len(cache.classes))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(copy.deepcopy(encoder), head)
    compute.place(network).train()
    views = prepare.crops((0.2, 1.0))
    peak = lr * batch_size / 256
    optimiser = torch.optim.SGD(network.parameters(), lr=peak, momentum=0.9, nesterov=True)
    steps = len(rows) // batch_size
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        for step in range(steps):
            part = order[step * batch_size : (step + 1) * batch_size]
            packed, sizes = cache.packed(part)
            draws = generator(compute.device, seed, epoch, step)
            x = random_view(packed.to(compute.device), views, draws, sizes.to(compute.device))
            optimiser.param_groups[0]["lr"] = learning_rate((epoch + step / steps) / epochs, peak)
            optimiser.zero_grad()
            torch.manual_seed(seed_of(seed, epoch, step, -1))  # for dropout
            with compute.autocast():
                scores = network(x)
            F.cross_entropy(scores.float(), torch.from_numpy(cache.labels[part]).to(compute.device)).backward()
            optimiser.step()
        done((epoch + 1) / epochs)
    network.eval()
    return network
