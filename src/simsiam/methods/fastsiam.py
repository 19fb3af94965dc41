"""FastSiam: D. Pototzky et al., "FastSiam: Resource-Efficient Self-Supervised Learning on a Single GPU", GCPR 2022."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simsiam.collapse import spread
from simsiam.config import require_above_0
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, at_least_float32, encoder_and_predictor, prediction_mlp, project
from simsiam.methods.simsiam import negative_cosine, projection_mlp

CITATION = (
    'D. Pototzky, A. Sultan, L. Schmidt-Thieme, "FastSiam: Resource-Efficient Self-Supervised Learning on a Single '
    'GPU" (GCPR 2022); builds on SimSiam, arXiv 2011.10566'
)
PUBLISHED = {"CIFAR-10, ResNet-18, 200 epochs, kNN (lightly)": 90.6}
VIEWS = range(3, 17)
DEFAULTS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "train": {"lr": 0.125, "weight_decay": 1e-4, "batch_size": 32},
        "views": {"count": 4},
    },
    # lightly's benchmark, the source of the published figure: 200 epochs, learning rate 0.06 at batch 128, which decays
    # for the predictor too.
    "cifar": {
        "method": {"projector_layers": 2, "projector_hidden": 2048, "predictor_fixed_lr": False},
        "train": {"lr": 0.12, "weight_decay": 5e-4, "batch_size": 128},
        "views": {"count": 4},
    },
    "thin": {
        "method": {
            "dim": 512,
            "projector_layers": 2,
            "projector_hidden": 512,
            "predictor_hidden": 128,
            "predictor_lr": 10.0,
        },
        "train": {"lr": 0.3, "weight_decay": 1e-4},
        "views": {"count": 4},
    },
}


@dataclass(frozen=True)
class Settings:
    """Defaults: SimSiam's for ImageNet, with the same names."""

    dim: int = 2048
    """d, width of z and p."""
    projector_layers: int = 3
    """Fully connected layers of the projection MLP."""
    projector_hidden: int | None = None
    """Width of its hidden layers; None: the backbone's feature width."""
    predictor_hidden: int | None = None
    """Width of the prediction MLP's hidden layer; None: d/4."""
    predictor_fixed_lr: bool = True
    """The predictor keeps the initial learning rate."""
    predictor_lr: float = 1.0
    """The predictor's learning rate as a multiple of the encoder's."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_layers", "projector_hidden", "predictor_hidden", "predictor_lr")


def averaged_target_loss(p: list[Tensor], z: list[Tensor]) -> Tensor:
    """Return the mean over the K views of D(p_i, mean of z_j over j != i). [B,d] each -> scalar in [-1, 1].

    A single view's z is a noisy target; the mean of several is more stable (section 3).
    """
    z = [at_least_float32(each) for each in z]
    total = torch.stack(z).sum(0)
    return torch.stack([negative_cosine(p[i], (total - z[i]) / (len(z) - 1)) for i in range(len(z))]).mean()


class Method(Siamese):
    """SimSiam with several views, each of which predicts the mean of the others."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        hidden = settings.projector_hidden or encoder.dim
        self.projector = projection_mlp(encoder.dim, hidden, settings.dim, settings.projector_layers)
        self.predictor = prediction_mlp(settings.dim, settings.predictor_hidden)

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = project(self.network, views)
        loss = averaged_target_loss([self.predictor(each) for each in z], [each.detach() for each in z])
        return loss, {"std": spread(*z)}

    def param_groups(self) -> list[dict[str, Any]]:
        return encoder_and_predictor(self, self.predictor, self.settings.predictor_fixed_lr, self.settings.predictor_lr)
