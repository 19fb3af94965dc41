"""The paper's experiments as commands: each TOML file in this folder defines one and gives it its name.

A file describes what the paper varies and what it found:

    title, source          a short description; the table or figure
    [settings]             for all variants
    [thin] [cifar] [imagenet]   override them at that scale
    [[variants]]
    name                   as in the paper's table
    published              linear top-1 on ImageNet (CIFAR-10 if the source says so), percent
    expect                 "collapse" if the paper's run collapses, "failure" if it fails in another way
    epochs                 multiple of the experiment's epochs; 1 by default
    scales                 those it can be run at; all by default
    [variants.settings]    [variants.thin] ...

`run` trains what is missing, one run folder per variant and seed, and compares the figures with the published ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from simsiam import methods
from simsiam.assess import evaluate_run
from simsiam.compute import pick_device
from simsiam.config import Interrupted, Table, UserError, as_path, counted, did_you_mean, merge, read_recipe
from simsiam.console import Listener
from simsiam.data.sources import open_images
from simsiam.defaults import largest_batch
from simsiam.recipe import preset
from simsiam.runs import RECIPE, SUMMARY, read_json, read_metrics, write_json, write_text
from simsiam.train import train

Scale = Literal["thin", "cifar", "imagenet"]
_RECIPES = {"thin": "demo", "cifar": "cifar", "imagenet": "imagenet"}
_EPOCHS = {"thin": 10.0, "cifar": 200.0, "imagenet": 100.0}
ACCURACIES = "accuracies.json"
"""In a run's folder: its accuracies as these experiments measure them."""
_CLEAR = 1.0
"""Minimum difference of two published figures, in percentage points, for their order to count."""


@dataclass(frozen=True)
class Variant:
    """A row of the paper's table."""

    name: str
    published: float | None = None
    """Linear accuracy in percent, in the paper's setting; None if the paper gives none."""
    expect: Literal["success", "collapse", "failure"] = "success"
    """The outcome that the paper reports; failure: it does not converge, or diverges."""
    epochs: float = 1.0
    """Multiple of the experiment's epochs."""
    scales: tuple[str, ...] = ("thin", "cifar", "imagenet")
    """Scales at which it is run."""
    settings: Table = field(default_factory=dict)
    """Differences from the scale's recipe."""

    @property
    def slug(self) -> str:
        """The name in a form that suits a folder."""
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name.lower()).split())


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper, registered by its file name."""

    name: str
    title: str
    source: str
    variants: tuple[Variant, ...]
    """The variants of the requested scale."""
    scales: tuple[str, ...]
    """Scales that have variants."""


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def get(name: str, scale: Scale = "thin") -> Experiment:
    """Read an experiment for a scale. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"Unknown experiment {name!r}.{did_you_mean(name, names())}")
    table = read_recipe(Path(__file__).with_name(f"{name}.toml"))
    shared = merge(table.get("settings", {}), table.get(scale, {}))
    variants = []
    for row in table["variants"]:
        own = merge(row.get("settings", {}), row.get(scale, {}))
        plain = {key: value for key, value in row.items() if key not in ("settings", "scales", *_RECIPES)}
        chosen = tuple(row.get("scales", _RECIPES))
        settings = merge(shared, own)
        method = methods.get(settings.get("method", {}).get("name", "simsiam"))
        if "predictor_lr" in method.Settings.__dataclass_fields__:  # as in the paper; the demo recipe's differs
            settings = merge({"method": {"predictor_lr": 1.0}}, settings)
        variant = Variant(**plain, scales=chosen, settings=settings)
        variants.append(variant)
    scales = tuple(each for each in _RECIPES if any(each in variant.scales for variant in variants))
    at_scale = tuple(variant for variant in variants if scale in variant.scales)
    return Experiment(name, table["title"], table["source"], at_scale, scales)


def run(
    name: str,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    scale: Scale = "thin",
    epochs: float | None = None,
    seeds: int = 2,
    device: str = "auto",
    workers: int | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Run the missing parts of an experiment and compare it with the published figures.

    Args:
        data: None for the demo set, only at the scale "thin".
        out: folder for the runs, `result.json`, `table.md` and `curves.svg`; None: runs/reproduce-NAME-SCALE. Finished
            runs in it are kept, interrupted ones resumed.
        epochs: None: 10 at the scale "thin", 200 at "cifar", 100 at "imagenet".
        seeds: number of runs per variant.
    Returns the contents of `result.json` and "folder". Raises UserError if `out` holds runs with other settings.
    """
    listener = listener or Listener()
    experiment = get(name, scale)
    if not experiment.variants:
        raise UserError(
            f"{name} is not available at the scale {scale!r}: add --scale {' or '.join(experiment.scales)}."
        )
    if data is None and scale != "thin":
        raise UserError(f"The scale {scale!r} needs data: add --data DATA.")
    if seeds < 1:
        raise UserError(f"seeds is {seeds}: it must be at least 1.")
    data = "demo" if data is None else str(data)
    epochs = _EPOCHS[scale] if epochs is None else epochs
    if epochs <= 0:
        raise UserError(f"epochs is {epochs:g}: it must be above 0.")
    pick_device(device)  # fail before anything is written
    folder = as_path(out or f"runs/reproduce-{name}-{scale}")
    _begin(folder, experiment, {"experiment": name, "scale": scale, "data": data, "epochs": epochs})
    total, number = len(experiment.variants) * seeds, 0
    rows = []
    for variant in experiment.variants:
        runs = []
        for seed in range(seeds):
            number += 1
            listener.say(f"{number} of {total}: {variant.name}, seed {seed}")
            place = folder / variant.slug / f"seed-{seed}"
            try:
                runs.append(_one(place, variant, seed, data, scale, epochs, device, workers, listener))
            except Interrupted as error:  # it says how to finish that run alone
                told = str(error).partition(" Resume with:")[0]
                raise Interrupted(f"{told} To go on, repeat the command: finished runs are kept.") from None
        rows.append(_row(variant, runs))
    result = {
        "experiment": name,
        "title": experiment.title,
        "source": experiment.source,
        "scale": scale,
        "data": data,
        "epochs": epochs,
        "seeds": seeds,
        "rows": rows,
        **compare(rows),
    }
    write_json(folder / "result.json", result)
    write_text(folder / "table.md", markdown(result))
    _draw_curves(folder, experiment.variants)
    return {**result, "folder": str(folder)}


def _batch(variant: Variant, scale: Scale) -> int:
    """The batch size that a variant or the preset of its method names; 0 if it has that of the recipe."""
    usual, method = preset(_RECIPES[scale]), variant.settings.get("method", {}).get("name")
    usual_size, size = (table["train"].get("batch_size", 0) for table in (usual, preset(_RECIPES[scale], method)))
    own: int = variant.settings.get("train", {}).get("batch_size", 0 if size == usual_size else size)
    return own


def _check_batches(experiment: Experiment, data: str, scale: Scale) -> None:
    """Raise UserError if there are too few images for the largest batch, which training would silently reduce."""
    most = max(_batch(variant, scale) for variant in experiment.variants)
    images = len(open_images(data).split()[0])
    if most and most > largest_batch(images):
        raise UserError(
            f"{experiment.name} has batches of {most:,} images and needs {4 * most:,} to train on: "
            f"{data} has {images:,}."
        )


def _begin(folder: Path, experiment: Experiment, settings: Table) -> None:
    """Write down the settings of a new experiment. Raises UserError if it cannot be run on these data or the folder
    holds runs with other settings."""
    path = folder / "experiment.json"
    if not any(folder.glob(f"*/seed-*/{RECIPE}")):  # new, or no run could start because of a mistake
        written = path.name, "result.json", "table.md", "curves.svg"
        own = {*written, *(variant.slug for variant in experiment.variants)}
        if folder.exists() and not (folder.is_dir() and {each.name for each in folder.iterdir()} <= own):
            raise UserError(f"{folder} exists and is not an experiment: choose another -o.")
        _check_batches(experiment, settings["data"], settings["scale"])
        write_json(path, settings)
    elif read_json(path) != settings:
        found = ", ".join(f"{key} {value}" for key, value in read_json(path).items())
        raise UserError(f"{folder} holds runs with other settings ({found}): use the same, or choose another -o.")


def _one(
    place: Path,
    variant: Variant,
    seed: int,
    data: str,
    scale: Scale,
    epochs: float,
    device: str,
    workers: int | None,
    listener: Listener,
) -> dict[str, Any]:
    """The figures of one run, which is trained and evaluated first unless that is done."""
    quiet = _Quiet(listener)
    if not (place / SUMMARY).exists():
        if (place / RECIPE).exists():
            train(out=place, resume=True, device=device, workers=workers, listener=quiet)
        else:
            train(
                data,
                place,
                recipe=_RECIPES[scale],
                **variant.settings,
                epochs=epochs * variant.epochs,
                seed=seed,
                on_collapse="continue",
                device=device,
                workers=workers,
                listener=quiet,
            )
    summary = read_json(place / SUMMARY)
    names = ("knn", "linear")
    accuracies: dict[str, float | None] = dict.fromkeys(names)
    if (place / ACCURACIES).exists():  # not evaluation.json, which `simsiam evaluate` may write with other settings
        accuracies = read_json(place / ACCURACIES)
    elif summary["verdict"] != "diverged":
        found = evaluate_run(place, names=names, baselines=False, device=device, workers=workers, listener=quiet)
        accuracies = {name: (found[name] or {}).get("trained") for name in names}
        write_json(place / ACCURACIES, accuracies)
    keys = ("verdict", "loss", "std", "effective_rank", "seconds", "images_per_second")
    return {**accuracies, **{key: summary[key] for key in keys}}


def _row(variant: Variant, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": variant.name, "published": variant.published, "expect": variant.expect}
    for key in ("linear", "knn", "std", "effective_rank", "loss"):
        values = [each[key] for each in runs if each[key] is not None]
        row[key] = round(statistics.mean(values), 4) if values else None
        row[f"{key}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        row[f"{key}_n"] = len(values)
    row |= {"n": len(runs), "verdicts": [each["verdict"] for each in runs], "runs": list(runs)}
    failed = [each["verdict"] != "healthy" for each in runs]
    row["verdict_agrees"] = (
        all(failed) if variant.expect == "collapse" else None if variant.expect == "failure" else not any(failed)
    )
    return row


def compare(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the order of the variants with the published one, pair by pair, and the verdicts with the expected ones.

    Only pairs whose published figures differ by at least 1 point count. They "agree" or "contradict" if our means
    differ by more than the larger of the two spreads; otherwise, or if a spread is unknown, they are "undecided".
    """
    pairs: dict[str, list[list[str]]] = {"agree": [], "contradict": [], "undecided": []}
    for i, first in enumerate(rows):
        for second in rows[i + 1 :]:
            if first["published"] is None or second["published"] is None or None in (first["linear"], second["linear"]):
                continue
            gap = first["published"] - second["published"]
            if abs(gap) < _CLEAR:
                continue
            ours = first["linear"] - second["linear"]
            spread = max(math.inf if row["linear_std"] is None else row["linear_std"] for row in (first, second))
            kind = "undecided" if abs(ours) <= spread else "agree" if ours * gap > 0 else "contradict"
            pairs[kind].append([first["name"], second["name"]])
    decided = [row["verdict_agrees"] for row in rows if row["verdict_agrees"] is not None]
    return {"pairs": pairs, "verdicts_agree": all(decided) if decided else None}


def figure(row: dict[str, Any], key: str, digits: int = 1) -> str:
    """Format a row's mean with its spread and, if some runs lack the figure (as diverged ones do), their number."""
    if row[key] is None:
        return "–"
    spread = row[f"{key}_std"]
    fewer = f" (n = {row[f'{key}_n']})" if row[f"{key}_n"] < row["n"] else ""
    return f"{row[key]:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "") + fewer


def markdown(result: dict[str, Any]) -> str:
    """The experiment's table of published figures, ours with spread, and verdicts, then how far the orders agree."""
    lines = [
        f"# {result['title']} ({result['source']})",
        "",
        f"Scale {result['scale']}, data {result['data']}, {counted(result['epochs'], 'epoch')}, "
        f"n = {counted(result['seeds'], 'seed')}; "
        "± is the standard deviation. Published: ImageNet, ResNet-50, 100 epochs, unless the source says otherwise.",
        "",
        "| variant | published linear | linear | kNN | std | effective rank | verdicts | as published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        published = "–" if row["published"] is None else f"{row['published']:.1f}"
        expected = {"success": "", "collapse": ", collapses", "failure": ", fails"}[row["expect"]]
        agrees = {True: "yes", False: "no", None: "–"}[row["verdict_agrees"]]
        cells = [row["name"], published + expected, figure(row, "linear"), figure(row, "knn")]
        cells += [figure(row, "std", 2), figure(row, "effective_rank"), ", ".join(row["verdicts"]), agrees]
        lines.append("| " + " | ".join(cells) + " |")
    pairs = result["pairs"]
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in pairs.items())
    lines += [
        "",
        f"Order of the variants by linear accuracy, over pairs published at least 1 point apart: {counts}.",
    ]
    lines += [f"- contradicts: {first} against {second}" for first, second in pairs["contradict"]]
    return "\n".join(lines) + "\n"


def _draw_curves(folder: Path, variants: Sequence[Variant]) -> None:
    """Draw `curves.svg`: loss and std over training for every variant's first seed, as in the paper's figure 2."""
    import altair as alt
    import vl_convert

    values = []
    for variant in variants:
        lines = [line for line in read_metrics(folder / variant.slug / "seed-0") if line["kind"] == "train"]
        for line in lines[:: max(1, len(lines) // 150)]:
            values += [
                {"variant": variant.name, "epoch": line["epoch"], "figure": figure, "value": line[key]}
                for key, figure in (("loss", "loss"), ("std", "std of z/|z| times sqrt(d)"))
            ]
    base = (
        alt.Chart(alt.Data(values=values))
        .mark_line()
        .encode(
            x=alt.X("epoch:Q", title="epoch"),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("variant:N", title=None, sort=[variant.name for variant in variants]),
        )
    )
    panels = [
        base.transform_filter(alt.datum.figure == figure).properties(width=360, height=220, title=figure)
        for figure in ("loss", "std of z/|z| times sqrt(d)")
    ]
    svg = vl_convert.vegalite_to_svg(alt.hconcat(*panels).configure(background="white").to_dict())
    write_text(folder / "curves.svg", svg)


class _Quiet(Listener):
    """For one run among many: passes on progress and messages, but not the plan or held-out figures."""

    def __init__(self, inner: Listener) -> None:
        self.inner = inner

    def step(self, figures: dict[str, Any], progress: float, left: float | None) -> None:
        self.inner.step(figures, progress, left)

    def decoding(self, done: int, total: int, bad: int) -> None:
        self.inner.decoding(done, total, bad)

    def say(self, text: str) -> None:
        self.inner.say(text)

    def close(self) -> None:
        self.inner.close()
