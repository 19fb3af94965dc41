"""What the terminal shows of names and texts that others chose."""

from __future__ import annotations

import pytest

from simsiam.console import Console

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
