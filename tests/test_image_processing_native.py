"""Native resolution: Qwen-VL's patches of stills and clips, with counts that follow from sizes alone."""

import base64
import itertools
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_of_qwen3_vl

from vlm_zoo.models.geometry_vlm import smart_resize
from vlm_zoo.models.image_processing_vlm import ImageError, ZooImageProcessor
from vlm_zoo.models.video_vlm import Clip


AREAS = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 60}
NATIVE = {"merge_size": 2, "patch_size": 14, "temporal_patch_size": 2, "size": AREAS}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth at most places, with edges, as photographs are."""
    coarse = Image.fromarray(noise(height // 9 + 2, width // 9 + 2, seed=seed))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def clip_of(frames) -> Clip:
    return Clip(frames=frames, times=[at / 2 for at in range(len(frames))], fps=2.0)


def film(frames: int, height: int, width: int) -> list[np.ndarray]:
    return [photo(height, width, seed=at) for at in range(frames)]


def random_sizes(count: int, low: int, high: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]


def levels(processor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The difference in 8-bit levels, of rows (c, f, p_h, p_w)."""
    std = torch.tensor(processor.image_std).view(1, -1, 1)
    return (ours - theirs).unflatten(1, (3, -1)).abs() * std * 255


def rows_by_loops(frames: list[np.ndarray], patch: int, merge: int, taps: int) -> list[list[int]]:
    """The rows of a clip of processed frames [H, W, C], value by value, as the layout is defined."""
    while len(frames) % taps:
        frames = [*frames, frames[-1]]
    height, width, channels = frames[0].shape
    block, rows = patch * merge, []
    for time, top, left in itertools.product(
        range(0, len(frames), taps), range(0, height, block), range(0, width, block)
    ):
        for row, column in itertools.product(range(merge), range(merge)):
            y, x = top + row * patch, left + column * patch
            places = itertools.product(range(channels), range(taps), range(patch), range(patch))
            rows.append([int(frames[time + tap][y + down, x + right, c]) for c, tap, down, right in places])
    return rows


@pytest.fixture
def native() -> ZooImageProcessor:
    return ZooImageProcessor(**NATIVE)


@pytest.fixture
def bare() -> ZooImageProcessor:
    """Rows hold the 8-bit levels themselves, of pictures that have the right size already."""
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    return ZooImageProcessor(
        merge_size=2, patch_size=3, temporal_patch_size=2, size={"shortest_edge": 1, "longest_edge": 900}, **plain
    )


# The same pixels


@pytest.mark.parametrize("draw", [photo, noise])
@pytest.mark.parametrize("options", [{}, {"patch_size": 16, "merge_size": 1}, {"merge_size": 3, "resample": 2}])
def test_patches_equal_qwen2_vls_within_a_level(draw, options):
    ours, theirs = ZooImageProcessor(**NATIVE | options), Qwen2VLImageProcessorPil(**NATIVE | options)
    differences = []
    for size in random_sizes(12, 20, 300):
        image = Image.fromarray(draw(*size))
        a, b = ours(clip_of([image]), return_tensors="pt"), theirs(image, return_tensors="pt")
        assert a.keys() == b.keys()
        assert torch.equal(a.image_grid_thw, b.image_grid_thw)
        assert a.pixel_values.shape == b.pixel_values.shape
        assert a.pixel_values.dtype == b.pixel_values.dtype == torch.float32
        differences.append(levels(ours, a.pixel_values, b.pixel_values).flatten())
    difference = torch.cat(differences).round()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() < 1e-4
    assert difference.mean() < 0.05


def test_a_batch_of_stills_has_one_frame_of_what_qwen2_vl_repeats(native):
    images = [Image.fromarray(photo(*size)) for size in random_sizes(6, 20, 300)]
    theirs = Qwen2VLImageProcessorPil(**NATIVE)(images, return_tensors="pt")
    outputs = native(images, return_tensors="pt")
    assert torch.equal(outputs.image_grid_thw, theirs.image_grid_thw)
    assert outputs.pixel_values.shape == (len(theirs.pixel_values), 3 * 14 * 14)
    repeated = outputs.pixel_values.view(-1, 3, 1, 196).expand(-1, -1, 2, -1).flatten(1)
    assert levels(native, repeated, theirs.pixel_values).max() < 2.01


@pytest.mark.parametrize(("frames", "taps"), [(1, 1), (1, 2), (2, 2), (3, 2), (3, 1), (4, 3)])
def test_rows_of_a_clip_are_laid_out_as_defined(bare, frames, taps):
    pictures = [noise(12, 18, seed=at) for at in range(frames)]
    outputs = bare(clip_of(pictures), temporal_patch_size=taps, return_tensors="pt")
    assert outputs.pixel_values.tolist() == rows_by_loops(pictures, patch=3, merge=2, taps=taps)
    assert outputs.image_grid_thw.tolist() == [[-(-frames // taps), 4, 6]]


def test_rows_of_stills_are_laid_out_as_defined_one_picture_after_the_other(bare):
    pictures = [noise(12, 18), noise(6, 6), noise(18, 6)]
    expected = [row for picture in pictures for row in rows_by_loops([picture], patch=3, merge=2, taps=1)]
    outputs = bare(pictures, return_tensors="pt")
    assert outputs.pixel_values.tolist() == expected
    assert outputs.image_grid_thw.tolist() == [[1, 4, 6], [1, 2, 2], [1, 6, 2]]


def test_a_still_beside_a_clip_is_repeated(bare):
    still, frames = noise(6, 12), [noise(12, 6, seed=at) for at in range(3)]
    expected = rows_by_loops([still], 3, 2, taps=2) + rows_by_loops(frames, 3, 2, taps=2)
    outputs = bare([still, clip_of(frames)], return_tensors="pt")
    assert outputs.pixel_values.tolist() == expected
    assert outputs.image_grid_thw.tolist() == [[1, 2, 4], [2, 4, 2]]


def test_frames_are_resized_and_normalised_as_stills_are(native):
    frames = film(3, 90, 130)
    of_clip = native(clip_of(frames), temporal_patch_size=1, return_tensors="pt")
    of_stills = native(frames, return_tensors="pt")
    assert torch.equal(of_clip.pixel_values, of_stills.pixel_values)
    assert of_clip.image_grid_thw.tolist() == [[3, *of_stills.image_grid_thw[0, 1:].tolist()]]


def test_frames_keep_their_own_unit_when_they_are_not_rescaled(bare):
    """A black frame cannot tell whether its numbers are fractions of white; the frame beside it can."""
    frames = [np.zeros((6, 6, 3), np.float32), noise(6, 6).astype(np.float32)]
    rows = bare(clip_of(frames), return_tensors="pt").pixel_values
    assert rows.tolist() == rows_by_loops(frames, patch=3, merge=2, taps=2)


def test_no_picture_depends_on_its_neighbours(native):
    images = [noise(*size) for size in [(30, 200), (90, 90), (64, 48)]]
    together = native(images)
    parts = together.pixel_values.split(together.image_grid_thw.prod(-1).tolist())
    for rows, image in zip(parts, images, strict=True):
        assert torch.equal(rows, native(image, return_tensors="pt").pixel_values)


def test_arrays_hold_the_same_as_tensors_which_come_unasked(native):
    images = [noise(40, 50), clip_of(film(3, 60, 40))]
    tensors, arrays, unasked = (native(images, return_tensors=kind) for kind in ("pt", "np", None))
    assert isinstance(arrays.pixel_values, np.ndarray)
    assert (tensors.pixel_values.numpy() == arrays.pixel_values).all()
    assert torch.equal(unasked.pixel_values, tensors.pixel_values)
    assert torch.equal(unasked.image_grid_thw, tensors.image_grid_thw)
    assert arrays.image_grid_thw.tolist() == tensors.image_grid_thw.tolist()
    assert tensors.image_grid_thw.dtype == torch.int64
    assert len(tensors.pixel_values) == tensors.image_grid_thw.prod(-1).sum()


def test_the_callers_picture_is_not_touched(bare):
    array = noise(6, 6)
    array.setflags(write=False)
    image = Image.fromarray(array)
    for source in (image, array, torch.from_numpy(array.copy())):
        bare(source, return_tensors="pt").pixel_values.zero_()
        assert (np.array(source) == array).all()


@pytest.mark.parametrize("options", [{"image_mean": 0.5, "image_std": 0.5}, {"do_normalize": False}])
def test_grey_pictures_can_stay_grey(native, options):
    image = Image.fromarray(noise(56, 56)[..., 0])
    grey = native(image, do_convert_rgb=False, return_tensors="pt", **options)
    assert grey.pixel_values.shape == (16, 14 * 14)
    colour = native(image, return_tensors="pt", **options).pixel_values
    assert torch.equal(colour, grey.pixel_values.repeat(1, 3))


def test_exif_orientation_is_applied_before_the_size_is_chosen(native):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = BytesIO()
    Image.fromarray(photo(60, 170)).save(buffer, "JPEG", exif=exif)
    image = Image.open(buffer)
    upright = ImageOps.exif_transpose(image)
    expected = native(np.array(upright), return_tensors="pt")
    for source in (image, clip_of([image])):
        outputs = native(source, temporal_patch_size=1, return_tensors="pt")
        assert torch.equal(outputs.pixel_values, expected.pixel_values)
        assert outputs.image_grid_thw.tolist() == [list(native.patch_grid(170, 60))]
    assert native.patch_grid(170, 60) != native.patch_grid(60, 170)


def test_frames_come_in_any_form(native, tmp_path):
    frames = film(3, 60, 80)
    paths = [tmp_path / f"{at}.png" for at in range(3)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    text = base64.b64encode(paths[2].read_bytes()).decode()
    expected = native(clip_of(frames), return_tensors="pt").pixel_values
    for given in (
        np.stack(frames),
        torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2),
        tuple(map(Image.fromarray, frames)),
        [str(paths[0]), paths[1], text],
    ):
        assert torch.equal(native(clip_of(given), return_tensors="pt").pixel_values, expected)


def test_clips_stand_anywhere_in_nested_lists(native):
    still, clip = noise(60, 80), clip_of(film(2, 40, 50))
    expected = native([still, clip, still], return_tensors="pt")
    nested = native([[still], None, [], [[clip], still]], return_tensors="pt")
    assert torch.equal(nested.pixel_values, expected.pixel_values)
    assert torch.equal(nested.image_grid_thw, expected.image_grid_thw)


# Counts from sizes alone


def test_token_counts_equal_qwen2_vls_on_random_sizes():
    for options in (
        NATIVE,
        NATIVE | {"patch_size": 16},
        {**NATIVE, "size": {"shortest_edge": 1, "longest_edge": 5000}},
    ):
        ours, theirs = ZooImageProcessor(**options), Qwen2VLImageProcessorPil(**options)
        for height, width in [*random_sizes(300, 10, 1500), (42, 14), (70, 98), (14, 14), (1, 200)]:
            assert ours.num_patches(height, width) == theirs.get_number_of_image_patches(height, width)


def test_counts_from_sizes_equal_what_a_call_gives(native):
    rng = random.Random(0)
    for height, width in random_sizes(25, 10, 260, seed=2):
        frames = rng.randint(1, 5)
        options = {"temporal_patch_size": rng.randint(1, 3), "max_clip_pixels": rng.choice([None, 20_000])}
        still = native(noise(height, width), return_tensors="pt", **options)
        clip = native(clip_of([noise(height, width)] * frames), return_tensors="pt", **options)
        for outputs, count in ((still, 1), (clip, frames)):
            grid = native.patch_grid(height, width, count, **options)
            assert outputs.image_grid_thw.tolist() == [list(grid)]
            assert len(outputs.pixel_values) == native.num_patches(height, width, count, **options) == np.prod(grid)
        rows, columns = native.patch_grid(height, width, **options)[1:]
        assert native.processed_size(height, width, **options) == (rows * 14, columns * 14)


def test_processing_is_idempotent_in_size(native):
    for size in random_sizes(300, 10, 1500, seed=4):
        processed = native.processed_size(*size)
        assert native.processed_size(*processed) == processed


def test_areas_stay_within_their_bounds():
    for height, width in random_sizes(1000, 20, 3000, seed=5):
        new_height, new_width = smart_resize((height, width), 28, 10_000, 200_000)
        assert new_height % 28 == new_width % 28 == 0
        assert 10_000 <= new_height * new_width <= 200_000


def test_halves_round_to_even():
    assert smart_resize((42, 70), 28, 1, 10**6) == (56, 56)
    assert smart_resize((98, 126), 28, 1, 10**6) == (112, 112)


def test_clips_with_a_budget_are_sized_as_qwen3_vls():
    rng = random.Random(0)
    areas, budget = {"shortest_edge": 4096, "longest_edge": 10**9}, 300_000
    processor = ZooImageProcessor(**NATIVE | {"patch_size": 16, "size": areas}, max_clip_pixels=budget)
    for height, width in random_sizes(300, 20, 900, seed=3):
        frames = rng.randint(2, 40)
        expected = smart_resize_of_qwen3_vl(frames, height, width, 2, 32, areas["shortest_edge"], budget)
        times, rows, columns = processor.patch_grid(height, width, frames)
        assert (times, rows * 16, columns * 16) == ((frames + 1) // 2, *expected)


def test_clips_without_a_budget_are_sized_as_stills(native):
    for height, width in random_sizes(50, 20, 900):
        assert native.patch_grid(height, width, 7)[1:] == native.patch_grid(height, width)[1:]


def test_a_budget_gives_no_frame_more_than_a_still(native):
    assert native.patch_grid(600, 900, 2, max_clip_pixels=10**9) == native.patch_grid(600, 900)
    times, rows, columns = native.patch_grid(600, 900, 20, max_clip_pixels=100_000)
    assert times == 10
    assert 20 * rows * columns * 14 * 14 <= 100_000 < 20 * np.prod(native.processed_size(600, 900))


def test_a_clip_of_one_frame_is_sized_as_a_still(native):
    outputs = native(clip_of([noise(600, 900)]), max_clip_pixels=5000, return_tensors="pt")
    assert outputs.image_grid_thw.tolist() == [list(native.patch_grid(600, 900))]


def test_trainers_can_ask_how_many_rows_each_picture_has(native):
    images = [[noise(40, 50)], None, [noise(300, 50), clip_of(film(3, 60, 60))]]
    outputs = native(images, return_tensors="pt", crop_to_patches=True)
    assert outputs.num_patches.tolist() == outputs.image_grid_thw.prod(-1).tolist()
    with pytest.raises(ValueError, match="return_row_col_info=True with merge_size=2"):
        native(images, return_row_col_info=True)


# Options, saving, loading


@pytest.mark.parametrize(
    "areas",
    [
        {"min_pixels": 3136, "max_pixels": 50_000},
        {"size": {"min_pixels": 3136, "max_pixels": 50_000}},
        {"size": {"shortest_edge": 3136, "longest_edge": 50_000}},
        {"size": {"shortest_edge": 1, "longest_edge": 50_000}, "min_pixels": 3136},
    ],
)
def test_areas_can_be_named_as_saved_files_name_them(areas):
    processor = ZooImageProcessor(**{**NATIVE, "size": None} | areas)
    assert processor.size == {"shortest_edge": 3136, "longest_edge": 50_000}
    assert not {"min_pixels", "max_pixels"} & processor.to_dict().keys()


def test_a_saved_qwen2_vl_processor_opens(tmp_path):
    theirs = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=50_000)
    theirs.save_pretrained(tmp_path)
    ours = ZooImageProcessor.from_pretrained(tmp_path)
    image = photo(120, 170)
    outputs, expected = (processor(image, return_tensors="pt") for processor in (ours, theirs))
    assert torch.equal(outputs.image_grid_thw, expected.image_grid_thw)
    assert levels(ours, outputs.pixel_values, expected.pixel_values.view(-1, 3, 2, 196)[:, :, 0].flatten(1)).max() < 2


def test_saving_and_loading_keeps_every_option(tmp_path, native):
    processor = ZooImageProcessor(**native.to_dict(), max_clip_pixels=10**5)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ZooImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.max_clip_pixels == 10**5
    assert not loaded.do_center_crop
    frames = film(4, 200, 300)
    outputs, expected = (one(clip_of(frames), return_tensors="pt") for one in (loaded, processor))
    assert torch.equal(outputs.pixel_values, expected.pixel_values)


def test_a_saved_folder_carries_its_code(tmp_path, native):
    native.save_pretrained(tmp_path)
    assert {"image_processing_vlm.py", "geometry_vlm.py", "video_vlm.py"} <= {path.name for path in tmp_path.iterdir()}


def test_the_keys_of_a_call_are_the_model_input_names(native):
    assert list(native(noise(40, 50), return_tensors="pt")) == native.model_input_names
    assert native.model_input_names == ["pixel_values", "image_grid_thw"]
    assert ZooImageProcessor().model_input_names == ["pixel_values"]


def test_options_of_a_call_replace_the_configured_ones(native):
    image = noise(200, 300)
    for options in ({"max_pixels": 20_000}, {"size": {"shortest_edge": 1, "longest_edge": 9000}}, {"patch_size": 16}):
        outputs = native(image, return_tensors="pt", **options)
        assert outputs.image_grid_thw.tolist() == [list(native.patch_grid(200, 300, **options))]
        assert native.patch_grid(200, 300, **options) != native.patch_grid(200, 300)


def test_a_call_can_turn_native_resolution_on():
    image = noise(100, 130)
    outputs = ZooImageProcessor()(image, return_tensors="pt", **NATIVE)
    assert torch.equal(outputs.pixel_values, ZooImageProcessor(**NATIVE)(image, return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"patch_size": None}, "patch_size=None .* merge_size=2"),
        ({"patch_size": 0}, "patch_size=0 .* merge_size=2"),
        ({"merge_size": 0}, "merge_size=0"),
        ({"temporal_patch_size": 0}, "temporal_patch_size=0"),
        ({"max_clip_pixels": 0}, "max_clip_pixels=0"),
        ({"size": None}, r"size=\{\}.* merge_size=2"),
        ({"size": 224}, r"'shortest_edge': 224.* merge_size=2"),
        ({"size": 224, "max_pixels": 9000}, r"'shortest_edge': 224.* max_pixels=9000 with merge_size=2"),
        ({"size": {"height": 56, "width": 50}}, "'height': 56.* multiples of 28"),
        ({"size": {"height": 56, "width": 56}, "max_pixels": 9000}, "'height': 56.* merge_size=2"),
        ({"size": {"shortest_edge": 9000, "longest_edge": 4000}}, "'longest_edge': 4000"),
        ({"max_tiles": 4}, "max_tiles=4 with merge_size=2"),
        ({"image_grid_pinpoints": [[28, 28]]}, r"image_grid_pinpoints=\[\[28, 28\]\] with merge_size=2"),
        ({"do_pad_to_square": True}, "do_pad_to_square=True with merge_size=2"),
        ({"merge_size": None}, "patch_size=14, temporal_patch_size=2 without merge_size"),
        ({"merge_size": None, "patch_size": None, "max_pixels": 9}, "max_pixels=9 without merge_size"),
    ],
)
def test_options_that_exclude_each_other_are_named(options, cause):
    with pytest.raises(ValueError, match=cause):
        ZooImageProcessor(**NATIVE | options)


def test_patch_counts_without_native_resolution_are_an_error(native):
    with pytest.raises(ValueError, match="merge_size=None"):
        ZooImageProcessor().patch_grid(100, 100)
    with pytest.raises(ValueError, match="0 frames"):
        native.patch_grid(100, 100, frames=0)


# Bad input


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (noise(10, 2001), "image 1 has 10 x 2001 pixels, expected an aspect ratio of at most 200"),
        (noise(40, 50)[:0], "image 1 has 0 x 50 pixels"),
        (17, "image 1 is of type int"),
        ("no/such/file.png", "image 1 could not be opened"),
        (clip_of([]), "image 1 is a clip without frames"),
        (Clip(None, [], 2.0), "image 1 is a clip without frames"),
        (clip_of([noise(40, 50), 17]), "image 1 frame 1 is of type int"),
        (clip_of([clip_of([noise(40, 50)])]), "image 1 frame 0 is of type Clip"),
        (clip_of([noise(40, 50), "no/such/file.png"]), "image 1 frame 1 could not be opened"),
        (clip_of([noise(40, 50), noise(40, 50), noise(41, 50)]), r"image 1 frame 2 .*\(3, 41, 50\).*\(3, 40, 50\)"),
        (clip_of([noise(40, 50), noise(40, 50) * 3.0]), r"image 1 frame 1 has pixels in \[0"),
        (clip_of([noise(2001, 10)]), "image 1 frame 0 has 2001 x 10 pixels, expected an aspect ratio"),
    ],
)
def test_bad_pictures_are_named_with_index_frame_and_cause(native, image, cause):
    with pytest.raises(ImageError, match=cause):
        native([noise(40, 50), image], return_tensors="pt")


@pytest.mark.parametrize("size", [(10, 2001), (2001, 10), (0, 10)])
def test_counts_of_impossible_sizes_are_image_errors(native, size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels"):
        native.num_patches(*size)


def test_a_clip_without_native_resolution_is_an_error():
    with pytest.raises(ImageError, match=r"image 0 is a clip.*merge_size is None"):
        ZooImageProcessor()(clip_of([noise(40, 50)]))


def test_a_size_that_is_no_multiple_is_an_error_where_nothing_is_resized(bare):
    with pytest.raises(ImageError, match=r"image 0 has 12 x 15 pixels.*multiples of 6"):
        bare(noise(12, 15))


def test_pixels_are_bounded_as_they_come_and_after_resizing(native):
    with pytest.raises(ImageError, match="image 0 has 100 x 200 pixels, more than max_image_pixels=10000"):
        native(noise(100, 200), max_image_pixels=10_000)
    with pytest.raises(ImageError, match=r"image 0 frame 0 would be resized to .* max_image_pixels=1000"):
        native(clip_of([noise(20, 20)]), max_image_pixels=1000)


def test_frames_count_as_images(native):
    batch = [noise(40, 50), clip_of(film(3, 40, 50))]
    assert len(native(batch, max_images=4).image_grid_thw) == 2
    with pytest.raises(ImageError, match="4 images were given, more than max_images=3"):
        native(batch, max_images=3)


def test_pictures_with_different_channels_are_an_error(native):
    images = [Image.new("L", (40, 50)), Image.new("RGB", (40, 50))]
    with pytest.raises(ImageError, match=r"\[1, 3\] channels.*do_convert_rgb"):
        native(images, do_convert_rgb=False, do_normalize=False)


# One size for all


def test_one_size_for_all_gives_every_picture_the_same_grid(native):
    images = [Image.fromarray(photo(*size)) for size in ((30, 90), (200, 41))]
    outputs = native(images, size={"height": 56, "width": 84}, return_tensors="pt")
    assert outputs.image_grid_thw.tolist() == [[1, 4, 6]] * 2
    assert native.patch_grid(30, 90, size={"height": 56, "width": 84}) == (1, 4, 6)


def test_one_size_for_all_holds_the_pixels_of_a_fixed_tower(native):
    image = Image.fromarray(photo(70, 50))
    size = {"height": 56, "width": 56}
    patches = native(image, size=size, merge_size=1, return_tensors="pt").pixel_values
    picture = ZooImageProcessor(size=size, do_center_crop=False)(image, return_tensors="pt").pixel_values[0]
    rebuilt = patches.view(4, 4, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 56, 56)
    assert torch.equal(rebuilt, picture)


def test_one_size_that_is_no_multiple_of_a_token_is_refused(native):
    with pytest.raises(ValueError, match="multiples of 28"):
        native(Image.fromarray(photo(70, 50)), size={"height": 56, "width": 50}, return_tensors="pt")
