"""The methods other than SimSiam: losses against naive references and limits, and what must get a gradient or not."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.encoders import Encoder, EncoderSpec
from simsiam.heads import follow, in_float32, mlp, similarities, twin, unit
from simsiam.methods import barlow, byol, deepcluster, fastsiam, moco, simclr, simsiam, swav, vicreg

B, D = 12, 6
pytestmark = pytest.mark.usefixtures("one_thread")


def vectors(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(module: Any, images: int = 0, **settings: Any) -> Any:
    """The method with a linear encoder of 3x2x2 pixels."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderSpec("linear", 2), nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), 8)
    method = module.Method(encoder, module.Settings(dim=D, **settings))
    if images:
        method.allocate(images)
    return method


def views(count: int = 2) -> list[Tensor]:
    return [vectors(seed, B, 3, 2, 2) for seed in range(count)]


def reached(network: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 1e-9) for p in network.parameters())


# --- SimCLR -----------------------------------------------------------------------------------------------------------


def naive_nt_xent(z: np.ndarray, temperature: float) -> float:
    """Equation 1 of the paper, pair by pair; rows i and i + N/2 belong together."""
    n = len(z)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(n):
        j = (i + n // 2) % n
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i)
        total -= math.log(math.exp(z[i] @ z[j] / temperature) / others)
    return total / n


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_the_naive_twins(temperature: float) -> None:
    z1, z2 = vectors(0, B, D), vectors(1, B, D)
    ours = simclr.nt_xent(z1, z2, z1, z2, temperature).item()
    assert ours == pytest.approx(naive_nt_xent(torch.cat([z1, z2]).double().numpy(), temperature), rel=1e-5)


def test_limits_of_nt_xent() -> None:
    same = torch.ones(B, D)
    assert simclr.nt_xent(same, same, same, same, 0.1).item() == pytest.approx(math.log(2 * B - 1), rel=1e-6)
    apart = torch.eye(B)
    expected = math.log(math.exp(1 / 0.1) + 2 * B - 2) - 1 / 0.1
    assert simclr.nt_xent(apart, apart, apart, apart, 0.1).item() == pytest.approx(expected, rel=1e-3)


def test_simclr_with_simsiams_parts() -> None:
    method = build(simclr, predictor=True, stop_gradient=True)
    method(views(), torch.arange(B))[0].backward()
    assert reached(method.predictor) and reached(method.encoder)
    plain, stopped = build(simclr), build(simclr, stop_gradient=True)
    for each in (plain, stopped):
        each(views(), torch.arange(B))[0].backward()
    first, second = (next(m.encoder.parameters()).grad for m in (plain, stopped))
    assert not torch.allclose(first, second)  # without the gradient of the keys


# --- MoCo -------------------------------------------------------------------------------------------------------------


def test_info_nce_is_the_naive_twins() -> None:
    q, k, queue = (unit(vectors(seed, n, D)) for seed, n in ((0, B), (1, B), (2, 20)))
    total = 0.0
    for i in range(B):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        total -= math.log(positive / (positive + sum(math.exp(float(q[i] @ other) / 0.2) for other in queue)))
    assert moco.info_nce(q, k, queue, 0.2).item() == pytest.approx(total / B, rel=1e-5)
    assert moco.info_nce(q, q[:1].expand(B, D) * 0, queue * 0, 0.2).item() == pytest.approx(math.log(21), rel=1e-6)


def test_moco_keys_get_no_gradient_and_the_queue_holds_the_newest() -> None:
    method = build(moco, queue=2 * B + 4, bn_groups=2)
    seen = []
    for number in range(4):
        x = [vectors(10 * number + view, B, 3, 2, 2) for view in range(2)]
        loss, _ = method(x, torch.arange(B))
        loss.backward()
        assert not reached(method.key_network) and reached(method.encoder)
        seen.append(method.queue.clone())
        method.after_step(0.0)
    kept = [any(torch.equal(row, other) for other in seen[3]) for row in seen[2]]
    assert sum(kept) == len(seen[2]) - B  # each step replaces a batch of keys, the oldest
    torch.testing.assert_close(seen[3].norm(dim=1), torch.ones(2 * B + 4))


def keys_of(method: Any, x: Tensor) -> Tensor:
    """Without BN, keys do not depend on the order and groups in which they are computed."""
    with torch.no_grad():
        return unit(method.key_network(x))


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_is_the_naive_twins_with_every_view_as_query_where_it_is_symmetric(symmetric: bool) -> None:
    method, (x1, x2) = build(moco, queue=3 * B, symmetric=symmetric), views()
    with torch.no_grad():
        for parameter in method.key_network.parameters():
            parameter.add_(0.1)  # keys must differ from queries
        before, q = method.queue.clone(), [unit(method.embed(x)[1]) for x in (x1, x2)]
    k = [keys_of(method, x) for x in (x1, x2)]
    losses = [moco.info_nce(q[0], k[1], before, 0.2).item(), moco.info_nce(q[1], k[0], before, 0.2).item()]
    assert abs(losses[0] - losses[1]) > 1e-3
    loss, _ = method([x1, x2], torch.arange(B))
    assert loss.item() == pytest.approx(sum(losses) / 2 if symmetric else losses[0], rel=1e-5)
    fresh = [k[1], k[0]] if symmetric else [k[1]]
    torch.testing.assert_close(method.queue, torch.cat([*fresh, before[len(fresh) * B :]]))


@pytest.mark.parametrize("queue", [2 * B + 4, B - 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mocos_queue_is_a_ring_of_the_last_keys(queue: int, symmetric: bool) -> None:
    method = build(moco, queue=queue, symmetric=symmetric)
    naive, came = list(method.queue), 0
    for number in range(5):
        x = [vectors(10 * number + view, B, 3, 2, 2) for view in range(2)]
        keys = torch.cat([keys_of(method, x[1]), keys_of(method, x[0])] if symmetric else [keys_of(method, x[1])])
        method(x, torch.arange(B))
        for key in keys[-queue:]:
            naive[came % queue] = key
            came += 1
        torch.testing.assert_close(method.queue, torch.stack(naive))


def test_mocos_keys_are_shuffled_between_the_groups_and_come_back_in_order() -> None:
    """Shuffled BN (MoCo, section 3.3): a key and its query share no statistics."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
    settings = moco.Settings(dim=D, queue=5 * B, bn_groups=3)
    method = moco.Method(Encoder(EncoderSpec("linear", 2), backbone, 8), settings)
    seen: dict[str, list[Tensor]] = {"queries": [], "keys": []}
    made: dict[str, list[Tensor]] = {"queries": [], "keys": []}
    for name, network in (("queries", method.network), ("keys", method.key_network)):
        encoder, projector = network
        encoder.register_forward_hook(lambda _, given, out, to=seen[name]: to.append(given[0]))
        projector.register_forward_hook(lambda _, given, out, to=made[name]: to.append(out))
    x = views()
    orders = []
    for number in range(3):
        for parts in (*seen.values(), *made.values()):
            parts.clear()
        method(x, torch.arange(B))
        assert [len(given) for given in seen["keys"]] == [len(given) for given in seen["queries"]] == [4, 4, 4]
        assert torch.equal(torch.cat(seen["queries"]), x[0])
        given, keys = torch.cat(seen["keys"]), torch.cat(made["keys"])
        order = [int((given == image).flatten(1).all(1).nonzero()) for image in x[1]]  # new position of each image
        assert sorted(order) == list(range(B))
        groups = {frozenset(image for image in range(B) if order[image] // 4 == part) for part in range(3)}
        assert groups != {frozenset(range(first, first + 4)) for first in (0, 4, 8)}  # the groups of the queries
        torch.testing.assert_close(method.queue[number * B : (number + 1) * B], unit(keys.detach())[order])
        orders.append(tuple(order))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_mocos_key_network_follows_by_its_momentum(momentum: float) -> None:
    method = build(moco, queue=2 * B, momentum=momentum)
    before = copy.deepcopy(method.key_network)
    sgd = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    method(views(), torch.arange(B))[0].backward()
    sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(method.key_network.parameters(), before.parameters(), strict=True))
    method.after_step(0.3)
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    for key, old, query in zip(method.key_network.parameters(), before.parameters(), online, strict=True):
        assert (query - old).abs().max() > 1e-4
        torch.testing.assert_close(key, momentum * old + (1 - momentum) * query)


def test_the_twin_follows() -> None:
    slow, fast = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [p.clone() for p in slow.parameters()]
    follow(slow, fast, 0.9)
    for now, old, new in zip(slow.parameters(), before, fast.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)
    assert not any(p.requires_grad for p in twin(fast).parameters())


def test_moco_bn_statistics_are_those_of_a_group() -> None:
    """With as many groups as the batch allows, a query's output depends only on its group."""
    method = build(moco, bn_groups=B // 4)
    norm = nn.BatchNorm1d(12, affine=False)
    x = views(1)[0]
    parts = method._grouped(nn.Sequential(Encoder(EncoderSpec("flat", 2), nn.Flatten(), 12), norm), x)
    whole = torch.cat([norm(part.flatten(1)) for part in x.chunk(B // 4)])
    assert torch.equal(parts, whole) and not torch.allclose(parts, norm(x.flatten(1)))


def test_moco_groups_differ_by_one_image_at_most() -> None:
    method = build(moco, bn_groups=8)
    seen: list[int] = []

    def count(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    for batch, groups in ((21, 8), (13, 6), (3, 1)):
        seen.clear()
        encoder = Encoder(EncoderSpec("none", 2), nn.Identity(), 1)
        encoder.forward = count  # type: ignore[method-assign]
        assert torch.equal(
            method._grouped(nn.Sequential(encoder, nn.Identity()), torch.arange(batch)), torch.arange(batch)
        )
        assert len(seen) == groups and min(seen) >= 2 and max(seen) - min(seen) <= 1, seen


# --- BYOL -------------------------------------------------------------------------------------------------------------


def test_byol_regression_and_momentum() -> None:
    q, z = vectors(0, B, D), vectors(1, B, D)
    naive = np.mean(
        [
            np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)
            for a, b in zip(q.numpy(), z.numpy(), strict=True)
        ]
    )
    assert byol.regression(q, z).item() == pytest.approx(float(naive), rel=1e-5)
    assert byol.regression(q, 3 * q).item() == pytest.approx(0, abs=1e-6)
    assert byol.regression(q, -q).item() == pytest.approx(4, abs=1e-6)
    assert byol.target_momentum(0.99, 0) == pytest.approx(0.99) and byol.target_momentum(0.99, 1) == 1
    assert byol.target_momentum(0.99, 0.5) == pytest.approx(0.995)


def test_byols_target_gets_no_gradient_and_moves_slowly() -> None:
    method = build(byol, hidden=10, momentum=0.9)
    loss, _ = method(views(), torch.arange(B))
    loss.backward()
    assert reached(method.encoder) and reached(method.predictor) and not reached(method.target)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1)
    target, online = next(method.target.parameters()), next(method.encoder.parameters())
    old = target.clone()
    method.after_step(0.0)
    torch.testing.assert_close(target, 0.9 * old + 0.1 * online)
    method.after_step(1.0)  # at the end of training the target no longer moves
    torch.testing.assert_close(target, 0.9 * old + 0.1 * online)


# --- SwAV -------------------------------------------------------------------------------------------------------------


def naive_sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Naive reference with prototypes in rows, like Q in the paper: rows sum to 1/K, columns to 1/B."""
    q = np.exp(scores.T / epsilon)
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        for row in range(k):
            q[row] /= q[row].sum() * k
        for column in range(b):
            q[:, column] /= q[:, column].sum() * b
    return (q * b).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_naive_twins(iterations: int) -> None:
    scores = similarities(vectors(0, 32, D), unit(vectors(1, 5, D)))
    expected = naive_sinkhorn(scores.double().numpy(), 0.05, iterations)
    np.testing.assert_allclose(swav.sinkhorn(scores, 0.05, iterations).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_sinkhorn_uses_every_prototype_equally() -> None:
    q = swav.sinkhorn(vectors(0, 40, 8) / 4, 0.5, 200)
    torch.testing.assert_close(q.sum(1), torch.ones(40))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 5.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(swav.sinkhorn(torch.zeros(6, 3), 0.05, 3), torch.full((6, 3), 1 / 3))
    assert swav.sinkhorn(1e3 * vectors(0, 6, 3), 0.05, 3).isfinite().all()


def test_swapped_prediction_is_the_naive_twins() -> None:
    scores = [vectors(seed, B, 5) for seed in range(3)]
    codes = [vectors(seed, B, 5).softmax(1) for seed in (7, 8)]
    total = []
    for i, code in enumerate(codes):
        for j, score in enumerate(scores):
            if i != j:
                p = np.exp(score.numpy() / 0.1) / np.exp(score.numpy() / 0.1).sum(1, keepdims=True)
                total.append(-(code.numpy() * np.log(p)).sum(1).mean())
    assert swav.swapped_prediction(scores, codes, 0.1).item() == pytest.approx(float(np.mean(total)), rel=1e-4)


def swav_method(**settings: Any) -> Any:
    return build(swav, **{"projector_hidden": 10, "prototypes": 7, "freeze_epochs": 0, **settings})


def test_swav_takes_small_views_for_predictions_only() -> None:
    """Multi-crop: codes come only from the two full views."""
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8))
    settings = swav.Settings(dim=D, projector_hidden=10, prototypes=7, freeze_epochs=0)
    method = swav.Method(Encoder(EncoderSpec("linear", 4), pooled, 8), settings)
    crops = [vectors(0, B, 3, 4, 4), vectors(1, B, 3, 4, 4), vectors(2, B, 3, 2, 2)]
    z = [method.projector(method.encoder(x)) for x in crops]
    prototypes = method.prototypes.weight
    codes = [swav.sinkhorn(similarities(z[i], prototypes), 0.05, 3) for i in (0, 1)]
    expected = swav.swapped_prediction([similarities(each, prototypes) for each in z], codes, 0.1)
    assert method(crops, torch.arange(B))[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_swav_codes_get_no_gradient_unless_asked() -> None:
    grads = []
    for stop_gradient in (True, False):
        method = swav_method(stop_gradient=stop_gradient)
        method(views(), torch.arange(B))[0].backward()
        grads.append(method.prototypes.weight.grad.clone())
    assert grads[0].abs().sum() > 0 and not torch.allclose(grads[0], grads[1])


def test_swavs_prototypes_are_frozen_first_and_stay_on_the_sphere() -> None:
    method = swav_method(freeze_epochs=2)
    sgd = torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-2)
    before = method.prototypes.weight.detach().clone()
    for number in range(4):
        method.before_epoch(number)
        loss, _ = method(views(), torch.arange(B))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        method.after_step(0.0)
        moved = not torch.allclose(method.prototypes.weight, before, atol=1e-5)
        assert moved == (number >= 2)
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(7))


def test_swavs_queue_helps_the_codes_once_it_is_full() -> None:
    method, plain = swav_method(queue=2 * B, queue_epoch=1), swav_method()
    losses = []
    for step in range(4):
        x = [vectors(10 * step + view, B, 3, 2, 2) for view in range(2)]
        for each in (method, plain):
            each.before_epoch(step)
        with torch.no_grad():
            losses.append((method(x, torch.arange(B))[0].item(), plain(x, torch.arange(B))[0].item()))
    assert [a == pytest.approx(b, rel=1e-6) for a, b in losses] == [True, True, False, False]
    newest = unit(method.projector(method.encoder(x[0])).detach())
    torch.testing.assert_close(method.queue[0, :B], newest)


def test_swavs_queues_are_each_views_own() -> None:
    """The codes of a view use the queued features of that view, newest first."""
    method = swav_method(queue=2 * B, queue_epoch=0)
    stored: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for step in range(4):
            x = [vectors(10 * step + view, B, 3, 2, 2) for view in range(2)]
            z = [unit(method.embed(each)[1]) for each in x]
            scores = [similarities(each, method.prototypes.weight) for each in z]
            rows = [torch.cat([*old[:2], new]) for old, new in zip(stored, z, strict=True)]
            codes = [swav.sinkhorn(similarities(each, method.prototypes.weight), 0.05, 3)[-B:] for each in rows]
            loss, _ = method(x, torch.arange(B))
            for old, new in zip(stored, z, strict=True):
                old.insert(0, new)
            if step >= 2:
                assert loss.item() == pytest.approx(swav.swapped_prediction(scores, codes, 0.1).item(), rel=1e-5)
                for view in range(2):
                    torch.testing.assert_close(method.queue[view], torch.cat(stored[view][:2]))


def test_swavs_single_full_size_view_has_a_queue() -> None:
    """Its codes are those of one view; the small ones predict them."""
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8))
    settings = swav.Settings(dim=D, projector_hidden=10, prototypes=7, queue=2 * B, queue_epoch=0)
    method = swav.Method(Encoder(EncoderSpec("linear", 4), pooled, 8), settings)
    used = []
    for step in range(4):
        used.append(method._use_queue())
        with torch.no_grad():
            loss, _ = method([vectors(10 * step, B, 3, 4, 4), vectors(10 * step + 1, B, 3, 2, 2)], torch.arange(B))
        assert loss.isfinite()
    assert used == [False, False, True, True]


def test_swavs_queue_waits_until_no_row_is_empty() -> None:
    method = swav_method(queue=2 * B + 1, queue_epoch=0)
    used = []
    for step in range(5):
        used.append(method._use_queue())
        with torch.no_grad():
            method([vectors(10 * step + view, B, 3, 2, 2) for view in range(2)], torch.arange(B))
    assert used == [False, False, False, True, True]


def test_swavs_prototypes_normalised_in_the_graph_get_the_gradient_of_their_directions() -> None:
    x = [vectors(view, B, 3, 2, 2) for view in range(2)]
    losses, along = [], []
    for inside in (False, True):
        method = swav_method(freeze_epochs=0, normalised_in_graph=inside)
        loss, _ = method(x, torch.arange(B))
        loss.backward()
        weight = method.prototypes.weight
        losses.append(loss.item())
        along.append((weight.grad * weight.detach()).sum(1).abs().max().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert along[0] > 1e-3 > 1e-6 > along[1]


@pytest.mark.parametrize("module", [simclr, swav], ids=["simclr", "swav"])
def test_a_projection_head_of_three_layers_has_one_more_in_between(module: Any) -> None:
    heads = [build(module, projector_layers=layers, projector_hidden=9).projector for layers in (2, 3)]
    shapes = [[layer.weight.shape for layer in head if isinstance(layer, nn.Linear)] for head in heads]
    assert shapes[1] == [shapes[0][0], (9, 9), shapes[0][1]]


# --- DeepCluster ------------------------------------------------------------------------------------------------------


def test_spherical_kmeans_finds_what_is_there() -> None:
    centres = unit(torch.eye(4, 8))
    labels = torch.arange(200) % 4
    x = unit(centres[labels] + 0.1 * vectors(0, 200, 8))
    best = 0.0
    for seed in range(5):
        centroids, assigned = deepcluster.spherical_kmeans(x, 4, 10, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
        assert torch.equal(assigned, (x @ centroids.T).argmax(1))
        same = (assigned[:, None] == assigned) == (labels[:, None] == labels)
        best = max(best, float(same.float().mean()))
    assert best == 1.0


def test_deepcluster_alternates() -> None:
    method = build(deepcluster, images=40, projector_hidden=10, prototypes=4, heads=2)
    data = [
        ([vectors(10 * i + view, 10, 3, 2, 2) for view in range(2)], torch.arange(10 * i, 10 * i + 10))
        for i in range(4)
    ]
    method.before_training(iter(data))
    assert torch.equal(method.memory.norm(dim=2) > 0, torch.ones(2, 40, dtype=torch.bool))
    method.before_epoch(0)
    assert set(method.assigned.flatten().tolist()) <= set(range(4)) and not torch.equal(*method.assigned)
    x, index = data[1]
    loss, _ = method(x, index)
    with torch.no_grad():
        z = [unit(method.projector(method.encoder(each))) for each in x]
        naive = [
            F.cross_entropy(each @ method.prototypes[head].T / 0.1, method.assigned[head, index])
            for each in z
            for head in range(2)
        ]
    assert loss.item() == pytest.approx(torch.stack(naive).mean().item(), rel=1e-5)
    assert torch.equal(method.memory[1, index], z[1])
    assert "prototypes" not in dict(method.named_parameters())  # computed, not trained


def test_deepclusters_heads_cluster_the_two_views_in_turn() -> None:
    """Each head is a converged k-means of its memory; heads with the same memory differ in their random draws."""
    images, k, heads = 40, 4, 4
    method = build(deepcluster, images=images, projector_hidden=10, prototypes=k, heads=heads, iterations=50)
    data = [vectors(view, images, 3, 2, 2) for view in range(2)]
    method.before_training(iter([(data, torch.arange(images))]))
    with torch.no_grad():
        own = [unit(method.embed(x)[1]) for x in data]
    for view in range(2):
        torch.testing.assert_close(method.memory[view], own[view])
    method.before_epoch(0)
    for head in range(heads):
        z, prototypes, assigned = own[head % 2], method.prototypes[head], method.assigned[head]
        assert torch.equal(assigned, (z @ prototypes.T).argmax(1))
        assert not torch.equal(assigned, (own[1 - head % 2] @ prototypes.T).argmax(1))
        centres = torch.stack([z[assigned == cluster].sum(0) for cluster in range(k)])
        torch.testing.assert_close(prototypes, unit(centres))
    assert not torch.equal(method.prototypes[0], method.prototypes[2])


def test_deepcluster_leaves_out_images_it_has_not_seen() -> None:
    method = build(deepcluster, images=30, projector_hidden=10, prototypes=4, heads=1)
    method.before_training(iter([(views(), torch.arange(B))]))
    method.before_epoch(0)
    assert (method.assigned[0, B:] == -100).all() and (method.assigned[0, :B] >= 0).all()
    loss, _ = method(views(), torch.arange(B) + B)
    assert loss.item() == 0


# --- Barlow Twins and VICReg ------------------------------------------------------------------------------------------


def test_barlow_twins_is_the_naive_twins() -> None:
    z1, z2 = vectors(0, B, D), vectors(1, B, D)
    total = 0.0
    for i in range(D):
        for j in range(D):
            c = np.corrcoef(z1[:, i].double().numpy(), z2[:, j].double().numpy())[0, 1]
            total += (1 - c) ** 2 if i == j else 0.005 * c**2
    assert barlow.barlow_twins(z1, z2, 0.005).item() == pytest.approx(total, rel=1e-3)


def test_limits_of_barlow_twins() -> None:
    white = torch.linalg.qr(vectors(0, 64, D) - vectors(0, 64, D).mean(0))[0] * 8
    assert barlow.barlow_twins(white, 2 * white + 1, 0.005).item() == pytest.approx(0, abs=1e-4)
    line = vectors(0, 64, 1).expand(64, D)
    assert barlow.barlow_twins(line, line, 0.005).item() == pytest.approx(0.005 * D * (D - 1), rel=1e-2)


def test_vicreg_is_the_naive_twins() -> None:
    z1, z2 = vectors(0, B, D) / 2, vectors(1, B, D) / 2

    def terms(z: np.ndarray) -> tuple[float, float]:
        covariance = np.cov(z.T)
        variance = np.mean([max(0.0, 1 - math.sqrt(covariance[i, i] + 1e-4)) for i in range(D)])
        return float(variance), sum(covariance[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D

    (v1, c1), (v2, c2) = terms(z1.double().numpy()), terms(z2.double().numpy())
    s = float(((z1 - z2) ** 2).mean())
    expected = 25 * s + 25 * (v1 + v2) / 2 + c1 + c2
    assert vicreg.vicreg(z1, z2, 25.0, 25.0, 1.0).item() == pytest.approx(expected, rel=1e-4)
    constant = torch.ones(B, D)
    assert vicreg.vicreg(constant, constant, 25.0, 25.0, 1.0).item() == pytest.approx(25 * 0.99, rel=1e-3)


# --- FastSiam ---------------------------------------------------------------------------------------------------------


def test_fastsiam_is_the_naive_twins() -> None:
    p, z = [vectors(seed, B, D) for seed in range(4)], [vectors(seed, B, D) for seed in range(4, 8)]
    naive = [
        -float(F.cosine_similarity(p[i], torch.stack([z[j] for j in range(4) if j != i]).mean(0), dim=1).mean())
        for i in range(4)
    ]
    assert fastsiam.averaged_target_loss(p, z).item() == pytest.approx(sum(naive) / 4, rel=1e-5)


def test_fastsiam_with_two_views_would_be_simsiam() -> None:
    p, z = [vectors(0, B, D), vectors(1, B, D)], [vectors(2, B, D), vectors(3, B, D)]
    expected = (simsiam.negative_cosine(p[0], z[1]) + simsiam.negative_cosine(p[1], z[0])) / 2
    assert fastsiam.averaged_target_loss(p, z).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("count", [3, 4])
def test_fastsiam_draws_every_views_prediction_to_the_mean_of_all_others(count: int) -> None:
    method = build(fastsiam, projector_layers=2, projector_hidden=10, predictor_hidden=4)
    with torch.no_grad():
        z = [method.embed(x)[1] for x in views(count)]
        p = [method.predictor(each).double().numpy() for each in z]
    total = 0.0
    for i in range(count):
        target = sum(z[j].double().numpy() for j in range(count) if j != i) / (count - 1)
        for a, b in zip(p[i], target, strict=True):
            total -= float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
    loss, _ = method(views(count), torch.arange(B))
    assert loss.item() == pytest.approx(total / count / B, rel=1e-4)


def test_fastsiams_targets_get_no_gradient() -> None:
    method = build(fastsiam, projector_layers=2, projector_hidden=10, predictor_hidden=4)
    for parameter in method.predictor.parameters():
        nn.init.zeros_(parameter)
    # p is constant, so no gradient passes through it; z must not get any either.
    method(views(4), torch.arange(B))[0].backward()
    assert not reached(method.encoder)


# --- every loss -------------------------------------------------------------------------------------------------------

LOSSES = {
    "negative_cosine": simsiam.negative_cosine,
    "softmax": simsiam.softmax_cross_entropy,
    "averaged_target": lambda a, b: fastsiam.averaged_target_loss([a, b, a + b], [b, a, a - b]),
    "nt_xent": lambda a, b: simclr.nt_xent(a, b, a, b, 0.1),
    "info_nce": lambda a, b: moco.info_nce(unit(a), unit(b), unit(vectors(9, 20, D)).to(a.dtype), 0.2),
    "regression": byol.regression,
    "swapped": lambda a, b: swav.swapped_prediction(
        [a, b], [swav.sinkhorn(b, 0.05, 3), swav.sinkhorn(a, 0.05, 3)], 0.1
    ),
    "barlow": lambda a, b: barlow.barlow_twins(a, b, 0.005),
    "vicreg": lambda a, b: vicreg.vicreg(a, b, 25.0, 25.0, 1.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_ignores_autocast(name: str) -> None:
    a, b = vectors(0, B, D), vectors(1, B, D)
    plain = LOSSES[name](a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](a, b), plain)


def test_a_loss_in_float32_gets_its_tensors_so() -> None:
    class Own:
        @in_float32
        def loss(self, views: list[Tensor], index: Tensor, scale: float) -> Tensor:
            assert index.dtype == torch.int64
            return (views[0] @ views[1].T).sum() * scale

    low = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = Own().loss([low, low], torch.arange(4), 2.0)
    assert torch.equal(found, (low.float() @ low.float().T).sum() * 2)
    assert Own().loss([low.double()] * 2, torch.arange(4), 1.0).dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_in_float64_is_that_in_float32_and_its_gradient_that_of_its_differences(name: str) -> None:
    a, b = vectors(0, B, D, dtype=torch.float64), vectors(1, B, D, dtype=torch.float64)
    loss = LOSSES[name](a, b)
    assert loss.dtype == torch.float64
    assert LOSSES[name](a.float(), b.float()).item() == pytest.approx(loss.item(), rel=1e-4)
    assert torch.autograd.gradcheck(LOSSES[name], (a.requires_grad_(), b.requires_grad_()), rtol=1e-3, atol=1e-6)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_an_mlp_has_bias_only_where_no_bn_follows() -> None:
    network = mlp([4, 5, 6, 7], output_norm="plain")
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert all(layer.bias is None for layer in network if isinstance(layer, nn.Linear))
    assert not network[-1].affine
    plain = mlp([4, 5, 6], hidden_norm=False)
    assert [type(layer).__name__ for layer in plain] == ["Linear", "ReLU", "Linear"] and plain[0].bias is not None
