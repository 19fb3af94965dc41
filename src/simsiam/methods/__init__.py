"""The self-supervised methods: one module per paper, registered by its file name.

Each module defines a class `Method(Siamese)` (heads.py) and a dataclass `Settings`, and names its sources in `CITATION` and
`PUBLISHED`. The contract, which tests/test_methods.py checks for every module:

    a docstring              its first line is the method's description in listings
    CITATION, PUBLISHED      text with the paper's arXiv number; {setting: figure}
    VIEWS                    supported numbers of views per image, the default first
    DEFAULTS                 {recipe: table}: overrides for the recipes "imagenet", "cifar" and "thin", at least the
                             learning rate and weight decay; of a recipe without an entry, all but [method] is kept
    ONE_DEVICE               optional overrides for when the multi-device batch in DEFAULTS is reduced to one device's
    FEW_PHOTOGRAPHS          optional overrides of the recipe "thin" for fewer than 20,000 photographs
    Settings                 frozen dataclass with the paper's values as defaults; one field is `dim`, the width of z,
                             which raises ValueError if it is below 1

    Method(encoder, settings)
    forward(views, index) -> (loss, stats)   views: list of float [B,3,h,w]; index: int64 [B], positions in the training
                                             set; loss: float32 scalar; stats: detached scalars, including "std"
    embed(x) -> (h, z)                       features and projection, for monitoring
  and, if needed, what `Siamese` has defaults for; hooks run without gradient:
    param_groups() -> list                   torch parameter groups; "fixed_lr": True keeps the initial learning rate,
                                             "lr_scale" multiplies it
    allocate(images)                         creates buffers that hold something for each image
    sweeps = True, before_training(batches)  called once with (views, index), of at most two views, of all whole batches,
                                             or as many as a tenth of the budget allows, under autocast
    before_epoch(epoch)                      called at the start of each epoch
    fixed                                    False until every step performs the same operations (`Siamese.fixed`)
    sync_bn = False                          in multi-process runs, each process keeps its own BN statistics
    after_step(progress)                     progress in [0, 1]: the share of training completed before this step

A method receives a built encoder and never sees labels or files. Queues, prototypes and EMA networks are buffers or
submodules, so the state dict holds everything a resumed run needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from simsiam.config import UserError, did_you_mean


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """Return the method's module. Raises UserError if the name is unknown."""
    if name not in names():
        raise UserError(f"Unknown method {name!r}.{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
