"""The run folder: interruptions never damage intact files."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from simsiam.config import UserError
from simsiam.runs import (
    Checkpoints,
    Metrics,
    atomic,
    check_unused,
    claim,
    keep,
    make_writable,
    read_json,
    read_metrics,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)


def state(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((2, 3), float(step)), "steps": torch.tensor(step), "half": torch.ones(2).bfloat16()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_one_trains_in_is_not_anothers(tmp_path: Path) -> None:
    lock = claim(tmp_path)
    code = "import sys; from simsiam.runs import claim; from pathlib import Path; claim(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode and "Another process is training in" in done.stderr
    lock.release()
    assert subprocess.run(command, timeout=60).returncode == 0
    check_unused(tmp_path)  # a leftover lock file does not count


@pytest.mark.parametrize("take", [check_unused, make_writable])
def test_a_name_that_is_not_utf_8_is_refused_at_the_start(take: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\\xe9 is not UTF-8: choose another -o"):
        take(tmp_path / os.fsdecode(b"r\xe9"))
    assert not files(tmp_path)


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not saved"):
        assert not keep(lambda: write_text(tmp_path / "file" / "inside", "text"))
    assert keep(lambda: write_text(tmp_path / "inside", "text"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to")
def test_a_library_that_writes_has_no_say_in_why_it_may_not() -> None:
    from pyarrow import parquet, table

    path = Path("/proc/self/clusters.parquet")
    with (
        pytest.raises(UserError, match=r"^Cannot write /proc/self/clusters\.parquet: No such file or directory\.$"),
        atomic(path) as temporary,
    ):
        parquet.write_table(table({"id": [1]}), temporary)


# --- atomic files -----------------------------------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="stopped"), atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("stopped")
    assert path.read_text() == "old" and files(tmp_path) == {"a.txt"}
    write_text(path, "new")
    assert path.read_text() == "new" and files(tmp_path) == {"a.txt"}


def test_what_a_file_is_renamed_to_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut could leave an empty new file and no old one."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    write_text(tmp_path / "a.txt", "whole")
    assert done == [5, "renamed"]


def test_a_name_that_is_not_utf_8_is_written_so_that_it_can_be_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", os.fsdecode(b"r\xe9"))
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == r"r\udce9"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """A process is really killed while writing: the old file remains, and the next save succeeds."""
    Checkpoints(tmp_path).save(1, state(1), {"step": 1}, healthy=True)
    code = (
        "import os, signal, sys, pathlib\n"
        "from simsiam.runs import atomic\n"
        "with atomic(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "checkpoints/step-000000001.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None and loaded[1] == {"step": 1}
    Checkpoints(tmp_path).save(2, state(2), {"step": 2}, healthy=True)
    loaded = Checkpoints(tmp_path).load()
    assert loaded is not None and loaded[1] == {"step": 2}
    assert files(path.parent) == {"step-000000002.safetensors", "LAST", "HEALTHY"}  # the partial file is gone


@pytest.mark.parametrize("inside", ["folder", "file/a.txt"])  # the path is a folder; its parent is a file
def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"Cannot write .*: (Is a directory|File exists)"):
        write_text(tmp_path / inside, "x")
    assert files(tmp_path) == {"file", "folder"}


def test_json_survives_and_damage_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "deep/a.json", {"a": [1, None, "ä"]})
    assert read_json(tmp_path / "deep/a.json") == {"a": [1, None, "ä"]}
    (tmp_path / "b.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"Cannot read .*b\.json"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match=r"Cannot read .*c\.json"):
        read_json(tmp_path / "c.json")
    with pytest.raises(UserError, match=r"There is no .*none\.json"):
        read_json(tmp_path / "none.json")


def test_tensors_survive_with_their_header(tmp_path: Path) -> None:
    tensors = {**state(3), "strided": torch.arange(12.0).view(3, 4).T, "grad": torch.ones(2, requires_grad=True)}
    tensors["last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    write_tensors(tmp_path / "a.safetensors", tensors, {"x": "1"})
    read, header = read_tensors(tmp_path / "a.safetensors")
    assert header == {"x": "1"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) and read[key].dtype == tensors[key].dtype for key in tensors)


def test_tensors_may_be_read_by_whom_any_other_file_may(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", state(1))
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


def test_tensors_that_a_disk_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's error has no errno."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"Cannot write .*No space left on device.* Free some space"):
        write_tensors(tmp_path / "a.safetensors", state(1))
    assert not files(tmp_path)


def test_damaged_tensors_are_the_users_mistake(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", state(1))
    whole = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (b"", whole[:5], whole[:-3], b"\xff" * 64, os.urandom(8) + whole[8:]):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
            read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="There is no"):
        read_tensors(tmp_path / "none.safetensors")


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [pickle.dump, lambda value, file: torch.save({"weight": value}, file)])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, write: object) -> None:
    path = tmp_path / "checkpoints/step-000000001.safetensors"
    path.parent.mkdir()
    with open(path, "wb") as file:
        write(Bomb(tmp_path / "run"), file)  # type: ignore[operator]
    write_text(path.parent / "LAST", path.name)
    with pytest.raises(UserError, match="damaged or not a safetensors"):
        Checkpoints(tmp_path).load()
    assert not (tmp_path / "run").exists()
    # The bomb is live: unpickling it does create the file.
    if write is pickle.dump:
        pickle.loads(path.read_bytes())
        assert (tmp_path / "run").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_only_the_last_and_the_last_healthy_state_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None and checkpoints.load("HEALTHY") is None
    for step, healthy in ((10, True), (20, True), (30, False), (40, False)):
        checkpoints.save(step, state(step), {"step": step, "seconds": step / 10}, healthy=healthy)
        healthy_step = min(step, 20)
        expected = {f"step-{kept:09d}.safetensors" for kept in (step, healthy_step)} | {"LAST", "HEALTHY"}
        assert files(tmp_path / "checkpoints") == expected
        for name, at in (("LAST", step), ("HEALTHY", healthy_step)):
            loaded = Checkpoints(tmp_path).load(name)
            assert loaded is not None and loaded[1] == {"step": at, "seconds": at / 10}
            assert all(torch.equal(loaded[0][key], value) for key, value in state(at).items())


def test_a_run_that_was_never_healthy_keeps_one_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {}, healthy=False)
    assert files(checkpoints.folder) == {"step-000000003.safetensors", "LAST"}


def test_saving_a_step_again_writes_it_once(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(5, state(5), {"step": 5}, healthy=False)
    before = path.stat().st_ino
    assert checkpoints.save(5, state(5), {"step": 5}, healthy=True) == path
    assert path.stat().st_ino == before
    assert checkpoints.named("HEALTHY") == checkpoints.named("LAST") == path
    path.unlink()
    checkpoints.save(5, state(5), {"step": 5}, healthy=False)
    assert checkpoints.load() is not None


def test_a_state_that_could_not_be_written_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {"step": 1}, healthy=True)
    monkeypatch.setattr("simsiam.runs.write_tensors", lambda *_: (_ for _ in ()).throw(UserError("full")))
    with pytest.raises(UserError, match="full"):
        checkpoints.save(2, state(2), {"step": 2}, healthy=True)
    for name in ("LAST", "HEALTHY"):
        loaded = checkpoints.load(name)
        assert loaded is not None and loaded[1] == {"step": 1}


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_drops_the_lines_past_its_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write(step=step, loss=-step / 10)
        assert read_metrics(tmp_path)[-1] == {"step": step, "loss": -step / 10}  # written at once: a kill loses nothing
    metrics.close()
    resumed = Metrics(tmp_path, resume_step=3)
    resumed.write(step=4, loss=7.0)
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, -0.1),
        (2, -0.2),
        (3, -0.3),
        (4, 7.0),
    ]
    Metrics(tmp_path).close()  # a new run starts with an empty file
    assert read_metrics(tmp_path) == []


def test_half_a_line_is_skipped_and_does_not_stick_to_the_next(tmp_path: Path) -> None:
    whole = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2))
    for cut in range(1, 12):
        (tmp_path / "metrics.jsonl").write_text(whole + json.dumps({"step": 3, "loss": 1})[:cut])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
        resumed = Metrics(tmp_path, resume_step=2)
        resumed.write(step=3)
        resumed.close()
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_full_disk_is_said_of_figures_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = Metrics(tmp_path)
    with pytest.raises(UserError, match=r"Cannot write .*metrics\.jsonl: No space left on device\. Free some space"):
        metrics.write(step=1)
    metrics.close()  # must not raise: another error would hide the first


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    Metrics(tmp_path, resume_step=0).close()
    assert read_metrics(tmp_path) == []
