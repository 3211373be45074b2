"""From a row's case to its line in the table: equality first, then turns, then memory."""

import contextlib
import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import transformers
from transformers.utils import logging as hf_logging

from .measure import Step, cpu_milliseconds, cuda_milliseconds, one_thread, peak_memory, take_turns
from .scale import FULL, QUICK, Scale


logger = logging.getLogger(__name__)

SCALES = {"full": FULL, "quick": QUICK}


class NotRun(Exception):
    """A row has nothing to run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Equality:
    """
    What was compared before the clock ran.

    equal: whether both sides compute the same.
    text: what was compared, and by how much it differs.
    """

    equal: bool
    text: str

    def __and__(self, other: "Equality") -> "Equality":
        return Equality(self.equal and other.equal, f"{self.text}; {other.text}")


def same(what: str, ours: object, peer: object) -> Equality:
    """Equal bit for bit: tensors, or anything that compares with `==`."""
    if isinstance(ours, torch.Tensor) and isinstance(peer, torch.Tensor):
        if torch.equal(ours, peer):
            return Equality(True, f"{what} equal bit for bit")
        return close(what, ours, peer, 0.0)
    return Equality(ours == peer, f"{what} equal" if ours == peer else f"{what} differ")


def close(what: str, ours: torch.Tensor, peer: torch.Tensor, allowed: float, relative: bool = False) -> Equality:
    """Equal up to `allowed`: the largest difference, or with `relative` the difference's norm by that of `peer`."""
    if ours.shape != peer.shape:
        return Equality(False, f"{what}: shapes {list(ours.shape)} and {list(peer.shape)}")
    ours, peer = ours.detach().float(), peer.detach().float()
    difference = (ours - peer).norm() / peer.norm().clamp_min(1e-30) if relative else (ours - peer).abs().max()
    kind = "relative difference" if relative else "max difference"
    return Equality(difference.item() <= allowed, f"{what}: {kind} {difference.item():.1e}, allowed {allowed:.1e}")


@dataclass
class Case:
    """
    Two sides that compute the same.

    peer: what the zoo is measured against.
    ours, theirs: one step of either side.
    compare: shows that they are equal; it runs before the clock does.
    limit: what bounds the ratio, in words.
    limit_step: the part of the work that no implementation can leave out, timed beside the two sides.
    limit_ratio: the bound itself where it follows from the sizes.
    host: whether the steps are the CPU's work on any machine.
    note: what else a reader should know; `{ours}`, `{peer}` and the names in `parts` stand for milliseconds.
    parts: further steps to time for the note.
    """

    peer: str
    ours: Step
    theirs: Step
    compare: Callable[[], Equality]
    limit: str
    limit_step: Step | None = None
    limit_ratio: float | None = None
    host: bool = False
    note: str = ""
    parts: dict[str, Step] = field(default_factory=dict)

    def steps(self) -> dict[str, Step]:
        """All steps by name."""
        limit = {} if self.limit_step is None else {"limit": self.limit_step}
        return {"ours": self.ours, "peer": self.theirs, **limit, **self.parts}


@dataclass
class Row:
    """
    A line of the table.

    ours_ms, peer_ms: medians, in milliseconds.
    ratio, spread: how many times as long the peer takes, median and quartiles over the rounds.
    limit_ratio: the largest ratio that could be reached.
    memory_ratio, memory_mib: peak memory of a step, ours by the peer's; and both (and the limit's) in MiB.
    target, memory_target: what the row should reach at full size.
    equality: what was compared, and the difference.
    invalid: the sides differ or a step failed, so that the row says nothing.
    """

    name: str
    scale: str
    device: str = "cpu"
    peer: str = ""
    ours_ms: float | None = None
    peer_ms: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    rounds: int = 0
    limit_ratio: float | None = None
    limit: str = ""
    memory_ratio: float | None = None
    memory_mib: dict[str, float] = field(default_factory=dict)
    target: float | None = None
    memory_target: float | None = None
    equality: str = ""
    invalid: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """`"reached"`, `"missed"`, or `"within spread"` when the median is below the target and the upper quartile is
        not; empty without a target or a ratio."""
        if self.target is None or self.ratio is None:
            return ""
        if self.ratio >= self.target:
            return "reached"
        return "within spread" if self.spread[1] >= self.target else "missed"

    @property
    def memory_verdict(self) -> str:
        """`"reached"` or `"missed"`; empty without a target or a measurement."""
        if self.memory_target is None or self.memory_ratio is None:
            return ""
        return "reached" if round(self.memory_ratio, 2) <= self.memory_target else "missed"

    def to_dict(self) -> dict:
        """The row as JSON takes it."""
        return {**dataclasses.asdict(self), "verdict": self.verdict, "memory_verdict": self.memory_verdict}


@dataclass(frozen=True)
class Entry:
    """A registered row."""

    name: str
    build: Callable[[Scale], Case]
    target: float | None = None
    memory_target: float | None = None
    rounds: int = 1


ROW_MODULES = ("rows", "blip2_rows", "flamingo_rows", "vet_rows", "mrope_rows", "arr_coc_rows")
ROWS: dict[str, Entry] = {}


def row(name: str, target: float | None = None, memory_target: float | None = None, rounds: int = 1):
    """
    Registers a function that makes a row's `Case` at a scale; it may raise `NotRun`.

    Args:
        name: of the row.
        target: ratio that the row should reach.
        memory_target: ours by the peer's peak memory; with it the memory is measured.
        rounds: how many times as many rounds as the scale has, for a ratio that must be known well.
    """

    def register(build: Callable[[Scale], Case]) -> Callable[[Scale], Case]:
        ROWS[name] = Entry(name, build, target, memory_target, rounds)
        return build

    return register


def find_rows(only: list[str] | None = None) -> list[Entry]:
    """The rows of these names, or all; an unknown name is a `ValueError` with those that exist."""
    for module in ROW_MODULES:  # importing one registers its rows
        importlib.import_module(f".{module}", __package__)
    unknown = [name for name in only or [] if name not in ROWS]
    if unknown:
        raise ValueError(f"Unknown row(s) {', '.join(unknown)}; there are {', '.join(ROWS)}.")
    return [ROWS[name] for name in only or ROWS]


def run(quick: bool = False, only: list[str] | None = None, device: str = "cpu") -> list[Row]:
    """
    Measures the table.

    Args:
        quick: smaller sizes and fewer rounds.
        only: names of rows; all by default.
        device: where models run, `"cpu"` or `"cuda"`.

    Raises:
        ValueError: a name that no row has.
    """
    scale = "quick" if quick else "full"
    found = []
    with one_thread(), no_progress_bars():
        for entry in find_rows(only):
            logger.info("%s …", entry.name)
            found.append(measure(entry, scale, dataclasses.replace(SCALES[scale], device=device)))
    return found


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows none while it loads weights."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def measure(entry: Entry, scale_name: str, scale: Scale) -> Row:
    """Measures one row; what goes wrong in it makes it invalid, and the other rows go on."""
    result = Row(entry.name, scale_name, scale.device)
    if scale_name == "full":  # targets are stated for its sizes
        result.target, result.memory_target = entry.target, entry.memory_target
    try:
        case = entry.build(scale)
        result.peer, result.limit = case.peer, case.limit
        equality = case.compare()
        result.equality, result.invalid = equality.text, not equality.equal
        if equality.equal:
            _time(result, case, entry, scale)
            if entry.memory_target is not None:
                _weigh(result, case)
    except NotRun as reason:
        result.note = f"not run: {reason}"
    except Exception as error:  # the rest of the table must still be printed
        logger.debug("%s failed", entry.name, exc_info=True)
        result.invalid, result.note = True, f"{type(error).__name__}: {error}"
    return result


def _time(result: Row, case: Case, entry: Entry, scale: Scale) -> None:
    clock = cuda_milliseconds if scale.device.startswith("cuda") and not case.host else cpu_milliseconds
    steps = case.steps()
    timing = take_turns(steps, entry.rounds * scale.rounds, scale.seconds, clock)
    medians = {name: timing.median(name) for name in steps}
    result.ours_ms, result.peer_ms, result.rounds = medians["ours"], medians["peer"], timing.rounds
    result.ratio, result.spread = timing.ratio("peer", "ours")
    result.limit_ratio = timing.ratio("peer", "limit")[0] if "limit" in steps else case.limit_ratio
    result.note = case.note.format(**{name: f"{median:.3g} ms" for name, median in medians.items()})


def _weigh(result: Row, case: Case) -> None:
    steps = [name for name in ("ours", "peer", "limit") if name in case.steps()]
    peaks = {name: peak_memory(result.name, name, result.scale, result.device) for name in steps}
    result.memory_mib = {name: peak / 2**20 for name, peak in peaks.items()}
    result.memory_ratio = peaks["ours"] / max(peaks["peer"], 1)


# The table


def table(rows: list[Row]) -> str:
    """Rows as text: the numbers, and below each what was compared with what."""
    width = max((len(one.name) for one in rows), default=3)
    lines = [
        f"{'row':<{width}}  {'ours':>9}  {'peer':>9}  {'ratio':>7}  {'quartiles':<14}  {'n':>3}  {'limit':>6}  target"
    ]
    for one in rows:
        lines.append(f"{one.name:<{width}}  {_numbers(one)}".rstrip())
        details = {"against": one.peer, "equality": one.equality, "limit": one.limit, "memory": _memory(one)}
        lines += [f"    {name:<9} {text}" for name, text in {**details, "note": one.note}.items() if text]
    return "\n".join((*lines, "", *_footer(rows)))


def _numbers(one: Row) -> str:
    if one.invalid:
        return "INVALID"
    if one.ratio is None:
        return "not run"
    spread = "[{:.2f}, {:.2f}]".format(*one.spread)
    limit = "" if one.limit_ratio is None else f"{one.limit_ratio:.2f}x"
    target = "" if one.target is None else f"{one.target:.2f}x {one.verdict}"
    return (
        f"{one.ours_ms:6.4g} ms  {one.peer_ms:6.4g} ms  {one.ratio:6.2f}x  {spread:<14}  {one.rounds:>3}  {limit:>6}  "
        f"{target}"
    )


def _memory(one: Row) -> str:
    if one.memory_ratio is None:
        return ""
    sizes = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in one.memory_mib.items())
    target = "" if one.memory_target is None else f"; target {one.memory_target:.2f} {one.memory_verdict}"
    return f"{one.memory_ratio:.2f} of the peer's ({sizes}){target}"


def _footer(rows: list[Row]) -> list[str]:
    devices = sorted({one.device for one in rows}) or ["cpu"]
    clocks = [
        "process CPU time at one thread" if device == "cpu" else f"CUDA events on {device}" for device in devices
    ]
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    lines = [
        f"ratio = peer / ours, the median of n rounds in which the sides take turns; {' and '.join(clocks)}.",
        "memory = what one step adds at its peak to a process with everything loaded.",
        f"torch {torch.__version__}, transformers {transformers.__version__}{load}.",
    ]
    if any(one.scale != "full" for one in rows):
        lines.append("Smaller sizes than those for which targets are stated.")
    return lines
