"""Evaluation of a run, as a user does it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simsiam
from simsiam import evaluate, tables
from simsiam.assess import Subject, evaluate_run, features_by_kind
from simsiam.compute import Compute
from simsiam.config import UserError
from simsiam.console import Console, Listener
from simsiam.data.cache import build_cache
from simsiam.data.sources import open_images
from simsiam.features import Preprocessing, embed_rows, pixel_rows, preprocessing
from simsiam.runs import read_json
from test_train import SMALL


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    simsiam.train(photos, folder, epochs=2, **SMALL)
    return folder


def test_every_evaluation_beside_pixels_and_the_untrained_encoder(run: Path) -> None:
    result = evaluate_run(run)
    file = Path(result.pop("file"))
    assert file == run / "evaluation.json" and json.loads(file.read_text()) == result
    assert set(evaluate.names()) <= result.keys()
    for name in ("knn", "linear", "fewshot"):
        assert all(0 <= result[name][kind] <= 100 for kind in ("trained", "untrained", "pixels")), name
    assert {"k", "T"} <= result["knn"].keys() and {"draws", "by_labels"} <= result["fewshot"].keys()
    summary = json.loads((run / "summary.json").read_text())
    for key in ("std", "effective_rank", "verdict"):
        assert result["collapse"][key] == summary[key]
    assert result["knn"]["trained"] == summary["knn"]["trained"], "evaluate and train measure the same thing"
    assert {kind: each.keys() for kind, each in result["collapse"]["baselines"].items()} == {
        kind: {"std", "effective_rank"} for kind in ("untrained", "pixels")
    }
    for wrong, says in (
        ({"seed": -1}, "seed is -1"),
        ({"k": 2.5}, "k is 2.5"),
        ({"seed": 1 << 32}, "seed is 4294967296"),
    ):
        with pytest.raises(UserError, match=f"^{says}: it must be"):
            evaluate_run(run, **wrong)


def test_every_kind_has_features_of_its_own(photos: Path, tmp_path: Path) -> None:
    cache, compute = build_cache(open_images(photos), 16, tmp_path), Compute(torch.device("cpu"), "fp32")
    rows = np.random.default_rng(0).permutation(cache.decoded(np.arange(len(cache))))
    train, test = rows[:20], rows[20:30]
    prepare = preprocessing(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    networks: dict[str, Any] = {"encoder": lambda x: x.flatten(1)[:, :5], "before": lambda x: x.flatten(1)[:, 5:9]}
    subject = Subject(**networks, prepare=prepare, cache=cache, compute=compute, listener=Listener())
    found = {kind: make() for kind, make in features_by_kind(subject, train, test).items()}
    pixels = pixel_rows(prepare, cache, rows[:30])
    for kind, expected in (("trained", pixels[:, :5]), ("untrained", pixels[:, 5:9]), ("pixels", pixels)):
        assert torch.equal(found[kind].train, expected[:20]) and torch.equal(found[kind].test, expected[20:])
        assert cache.labels is not None and found[kind].classes == 3
        assert found[kind].train_labels.tolist() == cache.labels[train].tolist()
        assert found[kind].test_labels.tolist() == cache.labels[test].tolist()
    assert list(found) == ["trained", "untrained", "pixels"]
    assert list(features_by_kind(replace(subject, before=None), train, test)) == ["trained"]


def test_other_data_some_evaluations_and_no_labels(run: Path, photos: Path, tmp_path: Path) -> None:
    evaluate_run(run)
    before = (run / "evaluation.json").read_text()
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(photos.rglob("*.png"))[:40]:
        (flat / path.name).write_bytes(path.read_bytes())
    result = evaluate_run(run, flat)
    assert result["knn"] is result["linear"] is result["fewshot"] is None
    assert result["collapse"]["std"] > 0 and result["collapse"]["verdict"]
    assert (
        list(evaluate_run(run, flat, names=["knn"])) == ["run", "data", "fingerprint", "knn", "file"]
        and result["file"] is None
    )
    assert result["collapse"]["dim"] == 64, "of the features: what the run says of z is of its own data"
    assert (run / "evaluation.json").read_text() == before, "only its own data speak about a run"
    again = evaluate_run(run, names=["knn"], k=1)
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["knn"] == again["knn"] and set(evaluate.names()) <= kept.keys(), "what was not asked for stays"
    with pytest.raises(UserError, match="knn"):
        evaluate_run(run, names=["kNN"])
    with pytest.raises(UserError, match="no trained encoder"):
        evaluate_run(tmp_path)
    moved = shutil.copytree(run, tmp_path / "run")
    about = json.loads((moved / "encoder.json").read_text())
    (moved / "encoder.json").write_text(json.dumps(about | {"data": "/nowhere"}))
    with pytest.raises(UserError, match=r"There is no /nowhere.*give its new path: simsiam evaluate .*run DATA$"):
        evaluate_run(moved)
    with pytest.raises(UserError, match=r"There is no /not/here\. Name (?!.*new place)"):
        evaluate_run(moved, "/not/here")


@pytest.mark.parametrize("case", ["one class", "another class"])
def test_test_labels_that_mislead_are_warned_of(run: Path, photos: Path, tmp_path: Path, case: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data / "train")
    kinds = sorted(path.name for path in photos.iterdir() if path.is_dir())
    for kind in kinds if case == "another class" else kinds[:1]:
        shutil.copytree(photos / kind, data / "test" / kind)
    if case == "another class":
        (data / "test" / kinds[0]).rename(data / "test" / "misspelt")
    says = {
        "one class": rf"All labelled test images are of the class {kinds[0]}",
        "another class": r"32 of 96 test images are left out of the accuracies: they have no label, or one that no",
    }
    with pytest.warns(UserWarning, match=says[case]):
        evaluate_run(run, data, names="knn")


def test_k_without_knn_is_said(run: Path) -> None:
    with pytest.warns(UserWarning, match="-k 3 is for knn, which is not among retrieval: ignored"):
        assert evaluate_run(run, names="retrieval", k=3)["retrieval"]["trained"] > 0
    with pytest.raises(UserError, match="k is 0"):
        evaluate_run(run, k=0)


def test_images_without_a_label_are_not_embedded_for_nothing(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(photos)
    assert images.labels is not None
    train, _ = images.split()
    unknown = images.labels.copy()
    unknown[train[::2]] = -1
    monkeypatch.setattr("simsiam.assess.open_images", lambda _: replace(images, labels=unknown))
    embedded: list[int] = []

    def embed(encoder: Any, prepare: Any, cache: Any, rows: np.ndarray, *rest: Any) -> Any:
        embedded.append(len(rows))
        return embed_rows(encoder, prepare, cache, rows, *rest)

    monkeypatch.setattr("simsiam.assess.embed_rows", embed)
    found = evaluate_run(run, photos, names=["knn"], baselines=False, sgd=True)
    known = found["knn"]["train"]
    assert len(train) // 2 - 3 <= known <= len(train) // 2  # some files are bad
    assert embedded.count(known) == 91 and len(embedded) == 93 and max(embedded) == known


def test_damaged_files_of_a_run_are_done_without(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    (own / "environment.json").write_text('{"device": "quantum:3"}')
    assert evaluate_run(own, names="collapse")["collapse"]["std"] > 0
    for name in ("evaluation.json", "summary.json"):
        (own / name).write_text('{"knn": {')
    assert evaluate_run(own, names="collapse")["collapse"]["std"] > 0
    assert read_json(own / "evaluation.json")["collapse"]["std"] > 0


def test_the_std_is_said_to_be_of_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    collapse = {"std": 0.9, "effective_rank": 9.0, "most_rank": 63, "verdict": "healthy", "dim": 64, "rows": 90}
    for more, says in (
        ({"std_features": 0.3}, "std of z/|z| 0.90 (1 healthy"),
        ({}, "std of the features 0.90 (0 coll"),
    ):
        tables.evaluation(Console(), {"run": "r", "data": "d", "collapse": collapse | more, "file": None})
        assert says in " ".join(capsys.readouterr().err.split())


def test_labels_are_missed_only_where_something_needs_them(capsys: pytest.CaptureFixture[str]) -> None:
    collapse = {"std": 1.0, "effective_rank": 9.0, "most_rank": 63, "verdict": "healthy", "dim": 64, "rows": 90}
    tables.evaluation(Console(), {"run": "r", "data": "d", "collapse": collapse, "file": None})
    assert "label" not in capsys.readouterr().err
    tables.evaluation(Console(), {"run": "r", "data": "d", "collapse": collapse, "knn": None, "linear": None})
    assert "Too few labels, or none, for knn, linear." in capsys.readouterr().err


def test_its_own_images_are_known_again_where_they_lie_now(run: Path, photos: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    moved = shutil.copytree(photos, tmp_path / "moved")  # keeps modification times, like `mv`
    result = evaluate_run(own, moved, names=["knn", "collapse"])
    assert result["file"] == str(own / "evaluation.json") and result["data"] == str(moved)
    assert result["collapse"]["effective_rank_features"] > 0, "beside what training said of z"
    assert json.loads((own / "evaluation.json").read_text())["knn"] == result["knn"]
    next(moved.rglob("*.png")).unlink()
    assert evaluate_run(own, moved, names=["knn"])["file"] is None


def test_the_papers_linear_protocol_on_request(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[int] = []

    def watched(network: object, prepare: object, cache: object, rows: np.ndarray, *more: object) -> torch.Tensor:
        if isinstance(prepare, Preprocessing):
            plain.append(len(rows))
        return embed_rows(network, prepare, cache, rows, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("simsiam.assess.embed_rows", watched)
    result = evaluate_run(run, names=["collapse"], sgd=True, baselines=False)["linear_sgd"]
    assert plain[2:] == [plain[1]], "after `collapse`, the test images alone: training takes random crops"
    assert (result["optimiser"], result["epochs"], result["weight_decay"]) == ("lars", 90, 0.0)
    assert 0 <= result["trained"] <= 100


def test_images_that_changed_since_are_not_mixed_with_those_of_the_run(photos: Path, tmp_path: Path) -> None:
    images, folder = tmp_path / "images", tmp_path / "run"
    shutil.copytree(photos, images)
    simsiam.train(images, folder, epochs=1, **SMALL)
    before = evaluate_run(folder, names=["knn", "collapse"])
    assert before["collapse"]["most_rank"] == read_json(folder / "summary.json")["most_rank"]
    for path in sorted(images.rglob("*.png"))[::2]:
        path.unlink()
    told: list[str] = []
    listener = Listener()
    listener.say = told.append  # type: ignore[method-assign]
    after = evaluate_run(folder, names=["collapse"], listener=listener)
    assert any("have changed since training" in line for line in told)
    assert after["collapse"]["effective_rank"] <= after["collapse"]["rows"] and "std_features" not in after["collapse"]
    kept = read_json(folder / "evaluation.json")
    assert "knn" not in kept and kept["fingerprint"] == after["fingerprint"] != before["fingerprint"]
    evaluate_run(folder, names=["knn"])
    assert {"knn", "collapse"} <= read_json(folder / "evaluation.json").keys(), "of the same images they stay together"


def test_what_was_stored_meanwhile_is_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning takes minutes, in which another process may evaluate the run."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink(missing_ok=True)

    def slowly(*_: Any, **__: Any) -> dict[str, Any]:
        evaluate_run(tmp_path / "run", names="retrieval", baselines=False)
        return {"value": 50.0, "lr": 0.1}

    monkeypatch.setattr("simsiam.assess.finetune", slowly)
    result = evaluate_run(tmp_path / "run", names="collapse", share=0.5, baselines=False)
    stored = read_json(tmp_path / "run" / "evaluation.json")
    assert "retrieval" not in result and {"retrieval", "collapse", "finetune"} <= stored.keys()


@pytest.mark.filterwarnings("ignore:.*accuracies")
def test_a_single_labelled_image_is_too_few_and_no_error(run: Path, photos: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(photos.rglob("*.png"))[:30]
    labels: list[int | None] = [None] * 30
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    for number in range(0, 30, 3):  # held out and not, whatever the split takes
        labels[number] = number // 15
    for few in (range(0, 30, 3), range(0, 16, 15)):
        given = [label if i in few else None for i, label in enumerate(labels)]
        pq.write_table(pa.table({"image": images, "label": pa.array(given, pa.int64())}), tmp_path / "a.parquet")
        assert evaluate_run(run, tmp_path / "a.parquet", names=["knn", "collapse"])["collapse"]["rows"] > 1
