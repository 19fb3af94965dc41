"""Planted duplicates, clusters and outliers are found, and nothing else."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

import simsiam
from simsiam import duplicates
from simsiam.clusters import clusters, find_clusters
from simsiam.config import UserError
from simsiam.data.cache import Cache
from simsiam.duplicates import find_duplicates, near_duplicates
from simsiam.embeddings import embed_to, read_embeddings
from simsiam.search import nearest
from test_search import made
from test_train import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(seed: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """Smooth noise, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return coarse.filter(ImageFilter.GaussianBlur(1))


def saved_anew(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return Image.open(buffer)


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "anew": saved_anew,
    "smaller": lambda image: image.resize((32, 32), Image.Resampling.BICUBIC),
    "larger": lambda image: image.resize((80, 80), Image.Resampling.BICUBIC),
    "cropped": lambda image: image.crop((1, 1, 47, 47)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of 120 pictures: five have an altered copy, one has two identical copies."""
    folder = tmp_path_factory.mktemp("planted")
    images = folder / "images"
    images.mkdir()
    for i in range(120):
        picture(i).save(images / f"p{i:03d}.png")
    for i, (name, alter) in enumerate(ALTERED.items()):
        alter(picture(10 * i + 3)).save(images / f"a{10 * i + 3:03d}-{name}.png")
    for name in ("c077", "z077"):
        shutil.copy(images / "p077.png", images / f"{name}.png")
    simsiam.train(images, folder / "run", epochs=2, **SMALL)
    embed_to(folder / "run", images, folder / "vectors")
    return folder / "vectors"


def test_the_planted_duplicates_are_found_and_no_others(planted: Path) -> None:
    found = near_duplicates(planted)
    groups = {frozenset(each["id"] for each in group) for group in found["groups"]}
    wanted = {frozenset({f"p{10 * i + 3:03d}.png", f"a{10 * i + 3:03d}-{name}.png"}) for i, name in enumerate(ALTERED)}
    wanted.add(frozenset({"p077.png", "c077.png", "z077.png"}))
    assert groups <= wanted, "two pictures that have nothing in common"
    assert len(groups) >= 5 and found["recall"] > 0.8  # by design it may miss one in ten
    assert found["copies"] == sum(len(group) - 1 for group in groups) and found["images"] == 127
    (largest, *_) = found["groups"]  # the largest group comes first
    assert len(largest) == 3 and all(each["identical"] and each["score"] == 1 for each in largest)
    assert not any(each["identical"] for group in found["groups"][1:] for each in group[1:])


def test_identical_pixels_need_no_encoder_and_no_images(planted: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(planted, alone)
    meta = json.loads((alone / "meta.json").read_text())
    (alone / "meta.json").write_text(json.dumps(meta | {"run": str(tmp_path / "gone"), "data": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="--threshold"):
        near_duplicates(alone)
    found = near_duplicates(alone, 1.0)
    assert {each["id"] for each in found["groups"][0]} == {"p077.png", "c077.png", "z077.png"}
    assert found["recall"] is None and found["threshold"] == 1
    assert near_duplicates(alone, -1.0)["groups"][0].__len__() == 127  # everything counts as similar


def test_scores_are_exact_among_however_many(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index's own are in float16, and 1 for vectors of zeros."""
    folder = shutil.copytree(planted, tmp_path / "vectors")
    vectors = np.load(folder / "vectors.npy")
    vectors[[10, 20]] = 0
    np.save(folder / "vectors.npy", vectors)
    exact = near_duplicates(folder, 0.99)
    monkeypatch.setattr("simsiam.search.ALL_PAIRS", 10)
    assert near_duplicates(folder, 0.99) == exact and exact["copies"] >= 4


def test_flat_pictures_are_no_copies_of_each_other(planted: Path, tmp_path: Path) -> None:
    """Blank pages: without their mean colour, only noise or nothing remains."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        picture(i).save(images / f"p{i:03d}.png")
        Image.new("RGB", (48, 48), (5 * i, 255 - 3 * i, 100)).save(images / f"blank-{i:03d}.png")
    saved_anew(picture(5)).save(images / "again.png")
    embed_to(planted.parent / "run", images, tmp_path / "vectors")
    found = near_duplicates(tmp_path / "vectors")
    assert found["groups"] and all("blank" not in each["id"] for group in found["groups"] for each in group)
    assert found["pixel_threshold"] > 0.8
    for path in images.glob("[pa]*.png"):
        path.unlink()
    embed_to(planted.parent / "run", images, tmp_path / "blank")
    assert near_duplicates(tmp_path / "blank")["groups"] == []
    shutil.copy(images / "blank-000.png", images / "blank-copy.png")
    for path in images.glob("blank-0[0-3][1-9].png"):
        path.unlink()
    for path in images.glob("blank-0[1-3]0.png"):
        path.unlink()
    embed_to(planted.parent / "run", images, tmp_path / "one")  # one picture, two copies
    assert (
        len(near_duplicates(tmp_path / "one")["groups"]) == 1 == len(near_duplicates(tmp_path / "one", 0.5)["groups"])
    )


def test_changed_images_are_refused_and_new_ones_are_not(planted: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(json.loads((planted / "meta.json").read_text())["data"], images)
    embed_to(planted.parent / "run", images, tmp_path / "vectors")
    before = near_duplicates(tmp_path / "vectors")
    picture(999).save(images / "0.png")  # a new image that sorts first
    assert near_duplicates(tmp_path / "vectors") == before
    count = len(read_embeddings(tmp_path / "vectors"))
    first, second, *_ = sorted(path for path in images.rglob("*.png") if path.name != "0.png")
    picture(999).save(first)
    with pytest.raises(UserError, match=rf"1 of the {count} images in .* have changed or are gone .*simsiam embed"):
        near_duplicates(tmp_path / "vectors")
    second.unlink()
    with pytest.raises(UserError, match=rf"2 of the {count} images .*simsiam embed"):
        near_duplicates(tmp_path / "vectors")
    embed_to(planted.parent / "run", images, tmp_path / "vectors")
    assert near_duplicates(tmp_path / "vectors")["images"] == count


def test_an_image_that_cannot_be_read_any_more_is_named(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is gone and one file can no longer be read, although its name, size and time are unchanged."""
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    load = Cache._load

    def failing(cache: Cache, row: int) -> np.ndarray | Exception:
        return load(cache, row) if row != 3 else OSError("Input/output error")

    monkeypatch.setattr(Cache, "_load", failing)
    name = read_embeddings(planted).ids[3]
    with pytest.raises(UserError, match=rf"^{name} can no longer be read \(cannot be read: Input.*simsiam embed"):
        near_duplicates(planted)


def test_groups_are_those_of_a_literal_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        kinds = rng.integers(0, 12, 30)
        rows, kind = duplicates._kinds([f"pixels-{each}" for each in kinds])
        assert [kinds[row] for row in rows] == list(dict.fromkeys(kinds)) and (kind[rows] == range(len(rows))).all()
        links = np.sort(rng.integers(0, len(rows), (rng.integers(0, 8), 2)), 1)
        links = links[links[:, 0] != links[:, 1]]
        scores = rng.uniform(0.9, 0.99, len(links))
        together = [{row} for row in range(30)]
        changed = True
        while changed:
            changed = False
            for a in range(30):
                for b in range(30):
                    linked = kind[a] == kind[b] or any({kind[a], kind[b]} == set(link) for link in links.tolist())
                    if linked and together[a] is not together[b]:
                        together[a] |= together[b]
                        for row in together[a]:
                            together[row] = together[a]
                        changed = True
        wanted = {frozenset(group) for group in together if len(group) > 1}
        found = duplicates._groups(kind, links, scores)
        assert {frozenset(row for row, *_ in group) for group in found} == wanted
        for group in found:
            first = group[0][0]
            degree = {row: sum(kind[row] in link for link in links.tolist()) for row, *_ in group}
            assert degree[first] == max(degree.values()), "most others are linked to the first"
            for row, score, same in group[1:]:
                own = [s for s, link in zip(scores, links.tolist(), strict=True) if kind[row] in link]
                best = 1.0 if (kind == kind[row]).sum() > 1 else max(own)
                assert score == best and same == (kind[row] == kind[first])


def test_an_index_finds_the_same_neighbours_and_never_the_image_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(400, 16)).astype(np.float32)
    vectors[7] = vectors[9]  # equal vectors: their order is arbitrary
    scores, found = nearest(vectors, 5)
    monkeypatch.setattr("simsiam.search.ALL_PAIRS", 100)
    near_scores, near = nearest(vectors, 5)
    assert (near != np.arange(400)[:, None]).all() and (found != np.arange(400)[:, None]).all()
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.tolist(), near.tolist(), strict=True)]) > 0.95
    assert near[7, 0] == 9 and near[9, 0] == 7
    assert np.abs(np.sort(near_scores)[:, -1] - np.sort(scores)[:, -1]).max() < 0.01  # float16
    monkeypatch.setattr("simsiam.search._QUERIES", 399)  # leaves a last block of one query
    assert np.array_equal(nearest(vectors, 5)[1], near)


@pytest.mark.parametrize("all_pairs", [100_000, 10])
def test_what_is_looked_for_is_the_other_form(all_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simsiam.search.ALL_PAIRS", all_pairs)
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    other = np.ascontiguousarray(vectors[:, ::-1])
    similarity = (other @ vectors.T) / np.linalg.norm(vectors, axis=1)
    np.fill_diagonal(similarity, -np.inf)
    assert (nearest(vectors, 1, other)[1][:, 0] == similarity.argmax(1)).mean() > 0.9  # float16 in the index


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    """Embeddings in four directions (30, 25, 20 and 15 of them), and one outlier."""
    rng = np.random.default_rng(0)
    centres = np.eye(8)[:5]
    of = np.repeat(np.arange(5), [30, 25, 20, 15, 1])
    folder = made(tmp_path / "vectors", (centres[of] + 0.05 * rng.normal(size=(91, 8))) * rng.uniform(0.5, 2, (91, 1)))
    table = pq.read_table(folder / "items.parquet")
    names = [None if each == 4 else f"kind-{each}" for each in of]
    pq.write_table(table.append_column("class", [names]), folder / "items.parquet")
    return folder


def test_clusters_are_the_kinds_that_were_planted(blobs: Path) -> None:
    found = clusters(blobs, 5)
    assert [each["images"] for each in found["clusters"]] == [30, 25, 20, 15, 1]
    assert [each["classes"] for each in found["clusters"]][:4] == [{f"kind-{i}": 1.0} for i in range(4)]
    assert found["agreement"] == {"nmi": 1.0, "purity": 1.0}
    assert found["odd"][0]["id"] == "image-90" and len(found["odd"]) == 9
    rows = read_embeddings(blobs).vectors
    alike = np.sort((rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ (rows[90] / np.linalg.norm(rows[90])))
    assert found["odd"][0]["similarity"] == pytest.approx(alike[-11:-1].mean(), abs=1e-5)  # the last is itself
    table = pq.read_table(found["file"]).to_pydict()
    assert table["id"] == read_embeddings(blobs).ids and table["cluster"][:31] == [0] * 30 + [1]
    # The examples are the nearest to the centre, by brute force.
    vectors = read_embeddings(blobs).vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    middle = unit[:30].sum(0)
    best = np.argsort(-(unit[:30] @ middle))[:9]
    assert found["clusters"][0]["examples"] == [f"image-{row}" for row in best]
    assert clusters(blobs, 5) == found  # the same seed, the same clusters
    assert clusters(blobs)["count"] == 9  # a tenth of the images


@pytest.mark.usefixtures("on_cpu")  # on a GPU, rounding depends on the block size
def test_the_vectors_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet's vectors take 10 GB: never copy all of them; the results are the same."""
    rng = np.random.default_rng(0)
    of = np.sort(rng.integers(0, 5, 3000))
    vectors = (np.eye(16)[of] + 0.05 * rng.normal(size=(3000, 16))) * rng.uniform(0.5, 2, (3000, 1))
    vectors[-1] = 0.5 * vectors[5]
    stored = read_embeddings(made(tmp_path / "vectors", vectors))
    stored.items["pixels"] = [f"{min(row, 2900)}" for row in range(3000)]  # of the last hundred, one is compared
    whole, copies = find_clusters(stored, 5), find_duplicates(stored, 0.99)

    class Watched(duplicates._Picked):
        most = 0

        def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
            rows = super().__getitem__(which)
            self.most = max(self.most, len(rows))
            return rows

    watched: Any = Watched(stored.vectors, np.arange(3000))
    monkeypatch.setattr("simsiam.neighbours._BLOCK", 1600)
    monkeypatch.setattr("simsiam.neighbours._BANK_BLOCK", 1600)
    parts = find_clusters(replace(stored, vectors=watched), 5)
    assert np.array_equal(parts.label, whole.label) and [row for row, _ in parts.odd] == [row for row, _ in whole.odd]
    assert np.abs(parts.similarity - whole.similarity).max() < 1e-6
    watched.most = 0
    monkeypatch.setattr("simsiam.clusters._MANY", 500)  # initial directions from a subset
    parts = find_clusters(replace(stored, vectors=watched), 5)
    assert np.array_equal(parts.label, whole.label) and watched.most == 512
    assert find_duplicates(replace(stored, vectors=watched), 0.99) == copies and watched.most == 512


def test_a_collapsed_embedding_has_clusters_that_are_empty(tmp_path: Path) -> None:
    folder = made(tmp_path / "vectors", np.ones((30, 4)))
    table = pq.read_table(folder / "items.parquet")
    pq.write_table(table.append_column("class", [[None] * 30]), folder / "items.parquet")
    found = clusters(folder, 3)
    assert [each["images"] for each in found["clusters"]] == [30, 0, 0]
    shown = subprocess.run(
        [sys.executable, "-m", "simsiam", "clusters", str(folder), "-n", "3"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert shown.returncode == 0 and "–" in shown.stderr, shown.stderr


def test_clusters_that_cannot_be_kept_are_shown(blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simsiam.runs.os.replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.warns(UserWarning, match="read-only. The result is shown"):
        found = clusters(blobs, 4)
    assert found["file"] is None and len(found["clusters"]) == 4


def test_without_labels_nothing_is_said_about_them(planted: Path) -> None:
    found = clusters(planted, 4)
    assert found["agreement"] is None and all(each["classes"] is None for each in found["clusters"])


def test_mistakes_are_one_clear_line(blobs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="91 images cannot form 92 clusters"):
        clusters(blobs, 92)
    stored = read_embeddings(blobs)
    with pytest.raises(UserError, match=r"has 1 image: clusters need at least 2\.$"):
        find_clusters(replace(stored, vectors=stored.vectors[:1]))
    with pytest.raises(UserError, match="from -1 to 1"):
        near_duplicates(blobs, 1.5)
    with pytest.raises(UserError, match=r"threshold is '0\.9'.* a number"):
        near_duplicates(blobs, "0.9")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"count is 3\.5.* a whole number"):
        clusters(blobs, 3.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed is -1: it must be a whole number from 0"):
        clusters(blobs, 3, seed=-1)
    with pytest.raises(UserError, match="simsiam embed RUN DATA"):
        clusters(tmp_path)


def test_the_commands_print_a_summary_or_json(planted: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "simsiam", *words], capture_output=True, text=True, timeout=300)

    shown = command("duplicates", str(planted))
    assert shown.returncode == 0 and shown.stdout == "" and "removed" in shown.stderr and "p077.png" in shown.stderr
    assert json.loads(command("duplicates", str(planted), "--json").stdout)["groups"]
    shown = command("clusters", str(planted), "-n", "3")
    assert shown.returncode == 0 and "3 clusters" in shown.stderr and "Outliers" in shown.stderr
    assert json.loads(command("clusters", str(planted), "-n", "3", "--json").stdout)["count"] == 3
    wrong = command("clusters", str(planted), "-n", "500")
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1
