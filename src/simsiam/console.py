"""Terminal output: progress and results, always on stderr, because stdout belongs to `--json`."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
import warnings
from collections.abc import Sequence
from typing import IO, Any, cast

from simsiam.config import counted, show_duration


class Listener:
    """Receives the progress and the messages of a long call. This base class ignores them."""

    def decoding(self, done: int, total: int, bad: int) -> None:
        """Called after every image decoded into the cache."""

    def checking(self, done: int, total: int, bad: int) -> None:
        """Called as stored images are read to be checked or compared."""

    def embedding(self, done: int, total: int) -> None:
        """Called after every embedded batch."""

    def finetuning(self, progress: float) -> None:
        """Called after every epoch of fine-tuning. progress: overall fraction done, in 0..1."""

    def plan(self, facts: Sequence[tuple[str, str]], reasons: Sequence[tuple[str, str, str]]) -> None:
        """Called before training with what is trained on what, and the reason for every derived default."""

    def step(self, figures: dict[str, Any], progress: float, left: float | None) -> None:
        """Called about once a second with the latest training figures, the fraction done and the seconds left."""

    def monitor(self, figures: dict[str, Any]) -> None:
        """Called after every evaluation on the held-out images."""

    def say(self, text: str) -> None:
        """Show a line that must be seen."""

    def close(self) -> None:
        """Remove progress bars; called at the end, however the run ends."""


class _Stderr:
    """stderr that may be closed (terminal gone, `| head`): the program then continues silently."""

    @property
    def _stream(self) -> Any:
        # A progress bar replaces sys.stderr, which is None if it was closed from the start (`2>&-`).
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr) or io.StringIO()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


_PAUSE = 30.0  # seconds
_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]} | {
    code: f"\\u{code:04x}"
    for code in [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]  # change the text direction
}


def visible(text: str) -> str:
    """Escape control characters: file names are untrusted, and the terminal must show these instead of obeying them."""
    return text.translate(_CONTROLS)


def screen() -> Any:
    """Return rich's console on stderr, without emoji codes: `:smile:` in a path is shown literally."""
    from rich.console import Console as Rich

    return Rich(file=cast(IO[str], _Stderr()), highlight=False, emoji=False)


class Console(Listener):
    """Progress bars and lines through rich; plain lines if stderr is not a terminal."""

    def __init__(self) -> None:
        from rich.progress import Progress

        self.screen = screen()
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0
        self._counted: tuple[str, float] | None = None

    def _show(self, kind: str, done: float, total: float, text: str) -> None:
        """Move the progress bar of a task, which is drawn first if another one is shown or none."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None or self._task[0] != kind:
            self.close()
            training, told = kind == "training", TextColumn("{task.fields[text]}")
            columns = [told] if training else [MofNCompleteColumn(), told, TimeRemainingColumn()]
            self._bar = Progress(TextColumn(kind), BarColumn(24), *columns, console=self.screen, transient=not training)
            self._bar.start()
            self._task = (kind, self._bar.add_task(kind, total=total, text=""))
        self._bar.update(self._task[1], completed=done, text=text)

    def _count(self, kind: str, done: int, total: int, text: str) -> None:
        if not self.screen.is_terminal:  # a file or a log: an occasional line for long tasks
            now = time.monotonic()
            if self._counted is None or self._counted[0] != kind:
                self._counted = (kind, now)
            elif now - self._counted[1] >= _PAUSE:
                self._counted = (kind, now)
                self.say(f"{kind}: {100 * done // total} %")
            if done == total:  # the next count is a new task
                self._counted = None
            return
        self._show(kind, done, total, text)
        if done == total:
            self.close()

    def decoding(self, done: int, total: int, bad: int) -> None:
        self._count("decoding", done, total, f"{bad} bad" if bad else "")
        if done == total:
            left_out = f"; {counted(bad, 'bad file')} left out." if bad else "."
            self.say(f"Decoded {counted(done - bad, 'image')} into the cache{left_out}")

    def checking(self, done: int, total: int, bad: int) -> None:
        self._count("checking", done, total, f"{bad} bad" if bad else "")

    def embedding(self, done: int, total: int) -> None:
        self._count("embedding", done, total, "")

    def finetuning(self, progress: float) -> None:
        self._count("fine-tuning", round(100 * progress), 100, "percent")

    def plan(self, facts: Sequence[tuple[str, str]], reasons: Sequence[tuple[str, str, str]]) -> None:
        from rich.markup import escape
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, value in facts:
            table.add_row(f"[bold]{name}[/]", escape(visible(value)))
        self.screen.print(table)
        if reasons:
            self.screen.print("\n[bold]Chosen for this data[/] (set any of them as key=value)")
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True)  # in a narrow terminal the reason wraps, and no setting is cut
            table.add_column(overflow="fold")
            table.add_column()
            for setting, value, why in reasons:
                table.add_row(f"  {setting}", f"[cyan]{escape(visible(value))}[/]", f"[dim]{escape(visible(why))}[/]")
            self.screen.print(table)
        self.screen.print()

    def step(self, figures: dict[str, Any], progress: float, left: float | None) -> None:
        remaining = "" if left is None else f"{show_duration(left)} left"
        text = (
            f"{100 * progress:3.0f} %  loss {figures['loss']:+.3f}  std {figures['std']:.2f}  lr {figures['lr']:.3g}  "
            f"{figures['images_per_second']:,.0f} images/s  {remaining}"
        )
        if self.screen.is_terminal:
            self._show("training", progress, 1.0, text)
        elif progress >= self._said:
            self.screen.print(text, soft_wrap=True)
            self._said = math.floor(progress * 20 + 1) / 20

    def monitor(self, figures: dict[str, Any]) -> None:
        parts = [f"step {figures['step']:,}"]
        if figures.get("knn") is not None:
            parts.append(f"kNN {figures['knn']:.1f}")
        if figures.get("effective_rank") is not None:
            parts.append(f"effective rank {figures['effective_rank']:.0f}")
            parts.append(f"second view retrieved {figures['retrieval']:.0f} %")
        parts.append(figures["verdict"])
        self.screen.print(f"[dim]  {figures.get('of', 'held out')}: " + "  ".join(parts) + "[/]", soft_wrap=True)

    def say(self, text: str) -> None:
        self.screen.print(visible(text), soft_wrap=True, markup=False)

    def heading(self, text: str) -> None:
        self.screen.print(f"\n[bold]{text}[/]")

    def entry(self, name: str, says: str) -> None:
        """Print a name and its description, indented and wrapped."""
        from rich.markup import escape
        from rich.padding import Padding

        self.screen.print(Padding(f"[cyan]{name}[/]" + (f"  {escape(says)}" if says else ""), (0, 0, 0, 2)))

    def results(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of results."""
        from rich.markup import escape
        from rich.table import Table

        # A table's own title would be wrapped at the table's width.
        self.screen.print(visible(title), style="bold", markup=False, soft_wrap=True)
        table = Table(show_header=any(columns))
        for i, column in enumerate(columns):
            style = "bold" if column == "trained" else ""
            table.add_column(column, justify="right" if i else "left", style=style, overflow="fold")
        for row in rows:
            table.add_row(*(escape(visible(cell)) for cell in row))
        self.screen.print(table)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._said = 0.0

    def show_warnings(self) -> None:
        """Show each warning once, as one line here, instead of Python's two with a source line."""

        said: set[str] = set()

        def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
            line = f"Warning: {message}".replace("\n", " ")
            if line not in said:  # the viewer lists a folder repeatedly
                said.add(line)
                self.screen.print(visible(line), soft_wrap=True, markup=False, style="yellow")

        warnings.showwarning = show
