"""Convolutions in other forms against torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam import convolutions, kernels
from simsiam.compute import computes_bf16
from simsiam.convolutions import Conv2d, taught
from simsiam.encoders import EncoderSpec, build

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, bool]]]:
    """For each of our convolutions that ran: whether the gradients of image and weight were computed in our way."""
    real, seen = convolutions._Convolution.apply, []

    def spy(*given: Any) -> Tensor:
        seen.append(given[-1])
        return real(*given)

    monkeypatch.setattr(convolutions._Convolution, "apply", spy)
    yield seen


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def gradients(conv: nn.Module, x: Tensor, precision: str) -> list[Tensor]:
    """Return the output and the gradients of x and of the weight, for a random gradient of y."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = conv(x)
    y.backward(random(*y.shape, seed=1).to(y.dtype))
    weight = conv.weight.grad
    assert x.grad is not None and isinstance(weight, Tensor)
    return [y, x.grad, weight]


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
@pytest.mark.parametrize(
    ("inner", "outer", "side", "k", "stride", "strided"),
    [
        (16, 32, 9, 1, 2, True),
        (16, 32, 14, 1, 3, True),
        (16, 64, 8, 3, 1, False),
        (8, 40, 11, 3, 2, False),
        (8, 30, 7, 5, 2, False),
        (128, 16, 6, 1, 1, False),
        (3, 16, 32, 3, 1, False),
        (16, 16, 8, 3, 1, False),
    ],
)
def test_gradients_are_torchs(
    inner: int,
    outer: int,
    side: int,
    k: int,
    stride: int,
    strided: bool,
    precision: str,
    planes: bool,
    own: list[tuple[bool, bool]],
) -> None:
    """For non-square images in both layouts; in bf16, as close to float64 as torch's."""
    if precision == "bf16" and not computes_bf16(CPU):
        pytest.skip("this processor would have to emulate bf16")
    dtype = torch.float64 if precision == "float64" else torch.float32
    theirs = nn.Conv2d(inner, outer, k, stride, k // 2, bias=False).to(dtype)
    nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(2))
    x = random(3, inner, side, side - 1).to(dtype)
    if not planes:
        x, theirs = x.to(memory_format=torch.channels_last), theirs.to(memory_format=torch.channels_last)
    ours, exactly = taught(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    assert type(ours) is Conv2d and type(theirs) is nn.Conv2d
    found, plain = gradients(ours, x, precision), gradients(theirs, x, precision)
    of_weight = kernels.multiplies() and precision == "bf16"
    assert own == ([(strided, of_weight)] if strided or of_weight else [])
    exact = gradients(exactly, x.double(), "float64")
    for one, other, best in zip(found, plain, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert off(one, best) <= {"float64": 1e-12, "float32": 1e-6, "bf16": 1.2 * off(other, best)}[precision]


def test_only_what_it_is_made_for_is_taken(own: list[tuple[bool, bool]]) -> None:
    def run(grad: bool = True, frozen: bool = False, **settings: object) -> None:
        conv = taught(nn.Conv2d(32, 32, 1, **{"stride": 2, "bias": False} | settings))  # type: ignore[arg-type]
        conv.requires_grad_(not frozen)
        with torch.set_grad_enabled(grad):
            theirs = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            torch.testing.assert_close(conv(x), theirs)

    x = random(2, 32, 4, 4)
    run()
    assert own == [(True, False)]
    for other in ({"bias": True}, {"groups": 4}, {"stride": (2, 1)}, {"padding": 1}, {"stride": 1}):
        run(**other)
    run(grad=False)
    run(frozen=True)
    with kernels.off():
        run()
    assert len(own) == 1


needs_matrix_units = pytest.mark.skipif(not kernels.multiplies(), reason="this processor has no AMX, or no compiler")


def drawn(
    batch: int, inner: int, outer: int, sides: tuple[int, int], k: int, stride: int, padding: int
) -> list[Tensor]:
    """x and a gradient of y in bfloat16 and channels_last, and the weight's gradient in float64."""
    x, weight = random(batch, inner, *sides).bfloat16(), torch.zeros(outer, inner, k, k).double()
    y = random(*F.conv2d(x.double(), weight, None, stride, padding).shape, seed=1).bfloat16()
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, y.double(), stride, padding)
    return [*(each.contiguous(memory_format=torch.channels_last) for each in (x, y)), exact]


@needs_matrix_units
@pytest.mark.parametrize(
    ("batch", "inner", "outer", "sides", "k", "stride", "padding"),
    [
        (4, 16, 16, (8, 8), 3, 1, 1),
        (5, 20, 40, (9, 7), 3, 2, 1),  # channels that do not fill a tile
        (3, 3, 16, (24, 20), 3, 1, 1),
        (33, 64, 64, (6, 6), 3, 1, 1),
        (9, 48, 96, (7, 7), 1, 2, 0),
        (7, 128, 64, (5, 6), 1, 1, 0),
        (3, 32, 32, (11, 9), 5, 3, 2),
        (2, 16, 16, (9, 9), 3, 1, 0),  # less padding than the kernel reaches
        (2, 16, 16, (9, 9), 2, 2, 0),
        (2, 16, 24, (30, 31), 7, 2, 3),
        (2, 16, 16, (9, 9), 1, 3, 0),  # phases of x that no weight reads
        (1, 16, 16, (1, 1), 3, 1, 1),
        (200, 16, 32, (32, 32), 3, 1, 1),  # several rounds of copies
        (6, 256, 256, (3, 4), 3, 1, 1),  # one part
        (6, 250, 260, (3, 4), 3, 1, 1),
        (50, 256, 256, (6, 6), 3, 1, 1),  # the number of threads decides how many channels are copied together
    ],
)
def test_the_weight_gradient_is_exact(
    batch: int, inner: int, outer: int, sides: tuple[int, int], k: int, stride: int, padding: int
) -> None:
    """The sums are in float32; with other numbers of threads they are the same to the last bit."""
    x, y, exact = drawn(batch, inner, outer, sides, k, stride, padding)
    found = []
    for threads in (1, 2, 5, 40):
        torch.set_num_threads(threads)
        found.append(kernels.weight_gradient(x, y, k, stride, padding))
    torch.set_num_threads(1)
    assert off(found[0], exact) < 1e-6 and all(torch.equal(each, found[0]) for each in found)


@pytest.mark.skipif(not computes_bf16(CPU), reason="this processor would have to emulate bf16")
def test_an_empty_batch_has_no_gradient() -> None:
    conv = taught(nn.Conv2d(16, 16, 3, 1, 1, bias=False))
    _, of_x, of_weight = gradients(conv, torch.randn(0, 16, 8, 8), "bf16")
    assert of_x.shape == (0, 16, 8, 8) and of_weight.shape == (16, 16, 3, 3) and not of_weight.any()


@needs_matrix_units
def test_what_is_not_finite_shows_in_the_weight_gradient() -> None:
    x, y, _ = drawn(4, 16, 32, (6, 6), 3, 1, 1)
    x[2, 5, 3, 3] = float("inf")
    found = kernels.weight_gradient(x, y, 3, 1, 1)
    assert not found[:, 5].isfinite().any() and found[:, :5].isfinite().all()


@needs_matrix_units
def test_torchs_products_are_right_after_ours() -> None:
    """Both configure the same tiles of the processor."""
    x, y, exact = drawn(8, 64, 64, (6, 6), 3, 1, 1)
    left, right = random(100, 200).bfloat16(), random(200, 300).bfloat16()
    product = left.double() @ right.double()
    for _ in range(3):
        assert off(kernels.weight_gradient(x, y, 3, 1, 1), exact) < 1e-6
        assert off(left @ right, product) < 1e-2


@pytest.mark.parametrize("name", ["thin-resnet18", "resnet18", "timm/resnet18"])
def test_every_convolution_of_a_backbone_is_one(name: str, own: list[tuple[bool, bool]]) -> None:
    """Weights, names and copies are unchanged, and inference uses torch's convolution."""
    encoder = build(EncoderSpec(name, 32), 0)
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 20 and all(type(conv) is Conv2d for conv in copy.deepcopy(convs))
    encoder(random(2, 3, 32, 32)).sum().backward()
    assert own == [(True, False)] * 3  # the strided shortcuts
    with torch.inference_mode():
        encoder.eval()(random(2, 3, 32, 32))
    assert len(own) == 3
