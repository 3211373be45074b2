"""Native resolution: every kind of tower sees images of any size as transformers' own does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, ViTConfig
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from vlm_zoo.models.native_vlm import (
    Neighbours,
    PatchEmbedding,
    build_native_tower,
    check_patches,
    feature_width,
    is_native,
    patch_geometry,
    patch_places,
    see_natively,
    window_order,
)
from vlm_zoo.models.parts_vlm import build_part
from vlm_zoo.testing import tiny_model


SIDE = 2
QWEN = {"depth": 3, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
FIXED = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
TOWERS = {
    "qwen2_vl_vision": {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2, **QWEN},
    "qwen2_5_vl_vision": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        **QWEN,
    },
    "qwen3_vl_vision": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        **QWEN,
    },
    "siglip2_vision_model": {
        **{name: value for name, value in FIXED.items() if name != "image_size"},
        "num_patches": 16,
    },
    "clip_vision_model": FIXED,
    "siglip_vision_model": FIXED,
    "dinov2": {**{name: value for name, value in FIXED.items() if name != "intermediate_size"}, "mlp_ratio": 2},
    "vit": FIXED,
}
PACKED = [name for name in TOWERS if name.startswith("qwen")]
PICTURES = ["clip_vision_model", "siglip_vision_model", "dinov2", "vit"]
PREFIX = {"clip_vision_model": 1, "dinov2": 1, "vit": 1}
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 2], [1, 4, 6], [1, 6, 10]])


def config_of(kind):
    return AutoConfig.for_model(kind, **TOWERS[kind])


def whole_tower(kind):
    """transformers' own, every parameter random."""
    tower = build_part(config_of(kind), "vision tower").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    tower.set_attn_implementation("eager")
    return tower


def native_tower(kind, layers=(3,), whole=None):
    tower = build_native_tower(config_of(kind), list(layers)).eval()
    tower.load_state_dict((whole or whole_tower(kind)).state_dict(), strict=False)
    tower.set_attn_implementation("eager")
    return tower


def patches_of(kind, grids=GRIDS, frames=1):
    geometry = patch_geometry(config_of(kind))
    return torch.randn(int(grids.prod(dim=1).sum()), geometry.values * frames)


def features(kind, tower, patches, grids, layers=(3,), **kwargs):
    return see_natively(tower, patches, grids, list(layers), SIDE, PREFIX.get(kind, 0), **kwargs)[1]


def picture(patches, grid, side=SIDE):
    """The picture `float[1, C, H, W]` of patches in squares, by a loop."""
    _, rows, columns = grid
    size = round((patches.shape[1] / 3) ** 0.5)
    pixels = torch.empty(1, 3, rows * size, columns * size)
    places = [
        (top + y, left + x)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for y in range(side)
        for x in range(side)
    ]
    for patch, (y, x) in zip(patches, places, strict=True):
        pixels[0, :, y * size : (y + 1) * size, x * size : (x + 1) * size] = patch.view(3, size, size)
    return pixels, [y * columns + x for y, x in places]


# --- features --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_images_of_a_batch_have_the_features_that_they_have_alone(kind):
    tower, patches = native_tower(kind, (1, 3)), patches_of(kind)
    together = features(kind, tower, patches, GRIDS, (1, 3))
    counts, start = GRIDS.prod(dim=1).tolist(), 0
    for grid, count in zip(GRIDS, counts, strict=True):
        rows = slice(start, start + count)
        alone = features(kind, tower, patches[rows], grid[None], (1, 3))
        for layer, own in zip(together, alone, strict=True):
            assert layer.shape == (sum(counts), 24)
            torch.testing.assert_close(layer[rows], own, atol=2e-6, rtol=1e-5)
        start += count


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKED)
def test_packed_towers_give_the_hidden_states_of_transformers(kind):
    whole, grids = whole_tower(kind), torch.cat((GRIDS, torch.tensor([[3, 4, 6]])))
    patches = patches_of(kind, grids, frames=2)
    outputs = whole(patches, grid_thw=grids, output_hidden_states=True)
    found = features(kind, native_tower(kind, range(4), whole), patches, grids, range(4))
    for layer in range(4):
        expected = outputs.hidden_states[layer]
        if kind == "qwen2_5_vl_vision":  # it leaves them window by window
            order, _ = get_vision_window_index(grids, SIDE, 16, 4)
            expected = expected.unflatten(0, (-1, SIDE**2))[torch.argsort(order)].flatten(0, 1)
        torch.testing.assert_close(found[layer], expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_naflex_gives_the_hidden_states_of_transformers():
    kind = "siglip2_vision_model"
    whole, patches = whole_tower(kind), patches_of(kind)
    found = features(kind, native_tower(kind, (0, 3), whole), patches, GRIDS, (0, 3))
    longest, start = int(GRIDS.prod(dim=1).max()), 0
    for number, grid in enumerate(GRIDS.tolist()):
        pixels, places = picture(patches[start : start + grid[1] * grid[2]], grid)
        own = pixels.unflatten(3, (-1, 4)).unflatten(2, (-1, 4))[0].permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        values, mask = torch.zeros(1, longest, own.shape[1]), torch.zeros(1, longest, dtype=torch.int32)
        values[0, : len(own)], mask[0, : len(own)] = own, 1  # padded, as transformers' processor does
        outputs = whole(
            values, pixel_attention_mask=mask, spatial_shapes=GRIDS[number, None, 1:], output_hidden_states=True
        )
        for layer, states in zip((0, 3), found, strict=True):
            expected = outputs.hidden_states[layer][0, places]
            torch.testing.assert_close(states[start : start + len(own)], expected, atol=2e-6, rtol=1e-5)
        start += len(own)


@torch.no_grad()
@pytest.mark.parametrize("kind", PICTURES)
def test_towers_of_pictures_give_the_hidden_states_of_transformers(kind):
    whole, patches, prefix = whole_tower(kind), patches_of(kind), PREFIX.get(kind, 0)
    found = features(kind, native_tower(kind, (1, 3), whole), patches, GRIDS, (1, 3))
    named = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    start = 0
    for grid in GRIDS.tolist():
        pixels, places = picture(patches[start : start + grid[1] * grid[2]], grid)
        outputs = whole(pixels, output_hidden_states=True, **named)
        for layer, states in zip((1, 3), found, strict=True):
            expected = outputs.hidden_states[layer][0, prefix:][places]
            torch.testing.assert_close(states[start : start + len(places)], expected, atol=2e-6, rtol=1e-5)
        start += len(places)


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKED)
def test_single_frames_are_taken_to_stand_still(kind):
    tower, still = native_tower(kind), patches_of(kind)
    repeated = still.view(len(still), 3, 1, -1).expand(-1, -1, 2, -1).flatten(1)
    one, two = (features(kind, tower, patches, GRIDS)[0] for patches in (still, repeated))
    torch.testing.assert_close(one, two, atol=5e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip2_vision_model", *PICTURES])
def test_frames_of_a_clip_are_pictures_to_towers_that_know_no_time(kind):
    tower, clip = native_tower(kind), torch.tensor([[3, 4, 6]])
    patches = patches_of(kind, clip)
    frames = torch.tensor([[1, 4, 6]] * 3)
    assert torch.equal(features(kind, tower, patches, clip)[0], features(kind, tower, patches, frames)[0])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_are_interpolated_as_asked(mode):
    kind = "qwen3_vl_vision"
    tower, patches = native_tower(kind, (0,)), patches_of(kind)
    found = features(kind, tower, patches, GRIDS, (0,), position_mode=mode)[0]
    table = tower.pos_embed.weight.view(1, 4, 4, -1).permute(0, 3, 1, 2)
    start = 0
    for _, height, width in GRIDS.tolist():
        grown = torch.nn.functional.interpolate(table, size=(height, width), mode=mode)[0].flatten(1).T
        rows = slice(start, start + height * width)
        _, places = picture(patches[rows], [1, height, width])
        torch.testing.assert_close(found[rows], tower.patch_embed(patches[rows]) + grown[places], atol=1e-5, rtol=1e-5)
        start += height * width


def test_pixels_are_taken_in_any_float_dtype():
    tower = native_tower("qwen2_vl_vision").to(torch.bfloat16)
    assert features("qwen2_vl_vision", tower, patches_of("qwen2_vl_vision"), GRIDS)[0].dtype == torch.bfloat16


# --- order -----------------------------------------------------------------------------------------------------------


def random_grids(seed, side):
    generator = torch.Generator().manual_seed(seed)
    grids = torch.randint(1, 8, (6, 3), generator=generator)
    grids[:, 0] = grids[:, 0] % 3 + 1
    grids[:, 1:] *= side
    return grids


@pytest.mark.parametrize("side", [1, 2, 3])
def test_places_of_patches_are_those_of_transformers(side):
    for seed in range(10):
        grids = random_grids(seed, side)
        assert torch.equal(patch_places(grids, side), get_vision_position_ids(grids, side))


@pytest.mark.parametrize(("side", "window"), [(2, 2), (2, 3), (2, 4), (1, 4), (3, 1)])
def test_windows_are_those_of_transformers(side, window):
    for seed in range(10):
        grids = random_grids(seed, side)
        order, bounds = window_order(grids, side, window)
        expected_order, expected_bounds = get_vision_window_index(grids, side, window * side * 4, 4)
        assert torch.equal(order, expected_order) and torch.equal(bounds, expected_bounds)


def test_a_patch_embedding_is_the_convolution_that_it_replaces():
    convolution = torch.nn.Conv3d(3, 24, (2, 4, 4), stride=(2, 4, 4), bias=True)
    patches = torch.randn(17, 3 * 2 * 4 * 4)
    expected = convolution(patches.view(17, 3, 2, 4, 4)).flatten(1)
    embedding = PatchEmbedding(convolution)
    assert embedding.width == 24 and embedding.proj is convolution
    torch.testing.assert_close(embedding(patches), expected)


def test_neighbours_are_laid_side_by_side():
    states = torch.arange(16.0).view(8, 2)
    assert torch.equal(Neighbours(2)(states), torch.arange(16.0).view(2, 8))


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("layers", [(3,), (2,), (1, 2)])
def test_every_parameter_that_is_left_is_used(kind, layers):
    if kind == "qwen3_vl_vision" and layers == (3,):
        layers = (1, 3)
    tower = build_native_tower(config_of(kind), list(layers)).train()
    sum(state.square().sum() for state in features(kind, tower, patches_of(kind), GRIDS, layers)).backward()
    unused = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert unused == []


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_behind_the_last_one_used_are_not_built(kind):
    whole, cut = whole_tower(kind), build_native_tower(config_of(kind), [1])
    assert sum(p.numel() for p in cut.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())
    assert set(cut.state_dict()) <= set(whole.state_dict())


@pytest.mark.parametrize("kind", TOWERS)
def test_a_cut_tower_gives_the_states_of_the_whole_one(kind):
    whole, patches = whole_tower(kind), patches_of(kind)
    with torch.no_grad():
        cut = features(kind, native_tower(kind, (1,), whole), patches, GRIDS, (1,))
        full = features(kind, native_tower(kind, (1, 3), whole), patches, GRIDS, (1, 3))
    torch.testing.assert_close(cut[0], full[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TOWERS)
def test_the_width_of_a_tower_is_that_of_its_states(kind):
    assert feature_width(build_native_tower(config_of(kind), [3])) == 24


@pytest.mark.parametrize("kind", TOWERS)
def test_native_towers_are_told_from_those_of_pictures(kind):
    assert is_native(config_of(kind)) == (kind not in PICTURES)


def test_a_language_model_is_no_native_tower():
    assert not is_native(AutoConfig.for_model("llama"))


def test_the_config_says_what_a_patch_covers():
    assert patch_geometry(config_of("qwen2_vl_vision")) == (3, 2, 4)
    assert patch_geometry(config_of("siglip2_vision_model")) == (3, 1, 4)
    assert patch_geometry(config_of("clip_vision_model")).values == 48
    assert patch_geometry(ViTConfig(patch_size=[8, 8])).size == 8


def test_patches_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match=r"square patches, this tower has \(8, 4\)"):
        patch_geometry(ViTConfig(patch_size=[8, 4]))


def test_a_tower_that_does_not_say_its_channels_is_refused():
    config = AutoConfig.for_model("llama")
    config.patch_size = 4
    with pytest.raises(ValueError, match=r"\(llama\) does not say its channels"):
        patch_geometry(config)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grids", "message"),
    [
        ((24, 64), [[1, 4, 6]], r"shape \[24, 64\], expected \[patches, 96\] or, for single frames, \[patches, 48\]"),
        ((1, 3, 16, 16), [[1, 4, 4]], r"shape \[1, 3, 16, 16\], expected \[patches, 96\]"),
        ((24, 96), [1, 4, 6], "time, height and width in patches for each image"),
        ((24, 96), [[4, 6]], "time, height and width in patches for each image"),
        ((24, 96), [[1, 4, 6], [0, 2, 2]], "time, height and width in patches for each image"),
        ((25, 96), [[1, 4, 6]], "counts 24 patches, pixel_values holds 25"),
        ((15, 96), [[1, 3, 5]], r"not made of squares of 2 x 2 patches: were the images"),
    ],
)
def test_patches_of_another_model_are_refused(shape, grids, message):
    with pytest.raises(ValueError, match=message):
        check_patches(config_of("qwen2_vl_vision"), torch.zeros(shape), torch.tensor(grids), SIDE)


def test_patches_of_either_length_are_taken():
    for values in (48, 96):
        check_patches(config_of("qwen2_vl_vision"), torch.zeros(24, values), torch.tensor([[1, 4, 6]]), SIDE)


@pytest.mark.parametrize("frames", [1, 2])
def test_an_adapter_around_the_patch_embedding_learns_and_starts_with_nothing(frames):
    model = tiny_model("mrope", vision="qwen3_vl")
    patches, grids = torch.randn(16, 3 * frames * 8 * 8), torch.tensor([[1, 4, 4]])
    expected = model.get_image_features(patches, image_grid_thw=grids).pooler_output[0]
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*patch_embed\.proj"))
    found = adapted.base_model.model.get_image_features(patches, image_grid_thw=grids).pooler_output[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    learned = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert learned and all(gradient is not None and gradient.any() for gradient in learned)


def test_a_packed_tower_of_another_make_is_refused():
    config = AutoConfig.for_model("glm4v_vision", depth=1, hidden_size=32, num_heads=2, out_hidden_size=32)
    with pytest.raises(ValueError, match=r"Glm4vVisionModel .*'downsample'.* expected a tower like those of Qwen2-VL"):
        build_native_tower(config, [1])


def test_prefix_tokens_that_are_not_there_are_missed():
    model = tiny_model("mrope", vision="clip", num_prefix_tokens=0)
    with pytest.raises(ValueError, match=r"made \[1, 17\] states of \[1, 16\] patches, without 0 prefix tokens"):
        model.get_image_features(torch.randn(16, 3 * 8 * 8), image_grid_thw=torch.tensor([[1, 4, 4]]))
