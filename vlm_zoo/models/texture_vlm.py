"""The texture of a picture: 13 channels that need no parameters, and what each cell of them says.

    pictures     float[I, 3, h, w] in [0, 1], recovered from normalised pixels in any layout
    texture      float[I, 13, h, w] in [0, 1]: colours, L*a*b*, Sobel, place, eccentricity, local contrast
    statistics   of each cell: the means of the channels, and the entropies of L, a, b and the Sobel magnitude

A picture is read by itself: nothing depends on its neighbours in the batch, on a CPU not even the last bit, and all of
it is in float32, under autocast too. So a decision that rests on these numbers is the same whatever else is in the
batch.

The colours are those of sRGB under D65 (https://www.color.org/srgb.pdf, CIE 15).
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .native_vlm import PatchGeometry


TEXTURE_CHANNELS: tuple[str, ...] = (
    *("red", "green", "blue"),
    *("lightness", "a", "b"),
    *("sobel_x", "sobel_y", "sobel_magnitude"),
    *("y", "x", "eccentricity", "contrast"),
)
ENTROPY_CHANNELS: tuple[str, ...] = ("lightness", "a", "b", "sobel_magnitude")
_SIGNED_CHANNELS = ("sobel_x", "sobel_y")  # around 0.5

_XYZ_OF_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)
_LUMA = (0.299, 0.587, 0.114)
_TINY = 1e-12  # keeps the slope of a square root at zero finite

_BINS = 16
_LEVELS = 1024  # 64 to a bin: entropies within 0.01 of those of exact values
# Frames are handled in groups of so many pixels: on a CPU what its cache holds is fastest, elsewhere few calls are
_PIXELS_AT_ONCE_ON_CPU, _PIXELS_AT_ONCE = 2**18, 2**22


# Texture


def texture(images: torch.Tensor, fixation: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """
    Computes the texture array, without parameters and with finite gradients everywhere.

    Args:
        images (`float[I, 3, h, w]`): in [0, 1].
        fixation: (y, x) in [0, 1], where the eccentricity is 0; it is 1 at the corner farthest from there.

    Returns:
        `float[I, 13, h, w]`, the channels of `TEXTURE_CHANNELS`, in [0, 1] up to rounding. The two signed Sobel
        channels are around 0.5.
    """
    channels = _channels(images, fixation)
    return torch.stack(torch.broadcast_tensors(*channels.values()), dim=1)


def _channels(images: torch.Tensor, fixation: tuple[float, float]) -> dict[str, torch.Tensor]:
    """The channels by name, `float[I, h, w]` each, and `float[1, h, w]` where all images have the same."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"The texture array takes float[images, 3, height, width], got {list(images.shape)}. Likely cause: grey "
            "pictures, whose channel is to be repeated, or pictures without the axis of images."
        )
    images = images.float()
    luma = _mix(images, _LUMA)
    return {
        **dict(zip(TEXTURE_CHANNELS[:3], images.unbind(dim=1), strict=True)),
        **dict(zip(TEXTURE_CHANNELS[3:6], _lab(images), strict=True)),
        **dict(zip(TEXTURE_CHANNELS[6:9], _sobel(luma), strict=True)),
        **dict(zip(TEXTURE_CHANNELS[9:12], _places(images, fixation), strict=True)),
        TEXTURE_CHANNELS[12]: _contrast(luma),
    }


def _mix(images: torch.Tensor, weights: tuple[float, float, float]) -> torch.Tensor:
    """A weighted sum of colours, `float[I, 3, h, w]` to `float[I, h, w]`."""
    # Not a matrix product: how that rounds depends on the batch
    red, green, blue = images.unbind(dim=1)
    return (red * weights[0]).add_(green, alpha=weights[1]).add_(blue, alpha=weights[2])


def _lab(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L*, a* and b*, each moved into [0, 1]."""
    linear = _line_and_power(images, joint=0.04045, slope=1 / 12.92, shift=0.055, exponent=2.4)
    shares = [
        _mix(linear, tuple(weight / white for weight in weights))
        for weights, white in zip(_XYZ_OF_RGB, _WHITE, strict=True)
    ]
    x, y, z = (_line_and_power(share, joint=0.008856, slope=7.787, shift=0.0, exponent=1 / 3) for share in shares)
    lightness = (y * 1.16).sub_(0.16)
    return lightness, (x - y).mul_(500 / 255).add_(128 / 255), (y - z).mul_(200 / 255).add_(128 / 255)


def _line_and_power(values: torch.Tensor, joint: float, slope: float, shift: float, exponent: float) -> torch.Tensor:
    """`((v + shift) / (1 + shift)) ** exponent` from the joint on, below it the line that ends there."""
    # Without `where`, whose branch not taken would bring the root's infinite slope at 0 into the gradient
    power = values.clamp_min(joint).add_(shift).div_(1 + shift)
    # Not pow: how that rounds on a CPU depends on a pixel's place in memory, and so on the batch
    power = power.log_().mul_(exponent).exp_()
    return values.clamp_max(joint).sub_(joint).mul_(slope).add_(power)


def _sobel(luma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slopes along x and y around 0.5, at most 0.5 away, and their length."""
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    left, middle, right = padded[..., :-2], padded[..., 1:-1], padded[..., 2:]
    difference = right - left
    x = (difference[:, :-2] + difference[:, 2:]).add_(difference[:, 1:-1], alpha=2).div_(8)
    smooth = (left + right).add_(middle, alpha=2)
    y = (smooth[:, 2:] - smooth[:, :-2]).div_(8)
    return x + 0.5, y + 0.5, (x * x).add_(y * y).add_(_TINY).mul_(2).sqrt()


def _places(images: torch.Tensor, fixation: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, x and eccentricity, `float[1, h, w]` each."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device, dtype=torch.float32)
    columns = torch.arange(width, device=images.device, dtype=torch.float32)
    y = ((rows + 0.5) / height)[:, None].expand(1, height, width)
    x = ((columns + 0.5) / width).expand(1, height, width)
    farthest = math.hypot(*(max(place, 1 - place) for place in fixation))
    return y, x, torch.hypot(y - fixation[0], x - fixation[1]) / farthest


def _contrast(luma: torch.Tensor) -> torch.Tensor:
    """Twice the standard deviation within a window, which at an edge holds fewer pixels."""
    # The spread is the same from any origin; from a colour of the picture itself a constant picture has none at all
    luma = luma - luma[:, :1, :1].detach()
    mean, square = _window_means(luma), _window_means(luma * luma)
    return square.sub_(mean * mean).clamp_min_(0).add_(_TINY).sqrt().mul(2)


def _window_means(values: torch.Tensor) -> torch.Tensor:
    """
    Means over windows of 7 x 7 around each pixel, `float[I, h, w]` to the same.

    As `avg_pool2d` with `count_include_pad=False`, by sums of shifted pictures: a tenth of its time on a CPU.
    """
    for axis in (-2, -1):
        length = values.shape[axis]
        padded = F.pad(values, (0, 0, 3, 3) if axis == -2 else (3, 3))
        pairs = padded.narrow(axis, 0, length + 5) + padded.narrow(axis, 1, length + 5)
        sums = pairs.narrow(axis, 0, length) + pairs.narrow(axis, 2, length)  # 7 = 2 + 2 + 2 + 1
        sums.add_(pairs.narrow(axis, 4, length)).add_(padded.narrow(axis, 6, length))
        place = torch.arange(length, device=values.device)
        counts = (place + 3).clamp_max(length - 1) - (place - 3).clamp_min(0) + 1
        values = sums.div_(counts[:, None] if axis == -2 else counts)
    return values


# Cells


def cell_statistics(pictures: torch.Tensor, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the texture array says of each cell.

    Args:
        pictures (`float[G, 3, h, w]`): in [0, 1].
        cell: edge of a cell in pixels; `ValueError` unless it divides the height and the width.

    Returns:
        Cells row by row, K = h / cell * w / cell: the means of the channels of `TEXTURE_CHANNELS` `float[G, K, 13]`,
        those of the signed Sobel channels of their distance from 0.5; and the entropies of `ENTROPY_CHANNELS`
        `float[G, K, 4]`, see [`cell_entropies`], which carry no gradient.
    """
    channels = _channels(pictures, (0.5, 0.5))
    entropies = cell_entropies(torch.stack([channels[name].detach() for name in ENTROPY_CHANNELS], dim=1), cell)
    for name in _SIGNED_CHANNELS:
        channels[name] = (channels[name] - 0.5).abs()
    means = [_cell_means(channel, cell) for channel in channels.values()]
    return torch.stack(torch.broadcast_tensors(*means), dim=2), entropies


def _check_cells(values: torch.Tensor, cell: int) -> None:
    height, width = values.shape[-2:]
    if cell < 1 or height % cell or width % cell:
        raise ValueError(
            f"Pictures of {height} x {width} pixels cannot be cut into cells of {cell} x {cell}. Likely cause: the "
            "cells of another vision tower."
        )


def _cell_means(values: torch.Tensor, cell: int) -> torch.Tensor:
    """`float[G, h, w]` to `float[G, K]`."""
    sums = values.unflatten(1, (-1, cell)).sum(dim=2).unflatten(2, (-1, cell)).sum(dim=3)
    return sums.flatten(1) / cell**2


def cell_entropies(values: torch.Tensor, cell: int) -> torch.Tensor:
    """
    Shannon entropies of the values in each cell, of a soft histogram of 16 bins.

    A value belongs to a bin by `softmax(-(value - centre)² / (2 s²))` with s = 1 / 64, and a histogram is the mean
    over the pixels of a cell. 1 is a cell that fills all bins alike, 0 one of a single value; between two bins that
    value still has ln 2 / ln 16 = 0.25.

    Values are rounded to 1024 levels, whose memberships are a table: the result is within 0.01 of that of exact
    values, at a fiftieth of the time, and carries no gradient.

    Args:
        values (`float[G, V, h, w]`): in [0, 1]; what lies outside counts as the nearer end.
        cell: edge of a cell in pixels; `ValueError` unless it divides the height and the width.

    Returns:
        `float[G, K, V]` in [0, 1], cells row by row.
    """
    _check_cells(values, cell)
    values = values.detach().float().unflatten(3, (-1, cell)).unflatten(2, (-1, cell))
    cells = (values * _LEVELS).permute(0, 2, 4, 1, 3, 5)  # float[G, h / cell, w / cell, V, cell, cell]
    # Bounds after rounding: a pixel that is no number would otherwise point outside the table
    levels = cells.to(torch.int32).clamp_(0, _LEVELS - 1).reshape(-1, cell**2)
    # Row by row, where a product of counts and table would round by the number of rows
    histograms = F.embedding_bag(levels, _memberships(values.device), mode="sum") / cell**2
    entropies = torch.special.entr(histograms).sum(dim=1) / math.log(_BINS)
    return entropies.clamp_max(1).view(cells.shape[0], -1, cells.shape[3])


def _memberships(device: torch.device) -> torch.Tensor:
    """How much each level belongs to each bin: `float[levels, bins]`, rows that sum to 1."""
    value = (torch.arange(_LEVELS, device=device, dtype=torch.float32) + 0.5) / _LEVELS
    centre = (torch.arange(_BINS, device=device, dtype=torch.float32) + 0.5) / _BINS
    distance = (value[:, None] - centre) * (4 * _BINS)  # in units of s
    return torch.softmax(-distance.square() / 2, dim=1)


# Pixels in any layout


class FramesOfSize(NamedTuple):
    """
    The frames of a batch that have one size.

    size: (height, width) in patches. frames: their numbers, counted over all images of the batch. pictures:
    `float[G, C, h, w]`.
    """

    size: tuple[int, int]
    frames: list[int]
    pictures: torch.Tensor


def pictures_of_patches(
    pixel_values: torch.Tensor, grids: torch.Tensor | None, geometry: PatchGeometry, merge_size: int
) -> list[FramesOfSize]:
    """
    Puts patches together again, one tensor for each distinct size.

    A frame is one time step of an image. Where patches span several frames it is the first of them.

    Args:
        pixel_values: patches `float[N, C * F * P * P]`, or of a single frame `float[N, C * P * P]`, in the layout of
            native resolution; or pictures `float[I, C, H, W]`, which lose what fills no patch.
        grids (`int[I, 3]`, *optional*): in patches; None with pictures.
        geometry: what a patch covers.
        merge_size: side of a square of neighbours.
    """
    size = geometry.size
    if pixel_values.ndim == 4:
        height, width = (length // size for length in pixel_values.shape[2:])
        pictures = pixel_values[:, :, : height * size, : width * size]
        return [FramesOfSize((height, width), list(range(len(pictures))), pictures)]
    grids = _checked_grids(pixel_values, grids, geometry, merge_size)
    images_of_size: dict[tuple[int, int], list[int]] = {}
    for image, (_, height, width) in enumerate(grids):
        images_of_size.setdefault((height, width), []).append(image)
    ends = list(itertools.accumulate(frames for frames, _, _ in grids))
    first_frames = pixel_values.unflatten(1, (geometry.channels, -1, size**2))[:, :, 0]  # float[N, C, P * P]
    patches = first_frames.split([math.prod(grid) for grid in grids])
    found = []
    for (height, width), images in images_of_size.items():
        own = torch.cat([patches[image] for image in images]) if len(images) < len(grids) else first_frames
        squares = own.unflatten(2, (size, size)).unflatten(
            0, (-1, height // merge_size, width // merge_size, merge_size, merge_size)
        )  # float[G, h / m, w / m, m, m, C, P, P]
        pictures = squares.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5, 7).flatten(2, 4)
        frames = [frame for image in images for frame in range(ends[image] - grids[image][0], ends[image])]
        found.append(FramesOfSize((height, width), frames, pictures))
    return found


def _checked_grids(
    patches: torch.Tensor, grids: torch.Tensor | None, geometry: PatchGeometry, merge_size: int
) -> list[list[int]]:
    foreign = "Likely cause: pixels prepared by the processor of another model."
    widths = geometry.values, geometry.values * geometry.frames
    if grids is None or patches.ndim != 2 or patches.shape[1] not in widths:
        raise ValueError(
            f"Expected pictures [images, channels, height, width], or patches [patches, {widths[0]}] or "
            f"[patches, {widths[1]}] with their grids, got {list(patches.shape)} and grids "
            f"{None if grids is None else list(grids.shape)}. {foreign}"
        )
    grids = grids.tolist()  # once: each look at a tensor on a device waits for it
    counted = sum(map(math.prod, grids))
    if counted != len(patches) or any(height % merge_size or width % merge_size for _, height, width in grids):
        raise ValueError(
            f"Grids {grids} count {counted} patches in squares of {merge_size} x {merge_size}, pixel_values holds "
            f"{len(patches)}. {foreign}"
        )
    return grids


def unnormalize(
    pictures: torch.Tensor, mean: float | list[float] | tuple[float, ...], std: float | list[float] | tuple[float, ...]
) -> torch.Tensor:
    """
    Takes back an image processor's normalisation.

    Args:
        pictures (`float[G, C, h, w]`): normalised.
        mean, std: of the image processor, one number or one for each channel.

    Returns:
        `float[G, C, h, w]` in [0, 1].
    """
    mean, std = (
        torch.tensor(value, dtype=torch.float32, device=pictures.device).reshape(-1, 1, 1) for value in (mean, std)
    )
    if {len(mean), len(std)} - {1, pictures.shape[1]}:
        raise ValueError(
            f"The normalisation has {len(mean)} means and {len(std)} deviations, the pictures have "
            f"{pictures.shape[1]} channels. Likely cause: image_mean and image_std of another model."
        )
    return torch.addcmul(mean, pictures.float(), std).clamp_(0, 1)


def texture_of_patches(
    pixel_values: torch.Tensor,
    grids: torch.Tensor | None,
    geometry: PatchGeometry,
    merge_size: int,
    mean: float | list[float] | tuple[float, ...],
    std: float | list[float] | tuple[float, ...],
) -> torch.Tensor:
    """
    What the texture array says of each visual token: of each square of neighbouring patches.

    Args:
        pixel_values, grids, geometry, merge_size: see [`pictures_of_patches`].
        mean, std: of the image processor.

    Returns:
        `float[K, 17]`, the 13 means and 4 entropies of [`cell_statistics`]; cells are those of all images one after
        the other, frame by frame and row by row, the order of `places_in(in_squares(grids, merge_size))`.
    """
    if geometry.channels not in (1, 3):
        raise ValueError(
            f"The texture array takes pictures of 3 channels or 1, the vision tower's have {geometry.channels}."
        )
    cells_of_frame = {}
    for size, frames, pictures in pictures_of_patches(pixel_values, grids, geometry, merge_size):
        at_once = _PIXELS_AT_ONCE_ON_CPU if pictures.device.type == "cpu" else _PIXELS_AT_ONCE
        pieces = []
        for some in pictures.split(max(1, at_once // (math.prod(size) * geometry.size**2))):
            colours = unnormalize(some, mean, std).expand(-1, 3, -1, -1)
            pieces += torch.cat(cell_statistics(colours, geometry.size * merge_size), dim=2)
        cells_of_frame.update(zip(frames, pieces, strict=True))
    return torch.cat([cells_of_frame[frame] for frame in range(len(cells_of_frame))])
