"""SimSiam: X. Chen, K. He, "Exploring Simple Siamese Representation Learning", CVPR 2021."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.collapse import spread
from simsiam.config import require_above_0, require_not_negative
from simsiam.encoders import Encoder
from simsiam.heads import (
    HeadNorms,
    Siamese,
    at_least_float32,
    encoder_and_predictor,
    mlp,
    prediction_mlp,
    project,
    twin,
)
from simsiam.ranks import all_gather

CITATION = 'X. Chen, K. He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566 (CVPR 2021)'
PUBLISHED = {
    "ImageNet, ResNet-50, 100 epochs, linear": 68.1,
    "CIFAR-10, ResNet-18, 800 epochs, linear": 91.8,
}
VIEWS = (2, 4, 6, 8)
DEFAULTS: dict[str, dict[str, Any]] = {}  # the recipes already are SimSiam's
FEW_PHOTOGRAPHS = {"method": {"predictor_lr": 30.0}}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet (section 3; for the predictor's learning rate, table 1c). The rest are
    ablations."""

    dim: int = 2048
    """d, width of z and p."""
    projector_layers: int = 3
    """Fully connected layers of the projection MLP (2 on CIFAR-10, appendix D)."""
    projector_hidden: int | None = None
    """Width of its hidden layers; None: the backbone's feature width, as in the released code."""
    predictor_hidden: int | None = None
    """Width of the prediction MLP's hidden layer; None: d/4, the paper's bottleneck."""
    predictor: bool = True
    """False: h is the identity (table 1a); the network collapses."""
    predictor_trained: bool = True
    """False: h keeps its random initial weights (table 1b); training does not converge."""
    predictor_fixed_lr: bool = True
    """The predictor keeps the initial learning rate (table 1c, 68.1) from the first step on, even while the encoder's
    warms up; False: it follows the encoder's (67.7)."""
    predictor_lr: float = 1.0
    """The predictor's learning rate as a multiple of the encoder's. Above 1 the predictor stays closer to its optimum,
    and more directions of z survive the first steps (Y. Tian et al., arXiv 2102.06810): 10 helps in short runs of thin
    networks, and 30 with few photographs (docs/log.md)."""
    stop_gradient: bool = True
    """False: gradient flows through both sides (figure 2); the network collapses."""
    bn: Literal["none", "hidden", "default", "all"] = "default"
    """BN in the heads (table 3): none, on hidden layers only, also on z ("default"), or also on p ("all")."""
    similarity: Literal["cosine", "softmax"] = "cosine"
    """D: negative cosine, or the cross-entropy of the softmax over channels (section 4.5)."""
    symmetric: bool = True
    """False: D(p1, z2) alone (section 4.6). With views.count=4 it uses two such pairs per image."""
    target_steps: int = 1
    """Steps between updates of the weights that compute the targets (section 5.2, k-step alternation); 0: one epoch."""
    target_momentum: float | None = None
    """m of a moving average of each image's projections, used as its target (section 5.2: 0.8, without predictor);
    None: z itself is the target."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_layers", "projector_hidden", "predictor_hidden", "predictor_lr")
        require_not_negative(self, "target_steps")
        if self.target_momentum is not None and not 0 <= self.target_momentum < 1:
            raise ValueError("target_momentum must be at least 0 and below 1.")
        if self.target_momentum is not None and self.target_steps != 1:
            raise ValueError("target_momentum and target_steps cannot both be set.")


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Return D(p, z) = -(p/|p|) . (z/|z|), averaged over the batch, in float32 (eq. 1). [B,d] each -> [-1, 1]."""
    return -F.cosine_similarity(at_least_float32(p), at_least_float32(z), dim=1, eps=1e-8).mean()


def softmax_cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """Return D(p, z) = -softmax(z) . log softmax(p), averaged over the batch (section 4.5). [B,d] each -> [0, inf)."""
    return -(at_least_float32(z).softmax(1) * at_least_float32(p).log_softmax(1)).sum(1).mean()


def projection_mlp(inner: int, hidden: int, dim: int, layers: int, bn: HeadNorms = "default") -> nn.Sequential:
    """Projection MLP: BN after every layer, ReLU after all but the last, whose BN is not affine (section 3).

    The released code has a bias before that last BN, frozen; it has no effect on z and is omitted here.
    """
    widths = [inner, *[hidden] * (layers - 1), dim]
    return mlp(widths, hidden_norm=bn != "none", output_norm="none" if bn in ("none", "hidden") else "plain")


class Method(Siamese):
    """f = encoder + projector, with the same weights for all views; h = predictor."""

    target: nn.Sequential
    target_age: Tensor
    memory: Tensor
    remembered: Tensor
    _age: int

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        width = settings.projector_hidden or encoder.dim
        self.projector = projection_mlp(encoder.dim, width, settings.dim, settings.projector_layers, settings.bn)
        hidden, bn = settings.predictor_hidden, settings.bn
        self.predictor = prediction_mlp(settings.dim, hidden, bn) if settings.predictor else nn.Identity()
        self.predictor.requires_grad_(settings.predictor_trained)
        if settings.target_steps != 1:
            self.target = twin(self.network)
            self.register_buffer("target_age", torch.zeros((), dtype=torch.long))
            self._in_host(self)
            self.register_load_state_dict_post_hook(self._in_host)

    @staticmethod
    def _in_host(method: Any, *_: Any) -> None:
        """Take `_age`, a host copy of `target_age` that saves device synchronisation."""
        method._age = int(method.target_age)

    def allocate(self, images: int) -> None:
        if self.settings.target_momentum is not None:
            self.register_buffer("memory", torch.zeros(images, self.settings.dim))
            self.register_buffer("remembered", torch.zeros(images, dtype=torch.bool))

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L = D(p1, stopgrad(z2))/2 + D(p2, stopgrad(z1))/2 (eq. 4), averaged over the pairs, and stats.

        Each view is a separate forward pass, so each has its own BN statistics.
        """
        z = project(self.network, views)
        p = [self.predictor(each) for each in z]
        targets = self._targets(views, z, index)
        if self.settings.stop_gradient:
            targets = [target.detach() for target in targets]
        distance = negative_cosine if self.settings.similarity == "cosine" else softmax_cross_entropy
        losses = []
        for i in range(0, len(views), 2):
            losses.append(distance(p[i], targets[i + 1]))
            if self.settings.symmetric:
                losses.append(distance(p[i + 1], targets[i]))
        loss = torch.stack(losses).mean()
        return loss, {"std": spread(*z)}

    def _targets(self, views: list[Tensor], z: list[Tensor], index: Tensor) -> list[Tensor]:
        """Return the targets of p: z of the other view, or its replacement from section 5.2."""
        settings = self.settings
        if settings.target_momentum is not None:
            with torch.no_grad():
                old, known = self.memory[index], self.remembered[index][:, None]
                m = torch.where(known, settings.target_momentum, 0.0)
                targets = [m * old + (1 - m) * each.float() for each in z]
                # One new augmentation per step, as in the paper: the second view.
                seen = all_gather(index)
                self.memory[seen] = all_gather(targets[1])
                self.remembered.index_fill_(0, seen, True)  # assigning True would copy it to the GPU and wait
            return targets
        if settings.target_steps == 1:
            return z
        with torch.no_grad():
            return project(self.target, views)

    def before_epoch(self, epoch: int) -> None:
        if self.settings.target_steps == 0:
            self._refresh()

    def after_step(self, progress: float) -> None:
        if self.settings.target_steps > 1:
            self.target_age += 1
            self._age += 1
            if self._age >= self.settings.target_steps:
                self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Copy the current weights and BN statistics to the target: it is the same network, k steps ago."""
        self.target.load_state_dict(self.network.state_dict())
        self.target_age.zero_()
        self._age = 0

    def param_groups(self) -> list[dict[str, Any]]:
        return encoder_and_predictor(self, self.predictor, self.settings.predictor_fixed_lr, self.settings.predictor_lr)
