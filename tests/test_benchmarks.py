"""benchmarks/: what makes the figures comparable, tested without measuring."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from simsiam.methods.simsiam import Method, Settings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module("peers")
    for name in ("peers", "pipelines", "training"):
        sys.modules.pop(name)


def test_peers_train_a_model_of_the_same_shape_as_ours(peers: Any) -> None:
    task = peers.Task(Path(), 32, 8, torch.device("cpu"), "thin-resnet18", 1.0)
    backbone = task.backbone()
    projector, predictor = peers.pipelines.heads(backbone.dim, task, inplace=True)
    heads = {"dim": task.dim, "projector_hidden": backbone.dim, "predictor_hidden": task.predictor}
    ours = Method(backbone, Settings(projector_layers=3, **heads))

    def shapes(*modules: torch.nn.Module) -> list[torch.Size]:
        return [p.shape for module in modules for p in module.parameters() if p.requires_grad]

    assert shapes(projector, predictor) == shapes(ours.projector, ours.predictor)


def test_contenders_take_turns_and_ratios_are_taken_within_a_round(peers: Any) -> None:
    seen: list[str] = []

    def contender(name: str, figures: list[float]) -> Any:
        left = iter(figures)
        return lambda: (seen.append(name), next(left))[1]

    contenders = {"ours": contender("ours", [2.0, 30.0]), "peer": contender("peer", [1.0, 10.0]), "gone": "not here"}
    rates = peers.Comparison("rates", "images/s", contenders)
    rates.run(2)
    assert seen == ["ours", "peer", "peer", "ours"]
    assert rates.ratios("ours") == [1, 1] and rates.ratios("peer") == [2, 3]
    assert "| peer | 5.5 | 6.364 | 2.5 | 0.7071 |" in rates.table()
    assert "| gone | left out: not here |" in rates.table()

    times = peers.Comparison("times", "s", {"ours": lambda: 1.0, "peer": lambda: 4.0})
    times.run(1)
    assert times.ratios("peer") == [4], "fewer seconds are better"


def test_a_window_leaves_the_first_steps_out(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now)
    clock = peers.Clock(seconds=2.0, batch=10, device=torch.device("cpu"), warmup=2)
    steps = 0
    while not clock.over():
        now += 100.0 if steps == 0 else 0.5  # the slow first step must not count
        steps += 1
    assert clock.rate == pytest.approx(10 / 0.5)
