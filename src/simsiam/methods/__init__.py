"""One paper per file; the file name is the registry.

A method module has a class `Method(nn.Module)` and a dataclass `Settings`, and says in `CITATION` and `PUBLISHED` where
they come from. The contract, which tests/test_methods.py checks for every file:

    CITATION, PUBLISHED      text with the paper's arXiv number; {setting: figure}
    VIEWS                    how many views of an image it takes, the default first
    DEFAULTS                 {recipe: table}: what it changes in the recipes "imagenet", "cifar" and "thin", learning rate
                             and weight decay at least; a recipe that is not there keeps its own
    ONE_DEVICE               if its DEFAULTS have a batch for many devices: a table for the batch of one
    Settings                 frozen dataclass; its defaults are the paper's; `dim`, the width of z, is among them, and
                             refused by a ValueError where it is below 1

    Method(encoder, settings)
    forward(views, index) -> (loss, stats)   views: list of float [B,3,h,w]; index: int64 [B], the images' positions;
                                             loss: float32 scalar; stats: detached scalars, "std" among them
    embed(x) -> (h, z)                       features and projection, for monitors
  and, where a method needs it, the hooks without gradient:
    param_groups() -> list                   torch parameter groups; "fixed_lr": True keeps the initial learning rate,
                                             "lr_scale" multiplies it
    allocate(images)                         makes buffers for what it remembers of each image
    before_training(batches)                 once, with (views, index) of the images in whole batches; autocast is on
    before_epoch(epoch)                      at the start of each epoch
    fixed                                    False until every step does the same operations (`Siamese.fixed`)
    sync_bn = False                          BN's statistics stay each process's own, where several share a run
    after_step(progress)                     progress in [0, 1]: the share of training that was done before this step

A method is handed a built encoder and never sees labels or files. Queues, prototypes and EMA twins are buffers or
submodules, so the state dict holds all that a resumed run needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from torch import nn

from simsiam.config import UserError, did_you_mean


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The method's module. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"Unknown method {name!r}.{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def param_groups(method: nn.Module) -> list[dict[str, Any]]:
    """The method's own parameter groups, or one group of all that is trained."""
    if hasattr(method, "param_groups"):
        groups: list[dict[str, Any]] = method.param_groups()  # type: ignore[operator]
        return groups
    return [{"params": [parameter for parameter in method.parameters() if parameter.requires_grad]}]
