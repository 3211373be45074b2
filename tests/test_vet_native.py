"""The visual embedding table at native resolution: images and clips of any size, each with its own count of tokens."""

import itertools

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from vlm_zoo.models.image_processing_vlm import ImageError
from vlm_zoo.models.vet import layout
from vlm_zoo.testing import tiny_config, tiny_model, tiny_processor


# A tower of patches in one sequence, one of sequences, one of pictures
TOWERS = ["qwen3_vl", "siglip2", "siglip"]
NATIVE = {"native_resolution": True, "hidden_stride": 2, "num_visual_indicators": 4}
SIZES = [(32, 32), (48, 80), (16, 96), (70, 33)]  # in pixels; a token is 16 wide


def model_of(vision="qwen3_vl", **fields):
    return tiny_model("zoo_vet", vision=vision, **{**NATIVE, **fields})


def processor_of(vision="qwen3_vl", **fields):
    return tiny_processor("zoo_vet", tiny_config("zoo_vet", vision=vision, **{**NATIVE, **fields}))


def picture(height, width, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def patches_of(model, grids):
    """Random patches of images with these grids, one frame each."""
    grids = torch.tensor(grids)
    size = model.config.vision_config.patch_size
    return {"pixel_values": torch.randn(int(grids.prod(dim=1).sum()), 3 * size**2), "image_grid_thw": grids}


def features_of(model, **images):
    return model.get_image_features(**images).pooler_output


def rows_of(images):
    """The images one by one."""
    counts = images["image_grid_thw"].prod(dim=1).tolist()
    parts = zip(images["pixel_values"].split(counts), images["image_grid_thw"], strict=True)
    return [{"pixel_values": pixels, "image_grid_thw": grid[None]} for pixels, grid in parts]


# --- features --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("vision", TOWERS)
def test_images_of_a_batch_have_the_features_that_they_have_alone(vision):
    model = model_of(vision)
    images = patches_of(model, [[1, 4, 6], [1, 2, 2], [3, 4, 2], [1, 4, 6], [1, 8, 2]])
    together = features_of(model, **images)
    assert [len(own) for own in together] == [8, 3, 8, 8, 6]
    for own, image in zip(together, rows_of(images), strict=True):
        torch.testing.assert_close(own, features_of(model, **image)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_square_of_patches_side_by_side_becomes_a_token():
    model = model_of()
    images = patches_of(model, [[1, 4, 6]])
    outputs = model.get_image_features(**images)
    states, connector = outputs.hidden_states[2], model.model.connector
    expected = connector.tokenize(states.view(6, 4 * 32)) @ connector.table.weight[:508]
    torch.testing.assert_close(outputs.pooler_output[0][1:-1], expected)


@torch.no_grad()
def test_a_picture_of_the_towers_own_size_has_the_features_of_a_fixed_size():
    native, fixed = (
        tiny_model("zoo_vet", vision="siglip", hidden_stride=2, num_visual_indicators=0, native_resolution=resolution)
        for resolution in (True, False)
    )
    fixed.load_state_dict(native.state_dict())
    processors = [tiny_processor("zoo_vet", model.config) for model in (native, fixed)]
    own, other = (
        torch.cat(features_of(model, **processor.image_processor([picture(32, 32)], return_tensors="pt")))
        for model, processor in zip((native, fixed), processors, strict=True)
    )
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("vision", TOWERS)
def test_logits_of_a_padded_batch_are_those_of_its_rows(vision):
    model, processor = model_of(vision), processor_of(vision)
    images = [[picture(48, 80)], [picture(32, 32, 1), picture(16, 64, 2)]]
    text = ["What is <image>?", "<image> and <image>"]
    options = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
    logits = model(**processor(images=images, text=text, **options)).logits
    for number, (own, words) in enumerate(zip(images, text, strict=True)):
        alone = model(**processor(images=[own], text=[words], **options)).logits[0]
        torch.testing.assert_close(logits[number, : len(alone)], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_are_interpolated_as_the_config_says():
    models = [model_of(position_interpolation=mode) for mode in (None, "bilinear", "bicubic")]
    images = patches_of(models[0], [[1, 6, 10]])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    tokens = [features_of(model, **images)[0] for model in models]
    for one, other in itertools.combinations(tokens, 2):
        assert (one - other).abs().max() > 1e-5


@torch.no_grad()
def test_at_the_size_of_the_table_interpolation_changes_nothing():
    models = [model_of(position_interpolation=mode) for mode in (None, "bilinear", "bicubic")]
    images = patches_of(models[0], [[1, 4, 4]])
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        torch.testing.assert_close(features_of(model, **images)[0], features_of(models[0], **images)[0])


@pytest.mark.parametrize("mode", [None, "bicubic"])
def test_bfloat16_is_float32_to_its_own_precision(mode):
    model = model_of(position_interpolation=mode)
    images = patches_of(model, [[1, 4, 6], [2, 2, 2]])
    expected = torch.cat(features_of(model, **images))
    found = torch.cat(features_of(model.bfloat16(), **images))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 0.03 * expected.norm()


# --- indicators ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("count", "still", "clip"),
    [(0, [], []), (2, [0, 1], [0, 1]), (4, [0, 1], [2, 3])],
)
def test_clips_have_indicators_of_their_own_where_there_are_four(count, still, clip):
    model = model_of(num_visual_indicators=count)
    table = model.model.connector.table.weight[512 - count :]
    features = features_of(model, **patches_of(model, [[1, 2, 4], [3, 2, 2], [1, 2, 2]]))
    for own, tokens, numbers in zip(features, (2, 3, 1), (still, clip, still), strict=True):
        assert len(own) == tokens + len(numbers)
        if count:
            assert torch.equal(own[[0, -1]], table[numbers])


def test_five_indicators_lay_an_image_of_its_own_size_out_as_one_view():
    model = model_of(num_visual_indicators=5)
    (features,) = features_of(model, **patches_of(model, [[1, 2, 4]]))
    assert torch.equal(features[[0, 3, 4]], model.model.connector.table.weight[[507, 508, 511]])


def test_an_image_and_a_clip_are_laid_out_alike_but_for_their_indicators():
    assert layout((1, 1), 4) == [("indicator", 0), ("view", 0), ("indicator", 1)]
    assert layout((1, 1), 4, is_clip=True) == [("indicator", 2), ("view", 0), ("indicator", 3)]
    assert layout((1, 1), 2, is_clip=True) == layout((1, 1), 2)


# --- counts ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("count", [0, 2, 4])
def test_counts_placeholders_and_features_agree_over_sizes(vision, count):
    processor, model = (make(vision, num_visual_indicators=count) for make in (processor_of, model_of))
    for size in SIZES:
        batch = processor(images=[picture(*size)], text=["a <image> b"], return_tensors="pt")
        placeholders = int((batch["input_ids"] == processor.image_token_id).sum())
        images = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        assert processor.num_image_tokens(*size) == placeholders == len(features_of(model, **images)[0])
        assert processor.num_pixel_rows(*size) == len(batch["pixel_values"])
        assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


@torch.no_grad()
@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_counts_placeholders_and_features_agree_over_clips(vision, frames):
    processor, model = processor_of(vision), model_of(vision)
    clip = [picture(40, 70, seed) for seed in range(frames)]
    batch = processor(videos=[clip], text=["a <video> b"], do_sample_frames=False, return_tensors="pt")
    placeholders = int((batch["input_ids"] == processor.image_token_id).sum())
    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    (grid,) = batch["image_grid_thw"].tolist()
    assert grid[0] == -(-frames // (2 if vision == "qwen3_vl" else 1))
    assert processor.num_grid_tokens(*grid) == placeholders == len(features_of(model, **images)[0])
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


@torch.no_grad()
def test_images_and_clips_in_one_batch_find_their_places():
    processor, model = processor_of("siglip2"), model_of("siglip2")
    clip = [picture(32, 48, seed) for seed in range(3)]
    options = {"do_sample_frames": False, "return_tensors": "pt"}
    batch = processor(images=[[picture(48, 32)]], videos=[[clip]], text=["<video> or <image>"], **options)
    assert batch["image_grid_thw"][:, 0].tolist() == [3, 1]
    features = features_of(model, pixel_values=batch["pixel_values"], image_grid_thw=batch["image_grid_thw"])
    assert [len(own) for own in features] == [3 * 6 + 2, 6 + 2]
    assert torch.isfinite(model(**batch).logits).all()


def test_images_are_resized_to_keep_the_bounds_of_tokens():
    processor = processor_of(min_image_tokens=6, max_image_tokens=12, max_clip_tokens=24, num_visual_indicators=0)
    counts = [processor.num_image_tokens(*size) for size in [(8, 8), (16, 200), (48, 64), (300, 300), (1000, 90)]]
    assert min(counts) >= 6 and max(counts) <= 12 and processor.num_image_tokens(48, 64) == 12
    clip = [picture(160, 160, seed) for seed in range(8)]
    batch = processor(videos=[clip], text=["<video>"], do_sample_frames=False, return_tensors="pt")
    assert 4 <= int((batch["input_ids"] == processor.image_token_id).sum()) <= 24


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", TOWERS)
def test_words_are_read_out_image_by_image(vision):
    model = model_of(vision, tokenize_function="st_argmax")
    images = patches_of(model, [[1, 4, 6], [1, 2, 2], [2, 2, 4]])
    words, features = model.visual_words(**images, top_k=3), features_of(model, **images)
    assert [own.ids.shape for own in words] == [(6, 3), (1, 3), (4, 3)]
    for own, tokens in zip(words, features, strict=True):
        assert torch.equal(model.model.connector.table(own.ids[:, 0]), tokens[1:-1])
        assert own.ids.max() < model.config.num_visual_words


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", TOWERS)
@pytest.mark.parametrize("function", ["softmax", "st_argmax", "gumbel_argmax"])
def test_gradients_reach_tower_head_and_table(vision, function):
    model, processor = model_of(vision, tokenize_function=function).train(), processor_of(vision)
    images = [[picture(48, 80)], [picture(32, 32, 1)]]
    batch = processor(images=images, text=["<image> is this", "<image>"], padding=True, return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    parameters = [*model.model.vision_tower.parameters(), *model.model.connector.parameters()]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)
    assert all(model.model.connector.table.weight.grad[-4:-2].abs().amax(dim=1) > 0)  # start and end of an image
    assert not model.model.connector.table.weight.grad[-2:].any()  # of a clip
    assert model.model.connector.head.weight.grad.abs().max() > 0
    assert next(model.model.vision_tower.parameters()).grad.abs().max() > 0


def test_a_frozen_tower_keeps_no_graph():
    model = model_of()
    model.model.vision_tower.requires_grad_(False)
    outputs = model.get_image_features(**patches_of(model, [[1, 2, 4]]))
    assert not outputs.last_hidden_state.requires_grad and outputs.pooler_output[0].requires_grad


@pytest.mark.parametrize("vision", TOWERS)
def test_a_blank_image_stands_in_where_a_rank_has_none(vision):
    model = model_of(vision)
    (features,) = features_of(model, **model.model.dummy_vision_inputs())
    assert len(features) == 3 and torch.isfinite(features).all()


# --- config ----------------------------------------------------------------------------------------------------------


def test_a_tower_of_patches_has_native_resolution_unasked():
    assert tiny_config("zoo_vet", vision="qwen3_vl", hidden_stride=2).native_resolution
    assert tiny_config("zoo_vet", vision="siglip2").native_resolution
    assert not tiny_config("zoo_vet", vision="siglip").native_resolution


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tiles": 4}, "max_tiles is 4, at native resolution it must be None"),
        ({"tower_norm": True}, "tower_norm is True, at native resolution it must be False"),
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full', at native resolution it must be 'default'",
        ),
        ({"hidden_stride": 3}, "hidden_stride is 3, the tower orders its patches by squares of 2"),
        ({"min_image_tokens": 9, "max_image_tokens": 8}, "Expected 1 <= min_image_tokens"),
        ({"max_image_tokens": 9, "max_clip_tokens": 8}, "Expected 1 <= min_image_tokens"),
        ({"position_interpolation": "nearest"}, "position_interpolation"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config("zoo_vet", vision="qwen3_vl", **{**NATIVE, **fields})


@pytest.mark.parametrize("vision", ["siglip", "siglip2", "qwen2_vl"])
def test_positions_of_a_tower_without_a_table_of_its_own_are_not_interpolated_otherwise(vision):
    with pytest.raises(StrictDataclassError, match="has no table of positions that can be interpolated"):
        tiny_config("zoo_vet", vision=vision, position_interpolation="bicubic", **NATIVE)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_pictures_of_one_size_are_refused_by_a_native_model():
    batch = tiny_processor("zoo_vet")(images=[picture(32, 32)], text=["<image>"], return_tensors="pt")
    with pytest.raises(ValueError, match=r"\[1, 3, 32, 32\] came without image_grid_thw"):
        model_of()(**batch)


def test_patches_are_refused_by_a_model_of_one_size():
    batch = processor_of("siglip")(images=[picture(32, 32)], text=["<image>"], return_tensors="pt")
    with pytest.raises(ValueError, match="image_grid_thw is for native resolution, which this model has not"):
        tiny_model("zoo_vet", vision="siglip", hidden_stride=2, num_visual_indicators=4)(**batch)


def test_a_clip_is_refused_at_one_size():
    processor = tiny_processor("zoo_vet")
    frames = [picture(32, 32, seed) for seed in range(2)]
    with pytest.raises(ImageError, match="is a clip, which only native resolution can take"):
        processor(videos=[frames], text=["<video>"], do_sample_frames=False, return_tensors="pt")


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[1, 4, 4]], "image_grid_thw counts 16 patches, pixel_values holds 24"),
        ([[1, 3, 8]], "is not made of squares of 2 x 2 patches"),
        ([[4, 6]], "must hold time, height and width"),
        ([[0, 4, 6]], "must hold time, height and width"),
    ],
)
def test_grids_that_do_not_belong_to_the_patches_are_refused(grids, message):
    model = model_of()
    images = patches_of(model, [[1, 4, 6]])
    with pytest.raises(ValueError, match=message):
        model.get_image_features(images["pixel_values"], image_grid_thw=torch.tensor(grids))


def test_patches_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values has shape \[4, 48\], expected \[patches, 384\]"):
        model_of().get_image_features(torch.zeros(4, 48), image_grid_thw=torch.tensor([[1, 2, 2]]))


def test_placeholders_of_another_count_are_refused():
    model, processor = model_of(), processor_of(num_visual_indicators=2)
    batch = processor(images=[picture(32, 32)], text=["<image>"], return_tensors="pt")
    four = processor_of(num_visual_indicators=0)(images=[picture(32, 32)], text=["<image>"], return_tensors="pt")
    assert model(**batch).logits.shape[1] == 6
    with pytest.raises(ValueError, match="placeholder"):
        model(**four)
