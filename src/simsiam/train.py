"""Training: from a data set to a run folder. `fit` is the loop; the rest is what it is handed and what it leaves behind."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsiam import evaluate, methods, recipes
from simsiam.assess import side_by_side
from simsiam.collapse import Guard, Verdict, judge
from simsiam.compute import Compute, describe, generator, pick_device, probe_precision, set_threads
from simsiam.config import Table, UserError, merge, parse_override, read_recipe, show_duration, write_recipe
from simsiam.console import Listener
from simsiam.data.cache import Cache, build_cache
from simsiam.data.loader import Loader
from simsiam.data.sources import open_images
from simsiam.data.views import plain_pixels, random_view
from simsiam.embed import Preprocessing, embed_rows, preprocessing, save_encoder, untrained, write_embedding
from simsiam.encoders import Encoder, build
from simsiam.monitor import Monitor, draw
from simsiam.optim import learning_rate
from simsiam.recipe import Recipe, Reasons, default_epochs, look_at, qualify, read, resolve
from simsiam.runs import ENVIRONMENT, RECIPE, SUMMARY, Checkpoints, Metrics, read_json, write_json, write_text

_BANK, _QUERIES = 10_000, 2_000
"""Images of the final kNN; `simsiam evaluate` takes all."""
_SHOWN = 2_000  # held-out images kept for looking at
_MONITOR_SHARE = 0.05  # of the time, at most
_LOOKS = 20
_CHECKPOINT_SECONDS = 60.0


def train(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    size: int | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains an encoder on unlabelled images.

    Args:
        data: whatever `open_images` takes; None for the recipe's own, or the bundled demo set.
        out: the run folder; None for a new one under `runs/`.
        recipe: name of a built-in recipe or path of a TOML file.
        overrides: settings as text, "train.lr=0.1".
        size: side of the views, and of the images in use, in pixels.
        resume: go on with the run in `out`, to the same weights as if it had never stopped.
        settings: method, encoder, epochs, budget, batch_size, seed, ... : any setting by its name.

    Returns the run's summary (design.md: keys of `train --json`).
    Raises UserError for the user's mistakes, before anything is overwritten. A signal (SIGINT, SIGTERM) saves the state
    and raises Interrupted.
    """
    listener = listener or Listener()
    threads = set_threads()
    where = pick_device(device)
    given = _given(recipe, overrides, settings)
    if resume:
        run = _resumable(out)
        if data is not None or given or size is not None:
            listener.say(f"Warning: --resume takes data and settings from {run / RECIPE}; what else was given is ignored.")
        done = run / SUMMARY
        if done.exists():
            listener.say(f"{run} is finished: nothing is left to resume.")
            return read_json(done)
        table = read_recipe(run / RECIPE)
    else:
        run = _new_run(out, str(data or given.get("data") or "demo"), str(_name(given.get("method")) or "simsiam"))
        table = given

    if data is None and not resume and "data" not in table:
        table = merge(recipes.get("demo"), table) if recipe is None else {**table, "data": "demo"}
    if data is not None and not resume:
        table = {**table, "data": _absolute(data)}
    images = open_images(table["data"])
    facts = look_at(images, where.type)
    settings_, reasons = (read(table), []) if resume else resolve(table, facts, size)
    prepare = preprocessing(settings_.eval.size, settings_.views.mean, settings_.views.std)
    short_side = max(prepare.short_side, preprocessing(settings_.views.size, prepare.mean, prepare.std).short_side)
    cache = build_cache(images, short_side, workers=workers, progress=listener.decoding)
    listener.close()
    rows, held_out = cache.split()
    if len(rows) < 2:
        raise UserError(f"{table['data']} has {len(rows)} usable image to train on: at least 2 are needed.")
    if not resume:
        facts = replace(facts, images=len(rows))
        settings_, reasons = resolve(table, facts, size)

    method = build_method(settings_)
    loader = Loader(cache, rows, settings_.train.batch_size, where, settings_.seed)
    compute, seconds_per_step, why = _probe(method, settings_, loader, where)
    if not resume:
        wanted = settings_.train
        reasons.append(("train.precision", compute.precision, why))
        if wanted.epochs is None and wanted.budget is None:
            epochs, reason = default_epochs(facts, seconds_per_step * loader.steps_per_epoch)
            reasons.append(("train.epochs", f"{epochs:g}", reason))
            wanted = replace(wanted, epochs=epochs)
        settings_ = replace(settings_, train=replace(wanted, precision=compute.precision))
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / RECIPE, write_recipe(settings_.table()))
    write_json(run / ENVIRONMENT, {**describe(), "device": str(where), "threads": threads, **_command()})
    compute.place(method)
    training = Training(run, settings_, method, optimizer(method, settings_), loader, compute, listener)
    training.restore(cache.fingerprint, resume)
    listener.plan(_facts(training, cache, len(rows), len(held_out), seconds_per_step), reasons)
    training.monitor = Monitor(cache, rows, held_out, settings_.views, prepare, compute)
    before = untrained(settings_.encoder, settings_.seed, prepare, cache, rows, compute)
    try:
        with _signals() as stopped:
            fit(training, before, stopped)
        return _finish(training, before, cache, rows, held_out, prepare)
    finally:
        listener.close()
        training.close()


class Interrupted(Exception):
    """A signal ended the run; its state is saved, and the message says how to go on."""


@dataclass
class Training:
    """Everything that the loop works on."""

    run: Path
    recipe: Recipe
    method: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    compute: Compute
    listener: Listener
    step: int = 0
    seconds: float = 0.0
    """Spent in the loop so far, monitors and checkpoints included."""
    working: float = 0.0
    """Of these, spent on training steps."""
    monitor: Monitor | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    guards: tuple[Guard, Guard] = field(default_factory=lambda: (Guard(5), Guard(3)))
    """On the training batches, and on the held-out images."""

    def restore(self, fingerprint: str, resume: bool) -> None:
        """Loads the last checkpoint where there is one, opens `metrics.jsonl` at its step."""
        self.fingerprint = fingerprint
        self.checkpoints = Checkpoints(self.run)
        found = self.checkpoints.load() if resume else None
        if found is not None:
            tensors, state = found
            if state["fingerprint"] != fingerprint:
                raise UserError(
                    f"The images of {self.recipe.data} have changed since {self.run} began: bring them back, or start a "
                    "new run."
                )
            self.step, self.seconds, self.working = state["step"], state["seconds"], state["working"]
            self.latest = state["latest"]
            self.method.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("method.")})
            _load_optimizer(self.optimizer, tensors)
        self.metrics = Metrics(self.run, self.step if found else None)
        self.board: Any = None
        if self.recipe.train.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("train.tensorboard needs TensorBoard: pip install 'simsiam[tensorboard]'.") from None
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.step)

    def record(self, kind: str, figures: dict[str, Any]) -> None:
        # A figure that is not finite has no place in JSON; the verdict says so.
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in figures.items()
        }
        self.metrics.write(kind=kind, **plain)
        if self.board is not None:
            for key, value in plain.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(f"{kind}/{key}", value, self.step)

    def save(self) -> None:
        tensors = {f"method.{name}": value for name, value in self.method.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": v for key, v in state.items() if isinstance(v, Tensor)}
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "working": self.working,
            "fingerprint": self.fingerprint,
            "latest": {key: value for key, value in self.latest.items() if value is None or math.isfinite(value)},
        }
        self.checkpoints.save(self.step, tensors, state, healthy=self.verdict.name == "healthy")

    @property
    def verdict(self) -> Verdict:
        """The standing one: what the training batches show first, then what the held-out images show."""
        batches, held_out = (guard.verdict for guard in self.guards)
        return batches if batches.name != "healthy" else held_out

    def close(self) -> None:
        self.metrics.close()
        if self.board is not None:
            self.board.close()


def fit(t: Training, before: torch.nn.Module, stopped: list[str]) -> None:
    """The loop. Ends when the schedule does, when the guard stops it, or, the state saved, with Interrupted."""
    recipe, settings, device = t.recipe, t.recipe.train, t.compute.device
    per_epoch = t.loader.steps_per_epoch
    total = None if settings.epochs is None else max(1, round(settings.epochs * per_epoch))
    peak = settings.lr * settings.batch_size / 256
    start, last_flush, last_look, last_save = (time.perf_counter() for _ in range(4))
    before, look_seconds = t.seconds, 0.0
    losses: list[Tensor] = []
    spreads: list[Tensor] = []
    if t.step == 0:
        look_seconds = _look(t)
        t.record("monitor", {"step": 0, "seconds": 0.0, **t.monitor.baselines(before)})
        t.save()
        last_flush = time.perf_counter()
    t.method.train()
    for epoch in itertools.count(t.step // per_epoch):
        if (total is not None and t.step >= total) or (settings.seconds is not None and t.seconds >= settings.seconds):
            return
        hook(t.method, "before_epoch", epoch)
        for batch in t.loader.epoch(epoch, t.step % per_epoch):
            if total is not None:
                done = t.step - t.step % per_epoch if settings.cosine == "epoch" else t.step
                progress, warmup = done / total, settings.warmup_epochs * per_epoch / total
            else:
                assert settings.seconds is not None
                progress = min(t.seconds / settings.seconds, 1.0)
                pace = t.seconds / t.step if t.step else 0.0
                warmup = settings.warmup_epochs * per_epoch * pace / settings.seconds
            rate = learning_rate(progress, peak, min(warmup, 0.5))
            for group in t.optimizer.param_groups:
                group["lr"] = peak if group.get("fixed_lr") else rate

            draws = generator(device, recipe.seed, t.step)
            views = [random_view(batch.images, recipe.views, draws, batch.sizes) for _ in range(2)]
            with t.compute.autocast():
                loss, stats = t.method(views, batch.index)
            t.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            t.optimizer.step()
            hook(t.method, "after_step", progress)
            t.step += 1
            losses.append(loss.detach())
            spreads.append(stats["std"].detach())

            now = time.perf_counter()
            t.seconds = before + now - start
            at_end = (total is not None and t.step >= total) or (
                settings.seconds is not None and t.seconds >= settings.seconds
            )
            # Reading a figure waits for the device, so it happens about once a second.
            if now - last_flush >= 1 or at_end or stopped or t.step == 1:
                loss_, std = float(torch.stack(losses).mean()), float(torch.stack(spreads).mean())
                now = time.perf_counter()
                t.seconds, t.working = before + now - start, t.working + now - last_flush
                speed = len(losses) * settings.batch_size / (now - last_flush)
                t.latest = {"loss": loss_, "std": std}
                epochs = round(t.step / per_epoch, 4)
                share = t.step / total if total else min(t.seconds / (settings.seconds or 1), 1.0)
                figures = {"step": t.step, "epoch": epochs, "progress": round(share, 5), "seconds": round(t.seconds, 3)}
                figures |= {"loss": loss_, "std": std, "lr": rate, "images_per_second": round(speed, 1)}
                t.record("train", figures)
                left = t.seconds / share * (1 - share) if share > 0.005 else None
                t.listener.step(figures, share, left)
                losses, spreads = [], []
                known = t.verdict.name
                t.guards[0].look(judge(loss_, std))
                if stopped:
                    t.save()
                    raise Interrupted(
                        f"{stopped[0]}: stopped at step {t.step:,}, everything is saved. "
                        f"Go on with: simsiam train --resume -o {shlex.quote(str(t.run))}"
                    )
                planned = settings.seconds or (t.seconds / share)
                due = max(look_seconds / _MONITOR_SHARE, planned / _LOOKS)
                if (now - last_look >= due and not at_end) or t.verdict.name != known:
                    look_seconds = _look(t)
                    last_look = time.perf_counter()
                if t.verdict.name != "healthy" and settings.on_collapse == "stop":
                    return
                if time.perf_counter() - last_save >= _CHECKPOINT_SECONDS:
                    t.save()
                    last_save = time.perf_counter()
                last_flush = time.perf_counter()
                t.seconds = before + last_flush - start
            if at_end:
                return


def _look(t: Training) -> float:
    """One look at the held-out images; returns the seconds it took."""
    assert t.monitor is not None
    start = time.perf_counter()
    figures = t.monitor.look(t.method)
    loss, std = t.latest.get("loss", 0.0), figures.get("std_z", math.nan)
    if t.step:
        verdict = t.guards[1].look(judge(loss, std, figures.get("effective_rank"), figures.get("std_features")))
        named = t.guards[0].verdict.name
        t.latest |= {"effective_rank": figures.get("effective_rank")}
        name = verdict.name if named == "healthy" else named
    else:
        name = "healthy"
    line = {"step": t.step, "seconds": round(t.seconds, 3), **figures, "verdict": name}
    t.record("monitor", line)
    t.listener.monitor(line)
    return time.perf_counter() - start


def hook(method: torch.nn.Module, name: str, *arguments: Any) -> None:
    """Calls an optional part of the method's contract."""
    part = getattr(method, name, None)
    if part is not None:
        part(*arguments)


# --- before the loop ------------------------------------------------------------------------------------------------


def build_method(recipe: Recipe) -> torch.nn.Module:
    """The method with fresh weights, a function of the recipe's seed."""
    encoder = build(recipe.encoder, recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        return methods.get(recipe.method).Method(encoder, recipe.method_settings)


def optimizer(method: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay on everything (section 4.1); fused: one pass over the weights."""
    fused = next(method.parameters()).device.type in ("cpu", "cuda")
    rate = recipe.train.lr * recipe.train.batch_size / 256
    return torch.optim.SGD(
        method.param_groups(),
        lr=rate,
        momentum=recipe.train.momentum,
        weight_decay=recipe.train.weight_decay,
        fused=fused,
    )


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _probe(
    method: torch.nn.Module, recipe: Recipe, loader: Loader, device: torch.device
) -> tuple[Compute, float, str]:
    """Picks the precision by measuring; returns it with the seconds of a step. The method is left as it was."""
    copied = copy.deepcopy(method)
    batch = next(iter(loader.epoch(0)))
    seconds: dict[str, float] = {}

    def step(compute: Compute) -> None:
        compute.place(copied)
        start = time.perf_counter()
        draws = generator(device, recipe.seed)
        views = [random_view(batch.images, recipe.views, draws, batch.sizes) for _ in range(2)]
        with compute.autocast():
            loss, _ = copied(views, batch.index)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        seconds[compute.precision] = min(taken, seconds.get(compute.precision, taken))

    wanted = recipe.train.precision
    precision, why = probe_precision(device, step) if wanted == "auto" else (wanted, "asked for")
    compute = Compute(device, precision)
    for _ in range(0 if precision in seconds else 3):
        step(compute)
    return compute, seconds[precision], why


def _given(recipe: str | None, overrides: Sequence[str], settings: dict[str, Any]) -> Table:
    table: Table = {} if recipe is None else recipes.get(recipe)
    for key, value in settings.items():
        if value is not None:
            table = _drop_rival(merge(table, qualify({key: value})), key)
    for text in overrides:
        override = parse_override(text)
        table = _drop_rival(merge(table, qualify(override)), text.partition("=")[0].split(".")[-1].strip())
    return table


def _drop_rival(table: Table, key: str) -> Table:
    """--budget takes the place of a recipe's epochs, and the other way round."""
    rival = {"epochs": "budget", "budget": "epochs"}.get(key)
    if rival is None:
        return table
    return {**table, "train": {k: v for k, v in table["train"].items() if k != rival}}


def _name(table: Any) -> Any:
    return table.get("name") if isinstance(table, dict) else table


def _absolute(data: str | Path) -> str:
    """A path that means the same from any folder; names and patterns stay as they are."""
    text = os.path.expanduser(os.fspath(data))
    return os.path.abspath(text) if os.path.exists(text) else text


def _new_run(out: str | Path | None, data: str, method: str) -> Path:
    if out is None:
        stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(data).stem.lower()).strip("-") or "images"
        free = (Path("runs") / f"{stem}-{method}-{number}" for number in itertools.count(1))
        return next(path for path in free if not path.exists())
    run = Path(out)
    if (run / RECIPE).exists():
        raise UserError(f"{run} holds a run already: go on with it by --resume, or choose another -o.")
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        raise UserError(f"{run} exists and is not a run: choose another -o.")
    return run


def _resumable(out: str | Path | None) -> Path:
    if out is None:
        raise UserError("--resume needs to know which run: add -o RUN.")
    run = Path(out)
    if not (run / RECIPE).exists():
        raise UserError(f"{run} holds no run to resume: it has no {RECIPE}.")
    return run


def _command() -> dict[str, str]:
    return {"command": shlex.join(["simsiam", *sys.argv[1:]])} if Path(sys.argv[0]).name == "simsiam" else {}


def _facts(
    t: Training, cache: Cache, rows: int, held_out: int, seconds_per_step: float
) -> list[tuple[str, str]]:
    recipe, encoder = t.recipe, t.method.encoder
    parameters = sum(p.numel() for p in encoder.parameters())  # type: ignore[union-attr]
    left = (
        recipe.train.seconds
        if recipe.train.epochs is None
        else recipe.train.epochs * t.loader.steps_per_epoch * seconds_per_step
    )
    assert left is not None
    length = f"{recipe.train.epochs:g} epochs" if recipe.train.epochs else "as many epochs as fit"
    bad = f", {len(cache.bad):,} bad files left out (`simsiam check` names them)" if cache.bad else ""
    facts = [
        ("data", f"{recipe.data}: {rows:,} images to train on, {held_out:,} held out for monitoring{bad}"),
        ("method", f"{recipe.method}, batch {recipe.train.batch_size}, base lr {recipe.train.lr:g}"),
        ("encoder", f"{recipe.encoder.name}, {parameters / 1e6:.2g} M parameters, {encoder.dim} features"),  # type: ignore[union-attr]
        ("views", f"{recipe.views.size} px in training, {recipe.eval.size} px in use"),
        ("compute", f"{t.compute.device}, {t.compute.precision}, {torch.get_num_threads()} threads"),
        ("length", f"{length}, about {show_duration(max(left - t.seconds, 0))}"),
        ("run", str(t.run)),
    ]
    return [*facts, ("resumed", f"at step {t.step:,}")] if t.step else facts


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """SIGINT and SIGTERM put their name into the list; a second one is not waited for. Only the main thread may ask."""
    stopped: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, _: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- after the loop -------------------------------------------------------------------------------------------------


def _finish(
    t: Training, before: Encoder, cache: Cache, rows: np.ndarray, held_out: np.ndarray, prepare: Preprocessing
) -> dict[str, Any]:
    """The last look, the encoder, the samples to look at, the figures: `summary.json` is written last."""
    _look(t)
    t.save()
    recipe, verdict = t.recipe, t.verdict
    t.method.eval()
    encoder: Any = t.method.encoder
    about = {"method": recipe.method, "data": recipe.data, "step": t.step, "verdict": verdict.name}
    save_encoder(t.run, encoder, prepare, recipe.seed, about)
    _keep_samples(t, cache, rows, held_out, prepare, before)
    knn = None
    if cache.labels is not None and verdict.name != "diverged":
        bank, queries = draw(rows, _BANK), draw(held_out, _QUERIES)
        kinds = side_by_side(encoder, before, prepare, cache, bank, queries, t.compute, t.listener)
        knn = evaluate.compare(["knn"], kinds, seed=recipe.seed)["knn"]
    images = t.step * recipe.train.batch_size
    summary = {
        "run": str(t.run),
        "data": recipe.data,
        "method": recipe.method,
        "encoder": recipe.encoder.name,
        "images": len(rows),
        "held_out": len(held_out),
        "bad_files": [{"path": path, "reason": reason} for path, reason in cache.bad],
        "epochs": round(images / len(rows), 3),
        "steps": t.step,
        "seconds": round(t.seconds, 2),
        "images_per_second": round(images / t.working, 1) if t.working else None,
        "loss": _plain(t.latest.get("loss")),
        "std": _plain(t.latest.get("std")),
        "effective_rank": _plain(t.latest.get("effective_rank")),
        "dim": getattr(recipe.method_settings, "dim", None),
        "verdict": verdict.name,
        "evidence": verdict.evidence,
        "advice": verdict.advice or None,
        "knn": knn,
    }
    write_json(t.run / SUMMARY, summary)
    return summary


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _keep_samples(
    t: Training, cache: Cache, rows: np.ndarray, held_out: np.ndarray, prepare: Preprocessing, before: Encoder
) -> None:
    """`samples/`: views as the network saw them, and held-out images with their embeddings before and after."""
    images, sizes = cache.batch(draw(rows, 8))
    draws = generator(torch.device("cpu"), t.recipe.seed)
    views = t.recipe.views
    mean, std = (torch.tensor(values)[:, None, None] for values in (views.mean, views.std))
    shown = [plain_pixels(images, views.size, 1.0, sizes)]
    shown += [(random_view(images, views, draws, sizes) * std + mean) * 255 for _ in range(2)]
    folder = t.run / "samples"
    folder.mkdir(exist_ok=True)
    np.save(folder / "views.npy", torch.stack([_pictures(view) for view in shown], 1).numpy())

    some = draw(held_out if len(held_out) >= 16 else rows, _SHOWN)
    vectors = embed_rows(t.method.encoder, prepare, cache, some, t.compute).numpy()  # type: ignore[arg-type]
    meta = {"format": 1, "run": str(t.run), "dim": vectors.shape[1], "data": t.recipe.data}
    write_embedding(folder / "embedding", vectors, cache, some, meta)
    np.save(folder / "untrained.npy", embed_rows(before, prepare, cache, some, t.compute).numpy())
    side = min(96, max(prepare.size, 32))
    small = [
        _pictures(plain_pixels(*_one(cache.batch(some[i : i + 64]), side, 1.0))) for i in range(0, len(some), 64)
    ]
    np.save(folder / "embedding" / "thumbnails.npy", torch.cat(small).numpy())


def _one(batch: tuple[Tensor, Tensor], side: int, share: float) -> tuple[Tensor, int, float, Tensor]:
    return batch[0], side, share, batch[1]


def _pictures(pixels: Tensor) -> Tensor:
    """float [B,3,h,w] in 0..255 -> uint8 [B,h,w,3]."""
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
