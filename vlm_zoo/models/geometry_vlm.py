"""Geometry of pictures: pure functions of (height, width), from which all counts of tiles, patches and tokens follow.

AnyRes chooses by transformers' `select_best_resolution(image_size, pinpoints)`, which belongs to this set too.
"""

import itertools
import math
from typing import NamedTuple

from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width


class ImageError(ValueError):
    """A picture that cannot be used: unreadable, out of bounds, or no picture at all."""


def fitted_size(image_size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """Returns the size, rounded up, at which a picture keeps its aspect ratio and just fits into `resolution`."""
    (height, width), (max_height, max_width) = image_size, resolution
    scale_height, scale_width = max_height / height, max_width / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), max_height), max_width
    return max_height, min(math.ceil(width * scale_height), max_width)


def letterbox_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size, rounded down, at which a picture keeps its aspect ratio and just fits into `size`."""
    scale = min(size[0] / image_size[0], size[1] / image_size[1])
    pairs = zip(size, image_size, strict=True)
    height, width = (limit if limit / length == scale else max(1, int(length * scale)) for limit, length in pairs)
    return height, width


class ViewRegion(NamedTuple):
    """
    What a view shows of a picture, as (top, left, bottom, right) in the picture's pixels.

    frame: where the edges of the view are; beyond those of the picture where the view is padded.
    part: what the view has of the picture. What its frame has beyond that is padding.
    """

    frame: tuple[float, float, float, float]
    part: tuple[float, float, float, float]

    def window(self, size: tuple[int, int], window: tuple[int, int, int, int]) -> "ViewRegion":
        """Returns what a window (top, left, bottom, right) shows that is cut out of the view's `size` pixels, or
        reaches beyond them."""
        top, left, bottom, right = self.frame
        heights, widths = (bottom - top) / size[0], (right - left) / size[1]
        frame = (
            top + window[0] * heights,
            left + window[1] * widths,
            top + window[2] * heights,
            left + window[3] * widths,
        )
        return ViewRegion(frame, self.part)

    def canvas(self, size: tuple[int, int], canvas: tuple[int, int]) -> "ViewRegion":
        """Returns what a larger canvas shows in whose middle the view's `size` pixels lie."""
        top, left = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
        return self.window(size, (-top, -left, canvas[0] - top, canvas[1] - left))

    def tiles(self, size: tuple[int, int], tile: int) -> list["ViewRegion"]:
        """Returns what each of the tiles shows, row by row, into which the view's `size` pixels are cut."""
        corners = itertools.product(range(0, size[0], tile), range(0, size[1], tile))
        return [self.window(size, (top, left, top + tile, left + tile)) for top, left in corners]


def unpadded_grid(image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """
    Returns the (rows, columns) of a feature grid that remain when those that saw only padding are cut off.

    As many are cut at one end as at the other, `(grid - kept) // 2`. A picture of (480, 640) on a grid of (48, 48)
    keeps (36, 48), and row 6 is the first.
    """
    (height, width), (rows, columns) = image_size, grid
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - (rows - kept) // 2 * 2, columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - (columns - kept) // 2 * 2


def covering_grid(image_size: tuple[int, int], tile: int, max_tiles: int, enough: float = 0.9) -> tuple[int, int]:
    """
    Returns the (rows, columns) of the smallest grid whose tiles show enough of a picture at its own resolution.

    A tile whose longer edge is above `tile` is shrunk to it, keeping its aspect ratio; what is left of the picture's
    area is what the grid covers. Without a grid that covers enough it is the one that covers most.

    Args:
        image_size: (height, width) of the picture.
        tile: edge of what the tower sees.
        max_tiles: rows times columns at most.
        enough: share of the area above which a grid is good.
    """
    height, width = image_size
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    covered = {}
    for grid in grids:
        area = 0
        for top, left, bottom, right in tile_regions(image_size, grid):
            longer, shorter = max(right - left, bottom - top), min(right - left, bottom - top)
            area += tile * (shorter / longer * tile) if longer > tile else longer * shorter
        covered[grid] = area / (height * width)
    good = [grid for grid in grids if covered[grid] > enough]
    if good:
        return min(good, key=lambda grid: (math.prod(grid), -covered[grid]))
    return min(grids, key=lambda grid: (-covered[grid], math.prod(grid)))


def tile_regions(image_size: tuple[int, int], grid: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Returns (top, left, bottom, right) of the tiles of a picture, row by row; the last ones take what remains."""
    edges = []
    for length, parts in zip(image_size, grid, strict=True):
        starts = [length // parts * part for part in range(parts)]
        edges.append(list(zip(starts, (*starts[1:], length), strict=True)))
    return [(top, left, bottom, right) for (top, bottom), (left, right) in itertools.product(*edges)]


def resized_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """Returns the (height, width) to which `size` resizes, with the rounding of transformers."""
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio(image_size, size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        longer = int(size.shortest_edge * max(image_size) / min(image_size))
        return (longer, size.shortest_edge) if image_size[1] <= image_size[0] else (size.shortest_edge, longer)
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError(
        f"size={size}, expected height and width, shortest_edge (and longest_edge), or max_height and max_width"
    )


def smart_resize(
    image_size: tuple[int, int],
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    temporal_patch_size: int = 1,
) -> tuple[int, int]:
    """
    Returns the (height, width) in multiples of `factor` that is nearest to a picture's own and within the bounds.

    Each side is rounded to a multiple of `factor`, half to the even one. Where the area that this gives is above
    `max_pixels`, both sides of the picture are divided by `sqrt(height * width / max_pixels)` and rounded down, to
    `factor` at least; where it is below `min_pixels` they are scaled up likewise and rounded up (Qwen2-VL,
    https://huggingface.co/papers/2409.12191).

    With `frames` the bounds count the pixels of a whole clip, `frames * height * width` (Qwen3-VL,
    https://huggingface.co/papers/2511.21631): the area that is compared counts the frames rounded to a multiple of
    `temporal_patch_size`, the scale all of them, and a picture with a side below `factor` is first scaled up to it.
    As published, a clip may so exceed `max_pixels` by the frames that rounding left out.

    Args:
        image_size: (height, width) of the picture.
        factor: edge in pixels of what becomes one visual token, `patch_size * merge_size`.
        min_pixels, max_pixels: bounds of the result's area.
        frames: of the clip.
        temporal_patch_size: frames that share a visual token.

    Raises:
        ImageError: when a side is above 200 times the other.
    """
    height, width = image_size
    if min(image_size) < 1 or max(image_size) / min(image_size) > 200:
        raise ImageError(
            f"has {height} x {width} pixels, expected an aspect ratio of at most 200 at native resolution"
        )
    if frames > 1 and min(image_size) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = round(height / factor) * factor, round(width / factor) * factor
    compared = math.prod(rounded) * max(round(frames / temporal_patch_size), 1) * temporal_patch_size
    if compared > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        return tuple(max(factor, math.floor(length / shrink / factor) * factor) for length in (height, width))
    if compared < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        return tuple(math.ceil(length * grow / factor) * factor for length in (height, width))
    return rounded
