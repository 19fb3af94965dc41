"""How the terminal shows untrusted names and texts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from simsiam import tables
from simsiam.console import Console
from simsiam.data.check import UNLABELLED

NAMES = ["IMG [edited].jpg", "a[/b].jpg", "[bold]", "ä [red]x[/red]"]


def test_brackets_in_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.results("Title [x]", ["name", "value"], [[name, "1"] for name in NAMES])
    console.plan([("data", name) for name in NAMES], [("a.b", name, name) for name in NAMES])
    for name in NAMES:
        console.entry("entry", name)
        console.say(name)
    shown = capsys.readouterr().err
    assert all(shown.count(name) >= 5 for name in NAMES) and "Title [x]" in shown


def test_a_name_is_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    Console().say("a:smile:.jpg")
    assert "a:smile:.jpg" in capsys.readouterr().err


def test_control_characters_of_a_name_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """File names in an archive are untrusted: they must not colour the terminal or set its title."""
    name = "e\x1b[31mRED\x1b]0;title\x07\x9b2J\n\t.png"
    console = Console()
    console.results(name, ["name"], [[name]])
    console.plan([("data", name)], [("a.b", name, "why")])
    console.say(name)
    shown = capsys.readouterr().err
    assert shown.count(r"e\x1b[31mRED\x1b]0;title\x07\x9b2J\x0a\x09.png") == 5
    assert not {"\x1b", "\x07", "\x9b", "\t"} & set(shown)


def test_a_narrow_terminal_cuts_no_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    Console().plan([], [("train.weight_decay", "0.0001", "7,994 images are few: more and smaller steps")])
    shown = capsys.readouterr().err
    assert "train.weight_decay  0.0001" in shown and "…" not in shown and "smaller" in shown
    Console().results("clusters", ["cluster", "images", "nearest"], [["0", "61", "a/very/long/name/of/an/image.jpg"]])
    shown = "".join(capsys.readouterr().err.replace("│", "").split())
    assert "…" not in shown and "nearest" in shown and all(part in shown for part in ("a/very", "image.jpg"))


def test_without_stderr_it_goes_on_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """`simsiam train 2>&-`."""
    monkeypatch.setattr(sys, "stderr", None)
    console = Console()
    console.say("a line")
    console.results("title", ["name"], [["cell"]])


def test_a_reader_that_leaves_does_not_end_the_run() -> None:
    """`simsiam train 2>&1 | head -1`."""
    code = (
        "import os, sys\n"
        "from simsiam.console import Console\n"
        "console = Console()\n"
        "read, write = os.pipe()\n"
        "os.dup2(write, 2); os.close(write); os.close(read)\n"
        "for _ in range(3):\n"
        "    console.say('x' * 100); console.monitor({'step': 1, 'verdict': 'healthy'})\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "went on\n"


def test_without_a_terminal_what_takes_long_says_so_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of `evaluate --finetune` or of a large `embed` must not look like a hanging process."""
    console, now = Console(), 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for done in range(0, 60_001, 1_000):
        console.embedding(done, 60_000)
        now += 1
    now += 100
    console.embedding(0, 10)
    console.finetuning(0.0)
    now += 31
    console.finetuning(0.5)
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["embedding: 50 %", "embedding: 100 %", "fine-tuning: 50 %"]


def test_images_without_a_label_are_no_class(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {**{f"class{i}": 5 for i in range(10)}, UNLABELLED: 1234}
    found = {
        "name": "set",
        "images": 1284,
        "bytes": 5,
        "bad_files": [],
        "duplicates": [],
        "duplicates_across_splits": 0,
    }
    found |= {"splits": {"train": 1284, "test": 0}, "modes": {}, "formats": {}, "sizes": None}
    for given, wanted in ((labels, "1,234 images without"), ({"a": 2, "b": 3}, "2: a 2, b 3"), (None, "none found")):
        tables.check(Console(), {**found, "labels": given})
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert wanted in shown and "(unlabelled)" not in shown
        assert given is not labels or "10: class0 5" in shown
