"""Clocks: steps in turn, compared round by round, and the peak memory of one step in a process of its own."""

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """
    Rounds of several steps.

    milliseconds: for each step, by its name, one number a round.
    """

    milliseconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.milliseconds.values())))

    def median(self, name: str) -> float:
        """The median of a step, in milliseconds."""
        return statistics.median(self.milliseconds[name])

    def ratios(self, name: str, base: str) -> list[float]:
        """How many times as long as `base` the step `name` took, round by round."""
        pairs = zip(self.milliseconds[name], self.milliseconds[base], strict=True)
        return [one / max(other, 1e-6) for one, other in pairs]

    def ratio(self, name: str, base: str) -> tuple[float, tuple[float, float]]:
        """The median of `ratios`, and their first and third quartile."""
        ratios = self.ratios(name, base)
        if len(ratios) == 1:
            return ratios[0], (ratios[0], ratios[0])
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, (low, high)


def cpu_milliseconds(step: Step) -> float:
    """CPU time of this process, which other processes' load hardly changes."""
    start = time.process_time()
    step()
    return (time.process_time() - start) * 1e3


def cuda_milliseconds(step: Step) -> float:
    """Time between two events on the GPU's stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's CPU kernels: CPU time of several is time that they wait for each other too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    seconds: float = 0.0,
    clock: Callable[[Step], float] = cpu_milliseconds,
) -> Timing:
    """
    Times steps in turn, after one round that does not count; every other round goes in the opposite order.

    Args:
        steps: what to time, by name.
        rounds: how many rounds at least.
        seconds: go on until the rounds took this long, or there are ten times `rounds`.
        clock: runs a step and returns milliseconds.
    """
    names = list(steps)
    for name in names:
        clock(steps[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = count = 0
    while count < rounds or (spent < 1e3 * seconds and count < 10 * rounds):
        for name in names if count % 2 == 0 else reversed(names):
            times[name].append(clock(steps[name]))
            spent += times[name][-1]
        count += 1
    return Timing(times)


# Memory


def peak_memory(row: str, step: str, scale: str, device: str = "cpu") -> int:
    """
    Bytes that one step of a row adds at its peak to a process that has everything loaded.

    Args:
        row: name of the row.
        step: `"ours"`, `"peer"` or `"limit"`.
        scale: `"full"` or `"quick"`.
        device: where the models run.
    """
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # glibc gives back what is freed; else holes in its heap count too
    }
    command = [sys.executable, "-m", "vlm_zoo.bench.peak", row, step, scale, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"The peak memory of {row} ({step}) could not be measured: {reason}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def peak_of(step: Step, device: str = "cpu") -> int:
    """Bytes that a step adds at its peak to what this process holds before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    _return_free_memory()
    _forget_peak()
    before = _resident()
    step()
    return max(_peak() - before, 0)


def _return_free_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Linux only: building the models must not count. Elsewhere a step that needs less than that shows too much."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident() -> int:
    try:
        return 1024 * _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    """The largest resident set so far. `ru_maxrss` of a child starts from its parent's on Linux, `VmHWM` does not."""
    try:
        return 1024 * _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
