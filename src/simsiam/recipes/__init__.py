"""Recipes: every TOML file in this folder is one, by its name. Its header states command and expected figure."""

from __future__ import annotations

import os
from pathlib import Path

from simsiam.config import Table, UserError, did_you_mean, read_recipe


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def get(name: str) -> Table:
    """A built-in recipe by name, or any TOML file by path. Raises UserError where there is neither."""
    if name in names():
        return read_recipe(Path(__file__).with_name(f"{name}.toml"))
    path = Path(name)
    if not os.path.exists(path) and path.suffix != ".toml":
        raise UserError(f"There is no recipe {name!r}.{did_you_mean(name, names())} Or give the path of a TOML file.")
    return read_recipe(path)
