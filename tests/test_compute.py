"""Device, precision, threads and seeds."""

from __future__ import annotations

import io
import itertools
import json
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import check_output

import pytest
import torch

from simsiam import compute
from simsiam.compute import Compute, Pace, cpu_quota, describe, generator, pick_device, probe_precision, set_threads
from simsiam.config import UserError
from simsiam.data.decode import default_workers

CPU = torch.device("cpu")


def draw(*key: int, count: int = 4096) -> torch.Tensor:
    return torch.randn(count, generator=generator(CPU, *key))


def test_a_generator_is_a_function_of_its_key() -> None:
    before = torch.random.get_rng_state()
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (12,), (1, 2), (2, 1), (-1,), (2**40,)]
    assert all(torch.equal(draw(*key), draw(*key)) for key in keys)
    assert not any(torch.equal(draw(*one), draw(*two)) for one, two in itertools.combinations(keys, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_neighbouring_keys_are_independent() -> None:
    """Seeds 0..15 and steps 0..15 of seed 0, also shifted relative to each other: no correlation beyond chance."""
    streams = torch.stack([draw(seed) for seed in range(16)] + [draw(0, step) for step in range(16)])
    limit = 5 / streams.shape[1] ** 0.5
    for shift in (0, 1, 2, 624):
        rolled = streams.roll(shift, dims=1)
        correlation = streams @ rolled.T / streams.shape[1]
        if shift == 0:
            correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < limit


def test_pick_device() -> None:
    assert pick_device("cpu") == CPU
    assert torch.empty(1, device=pick_device("auto")).numel() == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu0", "meta", "hpu"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be used .* Try the device cpu") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", 8), ("50000 100000\n", 1), ("200000 100000\n", 2), ("1600000 100000\n", 8), ("broken", 8)],
)
def test_cores_are_the_smaller_of_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(compute, "open", lambda *_, **__: io.StringIO(quota), raising=False)
    assert cpu_quota() == default_workers() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_process_bound_to_one_core_has_one() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from simsiam.compute import cpu_quota; print(cpu_quota())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_threads_follow_the_quota_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(compute, "cpu_quota", lambda: 1)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert set_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert set_threads() == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


class Machine:
    """A simulated machine: steps take 0.1 s on two threads, 0.2 s on one; 6 s on two if other processes are busy."""

    def __init__(self, pace: Pace) -> None:
        self.pace, self.clock, self.said = pace, 0.0, list[str]()

    def run(self, seconds: float, busy: bool) -> tuple[int, float]:
        """Return the number of steps, and the fraction of them on two threads."""
        end, steps, on_two = self.clock + seconds, 0, 0
        while self.clock < end:
            two = torch.get_num_threads() == 2
            took = (6.0 if busy else 0.1) if two else 0.2
            self.clock, steps, on_two = self.clock + took, steps + 1, on_two + two
            if line := self.pace.took(took):
                self.said.append(line)
        return steps, on_two / steps


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_run_gives_way_and_comes_back() -> None:
    machine = Machine(Pace(2, 2, 0.1, 0.2, adapts=True))
    assert machine.run(60, busy=False) == (pytest.approx(600, abs=1), 1.0) and not machine.said
    steps, _ = machine.run(600, busy=True)
    assert steps > 0.85 * 600 / 0.2, "three slow steps and a few trials, no more"
    assert len(machine.said) == 1 and "a step takes 6.0 s on 2 threads" in machine.said[0]
    machine.run(Pace.LONGEST_WAIT, busy=False)
    assert machine.run(60, busy=False)[1] == 1.0 and len(machine.said) == 1


@pytest.mark.usefixtures("two_threads")
def test_one_slow_step_is_nothing() -> None:
    pace = Pace(2, 2, 0.1, 0.2, adapts=True)
    for took in [0.1, 9.0, 9.0, 0.1] * 5:
        assert pace.took(took) is None
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_run_that_must_repeat_exactly_only_says_so() -> None:
    machine = Machine(Pace(2, 2, 0.1, 0.2, adapts=False))
    machine.run(60, busy=True)
    assert torch.get_num_threads() == 2
    assert len(machine.said) == 1 and "resume it with OMP_NUM_THREADS=1" in machine.said[0]


@pytest.mark.usefixtures("two_threads")
def test_a_run_that_begins_on_half_tries_all_later() -> None:
    torch.set_num_threads(1)
    machine = Machine(Pace(2, 1, 1.0, 0.2, adapts=True))
    machine.run(40, busy=False)
    assert torch.get_num_threads() == 2 and not machine.said


def test_autocast_is_the_precision() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with Compute(CPU, "bf16").autocast():
        assert layer(x).dtype == torch.bfloat16
    with Compute(CPU, "fp32").autocast():
        assert layer(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_convolutions_are_placed_in_channels_last() -> None:
    conv = torch.nn.Conv2d(3, 8, 3)
    weight = conv.weight.detach().clone()
    placed = Compute(CPU, "fp32").place(conv)
    assert placed.weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(placed.weight, weight)


@pytest.mark.parametrize("faster", ["bf16", "fp32"])
def test_the_faster_precision_is_picked(monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    """With a clock advanced only by steps. A slow warm-up and one slow repetition of the faster one must not count."""
    clock = 0.0
    calls: list[str] = []

    def step(compute: Compute) -> None:
        nonlocal clock
        calls.append(compute.precision)
        with compute.autocast():  # the step runs in the requested precision
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == {"bf16": torch.bfloat16}.get(
                compute.precision, torch.float32
            )
        disturbed = compute.precision == faster and calls.count(faster) != 3
        clock += 100 if disturbed else 1 if compute.precision == faster else 4

    monkeypatch.setattr(compute.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(compute, "computes_bf16", lambda device: True)
    picked, reason = probe_precision(CPU, step)
    assert picked == faster and "4.00x" in reason and set(calls) == {"bf16", "fp32"}
    for seconds, wanted in ((1.05, "fp32"), (1.2, "bf16")):  # of fp32, 1 of bf16

        def about_as_fast(each: Compute, seconds: float = seconds) -> None:
            nonlocal clock
            clock += 1 if each.precision == "bf16" else seconds

        assert probe_precision(CPU, about_as_fast)[0] == wanted
    monkeypatch.setattr(compute, "computes_bf16", lambda device: False)
    calls.clear()
    assert probe_precision(CPU, step)[0] == "fp32" and not calls


def test_the_description_is_json() -> None:
    found = json.loads(json.dumps(describe()))
    assert found["torch"] == torch.__version__ and 1 <= found["cores"] <= (os.cpu_count() or 1) and found["cpu"]


_MEMORY = """
import resource, torch
from pathlib import Path
from simsiam.compute import set_threads

def told(file, key):
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(key))

limit = {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20))
before = told("/proc/self/status", "VmSize")
set_threads()
reserved = told("/proc/self/status", "VmSize") - before
faults = []
for _ in range(2):  # an activation each; all are freed together
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2 << 20) for _ in range(25)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
    huge = told("/proc/self/smaps_rollup", "AnonHugePages")
    del kept
print(reserved // 1024, huge // 1024, *faults)
"""


def _memory(limit: int = 0) -> list[int]:
    """MB that `set_threads` reserves, MB in huge pages of 200 that are then allocated, page faults the first and the
    second time. limit: of the address space, in MB."""
    return [int(each) for each in check_output([sys.executable, "-c", _MEMORY.format(limit=limit)], text=True).split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept() -> None:
    """The next step finds it again, instead of 200 MB in 50,000 pages that the system clears first."""
    *_, again = _memory()
    assert again < 15_000


def _gives_huge_pages() -> bool:
    """Whether the system has huge pages left for a block that asks for them."""

    def taken() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))

    size, before = 64 << 20, taken()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.madvise(mmap.MADV_HUGEPAGE)
        block[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
        return taken() - before > size // 2


def test_memory_is_in_huge_pages() -> None:
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not pages.exists() or not compute._may_reserve():
        pytest.skip("this system gives huge pages to all programs or to none, or its memory is limited")
    reserved, huge, *_ = _memory(limit=20_000)  # somebody counts the address space
    assert reserved < 100 and huge < 50
    reserved, huge, first, _ = _memory()
    assert reserved > 500
    if not _gives_huge_pages():
        pytest.skip("this system has no huge pages to give")
    assert huge > 100 and first < 25_000


@pytest.mark.parametrize("name", ["MALLOC_PERTURB_", "LD_PRELOAD"])
def test_a_chosen_allocator_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc writes to every block it frees if told so: that would be a quarter of the machine's memory."""
    monkeypatch.setenv(name, "1" if name == "MALLOC_PERTURB_" else "")
    reserved, *_ = _memory()
    assert reserved < 100
