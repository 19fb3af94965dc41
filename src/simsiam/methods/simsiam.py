"""SimSiam: X. Chen, K. He, "Exploring Simple Siamese Representation Learning", CVPR 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.collapse import normalised_std
from simsiam.encoders import Encoder

CITATION = 'X. Chen, K. He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566 (CVPR 2021)'
PUBLISHED = {
    "ImageNet, ResNet-50, 100 epochs, linear": 68.1,
    "CIFAR-10, ResNet-18, 800 epochs, linear": 91.8,
}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet (section 3 and 4.1)."""

    dim: int = 2048
    """d, width of z and p."""
    projector_layers: int = 3
    """Fully connected layers of the projection MLP (2 on CIFAR-10, appendix D)."""
    projector_hidden: int | None = None
    """Width of its hidden layers; None: the backbone's, as in the released code."""
    predictor_hidden: int | None = None
    """Width of the prediction MLP's hidden layer; None: d/4, the paper's bottleneck."""
    predictor: bool = True
    """False: h is the identity (table 1a); the network collapses."""
    stop_gradient: bool = True
    """False: gradient flows through both sides (figure 2); the network collapses."""
    predictor_fixed_lr: bool = True
    """The predictor keeps the initial learning rate (table 1c, 68.1); False decays it too (67.7)."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.projector_layers < 1:
            raise ValueError("dim and projector_layers must be at least 1.")


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, z) = -(p/|p|) . (z/|z|), mean over the batch, in float32 (eq. 1). [B,d] each -> scalar in [-1, 1]."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1, eps=1e-8).mean()


def projection_mlp(inner: int, hidden: int, dim: int, layers: int) -> nn.Sequential:
    """BN after every layer, ReLU after all but the last, whose BN has no affine (section 3, 'projection MLP')."""
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        # No bias: the BN that follows would cancel it. (The released code keeps one on the last layer, frozen.)
        modules.append(nn.Linear(inner, dim if last else hidden, bias=False))
        modules.append(nn.BatchNorm1d(dim if last else hidden, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
        inner = hidden
    return nn.Sequential(*modules)


def prediction_mlp(dim: int, hidden: int) -> nn.Sequential:
    """A bottleneck: BN and ReLU on the hidden layer, neither at the output (section 3, 'prediction MLP')."""
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim),
    )


class Method(nn.Module):
    """f = encoder + projector, one set of weights for both views; h = predictor."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = encoder
        hidden = settings.projector_hidden or encoder.dim
        self.projector = projection_mlp(encoder.dim, hidden, settings.dim, settings.projector_layers)
        bottleneck = settings.predictor_hidden or max(1, settings.dim // 4)
        self.predictor = prediction_mlp(settings.dim, bottleneck) if settings.predictor else nn.Identity()

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L = D(p1, stopgrad(z2))/2 + D(p2, stopgrad(z1))/2 (eq. 2).

        Each view is its own forward pass, so each has its own BN statistics.
        """
        x1, x2 = views
        z1, z2 = self.projector(self.encoder(x1)), self.projector(self.encoder(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.settings.stop_gradient:
            loss = negative_cosine(p1, z2.detach()) / 2 + negative_cosine(p2, z1.detach()) / 2
        else:
            loss = negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2
        with torch.no_grad():
            std = (normalised_std(z1) + normalised_std(z2)) / 2
        return loss, {"std": std}

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [B,3,h,w] -> features [B,dim] and projection z [B,d]."""
        h = self.encoder(x)
        return h, self.projector(h)

    def param_groups(self) -> list[dict[str, Any]]:
        encoder = [*self.encoder.parameters(), *self.projector.parameters()]
        groups: list[dict[str, Any]] = [{"params": encoder}]
        predictor = list(self.predictor.parameters())
        if predictor:
            groups.append({"params": predictor, "fixed_lr": self.settings.predictor_fixed_lr})
        return groups
