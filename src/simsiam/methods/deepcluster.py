"""DeepCluster v2: M. Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", revised for SwAV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.collapse import spread
from simsiam.compute import generator
from simsiam.config import require_above_0
from simsiam.encoders import Encoder
from simsiam.heads import Siamese, at_least_float32, mlp, project, similarities, unit
from simsiam.methods import swav
from simsiam.ranks import all_gather, all_reduce_, broadcast_, world_size

CITATION = (
    'M. Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", arXiv 1807.05520 (ECCV 2018); '
    "version 2: arXiv 2006.09882, section 5 and appendix"
)
PUBLISHED = {
    "ImageNet, ResNet-50, 800 epochs, multi-crop, linear": 75.2,
    "CIFAR-10, ResNet-18, 1000 epochs, linear (solo-learn)": 88.85,
}
VIEWS = range(2, 17)
DEFAULTS: dict[str, dict[str, Any]] = {
    "imagenet": swav.DEFAULTS["imagenet"],  # version 2 comes from the SwAV paper, in the same setting
    "cifar": {"method": {"prototypes": 1000}, "train": {"lr": 0.06, "weight_decay": 5e-4}},
    "thin": {
        "method": {"prototypes": 200, "projector_hidden": 512},
        "train": {"lr": 0.3, "weight_decay": 1e-4},
    },
}


@dataclass(frozen=True)
class Settings:
    """Defaults: the paper's for ImageNet."""

    dim: int = 128
    """Width of z."""
    projector_hidden: int = 2048
    """Width of the projection head's hidden layer."""
    prototypes: int = 3000
    """K, clusters per clustering, limited to the number of images."""
    heads: int = 3
    """Number of clusterings, each with its own random initial centroids."""
    temperature: float = 0.1
    """tau of the prediction."""
    iterations: int = 10
    """k-means iterations before each epoch."""

    def __post_init__(self) -> None:
        require_above_0(self, "dim", "projector_hidden", "prototypes", "heads", "iterations", "temperature")


def spherical_kmeans(x: Tensor, k: int, iterations: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return centroids [k,d] on the unit sphere and the index of each row's nearest one, int64 [N].

    x: float [N,d], rows of unit length. A cluster that becomes empty keeps its centroid.
    """
    centroids = x[torch.randperm(len(x), generator=draws, device=draws.device)[:k].to(x.device)]
    assigned = nearest_centroid(x, centroids)
    for _ in range(iterations):
        sums = _sums(x, assigned, len(centroids))
        filled = torch.bincount(assigned, minlength=len(centroids))[:, None] > 0
        centroids = torch.where(filled, unit(sums), centroids)
        assigned = nearest_centroid(x, centroids)
    return centroids, assigned


def _sums(x: Tensor, assigned: Tensor, k: int) -> Tensor:
    """Sum the rows of each cluster: [k,d], reproducible to the last bit."""
    sums = x.new_zeros(k, x.shape[1])
    if x.is_cuda:  # index_add_ adds in arbitrary order here, but index_put_ sorts; on a CPU it is the reverse
        return sums.index_put_((assigned,), x, accumulate=True)
    return sums.index_add_(0, assigned, x)


def nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the centroid with the largest cosine similarity, int64 [N], computed in chunks of rows."""
    return torch.cat([(part @ centroids.T).argmax(1) for part in x.split(8192)])


class Method(Siamese):
    """Alternates between clustering the features of the last epoch and predicting each image's cluster.

    The features are those computed when an image was last seen in training (version 2: no extra pass over the data),
    stored for two views. Unlike in the released code, each view is a separate forward pass with its own BN statistics.
    """

    sweeps = True
    memory: Tensor
    assigned: Tensor
    prototypes: Tensor
    seed: Tensor

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__(encoder, settings)
        self.projector = mlp([encoder.dim, settings.projector_hidden, settings.dim])
        self.register_buffer("seed", torch.randint(2**31, ()))

    def allocate(self, images: int) -> None:
        settings = self.settings
        self.register_buffer("memory", torch.zeros(2, images, settings.dim))
        self.register_buffer("assigned", torch.zeros(settings.heads, images, dtype=torch.long))
        clusters = min(settings.prototypes, images)
        self.register_buffer("prototypes", torch.zeros(settings.heads, clusters, settings.dim))

    def before_training(self, batches: Iterable[tuple[list[Tensor], Tensor]]) -> None:
        """Fill the memory with one pass over the data."""
        for views, index in batches:
            self._remember([unit(z) for z in project(self.network, views[:2])], index)

    @torch.no_grad()
    def before_epoch(self, epoch: int) -> None:
        rows = self.memory[0].norm(dim=1).nonzero()[:, 0]  # images of an incomplete last batch have no features
        self.assigned.fill_(-100)  # ignored by cross_entropy
        for head, prototypes in enumerate(self.prototypes):
            draws = generator(torch.device("cpu"), int(self.seed), epoch, head)
            x = self.memory[head % 2, rows]
            centroids, self.assigned[head, rows] = spherical_kmeans(x, len(prototypes), self.settings.iterations, draws)
            prototypes.zero_()
            prototypes[: len(centroids)] = centroids
        broadcast_([self.prototypes, self.assigned])  # sums on a GPU may differ in the last bits

    def forward(self, views: list[Tensor], index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raw = project(self.network, views)
        z = [unit(each) for each in raw]
        assigned = self.assigned[:, index]
        known = (assigned >= 0).sum(1)
        all_reduce_([known])  # over the whole batch, because the ranks' gradients are averaged
        losses = [
            self._cross_entropy(similarities(each, prototypes), targets, clustered)
            for each in z
            for prototypes, targets, clustered in zip(self.prototypes, assigned, known, strict=True)
        ]
        with torch.no_grad():
            self._remember(z[:2], index)
        return torch.stack(losses).mean(), {"std": spread(*raw[:2])}

    def _cross_entropy(self, scores: Tensor, targets: Tensor, known: Tensor) -> Tensor:
        """Return the mean over the `known` images of all ranks that have a cluster; 0 if none has."""
        total = F.cross_entropy(at_least_float32(scores) / self.settings.temperature, targets, reduction="sum")
        return total * world_size() / known.clamp(min=1)

    def _remember(self, z: list[Tensor], index: Tensor) -> None:
        index = all_gather(index)
        for memory, each in zip(self.memory, z, strict=True):
            memory[index] = all_gather(each.detach())
