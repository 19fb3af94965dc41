"""Typed settings: values survive a round trip, and errors name the key."""

from __future__ import annotations

import copy
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from simsiam.config import (
    UserError,
    counted,
    did_you_mean,
    fill,
    merge,
    parse_duration,
    parse_override,
    read_recipe,
    short_name,
    show_bytes,
    show_duration,
    table_of,
    write_recipe,
)


@dataclass(frozen=True)
class Settings:
    rate: float = 0.5
    steps: int = 3
    name: str = "a"
    fast: bool = False
    kind: Literal["auto", "bf16"] = "auto"
    scale: tuple[float, float] = (0.2, 1.0)
    width: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps must not be negative.")


def test_an_empty_table_is_the_defaults() -> None:
    assert fill(Settings, {}, "train") == Settings()


def test_values_arrive_with_their_own_types() -> None:
    table = {"rate": 1, "steps": 3.0, "name": "b", "fast": True, "kind": "bf16", "scale": [1, 0.5], "width": 64}
    filled = fill(Settings, table, "train")
    assert filled == Settings(1.0, 3, "b", True, "bf16", (1.0, 0.5), 64)
    assert type(filled.rate) is float and type(filled.steps) is int and type(filled.scale[0]) is float
    assert fill(Settings, {"width": None}, "train").width is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"step": 3}, r"Unknown setting train\.step\. Did you mean 'steps'\?"),
        ({"xyz": 3}, r"Unknown setting train\.xyz\. Available: fast, kind, name, rate, scale, steps, width\."),
        ({"rate": "high"}, r"train\.rate is 'high'.* a number"),
        ({"rate": True}, r"train\.rate is True.* a number"),
        ({"rate": float("nan")}, r"train\.rate is nan.* finite"),
        ({"rate": float("inf")}, r"train\.rate is inf.* finite"),
        ({"steps": 2.5}, r"train\.steps is 2\.5.* a whole number"),
        ({"steps": True}, r"train\.steps is True.* a whole number"),
        ({"fast": 1}, r"train\.fast is 1.* true or false"),
        ({"name": 1}, r"train\.name is 1.* text"),
        ({"kind": "fp8"}, r"train\.kind is 'fp8'.* 'auto', 'bf16'"),
        ({"scale": [0.1]}, r"train\.scale .* list of 2"),
        ({"scale": "ab"}, r"train\.scale .* list of 2"),
        ({"scale": [0.1, "b"]}, r"train\.scale is 'b'.* a number"),
        ({"width": "wide"}, r"train\.width is 'wide'.* a whole number"),
        ({"steps": -1}, r"In \[train\]: steps must not be negative"),
    ],
)
def test_a_mistake_names_its_key(table: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        fill(Settings, table, "train")
    assert "\n" not in str(error.value)


def test_a_setting_that_must_be_there_is_named() -> None:
    @dataclass
    class Needs:
        size: int
        crop: int = 3

    assert fill(Needs, {"size": 2}, "eval") == Needs(2, 3)
    with pytest.raises(UserError, match=r"^The setting eval\.size is missing\.$"):
        fill(Needs, {"crop": 2}, "eval")


def test_a_recipe_survives_the_way_to_disk(tmp_path: Path) -> None:
    settings = Settings(rate=1e-4, name='quo"te\n', scale=(0.1, 2.0), fast=True)
    table = {"train": table_of(settings), "seed": 7, "nested": {"deep": {"list": [1, 2]}}}
    (tmp_path / "a.toml").write_text(write_recipe(table), encoding="utf-8")
    read = read_recipe(tmp_path / "a.toml")
    assert fill(Settings, read["train"], "train") == settings
    assert read["seed"] == 7 and read["nested"] == {"deep": {"list": [1, 2]}}
    assert write_recipe(read) == write_recipe(table)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("a = = 1")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "none.toml", "No recipe at"), (tmp_path, "Cannot read")):
        with pytest.raises(UserError, match=message):
            read_recipe(path)
    for name in ("broken", "binary"):
        with pytest.raises(UserError, match=f"Cannot read the recipe .*{name}"):
            read_recipe(tmp_path / f"{name}.toml")


def test_merge_lays_one_table_on_the_other() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2], "c": {"k": 1}}
    over = {"a": {"y": {"w": 3}}, "b": [9], "c": 5, "d": {"new": 1}}
    before = copy.deepcopy((base, over))
    assert merge(base, over) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [9], "c": 5, "d": {"new": 1}}
    assert (base, over) == before
    assert merge(base, {}) == base and merge({}, over) == over and merge(base, base) == base


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("views.blur=0.5", {"views": {"blur": 0.5}}),
        (" a . b.c = 3 ", {"a": {"b": {"c": 3}}}),
        ("train.lr=1e-3", {"train": {"lr": 0.001}}),
        ("views.scale=[0.2, 1.0]", {"views": {"scale": [0.2, 1.0]}}),
        ("on=true", {"on": True}),
        ("on=False", {"on": False}),
        ("name=thin-resnet18", {"name": "thin-resnet18"}),
        ("name='1'", {"name": "1"}),
        ("path=C:\\data=x", {"path": "C:\\data=x"}),
        ("empty=", {"empty": ""}),
    ],
)
def test_overrides(text: str, table: dict[str, object]) -> None:
    assert parse_override(text) == table


@pytest.mark.parametrize("text", ["lr", "=3", "", "  =3"])
def test_an_override_without_key_or_value(text: str) -> None:
    with pytest.raises(UserError, match="key=value"):
        parse_override(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    {"90s": 90, "10m": 600, "1h30m": 5400, "2h": 7200, "1.5 h": 5400, "10 min": 600, "1d": 86400, "5SEC": 5}.items(),
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["10", "", "0s", "-5m", "5 minutes and a bit", "m", "1h30", "ten m", "5x"])
def test_durations_that_would_be_a_guess(text: str) -> None:
    with pytest.raises(UserError, match="write it like 90s"):
        parse_duration(text)


def test_durations_as_a_person_says_them() -> None:
    shown = {0: "0.0 s", 4.24: "4.2 s", 9.94: "9.9 s", 9.96: "10 s", 48: "48 s", 60: "1 min 00 s", 545: "9 min 05 s"}
    shown |= {3599.6: "1 h 00 min", 11520: "3 h 12 min", 48 * 3600: "2.0 days", 36 * 3600: "36 h 00 min"}
    assert {seconds: show_duration(seconds) for seconds in shown} == shown


def test_no_unit_is_ever_full() -> None:
    for tenths in range(0, 72_000, 7):
        assert "60" not in show_duration(tenths / 10).split()


def test_did_you_mean() -> None:
    assert did_you_mean("simsaim", ["byol", "simsiam"]) == " Did you mean 'simsiam'?"
    assert did_you_mean("zzz", ["b", "a"]) == " Available: a, b."


def test_settings_and_run_folders_are_light_to_import() -> None:
    """`simsiam --help` depends on this: importing torch takes seconds."""
    code = "import sys, simsiam, simsiam.config, simsiam.runs, simsiam.compute; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_recipes_are_toml_1() -> None:
    assert tomllib.loads(write_recipe({"a": {"b": (1, 2)}, "c": float("inf")})) == {
        "a": {"b": [1, 2]},
        "c": float("inf"),
    }


def test_counted() -> None:
    shown = [counted(count, "bad file") for count in (0, 1, 2, 3000)]
    assert shown == ["0 bad files", "1 bad file", "2 bad files", "3,000 bad files"]
    assert [counted(count, "epoch") for count in (0.5, 1.0, 800.0)] == ["0.5 epochs", "1 epoch", "800 epochs"]


def test_bytes_are_said_in_the_unit_that_fits() -> None:
    shown = {0: "0 bytes", 999: "999 bytes", 1_000: "1 kB", 84_251_000: "84.3 MB", 999_600_000: "1 GB", 335e9: "335 GB"}
    assert {count: show_bytes(count) for count in [*shown]} == shown and show_bytes(12.34e15) == "12,340.0 TB"


def test_a_set_of_torchvision_is_called_by_its_kind() -> None:
    names = {"CIFAR10:/home/me/data": "CIFAR10", "/home/me/photos": "photos", "/a/b:c/d.tar": "d.tar", "demo": "demo"}
    assert {data: short_name(data) for data in names} == names and short_name("/") == "/"
