"""Measurements before the first step: precision, number of threads and whether to compile."""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from simsiam import ranks
from simsiam.compute import Compute, Pace, generator, out_of_memory, probe_precision, set_threads, wait
from simsiam.config import UserError
from simsiam.data.loader import Batch, Loader
from simsiam.data.views import random_views
from simsiam.defaults import Facts, Reasons, default_epochs
from simsiam.heads import Siamese
from simsiam.recipe import Recipe
from simsiam.step import Step

_FEW = 64
"""Images for choosing a precision: a whole batch in float32 would determine the memory use of the whole run."""

_STEPS = 8
"""Steps timed on a GPU: three launched kernel by kernel, one that is captured, and the rest as in the run."""
_WORTH_COMPILING = 300.0
"""Shortest run, in seconds, that is compiled. Compiling took 18 s for a ResNet-18 and 38 s for a ResNet-50, and saves a
fifth to a quarter of the time."""


@dataclass(frozen=True)
class Probed:
    """The results of the measurements."""

    precision: Literal["bf16", "fp32"]
    step_seconds: float
    why: str
    """The reason for the precision."""
    threads: int
    full: int
    """Threads to use if nothing else runs; `threads` is half of them if that was faster."""
    full_seconds: float = 0.0
    half_seconds: float = 0.0
    """Step time on all and on half of the threads; 0 if not measured."""
    compiles: bool = False
    why_compiled: str = ""

    def pace(self, recipe: Recipe) -> Pace | None:
        """Return the monitor of the run's threads; None if half of them were not tried."""
        if not self.half_seconds:
            return None
        adapts = recipe.train.epochs is None and recipe.train.threads is None
        return Pace(self.full, self.threads, self.full_seconds, self.half_seconds, adapts)


def probe(
    method: Siamese,
    recipe: Recipe,
    loader: Loader,
    device: torch.device,
    facts: Facts,
    say: Callable[[str], None],
    resumed: bool = False,
) -> Probed:
    """Choose precision, threads and, on a GPU, whether to compile, by measuring.

    The method is left unchanged, and torch with all threads.

    Args:
        say: called before slow work.
        resumed: the recipe's `train.compile` was settled when the run began, perhaps on another machine: if this one
            cannot compile, the run continues uncompiled.

    Raises UserError if the user asks to compile an encoder that cannot be compiled.
    """
    copied = copy.deepcopy(method)
    batch = next(iter(loader.epoch(0)))
    seconds: dict[str, float] = {}

    def step(compute: Compute, images: int | None = None) -> None:
        compute.place(copied)
        start = time.perf_counter()
        draws = generator(device, recipe.seed)
        sizes = None if batch.sizes is None else batch.sizes[:images]
        views = random_views(batch.images[:images], recipe.views.each(), draws, sizes)
        with compute.autocast():
            loss, _ = copied(list(views), batch.index[:images])
        loss.backward()
        wait(device)
        taken = time.perf_counter() - start
        seconds[compute.precision] = min(taken, seconds.get(compute.precision, taken))

    full = set_threads(recipe.train.threads)
    # Half of the threads first: if another program uses the cores, all of them may take a minute instead of a second.
    # Not with several ranks: they wait for one another in every step, so all need the same number.
    halves = device.type == "cpu" and full > 1 and "OMP_NUM_THREADS" not in os.environ and not ranks.is_distributed()
    if halves:
        torch.set_num_threads(full // 2)
    wanted = recipe.train.precision
    precision, why = probe_precision(device, partial(step, images=_FEW)) if wanted == "auto" else (wanted, "asked for")
    compute = Compute(device, precision)
    if device.type == "cuda" and not ranks.is_distributed():
        length = partial(_length, recipe, loader.steps_per_epoch, facts)
        found = Probed(precision, 0.0, why, full, full)
        return _probe_gpu(copied, recipe, batch, compute, found, length, say, resumed)
    seconds.clear()  # these were measured on few images
    for _ in range(3):
        step(compute)
    half_seconds, compiles = seconds[precision], False
    if recipe.train.compile:
        fused = Step(copied, None, recipe.views.each(), compute, compiles=True)
        _, refused = _compiled(lambda: float(fused(batch, recipe.seed)[0]), not resumed, say)
        compiles = not refused
    if not halves:
        return Probed(precision, half_seconds, why, full, full, compiles=compiles)
    torch.set_num_threads(full)
    del seconds[precision]
    step(compute)
    if seconds[precision] < 2 * half_seconds:
        step(compute)
    full_seconds = seconds[precision]
    threads = full if recipe.train.threads or full_seconds < 1.2 * half_seconds else full // 2
    return Probed(precision, min(half_seconds, full_seconds), why, threads, full, full_seconds, half_seconds, compiles)


def _probe_gpu(
    method: Siamese,
    recipe: Recipe,
    batch: Batch,
    compute: Compute,
    found: Probed,
    length: Callable[[float], float],
    say: Callable[[str], None],
    resumed: bool = False,
) -> Probed:
    """Return `found` with the step time and whether to compile. length: seconds per step -> seconds of the run."""
    compute.place(method)
    asked = recipe.train.compile
    plain = 0.0 if asked and not resumed else _step_seconds(method, recipe, batch, compute, False)
    found = replace(found, step_seconds=plain)
    if asked is False or (asked is None and length(plain) < _WORTH_COMPILING):
        return found
    work = partial(_step_seconds, method, recipe, batch, compute, True)
    fused, refused = _compiled(work, bool(asked) and not resumed, say)
    if refused or not (asked or fused < 0.95 * plain):
        return replace(found, why_compiled=refused or "measured no faster here")
    faster = "asked for" if asked else f"measured {plain / fused:.2f}x faster here"
    return replace(found, step_seconds=fused, compiles=True, why_compiled=faster)


def _compiled(work: Callable[[], float], asked: bool, say: Callable[[str], None]) -> tuple[float, str]:
    """Return what `work` returns and "", or 0 and why compiling failed. Raises UserError in that case if `asked`."""
    say("Compiling the encoder, which takes up to a minute the first time.")
    try:
        return work(), ""
    except Exception as error:  # many kinds: no C compiler, a backbone that torch cannot trace, ...
        if asked and out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"cannot be compiled here ({lines[0][:100]})"
        if asked:
            raise UserError(f"train.compile: this encoder {reason}. Remove that setting.") from None
    _free()
    return 0.0, reason


def _step_seconds(method: Siamese, recipe: Recipe, batch: Batch, compute: Compute, compiles: bool) -> float:
    """Return the fastest of a few steps on a GPU; the weights are left unchanged."""
    step = Step(method, None, recipe.views.each(), compute, compiles=compiles)
    times = []
    for number in range(_STEPS):
        wait(compute.device)
        start = time.perf_counter()
        step(batch, recipe.seed, number)
        wait(compute.device)
        times.append(time.perf_counter() - start)
    method.zero_grad(set_to_none=True)
    del step
    _free()
    return min(times)


def _free() -> None:
    gc.collect()  # a step and its graphs refer to each other; the next step needs their memory
    torch.cuda.empty_cache()


def _length(recipe: Recipe, steps_per_epoch: int, facts: Facts, step_seconds: float) -> float:
    """Estimate the duration of a run in seconds."""
    if recipe.train.seconds is not None:
        return recipe.train.seconds
    epochs = recipe.train.epochs
    if epochs is None:
        epochs, _ = default_epochs(facts, step_seconds * steps_per_epoch)
    return epochs * steps_per_epoch * step_seconds


def settle(recipe: Recipe, probed: Probed, facts: Facts, steps_per_epoch: int) -> tuple[Recipe, Reasons]:
    """Return the recipe with the measured settings, and the reason for each: precision, threads, compilation, and
    epochs if no length was asked for."""
    reasons: Reasons = [("train.precision", probed.precision, probed.why)]
    if probed.threads < probed.full:
        reasons.append(
            ("train.threads", str(probed.threads), f"faster than {probed.full}: other programs use the cores")
        )
    if probed.why_compiled:
        reasons.append(("train.compile", "true" if probed.compiles else "false", probed.why_compiled))
    compiles = recipe.train.compile
    if facts.device == "cuda":  # kept in the recipe: a resumed run does not decide again
        compiles = probed.compiles or bool(compiles)
    train = replace(recipe.train, precision=probed.precision, compile=compiles)
    if train.epochs is None and train.budget is None:
        epochs, why = default_epochs(facts, probed.step_seconds * steps_per_epoch)
        reasons.append(("train.epochs", f"{epochs:g}", why))
        train = replace(train, epochs=epochs)
    if probed.half_seconds and train.epochs is not None:  # exact resumption needs the same number of threads
        train = replace(train, threads=probed.threads)
    return replace(recipe, train=train), reasons
