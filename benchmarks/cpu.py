"""Speed of our kernels on this CPU: a training step and inference, with torch's operations and with ours.

    python benchmarks/cpu.py [--encoder thin-resnet18] [--size 24 96] [--batch 128] [--rounds 20] [--json FILE]

Images are random pixels of the size that the cache would store. The variants alternate, one call each per round, and
ratios are taken within a round, so that changes in machine speed affect both sides. Figures are medians ± std.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training import median_and_std

from simsiam import kernels
from simsiam.compute import Compute, computes_bf16, describe, set_threads
from simsiam.config import merge
from simsiam.data.loader import Batch
from simsiam.encoders import EncoderSpec, build, in_use, view_dtype
from simsiam.features import preprocessing
from simsiam.kernels import Packed
from simsiam.recipe import preset, read
from simsiam.step import Step
from simsiam.train import build_method, optimizer

Ways = dict[str, Callable[[], Any]]


def packed(count: int, side: int) -> Packed:
    """`count` random images with short side `side`, a quarter wider than high."""
    sizes = np.array([(side, side * 5 // 4)] * count, np.int32)
    length = 3 * int(sizes[0].prod())
    pixels = np.random.default_rng(0).integers(0, 256, count * length, dtype=np.uint8)
    return Packed(pixels, np.arange(count, dtype=np.int64) * length, sizes)


def training(encoder: str, size: int, batch_size: int, compute: Compute) -> Ways:
    table = merge(
        {"data": "-", "seed": 0, "eval": {"size": size}, **preset("thin", None)},
        {"encoder": {"name": encoder, "size": size}, "views": {"size": size}, "train": {"batch_size": batch_size}},
    )
    recipe = read(table)
    method = compute.place(build_method(recipe, batch_size)).train()
    step = Step(method, optimizer(method, recipe), recipe.views.each(), compute)
    images = packed(batch_size, preprocessing(size, recipe.views.mean, recipe.views.std).short_side)
    given = images.to(compute.device)
    batch = Batch(given, torch.from_numpy(images.sizes), torch.arange(batch_size))
    views = step.views(batch, 0)

    def by_torch() -> None:
        with kernels.off():
            step.update(views, batch.index)

    return {
        "by torch's operations": by_torch,
        "ours": lambda: step.update(views, batch.index),
        "ours, its views too": lambda: step(batch, 0),
    }


def using(name: str, size: int, batch_size: int, compute: Compute) -> Ways:
    encoder = build(EncoderSpec(name, size), 0).eval()
    compute.place(encoder)
    prepare = preprocessing(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = packed(batch_size, prepare.short_side)
    given, sizes = images.to(compute.device), torch.from_numpy(images.sizes)
    folded = in_use(encoder, compute)
    x, fitting = prepare(given, sizes), prepare(given, sizes, view_dtype(folded))

    def features(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), compute.autocast():
            return network(x).float()

    def by_torch() -> None:
        with kernels.off():
            features(encoder, x)

    return {
        "by torch's operations": by_torch,
        "ours, as it trains": lambda: features(encoder, x),
        "ours": lambda: features(folded, fitting),
        "ours, its views too": lambda: features(folded, prepare(given, sizes, view_dtype(folded))),
    }


def in_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, after two warm-up rounds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 2):
        for name in names if number % 2 else names[::-1]:
            start = time.perf_counter()
            ways[name]()
            if number > 1:
                taken[name].append(time.perf_counter() - start)
    return taken


def told(values: list[float]) -> str:
    median, std = median_and_std(values)
    return f"{median:.3f} ± {std:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="thin-resnet18")
    parser.add_argument("--size", type=int, nargs="+", default=[24, 96])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 where the processor computes with it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_threads()
    device = torch.device("cpu")
    compute = Compute(device, arguments.precision or ("bf16" if computes_bf16(device) else "fp32"))
    results: dict[str, Any] = {}
    for size in arguments.size:
        for kind, make in {"step": training, "in use": using}.items():
            taken = in_turns(make(arguments.encoder, size, arguments.batch, compute), arguments.rounds)
            print(f"{arguments.encoder}, {size} px, {arguments.batch} images, {compute.precision}, {kind}")
            for name, seconds in taken.items():
                ratio = [one / other for one, other in zip(taken["by torch's operations"], seconds, strict=True)]
                gain = "" if seconds is taken["by torch's operations"] else f"   {told(ratio)} times as fast"
                print(f"  {name:24s} {arguments.batch / statistics.median(seconds):8.0f} images/s{gain}", flush=True)
            share = [one / other for one, other in zip(taken["ours"], taken["ours, its views too"], strict=True)]
            print(f"  without its views it takes {told(share)} of the time", flush=True)
            results[f"{size} px, {kind}"] = taken
    if arguments.json:
        settings = vars(arguments) | {"json": None, "precision": compute.precision}
        found = {"environment": describe(), "settings": settings, "seconds": results}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
