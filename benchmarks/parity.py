"""Compare our training with the authors' code: the same initial weights and views must give the same trained weights.

    python benchmarks/parity.py --released DIR [--archs resnet18 resnet50] [--epochs 3] [--steps 8] [--json FILE]

DIR is a checkout of facebookresearch/simsiam, whose `builder.py` (model) and `main_simsiam.py` (learning rate) are used
unmodified; the loop is theirs too, without the distributed wrapper, which needs a GPU. Ours is the recipe `imagenet`
with a batch of 16, a learning rate that moves the weights in a few steps, and 32-pixel views of the demo set.
Everything runs in float64 to keep rounding negligible.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

LR = 8.0


def released(folder: str) -> ModuleType:
    """Import their `main_simsiam`. Its package is also called simsiam, so it is dropped from sys.modules afterwards."""
    sys.path.insert(0, folder)
    main = importlib.import_module("main_simsiam")
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "simsiam"]:
        del sys.modules[name]
    return main


def compare(main: ModuleType, arch: str, epochs: int, steps: int, batch: int = 16, size: int = 32) -> dict[str, Any]:
    """Differences after `epochs` of `steps` steps each: the largest absolute one of the losses; the largest of |ours -
    theirs| / |theirs| over the tensors of weights, BN statistics and momentum; and the median relative change of the
    matrices and filters in training."""
    from simsiam.compute import generator
    from simsiam.data.cache import build_cache
    from simsiam.data.loader import Loader
    from simsiam.data.sources import open_images
    from simsiam.data.views import random_view
    from simsiam.recipe import gather, read
    from simsiam.released import released_name
    from simsiam.train import build_method, optimizer

    settings = [f"encoder.name={arch}", f"encoder.size={size}", f"views.size={size}", f"eval.size={size}"]
    settings += [f"batch_size={batch}", f"lr={LR}", f"epochs={epochs}"]
    plan = read({"seed": 0, **gather("demo", "imagenet", settings, {})})
    cpu = torch.device("cpu")
    cache = build_cache(open_images("demo"), plan.prepare.short_side)
    loader = Loader(cache, cache.split()[0][: batch * steps], batch, cpu, 0)

    torch.manual_seed(0)
    theirs = main.simsiam.builder.SimSiam(models.__dict__[arch]).double()
    ours: Any = build_method(plan, batch * steps).double()
    weights = {name: theirs.state_dict()[released_name(name)].clone() for name in ours.state_dict()}
    ours.load_state_dict(weights)

    args = SimpleNamespace(epochs=epochs)
    init_lr = LR * batch / 256
    groups = [
        {"params": theirs.encoder.parameters(), "fix_lr": False},
        {"params": theirs.predictor.parameters(), "fix_lr": True},
    ]
    their_sgd = torch.optim.SGD(groups, init_lr, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CosineSimilarity(dim=1)
    our_sgd, schedule = optimizer(ours, plan), plan.train.schedule(loader.steps_per_epoch)
    assert loader.steps_per_epoch == steps

    theirs.train(), ours.train()
    losses, step = [], 0
    for epoch in range(epochs):
        main.adjust_learning_rate(their_sgd, init_lr, epoch, args)
        for images in loader.epoch(epoch, 0):
            draws = generator(cpu, 0, step)
            x = [random_view(images.images, view, draws, images.sizes).double() for view in plan.views.each()]

            p1, p2, z1, z2 = theirs(x1=x[0], x2=x[1])
            loss = -(criterion(p1, z2).mean() + criterion(p2, z1).mean()) * 0.5
            their_sgd.zero_grad()
            loss.backward()
            their_sgd.step()

            for group in our_sgd.param_groups:
                group["lr"] = schedule.peak if group.get("fixed_lr") else schedule.rate(step, 0.0)
            our_loss, _ = ours(x, images.index)
            our_sgd.zero_grad(set_to_none=True)
            our_loss.backward()
            our_sgd.step()

            losses.append((our_loss.item(), loss.item()))
            step += 1

    state, trained = ours.state_dict(), dict(ours.named_parameters())
    statistics = {name: theirs.state_dict()[released_name(name)] for name in state if "running" in name}
    # Their frozen bias, which ours lacks, is in the running mean of the output BN, as far as its momentum has gone.
    output_bn, passes = theirs.encoder.fc[7], 2 * step
    statistics["projector.7.running_mean"] -= theirs.encoder.fc[6].bias * (1 - (1 - output_bn.momentum) ** passes)
    named = {name: theirs.get_parameter(released_name(name)) for name in trained}
    return {
        "arch": arch,
        "steps": step,
        "losses": [round(theirs, 6) for _, theirs in (losses[0], losses[-1])],
        "loss_difference": max(abs(a - b) for a, b in losses),
        "weights_difference": max(off(trained[name], named[name]) for name in trained),
        "statistics_difference": max(off(state[name], value) for name, value in statistics.items()),
        "momentum_difference": max(
            off(our_sgd.state[trained[name]]["momentum_buffer"], their_sgd.state[named[name]]["momentum_buffer"])
            for name in trained
        ),
        "weights_moved": median(off(value, weights[name]) for name, value in trained.items() if value.ndim > 1),
    }


def off(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, with |b| at least 1e-6 for what is 0 up to rounding (the mean of a BN's output)."""
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", required=True, help="a checkout of facebookresearch/simsiam")
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of an epoch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    main = released(arguments.released)
    from simsiam.compute import describe

    found = [compare(main, arch, arguments.epochs, arguments.steps) for arch in arguments.archs]
    for result in found:
        print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": found, "environment": describe()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
