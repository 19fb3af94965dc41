"""SwAV: M. Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam import ranks
from simsiam.collapse import spread
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, in_float32, mlp, project, similarities, unit, wide

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
            "weight_decay": 1e-6,
            "batch_size": 4096,
            "warmup_epochs": 10,
            "cosine": "step",
        },
        "views": {
            "scale": [0.14, 1.0],
            "jitter": [0.8, 0.8, 0.8, 0.2],
            "small_count": 6,
            "small_size": 96,
            "small_scale": [0.05, 0.14],
        },
    },
    "cifar": {
        "method": {"prototypes": 1000, "queue": 3840, "queue_epoch": 15},
        "train": {"lr": 0.06, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {"prototypes": 200, "projector_hidden": 512, "queue": 1024, "queue_epoch": 1, "freeze_steps": 50},
        "train": {"lr": 0.3, "weight_decay": 1e-4},
    },
}
ONE_DEVICE = {"method": {"queue": 3840}, "train": {"lr": 0.6, "warmup_epochs": 0}}
"""The released script for a batch of 256, but for freeze_steps: 5005 there, an epoch of ImageNet."""


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
    """K, the trainable vectors that a code assigns an image to."""
    temperature: float = 0.1
    """tau of the prediction."""
    epsilon: float = 0.05
    """Entropy regularisation of the codes; below 0.025 they would leave the range of float32."""
    sinkhorn_iterations: int = 3
    queue: int = 0
    """Features of earlier batches that help to compute the codes, where a batch is small against K; 0: none."""
    queue_epoch: int = 15
    """The epoch, the first being 0, from which the queue is used."""
    freeze_steps: int = 313
    """Steps during which the prototypes stay as they were drawn."""
    predictor: bool = False
    """A prediction MLP before the prediction (SimSiam paper, section 6.2)."""
    stop_gradient: bool = True
    """False: gradient flows through the codes too (SimSiam paper, section 6.2: diverges)."""
    normalised_in_graph: bool = False
    """The prototypes are normalised in the forward pass too, and their gradient is that of their directions (SimSiam paper,
    section 6.2)."""

    def __post_init__(self) -> None:
        for name in ("dim", "projector_layers", "projector_hidden", "prototypes", "sinkhorn_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if min(self.queue, self.queue_epoch, self.freeze_steps) < 0 or self.temperature <= 0:
            raise ValueError("queue, queue_epoch and freeze_steps must not be negative, temperature above 0.")
        if self.epsilon < 0.025:
            raise ValueError(f"epsilon is {self.epsilon:g}: it must be at least 0.025.")


@in_float32
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes q: assignments of B features to K prototypes that use every prototype equally (section 3.1, eq. 3 to 5).

    scores: float [B,K], cosines; with several ranks, this rank's rows. Returns [B,K] in float32, rows summing to 1. The last
    scaling is that of the rows; after enough iterations each column sums to B/K as well.
    """
    scores = wide(scores) / epsilon
    largest = scores.detach().amax()
    ranks.all_ranks([largest], "max")
    q = torch.exp(scores - largest)  # a common factor, which the scaling cancels: without it exp could overflow
    for _ in range(iterations):
        columns = ranks.total(q.sum(0))
        q = q / columns.clamp(min=torch.finfo(q.dtype).tiny)
        q = q / q.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    return q


@in_float32
def swapped_prediction(scores: list[Tensor], codes: list[Tensor], temperature: float) -> Tensor:
    """Cross-entropy of each code with the prediction from every other view (eq. 2), mean over pairs and batch.

    scores: [B,K] of every view; codes: [B,K] of the first, full-size views.
    """
    predictions = [F.log_softmax(wide(each) / temperature, 1) for each in scores]
    losses = [
        -(code * predictions[other]).sum(1).mean()
        for view, code in enumerate(codes)
        for other in range(len(scores))
        if other != view
    ]
    return torch.stack(losses).mean()


class Method(Siamese):
    """Each view predicts the code that the other got, among prototypes that are trained along.

    Unlike the released code, each view is its own forward pass, with BN statistics of its own; the prototypes start Gaussian
    on the sphere; the queue fills from the first step.
    """

    queue: Tensor
    steps: Tensor
    epoch: Tensor
    _queue_ready: bool
    _epoch: int | None

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__()
        self.settings, self.encoder = settings, encoder
        self.projector = mlp(
            [encoder.dim, *[settings.projector_hidden] * (settings.projector_layers - 1), settings.dim]
        )
        narrow = max(1, settings.dim // 4)
        self.predictor = mlp([settings.dim, narrow, settings.dim]) if settings.predictor else nn.Identity()
        self.prototypes = nn.Linear(settings.dim, settings.prototypes, bias=False)
        nn.init.normal_(self.prototypes.weight)
        self.after_step(0.0)
        self.register_buffer("queue", torch.zeros(2, settings.queue, settings.dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self._in_host(self)
        self.register_load_state_dict_post_hook(self._in_host)

    @staticmethod
    def _in_host(method: Any, *_: Any) -> None:
        """What the buffers tell, known without waiting for the device; None: to be read."""
        method._queue_ready, method._epoch = False, None

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """False until the queue, where there is one, is in use."""
        return not self.settings.queue or self._queue_ready

    def before_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self._epoch = epoch

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        settings, weight = self.settings, self.prototypes.weight
        weight = unit(weight) if settings.normalised_in_graph else weight
        self.steps += self.training
        prototypes = torch.where(self.steps > settings.freeze_steps, weight, weight.detach())
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
            rows = torch.cat([self.queue[slot, ranks.rank() :: ranks.count()], z])  # each rank brings its part
        return sinkhorn(similarities(rows, prototypes), self.settings.epsilon, self.settings.sinkhorn_iterations)[
            -len(z) :
        ]

    def _use_queue(self) -> bool:
        if self.settings.queue and not self._queue_ready:
            self._epoch = int(self.epoch) if self._epoch is None else self._epoch
            if self._epoch >= self.settings.queue_epoch:
                self._queue_ready = bool(self.queue[:, -1].any())  # features have length 1: it is full
        return self._queue_ready

    def _enqueue(self, z: list[Tensor]) -> None:
        if self.settings.queue:
            fresh = [torch.cat([ranks.gather(each), old]) for each, old in zip(z, self.queue, strict=True)]
            self.queue.copy_(torch.stack(fresh)[:, : self.settings.queue])

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Prototypes stay on the sphere. That undoes what weight decay did to them while they are frozen, too."""
        self.prototypes.weight.copy_(unit(self.prototypes.weight))
