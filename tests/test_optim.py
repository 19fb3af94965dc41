"""The schedule against its closed form, LARS against a naive reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from simsiam.optim import LARS, Schedule, learning_rate


def test_half_a_cosine() -> None:
    for progress in np.linspace(0, 1, 101):
        assert math.isclose(learning_rate(progress, 0.06), 0.06 * (1 + math.cos(math.pi * progress)) / 2)
    assert learning_rate(0, 0.06) == 0.06 and learning_rate(1, 0.06) == 0 and learning_rate(1.001, 0.06) == 0


@pytest.mark.parametrize("end", [0.0, 0.2, 1.0])
def test_the_schedule_is_torchs(end: float) -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=50, eta_min=end * 0.3)
    for epoch in range(51):
        assert math.isclose(learning_rate(epoch / 50, 0.3, end=end), optimiser.param_groups[0]["lr"], abs_tol=1e-12)
        optimiser.step()
        schedule.step()


def test_warm_up_is_linear_and_meets_the_cosine() -> None:
    warmup, base = 0.2, 0.5
    for progress in np.linspace(0, 0.199, 20):
        assert math.isclose(learning_rate(progress, base, warmup), base * progress / warmup)
    assert math.isclose(learning_rate(warmup, base, warmup), base)
    assert math.isclose(learning_rate((1 + warmup) / 2, base, warmup), base / 2)
    assert learning_rate(1, base, warmup) == 0 and math.isclose(learning_rate(1, base, warmup, 0.2), 0.2 * base)


def test_a_schedule_by_steps() -> None:
    schedule = Schedule(0.4, steps_per_epoch=10, epochs=5, seconds=None, warmup_epochs=1, end=0.1)
    assert schedule.steps == 50
    for step in range(51):  # the clock does not matter
        assert math.isclose(schedule.rate(step, 99.0), learning_rate(step / 50, 0.4, 0.2, 0.1), abs_tol=1e-15)
        assert schedule.over(step, 1e9) == (step == 50)
    assert Schedule(0.4, steps_per_epoch=10, epochs=0.01, seconds=None).steps == 1
    assert Schedule(0.4, steps_per_epoch=100, epochs=0.29, seconds=None).steps == 29  # 28.999999999999996


def test_a_schedule_by_epoch_is_the_released_codes() -> None:
    schedule = Schedule(0.4, steps_per_epoch=7, epochs=5, seconds=None, by_epoch=True)
    for step in range(35):
        assert math.isclose(schedule.rate(step, 0), 0.4 * (1 + math.cos(math.pi * (step // 7) / 5)) / 2)


@pytest.mark.parametrize("warmup", [0.0, 1.0, 1.5, 2.0, 4.0, 9.0])
@pytest.mark.parametrize("by_epoch", [False, True])
def test_warm_up_only_rises_and_the_cosine_only_falls(warmup: float, by_epoch: bool) -> None:
    """Wherever within an epoch warm-up ends; it takes at most half of a short run."""
    schedule = Schedule(1.0, steps_per_epoch=10, epochs=5, seconds=None, warmup_epochs=warmup, by_epoch=by_epoch)
    rates, turn = [schedule.rate(step, 0) for step in range(50)], round(min(10 * warmup, 25))
    assert rates[:turn] == sorted(rates[:turn]) and rates[turn:] == sorted(rates[turn:], reverse=True)
    assert rates[:turn] == pytest.approx([step / min(10 * warmup, 25) for step in range(turn)])
    assert rates[turn] == pytest.approx(1.0) and rates[-1] < (0.4 if by_epoch else 0.02)


def test_a_schedule_by_the_clock() -> None:
    schedule = Schedule(0.4, steps_per_epoch=10, epochs=None, seconds=60.0)
    assert schedule.steps is None and not schedule.over(0, 1e9)  # at least one step
    for seconds in (0.0, 15.0, 30.0, 59.0, 60.0, 75.0):
        assert math.isclose(schedule.rate(12, seconds), learning_rate(min(seconds / 60, 1), 0.4), abs_tol=1e-15)
        assert schedule.over(12, seconds) == (seconds >= 60)
    # Warm-up lasts one epoch at the pace so far: 10 steps at 0.5 s, of 60 s.
    warm = Schedule(0.4, steps_per_epoch=10, epochs=None, seconds=60.0, warmup_epochs=1)
    assert math.isclose(warm.rate(5, 2.5), 0.2) and math.isclose(warm.rate(10, 5.0), 0.4)
    assert warm.rate(0, 0.0) == warm.rate(0, 1.5) == 0.0, "before the first step as by steps"


SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (5, 4),
    "conv": (3, 2, 3, 3),
    "bias": (6,),
    "zero": (2, 2),
    "scalar": (),
}


def problem() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Parameters and their gradients for six steps; `zero` starts at 0, and some gradients are 0."""
    torch.manual_seed(0)
    parameters = {name: torch.randn(shape) * (name != "zero") for name, shape in SHAPES.items()}
    steps = [
        {name: torch.randn(shape) * (name != "matrix" or i != 2) for name, shape in SHAPES.items()} for i in range(6)
    ]
    return parameters, steps


def apply(optimiser: torch.optim.Optimizer, named: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
    for name, parameter in named.items():
        parameter.grad = gradients[name].clone()
    optimiser.step()


def naive_lars(
    parameters: dict[str, torch.Tensor], steps: list[dict[str, torch.Tensor]], decay: float, settings: dict[str, float]
) -> dict[str, np.ndarray]:
    """Naive reference in float64, one number at a time, after the released code: BYOL's LARS, and apex's LARC."""
    result = {}
    for name, parameter in parameters.items():
        w, v = parameter.double().numpy().copy(), np.zeros(parameter.shape)
        for number, gradients in enumerate(steps):
            g = gradients[name].double().numpy()
            w_norm, g_norm = math.sqrt((w**2).sum()), math.sqrt((g**2).sum())
            if settings.get("vectors"):
                if w_norm > 0 and g_norm > 0:
                    g = settings["trust_coefficient"] * w_norm / (g_norm + decay * w_norm) * (g + decay * w)
            elif w.ndim > 1:
                g = g + decay * w
                g_norm = math.sqrt((g**2).sum())
                if w_norm > 0 and g_norm > 0:
                    g = settings["trust_coefficient"] * w_norm / g_norm * g
            v = settings["momentum"] * v + g
            w = w - settings["lr"] / (1 + number) * v
        result[name] = w
    return result


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.3, "momentum": 0.9, "trust_coefficient": 0.001},
        {"lr": 2.0, "momentum": 0.0, "trust_coefficient": 0.1},
        {"lr": 0.3, "momentum": 0.9, "trust_coefficient": 0.001, "vectors": True},
    ],
)
def test_lars_is_its_naive_twin(settings: dict[str, Any], decay: float) -> None:
    """With a falling rate: it scales the step, not the momentum buffer."""
    parameters, steps = problem()
    named = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    optimiser = LARS(named.values(), weight_decay=decay, **settings)
    for number, gradients in enumerate(steps):
        optimiser.param_groups[0]["lr"] = settings["lr"] / (1 + number)
        apply(optimiser, named, gradients)
    for name, expected in naive_lars(parameters, steps, decay, settings).items():
        np.testing.assert_allclose(named[name].detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_vectors_are_left_to_sgd() -> None:
    parameters, steps = problem()
    ours, theirs = ({"bias": parameters["bias"].clone().requires_grad_()} for _ in range(2))
    lars = LARS(ours.values(), lr=0.1, momentum=0.9, weight_decay=0.5)
    sgd = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9)
    for gradients in steps:
        apply(lars, ours, gradients)
        apply(sgd, theirs, gradients)
    torch.testing.assert_close(ours["bias"], theirs["bias"])


def test_the_step_does_not_depend_on_the_scale_of_the_gradient() -> None:
    """The purpose of LARS: without decay, the first step has length lr * trust * |w| for any gradient scale."""
    for scale in (1e-4, 1.0, 1e4):
        w = torch.full((3, 4), 2.0, requires_grad=True)
        w.grad = scale * torch.arange(12.0).view(3, 4)
        before = w.detach().clone()
        LARS([w], lr=0.5, trust_coefficient=0.01).step()
        assert math.isclose(float((w.detach() - before).norm()), 0.5 * 0.01 * float(before.norm()), rel_tol=1e-4)


def test_without_a_gradient_nothing_moves() -> None:
    still, zero = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    zero.grad = torch.zeros(2, 2)
    optimiser = LARS([still, zero], lr=0.5, weight_decay=0.0)
    optimiser.step()
    assert torch.equal(still, torch.ones(2, 2)) and torch.equal(zero, torch.ones(2, 2))


def test_a_loaded_state_goes_on_identically() -> None:
    parameters, steps = problem()
    named = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    optimiser = LARS(named.values(), lr=0.3, weight_decay=0.01)
    for gradients in steps[:3]:
        apply(optimiser, named, gradients)
    copied = {name: value.detach().clone().requires_grad_() for name, value in named.items()}
    resumed = LARS(copied.values(), lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for gradients in steps[3:]:
        apply(optimiser, named, gradients)
        apply(resumed, copied, gradients)
    assert all(torch.equal(named[name], copied[name]) for name in named)
