"""The peers' SimSiam training pipelines, each with default and with best settings; `peers.py` measures them.

All train the same backbone with heads of the same widths on the same images, at the same batch and view size. Transforms,
loader, loop, heads and optimiser are those of each peer:

* lightly: the package from PyPI; its transform, heads and loss, in the loop of its `examples/pytorch/simsiam.py`.
* released code: facebookresearch/simsiam (`main_simsiam.py`, `simsiam/loader.py`, `simsiam/builder.py`), rewritten with
  the same operations in the same order. Left out: DistributedDataParallel with SyncBatchNorm, which one device does not
  need.
* solo-learn: vturrisi/solo-learn 1.0.6 (`main_pretrain.py`, `solo/data/pretrain_dataloader.py`, `solo/methods/base.py` and
  `simsiam.py`, `scripts/pretrain/cifar/simsiam.yaml`), rewritten on pytorch-lightning: the newest solo-learn on PyPI
  requires torch 1.9.1 and cannot be installed alongside ours. Left out: logger, progress bar and checkpoints, DDP,
  DALI.

The omitted parts would only slow the peers down. The default numbers of workers, 8, 32 and 4, are those of their
scripts. Our kernels are disabled while they train, so that a peer's operations are torch's.
"""

from __future__ import annotations

import io
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from simsiam import kernels
from simsiam.compute import computes_bf16, cpu_quota, wait
from simsiam.data.decode import decode
from simsiam.data.demo import photograph_files
from simsiam.data.sources import open_images
from simsiam.encoders import Encoder, EncoderSpec, build

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPOCH = 50_000
_CLASSES = 10
_WARMUP_STEPS = 3


@dataclass(frozen=True)
class Task:
    """The training task that all contenders share."""

    folder: Path
    size: int
    batch: int
    device: torch.device
    encoder: str
    seconds: float
    dim: int = 512
    predictor: int = 128

    def backbone(self) -> Encoder:
        return build(EncoderSpec(self.encoder, self.size), seed=0)


@dataclass(frozen=True)
class Knobs:
    workers: int
    threads: int
    """torch threads in the training process."""
    best: bool
    """bf16 autocast if the processor supports it, channels_last, pinned memory and persistent workers; otherwise as in
    the peer's own script."""


class Clock:
    """Measures images/s over `seconds`, after some warm-up steps that are not counted."""

    def __init__(self, seconds: float, batch: float, device: torch.device, warmup: int = _WARMUP_STEPS) -> None:
        self.seconds, self.batch, self.device, self.warmup = seconds, batch, device, warmup
        self.steps, self.rate = 0, math.nan

    def over(self) -> bool:
        """Whether the time is up; must be called after every step."""
        self.steps += 1
        if self.steps == self.warmup:
            wait(self.device)
            self.start = time.perf_counter()
        if self.steps <= self.warmup or time.perf_counter() - self.start < self.seconds:
            return False
        wait(self.device)
        self.rate = (self.steps - self.warmup) * self.batch / (time.perf_counter() - self.start)
        return True


# --- the images -----------------------------------------------------------------------------------------------------


def small_images(data: str, folder: Path, count: int) -> None:
    """Write up to `count` training images of `data`, evenly spread over it, as PNG files."""
    images = open_images(data)
    rows = images.train[np.linspace(0, len(images.train) - 1, min(count, len(images.train))).astype(int)]
    for i, row in enumerate(rows.tolist()):
        Image.fromarray(decode(images.read(row))).save(folder / f"{i:06d}.png", compress_level=1)


def large_photos(folder: Path, count: int) -> None:
    """Write a twentieth of `count`, but at least 8, JPEG files of 1600x1200."""
    for i, photograph in enumerate(crops(1600, 1200, max(8, count // 20))):
        photograph.save(folder / f"{i:06d}.jpg", quality=90)


def crops(width: int, height: int, count: int) -> Iterator[Image.Image]:
    """Random crops of the demo set's photographs, resized."""
    photographs = [Image.open(io.BytesIO(content)).convert("RGB") for content in photograph_files().values()]
    rng = np.random.default_rng(0)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        share, at = rng.uniform(0.5, 1), rng.uniform(size=2)
        w = share * min(photograph.width, photograph.height * width / height)
        h = w * height / width
        left, top = at[0] * (photograph.width - w), at[1] * (photograph.height - h)
        yield photograph.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))


@cache
def in_memory(folder: Path) -> list[Image.Image]:
    """The images of a folder, decoded."""
    return [default_loader(path) for path in files(folder)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"))


class Pictures(Dataset[Any]):
    """The transformed images, repeated so that an epoch is at least as long as CIFAR-10's.

    Images in memory are copied first, as torchvision's CIFAR10 creates each from its array; paths are read by
    ImageFolder's loader. With `labels`, items are (index, views, label).
    """

    def __init__(self, images: Sequence[Image.Image | Path], views: Callable[[Any], Any], labels: bool = False) -> None:
        self.images, self.views, self.labels = images, views, labels

    def __len__(self) -> int:
        return max(len(self.images), _EPOCH)

    def __getitem__(self, index: int) -> Any:
        image = self.images[index % len(self.images)]
        views = self.views(image.copy() if isinstance(image, Image.Image) else default_loader(image))
        return (index, views, index % _CLASSES) if self.labels else views


# --- the peers' views -----------------------------------------------------------------------------------------------


class Two:
    """Two draws of one random transform."""

    def __init__(self, view: Callable[[Any], Any]) -> None:
        self.view = view

    def __call__(self, image: Any) -> list[Any]:
        return [self.view(image), self.view(image)]


class Blur:
    """Pillow's Gaussian blur with a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pillow_view(size: int, smallest: float, interpolation: T.InterpolationMode) -> T.Compose:
    """The paper's augmentation as in the released code and solo-learn: torchvision on one Pillow image."""
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=interpolation),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([Blur()], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


def torchvision_view(size: int) -> v2.Compose:
    """The paper's augmentation on one uint8 tensor, as torchvision's documentation advises; the blur spans a tenth."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(size // 10 | 1, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def lightly_view(size: int) -> Callable[[Any], Any]:
    from lightly.transforms import SimSiamTransform

    return SimSiamTransform(input_size=size)


def _loader(task: Task, knobs: Knobs, views: Callable[[Any], Any], pinned: bool) -> DataLoader[Any]:
    return DataLoader(
        Pictures(in_memory(task.folder) if task.size <= 32 else files(task.folder), views, labels=True),
        batch_size=task.batch,
        shuffle=True,
        drop_last=True,
        num_workers=knobs.workers,
        pin_memory=(pinned or knobs.best) and task.device.type == "cuda",
        persistent_workers=knobs.best and knobs.workers > 0,
    )


def _place(module: nn.Module, task: Task, best: bool) -> nn.Module:
    layout = torch.channels_last if best else torch.preserve_format
    return module.to(task.device, memory_format=layout)  # type: ignore[call-overload]


def _send(x: Tensor, task: Task, best: bool, wait: bool) -> Tensor:
    layout = torch.channels_last if best else torch.preserve_format
    return x.to(task.device, non_blocking=not wait, memory_format=layout)


# --- the peers ------------------------------------------------------------------------------------------------------


def lightly(task: Task, knobs: Knobs, clock: Clock) -> None:
    # Peers are imported inside functions so that they do not count in the memory measured for ours.
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.transforms import SimSiamTransform

    backbone = task.backbone()
    projection = SimSiamProjectionHead(backbone.dim, backbone.dim, task.dim)
    prediction = SimSiamPredictionHead(task.dim, task.predictor, task.dim)
    model = _place(nn.ModuleList([backbone, projection, prediction]), task, knobs.best)
    loader = _loader(task, knobs, SimSiamTransform(input_size=task.size), pinned=False)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = projection(backbone(x).flatten(start_dim=1))
        return z.detach(), prediction(z)

    while True:
        total = 0.0
        for _, (x0, x1), _ in loader:
            x0, x1 = (_send(x, task, knobs.best, wait=not knobs.best) for x in (x0, x1))
            with torch.autocast(task.device.type, torch.bfloat16, enabled=knobs.best and has_bf16(task)):
                (z0, p0), (z1, p1) = forward(x0), forward(x1)
                loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
            total += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if clock.over():
                return


def heads(inner: int, task: Task, inplace: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """Projector and predictor of the released code and of solo-learn; the last projector layer's bias is frozen."""
    projector = nn.Sequential(
        nn.Linear(inner, inner, bias=False),
        nn.BatchNorm1d(inner),
        nn.ReLU(inplace),
        nn.Linear(inner, inner, bias=False),
        nn.BatchNorm1d(inner),
        nn.ReLU(inplace),
        nn.Linear(inner, task.dim),
        nn.BatchNorm1d(task.dim, affine=False),
    )
    projector[6].bias.requires_grad = False
    predictor = nn.Sequential(
        nn.Linear(task.dim, task.predictor, bias=False),
        nn.BatchNorm1d(task.predictor),
        nn.ReLU(inplace),
        nn.Linear(task.predictor, task.dim),
    )
    return projector, predictor


def released(task: Task, knobs: Knobs, clock: Clock) -> None:
    backbone = task.backbone()
    projector, predictor = heads(backbone.dim, task, inplace=True)
    encoder = nn.Sequential(backbone, projector)
    model = _place(nn.ModuleList([encoder, predictor]), task, knobs.best).train()
    criterion = nn.CosineSimilarity(dim=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05 * task.batch / 256, momentum=0.9, weight_decay=1e-4)
    view = pillow_view(task.size, 0.2, T.InterpolationMode.BILINEAR)
    loader = _loader(task, knobs, Two(view), pinned=True)
    seen, total = 0, 0.0
    while True:
        for _, (x1, x2), _ in loader:
            x1, x2 = (_send(x, task, knobs.best, wait=False) for x in (x1, x2))
            with torch.autocast(task.device.type, torch.bfloat16, enabled=knobs.best and has_bf16(task)):
                z1, z2 = encoder(x1), encoder(x2)
                p1, p2 = predictor(z1), predictor(z2)
                loss = -(criterion(p1, z2.detach()).mean() + criterion(p2, z1.detach()).mean()) * 0.5
            total, seen = total + loss.item() * len(x1), seen + len(x1)  # its meter synchronises on every loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if clock.over():
                return


def solo_learn(task: Task, knobs: Knobs, clock: Clock) -> None:
    import pytorch_lightning as pl

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Method(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = task.backbone()
            self.classifier = nn.Linear(self.backbone.dim, _CLASSES)  # trained alongside, on detached features
            self.projector, self.predictor = heads(self.backbone.dim, task, inplace=False)

        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.backbone.parameters()},
                {"params": self.classifier.parameters(), "lr": 0.1, "weight_decay": 0},
                {"params": self.projector.parameters()},
                {"params": self.predictor.parameters()},
            ]
            optimizer = torch.optim.SGD(groups, lr=0.5 * task.batch / 256, weight_decay=1e-5, momentum=0.9)
            warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 1950))
            return [optimizer], [{"scheduler": warmup, "interval": "step", "frequency": 1}]

        def view(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
            features = self.backbone(x.to(memory_format=torch.channels_last))
            logits = self.classifier(features.detach())
            with torch.no_grad():
                right = logits.topk(5, 1).indices.t() == labels
                accuracy = [right[:k].reshape(-1).float().sum() * 100 / len(labels) for k in (1, 5)]
            z = self.projector(features)
            return z, self.predictor(z), F.cross_entropy(logits, labels, ignore_index=-1), accuracy

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            _, (x1, x2), labels = batch
            (z1, p1, class1, right1), (z2, p2, class2, right2) = self.view(x1, labels), self.view(x2, labels)
            by_class = (class1 + class2) / 2
            top1, top5 = ((a + b) / 2 for a, b in zip(right1, right2, strict=True))
            self.log_dict({"class": by_class, "top1": top1, "top5": top5}, on_epoch=True, sync_dist=True)
            loss = -F.cosine_similarity(p1, z2.detach(), dim=-1).mean() / 2
            loss = loss - F.cosine_similarity(p2, z1.detach(), dim=-1).mean() / 2
            std = sum(F.normalize(z, dim=-1).std(dim=0).mean() for z in (z1, z2)) / 2
            self.log_dict({"loss": loss, "std": std}, on_epoch=True, sync_dist=True)
            return loss + by_class

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if not trainer.should_stop and clock.over():
                trainer.should_stop = True

    view = pillow_view(task.size, 0.08, T.InterpolationMode.BICUBIC)
    trainer = pl.Trainer(
        accelerator="gpu" if task.device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1000,
        # On a CPU, lightning replaces fp16 with bf16, even if that has to be emulated.
        precision="32-true" if not has_bf16(task) else "bf16-mixed" if knobs.best else "16-mixed",
        callbacks=[Stop()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Method().to(memory_format=torch.channels_last), _loader(task, knobs, Two(view), pinned=True))


def has_bf16(task: Task) -> bool:
    """False if the processor would have to emulate it, ten times slower than float32."""
    return computes_bf16(task.device)


# --- at defaults and at best ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    name: str
    train: Callable[[Task, Knobs, Clock], None]
    workers: int
    """Workers in its own script."""
    needs: str = "torch"

    @property
    def missing(self) -> str | None:
        found = find_spec(self.needs.replace("-", "_")) is not None
        return None if found else f"{self.needs} is not installed: pip install -r benchmarks/requirements.txt"


LIGHTLY = Peer("lightly", lightly, 8, "lightly")
PEERS = (
    LIGHTLY,
    Peer("released code", released, 32),
    Peer("solo-learn", solo_learn, 4, "pytorch-lightning"),
)


def defaults(peer: Peer) -> Knobs:
    return Knobs(peer.workers, torch.get_num_threads(), best=False)


def tuned(peer: Peer, task: Task, place: Path) -> Knobs:
    """The fastest of a few choices of workers and threads, measured once and stored in `place`.

    With more processes than cores, the threads of a step wait for one another, so the best choice has to be measured.
    """
    kept = place / f"best-{peer.train.__name__}-{task.size}.json"
    if not kept.exists():
        cores, threads = cpu_quota(), torch.get_num_threads()
        shapes = {(0, threads), (1, threads), (cores, threads), (cores, 1)}
        if task.device.type == "cuda":
            shapes = {(max(1, cores // 2), threads), (cores, threads)}
        rates = {shape: images_per_second(peer, task, Knobs(*shape, True), 1 / 3) for shape in sorted(shapes)}
        kept.write_text(json.dumps(max(rates, key=lambda shape: rates[shape])))
    workers, threads = json.loads(kept.read_text())
    return Knobs(workers, threads, best=True)


def images_per_second(peer: Peer, task: Task, knobs: Knobs, share: float = 1.0) -> float:
    """Measure the peer's images/s over `share` of the task's seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(knobs.threads)
    clock = Clock(task.seconds * share, task.batch, task.device)
    try:
        with kernels.off():  # the backbone is ours, but must run on torch's operations
            peer.train(task, knobs, clock)
    finally:
        torch.set_num_threads(before)
    return clock.rate
