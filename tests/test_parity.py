"""Our SimSiam against the authors' release: the same weights and views give the same numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from simsiam import kernels
from simsiam.encoders import EncoderSpec, build
from simsiam.methods.simsiam import Method, Settings

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, PRED_DIM = 64, 16


class Released(nn.Module):
    """A reimplementation of the released model (facebookresearch/simsiam, builder.py): a torchvision ResNet whose fc
    becomes the projection MLP, with the original fc, its bias frozen, as the last layer."""

    def __init__(self, arch: str, dim: int = DIM, pred_dim: int = PRED_DIM) -> None:
        super().__init__()
        self.encoder = models.get_model(arch, num_classes=dim, zero_init_residual=True)
        last = self.encoder.fc
        last.bias.requires_grad_(False)
        width = last.in_features
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        self.encoder.fc = nn.Sequential(*layers, last, nn.BatchNorm1d(dim, affine=False))
        hidden = [nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True)]
        self.predictor = nn.Sequential(*hidden, nn.Linear(pred_dim, dim))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1, z2 = self.encoder(x1), self.encoder(x2)
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


def released_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return -(F.cosine_similarity(p1, z2, dim=1).mean() + F.cosine_similarity(p2, z1, dim=1).mean()) * 0.5


def released(arch: str, seed: int = 0, **widths: int) -> Released:
    """With random BN weights: zero-initialised residual blocks would block gradients."""
    torch.manual_seed(seed)
    model = Released(arch, **widths)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def views(seed: int, batch: int = 8, side: int = 32) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, side, side, generator=draws) for _ in range(2)]


def ours(theirs: Released, arch: str) -> Method:
    """Our method with their weights, name by name; only the frozen bias has no counterpart."""
    method = Method(build(EncoderSpec(arch, 32), 1), Settings(dim=DIM, predictor_hidden=PRED_DIM))
    encoder, projector = method.encoder.backbone.state_dict(), method.projector.state_dict()
    weights = theirs.encoder.state_dict()
    assert {*encoder, *(f"fc.{name}" for name in projector)} == weights.keys() - {"fc.6.bias"}
    method.encoder.backbone.load_state_dict({name: weights[name] for name in encoder})
    method.projector.load_state_dict({name: weights[f"fc.{name}"] for name in projector})
    method.predictor.load_state_dict(theirs.predictor.state_dict())
    return method


def outputs(module: nn.Module) -> list[Tensor]:
    """A list that collects the module's outputs, call by call."""
    kept: list[Tensor] = []
    module.register_forward_hook(lambda *call: kept.append(call[2]))
    return kept


def off(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| with Euclidean norms of whole tensors: single entries near 0 are only rounding."""
    return float(((a - b).norm() / b.norm()).detach())


def of_theirs(arch: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """p, z, the loss and every gradient of the released model, under our names, in training mode."""
    theirs = released(arch).to(dtype)
    p1, p2, z1, z2 = theirs(*(view.to(dtype) for view in views(1)))
    loss = released_loss(p1, p2, z1, z2)
    loss.backward()
    named = {f"encoder.backbone.{k}": v for k, v in theirs.encoder.named_parameters() if not k.startswith("fc.")}
    named |= {f"projector.{k}": v for k, v in theirs.encoder.fc.named_parameters() if v.requires_grad}
    named |= {f"predictor.{k}": v for k, v in theirs.predictor.named_parameters()}
    assert theirs.encoder.fc[6].bias.grad is None
    return {"p1": p1, "p2": p2, "z1": z1, "z2": z2, "loss": loss} | _gradients(named)


def of_ours(arch: str, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """The same for our method with their weights."""
    method = ours(released(arch), arch).to(dtype)
    method.settings = dataclasses.replace(method.settings, **changes)
    projections, predictions = outputs(method.projector), outputs(method.predictor)
    x = [view.to(dtype) for view in views(1)]
    loss, _ = method(x, torch.arange(len(x[0])))
    loss.backward()
    found = zip(("p1", "p2", "z1", "z2", "loss"), [*predictions, *projections, loss], strict=True)
    return dict(found) | _gradients(dict(method.named_parameters()))


def _gradients(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    assert found.keys() == named.keys()
    return found


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: off(found[name].double(), expected[name].double()) for name in expected}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_outputs_loss_and_every_gradient_are_the_released_ones(arch: str, dtype: torch.dtype, tolerance: float) -> None:
    """With the same torch operations."""
    with kernels.off():
        found = errors(of_ours(arch, dtype), of_theirs(arch, dtype))
    assert not {name: error for name, error in found.items() if not error < tolerance}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_kernels_are_no_further_off_than_the_released_model_rounds(arch: str) -> None:
    """Rounding alone puts a ResNet-50's gradients 4 % off those in float64 here."""
    exact = of_theirs(arch, torch.float64)
    rounding = errors(of_theirs(arch, torch.float32), exact)
    found = errors(of_ours(arch, torch.float32), exact)
    assert not {name: error for name, error in found.items() if not error < 3 * rounding[name]}


def test_a_gradient_that_flows_where_theirs_stops_is_seen() -> None:
    """The comparison can fail: without our stop-gradient, outputs are equal but all encoder gradients differ."""
    exact = of_theirs("resnet18", torch.float64)
    found = errors(of_ours("resnet18", torch.float64, stop_gradient=False), exact)
    assert max(found[name] for name in ("p1", "p2", "z1", "z2", "loss")) < 1e-9
    assert min(error for name, error in found.items() if name.startswith(("encoder", "projector"))) > 1e-2
