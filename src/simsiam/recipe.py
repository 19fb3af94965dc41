"""The settings of a run: recipe and overrides in one table, and the table as typed settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simsiam import methods, recipes
from simsiam.compute import Precision
from simsiam.config import (
    Table,
    UserError,
    as_seed,
    did_you_mean,
    fill,
    merge,
    parse_duration,
    parse_override,
    read_recipe,
    require_above_0,
    require_not_negative,
    table_of,
    typed,
)
from simsiam.data.sources import absolute
from simsiam.data.views import ViewSettings
from simsiam.encoders import EncoderSpec
from simsiam.features import Preprocessing, preprocessing
from simsiam.optim import Schedule
from simsiam.runs import RECIPE

OPEN = "open"
"""Key that marks a table without a requested recipe."""
TABLES = ("method", "encoder", "train", "views", "eval")
_OPTIONS = ("recipe", "out", "resume", "device", "workers")


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
    for key in ("data", *TABLES):
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
        if key not in ("data", "seed", *TABLES):
            raise UserError(f"Unknown setting {key}.{did_you_mean(key, ['data', 'seed', *TABLES])}")
        if key in TABLES and not isinstance(value, dict):
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
        table = as_method(table, family(table.get("encoder", {}).get("name")), method)
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
    if key in (*TABLES, "data", "seed"):
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


def family(encoder: Any) -> str:
    """Return the built-in recipe for encoders of this one's family."""
    first = str(encoder).partition("-")[0]
    return first if first in ("thin", "cifar") else "imagenet"
