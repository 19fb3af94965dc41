"""Convolutions in other forms against torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam import convolutions, kernels
from simsiam.compute import computes_bf16
from simsiam.convolutions import Conv2d, patches, taught
from simsiam.encoders import EncoderSpec, build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply the rule for processors with AMX on any processor."""
    monkeypatch.setattr(convolutions, "_has_amx", lambda: True)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, bool]]]:
    """For each of our convolutions that ran: whether the gradients of image and weight were computed as products."""
    real, seen = convolutions._Convolution.apply, []

    def spy(x: Tensor, weight: Tensor, stride: int, padding: int, by_product: tuple[bool, bool]) -> Tensor:
        seen.append(by_product)
        return real(x, weight, stride, padding, by_product)

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
    ("inner", "outer", "side", "k", "stride", "expected"),
    [
        (16, 32, 9, 1, 2, (True, True)),
        (16, 32, 14, 1, 3, (True, True)),
        (16, 64, 8, 3, 1, (False, True)),
        (8, 40, 11, 3, 2, (False, True)),
        (8, 30, 7, 5, 2, (False, True)),
        (128, 16, 6, 1, 1, (False, True)),
        (16, 32, 32, 1, 2, (True, False)),
        (16, 16, 8, 3, 1, (False, False)),
    ],
)
def test_gradients_are_torchs(
    inner: int,
    outer: int,
    side: int,
    k: int,
    stride: int,
    expected: tuple[bool, bool],
    precision: str,
    planes: bool,
    products: list[tuple[bool, bool]],
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
    of_weight = expected[1] and precision == "bf16"
    assert products == ([(expected[0], of_weight)] if expected[0] or of_weight else [])
    exact = gradients(exactly, x.double(), "float64")
    for one, other, best in zip(found, plain, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert off(one, best) <= {"float64": 1e-12, "float32": 1e-6, "bf16": 1.2 * off(other, best)}[precision]


def test_only_what_it_is_made_for_is_taken(products: list[tuple[bool, bool]]) -> None:
    def run(grad: bool = True, side: int = 4, frozen: bool = False, **settings: object) -> None:
        conv = taught(nn.Conv2d(32, 32, 1, **{"stride": 2, "bias": False} | settings))  # type: ignore[arg-type]
        conv.requires_grad_(not frozen)
        with torch.set_grad_enabled(grad):
            theirs = F.conv2d(
                F.pad(x, (0, 0, 0, 0)), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
            )  # type: ignore[arg-type]
            torch.testing.assert_close(conv(x), theirs)

    x = random(2, 32, 4, 4)
    run()
    assert products == [(True, False)]
    for other in ({"bias": True}, {"groups": 4}, {"stride": (2, 1)}, {"padding": 1}, {"stride": 1}):
        run(**other)
    run(grad=False)
    run(frozen=True)
    with kernels.off():
        run()
    assert len(products) == 1


@pytest.mark.parametrize(("k", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2), (2, 2, 0)])
def test_patches_are_what_unfold_gives(k: int, stride: int, padding: int) -> None:
    x = random(2, 5, 9, 7)
    theirs = F.unfold(x, k, padding=padding, stride=stride)  # [B, C k k, places]
    theirs = theirs.view(2, 5, k, k, -1).permute(0, 4, 2, 3, 1).reshape(-1, k * k * 5)
    assert torch.equal(patches(x.to(memory_format=torch.channels_last), k, stride, padding), theirs)
    assert torch.equal(patches(x, k, stride, padding), theirs)


@pytest.mark.parametrize("name", ["thin-resnet18", "resnet18", "timm/resnet18"])
def test_every_convolution_of_a_backbone_is_one(name: str, products: list[tuple[bool, bool]]) -> None:
    """Weights, names and copies are unchanged, and inference uses torch's convolution."""
    encoder = build(EncoderSpec(name, 32), 0)
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 20 and all(type(conv) is Conv2d for conv in copy.deepcopy(convs))
    encoder(random(2, 3, 32, 32)).sum().backward()
    assert len(products) == 3 and all(products)  # the strided shortcuts
    with torch.inference_mode():
        encoder.eval()(random(2, 3, 32, 32))
    assert len(products) == 3
