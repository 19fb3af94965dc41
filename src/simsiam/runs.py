"""The run folder: every file that a run writes, such that a kill at any moment loses nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
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
LOCK = ".lock"


def cache_folder() -> Path:
    """Return the folder for files that can be recreated: $SIMSIAM_CACHE, or ~/.cache/simsiam."""
    try:
        return Path(os.environ.get("SIMSIAM_CACHE") or "~/.cache/simsiam").expanduser()
    except RuntimeError:
        raise UserError("There is no home folder for the cache: set SIMSIAM_CACHE to a folder.") from None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`."""
    # Not the process id: containers that share a folder have the same ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # fails with the system's words, where a library's own would be unclear
        yield temporary
        with open(temporary, "r+b") as file:  # Windows can flush only writable files
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.{_mend(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def left_by_a_kill(folder: Path, name: str = "*") -> set[Path]:
    """Return the temporary files in a folder that `atomic` did not get to rename. name: pattern of the final name."""
    return set(folder.glob(f".{name}.*.tmp"))


def _mend(error: OSError) -> str:
    # An error without errno comes from a library that writes, and usually means a full disk.
    return " Free some space." if error.errno in (None, errno.ENOSPC, errno.EDQUOT) else ""


def keep(write: Callable[[], Any]) -> bool:
    """Call `write` and return whether it succeeded. If not, only warn: the result is shown anyway."""
    try:
        write()
    except UserError as error:
        warnings.warn(f"{error} The result is shown but not saved.", stacklevel=3)
        return False
    return True


def _check_name(folder: Path) -> None:
    """Raise UserError for a name that is not UTF-8: safetensors and Parquet files cannot be opened there."""
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(folder).decode("utf-8", "backslashreplace")
        raise UserError(f"The name {shown} is not UTF-8: choose another -o.") from None


def make_writable(folder: Path) -> None:
    """Create the folder if it is missing. Raises UserError if no file can be written into it."""
    _check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror or error}. Choose another -o.") from None


def check_unused(run: Path) -> None:
    """Raise UserError if the folder requested for a new run is not empty."""
    _check_name(run)
    if os.path.exists(run / RECIPE):  # Path's own raises if a folder above may not be entered
        raise UserError(f"{run} already contains a run: continue it with --resume, or choose another -o.")
    if os.path.isfile(run) or (os.path.isdir(run) and any(name != LOCK for name in _listed(run))):
        raise UserError(f"{run} exists and is not a run: choose another -o.")


def check_place(run: Path | None) -> None:
    """Raise UserError if a new run, in `run` or under `runs/`, cannot be written: now, not once all is decoded."""
    run = (run or Path("runs")).absolute()
    above = next(path for path in (run, *run.parents) if os.path.exists(path))
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"Cannot create the run folder {run}: {above} is not a writable folder. Choose another -o.")


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise UserError(f"Cannot read {folder}: {error.strerror or error}. Choose another -o.") from None


def made(run: Path | None, data: str, method: str) -> Path:
    """Create the run folder and return it. run: None for a new one under `runs/` that no other process can get."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in data.lower()).strip("-") or "images"
    names = (Path("runs") / f"{stem}-{method}-{number}" for number in itertools.count(1))
    for path in names if run is None else [run]:
        try:
            path.mkdir(parents=True, exist_ok=run is not None)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"Cannot create the run folder {path}: {error.strerror or error}. Choose another -o."
            ) from None
        return path
    raise AssertionError("check_unused rejects an -o that is a file")


def claim(folder: Path, doing: str = "training") -> FileLock:
    """Return a lock on the folder, to hold while writing to it. Raises UserError if another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is {doing} in {folder}: wait for it, or choose another -o.") from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    return lock


def resumable(run: Path | None) -> Path:
    """Return the run to resume. Raises UserError if there is none."""
    if run is None:
        raise UserError("--resume needs a run: add -o RUN.")
    if not os.path.exists(run / RECIPE):
        raise UserError(f"{run} is not a run, so it cannot be resumed: it has no {RECIPE}.")
    return run


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, completely or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may not be UTF-8


def write_json(path: Path, value: Any) -> None:
    """Write JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object at `path`. Raises UserError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: {path.parent} may be an incomplete copy.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"Cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"Cannot read {path}: it is not a JSON object.")
    return value


def read_kept(path: Path) -> dict[str, Any]:
    """Read the JSON object at `path`, which can be recreated: {} if it is missing or broken."""
    try:
        return read_json(path)
    except UserError:
        return {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: tensors and a string-to-string header, no code."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        mode = temporary.stat().st_mode  # follows the umask; the library would let only the owner read
        try:
            save_file(plain, str(temporary), metadata=dict(metadata or {}))
        except SafetensorError as error:  # usually a full disk
            raise OSError(str(error)) from None
        temporary.chmod(mode)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a safetensors file. Raises UserError if it is missing or broken."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"There is no {path}.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}.") from None


class Checkpoints:
    """`checkpoints/`: the newest state, and the last one that the collapse guard called healthy.

    A state is one safetensors file whose header holds the JSON part (step, elapsed seconds, ...), so a kill can never
    separate the two. `LAST` and `HEALTHY` are text files that name a state.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, healthy: bool) -> Path:
        """Save a state as `LAST` and, if `healthy`, as `HEALTHY`; delete states that are neither. Returns its file."""
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
        """Return the file that `LAST` or `HEALTHY` names; None before the first save."""
        try:
            return self.folder / (self.folder / name).read_text(encoding="utf-8").strip()
        except OSError:
            return None

    def load(self, name: str = LAST) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and JSON part of the named state; None before the first save."""
        path = self.named(name)
        if path is None:
            return None
        tensors, metadata = read_tensors(path)
        return tensors, json.loads(metadata["state"])

    def state(self) -> dict[str, Any] | None:
        """Return the JSON part of the newest state, without reading its tensors; None before the first save."""
        path = self.named(LAST)
        if path is None:
            return None
        with _opened(path) as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            return state


class Metrics:
    """`metrics.jsonl`: one JSON object per line, appended and flushed; a resumed run drops lines after its step."""

    def __init__(self, run: Path, resume_step: int | None = None) -> None:
        self.path = run / METRICS
        if resume_step is None:
            self.path.write_text("", encoding="utf-8")
        else:
            kept = [line for line in read_metrics(run) if line["step"] <= resume_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, **values: Any) -> None:
        """Append a line. Raises UserError if it cannot be written, e.g. to a full disk."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror or error}.{_mend(error)}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # retries a line that did not fit, which `write` has reported
            self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return every complete line of `metrics.jsonl`; one cut off by a kill is skipped."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(run / METRICS, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
