"""The report: one self-contained HTML page about a run, made only from the files in its folder."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import math
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simsiam.compute import draw
from simsiam.config import UserError, as_path, counted, read_recipe, short_name, show_bytes, show_duration
from simsiam.runs import (
    ENCODER,
    ENVIRONMENT,
    EVALUATION,
    METRICS,
    RECIPE,
    REPORT,
    SUMMARY,
    read_json,
    read_metrics,
    write_text,
)
from simsiam.show import charts
from simsiam.show.layout import layout

Table = dict[str, Any]
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

NEIGHBOURS, QUERIES, VIEWS = 8, 8, 8
MAP_ITEMS = 1500

_VERDICTS = {
    "healthy": ("good", "Healthy"),
    "partial": ("fair", "Partly collapsed"),
    "collapsed": ("bad", "Collapsed"),
    "diverged": ("bad", "Diverged"),
}
_MEASURES = {
    "knn": ("kNN", "the most similar training images vote on the class"),
    "linear": ("Linear", "a linear classifier on the frozen features"),
    "linear_sgd": ("Linear, SGD", "the same with the paper's protocol: LARS on random crops"),
    "fewshot": ("Few-shot", "a classifier trained on only a few labelled images per class"),
    "finetune": ("Fine-tuned", "the whole network trained on a share of the labels"),
    "retrieval": ("Retrieval", "the share of the 10 most similar training images that are of the same class"),
    "clusters": ("Clusters", "k-means without labels, its clusters then matched to the classes"),
}
_FILES = {
    f"{ENCODER}.safetensors": "the trained weights, without any code",
    f"{ENCODER}.json": "what is needed to use the weights: architecture, size, mean and std",
    RECIPE: "every setting of this run; pass it to --recipe to run again",
    SUMMARY: "the final figures",
    EVALUATION: "what simsiam evaluate measured",
    METRICS: "the curves, one JSON object per line",
    ENVIRONMENT: "versions and hardware",
    "samples/embedding/vectors.npy": "embeddings of the images shown on this page",
}


@dataclass(frozen=True)
class Sample:
    """The embedded images that the run kept for the report; every array has one row per image."""

    vectors: Floats  # [N,D]
    untrained: Floats | None  # [N,D'], the same images
    ids: list[str]
    labels: NDArray[np.int64] | None  # [N], -1 unknown
    classes: list[str] | None
    thumbnails: Pixels  # [N,h,w,3]

    def class_of(self, row: int) -> str | None:
        if self.labels is None:
            return None
        label = int(self.labels[row])
        if label < 0:
            return "unknown"
        return self.classes[label] if self.classes and label < len(self.classes) else str(label)

    def rows(self, rows: NDArray[np.int64]) -> Sample:
        return Sample(
            self.vectors[rows],
            None if self.untrained is None else self.untrained[rows],
            [self.ids[row] for row in rows],
            None if self.labels is None else self.labels[rows],
            self.classes,
            self.thumbnails[rows],
        )


def write_report(run: str | Path) -> Path:
    """Write `run/report.html` and return its path.

    Parts of the page whose files are missing are left out.
    Raises UserError if `run` is not a run folder or a file in it is damaged.
    """
    run = as_path(run)
    if not any((run / name).exists() for name in (RECIPE, SUMMARY, METRICS)):
        raise UserError(f"{run} is not a run folder: give the folder that `simsiam train -o` wrote.")
    path = run / REPORT
    write_text(path, _page(run))
    return path


def _page(run: Path) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["number"] = _number
    environment.globals["counted"] = counted
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    content = _content(run)
    return template.render(content, bundle=_bundle())


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed from the wheel, so that the page loads nothing. Takes a second to build."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", r"<\/script")


def _content(run: Path) -> Table:
    summary, environment, evaluation = (_json(run / name) for name in (SUMMARY, ENVIRONMENT, EVALUATION))
    there = (run / RECIPE).exists()
    config = read_recipe(run / RECIPE) if there else {}
    recipe = (run / RECIPE).read_text(encoding="utf-8") if there else ""
    metrics = read_metrics(run)
    sample = _read_sample(run)
    if sample is not None and summary.get("encoder_step") == 0:  # nothing to compare with
        sample = replace(sample, untrained=None)
    measures = _measures(evaluation)
    figures = {name: evaluation.get(name) or summary.get(name) or {} for name in measures}
    facts = _facts(run, summary, config, evaluation, metrics, sample)
    data = facts["data"]
    again = shlex.join(["simsiam", "train", *([data] if data else []), "--recipe", str(run / RECIPE), "-o", "NEW_RUN"])
    tone, word = _VERDICTS.get(facts["verdict"], ("none", "Not judged"))
    if not summary and tone in ("none", "good"):
        tone, word = "none", "Not finished"
    return {
        "title": short_name(data) if data else run.resolve().name,
        "run": str(run),
        "quoted_run": shlex.quote(str(run)),
        "literal_run": json.dumps(str(run), ensure_ascii=False),
        "tone": tone,
        "word": word,
        "sentences": _sentences(facts, figures["knn"]),
        "tiles": _tiles(facts),
        "facts": facts,
        "bad_files": summary.get("bad_files", []),
        "results": _results(measures, figures),
        "curves": _curves(facts, metrics),
        "views": _views(run),
        "neighbours": None if sample is None or len(sample.ids) < 3 else _neighbours(sample),
        "map": None if sample is None or len(sample.ids) < 3 else _map(sample),
        "recipe": recipe,
        "environment": {key: value for key, value in environment.items() if value is not None},
        "again": again,
        "files": [
            {
                "name": name,
                "says": says,
                "size": show_bytes((run / name).stat().st_size).replace(" ", "\N{NO-BREAK SPACE}"),
            }
            for name, says in _FILES.items()
            if (run / name).exists()
        ],
    }


def _json(path: Path) -> Table:
    return read_json(path) if path.exists() else {}


# ---------------------------------------------------------------- text and figures


def _facts(
    run: Path, summary: Table, config: Table, evaluation: Table, metrics: Sequence[Table], sample: Sample | None
) -> Table:
    """The facts about the run that the page states; a value is None if no file contains it."""
    last: Table = {}
    for line in metrics:
        last |= {key: value for key, value in line.items() if value is not None}
    collapse = evaluation.get("collapse") or {}
    told = ("std", "effective_rank", "verdict", "images_per_second")
    # The summary first: an evaluation on other images judges the features, not z. What a run that has ended lacks there
    # it has not, as a diverged one its spread.
    given = (summary, collapse) if summary else (collapse, last)
    facts = {key: next((of[key] for of in given if of.get(key) is not None), None) for key in told}
    facts |= {key: summary.get(key) for key in ("images", "epochs")}
    facts["steps"] = summary.get("steps", last.get("step"))
    facts["seconds"] = summary.get("seconds", last.get("seconds"))
    facts["retrieval"] = last.get("retrieval")
    method, encoder = config.get("method", {}), config.get("encoder", {})
    facts["method"] = summary.get("method") or method.get("name")
    facts["encoder"] = summary.get("encoder") or encoder.get("name")
    facts["dim"] = summary.get("dim") or collapse.get("dim") or method.get("dim")
    ranked = (of["most_rank"] for of in (summary, collapse, last) if of.get("most_rank"))
    facts["most_rank"] = next(ranked, facts["dim"])
    facts["data"] = summary.get("data") or config.get("data")
    facts["cosine"] = facts["method"] in ("simsiam", "fastsiam") and method.get("similarity") != "softmax"
    facts["labelled"] = "knn" in last or (sample is not None and sample.labels is not None)
    facts["classes"] = len(sample.classes) if sample and sample.classes else None
    facts["finished"], facts["imported"] = bool(summary), "imported" in summary
    facts["bad_files"] = len(summary["bad_files"]) if "bad_files" in summary else None
    facts["advice"] = summary.get("advice") or ""
    facts["encoder_step"] = summary.get("encoder_step")
    facts["usable"] = (run / f"{ENCODER}.json").exists()
    facts["resume"] = shlex.join(["simsiam", "train", "--resume", "-o", str(run)])
    return facts


def _sentences(facts: Table, knn: Mapping[str, Any]) -> list[str]:
    """The verdict as sentences, the first of which follows the verdict's name and a colon."""
    images = f"{facts['images']:,} images" if facts["images"] else "the images"
    time = f" in {_nbsp(show_duration(facts['seconds']))}" if facts["seconds"] else ""
    rank = f"only {facts['effective_rank']:.0f}" if facts["effective_rank"] is not None else "only a few"
    step = "" if facts["encoder_step"] is None else f", from step {facts['encoder_step']:,}"
    first = {
        "healthy": f"the encoder learnt from {images}{time}.",
        "partial": f"the encoder learnt from {images}{time}, but uses {rank} of "
        f"{facts['dim'] or 'its'} directions. {facts['advice']}",
        "collapsed": f"every image gets nearly the same embedding, so this encoder is of no use. {facts['advice']}",
        "diverged": f"the loss became infinite or NaN. The encoder that is kept is the last healthy one{step}. "
        f"{facts['advice']}",
    }.get(facts["verdict"] or "")
    if facts["imported"]:
        first = f"the weights of a released checkpoint, after {facts['steps']:,} steps. Nothing was trained here."
    elif first is None or (facts["verdict"] == "healthy" and not facts["finished"]):
        steps = f"{facts['steps']:,} steps so far" if facts["steps"] else "no step has been recorded yet"
        first = f"{steps}{time}."
    trained, untrained, pixels = (knn.get(key) for key in ("trained", "untrained", "pixels"))
    if facts["verdict"] in ("collapsed", "diverged"):
        return [first]
    if trained is not None:
        says = f"Its nearest neighbours name the right class for {_percent(trained)} of the images held out for testing"
        others = [(untrained, "before training"), (pixels, "with raw pixels")]
        against = " and ".join(f"{_percent(value)} {name}" for value, name in others if value is not None)
        second = f"{says}, against {against}." if against else f"{says}."
        best = max((value for value, _ in others if value is not None), default=-math.inf)
        return [first, second, *(["That is no gain: train longer or on more images."] if trained <= best else [])]
    if facts["retrieval"] is not None:
        labels = "" if facts["labelled"] else "There are no labels to test against; "
        says = f"it finds an image's own second view among the others in {_percent(facts['retrieval'])} of cases."
        return [first, (labels + says)[0].upper() + (labels + says)[1:]]
    return [first]


def _tiles(facts: Table) -> list[tuple[str, str]]:
    """(name, value) of each key fact that is known."""
    tiles = [
        ("images", _number(facts["images"])),
        ("encoder", facts["encoder"]),
        ("method", facts["method"]),
        ("epochs", _number(facts["epochs"])),
        ("training time", _nbsp(show_duration(facts["seconds"])) if facts["seconds"] else None),
        ("images per second", _number(facts["images_per_second"])),
        ("bad files", _number(facts["bad_files"])),
    ]
    return [(name, value) for name, value in tiles if value is not None]


def _measures(evaluation: Table) -> dict[str, tuple[str, str]]:
    """Title and explanation of all that may have been measured; evaluations not in `_MEASURES` get only a title."""
    compared = [key for key, value in evaluation.items() if isinstance(value, dict) and "trained" in value]
    return {**_MEASURES, **{key: (key.replace("_", " ").capitalize(), "") for key in compared if key not in _MEASURES}}


def _results(measures: Mapping[str, tuple[str, str]], figures: Mapping[str, Mapping[str, Any]]) -> Table | None:
    rows: list[Table] = []
    for key, (name, says) in measures.items():
        row = {of: figures[key].get(of) for of in charts.REPRESENTATIONS}
        if all(value is None for value in row.values()):
            continue
        settings = [
            f"{setting} = {_number(value) if isinstance(value, float) else value}"
            for setting, value in figures[key].items()
            if setting not in row and value is not None and not isinstance(value, dict | list)
        ]
        others = [value for of, value in row.items() if of != "trained" and value is not None]
        gain = row["trained"] - max(others) if others and row["trained"] is not None else None
        rows.append({"name": name, "says": says, "settings": ", ".join(settings), "gain": gain, **row})
    if not rows:
        return None
    return {"rows": rows, "chart": charts.results({str(row["name"]): row for row in rows})}


def _curves(facts: Table, metrics: Sequence[Table]) -> list[Table]:
    """Charts of the figures in `metrics.jsonl`, each with a sentence on how to read it."""
    epochs, steps = facts["epochs"], facts["steps"]
    per_step = epochs / steps if epochs and steps else 1.0
    x_title = "epoch" if epochs and steps else "step"

    def points(kind: str, key: str) -> list[tuple[float, float]]:
        lines = [line for line in metrics if line.get("kind") == kind]
        return [
            (line["step"] * per_step, float(line[key])) for line in lines if _finite(line.get(key), line.get("step"))
        ]

    # The curve uses a smaller sample than the table and so has its own baselines, in its first line.
    first = next((line for line in metrics if line.get("kind") == "monitor" and line.get("step") == 0), {})
    baselines = {
        f"{name} {first[key]:.1f}": float(first[key])
        for key, name in (("knn", "untrained"), ("knn_pixels", "raw pixels"))
        if _finite(first.get(key))
    }
    minimum = " The minimum is −1; reaching it at once, with the spread at 0, is collapse." if facts["cosine"] else ""
    wanted: list[tuple[str, str, str, str, dict[str, float], bool]] = [
        ("train", "loss", "Loss", "Falls as the network predicts one view of an image from the other." + minimum,
         {"minimum −1": -1.0} if facts["cosine"] else {}, False),
        ("train", "std", "Spread of the embeddings", "std of z/|z| × √d. Near 1, different images get different "
         "embeddings; at 0 they all get the same one.", {"healthy 1": 1.0, "collapsed 0": 0.0}, True),
        ("monitor", "effective_rank", "Effective rank", "How many independent directions the embeddings use. It should "
         "settle well above a handful; a fall to a few is partial collapse, which the spread does not show.", {}, True),
        ("monitor", "knn", "kNN accuracy (%)", "How often the nearest neighbours name the right class, on a sample; a "
         "smaller sample than the table's gives lower figures. Above both dashed lines, training has paid off.",
         baselines, False),
        ("monitor", "retrieval", "Second view found (%)", "How often an image's other view is its nearest neighbour "
         "among many. It needs no labels; higher is better.", {}, False),
        ("train", "lr", "Learning rate", "The size of the training steps, which follows a schedule.", {}, True),
    ]  # fmt: skip
    found = []
    for kind, key, title, says, references, zero in wanted:
        line = points(kind, key)
        if line:
            # Labels go where the line is far from its references: losses end near them, kNN starts near them.
            side: Literal["left", "right"] = "right" if key == "knn" else "left"
            spec = charts.curve(line, title=title, x_title=x_title, references=references, label_at=side, zero=zero)
            found.append({"title": title, "says": says, "last": _number(line[-1][1]), "chart": spec})
    return found


# ---------------------------------------------------------------- pictures


def _views(run: Path) -> Table | None:
    """Rows of original, view 1, view 2 as data URIs; `small` if they should be enlarged pixel by pixel."""
    path = run / "samples" / "views.npy"
    if not path.exists():
        return None
    with _readable(path):
        views = np.load(path, allow_pickle=False)[:VIEWS]
    return {"rows": [[_data_uri(picture) for picture in row] for row in views], "small": max(views.shape[2:4]) <= 64}


def _read_sample(run: Path) -> Sample | None:
    folder = run / "samples" / "embedding"
    if not all((folder / name).exists() for name in ("vectors.npy", "items.parquet", "thumbnails.npy")):
        return None
    import pyarrow.parquet as pq

    def array(path: Path) -> NDArray[Any]:
        with _readable(path):
            return np.load(path, allow_pickle=False)

    with _readable(folder / "items.parquet"):
        items = pq.read_table(folder / "items.parquet").to_pydict()
    vectors, thumbnails = array(folder / "vectors.npy"), array(folder / "thumbnails.npy")
    path = run / "samples" / "untrained.npy"
    untrained = array(path) if path.exists() else None
    count = len(vectors)
    if not len(items["id"]) == len(thumbnails) == count or (untrained is not None and len(untrained) != count):
        warnings.warn(f"The files in {folder} do not belong together: neighbours and map are left out.", stacklevel=2)
        return None
    known = np.array([-1 if label is None else label for label in items.get("label", [None] * count)], np.int64)
    meta = _json(folder / "meta.json")
    labels = known if (known >= 0).any() else None
    return Sample(vectors, untrained, [str(i) for i in items["id"]], labels, meta.get("classes"), thumbnails)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise UserError if the file read within is damaged."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"Cannot read {path}: {' '.join(str(error).split())}. Delete it to do without.") from None


def _neighbours(sample: Sample) -> Table:
    """Query images, drawn at random across the classes, and their nearest neighbours after and before training."""
    k = min(NEIGHBOURS, len(sample.ids) - 1)
    spaces = {"trained": sample.vectors} | ({} if sample.untrained is None else {"untrained": sample.untrained})
    nearest = {name: _nearest(vectors, k) for name, vectors in spaces.items()}
    agreement, most = {}, np.full(len(sample.ids), k)
    if sample.labels is not None:
        known = sample.labels >= 0
        # A class may have fewer than k other images.
        most[known] = np.minimum(k, np.bincount(sample.labels[known])[sample.labels[known]] - 1)
        agreement = {
            name: 100 * float((sample.labels[index] == sample.labels[:, None])[known].mean())
            for name, (_, index) in nearest.items()
        }
        agreement["most"] = 100 * float(most[known].mean() / k)
    queries = []
    for query in _spread(sample.labels, len(sample.ids)):
        strips = []
        for name, (similarity, index) in nearest.items():
            found = zip(similarity[query], index[query], strict=True)
            strip = [_neighbour(sample, query, int(row), float(score)) for score, row in found]
            hits = sum(item["same"] for item in strip) if sample.class_of(query) not in (None, "unknown") else None
            strips.append({"name": name, "items": strip, "hits": hits})
        queries.append({
            "id": sample.ids[query], "class": sample.class_of(query),
            "image": _data_uri(sample.thumbnails[query]), "strips": strips, "most": int(most[query]),
        })  # fmt: skip
    return {"k": k, "count": len(sample.ids), "queries": queries, "agreement": agreement}


def _neighbour(sample: Sample, query: int, row: int, similarity: float) -> Table:
    same = sample.labels is not None and sample.labels[row] == sample.labels[query] >= 0
    name = sample.class_of(row)
    says = f"similarity {similarity:.2f}" + (f" · {name}" if name else "") + f" · {sample.ids[row]}"
    return {"image": _data_uri(sample.thumbnails[row]), "same": bool(same), "says": says}


def _spread(labels: NDArray[np.int64] | None, count: int) -> list[int]:
    """Up to QUERIES rows that cover as many classes as possible."""
    order = np.random.default_rng(1).permutation(count)
    if labels is None:
        return [int(row) for row in order[:QUERIES]]
    turns: dict[int, int] = {}
    keyed = []
    for place, row in enumerate(order):
        label = int(labels[row])
        turns[label] = turns.get(label, -1) + 1
        keyed.append((label < 0, turns[label], place, int(row)))
    return [row for *_, row in sorted(keyed)[:QUERIES]]


def _nearest(vectors: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
    """Cosine similarity and row of the k nearest other images: two arrays [N,k], nearest first."""
    from simsiam.neighbours import top_k

    similarity, index = top_k(vectors, vectors, k, exclude_self=True)
    return similarity.numpy(), index.numpy()


def _map(sample: Sample) -> Table:
    sample = sample.rows(draw(np.arange(len(sample.ids)), MAP_ITEMS))
    place, how = layout(sample.vectors)
    pictures = [_data_uri(_shrink(picture, 40), quality=62) for picture in sample.thumbnails]
    rows = []
    for row, (x, y) in enumerate(place):
        item: Table = {"x": round(float(x), 3), "y": round(float(y), 3), "id": sample.ids[row], "image": pictures[row]}
        name = sample.class_of(row)
        rows.append(item if name is None else item | {"class": name})
    names = sorted({row["class"] for row in rows}) if sample.labels is not None else None
    return {"count": len(rows), "how": how, "labelled": names is not None, "chart": charts.embedding_map(rows, names)}


def _shrink(picture: Pixels, side: int) -> Pixels:
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _data_uri(picture: Pixels, quality: int = 80) -> str:
    """A picture [h,w,3] as a WebP data URI, shrunk to 160 pixels; lossless up to 40, where single pixels show."""
    exact = max(picture.shape[:2]) <= 40 and quality >= 80
    buffer = io.BytesIO()
    Image.fromarray(_shrink(picture, 160)).save(buffer, "WEBP", lossless=exact, quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------- number formats


def _finite(*values: Any) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _nbsp(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _percent(value: float) -> str:
    return f"{value:.0f}\N{NO-BREAK SPACE}%"


def _number(value: Any) -> str | None:
    if not _finite(value):
        return None if value is None else str(value)
    whole = value == int(value) or abs(value) >= 100
    return (f"{value:,.0f}" if whole else f"{value:.3g}").replace("-", "\N{MINUS SIGN}")
