"""Import the authors' released checkpoints as run folders that every other command accepts.

Their pre-training file is {"epoch", "arch", "state_dict", "optimizer"} with the tensors `module.encoder.*` (a
torchvision ResNet whose fc is the projection MLP) and `module.predictor.*`; their linear-classification file has the
names of the plain ResNet. Both are pickles: only tensors and plain values are read; a file with code in it is refused.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simsiam import methods
from simsiam.compute import describe
from simsiam.config import Table, UserError, as_path, did_you_mean, merge, write_recipe
from simsiam.encoders import build
from simsiam.recipe import Recipe, gather, read
from simsiam.runs import ENVIRONMENT, RECIPE, SUMMARY, Checkpoints, write_json, write_text
from simsiam.weights import save_encoder

_SIZE = 224
_FROZEN = "encoder.fc.6.bias"
"""Bias of the last projector layer: in their optimiser but never trained; the BN that follows cancels it."""


def import_released(
    checkpoint: str | Path, out: str | Path, *, encoder: str | None = None, data: str | Path | None = None
) -> dict[str, Any]:
    """Turns a released `.pth.tar`, or a file with the same names, into the run folder `out`.

    Args:
        checkpoint: from pre-training (encoder, heads, momentum) or from linear classification (encoder only).
        encoder: one of torchvision's ResNets; None: the `arch` in the file.
        data: the data of `simsiam evaluate RUN` without DATA; None: torchvision's ImageNet, if it is found.
    Returns the run's summary, as `train` does; values that the file does not contain are None.
    Raises UserError, and writes nothing, if the file holds code, is not a checkpoint, or does not fit.
    """
    path, run = as_path(checkpoint), as_path(out)
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        raise UserError(f"{run} exists already: choose another -o.")
    file = _read(path)
    weights = _weights(file, path)
    pretraining = any(name.startswith("encoder.") for name in weights)
    plan = _recipe(file, weights, path, encoder, data, pretraining)
    found = build(plan.encoder, plan.seed)
    method = methods.get(plan.method).Method(found, plan.method_settings)
    target = method if pretraining else found.backbone
    names = {released_name(name): name for name in target.state_dict()}
    _load(target, names, weights, path)

    # Both views pass through the first BN in every step; linear classification leaves it in eval mode.
    steps = int(weights["encoder.bn1.num_batches_tracked" if pretraining else "bn1.num_batches_tracked"]) // 2
    momentum = _momentum(method, file.get("optimizer")) if pretraining else {}
    with open(path, "rb") as opened:
        origin = {"file": str(path.resolve()), "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
    known = ["encoder"] + ["method.dim", "method.predictor_hidden"] * pretraining
    known += ["train.epochs"] * (pretraining and bool(file.get("epoch")))
    note = f"# Imported from {path.name}. From the file: {', '.join(known)}. The rest is the recipe `imagenet`.\n\n"
    write_text(run / RECIPE, note + write_recipe(plan.table()))
    write_json(run / ENVIRONMENT, {**describe(), "imported": origin["file"], "sha256": origin["sha256"]})
    if pretraining:
        tensors = {f"method.{name}": value for name, value in method.state_dict().items()}
        state = {"step": steps, "seconds": 0.0, "training_seconds": 0.0, "fingerprint": "", "latest": {}}
        Checkpoints(run).save(steps, tensors | momentum, state, healthy=True)
    about = {"method": plan.method, "data": plan.data, "step": steps, "verdict": None}
    save_encoder(run, found.eval(), plan.prepare, plan.seed, about)
    unknown = ("images", "held_out", "seconds", "images_per_second", "loss", "std", "effective_rank", "most_rank")
    summary: dict[str, Any] = {
        "run": str(run),
        "data": plan.data,
        "method": plan.method,
        "encoder": plan.encoder.name,
        **dict.fromkeys(unknown),
        "bad_files": [],
        "epochs": file.get("epoch") if pretraining else None,
        "steps": steps,
        "dim": plan.method_settings.dim if pretraining else None,
        "encoder_step": steps,
        "verdict": None,
        "evidence": f"imported from {path.name}",
        "advice": None,
        "knn": None,
        "imported": {**origin, "heads": pretraining, "momentum": bool(momentum)},
    }
    write_json(run / SUMMARY, summary)
    return summary


def _read(path: Path) -> Table:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols that torch does not write
            file = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # torch raises all kinds of errors on a broken file
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{path} holds more than tensors: it refers to {code[1]}, and code in a file is never run. Save the "
                'weights alone: torch.save({"arch": NAME, "state_dict": model.state_dict()}, FILE).'
            ) from None
        raise UserError(f"{path} is not a PyTorch checkpoint, or is damaged: give a .pth.tar file.") from None
    if not isinstance(file, dict):
        raise UserError(f"{path} holds a {type(file).__name__}, not a checkpoint with a state_dict.")
    return file


def _weights(file: Table, path: Path) -> dict[str, Tensor]:
    """The state dict, without the prefix `module.` that DistributedDataParallel adds to every name."""
    state = file.get("state_dict", file)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path} has no state_dict with weights in it.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} has no state_dict: {name!r} in it is not the name of a tensor.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _recipe(
    file: Table, weights: dict[str, Tensor], path: Path, encoder: str | None, data: str | Path | None, heads: bool
) -> Recipe:
    """The recipe `imagenet`, with the settings found in the file."""
    from torchvision import models

    arch = encoder or file.get("arch")
    named = {name: models.get_model_builder(name) for name in models.list_models(module=models)}
    known = [name for name, builder in named.items() if builder.__module__ == models.resnet.__name__]
    if not isinstance(arch, str):
        raise UserError(
            f"{path} does not name its encoder, as the released code's checkpoints do: if it is of one of torchvision's "
            "ResNets, add --encoder resnet50, for example."
        )
    if arch not in known:
        raise UserError(
            f"{path} has the encoder {arch!r}; the released code trains ResNets.{did_you_mean(arch, known)}"
        )
    told: Table = {"encoder": {"name": arch, "size": _SIZE}}
    if heads:
        for name in ("encoder.fc.6.weight", "predictor.0.weight"):
            if name not in weights or weights[name].ndim != 2:
                raise UserError(f"{path} is not a checkpoint of the released SimSiam: it has no matrix {name}.")
        widths = {
            "dim": len(weights["encoder.fc.6.weight"]),
            "predictor_hidden": len(weights["predictor.0.weight"]),
        }
        told |= {"method": widths, "train": {"epochs": file["epoch"]} if file.get("epoch") else {}}
    table = merge(gather(data, "imagenet", [], {}), told)
    if data is None:  # wherever it will be when it is wanted
        table["data"] = "ImageNet"
    return read({"seed": 0, "eval": {"size": _SIZE}, **table})


def released_name(name: str) -> str:
    """The released code's name for our tensor `name`; those of a backbone alone are the same."""
    return re.sub("^projector", "encoder.fc", re.sub("^encoder.backbone", "encoder", name))


def _load(target: nn.Module, names: dict[str, str], weights: dict[str, Tensor], path: Path) -> None:
    """Copies the file's tensors into ours. Raises UserError if names or shapes are not exactly as expected."""
    own = target.state_dict()
    shapes = {name: own[ours].shape for name, ours in names.items()}
    heads = "encoder.fc.6.weight" in names
    if heads:
        shapes[_FROZEN] = shapes["encoder.fc.6.weight"][:1]
    spare = () if heads else ("fc.weight", "fc.bias")  # the classifier
    faults = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in weights if name not in shapes and name not in spare],
        "of another shape": [name for name in shapes if name in weights and weights[name].shape != shapes[name]],
    }
    if any(faults.values()):
        told = "; ".join(
            f"{what}: {', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}"
            for what, found in faults.items()
            if found
        )
        raise UserError(f"{path} is not what the released code saves. Tensors {told}. Another --encoder may fit.")
    tensors = {ours: weights[name] for name, ours in names.items()}
    if heads:
        # Ours has no bias there: W x + b - mean = W x - (mean - b).
        mean = names["encoder.fc.7.running_mean"]
        tensors[mean] = tensors[mean] - weights[_FROZEN]
    target.load_state_dict(tensors)


def _momentum(method: Any, state: Any) -> dict[str, Tensor]:
    """Their SGD's momentum buffers, numbered like our parameters; {} if the file has none that fit.

    torch numbers an optimiser's parameters. Theirs, with and without --fix-pred-lr, are the encoder's, including its fc
    with the frozen bias, then the predictor's. Ours are the same without that bias. The learning rate is not part of
    the buffers, so they need no conversion.
    """
    trained = [parameter for group in method.param_groups() for parameter in group["params"]]
    frozen = 1 + next(i for i, parameter in enumerate(trained) if parameter is method.projector[6].weight)
    try:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        del numbers[frozen]
        buffers = [state["state"][number]["momentum_buffer"] for number in numbers]
    except (KeyError, IndexError, TypeError):
        return {}
    if [getattr(buffer, "shape", None) for buffer in buffers] != [parameter.shape for parameter in trained]:
        return {}
    return {f"optimizer.{i}.momentum_buffer": buffer for i, buffer in enumerate(buffers)}
