"""What `explain` found."""

import os
import secrets
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
import torch

from .asking import ExplainError


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Explanation:
    """
    Where a model looked.

    question, answer: what was asked, and the answer that is explained.
    image: the picture, upright.
    maps: for each name `float[h, w]` over the whole picture, none below 0; maps may differ in h and w.
    labels: what is written over maps, by default their names.
    boxes (`float[K, 4]`, *optional*):
        Top, left, bottom and right of what each visual token covers, in shares of the picture's height and width, for
        tokens that stand for a place in it. `None` where tokens stand for no place.
    """

    question: str
    answer: str
    image: PIL.Image.Image
    maps: dict[str, torch.Tensor]
    labels: dict[str, str] = field(default_factory=dict)
    boxes: torch.Tensor | None = None

    def figure(self) -> "Figure":
        """The picture, the tokens on it, then each map over it; question and answer above."""
        from .drawing import draw  # matplotlib takes its time, and only those who draw need it

        return draw(self)

    def to_image(self) -> PIL.Image.Image:
        """`figure` as pixels."""
        with PIL.Image.open(BytesIO(self._png())) as image:
            return image.convert("RGB")

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes `figure` as a PNG, whole or not at all, in place of what may be there.

        Raises:
            ExplainError: for a name that does not end in .png, or a folder.
        """
        path = checked_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
        try:
            temporary.write_bytes(self._png())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _png(self) -> bytes:
        from .drawing import png

        return png(self.figure())


def checked_path(path: str | os.PathLike) -> Path:
    """The path of a PNG; another name or a folder is an `ExplainError`."""
    path = Path(path)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ExplainError(f"The map is a PNG: expected a file name that ends in .png, got '{path}'.")
    return path
