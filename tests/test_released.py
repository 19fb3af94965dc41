"""A released checkpoint becomes a run: same outputs, same next step, and usable by every other command."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import v2

import simsiam
from simsiam import methods
from simsiam.assess import evaluate_run
from simsiam.config import UserError, read_recipe
from simsiam.data.sources import absolute
from simsiam.embeddings import embed_to
from simsiam.encoders import build
from simsiam.export import export
from simsiam.recipe import read
from simsiam.released import import_released
from simsiam.runs import Checkpoints, read_json
from simsiam.session import _load_optimizer
from simsiam.show.report import write_report
from simsiam.train import optimizer
from test_parity import Released, off, outputs, released, released_loss, views
from test_train import command

pytestmark = pytest.mark.usefixtures("one_thread", "tidy")

LR = 0.05


@pytest.fixture
def tidy(tmp_path: Path) -> Iterator[None]:
    """Delete the files afterwards: whole networks are too large to keep."""
    yield
    shutil.rmtree(tmp_path)


def sgd(model: Released, fix_pred_lr: bool) -> torch.optim.SGD:
    """The released optimiser: encoder and predictor as two groups, or everything in one."""
    groups: Any = model.parameters()
    if fix_pred_lr:
        groups = [
            {"params": model.encoder.parameters(), "fix_lr": False},
            {"params": model.predictor.parameters(), "fix_lr": True},
        ]
    return torch.optim.SGD(groups, LR, momentum=0.9, weight_decay=1e-4)


def step(model: Released, optimiser: torch.optim.SGD, seed: int) -> None:
    loss = released_loss(*model(*views(seed)))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def released_file(folder: Path, *, fix_pred_lr: bool = True, prefix: str = "module.") -> tuple[Path, Released, Any]:
    """A checkpoint in the released format after three steps, so that all running statistics have changed."""
    model = released("resnet18")
    optimiser = sgd(model, fix_pred_lr)
    for seed in range(3):
        step(model, optimiser, seed)
    path = folder / "checkpoint_0099.pth.tar"
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": optimiser.state_dict()}, path)
    return path, model, optimiser


def method_of(run: Path) -> tuple[Any, torch.optim.Optimizer, dict[str, Tensor]]:
    """Our method and optimiser, built from `config.toml` and loaded from the run's checkpoint."""
    plan = read(read_recipe(run / "config.toml"))
    method = methods.get(plan.method).Method(build(plan.encoder, 7), plan.method_settings)
    found = Checkpoints(run).load()
    assert found is not None
    tensors = found[0]
    method.load_state_dict(
        {name.removeprefix("method."): v for name, v in tensors.items() if name.startswith("method.")}
    )
    ours = optimizer(method, plan)
    _load_optimizer(ours, tensors)
    return method, ours, tensors


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Released]:
    folder = tmp_path_factory.mktemp("released")
    path, model, _ = released_file(folder)
    import_released(path, folder / "run")
    return folder / "run", model


def test_in_use_the_outputs_are_theirs(imported: tuple[Path, Released]) -> None:
    """z and p with running BN statistics, where the bias that ours lacks would show."""
    run, theirs = imported
    method, _, _ = method_of(run)
    assert theirs.encoder.fc[6].bias.abs().max() > 0.01
    predictions = outputs(method.predictor)
    theirs.eval()
    method.eval()
    x1, x2 = views(9)
    with torch.no_grad():
        p1, p2, z1, z2 = theirs(x1, x2)
        method([x1, x2], torch.arange(len(x1)))
        found = [*predictions, method.embed(x1)[1], method.embed(x2)[1]]
    assert max(off(a, b) for a, b in zip(found, (p1, p2, z1, z2), strict=True)) < 1e-5


@pytest.mark.parametrize("fix_pred_lr", [True, False])
def test_the_next_step_is_theirs(tmp_path: Path, fix_pred_lr: bool) -> None:
    """Momentum is assigned to the right parameters: in the next step, all weights move like theirs."""
    path, theirs, optimiser = released_file(tmp_path, fix_pred_lr=fix_pred_lr)
    summary = import_released(path, tmp_path / "run")
    assert summary["imported"]["momentum"]
    method, ours, _ = method_of(tmp_path / "run")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    step(theirs, optimiser, 5)
    for group in ours.param_groups:
        group["lr"] = LR
    loss, _ = method(views(5), torch.arange(8))
    loss.backward()
    ours.step()
    wanted = {f"encoder.backbone.{name}": value for name, value in theirs.encoder.named_parameters()}
    wanted |= {f"projector.{name}": value for name, value in theirs.encoder.fc.named_parameters()}
    wanted |= {f"predictor.{name}": value for name, value in theirs.predictor.named_parameters()}
    moved = {name: off(p - before[name], wanted[name] - before[name]) for name, p in method.named_parameters()}
    assert max(moved.values()) < 1e-3, moved  # the difference of rounded weights


@pytest.mark.parametrize("what", ["missing", "of another shape"])
def test_momentum_that_does_not_fit_is_left_out(tmp_path: Path, what: str) -> None:
    path, _, _ = released_file(tmp_path)
    file = torch.load(path, weights_only=True)
    state = file["optimizer"]["state"]
    if what == "missing":
        del state[3]
    else:
        state[3]["momentum_buffer"] = state[3]["momentum_buffer"][:-1].clone()
    torch.save(file, path)
    summary = import_released(path, tmp_path / "run")
    assert summary["imported"]["momentum"] is False and summary["imported"]["heads"]
    assert not [name for name in Checkpoints(tmp_path / "run").load()[0] if name.startswith("optimizer.")]


def test_what_the_file_tells_is_in_the_run(imported: tuple[Path, Released]) -> None:
    run, _ = imported
    plan, summary = read(read_recipe(run / "config.toml")), read_json(run / "summary.json")
    assert (plan.encoder.name, plan.method_settings.dim, plan.method_settings.predictor_hidden) == ("resnet18", 64, 16)
    assert (plan.train.epochs, plan.train.batch_size, plan.views.size, plan.eval.size) == (100, 512, 224, 224)
    assert (summary["epochs"], summary["steps"], summary["dim"], summary["verdict"]) == (100, 3, 64, None)
    keys = "run method encoder images bad_files epochs steps seconds images_per_second loss std effective_rank verdict"
    assert {*keys.split(), "knn", "data", "evidence", "advice"} <= summary.keys()
    assert read_json(run / "encoder.json")["preprocessing"]["size"] == 224
    assert Checkpoints(run).load("HEALTHY")[1]["step"] == 3
    write_report(run)


def test_images_are_prepared_as_the_released_evaluation_does(imported: tuple[Path, Released]) -> None:
    """Resize 256, centre crop 224, ImageNet's mean and std, then the plain network, by torchvision's transforms."""
    run, theirs = imported
    pixels = np.random.default_rng(0).integers(0, 256, (2, 300, 256, 3), dtype=np.uint8)
    prepare = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    plain = models.resnet18(num_classes=5)
    plain.load_state_dict({k: v for k, v in theirs.encoder.state_dict().items() if k[:3] != "fc."}, strict=False)
    plain.fc = nn.Identity()
    with torch.inference_mode():
        wanted = plain.eval()(prepare(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    found = torch.from_numpy(simsiam.load(run, "cpu", precision="fp32").embed(pixels))
    assert off(found, wanted) < 1e-5


def test_from_the_released_file_to_evaluation_vectors_and_export(
    imported: tuple[Path, Released], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measuring bf16 against fp32 takes longer than everything else.
    monkeypatch.setattr("simsiam.weights.probe_encoder", lambda *_: "fp32")
    run, theirs = imported
    few = tmp_path / "few"
    for source in sorted(photos.rglob("*.png"))[::6]:
        target = few / source.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    result = evaluate_run(run, few, names=["knn", "collapse"])
    assert {"trained", "untrained", "pixels"} <= result["knn"].keys() and result["collapse"]["verdict"]
    assert embed_to(run, few, tmp_path / "vectors")["dim"] == 512
    written = torch.load(export(run, "torchvision")["path"], weights_only=True)
    state = theirs.encoder.state_dict()
    assert written.keys() == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(value, state[name]) for name, value in written.items())
    with pytest.raises(UserError, match="ImageNet"):  # the default data set, which is not available
        evaluate_run(run)


def test_linear_classification_gives_the_encoder_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=10)
    plain.bn1.num_batches_tracked.fill_(20)
    state = {f"module.{name}": value for name, value in plain.state_dict().items()}
    file = {"epoch": 90, "arch": "resnet18", "state_dict": state, "best_acc1": torch.tensor(68.1), "optimizer": {}}
    torch.save(file, tmp_path / "model_best.pth.tar")
    summary = import_released(tmp_path / "model_best.pth.tar", tmp_path / "run", data="CIFAR10")
    assert not summary["imported"]["heads"] and not (tmp_path / "run" / "checkpoints").exists()
    assert (summary["epochs"], summary["steps"], summary["data"]) == (None, 10, absolute("CIFAR10"))
    x = torch.randn(2, 3, 64, 64)
    encoder = simsiam.load(tmp_path / "run", "cpu", precision="fp32").encoder_
    plain.fc = nn.Identity()
    with torch.inference_mode():
        assert off(encoder(x), plain.eval()(x)) < 1e-6


def test_names_without_module_and_a_bare_state_dict(tmp_path: Path, imported: tuple[Path, Released]) -> None:
    run, theirs = imported
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="--encoder"):
        import_released(tmp_path / "bare.pth", tmp_path / "run")
    summary = import_released(tmp_path / "bare.pth", tmp_path / "run", encoder="resnet18")
    assert (summary["epochs"], summary["imported"]["momentum"]) == (None, False)
    sha256 = [read_json(folder / "encoder.json")["sha256"] for folder in (run, tmp_path / "run")]
    assert sha256[0] == sha256[1]


def test_the_command_line_prints_one_json_object(tmp_path: Path) -> None:
    path, _, _ = released_file(tmp_path)
    done = subprocess.run(
        command("import", path, "-o", tmp_path / "run", "--json"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_json(tmp_path / "run" / "summary.json")
    assert "resnet18 after 3 steps: encoder, heads and momentum" in done.stderr and "simsiam evaluate" in done.stderr


def test_there_is_nothing_to_resume(imported: tuple[Path, Released]) -> None:
    run, _ = imported
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match=rf"was imported .*simsiam train DATA --init {run}"):
        simsiam.train(out=run, resume=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# --- what is refused --------------------------------------------------------------------------------------------------


class Malicious:
    """Creates a folder if it is unpickled without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_never_run(tmp_path: Path, new_format: bool) -> None:
    path, trap = tmp_path / "evil.pth.tar", tmp_path / "trap"
    file = {"arch": "resnet18", "state_dict": {"module.conv1.weight": torch.ones(1)}, "optimizer": Malicious(trap)}
    torch.save(file, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=r"mkdir.*never run") as refused:
        import_released(path, tmp_path / "run")
    assert not trap.exists() and not (tmp_path / "run").exists()
    assert "\n" not in str(refused.value)
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap works: only our care kept it shut"


def test_a_plain_pickle_is_not_run_either(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, trap = tmp_path / "evil.pth.tar", tmp_path / "trap"
    path.write_bytes(pickle.dumps({"state_dict": Malicious(trap)}, protocol=4))
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        import_released(path, tmp_path / "run")
    assert not trap.exists() and not recwarn.list


def tensors(names: tuple[str, ...] = ("module.conv1.weight",)) -> dict[str, Tensor]:
    return {name: torch.ones(2, 2) for name in names}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({"arch": "resnet1800", "state_dict": tensors()}, "resnet18"),
        ({"arch": "vgg16", "state_dict": tensors()}, "trains ResNets"),
        ({"arch": "resnet18", "state_dict": tensors()}, "missing: bn1.weight.*another shape: conv1.weight"),
        ({"arch": "resnet18", "state_dict": tensors(("encoder.conv1.weight",))}, "no matrix encoder.fc.6.weight"),
        (
            {"arch": "resnet18", "state_dict": tensors(("encoder.fc.6.weight", "predictor.0.weight"))},
            "missing: encoder.conv1.weight, .* and [0-9]+ more",
        ),
        ({"arch": "resnet18", "state_dict": {}}, "no state_dict"),
        ({"arch": "resnet18", "state_dict": [1]}, "no state_dict"),
        ({"epoch": 3}, "'epoch' in it is not the name of a tensor"),
        ([1, 2], "holds a list"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path, file: Any, says: str) -> None:
    torch.save(file, tmp_path / "file.pth.tar")
    with pytest.raises(UserError, match=says) as refused:
        import_released(tmp_path / "file.pth.tar", tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04 broken", json.dumps({"arch": "x"}).encode(), b"\x80\x02}q\x00."]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pth.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"file.pth.tar (is not a PyTorch checkpoint|has no state_dict)"):
        import_released(tmp_path / "file.pth.tar", tmp_path / "run")


def test_one_tensor_too_many_or_too_few(tmp_path: Path) -> None:
    path, _, _ = released_file(tmp_path, prefix="")
    file = torch.load(path, weights_only=True)
    bias = file["state_dict"].pop("encoder.fc.6.bias")
    torch.save(file, path)
    with pytest.raises(UserError, match=r"missing: encoder\.fc\.6\.bias"):
        import_released(path, tmp_path / "run")
    file["state_dict"] |= {"encoder.fc.6.bias": bias, "queue": bias}
    torch.save(file, path)
    with pytest.raises(UserError, match="unexpected: queue"):
        import_released(path, tmp_path / "run")


def test_nothing_is_overwritten_and_nowhere_is_named(tmp_path: Path, imported: tuple[Path, Released]) -> None:
    with pytest.raises(UserError, match="another -o"):
        import_released(tmp_path / "nowhere.pth.tar", imported[0])
    with pytest.raises(UserError, match=r"nowhere.pth.tar: No such file"):
        import_released(tmp_path / "nowhere.pth.tar", tmp_path / "run")
    with pytest.raises(UserError, match="directory"):
        import_released(tmp_path, tmp_path / "run")
