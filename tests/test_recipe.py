"""Recipes: what the user asks for, what is derived from the data and the machine, and why."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import simsiam
from simsiam import methods
from simsiam.config import UserError, write_recipe
from simsiam.defaults import Facts, default_epochs, resolve
from simsiam.recipe import TrainSettings, gather, preset, read


@pytest.mark.parametrize("images", [10, 300, 3_800, 50_000, 2_000_000])
@pytest.mark.parametrize("side", [8, 28, 32, 64, 100, 500])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_defaults_fit_any_data(images: int, side: int, device: str) -> None:
    facts = Facts(images, side, device)
    recipe, reasons = resolve(gather("somewhere", None, [], {}), facts)
    assert 2 <= recipe.train.batch_size <= images
    assert recipe.views.size <= recipe.eval.size <= max(224, side) and recipe.views.size >= 8
    assert recipe.eval.size <= max(16, -(-side // 8) * 8), "images are not enlarged"
    assert all(why for _, _, why in reasons)
    assert read(recipe.table()) == recipe
    epochs, why = default_epochs(facts, seconds_per_epoch=10)
    assert 1 <= epochs <= 800 and why


@pytest.mark.parametrize(
    ("facts", "encoder", "sizes", "batch_size"),
    [
        ((1_000, 28, "cpu"), "thin-resnet18", (24, 32), 64),
        ((100, 28, "cpu"), "thin-resnet18", (24, 32), 16),
        ((1_000, 500, "cpu"), "thin-resnet18", (48, 64), 64),
        ((20_000, 500, "cpu"), "thin-resnet18", (48, 64), 128),
        ((50_000, 33, "cuda"), "cifar-resnet18", (40, 40), 512),
        ((199_999, 500, "cuda"), "resnet18", (224, 224), 512),
        ((200_000, 500, "cuda"), "resnet50", (224, 224), 512),
        ((200_000, 100, "cuda"), "resnet50", (96, 96), 512),
    ],
)
def test_defaults_are_those_that_the_docs_tell(
    facts: tuple[int, int, str], encoder: str, sizes: tuple[int, int], batch_size: int
) -> None:
    recipe, reasons = resolve(gather("x", None, [], {}), Facts(*facts))
    few_photographs = encoder.startswith("thin-") and facts[0] < 20_000 and facts[1] > 48
    assert (recipe.views.jitter[3] < 0.1) == few_photographs == any(name == "views.jitter" for name, *_ in reasons)
    assert (recipe.views.gray_p < 0.2) == few_photographs
    if encoder.startswith("thin-"):
        assert recipe.method_settings.predictor_lr == (30 if few_photographs else 10)
    found = recipe.encoder.name, (recipe.views.size, recipe.eval.size), recipe.train.batch_size
    assert found == (encoder, sizes, batch_size)


@pytest.mark.parametrize(
    ("images", "device", "seconds", "epochs"),
    [
        (1_000, "cpu", 10, 180),  # half an hour
        (1_000, "cuda", 100, 144),  # four hours
        (1_000, "cpu", 0.001, 800),
        (199_999, "cpu", 0.001, 800),
        (200_000, "cpu", 0.001, 100),
        (1_000, "cpu", 1e5, 1),  # one epoch at least
    ],
)
def test_epochs_are_the_papers_or_what_a_person_waits_for(
    images: int, device: str, seconds: float, epochs: float
) -> None:
    assert default_epochs(Facts(images, 32, device), seconds)[0] == epochs


def test_images_are_kept_at_the_size_of_use_and_of_views() -> None:
    facts = Facts(1_000, 32, "cpu")
    larger, _ = resolve(gather("x", None, ["views.size=40"], {}), facts)
    assert larger.eval.size == 40  # inference size is at least the training size
    for sizes in ((96, 64), (64, 96)):
        overrides = [f"views.size={sizes[0]}", f"eval.size={sizes[1]}"]
        assert resolve(gather("x", None, overrides, {}), facts)[0].short_side == 110  # 96 / (7/8)


def test_what_the_user_says_stands() -> None:
    facts = Facts(50_000, 32, "cpu")
    asked = gather("x", "cifar", ["lr=0.2", "views.blur_p=0.5"], {"epochs": 5.0, "batch_size": 64, "method": "simsiam"})
    recipe, _ = resolve(asked, facts)
    assert (recipe.train.lr, recipe.views.blur_p, recipe.train.epochs, recipe.train.batch_size) == (0.2, 0.5, 5, 64)
    assert recipe.encoder.name == "cifar-resnet18" and recipe.method_settings.dim == 2048
    budget, _ = resolve(gather("x", "cifar", [], {"budget": "5m"}), facts)
    assert budget.train.epochs is None and budget.train.seconds == 300
    for lengths, last in ((["epochs=5", "budget=5m"], "budget"), (["budget=5m", "epochs=5"], "epochs")):
        assert {"epochs", "budget"} & gather("x", "cifar", lengths, {})["train"].keys() == {last}
    for overrides, settings in (([], {"size": 96}), (["size=96"], {}), (["views.size=48", "size=96"], {})):
        sized, _ = resolve(gather("x", None, overrides, settings), facts)
        assert sized.views.size == sized.eval.size == 96


@pytest.mark.parametrize("method", [None, "byol", "fastsiam"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("facts", [(50_000, 32), (1_281_167, 400)])
def test_to_name_the_default_encoder_changes_nothing(method: str | None, device: str, facts: tuple[int, int]) -> None:
    asked = {"method": method}
    plain, _ = resolve(gather("x", None, [], asked), Facts(*facts, device))
    named, reasons = resolve(gather("x", None, [], {**asked, "encoder": plain.encoder.name}), Facts(*facts, device))
    assert named == plain and any(plain.encoder.name in why for setting, _, why in reasons if setting == "recipe")


def test_a_recipe_that_is_asked_for_is_not_mixed_with_another() -> None:
    for name, family in (("imagenet", "thin-resnet18"), ("cifar", "resnet18"), ("demo", "cifar-resnet18")):
        asked = gather("x", name, [], {})
        plain, _ = resolve(asked, Facts(50_000, 32, "cuda"))
        other, reasons = resolve(gather("x", name, [], {"encoder": family}), Facts(50_000, 32, "cuda"))
        assert other.method_settings == plain.method_settings and other.train == plain.train
        assert other.views == plain.views and not any(setting == "recipe" for setting, _, _ in reasons)


def test_numbers_arrive_with_the_type_of_their_setting(photos: Path) -> None:
    plan, reasons = resolve(gather(str(photos), None, ["train.batch_size=512.0"], {}), Facts(96, 32, "cpu"))
    assert plan.train.batch_size == 16 and any(setting == "train.batch_size" for setting, _, _ in reasons)


@pytest.mark.parametrize("name", ["imagenet", "cifar"])
def test_presets_are_the_papers(name: str) -> None:
    recipe, _ = resolve(gather("x", name, [], {}), Facts(50_000, 32 if name == "cifar" else 400, "cuda"))
    train, views, method = recipe.train, recipe.views, recipe.method_settings
    assert (train.momentum, train.batch_size, train.cosine, train.warmup_epochs) == (0.9, 512, "epoch", 0)
    assert views.jitter == (0.4, 0.4, 0.4, 0.1) and (views.jitter_p, views.gray_p, views.flip_p) == (0.8, 0.2, 0.5)
    assert views.scale == (0.2, 1.0) and method.dim == 2048 and method.predictor_hidden in (None, 512)
    assert method.stop_gradient and method.predictor and method.predictor_fixed_lr
    if name == "imagenet":
        assert (train.lr, train.weight_decay, train.epochs, views.size) == (0.05, 1e-4, 100, 224)
        assert (views.blur_p, views.blur_sigma, method.projector_layers) == (0.5, (0.1, 2.0), 3)
        assert recipe.encoder.name == "resnet50"
    else:
        assert (train.lr, train.weight_decay, train.epochs, views.size) == (0.03, 5e-4, 800, 32)
        assert (views.blur_p, method.projector_layers) == (0.0, 2)


def test_a_papers_encoder_and_batch_are_cut_to_size_with_a_reason() -> None:
    """With few large images on a GPU; the BYOL paper uses batches of 4096."""
    facts = Facts(3_800, 500, "cuda")
    plan, reasons = resolve(gather("x", None, [], {"method": "byol"}), facts)
    assert plan.encoder.name == "resnet18" and plan.train.batch_size == 512
    assert {setting: value for setting, value, _ in reasons}.items() >= {
        "encoder": "resnet18",
        "train.batch_size": "512",
    }.items()
    # SwAV needs a queue with small batches.
    plan, reasons = resolve(gather("x", None, [], {"method": "swav"}), facts)
    assert (plan.train.batch_size, plan.train.lr, plan.method_settings.queue) == (512, 0.6, 3840)
    told = [(setting, value) for setting, value, reason in reasons if reason == "one device"]
    assert told == [
        ("method.queue", "3840"),
        ("train.lr", "0.6"),
        ("train.warmup_epochs", "0"),
        ("train.batch_size", "512"),
    ]
    plan, reasons = resolve(gather("x", None, ["train.lr=0.3", "method.queue=0"], {"method": "swav"}), facts)
    assert (plan.train.batch_size, plan.train.lr, plan.method_settings.queue) == (512, 0.3, 0)
    assert not {"method.queue", "train.lr"} & {setting for setting, *_ in reasons}
    plan, _ = resolve(gather("x", "imagenet", [], {"method": "swav"}), Facts(50_000, 500, "cuda"))
    assert (plan.train.batch_size, plan.train.lr, plan.method_settings.queue) == (4096, 0.3, 0)
    # The paper's batch has the paper's settings, whoever wants it.
    for asked, processes in (({"batch_size": 4096}, 1), ({}, 8)):
        large = Facts(2_000_000, 500, "cuda", processes)
        plan, reasons = resolve(gather("x", None, [], {"method": "swav", **asked}), large)
        assert (plan.train.batch_size, plan.train.lr, plan.train.warmup_epochs) == (4096, 0.3, 10)
        assert plan.method_settings.queue == 0 and not any("device" in reason for *_, reason in reasons)
    plan, reasons = resolve(gather("x", None, [], {"method": "swav"}), replace(large, processes=2))
    assert (plan.train.batch_size, plan.train.lr) == (1024, 0.6) and ("train.lr", "0.6", "2 devices") in reasons
    plan, reasons = resolve(gather("x", None, [], {}), facts)
    assert ("encoder", "resnet18") in [(setting, value) for setting, value, _ in reasons]


def test_a_reason_is_given_for_what_was_derived_and_for_nothing_else() -> None:
    facts = Facts(5_000, 96, "cpu")
    _, reasons = resolve(gather("x", None, [], {}), facts)
    assert {"train.batch_size", "train.weight_decay"} <= {setting for setting, _, _ in reasons}
    plan, reasons = resolve(gather("x", None, [], {"encoder": "resnet18", "batch_size": 32}), facts)
    assert plan.train.batch_size == 32 and "train.batch_size" not in {setting for setting, _, _ in reasons}
    _, reasons = resolve(gather("x", None, [], {}), Facts(100, 96, "cpu"))
    assert [value for setting, value, _ in reasons if setting == "train.batch_size"] == ["16"]


def test_another_method_takes_the_optimiser_where_it_belongs(tmp_path: Path) -> None:
    """Built-in recipes use the method's optimiser, even if a SimSiam run starts from BYOL; a user's own file keeps its
    training settings."""
    own = tmp_path / "own.toml"
    own.write_text(
        '[method]\nname = "simsiam"\ndim = 64\n[encoder]\nname = "thin-resnet18"\n'
        '[train]\nlr = 0.7\nweight_decay = 2e-3\noptimizer = "lars"\nepochs = 9\n'
    )
    table = gather("x", str(own), [], {"method": "byol"})
    assert table["method"] == {"name": "byol"} and table["encoder"] == {"name": "thin-resnet18"}
    assert table["train"] == {"lr": 0.7, "weight_decay": 2e-3, "optimizer": "lars", "epochs": 9}
    run = tmp_path / "run"
    run.mkdir()
    byol = resolve(gather("x", "cifar", [], {"method": "byol", "epochs": 5.0}), Facts(50_000, 32, "cuda"))[0]
    (run / "config.toml").write_text(write_recipe(byol.table()))
    back = gather("x", None, [], {"init": str(run), "method": "simsiam"})
    theirs = preset("cifar")
    assert back["method"] == theirs["method"] and "momentum" not in back["method"]
    assert all(back["train"][key] == theirs["train"][key] for key in ("lr", "weight_decay"))
    assert "optimizer" not in back["train"] and back["train"]["epochs"] == 5.0


@pytest.mark.parametrize("family", ["thin", "cifar", "imagenet"])
@pytest.mark.parametrize(("former", "method"), list(itertools.permutations(methods.names(), 2)))
def test_views_go_with_the_method_that_they_belong_to(tmp_path: Path, family: str, former: str, method: str) -> None:
    facts = Facts(50_000, 100, "cuda")
    before = resolve(gather("x", family, [], {"method": former}), facts)[0]
    (tmp_path / "config.toml").write_text(write_recipe(before.table()))
    now = resolve(gather("x", None, [], {"init": str(tmp_path), "method": method}), facts)[0]
    assert now.views == resolve(gather("x", family, [], {"method": method}), facts)[0].views
    assert now.method_settings == resolve(gather("x", family, [], {"method": method}), facts)[0].method_settings


def test_numbers_of_numpy_are_numbers() -> None:
    asked = gather("x", "cifar", [], {"seed": np.int64(3), "lr": np.float32(0.25), "batch_size": np.int32(64)})
    recipe = resolve(asked, Facts(50_000, 32, "cpu"))[0]
    assert (recipe.seed, recipe.train.lr, recipe.train.batch_size) == (3, 0.25, 64)


def test_what_a_recipe_leaves_open_is_the_papers(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[encoder]\nname = "resnet18"\n')
    recipe = resolve(gather("x", str(tmp_path / "own.toml"), [], {}), Facts(50_000, 100, "cuda"))[0]
    assert recipe.train == TrainSettings() and recipe.train.batch_size == 512


def test_init_leaves_behind_what_was_measured_on_another_machine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    there = {"precision": "bf16", "compile": True, "threads": 3}
    told = resolve(gather("x", "cifar", ["train.lr=0.07"], there), Facts(50_000, 32, "cuda"))[0]
    (run / "config.toml").write_text(write_recipe(told.table()))
    here = gather("x", None, [], {"init": str(run)})
    assert not here["train"].keys() & there.keys() and here["train"]["lr"] == 0.07
    assert gather("x", None, [], {"init": str(run), "precision": "fp32"})["train"]["precision"] == "fp32"


def test_new_weights_suit_the_size_that_is_asked_for(tmp_path: Path) -> None:
    """Of a run's own recipe, which names the size of its stem; weights that are taken over keep it."""
    table = preset("thin")
    table = {**table, "encoder": {**table["encoder"], "size": 32}, "eval": {"size": 32}, "data": "demo"}
    (tmp_path / "config.toml").write_text(write_recipe(table))
    facts = Facts(1000, 256, "cpu")
    for settings, size in (({"size": 128}, 128), ({}, 32), ({"size": 128, "encoder": {"size": 64}}, 64)):
        plan_, _ = resolve(gather("demo", str(tmp_path / "config.toml"), [], settings), facts)
        assert plan_.encoder.size == size and plan_.prepare.size == settings.get("size", 32)
    plan_, _ = resolve(gather("demo", None, [], {"size": 128, "init": str(tmp_path)}), facts)
    assert plan_.encoder.size == 32


def test_small_views_are_smaller_than_the_others(photos: Path, tmp_path: Path) -> None:
    plan_, _ = resolve(
        gather(str(photos), None, [], {"method": "swav", "encoder": "resnet18"}), Facts(1000, 256, "cpu")
    )
    assert [view.size for view in plan_.views.each()] == [64, 64] + [27] * 6
    whole, _ = resolve(gather("x", "imagenet", [], {"method": "swav"}), Facts(2_000_000, 256, "cuda"))
    assert {view.size for view in whole.views.each()} == {224, 96}
    with pytest.raises(UserError, match=r"cannot take 96-pixel views .*another --size, or views.small_count=0"):
        simsiam.train(photos, tmp_path / "run", method="swav", encoder="vit_b_16", size=224)
