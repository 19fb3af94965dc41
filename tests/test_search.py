"""Searching stored embeddings: exact, through an index, from files and by id."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simsiam.config import UserError
from simsiam.console import Listener
from simsiam.embeddings import read_embeddings
from simsiam.search import RECALL, make_index, open_index, search

pytestmark = pytest.mark.usefixtures("one_thread")


def made(folder: Path, vectors: np.ndarray) -> Path:
    """Embeddings without images."""
    folder.mkdir()
    np.save(folder / "vectors.npy", vectors.astype(np.float32))
    pq.write_table(pa.table({"id": [f"image-{i}" for i in range(len(vectors))]}), folder / "items.parquet")
    meta = {"vectors": len(vectors), "dim": vectors.shape[1], "run": "gone", "encoder": "x", "fingerprint": "y"}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_the_nearest_are_those_of_a_literal_search(stored: Path) -> None:
    data = read_embeddings(stored)
    unit = data.vectors / np.linalg.norm(data.vectors, axis=1, keepdims=True)
    for row in (0, 17, len(data) - 1):
        similarity = unit @ unit[row]
        similarity[row] = -2
        best = np.argsort(-similarity)[:5]
        (found,) = search(stored, [data.ids[row]], k=5)
        assert [each["score"] for each in found["neighbours"]] == pytest.approx(similarity[best].tolist(), abs=1e-5)
        assert data.ids[row] not in [each["id"] for each in found["neighbours"]]


def test_a_file_finds_itself(stored: Path, photos: Path) -> None:
    ids = read_embeddings(stored).ids[:3]
    found = search(stored, [photos / id_ for id_ in ids], k=1)
    for id_, result in zip(ids, found, strict=True):
        assert result["query"] == str(photos / id_)
        assert result["neighbours"][0]["score"] > 0.99 and len(result["neighbours"]) == 1
        assert result["neighbours"][0]["id"] == id_


def test_of_equal_vectors_any_counts_as_found() -> None:
    """As of blank pages, which are all one."""
    vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    vectors[:150] = vectors[0]
    assert make_index(vectors)[1]["recall_at_10"] >= RECALL
    vectors[:900] = vectors[0]  # the index is worse then, and a wider search does not help
    about = make_index(vectors)[1]
    assert about["recall_at_10"] < RECALL and about["expansion"] < 4096


def test_the_index_has_the_recall_that_it_says_and_is_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 32))
    folder = made(tmp_path / "vectors", centres[rng.integers(50, size=4000)] + 0.5 * rng.normal(size=(4000, 32)))
    told: list[str] = []
    listener = Listener()
    listener.say = told.append  # type: ignore[method-assign]
    queries = [f"image-{i}" for i in range(0, 4000, 40)]
    near = search(folder, queries, k=10, index=True, listener=listener)
    exact = search(folder, queries, k=10, index=False)
    hits = [
        len({each["id"] for each in a["neighbours"]} & {each["id"] for each in b["neighbours"]})
        for a, b in zip(near, exact, strict=True)
    ]
    assert sum(hits) / (10 * len(queries)) > RECALL - 0.03
    assert read_embeddings(folder) and json.loads((folder / "index.json").read_text())["recall_at_10"] >= RECALL
    assert len(told) == 2 and "%" in told[1]
    assert search(folder, queries, k=10, index=True, listener=listener) == near and len(told) == 2
    # The index is rebuilt for other vectors, even if an old one exists.
    made(tmp_path / "fewer", rng.normal(size=(100, 32)))
    for file in (tmp_path / "fewer").iterdir():
        file.replace(folder / file.name)
    assert len(search(folder, ["image-3"], k=200, index=True, listener=listener)[0]["neighbours"]) == 99
    assert open_index(read_embeddings(folder))[1]["vectors"] == 100


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    folder = made(tmp_path / "vectors", np.random.default_rng(0).normal(size=(200, 16)))
    whole = search(folder, ["image-3"], k=5, index=True)
    content = (folder / "index.usearch").read_bytes()
    for damaged in (b"", content[: len(content) // 2], bytes(len(content))):
        (folder / "index.usearch").write_bytes(damaged)
        assert search(folder, ["image-3"], k=5, index=True) == whole
        assert len((folder / "index.usearch").read_bytes()) == len(content)
    for told in ("", "[]", "{}", "no JSON"):
        (folder / "index.json").write_text(told)
        assert search(folder, ["image-3"], k=5, index=True) == whole
        assert json.loads((folder / "index.json").read_text())["vectors"] == 200


@pytest.mark.parametrize("scale", [1e-8, 1e5])
def test_the_index_finds_vectors_of_any_length(tmp_path: Path, scale: float) -> None:
    """It stores float16, whose maximum is 65,504."""
    folder = made(tmp_path / "vectors", scale * np.random.default_rng(0).normal(size=(3000, 32)))
    assert open_index(read_embeddings(folder))[1]["recall_at_10"] >= RECALL
    for near, exact in zip(
        *(search(folder, ["image-3", "image-9"], k=1, index=way) for way in (True, False)), strict=True
    ):
        assert near["neighbours"][0]["id"] == exact["neighbours"][0]["id"]
        assert near["neighbours"][0]["score"] == pytest.approx(exact["neighbours"][0]["score"], abs=2e-6)


def test_a_score_means_the_same_through_the_index(tmp_path: Path) -> None:
    """A zero vector has similarity 0 to everything, in float16 too."""
    vectors = np.random.default_rng(0).normal(size=(300, 16))
    vectors[:50] = 0
    folder = made(tmp_path / "vectors", vectors)
    near, exact = (search(folder, ["image-3", "image-99"], k=20, index=way) for way in (True, False))
    assert {each["score"] for each in near[0]["neighbours"]} == {0.0}
    scores = [[each["score"] for each in found[1]["neighbours"]] for found in (near, exact)]
    assert scores[0] == sorted(scores[0], reverse=True) == pytest.approx(scores[1], abs=2e-6)


def test_copies_do_not_hide_the_others_from_the_index(tmp_path: Path) -> None:
    """From one of many equal vectors, an index leads only to the others: unfilled places are not neighbours."""
    vectors = np.random.default_rng(0).normal(size=(1500, 16))
    vectors[:1300] = vectors[0]
    folder = made(tmp_path / "vectors", vectors)
    for queries in (["image-3"], ["image-3", "image-1400"]):
        for near in search(folder, queries, k=1499, index=True):
            assert len({each["id"] for each in near["neighbours"]}) == 1499
            assert all(-1 <= each["score"] <= 1.001 for each in near["neighbours"])


def test_mistakes_are_one_clear_line(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an image file nor an id"):
        search(stored, ["nowhere.jpg"])
    with pytest.raises(UserError, match="simsiam embed RUN DATA"):
        search(tmp_path, ["a.jpg"])
    with pytest.raises(UserError, match="takes image files, ids of stored images and images, not bytes"):
        search(stored, [b"GIF89a"])
    with pytest.raises(UserError, match=r"k is 2\.5.* a whole number"):
        search(stored, ["image-1"], k=2.5)  # type: ignore[arg-type]
    lost = made(tmp_path / "lost", np.eye(4))
    assert search(lost, ["image-1"], k=2)[0]["neighbours"][0]["score"] == 0
    assert search(lost, iter(["image-1"]), k=2) == search(lost, ["image-1"], k=2)
    picture = Path(__file__).parents[1] / "docs" / "results" / "demo.png"
    with pytest.raises(UserError, match=r"is gone from .*: simsiam embed NEW_RUN \S+ -o \S+lost$"):
        search(lost, [picture])
    np.save(lost / "vectors.npy", np.eye(3, dtype=np.float32))
    with pytest.raises(UserError, match="do not belong together"):
        search(lost, ["image-1"])
    (lost / "meta.json").unlink()
    with pytest.raises(UserError, match="interrupted"):
        search(lost, ["image-1"])


def test_the_command_prints_a_table_or_json(stored: Path) -> None:
    id_ = read_embeddings(stored).ids[0]
    command = [sys.executable, "-m", "simsiam", "search", str(stored), id_, "-k", "3"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0 and shown.stdout == "" and "most similar" in shown.stderr
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300).stdout)
    assert found[0]["query"] == id_ and len(found[0]["neighbours"]) == 3


def test_queries_may_come_as_any_list(
    stored: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = read_embeddings(stored).ids[:2]
    wanted = search(stored, ids, k=2)
    assert search(stored, np.array(ids), k=2) == wanted == search(stored, iter(ids), k=2)
    for nothing in ([], np.array([], str)):
        with pytest.raises(UserError, match="at least one image"):
            search(stored, nothing)
    for wrong in (3, None, [b"GIF89a"]):
        with pytest.raises(UserError, match="takes image files, ids of stored images and images, not"):
            search(stored, wrong)
    picture = Image.open(photos / ids[0])
    (of_file,) = search(stored, photos / ids[0], k=3)
    for images in (picture, [picture], np.asarray(picture), np.asarray(picture)[None]):
        (found,) = search(stored, images, k=3)
        assert found["query"] == "image 0" and found["neighbours"] == of_file["neighbours"]
    assert [each["query"] for each in search(stored, [ids[1], picture], k=1)] == [ids[1], "image 1"]
    (tmp_path / "a.png").write_bytes((photos / ids[0]).read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert search(stored, ["~/a.png"], k=1)[0]["neighbours"][0]["id"] == ids[0]
