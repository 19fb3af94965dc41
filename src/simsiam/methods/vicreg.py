"""VICReg: A. Bardes et al., "Variance-Invariance-Covariance Regularization", ICLR 2022."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from simsiam.collapse import spread
from simsiam.config import merge, require_above_0, require_not_negative
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, in_float32, mlp, project
from simsiam.methods import barlow
from simsiam.ranks import all_gather

CITATION = (
    'A. Bardes, J. Ponce, Y. LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised '
    'Learning", arXiv 2105.04906 (ICLR 2022)'
)
PUBLISHED = {
    "ImageNet, ResNet-50, 1000 epochs, linear": 73.2,
    "CIFAR-10, ResNet-18, 1000 epochs, linear (solo-learn)": 92.07,
}
VIEWS = (2,)
DEFAULTS: dict[str, dict[str, Any]] = {
    # The same optimiser and augmentation; the rate is that of 100 epochs (released code's README), 0.2 that of 1000.
    "imagenet": merge(barlow.DEFAULTS["imagenet"], {"train": {"lr": 0.3}}),
    "cifar": {
        "method": {"dim": 2048, "projector_hidden": 2048},
        "train": {"lr": 0.01, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {"dim": 512, "projector_hidden": 512},
        "train": {"lr": 0.05, "weight_decay": 1e-4},
    },
}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet (section 4.2)."""

    dim: int = 8192
    """Width of z."""
    projector_hidden: int = 8192
    """Width of the expander's two hidden layers."""
    invariance: float = 25.0
    """lambda, the weight of the invariance term."""
    variance: float = 25.0
    """mu, the weight of the variance term."""
    covariance: float = 1.0
    """nu, the weight of the covariance term."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_hidden")
        require_not_negative(self, "invariance", "variance", "covariance")


def variance_term(z: Tensor) -> Tensor:
    """Hinge loss that keeps the std of every channel above 1 (eq. 1): mean of max(0, 1 - std). z: float [B,d]."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance_term(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal entries of the covariance, divided by d (eq. 3 and 4). z: float [B,d]."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


@in_float32
def vicreg(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Return lambda s + mu [v(z1) + v(z2)] + nu [c(z1) + c(z2)] (eq. 6), with v halved as in the released code.

    z: float [B,d]; computed over the batches of all ranks. s is the mean squared difference of the views' entries, also
    as in the released code; eq. 5 sums over the channels instead.
    """
    first, second = all_gather(z1), all_gather(z2)
    v = (variance_term(first) + variance_term(second)) / 2
    c = covariance_term(first) + covariance_term(second)
    return invariance * F.mse_loss(first, second) + variance * v + covariance * c


class Method(Siamese):
    """Pulls the views of an image together, keeps the variance of every channel of z, and decorrelates the channels."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        self.projector = mlp([encoder.dim, settings.projector_hidden, settings.projector_hidden, settings.dim])

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = project(self.network, views)
        settings = self.settings
        loss = vicreg(z1, z2, settings.invariance, settings.variance, settings.covariance)
        return loss, {"std": spread(z1, z2)}
