"""Typed settings: dataclasses defined next to their users, filled from TOML tables and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Table = dict[str, Any]


class UserError(ValueError):
    """A user error: one clear line that says what to do. The command line prints it and exits with status 2."""


class Interrupted(Exception):
    """A signal ended the run; its state, if any, is saved, and the message says how to resume."""


MOST_SEED = (1 << 32) - 1
"""The largest seed that scikit-learn accepts."""


def did_you_mean(name: str, known: Iterable[str], short: Iterable[str] = ()) -> str:
    """Return a hint for a mistyped name: ' Did you mean X?', or the list of known names; `short` names can be suggested
    but are not listed."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, sorted({*known, *short}), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Available: {', '.join(known)}."


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as the user wrote it, with ~ expanded: shells do not do so after `--out=`, nor does Python."""
    return Path(path).expanduser()


def read_recipe(path: Path) -> Table:
    """Read a TOML recipe. Raises UserError if the file is missing or not TOML."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"No recipe at {path}. `simsiam list` shows the built-in ones.") from None
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the recipe {path}: {error}.") from None


def table_of(settings: Any) -> Table:
    """Return the fields of a dataclass of settings as a table, without those that are None: TOML has no null, and a
    missing key means the default."""
    return {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}


def write_recipe(table: Table) -> str:
    """Return the table, which holds no None, as TOML text."""
    import tomli_w

    return tomli_w.dumps(table)


def merge(base: Table, over: Table) -> Table:
    """Return `base` updated with `over`, table by table; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> Table:
    """Parse `views.blur=0.5` to {"views": {"blur": 0.5}}. The value is TOML; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"Cannot read {text!r}: an override is written key=value, for example train.lr=0.03.")
    value = {"True": "true", "False": "false"}.get(value.strip(), value.strip())
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.strip().split(".")):
        parsed = {part.strip(): parsed}
    return parsed


def fill(cls: type[T], table: Table, where: str) -> T:
    """Build the dataclass `cls` from a TOML table, checking names and types.

    Raises UserError naming the key (`where` is the table's name) for one that is unknown or missing, or a value of the
    wrong type.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    for key in table:
        if key not in names:
            raise UserError(f"Unknown setting {where}.{key}.{did_you_mean(key, names)}")
    for field in fields:
        if field.name not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"The setting {where}.{field.name} is missing.")
    try:
        return cls(**typed(cls, table, where))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"In [{where}]: {error}") from None


def typed(cls: type[Any], table: Table, where: str) -> Table:
    """Return the table with values converted to the types of the dataclass `cls`; unknown names are left to `fill`.

    Raises UserError naming the key for a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    return {key: coerce(value, hints[key], f"{where}.{key}") if key in hints else value for key, value in table.items()}


_KINDS: dict[Any, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def as_seed(value: Any) -> int:
    """Return the value as a seed. Raises UserError if it is none."""
    seed: int = coerce(value, int, "seed")
    if not 0 <= seed <= MOST_SEED:
        raise UserError(f"seed is {seed}: it must be a whole number from 0 to {MOST_SEED}.")
    return seed


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Return the value as the type `hint`. Raises UserError, naming it, if it is of another type or not finite."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # also numpy's
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
        return coerce(value, hint, name)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{name} is {value!r}: it must be one of {', '.join(map(repr, choices))}.")
        return value
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(typing.get_args(hint)):
            return tuple(coerce(v, h, name) for v, h in zip(value, typing.get_args(hint), strict=True))
        raise UserError(f"{name} is {value!r}: it must be a list of {len(typing.get_args(hint))} values.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is not bool and isinstance(value, bool))):
        like = ", like '10m'" if name == "train.budget" else ""
        raise UserError(f"{name} is {value!r}: it must be {_KINDS.get(hint, f'of type {hint.__name__}')}{like}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: it must be a finite number.")
    return value


def require_above_0(settings: Any, *names: str) -> None:
    """Raise ValueError for the first of these settings that is not above 0; None stands for a default."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value:g}: it must be above 0.")


def require_not_negative(settings: Any, *names: str) -> None:
    """Raise ValueError for the first of these settings that is negative."""
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} is {getattr(settings, name):g}: it must not be negative.")


def short_name(data: str) -> str:
    """Return a short name for the data of a recipe: of a file or folder its own, of a torchvision set that of its kind."""
    kind, colon, _ = data.partition(":")
    return kind if colon and kind.isidentifier() else Path(data).name or data


def counted(count: float, noun: str) -> str:
    """Return count and noun: '1 image', '2,000 images', '0.5 epochs'."""
    return f"{count:{'g' if isinstance(count, float) else ','}} {noun}" + ("" if count == 1 else "s")


_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str) -> float:
    """Parse '90s', '10m', '1h30m' or '2h' to seconds. Raises UserError, also for a number without unit."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(sec|min|s|m|h|d)", text.lower())
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds <= 0 or re.sub(r"(\d+(?:\.\d+)?)\s*(sec|min|s|m|h|d)|\s", "", text.lower()):
        raise UserError(f"Cannot read the time {text!r}: write it like 90s, 10m or 1h30m.")
    return seconds


def show_bytes(count: float) -> str:
    """Return a readable size: '512 bytes', '84.3 MB', '335 GB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def show_duration(seconds: float) -> str:
    """Return a readable duration: '48 s', '9 min 05 s', '3 h 12 min'."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"
