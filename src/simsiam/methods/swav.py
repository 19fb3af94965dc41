"""SwAV: M. Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam import ranks
from simsiam.collapse import spread
from simsiam.config import require_above_0, require_not_negative
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, in_float32, mlp, prediction_mlp, project, similarities, unit

CITATION = (
    'M. Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882 '
    "(NeurIPS 2020)"
)
PUBLISHED = {
    "ImageNet, ResNet-50, 800 epochs, multi-crop, linear": 75.3,
    "ImageNet, ResNet-50, 100 epochs, two crops, linear (as the SimSiam paper reproduces it, projector_layers=3)": 66.5,
    "CIFAR-10, ResNet-18, 1000 epochs, linear (solo-learn)": 89.17,
}
VIEWS = range(2, 17)
DEFAULTS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "train": {
            "optimizer": "larc",
            "lr": 0.3,
            "lr_end": 0.001,
            "weight_decay": 1e-6,
            "batch_size": 4096,
            "warmup_epochs": 10,
            "cosine": "step",
        },
        "views": {
            "scale": [0.14, 1.0],
            "jitter": [0.8, 0.8, 0.8, 0.2],
            "small_count": 6,
            "small_scale": [0.05, 0.14],
        },
    },
    "cifar": {
        "method": {"prototypes": 1000, "queue": 3840, "queue_epoch": 15},
        "train": {"lr": 0.06, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {"prototypes": 200, "projector_hidden": 512, "queue": 1024, "queue_epoch": 1},
        "train": {"lr": 0.3, "weight_decay": 1e-4},
    },
}
ONE_DEVICE = {"method": {"queue": 3840}, "train": {"lr": 0.6, "warmup_epochs": 0}}
"""As in the released script for batch 256."""


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet (section 4.1 and appendix A)."""

    dim: int = 128
    """Width of z."""
    projector_layers: int = 2
    """Fully connected layers of the projection head (3 in the SimSiam paper, appendix C)."""
    projector_hidden: int = 2048
    """Width of its hidden layers."""
    prototypes: int = 3000
    """K, the number of trainable prototypes that a code assigns images to."""
    temperature: float = 0.1
    """tau of the prediction."""
    epsilon: float = 0.05
    """Entropy regularisation of the codes; below 0.025 they would leave the range of float32."""
    sinkhorn_iterations: int = 3
    queue: int = 0
    """Features of earlier batches that are added when computing the codes, for batches small relative to K; 0: none."""
    queue_epoch: int = 15
    """The epoch, counted from 0, from which the queue is used."""
    freeze_epochs: int = 1
    """Initial epochs during which the prototypes are frozen. The released scripts state them in steps: 313 at batch 4096,
    5005 at 256."""
    predictor: bool = False
    """Apply a prediction MLP to z before it is compared with the prototypes (SimSiam paper, section 6.2)."""
    stop_gradient: bool = True
    """False: gradient flows through the codes too (SimSiam paper, section 6.2: diverges)."""
    normalised_in_graph: bool = False
    """Also normalise the prototypes in the forward pass, so that their gradient is that of their directions (SimSiam
    paper, section 6.2)."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_layers", "projector_hidden", "prototypes", "sinkhorn_iterations")
        require_above_0(self, "temperature")
        require_not_negative(self, "queue", "queue_epoch", "freeze_epochs")
        if self.epsilon < 0.025:
            raise ValueError(f"epsilon is {self.epsilon:g}: it must be at least 0.025.")


@in_float32
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return codes q: assignments of B features to K prototypes that use all prototypes equally (section 3.1, eq. 3-5).

    scores: float [B,K], cosines; with several ranks, this rank's rows. Returns float32 [B,K] with rows summing to 1,
    because rows are scaled last; after enough iterations each column sums to B/K as well.
    """
    scores = scores / epsilon
    largest = scores.detach().amax()
    ranks.all_reduce_([largest], "max")
    q = torch.exp(scores - largest)  # prevents overflow; the scaling cancels this factor
    for _ in range(iterations):
        columns = ranks.all_sum(q.sum(0))
        q = q / columns.clamp(min=torch.finfo(q.dtype).tiny)
        q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return q


@in_float32
def swapped_prediction(scores: list[Tensor], codes: list[Tensor], temperature: float) -> Tensor:
    """Return the mean cross-entropy of each code with the prediction from every other view (eq. 2).

    scores: [B,K] of every view; codes: [B,K] of the full-size views, which come first. Mean over pairs and batch.
    """
    predictions = [F.log_softmax(each / temperature, 1) for each in scores]
    losses = [
        -(code * predictions[other]).sum(1).mean()
        for view, code in enumerate(codes)
        for other in range(len(scores))
        if other != view
    ]
    return torch.stack(losses).mean()


class Method(Siamese):
    """Each view predicts the code of the other, an assignment to jointly trained prototypes.

    Unlike in the released code, each view is a separate forward pass with its own BN statistics; the prototypes are
    initialised as normalised Gaussian vectors; the queue fills from the first step.
    """

    queue: Tensor
    epoch: Tensor
    _queue_ready: bool
    _epoch: int

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        self.projector = mlp(
            [encoder.dim, *[settings.projector_hidden] * (settings.projector_layers - 1), settings.dim]
        )
        self.predictor = prediction_mlp(settings.dim) if settings.predictor else nn.Identity()
        self.prototypes = nn.Linear(settings.dim, settings.prototypes, bias=False)
        nn.init.normal_(self.prototypes.weight)
        self.after_step(0.0)
        self.register_buffer("queue", torch.zeros(2, settings.queue, settings.dim))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self._in_host(self)
        self.register_load_state_dict_post_hook(self._in_host)

    @staticmethod
    def _in_host(method: Any, *_: Any) -> None:
        """Take host copies of buffer values, which save device synchronisation."""
        method._queue_ready, method._epoch = False, int(method.epoch)

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """False until the queue, if any, is in use."""
        return not self.settings.queue or self._queue_ready

    def before_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self._epoch = epoch

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        settings, weight = self.settings, self.prototypes.weight
        weight = unit(weight) if settings.normalised_in_graph else weight
        prototypes = torch.where(self.epoch >= settings.freeze_epochs, weight, weight.detach())
        z = project(self.network, views)
        full = [i for i, x in enumerate(views) if x.shape == views[0].shape][:2]
        # stopgrad: the codes are targets.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not settings.stop_gradient):
            codes = [self._code(unit(z[i]), prototypes, slot) for slot, i in enumerate(full)]
        scores = [similarities(self.predictor(each), prototypes) for each in z]
        loss = swapped_prediction(scores, codes, settings.temperature)
        with torch.no_grad():
            self._enqueue([unit(z[i]) for i in full])
        return loss, {"std": spread(*(z[i] for i in full))}

    def _code(self, z: Tensor, prototypes: Tensor, slot: int) -> Tensor:
        rows = z
        if self._use_queue():
            own = self.queue[slot, ranks.rank() :: ranks.world_size()]  # each rank contributes its part
            rows = torch.cat([own, z])
        return sinkhorn(similarities(rows, prototypes), self.settings.epsilon, self.settings.sinkhorn_iterations)[
            -len(z) :
        ]

    def _use_queue(self) -> bool:
        if self.settings.queue and not self._queue_ready and self._epoch >= self.settings.queue_epoch:
            self._queue_ready = bool(self.queue[0, -1].any())  # rows have unit length, unset ones are 0
        return self._queue_ready

    def _enqueue(self, z: list[Tensor]) -> None:
        if self.settings.queue:
            for each, queue in zip(z, self.queue, strict=False):  # a single full-size view fills one of the two
                queue.copy_(torch.cat([ranks.all_gather(each), queue])[: self.settings.queue])

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Project the prototypes back onto the sphere; while they are frozen, this also undoes weight decay."""
        self.prototypes.weight.copy_(unit(self.prototypes.weight))
