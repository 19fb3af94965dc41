"""Turn cache rows into batches on the device, in an order determined by (seed, epoch)."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsiam import kernels, ranks
from simsiam.config import UserError, counted
from simsiam.data.cache import Cache
from simsiam.kernels import Images, Packed

_RESIDENT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
_AHEAD = 3


@dataclass(frozen=True)
class Batch:
    """The images of one step, or this process's part of them."""

    images: Images
    """uint8 [B,3,H,W] on the device, padded at the bottom and right if sizes differ; or, on a CPU, packed."""
    sizes: Tensor | None
    """int32 [B,2] (height, width) on the device; None if every image fills the batch."""
    index: Tensor
    """int64 [B], each image's position among the training images."""


class Loader:
    """Batches of the given cache rows. A small data set is kept on the device; for a larger one the next
    batches are read ahead, unless kernels draw the views straight from the memory map.

    Images not decoded yet are decoded on their way into the first epoch's batches, so that training does not wait for
    the whole set. The batches are the same either way: bad images are skipped, and if the others are too few for an
    epoch's steps, its order starts over.

    Args:
        rows: int64 [N], the cache rows to train on, with or without bad images.
        batch_size: B; the last, incomplete batch of an epoch is dropped, as in the paper. With several processes, each
            gets its part of every batch, so B is a multiple of their number.
    """

    def __init__(self, cache: Cache, rows: np.ndarray, batch_size: int, device: torch.device, seed: int) -> None:
        assert 0 < batch_size <= len(rows) and batch_size % ranks.world_size() == 0, (batch_size, len(rows))
        self.cache, self.rows, self.batch_size, self.device, self.seed = cache, rows, batch_size, device, seed
        self.steps_per_epoch = len(rows) // batch_size
        self._images: Tensor | None = None
        self._settle()

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of the training images, bad ones included, for one epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from its step `start` on.

        Raises UserError if fewer than two images can be decoded, and whatever `Cache.usable` raises.
        """
        self._settle()
        part = self.batch_size // ranks.world_size()
        own = slice(ranks.rank() * part, (ranks.rank() + 1) * part)
        chunks = (chunk[own] for chunk in itertools.islice(self._chunks(epoch), start, None))
        if self._images is not None:
            for chunk in chunks:
                index = self._sent(torch.from_numpy(chunk))
                yield Batch(self._images[index], None, index)
        elif self._reads_ahead():
            yield from self._read_ahead(chunks)
        else:
            yield from map(self._load, chunks if self._decodes() else self._expected(chunks))

    def _chunks(self, epoch: int) -> Iterator[np.ndarray]:
        """Yields each step's batch over all ranks, as positions int64 [B]."""
        order, at = self.order(epoch), 0
        found = order[:0]
        for _ in range(self.steps_per_epoch):
            while len(found) < self.batch_size:
                if at >= len(order):
                    at = 0
                    count = len(self.cache.decoded(self.rows))
                    if count < 2:
                        first = "".join(f" Bad: {path} ({reason}), ..." for path, reason in self.cache.bad[:1])
                        raise UserError(
                            f"{self.cache.name} has {counted(count, 'usable image')} to train on: at least 2 are needed."
                            f"{first} `simsiam check` lists all bad files."
                        )
                piece = order[at : at + self.batch_size]
                found = np.concatenate([found, piece[self.cache.usable(self.rows[piece])]])
                at += len(piece)
            yield found[: self.batch_size]
            found = found[self.batch_size :]

    def _settle(self) -> None:
        """Moves the images to the device, once all are decoded, if they have one size and are few enough."""
        if self._images is not None:
            return
        left = self.cache.missing(self.rows)
        if 0 < len(left) < self.batch_size:  # in the incomplete batch that an epoch drops
            self.cache.usable(left)
        size = self.cache.uniform(self.rows)
        most = _RESIDENT_BYTES.get(self.device.type, 0)
        if self.device.type == "cuda":  # a fifth of the free memory: the network and its activations need the rest
            most = min(most, torch.cuda.mem_get_info(self.device)[0] // 5)
        if size is None or len(self.rows) * 3 * size[0] * size[1] > most:
            return
        good = self.cache.usable(self.rows)
        images = self.cache.batch(self.rows[good])[0]
        if not good.all():  # a place for every position; that of a bad image is never read
            there, shape = images, (len(self.rows), *images.shape[1:])
            images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            images[torch.from_numpy(good)] = there
        self._images = images.to(self.device)

    def _reads_ahead(self) -> bool:
        """Whether a thread reads ahead. Not on a CPU while images are being decoded, because that and training would
        compete for its cores, nor if batches are not copied."""
        return self.device.type != "cpu" or not (self._decodes() or kernels.compiled())

    def _decodes(self) -> bool:
        return len(self.cache.missing(self.rows)) > 0

    def _expected(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the chunks while the operating system prefetches the pixels of the next one."""
        for chunk, following in itertools.pairwise(itertools.chain(chunks, [None])):
            assert chunk is not None
            if following is not None:
                self.cache.expect(self.rows[following])
            yield chunk

    def _load(self, chunk: np.ndarray) -> Batch:
        rows, index = self.rows[chunk], torch.from_numpy(chunk)
        packed, sizes = self.cache.packed(rows)
        images = packed.to(self.device) if self.device.type == "cpu" else packed.padded()
        if isinstance(images, Packed):
            return Batch(images, sizes, index)
        uniform = bool((sizes == torch.tensor(images.shape[-2:], dtype=sizes.dtype)).all())
        return Batch(self._sent(images), None if uniform else self._sent(sizes), self._sent(index))

    def _sent(self, values: Tensor) -> Tensor:
        """Copies values to the device, a CUDA one without waiting for work running there."""
        if self.device.type != "cuda":  # Apple's copies would still read memory that is freed and used again
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

    def _read_ahead(self, chunks: Iterator[np.ndarray]) -> Iterator[Batch]:
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
