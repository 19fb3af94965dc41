"""Defaults derived from the data and the machine, each with its reason."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from simsiam import methods
from simsiam.config import Table, UserError, counted, merge, show_duration
from simsiam.data.decode import open_image
from simsiam.data.sources import ImageSet
from simsiam.recipe import OPEN, TABLES, Recipe, TrainSettings, family, preset, read

Reasons = list[tuple[str, str, str]]
"""(setting, value, why) of every derived default."""

_SMALL_IMAGE = 48
_LOOK_AT = 200
_PATIENCE = {"cpu": 1800.0, "cuda": 4 * 3600.0, "mps": 1800.0}
"""Longest default duration of a run, in seconds."""


@dataclass(frozen=True)
class Facts:
    """What defaults are derived from."""

    images: int
    """Number of training images."""
    short_side: int
    """Median over the images, in pixels."""
    device: str
    """cpu, cuda or mps."""
    processes: int = 1
    """Each has a device."""

    @property
    def sides(self) -> str:
        """The short side in words."""
        return f"images are {self.short_side} px on their short side (median)"

    @property
    def small(self) -> bool:
        """Whether the images are CIFAR-like rather than photographs."""
        return self.short_side <= _SMALL_IMAGE


def look_at(images: ImageSet, rows: np.ndarray, device: str, processes: int = 1) -> Facts:
    """Read the headers of up to `_LOOK_AT` images. rows: the training images.

    Raises UserError if there are fewer than two training images.
    """
    if len(rows) < 2:
        raise UserError(f"{images.name} has {counted(len(rows), 'image')} to train on: at least 2 are needed.")
    sides = []
    for i in images.some(_LOOK_AT).tolist():
        try:
            sides.append(min(open_image(images.read(i)).size))
        except Exception:  # archives and plug-ins raise anything; bad files are reported during decoding
            continue
    return Facts(len(rows), int(np.median(sides)) if sides else 32, device, processes)


def check_settings(table: Table, device: str) -> None:
    """Raise the UserErrors of `resolve` for bad settings, and for a missing package, before a large set is listed."""
    plan, _ = resolve(table, Facts(1_000_000, 256, device))
    if plan.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("train.tensorboard needs TensorBoard: pip install 'simsiam[tensorboard]'.")


def resolve(table: Table, facts: Facts) -> tuple[Recipe, Reasons]:
    """Fill in what the user left open in `table`, the recipe and overrides from `gather`.

    Returns the recipe and the reason for every default that depends on the data or the machine. Epochs stay open if
    neither epochs nor budget is given: `default_epochs` decides once the speed is known.
    """
    why: Reasons = []
    table = dict(table)
    if table.pop(OPEN, False) or table.get("encoder", {}).get("name") is None:
        table = merge(_defaults(table, facts, why), table)
    table = {**{key: {} for key in TABLES}, "seed": 0, **table}
    sizes = _sizes(table, facts, why)
    train = {"batch_size": TrainSettings.batch_size, **table["train"]}
    most = largest_batch(facts.images)
    if train["batch_size"] > most:
        train["batch_size"] = min(train["batch_size"], 2 ** int(math.log2(max(2, most))))
        why = [reason for reason in why if reason[0] != "train.batch_size"]
        why.append(("train.batch_size", str(train["batch_size"]), f"there are only {facts.images:,} images"))
    full = {
        **table,
        "method": {"name": "simsiam", **table["method"]},
        "encoder": {"size": sizes["eval"], **table["encoder"]},
        "train": train,
        **{part: {**table[part], "size": size} for part, size in sizes.items()},
    }
    return read(full), why


def _defaults(table: Table, facts: Facts, why: Reasons) -> Table:
    """Return the built-in recipe that fills in what `table` leaves open, adapted to the data and the machine."""
    named = table.get("encoder", {}).get("name")
    base, reason = _base(named, facts)
    why.append(("recipe", base, reason))
    method = table.get("method", {}).get("name")
    if method is None and base == "thin":
        why.append(("method", "simsiam", "the default; in runs of minutes simclr often learns faster"))
    defaults = preset(base, method)
    defaults["train"].pop("epochs", None)
    defaults["views"].pop("size", None)

    def derive(settings: Table, reason: str) -> None:
        """Put settings over the defaults; those that the user left open are shown with the reason."""
        nonlocal defaults
        defaults = merge(defaults, settings)
        for part, rows in settings.items():
            left = {key: value for key, value in rows.items() if key not in table.get(part, {})}
            why.extend((f"{part}.{key}", _shown(value), reason) for key, value in left.items())

    if named is None and base == "imagenet" and facts.images < 200_000:
        defaults["encoder"] = {"name": "resnet18"}
        why.append(("encoder", "resnet18", f"{facts.images:,} images are few for the paper's resnet50"))
    most, module = 512 if facts.device == "cuda" else 256, methods.get(defaults["method"]["name"])
    most *= facts.processes
    papers = defaults["train"].get("batch_size", 0)
    asked = table.get("train", {}).get("batch_size", most)
    if papers > most and asked <= most:  # the paper used a hundred devices
        own = getattr(module, "ONE_DEVICE", {})
        devices = "one device" if facts.processes == 1 else f"{facts.processes} devices"
        derive(merge(own, {"train": {"batch_size": most}}), devices)
    if base == "thin" and facts.images < 20_000:
        few = {"weight_decay": 1e-4, "batch_size": 64}
        derive({"train": few}, f"{facts.images:,} images are few: more and smaller steps")
        if not facts.small:
            softer = {"jitter": [0.4, 0.4, 0.2, 0.03], "gray_p": 0.05}
            derive({"views": softer}, f"colours help to tell {facts.images:,} photographs apart")
            derive(
                getattr(module, "FEW_PHOTOGRAPHS", {}), f"measured to help with few photographs; {facts.images:,} here"
            )
    return defaults


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _sizes(table: Table, facts: Facts, why: Reasons) -> dict[str, int]:
    """Return the sides of views and of images at inference, in pixels: {"views": size, "eval": size}."""
    views, use = (table[part].get("size") for part in ("views", "eval"))
    thin = str(table["encoder"].get("name", "")).startswith("thin-")
    if use is None and views is not None:
        use = max(_upto(views * 4 // 3, facts.short_side, 8), views) if thin else views
    elif use is None and facts.small:
        use = max(16, math.ceil(facts.short_side / 8) * 8)
        why.append(("eval.size", str(use), facts.sides))
    elif use is None:
        gpu = facts.device == "cuda"
        use = _upto(224 if gpu else 64, facts.short_side, 32)
        why.append(("eval.size", str(use), f"{facts.sides}; {'a GPU' if gpu else 'no GPU'}"))
    if views is None:
        views = max(8, use * 3 // 4 // 8 * 8) if thin else use
        if views != use:
            why.append(("views.size", str(views), f"crops enlarge objects to their size at {use} px; faster"))
    return {"views": views, "eval": use}


def largest_batch(images: int) -> int:
    """Return the largest batch with which an epoch of this many training images has four steps."""
    return images // 4


def _base(encoder: Any, facts: Facts) -> tuple[str, str]:
    """Return the built-in recipe for open settings, and why: that of the encoder's family, if one is requested."""
    if encoder is not None:
        return family(encoder), f"the encoder is {encoder}"
    if facts.device != "cuda":
        return "thin", "no GPU"
    return "cifar" if facts.small else "imagenet", f"a GPU, and {facts.sides}"


def _upto(most: int, side: int, step: int) -> int:
    """Return the largest multiple of `step` up to `most` and `side`, but at least `step`."""
    return max(step, min(most, side // step * step))


def default_epochs(facts: Facts, seconds_per_epoch: float) -> tuple[float, str]:
    """Return the default epochs, and why: the paper's, limited by `_PATIENCE`."""
    full = 800 if facts.images < 200_000 else 100
    patience = _PATIENCE[facts.device]
    fit = patience / seconds_per_epoch
    if fit >= full:
        return full, "the paper's length for a set of this size"
    epochs = max(1.0, float(math.floor(fit)))
    limit = show_duration(patience)
    return epochs, f"about {limit}; the paper trains {full} epochs. Change it with --epochs or --budget"
