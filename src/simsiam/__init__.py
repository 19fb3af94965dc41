"""SimSiam and its family: an encoder from a folder of unlabelled images, with proof of what it learnt.

The Python interface mirrors the command line: `simsiam.train(...)` makes a run, `simsiam.load(run).embed(images)` uses it.
A mistake of the caller's is a `simsiam.UserError`, a ValueError whose message says what to do.
"""

from __future__ import annotations

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

    # Kept in globals: importing the submodule `simsiam.train` would otherwise bind that name to the module.
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """With what is imported on first use, or `help(simsiam)` and a completing shell would not know it."""
    return sorted({*globals(), *__all__})
