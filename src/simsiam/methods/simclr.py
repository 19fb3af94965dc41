"""SimCLR: T. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.collapse import spread
from simsiam.config import require_above_0
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, in_float32, mlp, prediction_mlp, project, unit
from simsiam.ranks import all_gather, rank

CITATION = (
    'T. Chen, S. Kornblith, M. Norouzi, G. Hinton, "A Simple Framework for Contrastive Learning of Visual '
    'Representations", arXiv 2002.05709 (ICML 2020)'
)
PUBLISHED = {
    "ImageNet, ResNet-50, 100 epochs, linear (as the SimSiam paper reproduces it, projector_layers=3)": 66.5,
    "CIFAR-10, ResNet-18, 800 epochs, linear (SimSiam paper, appendix D)": 91.1,
}
VIEWS = (2,)
DEFAULTS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "train": {
            "optimizer": "lars",
            "lr": 0.3,
            "weight_decay": 1e-6,
            "batch_size": 4096,
            "warmup_epochs": 10,
            "cosine": "step",
        },
        "views": {"scale": [0.08, 1.0], "jitter": [0.8, 0.8, 0.8, 0.2]},
    },
    # The setting of the SimSiam paper's appendix D, which states neither head nor temperature: these are our choice.
    "cifar": {
        "method": {"temperature": 0.5, "dim": 128, "projector_hidden": 512},
        "train": {"lr": 0.03, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {"temperature": 0.2, "dim": 128, "projector_hidden": 512},
        "train": {"lr": 0.3, "weight_decay": 1e-4},
    },
}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet (section 2.3; temperature: table 5)."""

    dim: int = 128
    """d, width of z."""
    projector_layers: int = 2
    """Fully connected layers of the projection head (3 in the SimSiam paper, appendix C)."""
    projector_hidden: int | None = None
    """Width of its hidden layers; None: the backbone's feature width."""
    temperature: float = 0.1
    """tau of NT-Xent."""
    predictor: bool = False
    """A prediction MLP on one side, as in SimSiam (SimSiam paper, section 6.2)."""
    stop_gradient: bool = False
    """No gradient through the other side (SimSiam paper, section 6.2)."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_layers", "projector_hidden", "temperature")


@in_float32
def nt_xent(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy (eq. 1), averaged over the 2B queries.

    The released code uses twice this loss; LARS cancels the factor except for biases and BN.

    q, k: float [B,d], the queries and keys of the two views; in SimCLR q = k = z. The key of the other view is the
    positive and the other 2B-2 keys are the negatives; an image's key in the same view is excluded. Keys of all ranks
    are used, with rows in rank order.
    """
    queries = torch.cat([unit(q1), unit(q2)])
    keys = torch.cat([all_gather(unit(k1)), all_gather(unit(k2))])
    logits = queries @ keys.T / temperature
    batch, total = len(q1), len(keys) // 2
    own = torch.arange(batch, device=q1.device) + rank() * batch
    same = torch.cat([own, own + total])
    positive = torch.cat([own + total, own])
    logits = logits.scatter(1, same[:, None], -torch.inf)
    return F.cross_entropy(logits, positive)


class Method(Siamese):
    """Contrasts the two views of each image with all other images of the batch.

    Unlike in the released code, each view is a separate forward pass with its own BN statistics; the head's last BN has
    an offset, and the head's weights have PyTorch's default initialisation (there: Gaussian, std 0.01).
    """

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        hidden = settings.projector_hidden or encoder.dim
        self.projector = mlp(
            [encoder.dim, *[hidden] * (settings.projector_layers - 1), settings.dim], output_norm="affine"
        )
        self.predictor = prediction_mlp(settings.dim) if settings.predictor else nn.Identity()

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = project(self.network, views)
        k1, k2 = (z.detach() for z in (z1, z2)) if self.settings.stop_gradient else (z1, z2)
        loss = nt_xent(self.predictor(z1), self.predictor(z2), k1, k2, self.settings.temperature)
        return loss, {"std": spread(z1, z2)}
