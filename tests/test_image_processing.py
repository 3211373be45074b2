"""Pixels: the same as transformers' PIL backends, from any input, with counts that follow from sizes alone."""

import base64
import json
import random
import warnings
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers import AutoImageProcessor, CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from vlm_zoo.models.geometry_vlm import fitted_size, unpadded_grid
from vlm_zoo.models.image_processing_vlm import (
    ImageError,
    ZooImageProcessor,
    ZooImageProcessorKwargs,
    select_best_resolution,
)


CLIP = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
SIGLIP = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
PAIRS = {
    "clip": (ZooImageProcessor(**CLIP), CLIPImageProcessorPil(**CLIP)),
    "clip, bilinear": (ZooImageProcessor(resample=2, **CLIP), CLIPImageProcessorPil(resample=2, **CLIP)),
    "clip, crop wider than the picture": (
        ZooImageProcessor(size={"shortest_edge": 40}, crop_size=53),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=53),
    ),
    "siglip": (ZooImageProcessor(do_center_crop=False, **SIGLIP), SiglipImageProcessorPil(**SIGLIP)),
    "llava, padded": (ZooImageProcessor(do_pad_to_square=True, **CLIP), LlavaImageProcessorPil(do_pad=True, **CLIP)),
    "llava-next": (
        ZooImageProcessor(image_grid_pinpoints=PINPOINTS, **CLIP),
        LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **CLIP),
    ),
    "llava-next, tiles that do not divide": (
        ZooImageProcessor(size={"shortest_edge": 40}, crop_size=36, image_grid_pinpoints=PINPOINTS),
        LlavaNextImageProcessorPil(size={"shortest_edge": 40}, crop_size=36, image_grid_pinpoints=PINPOINTS),
    ),
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth at most places, with edges, as photographs are."""
    coarse = Image.fromarray(noise(height // 9 + 2, width // 9 + 2, seed=seed))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def levels(processor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The difference in 8-bit levels."""
    return (ours - theirs).abs() * torch.tensor(processor.image_std).view(-1, 1, 1) * 255


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def random_sizes(count: int, low: int, high: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]


@pytest.fixture
def fixed() -> ZooImageProcessor:
    return ZooImageProcessor(**CLIP)


@pytest.fixture
def anyres() -> ZooImageProcessor:
    return ZooImageProcessor(image_grid_pinpoints=PINPOINTS, **CLIP)


# The same pixels


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("draw", [photo, noise])
def test_pixels_equal_the_pil_backend_within_a_level(name, draw):
    ours, theirs = PAIRS[name]
    differences = []
    for size in random_sizes(40, 20, 300):
        image = Image.fromarray(draw(*size))
        a, b = ours(image, return_tensors="pt"), theirs(image, return_tensors="pt")
        assert a.keys() == b.keys()
        assert a.pixel_values.shape == b.pixel_values.shape
        differences.append(levels(ours, a.pixel_values, b.pixel_values).flatten())
    difference = torch.cat(differences).round()
    print(
        f"{name}, {draw.__name__}: at most {difference.max():.0f} levels, mean {difference.mean():.5f}, "
        f"{(difference > 0).float().mean():.3%} differ, {(difference > 1).float().mean():.5%} by two"
    )
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-4
    assert difference.mean() < 0.05


@pytest.mark.parametrize("resample", [0, 1, 4, 5], ids=["nearest", "lanczos", "box", "hamming"])
def test_filters_that_torch_lacks_equal_pillow_exactly(resample):
    options = {**SIGLIP, "resample": resample}
    ours, theirs = ZooImageProcessor(do_center_crop=False, **options), SiglipImageProcessorPil(**options)
    for size in random_sizes(10, 20, 150):
        image = Image.fromarray(noise(*size))
        a, b = ours(image, return_tensors="pt"), theirs(image, return_tensors="pt")
        torch.testing.assert_close(a.pixel_values, b.pixel_values)


def test_a_tall_picture_squashed_to_a_square_equals_the_pil_backend():
    """Pillow resizes along columns first here, and with noise the order of the passes shows."""
    ours, theirs = PAIRS["siglip"]
    image = Image.fromarray(noise(300, 50))
    a, b = ours(image, return_tensors="pt"), theirs(image, return_tensors="pt")
    assert levels(ours, a.pixel_values, b.pixel_values).max() < 2.01


@pytest.mark.parametrize("size", [{"shortest_edge": 40, "longest_edge": 60}, {"max_height": 40, "max_width": 60}])
def test_bounded_sizes_equal_the_pil_backend(size):
    ours, theirs = (
        cls(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        for cls in (ZooImageProcessor, CLIPImageProcessorPil)
    )
    for height, width in random_sizes(20, 20, 200):
        image = Image.fromarray(photo(height, width))
        a, b = ours(image, return_tensors="pt"), theirs(image, return_tensors="pt")
        assert a.pixel_values.shape[-2:] == b.pixel_values.shape[-2:] == ours.processed_size(height, width)
        assert levels(ours, a.pixel_values, b.pixel_values).max() < 2.01


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_has_the_pixels_of_the_pil_backend(mode):
    image = Image.fromarray(photo(70, 90)).convert(mode)
    ours, theirs = PAIRS["clip"]
    a, b = ours(image, return_tensors="pt"), theirs(image, return_tensors="pt")
    assert levels(ours, a.pixel_values, b.pixel_values).max() < 1.01


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_becomes_white_as_in_the_pil_backend(kind):
    rgba = Image.fromarray(np.dstack([photo(70, 90), noise(70, 90, 1)[..., 0]]), "RGBA")
    if kind == "P":
        palette = rgba.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
        image = Image.open(BytesIO(encoded(palette, transparency=3)))
    elif kind == "RGB":
        image = Image.open(BytesIO(encoded(rgba.convert("RGB"), transparency=rgba.getpixel((4, 4))[:3])))
    else:
        image = rgba.convert(kind)
    ours, theirs = PAIRS["clip"]
    a, b = ours(image, return_tensors="pt"), theirs(image, return_tensors="pt")
    assert levels(ours, a.pixel_values, b.pixel_values).max() < 1.01


def test_an_rgba_array_equals_the_pil_backend():
    ours, theirs = PAIRS["clip"]
    array = np.dstack([photo(70, 90), noise(70, 90, 1)])
    expected = theirs(array, return_tensors="pt").pixel_values
    for image in (array, torch.from_numpy(array).permute(2, 0, 1)):
        assert levels(ours, ours(image, return_tensors="pt").pixel_values, expected).max() < 1.01


# Any input


FORMS = {
    "pil": Image.fromarray,
    "numpy chw": lambda array: array.transpose(2, 0, 1),
    "numpy with negative strides": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
    "torch hwc": torch.from_numpy,
    "torch view": lambda array: torch.from_numpy(array).permute(2, 0, 1),
    "torch chw": lambda array: torch.from_numpy(array).permute(2, 0, 1).contiguous(),
    "float32 in [0, 1]": lambda array: (array / 255).astype(np.float32),
    "float64 in [0, 1]": lambda array: array / 255,
    "torch float64 in [0, 1]": lambda array: torch.from_numpy(array / 255),
    "float32 in [0, 255]": lambda array: array.astype(np.float32),
    "int64": lambda array: array.astype(np.int64),
    "16 bits": lambda array: array.astype(np.uint16) * 257,
    "16 bits, big-endian": lambda array: (array.astype(np.uint16) * 257).astype(">u2"),
    "torch 16 bits": lambda array: torch.from_numpy(array.astype(np.uint16) * 257),
}
GREY_FORMS = {
    "hw": lambda array: array,
    "hw1": lambda array: array[..., None],
    "torch hw": torch.from_numpy,
    "torch 1hw": lambda array: torch.from_numpy(array)[None],
    "mode I": lambda array: Image.fromarray(array).convert("I"),
    "mode F": lambda array: Image.fromarray(array).convert("F"),
    "mode I;16": lambda array: Image.fromarray(array.astype(np.uint16) * 257),
    "mode I with 16 bits": lambda array: Image.fromarray(array.astype(np.int32) * 257),
    "16-bit file": lambda array: Image.open(BytesIO(encoded(Image.fromarray(array.astype(np.uint16) * 257)))),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_in_any_form_has_the_same_pixels(fixed, form):
    array = noise(61, 83)
    expected = fixed(array, return_tensors="pt").pixel_values
    assert torch.equal(fixed(FORMS[form](array), return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("form", GREY_FORMS)
def test_one_grey_picture_in_any_form_has_the_same_pixels(fixed, form):
    array = noise(61, 83, 1)[..., 0]
    expected = fixed(Image.fromarray(array), return_tensors="pt").pixel_values
    assert torch.equal(fixed(GREY_FORMS[form](array), return_tensors="pt").pixel_values, expected)


def test_black_and_white_arrays_reach_from_0_to_255(fixed):
    mask = noise(48, 48, 1)[..., 0] > 127
    expected = fixed(mask.astype(np.uint8) * 255, return_tensors="pt").pixel_values
    assert torch.equal(fixed(mask, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("size", [(40, 50), (300, 200), (2100, 2100)])
def test_pictures_in_pillows_own_memory_equal_their_arrays(fixed, size):
    """Up to 16 MB Pillow lends its memory, above that it is copied."""
    array = noise(*size)
    expected = fixed(array, return_tensors="pt").pixel_values
    assert torch.equal(fixed(Image.fromarray(array), return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"do_resize": False, "do_normalize": False}])
def test_the_callers_picture_is_not_touched(options):
    processor = ZooImageProcessor(crop_size=20, size=20, **options)
    array = noise(20, 20)
    array.setflags(write=False)
    image, tensor = Image.fromarray(array), torch.from_numpy(array.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (image, tensor, array):
            processor(source, return_tensors="pt").pixel_values.zero_()
            processor.process_image(source).zero_()
    assert (np.array(image) == array).all()
    assert (tensor.numpy() == array).all()


def test_paths_and_base64_strings_equal_the_opened_picture(fixed, tmp_path):
    image = Image.fromarray(np.dstack([photo(50, 60), noise(50, 60, 1)]), "RGBA")
    data = encoded(image)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    expected = fixed(image, return_tensors="pt").pixel_values
    for source in (path, str(path), text, f"data:image/png;base64,{text}"):
        assert torch.equal(fixed(source, return_tensors="pt").pixel_values, expected)


def test_nested_lists_and_batches_are_flattened_in_order(fixed):
    arrays = [noise(40, 50, seed=seed) for seed in range(5)]
    expected = fixed(arrays, return_tensors="pt").pixel_values
    nested = [
        [arrays[0]],
        [],
        None,
        [Image.fromarray(arrays[1]), np.stack(arrays[2:4])],
        [torch.from_numpy(arrays[4])],
    ]
    assert torch.equal(fixed(nested, return_tensors="pt").pixel_values, expected)
    assert torch.equal(fixed(np.stack(arrays), return_tensors="pt").pixel_values, expected)


def test_ambiguous_layouts_follow_the_custom_of_the_library(fixed):
    array = noise(3, 3)
    expected = fixed(Image.fromarray(array), return_tensors="pt").pixel_values
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    for image, layout in [
        (array, None),
        (array, "channels_last"),
        (first, "channels_first"),
        (torch.from_numpy(first), None),
        (torch.from_numpy(first), "channels_first"),
        (torch.from_numpy(array), "channels_last"),
    ]:
        outputs = fixed(image, return_tensors="pt", input_data_format=layout)
        assert torch.equal(outputs.pixel_values, expected)


def test_four_channels_stay_four_for_a_tower_that_names_four(fixed):
    options = {"image_mean": [0.0] * 4, "image_std": [1.0] * 4, "input_data_format": "channels_last"}
    outputs = fixed([noise(40, 50, 4), noise(60, 50, 4)], return_tensors="pt", **options)
    assert outputs.pixel_values.shape == (2, 4, 48, 48)


@pytest.mark.parametrize("image", [Image.fromarray(noise(40, 50)[..., 0]), noise(40, 50, 1), torch.zeros(40, 50)])
def test_grey_pictures_can_stay_grey(fixed, image):
    outputs = fixed(image, do_convert_rgb=False, do_normalize=False, do_pad_to_square=True, return_tensors="pt")
    assert outputs.pixel_values.shape == (1, 1, 48, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path, anyres):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(photo(60, 110)), "JPEG", exif=exif))
    upright = ImageOps.exif_transpose(Image.open(path))
    expected = anyres(np.array(upright), return_tensors="pt")
    for source in (path, Image.open(path)):
        outputs = anyres(source, return_tensors="pt")
        assert torch.equal(outputs.pixel_values, expected.pixel_values)
        assert outputs.image_sizes.tolist() == [[upright.height, upright.width]]
    as_stored = anyres(path, do_exif_transpose=False, return_tensors="pt")
    assert as_stored.image_sizes.tolist() == [[60, 110]]


def test_a_broken_exif_block_does_not_refuse_the_picture(fixed):
    image = Image.fromarray(photo(60, 60))
    expected = fixed(image, return_tensors="pt").pixel_values
    image.info["exif"] = b"Exif\x00\x00no TIFF header"
    assert torch.equal(fixed(image, return_tensors="pt").pixel_values, expected)


# What comes out


def test_no_picture_depends_on_its_neighbours(anyres, fixed):
    images = [Image.fromarray(noise(*size)) for size in [(30, 200), (90, 90), (30, 200), (200, 31), (64, 48)]]
    together, alone = (fixed(images, return_tensors="pt"), [fixed(image, return_tensors="pt") for image in images])
    assert torch.equal(together.pixel_values, torch.cat([one.pixel_values for one in alone]))
    together, alone = (anyres(images, return_tensors="pt"), [anyres(image, return_tensors="pt") for image in images])
    for tiles, size, one in zip(together.pixel_values, together.image_sizes, alone, strict=True):
        count = one.pixel_values.shape[1]
        assert torch.equal(tiles[:count], one.pixel_values[0])
        assert not tiles[count:].any()
        assert torch.equal(size, one.image_sizes[0])


def test_anyres_gives_the_tiles_and_sizes_of_llava_next(anyres):
    theirs = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **CLIP)
    images = [Image.fromarray(photo(*size)) for size in random_sizes(12, 10, 250, seed=1)]
    a, b = anyres(images, return_tensors="pt"), theirs(images, return_tensors="pt")
    assert torch.equal(a.image_sizes, b.image_sizes)
    assert a.image_sizes.dtype == b.image_sizes.dtype
    assert a.pixel_values.shape == b.pixel_values.shape
    assert levels(anyres, a.pixel_values, b.pixel_values).max() < 2.01


def test_the_keys_of_a_call_are_the_model_input_names(anyres, fixed):
    for processor in (anyres, fixed):
        assert list(processor(noise(40, 50), return_tensors="pt")) == processor.model_input_names
    fixed.image_grid_pinpoints = PINPOINTS
    assert (
        list(fixed(noise(40, 50), return_tensors="pt")) == fixed.model_input_names == ["pixel_values", "image_sizes"]
    )


def test_tensors_arrays_and_lists_hold_the_same(anyres, fixed):
    images = [noise(40, 50), noise(200, 50)]
    for processor in (anyres, fixed):
        tensors, arrays, lists = (processor(images, return_tensors=kind) for kind in ("pt", "np", None))
        assert isinstance(arrays.pixel_values, np.ndarray)
        assert isinstance(lists.pixel_values, list)
        assert (tensors.pixel_values.numpy() == arrays.pixel_values).all()
        assert torch.equal(torch.stack(lists.pixel_values), tensors.pixel_values)
        assert tensors.pixel_values.dtype == torch.float32


def test_tiles_stay_a_ragged_list_without_padding(anyres):
    images = [noise(40, 50), noise(300, 50)]
    outputs = anyres(images, do_pad=False)
    assert [tuple(tiles.shape) for tiles in outputs.pixel_values] == [(3, 3, 48, 48), (4, 3, 48, 48)]
    with pytest.raises(ImageError, match="do_pad"):
        anyres(images, do_pad=False, return_tensors="pt")


def test_pictures_of_different_sizes_are_a_list_or_an_error():
    processor = ZooImageProcessor(size={"shortest_edge": 30}, do_center_crop=False)
    images = [noise(40, 50), noise(50, 40)]
    assert [tuple(image.shape) for image in processor(images).pixel_values] == [(3, 30, 37), (3, 37, 30)]
    with pytest.raises(ImageError, match=r"37.*centre crop"):
        processor(images, return_tensors="pt")


def test_floats_keep_their_unit_when_they_are_not_rescaled(fixed):
    array = noise(48, 48)
    plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    unit, whole = fixed(array / 255, **plain).pixel_values, fixed(array, **plain).pixel_values
    assert whole.max() == 255
    torch.testing.assert_close(unit * 255, whole)


def test_rescaling_and_normalising_follow_their_options(fixed):
    array = noise(48, 48)
    expected = torch.from_numpy(array).permute(2, 0, 1).double()
    for do_rescale in (True, False):
        for do_normalize in (True, False):
            outputs = fixed(array, do_rescale=do_rescale, do_normalize=do_normalize, return_tensors="pt")
            want = expected / 255 if do_rescale else expected
            if do_normalize:
                mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (fixed.image_mean, fixed.image_std))
                want = (want - mean) / std
            torch.testing.assert_close(outputs.pixel_values[0].double(), want, rtol=1e-5, atol=1e-5)


def test_a_scalar_mean_counts_for_all_channels(fixed):
    array = noise(40, 60, 1)[..., 0]
    outputs = fixed(array, image_mean=0.5, image_std=0.5, do_pad_to_square=True, return_tensors="pt")
    expected = fixed(array, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pad_to_square=True, return_tensors="pt")
    assert torch.equal(outputs.pixel_values, expected.pixel_values)


def test_trainers_can_ask_for_tiles_and_grids(anyres, fixed):
    """What TRL's GRPO and RLOO ask of processors whose `pixel_values` have a row for each tile."""
    images = [[noise(40, 50)], None, [noise(300, 50), noise(30, 30)]]
    outputs = anyres(images=images, return_tensors="pt", crop_to_patches=True, return_row_col_info=True)
    assert outputs.num_patches.tolist() == [3, 4, 3]
    assert (1 + outputs.image_rows * outputs.image_cols).tolist() == [3, 4, 3]
    assert anyres.use_thumbnail
    outputs = fixed(images=images, return_tensors="pt", crop_to_patches=True, return_row_col_info=True)
    assert outputs.num_patches.tolist() == (outputs.image_rows * outputs.image_cols).tolist() == [1, 1, 1]
    assert not fixed.use_thumbnail


# Counts from sizes alone


@pytest.mark.parametrize("name", PAIRS)
def test_counts_from_sizes_equal_what_a_call_gives(name):
    processor = PAIRS[name][0]
    for height, width in random_sizes(25, 1, 260, seed=2):
        pixel_values = processor(noise(height, width), return_tensors="pt").pixel_values[0]
        tiles = pixel_values if pixel_values.ndim == 4 else pixel_values[None]
        assert len(tiles) == processor.num_tiles(height, width)
        assert tuple(tiles.shape[-2:]) == processor.processed_size(height, width)
        rows, columns = processor.tile_grid(height, width) or (0, 0)
        assert len(tiles) == 1 + rows * columns


def test_counts_follow_the_options_of_a_call(fixed):
    options = {"image_grid_pinpoints": [[48, 48], [96, 96]], "size": {"shortest_edge": 48}}
    shape = fixed(noise(100, 100), return_tensors="pt", **options).pixel_values.shape
    assert fixed.num_tiles(100, 100, **options) == shape[1] == 5
    assert fixed.num_tiles(100, 100) == 1
    assert fixed.tile_grid(100, 100) is None
    assert fixed.processed_size(100, 100, crop_size=30) == (30, 30)


def test_the_geometry_equals_transformers():
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    for height, width in [*random_sizes(3000, 1, 2500, seed=3), (1, 5000), (5000, 1), (1, 1), (396, 704)]:
        best = select_best_resolution((height, width), pinpoints)
        assert best[0] * best[1] // 336**2 + 1 == image_size_to_num_patches([height, width], pinpoints, 336)
        shape = SimpleNamespace(shape=(3, height, width))
        assert fitted_size((height, width), best) == get_patch_output_size(shape, best, "channels_first")
        grid = best[0] // 14, best[1] // 14
        rows, columns = unpadded_grid((height, width), grid)
        assert unpad_image(torch.empty(1, *grid), [height, width]).shape[1:] == (rows, columns)
        tokens = LlavaNextProcessor._get_unpadded_features(None, height, width, 24, 24, best[0] // 336, best[1] // 336)
        assert tokens == (rows * columns, rows)


# Options, saving, loading


def test_the_defaults_are_clips():
    image = Image.fromarray(photo(300, 400))
    ours, theirs = ZooImageProcessor(), CLIPImageProcessorPil()
    a, b = ours(image, return_tensors="pt").pixel_values, theirs(image, return_tensors="pt").pixel_values
    assert a.shape == (1, 3, 224, 224)
    assert levels(ours, a, b).max() < 1.01


@pytest.mark.parametrize("backend", [None, "pil", "torchvision"])
def test_saving_and_loading_keeps_every_option(backend, tmp_path, anyres):
    anyres = ZooImageProcessor(**{**anyres.to_dict(), "do_exif_transpose": False, "max_image_pixels": 10**6})
    anyres.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is ZooImageProcessor
    assert loaded.to_dict() == anyres.to_dict()
    assert loaded.model_input_names == anyres.model_input_names == ["pixel_values", "image_sizes"]
    assert loaded.to_dict() == ZooImageProcessor.from_pretrained(tmp_path).to_dict()


def test_a_saved_folder_carries_its_code(tmp_path, fixed):
    fixed.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_vlm.ZooImageProcessor"}
    assert (tmp_path / "image_processing_vlm.py").exists()


def test_an_explicit_none_survives_saving(tmp_path):
    processor = ZooImageProcessor(do_resize=None, max_image_pixels=None)
    assert processor.to_dict()["do_resize"] is None
    processor.save_pretrained(tmp_path)
    loaded = ZooImageProcessor.from_pretrained(tmp_path)
    assert loaded.do_resize is None
    assert loaded.max_image_pixels is None


def test_none_in_a_call_means_as_configured(anyres):
    image = noise(40, 50)
    expected = anyres(image, return_tensors="pt").pixel_values
    options = dict.fromkeys(["do_resize", "do_rescale", "do_normalize", "image_grid_pinpoints", "size"])
    assert torch.equal(anyres(image, return_tensors="pt", **options).pixel_values, expected)


def test_an_empty_list_of_pinpoints_turns_anyres_off(anyres, fixed):
    image = noise(40, 50)
    outputs = anyres(image, return_tensors="pt", image_grid_pinpoints=[])
    assert torch.equal(outputs.pixel_values, fixed(image, return_tensors="pt").pixel_values)


def test_options_override_when_loading(fixed):
    loaded = ZooImageProcessor.from_dict(fixed.to_dict(), size=42, crop_size=84)
    assert loaded.size == {"shortest_edge": 42}
    assert loaded.crop_size == {"height": 84, "width": 84}


def test_instances_share_no_defaults():
    first, second = ZooImageProcessor(), ZooImageProcessor()
    first.size["shortest_edge"] = 7
    first.crop_size["height"] = 7
    assert second.size == {"shortest_edge": 224} == ZooImageProcessor.size
    assert second.crop_size["height"] == 224


def test_every_option_is_documented():
    assert ZooImageProcessor.valid_kwargs is ZooImageProcessorKwargs
    own = set(ZooImageProcessorKwargs.__annotations__) - set(CLIPImageProcessorPil.valid_kwargs.__annotations__)
    assert all(f"    {name} (`" in ZooImageProcessorKwargs.__doc__ for name in own)


@pytest.mark.parametrize("pinpoints", [[1, 2], [[0, 48]], "48x48", [[48, 48, 48]], [["a", "b"]]])
def test_malformed_pinpoints_are_named(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        ZooImageProcessor(image_grid_pinpoints=pinpoints)


# Bad input


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (noise(40, 50)[:0], "0 x 50"),
        (torch.zeros(3, 40, 0), "40 x 0"),
        (noise(40, 50, 2), "1, 3 or 4 channels"),
        (noise(40, 50, 5), "1, 3 or 4 channels"),
        (np.zeros((2, 2, 2, 40, 50)), "shape"),
        (np.zeros(7), "shape"),
        (np.full((40, 50, 3), np.nan), "not a number"),
        (np.full((40, 50, 3), np.inf), "inf"),
        (noise(40, 50) / 127.5 - 1, "normalised already"),
        (noise(40, 50) * 3.0, "expected \\[0, 1\\] or \\[0, 255\\]"),
        (noise(40, 50).astype(np.int64) - 20, "-20"),
        (noise(40, 50).astype(np.int64) * 1000, "16 bits"),
        (noise(40, 50).astype(complex), "complex"),
        (torch.zeros(3, 40, 50, dtype=torch.complex64), "complex"),
        (noise(40, 50).astype(object), "object"),
        (np.full((4, 4), "a"), "type <U1"),
        (np.zeros((1, 4_000_000, 3), np.uint8), "would be resized to 48 x 192000000"),
        (17, "type int"),
        ({"image": 1}, "type dict"),
        ("no/such/file.png", "no/such/file.png"),
        ("%" * 5000, "could not be opened"),
        (base64.b64encode(b"no picture at all").decode(), "could not be opened"),
    ],
)
def test_bad_pictures_are_named_with_index_and_cause(fixed, image, cause):
    with pytest.raises(ImageError, match=f"image 1 .*{cause}") as caught:
        fixed([noise(40, 50), image], return_tensors="pt")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_errors_with_their_index(fixed, tmp_path, format):
    warnings.simplefilter("ignore")  # Pillow warns of some of the damage before it fails
    data = encoded(Image.fromarray(noise(60, 60)), format)
    for end in (0, 10, len(data) // 3, len(data) // 2):
        path = tmp_path / f"{end}.{format}"
        path.write_bytes(data[:end])
        with pytest.raises(ImageError, match="image 2 "):
            fixed([noise(40, 50), [noise(40, 50), path]], return_tensors="pt")


def test_random_damage_gives_pixels_or_an_image_error(fixed):
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    for format in ("PNG", "JPEG", "GIF", "BMP"):
        data = encoded(Image.fromarray(photo(40, 40)), format)
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                outputs = fixed(base64.b64encode(damaged).decode(), return_tensors="pt")
            except ImageError:
                continue
            assert outputs.pixel_values.isfinite().all()


def test_a_picture_beyond_the_bound_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("L", (3000, 2000)).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="image 0 has 2000 x 3000 pixels, more than max_image_pixels=1000000"):
        ZooImageProcessor(max_image_pixels=10**6)(path, return_tensors="pt")


def test_a_decompression_bomb_is_an_image_error(fixed):
    header = encoded(Image.new("1", (1, 1)), "PPM").replace(b"P4\n1 1", b"P4\n90000 90000")
    with pytest.raises(ImageError, match="DecompressionBombError"):
        fixed(base64.b64encode(header).decode())


def test_pixels_are_bounded_after_resizing_padding_and_tiling_too():
    image = noise(10, 400)
    options = {"max_image_pixels": 20_000, "size": 48, "crop_size": 48}
    with pytest.raises(ImageError, match="would be resized to 48 x 1920"):
        ZooImageProcessor(**options)(image)
    with pytest.raises(ImageError, match="would be padded to 400 x 400"):
        ZooImageProcessor(do_pad_to_square=True, **options)(image)
    with pytest.raises(ImageError, match="would be tiled at 480 x 480"):
        ZooImageProcessor(image_grid_pinpoints=[[480, 480]], **options)(image)


def test_a_side_that_would_vanish_is_an_error():
    processor = ZooImageProcessor(size={"max_height": 20, "max_width": 20}, do_center_crop=False)
    with pytest.raises(ImageError, match="would be resized to 0 x 20"):
        processor(noise(1, 100), return_tensors="pt")


def test_extreme_aspect_ratios_become_tiles(anyres):
    for size in [(1, 3000), (3000, 1), (1, 1)]:
        outputs = anyres(noise(*size), return_tensors="pt")
        assert outputs.pixel_values.shape[1] == anyres.num_tiles(*size)


@pytest.mark.parametrize("images", [[], [[], []], [None], None, ()])
def test_a_call_without_images_says_so(fixed, images):
    with pytest.raises(ImageError, match="no images"):
        fixed(images, return_tensors="pt")


def test_too_many_images_are_refused(fixed):
    with pytest.raises(ImageError, match="3 images were given, more than max_images=2"):
        fixed([[noise(40, 50)] * 2, np.zeros((40, 50, 3), np.uint8)], max_images=2)


def test_a_channel_mismatch_names_both_sides(fixed):
    with pytest.raises(ImageError, match="image 0 has 1 channels, image_mean has 3: is do_convert_rgb off"):
        fixed(Image.new("L", (40, 50)), do_convert_rgb=False)


dtypes = st.sampled_from(["u1", "u2", ">u2", "i4", "i8", "f2", "f4", "f8", "?", "c8", "O", "U1", "M8[s]"])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 17, 50]), max_size=5)
values = st.sampled_from([0, 1, 0.5, 200, 255, 256, 70000, -1, float("nan"), float("inf")])


@st.composite
def arrays(draw):
    dtype, shape, value = draw(dtypes), draw(shapes), draw(values)
    with np.errstate(all="ignore"):
        try:
            array = np.full(shape, value).astype(dtype)
        except (TypeError, ValueError, OverflowError):
            array = np.zeros(shape, dtype)
    if draw(st.booleans()) and array.dtype.kind in "buif" and array.dtype.isnative:
        return torch.from_numpy(array)
    return array


pictures = st.builds(
    Image.new,
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"]),
    st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
junk = st.one_of(
    arrays(), pictures, st.none(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=9)
)
options = st.fixed_dictionaries(
    {},
    optional={
        "do_resize": st.booleans(),
        "do_convert_rgb": st.booleans(),
        "do_normalize": st.booleans(),
        "do_pad_to_square": st.booleans(),
        "do_center_crop": st.booleans(),
        "image_grid_pinpoints": st.sampled_from([[], PINPOINTS, [[0, 1]], [[5, 5]]]),
        "input_data_format": st.sampled_from(["channels_first", "channels_last"]),
        "max_image_pixels": st.sampled_from([1, 10_000]),
        "resample": st.integers(0, 5),
        "return_tensors": st.sampled_from(["pt", "np"]),
        "size": st.sampled_from([{"height": 1, "width": 1}, {"shortest_edge": 9}, {"max_height": 9, "max_width": 4}]),
    },
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.recursive(junk, lambda inner: st.lists(inner, max_size=3), max_leaves=5), options)
def test_malformed_input_gives_pixels_or_a_value_error(images, call):
    processor = ZooImageProcessor(**CLIP)
    try:
        outputs = processor(images, **call)
    except ValueError as error:
        assert str(error)
        return
    assert all(torch.as_tensor(image).isfinite().all() for image in outputs.pixel_values)
