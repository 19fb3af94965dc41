"""Export a run's encoder to torchvision, timm, safetensors or ONNX; checked against ours before it is kept."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simsiam.config import UserError, as_path, did_you_mean
from simsiam.data.decode import MAX_ASPECT
from simsiam.data.views import normalise
from simsiam.encoders import OURS, Encoder, ResNet, build, timm_options, torchvision_options
from simsiam.features import Preprocessing
from simsiam.runs import ENCODER, RECIPE, atomic, make_writable, read_tensors, write_tensors
from simsiam.weights import failure, read_encoder

TARGETS = ("torchvision", "timm", "onnx", "safetensors")
TOLERANCE = 1e-4
"""Largest accepted difference of a feature, relative to the largest feature."""

_ELSE = "Use --to safetensors (its weights) or --to onnx (the whole network)."
_OPSET = 18


@dataclass(frozen=True)
class _Target:
    """How one kind of file is written, and how its software reads it."""

    save: Callable[[Path], None]
    features: Callable[[Path, Tensor], Tensor]
    """(file, uint8 images [B,3,H,W]) -> [B,dim]"""
    use: str
    """A line of Python that reads FILE."""


def export(
    run: str | Path, to: str, out: str | Path | None = None, *, with_preprocessing: bool = False
) -> dict[str, Any]:
    """Writes the encoder of `run` to a file that other software can read.

    Args:
        to: "torchvision" or "timm": a state dict, tensors only, for that library's model of the same name;
            "safetensors": the weights, with what is needed to use them in the header;
            "onnx": the network, float32 [B,3,size,size] -> [B,dim], for any B.
        out: the file, or a folder for it; None: `export/` in the run folder.
        with_preprocessing: ONNX only: the network takes uint8 pixels [B,H,W,3] of any size.
    Returns {"run", "to", "path", "dim", "max_error", "preprocessing", "use"}: `max_error` is the largest difference
    from our features on random images, relative to the largest feature; `preprocessing` what remains to be done before
    the network; `use` a line of Python that reads the file.
    Raises UserError if the encoder has no counterpart there, or a package is missing.
    """
    if to not in TARGETS:
        raise UserError(f"Cannot export to {to!r}.{did_you_mean(to, TARGETS)}")
    if with_preprocessing and to != "onnx":
        raise UserError("--with-preprocessing is for --to onnx: the other files hold weights and compute nothing.")
    run = as_path(run)
    encoder, prepare, meta = read_encoder(run)
    if failed := failure(run, meta):
        warnings.warn(failed, stacklevel=2)
    about = {key: meta[key] for key in ("encoder", "dim", "preprocessing", "sha256")}
    name = encoder.spec.name.replace("/", "-")
    if to == "onnx":
        target = _onnx(encoder, prepare, about, with_preprocessing)
        name += "-pixels.onnx" if with_preprocessing else ".onnx"
    elif to == "safetensors":
        target = _safetensors(encoder, prepare, about)
        name += ".safetensors"
    else:
        target = _state_dict(to, encoder, prepare)
        name += f"-{to}.pth"
    path = _place(run / "export" if out is None else as_path(out), name)
    make_writable(path.parent)

    side = prepare.short_side
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, side, side + side // 3), dtype=torch.uint8, generator=draws)
    with torch.inference_mode():
        wanted = encoder(prepare(images))
    with atomic(path) as file:
        target.save(file)
        with torch.inference_mode():
            found = target.features(file, images)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE:  # also if it is NaN
            raise UserError(f"The features of {to}'s {encoder.spec.name} differ from ours by {error:.2g}: not kept.")
    return {
        "run": str(run),
        "to": to,
        "path": str(path),
        "dim": encoder.dim,
        "max_error": error,
        "preprocessing": None if with_preprocessing else meta["preprocessing"],
        "use": target.use.replace("FILE", repr(str(path))),
    }


def _place(out: Path, name: str) -> Path:
    """The file to write: `out`, or `name` inside it if it is a folder, or does not exist and has no extension.

    Raises UserError if that would overwrite a file of another kind, or a run's own."""
    path = out / name if out.is_dir() or not (out.suffix or out.exists()) else out
    own_weights = path.name == f"{ENCODER}.safetensors" and path.with_suffix(".json").exists()
    of_a_run = own_weights or (path.parent.name == "checkpoints" and (path.parents[1] / RECIPE).exists())
    if path.exists() and (of_a_run or path.suffix != Path(name).suffix):
        raise UserError(f"{path} exists and is not an export: choose another -o.")
    return path


def _safetensors(encoder: Encoder, prepare: Preprocessing, about: dict[str, Any]) -> _Target:
    def save(file: Path) -> None:
        write_tensors(file, encoder.backbone.state_dict(), {key: json.dumps(value) for key, value in about.items()})

    def features(file: Path, images: Tensor) -> Tensor:
        twin = build(encoder.spec, 0)
        twin.backbone.load_state_dict(read_tensors(file)[0])
        return twin.eval()(prepare(images))

    return _Target(save, features, "import safetensors.torch; weights = safetensors.torch.load_file(FILE)")


# --- torchvision and timm -------------------------------------------------------------------------------------------


def _state_dict(library: str, encoder: Encoder, prepare: Preprocessing) -> _Target:
    weights = {name: value.contiguous() for name, value in encoder.backbone.state_dict().items()}
    model, make = _counterpart(library, encoder)
    heads = _fit(model, weights, library, encoder)

    def save(file: Path) -> None:
        try:
            with open(file, "wb") as opened:  # given a path, torch would store its name
                torch.save(weights, opened)
        except RuntimeError as error:  # a full disk, most often
            raise OSError(str(error)) from None

    def features(file: Path, images: Tensor) -> Tensor:
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()(prepare(images))

    strict = "" if library == "timm" else ", strict=False"
    load = f"model.load_state_dict(torch.load(FILE, weights_only=True){strict})"
    bare = "".join(f"; model.set_submodule({head!r}, torch.nn.Identity())" for head in heads)
    return _Target(save, features, f"import torch, {library}; {make}; {load}{bare}; model.eval()")


def _counterpart(library: str, encoder: Encoder) -> tuple[nn.Module, str]:
    """The library's own model of the encoder's name, and code that creates it. Raises UserError if it has none."""
    spec, backbone = encoder.spec, encoder.backbone
    ours = spec.name in OURS
    name = spec.name.partition("-")[2] if ours else spec.name.removeprefix("timm/")
    try:
        if library == "torchvision":
            from torchvision import models

            options = torchvision_options(name, spec.size)
            model = models.get_model(name, weights=None, **options)
            make = f"model = torchvision.models.{name}({_arguments(options, 'num_classes=10')})"
        else:
            import timm

            options = timm_options(name, spec.size)
            model = timm.create_model(name, pretrained=False, num_classes=0, **options)
            make = f"model = timm.create_model({_arguments(options, repr(name), 'num_classes=0')})"
    except (ValueError, RuntimeError, TypeError):
        raise UserError(f"{library} has no {name} that matches the encoder {spec.name}. {_ELSE}") from None
    if ours:
        assert isinstance(backbone, ResNet)
        # After the stem, at width 64, ours is the same network with the same names.
        stem = backbone.conv1
        model.conv1 = nn.Conv2d(3, stem.out_channels, 3, stem.stride, 1, bias=False)  # type: ignore[arg-type]
        make += f"; model.conv1 = torch.nn.Conv2d(3, {stem.out_channels}, 3, {stem.stride[0]}, 1, bias=False)"
        if isinstance(backbone.maxpool, nn.Identity):
            model.maxpool = nn.Identity()
            make += "; model.maxpool = torch.nn.Identity()"
    return model, make


def _arguments(options: dict[str, Any], *first: str) -> str:
    return ", ".join([*first, *(f"{key}={value!r}" for key, value in options.items())])


def _fit(model: nn.Module, weights: dict[str, Tensor], library: str, encoder: Encoder) -> list[str]:
    """Removes `model`'s classifier, which the weights lack, and returns its name. Raises UserError if they lack more or
    do not fit."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError:  # other shapes
        missing, unexpected = [], ["shapes"]
    heads = {name.rpartition(".")[0] for name in missing}
    width = encoder.backbone.conv1.out_channels if isinstance(encoder.backbone, ResNet) else 64
    classifiers = 1 if library == "torchvision" else 0  # timm builds the model without one
    if unexpected or len(heads) != classifiers or "" in heads:
        why = f", which is 64 channels wide, not {width}" if width != 64 else ""
        raise UserError(f"The weights of {encoder.spec.name} do not fit into {library}'s model{why}. {_ELSE}")
    for head in heads:
        model.set_submodule(head, nn.Identity())
    return sorted(heads)


# --- ONNX -----------------------------------------------------------------------------------------------------------


class FromPixels(nn.Module):
    """An encoder with `Preprocessing` in front of it; all images of a batch have the same size.

    Elsewhere, `decode` reduces a large image with Pillow's bicubic filter and `plain_view` enlarges a small one
    bilinearly. Here both are two small matrices that depend only on height and width, so that these may vary. The
    features are those of `load(run).embed` on the same pixels; for a large JPEG file, which `decode` reads at a reduced
    scale, they differ slightly.
    """

    def __init__(self, encoder: nn.Module, prepare: Preprocessing) -> None:
        super().__init__()
        self.encoder, self.prepare = encoder, prepare

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> features [B,dim]."""
        # Lengths come from an index, so that they stay variables when the network is traced.
        rows, columns = (torch.arange(pixels.shape[axis], device=pixels.device) for axis in (1, 2))
        height, width = rows[-1:] + 1, columns[-1:] + 1
        short = torch.minimum(height, width)
        w_y, w_x = self._resampling(rows, height, short), self._resampling(columns, width, short)
        x = self._kept(pixels.permute(0, 3, 1, 2).float() @ w_x.mT, short)
        x = self._kept(w_y @ x, short)
        return self.encoder(normalise(x, self.prepare.mean, self.prepare.std))

    def _kept(self, x: Tensor, short: Tensor) -> Tensor:
        """Clamps; if reducing, also rounds like Pillow after each direction. `plain_view`, which enlarges, does not."""
        x = x.clamp(0, 255)
        return torch.where(short > self.prepare.short_side, x.round(), x)

    def _resampling(self, source: Tensor, length: Tensor, short: Tensor) -> Tensor:
        """Matrix [size, length] that resizes the short side to `short_side` and keeps the central `size` pixels."""
        size, side = self.prepare.size, self.prepare.short_side
        reduce = short > side
        box = torch.minimum(length, MAX_ASPECT * short)
        resized = torch.div(side * box, short, rounding_mode="floor").float()
        step = box / resized
        start = ((resized - size) / 2).round() + torch.arange(size, device=source.device) + 0.5
        centre = torch.div(length - box, 2, rounding_mode="floor") + start * step
        d = (source + 0.5 - centre[:, None]).abs() / step.clamp(min=1)
        triangle = (1 - d).clamp(min=0)
        cubic = torch.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
        weight = torch.where(reduce, torch.where(d < 2, cubic, 0.0), triangle)
        return weight / weight.sum(1, keepdim=True)


def _onnx(encoder: Encoder, prepare: Preprocessing, about: dict[str, Any], from_pixels: bool) -> _Target:
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"ONNX needs {' and '.join(lacking)}: pip install 'simsiam[onnx]'.")
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    network: nn.Module
    if from_pixels:
        name, network = "pixels", FromPixels(encoder, prepare).eval()
        example = torch.zeros(2, prepare.size + 3, prepare.size + 5, 3, dtype=torch.uint8)
        dynamic = {0: batch, 1: height, 2: width}
    else:
        name, network = "images", nn.Sequential(encoder).eval()
        example, dynamic = torch.zeros(2, 3, prepare.size, prepare.size), {0: batch}

    def save(file: Path) -> None:
        with warnings.catch_warnings():
            # torch 2.11 warns about one of its own classes.
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            try:
                program = torch.onnx.export(
                    network,
                    (example,),
                    dynamo=True,
                    opset_version=_OPSET,
                    input_names=[name],
                    output_names=["features"],
                    dynamic_shapes=(dynamic,),
                    verbose=False,
                )
            except torch.onnx.OnnxExporterError as error:
                reason = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error.__cause__ or error)).split())[:200]
                raise UserError(f"torch cannot export {encoder.spec.name} to ONNX ({reason}).") from None
        assert program is not None
        program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
        program.save(str(file), external_data=False)

    def features(file: Path, images: Tensor) -> Tensor:
        session = importlib.import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
        x = images.permute(0, 2, 3, 1) if from_pixels else prepare(images)
        result: NDArray[np.float32] = session.run(None, {name: x.contiguous().numpy()})[0]
        return torch.from_numpy(result)

    run = f"onnxruntime.InferenceSession(FILE).run(None, {{'{name}': {name}}})[0]"
    return _Target(save, features, f"import onnxruntime; features = {run}")
