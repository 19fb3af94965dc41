"""A few steps before the first one: precision and threads, by measuring."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from simsiam import ranks
from simsiam.compute import Compute, Pace, generator, probe_precision, set_threads
from simsiam.data.loader import Loader
from simsiam.data.views import random_view
from simsiam.recipe import Facts, Reasons, Recipe, default_epochs

_FEW = 64
"""Images that the choice of a precision takes: all of a batch in float32 would set the memory of the whole run."""


@dataclass(frozen=True)
class Probed:
    """What a few steps at the start have shown."""

    precision: Literal["bf16", "fp32"]
    step_seconds: float
    why: str
    """The reason for the precision."""
    threads: int
    full: int
    """Threads where nothing else runs; `threads` is half of them where that was faster."""
    full_seconds: float = 0.0
    half_seconds: float = 0.0
    """A step on all and on half of them; 0 where that was not tried."""

    def pace(self, recipe: Recipe) -> Pace | None:
        """What watches the threads of the run; None where half of them were not tried."""
        if not self.half_seconds:
            return None
        adapts = recipe.train.epochs is None and recipe.train.threads is None
        return Pace(self.full, self.threads, self.full_seconds, self.half_seconds, adapts)


def probe(method: torch.nn.Module, recipe: Recipe, loader: Loader, device: torch.device) -> Probed:
    """Picks precision and threads by measuring. The method is left as it was; torch has all threads."""
    copied = copy.deepcopy(method)
    batch = next(iter(loader.epoch(0)))
    seconds: dict[str, float] = {}

    def step(compute: Compute, images: int | None = None) -> None:
        compute.place(copied)
        start = time.perf_counter()
        draws = generator(device, recipe.seed)
        sizes = None if batch.sizes is None else batch.sizes[:images]
        views = [random_view(batch.images[:images], view, draws, sizes) for view in recipe.views.each()]
        with compute.autocast():
            loss, _ = copied(views, batch.index[:images])
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        seconds[compute.precision] = min(taken, seconds.get(compute.precision, taken))

    full = set_threads(recipe.train.threads)
    # Half of the threads first: beside another program, all of them may take a minute for what takes a second.
    # Not with several ranks: they wait for one another in a step, so all have to take as many.
    halves = device.type == "cpu" and full > 1 and "OMP_NUM_THREADS" not in os.environ and not ranks.several()
    if halves:
        torch.set_num_threads(full // 2)
    wanted = recipe.train.precision
    precision, why = probe_precision(device, partial(step, images=_FEW)) if wanted == "auto" else (wanted, "asked for")
    compute = Compute(device, precision)
    seconds.clear()  # of few images
    for _ in range(3):
        step(compute)
    half_seconds = seconds[precision]
    if not halves:
        return Probed(precision, half_seconds, why, full, full)
    torch.set_num_threads(full)
    del seconds[precision]
    step(compute)
    if seconds[precision] < 2 * half_seconds:
        step(compute)
    full_seconds = seconds[precision]
    threads = full if recipe.train.threads or full_seconds < 1.2 * half_seconds else full // 2
    return Probed(precision, min(half_seconds, full_seconds), why, threads, full, full_seconds, half_seconds)


def settle(recipe: Recipe, probed: Probed, facts: Facts, steps_per_epoch: int) -> tuple[Recipe, Reasons]:
    """The recipe with what only measuring could tell, and the reason for each: precision, threads, and the epochs where
    nobody asked for a length."""
    reasons: Reasons = [("train.precision", probed.precision, probed.why)]
    if probed.threads < probed.full:
        reasons.append(("train.threads", str(probed.threads), f"faster than {probed.full}: others use the cores"))
    train = replace(recipe.train, precision=probed.precision)
    if train.epochs is None and train.budget is None:
        epochs, why = default_epochs(facts, probed.step_seconds * steps_per_epoch)
        reasons.append(("train.epochs", f"{epochs:g}", why))
        train = replace(train, epochs=epochs)
    if probed.half_seconds and train.epochs is not None:  # same weights after a resume: the same threads
        train = replace(train, threads=probed.threads)
    return replace(recipe, train=train), reasons
