"""The C kernels against torch in float64. Views are tested separately, with and without kernels."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from simsiam import kernels
from simsiam.encoders import EncoderSpec, build

pytestmark = [
    pytest.mark.skipif(kernels.compiled() is None, reason="no C compiler here"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which kernels were called."""
    made: list[str] = []
    run = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda name, *arguments: (made.append(name), run(name, *arguments)))
    return made


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        norm.running_mean.normal_()  # type: ignore[union-attr]
    return norm


def outcome(
    norm: Callable[..., Tensor], bn: nn.BatchNorm2d, x: Tensor, added: Tensor | None, relu: bool, gradient: Tensor
) -> list[Tensor]:
    """Return the result, all gradients and the running statistics."""
    given = [each.clone().requires_grad_() for each in (x, added) if each is not None]
    y = norm(bn, *given, *([None] if added is None else []), relu)
    y.backward(gradient.to(y.dtype))
    assert bn.weight.grad is not None and bn.bias.grad is not None and bn.num_batches_tracked is not None
    statistics = [bn.running_mean, bn.running_var, bn.num_batches_tracked.float()]
    return [y.detach(), *(each.grad for each in given), bn.weight.grad, bn.bias.grad, *statistics]  # type: ignore[list-item]


def by_torch(bn: nn.BatchNorm2d, x: Tensor, added: Tensor | None, relu: bool) -> Tensor:
    y = bn(x) if added is None else bn(x) + added
    return F.relu(y) if relu else y


@pytest.mark.parametrize(("adds", "relu"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("channels", [8, 16, 24, 64, 100, 512, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_norm_is_torchs(
    channels: int, adds: bool, relu: bool, dtype: torch.dtype, momentum: float | None, calls: list[str]
) -> None:
    torch.manual_seed(0)
    x, added, gradient = (
        (scale * torch.randn(5, channels, 7, 9) + shift).to(dtype).contiguous(memory_format=torch.channels_last)
        for scale, shift in ((2, 3), (1, 0), (1, 0))
    )
    found = []
    for way, precision in ((kernels.norm, dtype), (by_torch, torch.float64)):
        torch.manual_seed(1)
        bn = batch_norm(channels)
        bn.momentum = momentum
        own = added.to(precision) if adds else None
        found.append(
            outcome(way, bn.to(torch.promote_types(precision, torch.float32)), x.to(precision), own, relu, gradient)
        )
    assert calls == ["norm_forward", "norm_backward"]
    for ours, theirs in zip(*found, strict=True):
        # A value near 0 may round to the other side of the ReLU, and its gradient with it.
        off = (ours.double() - theirs).abs() / theirs.abs().max()
        assert off.max() < (2e-6 if ours.dtype == torch.float32 and dtype == torch.float32 else 1e-2)
        assert off.mean() < (2e-7 if dtype == torch.float32 else 2e-3 if ours.dtype == torch.bfloat16 else 1e-4)


def test_a_large_mean_takes_no_digits() -> None:
    x = torch.randn(16, 32, 8, 8) + 3000
    bn = nn.BatchNorm2d(32)
    expected = F.batch_norm(x.double(), None, None, training=True)
    assert (kernels.norm(bn, x, relu=False) - expected).abs().max() < 1e-2
    assert bn.running_var is not None
    torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * x.double().var((0, 2, 3)).float(), rtol=1e-5, atol=0)


def test_neither_threads_nor_the_memorys_order_change_a_bit() -> None:
    x, added, gradient = torch.randn(3, 7, 16, 10, 10).unbind()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for form in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            given = (each.contiguous(memory_format=form) for each in (x, added))
            results.append(outcome(kernels.norm, batch_norm(16), *given, True, gradient))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_concatenated_views_are_normalised_one_by_one(
    training: bool, adds: bool, dtype: torch.dtype, calls: list[str]
) -> None:
    """Also where the rows of a view cannot be merged by eight, and the running statistics are those of all views."""
    views = 3
    x, added, gradient = torch.randn(3, views * 5, 16, 5, 3).to(dtype).unbind()
    results = []
    for joined in (True, False):
        torch.manual_seed(0)
        bn = batch_norm(16).train(training)
        leaves = [x.clone().requires_grad_(training), added.clone().requires_grad_(training)]
        given = (leaves[0], leaves[1] if adds else None)
        with torch.set_grad_enabled(training):
            if joined:
                y = kernels.norm(bn, *given, views=views)
            else:
                parts = zip(leaves[0].chunk(views), leaves[1].chunk(views), strict=True)
                y = torch.cat([kernels.norm(bn, own, more if adds else None) for own, more in parts])
        if training:
            y.backward(gradient)
        results.append([y.detach(), *(each.grad for each in leaves), bn.running_mean, bn.running_var])
        results[-1].append(bn.num_batches_tracked)
        weights = [bn.weight.grad, bn.bias.grad]
        if joined:
            assert calls == (["norm_forward", "norm_backward"] if training else ["norm_in_use"])
            summed = weights
    assert all(one is other or torch.equal(one, other) for one, other in zip(*results, strict=True))
    if training:
        torch.testing.assert_close(summed, weights)  # added in another order


def test_a_gradient_that_is_one_value_for_many_is_taken() -> None:
    """Such as the expanded gradient of a mean."""
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    kernels.norm(batch_norm(8), x).mean((2, 3)).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 3, 0, 0), (2, 3, 4, 1)])
def test_what_is_not_finite_shows(bad: float, place: tuple[int, ...]) -> None:
    """Otherwise a diverged run would look healthy."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 8, 5, 5).to(dtype)
        x[place] = bad
        y = kernels.norm(batch_norm(8), x)
        assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(kernels.norm(batch_norm(8), x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_a_traced_encoder_computes() -> None:
    encoder = build(EncoderSpec("thin-resnet18", 32, width=8), 0).eval()
    first, second = torch.randn(2, 4, 3, 32, 32).unbind()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing itself may warn
        traced = torch.jit.trace(encoder, first)
        torch.testing.assert_close(traced(second), encoder(second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        *("evaluation", "float64", "another norm", "no weights", "no statistics", "one value"),
        *("bfloat16 weights", "another precision is added", "one value is added"),
    ],
)
def test_the_rest_is_left_to_torch(case: str, calls: list[str]) -> None:
    bn: nn.Module = batch_norm(8)
    x = torch.randn(4, 8, 5, 5)
    if case == "evaluation":  # with gradients; without them, see below
        bn.eval()
    elif case == "float64":
        bn, x = bn.double(), x.double()
    elif case == "another norm":
        bn = nn.GroupNorm(2, 8)
    elif case == "no weights":
        bn = nn.BatchNorm2d(8, affine=False)
    elif case == "no statistics":
        bn = nn.BatchNorm2d(8, track_running_stats=False)
    elif case == "one value":
        with pytest.raises(ValueError, match="more than 1 value"):
            kernels.norm(bn, x[:1, :, :1, :1])
        x = x[:1]
        bn.eval()
    elif case == "bfloat16 weights":
        bn, x = bn.bfloat16(), x.bfloat16()
    added = x.double() if case == "another precision is added" else x[:1, :, :1, :1] if "is added" in case else x
    y = kernels.norm(bn, x, added)
    assert not calls and torch.equal(y, F.relu(bn(x) + added))


@pytest.mark.parametrize(("adds", "relu"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_in_use_is_torchs(adds: bool, relu: bool, dtype: torch.dtype, calls: list[str]) -> None:
    bn = batch_norm(24).eval()
    bn.running_var = torch.rand(24) + 0.5
    x, added = (2 * torch.randn(2, 3, 24, 5, 4)).to(dtype).unbind()
    with torch.inference_mode():
        y = kernels.norm(bn, x, added if adds else None, relu)
        assert calls == ["norm_in_use"]
        expected = by_torch(bn.double(), x.double(), added.double() if adds else None, relu)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


def test_an_encoder_learns_the_same_without_them(calls: list[str]) -> None:
    torch.manual_seed(0)
    x, towards = torch.randn(16, 3, 32, 32), torch.randn(16, 64)
    gradients = []
    for with_kernels in (True, False):
        encoder = build(EncoderSpec("thin-resnet18", 32, width=8), 0).to(memory_format=torch.channels_last)
        with contextlib.nullcontext() if with_kernels else kernels.off():
            (encoder(x) * towards).sum().backward()
        gradients.append({name: value.grad for name, value in encoder.named_parameters()})
        gradients[-1] |= {name: value for name, value in encoder.named_buffers() if value.is_floating_point()}
    assert len(calls) == 2 * 20
    for name, ours in gradients[0].items():
        torch.testing.assert_close(ours, gradients[1][name], rtol=1e-3, atol=1e-4 * float(ours.abs().max()), msg=name)


@pytest.mark.parametrize(("columns", "k"), [(1, 1), (7, 7), (40, 1), (40, 39), (1000, 20), (1003, 200), (5000, 1)])
@pytest.mark.parametrize("distinct", [1_000_000, 5])
def test_largest_is_topk(columns: int, k: int, distinct: int, calls: list[str]) -> None:
    torch.manual_seed(0)
    values = torch.randint(distinct, (9, columns)).float() - distinct / 2
    values[0], values[1] = values[0].sort().values, values[1].sort(descending=True).values
    values[2, ::2] = -torch.inf
    best, which = kernels.largest(values, k)
    assert calls == ["largest"]
    assert torch.equal(best, values.topk(k, dim=1).values) and torch.equal(best, values.gather(1, which))
    assert all(len(set(row)) == k for row in which.tolist())


@pytest.mark.parametrize(
    ("before", "after"),
    [((200, 180), (110, 99)), ((61, 333), (37, 202)), ((16, 16), (16, 16)), ((5, 9), (1, 2)), ((700, 40), (17, 40))],
)
@pytest.mark.parametrize("content", ["noise", "black and white"])
def test_reduced_is_pillows_bicubic(
    before: tuple[int, int], after: tuple[int, int], content: str, calls: list[str]
) -> None:
    """Except for sums that round the other way. Black and white overshoots and must be clamped to 0..255."""
    torch.manual_seed(0)
    image = torch.randint(256, (*before, 3), dtype=torch.uint8)
    if content == "black and white":
        image = (image > 127).to(torch.uint8) * 255
    for top, left, height, width in [(0, 0, *before), (0.5, 0.25, before[0] - 0.875, before[1] - 1.0)]:
        ours = kernels.reduced(image, *after, (top, left, height, width))
        assert calls.pop() == "reduced" and ours.shape == (*after, 3)
        # Across first; if that is more work, Pillow 13 begins with the other direction.
        resized = Image.fromarray(image.numpy())
        for size, box in [
            ((after[1], before[0]), (left, 0, left + width, before[0])),
            ((after[1], after[0]), (0, top, after[1], top + height)),
        ]:
            resized = resized.resize(size, Image.Resampling.BICUBIC, box)
        off = (ours.int() - torch.from_numpy(np.array(resized)).int()).abs()
        assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.005


def test_torchs_threads_are_found_where_no_name_is_global(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ARM, where libgomp is loaded privately for torch."""
    known, load = kernels._parallel(), ctypes.CDLL
    kernels._parallel.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(name) if name else SimpleNamespace())
    assert kernels._parallel() == known is not None


def test_a_compiler_that_fails_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> bool:
        kernels._found.cache_clear()
        return kernels.compiled() is not None

    with kernels.off():
        assert kernels.compiled() is None and not kernels.lacking()
    try:
        monkeypatch.setenv("SIMSIAM_KERNELS", "0")
        assert not found() and not kernels.lacking()
        monkeypatch.delenv("SIMSIAM_KERNELS")
        monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path))
        assert found() and [each.suffix for each in tmp_path.iterdir()] == [".so"]
        (library,) = tmp_path.iterdir()
        damaged = tmp_path / "damaged" / library.name
        damaged.parent.mkdir()
        damaged.write_bytes(bytes(1000))
        monkeypatch.setenv("SIMSIAM_CACHE", str(damaged.parent))
        assert found() and damaged.stat().st_size == library.stat().st_size, "it is made anew"
        shutil.rmtree(damaged.parent)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SIMSIAM_CACHE", ".")
        before = library.stat()
        assert found() and library.stat().st_ino == before.st_ino, "found where it is, and not made anew"
        monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path))
        false = tmp_path / "false"
        false.write_text("#!/bin/sh\nexit 1\n")
        false.chmod(0o755)
        monkeypatch.setenv("CC", str(false))
        assert not found() and len(list(tmp_path.iterdir())) == 2, "nothing half made is left"
        assert "false failed" in kernels.lacking()
        monkeypatch.setenv("CC", "no-such-compiler")
        assert found() and not kernels.lacking(), "another one is there"
    finally:
        monkeypatch.undo()
        kernels._found.cache_clear()
