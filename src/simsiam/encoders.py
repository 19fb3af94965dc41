"""Backbones by name: our thin and CIFAR ResNets, and any of torchvision's or timm's models.

An encoder maps float [B,3,h,w] to pooled features [B,dim]; it has no classifier. Names:

    thin-resnet18 | 34     ours for the CPU: width 16, stem by size in use
    cifar-resnet18 | 34    3x3 stem of stride 1, no max-pool (the paper's appendix D)
    resnet50, ...          torchvision
    timm/NAME              timm; a plain NAME works if torchvision has no model of that name
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simsiam.compute import Compute, computes_bf16
from simsiam.config import UserError, did_you_mean
from simsiam.convolutions import Folded, on_matrix_units, taught
from simsiam.kernels import norm, norms_views

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
_TOGETHER = 4
"""Most views that go through a network in one pass: each adds its BN to the code if it is compiled, and memory."""
OURS = [f"{family}-{depth}" for family in ("thin", "cifar") for depth in _BLOCKS]


@dataclass(frozen=True)
class EncoderSpec:
    """What is needed to rebuild an encoder; stored in `encoder.json`. None means the family's default."""

    name: str
    size: int
    """Side of the images in use (`eval.size`), in pixels: sets the stem, and the input of networks of one size."""
    width: int | None = None
    """Channels of the first stage, at least 8 (ours only); 64 in the papers' ResNets."""
    stem: int | None = None
    """Stride of the stem, 1, 2 or 4 (ours only)."""
    zero_init_residual: bool | None = None
    """The last BN weight of every residual block starts at 0, so a block starts as the identity (paper, appendix A).

    True by default for residual networks, but not for thin ones, whose kNN accuracy on CIFAR-10 was worse with it.
    """


class Encoder(nn.Module):
    """A backbone without its classifier. `backbone` keeps the original parameter names, so weights move both ways."""

    def __init__(self, spec: EncoderSpec, backbone: nn.Module, dim: int) -> None:
        super().__init__()
        self.spec, self.backbone, self.dim = spec, backbone, dim

    def forward(self, x: Tensor) -> Tensor:
        """float [B,3,h,w] -> pooled features h [B,dim]."""
        return self.backbone(x)

    def each(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Features of several views, float [B,3,h,w] each; BN statistics are computed per view."""
        runs: list[list[Tensor]] = []
        for x in views:
            if runs and runs[-1][0].shape == x.shape and len(runs[-1]) < _TOGETHER:
                runs[-1].append(x)
            else:
                runs.append([x])
        return [h for run in runs for h in self.together(run)]

    def together(self, views: list[Tensor]) -> Sequence[Tensor]:
        """`each` for views of one size. A `ResNet` that is compiled, or has kernels, takes them in one pass: fewer,
        larger operations. Its first BN stands for all; `norm` takes what has no kernel view by view."""
        net = self.backbone
        if isinstance(net, ResNet) and (torch.compiler.is_compiling() or norms_views(net.bn1, views[0])):
            features: Tensor = net(torch.cat(views), len(views))
            return features.chunk(len(views))
        return [self(x) for x in views]


def build(spec: EncoderSpec, seed: int) -> Encoder:
    """Builds an encoder with fresh weights, determined by (spec, seed); torch's global generator is left unchanged.

    Raises UserError for an unknown name, a setting that the backbone does not have, or views of an unsupported size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone, dim = _ours(spec) if spec.name in OURS else _foreign(spec)
    return Encoder(spec, taught(backbone), dim)


def names() -> list[str]:
    """The names of our and torchvision's encoders; timm's are too many (see `timm.list_models()`)."""
    return OURS + _torchvision_names()


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)  # classifiers only; detection, video, ... have their own modules


def _ours(spec: EncoderSpec) -> tuple[nn.Module, int]:
    family, depth = spec.name.split("-")
    thin = family == "thin"
    width = (16 if thin else 64) if spec.width is None else spec.width
    stem = (1 if not thin or spec.size <= 48 else 2 if spec.size <= 128 else 4) if spec.stem is None else spec.stem
    zero_init = not thin if spec.zero_init_residual is None else spec.zero_init_residual
    if width < 8:
        # With fewer channels, oneDNN's weight gradient of a strided 1x1 convolution in channels_last writes out of
        # bounds on processors with AVX2 (torch 2.14.1).
        raise UserError(f"encoder.width is {width}: it must be at least 8 channels.")
    if stem not in (1, 2, 4):
        raise UserError(f"encoder.stem is {stem}: the stride of the stem must be 1, 2 or 4.")
    return ResNet(_BLOCKS[depth], width, stem, zero_init), 8 * width


def check_sizes(encoder: Encoder, sizes: Iterable[int]) -> None:
    """Raises UserError if the encoder cannot take views of one of these sides, in pixels."""
    if encoder.spec.name in OURS:
        return
    training = encoder.training
    for size in sizes:
        with _takes(encoder.spec.name, size, "another --size, or views.small_count=0 if these are the small views"):
            _features(encoder, size)
    encoder.train(training)


@contextlib.contextmanager
def _takes(name: str, size: int, choose: str = "another --size") -> Iterator[None]:
    """Turns a network's error into a UserError which says that it cannot take images of this size."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, AssertionError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot take {size}-pixel views ({reason}). Choose {choose}.") from None


@torch.no_grad()
def _features(network: nn.Module, size: int) -> Any:
    """The features of two black images. In eval mode, so that BN's running statistics do not change."""
    return network.eval()(torch.zeros(2, 3, size, size))


def _foreign(spec: EncoderSpec) -> tuple[nn.Module, int]:
    with _takes(spec.name, spec.size):
        model = _from_torchvision(spec) if spec.name in _torchvision_names() else _from_timm(spec)
        features = _features(model, spec.size)
    if spec.width is not None or spec.stem is not None:
        raise UserError(f"encoder.width and encoder.stem are for {', '.join(OURS)}; {spec.name} has no such settings.")
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UserError(f"{spec.name} is not an image encoder: it does not return one vector per image.")
    return model.train(), features.shape[1]


def _from_torchvision(spec: EncoderSpec) -> nn.Module:
    from torchvision import models

    name, options = spec.name, dict[str, Any]()
    residual = models.get_model_builder(name).__module__ == models.resnet.__name__
    if residual:
        options["zero_init_residual"] = spec.zero_init_residual is not False
    elif spec.zero_init_residual is not None:
        raise _no_zero_init(spec)
    model = models.get_model(name, weights=None, **options, **torchvision_options(name, spec.size))
    if residual:
        _run_as_ours(model)
    heads = {attribute: getattr(model, attribute, None) for attribute in ("fc", "classifier", "head", "heads")}
    attribute, head = next((key, head) for key, head in heads.items() if head is not None)
    if isinstance(head, nn.Sequential):  # keep dropout, norms and hidden layers, drop the last layer
        last = [key for key, layer in head.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
        setattr(head, last, nn.Identity())
    else:
        setattr(model, attribute, nn.Identity())
    return model


def torchvision_options(name: str, size: int) -> dict[str, Any]:
    """Further arguments of torchvision's model of this name, for views of `size` pixels."""
    if name.startswith("vit_"):
        return {"image_size": size}
    if name.startswith("maxvit_"):
        return {"input_size": (size, size)}
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def timm_options(name: str, size: int) -> dict[str, Any]:
    """Further arguments of timm's model of this name, for views of `size` pixels."""
    import timm

    fixed = timm.is_model(name) and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    return {"img_size": size} if fixed else {}


def _run_as_ours(model: nn.Module) -> None:
    """Gives torchvision's ResNet our forward pass; its modules, their names and their weights stay the same."""
    from torchvision.models import resnet

    ours = {resnet.ResNet: ResNet, resnet.BasicBlock: BasicBlock, resnet.Bottleneck: Bottleneck, nn.Sequential: _Stage}
    for module in (model, *model.children(), *(block for stage in model.children() for block in stage.children())):
        module.__class__ = ours.get(type(module), type(module))


def _from_timm(spec: EncoderSpec) -> nn.Module:
    import timm

    name = spec.name.removeprefix("timm/")
    if not timm.is_model(name):
        listed = timm.list_models()
        places = [names(), listed] if name == spec.name else [[f"timm/{each}" for each in listed]]
        hints = [did_you_mean(spec.name, place) for place in places]
        hint = next((hint for hint in hints if "Did you mean" in hint), hints[-1])
        hint = hint if len(hint) < 100 else " `simsiam list` lists the encoders."  # a list of all 1400 would not help
        raise UserError(f"Unknown encoder {spec.name!r}.{hint}")
    options = timm_options(name, spec.size)
    if spec.zero_init_residual is not None:
        options["zero_init_last"] = spec.zero_init_residual
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if "zero_init_last" in str(error):
            raise _no_zero_init(spec) from None
        raise


def _no_zero_init(spec: EncoderSpec) -> UserError:
    return UserError(f"encoder.zero_init_residual is for residual networks; {spec.name} has no such setting.")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016); names as in torchvision."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        shortcut = _shortcut(self.downsample, x, views)
        x = norm(self.bn1, self.conv1(x), views=views)
        return norm(self.bn2, self.conv2(x), shortcut, views=views)


class Bottleneck(nn.Module):
    """torchvision's block of three convolutions with a shortcut, with our forward pass."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    bn1: nn.Module
    bn2: nn.Module
    bn3: nn.Module
    downsample: nn.Sequential | None

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        shortcut = _shortcut(self.downsample, x, views)
        x = norm(self.bn1, self.conv1(x), views=views)
        x = norm(self.bn2, self.conv2(x), views=views)
        return norm(self.bn3, self.conv3(x), shortcut, views=views)


def _shortcut(downsample: nn.Sequential | None, x: Tensor, views: int) -> Tensor:
    if downsample is None:
        return x
    conv, bn = downsample
    return norm(bn, _conv(conv, x), relu=False, views=views)


class _Stage(nn.Sequential):
    def __init__(self, inner: int, outer: int, count: int, stride: int) -> None:
        super().__init__(BasicBlock(inner, outer, stride), *(BasicBlock(outer, outer, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        for block in self:
            x = block(x, views)
        return x


class ResNet(nn.Module):
    """Basic-block ResNet of any width with a stem of stride 1 (CIFAR), 2 or 4. Features: average pool, 8 x width.

    torchvision's ResNets run with the same forward pass.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, stem: int, zero_init_residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, min(stem, 2), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == 4 else nn.Identity()
        self.layer1 = _Stage(width, width, blocks[0], 1)
        self.layer2 = _Stage(width, 2 * width, blocks[1], 2)
        self.layer3 = _Stage(2 * width, 4 * width, blocks[2], 2)
        self.layer4 = _Stage(4 * width, 8 * width, blocks[3], 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """views: number of batches that x concatenates, each with its own BN statistics."""
        x = self.maxpool(norm(self.bn1, _conv(self.conv1, x), views=views))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, views)
        return x.mean((2, 3))


def _conv(conv: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(conv, nn.Conv2d)
    return on_matrix_units(conv, x) if x.is_cuda else conv(x)


# --- inference on a CPU ---------------------------------------------------------------------------------------------


def in_use(encoder: Callable[[Tensor], Tensor], compute: Compute) -> Callable[[Tensor], Tensor]:
    """The function that computes an encoder's features at inference: without gradients, with its current weights.

    On a CPU, every BN of our and torchvision's ResNets is folded into the convolution before it, and oneDNN adds
    shortcut and ReLU to the convolution's sums before they are rounded and written. Anything else, and an encoder in
    training mode, is returned unchanged.
    """
    if not isinstance(encoder, Encoder) or not _folds(encoder.backbone, compute):
        return encoder
    return _InUse(encoder.backbone, torch.bfloat16 if compute.precision == "bf16" else torch.float32)


def view_dtype(network: Callable[[Tensor], Tensor]) -> torch.dtype:
    """The dtype of the views that a network returned by `in_use` takes without conversion."""
    return network.dtype if isinstance(network, _InUse) else torch.float32


def _folds(net: nn.Module, compute: Compute) -> bool:
    if not isinstance(net, ResNet):
        return False
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return (
        Folded.possible()
        and all(type(bn) is nn.BatchNorm2d and bn.affine and bn.track_running_stats for bn in norms)
        and not any(bn.training for bn in norms)
        and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in net.parameters())
        and (compute.precision == "fp32" or computes_bf16(compute.device))
    )


class _InUse:
    """A ResNet of `Folded` convolutions: float [B,3,h,w], ideally already of `dtype` -> features [B,dim]."""

    def __init__(self, net: Any, dtype: torch.dtype) -> None:
        self.dtype, self.maxpool = dtype, net.maxpool
        self.stem = Folded(net.conv1, net.bn1, dtype)
        self.blocks: list[tuple[Folded | None, list[Folded]]] = []
        for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
            numbers = [number for number in (1, 2, 3) if hasattr(block, f"conv{number}")]
            convs = [Folded(getattr(block, f"conv{n}"), getattr(block, f"bn{n}"), dtype) for n in numbers]
            shortcut = None if block.downsample is None else Folded(block.downsample[0], block.downsample[1], dtype)
            self.blocks.append((shortcut, convs))

    def __call__(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.stem(x.to(self.dtype)))
        for shortcut, (*convs, last) in self.blocks:
            y = x if shortcut is None else shortcut(x, relu=False)
            for conv in convs:
                x = conv(x)
            x = last.onto(y, x)
        return x.mean((2, 3))
