"""Everything that can be chosen by name, discovered: what `simsiam list` prints and the docs show."""

from __future__ import annotations

import importlib
from pathlib import Path


def everything() -> dict[str, dict[str, str]]:
    """{"methods": {name: one line about it}, "encoders": ..., "data sets", "evaluations", "recipes"}."""
    from simsiam import encoders, evaluate, methods, recipes

    def first_line(module: str) -> str:
        return (importlib.import_module(module).__doc__ or "").strip().splitlines()[0]

    recipe_folder = Path(recipes.__file__).parent
    headers = {name: (recipe_folder / f"{name}.toml").read_text(encoding="utf-8") for name in recipes.names()}
    return {
        "methods": {name: first_line(f"simsiam.methods.{name}") for name in methods.names()},
        "encoders": dict.fromkeys(encoders.names(), "") | {"timm/NAME": "any model of timm"},
        "datasets": {"demo": "patches of the photographs that scikit-image brings along"} | _torchvision(),
        "evaluations": {name: first_line(f"simsiam.evaluate.{name}") for name in evaluate.names()},
        "recipes": {name: text.splitlines()[0].lstrip("# ") for name, text in headers.items()},
    }


def _torchvision() -> dict[str, str]:
    from torchvision import datasets

    kinds = {name: getattr(datasets, name) for name in datasets.__all__}
    return {
        name: "torchvision's, NAME:FOLDER" for name in sorted(kinds) if issubclass(kinds[name], datasets.VisionDataset)
    }
