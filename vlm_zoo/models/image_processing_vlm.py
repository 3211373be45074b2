"""Pixels: any picture in, the float tensor that a vision tower reads out, with torch alone (no torchvision).

One class serves every architecture. Its steps, in the order of the data:

    fetch      paths, URLs, base64, nested lists  ->  a flat list of pictures; files are opened, not decoded
    read       PIL (any mode), numpy, torch       ->  uint8[1, C, H, W], upright, RGB; bounds are checked first
    view       fixed size: the picture itself, padded to a square if asked
               AnyRes: the whole picture squashed to one tile, then the tiles of the resolution that fits best
               covering grid: the whole picture, then the tiles of the smallest grid that keeps its resolution
               native resolution: the picture, or each frame of a clip
    fit        resize and centre crop, still uint8
    normalise  one multiply-add in float32        ->  float[I, C, H, W], with tiles float[I, P, C, H, W];
               at native resolution cut into patches first, while a pixel is a byte  ->  float[N, C * f * p * p]

Resizing uint8 pixels in the memory order of decoded files ([H, W, C]) is several times faster than resizing floats or
planes. Pictures are handled one by one: no result depends on its neighbours, and above 64 x 64 pixels a batch would be
slower. Against transformers' PIL backends (Pillow 13) values differ by at most one 8-bit level, and by two in one or
two values of a million.

AnyRes is LLaVA-NeXT's (https://llava-vl.github.io/blog/2024-01-30-llava-next), the padding to a square LLaVA-1.5's
(https://huggingface.co/papers/2310.03744), the covering grid Ovis' (https://huggingface.co/papers/2405.20797, from
version 1.6), native resolution Qwen2-VL's (https://huggingface.co/papers/2409.12191). Deviations from transformers'
processors: EXIF orientation is applied to PIL pictures as it is to files; floats in [0, 1] are not divided by 255 a
second time; 16-bit pictures are scaled to 8 bits, not clipped; `crop_size` decides the tile only where there is a
centre crop; None for an option means "as configured"; a covering grid has the rows and columns for which it was
chosen, where transformers' Ovis2 cuts a grid of 2 rows and 1 column into 1 row and 2 columns; at native resolution a
still is one frame, not the same one `temporal_patch_size` times, unless a clip is in the batch.
"""

import base64
import ctypes
import itertools
import math
import os
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ExifTags, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, select_best_resolution
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .geometry_vlm import (
    ImageError,
    ViewRegion,
    covering_grid,
    fitted_size,
    letterbox_size,
    resized_size,
    smart_resize,
    tile_regions,
)
from .video_vlm import Clip


# Reading: whatever it was -> uint8


def _open(source: str | os.PathLike) -> PIL.Image.Image:
    source = os.fspath(source)
    if source.startswith(("http://", "https://")):
        return load_image(source)
    if os.path.isfile(source):
        with open(source, "rb") as file:
            return PIL.Image.open(BytesIO(file.read()))
    encoded = source.split(",", 1)[-1] if source.startswith("data:image/") else source
    return PIL.Image.open(BytesIO(base64.b64decode(encoded)))


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block is no reason to refuse a picture
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


class _ArrowArray(ctypes.Structure):
    """The head of a struct that is stable: https://arrow.apache.org/docs/format/CDataInterface.html."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _borrow(image: PIL.Image.Image) -> np.ndarray | None:
    """
    Returns an RGB picture in Pillow's own memory, [H, W, 4] with an unused fourth byte.

    A copy takes as long as resizing, and several times as long where fresh memory is slow to map. None where Pillow
    keeps the picture in several blocks (by default from 16 MB on) or is too old to lend it.
    """
    try:
        capsule = image.__arrow_c_array__()[1]
    except (AttributeError, ValueError):
        return None
    pixels = _ArrowArray.from_address(_capsule_pointer(capsule, b"arrow_array"))
    size = image.height * image.width
    if pixels.length != size or pixels.offset != 0 or pixels.n_children != 1:
        return None
    values = pixels.children[0].contents
    if values.length != 4 * size or values.offset != 0 or values.n_buffers != 2 or not values.buffers[1]:
        return None
    buffer = (ctypes.c_uint8 * (4 * size)).from_address(values.buffers[1])
    buffer.owner = capsule  # which keeps the memory alive
    return np.frombuffer(buffer, np.uint8).reshape(image.height, image.width, 4)


def _decode(image: PIL.Image.Image, do_convert_rgb: bool | None) -> tuple[np.ndarray, int]:
    """Decodes a PIL picture to [H, W, C], of which so many channels count; transparent parts become white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        borrowed = _borrow(image)
        return (np.array(image) if borrowed is None else borrowed), 3
    if do_convert_rgb and image.mode[0] not in "IF":  # 16 or 32 bits, which Pillow would clip to 8
        return convert_to_rgb(image.convert("LA") if image.mode == "La" else image, return_numpy=True), 3
    array = np.array(image)
    array = array if array.ndim == 3 else array[..., None]
    return array, array.shape[2]


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "biuf":
        raise ImageError(f"has pixels of type {array.dtype}, expected whole or real numbers")
    if array.dtype.itemsize > 1 and array.dtype != np.float32:  # torch knows no big-endian and few unsigned types
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    return torch.from_numpy(array if array.flags.writeable and min(array.strides) > 0 else array.copy())


def _to_uint8(pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    Returns uint8 pixels and the number of 8-bit levels that one unit of the input was worth.

    Floats in [0, 1] are fractions of white (255 levels a unit), other numbers up to 255 are levels already, and
    integers up to 65535 are 16-bit.
    """
    if pixels.dtype == torch.uint8:
        return pixels, 1.0
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255, 1.0
    if pixels.is_complex():
        raise ImageError(f"has pixels of type {pixels.dtype}, expected whole or real numbers")
    is_float = pixels.is_floating_point()
    pixels = pixels.float() if is_float else pixels.long()
    low, high = (bound.item() for bound in pixels.aminmax())
    if low >= 0 and high <= 1 and is_float:
        return (pixels * 255).round().to(torch.uint8), 255.0
    if low >= 0 and high <= 255:
        return pixels.round().to(torch.uint8), 1.0
    if low >= 0 and high <= 65535 and not is_float:
        return ((pixels + 128) // 257).to(torch.uint8), 1.0
    expected = "[0, 1] or [0, 255]" if is_float else "[0, 255], or [0, 65535] for 16 bits"
    raise ImageError(f"has pixels in [{low}, {high}], expected {expected}: is it normalised already, or not a number?")


def _to_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """Repeats grey uint8[1, 1, H, W]; lays RGBA uint8[1, 4, H, W] over white."""
    if pixels.shape[1] == 1:
        return pixels.expand(-1, 3, -1, -1)
    alpha = pixels[:, 3:].float() / 255
    return (pixels[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


# Resizing and pasting: uint8[1, C, H, W] -> uint8[1, C, h, w]

_TORCH_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


def _resize(pixels: torch.Tensor, size: tuple[int, int], resample: PILImageResampling | int) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    mode = _TORCH_MODES.get(resample)
    if mode is None or size == (1, 1):  # torch lacks the other filters, and fails on a single pixel: Pillow, by plane
        planes = [PIL.Image.fromarray(plane).resize(size[::-1], resample) for plane in pixels[0].numpy()]
        return torch.from_numpy(np.stack([np.array(plane) for plane in planes]))[None]
    # Both round between the two passes, so their order shows: torch goes along rows first, Pillow along columns
    # where that removes more than twice as many rows as columns.
    if width != size[1] and height - size[0] > max(0, 2 * (width - size[1])):
        pixels = F.interpolate(pixels, (size[0], width), mode=mode, antialias=True)
    return F.interpolate(pixels, size, mode=mode, antialias=True)


def _paste(pixels: torch.Tensor, size: tuple[int, int], top: int, left: int) -> torch.Tensor:
    """Lays the picture on a black canvas; what hangs over the edges is cropped."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (left, size[1] - width - left, top, size[0] - height - top))


def _pad_to_square(pixels: torch.Tensor, image_mean: float | tuple[float, ...] | None) -> torch.Tensor:
    channels, height, width = pixels.shape[1:]
    edge = max(height, width)
    mean = image_mean if isinstance(image_mean, list | tuple) else [image_mean or 0.0] * channels
    square = pixels.new_zeros(1, edge, edge, channels).permute(0, 3, 1, 2)
    for channel, value in zip(range(channels), mean, strict=False):
        square[:, channel] = int(value * 255)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[..., top : top + height, left : left + width] = pixels
    return square


def _letterbox(pixels: torch.Tensor, size: tuple[int, int], settings: dict[str, Any]) -> torch.Tensor:
    """Resizes a picture into `size` at its own aspect ratio, in the middle of a canvas of the colour `image_mean`."""
    fitted = letterbox_size(tuple(pixels.shape[-2:]), size)
    pixels = _resize(pixels, fitted, settings["resample"])
    channels, mean = pixels.shape[1], settings["image_mean"]
    mean = mean if isinstance(mean, list | tuple) else [mean or 0.0] * channels
    canvas = pixels.new_zeros(1, *size, channels).permute(0, 3, 1, 2)
    for channel, value in zip(range(channels), mean, strict=False):
        canvas[:, channel] = round(value * 255)
    top, left = (size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2
    canvas[..., top : top + fitted[0], left : left + fitted[1]] = pixels
    return canvas


def _patches(pixels: torch.Tensor, patch_size: int, merge_size: int) -> torch.Tensor:
    """
    Cuts uint8[1, C, H, W] into uint8[N, C, p * p]: blocks of merge_size x merge_size patches row by row, in each block
    its patches row by row.
    """
    columns = pixels[0].unflatten(2, (-1, merge_size, patch_size))
    blocks = columns.unflatten(1, (-1, merge_size, patch_size))  # [C, H', m, p, W', m, p]
    ordered = blocks.permute(1, 4, 2, 5, 0, 3, 6).numpy()
    # numpy copies runs of a few bytes in two thirds of torch's time
    return torch.from_numpy(np.ascontiguousarray(ordered)).view(-1, pixels.shape[1], patch_size**2)


def _pictures(image: ImageInput | Clip) -> Any:
    return image.frames if isinstance(image, Clip) else [image]


class ZooImageProcessorKwargs(ImagesKwargs, total=False):
    """
    image_grid_pinpoints (`list[list[int]]`, *optional*):
        The resolutions [height, width] that AnyRes chooses from. None or an empty list: one fixed size.
    do_pad_to_square (`bool`, *optional*, defaults to `False`):
        Whether to pad a picture to a square of the colour `image_mean` before resizing it (LLaVA's "pad" aspect
        ratio). AnyRes ignores it; with `max_tiles` every view is resized at its own aspect ratio and then padded.
    max_tiles (`int`, *optional*):
        The tiles of a covering grid, at most (Ovis). None: no covering grid. Above one tile the whole picture comes
        first.
    do_exif_transpose (`bool`, *optional*, defaults to `True`):
        Whether to turn PIL pictures upright by their EXIF orientation.
    max_image_pixels (`int`, *optional*, defaults to 178956970):
        How many pixels a picture may have, as it comes and when resized. The default is Pillow's bound for files.
    max_images (`int`, *optional*, defaults to 10000):
        How many pictures one call may bring.
    crop_to_patches (`bool`, *optional*):
        Whether to return `num_patches` int[I] too: the number of views of each picture, at native resolution its rows
        in `pixel_values`.
    return_row_col_info (`bool`, *optional*):
        Whether to return `image_rows` and `image_cols` int[I] too: the grid of tiles of each picture. An error at
        native resolution, where `image_grid_thw` says it.
    merge_size (`int`, *optional*):
        Turns native resolution on (Qwen-VL): the edge, in patches, of what becomes one visual token. None: off. There
        is no centre crop then, and `size` is read as areas: `shortest_edge` is the least and `longest_edge` the most
        pixels of a picture.
    patch_size (`int`, *optional*):
        Edge of a patch in pixels, for native resolution.
    temporal_patch_size (`int`, *optional*, defaults to 1):
        How many frames of a clip one patch spans. The last frame is repeated until the frames can be divided.
    max_clip_pixels (`int`, *optional*):
        How many pixels the frames of a clip may have together; [`smart_resize`] has the formula (Qwen3-VL's, in which
        `shortest_edge` is the least of the whole clip too). No frame gets more than `longest_edge` for it, and a clip
        of one frame is sized as a still. None: every frame has the size of a still (Qwen2-VL).
    min_pixels (`int`, *optional*):
        What some saved files call `shortest_edge` of `size`, into which it is folded.
    max_pixels (`int`, *optional*):
        What some saved files call `longest_edge` of `size`, into which it is folded.
    """

    image_grid_pinpoints: list[list[int] | tuple[int, int]] | None
    do_pad_to_square: bool | None
    max_tiles: int | None
    do_exif_transpose: bool | None
    max_image_pixels: int | None
    max_images: int | None
    crop_to_patches: bool | None
    return_row_col_info: bool | None
    merge_size: int | None
    patch_size: int | None
    temporal_patch_size: int | None
    max_clip_pixels: int | None
    min_pixels: int | None
    max_pixels: int | None


class ZooImageProcessor(BaseImageProcessor):
    """
    Turns pictures into `pixel_values`, at one fixed size, as tiles, or in patches at native resolution.

    A fixed size gives `pixel_values` float[I, C, H, W]. `image_grid_pinpoints` or `max_tiles` give `pixel_values`
    float[I, P, C, H, W] (the whole picture, its tiles row by row and, if `do_pad`, zeros up to the picture with the
    most) and `image_sizes` int[I, 2], the (height, width) of each upright picture. Without `return_tensors` both are
    lists. `device` says where the result goes; the work is done on the CPU, so that pixels do not depend on it.

    `merge_size` gives `pixel_values` float[N, C * f * p * p], the patches of all pictures one after the other, and
    `image_grid_thw` int[I, 3], their number along time, height and width. Within a picture the rows are in the order
    (t, h / merge, w / merge, merge_h, merge_w), within a row the values in the order (c, f, p_h, p_w). Here, and only
    here, a picture may be a [`Clip`]: then f is `temporal_patch_size`, and stills in the same batch are repeated so
    often. In a batch of stills alone f is 1. Both are tensors, whatever `return_tensors` says.

    Raises [`ImageError`] with the index of the picture and the cause.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = ZooImageProcessorKwargs

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 224}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad = True
    image_grid_pinpoints = None
    do_pad_to_square = False
    max_tiles = None
    do_exif_transpose = True
    max_image_pixels = 178_956_970
    max_images = 10_000
    merge_size = None
    patch_size = None
    temporal_patch_size = 1
    max_clip_pixels = None

    def __init__(self, **kwargs: Unpack[ZooImageProcessorKwargs]):
        kwargs.pop("model_input_names", None)  # some saved files have it; here the tiles decide
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @property
    def backend(self) -> str:
        """The backend in whose place this class stands: it returns torch tensors too."""
        return "torchvision"

    @property
    def model_input_names(self) -> list[str]:
        """The keys that a call returns."""
        if self.merge_size is not None:
            return ["pixel_values", "image_grid_thw"]
        return ["pixel_values", "image_sizes"] if self.use_thumbnail else ["pixel_values"]

    @property
    def use_thumbnail(self) -> bool:
        """Whether the whole picture is a view beside its tiles."""
        return bool(self.image_grid_pinpoints or self.max_tiles)

    # Counting, from sizes alone; `images_kwargs` are options as a call would get them

    def processed_size(self, height: int, width: int, **images_kwargs) -> tuple[int, int]:
        """Returns the (height, width) at which the tower sees a picture of this size, or each of its tiles."""
        settings = self._settings(images_kwargs)
        if settings["merge_size"] is not None:
            return self._native_size((height, width), 1, settings)
        if settings["max_tiles"]:
            return self._tiling(settings)[0]
        if settings["image_grid_pinpoints"]:
            height, width = self._tiling(settings)[0]
        elif settings["do_pad_to_square"]:
            height = width = max(height, width)
        if settings["do_resize"]:
            height, width = resized_size((height, width), settings["size"])
        if settings["do_center_crop"]:
            height, width = settings["crop_size"].height, settings["crop_size"].width
        return height, width

    def tile_grid(self, height: int, width: int, **images_kwargs) -> tuple[int, int] | None:
        """Returns the (rows, columns) of tiles that a picture of this size is cut into; None at one fixed size."""
        settings = self._settings(images_kwargs)
        if settings["max_tiles"]:
            return covering_grid((height, width), self._tiling(settings)[1], settings["max_tiles"])
        if not settings["image_grid_pinpoints"]:
            return None
        best_height, best_width = select_best_resolution((height, width), settings["image_grid_pinpoints"])
        tile = self._tiling(settings)[1]
        return math.ceil(best_height / tile), math.ceil(best_width / tile)

    def num_tiles(self, height: int, width: int, **images_kwargs) -> int:
        """Returns how many views of a picture of this size the tower sees: the whole picture and its tiles."""
        grid = self.tile_grid(height, width, **images_kwargs) or (0, 0)
        if grid == (1, 1) and self._settings(images_kwargs)["max_tiles"]:
            return 1
        return 1 + math.prod(grid)

    def patch_grid(self, height: int, width: int, frames: int = 1, **images_kwargs) -> tuple[int, int, int]:
        """Returns the patches along (time, height, width) of a still, or of a clip of frames of this size."""
        settings = self._settings(images_kwargs)
        if settings["merge_size"] is None or frames < 1:
            raise ValueError(
                f"patch_grid of {frames} frames with merge_size={settings['merge_size']}, expected at least one frame"
                " and native resolution (merge_size=2, say)"
            )
        height, width = self._native_size((height, width), frames, settings)
        times = math.ceil(frames / settings["temporal_patch_size"])
        return times, height // settings["patch_size"], width // settings["patch_size"]

    def num_patches(self, height: int, width: int, frames: int = 1, **images_kwargs) -> int:
        """Returns how many rows of `pixel_values` a still, or a clip of frames of this size, becomes."""
        return math.prod(self.patch_grid(height, width, frames, **images_kwargs))

    def view_regions(self, height: int, width: int, **images_kwargs) -> list[ViewRegion]:
        """Returns what each view of a picture of this size shows of it."""
        settings, size = self._settings(images_kwargs), (height, width)
        picture = ViewRegion((0, 0, height, width), (0, 0, height, width))
        if settings["merge_size"] is not None:
            return [picture]
        if settings["max_tiles"]:
            view, tile = self._tiling(settings)
            grid = covering_grid(size, tile, settings["max_tiles"])
            if not settings["do_pad_to_square"]:
                return [picture, *(picture.tiles(grid, 1) if grid != (1, 1) else [])]
            crops = [ViewRegion(crop, crop) for crop in (tile_regions(size, grid) if grid != (1, 1) else [])]
            sizes = [(bottom - top, right - left) for (top, left, bottom, right), _ in (picture, *crops)]
            pairs = zip((picture, *crops), sizes, strict=True)
            return [region.canvas(letterbox_size(own, view), view) for region, own in pairs]
        if not settings["image_grid_pinpoints"]:
            if settings["do_pad_to_square"]:
                square = (max(size), max(size))
                picture, size = picture.canvas(size, square), square
            return [self._fitted_region(picture, size, settings)]
        view, tile = self._tiling(settings)
        best = select_best_resolution(size, settings["image_grid_pinpoints"])
        tiles = picture.canvas(fitted_size(size, best), best).tiles(best, tile)
        views = [(picture, view), *((region, (tile, tile)) for region in tiles)]
        return [self._fitted_region(region, own, settings) for region, own in views]

    @staticmethod
    def _fitted_region(region: ViewRegion, size: tuple[int, int], settings: dict[str, Any]) -> ViewRegion:
        """Returns what `_fit` leaves of a view of `size` pixels."""
        if settings["do_resize"]:
            size = resized_size(size, settings["size"])
        if settings["do_center_crop"]:
            height, width = settings["crop_size"].height, settings["crop_size"].width
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            region = region.window(size, (top, left, top + height, left + width))
        return region

    # Options

    def _settings(self, images_kwargs: dict[str, Any]) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self._valid_kwargs_names}
        settings |= {name: value for name, value in images_kwargs.items() if value is not None}
        return self._standardize_kwargs(**settings)

    def _standardize_kwargs(
        self,
        image_grid_pinpoints: list | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        crop_size = kwargs["crop_size"]
        if crop_size is not None and not (crop_size.height and crop_size.width):
            raise ValueError(f"crop_size={crop_size}, expected height and width")
        try:
            pinpoints = [[int(height), int(width)] for height, width in image_grid_pinpoints or []]
        except (TypeError, ValueError):
            pinpoints = [[0, 0]]
        if any(min(pinpoint) < 1 for pinpoint in pinpoints):
            raise ValueError(f"image_grid_pinpoints={image_grid_pinpoints!r}, expected a list of [height, width]")
        max_tiles = kwargs["max_tiles"]
        if max_tiles is not None and (pinpoints or max_tiles < 1):
            raise ValueError(
                f"max_tiles={max_tiles} with image_grid_pinpoints={pinpoints or None}, expected one of them, and "
                "max_tiles at least 1"
            )
        kwargs |= {"image_grid_pinpoints": pinpoints or None, "min_pixels": None, "max_pixels": None}
        return {**kwargs, **self._native_kwargs(kwargs, min_pixels, max_pixels)}

    @staticmethod
    def _native_kwargs(kwargs: dict[str, Any], min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """Returns what native resolution makes of the options, nothing where it is off."""
        merge_size, size = kwargs["merge_size"], kwargs["size"] or SizeDict()
        names = "patch_size", "temporal_patch_size", "max_clip_pixels"
        numbers = {name: kwargs[name] for name in names} | {"min_pixels": min_pixels, "max_pixels": max_pixels}
        if merge_size is None:
            default = {"temporal_patch_size": 1}
            alone = [f"{name}={value}" for name, value in numbers.items() if value not in (None, default.get(name))]
            if alone:
                raise ValueError(f"{', '.join(alone)} without merge_size, with which native resolution begins")
            return {}
        for name in ("image_grid_pinpoints", "max_tiles", "do_pad_to_square", "return_row_col_info"):
            if kwargs[name]:
                raise ValueError(
                    f"{name}={kwargs[name]} with merge_size={merge_size}, expected one of them: at native resolution"
                    " there are no tiles and no padding"
                )
        if min(merge_size, numbers["patch_size"] or 0, numbers["temporal_patch_size"] or 0) < 1:
            raise ValueError(
                f"patch_size={numbers['patch_size']} and temporal_patch_size={numbers['temporal_patch_size']} with"
                f" merge_size={merge_size}, expected all three, at least 1"
            )
        if numbers["max_clip_pixels"] is not None and numbers["max_clip_pixels"] < 1:
            raise ValueError(f"max_clip_pixels={numbers['max_clip_pixels']}, expected at least 1, or None")
        if size.height and size.width and min_pixels is None and max_pixels is None:  # one size for every picture
            factor = merge_size * numbers["patch_size"]
            if size.height % factor or size.width % factor:
                raise ValueError(
                    f"size={dict(size)} with patch_size={numbers['patch_size']} and merge_size={merge_size}, expected"
                    f" multiples of {factor}"
                )
            return {"size": SizeDict(height=size.height, width=size.width), "do_center_crop": False}
        is_area = size.longest_edge is not None  # {"shortest_edge": 224} is an edge
        least, most = (size.shortest_edge, size.longest_edge) if is_area else (size.min_pixels, size.max_pixels)
        least, most = least if min_pixels is None else min_pixels, most if max_pixels is None else max_pixels
        if not least or not most or not 1 <= least <= most:
            raise ValueError(
                f"size={dict(size)}, min_pixels={min_pixels} and max_pixels={max_pixels} with merge_size={merge_size}:"
                " native resolution needs the least and the most pixels of a picture, size with shortest_edge and"
                " longest_edge as areas, or one size for all, height and width"
            )
        return {"size": SizeDict(shortest_edge=least, longest_edge=most), "do_center_crop": False}

    @staticmethod
    def _native_size(image_size: tuple[int, int], frames: int, settings: dict[str, Any]) -> tuple[int, int]:
        """Returns the (height, width) to which a still, or each frame of a clip, is resized."""
        factor, size = settings["patch_size"] * settings["merge_size"], settings["size"]
        if not settings["do_resize"]:
            if image_size[0] % factor or image_size[1] % factor:
                raise ImageError(
                    f"has {image_size[0]} x {image_size[1]} pixels, but without do_resize both must be multiples of"
                    f" {factor} (patch_size x merge_size)"
                )
            return image_size
        if size.height:
            return size.height, size.width
        budget = settings["max_clip_pixels"]
        if frames > 1 and budget is not None:
            bounds = size.shortest_edge, budget, frames, settings["temporal_patch_size"]
            in_clip = smart_resize(image_size, factor, *bounds)
            if math.prod(in_clip) <= size.longest_edge:
                return in_clip
        return smart_resize(image_size, factor, size.shortest_edge, size.longest_edge)

    @staticmethod
    def _tiling(settings: dict[str, Any]) -> tuple[tuple[int, int], int]:
        """Returns the size to which the whole picture is squashed, and the edge of its tiles."""
        size = settings["size"]
        if settings["max_tiles"]:
            if size is None or not size.height or size.height != size.width:
                raise ValueError(f"size={size}, but max_tiles needs height and width, and both the same")
            return (size.height, size.width), size.height
        if size is None or not (size.shortest_edge or (size.height and size.width)):
            raise ValueError(f"size={size}, but AnyRes needs height and width, or shortest_edge")
        whole = size.height or size.shortest_edge, size.width or size.shortest_edge
        return whole, settings["crop_size"].height if settings["do_center_crop"] else whole[0]

    # Fetch

    def fetch_images(self, image_url_or_urls):
        """Opens paths, URLs and base64 strings and keeps the nesting; None in a list becomes an empty list."""
        indices = itertools.count()

        def fetch(item):
            if isinstance(item, list | tuple):
                return [[] if entry is None else fetch(entry) for entry in item]
            name = f"image {next(indices)}"
            if not isinstance(item, Clip):
                return self._fetch_picture(item, name)
            frames = enumerate(self._prepare_images_structure(item.frames))
            return replace(item, frames=[self._fetch_picture(frame, f"{name} frame {at}") for at, frame in frames])

        return fetch(image_url_or_urls)

    @staticmethod
    def _fetch_picture(item, name: str) -> PIL.Image.Image | np.ndarray | torch.Tensor:
        if isinstance(item, str | os.PathLike):
            try:
                return _open(item)
            except Exception as error:  # Pillow's plugins raise all sorts of errors
                raise ImageError(
                    f"{name} could not be opened, {str(item)[:80]!r} is no file, URL or base64 string of a"
                    f" picture ({type(error).__name__}: {str(error)[:200]})"
                ) from error
        if not isinstance(item, PIL.Image.Image | np.ndarray | torch.Tensor):
            raise ImageError(
                f"{name} is of type {type(item).__name__}, expected a PIL picture, an array, a tensor, a path, a URL"
                " or lists of them"
            )
        if not isinstance(item, PIL.Image.Image) and item.ndim == 2:
            return item[..., None] if isinstance(item, np.ndarray) else item[None]
        return item

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        if images is None:
            return []
        if isinstance(images, list | tuple):
            return [image for entry in images for image in self._prepare_images_structure(entry, expected_ndims)]
        is_batch = isinstance(images, np.ndarray | torch.Tensor) and images.ndim == expected_ndims + 1
        return list(images) if is_batch else [images]

    # Read

    def process_image(self, image: ImageInput, **images_kwargs) -> torch.Tensor:
        """Reads one picture: uint8[1, C, H, W]."""
        pixels, channels, _ = self._read(image, self._settings(images_kwargs))
        return pixels[:, :channels].clone()

    def _read(self, image: ImageInput, settings: dict[str, Any]) -> tuple[torch.Tensor, int, float]:
        """Returns uint8[1, C, H, W], how many of the channels count, and the 8-bit levels of one unit of the input."""
        is_pil = isinstance(image, PIL.Image.Image)
        if is_pil:
            self._check_size((image.height, image.width), settings, "has")
            try:
                image = _upright(image) if settings["do_exif_transpose"] else image
                image, channels = _decode(image, settings["do_convert_rgb"])
            except Exception as error:  # Pillow's decoders raise all sorts of errors
                raise ImageError(
                    f"could not be decoded, the file may be truncated or corrupt ({type(error).__name__}: {error})"
                ) from error
        channels_last = is_pil or self._is_channels_last(image, settings["input_data_format"])
        self._check_size(tuple(image.shape[:2] if channels_last else image.shape[1:]), settings, "has")
        image = _as_tensor(image) if isinstance(image, np.ndarray) else image.detach().cpu()
        image = image.permute(2, 0, 1) if channels_last else image
        pixels, levels = _to_uint8(image[None])
        channels = channels if is_pil else pixels.shape[1]
        mean = settings["image_mean"]
        expected = len(mean) if isinstance(mean, list | tuple) else None
        # An array with as many channels as the mean has entries is what the tower wants, be it four
        if settings["do_convert_rgb"] and channels != 3 and (is_pil or channels != expected):
            pixels, channels = _to_rgb(pixels), 3
        if settings["do_normalize"] and expected not in (None, channels):
            raise ImageError(f"has {channels} channels, image_mean has {expected}: is do_convert_rgb off?")
        return pixels, channels, levels

    @staticmethod
    def _is_channels_last(image: np.ndarray | torch.Tensor, input_data_format: str | None) -> bool:
        """Where either end could be channels, numpy is read as [H, W, C], torch as [C, H, W], as is their custom."""
        if image.ndim != 3:
            raise ImageError(f"has the shape {tuple(image.shape)}, expected [H, W], [H, W, C] or [C, H, W]")
        first, last = (image.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if input_data_format is not None:
            is_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
        else:
            is_last = isinstance(image, np.ndarray) if first and last else last
        if not (last if is_last else first):
            raise ImageError(
                f"has the shape {tuple(image.shape)}, expected 1, 3 or 4 channels at"
                f" {'one end' if input_data_format is None else input_data_format}"
            )
        return is_last

    @staticmethod
    def _check_size(size: tuple[int, int], settings: dict[str, Any], verb: str) -> None:
        bound = settings["max_image_pixels"]
        if min(size) < 1:
            raise ImageError(f"{verb} {size[0]} x {size[1]} pixels, expected at least 1 x 1")
        if bound is not None and math.prod(size) > bound:
            raise ImageError(f"{verb} {size[0]} x {size[1]} pixels, more than max_image_pixels={bound}")

    def _read_frames(self, image: ImageInput | Clip, settings: dict[str, Any]) -> list[tuple[torch.Tensor, float]]:
        """Reads a still or the frames of a clip; returns of each, resized, the channels that count and its levels."""
        pictures, frames, first = _pictures(image), [], None
        if len(pictures) == 0:
            raise ImageError("is a clip without frames")
        for at, picture in enumerate(pictures):
            try:
                pixels, channels, levels = self._read(picture, settings)
                shape = channels, *pixels.shape[2:]
                if first is None:
                    first, size = shape, self._native_size(shape[1:], len(pictures), settings)
                    self._check_size(size, settings, "would be resized to")
                elif shape != first:
                    raise ImageError(f"has the shape {shape} ([C, H, W]), expected that of the first frame, {first}")
            except ImageError as error:
                raise ImageError(f"frame {at} {error}" if isinstance(image, Clip) else str(error)) from error.__cause__
            frames.append((_resize(pixels, size, settings["resample"])[:, :channels], levels))
        return frames

    # View and fit

    def _view(self, pixels: torch.Tensor, settings: dict[str, Any]) -> list[torch.Tensor]:
        """Returns what the tower is to see of a picture, each uint8[1, C, h, w]."""
        image_size, pinpoints = tuple(pixels.shape[-2:]), settings["image_grid_pinpoints"]
        if settings["max_tiles"]:
            return self._cover(pixels, settings)
        if not pinpoints:
            if settings["do_pad_to_square"] and image_size[0] != image_size[1]:
                self._check_size((max(image_size),) * 2, settings, "would be padded to")
                pixels = _pad_to_square(pixels, settings["image_mean"])
            return [self._fit(pixels, settings)]
        whole, tile = self._tiling(settings)
        height, width = best = select_best_resolution(image_size, pinpoints)
        self._check_size(best, settings, "would be tiled at")
        fitted = fitted_size(image_size, best)
        canvas = _resize(pixels, fitted, settings["resample"])
        canvas = _paste(canvas, best, (height - fitted[0]) // 2, (width - fitted[1]) // 2)
        corners = itertools.product(range(0, height, tile), range(0, width, tile))
        tiles = [canvas[..., top : top + tile, left : left + tile] for top, left in corners]
        views = [self._fit(view, settings) for view in (_resize(pixels, whole, settings["resample"]), *tiles)]
        sizes = {tuple(view.shape[-2:]) for view in views}
        if len(sizes) > 1:
            raise ImageError(f"gives tiles of the sizes {sorted(sizes)}: {best} is no multiple of {tile}")
        return views

    def _cover(self, pixels: torch.Tensor, settings: dict[str, Any]) -> list[torch.Tensor]:
        """Returns the whole picture and its tiles; of a single tile, the whole picture alone."""
        image_size, (whole, tile) = tuple(pixels.shape[-2:]), self._tiling(settings)
        grid = covering_grid(image_size, tile, settings["max_tiles"])
        if settings["do_pad_to_square"]:
            regions = tile_regions(image_size, grid) if grid != (1, 1) else []
            crops = [pixels[..., top:bottom, left:right] for top, left, bottom, right in regions]
            return [_letterbox(view, whole, settings) for view in (pixels, *crops)]
        views = [_resize(pixels, whole, settings["resample"])]
        if grid != (1, 1):
            size = grid[0] * tile, grid[1] * tile
            self._check_size(size, settings, "would be tiled at")
            canvas = _resize(pixels, size, settings["resample"])
            corners = itertools.product(range(0, size[0], tile), range(0, size[1], tile))
            views += [canvas[..., top : top + tile, left : left + tile] for top, left in corners]
        return views

    def _fit(self, pixels: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
        if settings["do_resize"]:
            size = resized_size(tuple(pixels.shape[-2:]), settings["size"])
            self._check_size(size, settings, "would be resized to")
            pixels = _resize(pixels, size, settings["resample"])
        if settings["do_center_crop"]:
            height, width = size = settings["crop_size"].height, settings["crop_size"].width
            self._check_size(size, settings, "would be cropped to")
            pixels = _paste(pixels, size, -((pixels.shape[-2] - height) // 2), -((pixels.shape[-1] - width) // 2))
        return pixels

    # Normalise

    @staticmethod
    def _scale_and_shift(settings: dict[str, Any], levels: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns rescaling and normalising as one scale and one shift, float[C, 1, 1]."""
        scale = settings["rescale_factor"] if settings["do_rescale"] else 1 / levels
        mean, std = (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else (0.0, 1.0)
        mean, std = (torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (mean, std))
        return (scale / std).float(), (-mean / std).float()

    def _normalise(self, views: list[list[torch.Tensor]], levels: list[float], settings: dict[str, Any]):
        """Returns float[I, P, C, H, W], or a list of float[P, C, H, W] where pictures differ in shape."""
        most = max(map(len, views)) if settings["do_pad"] else None
        shapes = [(most or len(tiles), *tiles[0].shape[1:]) for tiles in views]
        if len(set(shapes)) == 1:
            pixel_values = torch.zeros(len(views), *shapes[0])
        elif settings["return_tensors"] is None:
            pixel_values = [torch.zeros(shape) for shape in shapes]
        else:
            raise ImageError(
                f"images end in the shapes {sorted(set(shapes))} ([tiles, C, H, W]) and cannot be one tensor: set a"
                " size with height and width, a centre crop or do_pad, or leave return_tensors out"
            )
        factors = {level: self._scale_and_shift(settings, level) for level in set(levels)}
        for rows, tiles, level in zip(pixel_values, views, levels, strict=True):
            scale, shift = factors[level]
            for row, tile in zip(rows, tiles, strict=False):
                row.copy_(tile[0])
            rows[: len(tiles)].mul_(scale).add_(shift)
        return pixel_values

    def preprocess(self, images: ImageInput, *args, **kwargs: Unpack[ZooImageProcessorKwargs]) -> BatchFeature:
        """Processes pictures; the options of [`ZooImageProcessorKwargs`] hold for this call."""
        return super().preprocess(images, *args, **{key: value for key, value in kwargs.items() if value is not None})

    def _preprocess_image_like_inputs(self, images: ImageInput, **settings) -> BatchFeature:
        images = self._prepare_images_structure(images)
        if not images:
            raise ImageError("no images were given: leave images out for text alone")
        count = sum(len(self._prepare_images_structure(_pictures(image))) for image in images)
        if settings["max_images"] is not None and count > settings["max_images"]:
            raise ImageError(f"{count} images were given, more than max_images={settings['max_images']}")
        images = self.fetch_images(images)
        data = self._fixed(images, settings) if settings["merge_size"] is None else self._native(images, settings)
        batch = BatchFeature(data, tensor_type=settings["return_tensors"])
        return batch if settings["device"] is None else batch.to(settings["device"])

    def _fixed(self, images: list, settings: dict[str, Any]) -> dict[str, Any]:
        """Returns what a call returns at one fixed size or as tiles."""
        views, levels, sizes = [], [], []
        for index, image in enumerate(images):
            try:
                if isinstance(image, Clip):
                    raise ImageError("is a clip, which only native resolution can take: merge_size is None")
                pixels, channels, levels_per_unit = self._read(image, settings)
                views.append([view[:, :channels] for view in self._view(pixels, settings)])
            except ImageError as error:
                raise ImageError(f"image {index} {error}") from error.__cause__
            levels.append(levels_per_unit)
            sizes.append(tuple(pixels.shape[-2:]))
        pixel_values = self._normalise(views, levels, settings)
        tiled = settings["image_grid_pinpoints"] or settings["max_tiles"]
        if settings["return_tensors"] is None:
            pixel_values = [rows if tiled else rows[0] for rows in pixel_values]
        data = {"pixel_values": pixel_values if tiled or isinstance(pixel_values, list) else pixel_values[:, 0]}
        if tiled:
            data["image_sizes"] = sizes
        if settings["crop_to_patches"]:
            data["num_patches"] = [len(tiles) for tiles in views]
        if settings["return_row_col_info"]:
            grids = [self.tile_grid(*size, **settings) or (1, 1) for size in sizes]
            data["image_rows"], data["image_cols"] = map(list, zip(*grids, strict=True))
        return data

    def _native(self, images: list, settings: dict[str, Any]) -> dict[str, Any]:
        """Returns what a call returns at native resolution."""
        patch_size, merge_size = settings["patch_size"], settings["merge_size"]
        taps = settings["temporal_patch_size"] if any(isinstance(image, Clip) for image in images) else 1
        clips = []  # a still is a clip of one frame
        for index, image in enumerate(images):
            try:
                frames = self._read_frames(image, settings)
            except ImageError as error:
                raise ImageError(f"image {index} {error}") from error.__cause__
            clips.append(frames + frames[-1:] * (-len(frames) % taps))
        channels = {frames[0][0].shape[1] for frames in clips}
        if len(channels) > 1:
            raise ImageError(
                f"images end with {sorted(channels)} channels and cannot be one tensor: set do_convert_rgb"
            )
        sizes = [frames[0][0].shape[2:] for frames in clips]
        grids = [
            [len(frames) // taps, height // patch_size, width // patch_size]
            for frames, (height, width) in zip(clips, sizes, strict=True)
        ]
        counts = [math.prod(grid) for grid in grids]
        pixel_values = torch.empty(sum(counts), *channels, taps, patch_size**2)
        for rows, grid, frames in zip(pixel_values.split(counts), grids, clips, strict=True):
            for at, moment in enumerate(rows.chunk(grid[0])):
                shown = frames[at * taps : (at + 1) * taps]
                moment.copy_(torch.stack([_patches(pixels, patch_size, merge_size) for pixels, _ in shown], dim=2))
                factors = [self._scale_and_shift(settings, levels) for _, levels in shown]
                scale, shift = (torch.cat(factor, dim=1) for factor in zip(*factors, strict=True))  # [C, f, 1]
                moment.mul_(scale).add_(shift)
        # Tensors, asked for or not: the patches of all images are one array
        data = {"pixel_values": pixel_values.flatten(1), "image_grid_thw": torch.tensor(grids)}
        if settings["crop_to_patches"]:
            data["num_patches"] = counts
        return data
