"""From what tokens weigh and where they stand to maps over the picture.

    places     float[K, 5]: a view, and a box in shares of that view (`ZooModel.token_places`); so are cells of pixels
    regions    what each view shows of the picture (`ZooImageProcessor.view_regions`)
    boxes      of tokens in shares of the picture: whole, and what of them is no padding
    map        float[h, w] over the whole picture, as fine as the smallest box

Tiles, padding, crops, squares of patches and regions of any detail are boxes, so that nothing here knows of them.
"""

from typing import NamedTuple

import torch

from ..models.geometry_vlm import ViewRegion


class Boxes(NamedTuple):
    """
    Top, left, bottom and right in shares of the picture.

    whole (`float[K, 4]`): may reach beyond the picture. part (`float[K, 4]`): what of each box is picture; where that
    is nothing, top is not above bottom or left not left of right.
    """

    whole: torch.Tensor
    part: torch.Tensor

    @property
    def seen(self) -> torch.Tensor:
        """`bool[K]`, false at boxes that hold nothing but padding."""
        return (self.part[:, 2:] - self.part[:, :2] > 1e-6).all(dim=1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a map in which the smallest box is a cell."""
        smallest = (self.whole[:, 2:] - self.whole[:, :2]).min(dim=0).values
        rows, columns = (max(1, round(1 / edge)) for edge in smallest.tolist())
        return rows, columns


def boxes_on_picture(places: torch.Tensor, regions: list[ViewRegion], size: tuple[int, int]) -> Boxes:
    """
    Args:
        places (`float[K, 5]`): all of which stand for a place.
        regions: of each view.
        size: height and width of the picture.
    """
    scale = torch.tensor([*size, *size], dtype=torch.float64)
    frames, parts = (torch.tensor(edges, dtype=torch.float64) / scale for edges in zip(*regions, strict=True))
    view = places[:, 0].long()
    start, end = frames[view].split(2, dim=1)
    whole = start.repeat(1, 2) + places[:, 1:] * (end - start).repeat(1, 2)
    part = torch.cat((torch.maximum(whole, parts[view])[:, :2], torch.minimum(whole, parts[view])[:, 2:]), dim=1)
    return Boxes(whole.float(), part.float())


def spread(values: torch.Tensor, boxes: Boxes, grid: tuple[int, int]) -> torch.Tensor:
    """
    Amounts `float[K]` that lie evenly in boxes, such as shares of attention, as a map: each cell has what lies in it.
    What lies in padding is lost, otherwise the sum is kept.
    """
    rows, columns = _overlaps(boxes, grid)
    heights, widths = (boxes.whole[:, 2:] - boxes.whole[:, :2]).unbind(dim=1)
    areas = heights * widths * grid[0] * grid[1]
    return (rows * (values / areas)[:, None]).T @ columns


def average(values: torch.Tensor, boxes: Boxes, grid: tuple[int, int]) -> torch.Tensor:
    """As `spread`, for values that are not amounts: each cell has the mean of what covers it, 0 where nothing does."""
    rows, columns = _overlaps(boxes, grid)
    covered = rows.T @ columns
    return torch.where(covered > 0, ((rows * values[:, None]).T @ columns) / covered.clamp(min=1e-12), 0.0)


def _overlaps(boxes: Boxes, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each row `float[K, h]` and of each column `float[K, w]` lies in each box, in cells."""
    overlaps = []
    for axis, count in enumerate(grid):
        low, high = boxes.part[:, axis, None] * count, boxes.part[:, axis + 2, None] * count
        cells = torch.arange(count, dtype=low.dtype)
        overlap = (torch.minimum(high, cells + 1) - torch.maximum(low, cells)).clamp(min=0)
        overlaps.append(torch.where(overlap > 1e-4, overlap, 0.0))  # what rounding errors alone let in
    return overlaps[0], overlaps[1]
