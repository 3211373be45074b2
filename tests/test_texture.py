"""The texture array and what it says of each cell, from pixels in every layout."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.native_vlm import PatchGeometry, in_squares, places_in
from vlm_zoo.models.texture_vlm import (
    ENTROPY_CHANNELS,
    TEXTURE_CHANNELS,
    cell_entropies,
    cell_statistics,
    pictures_of_patches,
    texture,
    texture_of_patches,
    unnormalize,
)
from vlm_zoo.models.video_vlm import Clip


LAB_OF_PURE_COLOURS = {
    (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
    (0.0, 1.0, 0.0): (87.73, -86.18, 83.18),
    (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
}
PATCH = 4
SIZES = {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}


def channel(array: torch.Tensor, name: str) -> torch.Tensor:
    return array[:, TEXTURE_CHANNELS.index(name)]


def flat(*colour: float, height: int = 12, width: int = 10) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, height, width).clone()


def direct_entropies(values: torch.Tensor) -> torch.Tensor:
    """The soft histogram as it is defined, without levels: `[G, h, w]` to `[G]`."""
    centres = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    distances = values.double().flatten(1)[..., None] - centres
    histogram = torch.softmax(-distances.square() / (2 * (1 / 64) ** 2), dim=2).mean(dim=1)
    return -(histogram * histogram.clamp_min(1e-300).log()).sum(dim=1) / math.log(16)


def processor_of(merge_size: int, taps: int) -> ZooImageProcessor:
    return ZooImageProcessor(merge_size=merge_size, patch_size=PATCH, temporal_patch_size=taps, size=SIZES)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(count: int, height: int, width: int, seed: int) -> Clip:
    frames = [noise(height, width, seed + at) for at in range(count)]
    return Clip(frames=frames, times=[at / 2 for at in range(count)], fps=2.0)


def batch_of(images: list, merge_size: int, taps: int) -> tuple[torch.Tensor, torch.Tensor, PatchGeometry]:
    batch = processor_of(merge_size, taps)(images, return_tensors="pt")
    return batch["pixel_values"], batch["image_grid_thw"], PatchGeometry(3, taps, PATCH)


def normalisation() -> dict[str, list[float]]:
    return {"mean": list(ZooImageProcessor.image_mean), "std": list(ZooImageProcessor.image_std)}


# The array


def test_texture_has_the_thirteen_channels_of_every_image():
    array = texture(torch.rand(2, 3, 9, 14))
    assert array.shape == (2, len(TEXTURE_CHANNELS), 9, 14)
    assert len(set(TEXTURE_CHANNELS)) == 13


def test_texture_is_in_zero_to_one():
    saturated = torch.randint(0, 2, (4, 3, 16, 16)).float()
    array = texture(torch.cat((saturated, torch.rand(4, 3, 16, 16))))
    assert array.min() >= 0
    assert array.max() <= 1 + 1e-6


def test_first_channels_are_the_colours_themselves():
    images = torch.rand(2, 3, 5, 6)
    assert torch.equal(texture(images)[:, :3], images)


def test_coordinates_are_those_of_the_centres_of_pixels():
    array = texture(torch.rand(1, 3, 2, 4))
    assert channel(array, "y")[0].tolist() == [[0.25] * 4, [0.75] * 4]
    assert channel(array, "x")[0].tolist() == [[0.125, 0.375, 0.625, 0.875]] * 2


def test_eccentricity_is_the_distance_from_the_middle_as_a_share_of_that_of_a_corner():
    array = texture(torch.rand(1, 3, 6, 10))
    y, x = channel(array, "y"), channel(array, "x")
    expected = ((2 * y - 1) ** 2 + (2 * x - 1) ** 2).sqrt() / 2**0.5
    torch.testing.assert_close(channel(array, "eccentricity"), expected)


def test_eccentricity_is_zero_at_another_fixation_and_one_at_most():
    eccentricity = channel(texture(torch.rand(1, 3, 10, 10), fixation=(0.25, 0.85)), "eccentricity")[0]
    assert eccentricity[2, 8] < 1e-6
    assert eccentricity.argmax() == 9 * 10  # the corner farthest from there
    assert 0.85 < eccentricity.max() <= 1


@pytest.mark.parametrize(("along", "across"), [("sobel_x", "sobel_y"), ("sobel_y", "sobel_x")])
def test_sobel_reaches_its_bound_at_an_edge_of_black_and_white(along, across):
    images = torch.zeros(1, 3, 8, 8)
    images[..., 4:] = 1
    array = texture(images if along == "sobel_x" else images.mT)
    slope = channel(array, along)[0] if along == "sobel_x" else channel(array, along)[0].mT
    assert torch.allclose(slope[:, 3:5], torch.ones(8, 2))  # 0.5 above the middle
    assert torch.allclose(slope[:, [0, 1, 2, 5, 6, 7]], torch.full((8, 6), 0.5))
    assert torch.allclose(channel(array, across), torch.full((1, 8, 8), 0.5))
    assert channel(array, "sobel_magnitude").max().item() == pytest.approx(0.5**0.5)


def test_sobel_is_negative_where_it_gets_darker():
    images = torch.ones(1, 3, 6, 6)
    images[..., 3:] = 0
    assert channel(texture(images), "sobel_x").min() == 0


def test_sobel_agrees_with_a_convolution():
    images = torch.rand(2, 3, 7, 9)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    luma = F.pad(
        (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True), [1] * 4, "replicate"
    )
    slopes = F.conv2d(luma, torch.stack((kernel, kernel.mT))[:, None])
    array = texture(images)
    torch.testing.assert_close(array[:, 6:8] - 0.5, slopes, atol=1e-6, rtol=0)
    torch.testing.assert_close(array[:, 8], slopes.square().sum(1).mul(2).sqrt(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(12, 15), (5, 2), (1, 1), (1, 9)])
def test_contrast_is_twice_the_deviation_within_the_window(size):
    images = torch.rand(2, 3, *size)
    luma = (images.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    mean, square = (F.avg_pool2d(part, 7, 1, 3, count_include_pad=False) for part in (luma, luma.square()))
    expected = 2 * (square - mean.square()).clamp_min(0).sqrt()
    found = channel(texture(images), "contrast")
    torch.testing.assert_close(found, expected[:, 0].float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("grey", [0.0, 0.1, 1 / 3, 0.77, 1.0])
def test_constant_pictures_have_no_contrast_up_to_their_edges(grey):
    assert channel(texture(flat(grey, grey, grey, height=20, width=20)), "contrast").max() < 1e-5


@pytest.mark.parametrize(("colour", "expected"), LAB_OF_PURE_COLOURS.items())
def test_lab_of_pure_colours_is_that_of_the_literature(colour, expected):
    lightness, a, b = texture(flat(*colour))[0, 3:6, 0, 0].tolist()
    assert (lightness * 100, a * 255 - 128, b * 255 - 128) == pytest.approx(expected, abs=0.01)


def test_lab_of_dark_greys_follows_the_line_below_the_joint():
    greys = torch.linspace(0, 0.1, 50)
    found = channel(texture(greys.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)), "lightness").flatten()
    linear = torch.where(greys <= 0.04045, greys / 12.92, ((greys + 0.055) / 1.055) ** 2.4)
    root = torch.where(linear > 0.008856, linear ** (1 / 3), 7.787 * linear + 4 / 29)
    torch.testing.assert_close(found, (116 * root - 16) / 100, atol=1e-5, rtol=0)


@pytest.mark.parametrize("colour", [(0.0,) * 3, (1.0,) * 3, (0.5,) * 3, (1.0, 0.0, 0.0)])
def test_gradients_are_finite_on_constant_pictures(colour):
    images = flat(*colour).requires_grad_()
    texture(images).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


def test_gradients_are_those_of_finite_differences():
    images = torch.rand(1, 3, 8, 9)
    weights, direction = torch.randn(1, 13, 8, 9), torch.randn(1, 3, 8, 9)
    leaf = images.clone().requires_grad_()
    (texture(leaf) * weights).sum().backward()
    step = 1e-3
    ends = [(texture(images + sign * step * direction) * weights).double().sum() for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert (leaf.grad * direction).sum().item() == pytest.approx(expected.item(), rel=0.02, abs=0.05)


def test_an_image_has_the_same_texture_whatever_else_is_in_the_batch():
    images = torch.rand(5, 3, 33, 47)
    images[0] *= 0.1
    assert all(torch.equal(texture(images)[at], texture(images[at : at + 1])[0]) for at in range(5))


def test_grey_pictures_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=r"\[images, 3, height, width\], got \[2, 1, 8, 8\]"):
        texture(torch.rand(2, 1, 8, 8))


# Cells


def test_statistics_are_area_means_with_the_signed_channels_as_distances():
    pictures = torch.rand(2, 3, 12, 20)
    array = texture(pictures)
    array[:, 6:8] = (array[:, 6:8] - 0.5).abs()
    means, entropies = cell_statistics(pictures, 4)
    assert means.shape == (2, 15, 13)
    assert entropies.shape == (2, 15, 4)
    torch.testing.assert_close(means, F.avg_pool2d(array, 4).flatten(2).mT, atol=1e-6, rtol=0)


def test_statistics_hold_the_entropies_of_lab_and_of_the_slope():
    pictures = torch.rand(1, 3, 16, 24) * torch.linspace(0.1, 1, 24)
    array = texture(pictures)
    _, entropies = cell_statistics(pictures, 8)
    for at, name in enumerate(ENTROPY_CHANNELS):
        values = channel(array, name)[0]
        cells = [values[top : top + 8, left : left + 8] for top in (0, 8) for left in (0, 8, 16)]
        expected = direct_entropies(torch.stack(cells))
        torch.testing.assert_close(entropies[0, :, at], expected.float(), atol=0.01, rtol=0)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.05, 0.001])
def test_entropies_agree_with_those_of_exact_values_within_a_hundredth(spread):
    values = torch.rand(200, 1, 1) + spread * (torch.rand(200, 8, 8) - 0.5)
    found = cell_entropies(values.clamp(0, 1)[:, None], 8)[:, 0, 0]
    torch.testing.assert_close(found, direct_entropies(values.clamp(0, 1)).float(), atol=0.01, rtol=0)


def test_entropy_of_a_constant_cell_is_that_of_one_bin_edge_at_most():
    values = torch.linspace(0, 1, 3001).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    entropies = cell_entropies(values, 4)
    assert entropies.min() < 0.01
    assert 0.24 < entropies.max() <= 0.26


def test_entropy_of_noise_is_high_and_at_most_one():
    entropies = cell_entropies(torch.rand(8, 4, 64, 64), 16)
    assert entropies.min() > 0.9
    assert entropies.max() <= 1


def test_entropy_does_not_depend_on_the_order_of_pixels_within_a_cell():
    values = torch.rand(1, 1, 8, 8) ** 3
    mixed = values.flatten()[torch.randperm(64)].view(1, 1, 8, 8)
    torch.testing.assert_close(cell_entropies(values, 8), cell_entropies(mixed, 8))
    assert not torch.allclose(cell_entropies(values, 4), cell_entropies(mixed, 4))


def test_entropy_increases_with_the_number_of_grey_levels():
    counts = (1, 2, 4, 8, 16)
    pictures = [((torch.arange(64) % count + 0.5) / count).view(1, 1, 8, 8) for count in counts]
    centred = [(picture * 16).floor().add(0.5) / 16 for picture in pictures]
    entropies = [cell_entropies(picture, 8).item() for picture in centred]
    assert all(second > first + 0.1 for first, second in itertools.pairwise(entropies))


def test_lightness_has_more_entropy_with_more_grey_levels():
    greys = [(torch.arange(256) % count / max(count - 1, 1)).view(1, 1, 16, 16) for count in (1, 3, 9)]
    entropies = [cell_statistics(grey.expand(-1, 3, -1, -1), 16)[1][0, 0, 0].item() for grey in greys]
    assert entropies[0] < entropies[1] - 0.1 < entropies[2] - 0.2


def test_values_that_are_no_numbers_point_nowhere():
    values = torch.full((1, 1, 2, 2), math.nan)
    values[..., 0, 0] = math.inf
    assert cell_entropies(values, 2).isfinite().all()


def test_means_carry_a_gradient_and_entropies_none():
    pictures = torch.rand(1, 3, 8, 8, requires_grad=True)
    means, entropies = cell_statistics(pictures, 4)
    means.sum().backward()
    assert pictures.grad.isfinite().all()
    assert not entropies.requires_grad


def test_a_picture_has_the_same_statistics_whatever_else_is_in_the_batch():
    pictures = torch.rand(6, 3, 24, 40)
    together = torch.cat(cell_statistics(pictures, 8), dim=2)
    apart = [torch.cat(cell_statistics(picture[None], 8), dim=2)[0] for picture in pictures]
    assert torch.equal(together, torch.stack(apart))


def test_a_cell_can_be_a_single_pixel():
    pictures = torch.rand(2, 3, 3, 2)
    means, entropies = cell_statistics(pictures, 1)
    torch.testing.assert_close(means[..., :3], pictures.flatten(2).mT)
    assert entropies.max() <= 0.26


def test_a_picture_can_be_a_single_pixel():
    means, entropies = cell_statistics(torch.rand(1, 3, 1, 1), 1)
    assert means.isfinite().all()
    assert entropies.shape == (1, 1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_float32_whatever_comes_in(dtype):
    pictures = torch.randint(0, 2, (1, 3, 8, 8)).to(dtype)
    expected = cell_statistics(pictures.float(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cell_statistics(pictures, 4)
    assert all(torch.equal(first, second) for first, second in zip(found, expected, strict=True))
    assert found[0].dtype == found[1].dtype == torch.float32


def test_cells_that_do_not_fill_the_picture_are_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"8 x 10 pixels cannot be cut into cells of 4 x 4"):
        cell_statistics(torch.rand(1, 3, 8, 10), 4)


# Layouts


@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("merge_size", [1, 2])
def test_stills_of_mixed_sizes_come_back_as_they_went_in(merge_size, taps):
    sizes = [(16, 24), (32, 16), (16, 24), (8, 8), (24, 16)]
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    patches, grids, geometry = batch_of(images, merge_size, taps)
    groups = pictures_of_patches(patches, grids, geometry, merge_size)
    assert [group.size for group in groups] == [(4, 6), (8, 4), (2, 2), (6, 4)]
    assert [group.frames for group in groups] == [[0, 2], [1], [3], [4]]
    for group in groups:
        levels = (unnormalize(group.pictures, **normalisation()) * 255).round().to(torch.uint8)
        for frame, picture in zip(group.frames, levels, strict=True):
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), images[frame])


@pytest.mark.parametrize("merge_size", [1, 2])
def test_clips_come_back_as_the_first_frame_of_every_patch(merge_size):
    images = [noise(16, 24, 0), clip(5, 24, 16, 10), noise(16, 24, 1), clip(4, 16, 24, 20)]
    patches, grids, geometry = batch_of(images, merge_size, taps=2)
    assert grids[:, 0].tolist() == [1, 3, 1, 2]
    shown = [images[0], *images[1].frames[::2], images[2], *images[3].frames[::2]]
    groups = pictures_of_patches(patches, grids, geometry, merge_size)
    assert [group.frames for group in groups] == [[0, 4, 5, 6], [1, 2, 3]]
    for group in groups:
        levels = (unnormalize(group.pictures, **normalisation()) * 255).round().to(torch.uint8)
        for frame, picture in zip(group.frames, levels, strict=True):
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), shown[frame])


def test_every_frame_of_a_clip_comes_back_from_patches_of_one_frame():
    film = clip(3, 16, 8, 0)
    [group] = pictures_of_patches(*batch_of([film], merge_size=2, taps=1), merge_size=2)
    levels = (unnormalize(group.pictures, **normalisation()) * 255).round().to(torch.uint8)
    assert np.array_equal(levels.permute(0, 2, 3, 1).numpy(), np.stack(film.frames))


def test_pictures_pass_without_what_fills_no_patch():
    pictures = torch.rand(2, 3, 18, 27)
    [group] = pictures_of_patches(pictures, None, PatchGeometry(3, 1, 4), merge_size=2)
    assert (group.size, group.frames) == ((4, 6), [0, 1])
    assert torch.equal(group.pictures, pictures[:, :, :16, :24])


def test_unnormalised_pixels_stay_in_zero_to_one():
    found = unnormalize(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1), 0.5, [0.2, 0.2, 0.2])
    assert found.flatten().tolist() == [0, 0.5, 1]


def test_a_normalisation_of_other_channels_is_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"3 means and 3 deviations, the pictures have 1 channels"):
        unnormalize(torch.zeros(1, 1, 2, 2), [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    ("patches", "grids", "message"),
    [
        (torch.zeros(8, 40), [[1, 2, 4]], r"\[patches, 48\] or \[patches, 96\] with their grids, got \[8, 40\]"),
        (torch.zeros(8, 48), None, r"got \[8, 48\] and grids None"),
        (torch.zeros(8, 48), [[1, 2, 2]], r"count 4 patches in squares of 2 x 2, pixel_values holds 8"),
        (torch.zeros(8, 48), [[1, 1, 8]], r"Grids \[\[1, 1, 8\]\] count 8 patches in squares of 2 x 2"),
    ],
)
def test_patches_that_do_not_fit_are_refused_with_both_sides(patches, grids, message):
    grids = grids if grids is None else torch.tensor(grids)
    with pytest.raises(ValueError, match=message):
        pictures_of_patches(patches, grids, PatchGeometry(3, 2, PATCH), merge_size=2)


# Tokens


@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("merge_size", [1, 2])
def test_rows_are_in_the_order_of_the_visual_tokens(merge_size, taps):
    """Every cell of every frame is painted with a colour of its own."""
    cell, counted, images = merge_size * PATCH, 0, []
    for times, height, width in [(1, 2, 3), (2, 3, 2), (1, 2, 3), (1, 4, 1), (2, 2, 3)]:
        frames = []
        for _ in range(times):
            numbers = np.arange(counted, counted + height * width).reshape(height, width, 1)
            painted = np.repeat(np.repeat(numbers, cell, axis=0), cell, axis=1).repeat(3, axis=2).astype(np.uint8)
            frames += [painted] * taps
            counted += height * width
        images.append(Clip(frames, [float(at) for at in range(len(frames))], 1.0) if times > 1 else frames[0])
    patches, grids, geometry = batch_of(images, merge_size, taps)
    rows = texture_of_patches(patches, grids, geometry, merge_size, **normalisation())
    assert rows.shape == (counted, 17)
    assert (rows[:, 0] * 255).round().tolist() == list(range(counted))

    places = places_in(in_squares(grids, merge_size))
    height = in_squares(grids, merge_size)[places.image, 1]
    y, x = ((places.within // places.width + 0.5) / height, (places.within % places.width + 0.5) / places.width)
    torch.testing.assert_close(rows[:, TEXTURE_CHANNELS.index("y")], y)
    torch.testing.assert_close(rows[:, TEXTURE_CHANNELS.index("x")], x)


def test_rows_are_the_means_and_entropies_of_the_pictures():
    images = [noise(16, 24, 0), noise(32, 16, 1)]
    rows = texture_of_patches(*batch_of(images, 2, 1), merge_size=2, **normalisation())
    pictures = [torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in images]
    expected = [torch.cat(cell_statistics(picture, 8), dim=2)[0] for picture in pictures]
    torch.testing.assert_close(rows, torch.cat(expected), atol=0.01, rtol=0)
    torch.testing.assert_close(rows[:, :13], torch.cat(expected)[:, :13], atol=2e-3, rtol=0)


def test_rows_of_an_image_are_the_same_whatever_else_is_in_the_batch():
    images = [noise(16, 24, seed) for seed in range(4)] + [noise(24, 8, 4)]
    together = texture_of_patches(*batch_of(images, 2, 1), merge_size=2, **normalisation())
    apart = [texture_of_patches(*batch_of([image], 2, 1), merge_size=2, **normalisation()) for image in images]
    assert torch.equal(together, torch.cat(apart))


def test_many_large_frames_are_handled_in_groups_to_the_same_result(monkeypatch):
    patches, grids, geometry = batch_of([noise(16, 24, seed) for seed in range(5)], 2, 1)
    whole = texture_of_patches(patches, grids, geometry, 2, **normalisation())
    monkeypatch.setattr("vlm_zoo.models.texture_vlm._PIXELS_AT_ONCE_ON_CPU", 2 * 16 * 24)
    assert torch.equal(texture_of_patches(patches, grids, geometry, 2, **normalisation()), whole)


def test_rows_of_pictures_are_those_of_the_same_pictures_in_patches():
    images = [noise(16, 24, seed) for seed in range(3)]
    patches, grids, geometry = batch_of(images, 2, 1)
    [group] = pictures_of_patches(patches, grids, geometry, 2)
    rows = texture_of_patches(group.pictures, None, geometry, 2, **normalisation())
    assert torch.equal(rows, texture_of_patches(patches, grids, geometry, 2, **normalisation()))


def test_grey_towers_see_three_equal_colours():
    pictures = torch.rand(1, 1, 8, 8)
    rows = texture_of_patches(pictures, None, PatchGeometry(1, 1, PATCH), 1, [0.0], [1.0])
    coloured = texture_of_patches(pictures.expand(-1, 3, -1, -1), None, PatchGeometry(3, 1, PATCH), 1, [0.0], [1.0])
    assert torch.equal(rows, coloured)


def test_towers_of_other_channels_are_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"3 channels or 1, the vision tower's have 4"):
        texture_of_patches(torch.rand(1, 4, 8, 8), None, PatchGeometry(4, 1, PATCH), 1, [0.5], [0.5])


def test_rows_of_half_precision_pixels_are_float32_and_close():
    patches, grids, geometry = batch_of([noise(16, 24, 0)], 2, 1)
    expected = texture_of_patches(patches, grids, geometry, 2, **normalisation())
    found = texture_of_patches(patches.bfloat16(), grids, geometry, 2, **normalisation())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)
