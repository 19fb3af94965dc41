"""A plausible run folder without training: coloured shapes, and embeddings that separate the classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CONFIG = """\
data = "photos/holiday"
seed = 0

[method]
name = "simsiam"
dim = 2048

[encoder]
name = "resnet18"
size = 32

[train]
epochs = 20.0
batch_size = 256
lr = 0.03
momentum = 0.9
weight_decay = 0.0005

[views]
size = 32
scale = [0.2, 1.0]
blur_p = 0.0

[eval]
size = 32
"""
BAD_FILES = [{"path": f"holiday/{i}.jpg", "reason": "empty file (0 bytes)"} for i in range(2)]


def pictures(labels: np.ndarray, side: int = 48) -> np.ndarray:
    """uint8 [N,side,side,3]: one hue and stripe width per class, plus noise."""
    rng = np.random.default_rng(0)
    grid = np.arange(side)
    out = np.empty((len(labels), side, side, 3), np.uint8)
    for row, label in enumerate(labels):
        wave = 0.5 + 0.5 * np.sin(grid * (0.15 + 0.07 * label) + rng.uniform(0, 6))
        hue = 0.5 + 0.5 * np.cos(2 * np.pi * (label / 10 + np.array([0, 1 / 3, 2 / 3])))
        pixels = 40 + 180 * wave[:, None, None] * hue + rng.normal(0, 12, (side, side, 3))
        out[row] = pixels.clip(0, 255)
    return out


def make_run(
    run: Path,
    *,
    items: int = 300,
    steps: int = 600,
    labels: np.ndarray | None = None,
    thumbnails: np.ndarray | None = None,
    ids: Sequence[str] | None = None,
    classes: Sequence[str] = CLASSES,
    labelled: bool = True,
    verdict: str = "healthy",
) -> Path:
    """Write every file that `train` and `evaluate` write, and return the folder."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, len(classes), items) if labels is None else labels
    thumbnails = pictures(labels) if thumbnails is None else thumbnails
    ids = [f"{classes[label]}/{row:05d}.png" for row, label in enumerate(labels)] if ids is None else ids
    centres = rng.normal(size=(len(classes), 64))
    samples = run / "samples" / "embedding"
    samples.mkdir(parents=True)
    for path, spread in ((samples / "vectors.npy", 1.25), (run / "samples" / "untrained.npy", 2.6)):
        np.save(path, (centres[labels] + rng.normal(size=(items, 64)) * spread).astype(np.float32))
    np.save(samples / "thumbnails.npy", thumbnails)
    column = pa.array(labels.tolist() if labelled else [None] * items, pa.int64())
    pq.write_table(pa.table({"id": pa.array(list(ids), pa.string()), "label": column}), samples / "items.parquet")
    (samples / "meta.json").write_text(json.dumps({"classes": list(classes) if labelled else None, "dim": 64}))
    first = thumbnails[:8]
    views = [first[:, 8:40, 8:40], first[:, 4:36, 10:42], first[:, 12:44, 2:34, ::-1]]
    np.save(run / "samples" / "views.npy", np.stack(views, axis=1))

    knn = {"trained": 71.2, "untrained": 61.0, "pixels": 48.1, "k": 200, "T": 0.1} if labelled else None
    collapse = {"std": 0.94, "effective_rank": 212.4, "dim": 2048, "verdict": verdict}
    if labelled:
        linear = {"trained": 78.4, "untrained": 66.2, "pixels": 51.3, "C": 1.0}
        fewshot = {"trained": 55.9, "untrained": 41.7, "pixels": 28.0, "shots": 10}
        (run / "evaluation.json").write_text(
            json.dumps({"knn": knn, "linear": linear, "fewshot": fewshot, "collapse": collapse})
        )
    summary = {
        "run": str(run), "data": "photos/holiday", "method": "simsiam", "encoder": "resnet18", "images": 8000,
        "bad_files": BAD_FILES, "epochs": 20, "steps": steps, "seconds": 178.2, "images_per_second": 912.0, "loss": -0.87,
        "std": 0.94, "effective_rank": 212.4, "verdict": verdict, "knn": knn,
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(CONFIG)
    environment = {"simsiam": "0.1.0", "python": "3.11.9", "torch": "2.15.0", "cores": 2, "gpu": None}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "encoder.json").write_text(json.dumps({"encoder": {"name": "resnet18", "size": 32}, "dim": 512}))
    (run / "encoder.safetensors").write_bytes(b"\0" * 1000)
    with open(run / "metrics.jsonl", "w", encoding="utf-8") as file:
        start = {"kind": "monitor", "step": 0, "seconds": 0.0, "knn": 61.0, "knn_pixels": 48.1, "verdict": "healthy"}
        file.write(json.dumps(start if labelled else {k: v for k, v in start.items() if "knn" not in k}) + "\n")
        for step in range(1, steps + 1):
            done = step / steps
            line = {
                "kind": "train", "step": step, "epoch": int(20 * done), "progress": done, "seconds": 178 * done,
                "loss": -0.9 * (1 - np.exp(-6 * done)) + rng.normal(0, 0.02), "images_per_second": 912.0,
                "std": 0.95 - 0.5 * np.exp(-20 * done) + rng.normal(0, 0.008),
                "lr": 0.03 * (1 + np.cos(np.pi * done)) / 2,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if step % max(1, steps // 20) == 0:
                line |= {
                    "kind": "monitor", "knn": 61 + 10.2 * done**0.6 if labelled else None,
                    "retrieval": 40 + 52 * done**0.5, "alignment": 0.6 + 0.3 * done,
                    "effective_rank": 60 + 150 * done**0.7, "std_features": 0.8,
                    "effective_rank_features": 30.0, "verdict": verdict,
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
    return run
