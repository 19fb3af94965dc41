"""The settings of a run: recipe, overrides, and defaults derived from the data, each with its reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simsiam import methods, recipes
from simsiam.compute import Precision
from simsiam.config import (
    Table,
    UserError,
    as_seed,
    counted,
    did_you_mean,
    fill,
    merge,
    parse_duration,
    parse_override,
    read_recipe,
    require_above_0,
    require_not_negative,
    show_duration,
    table_of,
    typed,
)
from simsiam.data.decode import open_image
from simsiam.data.sources import ImageSet, absolute
from simsiam.data.views import ViewSettings
from simsiam.encoders import EncoderSpec
from simsiam.features import Preprocessing, preprocessing
from simsiam.optim import Schedule
from simsiam.runs import RECIPE

Reasons = list[tuple[str, str, str]]
"""(setting, value, why) of every derived default."""

OPEN = "open"
"""Key that marks a table without a requested recipe."""
_SMALL_IMAGE = 48
_TABLES = ("method", "encoder", "train", "views", "eval")
_OPTIONS = ("recipe", "out", "resume", "device", "workers")
_LOOK_AT = 200
_PATIENCE = {"cpu": 1800.0, "cuda": 4 * 3600.0, "mps": 1800.0}
"""Longest default duration of a run, in seconds."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the optimisation. The defaults are the paper's for ImageNet (section 3)."""

    epochs: float | None = None
    budget: str | None = None
    """Training time ('10m') instead of epochs: the schedule follows the clock."""
    batch_size: int = 512
    optimizer: Literal["sgd", "lars", "larc"] = "sgd"
    """lars scales each layer's step by the norm of its weights, but BN and biases get neither scaling nor weight decay;
    larc treats them like the others."""
    lr: float = 0.05
    """Base learning rate: the actual rate is lr x batch_size / 256."""
    lr_end: float = 0.0
    """The learning rate at the end as a share of its peak: 0 in the paper."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Of all parameters; lars excludes BN and biases."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0, at most half of the run."""
    cosine: Literal["step", "epoch"] = "step"
    """The learning rate changes every step, or every epoch as in the paper."""
    precision: Precision = "auto"
    compile: bool | None = None
    """Fuse the encoder's BN, ReLU and shortcuts (torch.compile); None: on a GPU, if it is measured to be faster and the
    run is long enough to amortise compilation."""
    threads: int | None = None
    """CPU threads; None: all cores, or half of them if that is faster at the start because the machine is shared."""
    on_collapse: Literal["stop", "continue"] = "stop"
    init: str | None = None
    """Run whose weights to start from: all of them if its method matches, else only the encoder's."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints: the most that a kill loses; a signal loses nothing."""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.epochs is not None and self.budget is not None:
            raise ValueError("epochs and budget cannot both be set: choose one.")
        require_above_0(self, "epochs", "threads", "lr")
        require_not_negative(self, "weight_decay", "warmup_epochs", "checkpoint_seconds")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}: BN needs at least 2 images.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum:g}: it must be at least 0 and below 1.")
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"lr_end is {self.lr_end:g}: it is a share of the peak, from 0 to 1.")
        if self.budget is not None:
            parse_duration(self.budget)

    @property
    def peak(self) -> float:
        """The peak learning rate, scaled with the batch."""
        return self.lr * self.batch_size / 256

    @property
    def seconds(self) -> float | None:
        """The budget in seconds; None without one."""
        return None if self.budget is None else parse_duration(self.budget)

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """Return the learning rate schedule for this number of batches per epoch."""
        by_epoch = self.cosine == "epoch"
        return Schedule(
            self.peak, steps_per_epoch, self.epochs, self.seconds, self.warmup_epochs, by_epoch, self.lr_end
        )


@dataclass(frozen=True)
class EvalSettings:
    """Settings of inference: evaluations and everything else after training."""

    size: int
    """Side of the encoder's input at inference, in pixels; views may be smaller (docs/how-it-works.md)."""

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size is {self.size}: it must be at least 8 pixels.")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run; `table()` is its `config.toml`, which reproduces it."""

    data: str
    seed: int
    method: str
    method_settings: Any
    encoder: EncoderSpec
    train: TrainSettings
    views: ViewSettings
    eval: EvalSettings

    @property
    def prepare(self) -> Preprocessing:
        """Image preprocessing at inference."""
        return preprocessing(self.eval.size, self.views.mean, self.views.std)

    @property
    def short_side(self) -> int:
        """Short side at which to keep images, in pixels: enough for inference and for views."""
        training = preprocessing(self.views.size, self.views.mean, self.views.std)
        return max(self.prepare.short_side, training.short_side)

    def table(self) -> Table:
        """Return the table that `read` takes, without settings that are None."""
        return {
            "data": self.data,
            "seed": self.seed,
            "method": {"name": self.method, **table_of(self.method_settings)},
            "encoder": table_of(self.encoder),
            "train": table_of(self.train),
            "views": table_of(self.views),
            "eval": table_of(self.eval),
        }


_OWNERS: dict[str, type[Any]] = {
    "train": TrainSettings,
    "views": ViewSettings,
    "encoder": EncoderSpec,
    "eval": EvalSettings,
}
"""Whose settings each table holds; those of [method] are the method's."""


def read(table: Table) -> Recipe:
    """Build a Recipe from a complete table (`Recipe.table`). Raises UserError for an unknown name or a wrong value."""
    table = checked(table)
    for key in ("data", *_TABLES):
        if key not in table or (key == "method" and "name" not in table[key]):
            raise UserError(f"The recipe is not complete: it has no {'method.name' if key in table else key}.")
    seed = as_seed(table.get("seed", 0))
    method = {**table["method"]}
    name = method.pop("name")
    module = methods.get(name)
    views = fill(ViewSettings, {"count": module.VIEWS[0], **table["views"]}, "views")
    if len(views.each()) not in module.VIEWS:
        takes = " or ".join(map(str, sorted(module.VIEWS)[:4])) + (" ..." if len(module.VIEWS) > 4 else "")
        raise UserError(
            f"{name} takes {takes} views per image, but views.count and views.small_count give {len(views.each())}."
        )
    return Recipe(
        data=str(table["data"]),
        seed=seed,
        method=name,
        method_settings=fill(module.Settings, method, "method"),
        encoder=fill(EncoderSpec, table["encoder"], "encoder"),
        train=fill(TrainSettings, table["train"], "train"),
        views=views,
        eval=fill(EvalSettings, table["eval"], "eval"),
    )


def checked(table: Table) -> Table:
    """Check the tables and types of a full or partial recipe and convert its values: 512.0 becomes 512, a list a tuple.

    Raises UserError for an unknown table and for a value of the wrong type. Unknown settings are left to `read`.
    """
    for key, value in table.items():
        if key not in ("data", "seed", *_TABLES):
            raise UserError(f"Unknown setting {key}.{did_you_mean(key, ['data', 'seed', *_TABLES])}")
        if key in _TABLES and not isinstance(value, dict):
            raise UserError(f"{key} is {value!r}: in a recipe it must be a table, [{key}].")
    name = table.get("method", {}).get("name", "")
    if not isinstance(name, str):
        raise UserError(f"method.name is {name!r}: it must be text.")
    return {**table, **{key: typed(cls, table[key], key) for key, cls in _OWNERS.items() if key in table}}


def _laid(overrides: Iterable[Table]) -> Table:
    """The overrides as one table. The later of two wins, also of epochs and budget."""
    table: Table = {}
    for override in map(qualify, overrides):
        table = merge(table, override)
        given = override.get("train", {})
        for length, rival in (("epochs", "budget"), ("budget", "epochs")):
            if length in given and rival not in given:
                table["train"] = {key: value for key, value in table["train"].items() if key != rival}
    return table


def _check_agreement(named: Table, written: Table, where: str = "") -> None:
    """Raises UserError if an option and a key=value set one thing to two values."""
    for key in named.keys() & written.keys():
        one, other = named[key], written[key]
        if isinstance(one, dict) and isinstance(other, dict):
            _check_agreement(one, other, f"{key}.")
        elif one != other:
            raise UserError(f"{where}{key} is given twice, as {one} and as {other}: give it once.")
    lengths = {"epochs", "budget"}
    if where == "train." and len(lengths & (named.keys() | written.keys())) == 2:
        raise UserError("Give epochs or budget, not both.")


def gather(data: str | Path | None, recipe: str | None, overrides: Sequence[str], settings: Mapping[str, Any]) -> Table:
    """Merge the user's recipe, settings by name and overrides, in this order, into one table. It always has "data", and
    `OPEN` if the recipe is left to `resolve`."""
    if isinstance(overrides, str | Mapping):
        raise UserError(f"overrides is {overrides!r}: it must be a list of strings, like ['train.lr=0.1'].")
    if data is not None and not isinstance(data, str | os.PathLike):
        raise UserError(f"data is a {type(data).__name__}: it must be the path or name of one data set.")
    named = _laid([{key: value} for key, value in settings.items() if value is not None])
    written = _laid(map(parse_override, overrides))
    if settings.get("epochs") is not None and settings.get("budget") is not None:
        raise UserError("Give --epochs or --budget, not both.")
    _check_agreement(named, written)
    asked = merge(named, written)
    method, init = asked.get("method", {}).get("name"), asked.get("train", {}).get("init")
    table: Table = {}
    if init is not None and not isinstance(init, str | os.PathLike):
        raise UserError(f"train.init is {init!r}: it must be the path of a run.")
    if init is not None:
        init = os.path.abspath(os.path.expanduser(init))
        asked = merge(asked, {"train": {"init": init}})
    if init is not None and not os.path.exists(Path(init) / RECIPE):  # Path's own raises if it may not be entered
        raise UserError(f"{init} is not a run to start from: it has no {RECIPE}.")
    asked = checked(asked)
    if init is not None and recipe is None:
        table = checked(read_recipe(Path(init) / RECIPE))
        measured = ("precision", "compile", "threads")  # on that run's machine; measured again on this one
        table["train"] = {key: value for key, value in table.get("train", {}).items() if key not in measured}
        table = as_method(table, _family(table.get("encoder", {}).get("name")), method)
    elif recipe is not None or data is None:
        table = preset(recipe or "demo", method)
        # The stem of new weights suits their size at inference; a run's own recipe names it.
        if "size" in asked.get("eval", {}) and "encoder" in table:
            table["encoder"] = {key: value for key, value in table["encoder"].items() if key != "size"}
    if {"epochs", "budget"} & asked.get("train", {}).keys():  # each replaces the other in a recipe
        table = {**table, "train": {k: v for k, v in table.get("train", {}).items() if k not in ("epochs", "budget")}}
    table = merge(table, asked)
    if data is not None and "data" in asked:
        raise UserError(f"{data} and data={asked['data']} are two data sets: name one.")
    if data is not None or "data" in table:
        table["data"] = absolute(data if data is not None else str(table["data"]))
    return {"data": "demo", **({OPEN: True} if recipe is None and init is None and data is not None else {}), **table}


def preset(recipe: str, method: str | None = None) -> Table:
    """Adapt a recipe to another method: encoder and length are kept, and views and batch unless the method's DEFAULTS for
    this recipe, from which heads and optimiser come, name others. A user's own file keeps all but its method settings.

    Args:
        recipe: name of a built-in recipe or path of a TOML file.
        method: its name; None for the one in the recipe.
    """
    return as_method(checked(recipes.get(recipe)), recipe, method)


def as_method(table: Table, recipe: str, method: str | None) -> Table:
    """`preset` for a table already read; `recipe` is its name, if built in."""
    if method is None or method == table.get("method", {}).get("name", method):
        return table
    kept = ("epochs", "budget", "batch_size", "cosine")
    name = "thin" if recipe == "demo" else recipe
    own = methods.get(method).DEFAULTS.get(name)
    plain = recipes.get(recipe) if recipe in recipes.names() else {}
    former = methods.get(table["method"]["name"]).DEFAULTS.get(name, {}).get("views", {})  # go with their method
    views = {key: value for key, value in table.get("views", {}).items() if key not in former}
    views |= {key: value for key, value in plain.get("views", {}).items() if key in former}
    table, train = {**table, "method": {"name": method}, "views": views}, table.get("train", {})
    if own is None and plain and plain["method"]["name"] == method:
        # back to the recipe's own method, from a run with another
        own = {"method": plain["method"], "train": {k: v for k, v in plain["train"].items() if k not in kept}}
    if own is None:
        return table
    return merge({**table, "train": {key: value for key, value in train.items() if key in kept}}, own)


def qualify(override: Table) -> Table:
    """`{"lr": 0.1}` -> `{"train": {"lr": 0.1}}`: a setting may be named without its table if only one has it. A size
    without a table is that of views and of images at inference."""
    (key, value), *_ = override.items()
    if key in _OPTIONS:
        raise UserError(f"{key} is an option, not a setting: use --{key} on the command line, {key}=... in train().")
    if key in (*_TABLES, "data", "seed"):
        return override if isinstance(value, dict) or key in ("data", "seed") else {key: {"name": value}}
    if key == "size":
        return {"views": override, "eval": override}
    homes = [table for table, owner in _OWNERS.items() if key in {field.name for field in dataclasses.fields(owner)}]
    homes += [
        "method"
        for name in methods.names()
        if key in {field.name for field in dataclasses.fields(methods.get(name).Settings)}
    ][:1]
    if len(homes) == 1:
        return {homes[0]: override}
    known = [f"{table}.{field.name}" for table, owner in _OWNERS.items() for field in dataclasses.fields(owner)]
    if homes:
        raise UserError(f"{key} could be {' or '.join(f'{home}.{key}' for home in homes)}: write one of these.")
    raise UserError(f"Unknown setting {key}.{did_you_mean(key, known, (name.split('.')[1] for name in known))}")


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
    table = {**{key: {} for key in _TABLES}, "seed": 0, **table}
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


def _family(encoder: Any) -> str:
    """Return the built-in recipe for encoders of this one's family."""
    family = str(encoder).partition("-")[0]
    return family if family in ("thin", "cifar") else "imagenet"


def _base(encoder: Any, facts: Facts) -> tuple[str, str]:
    """Return the built-in recipe for open settings, and why: that of the encoder's family, if one is requested."""
    if encoder is not None:
        return _family(encoder), f"the encoder is {encoder}"
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
