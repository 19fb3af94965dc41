"""Use of a trained encoder: on disk, in memory, inside scikit-learn."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tarfile
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

import simsiam
from simsiam.assess import evaluate_run
from simsiam.clusters import clusters
from simsiam.compute import Compute, computes_bf16
from simsiam.config import UserError
from simsiam.console import Listener
from simsiam.data.cache import build_cache
from simsiam.data.imageset import ImageSet
from simsiam.data.sources import open_images
from simsiam.embed import ImageEncoder
from simsiam.embeddings import embed_to, read_embeddings, write_embedding
from simsiam.encoders import EncoderSpec, _InUse, in_use
from simsiam.features import Preprocessing, preprocessing, untrained
from simsiam.runs import claim, read_tensors
from simsiam.weights import read_encoder
from test_train import SMALL


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    simsiam.train(photos, folder, epochs=2, **SMALL)
    return folder


@pytest.fixture
def copy(photos: Path, tmp_path: Path) -> Path:
    """A small folder of images that a test may change."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(photos.rglob("*.png"))[:30]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_embed_writes_plain_files_that_agree(run: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    (copy / "broken.jpg").write_bytes(b"x")
    told = embed_to(run, copy, out)
    vectors, items = np.load(out / "vectors.npy"), pq.read_table(out / "items.parquet").to_pydict()
    meta = json.loads((out / "meta.json").read_text())
    assert vectors.dtype == np.float32 and vectors.shape == (30, 64) == (told["vectors"], told["dim"])
    assert items["id"] == sorted(path.name for path in copy.glob("*.png")) and items["label"] == [None] * 30
    assert [bad["path"] for bad in told["bad_files"]] == ["broken.jpg"]
    assert meta["encoder"] == json.loads((run / "encoder.json").read_text())["sha256"] and meta["preprocessing"]
    # The same image alone, from its file, gives the same vector: preprocessing is shared.
    alone = simsiam.load(run, precision="fp32").embed([copy / items["id"][7]])
    assert np.abs(alone[0] - vectors[7]).max() < 0.05 * np.abs(vectors[7]).max()  # bf16 has 8 bits


def test_items_say_what_is_known_of_an_image_and_half_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = SimpleNamespace(keys=np.arange(3, dtype=np.uint64))
    cache = SimpleNamespace(labels=np.array([1, -1, 0]), classes=("a", "b"), ids=["x", "y", "z"], images=images)

    def write() -> None:
        vectors, rows = np.ones((2, 4), np.float32), np.array([1, 0])
        write_embedding(tmp_path, vectors, cache, rows, {"dim": 4}, ["p", "q"])  # type: ignore[arg-type]

    write()
    stored = read_embeddings(tmp_path, ["id", "label", "class", "pixels"])
    assert stored.items == {"id": ["y", "x"], "label": [None, 1], "class": [None, "b"], "pixels": ["p", "q"]}
    assert stored.keys.tolist() == [1, 0] and not stored.replaced()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for module, save, name in ((np, "save", "vectors.npy"), (pq, "write_table", "items.parquet")):
        with monkeypatch.context() as patch:
            patch.setattr(module, save, full)
            with pytest.raises(UserError, match=rf"Cannot write .*{name}: No space left"):
                write()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "what was there stays whole"

    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name != "vectors.npy":  # the vectors are new, the items are still old
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("simsiam.runs.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write()
    with pytest.raises(UserError, match="Its writing was interrupted"):
        read_embeddings(tmp_path)


def test_a_first_writing_that_was_killed_is_begun_anew(run: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    out.mkdir()
    (out / ".vectors.npy.17.tmp").write_bytes(b"half")
    assert embed_to(run, copy, out)["new"] == 30
    (out / ".items.parquet.18.tmp").write_bytes(b"half")
    (out / ".notes.tmp").write_text("mine")
    assert embed_to(run, copy, out)["new"] == 0
    names = [".lock", ".notes.tmp", "items.parquet", "meta.json", "vectors.npy"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_embedding_again_computes_only_what_is_new(run: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    assert embed_to(run, copy, out)["new"] == 30
    first = np.load(out / "vectors.npy")
    assert embed_to(run, copy, out)["new"] == 0
    assert np.array_equal(first, np.load(out / "vectors.npy"))
    Image.new("RGB", (40, 40), "red").save(copy / "zz.png")
    min(copy.glob("*.png")).rename(copy / "yy.png")
    told = embed_to(run, copy, out)
    assert (told["new"], told["vectors"]) == (1, 31)
    ids = pq.read_table(out / "items.parquet")["id"].to_pylist()
    assert np.array_equal(np.load(out / "vectors.npy")[ids.index("yy.png")], first[0])


def test_only_one_process_embeds_into_a_folder(run: Path, copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    out.mkdir()
    lock = claim(out, "embedding")
    with pytest.raises(UserError, match=r"^Another process is embedding in .*vectors: wait for it, or choose another"):
        embed_to(run, copy, out)
    lock.release()
    assert embed_to(run, copy, out)["new"] == 30 and embed_to(run, copy, out)["new"] == 0


def test_what_another_process_has_embedded_meanwhile_is_not_replaced(
    run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(copy, tmp_path / "others")
    opened = open_images

    def slowly(data: str | Path) -> ImageSet:
        with monkeypatch.context() as patch:
            patch.setattr("simsiam.embeddings.open_images", opened)
            embed_to(run, tmp_path / "others", tmp_path / "out")
        return opened(data)

    monkeypatch.setattr("simsiam.embeddings.open_images", slowly)
    with pytest.raises(UserError, match=r"out holds embeddings of .*others: choose another -o"):
        embed_to(run, copy, tmp_path / "out")


def test_images_that_were_added_do_not_matter(run: Path, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in ("b.tar", "a.tar"):
        with tarfile.open(folder / name, "w") as tar:
            for path in sorted(copy.glob("*.png"))[:4]:
                tar.add(path, path.name)
        if name == "b.tar":
            embed_to(run, folder, tmp_path / "out")
    cache, rows = read_embeddings(tmp_path / "out").images()
    assert len(cache) == 8 and rows.tolist() == [4, 5, 6, 7]


def test_clusters_of_images_that_have_changed_are_named(run: Path, copy: Path, tmp_path: Path) -> None:
    class Heard(Listener):
        said: str = ""

        def say(self, text: str) -> None:
            self.said += text

    out, heard = tmp_path / "vectors", Heard()
    embed_to(run, copy, out)
    clusters(out, 3)
    embed_to(run, copy, out, listener=heard)
    assert not heard.said
    min(copy.glob("*.png")).unlink()
    embed_to(run, copy, out, listener=heard)
    assert "clusters.parquet still has the images of before: run `simsiam clusters` again" in heard.said
    heard.said = ""
    embed_to(run, copy, out, listener=heard)
    assert "again" in heard.said, "they still are those of before"
    clusters(out, 3)
    heard.said = ""
    embed_to(run, copy, out, listener=heard)
    assert not heard.said


def test_embeddings_of_other_data_are_not_replaced(run: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "first")
    shutil.copytree(copy, tmp_path / "second")
    embed_to(run, tmp_path / "first", tmp_path / "out")
    with pytest.raises(UserError, match=r"out holds embeddings of .*first: choose another -o, or delete it"):
        embed_to(run, tmp_path / "second", tmp_path / "out")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert embed_to(run, tmp_path / "moved", tmp_path / "out")["new"] == 0
    pattern = f"{tmp_path}/second/*.png"
    embed_to(run, pattern, tmp_path / "others")
    with pytest.raises(
        UserError, match=r"others holds embeddings of .*second/\*\.png: choose another -o, or delete it"
    ):
        embed_to(run, tmp_path / "moved", tmp_path / "others")
    shutil.rmtree(tmp_path / "second")
    assert embed_to(run, tmp_path / "moved", tmp_path / "others")["new"] == 0


def test_where_the_memory_is_short_a_batch_is_embedded_in_parts(
    run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(copy.iterdir())
    encoder = simsiam.load(run, precision="fp32")
    whole, most, taken = encoder.embed(paths), 4, []

    class Short(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            taken.append(len(x))
            return real(x)

    real = encoder.encoder_
    monkeypatch.setattr(encoder, "_in_use", Short())
    parts = encoder.embed(paths)
    assert sum(taken) == len(paths) and max(taken) == most
    assert np.allclose(parts, whole, atol=1e-5)
    most = 0
    with pytest.raises(
        UserError, match=r"Not even a single image fits into (this machine's memory|the memory of cuda)"
    ):
        encoder.embed(paths[:1])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_views_come_in_the_precision_that_the_encoder_takes(
    run: Path, copy: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16" and not computes_bf16(torch.device("cpu")):
        pytest.skip("this processor would have to emulate bf16")
    encoder, paths, seen = simsiam.load(run, "cpu", precision), sorted(copy.iterdir()), []
    real = _InUse.__call__

    def watched(folded: _InUse, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return real(folded, x)

    monkeypatch.setattr(_InUse, "__call__", watched)
    found = encoder.embed(paths)
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
    folded: Any = in_use(encoder.encoder_, encoder.compute_)
    monkeypatch.setattr(encoder, "_in_use", lambda x: real(folded, x))
    assert np.array_equal(found, encoder.embed(paths)), "float32 views, rounded by the encoder, give the same"


def test_a_set_without_a_usable_image_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.jpg"):
        embed_to(run, tmp_path / "bad", tmp_path / "out" / "of")
    assert not (tmp_path / "out" / "of").exists()


def test_embedding_holds_the_vectors_once(
    run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_to(run, copy, tmp_path / "whole")
    monkeypatch.setattr("simsiam.features.BATCH", 4)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: (made.append(shape), empty(*shape, **how))[1])
    out, later = tmp_path / "vectors", sorted(copy.iterdir())[::3]
    for path in later:
        path.rename(tmp_path / path.name)
    assert embed_to(run, copy, out)["new"] == 20
    for path in later:
        (tmp_path / path.name).rename(path)
    assert embed_to(run, copy, out)["new"] == 10
    whole, parts = (np.load(folder / "vectors.npy") for folder in (tmp_path / "whole", out))
    assert np.abs(parts - whole).max() < 0.05 * np.abs(whole).max()  # bf16 has 8 bits
    assert not {(20, 64), (10, 64)} & {*made}, "a second array of all new vectors"


def test_what_does_not_belong_together_is_refused(run: Path, copy: Path, photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    simsiam.train(photos, other, epochs=1, seed=5, **SMALL)
    out = tmp_path / "vectors"
    embed_to(run, copy, out)
    with pytest.raises(UserError, match="another encoder"):
        embed_to(other, copy, out)
    about = json.loads((run / "encoder.json").read_text())
    about["preprocessing"]["mean"][0] += 0.25
    shutil.copytree(run, tmp_path / "shifted")
    (tmp_path / "shifted" / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="another encoder"):  # same weights, other preprocessing
        embed_to(tmp_path / "shifted", copy, out)
    assert read_embeddings(out).encoder() is not None
    kept = (run / "encoder.json").read_text()
    (run / "encoder.json").write_text(json.dumps(about))
    try:
        with pytest.raises(UserError, match="other weights or"):
            read_embeddings(out).encoder()
    finally:
        (run / "encoder.json").write_text(kept)
    stored = read_embeddings(out)
    assert repr(stored) == f"Embeddings({str(out)!r}: {len(stored)} x {stored.meta['dim']})"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="something other than embeddings"):
        embed_to(run, copy, tmp_path / "thesis")
    description = (other / "encoder.json").read_text()
    assert '"width": 8' in description
    (other / "encoder.json").write_text(description.replace('"width": 8', '"width": 16'))  # as of another timm
    with pytest.raises(UserError, match=r"does not fit thin-resnet18 .*versions listed in .*environment\.json"):
        simsiam.load(other)
    (other / "encoder.json").write_text(description)
    (other / "encoder.safetensors").write_bytes((run / "encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match="not the file"):
        simsiam.load(other)
    (other / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*encoder\.safetensors: No such file"):
        simsiam.load(other)
    with pytest.raises(UserError, match="no trained encoder"):
        simsiam.load(tmp_path)


def test_embed_takes_what_people_have(run: Path, photos: Path) -> None:
    encoder = simsiam.load(run, precision="fp32")
    path = next(photos.rglob("*.png"))
    image = Image.open(path).convert("RGB")
    ways = [path, str(path), image, np.asarray(image)]
    vectors = encoder.embed(ways)
    assert vectors.shape == (4, encoder.dim) and vectors.dtype == np.float32
    assert np.allclose(vectors, vectors[0], atol=1e-5)
    batch = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    assert encoder.embed(batch).shape == (5, encoder.dim)
    assert encoder.embed([]).shape == (0, encoder.dim)
    for some in (dict.fromkeys([str(path)]), {0: image}.values(), deque([image]), (one for one in [image])):
        assert np.allclose(encoder.embed(some), vectors[:1], atol=1e-5)
    sizes = [Image.new("L", size, 90) for size in [(17, 90), (300, 40), (1, 1)]]
    together = encoder.embed(sizes)
    assert np.allclose(together, np.concatenate([encoder.embed([one]) for one in sizes]), atol=1e-4)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (["nowhere.jpg"], "nowhere.jpg"),
        ("one.jpg", "list"),
        (".", r"\. is a folder: .* list of its files"),
        ([np.zeros((8, 8, 3))], "float64"),
        ([np.zeros((8, 8, 5), np.uint8)], r"\[8, 8, 5\]"),
        ([np.zeros((0, 0, 3), np.uint8)], r"\[0, 0, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), "list"),  # not a batch of eight one-line images
        (np.zeros((8, 8), np.uint8), "list"),
    ],
)
def test_embed_says_what_it_cannot_take(run: Path, images: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        simsiam.load(run).embed(images)


def test_an_image_that_is_cut_off_is_named_however_it_is_given(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with Image.open(path) as opened:
        for image in (path, opened):
            with pytest.raises(UserError, match=r"Cannot read the image .*cut\.jpg: .*truncated"):
                simsiam.load(run).embed([image])


def test_an_image_that_is_damaged_inside_is_named(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(path)
    content = path.read_bytes()
    later = content.index(b"IDAT", content.index(b"IDAT") + 4)
    path.write_bytes(content[:later] + bytes(4) + content[later + 4 :])
    with Image.open(path) as opened, pytest.raises(UserError, match=r"Cannot read the image .*broken\.png"):
        simsiam.load(run).embed([opened])


def test_embed_looks_before_it_works(run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("images were decoded")

    monkeypatch.setattr("simsiam.data.cache.build_cache", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write to .*file/x.*-o"):
        embed_to(run, photos, tmp_path / "file" / "x")
    with pytest.raises(UserError, match=r"holds no trained encoder\. Name a folder that `simsiam train` wrote"):
        simsiam.load(photos)


def test_no_verb_decodes_onto_a_disk_without_room(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=0, free=1))
    for verb in (
        lambda: simsiam.train(photos, tmp_path / "run", epochs=1, **SMALL),
        lambda: embed_to(run, photos, tmp_path / "vectors"),
        lambda: evaluate_run(run),
    ):
        with pytest.raises(UserError, match=r"photos\S* needs about .* are free"):
            verb()
    assert not (tmp_path / "run").exists()
    assert all(not path.stat().st_size for path in (tmp_path / "cache").glob("*/images.bin"))


def test_it_is_a_scikit_learn_transformer(run: Path, photos: Path) -> None:
    paths = sorted(photos.rglob("*.png"))
    kinds = [path.parent.name for path in paths]
    pipeline = make_pipeline(ImageEncoder(str(run)), LogisticRegression(max_iter=500))
    pipeline.fit(paths, kinds)
    assert pipeline.score(paths, kinds) > 0.7  # chance is a third
    encoder = ImageEncoder(str(run), precision="fp32")
    check_is_fitted(encoder)
    twin = clone(encoder)
    assert twin.get_params() == {"run": str(run), "device": "auto", "precision": "fp32"}
    assert np.array_equal(twin.fit_transform(paths[:4]), encoder.transform(paths[:4]))
    assert encoder.get_feature_names_out().tolist() == [f"imageencoder{i}" for i in range(encoder.dim)]


def test_the_precision_is_that_of_training(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that updated embeddings are consistent; it is measured if the training precision is not known."""
    measured: list[int] = []
    monkeypatch.setattr("simsiam.weights.probe_encoder", lambda *_: measured.append(1) or "fp32")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for own, able, expected, asks in [
        ("bf16", True, "bf16", 0),
        ("bf16", False, "fp32", 1),
        ("fp32", True, "fp32", 0),
        ("auto", True, "fp32", 1),
    ]:
        monkeypatch.setattr("simsiam.weights.computes_bf16", lambda device, able=able: able)
        text = (run / "config.toml").read_text()
        (copy / "config.toml").write_text(re.sub(r"precision = .*", f'precision = "{own}"', text))
        measured.clear()
        assert simsiam.load(copy).compute_.precision == expected and len(measured) == asks
    (copy / "config.toml").unlink()  # as after `simsiam import` of a linear-classification file
    assert simsiam.load(copy).compute_.precision == "fp32" and len(measured) == 2


def test_the_encoder_on_disk_is_a_plain_network(run: Path) -> None:
    encoder, prepare, meta = read_encoder(run)
    assert not encoder.training and prepare.size == 16 and meta["dim"] == encoder.dim
    x = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    assert prepare(x).shape == (3, 3, 16, 16)
    assert torch.isfinite(encoder(prepare(x))).all()
    assert all(not name.startswith("backbone") for name in read_tensors(run / "encoder.safetensors")[0])


@pytest.mark.parametrize("size", [16, 32, 64, 96, 224])
def test_preprocessing_leaves_its_size(size: int) -> None:
    prepare = preprocessing(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert isinstance(prepare, Preprocessing) and round(prepare.short_side * prepare.share) == size
    white = torch.full((2, 3, prepare.short_side, prepare.short_side + 9), 255, dtype=torch.uint8)
    assert torch.allclose(prepare(white), torch.tensor(2.0), atol=1e-3)


def test_what_is_embedded_stays_as_it_was(run: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    encoder = simsiam.load(run)
    vectors = encoder.embed([image])
    assert image.size == (400, 300) and np.array_equal(vectors, encoder.embed([np.asarray(image)]))
    paths = np.array([str(tmp_path / "a.jpg")] * 2)
    assert np.array_equal(encoder.transform(paths), encoder.transform(paths.astype(object)))


@pytest.mark.parametrize(
    "one",
    [
        *(np.zeros(shape, np.uint8) for shape in ((8, 9, 3), (8, 9))),
        torch.zeros(8, 9, 3, dtype=torch.uint8),  # else every row of pixels would be an image
        Image.new("L", (9, 8)),
        "a.png",
        Path("a.png"),
        b"\xff\xd8",
    ],
    ids=lambda one: type(one).__name__,
)
def test_one_image_is_no_list_of_images(run: Path, one: object) -> None:
    with pytest.raises(UserError, match=r"put a single image into a list, \[image\]"):
        simsiam.load(run).embed(one)


def test_what_is_nearly_a_list_of_images_is_told_how(run: Path, photos: Path) -> None:
    paths = np.array([str(path) for path in sorted(photos.rglob("*.png"))[:4]])
    gray = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    encoder = simsiam.load(run)
    for wrong, hint, right in ((paths[:, None], r"column\.ravel\(\)", paths), (gray, r"list\(array\)", list(gray))):
        with pytest.raises(UserError, match=hint):
            encoder.embed(wrong)
        assert len(encoder.embed(right)) == len(right)


def test_a_damaged_description_is_one_line(run: Path, tmp_path: Path) -> None:
    for text in ("{}", "[1]", '{"encoder": {"name": "thin-resnet18", "size": 16}}'):
        shutil.copytree(run, tmp_path / "run", dirs_exist_ok=True)
        (tmp_path / "run" / "encoder.json").write_text(text)
        with pytest.raises(
            UserError, match=r"encoder.json(:| is damaged:) it (is not a JSON object|does not describe an encoder)"
        ):
            read_encoder(tmp_path / "run")


def test_other_parameters_are_another_encoder(run: Path, photos: Path, tmp_path: Path) -> None:
    simsiam.train(photos, tmp_path / "wide", epochs=1, overrides=[*SMALL["overrides"], "encoder.width=12"])
    encoder, paths = simsiam.load(run), sorted(photos.rglob("*.png"))[:2]
    first = encoder.embed(paths)
    second = encoder.set_params(run=str(tmp_path / "wide")).fit().embed(paths)
    assert second.shape[1] == encoder.dim == 12 * 8 != first.shape[1]
    with pytest.raises(UserError, match="precision is 'fp99'"):
        encoder.set_params(precision="fp99").embed(paths)


def test_the_untrained_encoder_is_a_function_of_its_seed(photos: Path, tmp_path: Path) -> None:
    """Also with dropout and stochastic depth: only the BN statistics are measured."""
    spec, prepare = EncoderSpec("efficientnet_b0", 32), preprocessing(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    cache = build_cache(open_images(photos), prepare.short_side, tmp_path)
    compute = Compute(torch.device("cpu"), "fp32")
    rows = cache.usable(np.arange(len(cache)))
    rows = np.arange(len(cache))[rows][:32]
    first, second = (untrained(spec, 0, prepare, cache, rows, compute).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.ne(0).any() for name, value in first.items() if name.endswith("running_mean"))


def test_a_last_batch_of_one_image_is_no_part_of_bn_statistics(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single image with a 1 x 1 feature map has no variance."""
    spec, prepare = EncoderSpec("resnet18", 32), preprocessing(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    cache, compute = (
        build_cache(open_images(photos), prepare.short_side, tmp_path),
        Compute(torch.device("cpu"), "fp32"),
    )
    rows = cache.decoded(np.arange(len(cache)))
    monkeypatch.setattr("simsiam.features.BATCH", 8)
    whole, more = (untrained(spec, 0, prepare, cache, rows[:count], compute).state_dict() for count in (16, 17))
    assert all(torch.equal(whole[name], more[name]) for name in whole)
    few = untrained(spec, 0, prepare, cache, rows[:5], compute).state_dict()
    assert few["backbone.bn1.running_mean"].any()


def closed_image() -> Image.Image:
    image = Image.new("RGB", (9, 9))
    image.close()
    return image


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (None, "a list of images"),
        (SimpleNamespace(columns=["path"], ndim=2), r"pass table\['path'\]"),  # a data frame
        ([np.zeros((3, 9, 9), np.uint8)], "transpose"),
        ([np.zeros((9, 9, 3))], "from 0 to 255"),
        ([b"\xff\xd8..."], r"image 0 \(from 0\) is bytes: open it with PIL"),
        ([np.zeros((9, 9, 3), np.uint8), None], r"image 1 \(from 0\) is missing \(None\)\.$"),
        ([np.zeros((9, 9, 3), np.uint8)] * 700 + [float("nan")], r"image 700 \(from 0\) is missing \(nan\)\.$"),
        ([closed_image()], "Operation on closed image"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_do(run: Path, images: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        simsiam.load(run).embed(images)


def test_images_are_reduced_as_they_come(run: Path) -> None:
    """A generator may yield more than fits into memory; files among its images keep their places."""
    encoder, alive = simsiam.load(run), set[int]()

    def photographs(paths: list[Path]) -> Iterator[Any]:
        for i, path in enumerate(paths):
            image = np.random.default_rng(i).integers(0, 255, (300, 200, 3), np.uint8)
            Image.fromarray(image).save(path)
            alive.add(i)
            weakref.finalize(image, alive.discard, i)
            assert len(alive) <= 3
            yield path if i % 5 == 3 else image
            del image

    paths = [run / f"photograph {i}.png" for i in range(30)]
    found = encoder.embed(photographs(paths))
    assert np.array_equal(found, encoder.embed(paths))


@pytest.mark.parametrize(("run", "says"), [(None, "not NoneType"), ({"run": "r"}, r"not dict\. .*summary\['run'\]")])
def test_what_names_no_run_is_refused_with_what_to_do(run: object, says: str) -> None:
    for use in (simsiam.load, lambda run: ImageEncoder(run).fit()):
        with pytest.raises(UserError, match=says):
            use(run)


def test_a_home_folder_is_expanded(run: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `--out=` shells do not, and Python never does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(copy)
    shutil.copytree(run, tmp_path / "run")
    name = min(copy.glob("*.png")).name
    vectors = simsiam.load("~/run").embed([f"~/images/{name}"])
    assert embed_to("~/run", "~/images", "~/out")["vectors"] == 30 and not (copy / "~").exists()
    stored = read_embeddings("~/out")
    assert np.allclose(stored.vectors[stored.ids.index(name)], vectors[0], atol=1e-4)
    assert stored.meta["run"] == str(tmp_path / "run")
    assert evaluate_run("~/run", names="collapse", baselines=False)["file"] == str(tmp_path / "run" / "evaluation.json")


def test_images_of_a_torchvision_set_may_move(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    root = tmp_path / "old"
    for i in range(20):
        path = root / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    assert embed_to(run, f"ImageFolder:{root}", tmp_path / "out")["new"] == 20
    shutil.copytree(root, tmp_path / "new")
    with pytest.raises(UserError, match=r"holds embeddings of ImageFolder:.*old"):
        embed_to(run, f"ImageFolder:{tmp_path / 'new'}", tmp_path / "out")
    shutil.rmtree(root)
    assert embed_to(run, f"ImageFolder:{tmp_path / 'new'}", tmp_path / "out")["new"] == 0


def test_an_empty_file_of_vectors_is_one_line_and_made_again(run: Path, copy: Path, tmp_path: Path) -> None:
    embed_to(run, copy, tmp_path / "out")
    (tmp_path / "out" / "vectors.npy").write_bytes(b"")
    with pytest.raises(UserError, match="Cannot read the embeddings"):
        read_embeddings(tmp_path / "out")
    assert embed_to(run, copy, tmp_path / "out")["new"] == 30


def test_a_missing_value_of_a_table_is_named(run: Path) -> None:
    class Missing:
        """pandas' NA: neither equal to itself nor not."""

        def __eq__(self, other: object) -> Any:
            return self

        def __hash__(self) -> int:
            return 0

        def __bool__(self) -> bool:
            raise TypeError("boolean value of NA is ambiguous")

        def __repr__(self) -> str:
            return "<NA>"

    for missing in (Missing(), float("nan"), None):
        with pytest.raises(UserError, match=r"image 1 \(from 0\) is missing"):
            simsiam.load(run).embed([np.zeros((8, 8, 3), np.uint8), missing])


def test_an_encoder_that_could_not_be_opened_again_is_not_half_of_each(run: Path, copy: Path, tmp_path: Path) -> None:
    encoder = simsiam.load(run)
    before = encoder.embed(sorted(copy.iterdir())[:2])
    for wrong in ({"precision": "bad"}, {"run": str(tmp_path / "gone")}):
        encoder.set_params(**wrong)
        with pytest.raises(UserError):
            encoder.embed([])
        encoder.set_params(run=os.fspath(run), precision="auto")
        assert np.array_equal(encoder.embed(sorted(copy.iterdir())[:2]), before)


def test_progress_is_closed_however_it_ends(run: Path, copy: Path, tmp_path: Path) -> None:
    class Bar(Listener):
        closed = 0
        compared: tuple[int, int] = (0, 0)

        def checking(self, done: int, total: int, bad: int) -> None:
            self.compared = (done, total)

        def embedding(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            self.closed += 1

    heard = Bar()
    with pytest.raises(KeyboardInterrupt):
        embed_to(run, copy, tmp_path / "out", listener=heard)
    assert heard.closed and heard.compared == (30, 30)
    heard.closed = 0
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, names="collapse", listener=heard)
    assert heard.closed
    heard.closed = 0
    with pytest.raises(UserError):
        simsiam.train(copy, tmp_path / "other", listener=heard, encoder="thin-resnet19")
    assert heard.closed
