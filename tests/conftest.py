"""Shared fixtures, and a temporary cache folder, so that nothing is written to the home folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before modules are collected: some compile the kernels then. Every worker of pytest-xdist has its own cache."""
    folder = tempfile.TemporaryDirectory(prefix="simsiam-cache-", ignore_cleanup_errors=True)
    patch = pytest.MonkeyPatch()
    patch.setenv("SIMSIAM_CACHE", folder.name)
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(patch.undo)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: a second one only slows down work this small, a hundredfold on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPU from tests that hold only on a CPU: a GPU has other defaults, reads ahead, rounds differently, and
    finishes before the guard, which checks once a second, has seen much. All other tests use a GPU if there is one."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 small images of several sizes in 3 class folders, and one broken file."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(96):
        kind = ("stripes", "rings", "noise")[i % 3]
        height, width = rng.integers(24, 48, 2)
        y, x = np.mgrid[:height, :width] / 8 + rng.uniform(0, 6, 2)[:, None, None]
        wave = {"stripes": np.sin(3 * x), "rings": np.sin(x**2 / 4 + y**2 / 4), "noise": rng.normal(size=x.shape)}[kind]
        colour = rng.uniform(60, 190, 3)
        pixels = (colour + 50 * wave[:, :, None]).clip(0, 255).astype(np.uint8)
        (root / kind).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / kind / f"{i:03d}.png")
    (root / "rings" / "broken.jpg").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="session")
def stored(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the photos, beside the run that made them. Tests may add files to the folder but not change any."""
    import simsiam
    from simsiam.embeddings import embed_to
    from test_train import SMALL

    folder = tmp_path_factory.mktemp("stored")
    simsiam.train(photos, folder / "run", epochs=1, **SMALL)
    embed_to(folder / "run", photos, folder / "vectors")
    return folder / "vectors"
