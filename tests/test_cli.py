"""The command line as a stable contract: commands, exit status, stdout and stderr."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import pytest

import simsiam
from simsiam import cli, reproduce
from simsiam.config import UserError
from simsiam.console import Listener
from simsiam.plan import plan
from test_decode import write_nasty_folder
from test_train import SMALL, command

VERBS = [each.name or each.callback.__name__ for each in cli.app.registered_commands if each.callback]


def simsiam_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, "COLUMNS": "160"}
    )


def called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[object, str, str]:
    """Run the command line in this process; return exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["simsiam", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr()
    return left.value.code, shown.out, shown.err


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    simsiam.train(photos, folder, epochs=2, **SMALL)
    return folder


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_never_imports_torch(verb: str | None) -> None:
    code = (
        "import sys\nsys.argv = ['simsiam', *{args!r}]\n"
        "from simsiam.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {{'torch', 'numpy', 'sklearn', 'timm', 'PIL', 'pyarrow', 'altair'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    ).format(args=[*([verb] if verb else []), "--help"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if verb is None:
        assert all(name in done.stdout for name in VERBS)
    else:
        assert ("--json" in done.stdout) == (verb != "view")


def test_import_and_version_are_light() -> None:
    code = "import sys, simsiam; assert not {'torch', 'numpy'} & set(sys.modules); print(simsiam.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == simsiam.__version__ == simsiam_cli("--version").stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--epoch", "3"], "No such option: --epoch. Did you mean --epochs? "),
        (["train", "--weight-decay", "0"], "Settings without an option are written weight_decay=VALUE. "),
        (["search", "d", "i", "--K", "3"], "No such option: --K. See `"),
    ],
)
def test_an_option_that_is_none_is_answered_with_what_was_meant(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, shown = called(capsys, monkeypatch, *arguments)
    assert status == 2 and says in shown and "\n" not in shown.strip()


def test_train_stays_a_function_where_the_module_was_imported_first() -> None:
    code = (
        "from simsiam.train import fit; import simsiam; from simsiam import train; "
        "assert train is simsiam.train and train is not fit; "
        "assert {'method', 'epochs', 'budget', 'seed'} <= set(__import__('inspect').signature(train).parameters)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_command_is_a_function_that_the_docs_name() -> None:
    text = (Path(__file__).parents[1] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    section = text.partition("## From Python")[2].partition("\n## ")[0]
    calls = re.findall(r"^\| `(\w+)` \| `simsiam\.([\w.]+)\((.*?)\)[`)]", section, re.MULTILINE)
    told = {verb: path for verb, path, _ in calls}
    assert set(told) == set(VERBS) - {"train"}
    for _, path, given in calls:
        module, _, name = path.rpartition(".")
        function = getattr(importlib.import_module(f"simsiam.{module}"), name)
        inspect.signature(function).bind(*filter(None, given.split(", ")))  # called as in the docs


def test_what_python_offers_is_listed_and_still_light() -> None:
    code = (
        "import sys, simsiam; assert set(simsiam.__all__) <= set(dir(simsiam)); "
        "assert issubclass(simsiam.UserError, ValueError) and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_whole_way_as_a_user_goes_it(photos: Path, tmp_path: Path) -> None:
    trained = simsiam_cli("train", photos, "--epochs", 2, "-o", "run", *SMALL["overrides"], "--json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    keys = (
        "run method encoder images bad_files epochs steps seconds images_per_second loss std effective_rank verdict knn"
    )
    assert set(keys.split()) <= summary.keys() and summary["verdict"] == "healthy"
    assert "raw pixels" in trained.stderr and "report.html" in trained.stderr and "Traceback" not in trained.stderr
    assert "Chosen for this data" in trained.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000

    evaluated = simsiam_cli("evaluate", "run", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert {"knn", "linear", "fewshot", "collapse"} <= json.loads(evaluated.stdout).keys()
    some = json.loads(simsiam_cli("evaluate", "run", "--only", "collapse", "--json", cwd=tmp_path).stdout)
    assert some["knn"] is some["linear"] is some["fewshot"] is None and some["collapse"]
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert kept["knn"] == json.loads(evaluated.stdout)["knn"], "what was not measured now is kept"
    embedded = simsiam_cli("embed", "run", photos, "-o", "vectors", "--json", cwd=tmp_path)
    assert embedded.returncode == 0, embedded.stderr
    told = json.loads(embedded.stdout)
    assert (told["vectors"], told["new"], len(told["bad_files"])) == (96, 96, 1)
    page = simsiam_cli("report", "run", "--json", cwd=tmp_path)
    assert page.returncode == 0 and json.loads(page.stdout)["report"].endswith("report.html")


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    good, bad = write_nasty_folder(tmp_path / "mess")
    done = simsiam_cli("check", tmp_path / "mess", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"images", "bad_files", "duplicates", "sizes", "modes", "labels"} <= found.keys()
    assert {entry["path"] for entry in found["bad_files"]} == set(bad)
    assert all(path in done.stderr for path in bad)
    assert found["images"] == len(good) + len(bad)


def test_list_finds_what_there_is() -> None:
    found = json.loads(simsiam_cli("list", "--json").stdout)
    assert "simsiam" in found["methods"] and {"imagenet", "cifar", "demo"} <= set(found["recipes"])
    assert {"knn", "linear", "fewshot"} <= set(found["evaluations"]) and "thin-resnet18" in found["encoders"]
    assert "demo" in found["datasets"]


def test_reproduce_lists_the_experiments(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = called(capsys, monkeypatch, "reproduce", "--json")
    found, shown = json.loads(out), " ".join(err.split())
    assert not status and [each["name"] for each in found] == reproduce.names()
    assert all(f"{each['name']} {each['title']} ({each['source']}; " in shown for each in found)


def test_plan_shows_what_it_measured(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["simsiam.plan"], "plan", functools.partial(plan, seconds=0.2))
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = called(capsys, monkeypatch, "plan", str(photos), "--json", *SMALL["overrides"])
    found = json.loads(out)
    assert not status and (found["images"], found["batch_size"]) == (97, 16)
    for text in ("97 images", f"batch 16, {found['device']}", f"{found['bottleneck']} (", "10m: ", "batches that fit"):
        assert text in err, err
    assert f"{found['images_per_second']:,.0f} images/s" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_stdout_is_one_line(photos: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("check", photos, "--json"), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and "Traceback" not in done.stderr.decode()
    assert done.stderr.decode().endswith("Error: Cannot write to stdout: No space left on device.\n")


def test_a_closed_stdout_is_said(photos: Path) -> None:
    shell = ["sh", "-c", 'exec "$@" >&-', "sh"]
    done = subprocess.run([*shell, *command("check", photos, "--json")], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.endswith("Error: Cannot write to stdout: it is closed.\n")


def test_key_value_may_stand_where_data_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = simsiam_cli("train", "train.lr=abc", cwd=tmp_path)
    assert done.returncode == 2 and "train.lr" in done.stderr, done.stderr
    with_equals = cli._data_and_overrides
    (tmp_path / "year=2024").mkdir()
    (tmp_path / "year=2024" / "a.png").touch()
    for data in (f"{tmp_path}/year=*/*.png", f"{tmp_path}/year=1999/*.png", f"{tmp_path}/year=2024"):
        assert with_equals(data, ["lr=1"]) == (data, ["lr=1"])
    monkeypatch.chdir(tmp_path)
    assert with_equals("year=2*/*.png", None) == ("year=2*/*.png", [])
    assert with_equals("views.size=2*", ["lr=1"]) == (None, ["views.size=2*", "lr=1"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nowhere"], "nowhere"),
        (["train", "{photos}", "--method", "simclear"], "simclr"),
        (["train", "{photos}", "--encoder", "resnet1800"], "resnet"),
        (["train", "{photos}", "--recipe", "cifra"], "cifar"),
        (["train", "{photos}", "--budget", "soon"], "10m"),
        (["train", "{photos}", "--budget", "5m", "train.epochs=2"], "not both"),
        (["train", "{photos}", "-o", "{run}"], "--resume"),
        (["train", "--resume"], "-o"),
        (["train", "{photos}", "--device", "tpu9"], "Try the device cpu"),
        (["train", "{photos}", "--no-such-option"], "--no-such-option"),
        (["evaluate", "{photos}"], "simsiam train"),
        (["evaluate", "{run}", "--only", "nnk"], "knn"),
        (["train", "{photos}", "{run}"], "name one data set"),
        (["embed", "{photos}", "{photos}", "-o", "x"], "simsiam train"),
        (["embed", "{run}", "nowhere", "-o", "x"], "nowhere"),
        (["report", "{photos}"], "run folder"),
        (["check", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_2(
    arguments: list[str],
    says: str,
    photos: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = called(capsys, monkeypatch, *(a.format(photos=photos, run=run) for a in arguments))
    assert status == 2 and out == "" and says in err
    assert err.count("Error: ") == 1 and err.rstrip().splitlines()[-1].startswith("Error: "), err
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_a_mistake_ends_the_process_so(photos: Path, run: Path, tmp_path: Path) -> None:
    """One of the cases above, in a separate process."""
    done = simsiam_cli("train", photos, "-o", run, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr and "--resume" in done.stderr.splitlines()[-1]


def test_an_empty_folder_and_one_image(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = simsiam_cli("train", tmp_path / "empty")
    assert done.returncode == 2 and "empty" in done.stderr
    from PIL import Image

    (tmp_path / "one").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "one" / "a.png")
    done = simsiam_cli("train", tmp_path / "one", cwd=tmp_path)
    assert done.returncode == 2 and "at least 2" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nothing",), "'nothing'"),
        (("trian",), "'trian'"),
        (("train", "--nothing"), "--nothing"),
        (("evaluate",), "RUN"),
        (("search", "d", "x.png", "-k", "0"), "-k"),
        (("export", "run"), "--to"),
        (("train", "--seed", str(1 << 32)), "--seed"),
    ],
)
def test_a_command_that_is_wrong_is_answered_by_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = called(capsys, monkeypatch, *arguments)
    assert status == 2 and not out
    assert len(err.strip().splitlines()) == 1 and says in err and "--help" in err, err
    assert "?." not in err and ".." not in err


def test_ctrl_c_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simsiam.catalogue.everything", stop)
    status, out, err = called(capsys, monkeypatch, "list")
    assert (status, out, err.strip()) == (1, "", "Interrupted.")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_unpacked_copy(tmp_path: Path, name: str) -> None:
    (tmp_path / "tmp").mkdir()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("large.png")
        info.size = 1 << 28  # a second of unpacking
        tar.addfile(info, types.SimpleNamespace(read=bytes))  # type: ignore[arg-type]
    process = subprocess.Popen(
        command("check", tmp_path / "a.tar.gz"),
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "tmp").glob("simsiam-*.tar")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (1, "Interrupted.") and not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("It is full."), ZeroDivisionError()], ids=repr)
def test_whatever_ends_a_progress_bar_the_cursor_comes_back(
    error: BaseException, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: object, workers: object, listener: Listener) -> None:
        listener.checking(1, 10, 0)
        raise error

    monkeypatch.setattr("simsiam.data.check.check", fail)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich assume a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["simsiam", "check", str(photos)])
    with pytest.raises(ZeroDivisionError if isinstance(error, ZeroDivisionError) else SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "checking" in shown and shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize("damage", ["page", "sample"])
def test_a_page_that_cannot_be_made_does_not_take_the_result_with_it(run: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink(missing_ok=True)
    if damage == "page":
        (copy / "report.html").mkdir()
    else:
        (copy / "samples" / "views.npy").write_bytes(b"")
    for arguments in (["train", "--resume", "-o", copy], ["evaluate", copy, "--only", "collapse"]):
        done = simsiam_cli(*arguments, "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["run"] == str(copy)
        assert "Warning: Cannot " in done.stderr and "The result is shown but not saved." in done.stderr
        assert "Report  " not in done.stderr
