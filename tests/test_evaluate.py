"""The evaluations, each against a naive reference, a closed-form limit or scikit-learn."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simsiam import evaluate
from simsiam.clusters import k_means
from simsiam.collapse import effective_rank, normalised_std
from simsiam.compute import generator
from simsiam.config import UserError
from simsiam.evaluate import Features, compare, fewshot, knn, linear

LABELLED = ("knn", "linear", "fewshot", "retrieval", "clusters")


def clusters(
    n: int = 300, m: int = 200, dim: int = 16, classes: int = 4, noise: float = 1.0, seed: int = 0
) -> Features:
    """Gaussian classes around random centres, separable with noise 0.05."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=random)
    labels = [torch.arange(count) % classes for count in (n, m)]
    rows = [centres[y] + noise * torch.randn(len(y), dim, generator=random) for y in labels]
    return Features(rows[0], labels[0], rows[1], labels[1], classes)


def value(name: str, features: Features) -> float:
    module, known = evaluate.get(name), features.labelled()
    return module.score(known if module.NEEDS_LABELS else features)["value"]


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", evaluate.names())
def test_contract(name: str) -> None:
    module = evaluate.get(name)
    features = clusters()
    before = [features.train.clone(), features.test.clone()]
    score = module.score(features, seed=3)
    assert module.__doc__ and isinstance(module.NEEDS_LABELS, bool)
    assert isinstance(score["value"], float) and math.isfinite(score["value"])
    assert json.loads(json.dumps(score)) == score
    assert module.score(features, seed=3) == score
    assert all(torch.equal(a, b) for a, b in zip(before, [features.train, features.test], strict=True))
    signature = inspect.signature(module.score)
    assert signature.parameters["seed"].default == 0
    assert all(p.default is not p.empty for key, p in signature.parameters.items() if key != "features")


def test_the_file_name_is_the_registry() -> None:
    files = {path.stem for path in Path(evaluate.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(evaluate.names()) == files >= {*LABELLED, "collapse"}
    with pytest.raises(UserError, match="Did you mean 'fewshot'"):
        evaluate.get("few-shot")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    features = clusters()
    for part in ("train", "test"):
        broken = getattr(features, part).clone()
        broken[5, 2] = bad
        with pytest.raises(UserError, match="encoder's features are not finite"):
            replace(features, **{part: broken})


@pytest.mark.parametrize("name", LABELLED)
def test_unknown_labels_are_left_out(name: str) -> None:
    features = clusters(noise=2.0)
    assert features.train_labels is not None and features.test_labels is not None
    train, test = torch.arange(300) % 7 != 0, torch.arange(200) % 3 != 0
    marked = replace(
        features,
        train_labels=features.train_labels.where(train, -1),
        test_labels=features.test_labels.where(test, -1),
    )
    cut = Features(features.train[train], features.train_labels[train], features.test[test],
                   features.test_labels[test], 4)  # fmt: skip
    score = evaluate.get(name).score
    assert score(marked.labelled()) == score(cut.labelled()) != score(features.labelled())


@pytest.mark.parametrize("name", LABELLED)
def test_separable_classes_score_100(name: str) -> None:
    assert value(name, clusters(noise=0.05)) == 100


@pytest.mark.parametrize("name", LABELLED)
def test_random_labels_score_chance(name: str) -> None:
    features = clusters(n=2000, m=2000)
    random = torch.Generator().manual_seed(1)
    labels = [torch.randint(4, (2000,), generator=random) for _ in range(2)]
    # The standard error of 2000 guesses is 1 point.
    assert value(name, replace(features, train_labels=labels[0], test_labels=labels[1])) == pytest.approx(25, abs=4)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("constant", [0.0, 0.1, -7e4])
def test_constant_features_score_chance(name: str, constant: float) -> None:
    features = clusters()
    constants = [torch.full_like(rows, constant) for rows in (features.train, features.test)]
    assert value(name, replace(features, train=constants[0], test=constants[1])) == 25


@pytest.mark.parametrize("name", sorted({*LABELLED} - {"clusters"}))  # does not use the training images
def test_a_class_without_training_images_counts_as_missed(name: str) -> None:
    features = clusters(noise=0.05)
    assert features.train_labels is not None
    assert (
        value(name, replace(features, train_labels=features.train_labels.where(features.train_labels != 2, -1))) == 75
    )


# --- side by side -----------------------------------------------------------------------------------------------------


def test_compare_puts_the_kinds_side_by_side() -> None:
    by_kind = {"trained": clusters(noise=0.3), "untrained": clusters(noise=2.0), "pixels": clusters(dim=30, noise=4.0)}
    kinds = {kind: partial(replace, features) for kind, features in by_kind.items()}
    table = compare(evaluate.names(), kinds, seed=1, settings={"knn": {"k": 20}, "fewshot": {"draws": 5}})
    assert json.loads(json.dumps(table)) == table
    assert list(table) == evaluate.names()
    for name in LABELLED:
        row = table[name]
        assert row is not None and row["trained"] > row["untrained"] > row["pixels"] and row["test"] == 200
        assert all(row[kind] == round(row[kind], 2) for kind in by_kind)
    assert table["knn"] == {
        **{kind: table["knn"][kind] for kind in by_kind},
        "k": 20,
        "T": 0.1,
        "train": 300,
        "test": 200,
    }
    assert table["fewshot"]["draws"] == 5 and table["fewshot"]["by_labels"].keys() == by_kind.keys()
    assert table["collapse"]["dim"] == {"trained": 16, "untrained": 16, "pixels": 30}
    one = evaluate.get("linear").score(by_kind["pixels"], seed=1)
    assert table["linear"]["pixels"] == one["value"]


def test_compare_says_null_where_labels_do_not_suffice() -> None:
    full = clusters()
    no_rows = torch.empty(0, 16), torch.empty(0, dtype=torch.int64)
    lacking = [
        replace(full, train_labels=None, test_labels=None),
        replace(full, test=no_rows[0], test_labels=no_rows[1]),
        replace(full, train_labels=torch.full((300,), -1)),
        replace(full, test_labels=torch.full((200,), -1)),
        replace(full, train_labels=torch.ones(300, dtype=torch.int64)),
    ]
    for features in lacking:
        table = compare(evaluate.names(), {"trained": partial(replace, features)})
        assert [name for name in table if table[name] is None] == [
            name for name in evaluate.names() if evaluate.get(name).NEEDS_LABELS
        ]
        assert table["collapse"] is not None


def test_compare_holds_one_kind_at_a_time() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def make() -> Features:
        assert all(features() is None for features in made)
        features = clusters()
        made.extend(map(weakref.ref, (features.train, features.test)))
        return features

    compare(evaluate.names(), dict.fromkeys(("trained", "untrained", "pixels"), make))
    assert len(made) == 6


def test_compare_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UserError, match=r"Unknown evaluation 'knm'.*'knn'"):
        compare(["knm"], {"trained": clusters})


# --- knn --------------------------------------------------------------------------------------------------------------


def vote(features: Features, k: int, T: float) -> float:
    """Naive reference: one test row and one neighbour at a time, in float64."""
    assert features.train_labels is not None and features.test_labels is not None
    train, test = features.train.double().numpy(), features.test.double().numpy()
    right = 0
    for row, label in zip(test, features.test_labels.tolist(), strict=True):
        similarity = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in train]
        votes = [0.0] * features.classes
        for neighbour in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            votes[int(features.train_labels[neighbour])] += math.exp(similarity[neighbour] / T)
        right += votes.index(max(votes)) == label
    return 100 * right / len(test)


@pytest.mark.parametrize(
    ("counts", "k"),
    [((5000,) * 10, 200), ((1000, 1000, 40), 200), ((999, 999, 5000), 20), ((3,), 20), ((0, 0, 0, 1000, 1000), 200)],
)
def test_k_is_200_where_a_class_has_a_thousand_images(counts: tuple[int, ...], k: int) -> None:
    labels = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    assert knn.usual_k(torch.cat([labels, torch.full((5000,), -1)])) == k


@pytest.mark.parametrize(("k", "T"), [(1, 0.1), (20, 0.1), (200, 0.1), (200, 1.0), (220, 0.02)])
def test_knn_is_the_naive_vote(k: int, T: float, monkeypatch: pytest.MonkeyPatch) -> None:
    features = clusters(n=220, m=60, noise=2.0)
    monkeypatch.setattr(knn, "_ROWS", 23)
    assert knn.score(features, k=k, T=T)["value"] == round(vote(features, k, T), 2)
    assert knn.score(features, k=k, T=T)["k"] == k


def test_more_neighbours_than_there_are_are_warned_of() -> None:
    features = clusters(n=220, m=60, noise=2.0)
    with pytest.warns(UserWarning, match="k is 500, but there are 220 labelled training images: all vote"):
        found = knn.score(features, k=500)
    assert found == knn.score(features, k=220)


def test_temperature_and_count_matter() -> None:
    features = clusters(n=600, m=500, noise=2.5)
    assert len({knn.score(features, k=k, T=T)["value"] for k, T in ((1, 0.1), (200, 0.1), (200, 10.0))}) == 3


def test_a_very_low_temperature_is_the_single_nearest() -> None:
    features = clusters(noise=2.0)
    assert knn.score(features, T=1e-4)["value"] == knn.score(features, k=1)["value"]


# --- linear -----------------------------------------------------------------------------------------------------------


def objective(theta: Tensor, x: Tensor, labels: Tensor, C: float) -> Tensor:
    """scikit-learn's objective, divided by C and the number of rows."""
    logits = x @ theta[:, :-1].T + theta[:, -1]
    return F.cross_entropy(logits, labels) + theta[:, :-1].square().sum() / (2 * C * len(x))


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_fit_is_scikit_learns_optimum(C: float) -> None:
    features = clusters(n=500, m=1000, noise=2.0)
    x, test = linear.standardise(features.train, features.test)
    labels, test_labels = features.train_labels, features.test_labels
    assert labels is not None and test_labels is not None
    reference = LogisticRegression(C=C, tol=1e-8, max_iter=2000).fit(x.double().numpy(), labels.numpy())
    best = torch.from_numpy(np.column_stack([reference.coef_, reference.intercept_]))
    theta = linear.fit(x, labels, 4, C).double().requires_grad_()
    loss = objective(theta, x.double(), labels, C)
    loss.backward()
    assert theta.grad is not None and theta.grad.abs().max() < 1e-4
    assert loss.item() == pytest.approx(objective(best, x.double(), labels, C).item(), rel=1e-5)
    expected = 100 * reference.score(test.double().numpy(), test_labels.numpy())
    assert float(linear.accuracy(theta.detach().float(), test, test_labels)) == pytest.approx(expected, abs=1)


def test_fit_is_the_optimum_for_many_classes_and_channels_too() -> None:
    """The gradient of the mean loss is smaller there from the start."""
    draws, classes, width = torch.Generator().manual_seed(0), 300, 512
    labels = torch.arange(3000) % classes
    x = 0.3 * torch.randn(classes, width, generator=draws)[labels] + torch.randn(3000, width, generator=draws)
    x, _ = linear.standardise(x, x)
    theta = linear.fit(x, labels, classes, 100.0).double()
    reference = LogisticRegression(C=100.0, tol=1e-10, max_iter=1000).fit(x.double().numpy(), labels.numpy())
    best = torch.from_numpy(np.column_stack([reference.coef_, reference.intercept_]))
    expected = objective(best, x.double(), labels, 100.0).item()
    assert objective(theta, x.double(), labels, 100.0).item() == pytest.approx(expected, rel=1e-5)


class Memory(TorchDispatchMode):
    """Peak bytes held by tensors created since entering the context."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.held:
                    self.held[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, storage.data_ptr())
        self.most = max(self.most, sum(self.held.values()))
        return result


def test_a_fit_holds_three_values_for_every_class_and_row_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(8000, 4), torch.arange(8000) % 500
    monkeypatch.setattr(linear, "_PART", 2000 * 500)
    with Memory() as memory:
        linear.fit(x, labels, 500, 1.0, steps=3)
    assert memory.most < 3.2 * 2000 * 500 * 4


def test_a_fit_in_parts_is_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.stack([clusters(seed=seed, noise=2.0).train for seed in range(3)])
    labels = (torch.arange(300) % 4).expand(3, -1)
    whole = linear.fit(x, labels, 4, 0.1, steps=5)
    monkeypatch.setattr(linear, "_PART", 7 * 4 * 3)  # 300 is no multiple of 7
    torch.testing.assert_close(linear.fit(x, labels, 4, 0.1, steps=5), whole)


def test_problems_solved_together_have_the_solutions_of_each_alone() -> None:
    x = torch.stack([clusters(seed=seed, noise=2.0).train for seed in range(3)])
    labels = (torch.arange(300) % 4).expand(3, -1)
    together = linear.fit(x, labels, 4, 0.1)
    for i in range(3):
        torch.testing.assert_close(together[i], linear.fit(x[i], labels[i], 4, 0.1), atol=0.01, rtol=0)


def test_standardise_drops_constant_channels_and_leaks_nothing_from_the_test_rows() -> None:
    features = clusters()
    train = torch.cat([features.train * 1000 + 5, torch.full((300, 1), 0.1)], 1)
    x, test = linear.standardise(train, train[:7] + 3)
    torch.testing.assert_close(x.mean(0), torch.zeros(17), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0)[:16], torch.full((16,), 17**-0.5))
    assert (x[:, 16] == 0).all() and (test[:, 16] == 0).all()
    torch.testing.assert_close(test[:, :16] - x[:7, :16], (3 / train.std(0, correction=0) / 17**0.5)[:16].expand(7, -1))


def test_strength_is_chosen_without_the_test_rows() -> None:
    features = clusters(n=1000, m=2000, dim=100, noise=2.5)
    assert features.train_labels is not None
    random = torch.Generator().manual_seed(1)
    wrong = torch.rand(1000, generator=random) < 0.4  # label noise calls for strong regularisation
    labels = torch.where(wrong, torch.randint(4, (1000,), generator=random), features.train_labels)
    features = replace(features, train_labels=labels)
    fixed = {C: linear.score(features, C=C)["value"] for C in linear.STRENGTHS}
    chosen = linear.score(features)
    assert min(fixed.values()) + 5 < chosen["value"] == fixed[chosen["C"]]
    assert chosen["value"] >= max(fixed.values()) - 2
    assert linear.score(replace(features, test=torch.zeros_like(features.test)))["C"] == chosen["C"]


@pytest.mark.parametrize("rows", [2, 3, 5, 10])
def test_a_handful_of_rows_is_enough(rows: int) -> None:
    features = clusters(n=rows, classes=2, noise=0.01)
    assert all(value(name, features) == 100 for name in {*LABELLED} - {"retrieval"})
    assert evaluate.get("retrieval").score(features)["nearest"] == 100  # too few rows for ten neighbours


def test_a_sample_of_rows_is_in_their_order() -> None:
    rows = evaluate.sample_rows(1000, 100, generator(torch.device("cpu"), 3)).tolist()
    assert rows == sorted(set(rows)) and len(rows) == 100 and rows[0] >= 0 and rows[-1] < 1000
    assert evaluate.sample_rows(7, 100, generator(torch.device("cpu"), 3)).tolist() == list(range(7))


# --- retrieval and clusters -------------------------------------------------------------------------------------------


def test_retrieval_counts_what_a_literal_search_finds() -> None:
    features = clusters(noise=3.0)
    train, test = (F.normalize(rows.double(), dim=1) for rows in (features.train, features.test))
    hits = []
    for row, label in zip(test, features.test_labels.tolist(), strict=True):
        best = (train @ row).argsort(descending=True)[:7]
        hits.append([int(features.train_labels[i] == label) for i in best])
    found = evaluate.get("retrieval").score(features, k=7)
    assert found["value"] == round(100 * np.mean(hits), 2) and found["k"] == 7
    assert found["nearest"] == round(100 * np.mean([row[0] for row in hits]), 2)


def test_clusters_are_matched_with_the_classes_as_well_as_can_be() -> None:
    features = clusters(noise=1.5)
    score = evaluate.get("clusters").score(features)
    found, labels = k_means(F.normalize(features.test, dim=1), 4), features.test_labels.numpy()
    best = max(np.mean(np.array(order)[found] == labels) for order in itertools.permutations(range(4)))
    assert score["value"] == round(100 * best, 2) and 0 < score["nmi"] < 1 and score["clusters"] == 4


# --- the paper's linear protocol --------------------------------------------------------------------------------------


def probe(features: Features, views: Callable[[int], Tensor], **settings: float) -> dict[str, object]:
    assert features.train_labels is not None and features.test_labels is not None
    return linear.sgd_probe(
        views, features.train_labels, features.test, features.test_labels, features.classes, **settings
    )


def test_sgd_probe_learns_separable_classes() -> None:
    features = clusters(n=1024, noise=0.3)
    seen: list[int] = []

    def views(epoch: int) -> Tensor:
        seen.append(epoch)
        return features.train

    result = probe(features, views, epochs=30, batch_size=64, lr=16)
    assert result == {"value": 100.0, "optimiser": "lars", "epochs": 30, "batch_size": 64, "lr": 16,
                      "weight_decay": 0.0, "train": 1024, "test": 200}  # fmt: skip
    assert seen == list(range(30))
    assert result == probe(features, views, epochs=30, batch_size=64, lr=16)


def test_sgd_probe_learns_from_the_views_that_it_is_given() -> None:
    features = clusters(n=1024, noise=0.3)
    shuffled = features.train[torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    result = probe(features, lambda epoch: shuffled, epochs=30, batch_size=64, lr=16)
    assert isinstance(result["value"], float) and result["value"] < 70
    with pytest.raises(UserError, match="not finite"):
        probe(features, lambda epoch: features.train / 0 if epoch else features.train, epochs=2)


def test_sgd_probe_is_plain_lars_with_the_cosine_of_the_epoch() -> None:
    features = clusters(n=96, m=40, noise=2.0)
    labels = features.train_labels
    assert labels is not None and features.test_labels is not None
    # One batch per epoch, so the order of rows does not matter to the naive reference.
    epochs, lr = 40, 8.0
    weight = torch.empty(4, 16).normal_(0, 0.01, generator=generator(torch.device("cpu"), 0)).double().requires_grad_()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    velocity = [torch.zeros(4, 16, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
    for epoch in range(epochs):
        loss = F.cross_entropy(features.train.double() @ weight.T + bias, labels)
        gradients = torch.autograd.grad(loss, [weight, bias])
        rate = lr * 96 / 256 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        with torch.no_grad():
            for v, w, g in zip(velocity, (weight, bias), gradients, strict=True):
                v.mul_(0.9).add_(g * (0.001 * w.norm() / g.norm() if w.any() else 1.0))
                w -= rate * v
    right = (features.test.double() @ weight.T + bias).argmax(1) == features.test_labels
    result = probe(features, lambda epoch: features.train, epochs=epochs, lr=lr)
    assert result["value"] == round(100 * float(right.double().mean()), 2)


def test_sgd_probe_leaves_unknown_labels_out_and_caps_the_batch() -> None:
    features = clusters(n=200, m=40)
    assert features.train_labels is not None
    marked = replace(features, train_labels=features.train_labels.where(torch.arange(200) % 4 != 1, -1))
    result = probe(marked, lambda epoch: features.train, epochs=1)
    assert (result["train"], result["batch_size"], result["epochs"]) == (150, 150, 1)


# --- few-shot ---------------------------------------------------------------------------------------------------------


def test_draws_are_balanced_distinct_and_paired() -> None:
    labels = torch.randint(5, (400,), generator=torch.Generator().manual_seed(0))
    chosen = fewshot.choose(labels, 7, 20, seed=4)
    assert chosen.shape == (20, 35)
    for rows in chosen:
        assert len(rows.unique()) == 35 and labels[rows].bincount().tolist() == [7] * 5
    assert len({tuple(rows.tolist()) for rows in chosen}) == 20
    assert torch.equal(chosen, fewshot.choose(labels, 7, 20, seed=4))
    assert not torch.equal(chosen, fewshot.choose(labels, 7, 20, seed=5))


def test_draws_are_those_of_a_literal_choice() -> None:
    labels = torch.tensor([8, 2, 8, 2, 2, 5, 5, 8, 2])
    random = generator(torch.device("cpu"), 3, 1, 2)
    literal = []
    for _ in range(20):
        members = [[row for row, label in enumerate(labels.tolist()) if label == each] for each in (2, 5, 8)]
        literal.append([rows[i] for rows in members for i in torch.randperm(len(rows), generator=random)[:2].tolist()])
    assert fewshot.choose(labels, 2, 20, seed=3).tolist() == literal


def test_fewshot_is_the_mean_and_std_of_single_fits() -> None:
    features = clusters(noise=1.5)
    score = fewshot.score(features, seed=2, draws=4)
    train, test = linear.standardise(features.train, features.test)
    labels, test_labels = features.train_labels, features.test_labels
    assert labels is not None and test_labels is not None
    for count in (1, 5, 10):
        values = []
        for rows in fewshot.choose(labels, count, 4, seed=2).numpy():
            fitted = LogisticRegression(C=score["C"], max_iter=2000).fit(
                train[rows].double().numpy(), labels[rows].numpy()
            )
            values.append(100 * fitted.score(test.double().numpy(), test_labels.numpy()))
        mean, std = score["by_labels"][str(count)]["mean"], score["by_labels"][str(count)]["std"]
        assert (mean, std) == (pytest.approx(np.mean(values), abs=0.6), pytest.approx(np.std(values, ddof=1), abs=0.6))
    assert (score["value"], score["labels_per_class"], score["draws"]) == (score["by_labels"]["10"]["mean"], 10, 4)


def test_fewshot_gains_from_labels_and_leaves_out_what_a_class_lacks() -> None:
    features = clusters(noise=1.5)
    by_labels = fewshot.score(features)["by_labels"]
    assert by_labels["1"]["mean"] < by_labels["5"]["mean"] < by_labels["10"]["mean"]
    assert features.train_labels is not None
    rare = features.train_labels.clone()
    rare[torch.nonzero(rare == 3)[6:, 0]] = -1
    few = replace(features, train_labels=rare).labelled()
    assert few is not None
    score = fewshot.score(few)
    assert (list(score["by_labels"]), score["labels_per_class"]) == (["1", "5"], 5)
    nothing = fewshot.score(few, labels_per_class=[7])
    assert (nothing["value"], nothing["by_labels"]) == (None, {})


def test_fewshot_does_not_depend_on_how_many_draws_are_fitted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features = clusters(noise=1.5)
    together = fewshot.score(features)
    monkeypatch.setattr(fewshot, "_AT_ONCE", 1)
    alone = fewshot.score(features)
    for count, figures in together["by_labels"].items():
        assert figures == pytest.approx(alone["by_labels"][count], abs=0.1)


def test_fewshot_samples_the_test_rows() -> None:
    features = clusters(m=3000, noise=1.5)
    sampled = fewshot.score(features, most_test=1000)
    assert sampled["test"] == 1000
    assert sampled["value"] == pytest.approx(fewshot.score(features)["value"], abs=4)


# --- collapse ---------------------------------------------------------------------------------------------------------


def test_collapse_without_labels() -> None:
    features = Features(torch.randn(400, 32), None, torch.randn(300, 32), None, 0)
    score = evaluate.get("collapse").score(features)
    assert score["value"] == score["std"] == round(float(normalised_std(features.test)), 4)
    assert score["effective_rank"] == round(effective_rank(features.test), 2)
    assert (score["verdict"], score["dim"], score["rows"]) == ("healthy", 32, 300)
    without_test = evaluate.get("collapse").score(replace(features, test=torch.empty(0, 32)), rows=100)
    assert (without_test["rows"], without_test["verdict"]) == (100, "healthy")
    for few, rows in ((15, 400), (16, 16)):  # with so few test rows, training rows are used
        assert evaluate.get("collapse").score(replace(features, test=features.test[:few]))["rows"] == rows


def test_collapse_is_named() -> None:
    one, line = torch.ones(300, 32), torch.randn(300, 2) @ torch.randn(2, 32)
    for rows, verdict in ((one, "collapsed"), (line, "partial")):
        assert evaluate.get("collapse").score(Features(rows, None, rows, None, 0))["verdict"] == verdict
