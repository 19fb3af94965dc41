"""Compare end-to-end training with its limit: the same model's step on a fixed batch already in memory.

    python benchmarks/training.py [--size 32 96] [--repeats 5] [--seconds 10] [--settings KEY=VALUE ...] [--json FILE]

Both alternate in one process. End to end is `simsiam.train` itself (loader, views, step, metrics, guard; evaluation on
held-out images and checkpoints are excluded, as in `images_per_second`). The limit is forward, loss, backward and
optimiser step on one batch. If the machine's speed varies, the share is steadier: the fraction of `simsiam.train`'s
time that these four take (CPU only: a GPU runs asynchronously to the clock).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import simsiam
from simsiam.compute import Compute, describe, pick_device, set_threads, wait
from simsiam.config import read_recipe
from simsiam.data.cache import build_cache
from simsiam.data.demo import photograph_files
from simsiam.data.loader import Loader
from simsiam.data.sources import open_images
from simsiam.data.views import ViewSettings
from simsiam.features import preprocessing
from simsiam.recipe import read
from simsiam.runs import read_json, read_metrics
from simsiam.step import Step
from simsiam.train import build_method, optimizer


def median_and_std(values: list[float]) -> tuple[float, float]:
    """The std of a single value is 0."""
    return statistics.median(values), statistics.stdev(values) if len(values) > 1 else 0.0


def photo_folder(folder: Path, count: int = 2000) -> Path:
    """Write crops of 120 to 280 pixels of the demo set's photographs, as JPEG files of many sizes."""
    photographs = [Image.open(io.BytesIO(content)).convert("RGB") for content in photograph_files().values()]
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        most_w, most_h = min(280, photograph.width), min(280, photograph.height)
        width, height = int(rng.integers(120, most_w + 1)), int(rng.integers(120, most_h + 1))
        left, top = (int(rng.integers(0, room + 1)) for room in (photograph.width - width, photograph.height - height))
        photograph.crop((left, top, left + width, top + height)).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def end_to_end(
    data: str, run: Path, size: int, seconds: float, device: str, overrides: list[str]
) -> tuple[float, float]:
    """images/s of `simsiam.train` over `seconds` and the step's share of the time, from the third line of metrics on:
    as for the limit, the first steps only warm up."""
    build_cache(open_images(data), preprocessing(size, ViewSettings.mean, ViewSettings.std).short_side)
    taken: list[float] = []

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = update(*arguments)
        taken.append(time.perf_counter() - start)
        return result

    update, Step.update = Step.update, timed  # type: ignore[method-assign]
    try:
        simsiam.train(
            data, run, size=size, budget=f"{seconds:g}s", device=device, on_collapse="continue", overrides=overrides
        )
    finally:
        Step.update = update  # type: ignore[method-assign]
    taken = taken[-read_json(run / "summary.json")["steps"] :]  # a probe at the start may take some steps too
    batch = read(read_recipe(run / "config.toml")).train.batch_size
    lines = [line for line in read_metrics(run) if line["kind"] == "train"][1:]
    assert len(lines) > 2, "too short a run: raise --seconds"
    steps = [after["step"] - before["step"] for before, after in itertools.pairwise(lines)]
    times = [batch * n / line["images_per_second"] for n, line in zip(steps, lines[1:], strict=True)]
    share = sum(taken[lines[0]["step"] : lines[-1]["step"]]) / sum(times)
    return batch * sum(steps) / sum(times), share


def limit(run: Path, seconds: float, device: str) -> float:
    """images/s of the bare step with the settings of `run`."""
    recipe = read(read_recipe(run / "config.toml"))
    where = pick_device(device)
    compute = Compute(where, "bf16" if recipe.train.precision == "bf16" else "fp32")
    prepare = preprocessing(recipe.eval.size, recipe.views.mean, recipe.views.std)
    cache = build_cache(open_images(recipe.data), prepare.short_side)
    method = compute.place(build_method(recipe, len(cache.split()[0])))
    steps = optimizer(method, recipe)
    batch = next(Loader(cache, cache.split()[0], recipe.train.batch_size, where, 0).epoch(0))
    step = Step(method, steps, recipe.views.each(), compute, compiles=bool(recipe.train.compile))
    views = [view.clone() for view in step.views(batch, 0)]
    for _ in range(5):
        step.update(views, batch.index)
    wait(where)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step.update(views, batch.index)
        count += 1
        if count % 10 == 0:
            wait(where)  # otherwise a GPU's queue would outlast the timed window
    wait(where)
    return count * recipe.train.batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[32, 96], help="32: the demo set; larger: photographs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", help="in place of the made images")
    parser.add_argument("--settings", nargs="+", default=[], help="as `simsiam train` takes them: train.compile=true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_threads()
    results: dict[str, Any] = {"environment": describe(), "sizes": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        folder.mkdir()
        for size in arguments.size:
            if arguments.data is None and size > 32 and not any(folder.iterdir()):
                photo_folder(folder)
            data = arguments.data or ("demo" if size <= 32 else str(folder))
            ours, bare, shares = [], [], []
            for repeat in range(arguments.repeats):
                run = Path(place) / f"{size}-{repeat}"
                rate, share = end_to_end(data, run, size, arguments.seconds, arguments.device, arguments.settings)
                ours.append(rate)
                shares.append(share)
                bare.append(limit(run, arguments.seconds, arguments.device))
                shown = f"end to end {rate:7.0f} images/s   bare step {bare[-1]:7.0f}   {rate / bare[-1]:.3f}"
                print(f"{size} px  {shown}   the step's share {share:.3f}", flush=True)
            ratios = [a / b for a, b in zip(ours, bare, strict=True)]
            for name, values in (("ratio", ratios), ("share", shares)):
                median, std = median_and_std(values)
                print(f"{size} px  {name} {median:.3f} (median of {len(values)}, std {std:.3f})", flush=True)
            results["sizes"][str(size)] = {"end_to_end": ours, "bare": bare, "ratio": ratios, "share": shares}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
