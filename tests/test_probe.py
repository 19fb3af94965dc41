"""What a few steps at the start decide on a GPU, with simulated times."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import simsiam
from simsiam import probe
from simsiam.compute import Compute
from simsiam.config import Interrupted, UserError, merge, read_recipe, write_recipe
from simsiam.data.loader import Batch
from simsiam.defaults import Facts
from simsiam.probe import Probed, settle
from simsiam.recipe import Recipe, preset, read
from simsiam.runs import write_text
from test_train import SMALL, Recorder, Stop

FACTS = Facts(images=50_000, short_side=32, device="cuda")
BATCH = Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, torch.arange(2))


def plan(**train: Any) -> Recipe:
    sizes = {"data": "x", "seed": 0, "encoder": {"size": 32}, "eval": {"size": 32}, "train": {"precision": "bf16"}}
    table = merge(preset("cifar"), sizes)
    table["train"].pop("epochs")
    return read(merge(table, {"train": train}))


def probed(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, plain: float, fused: float | Exception
) -> tuple[Probed, list[str]]:
    told: list[str] = []

    def seconds(*_: Any) -> float:
        if _[-1] and isinstance(fused, Exception):
            raise fused
        assert isinstance(fused, float) or not _[-1]
        return fused if _[-1] else plain  # type: ignore[return-value]

    monkeypatch.setattr(probe, "_step_seconds", seconds)
    start, compute = Probed("bf16", 0.0, "asked for", 2, 2), Compute(torch.device("cpu"), "bf16")
    length = partial(probe._length, recipe, 97, FACTS)
    return probe._probe_gpu(torch.nn.Linear(1, 1), recipe, BATCH, compute, start, length, told.append), told


@pytest.mark.parametrize(
    ("train", "plain", "fused", "compiles"),
    [
        ({"epochs": 800}, 0.02, 0.015, True),
        ({"epochs": 800}, 0.02, 0.0199, False),  # not faster
        ({"epochs": 2}, 0.02, 0.015, False),  # only four seconds
        ({"epochs": 2, "compile": True}, 0.02, 0.03, True),
        ({"epochs": 800, "compile": False}, 0.02, 0.015, False),
        ({"budget": "10m"}, 0.02, 0.015, True),
        ({"budget": "1m"}, 0.02, 0.015, False),
        ({}, 0.02, 0.015, True),  # the default length
    ],
)
def test_a_long_run_is_compiled_where_that_is_faster(
    train: dict[str, Any], plain: float, fused: float, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = plan(**train)
    found, told = probed(monkeypatch, recipe, plain, fused)
    assert found.compiles is compiles and found.step_seconds == (fused if compiles else plain)
    assert bool(told) == (compiles or "no faster" in found.why_compiled)
    settled, reasons = settle(recipe, found, FACTS, 97)
    assert settled.train.compile is compiles and settled.train.precision == "bf16"
    assert ("train.compile" in [setting for setting, _, _ in reasons]) == bool(told)
    assert read(settled.table()) == settled  # a resumed run keeps it
    again, _ = probed(monkeypatch, settled, plain, fused)
    assert again.compiles is compiles


def test_an_encoder_that_cannot_be_compiled_is_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("Failed to find C compiler.\nPlease specify one")
    found, _ = probed(monkeypatch, plan(epochs=800), 0.02, broken)
    assert not found.compiles and found.step_seconds == 0.02
    assert found.why_compiled == "cannot be compiled here (Failed to find C compiler.)"
    with pytest.raises(UserError, match=r"train.compile: this encoder cannot be compiled here \(Failed to find"):
        probed(monkeypatch, plan(epochs=800, compile=True), 0.02, broken)
    full = torch.OutOfMemoryError("CUDA out of memory")
    found, _ = probed(monkeypatch, plan(epochs=800), 0.02, full)  # compiling takes more memory than the step
    assert not found.compiles and "out of memory" in found.why_compiled
    with pytest.raises(torch.OutOfMemoryError):
        probed(monkeypatch, plan(epochs=800, compile=True), 0.02, full)


@pytest.mark.parametrize("asked", [True, False, None])
def test_what_a_user_asks_for_stands_on_a_cpu(asked: bool | None) -> None:
    """If unset, the run's recipe leaves it open, so that a GPU can decide."""
    recipe = plan(epochs=1, **({} if asked is None else {"compile": asked}))
    settled, _ = settle(recipe, Probed("fp32", 0.1, "asked for", 2, 2), replace(FACTS, device="cpu"), 97)
    assert settled.train.compile is asked


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_compiles(*_: Any, **__: Any) -> Any:
        def fails(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx\nand so on")

        return fails

    monkeypatch.setattr(torch, "compile", nothing_compiles)


@pytest.mark.usefixtures("no_compiler")
def test_a_cpu_without_a_compiler_says_so(photos: Path, tmp_path: Path) -> None:
    overrides = [*SMALL["overrides"], "train.compile=true"]
    with pytest.raises(UserError, match=r"^train.compile: this encoder cannot be compiled here \(No working C\+\+"):
        simsiam.train(photos, tmp_path / "run", epochs=1, overrides=overrides, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_compiler", "on_cpu")
def test_a_run_that_was_compiled_goes_on_where_nothing_can_be(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simsiam.session._FLUSH_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        simsiam.train(photos, tmp_path / "run", epochs=2, listener=Stop(signal.SIGINT, 3), **SMALL)
    config = tmp_path / "run" / "config.toml"
    write_text(config, write_recipe(merge(read_recipe(config), {"train": {"compile": True}})))  # as from a GPU
    told = Recorder()
    assert simsiam.train(out=tmp_path / "run", resume=True, listener=told)["steps"] == 10
    assert any("cannot compile the encoder: the run continues without" in line for line in told.lines)
