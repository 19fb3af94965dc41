"""One paper per file; the file name is the registry.

A method module has a class `Method(nn.Module)` and a dataclass `Settings`, and says in `CITATION` and `PUBLISHED` where
they come from. The contract, which tests/test_methods.py checks for every file:

    Method(encoder, settings)
    forward(views, index) -> (loss, stats)   views: list of float [B,3,h,w]; index: int64 [B], the images' positions;
                                             loss: float32 scalar; stats: detached scalars, "std" among them
    embed(x) -> (h, z)                       features and projection, for monitors
    param_groups() -> list                   torch parameter groups; "fixed_lr": True keeps the initial learning rate
    before_epoch, after_step                 optional

A method is handed a built encoder and never sees labels or files. Queues, prototypes and EMA twins are buffers or
submodules, so the state dict holds all that a resumed run needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from simsiam.config import UserError, nearest


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The method's module. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"Unknown method {name!r}.{nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
