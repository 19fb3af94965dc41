"""Barlow Twins: J. Zbontar et al., "Self-Supervised Learning via Redundancy Reduction", ICML 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simsiam.collapse import spread
from simsiam.config import require_above_0, require_not_negative
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, in_float32, mlp, project
from simsiam.methods import byol
from simsiam.ranks import all_gather

CITATION = (
    'J. Zbontar, L. Jing, I. Misra, Y. LeCun, S. Deny, "Barlow Twins: Self-Supervised Learning via Redundancy '
    'Reduction", arXiv 2103.03230 (ICML 2021)'
)
PUBLISHED = {
    "ImageNet, ResNet-50, 1000 epochs, linear": 73.2,
    "CIFAR-10, ResNet-18, 1000 epochs, linear (solo-learn)": 92.10,
}
VIEWS = (2,)
DEFAULTS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "train": {
            "optimizer": "lars",
            "lr": 0.2,
            "lr_end": 0.001,
            "weight_decay": 1e-6,
            "batch_size": 2048,
            "warmup_epochs": 10,
            "cosine": "step",
        },
        "views": byol.DEFAULTS["imagenet"]["views"],  # section 2.2: BYOL's augmentation
    },
    "cifar": {
        "method": {"dim": 2048, "projector_hidden": 2048, "scale": 0.01},
        "train": {"lr": 0.03, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {"dim": 512, "projector_hidden": 512, "scale": 0.01},
        "train": {"lr": 0.3, "weight_decay": 1e-4},
    },
}

ONE_DEVICE = {"train": {"lr": 0.3}}
"""The authors' table for batches below 2048 (facebookresearch/barlowtwins, issue 7): 0.3 at 512, 0.4 at 256."""


@dataclass(frozen=True)
class Settings:
    """Defaults: those of the released code for ImageNet. The paper (section 2.2) uses lambda 0.005 and weight decay
    1.5e-6."""

    dim: int = 8192
    """Width of z."""
    projector_hidden: int = 8192
    """Width of the projector's two hidden layers."""
    weight: float = 0.0051
    """lambda, the weight of the redundancy term."""
    scale: float = 0.024
    """Scale of the whole loss, as in the first release of the code. LARS cancels it, except that weight decay weighs
    1/scale = 42 times as much relative to the gradient, and that the learning rate of biases and BN, 0.0048 in that code, is
    scale * 0.2. That code also divides the loss's gradient by the number of GPUs: on its 32, biases and BN moved 32
    times less than here."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_hidden", "scale")
        require_not_negative(self, "weight")


@in_float32
def barlow_twins(z1: Tensor, z2: Tensor, weight: float) -> Tensor:
    """Return sum_i (1 - C_ii)^2 + lambda sum_(i != j) C_ij^2, C the cross-correlation of the two views (eq. 1 and 2).

    z: float [B,d]; C is [d,d], over the batches of all ranks.
    """
    first, second = standardise(all_gather(z1)), standardise(all_gather(z2))
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    invariance = (1 - diagonal).square().sum()
    redundancy = correlation.square().sum() - diagonal.square().sum()
    return invariance + weight * redundancy


def standardise(z: Tensor) -> Tensor:
    """Scale to mean 0 and std 1 over the batch, [B,d] -> [B,d]: BN without affine parameters."""
    return (z - z.mean(0)) * (z.var(0, correction=0) + 1e-5).rsqrt()


class Method(Siamese):
    """Makes every channel of z agree between the views and decorrelates the channels. No negatives, no asymmetry."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        self.projector = mlp([encoder.dim, settings.projector_hidden, settings.projector_hidden, settings.dim])

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = project(self.network, views)
        loss = self.settings.scale * barlow_twins(z1, z2, self.settings.weight)
        return loss, {"std": spread(z1, z2)}
