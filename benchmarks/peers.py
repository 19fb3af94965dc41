"""Compare ours with peers and with the limit: the same images, model, batch and view size, alternating in one process.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py [--only training,views] [--seconds 10] [--repeats 3] [--data DATA] [--json FILE]

    training  images/s end to end: `simsiam.train`, the bare step on one batch (the limit), the peers in pipelines.py
    views     images/s for two views each of images already decoded
    decode    images/s from JPEG files to pixels of a given short side; and of the whole first epoch with two views
    embed     images/s of inference, against the bare forward pass (the limit)
    search    seconds for the nearest neighbours of many queries, against the bare matrix product (the limit)
    startup   seconds to start a new process
    memory    peak of a training process with its workers, MB (proportional set size: a shared page counts once)
    growth    microseconds per image as a data set grows; --counts 1000 10000 100000 1000000 for the long version

Contenders alternate, in a different order each round. A ratio is taken within a round and is the factor by which ours
is better; median and std are over the rounds. Process start-up and the first steps are not counted (except for ours in
decode). "Best" is bf16 autocast (unless the processor emulates it), channels_last, persistent workers and the fastest
choice of workers and threads, found by trial beforehand.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import torch
from pipelines import LIGHTLY, PEERS, Clock, Peer, Pictures, Task, crops
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from training import limit, median_and_std, photo_folder

import simsiam
from simsiam import kernels
from simsiam.compute import cpu_quota, describe, generator, pick_device, set_threads
from simsiam.data.cache import build_cache, open_cache
from simsiam.data.decode import decode, in_order
from simsiam.data.loader import Loader
from simsiam.data.sources import open_images
from simsiam.data.views import ViewSettings, random_view
from simsiam.embeddings import embed_to
from simsiam.encoders import in_use, view_dtype
from simsiam.features import embed_rows, preprocessing
from simsiam.neighbours import top_k

Work = Callable[[], Any]
Contenders = dict[str, Callable[[], float] | str]
"""Ours first. A string in place of a function is the reason why the contender is left out."""
Costs = dict[str, dict[int, list[float]]]
"""Operation -> number of images -> microseconds per image, one figure per round."""
median = statistics.median


@dataclass
class Comparison:
    """The figures measured by each contender, one call per round."""

    title: str
    unit: str
    contenders: Contenders
    values: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int) -> None:
        here = [(name, work) for name, work in self.contenders.items() if not isinstance(work, str)]
        self.values = {name: [] for name, _ in here}
        for turn in range(rounds):
            # Ours goes first in the first round: the limits read their settings from its run.
            for name, work in [*here[turn % len(here) :], *here[: turn % len(here)]]:
                self.values[name].append(work())
                print(f"  {self.title}: {name} {self.values[name][-1]:.4g} {self.unit}", file=sys.stderr, flush=True)

    def ratios(self, name: str) -> list[float]:
        """The factor by which ours is better, for each round."""
        pairs = zip(next(iter(self.values.values())), self.values[name], strict=True)
        return [ours / its if self.unit.endswith("/s") else its / ours for ours, its in pairs]

    def table(self) -> str:
        lines = [f"| {self.title} | {self.unit} | std | ours is better by | std |", "|---|---|---|---|---|"]
        for name, values in self.values.items():
            figures = (*median_and_std(values), *median_and_std(self.ratios(name)))
            lines.append(f"| {name} | " + " | ".join(f"{figure:.4g}" for figure in figures) + " |")
        return "\n".join([*lines, *(f"| {name} | {why} | | | |" for name, why in self.left_out().items())])

    def left_out(self) -> dict[str, str]:
        return {name: f"left out: {why}" for name, why in self.contenders.items() if isinstance(why, str)}


# --- the images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The settings, and the data and runs made with them, once each, in `place`."""

    arguments: argparse.Namespace
    place: Path

    @property
    def device(self) -> torch.device:
        return pick_device(self.arguments.device)

    def task(self, size: int) -> Task:
        a = self.arguments
        return Task(self.folder(size), size, a.batch, self.device, a.encoder, a.seconds)

    def folder(self, size: int) -> Path:
        """Small images for small views; JPEG photographs of 120 to 280 px for larger ones."""
        if size <= 32:
            return self._made("small", partial(pipelines.small_images, self.arguments.data))
        return self._made("photos", photo_folder)

    def large_photos(self) -> Path:
        return self._made("large", pipelines.large_photos)

    def run(self, size: int) -> Path:
        """A run of ours, trained now if there is none."""
        run = self.place / f"run-{size}-auto"
        if not (run / "encoder.json").exists():
            ours(self, size)
        return run

    def _made(self, name: str, make: Callable[[Path, int], Any]) -> Path:
        folder = self.place / name
        if not folder.exists():
            folder.mkdir()
            make(folder, self.arguments.images)
        return folder


# --- training, memory -----------------------------------------------------------------------------------------------


def ours(bench: Bench, size: int, precision: str = "auto") -> float:
    """images/s of `simsiam.train` without evaluation, checkpoints and first step; model and views are the peers'."""
    task, run = bench.task(size), bench.place / f"run-{size}-{precision}"
    shutil.rmtree(run, ignore_errors=True)
    method = (
        f"dim={task.dim} projector_layers=3 projector_hidden={task.backbone().dim} predictor_hidden={task.predictor}"
    )
    train = f"batch_size={task.batch} precision={precision} budget={task.seconds:g}s on_collapse=continue"
    overrides = [f"method.{each}" for each in method.split()] + [f"train.{each}" for each in train.split()]
    overrides += [f"encoder.name={task.encoder}", "views.scale=[0.2, 1.0]", "views.blur_p=0.5"]
    overrides += ["train.compile=true"] if bench.arguments.compile else []
    device = bench.arguments.device
    build_cache(open_images(task.folder), decoded_side(size))  # decoding is measured in its own section
    summary = simsiam.train(str(task.folder), run, recipe="thin", size=size, device=device, overrides=overrides)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    if len(steps) < 2:
        return float(summary["images_per_second"])
    spans = [(b["step"] - a["step"], b["images_per_second"]) for a, b in itertools.pairwise(steps)]
    return sum(count for count, _ in spans) / sum(count / rate for count, rate in spans)


def by_torch_alone(work: Callable[[], float]) -> float:
    with kernels.off():
        return work()


def training_contenders(bench: Bench, size: int) -> Contenders:
    def bare() -> float:
        return limit(bench.run(size), bench.arguments.seconds, bench.arguments.device)

    contenders: Contenders = {
        "simsiam": partial(ours, bench, size),
        "simsiam, fp32": partial(ours, bench, size, "fp32"),
        "bare step (limit)": bare,
        "bare step, torch's operations alone": partial(by_torch_alone, bare),
    }
    for peer in chosen(bench.arguments):
        for best in (False, True):
            work = partial(theirs, bench, size, peer, best)
            contenders[f"{peer.name}, {'best' if best else 'defaults'}"] = peer.missing or work
    return contenders


def chosen(arguments: argparse.Namespace) -> list[Peer]:
    return [peer for peer in PEERS if arguments.peers is None or peer.name in arguments.peers.split(",")]


def theirs(bench: Bench, size: int, peer: Peer, best: bool) -> float:
    task = bench.task(size)
    knobs = pipelines.tuned(peer, task, bench.place) if best else pipelines.defaults(peer)
    return pipelines.images_per_second(peer, task, knobs)


def training(bench: Bench) -> Iterator[Comparison]:
    for size in bench.arguments.sizes:
        yield Comparison(f"training, {size} px", "images/s", training_contenders(bench, size))


def memory(bench: Bench) -> Iterator[Comparison]:
    for size in bench.arguments.sizes:
        for peer in chosen(bench.arguments):  # tuned here, not in the measured process
            if not peer.missing:
                pipelines.tuned(peer, bench.task(size), bench.place)
        bench.run(size)
        contenders: Contenders = {
            name: work if isinstance(work, str) else partial(peak_megabytes, bench, size, name)
            for name, work in training_contenders(bench, size).items()
        }
        yield Comparison(f"memory, {size} px", "MB", contenders)


def peak_megabytes(bench: Bench, size: int, contender: str) -> float:
    """Peak memory of a process that trains this contender, with all its descendants, sampled ten times a second."""
    again = ["--place", str(bench.place), "--child", contender, "--sizes", str(size)]
    child = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], *again], stdout=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, kilobytes(child.pid))
        time.sleep(0.1)
    assert child.returncode == 0, contender
    return peak / 1000


def kilobytes(pid: int) -> int:
    """Proportional set size of a process and its descendants (Linux); 0 if it has just ended."""
    try:
        own = next(
            line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")
        )
        children = [task.joinpath("children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (OSError, StopIteration):
        return 0
    return int(own.split()[1]) + sum(kilobytes(int(child)) for child in itertools.chain(*children))


# --- views, decode --------------------------------------------------------------------------------------------------


def decoded_side(size: int) -> int:
    """Short side of the images that views of this size are cropped from."""
    return preprocessing(size, pipelines.MEAN, pipelines.STD).short_side


def by_loader(bench: Bench, images: Any, view: Callable[[Any], Any], workers: int, collate: Any = None) -> float:
    """images/s of torch's DataLoader."""
    batch = bench.arguments.batch
    clock = Clock(bench.arguments.seconds, batch, bench.device)
    loader = DataLoader(Pictures(images, view), batch, num_workers=workers, collate_fn=collate)
    while True:
        for _ in loader:
            if clock.over():
                return clock.rate


def repeated(bench: Bench, work: Work, images: float, warmup: int = 1) -> float:
    """images/s of `work`, each call of which processes `images` images."""
    clock = Clock(bench.arguments.seconds, images, bench.device, warmup)
    while not clock.over():
        work()
    return clock.rate


def loader_contenders(bench: Bench, images: Any, views: dict[str, Any], collate: Any = None) -> Contenders:
    contenders: Contenders = {}
    for name, view in views.items():
        for workers in (0, cpu_quota()):
            work = partial(by_loader, bench, images, view, workers, collate)
            contenders[f"{name}, {workers} workers"] = view if isinstance(view, str) else work
    return contenders


def views(bench: Bench) -> Iterator[Comparison]:
    for size in bench.arguments.view_sizes:
        side, batch = decoded_side(size), bench.arguments.batch
        images = list(crops(side, side, 512))
        pixels = np.stack([np.asarray(image) for image in itertools.islice(itertools.cycle(images), batch)])
        on_device = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(bench.device)  # channels_last, as from a cache
        draw = partial(random_view, on_device, ViewSettings(size=size), generator(bench.device, 0))
        work = partial(repeated, bench, draw, batch / 2, warmup=6)  # two views make an image
        peers = {
            "torchvision v2": pipelines.Two(pipelines.torchvision_view(size)),
            "lightly": LIGHTLY.missing or pipelines.lightly_view(size),
        }
        contenders: Contenders = {"simsiam": work, **loader_contenders(bench, images, peers)}
        yield Comparison(f"views, {side} -> {size} px", "images/s", contenders)


def decode_once(bench: Bench, folder: Path, size: int, with_views: bool) -> float:
    """images/s from files to the cache, in whole builds until the time is up; optionally with one epoch of views."""
    short_side, directory = decoded_side(size), bench.place / "decoded"
    draws, count, seconds = generator(bench.device, 0), 0, 0.0
    while seconds < bench.arguments.seconds:
        start = time.perf_counter()
        if with_views:
            cache = open_cache(open_images(folder), short_side, directory)
            loader = Loader(cache, np.arange(len(cache)), min(bench.arguments.batch, len(cache)), bench.device, 0)
            for batch in loader.epoch(0):
                for _ in range(2):
                    random_view(batch.images, ViewSettings(size=size), draws, batch.sizes)
            count += loader.steps_per_epoch * loader.batch_size
        else:
            count += len(build_cache(open_images(folder), short_side, directory))
        seconds += time.perf_counter() - start
        shutil.rmtree(directory)
    return count / seconds


def decode_only(bench: Bench, folder: Path, short_side: int) -> float:
    images = open_images(folder)

    def work() -> None:
        for _ in in_order(lambda i: decode(images.read(i), short_side), len(images)):
            pass

    return repeated(bench, work, len(images))


def decoding(bench: Bench) -> Iterator[Comparison]:
    for size in (size for size in bench.arguments.view_sizes if size > 32):
        short_side = decoded_side(size)
        resize = {"torchvision": v2.Compose([v2.Resize(short_side), v2.PILToTensor()])}
        lightly = {"lightly": LIGHTLY.missing or pipelines.lightly_view(size)}
        for kind, folder in (("120 to 280 px", bench.folder(size)), ("1600x1200", bench.large_photos())):
            found = pipelines.files(folder)
            pixels: Contenders = {"simsiam": partial(decode_once, bench, folder, size, False)}
            pixels["simsiam, without the cache"] = partial(decode_only, bench, folder, short_side)
            pixels |= loader_contenders(bench, found, resize, collate=list)  # sizes differ: not stacked
            yield Comparison(f"decode, JPEG of {kind} to {short_side} px", "images/s", pixels)
            epoch: Contenders = {"simsiam": partial(decode_once, bench, folder, size, True)}
            epoch |= loader_contenders(bench, found, lightly)
            yield Comparison(f"first epoch, JPEG of {kind}, views of {size} px", "images/s", epoch)


# --- embed, search, start-up ----------------------------------------------------------------------------------------


def embed(bench: Bench) -> Iterator[Comparison]:
    for size in bench.arguments.sizes:
        yield Comparison(f"embed, {size} px", "images/s", embed_contenders(bench, size))


def embed_contenders(bench: Bench, size: int) -> Contenders:
    run, folder, out = bench.run(size), bench.folder(size), bench.place / "vectors"
    used = simsiam.load(run, bench.arguments.device)
    compute, prepare, encoder = used.compute_, used.preprocessing_, used.encoder_
    cache = build_cache(open_images(folder), prepare.short_side)
    rows = np.arange(len(cache))
    pixels, sizes = cache.batch(rows[:256])
    x = prepare(pixels.to(compute.device), sizes.to(compute.device))

    folded = in_use(encoder, compute)
    fitting = x.to(view_dtype(folded))

    def bare(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = x) -> None:
        with torch.inference_mode(), compute.autocast():
            network(x)

    def command() -> None:
        shutil.rmtree(out, ignore_errors=True)
        embed_to(run, folder, out, device=bench.arguments.device)

    return {
        "simsiam": partial(repeated, bench, partial(embed_rows, encoder, prepare, cache, rows, compute), len(rows)),
        "simsiam embed (with files and probe)": partial(repeated, bench, command, len(rows)),
        "bare forward, BN folded (limit)": partial(repeated, bench, partial(bare, folded, fitting), len(x)),
        "bare forward": partial(repeated, bench, partial(bare, encoder), len(x)),
        "bare forward, torch's operations alone": partial(
            by_torch_alone, partial(repeated, bench, partial(bare, encoder), len(x))
        ),
    }


def search(bench: Bench) -> Iterator[Comparison]:
    from sklearn.neighbors import NearestNeighbors

    draws = torch.Generator().manual_seed(0)
    count, asked = bench.arguments.bank, bench.arguments.queries
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 512, generator=draws)) for n in (count, asked))
    labels, columns, k = torch.randint(10, (count,), generator=draws), bank.T.contiguous(), min(200, count)

    def timed(work: Callable[[torch.Tensor], Any], block: int) -> float:
        work(queries[:64])
        return seconds(lambda: [work(part) for part in queries.split(block)])

    exact = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank)
    contenders: Contenders = {
        "simsiam": partial(timed, lambda part: top_k(part, bank, k), asked),
        "matrix product (limit)": partial(timed, lambda part: part @ columns, 512),
        "scikit-learn, brute force": partial(timed, exact.kneighbors, asked),
        "lightly, knn_predict": LIGHTLY.missing or "",
    }
    if not LIGHTLY.missing:
        from lightly.utils.benchmarking.knn import knn_predict

        predict = partial(knn_predict, feature_bank=columns, feature_labels=labels, num_classes=10, knn_k=k)
        contenders["lightly, knn_predict"] = partial(timed, predict, 512)
    yield Comparison(f"search, {k} nearest of {count:,} x 512 for {asked:,} queries", "s", contenders)


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def startup(bench: Bench) -> Iterator[Comparison]:
    lightly = "from lightly import loss, transforms; from lightly.models import modules"
    first = {"simsiam --help": ["-m", "simsiam", "--help"], "import simsiam": ["-c", "import simsiam"]}
    ready = {"simsiam": ["-c", "from simsiam.train import train"], "torch": ["-c", "import torch"]}
    yield Comparison(
        "start-up", "s", {name: fresh(command) for name, command in {**first, "python": ["-c", ""]}.items()}
    )
    contenders: Contenders = {name: fresh(command) for name, command in ready.items()}
    contenders["lightly"] = LIGHTLY.missing or fresh(["-c", lightly])
    yield Comparison("start-up, all imported that training takes", "s", contenders)


def fresh(command: list[str]) -> Callable[[], float]:
    """Return a timer of a separate Python process, run once here so that its files are in the page cache."""
    run = partial(subprocess.run, [sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    run()
    return partial(seconds, run)


# --- growth ---------------------------------------------------------------------------------------------------------


def growth(bench: Bench, rounds: int) -> Costs:
    costs: Costs = {}
    contents = []
    for image in crops(32, 32, 64):
        image.save(buffer := io.BytesIO(), "png")
        contents.append(buffer.getvalue())
    for count in bench.arguments.counts:
        folder = bench.place / "growing"
        for label in range(10):  # ImageFolder requires classes
            (folder / f"class{label}").mkdir(parents=True)
        for i in range(count):
            (folder / f"class{i % 10}" / f"{i:07d}.png").write_bytes(contents[i % len(contents)])
        for _ in range(rounds):
            for what, taken in costs_of(bench, folder):
                costs.setdefault(what, {}).setdefault(count, []).append(taken / count * 1e6)
                print(f"  growth, {count:,} images: {what} {taken:.4g} s", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return costs


def costs_of(bench: Bench, folder: Path) -> Iterator[tuple[str, float]]:
    """Yield (operation, seconds) for everything whose cost could grow faster than the data set."""
    directory = bench.place / "grown"
    images = open_images(folder)
    yield "list", seconds(lambda: open_images(folder))
    yield "list (torchvision ImageFolder)", seconds(lambda: ImageFolder(str(folder)))
    yield "build the cache", seconds(lambda: build_cache(images, None, directory))
    yield "open the cache", seconds(lambda: build_cache(images, None, directory))
    cache = build_cache(images, None, directory)
    rows, batch = np.arange(len(cache)), min(256, len(cache))
    yield "make the loader", seconds(lambda: Loader(cache, rows, batch, bench.device, 0))
    loader = Loader(cache, rows, batch, bench.device, 0)
    yield "order of an epoch", seconds(lambda: loader.order(1))
    yield "read an epoch", seconds(lambda: [None for _ in loader.epoch(1)])
    bank = torch.randn(len(cache), 128, generator=torch.Generator().manual_seed(0))
    yield "search for 100 queries", seconds(lambda: top_k(bank[:100], bank, 20))
    shutil.rmtree(directory)


def growth_table(costs: Costs, counts: list[int]) -> str:
    head = [f"| growth, µs per image | {' | '.join(f'{n:,}' for n in counts)} |", "|---" * (len(counts) + 1) + "|"]
    rows = [f"| {what} | {' | '.join(f'{median(by[n]):.3g}' for n in counts)} |" for what, by in costs.items()]
    return "\n".join([*head, *rows])


def growth_plot(costs: Costs, file: Path) -> None:
    import altair as alt

    points = [(what, n, median(values)) for what, by in costs.items() for n, values in by.items()]
    rows = [dict(zip(("what", "images", "µs per image"), point, strict=True)) for point in points]
    log = alt.Scale(type="log")
    chart = alt.Chart(alt.Data(values=rows), width=560, height=340).mark_line(point=True)
    x, y = alt.X("images:Q", scale=log), alt.Y("µs per image:Q", scale=log)
    chart.encode(x=x, y=y, color=alt.Color("what:N", title=None)).save(str(file))


# --- the command ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], Iterator[Comparison]]] = {
    "training": training,
    "views": views,
    "decode": decoding,
    "embed": embed,
    "search": search,
    "startup": startup,
    "memory": memory,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join([*SECTIONS, "growth"]), help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=10, help="of each timed piece")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; start-up has at least 5")
    parser.add_argument("--json", type=Path, help="all figures; the plot of growth goes beside it")
    parser.add_argument("--data", default="demo", help="small images: whatever `simsiam train` takes")
    parser.add_argument("--images", type=int, default=8000, help="of each made set, at most")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96], help="views in training, memory and embed")
    parser.add_argument("--view-sizes", type=int, nargs="+", default=[32, 96, 224], help="in views and decode")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--encoder", default="thin-resnet18")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="ours with train.compile=true, as in a long run on a GPU"
    )
    parser.add_argument("--peers", help="in training and memory, by name, separated by commas; all by default")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="images, for growth")
    parser.add_argument("--place", type=Path, help="folder for what is made; a temporary one by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # memory: a separate process that trains this contender
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    unknown = set(arguments.only) - {*SECTIONS, "growth"}
    strange = set((arguments.peers or LIGHTLY.name).split(",")) - {peer.name for peer in PEERS}
    if strange:
        parser.error(f"unknown peer {', '.join(sorted(strange))}: choose from {', '.join(peer.name for peer in PEERS)}")
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}: choose from {', '.join([*SECTIONS, 'growth'])}")
    return arguments


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("lightly", "pytorch-lightning", "torchvision", "scikit-learn", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def measure(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Run the sections, print their tables and return all figures."""
    bench = Bench(arguments, place)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    results: dict[str, Any] = {"environment": describe(), "peers": versions(), "settings": settings}
    results |= {"notes": pipelines.__doc__, "comparisons": []}
    for name in (name for name in arguments.only if name in SECTIONS):
        for comparison in SECTIONS[name](bench):
            comparison.run(max(5, arguments.repeats) if name == "startup" else arguments.repeats)
            print(comparison.table(), end="\n\n", flush=True)
            about = {"section": name, "title": comparison.title, "unit": comparison.unit, "values": comparison.values}
            ratios = {each: comparison.ratios(each) for each in comparison.values}
            results["comparisons"].append({**about, "ours_is_better_by": ratios, "left_out": comparison.left_out()})
    if "growth" in arguments.only:
        results["growth"] = growth(bench, arguments.repeats)
        print(growth_table(results["growth"], arguments.counts), end="\n\n", flush=True)
    results["best"] = {file.stem: json.loads(file.read_text()) for file in sorted(place.glob("best-*.json"))}
    return results


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore")  # peers warn about more workers than cores, pinned memory without a GPU, ...
    set_threads()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.place or Path(temporary)
        os.environ["SIMSIAM_CACHE"] = str(place / "cache")
        if arguments.child:
            work = training_contenders(Bench(arguments, place), arguments.sizes[0])[arguments.child]
            assert not isinstance(work, str)
            work()
            return
        results = measure(arguments, place)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        if "growth" in results:
            growth_plot(results["growth"], arguments.json.with_suffix(".growth.svg"))


if __name__ == "__main__":
    main()
