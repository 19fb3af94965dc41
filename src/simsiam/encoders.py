"""Backbones by name: the thin and CIFAR ResNets of ours, any of torchvision's and any of timm's.

An encoder maps float [B,3,h,w] to pooled features [B,dim]; its classifier is gone. Names:

    thin-resnet18          ours for the CPU: width 16, stem by view size
    cifar-resnet18 | 34    3x3 stem of stride 1, no max-pool (the paper's appendix D)
    resnet50, ...          torchvision
    timm/NAME              timm; a plain NAME works where torchvision has none of that name
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simsiam.config import UserError, nearest

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
_OURS = [f"{family}-{depth}" for family in ("thin", "cifar") for depth in _BLOCKS]


@dataclass(frozen=True)
class EncoderSpec:
    """What is needed to build the encoder again; stored in `encoder.json`."""

    name: str
    size: int
    """Side of the views that it is built for, in pixels."""
    width: int | None = None
    """Channels of the first stage (ours only): 64 is the ResNet of the papers."""
    stem: int | None = None
    """Stride of the stem, 1, 2 or 4 (ours only)."""


class Encoder(nn.Module):
    """A backbone without classifier. `backbone` has the names of the model it comes from, so weights move both ways."""

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, dim: int) -> None:
        super().__init__()
        self.spec, self.backbone, self.dim = spec, backbone, dim

    def forward(self, x: Tensor) -> Tensor:
        """float [B,3,h,w] -> pooled features h [B,dim]."""
        return self.backbone(x)


def build(spec: EncoderSpec, seed: int) -> Encoder:
    """The encoder with fresh weights, the same for the same (spec, seed); torch's global generator is left as it was.

    The last BN weight of every residual block starts at 0 (paper, section 4.1), so a block starts as the identity.
    Raises UserError for an unknown name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, dim = _ours(spec) if spec.name in _OURS else _foreign(spec)
    return Encoder(spec, backbone, dim)


def names() -> list[str]:
    """Ours and torchvision's by name; timm's are too many to list, `timm.list_models()` does."""
    return _OURS + _torchvision_names()


def to_table(spec: EncoderSpec) -> dict[str, Any]:
    return {key: value for key, value in asdict(spec).items() if value is not None}


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _ours(spec: EncoderSpec) -> tuple[nn.Module, int]:
    family, depth = spec.name.split("-")
    width = spec.width or (16 if family == "thin" else 64)
    stem = spec.stem or (1 if family == "cifar" or spec.size <= 48 else 2 if spec.size <= 128 else 4)
    if stem not in (1, 2, 4):
        raise UserError(f"encoder.stem is {stem}: the stride of the stem is 1, 2 or 4.")
    return ResNet(_BLOCKS[depth], width, stem), 8 * width


def _foreign(spec: EncoderSpec) -> tuple[nn.Module, int]:
    if spec.width is not None or spec.stem is not None:
        raise UserError(f"encoder.width and encoder.stem are for {', '.join(_OURS)}; {spec.name} has no such settings.")
    from torchvision import models

    if spec.name in _torchvision_names():
        zero_init = {"zero_init_residual": True} if spec.name.startswith(("resnet", "resnext", "wide_resnet")) else {}
        model = models.get_model(spec.name, weights=None, **zero_init)
        return _without_classifier(model, spec)
    import timm

    name = spec.name.removeprefix("timm/")
    if name not in timm.list_models():
        raise UserError(f"Unknown encoder {spec.name!r}.{nearest(name, [*names(), *timm.list_models()])}")
    sized = {"img_size": spec.size} if "vit" in name or "swin" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **sized)
    return model, _probe_dim(model, spec)


def _without_classifier(model: nn.Module, spec: EncoderSpec) -> tuple[nn.Module, int]:
    for attribute in ("fc", "classifier", "head", "heads"):
        head = getattr(model, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(model, attribute, nn.Identity())
            break
        if isinstance(head, nn.Sequential):  # dropout, norms and hidden layers stay, the last layer goes
            last = [name for name, layer in head.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
            setattr(head, last, nn.Identity())
            break
    return model, _probe_dim(model, spec)


def _probe_dim(model: nn.Module, spec: EncoderSpec) -> int:
    training = model.training
    try:
        with torch.no_grad():
            out = model.eval()(torch.zeros(2, 3, spec.size, spec.size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{spec.name} cannot take {spec.size}-pixel views ({reason}). Choose another --size.") from None
    model.train(training)
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise UserError(f"{spec.name} is no encoder of images: it does not give one vector for each.")
    return out.shape[1]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016); names as in torchvision."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + shortcut)


class ResNet(nn.Module):
    """Basic-block ResNet of any width with a stem of stride 1 (CIFAR), 2 or 4. Features: global average pool, 8 x width."""

    def __init__(self, blocks: tuple[int, ...], width: int, stem: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, min(stem, 2), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == 4 else nn.Identity()
        inner = width
        for stage, count in enumerate(blocks):
            outer = width * 2**stage
            layers = [BasicBlock(inner if i == 0 else outer, outer, 2 if stage and i == 0 else 1) for i in range(count)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            inner = outer
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))
