"""Compare ways to run the training step on a GPU: kernel by kernel, as one CUDA graph, compiled, and both.

    python benchmarks/step.py [--encoder cifar-resnet18] [--size 32] [--batch 512] [--json FILE] [--profile FILE]

Images are random pixels on the device. "step" is forward, loss, backward and optimiser on existing views; "whole" also
draws the views. The ways alternate for `--repeats` rounds; figures are medians in images/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from simsiam.compute import Compute, describe
from simsiam.config import merge
from simsiam.data.loader import Batch
from simsiam.recipe import preset, read
from simsiam.step import Step
from simsiam.train import build_method, optimizer

WAYS: dict[str, dict[str, Any]] = {
    "kernel by kernel": {"captures": False},
    "one graph": {"captures": True},
    "compiled": {"captures": False, "compiles": True},
    "compiled, one graph": {"captures": True, "compiles": True},
}


def timed(work: Callable[[], Any], seconds: float) -> float:
    """Mean seconds per call of `work`, called for about `seconds`."""
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
        count += 5
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="cifar-resnet18")
    parser.add_argument("--recipe", default="cifar")
    parser.add_argument("--method", help="the recipe's own by default")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--source", type=int, help="side of the images that views are cut from")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default=",".join(map(str, range(len(WAYS)))), help="numbers of the ways, in order")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="kernels by their time, of the last way")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    table = merge(
        {"data": "-", "seed": 0, "eval": {"size": arguments.size}, **preset(arguments.recipe, arguments.method)},
        {"encoder": {"name": arguments.encoder, "size": arguments.size}, "views": {"size": arguments.size}},
    )
    recipe = read(merge(table, {"train": {"batch_size": arguments.batch}}))
    draws = torch.Generator(device).manual_seed(0)
    side = arguments.source or arguments.size
    shape = (arguments.batch, side, side, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=draws).permute(0, 3, 1, 2)
    batch = Batch(images, None, torch.arange(arguments.batch, device=device))
    chosen = [list(WAYS)[int(number)] for number in arguments.ways.split(",")]
    works: dict[str, Step] = {}
    about: dict[str, Any] = {}
    for way in chosen:
        compute = Compute(device, "bf16")
        torch.cuda.reset_peak_memory_stats()
        method = compute.place(build_method(recipe, arguments.batch)).train()
        step = Step(method, optimizer(method, recipe), recipe.views.each(), compute, **WAYS[way])
        start = time.perf_counter()
        for number in range(6):
            loss, std = step(batch, 0, number)
        torch.cuda.synchronize()
        about[way] = {
            "start_seconds": time.perf_counter() - start,
            "loss": float(loss),
            "std": float(std),
            "memory_mb": torch.cuda.max_memory_allocated() / 1e6,
        }
        print(way, about[way], flush=True)
        works[way] = step
    if not arguments.repeats:
        return
    rates: dict[str, dict[str, list[float]]] = {way: {"step": [], "whole": [], "views": []} for way in chosen}
    for _ in range(arguments.repeats):
        for way, step in works.items():
            views = [view.clone() for view in step.views(batch, 0, 0)]
            for name, work in {
                "step": lambda step=step, views=views: step.update(views, batch.index),
                "whole": lambda step=step: step(batch, 0, 0),
                "views": lambda step=step: step.views(batch, 0, 0),
            }.items():
                seconds = arguments.seconds / (3 if name == "views" else 1)
                rates[way][name].append(arguments.batch / timed(work, seconds))
    for way in chosen:
        figures = {name: statistics.median(values) for name, values in rates[way].items()}
        line = "   ".join(f"{name} {value:9.0f}" for name, value in figures.items())
        print(f"{way:32s} {line}   whole/step {figures['whole'] / figures['step']:.3f}", flush=True)
    if arguments.profile:
        step = works[chosen[-1]]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for number in range(3):
                step(batch, 0, number)
            torch.cuda.synchronize()
        arguments.profile.write_text(
            profile.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=110)
        )
    if arguments.json:
        result = {"environment": describe(), "settings": vars(arguments) | {"json": None, "profile": None}}
        arguments.json.write_text(json.dumps({**result, "about": about, "rates": rates}, indent=2) + "\n")


if __name__ == "__main__":
    main()
