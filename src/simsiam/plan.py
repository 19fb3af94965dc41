"""A short probe before a long run: its speed, bottleneck and memory use, and the batch sizes and epochs that fit."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsiam.compute import Compute, generator, out_of_memory, pick_device, probe_precision, set_threads, wait
from simsiam.config import UserError, counted
from simsiam.data.cache import known_cache
from simsiam.data.decode import decode, in_order
from simsiam.data.loader import Batch
from simsiam.data.sources import ImageSet, open_images
from simsiam.data.views import random_views
from simsiam.defaults import check_settings, default_epochs, largest_batch, look_at, resolve
from simsiam.kernels import padded
from simsiam.recipe import Recipe, gather
from simsiam.step import Step
from simsiam.train import build_method, optimizer

_SAMPLE = 2000
"""Maximum number of images to decode, spread over the set."""
_FIT = (64, 128, 256, 512, 1024, 2048, 4096)


def plan(
    data: str | Path | None = None,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    workers: int | None = None,
    seconds: float = 30.0,
    **settings: Any,
) -> dict[str, Any]:
    """Measure decoding, views and training steps on the real images for about `seconds`, without writing any files but
    kernels that are not compiled yet.

    The other arguments are those of `train`. Returns rates in images/s, times in seconds ("seconds": the whole run,
    including decoding) and sizes in bytes:
    {"images", "method", "encoder", "device", "batch_size", "precision", "decode_images_per_second", "decode_seconds",
    "cache_bytes", "views_images_per_second", "images_per_second", "seconds_per_epoch", "epochs", "seconds",
    "bottleneck", "shares": {part: share of the time}, "memory_bytes", "memory_available", "largest_batch",
    "fits": {batch size: bytes}, "epochs_in": {"10m": ..., "1h": ..., "8h": ...}}.
    Raises UserError as `train` does.
    """
    set_threads()
    where = pick_device(device)
    asked = gather(data, recipe, overrides, settings)
    check_settings(asked, where.type)
    images = open_images(asked["data"])
    rows, _ = images.split()
    facts = look_at(images, rows, where.type)
    wanted, _ = resolve(asked, facts)
    set_threads(wanted.train.threads)
    pixels, decode_rate = _decode(images, wanted.short_side, workers, seconds / 3)
    batch, sizes = padded(list(itertools.islice(itertools.cycle(pixels), wanted.train.batch_size)))
    batch, sizes = batch.to(where), sizes.to(where)
    available = _available(where)  # now: after a step, torch keeps the memory it took
    while True:
        try:
            precision, views_seconds, step_seconds, memory = _measure(
                wanted, len(rows), batch, sizes, where, seconds / 6
            )
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) < 4:
                raise UserError("Not even two images fit into memory: choose a smaller --size or --encoder.") from None
        torch.cuda.empty_cache()
        batch, sizes = batch[: len(batch) // 2], sizes[: len(batch) // 2]
    times = wanted.train.batch_size / len(batch)
    views_seconds, step_seconds = times * views_seconds, times * step_seconds

    per_epoch = max(1, len(rows) // wanted.train.batch_size)
    epoch_seconds = per_epoch * (views_seconds + step_seconds)
    epochs, _ = default_epochs(facts, epoch_seconds)
    if wanted.train.epochs is not None:
        epochs = wanted.train.epochs
    cache = known_cache(images, wanted.short_side)
    waiting = len(images) if cache is None else len(cache.missing(np.arange(len(images))))
    decode_seconds = waiting / decode_rate
    if wanted.train.seconds is not None:  # the budget includes decoding during the first epoch
        epochs = float(f"{max(0.0, wanted.train.seconds - decode_seconds) / epoch_seconds:.3g}")
    parts = {"decoding": decode_seconds, "views": epochs * per_epoch * views_seconds}
    parts["model"] = epochs * per_epoch * step_seconds
    average = sum(len(image.reshape(-1)) for image in pixels) / len(pixels)
    each = memory["each"]
    return {
        "images": len(images),
        "method": wanted.method,
        "encoder": wanted.encoder.name,
        "device": str(where),
        "batch_size": wanted.train.batch_size,
        "precision": precision,
        "decode_images_per_second": round(decode_rate, 1),
        "decode_seconds": round(decode_seconds, 1),
        "cache_bytes": round(average * len(images)),
        "views_images_per_second": round(wanted.train.batch_size / views_seconds, 1),
        "images_per_second": round(wanted.train.batch_size / (views_seconds + step_seconds), 1),
        "seconds_per_epoch": float(f"{epoch_seconds:.3g}"),
        "epochs": epochs,
        "seconds": round(decode_seconds + epochs * epoch_seconds, 1),
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "shares": {name: round(value / sum(parts.values()), 3) for name, value in parts.items()},
        "memory_bytes": memory["fixed"] + each * wanted.train.batch_size,
        "memory_available": available,
        "largest_batch": largest_batch(len(rows)),
        "fits": {
            str(size): memory["fixed"] + each * size
            for size in _FIT
            if size <= largest_batch(len(rows))
            and (available is None or memory["fixed"] + each * size <= 0.9 * available)
        },
        "epochs_in": {
            text: round((length - decode_seconds) / epoch_seconds, 1) if length > decode_seconds else 0.0
            for text, length in (("10m", 600.0), ("1h", 3600.0), ("8h", 28800.0))
        },
    }


def _decode(images: ImageSet, short_side: int, workers: int | None, seconds: float) -> tuple[list[np.ndarray], float]:
    """Decode images spread over the set: arrays [H,W,3], bad ones left out, and images per second.

    Of a set that is slow out of order, the first ones: training decodes it in order.
    """
    rows = images.some(_SAMPLE)
    order = (rows if images.in_order else np.random.default_rng(0).permutation(rows)).tolist()

    def load(i: int) -> np.ndarray | None:
        try:
            return decode(images.read(order[i]), short_side)
        except Exception:  # as in the cache: archives and plug-ins may raise anything
            return None

    start, count = time.perf_counter(), 0
    found: list[np.ndarray] = []
    results = in_order(load, len(order), workers)
    for pixels in results:
        count += 1
        if pixels is not None:
            found.append(pixels)
        if time.perf_counter() - start > seconds:
            break
    taken = time.perf_counter() - start
    results.close()
    if not found:
        raise UserError(
            f"None of {counted(count, 'image')} of {images.name} can be decoded. `simsiam check` lists the reasons."
        )
    return found, count / taken


def _measure(
    recipe: Recipe, images: int, batch: Tensor, sizes: Tensor, device: torch.device, seconds: float
) -> tuple[str, float, float, dict[str, int]]:
    """Precision, seconds for the views and for the rest of a step, and memory in bytes: fixed, and per image.

    images: number of images the run trains on.
    """
    method = build_method(recipe, max(images, len(batch)))
    whole = bool((sizes == torch.tensor(batch.shape[-2:], device=device)).all())
    given = Batch(batch, None if whole else sizes, torch.arange(len(batch), device=device))
    made = random_views(batch, recipe.views.each(), generator(device, 0), given.sizes)

    def forward_and_backward(compute: Compute) -> None:
        compute.place(method)
        Step(method, None, [], compute, captures=False).update(made, given.index)

    wanted = recipe.train.precision
    precision = probe_precision(device, forward_and_backward)[0] if wanted == "auto" else wanted
    compute = Compute(device, precision)
    compute.place(method)
    step = Step(method, optimizer(method, recipe), recipe.views.each(), compute, compiles=bool(recipe.train.compile))
    views_seconds = _time(lambda: step.views(given, 0), seconds, device)
    step_seconds = _time(lambda: step.update(made, given.index), seconds, device)

    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), compute.autocast():
        loss, _ = method(list(made), given.index)
        del loss
    weights = sum(p.numel() * p.element_size() for group in method.param_groups() for p in group["params"])
    state = sum(value.numel() * value.element_size() for value in method.state_dict().values())
    kept = sum(saved.values()) - sum(saved.get(p.untyped_storage().data_ptr(), 0) for p in method.parameters())
    inputs = sum(view.numel() * view.element_size() for view in made) + batch.numel()
    return (
        precision,
        views_seconds,
        step_seconds,
        {
            "fixed": state + 2 * weights,  # gradient and momentum
            "each": (max(kept, 0) + inputs) // len(batch),
        },
    )


def _time(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Median seconds of `work` over as many calls as fit into `seconds`, at least three after warm-up."""
    times: list[float] = []
    begin = time.perf_counter()
    warm = 1 if device.type == "cpu" else 5  # one of which captures the CUDA graph
    while len(times) < warm + 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[warm:]))


def _available(device: torch.device) -> int | None:
    """Available memory of the device in bytes; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = []
    with contextlib.suppress(OSError):
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        limits.append(int(words[words.index("MemAvailable:") + 1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # the latter: "max", no limit
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text("ascii")) for name in ("max", "current"))
        lines = Path("/sys/fs/cgroup/memory.stat").read_text("ascii").splitlines()
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        limits.append(most - used + cached)
    return min(limits, default=None)
