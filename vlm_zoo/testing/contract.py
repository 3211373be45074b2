"""The contract: what every vision-language model should keep, as one call that prints a table.

    >>> from vlm_zoo.testing import check_vlm
    >>> report = check_vlm(model, processor)
    >>> print(report)
    >>> report.raise_if_failed()

It runs on any model of transformers with an image-text processor. Checks that need what only the zoo's models have
(parts, code in the checkpoint) are reported as skipped for others, with the reason. Use small models: some checks
train a step or start a process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, ProcessorMixin


class ContractViolation(AssertionError):
    """A model does not keep one of the contract's promises."""


class NotApplicable(Exception):
    """A check has nothing to check on this model; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """The outcome of one promise."""

    promise: str
    outcome: str  # "kept", "broken" or "skipped"
    detail: str
    seconds: float


@dataclass
class ContractReport:
    """What `check_vlm` found; printing it shows the table."""

    model: str
    checks: list[Check] = field(default_factory=list)

    @property
    def broken(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "broken"]

    def raise_if_failed(self) -> None:
        """Raises `ContractViolation` with the table when a promise is broken."""
        if self.broken:
            raise ContractViolation(str(self))

    def __str__(self) -> str:
        width = max((len(check.promise) for check in self.checks), default=0)
        lines = [f"{self.model}: {len(self.checks) - len(self.broken)} of {len(self.checks)} promises not broken"]
        lines += [
            f"{check.outcome:<8}{check.promise:<{width}}  {check.seconds:6.2f} s  {check.detail}".rstrip()
            for check in self.checks
        ]
        return "\n".join(lines)


PROMISES: dict[str, Callable] = {}


def promise(text: str):
    """Registers a check under the sentence it verifies; the check returns a detail for the table, or raises."""

    def register(function: Callable) -> Callable:
        PROMISES[text] = function
        return function

    return register


def require(condition: bool, message: str) -> None:
    """Raises `ContractViolation(message)` unless the condition holds."""
    if not condition:
        raise ContractViolation(message)


def check_vlm(
    model: PreTrainedModel, processor: ProcessorMixin, *, only: str | None = None, tolerance: float = 1e-4
) -> ContractReport:
    """
    Runs the contract.

    Args:
        model: a head model with generation, in float32.
        processor: its processor, with a chat template.
        only: run the promises that contain this text.
        tolerance: allowed difference of logits that should be equal.

    Returns:
        A report; checks never raise out of here.

    Raises:
        ValueError: when `only` matches no promise.
    """
    from . import promises  # registers the checks; imports the trainers, which a plain import should not pay for

    chosen = {text: check for text, check in PROMISES.items() if only is None or only in text}
    if not chosen:
        raise ValueError(f"No promise contains '{only}'; there are: {'; '.join(PROMISES)}.")
    report = ContractReport(type(model).__name__)
    for text, check in chosen.items():
        subject = promises.Subject(model, processor, tolerance)
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            outcome, detail = "kept", check(subject) or ""
        except NotApplicable as reason:
            outcome, detail = "skipped", str(reason)
        except Exception as error:  # a crash is a broken promise, and the table must still be printed
            outcome, detail = "broken", f"{type(error).__name__}: {error}"
        finally:
            torch.random.set_rng_state(state)
            model.eval()
        report.checks.append(Check(text, outcome, detail, time.perf_counter() - start))
    return report
