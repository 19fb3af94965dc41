"""Fine-tuning: learns only from the labels it may see, and leaves the encoder unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simsiam
import simsiam.finetune as finetune_module
from simsiam.assess import evaluate_run
from simsiam.compute import Compute
from simsiam.config import UserError
from simsiam.data.cache import Cache, build_cache
from simsiam.data.sources import open_images
from simsiam.encoders import Encoder, EncoderSpec, build
from simsiam.features import Preprocessing
from simsiam.finetune import choose, finetune
from simsiam.runs import read_json
from simsiam.weights import read_encoder
from test_train import SMALL

FP32 = Compute(torch.device("cpu"), "fp32")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    simsiam.train(photos, folder, epochs=1, **SMALL)
    return folder


@pytest.fixture(scope="module")
def parts(run: Path, photos: Path) -> tuple[Encoder, Preprocessing, Cache]:
    encoder, prepare, _ = read_encoder(run)
    return encoder, prepare, build_cache(open_images(photos), prepare.short_side)


def test_it_learns_and_leaves_the_encoder_as_it_was(
    parts: tuple[Encoder, Preprocessing, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, prepare, cache = parts
    monkeypatch.setattr("simsiam.finetune.RATES", (0.5,))
    train, test = np.arange(0, 96, 2), np.arange(1, 96, 2)
    train, test = train[cache.heights[train] > 0], test[cache.heights[test] > 0]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    told: list[float] = []
    found = finetune(encoder, prepare, cache, train, test, FP32, share=1.0, epochs=150, done=told.append)
    assert found is not None and found["value"] > 70  # chance is a third
    assert (found["train"], found["test"], found["epochs"], found["share"]) == (len(train), len(test), 150, 1.0)
    assert told == sorted(told) and told[-1] == pytest.approx(1) and len(told) == 150
    assert not encoder.training and all(
        torch.equal(value, before[name]) for name, value in encoder.state_dict().items()
    )


def test_it_sees_the_labels_of_its_rows_and_no_others(
    parts: tuple[Encoder, Preprocessing, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, prepare, cache = parts
    labels = cache.labels
    assert labels is not None
    train, test = cache.split()
    chosen = choose(labels, train, 0.3, 0)
    used = np.zeros(len(cache), dtype=bool)
    used[np.concatenate(chosen)] = True
    monkeypatch.setattr("simsiam.finetune.choose", lambda *_: chosen)  # the choice of rows may use all labels
    monkeypatch.setattr("simsiam.finetune.RATES", (0.1,))
    networks: list[torch.nn.Module] = []
    fit = finetune_module.fit
    monkeypatch.setattr(finetune_module, "fit", lambda *a: networks.append(fit(*a)) or networks[-1])

    def weights(labels: np.ndarray) -> torch.Tensor:
        twin = build_cache(dataclasses.replace(cache.images, labels=labels), prepare.short_side)
        assert finetune(encoder, prepare, twin, train, test, FP32, epochs=2) is not None
        return torch.cat([parameter.flatten() for parameter in networks[-1].parameters()])

    other = (labels + 1) % 3
    assert torch.equal(weights(labels), weights(np.where(used, labels, other)))
    assert not torch.equal(weights(labels), weights(np.where(used, other, labels)))


def test_the_rate_is_chosen_on_rows_that_are_not_trained_on(
    parts: tuple[Encoder, Preprocessing, Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that learns beats one that does not, in either order; the last fit uses all rows."""
    encoder, prepare, cache = parts
    train, test = cache.split()
    fit, seen = finetune_module.fit, []
    monkeypatch.setattr(finetune_module, "fit", lambda *a: seen.append((len(a[3]), a[5])) or fit(*a))
    for rates in ((1e-9, 0.5), (0.5, 1e-9)):
        seen.clear()
        monkeypatch.setattr("simsiam.finetune.RATES", rates)
        found = finetune(
            encoder, prepare, cache, train, test, FP32, share=1.0, epochs=30
        )  # 8 are too few on some draws
        assert found is not None and found["lr"] == 0.5
        few = len(choose(cache.labels, train, 1.0, 0)[0])  # type: ignore[arg-type]
        assert seen == [(few, rates[0]), (few, rates[1]), (len(train), 0.5)] and few < len(train)


@pytest.mark.parametrize(("share", "each"), [(1e-6, 5), (0.1, 10), (0.5, 50), (1.0, 100)])
def test_a_share_of_every_class(share: float, each: int) -> None:
    labels = np.concatenate([np.repeat([0, 1, 2], 100), [3, 3, -1]])
    train = np.arange(0, len(labels))
    kept, held_out = choose(labels, train, share, seed=1)
    rows = np.concatenate([kept, held_out])
    assert len(np.unique(rows)) == len(rows) and (labels[rows] >= 0).all()
    assert np.bincount(labels[rows]).tolist() == [each, each, each, 2]
    assert np.bincount(labels[held_out]).tolist() == [each // 5] * 3
    assert np.array_equal(np.concatenate(choose(labels, train, share, seed=1)), rows)
    assert share == 1 or not np.array_equal(
        np.sort(np.concatenate(choose(labels, train, share, seed=2))), np.sort(rows)
    )


def test_evaluate_sets_it_beside_training_from_scratch(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simsiam.finetune._EPOCHS", 2)
    monkeypatch.setattr("simsiam.finetune._FEWEST_STEPS", 0)
    found = evaluate_run(run, names=["collapse"], share=0.5)["finetune"]
    assert 0 <= found["trained"] <= 100 and 0 <= found["untrained"] <= 100 and found["pixels"] is None
    assert found["lr"].keys() == {"trained", "untrained"} and found["share"] == 0.5 and found["epochs"] == 2
    assert read_json(run / "evaluation.json")["finetune"] == found
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(photos.rglob("*.png"))[:20]:
        (flat / path.name).write_bytes(path.read_bytes())
    assert evaluate_run(run, flat, names=["collapse"], share=0.5)["finetune"] is None  # no labels
    for share in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="share of the labels"):
            evaluate_run(run, share=share)


@pytest.mark.parametrize(("asked", "name"), [({"share": 0.5}, "finetune"), ({"sgd": True}, "sgd_probe")])
def test_memory_that_runs_out_costs_the_other_evaluations_nothing(
    run: Path, asked: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    (run / "evaluation.json").unlink(missing_ok=True)
    monkeypatch.setattr(f"simsiam.assess.{name}", full)
    with pytest.raises(
        UserError, match=r"memory than (cpu|cuda) has\. The other evaluations are in .*evaluation\.json"
    ):
        evaluate_run(run, names=["knn"], **asked)
    assert read_json(run / "evaluation.json")["knn"]["trained"] > 0


def test_dropout_too_is_a_function_of_the_seed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(EncoderSpec("mobilenet_v3_small", 32), 0).eval()
    prepare = Preprocessing(32, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    cache = build_cache(open_images(photos), prepare.short_side)
    train, test = cache.split()
    monkeypatch.setattr("simsiam.finetune.RATES", (0.1,))
    fit, networks = finetune_module.fit, []
    monkeypatch.setattr(finetune_module, "fit", lambda *a: networks.append(fit(*a)) or networks[-1])
    before = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        assert finetune(encoder, prepare, cache, train, test, FP32, share=0.3, epochs=2, seed=seed) is not None
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (list(network.parameters()) for network in networks)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[-1], other[-1])
