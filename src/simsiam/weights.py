"""A run's encoder on disk: its weights, and all that its use needs to know."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from simsiam.compute import Compute, computes_bf16, probe_encoder
from simsiam.config import UserError, fill, read_recipe, table_of
from simsiam.encoders import Encoder, EncoderSpec, build
from simsiam.features import Preprocessing
from simsiam.runs import ENCODER, ENVIRONMENT, RECIPE, read_json, read_kept, read_tensors, write_json, write_tensors


def save_encoder(run: Path, encoder: Encoder, prepare: Preprocessing, seed: int, about: dict[str, Any]) -> None:
    """Writes `encoder.safetensors` with the backbone's own names and `encoder.json` with all that its use needs."""
    weights = run / f"{ENCODER}.safetensors"
    write_tensors(weights, encoder.backbone.state_dict())
    meta = {
        "format": 1,
        "encoder": table_of(encoder.spec),
        "seed": seed,
        "dim": encoder.dim,
        "preprocessing": asdict(prepare),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **about,
    }
    write_json(run / f"{ENCODER}.json", meta)


def read_encoder(run: Path) -> tuple[Encoder, Preprocessing, dict[str, Any]]:
    """A run's encoder in eval mode, its preprocessing and the contents of `encoder.json`.

    Raises UserError if `run` has none (yet), the two files do not belong together, or another version of timm or
    torchvision builds a different network.
    """
    description, weights = run / f"{ENCODER}.json", run / f"{ENCODER}.safetensors"
    if not os.path.exists(description):  # Path's own raises if a folder above may not be entered
        begun = os.path.exists(run / RECIPE)
        resume = (
            f" Its training has not finished: `simsiam train --resume -o {shlex.quote(str(run))}`." if begun else ""
        )
        raise UserError(f"{run} holds no trained encoder.{resume or ' Name a folder that `simsiam train` wrote.'}")
    meta = read_json(description)
    try:
        spec = fill(EncoderSpec, meta["encoder"], "encoder")
        prepare = fill(Preprocessing, meta["preprocessing"], "preprocessing")
        _ = meta["seed"], meta["sha256"]
    except (KeyError, TypeError):
        raise UserError(f"{description} is damaged: it does not describe an encoder.") from None
    try:
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"Cannot read {weights}: {error.strerror}.") from None
    if sha256 != meta["sha256"]:
        raise UserError(f"{weights} is not the file that {description.name} describes: copy both from the same run.")
    encoder = build(spec, meta["seed"])
    try:
        encoder.backbone.load_state_dict(read_tensors(weights)[0])
    except RuntimeError:  # names or shapes differ from those in training
        raise UserError(
            f"{weights} does not fit {spec.name} as it is built here: install the versions listed in "
            f"{run / ENVIRONMENT}."
        ) from None
    return encoder.eval(), prepare, meta


def failure(run: str | Path, meta: dict[str, Any]) -> str | None:
    """What the user of a run's encoder, described by its `encoder.json`, has to know if training failed; None if not."""
    verdict, step = meta.get("verdict"), meta.get("step")
    return {
        "diverged": f"{run} diverged: this is the last encoder that was healthy, from step {step}.",
        "collapsed": f"{run} collapsed: its vectors are nearly the same for all images.",
        "partial": f"{run} collapsed partly: its vectors use few directions.",
    }.get(str(verdict))


def compute_of(run: Path, encoder: Encoder, prepare: Preprocessing, device: torch.device) -> Compute:
    """How to compute with a run's encoder on a device: in its training precision, so that results match those at the
    end of training and are the same every time. If that is unknown, was chosen on another kind of device or would be
    emulated here, the faster precision is measured and used."""
    found: Any = None
    if (run / RECIPE).exists() and (run / ENVIRONMENT).exists():
        same = str(read_kept(run / ENVIRONMENT).get("device")).partition(":")[0] == device.type
        found = read_recipe(run / RECIPE).get("train", {}).get("precision") if same else None
    emulated = found == "bf16" and not computes_bf16(device)
    if found not in ("bf16", "fp32") or emulated:
        found = probe_encoder(encoder, prepare.size, device)
    return Compute(device, found)
