"""The report: a self-contained page, whatever the run folder lacks and whatever its names contain."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from simsiam.config import UserError
from simsiam.show import charts, report
from simsiam.show.layout import layout
from simsiam.show.report import write_report
from synthetic_run import CLASSES, make_run, pictures

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects the tags, the text outside scripts and the scripts; fails on unbalanced tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.specs = "", [], []
        source = path.read_text(encoding="utf-8")
        self.feed(source)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute is given twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            where = self.specs if self.tags[-1][1].get("type") == "application/json" else self.scripts
            where.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def sections(self) -> set[str | None]:
        return {attrs.get("id") for tag, attrs in self.tags if tag == "section"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "run", items=120, steps=3000)
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


def test_page_has_every_part_and_says_the_verdict(page: Page) -> None:
    assert page.sections() == {"results", "curves", "views", "neighbours", "map", "use"}
    text = re.sub(r"\s+", " ", page.text)
    assert "Healthy: the encoder learnt from 8,000 images in 2 min 58 s. Its nearest neighbours name the right" in text
    assert "71 % of the images held out for testing, against 61 % before training and 48 % with raw pixels." in text
    assert "k = 200, T = 0.1" in text and "212 of at most 2,048" in text


def test_page_loads_nothing(page: Page, run: Path) -> None:
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
        assert "url(" not in (attrs.get("style") or "")
    source = (run / "report.html").read_text(encoding="utf-8")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style
    for spec in page.specs:
        assert "://" not in spec, "a chart must not name an address, not even its schema's"


def test_page_is_small(run: Path) -> None:
    assert (run / "report.html").stat().st_size < 6e6


def test_every_chart_compiles(page: Page) -> None:
    """The Vega-Lite compiler reads each spec, as the browser will, and renders it."""
    import vl_convert

    assert len(page.specs) == 8
    for source in page.specs:
        svg = vl_convert.vegalite_to_svg(json.loads(source) | {"width": 400})
        assert svg.count("<path") > 3


def test_long_metrics_become_few_points_and_lose_no_extreme() -> None:
    rng = np.random.default_rng(0)
    points = [(float(step), float(value)) for step, value in enumerate(rng.normal(size=12_345))]
    points[777] = (777.0, 99.0)
    rows = charts.summarise(points)
    assert 100 < len(rows) <= charts._MAX_POINTS
    assert max(row["high"] for row in rows) == 99.0
    assert min(row["low"] for row in rows) == min(value for _, value in points)
    assert all(row["low"] <= row["y"] + 1e-4 and row["y"] <= row["high"] + 1e-4 for row in rows)
    xs = [row["x"] for row in rows]
    assert xs == sorted(xs)


def test_short_metrics_are_drawn_as_they_are() -> None:
    points = [(1.0, 0.5), (2.0, 0.25)]
    assert [(row["x"], row["y"]) for row in charts.summarise(points)] == points


def test_curves_of_the_page_are_short(page: Page) -> None:
    assert sum(map(len, page.specs[1:-1])) < 150_000


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["evaluation.json"], set()),
        (["evaluation.json", "summary.json"], set()),
        (["metrics.jsonl"], {"curves"}),
        (["samples/untrained.npy"], set()),
        (["samples/views.npy"], {"views"}),
        (["samples/embedding/thumbnails.npy"], {"neighbours", "map"}),
        (["samples/embedding/meta.json"], set()),
        (["environment.json", "config.toml", "encoder.json"], set()),
    ],
)
def test_missing_files_only_take_their_part_away(tmp_path: Path, missing: list[str], gone: set[str]) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    for name in missing:
        (run / name).unlink()
    page = Page(write_report(run))
    assert page.sections() == {"results", "curves", "views", "neighbours", "map", "use"} - gone


def test_only_a_recipe_is_enough_and_an_empty_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[method]\nname = "simsiam"\n')
    assert "Not finished" in Page(write_report(tmp_path)).text
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path / "empty")


def test_without_labels_nothing_speaks_of_classes(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", items=40, steps=40, labelled=False)))
    assert "There are no labels to test against; it finds an image's own second view" in page.text
    assert "same class" not in page.text and "kNN accuracy" not in page.text
    assert not any(attrs.get("class") == "same" for _, attrs in page.tags)


@pytest.mark.parametrize(
    ("verdict", "says"),
    [("partial", "Partly collapsed: "), ("collapsed", "Collapsed: every image"), ("diverged", "Diverged: the loss")],
)
def test_a_bad_verdict_is_said_first_and_not_praised(tmp_path: Path, verdict: str, says: str) -> None:
    page = Page(write_report(make_run(tmp_path / "run", items=24, steps=40, verdict=verdict)))
    assert says in page.text and "Healthy" not in page.text


def test_an_evaluation_on_other_images_does_not_change_the_verdict(tmp_path: Path) -> None:
    """It judges the features, training judges z."""
    run = make_run(tmp_path / "run", items=24, steps=40, verdict="diverged")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["collapse"] = {"std": 0.28, "effective_rank": 9.0, "verdict": "healthy", "dim": 128}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = Page(write_report(run)).text
    assert "Diverged: the loss" in text and "Healthy" not in text and "0.28" not in text


def test_an_imported_run_does_not_claim_to_have_learnt_here(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "verdict": None, "imported": "checkpoint.pth.tar"}))
    text = re.sub(r"\s+", " ", Page(write_report(run)).text)
    assert "the weights of a released checkpoint" in text and "the encoder learnt from" not in text


def test_an_evaluation_that_the_page_does_not_know_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["new_parts"] = {"trained": 61.25, "untrained": 40.0, "pixels": None, "pieces": 7}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = re.sub(r"\s+", " ", Page(write_report(run)).text)
    assert "New parts" in text and "61.2" in text and "pieces = 7" in text


def test_bars_say_what_the_table_says() -> None:
    """75.25 is rounded to 75.2 in Python, but would be 75.3 if formatted in the page."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg(charts.results({"kNN": {"pixels": 48.65, "trained": 75.25}}) | {"width": 400})
    assert f">{75.25:.1f}<" in svg and f">{48.65:.1f}<" in svg and svg.count(">75.") == 1


def test_labels_of_lines_that_nearly_meet_are_one() -> None:
    apart = charts._apart({"raw pixels": 94.9, "untrained": 94.8, "chance": 50.0}, 2.0)
    assert apart == [{"y": 94.9, "label": "raw pixels, untrained"}, {"y": 50.0, "label": "chance"}]
    spec = charts.curve(
        [(0, 90.0), (1, 95.0)], title="kNN", x_title="epoch", references={"raw pixels": 94.9, "untrained": 94.9}
    )
    text = json.dumps(spec)
    assert text.count('"label": "') == 1 and "raw pixels, untrained" in text and text.count('"y": 94.9') >= 3


def test_no_gain_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    (run / "evaluation.json").write_text(json.dumps({"knn": {"trained": 40.0, "untrained": 61.0, "pixels": 48.0}}))
    assert "That is no gain" in Page(write_report(run)).text


def test_non_finite_metrics_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 41, "loss": NaN, "std": Infinity}\n{"kind": "train", "st')
    for spec in Page(write_report(run)).specs:
        json.loads(spec, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "</script><b>\"'&<!--"
    classes = [evil + name for name in CLASSES]
    ids = [f"{evil}/{row}.png" for row in range(30)]
    run = make_run(tmp_path / "run", items=30, steps=40, classes=classes, ids=ids)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"data": evil, "encoder": evil, "bad_files": [{"path": evil, "reason": evil}]}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(f"name = {json.dumps(evil)}\n")
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    page = Page(write_report(run))
    assert evil in page.text
    known = {tag for tag, _ in Page(write_report(make_run(tmp_path / "tame", items=30, steps=40))).tags}
    assert {tag for tag, _ in page.tags} <= known | {"b", "table", "tr", "td"}
    assert sum(tag == "b" for tag, _ in page.tags) == 5, "only the page's own: the verdict, two pairs"
    rows = [json.loads(spec) for spec in page.specs][-1]["data"]["values"]
    assert {row["id"] for row in rows} == set(ids) and {row["class"] for row in rows} <= set(classes)


def test_neighbours_are_those_of_a_naive_search(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=60, steps=40)
    sample = report._read_sample(run)
    assert sample is not None
    vectors = np.load(run / "samples" / "embedding" / "vectors.npy")
    labels = sample.labels
    assert labels is not None
    found = report._neighbours(sample)
    for query in found["queries"]:
        row = sample.ids.index(query["id"])
        cosine = vectors @ vectors[row] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[row])
        cosine[row] = -np.inf
        expected = np.argsort(-cosine)[: report.NEIGHBOURS]
        strip = query["strips"][0]
        assert [item["says"].split(" · ")[-1] for item in strip["items"]] == [sample.ids[i] for i in expected]
        assert strip["hits"] == int((labels[expected] == labels[row]).sum()) <= query["most"]
        assert query["most"] == min(report.NEIGHBOURS, int((labels == labels[row]).sum()) - 1)
        assert strip["items"][0]["says"].startswith(f"similarity {cosine[expected[0]]:.2f}")
    assert len({query["class"] for query in found["queries"]}) == report.QUERIES, "a class each"
    text = write_report(run).read_text(encoding="utf-8")
    assert "5 of 8 same class (5 possible)" in text
    best = 100 * np.mean([min(8, (labels == label).sum() - 1) for label in labels]) / 8
    assert found["agreement"]["trained"] <= found["agreement"]["most"] == pytest.approx(best)
    assert f"{best:.0f}&nbsp;% is possible, as some classes are small" in text


def test_map_keeps_classes_apart() -> None:
    """Well-separated clusters must stay together in two dimensions."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    vectors = (rng.normal(size=(4, 32))[labels] * 4 + rng.normal(size=(120, 32))).astype(np.float32)
    place, how = layout(vectors)
    distance = np.linalg.norm(place[:, None] - place[None], axis=2) + np.diag(np.full(120, np.inf))
    assert how == "t-SNE" and (labels[distance.argmin(axis=1)] == labels).mean() > 0.95


@pytest.mark.parametrize("vectors", [np.eye(3), np.ones((50, 8)), np.ones((3, 1)), np.full((40, 4), np.nan)])
def test_map_of_few_or_collapsed_items_is_finite(vectors: np.ndarray) -> None:
    place, how = layout(vectors.astype(np.float32))
    assert place.shape == (len(vectors), 2) and how == "PCA" and np.isfinite(place).all()


def test_small_pictures_are_exact() -> None:
    import base64
    import io

    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    encoded = report._data_uri(picture).removeprefix("data:image/webp;base64,")
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))) == picture).all()


def test_mismatched_sample_is_left_out_with_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    np.save(run / "samples" / "embedding" / "thumbnails.npy", pictures(np.zeros(5, int)))
    with pytest.warns(UserWarning, match="do not belong together"):
        assert "neighbours" not in Page(write_report(run)).sections()


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    (run / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError):
            write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert [path.name for path in run.iterdir() if "tmp" in path.name] == []


def test_the_report_does_not_change_from_one_writing_to_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_importing_the_report_is_light() -> None:
    code = "import sys, simsiam.show.report; print([m for m in ('torch', 'sklearn', 'vl_convert') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "samples/views.npy",
        "samples/untrained.npy",
        *(f"samples/embedding/{n}" for n in ("vectors.npy", "items.parquet")),
    ],
)
@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, left: int) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    (run / name).write_bytes((run / name).read_bytes()[:left])
    with pytest.raises(
        UserError, match=f"Cannot read .*{re.escape(Path(name).name)}: .*Delete it to do without"
    ) as said:
        write_report(run)
    assert "\n" not in str(said.value)
    (run / name).unlink()
    write_report(run)


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    (run / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"Cannot read .*config\.toml"):
        write_report(run)


def test_a_path_in_any_script_stays_readable(tmp_path: Path) -> None:
    run = make_run(tmp_path / "été 写真", items=24, steps=40)
    assert "été 写真&#34;)" in write_report(run).read_text(encoding="utf-8")


def test_labels_are_not_denied_where_nothing_was_measured(tmp_path: Path) -> None:
    """A run that diverged, or that still trains, has no kNN of its end."""
    run = make_run(tmp_path / "run", items=24, steps=40, verdict="diverged")
    (run / "evaluation.json").unlink()
    summary = json.loads((run / "summary.json").read_text())
    lost = {"knn": None, "std": None, "effective_rank": None, "advice": "Lower train.lr."}
    (run / "summary.json").write_text(json.dumps({**summary, **lost}))
    text = re.sub(r"\s+", " ", Page(write_report(run)).text)
    assert "re no labels" not in text and "Diverged: the loss" in text and "Lower train.lr." in text
    assert "Spread of the embeddings</b>" not in text and "1 is healthy" not in text
    run = make_run(tmp_path / "unfinished", items=24, steps=40)
    for name in ("summary.json", "evaluation.json", "encoder.json"):
        (run / name).unlink()
    shutil.rmtree(run / "samples")
    page = Page(write_report(run))
    text = re.sub(r"\s+", " ", page.text)
    assert "re no labels" not in text and "below" not in text and "neighbours" not in page.sections()
    assert f"Continue this run simsiam train --resume -o {run}" in text and "bad files" not in text
    assert "of at most 2,048" in text


def test_the_minimum_is_that_of_the_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", items=24, steps=40)
    config = (run / "config.toml").read_text()
    for method, given, there in (
        ("simsiam", "", True),
        ("fastsiam", "", True),
        ("simsiam", 'similarity = "softmax"', False),
        ("simclr", "", False),
    ):
        (run / "config.toml").write_text(config.replace('name = "simsiam"', f'name = "{method}"\n{given}'))
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "method": method}))
        page = Page(write_report(run))
        assert ("The minimum is −1" in page.text) == there == any("minimum \\u22121" in spec for spec in page.specs)
