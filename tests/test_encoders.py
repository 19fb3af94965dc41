"""Backbones: ours against torchvision's, and any encoder against the contract [B,3,h,w] -> [B,dim]."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from simsiam import kernels
from simsiam.compute import Compute, computes_bf16
from simsiam.config import UserError, table_of
from simsiam.convolutions import on_matrix_units
from simsiam.encoders import BasicBlock, Encoder, EncoderSpec, ResNet, build, in_use, names


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def last_norms(backbone: nn.Module) -> list[Tensor]:
    """Return the weights of the last BN of every basic block (ours, torchvision's or timm's)."""
    return [block.bn2.weight for block in backbone.modules() if type(block).__name__ == "BasicBlock"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("depth", "training"), [("resnet18", True), ("resnet18", False), ("resnet34", False)])
def test_stages_are_torchvisions(depth: str, training: bool) -> None:
    """The stem differs by design; after it, weights load strictly and every stage gives the same output."""
    torch.manual_seed(0)
    theirs = models.get_model(depth, weights=None).train(training)
    for module in theirs.modules():  # statistics and scales other than 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    ours = build(EncoderSpec(f"cifar-{depth}", 32), 0).backbone.train(training)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        getattr(ours, stage).load_state_dict(getattr(theirs, stage).state_dict(), strict=True)
    ours, theirs = ours.double(), theirs.double()  # the last stage has only two values per variance
    x = y = torch.randn(2, 64, 8, 8).double()
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        x, y = getattr(ours, stage)(x), getattr(theirs, stage)(y)
        torch.testing.assert_close(x, y)
    assert (
        sum(p.numel() for p in ours.parameters())
        == sum(p.numel() for name, p in theirs.named_parameters() if not name.startswith(("conv1", "fc"))) + 64 * 3 * 9
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvisions_resnets_run_as_ours_and_stay_theirs(name: str, dtype: torch.dtype) -> None:
    """Features, gradients and BN statistics; our float32 network is as close to float64 as theirs."""

    def run(model: nn.Module, kind: torch.dtype) -> list[Tensor]:
        model = copy.deepcopy(model).to(kind, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        features = model(images(64, batch=8).to(kind))
        features.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [features.detach(), *gradients, *(each for each in model.buffers() if each.is_floating_point())]

    ours = build(EncoderSpec(name, 64, zero_init_residual=False), 0)
    assert isinstance(ours.backbone, ResNet)
    theirs = models.get_model(name, weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.backbone.state_dict(), strict=True)
    found, plain, exact = run(ours, dtype), run(theirs, dtype), run(theirs, torch.float64)
    assert len(found) == len(exact)
    for one, other, right in zip(found, plain, exact, strict=True):
        own, rounding = ((each.double() - right).norm() / right.norm() for each in (one, other))
        assert own < (1e-9 if dtype == torch.float64 else 1e-6 + 3 * rounding)


def test_features_of_ours_are_the_spatial_mean_of_the_last_stage() -> None:
    encoder = build(EncoderSpec("thin-resnet18", 32), 0).eval()
    maps: list[Tensor] = []
    encoder.backbone.layer4.register_forward_hook(lambda *args: maps.append(args[2]))  # type: ignore[union-attr]
    features = encoder(images(32))
    torch.testing.assert_close(features, maps[0].flatten(2).mean(2))
    assert maps[0].shape == (2, 128, 4, 4)


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [("cifar-resnet18", 96, 8), ("thin-resnet18", 48, 8), ("thin-resnet18", 64, 16), ("thin-resnet34", 160, 32)],
)
def test_default_stem_follows_the_view_size(name: str, size: int, stride: int) -> None:
    backbone = build(EncoderSpec(name, size, width=8), 0).backbone
    side: list[int] = []
    backbone.layer4.register_forward_hook(lambda *args: side.append(args[2].shape[-1]))  # type: ignore[union-attr]
    backbone(images(size))
    assert side == [size // stride]


def test_stem_and_width_are_as_asked() -> None:
    for stem, side in ((1, 8), (2, 4), (4, 2)):
        encoder = build(EncoderSpec("thin-resnet18", 64, width=8, stem=stem), 0)
        before: list[int] = []
        encoder.backbone.layer4.register_forward_hook(lambda *args, to=before: to.append(args[2].shape[-1]))  # type: ignore[union-attr]
        assert encoder(images(64)).shape == (2, encoder.dim) == (2, 64) and before == [side]


# Covers all conventions for heads, sizes and auxiliary outputs in torchvision and timm.
@pytest.mark.parametrize(
    ("name", "size", "dim"),
    [
        ("thin-resnet18", 32, 128),
        ("thin-resnet34", 64, 128),
        ("cifar-resnet18", 32, 512),
        ("resnet18", 64, 512),
        ("resnet50", 64, 2048),
        ("vit_b_16", 224, 768),
        ("vit_b_32", 64, 768),
        ("googlenet", 64, 1024),
        ("squeezenet1_1", 64, 512),
        ("mobilenet_v3_small", 64, 1024),
        ("regnet_y_400mf", 64, 440),
        ("densenet121", 64, 1024),
        ("swin_t", 64, 768),
        ("timm/resnet18", 64, 512),
        ("timm/vit_tiny_patch16_224", 64, 192),
        ("timm/resnet18.a1_in1k", 64, 512),
        ("mobilenetv3_small_100", 64, 1024),
        ("convnext_tiny", 32, 768),
    ],
)
def test_any_backbone_gives_a_vector_for_each_image(name: str, size: int, dim: int) -> None:
    state = torch.random.get_rng_state()
    encoder = build(EncoderSpec(name, size), 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    # Measuring the width has no side effects: initial BN statistics, training mode, no gradients.
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 0 and module.running_mean.count_nonzero() == 0
        assert module.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    out = encoder(images(size, batch=3))  # in training mode, where auxiliary classifiers would be active
    assert out.shape == (3, encoder.dim) == (3, dim) and out.dtype == torch.float32 and out.isfinite().all()


def test_inception_takes_what_it_can_and_says_what_it_cannot() -> None:
    assert build(EncoderSpec("inception_v3", 75), 0).dim == 2048
    with pytest.raises(UserError, match=r"inception_v3 cannot take 32-pixel views .*--size"):
        build(EncoderSpec("inception_v3", 32), 0)


@pytest.mark.parametrize(
    ("name", "size"), [("alexnet", 32), ("vit_b_32", 60), ("maxvit_t", 64), ("timm/efficientformer_l1", 96)]
)
def test_a_size_that_does_not_fit_is_the_users_mistake(name: str, size: int) -> None:
    with pytest.raises(UserError, match=f"{name} cannot take {size}-pixel views") as error:
        build(EncoderSpec(name, size), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["thin-resnet18", "shufflenet_v2_x0_5", "timm/resnet10t"])
def test_weights_are_a_function_of_the_seed(name: str) -> None:
    spec = EncoderSpec(name, 64)
    first = build(spec, 7).state_dict()
    torch.manual_seed(99)
    again, other = build(spec, 7).state_dict(), build(spec, 8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key in first if first[key].ndim == 4]
    assert weights and not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize(
    ("name", "default"),
    [("thin-resnet18", False), ("cifar-resnet18", True), ("resnet18", True), ("timm/resnet18", True)],
)
def test_zero_init(name: str, default: bool) -> None:
    for asked in (None, True, False):
        encoder = build(EncoderSpec(name, 32, zero_init_residual=asked), 0)
        norms = last_norms(encoder.backbone)
        assert len(norms) == 8
        zero = default if asked is None else asked
        assert all(bool((norm == (0 if zero else 1)).all()) for norm in norms)


def test_a_zero_block_is_the_identity() -> None:
    backbone = build(EncoderSpec("cifar-resnet18", 32), 0).backbone
    block = backbone.layer1[0]  # type: ignore[index]
    assert isinstance(block, BasicBlock)
    x = torch.randn(2, 64, 8, 8).relu()
    assert torch.equal(block(x), x)


def test_only_classifiers_are_listed() -> None:
    homes = {name: models.get_model_builder(name).__module__ for name in names() if "-" not in name}
    assert {"resnet50", "vit_b_16", "convnext_tiny"} <= homes.keys() and len(names()) == len(set(names()))
    kinds = ("detection", "segmentation", "video", "quantization", "optical_flow")
    assert not [name for name, home in homes.items() if any(kind in home for kind in kinds)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EncoderSpec("resnet81", 32), "Unknown encoder 'resnet81'.* Did you mean 'resnet"),
        (EncoderSpec("resnet51", 32), "Unknown encoder 'resnet51'.* Did you mean 'resnet50'"),  # timm has a resnet51q
        (EncoderSpec("timm/resnet_18", 32), "Did you mean 'timm/resnet18'"),
        (EncoderSpec("xyzzy", 32), "'xyzzy'. `simsiam list`"),
        (EncoderSpec("thin-resnet18", 32, stem=3), "1, 2 or 4"),
        (EncoderSpec("thin-resnet18", 32, width=4), "at least 8"),
        (EncoderSpec("resnet18", 32, width=32), "resnet18 has no such setting"),
        (EncoderSpec("timm/resnet18", 32, stem=1), "timm/resnet18 has no such setting"),
        (EncoderSpec("vgg11", 32, zero_init_residual=True), "vgg11 has no such setting"),
        (EncoderSpec("timm/convnext_atto", 32, zero_init_residual=False), "convnext_atto has no such setting"),
    ],
)
def test_mistakes_are_named(spec: EncoderSpec, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(spec, 0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_the_table_builds_the_same_encoder() -> None:
    spec = EncoderSpec("thin-resnet18", 32, width=8, zero_init_residual=False)
    assert EncoderSpec(**table_of(spec)) == spec and None not in table_of(spec).values()


@pytest.mark.parametrize(
    "spec",
    [
        *(EncoderSpec(name, 33, width=8, stem=stem) for name in ("cifar-resnet18", "thin-resnet18") for stem in (1, 2)),
        EncoderSpec("resnet50", 33, zero_init_residual=False),
    ],
    ids=str,
)
def test_the_convolutions_of_a_gpu_are_the_same(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and gradients, also for sides that are not a multiple of the stride."""
    encoder = build(spec, 0).double().train()
    found = []
    for gpu in (False, True):
        if gpu:
            monkeypatch.setattr("simsiam.encoders._conv", on_matrix_units)
        encoder.zero_grad()
        features = encoder(torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(0)).double())
        features.square().sum().backward()
        found.append([features, *(parameter.grad for parameter in encoder.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spec", [EncoderSpec("thin-resnet18", 16, width=8), EncoderSpec("resnet50", 40)], ids=str)
def test_views_in_one_pass_are_views_one_by_one(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features, gradients and BN statistics for views of two sizes, with the code that is compiled, but uncompiled."""
    one_by_one = build(spec, 0).double()
    together, side = copy.deepcopy(one_by_one), spec.size
    views = [images(side, batch=3).double() for _ in range(2)] + [images(side - 8, batch=3).double() for _ in range(5)]
    passes: list[int] = []
    together.backbone.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    alone = one_by_one.each(views)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    joined = together.each(views)
    assert passes == [6, 12, 3]
    torch.testing.assert_close(joined, alone)
    for features in (alone, joined):
        sum((h.square() * (i + 1)).sum() for i, h in enumerate(features)).backward()  # type: ignore[union-attr]
    for one, other in zip(one_by_one.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(one_by_one.buffers(), together.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(kernels.compiled() is None, reason="there are no kernels here")
@pytest.mark.parametrize("spec", [EncoderSpec("thin-resnet18", 16, width=8), EncoderSpec("resnet50", 40)], ids=str)
def test_kernels_take_all_views_in_one_pass(spec: EncoderSpec) -> None:
    """But with statistics of their own: torch's operations, view by view, give the same features and gradients."""
    views = [images(spec.size, batch=3) for _ in range(2)]
    found, passes = [], []
    for kernels_are_used in (True, False):
        encoder = build(spec, 0).to(memory_format=torch.channels_last)
        encoder.backbone.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
        with contextlib.nullcontext() if kernels_are_used else kernels.off():
            h = encoder.each(views)
            sum((each.square() * (i + 1)).sum() for i, each in enumerate(h)).backward()  # type: ignore[union-attr]
        found.append([*h, *(each.grad for each in encoder.parameters()), *encoder.buffers()])
    assert passes == [6, 3, 3]
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()


# --- in use -----------------------------------------------------------------------------------------------------------


def trained(name: str, size: int, **settings: int) -> Encoder:
    """The network with BN statistics, scales and shifts other than 0 and 1, in channels_last and eval mode."""
    encoder = build(EncoderSpec(name, size, **settings), 0)
    torch.manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        encoder.train()(images(size, batch=8))
    Compute(torch.device("cpu"), "fp32").place(encoder)
    return encoder.eval()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("thin-resnet18", 32, {}),
        ("thin-resnet18", 33, {"stem": 2, "width": 8}),
        ("cifar-resnet34", 40, {"stem": 4}),
        ("resnet18", 64, {}),
        ("resnet50", 65, {}),
        ("resnext50_32x4d", 64, {}),
    ],
)
def test_in_use_bn_is_folded_and_the_features_stay(
    name: str, size: int, settings: dict[str, int], precision: str
) -> None:
    """In float32 up to rounding; in bf16 as close to float32 as the original network, also for one image."""
    compute = Compute(torch.device("cpu"), precision)  # type: ignore[arg-type]
    if precision == "bf16" and not computes_bf16(compute.device):
        pytest.skip("this processor would have to emulate bf16")
    encoder = trained(name, size, **settings)
    folded = in_use(encoder, compute)
    assert folded is not encoder
    for batch in (5, 1):
        x = images(size, batch).to(memory_format=torch.channels_last)
        before = x.clone()
        with torch.inference_mode():
            expected = encoder(x)
            with compute.autocast():
                found, plain = folded(x), encoder(x)
        assert torch.equal(x, before) and found.shape == expected.shape
        assert off(found, expected) < (1e-5 if precision == "fp32" else 1.5 * off(plain, expected))


def test_what_cannot_be_folded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Compute(torch.device("cpu"), "fp32")
    ours = trained("thin-resnet18", 32, width=8)
    measuring = copy.deepcopy(ours)
    measuring.backbone.layer1[0].bn1.train()  # type: ignore[index, union-attr]
    others = [ours.double(), measuring, trained("mobilenet_v2", 32), trained("timm/resnet18", 32), lambda x: x]
    assert all(in_use(each, cpu) is each for each in others)
    assert in_use(ours.float(), cpu) is not ours
    with kernels.off():
        assert in_use(ours, cpu) is ours
    monkeypatch.setattr("simsiam.encoders.computes_bf16", lambda _: False)
    assert in_use(ours, Compute(cpu.device, "bf16")) is ours and in_use(ours, cpu) is not ours


def test_weights_that_change_are_folded_anew() -> None:
    encoder, x = trained("thin-resnet18", 32, width=8), images(32)
    compute = Compute(torch.device("cpu"), "fp32")
    with torch.inference_mode():
        first = in_use(encoder, compute)(x)
        with torch.no_grad():
            encoder.backbone.bn1.running_mean.add_(1)  # type: ignore[operator, union-attr]
        assert off(in_use(encoder, compute)(x), encoder(x)) < 1e-5 < off(first, encoder(x))
