"""An exported file is read by its target software without our code, and gives our features."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import skimage.data
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import simsiam
from simsiam import cli
from simsiam.config import UserError
from simsiam.encoders import EncoderSpec, build
from simsiam.export import TARGETS, FromPixels, export
from simsiam.features import preprocessing
from simsiam.runs import read_json
from simsiam.weights import save_encoder
from test_parity import off
from test_train import command

pytestmark = pytest.mark.usefixtures("one_thread", "tidy")

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def tidy(tmp_path: Path) -> Iterator[None]:
    """Delete the files afterwards: whole networks are too large to keep."""
    yield
    shutil.rmtree(tmp_path)


def make_run(folder: Path, name: str, size: int, **settings: Any) -> Path:
    """Write a run's encoder with random weights and BN statistics, as if trained."""
    encoder = build(EncoderSpec(name, size, **settings), 0)
    draws = torch.Generator().manual_seed(1)
    for key, value in encoder.backbone.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            low = 0.5 if key.endswith(("weight", "running_var")) else -0.2
            value.copy_(low + 0.5 * torch.rand(value.shape, generator=draws))
    save_encoder(folder, encoder, preprocessing(size, *IMAGENET), 0, {"data": "demo"})
    return folder


def images(size: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def features(run: Path, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return simsiam.load(run, "cpu", "fp32").encoder_(x)


def by_the_line_it_prints(use: str) -> nn.Module:
    """Run the printed line `use` without any other imports."""
    names: dict[str, Any] = {}
    exec(use, names)
    model: nn.Module = names["model"]
    return model


def test_torchvision_loads_all_but_its_classifier(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet18", 64)
    result = export(run, "torchvision")
    path = run / "export" / "resnet18-torchvision.pth"
    assert result.pop("preprocessing") == read_json(run / "encoder.json")["preprocessing"]
    assert result.pop("max_error") < 1e-6
    use = result.pop("use")
    assert result == {"run": str(run), "to": "torchvision", "path": str(path), "dim": 512}
    model = torchvision.models.resnet18(num_classes=7)
    told = model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert (sorted(told.missing_keys), told.unexpected_keys) == (["fc.bias", "fc.weight"], [])
    model.fc = nn.Identity()
    with torch.inference_mode():
        assert off(model.eval()(images(64)), features(run, images(64))) < 1e-6
        assert off(by_the_line_it_prints(use)(images(64)), features(run, images(64))) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 64), ("timm/resnet18", 64), ("timm/vit_tiny_patch16_224", 64), ("densenet121", 64)]
)
def test_timm_loads_it_strictly(tmp_path: Path, name: str, size: int) -> None:
    run = make_run(tmp_path / "run", name, size)
    model = by_the_line_it_prints(export(run, "timm")["use"])
    with torch.inference_mode():
        assert off(model(images(size)), features(run, images(size))) < 1e-5


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_cifar_net_is_theirs_but_for_the_stem(tmp_path: Path, library: str) -> None:
    run = make_run(tmp_path / "run", "cifar-resnet18", 32)
    result = export(run, library)
    model = by_the_line_it_prints(result["use"])
    assert result["max_error"] < 1e-6 and model.conv1.stride == (1, 1)
    with torch.inference_mode():
        assert off(model(images(32)), features(run, images(32))) < 1e-5


def test_torchvision_is_told_what_the_run_told_it(tmp_path: Path) -> None:
    """GoogLeNet is exported without auxiliary classifiers."""
    run = make_run(tmp_path / "run", "googlenet", 64)
    result = export(run, "torchvision")
    assert result["max_error"] < 1e-5
    with torch.inference_mode():
        assert off(by_the_line_it_prints(result["use"])(images(64)), features(run, images(64))) < 1e-5


@pytest.mark.parametrize(
    ("name", "settings", "to"),
    [
        ("thin-resnet18", {"width": 8}, "torchvision"),
        ("thin-resnet18", {"width": 8}, "timm"),
        ("timm/convnext_atto", {}, "torchvision"),  # unknown to torchvision
        ("timm/efficientnet_b0", {}, "torchvision"),  # same name, different modules
        ("squeezenet1_1", {}, "timm"),
    ],
)
def test_without_a_counterpart_another_format_is_named(
    tmp_path: Path, name: str, settings: dict[str, Any], to: str
) -> None:
    run = make_run(tmp_path / "run", name, 64, **settings)
    with pytest.raises(UserError, match=f"{to}.*--to safetensors.*--to onnx"):
        export(run, to)
    assert not (run / "export").exists()


def test_safetensors_hold_weights_and_all_that_their_use_needs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)
    result = export(run, "safetensors", tmp_path / "elsewhere" / "net.safetensors")
    weights = safetensors.torch.load_file(result["path"])
    with safe_open(result["path"], "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items()}
    told = read_json(run / "encoder.json")
    assert header == {key: told[key] for key in ("encoder", "dim", "preprocessing", "sha256")}
    twin = build(EncoderSpec(**header["encoder"]), 5)
    twin.backbone.load_state_dict(weights)
    with torch.inference_mode():
        assert off(twin.eval()(images(32)), features(run, images(32))) < 1e-6 and result["max_error"] == 0


def test_nothing_but_an_earlier_export_is_overwritten(tmp_path: Path) -> None:
    run, picture = make_run(tmp_path / "run", "thin-resnet18", 32, width=8), tmp_path / "mine.png"
    picture.write_bytes(b"years of work")
    weights = (run / "encoder.safetensors").read_bytes()
    state = run / "checkpoints" / "step-000000001.safetensors"
    state.parent.mkdir()
    state.write_bytes(b"hours of work")
    (run / "config.toml").write_text("")
    for out in (picture, run / "encoder.safetensors", state):
        with pytest.raises(UserError, match="is not an export"):
            export(run, "safetensors", out)
    assert picture.read_bytes() == b"years of work" and (run / "encoder.safetensors").read_bytes() == weights
    assert state.read_bytes() == b"hours of work"
    for _ in range(2):
        export(run, "safetensors", tmp_path / "mine.safetensors")
    found = export(run, "safetensors", tmp_path / "new")  # no suffix: a folder
    assert Path(found["path"]).parent == tmp_path / "new"
    # File permissions follow the umask.
    assert Path(found["path"]).stat().st_mode == (run / "encoder.json").stat().st_mode


def test_a_folder_given_to_out_takes_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)
    (tmp_path / "out").mkdir()
    assert export(run, "safetensors", tmp_path / "out")["path"] == str(tmp_path / "out" / "thin-resnet18.safetensors")


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "thin-resnet18", 72, width=8)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """One photograph at sizes around the run's 82 pixels: larger, equal, smaller, elongated."""
    full = Image.fromarray(skimage.data.astronaut())
    sizes = (512, 512), (300, 200), (161, 250), (82, 110), (60, 45), (40, 41), (600, 100)
    return [np.array(full.resize(size)) for size in sizes]


def test_onnx_takes_any_batch_and_gives_our_features(run: Path) -> None:
    result = export(run, "onnx")
    by_the_line: dict[str, Any] = {"images": images(72).numpy()}
    exec(result["use"], by_the_line)
    assert by_the_line["features"].shape == (3, result["dim"])
    session = onnxruntime.InferenceSession(result["path"])
    for batch in (1, 2, 5):
        found = session.run(None, {"images": images(72, batch).numpy()})[0]
        assert off(torch.from_numpy(found), features(run, images(72, batch))) < 1e-5
    assert 0 < result["max_error"] < 1e-5
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["preprocessing"]) == read_json(run / "encoder.json")["preprocessing"]
    assert [path.name for path in (run / "export").iterdir()] == ["thin-resnet18.onnx"], "one file, weights inside"


def test_with_preprocessing_raw_pixels_go_in(run: Path, photographs: list[np.ndarray], tmp_path: Path) -> None:
    """For any height and width, enlarged or reduced, the features match those of `embed` on the same pixels."""
    result = export(run, "onnx", tmp_path / "net.onnx", with_preprocessing=True)
    session = onnxruntime.InferenceSession(result["path"])
    ours = simsiam.load(run, "cpu", "fp32")
    for photograph in photographs:
        batch = np.stack([photograph, photograph[::-1]])
        found = session.run(None, {"pixels": batch})[0]
        assert off(torch.from_numpy(found), torch.from_numpy(ours.embed(batch))) < 2e-4, photograph.shape


@pytest.mark.parametrize("side", [98, 130, 154, 102])
def test_a_side_that_ends_in_a_half_pixel_is_rounded_as_in_use(tmp_path: Path, side: int) -> None:
    """Scaled by 24/96, sides of 98, 130 and 154 end in half a pixel, which Python rounds to even."""
    run = make_run(tmp_path / "run", "thin-resnet18", 24, width=8)
    ours = simsiam.load(run, "cpu", "fp32")
    rng = np.random.default_rng(0)
    for shape in ((96, side), (side, 96)):
        image = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(shape[::-1]))
        with torch.inference_mode():
            found = FromPixels(ours.encoder_, ours.preprocessing_)(torch.from_numpy(image.copy())[None])
        assert off(found, torch.from_numpy(ours.embed([image]))) < 5e-4
    result = export(run, "onnx", tmp_path / "net.onnx", with_preprocessing=True)
    found = onnxruntime.InferenceSession(result["path"]).run(None, {"pixels": image[None]})[0]
    assert off(torch.from_numpy(found), torch.from_numpy(ours.embed([image]))) < 5e-4


def test_enlarging_is_exact_and_reducing_is_pillows(run: Path, photographs: list[np.ndarray]) -> None:
    """The network gets the same pixels as in `embed`, up to rounding by at most one level."""
    ours = simsiam.load(run, "cpu", "fp32")
    seen: list[Tensor] = []

    class Keep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    ours._in_use = Keep()
    level = 1 / 255 / torch.tensor(IMAGENET[1])[:, None, None]
    for photograph in photographs:
        ours.embed([photograph])
        FromPixels(Keep(), ours.preprocessing_)(torch.from_numpy(photograph)[None])
        levels = ((seen[-1] - seen[-2]) / level).abs()
        if min(photograph.shape[:2]) <= 82:
            assert levels.max() < 0.01
        else:
            assert levels.max() < 2.1 and levels.mean() < 0.01


def test_a_missing_package_is_named_with_what_installs_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(UserError, match=r"onnxscript: pip install 'simsiam\[onnx\]'"):
        export(run, "onnx")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_file_whose_features_are_not_ours_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)

    def damaged(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        return {name: 1.01 * value for name, value in safetensors.torch.load_file(path).items()}, {}

    monkeypatch.setattr("simsiam.export.read_tensors", damaged)
    with pytest.raises(UserError, match="differ from ours"):
        export(run, "safetensors")
    assert not list((run / "export").iterdir())


@pytest.mark.parametrize(
    ("to", "options", "says"),
    [("tensorflow", {}, "torchvision"), ("timm", {"with_preprocessing": True}, "--to onnx")],
)
def test_mistakes_are_named(tmp_path: Path, to: str, options: dict[str, Any], says: str) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)
    with pytest.raises(UserError, match=says):
        export(run, to, **options)
    with pytest.raises(UserError, match="no trained encoder"):
        export(tmp_path, "onnx")


def test_the_command_line_prints_one_json_object(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)
    done = subprocess.run(
        command("export", run, "--to", "safetensors", "--json"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"run", "to", "path", "dim", "max_error"} <= told.keys() and Path(told["path"]).is_file()
    assert told["path"] in done.stderr
    offered = typing.get_args(typing.get_type_hints(cli.export)["to"])
    assert offered == tuple(TARGETS)


def test_a_folder_called_checkpoints_is_no_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)
    out = tmp_path / "checkpoints" / "net.safetensors"
    assert export(run, "safetensors", out)["path"] == export(run, "safetensors", out)["path"] == str(out)


def test_what_failed_is_exported_with_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "thin-resnet18", 32, width=8)
    about = read_json(run / "encoder.json")
    (run / "encoder.json").write_text(json.dumps({**about, "verdict": "collapsed"}))
    with pytest.warns(UserWarning, match="run collapsed: its vectors are nearly the same for all images"):
        export(run, "safetensors")
