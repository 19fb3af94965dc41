"""MoCo v2: X. Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.collapse import spread
from simsiam.config import require_above_0
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, follow, in_float32, mlp, project, twin, unit
from simsiam.ranks import all_gather, world_size

CITATION = (
    'X. Chen, H. Fan, R. Girshick, K. He, "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297; '
    'K. He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722 (CVPR 2020)'
)
PUBLISHED = {
    "ImageNet, ResNet-50, 200 epochs, linear": 67.5,
    "ImageNet, ResNet-50, 100 epochs, linear (symmetrised, as the SimSiam paper reproduces it)": 67.4,
}
VIEWS = (2,)
DEFAULTS: dict[str, dict[str, Any]] = {
    "imagenet": {"train": {"lr": 0.03, "weight_decay": 1e-4, "batch_size": 256}},
    "cifar": {
        "method": {"queue": 4096, "temperature": 0.1, "momentum": 0.99, "symmetric": True},
        "train": {"lr": 0.03, "weight_decay": 5e-4},
    },
    "thin": {
        "method": {
            "queue": 512,
            "temperature": 0.2,
            "momentum": 0.99,
            "bn_groups": 2,
            "symmetric": True,
            "projector_hidden": 512,
        },
        "train": {"lr": 0.3, "weight_decay": 1e-4},
    },
}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet."""

    dim: int = 128
    """Width of q and k."""
    projector_hidden: int | None = None
    """Width of the MLP head's hidden layer; None: the backbone's feature width."""
    queue: int = 65536
    """K, the number of negatives kept: keys of earlier batches."""
    momentum: float = 0.999
    """m, the EMA momentum of the key encoder."""
    temperature: float = 0.2
    """tau of InfoNCE."""
    symmetric: bool = False
    """Use each view once as query and once as key (the SimSiam paper's table 4) instead of the first as query and the
    second as key. The loss is the mean of the two terms; the authors' CIFAR-10 notebook uses their sum."""
    bn_groups: int = 8
    """Parts of a batch with separate BN statistics, emulating the paper's 8 GPUs. Fewer if the batch is small."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_hidden", "queue", "bn_groups", "temperature")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum:g}: it must be at least 0 and below 1.")


@in_float32
def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return -log softmax of q.k+ among q.k+ and q.k- over the queue (MoCo, eq. 1), averaged over the batch.

    q, k: float [B,d], rows of unit length; queue: [K,d], likewise.
    """
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


class Method(Siamese):
    """A query encoder, its momentum twin (the key encoder) and a queue of keys.

    Shuffled BN (MoCo, section 3.3): within one BN batch a query could identify its key by the batch statistics. Here a
    batch is split into `bn_groups` parts, each with its own statistics, and the keys are assigned to the parts in
    random order, which emulates several devices on one. With several processes each gets its share of the parts, at
    least two.
    """

    sync_bn = False

    queue: Tensor
    head: Tensor

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        hidden = settings.projector_hidden or encoder.dim
        self.projector = mlp([encoder.dim, hidden, settings.dim], hidden_norm=False)
        self.key_network = twin(self.network)
        self.register_buffer("queue", unit(torch.randn(settings.queue, settings.dim)))
        self.register_buffer("head", torch.zeros((), dtype=torch.long))

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = [(0, 1), (1, 0)] if self.settings.symmetric else [(0, 1)]
        negatives = self.queue.clone()  # the backward pass needs the values from before _enqueue
        losses, keys, queries = [], [], []
        for query, key in pairs:
            z = self._grouped(self.network, views[query])
            k = self._keys(views[key])
            losses.append(info_nce(unit(z), k, negatives, self.settings.temperature))
            keys.append(k)
            queries.append(z)
        self._enqueue(torch.cat([all_gather(k) for k in keys]))
        return torch.stack(losses).mean(), {"std": spread(*queries)}

    @torch.no_grad()
    def _keys(self, x: Tensor) -> Tensor:
        # torch's global generator is seeded for every step. Unlike randperm, this does not synchronise with the device.
        order = torch.rand(len(x), device=x.device).argsort()
        shuffled = self._grouped(self.key_network, x[order])
        return unit(shuffled)[order.argsort()]

    def _grouped(self, network: nn.Sequential, x: Tensor) -> Tensor:
        most = self.settings.bn_groups
        groups = max(1, min(max(min(most, 2), most // world_size()), len(x) // 2))  # BN needs at least two images
        return torch.cat(project(network, x.tensor_split(groups)))

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        size = len(self.queue)
        keys = keys[-size:]
        slots = (self.head + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(0, slots, keys.to(self.queue.dtype))
        self.head.add_(len(keys)).remainder_(size)

    def after_step(self, progress: float) -> None:
        follow(self.key_network, self.network, self.settings.momentum)
