"""Cache rows -> batches on the device, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsiam import ranks
from simsiam.data.cache import Cache

_RESIDENT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
_AHEAD = 3


@dataclass(frozen=True)
class Batch:
    images: Tensor
    """uint8 [B,3,H,W] on the device, padded at the bottom and right where sizes differ."""
    sizes: Tensor | None
    """int32 [B,2] (height, width) on the device; None where every image fills the batch."""
    index: Tensor
    """int64 [B], each image's position among the training images."""


class Loader:
    """Batches of the given cache rows. A data set that is small lives on the device; a larger one is read ahead.

    Args:
        rows: int64 [N], the cache rows to train on.
        batch_size: B; the last, incomplete batch of an epoch is dropped, as in the paper. Of several processes each gets
            its part of every batch, so B is a multiple of their number.
    """

    def __init__(self, cache: Cache, rows: np.ndarray, batch_size: int, device: torch.device, seed: int) -> None:
        assert 0 < batch_size <= len(rows) and batch_size % ranks.count() == 0, (batch_size, len(rows))
        self.cache, self.rows, self.batch_size, self.device, self.seed = cache, rows, batch_size, device, seed
        self.steps_per_epoch = len(rows) // batch_size
        self._images: Tensor | None = None
        if cache.uniform and cache.memory_bytes <= _RESIDENT_BYTES.get(device.type, 0):
            self._images = cache.batch(rows)[0].to(device)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of the training images for one epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` of it on."""
        order = self.order(epoch)
        part = self.batch_size // ranks.count()
        starts = (i * self.batch_size + ranks.rank() * part for i in range(start, self.steps_per_epoch))
        chunks = [order[i : i + part] for i in starts]
        if self._images is None:
            yield from self._read_ahead(chunks)
            return
        for chunk in chunks:
            index = torch.from_numpy(chunk).to(self.device)
            yield Batch(self._images[index], None, index)

    def _load(self, chunk: np.ndarray) -> Batch:
        images, sizes = self.cache.batch(self.rows[chunk])
        if self.device.type == "cuda":
            images = images.pin_memory()
        uniform = bool((sizes == torch.tensor(images.shape[-2:], dtype=sizes.dtype)).all())
        return Batch(
            images.to(self.device, non_blocking=True),
            None if uniform else sizes.to(self.device),
            torch.from_numpy(chunk).to(self.device),
        )

    def _read_ahead(self, chunks: list[np.ndarray]) -> Iterator[Batch]:
        """One thread reads the next batches from the memory map while this one trains."""
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
        stop = threading.Event()

        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for chunk in chunks:
                    if stop.is_set():
                        return
                    put(self._load(chunk))
                put(None)
            except BaseException as error:  # handed to the training thread, which raises it
                put(error)

        thread = threading.Thread(target=read, name="simsiam-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
