"""The command line: parse, call one function, print. Each command imports what it needs, so `--help` is instant."""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from simsiam import tables
from simsiam.compute import Precision, launched
from simsiam.config import MOST_SEED, Interrupted, UserError, counted

if TYPE_CHECKING:
    from simsiam.console import Console

app = typer.Typer(
    help="Train an image encoder on a folder of unlabelled images, measure what it learnt, and use it.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout; everything else goes to stderr.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode images; default: one per core, at most 16.")
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, as written by `simsiam train`.", show_default=False)
]
Embedded = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder written by `simsiam embed`.", show_default=False)
]
_CTRL_C = 130
_DATA = (
    "A folder of images (any depth, any mix), a Parquet file or folder, a tar, a zip, a shard pattern like "
    "'shard-{000..009}.tar', or the name of a torchvision data set."
)
Data = Annotated[str, typer.Argument(metavar="DATA", help=_DATA, show_default=False)]
DataOrDemo = Annotated[
    str | None, typer.Argument(metavar="DATA", help=_DATA + " Default: the bundled demo set.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. train.lr=0.1.", show_default=False)
]

Method = Annotated[str | None, typer.Option(help="See `simsiam list`.")]
EncoderName = Annotated[str | None, typer.Option(help="Name of a built-in, torchvision or timm encoder.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the images.")]
BatchSize = Annotated[int | None, typer.Option(help="Images per step.")]
Size = Annotated[int | None, typer.Option(help="Side of the views, and of images at inference, in pixels.")]
RecipeName = Annotated[str | None, typer.Option(help="Name of a built-in recipe, or a TOML file.")]


@app.command()
def train(
    data: DataOrDemo = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; default: a new one under runs/.")] = None,
    method: Method = None,
    encoder: EncoderName = None,
    epochs: Epochs = None,
    budget: Annotated[str | None, typer.Option(help="Training time, e.g. 10m; the schedule follows the clock.")] = None,
    batch_size: BatchSize = None,
    size: Size = None,
    recipe: RecipeName = None,
    init: Annotated[str | None, typer.Option(help="Run to start from: its weights and its settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in -o.")] = False,
    on_collapse: Annotated[
        Literal["stop", "continue"] | None, typer.Option(help="What to do on collapse. Default: stop.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Default: bf16 on GPUs that have it; on a CPU the faster one.")
    ] = None,
    device: Device = "auto",
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SEED, help="With --epochs on a CPU, the same seed gives the same weights."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Train an encoder on unlabelled images.

    On several GPUs: torchrun --nproc-per-node 4 -m simsiam train DATA ...
    """
    console = _console()
    data, texts = _data_and_overrides(data, overrides)
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
        precision=precision,
        on_collapse=on_collapse,
    )
    if not launched():
        tables.training(console, summary)
        _write_report(console, Path(summary["run"]))
        place, images = shlex.quote(summary["run"]), shlex.quote(summary["data"])
        if summary["verdict"] == "healthy":
            console.say(f"Next     simsiam evaluate {place}")
            console.say(f"         simsiam embed {place} {images} -o DIR")
        if as_json:
            _print_json(summary)
    if summary["verdict"] != "healthy":
        raise typer.Exit(1)


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Labelled images; default: those of the run.", show_default=False),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run only these evaluations, e.g. knn,linear.")] = None,
    sgd: Annotated[
        bool, typer.Option("--sgd", help="The paper's linear protocol: LARS, 90 epochs, crops and flips.")
    ] = False,
    finetune: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Also fine-tune the whole network on this share of the labels, at least 5 per class. Takes minutes.",
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--k",
            min=1,
            help="Neighbours for kNN; default: 200, or 20 if the median class has fewer than 1,000 images.",
        ),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of splits and random draws.")] = 0,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Compare a run to raw pixels and the untrained encoder: kNN, linear, few-shot, retrieval, clusters, collapse."""
    console = _console()
    from simsiam.assess import evaluate_run
    from simsiam.evaluate import names as evaluations

    chosen = None if only is None else [name.strip() for name in only.split(",")]
    result = evaluate_run(
        run,
        data,
        names=chosen,
        sgd=sgd,
        share=finetune,
        k=k,
        device=device,
        seed=seed,
        workers=workers,
        listener=console,
    )
    tables.evaluation(console, result)
    if result["file"]:
        _write_report(console, run)
    elif data is not None:
        console.say("The run's evaluation.json and report keep only results on the images it was trained on.")
    if as_json:
        _print_json({**dict.fromkeys((*evaluations(), "linear_sgd", "finetune")), **result})


@app.command()
def embed(
    run: Run,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for vectors.npy, items.parquet, meta.json.")],
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Turn images into vectors: one row per image, in plain files."""
    console = _console()
    from simsiam.embeddings import embed_to

    result = embed_to(run, data, out, device=device, workers=workers, listener=console)
    if hidden := tables.bad_files(console, result["bad_files"]):
        console.say(f"... and {hidden:,} more: --json lists all.")
    console.say(
        f"{counted(result['vectors'], 'vector')} of length {result['dim']} in {out}, {result['new']:,} of them new, "
        f"{counted(len(result['bad_files']), 'bad file')} left out."
    )
    place = shlex.quote(str(out))
    console.say(f"Next     simsiam view {place}")
    console.say(f"         simsiam duplicates {place}")
    if as_json:
        _print_json(result)


@app.command()
def search(
    embeddings: Embedded,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Image files, or ids of stored images.", show_default=False)
    ],
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours per image.")] = 10,
    index: Annotated[
        bool | None, typer.Option("--index/--exact", help="Default: exact up to a million vectors, an index beyond.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the stored images most similar to an image."""
    console = _console()
    from simsiam.search import search as find

    found = find(embeddings, images, k, index=index, device=device, listener=console)
    for result in found:
        if not result["neighbours"]:
            console.say(f"{result['query']}: {embeddings} contains no other image.")
            continue
        rows = [[each["id"], f"{each['score']:.3f}"] for each in result["neighbours"]]
        console.results(result["query"], ["most similar", "cosine"], rows)
    if as_json:
        _print_json(found)


@app.command()
def duplicates(
    embeddings: Embedded,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1, max=1, help="Decide by this cosine similarity alone. Default: measured on altered copies."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find near-duplicates: images that are identical, re-encoded, rescaled, slightly cropped or mirrored."""
    console = _console()
    from simsiam.duplicates import near_duplicates

    found = near_duplicates(embeddings, threshold, device=device, listener=console)
    tables.duplicates(console, found)
    if as_json:
        _print_json(found)


@app.command()
def clusters(
    embeddings: Embedded,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", min=2, help="Number of clusters; default: 20, at most a tenth of the images."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of k-means.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Group the images into clusters, and list the outliers."""
    console = _console()
    from simsiam.clusters import clusters as find

    found = find(embeddings, count, seed=seed, device=device, listener=console)
    tables.clusters(console, found)
    if as_json:
        _print_json(found)


@app.command()
def view(
    embeddings: Embedded,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    device: Device = "auto",
) -> None:
    """Open a local web page to browse the images: map, search by image, clusters, duplicates."""
    console = _console()
    from simsiam.show.viewer import serve

    def ready(address: str) -> None:
        console.say(f"Serving  {address}   (Ctrl-C to stop)")
        # Without a desktop, as over SSH, Python would open a text browser in this terminal and wait for it.
        desktop = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & os.environ.keys()
        if browser and desktop:
            import threading
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # it may wait for the page

    serve(embeddings, host=host, port=port, device=device, ready=ready)
    console.close()
    # What still computes for the page would hold this process until it is done. Files are written whole.
    atexit._run_exitfuncs()
    os._exit(0)


@app.command()
def export(
    run: Run,
    to: Annotated[
        Literal["torchvision", "timm", "onnx", "safetensors"],
        typer.Option(help="Format, or library that will read the file.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File or folder; default: export/ in RUN.")] = None,
    with_preprocessing: Annotated[
        bool,
        typer.Option("--with-preprocessing", help="ONNX only: the model takes uint8 pixels [B,H,W,3] of any size."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export the encoder to other software: torchvision, timm, ONNX or safetensors."""
    console = _console()
    from simsiam.export import export as write

    result = write(run, to, out, with_preprocessing=with_preprocessing)
    console.say(f"Written  {result['path']}; its features differ from ours by at most {result['max_error']:.1g}")
    console.say(f"Use      {result['use']}")
    p = result["preprocessing"]
    if p is not None:
        console.say(
            f"Input    RGB, resized (Pillow's bicubic) to a short side of {round(p['size'] / p['share'])}, central "
            f"{p['size']} pixels, "
            f"(x / 255 - mean) / std with mean {p['mean']} and std {p['std']}"
        )
    if as_json:
        _print_json(result)


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A .pth.tar checkpoint of the released SimSiam.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="New run folder.")],
    encoder: Annotated[str | None, typer.Option(help="A torchvision ResNet, if the file does not name one.")] = None,
    data: Annotated[str | None, typer.Option(help="Images that `evaluate RUN` uses. Default: ImageNet.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint released by the authors, or written by their code, into a run."""
    console = _console()
    from simsiam.released import import_released

    summary = import_released(checkpoint, out, encoder=encoder, data=data)
    parts = "encoder, heads and momentum" if summary["imported"]["momentum"] else "encoder and heads, no momentum"
    console.say(
        f"Imported {summary['encoder']} after {summary['steps']:,} steps: "
        f"{parts if summary['imported']['heads'] else 'encoder only'}, in {summary['run']}"
    )
    place = shlex.quote(summary["run"])
    console.say(f"Next     simsiam evaluate {place} DATA")
    console.say(f"         simsiam embed {place} DATA -o DIR")
    if as_json:
        _print_json(summary)


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Write the run's report, report.html: curves, views, neighbours, map, results."""
    console = _console()
    from simsiam.show.report import write_report

    page = write_report(run)
    console.say(f"Report   {page}")
    if as_json:
        _print_json({"report": str(page)})


@app.command()
def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(metavar="EXPERIMENT", help="Name of an experiment; default: list all.", show_default=False),
    ] = None,
    data: Annotated[str | None, typer.Option(help=_DATA + " Default with --scale thin: the demo set.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder; runs that it already contains are not repeated.")
    ] = None,
    scale: Annotated[
        Literal["thin", "cifar", "imagenet"],
        typer.Option(help="thin: minutes on a CPU; cifar, imagenet: the paper's scale, on a GPU."),
    ] = "thin",
    epochs: Annotated[float | None, typer.Option(help="Default: 10 for thin, 200 for cifar, 100 for imagenet.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 2,
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Run an experiment from the paper and compare the results with the published figures."""
    console = _console()
    from simsiam import reproduce as experiments

    if name is None:
        found = {each: experiments.get(each) for each in experiments.names()}
        for each, experiment in found.items():
            size = f"{len(experiment.variants)} variants" if experiment.variants else f"--scale {experiment.scales[0]}"
            console.entry(each, f"{experiment.title} ({experiment.source}; {size})")
        if as_json:
            _print_json([{"name": each, "title": e.title, "source": e.source} for each, e in found.items()])
        return
    result = experiments.run(
        name,
        data,
        out,
        scale=scale,
        epochs=epochs,
        seeds=seeds,
        device=device,
        workers=workers,
        listener=console,
    )
    tables.experiment(console, result)
    console.say(f"Table    {result['folder']}/table.md")
    console.say(f"Curves   {result['folder']}/curves.svg")
    if as_json:
        _print_json(result)


@app.command()
def plan(
    data: DataOrDemo = None,
    overrides: Overrides = None,
    method: Method = None,
    encoder: EncoderName = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    size: Size = None,
    recipe: RecipeName = None,
    device: Device = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Probe for half a minute: images/s, training time, memory, the bottleneck and what would fit."""
    console = _console()
    data, texts = _data_and_overrides(data, overrides)
    from simsiam.plan import plan as probe

    found = probe(
        data,
        recipe=recipe,
        overrides=texts,
        size=size,
        device=device,
        workers=workers,
        method=method,
        encoder=encoder,
        epochs=epochs,
        batch_size=batch_size,
    )
    tables.plan(console, found)
    if as_json:
        _print_json(found)


@app.command()
def check(data: Data, workers: Workers = None, as_json: Json = False) -> None:
    """Inspect a data set before a long run: counts, sizes, modes, bad files, duplicates."""
    console = _console()
    from simsiam.data.check import check as look

    found = look(data, workers, console)
    tables.check(console, found)
    if as_json:
        _print_json(found)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List methods, encoders, data sets, evaluations, experiments and recipes."""
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
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        from simsiam import __version__

        typer.echo(__version__)
        raise typer.Exit


def _called() -> Any:
    """Run the requested command. Raise KeyboardInterrupt on Ctrl-C, which typer turns into status 130 (older versions:
    into Abort)."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as error:
        if type(error).__name__ != "Abort":
            raise
        status = _CTRL_C
    finally:
        if _in_use is not None:
            _in_use.close()  # a progress bar left running hides the cursor
    if status == _CTRL_C:
        raise KeyboardInterrupt
    return status


def main() -> None:
    """Run the command line. Exit status: 0 success, 2 user error, 1 anything else."""
    for name in ("SIGTERM", "SIGHUP"):  # like Ctrl-C, so that temporary files are deleted; nohup has SIGHUP ignored
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(_called())
    except UserError as error:
        _last_line(f"Error in process {launched()}: {error}" if launched() else f"Error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _last_line("Interrupted.")
        sys.exit(1)
    except Interrupted as error:
        if not launched():  # only rank 0 reports it
            _last_line(str(error))
        sys.exit(1)
    except Exception as error:
        # A usage error, e.g. an unknown option. The class is click's, or typer's vendored copy of it.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "simsiam"
        message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
        message += "" if message.endswith("?") else "."
        if hasattr(error, "possibilities"):  # no such option; click would suggest --help for --lr
            option = getattr(error, "option_name", "")
            message = f"No such option: {option}."
            if close := [name for name in error.possibilities or () if name != "--help"]:
                message += f" Did you mean {close[0]}?"
            elif where.rpartition(" ")[2] in ("train", "plan"):
                message += f" Settings without an option are written {option.lstrip('-').replace('-', '_')}=VALUE."
        _last_line(f"Error: {message} See `{where} --help`.")
        sys.exit(2)


# --- printing -------------------------------------------------------------------------------------------------------


_in_use: Console | None = None


def _console() -> Console:
    """Return the console of the current command. `_called` closes it, however the command ends."""
    global _in_use
    from simsiam.console import Console

    console = _in_use = Console()
    console.show_warnings()
    return console


def _data_and_overrides(data: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Separate DATA from the settings. Without DATA, or with DATA behind a setting, a setting takes its place."""
    texts = list(overrides or [])
    if data is not None and re.match(r"\s*[\w.]+\s*=", data):
        from simsiam.data.sources import exists

        if not exists(data):
            texts = [data, *texts]
            data = next((text for text in texts if "=" not in text), None)
            if data is not None:
                texts.remove(data)
    for text in texts:
        if "=" not in text:  # e.g. an unquoted shard pattern, expanded by the shell
            raise UserError(
                f"{text} is not a setting such as train.lr=0.1, and DATA is already {data}: "
                "name one data set, and quote a pattern."
            )
    return data, texts


def _write_report(console: Console, run: Path) -> None:
    """Write the report of a run that has just changed, and name the file; a full disk costs a warning."""
    from simsiam.runs import REPORT, keep
    from simsiam.show.report import write_report

    if keep(lambda: write_report(run)):
        console.say(f"Report   {run / REPORT}")


def _last_line(text: str) -> None:
    from simsiam.console import screen, visible

    screen().print(visible(text), markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    if not sys.stdout:  # `>&-`
        raise UserError("Cannot write to stdout: it is closed.")
    try:
        typer.echo(json.dumps(value, indent=2))
    except BrokenPipeError:  # `| head`
        raise
    except OSError as error:
        raise UserError(f"Cannot write to stdout: {error.strerror or error}.") from None
