"""Several processes on one run: they compute what one process would, for every method."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from simsiam import methods, ranks
from simsiam.config import UserError
from simsiam.data.cache import build_cache
from simsiam.data.sources import open_images
from simsiam.encoders import EncoderSpec, build
from simsiam.methods import barlow, simclr, swav
from simsiam.runs import ENVIRONMENT, Checkpoints, read_json, read_metrics
from simsiam.train import _check_alike

RANKS = 2
BATCH, IMAGES, STEPS = 8, 16, 4
ROWS, WIDTH = 12, 6
SMALL: dict[str, dict[str, Any]] = {
    "barlow": {"dim": 16, "projector_hidden": 16},
    "byol": {"dim": 16, "hidden": 16},
    "deepcluster": {"dim": 16, "projector_hidden": 16, "prototypes": 4, "iterations": 2},
    "moco": {"dim": 16, "queue": 16, "projector_hidden": 16, "bn_groups": 2},
    "swav": {"dim": 16, "projector_hidden": 16, "prototypes": 8, "queue": 16, "queue_epoch": 0, "freeze_epochs": 1},
    "vicreg": {"dim": 16, "projector_hidden": 16},
}


def small_method(name: str, **settings: Any) -> nn.Module:
    module = methods.get(name)
    encoder = build(EncoderSpec("thin-resnet18", 8, width=8), 0)
    torch.manual_seed(0)
    known = module.Settings.__dataclass_fields__
    small = SMALL.get(name, {"dim": 16, "projector_hidden": 16})
    chosen = {key: value for key, value in small.items() if key in known}
    method: nn.Module = module.Method(encoder, module.Settings(**{**chosen, **settings})).double()
    method.allocate(IMAGES)
    return method.double()


def batch(step: int, count: int) -> tuple[list[Tensor], Tensor]:
    draws = torch.Generator().manual_seed(step)
    index = torch.randperm(IMAGES, generator=draws)[:BATCH]
    return [torch.randn(BATCH, 3, 8, 8, generator=draws, dtype=torch.float64) for _ in range(count)], index


def trained(name: str, **settings: Any) -> dict[str, Tensor]:
    """Return the state after a few steps on this rank's part of the same batches."""
    method = small_method(name, **settings).train()
    forward = ranks.data_parallel(method, method.sync_bn)
    steps = torch.optim.SGD(method.param_groups(), lr=0.05, momentum=0.9)
    part = BATCH // ranks.world_size()
    own = slice(ranks.rank() * part, (ranks.rank() + 1) * part)

    def share(step: int) -> tuple[list[Tensor], Tensor]:
        views, index = batch(step, methods.get(name).VIEWS[0])
        return [view[own] for view in views], index[own]

    with torch.no_grad():
        method.before_training([share(step) for step in range(2)])
    for step in range(STEPS):
        if step % 2 == 0:
            method.before_epoch(step // 2)
        loss, stats = forward(*share(step))
        assert stats["std"].isfinite()
        steps.zero_grad()
        loss.backward()
        steps.step()
        method.after_step(step / STEPS)
    return method.state_dict()


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in methods.names()),
    ("simsiam", {"predictor": False, "target_momentum": 0.8}),
    ("simsiam", {"target_steps": 2}),
    ("swav", {"stop_gradient": False}),
]


def vectors(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _losses(number: int) -> dict[str, Any]:
    z1, z2 = vectors(0).requires_grad_(), vectors(1).requires_grad_()
    half = slice(number * ROWS // 2, (number + 1) * ROWS // 2)
    contrastive = simclr.nt_xent(z1[half], z2[half], z1[half], z2[half], 0.2)
    redundancy = barlow.barlow_twins(z1[half], z2[half], 0.005)
    code = swav.sinkhorn(z1[half].detach(), 0.5, 3)
    (contrastive + redundancy / 2).backward()
    return {"losses": [contrastive.item(), redundancy.item()], "grad": z1.grad, "code": code}


def _work(number: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": str(RANKS)}
    threads = len(os.listdir("/proc/self/task"))
    with ranks.process_group(torch.device("cpu")):
        assert ranks.is_distributed() and ranks.rank() == number and ranks.is_main() == (number == 0)
        assert ranks.from_main(lambda: f"from {number}") == "from 0"
        assert ranks.agree(float(number + 5), number == 1, False) == (5.0, (True, False))
        states = [trained(name, **settings) for name, settings in CASES]
        torch.save({"states": states, "losses": _losses(number)}, f"{folder}/{number}.pt")
    # A leftover thread of the process group would abort the process at interpreter exit.
    assert len(os.listdir("/proc/self/task")) == threads


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of two ranks: the states of every case, losses and codes of its half of a batch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_work, args=(free_port(), str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{number}.pt") for number in range(RANKS)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{'-'.join(s)}".strip("-") for n, s in CASES])
def test_two_ranks_end_where_one_process_does(number: int, shared: list[dict[str, Any]]) -> None:
    """BN over the whole batch, gathered negatives, codes, clusters and memories, all in float64."""
    first, second = (rank["states"][number] for rank in shared)
    name, settings = CASES[number]
    sync_bn = methods.get(name).Method.sync_bn
    for key in first:
        if sync_bn or "running" not in key:  # without it, each rank has its own statistics, as intended for MoCo
            torch.testing.assert_close(first[key], second[key], rtol=1e-9, atol=1e-12, msg=key)
    if sync_bn:
        alone = trained(name, **settings)
        for key in alone:
            torch.testing.assert_close(alone[key], first[key], rtol=1e-6, atol=1e-9, msg=key)


def test_two_ranks_see_each_others_rows(shared: list[dict[str, Any]]) -> None:
    """Losses, codes and gradients over two processes are those of one process with the whole batch."""
    found = [rank["losses"] for rank in shared]
    z1, z2 = vectors(0).requires_grad_(), vectors(1).requires_grad_()
    contrastive = simclr.nt_xent(z1, z2, z1, z2, 0.2)
    redundancy = barlow.barlow_twins(z1, z2, 0.005)
    (2 * contrastive + redundancy).backward()  # summed over ranks: own queries, but all of C
    assert sum(each["losses"][0] for each in found) / 2 == pytest.approx(contrastive.item(), rel=1e-5)
    assert [each["losses"][1] for each in found] == [pytest.approx(redundancy.item(), rel=1e-5)] * 2
    torch.testing.assert_close(torch.cat([each["code"] for each in found]), swav.sinkhorn(z1.detach(), 0.5, 3))
    torch.testing.assert_close(found[0]["grad"] + found[1]["grad"], z1.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["timm/efficientnet_b0", "resnet18"])
@pytest.mark.parametrize("training", [True, False])
def test_synchronised_bn_is_the_bn_that_it_was(name: str, training: bool) -> None:
    """In one process it sees the same rows; timm's BN includes an activation that must be kept."""
    encoder = build(EncoderSpec(name, 64), 0).train(training)
    twin = copy.deepcopy(encoder)
    ranks._synchronise(twin, torch.device("cpu"))
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), encoder(x), rtol=1e-3, atol=1e-3)
    assert twin.state_dict().keys() == encoder.state_dict().keys()
    ranks._synchronise(twin, torch.device("cuda"))  # torch's, which needs a GPU in training mode
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(twin(x), encoder(x), rtol=1e-3, atol=1e-3)


# --- whole runs, as torchrun starts them ----------------------------------------------------------------------------

TINY = ["method.dim=16", "method.projector_hidden=16", "encoder.width=8", "views.size=16", "eval.size=16"]
TINY += ["train.batch_size=16", "train.precision=fp32"]
PLAIN = ["views.scale=[1,1]", "views.ratio=[1,1]", "views.flip_p=0", "views.jitter_p=0", "views.gray_p=0"]


def torchrun(*arguments: object, processes: int = RANKS) -> list[str]:
    where = ["--nproc-per-node", str(processes), "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *where, "-m", "simsiam", *map(str, arguments)]


def one_core() -> dict[str, str]:
    """The environment with one thread and no GPU, since each process would need its own GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_core())


def test_a_run_over_two_processes_is_one_run(tmp_path: Path) -> None:
    """One table, one run folder; without random views, the same weights as from a single process."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(80):  # square, so that the plain crop has no random position
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 24, 3), np.uint8)).save(photos / f"{i}.png")
    settings = ["--epochs", 0.2, *TINY, *PLAIN]  # one step: more would amplify float32 rounding
    two = run(torchrun("train", photos, "-o", tmp_path / "two", *settings))
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("Report   ") == 1
    assert read_json(tmp_path / "two" / ENVIRONMENT)["processes"] == 2
    one = run([sys.executable, "-m", "simsiam", "train", str(photos), "-o", str(tmp_path / "one"), *map(str, settings)])
    assert one.returncode == 0, one.stderr
    first, second = (Checkpoints(tmp_path / name).load() for name in ("one", "two"))
    assert first is not None and second is not None and first[1]["step"] == second[1]["step"] == 1
    assert first[0].keys() == second[0].keys()
    for key, value in first[0].items():
        if value.ndim > 1:  # a ReLU near 0 may go either way
            assert torch.cosine_similarity(value.flatten(), second[0][key].flatten(), dim=0) > 0.99, key


def test_a_signal_stops_both_and_the_run_goes_on(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    env = one_core()
    started = torchrun("train", photos, "-o", folder, "--epochs", 2000, *TINY)
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    until = time.monotonic() + 120
    while len(read_metrics(folder)) < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert "everything is saved" in error and "torchrun --nproc-per-node 2 -m simsiam train --resume" in error
    found = Checkpoints(folder).load()
    assert found is not None and found[1]["step"] > 0
    assert not (folder / "summary.json").exists()
    again = subprocess.Popen(
        torchrun("train", "--resume", "-o", folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    before, until = len(read_metrics(folder)), time.monotonic() + 120
    while len(read_metrics(folder)) < before + 2 and again.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    _, error = again.communicate(timeout=60)
    assert "everything is saved" in error, error
    later = Checkpoints(folder).load()
    assert later is not None and later[1]["step"] > found[1]["step"]


def test_a_batch_that_cannot_be_shared_is_refused(photos: Path, tmp_path: Path) -> None:
    refused = run(torchrun("train", photos, "-o", tmp_path / "run", "--epochs", 1, *TINY, "train.batch_size=9"))
    assert refused.returncode != 0 and "must be a multiple" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_a_line_and_no_traceback_of_either_process(tmp_path: Path) -> None:
    """The second waits while the first decodes the images; torchrun may end it before it can say the same."""
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    refused = run(torchrun("train", tmp_path, "-o", tmp_path / "run", "--epochs", 1, *TINY))
    assert refused.returncode != 0 and "typer" not in refused.stderr
    assert "Error: None of the 20 images" in refused.stderr


def test_processes_that_read_other_images_do_not_train(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails for only one of them."""
    cache = build_cache(open_images(photos), 16, tmp_path)
    _check_alike(cache)
    usable = cache.usable(np.arange(len(cache)))
    assert not usable.all()
    monkeypatch.setattr(ranks, "from_main", lambda value: ~value())
    with pytest.raises(UserError, match="Not every process could read the same images"):
        _check_alike(cache)
