"""Discover everything that can be chosen by name, for `simsiam list` and the docs."""

from __future__ import annotations

import importlib
from pathlib import Path

_NO_SINGLE_IMAGES = {
    *("_optical_flow", "_stereo_matching", "cityscapes", "coco", "fakedata", "flickr", "folder", "hmdb51", "kinetics"),
    *("kitti", "lfw", "moving_mnist", "phototour", "sbd", "sbu", "ucf101", "vision", "voc", "widerface"),
}
"""torchvision's modules of videos, image pairs, detection and captions."""


def everything() -> dict[str, dict[str, str]]:
    """{"methods": {name: description}, "encoders": ..., "datasets", "evaluations", "experiments", "recipes"}."""
    from simsiam import encoders, evaluate, methods, recipes, reproduce

    def first_line(module: str) -> str:
        return (importlib.import_module(module).__doc__ or "").strip().splitlines()[0]

    recipe_folder = Path(recipes.__file__).parent
    headers = {name: (recipe_folder / f"{name}.toml").read_text(encoding="utf-8") for name in recipes.names()}
    return {
        "methods": {name: first_line(f"simsiam.methods.{name}") for name in methods.names()},
        "encoders": dict.fromkeys(encoders.names(), "") | {"timm/NAME": "any timm model"},
        "datasets": {"demo": "patches of the photographs included in scikit-image and scikit-learn"} | _torchvision(),
        "evaluations": {name: first_line(f"simsiam.evaluate.{name}") for name in evaluate.names()},
        "experiments": {name: reproduce.get(name).title for name in reproduce.names()},
        "recipes": {name: text.splitlines()[0].lstrip("# ") for name, text in headers.items()},
    }


def _torchvision() -> dict[str, str]:
    from simsiam.data.torchvision_sets import kinds

    sets = [name for name, kind in kinds().items() if kind.__module__.rpartition(".")[2] not in _NO_SINGLE_IMAGES]
    return dict.fromkeys(sorted(sets), "from torchvision; write NAME:FOLDER")
