"""The run folder: everything that a run leaves behind, written so that a kill at any moment loses nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simsiam.config import UserError

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor

RECIPE, SUMMARY, METRICS, ENVIRONMENT = "config.toml", "summary.json", "metrics.jsonl", "environment.json"
EVALUATION, ENCODER, REPORT = "evaluation.json", "encoder", "report.html"
LAST, HEALTHY = "LAST", "HEALTHY"
_LOCK = ".lock"


def cache_folder() -> Path:
    """Where what can be made again is kept: $SIMSIAM_CACHE, or ~/.cache/simsiam."""
    return Path(os.environ.get("SIMSIAM_CACHE") or "~/.cache/simsiam").expanduser()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.{_mend(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def left_by_a_kill(folder: Path, name: str = "*") -> set[Path]:
    """The temporary paths in a folder that `atomic` had not renamed yet to files of that name, a pattern."""
    return set(folder.glob(f".{name}.*.tmp"))


def _mend(error: OSError) -> str:
    # A message without number comes from a library that writes, and is a full disk most often.
    return " Free some space." if error.errno in (None, errno.ENOSPC, errno.EDQUOT) else ""


def keep(write: Callable[[], Any]) -> bool:
    """Whether `write` could write. Where not, a warning says so: what it would have kept is shown all the same."""
    try:
        write()
    except UserError as error:
        warnings.warn(f"{error} The result is shown, and not kept.", stacklevel=3)
        return False
    return True


def _check_name(folder: Path) -> None:
    """Raises UserError for a name that is not UTF-8: safetensors and Parquet files cannot be opened there."""
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise UserError(f"The name {shown} is not UTF-8: choose another -o.") from None


def make_writable(folder: Path) -> None:
    """Makes the folder where it is missing. Raises UserError where no file can be written into it."""
    _check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror or error}. Choose another -o.") from None


def check_unused(run: Path) -> None:
    """Raises UserError where something is already in the folder that was asked for, for a new run."""
    _check_name(run)
    if (run / RECIPE).exists():
        raise UserError(f"{run} holds a run already: go on with it by --resume, or choose another -o.")
    if run.is_file() or (run.is_dir() and any(path.name != _LOCK for path in run.iterdir())):
        raise UserError(f"{run} exists and is not a run: choose another -o.")


def made(run: Path | None, data: str, method: str) -> Path:
    """The run folder, there from now on; None: a new one under `runs/`, which no other process can take as well."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in data.lower()).strip("-") or "images"
    names = (Path("runs") / f"{stem}-{method}-{number}" for number in itertools.count(1))
    for path in names if run is None else [run]:
        try:
            path.mkdir(parents=True, exist_ok=run is not None)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"Cannot make the run folder {path}: {error.strerror or error}. Choose another -o."
            ) from None
        return path
    raise AssertionError("an -o that is a file is refused before")


def claim(run: Path) -> FileLock:
    """A lock on the run folder, to be held while training writes there. Raises UserError where another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is training in {run}: wait for it, or choose another -o.") from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    return lock


def resumable(run: Path | None) -> Path:
    """The run that was asked for. Raises UserError where there is none."""
    if run is None:
        raise UserError("--resume needs to know which run: add -o RUN.")
    if not (run / RECIPE).exists():
        raise UserError(f"{run} holds no run to resume: it has no {RECIPE}.")
    return run


def write_text(path: Path, text: str) -> None:
    """UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8


def write_json(path: Path, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object at `path`. Raises UserError where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: was {path.parent} copied in part?") from None
    except (ValueError, OSError) as error:
        raise UserError(f"Cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"Cannot read {path}: it holds no JSON object.")
    return value


def read_kept(path: Path) -> dict[str, Any]:
    """The JSON object at `path`, of what can be made again; {} where it is missing or broken."""
    try:
        return read_json(path)
    except UserError:
        return {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file: tensors and a string-to-string header, no code in it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; the library lets only the owner read
        try:
            save_file(plain, str(temporary), metadata=dict(metadata or {}))
        except SafetensorError as error:  # a full disk, most often
            raise OSError(str(error)) from None
        temporary.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its header. Raises UserError where it is missing or broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"There is no {path}.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}.") from None


class Checkpoints:
    """`checkpoints/`: the newest states, and the last one that the collapse guard called healthy.

    A state is one safetensors file; its header carries the JSON part (step, elapsed seconds, ...), so a kill can never
    separate the two. `LAST` and `HEALTHY` are text files that name a state.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, healthy: bool) -> Path:
        """The file of the state, which is `LAST` from now on and, if so, `HEALTHY`. States that are neither are deleted."""
        path = self.folder / f"step-{step:09d}.safetensors"
        if self.named(LAST) != path or not path.exists():
            write_tensors(path, tensors, {"state": json.dumps(dict(state))})
            write_text(self.folder / LAST, path.name + "\n")
        if healthy:
            write_text(self.folder / HEALTHY, path.name + "\n")
        keep = {self.named(LAST), self.named(HEALTHY)}
        for old in [*self.folder.glob("step-*.safetensors"), *left_by_a_kill(self.folder)]:
            if old not in keep:
                old.unlink(missing_ok=True)
        return path

    def named(self, name: str) -> Path | None:
        """The file that `LAST` or `HEALTHY` names; None before the first."""
        try:
            return self.folder / (self.folder / name).read_text(encoding="utf-8").strip()
        except OSError:
            return None

    def load(self, name: str = LAST) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The named state, or None where none was saved yet."""
        path = self.named(name)
        if path is None:
            return None
        tensors, metadata = read_tensors(path)
        return tensors, json.loads(metadata["state"])


class Metrics:
    """`metrics.jsonl`: one JSON object a line, appended and flushed; a resumed run drops the lines past its step."""

    def __init__(self, run: Path, resume_step: int | None = None) -> None:
        self.path = run / METRICS
        if resume_step is None:
            self.path.write_text("", encoding="utf-8")
        else:
            kept = [line for line in read_metrics(run) if line["step"] <= resume_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, **values: Any) -> None:
        """Raises UserError where the disk is full."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror or error}.{_mend(error)}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a line that did not fit is tried again here, and `write` has said so
            self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line of `metrics.jsonl`; a line cut off by a kill is skipped."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(run / METRICS, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
