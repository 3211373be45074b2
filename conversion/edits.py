"""What happens to a tensor between reading and writing, and how it is undone.

An edit is data: the record of a conversion names it, so the way back needs no code of the script that made it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from .engine import ConversionError


class Edit(ABC):
    """
    A change to a tensor.

    kind: its name in a record.
    is_exact: whether what it made is enough to undo it. Where it is not, the tensor as it was waits in the side file.
    """

    kind: ClassVar[str]
    is_exact: ClassVar[bool] = True

    @abstractmethod
    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the source's tensor to the zoo's."""

    @abstractmethod
    def undo(self, tensor: torch.Tensor, rows: int, original: torch.Tensor | None = None) -> torch.Tensor:
        """
        From the zoo's tensor to the source's.

        Args:
            tensor: the zoo's, which may have been trained since.
            rows: of the source's.
            original: the source's as it was, of an edit that is not exact.
        """

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class FillRows(Edit):
    """Fills a matrix up to `rows` rows with its mean row, computed in float32."""

    kind = "fill_rows"
    rows: int

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(self.rows - len(tensor), -1)))

    def undo(self, tensor: torch.Tensor, rows: int, original: torch.Tensor | None = None) -> torch.Tensor:
        return tensor[:rows]


@dataclass(frozen=True)
class CutRows(Edit):
    """Keeps the first `rows` rows of a matrix."""

    kind = "cut_rows"
    is_exact = False
    rows: int

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.rows].clone()

    def undo(self, tensor: torch.Tensor, rows: int, original: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat((tensor, original[self.rows :].to(tensor.dtype)))


@dataclass(frozen=True)
class AddKeyBias(Edit):
    """Biases of queries and values, `float[2 * D]`, to those of queries, keys and values, `float[3 * D]`."""

    kind = "add_key_bias"

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        query, value = tensor.chunk(2)
        return torch.cat((query, torch.zeros_like(query), value))

    def undo(self, tensor: torch.Tensor, rows: int, original: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = tensor.chunk(3)
        if key.count_nonzero():
            raise ConversionError(
                f"The source's tower has no bias of keys, but {key.count_nonzero()} of {len(key)} are not zero: "
                "was it trained?"
            )
        return torch.cat((query, value))


@dataclass(frozen=True)
class Transpose(Edit):
    """Swaps the last two of three axes."""

    kind = "transpose"

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous()

    def undo(self, tensor: torch.Tensor, rows: int, original: torch.Tensor | None = None) -> torch.Tensor:
        return self.apply(tensor)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiplies by a factor in float32, where it does not round."""

    kind = "scale"
    is_exact = False
    factor: float

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() * self.factor

    def undo(self, tensor: torch.Tensor, rows: int, original: torch.Tensor | None = None) -> torch.Tensor:
        if torch.equal(self.apply(original), tensor):
            return original
        return (tensor.float() / self.factor).to(original.dtype)


KINDS = {edit.kind: edit for edit in (FillRows, CutRows, AddKeyBias, Transpose, Scale)}


def from_record(record: Mapping[str, Any]) -> Edit:
    """The edit that a record names; one that is not known is a `ConversionError`."""
    fields = dict(record)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ConversionError(f"The record names the edit '{kind}'; known are {', '.join(KINDS)}.")
    try:
        return KINDS[kind](**fields)
    except TypeError as error:
        raise ConversionError(f"The record's edit '{kind}' does not fit: {error}") from error
