"""Training: from a data set to a run folder. `fit` is the loop."""

from __future__ import annotations

import contextlib
import functools
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsiam import evaluate, kernels, methods, ranks
from simsiam.assess import Rows, Subject, features_by_kind, keep_samples
from simsiam.compute import (
    Compute,
    describe,
    draw,
    enough_memory,
    generator,
    pick_device,
    repeatable,
    seed_of,
    set_threads,
)
from simsiam.config import Interrupted, Table, UserError, as_path, counted, read_recipe, show_duration, write_recipe
from simsiam.console import Listener
from simsiam.data.cache import Cache, build_cache, open_cache
from simsiam.data.imageset import ImageSet
from simsiam.data.loader import Loader
from simsiam.data.sources import open_images
from simsiam.data.views import random_views
from simsiam.defaults import Facts, Reasons, check_settings, look_at, resolve
from simsiam.encoders import Encoder, build, check_sizes
from simsiam.features import BN_IMAGES, untrained
from simsiam.heads import Siamese
from simsiam.monitor import FEWEST, Monitor
from simsiam.optim import LARS
from simsiam.probe import probe, settle
from simsiam.recipe import OPEN, Recipe, gather, read
from simsiam.runs import (
    ENVIRONMENT,
    HEALTHY,
    LAST,
    RECIPE,
    SUMMARY,
    Checkpoints,
    check_place,
    check_unused,
    claim,
    made,
    read_json,
    read_kept,
    resumable,
    write_json,
    write_text,
)
from simsiam.session import Session, check_images, finite, method_tensors, signals
from simsiam.step import Step
from simsiam.weights import read_encoder, save_encoder

_SWEEP_SHARE = 0.1
_BANK, _QUERIES = 12_000, 2_000
"""Bank and queries of the final kNN; `simsiam evaluate` uses all. For CIFAR-10, k stays the same (`knn.usual_k`)."""


def train(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    method: str | None = None,
    encoder: str | None = None,
    epochs: float | None = None,
    budget: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    size: int | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train an encoder on unlabelled images.

    Args:
        data: anything `open_images` accepts; None for the recipe's, or the bundled demo set.
        out: the run folder; None for a new one under `runs/`.
        method, encoder: names, as listed by `simsiam list`.
        epochs: passes over the images.
        budget: training time, e.g. "10m"; the schedule follows the clock.
        batch_size: images per step.
        seed: with `epochs` on a CPU, the same seed gives the same weights.
        size: side of the views, and of images at inference, in pixels.
        recipe: name of a built-in recipe or path of a TOML file.
        overrides: settings as strings, e.g. "train.lr=0.1".
        resume: continue the run in `out`, with `epochs` on a CPU to the same weights as if it had never stopped. `data`
            may then give the new path of its images.
        settings: any other setting by name, or a table of them: lr=0.1, init="runs/before", views={"size": 32}, ...

    Arguments left as None come from the recipe, or are derived from the data and the machine.

    Returns the run's summary: the keys of `train --json`.
    Raises UserError for user errors, before anything is overwritten. A signal (SIGINT, SIGTERM) saves the state and
    raises Interrupted.

    Under torchrun, every process calls this with the same arguments: they share each batch, and only rank 0 writes
    files and reports progress. `batch_size` is the total over all processes.
    """
    settings |= {"method": method, "encoder": encoder, "epochs": epochs, "budget": budget}
    settings |= {"batch_size": batch_size, "seed": seed, "size": size}
    threads = set_threads()
    advice = "choose a smaller --batch-size, --size or --encoder; `simsiam plan` shows what fits."
    try:
        fits = enough_memory(f"Not enough memory for this batch size: {advice}")
        with fits, ranks.process_group(pick_device(device)) as where, repeatable(where):
            heard = (listener if ranks.is_main() else None) or Listener()
            return _train(data, out, recipe, overrides, resume, where, workers, heard, settings)
    finally:
        torch.set_num_threads(threads)
        if listener is not None:
            listener.close()


def _train(
    data: str | Path | None,
    out: str | Path | None,
    recipe: str | None,
    overrides: Sequence[str],
    resume: bool,
    where: torch.device,
    workers: int | None,
    listener: Listener,
    settings: Table,
) -> dict[str, Any]:
    asked = gather(data, recipe, overrides, settings)
    given = None if out is None else as_path(out)
    resumed: Recipe | None = None
    if resume:
        run = resumable(given)
        ignored = recipe is not None or overrides or any(value is not None for value in settings.values())
        if ranks.is_main() and ignored:
            told = f"--resume takes its settings from {run / RECIPE}; the given ones are ignored."
            warnings.warn(told, stacklevel=3)
        finished = _finished(run, listener)
        if finished is not None:
            return finished
        ranks.from_main(lambda: claim(run).release())  # fail before reading images if another process is training there
        resumed = read({**read_recipe(run / RECIPE), **({} if data is None else {"data": asked["data"]})})
    else:
        if given is not None:
            check_unused(given)
        check_place(given)
        check_settings(asked, where.type)
    name = asked["data"] if resumed is None else resumed.data
    listener.say(f"Inspecting {name} ...")
    images = _opened(name, given if resume and data is None else None)
    rows, held_out = images.split()
    facts = look_at(images, rows, where.type, ranks.world_size())
    plan, reasons = (resumed, []) if resumed is not None else resolve(asked, facts)
    explicit = OPEN in asked or settings["batch_size"] is not None  # else it may be the recipe's
    wanted = asked.get("train", {}).get("batch_size") if explicit else None
    if resumed is not None:
        check_images(plan, run, images.fingerprint, len(rows))
    elif wanted is not None and plan.train.batch_size != wanted and ranks.is_main():
        told = f"There are only {counted(facts.images, 'image')} to train on: the batch size is {plan.train.batch_size}"
        warnings.warn(f"{told}, not {wanted}.", stacklevel=3)
    _check_parts(plan.train.batch_size)
    job = _Job(given, resume, resume and data is not None, plan, reasons, images, rows, held_out, facts)
    s, step_seconds = _session(job, where, workers, listener)
    try:
        _write_start(s, job)
        listener.plan(_facts(s, len(held_out), step_seconds), job.reasons)
        return _run(s, held_out)
    finally:
        s.close()


@dataclass
class _Job:
    """A run before it starts. `_session` settles what is measured on the machine."""

    out: Path | None
    resume: bool
    moved: bool
    """The run is resumed on the same images at a path that was given now."""
    plan: Recipe
    reasons: Reasons
    images: ImageSet
    rows: Rows
    held_out: Rows
    facts: Facts


def _finished(run: Path, listener: Listener) -> dict[str, Any] | None:
    """Return the summary of a run that has ended; None if it can be resumed. Raises UserError for an imported run."""
    if not (run / SUMMARY).exists():
        return None
    summary = read_json(run / SUMMARY)
    if "imported" in summary:
        again = f"simsiam train DATA --init {shlex.quote(str(run))}"
        raise UserError(f"{run} was imported and cannot be resumed. Start from it with: {again}")
    listener.say(
        f"{run} is finished: there is nothing to resume. To train on from its weights: "
        f"simsiam train DATA --init {shlex.quote(str(run))}"
    )
    return {**summary, "run": str(run)}  # it may have been moved


def _opened(name: str, resumed: Path | None) -> ImageSet:
    """Open the images; `resumed` is the run whose recipe names them."""
    try:
        return open_images(name)
    except UserError as error:
        if resumed is None:
            raise
        again = f"simsiam train DATA --resume -o {shlex.quote(str(resumed))}"
        raise UserError(f"{error} If it was moved, give its new path: {again}") from None


def _session(job: _Job, where: torch.device, workers: int | None, listener: Listener) -> tuple[Session, float]:
    """Build cache, method and optimiser, and settle precision, threads and compilation by measuring.

    Returns the session, whose run folder exists, and the seconds of a step.
    """
    plan, rows = job.plan, job.rows
    # First what may be refused: decoding may take hours.
    saved = job.resume and job.out is not None and Checkpoints(job.out).named(LAST) is not None
    method = build_method(plan, len(rows)) if saved else _initial(plan, len(rows), listener)
    # Decode everything first if all ranks must know which images are bad, if the method visits every image before
    # training, or if reading out of file order is many times slower.
    if ranks.is_distributed() or job.images.in_order or methods.get(plan.method).Method.sweeps:
        decoding = listener.decoding
        cache = ranks.main_first(lambda: build_cache(job.images, plan.short_side, workers=workers, progress=decoding))
        _check_alike(cache)
    else:
        cache = open_cache(job.images, plan.short_side, workers=workers)
    loader = Loader(cache, rows, plan.train.batch_size, where, plan.seed)
    own = probe(method, plan, loader, where, job.facts, listener.say, resumed=job.resume)
    probed = ranks.from_main(lambda: own)
    compute = Compute(where, probed.precision)
    torch.set_num_threads(probed.threads)
    if where.type == "cpu" and kernels.lacking():
        listener.say(
            f"Running without compiled kernels ({kernels.lacking()}): views and batch normalisation are slower."
        )
    if not job.resume:
        plan, more = settle(plan, probed, job.facts, loader.steps_per_epoch)
        job.reasons += more
    elif plan.train.compile and not probed.compiles:
        listener.say("This machine cannot compile the encoder: the run continues without compiling.")
        plan = replace(plan, train=replace(plan.train, compile=False))
    run = ranks.from_main(lambda: made(job.out, job.images.name, plan.method))
    compute.place(method)
    session = Session(
        run=run,
        recipe=plan,
        method=method,
        optimizer=optimizer(method, plan),
        schedule=plan.train.schedule(loader.steps_per_epoch),
        loader=loader,
        compute=compute,
        monitor=Monitor(cache, rows, job.held_out, plan.views, plan.prepare, compute, listener.decoding),
        listener=listener,
        pace=probed.pace(plan),
    )
    return session, probed.step_seconds


def _write_start(s: Session, job: _Job) -> None:
    """Lock the run folder, write the recipe and the environment into it, and load the last checkpoint of a resumed run."""
    ranks.from_main(lambda: s.claim(job.resume))
    if ranks.is_main() and not job.resume:
        write_text(s.run / RECIPE, write_recipe(s.recipe.table()))
    s.open(job.resume)
    if ranks.is_main():
        device = s.compute.device
        about: Table = {"device": str(device), "processes": ranks.world_size(), **_command()}
        if device.type == "cpu":
            about["kernels"] = kernels.compiled() is not None
        began = read_kept(s.run / ENVIRONMENT).get("command") if job.resume else None
        if began is not None:
            about["command"] = began
        write_json(s.run / ENVIRONMENT, {**describe(device), **about})
    if job.moved and ranks.is_main():
        write_text(s.run / RECIPE, write_recipe({**read_recipe(s.run / RECIPE), "data": s.recipe.data}))


def _run(s: Session, held_out: Rows) -> dict[str, Any]:
    """Train to the end and return the summary."""

    @functools.cache
    def before() -> Encoder:
        plan, cache = s.recipe, s.loader.cache
        some = draw(s.loader.rows, BN_IMAGES)
        return untrained(plan.encoder, plan.seed, plan.prepare, cache, some[cache.usable(some)], s.compute)

    try:
        with signals() as stopped:
            s.begin(before)
            fit(s, stopped)
        return ranks.from_main(lambda: _finish(s, before(), held_out))
    except UserError as error:  # e.g. a full disk: the run can be resumed once that is fixed
        if ranks.is_main():
            with contextlib.suppress(UserError):  # earlier checkpoints are intact
                s.save()
        saved = s.saved_step()
        kept = "" if saved is None else f" The run is saved up to step {saved:,}."
        raise UserError(f"{error}{kept} {_go_on(s)}") from error


def fit(s: Session, stopped: list[str]) -> None:
    """The training loop. Ends with the schedule or by the guard; a signal saves the state and raises Interrupted."""
    s.method.train()
    views, compiles = s.recipe.views.each(), bool(s.recipe.train.compile)
    step = Step(s.method, s.optimizer, views, s.compute, compiles=compiles, say=s.listener.say)
    per_epoch = s.loader.steps_per_epoch
    if s.step == 0 and s.method.sweeps:
        with torch.no_grad(), s.compute.autocast():
            s.method.before_training(_sweep(s, stopped))
        s.tick()
    while not (s.over or s.guard_stops):  # the latter: a resumed run that the guard had stopped
        epoch = s.step // per_epoch
        if s.step % per_epoch == 0:  # after a resume within an epoch, its effect is part of the state
            with torch.no_grad():
                s.method.before_epoch(epoch)
        for batch in s.loader.epoch(epoch, s.step % per_epoch):
            began = time.perf_counter()
            rate = s.schedule.rate(s.step, s.seconds)
            for group in s.optimizer.param_groups:
                group["lr"] = group.get("lr_scale", 1.0) * (s.schedule.peak if group.get("fixed_lr") else rate)
            loss, std = step(batch, s.recipe.seed, s.step)
            with torch.no_grad():
                s.method.after_step(s.schedule.progress(s.step, s.seconds))

            s.stepped(loss, std, time.perf_counter() - began)
            if ranks.is_main() and (s.due or stopped):
                s.flush(rate)
            guarded = s.agree(stopped)
            if stopped:
                if ranks.is_main():
                    s.save()
                raise Interrupted(f"{stopped[0]}: stopped at step {s.step:,}, everything is saved. {_go_on(s)}")
            if s.over or guarded:
                return


def _go_on(s: Session) -> str:
    again = f"torchrun --nproc-per-node {ranks.world_size()} -m simsiam" if ranks.is_distributed() else "simsiam"
    device = s.compute.device  # not part of the recipe
    usual = ranks.is_distributed() or device == pick_device()
    on = "" if usual else f" --device {device}"
    return f"Resume with: {again} train --resume -o {shlex.quote(str(s.run))}{on}"


def _sweep(s: Session, stopped: list[str]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield views of the images, in whole batches, before the first step; of a budget it takes a tenth at most. A signal
    ends it; nothing is saved."""
    settings = s.recipe.views.each()[:2]
    for number, batch in enumerate(s.loader.epoch(0)):
        s.tick()
        s.agree(stopped)
        if stopped:
            raise Interrupted(f"{stopped[0]}: stopped before the first step. {_go_on(s)}")
        if number and s.schedule.progress(0, s.seconds) > _SWEEP_SHARE:
            return
        draws = generator(s.compute.device, s.recipe.seed, -1, number, *ranks.rank_key())
        torch.manual_seed(seed_of(s.recipe.seed, -2, number, *ranks.rank_key()))  # for dropout, as in every step
        with torch.autocast(s.compute.device.type, enabled=False):  # the caller runs under autocast
            views = random_views(batch.images, settings, draws, batch.sizes)
        yield list(views), batch.index


def build_method(recipe: Recipe, images: int, encoder: Encoder | None = None) -> Siamese:
    """Build the method with fresh weights determined by the recipe's seed; torch's global generator is left unchanged.

    images: number of training images, for methods with per-image memory.
    encoder: None for one with fresh weights.
    Raises UserError if the encoder cannot be built or cannot take the recipe's views.
    """
    encoder = encoder or build(recipe.encoder, recipe.seed)
    check_sizes(encoder, {each.size for each in recipe.views.each()} - {recipe.encoder.size})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed + 1)
        method: Siamese = methods.get(recipe.method).Method(encoder, recipe.method_settings)
        method.allocate(images)
    return method


def optimizer(method: Siamese, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with momentum and weight decay on all parameters (appendix A), fused into one pass; or LARS."""
    train, groups = recipe.train, method.param_groups()
    settings: Table = {"lr": train.peak, "momentum": train.momentum, "weight_decay": train.weight_decay}
    if train.optimizer != "sgd":
        return LARS(groups, **settings, vectors=train.optimizer == "larc")
    return torch.optim.SGD(groups, **settings, fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))


# --- before the loop ------------------------------------------------------------------------------------------------


def _check_parts(batch_size: int) -> None:
    """Raise UserError if a batch cannot be divided evenly among the processes."""
    if batch_size % ranks.world_size() or batch_size < 2 * ranks.world_size():
        raise UserError(
            f"train.batch_size is {batch_size}: torchrun started {ranks.world_size()} processes, so it must be a multiple "
            "of that number, with at least 2 images each."
        )


def _check_alike(cache: Cache) -> None:
    """Raise UserError if the processes could not read the same images: their parts would not form one batch."""
    usable = cache.usable(np.arange(len(cache)))
    _, (differs,) = ranks.agree(0.0, not np.array_equal(usable, ranks.from_main(lambda: usable)))
    if differs:
        raise UserError("Not every process could read the same images: a disk or network failed meanwhile. Try again.")


def _initial(plan: Recipe, images: int, listener: Listener) -> Siamese:
    """Return the method before its first step, with the weights of the run `train.init` if that is set.

    All weights if that run has the same method and widths, else the encoder's. Raises UserError if it has none or if its
    encoder differs.
    """
    if plan.train.init is None:
        return build_method(plan, images)
    run = Path(plan.train.init)
    encoder = build(plan.encoder, plan.seed)
    theirs, step = _saved_weights(run)
    weights = {name.removeprefix("encoder."): value for name, value in theirs.items() if name.startswith("encoder.")}
    try:
        encoder.load_state_dict(weights or read_encoder(run)[0].state_dict())
    except RuntimeError:
        raise UserError(f"The encoder of {run} does not match the requested {plan.encoder.name}.") from None
    method = build_method(plan, images, encoder)
    ours, trained = method.state_dict(), dict(method.named_parameters())
    # A queue may have another length, and per-image memory belongs to other images.
    alike = {name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape}
    fits = theirs.keys() == ours.keys() and alike >= trained.keys()
    if fits:
        method.load_state_dict({**ours, **{name: theirs[name] for name in alike}})
        method.allocate(images)
    what = "all weights" if fits else "the encoder (not the heads: their method or widths differ)"
    listener.say(f"Starts from {what} of {run}{step}.")
    return method


def _saved_weights(run: Path) -> tuple[dict[str, Tensor], str]:
    """Return the method's newest state, or of a failed run its last healthy one, and its step in words; {} if none."""
    for name in (LAST, HEALTHY):
        found = Checkpoints(run).load(name)
        if found is not None:
            weights, state = method_tensors(found[0]), found[1]
            healthy = all(verdict["name"] == "healthy" for verdict in state.get("verdicts", ()))
            if name == HEALTHY or (healthy and all(bool(value.isfinite().all()) for value in weights.values())):
                return weights, f" after step {state['step']:,}"
    return {}, ""


def _command() -> dict[str, str]:
    called = Path(sys.argv[0])  # the latter: python -m simsiam
    ours = called.name == "simsiam" or called == Path(__file__).with_name("__main__.py")
    return {"command": shlex.join(["simsiam", *sys.argv[1:]])} if ours else {}


def _threads() -> str:
    threads, processes = torch.get_num_threads(), ranks.world_size()
    text = counted(threads, "thread")
    return text if processes == 1 else f"{processes} processes, {text} each"


def _facts(s: Session, held_out: int, step_seconds: float) -> list[tuple[str, str]]:
    recipe, encoder, cache = s.recipe, s.method.encoder, s.loader.cache
    parameters = sum(p.numel() for p in encoder.parameters())
    left = (
        recipe.train.seconds
        if recipe.train.epochs is None
        else recipe.train.epochs * s.loader.steps_per_epoch * step_seconds + cache.seconds_left(s.loader.rows)
    )
    assert left is not None
    length = counted(recipe.train.epochs, "epoch") if recipe.train.epochs else "as many epochs as fit"
    bad = f", {len(cache.bad):,} of them bad files so far" if cache.bad else ""
    waiting = len(cache.missing(s.loader.rows))
    later = [("decoding", f"{waiting:,} images, once, while the first epoch trains")] if waiting else []
    facts = [
        (
            "data",
            f"{recipe.data}: {len(s.loader.rows):,} images to train on, {held_out:,} held out for monitoring{bad}",
        ),
        *later,
        ("method", f"{recipe.method}, batch {recipe.train.batch_size}, base lr {recipe.train.lr:g}"),
        ("encoder", f"{recipe.encoder.name}, {parameters / 1e6:.2g} M parameters, {encoder.dim} features"),
        ("views", f"{recipe.views.size} px in training, {recipe.eval.size} px in use"),
        ("compute", f"{s.compute.device}, {s.compute.precision}, {_threads()}"),
        ("length", f"{length}, about {show_duration(max(left - s.seconds, 0))}"),
        ("run", str(s.run)),
    ]
    return [*facts, ("resumed", f"at step {s.step:,}")] if s.step else facts


# --- after the loop -------------------------------------------------------------------------------------------------


def _finish(s: Session, before: Encoder, held_out: Rows) -> dict[str, Any]:
    """Evaluate once more, save encoder and samples, and return the summary; `summary.json`, written last, marks the run
    as finished."""
    if s.looked_at != s.step:
        s.look()
    s.save()
    # A run that ended within its first epoch has not seen all images: do not decode the rest for this.
    cache = s.loader.cache
    cache.usable(draw(held_out, _QUERIES), s.listener.decoding)
    rows, held_out = cache.decoded(s.loader.rows), cache.decoded(held_out)
    s.method.eval()
    encoder = s.method.encoder
    plan, verdict = s.recipe, s.verdict
    # Non-finite weights are useless: fall back to the last healthy ones.
    step = s.step if verdict.name != "diverged" else s.back_to_healthy()
    about = {
        "method": plan.method,
        "data": plan.data,
        "fingerprint": s.loader.cache.fingerprint,
        "step": step,
        "verdict": verdict.name,
    }
    save_encoder(s.run, encoder, plan.prepare, plan.seed, about)
    shown = held_out if len(held_out) >= FEWEST else rows
    subject = Subject(
        encoder=encoder, before=before, prepare=plan.prepare, cache=cache, compute=s.compute, listener=s.listener
    )
    keep_samples(s.run, subject, plan.views, rows, shown)
    knn = None
    if cache.labels is not None and verdict.name != "diverged":
        bank, queries = draw(cache.labelled(rows), _BANK), draw(held_out, _QUERIES)
        kinds = features_by_kind(subject, bank, queries)
        knn = evaluate.compare(["knn"], kinds, seed=plan.seed)["knn"]
    images = s.step * plan.train.batch_size
    figures = {
        key: round(value, 4) if value is not None and finite(value) else None
        for key, value in ((key, s.latest.get(key)) for key in ("loss", "std", "effective_rank"))
    }
    summary = {
        "run": str(s.run),
        "data": plan.data,
        "method": plan.method,
        "encoder": plan.encoder.name,
        "images": len(rows),
        "held_out": len(held_out),
        "bad_files": [{"path": path, "reason": reason} for path, reason in cache.bad],
        "epochs": round(s.step / s.loader.steps_per_epoch, 3),
        "steps": s.step,
        "seconds": round(s.seconds, 2),
        "images_per_second": round(images / s.training_seconds, 1) if s.training_seconds else None,
        **figures,
        "most_rank": s.latest.get("most_rank"),
        "dim": getattr(plan.method_settings, "dim", None),
        "encoder_step": step,
        "verdict": verdict.name,
        "evidence": verdict.evidence,
        "advice": verdict.advice or None,
        "knn": knn,
    }
    write_json(s.run / SUMMARY, summary)
    if cache.bad:
        were = "file was" if len(cache.bad) == 1 else "files were"
        s.listener.say(f"{len(cache.bad):,} bad {were} left out; {s.run / SUMMARY} lists them.")
    return summary
