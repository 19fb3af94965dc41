"""BYOL: J.-B. Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simsiam.collapse import spread
from simsiam.config import require_above_0
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, encoder_and_predictor, follow, mlp, project, twin, unit

CITATION = (
    'J.-B. Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", arXiv 2006.07733 '
    "(NeurIPS 2020)"
)
PUBLISHED = {
    "ImageNet, ResNet-50, 1000 epochs, linear": 74.3,
    "ImageNet, ResNet-50, 100 epochs, linear (as the SimSiam paper reproduces it)": 66.5,
    "CIFAR-10, ResNet-18, 1000 epochs, linear (solo-learn)": 92.58,
}
VIEWS = (2,)
DEFAULTS: dict[str, dict[str, Any]] = {
    # The released preset for 100 epochs, this recipe's length. The preset for 300 epochs has lr 0.3, the one for 1000
    # (as in the paper) lr 0.2, weight decay 1.5e-6 and momentum 0.996.
    "imagenet": {
        "method": {"momentum": 0.99},
        "train": {
            "optimizer": "lars",
            "lr": 0.45,
            "weight_decay": 1e-6,
            "batch_size": 4096,
            "warmup_epochs": 10,
            "cosine": "step",
        },
        "views": {
            "scale": [0.08, 1.0],
            "jitter": [0.4, 0.4, 0.2, 0.1],
            "blur_p": 1.0,
            "second_blur_p": 0.1,
            "second_solarize_p": 0.2,
        },
    },
    "cifar": {
        "method": {"hidden": 2048, "momentum": 0.99},
        "train": {"lr": 0.03, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {"hidden": 512, "dim": 128, "momentum": 0.98, "predictor_lr": 10.0},
        "train": {"lr": 0.1, "weight_decay": 1e-4},
    },
}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet, 1000 epochs (section 3.3)."""

    dim: int = 256
    """Width of the projection and of the prediction."""
    hidden: int = 4096
    """Width of the hidden layer of both MLPs."""
    momentum: float = 0.996
    """tau_base, the initial EMA momentum of the target network; it rises to 1 along half a cosine."""
    predictor_lr: float = 1.0
    """The predictor's learning rate as a multiple of the online network's."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "hidden", "predictor_lr")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum is {self.momentum:g}: it must lie between 0 and 1.")


def regression(q: Tensor, z: Tensor) -> Tensor:
    """Return |q/|q| - z/|z||^2 = 2 - 2 cos(q, z) (eq. 2), averaged over the batch. [B,d] each -> scalar in [0, 4]."""
    return 2 - 2 * (unit(q) * unit(z)).sum(1).mean()


def target_momentum(base: float, progress: float) -> float:
    """Return tau = 1 - (1 - tau_base) (cos(pi k/K) + 1)/2 (section 3.3); progress is k/K in [0, 1]."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


class Method(Siamese):
    """An online network whose predictor predicts the output of a target network, its EMA."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        self.projector = mlp([encoder.dim, settings.hidden, settings.dim])
        self.predictor = mlp([settings.dim, settings.hidden, settings.dim])
        self.target = twin(self.network)

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = project(self.network, views)
        with torch.no_grad():
            t1, t2 = project(self.target, views)
        loss = regression(self.predictor(z1), t2) + regression(self.predictor(z2), t1)
        return loss, {"std": spread(z1, z2)}

    def param_groups(self) -> list[dict[str, Any]]:
        return encoder_and_predictor(self, self.predictor, False, self.settings.predictor_lr)

    def after_step(self, progress: float) -> None:
        momentum = target_momentum(self.settings.momentum, progress)
        follow(self.target, self.network, momentum)
