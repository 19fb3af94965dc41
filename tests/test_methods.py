"""The contract of methods/__init__.py, for every method."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import simsiam
from simsiam import methods, recipes
from simsiam.config import UserError
from simsiam.encoders import EncoderSpec, build
from simsiam.recipe import preset, read

BATCH, SIZE = 8, 16
SMALL = {
    **{"dim": 32, "projector_hidden": 32, "predictor_hidden": 16, "hidden": 32},
    **{"prototypes": 12, "queue": 24, "queue_epoch": 1, "freeze_epochs": 2, "bn_groups": 2},
}
IMAGES = 64
GOLDEN = Path(__file__).with_name("golden_losses.json")
every_method = pytest.mark.parametrize("name", methods.names())


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """The method with a small encoder and small widths."""
    module = methods.get(name)
    known = {field.name for field in dataclasses.fields(module.Settings)}
    settings = module.Settings(**{key: value for key, value in (SMALL | changes).items() if key in known})
    encoder = build(EncoderSpec("thin-resnet18", SIZE, width=8), seed)
    torch.manual_seed(seed)
    method: nn.Module = module.Method(encoder, settings)
    method.allocate(IMAGES)
    return method


def batch(name: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """The method's default number of views of a batch; the batches together contain every image once."""
    draws = np.random.default_rng(seed)
    shape = (BATCH, 3, SIZE, SIZE)
    views = [torch.from_numpy(draws.standard_normal(shape)).to(dtype) for _ in range(methods.get(name).VIEWS[0])]
    start = seed * BATCH % IMAGES
    return views, torch.arange(start, start + BATCH)


def begin(name: str, method: nn.Module) -> None:
    with torch.no_grad():
        method.before_training(batch(name, seed, dtype(method)) for seed in range(IMAGES // BATCH))


def dtype(method: nn.Module) -> torch.dtype:
    return next(method.parameters()).dtype


def optimiser(method: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.param_groups(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def step(name: str, method: nn.Module, sgd: torch.optim.Optimizer, number: int) -> float:
    """One training step as in the training loop, each in its own epoch."""
    torch.manual_seed(number)
    method.before_epoch(number)
    loss, _ = method(*batch(name, number, dtype(method)))
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    method.after_step(number / 10)  # the fraction of training done
    return loss.item()  # type: ignore[no-any-return]


@every_method
def test_a_method_says_where_it_comes_from(name: str) -> None:
    module = methods.get(name)
    assert "arXiv" in module.CITATION and (module.__doc__ or "").strip()
    assert module.PUBLISHED and all(isinstance(value, float) for value in module.PUBLISHED.values())
    assert dataclasses.is_dataclass(module.Settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.Settings().dim = 1
    assert issubclass(module.Method, nn.Module)
    assert len(module.VIEWS) > 0 and min(module.VIEWS) >= 2


@every_method
@pytest.mark.parametrize("recipe", recipes.names())
def test_every_recipe_can_be_had_with_every_method(name: str, recipe: str) -> None:
    """The result has only settings that the method knows: `read` rejects any other."""
    table = preset(recipe, name)
    assert {"lr", "weight_decay"} <= table["train"].keys(), "or it would take those of no recipe at all"
    views, encoder = {"size": 32, **table["views"]}, {"size": 32, **table["encoder"]}
    plan = read({"data": "x", **table, "views": views, "encoder": encoder, "eval": {"size": 32}})
    assert plan.method == name and len(plan.views.each()) in methods.get(name).VIEWS
    assert read(plan.table()) == plan


RELEASED: list[tuple[str, str, tuple[str, float, float, int, float], dict[str, Any]]] = [
    ("imagenet", "simsiam", ("sgd", 0.1, 1e-4, 512, 0.0), {"dim": 2048}),
    ("imagenet", "simclr", ("lars", 4.8, 1e-6, 4096, 10.0), {"temperature": 0.1}),
    ("imagenet", "moco", ("sgd", 0.03, 1e-4, 256, 0.0), {"momentum": 0.999, "temperature": 0.2, "queue": 65536}),
    ("imagenet", "byol", ("lars", 7.2, 1e-6, 4096, 10.0), {"momentum": 0.99}),  # the released preset for 100 epochs
    ("imagenet", "swav", ("larc", 4.8, 1e-6, 4096, 10.0), {"prototypes": 3000, "freeze_epochs": 1}),
    ("imagenet", "deepcluster", ("larc", 4.8, 1e-6, 4096, 10.0), {"prototypes": 3000, "heads": 3}),
    ("imagenet", "barlow", ("lars", 1.6, 1e-6, 2048, 10.0), {"weight": 0.0051, "dim": 8192}),
    ("imagenet", "vicreg", ("lars", 2.4, 1e-6, 2048, 10.0), {"invariance": 25.0, "covariance": 1.0}),
    ("cifar", "simsiam", ("sgd", 0.06, 5e-4, 512, 0.0), {}),
    ("cifar", "moco", ("sgd", 0.06, 5e-4, 512, 0.0), {"momentum": 0.99, "temperature": 0.1, "queue": 4096}),
    ("cifar", "fastsiam", ("sgd", 0.06, 5e-4, 128, 0.0), {}),  # lightly's benchmark
]


@pytest.mark.parametrize(("recipe", "name", "training", "method"), RELEASED, ids=[f"{r}-{n}" for r, n, *_ in RELEASED])
def test_a_recipe_trains_as_was_published(
    recipe: str, name: str, training: tuple[str, float, float, int, float], method: dict[str, Any]
) -> None:
    """Optimiser, actual learning rate, weight decay, batch size and warm-up epochs."""
    table = preset(recipe, name)
    plan = read({"data": "x", **table, "encoder": {"size": 32, **table["encoder"]}, "eval": {"size": 32}})
    kind, *numbers = training
    train = plan.train
    assert train.optimizer == kind
    assert [train.peak, train.weight_decay, train.batch_size, train.warmup_epochs] == pytest.approx(numbers)
    assert {key: getattr(plan.method_settings, key) for key in method} == method


@every_method
def test_forward_gives_a_float32_loss_and_detached_stats(name: str) -> None:
    views, index = batch(name, 0)
    before = [view.clone() for view in views]
    method = make(name)
    begin(name, method)
    method.before_epoch(0)
    loss, stats = method(views, index)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad and loss.isfinite()
    assert "std" in stats
    for value in stats.values():
        assert isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad and value.isfinite()
    assert all(torch.equal(view, old) for view, old in zip(views, before, strict=True))


@every_method
def test_the_loss_reaches_the_encoder(name: str) -> None:
    method = make(name)
    begin(name, method)
    method.before_epoch(0)
    method(*batch(name, 0))[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    assert sum(float(p.grad.norm()) for p in method.encoder.parameters() if p.grad is not None) > 0  # type: ignore[union-attr]


@every_method
def test_embed_gives_features_and_projection(name: str) -> None:
    method = make(name).eval()
    with torch.no_grad():
        x = batch(name, 0)[0][0]
        h, z = method.embed(x)  # type: ignore[operator]
        assert h.shape == (BATCH, method.encoder.dim) and z.shape[0] == BATCH and z.ndim == 2  # type: ignore[union-attr]
        assert torch.equal(h, method.encoder(x))  # type: ignore[operator]
        # In eval mode an embedding does not depend on the rest of the batch.
        torch.testing.assert_close(method.embed(x[2:3]), (h[2:3], z[2:3]))  # type: ignore[operator]


@every_method
def test_param_groups_hold_every_trained_parameter_once(name: str) -> None:
    method = make(name)
    grouped = [id(p) for group in method.param_groups() for p in group["params"]]
    trained = [id(p) for p in method.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained)


@every_method
def test_training_is_deterministic(name: str) -> None:
    runs = []
    for _ in range(2):
        method = make(name)
        begin(name, method)
        sgd = optimiser(method)
        runs.append(([step(name, method, sgd, seed) for seed in range(3)], method.state_dict()))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0])) == 3
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())


@every_method
def test_a_reloaded_state_goes_on_identically(name: str) -> None:
    """Everything that the next step depends on is in the state dict, including queues and target networks."""
    method = make(name)
    begin(name, method)
    sgd = optimiser(method)
    for seed in range(6):
        step(name, method, sgd, seed)
    resumed = make(name, seed=1)
    resumed.load_state_dict(copy.deepcopy(method.state_dict()), strict=True)
    resumed_sgd = optimiser(resumed)
    resumed_sgd.load_state_dict(copy.deepcopy(sgd.state_dict()))
    for seed in (6, 7, 8):
        assert step(name, method, sgd, seed) == step(name, resumed, resumed_sgd, seed)
    theirs = resumed.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in method.state_dict().items())


def in_float64(method: nn.Module) -> nn.Module:
    """The method in float64, with the same weights on every processor, unlike torch's normal numbers."""
    drawn: dict[bytes, Tensor] = {}
    draws = np.random.default_rng(0)
    with torch.no_grad():
        for value in method.double().state_dict().values():
            if value.is_floating_point() and value.numel() > 1 and value.std() > 0:
                spread = float(f"{value.std():.2g}")
                key = value.numpy().tobytes()  # a target network stays equal to its original
                value.copy_(drawn.setdefault(key, torch.from_numpy(draws.normal(0, spread, value.shape))))
    return method


@every_method
def test_the_first_20_losses_are_golden(name: str) -> None:
    """Detects any change of a loss, a head or the order of random draws. SIMSIAM_GOLDEN=write accepts it.

    In float64: with such small batches, float32 rounding, which depends on the processor, dominates after ten steps.
    """
    method = in_float64(make(name))
    begin(name, method)
    sgd = torch.optim.SGD(method.param_groups(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    losses = [step(name, method, sgd, number) for number in range(20)]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("SIMSIAM_GOLDEN") == "write":
        found = [float(f"{loss:.12g}") for loss in losses]
        GOLDEN.write_text(json.dumps({**golden, name: found}, indent=1, sort_keys=True) + "\n")
    else:
        assert name in golden, f"no losses of {name} are kept yet: docs/add-your-own.md says how to write them"
        assert losses == pytest.approx(golden[name], rel=1e-6, abs=1e-9)


@every_method
def test_a_bf16_step_is_finite(name: str) -> None:
    method, twin = make(name), make(name)
    for each in (method, twin):
        begin(name, each)
        each.before_epoch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, stats = method(*batch(name, 0))
    assert loss.dtype == torch.float32 and loss.isfinite() and all(value.isfinite() for value in stats.values())
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    exact, _ = twin(*batch(name, 0))
    assert abs(loss.item() - exact.item()) < 0.05 * max(1.0, abs(exact.item()))


@every_method
def test_settings_outside_their_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="dim"):
        methods.get(name).Settings(dim=0)


def test_an_unknown_method_is_hinted_at() -> None:
    assert "simsiam" in methods.names()
    with pytest.raises(UserError, match="Did you mean 'simsiam'"):
        methods.get("simsaim")


@every_method
def test_it_learns_the_demo_set(name: str, tmp_path: Path) -> None:
    """A network and views so small that one core does a dozen steps per second; otherwise the demo recipe."""
    small = ["encoder.width=8", "views.size=16", "eval.size=16"]
    # The guard must not stop it: some dip early, and on a busy machine more checks fall into the dip.
    summary = simsiam.train(
        "demo", tmp_path / "run", recipe="demo", method=name, epochs=5, overrides=small, on_collapse="continue"
    )
    knn = summary["knn"]
    assert summary["verdict"] == "healthy", summary["evidence"]
    assert knn["trained"] > knn["untrained"] + 5, knn
