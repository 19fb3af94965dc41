"""Metrics on held-out images while a run trains: label-free figures always, kNN accuracy if labels exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simsiam.collapse import alignment, effective_rank, normalised_std, retrieval
from simsiam.compute import Compute, draw, generator
from simsiam.data.cache import Cache, Progress
from simsiam.data.views import ViewSettings, random_view
from simsiam.evaluate.knn import accuracy
from simsiam.features import Preprocessing, embed_rows, pixel_rows
from simsiam.heads import Siamese

SAMPLE = 512
"""Number of held-out images for the label-free figures."""
FEWEST = 16
"""Held-out images below which training images are shown instead."""
_BANK, _QUERIES = 1500, 500
_K = 20  # 200 neighbours would exceed the size of a class in a bank this small
_VIEW_BATCH = 256


class Monitor:
    """Evaluates the same held-out images, in the same views, at every look.

    Args:
        train, held_out: int64, the cache rows that are trained on and those that are not.
        progress: called while the few images needed are decoded, as by `Cache.usable`.
    """

    def __init__(
        self,
        cache: Cache,
        train: NDArray[np.int64],
        held_out: NDArray[np.int64],
        views: ViewSettings,
        prepare: Preprocessing,
        compute: Compute,
        progress: Progress | None = None,
    ) -> None:
        self.cache, self.views, self.prepare, self.compute = cache, views, prepare, compute
        parts = draw(held_out, SAMPLE), draw(cache.labelled(train), _BANK), draw(held_out, _QUERIES)
        labels = cache.labels
        cache.usable(np.concatenate(parts if labels is not None else parts[:1]), progress)
        self.sample, self.bank, self.queries = (cache.decoded(part) for part in parts)
        self.of = "held out"
        for most in (SAMPLE, len(train)):  # the latter: nearly all files are bad
            if len(self.sample) < FEWEST:
                # A set too small to hold any out is monitored on its training images: better than nothing.
                some, self.of = draw(train, most), "trained on"
                cache.usable(some, progress)
                self.sample = draw(cache.decoded(some), SAMPLE)
        known = labels is not None and (labels[self.queries] >= 0).any() and (labels[self.bank] >= 0).any()
        self.labelled = bool(known)

    def look(self, method: Siamese, knn: bool = True) -> dict[str, Any]:
        """Return the figures of the method as it is now, and which images they are of ("of").

        There are no figures if the output is not finite. Restores the method's mode and does not use training's random
        numbers.
        """
        training = method.training
        method.eval()
        figures = self._two_views(method)
        if figures and self.labelled and knn:
            figures["knn"] = self.knn(method.encoder)
        method.train(training)
        return {**figures, "of": self.of}

    def baselines(self, untrained: Callable[[], nn.Module]) -> dict[str, float]:
        """Return the kNN accuracy of the untrained encoder and of raw pixels here: what training has to beat."""
        if not self.labelled:
            return {}
        pixels = [pixel_rows(self.prepare, self.cache, rows) for rows in (self.bank, self.queries)]
        return {"knn": self.knn(untrained()), "knn_pixels": self._vote(*pixels)}

    def knn(self, encoder: Callable[[Tensor], Tensor]) -> float:
        """Return the kNN accuracy in percent on this sample."""
        return self._vote(
            *(embed_rows(encoder, self.prepare, self.cache, rows, self.compute) for rows in (self.bank, self.queries))
        )

    def _vote(self, bank: Tensor, queries: Tensor) -> float:
        assert self.cache.labels is not None
        known = [torch.from_numpy(self.cache.labels[rows]) for rows in (self.bank, self.queries)]
        return accuracy(bank, known[0], queries, known[1], k=_K)

    def _two_views(self, method: Siamese) -> dict[str, Any]:
        draws = generator(self.compute.device, 0x5EED)
        looks: list[list[tuple[Tensor, Tensor]]] = [[], []]
        for start in range(0, len(self.sample), _VIEW_BATCH):
            packed, sizes = self.cache.packed(self.sample[start : start + _VIEW_BATCH])
            images, sizes = packed.to(self.compute.device), sizes.to(self.compute.device)
            for side in range(2):
                x = random_view(images, self.views, draws, sizes)
                with torch.inference_mode(), self.compute.autocast():
                    looks[side].append(method.embed(x))
        (h1, z1), (_, z2) = ([torch.cat(each).float() for each in zip(*look, strict=True)] for look in looks)
        if not (torch.isfinite(z1).all() and torch.isfinite(h1).all()):
            return {}
        return {
            "std_z": float(normalised_std(z1)),
            "std_features": float(normalised_std(h1)),
            "effective_rank": effective_rank(z1.cpu()),
            "most_rank": min(len(z1) - 1, z1.shape[1]),
            "effective_rank_features": effective_rank(h1.cpu()),
            "alignment": alignment(z1, z2),
            "retrieval": retrieval(z1, z2),
        }
