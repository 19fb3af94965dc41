"""The command line: parse, call one function, print. What a verb needs is imported inside it, so --help is instant."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simsiam.compute import launched
from simsiam.config import Interrupted, UserError

if TYPE_CHECKING:
    from simsiam.console import Console

app = typer.Typer(
    help="Point it at a folder of unlabelled images: an encoder that has learnt from them, and proof of what it learnt.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads that decode images; default: the cores there are.")]
Run = Annotated[Path, typer.Argument(help="A run folder, as `simsiam train` writes it.", show_default=False)]
Embedded = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `simsiam embed` wrote.", show_default=False)
]
_DATA = (
    "A folder of images (any depth, any mix), a Parquet file or folder, a tar, a zip, a shard pattern like "
    "'shard-{000..009}.tar', or a torchvision data set's name."
)


class OnCollapse(StrEnum):
    """What the collapse guard does."""

    stop = "stop"
    go_on = "continue"


class Scale(StrEnum):
    """How much an experiment takes."""

    thin = "thin"
    cifar = "cifar"
    imagenet = "imagenet"


class Precision(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Target(StrEnum):
    """What `export` writes for."""

    torchvision = "torchvision"
    timm = "timm"
    onnx = "onnx"
    safetensors = "safetensors"


@app.command()
def train(
    data: Annotated[str | None, typer.Argument(help=_DATA + " None: the bundled demo set.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings, like train.lr=0.1.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; default: a new one under runs/.")] = None,
    method: Annotated[str | None, typer.Option(help="See `simsiam list`.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Ours, torchvision's or timm's, by name.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the images.")] = None,
    budget: Annotated[str | None, typer.Option(help="Train for this time, like 10m; the schedule follows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the views, and of the images in use, in pixels.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A built-in recipe's name, or a TOML file.")] = None,
    init: Annotated[str | None, typer.Option(help="A run to start from: its weights, and its settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in -o.")] = False,
    on_collapse: Annotated[OnCollapse | None, typer.Option(help="What the guard does. Default: stop.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: the faster one, measured.")] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same weights.")] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images.

    On several GPUs: torchrun --nproc-per-node 4 -m simsiam train DATA ...
    """
    console = _console()
    texts = list(overrides or [])
    if data is not None and "=" in data and not os.path.exists(data):
        texts.insert(0, data)
        data = None
    from simsiam.train import train as run_training

    summary = run_training(
        data,
        out,
        recipe=recipe,
        overrides=texts,
        size=size,
        resume=resume,
        device=device,
        workers=workers,
        listener=console,
        method=method,
        encoder=encoder,
        epochs=epochs,
        budget=budget,
        batch_size=batch_size,
        init=init,
        seed=seed,
        precision=None if precision is None else precision.value,
        on_collapse=None if on_collapse is None else on_collapse.value,
    )
    from simsiam.show.report import write_report

    if not launched():
        page = write_report(Path(summary["run"]))
        _training_table(console, summary)
        console.say(f"Report   {page}")
        console.say(f"Next     simsiam evaluate {summary['run']}")
        console.say(f"         simsiam embed {summary['run']} {summary['data']} -o DIR")
        if as_json:
            _print_json(summary)
    if summary["verdict"] != "healthy":
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Argument(help="Labelled images; default: the run's own.", show_default=False)
    ] = None,
    only: Annotated[str | None, typer.Option(help="Some evaluations only, like knn,linear.")] = None,
    sgd: Annotated[
        bool, typer.Option("--sgd", help="The paper's linear protocol: LARS, 90 epochs, crops and flips.")
    ] = False,
    k: Annotated[
        int | None,
        typer.Option(min=1, help="Neighbours of kNN; default: 200, or 20 where classes have fewer than 1,000 images."),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of splits and draws.")] = 0,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure a run: kNN, linear probe, few-shot and collapse, beside raw pixels and the untrained encoder."""
    console = _console()
    from simsiam.assess import evaluate_run
    from simsiam.show.report import write_report

    chosen = None if only is None else [name.strip() for name in only.split(",")]
    result = evaluate_run(
        run, data, names=chosen, sgd=sgd, k=k, device=device, seed=seed, workers=workers, listener=console
    )
    console.close()
    _evaluation_table(console, result)
    if data is None:
        console.say(f"Report   {write_report(run)}")
    if as_json:
        _print_json(result)


@app.command()
def embed(
    run: Run,
    data: Annotated[str, typer.Argument(help=_DATA, show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for vectors.npy, items.parquet, meta.json.")],
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Turn images into vectors: one row for each image, in plain files."""
    console = _console()
    from simsiam.embeddings import embed_to

    result = embed_to(run, data, out, device, workers, console.decoding, console.embedding)
    console.close()
    for bad in result["bad_files"]:
        console.say(f"Bad file: {bad['path']}: {bad['reason']}")
    console.say(
        f"{result['vectors']:,} vectors of length {result['dim']} in {out}, {result['new']:,} of them new, "
        f"{len(result['bad_files']):,} bad files left out."
    )
    console.say(f"Next     simsiam view {out}")
    console.say(f"         simsiam duplicates {out}")
    if as_json:
        _print_json(result)


@app.command()
def search(
    embeddings: Embedded,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files, or ids of stored images.", show_default=False)
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours of each.")] = 10,
    index: Annotated[
        bool | None, typer.Option("--index/--exact", help="Default: compare all, up to a million; an index beyond.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the stored images that are most alike to an image."""
    console = _console()
    from simsiam.search import search as find

    found = find(embeddings, images, k, index=index, device=device, progress=console.say)
    if as_json:
        _print_json(found)
        return
    for result in found:
        rows = [[each["id"], f"{each['score']:.3f}"] for each in result["neighbours"]]
        console.results(result["query"], ["most alike", "cosine"], rows)


@app.command()
def duplicates(
    embeddings: Embedded,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Cosine similarity that decides alone. Default: measured on altered copies."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find images that are one picture: identical, saved anew, scaled, cropped a little or mirrored."""
    console = _console()
    from simsiam.explore import near_duplicates

    found = near_duplicates(embeddings, threshold, device=device, progress=console.say)
    _duplicates_table(console, found)
    if as_json:
        _print_json(found)


@app.command()
def clusters(
    embeddings: Embedded,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=2, help="Clusters; default: 20, a tenth of the images at most.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of k-means.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Sort the images into clusters, and name those that are like no other."""
    console = _console()
    from simsiam.explore import clusters as find

    found = find(embeddings, count, seed=seed, device=device, progress=console.say)
    _clusters_table(console, found)
    if as_json:
        _print_json(found)


@app.command()
def view(
    embeddings: Embedded,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    device: Device = "auto",
) -> None:
    """Open a local web page to look through the images: map, search by image, clusters, duplicates."""
    console = _console()
    from simsiam.show.viewer import serve

    def ready(address: str) -> None:
        console.say(f"Look at  {address}   (Ctrl-C ends it)")
        if browser:
            import webbrowser

            webbrowser.open(address)

    serve(embeddings, host=host, port=port, device=device, ready=ready)


@app.command()
def export(
    run: Run,
    to: Annotated[Target, typer.Option(help="Software that is to read the file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File or folder; default: export/ in RUN.")] = None,
    with_preprocessing: Annotated[
        bool, typer.Option("--with-preprocessing", help="ONNX: takes uint8 pixels [B,H,W,3] of any size.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the encoder for other software: torchvision, timm, ONNX or safetensors."""
    console = _console()
    from simsiam.export import export as write

    result = write(run, to.value, out, with_preprocessing=with_preprocessing)
    console.say(f"Written  {result['path']}; its features differ from ours by {result['max_error']:.1g} at most")
    console.say(f"Use      {result['use']}")
    p = result["preprocessing"]
    if p is not None:
        console.say(
            f"Input    RGB, short side {round(p['size'] / p['share'])} and central {p['size']} pixels, "
            f"(x / 255 - mean) / std with mean {p['mean']} and std {p['std']}"
        )
    if as_json:
        _print_json(result)


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth.tar of the released SimSiam.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder; a new one.")],
    encoder: Annotated[str | None, typer.Option(help="A ResNet of torchvision, where the file names none.")] = None,
    data: Annotated[str | None, typer.Option(help="Images that `evaluate RUN` takes. Default: ImageNet.")] = None,
    as_json: Json = False,
) -> None:
    """Make a run of a checkpoint that the authors released, or that their code wrote."""
    console = _console()
    from simsiam.released import import_released

    summary = import_released(checkpoint, out, encoder=encoder, data=data)
    parts = "encoder, heads and momentum" if summary["imported"]["momentum"] else "encoder and heads, no momentum"
    console.say(
        f"Imported {summary['encoder']} after {summary['steps']:,} steps: "
        f"{parts if summary['imported']['heads'] else 'the encoder alone'}, in {summary['run']}"
    )
    console.say(f"Next     simsiam evaluate {summary['run']} DATA")
    console.say(f"         simsiam embed {summary['run']} DATA -o DIR")
    if as_json:
        _print_json(summary)


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Write the run's page, report.html: curves, views, neighbours, map, results."""
    console = _console()
    from simsiam.show.report import write_report

    page = write_report(run)
    console.say(f"Report   {page}")
    if as_json:
        _print_json({"report": str(page)})


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="An experiment; none: list them.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help=_DATA + " Default at the scale thin: the demo set.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder; what it holds already is not run again.")
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="thin: minutes on a CPU; cifar and imagenet: the paper's, on a GPU.")
    ] = Scale.thin,
    epochs: Annotated[float | None, typer.Option(help="Default: 10 for thin, 200 for cifar, 100 for imagenet.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 2,
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Run an experiment of the paper and set the figures beside the published ones."""
    console = _console()
    from simsiam import reproduce as experiments

    if name is None:
        found = {each: experiments.get(each) for each in experiments.names()}
        for each, experiment in found.items():
            console.entry(each, f"{experiment.title} ({experiment.source}; {len(experiment.variants)} variants)")
        if as_json:
            _print_json([{"name": each, "title": e.title, "source": e.source} for each, e in found.items()])
        return
    result = experiments.run(
        name,
        data,
        out,
        scale=scale.value,
        epochs=epochs,
        seeds=seeds,
        device=device,
        workers=workers,
        listener=console,
    )
    console.close()
    rows = [
        [
            row["name"],
            _number(row["published"]),
            *(_spread(row, key) for key in ("linear", "knn")),
            _number(row["std"], 2),
            _number(row["effective_rank"]),
            ", ".join(dict.fromkeys(row["verdicts"])),
        ]
        for row in result["rows"]
    ]
    columns = ["variant", "published", "linear", "kNN", "std", "rank", "verdicts"]
    console.say("")
    console.results(f"{result['title']} ({result['source']}), n = {seeds}", columns, rows)
    console.say(
        "Order of variants published 1 point or more apart: "
        + ", ".join(f"{len(pairs)} pairs {kind}" for kind, pairs in result["pairs"].items())
        + "."
    )
    console.say(f"Table    {result['folder']}/table.md")
    console.say(f"Curves   {result['folder']}/curves.svg")
    if as_json:
        _print_json(result)


@app.command()
def plan(
    data: Annotated[str | None, typer.Argument(help=_DATA + " None: the bundled demo set.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings, like train.lr=0.1.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `simsiam list`.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Ours, torchvision's or timm's, by name.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the views, and of the images in use, in pixels.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A built-in recipe's name, or a TOML file.")] = None,
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Probe for half a minute: images/s, time to finish, memory, the bottleneck and what would fit."""
    console = _console()
    from simsiam.plan import plan as probe

    found = probe(
        data,
        recipe=recipe,
        overrides=overrides or [],
        size=size,
        device=device,
        workers=workers,
        method=method,
        encoder=encoder,
        epochs=epochs,
        batch_size=batch_size,
    )
    _plan_table(console, found)
    if as_json:
        _print_json(found)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help=_DATA, show_default=False)], workers: Workers = None, as_json: Json = False
) -> None:
    """Say what is in a data set before a long run: counts, sizes, modes, bad files, duplicates."""
    console = _console()
    from simsiam.data.check import check as look
    from simsiam.data.sources import open_images

    found = look(open_images(data), workers, console.checking)
    console.close()
    _check_table(console, found)
    if as_json:
        _print_json(found)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List methods, encoders, data sets, evaluations and recipes."""
    console = _console()
    from simsiam import catalogue

    found = catalogue.everything()
    for kind, entries in found.items():
        console.heading(kind)
        for says in dict.fromkeys(entries.values()):
            alike = [name for name, text in entries.items() if text == says]
            console.entry(", ".join(alike), says)
    if as_json:
        _print_json({kind: list(entries) for kind, entries in found.items()})


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if show:
        from simsiam import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line. Exit status: 0 done, 2 the user's mistake, 1 anything else."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        _last_line(f"Error in process {launched()}: {error}" if launched() else f"Error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _last_line("Interrupted.")
        sys.exit(1)
    except Interrupted as error:
        if not launched():  # one process says it for all
            _last_line(str(error))
        sys.exit(1)


# --- printing -------------------------------------------------------------------------------------------------------


def _console() -> Console:
    from simsiam.console import Console

    console = Console()
    console.show_warnings()
    return console


def _last_line(text: str) -> None:
    from rich.console import Console as Screen

    Screen(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _number(value: Any, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _spread(row: dict[str, Any], key: str) -> str:
    spread = row[f"{key}_std"]
    return _number(row[key]) + (f" ± {spread:.1f}" if spread is not None else "")


def _training_table(console: Console, summary: dict[str, Any]) -> None:
    from simsiam.config import show_duration

    knn = summary["knn"]
    console.say("")
    if summary["verdict"] != "healthy":
        console.say(f"{summary['verdict'].upper()}: {summary['evidence']} {summary['advice'] or ''}")
    rows = [
        ["loss", _number(summary["loss"], 3)],
        ["std of z/|z|, times sqrt(d) (1 healthy, 0 collapsed)", _number(summary["std"], 2)],
        [f"effective rank of z (of {summary['dim']})", _number(summary["effective_rank"])],
        ["verdict", summary["verdict"]],
        ["images/s", _number(summary["images_per_second"], 0)],
        ["epochs", f"{summary['epochs']:g}"],
        ["time", show_duration(summary["seconds"])],
    ]
    console.results("Training", ["", "value"], rows)
    if knn:
        _comparison(
            console, f"kNN, percent right (k={knn['k']}, T={knn['T']}, {knn['test']:,} held-out images)", {"kNN": knn}
        )


def _comparison(console: Console, title: str, results: dict[str, Any]) -> None:
    kinds = ("pixels", "untrained", "trained")
    rows = [[name, *(_number(figures[kind]) for kind in kinds)] for name, figures in results.items()]
    console.results(title, ["", "raw pixels", "untrained encoder", "trained"], rows)


def _evaluation_table(console: Console, result: dict[str, Any]) -> None:
    named = {name: figures for name, figures in result.items() if isinstance(figures, dict) and "trained" in figures}
    if named:
        _comparison(console, "Percent right, higher is better", named)
        for name, figures in named.items():
            settings = {key: value for key, value in figures.items() if key not in ("trained", "untrained", "pixels")}
            plain = ", ".join(f"{key} {value}" for key, value in settings.items() if not isinstance(value, dict | list))
            console.say(f"  {name}: {plain}")
    else:
        console.say("No labels, so no kNN, linear or few-shot figures: only what needs none.")
    collapse = result.get("collapse")
    if collapse:
        console.say(
            f"Collapse: {collapse['verdict']}; std {_number(collapse['std'], 2)} (1 healthy, 0 collapsed), "
            f"effective rank {_number(collapse['effective_rank'])} of {collapse['dim']}."
        )


def _plan_table(console: Console, found: dict[str, Any]) -> None:
    from simsiam.config import show_duration

    def memory(count: int | None) -> str:
        return "unknown" if count is None else f"{count / 1e9:,.1f} GB" if count > 1e9 else f"{count / 1e6:,.0f} MB"

    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["shares"].items())
    fits = ", ".join(f"{size} ({memory(count)})" for size, count in found["fits"].items())
    lengths = ", ".join(f"{text}: {epochs:,g}" for text, epochs in found["epochs_in"].items())
    rows = [
        [
            "run",
            f"{found['method']}, {found['encoder']}, batch {found['batch_size']}, {found['device']}, {found['precision']}",
        ],
        [
            "decoding, once",
            f"{found['decode_images_per_second']:,.0f} images/s, {show_duration(found['decode_seconds'])}, "
            f"{memory(found['cache_bytes'])} on disk",
        ],
        [
            "training",
            f"{found['images_per_second']:,.0f} images/s, {show_duration(found['seconds_per_epoch'])} an epoch",
        ],
        ["time to finish", f"{found['epochs']:g} epochs, {show_duration(found['seconds'])}"],
        ["bottleneck", f"{found['bottleneck']} ({shares})"],
        ["epochs that fit into", lengths],
        ["memory", f"about {memory(found['memory_bytes'])} of {memory(found['memory_available'])}"],
        ["batches that fit", fits or "none: choose a smaller encoder or size"],
    ]
    console.results(f"{found['images']:,} images", ["", ""], rows)


def _duplicates_table(console: Console, found: dict[str, Any]) -> None:
    groups = found["groups"]
    measured = (
        ""
        if found["recall"] is None
        else (
            f", and {found['pixel_threshold']:.3f} between the pictures: "
            f"{100 * found['recall']:.0f} % of altered copies pass both"
        )
    )
    console.say(f"Alike means a similarity of {found['threshold']:.3f} or more{measured}.")
    console.say(
        f"{found['copies']:,} of {found['images']:,} images could go: they are copies of another, in {len(groups):,} groups."
        if groups
        else f"None of {found['images']:,} images is a copy of another."
    )
    for group in groups[:10]:
        first, *others = group
        console.say(f"\n  {first['id']}")
        for other in others[:5]:
            how = "the same pixels" if other["identical"] else f"{other['score']:.3f}"
            console.say(f"    {other['id']}  {how}")
        if len(others) > 5:
            console.say(f"    ... and {len(others) - 5:,} more")
    if len(groups) > 10:
        console.say(f"\n  ... and {len(groups) - 10:,} more groups: --json lists all, `simsiam view` shows them.")


def _clusters_table(console: Console, found: dict[str, Any]) -> None:
    labelled = found["agreement"] is not None
    rows = []
    for each in found["clusters"]:
        classes = list((each["classes"] or {}).items())[:2]
        shares = [", ".join(f"{name} {100 * share:.0f} %" for name, share in classes)] if labelled else []
        rows.append([str(each["cluster"]), f"{each['images']:,}", *shares, each["examples"][0]])
    columns = ["cluster", "images", *(["classes"] if labelled else []), "nearest to the centre"]
    console.results(f"{found['images']:,} images in {found['count']} clusters", columns, rows)
    if labelled:
        nmi, purity = found["agreement"]["nmi"], found["agreement"]["purity"]
        console.say(
            f"Agreement with the labels: purity {purity:.2f}, normalised mutual information {nmi:.2f} (1 is full)."
        )
    console.say("Like no other: " + ", ".join(each["id"] for each in found["odd"][:5]))
    console.say(f"Written  {found['file']}: the cluster of every image")


def _check_table(console: Console, found: dict[str, Any]) -> None:
    sizes, splits = found["sizes"], found["splits"]
    labels = found["labels"]
    extra = sum(len(group) - 1 for group in found["duplicates"])
    rows = [
        ["images", f"{found['images']:,} ({splits['train']:,} to train on, {splits['test']:,} in the test split)"],
        ["on disk", f"{found['bytes'] / 1e6:,.1f} MB"],
        ["bad files", f"{len(found['bad_files']):,}"],
        ["byte-identical copies", f"{extra:,}" + _across(found)],
        ["modes", _counts(found["modes"])],
        ["formats", _counts(found["formats"])],
    ]
    if sizes:
        rows[2:2] = [
            ["width x height", "  ".join(f"{key} {sizes[key][0]}x{sizes[key][1]}" for key in ("min", "median", "max"))],
            ["short side", "  ".join(f"{key} {value}" for key, value in sizes["short_side"].items())],
        ]
    rows.append(["labels", "none found" if labels is None else f"{len(labels)}: {_counts(labels)}"])
    console.results(found["name"], ["", ""], rows)
    for bad in found["bad_files"][:20]:
        console.say(f"Bad file: {bad['path']}: {bad['reason']}")
    for group in found["duplicates"][:10]:
        console.say(f"Identical: {', '.join(group[:6])}{' ...' if len(group) > 6 else ''}")
    hidden = max(0, len(found["bad_files"]) - 20) + max(0, len(found["duplicates"]) - 10)
    if hidden:
        console.say(f"... and {hidden:,} more: --json lists all.")


def _across(found: dict[str, Any]) -> str:
    groups = found["duplicates_across_splits"]
    return f" ({groups:,} groups reach from the training into the test split)" if groups else ""


def _counts(counts: dict[str, int]) -> str:
    shown = list(counts.items())[:8]
    rest = len(counts) - len(shown)
    return ", ".join(f"{name} {count:,}" for name, count in shown) + (f", and {rest} more" if rest else "")
