"""The experiments: every file can be run; finished runs are kept; the comparison with the paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from simsiam import methods, reproduce
from simsiam.assess import evaluate_run
from simsiam.config import Interrupted, UserError
from simsiam.defaults import Facts, resolve
from simsiam.recipe import gather

every_experiment = pytest.mark.parametrize("name", reproduce.names())


@every_experiment
@pytest.mark.parametrize("scale", ["thin", "cifar", "imagenet"])
def test_every_variant_can_be_run(name: str, scale: Any) -> None:
    """Every variant also differs from the others in settings, length or method."""
    experiment = reproduce.get(name, scale)
    assert experiment.title and experiment.source and experiment.scales
    assert bool(experiment.variants) == (scale in experiment.scales) and len(experiment.variants) != 1
    assert len({variant.slug for variant in experiment.variants}) == len(experiment.variants)
    plans = []
    for variant in experiment.variants:
        settings = variant.settings | {"epochs": 10.0 * variant.epochs}
        table = gather("demo", reproduce._RECIPES[scale], [], settings)
        plan, _ = resolve(table, Facts(50_000, 32, "cpu"))
        assert plan.method in methods.names() and plan.train.epochs == 10 * variant.epochs
        plans.append(plan)
    assert all(first != second for i, first in enumerate(plans) for second in plans[i + 1 :])


def planned(name: str, scale: Any) -> dict[str, Any]:
    """Map each variant to its recipe, as `run` trains it on ImageNet or CIFAR-10."""
    plans = {}
    for variant in reproduce.get(name, scale).variants:
        settings = variant.settings | {"epochs": reproduce._EPOCHS[scale] * variant.epochs}
        plans[variant.name], _ = resolve(
            gather("x", reproduce._RECIPES[scale], [], settings), Facts(50_000, 32, "cuda")
        )
    return plans


def test_what_is_compared_is_what_the_paper_ran() -> None:
    plans = planned("comparison", "imagenet")
    assert {len(plan.views.each()) for plan in plans.values()} == {2}, "SwAV without multi-crop"
    assert {plan.train.batch_size for name, plan in plans.items() if name.startswith("SimSiam")} == {256}
    assert sorted({plan.train.epochs for plan in plans.values()}) == [100, 200, 400, 800]
    assert {len(plan.views.each()) for plan in planned("swav", "imagenet").values()} == {2}
    assert {plan.train.epochs for plan in planned("cifar", "cifar").values()} == {800}
    # 67.7 is with decaying predictor rate; 68.1 with a constant one.
    assert {plan.method_settings.predictor_fixed_lr for plan in planned("stop-gradient", "imagenet").values()} == {
        False
    }
    rates = {name: plan.method_settings.predictor_fixed_lr for name, plan in planned("predictor", "imagenet").items()}
    assert (rates["learning rate with cosine decay"], rates["constant learning rate"]) == (False, True)
    # Appendix C: the paper's versions of SimCLR, SwAV and MoCo v2. Footnote 6: BYOL by length. Section 4.4: a warm-up.
    layers = {
        name: plan.method_settings.projector_layers for name, plan in plans.items() if name[:4] in ("SimC", "SwAV")
    }
    assert set(layers.values()) == {3} and len(layers) == 8
    for name in ("simclr", "swav"):
        assert {plan.method_settings.projector_layers for plan in planned(name, "imagenet").values()} == {3}
    assert {plan.method_settings.normalised_in_graph for plan in planned("swav", "imagenet").values()} == {True}
    assert {plan.method_settings.symmetric for name, plan in plans.items() if name.startswith("MoCo")} == {True}
    byol = {name: plan for name, plan in plans.items() if name.startswith("BYOL")}
    assert [(p.train.lr, p.train.weight_decay, p.method_settings.momentum) for p in byol.values()] == [
        (0.45, 1e-6, 0.99),
        (0.3, 1e-6, 0.99),
        (0.3, 1e-6, 0.99),
        (0.2, 1.5e-6, 0.996),
    ]
    swav_views = [plan.views.scale for name, plan in plans.items() if name.startswith("SwAV")]
    assert swav_views == [(0.08, 1.0)] * 4
    warmups = {name: plan.train.warmup_epochs for name, plan in planned("bn", "imagenet").items()}
    assert [name for name, epochs in warmups.items() if epochs == 10] == ["none"]


def row(name: str, published: float | None, linear: float, spread: float | None) -> dict[str, Any]:
    return {"name": name, "published": published, "linear": linear, "linear_std": spread, "verdict_agrees": True}


def test_order_is_compared_only_where_it_is_clear() -> None:
    rows = [
        row("a", 68.1, 60, 1),
        row("b", 64.0, 58, 1),
        row("c", 63.5, 70, 1),
        row("d", 60.0, 58.5, 1),
        row("e", None, 1, 0),
    ]
    found = reproduce.compare(rows)
    assert found["pairs"] == {
        "agree": [["a", "b"], ["a", "d"], ["c", "d"]],
        "contradict": [["a", "c"]],  # b and c are published half a point apart: not ordered
        "undecided": [["b", "d"]],
    }
    assert found["verdicts_agree"] is True
    once = reproduce.compare([row("a", 68.1, 90, None), row("b", 64.0, 10, None)])  # one seed: no spread, no order
    assert once["pairs"] == {"agree": [], "contradict": [], "undecided": [["a", "b"]]}


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reproduce") / "stop-gradient"
    return folder, reproduce.run("stop-gradient", photos, folder, epochs=2, seeds=2)


def test_an_experiment_leaves_table_and_curves(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["with stop-gradient"]["published"] == 67.7 and rows["without stop-gradient"]["expect"] == "collapse"
    for each in rows.values():
        assert each["n"] == 2 and 0 <= each["linear"] <= 100 and each["linear_std"] is not None
        first, second = ([run[key] for key in ("loss", "std", "effective_rank", "knn")] for run in each["runs"])
        assert first != second  # another seed is another run
    table = (folder / "table.md").read_text()
    assert "| with stop-gradient | 67.7 |" in table and "0.1, collapses" in table
    assert json.loads((folder / "result.json").read_text())["rows"] == result["rows"]
    assert (folder / "curves.svg").read_text().startswith("<svg")


def test_what_ran_is_kept_and_what_is_missing_is_run(finished: tuple[Path, dict[str, Any]], photos: Path) -> None:
    folder, result = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    gone = folder / "without-stop-gradient" / "seed-1"
    shutil.rmtree(gone)
    again = reproduce.run("stop-gradient", photos, folder, epochs=2, seeds=2)
    assert again["rows"][0] == result["rows"][0]
    # Not the loss: the summary has its mean since the last report, whose time varies.
    assert again["rows"][1]["n"] == 2 and (gone / "summary.json").exists()
    for path, stamp in stamps.items():
        assert (path.stat().st_mtime_ns == stamp) == (gone not in path.parents)


def test_an_evaluation_with_other_settings_is_not_mixed_in(finished: tuple[Path, dict[str, Any]], photos: Path) -> None:
    folder, result = finished
    run = folder / "with-stop-gradient" / "seed-0"
    evaluate_run(run, names=("knn",), k=1, seed=3)
    again = reproduce.run("stop-gradient", photos, folder, epochs=2, seeds=2)
    assert [again["rows"][0][key] for key in ("knn", "linear")] == [result["rows"][0][key] for key in ("knn", "linear")]


def test_other_settings_need_another_folder(finished: tuple[Path, dict[str, Any]], photos: Path) -> None:
    with pytest.raises(UserError, match="other settings"):
        reproduce.run("stop-gradient", photos, finished[0], epochs=3)


def test_a_mistake_before_the_first_run_does_not_claim_the_folder(photos: Path, tmp_path: Path) -> None:
    for wrong in (0, -1):
        with pytest.raises(UserError, match="above 0"):
            reproduce.run("stop-gradient", photos, tmp_path / "out", epochs=wrong)


def test_a_batch_that_the_images_do_not_fill_is_refused(photos: Path, tmp_path: Path) -> None:
    """It would be reduced, but compared with the published figure for the full batch."""
    with pytest.raises(UserError, match=r"batches of 1,024 images and needs 4,096 to train on: .* has \d+\.$"):
        reproduce.run("batch-size", photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_diverged_does_not_count_as_measured() -> None:
    figures = {"knn": 60.0, "std": 1.0, "effective_rank": 9.0, "loss": -0.9, "verdict": "healthy"}
    lost = {**dict.fromkeys(figures), "linear": None, "verdict": "diverged"}
    row = reproduce._row(reproduce.Variant("one", 68.1), [{**figures, "linear": 70.0}, lost])
    assert (row["linear"], row["linear_n"], row["n"], row["linear_std"]) == (70.0, 1, 2, None)
    result = {"title": "t", "source": "s", "scale": "thin", "data": "demo", "epochs": 1.0, "seeds": 2, "rows": [row]}
    assert "| 70.0 (n = 1) |" in reproduce.markdown({**result, **reproduce.compare([row])})


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="Did you mean 'stop-gradient'"):
        reproduce.run("stop-gradeint")
    with pytest.raises(UserError, match="add --scale cifar"):
        reproduce.run("cifar")
    with pytest.raises(UserError, match="add --data"):
        reproduce.run("stop-gradient", scale="cifar")


def test_ctrl_c_says_how_the_experiment_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("SIGINT: stopped at step 7, everything is saved. Resume with: simsiam train --resume -o x")

    monkeypatch.setattr(reproduce, "train", stopped)
    with pytest.raises(
        Interrupted, match=r"^SIGINT: stopped at step 7, everything is saved. To go on, repeat the comm"
    ):
        reproduce.run("symmetry", photos, tmp_path / "out")


def test_a_batch_of_the_methods_own_counts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SimCLR has 4,096 images on ImageNet, SimSiam 256."""
    with pytest.raises(UserError, match=r"batches of 4,096 images and needs 16,384 to train on: demo has 7,994"):
        reproduce.run("comparison", "demo", tmp_path / "out", scale="imagenet")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0.0}, "epochs is 0: it must be above 0"),
        ({"data": "nowhere"}, "nowhere"),
        ({"device": "gpu"}, "Device 'gpu' cannot be used"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        reproduce.run("symmetry", settings.pop("data", None), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="mine exists and is not an experiment: choose another -o"):
        reproduce.run("symmetry", photos, tmp_path / "mine")
    assert sorted(tmp_path.rglob("*")) == before
