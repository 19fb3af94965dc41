"""SimSiam and related methods: train an encoder on a folder of unlabelled images and measure what it learnt.

The Python interface mirrors the command line: `simsiam.train(...)` makes a run, `simsiam.load(run).embed(images)` uses it.
Invalid input raises `simsiam.UserError`, a ValueError whose message says what to do.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simsiam.config import UserError
    from simsiam.embed import ImageEncoder, load
    from simsiam.train import train

__version__ = "0.1.0"
__all__ = ["ImageEncoder", "UserError", "__version__", "load", "train"]

_HOME = {
    "train": "simsiam.train",
    "load": "simsiam.embed",
    "ImageEncoder": "simsiam.embed",
    "UserError": "simsiam.config",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import simsiam` and `simsiam --help` never import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'simsiam' has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Keep imports of the submodule `simsiam.train` from replacing the function `simsiam.train`."""
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    """Include names that are imported on first use, for `help(simsiam)` and tab completion."""
    return sorted({*globals(), *__all__})
