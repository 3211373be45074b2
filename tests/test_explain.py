"""`vlm_zoo.explain`: maps over the picture, for every architecture and every layout of pixels."""

import os

import numpy as np
import PIL.Image
import pytest
import torch

import vlm_zoo
from vlm_zoo import ZOO, cli
from vlm_zoo.explain import ExplainError, Explanation, drawing, looking
from vlm_zoo.explain.asking import ask, read_picture
from vlm_zoo.explain.maps import Boxes, average, boxes_on_picture, spread
from vlm_zoo.models.geometry_vlm import ImageError, ViewRegion
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.layers import grid_places
from vlm_zoo.models.llava import ZooLlavaModel
from vlm_zoo.models.native_vlm import patch_places
from vlm_zoo.testing import tiny_config, tiny_model, tiny_processor


explain = vlm_zoo.explain

QUESTION, ANSWER = "What is this?", "a dog"

# Fields with which the picture has a say in the tiny models
FIELDS = {"zoo_flamingo": {"gate_init": 1.0}}

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
VARIANTS = {
    "tiles": ("zoo_llava", {"image_grid_pinpoints": PINPOINTS}),
    "tiles-flat": ("zoo_llava", {"image_grid_pinpoints": PINPOINTS, "merge_type": "flat"}),
    "tiles-spatial": ("zoo_llava", {"image_grid_pinpoints": PINPOINTS, "merge_type": "spatial"}),
    "prefix-tokens": ("zoo_llava", {"vision_feature_select_strategy": "full"}),
    "covering-tiles": ("zoo_vet", {"max_tiles": 4}),
    "neighbours": ("zoo_vet", {"hidden_stride": 3}),
    "native-indicators": ("zoo_vet", {"vision": "qwen3_vl", "hidden_stride": 2, "num_visual_indicators": 4}),
    "deepstack": ("zoo_mrope", {"vision": "qwen3_vl", "text": "qwen3", "deepstack_layers": [1]}),
    "sliding-window": ("zoo_mrope", {"vision": "qwen2_5_vl", "text": "gemma3", "mrope_layout": "chunked"}),
    "text-conditioned": ("zoo_blip2", {"text_conditioned": True}),
}
CASES = {**{name: (name, FIELDS.get(name, {})) for name in ZOO}, **VARIANTS}
SHOW_ATTENTION = [name for name, (model_type, _) in CASES.items() if model_type not in ("zoo_blip2", "zoo_flamingo")]


def picture(width: int = 64, height: int = 32) -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


def ramp(width: int, height: int) -> PIL.Image.Image:
    """Each pixel says in red and green where it is; blue tells it from padding."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return PIL.Image.fromarray(np.stack((y, x, np.full_like(x, 255)), axis=-1))


def build(model_type: str, **fields) -> tuple:
    torch.manual_seed(0)
    model = tiny_model(model_type, **fields)
    return model, tiny_processor(model_type, model.config)


@pytest.fixture(scope="module")
def pairs() -> dict:
    return {name: build(model_type, **fields) for name, (model_type, fields) in CASES.items()}


@pytest.fixture(scope="module")
def llava(pairs) -> tuple:
    return pairs["zoo_llava"]


# ---------------------------------------------------------------------------------------------------------------------
# Every architecture and layout
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_maps_are_finite_and_never_below_zero(name, pairs):
    found = explain(*pairs[name], picture(), QUESTION, answer=ANSWER)
    for values in found.maps.values():
        assert values.ndim == 2 and values.dtype == torch.float32
        assert values.isfinite().all() and (values >= 0).all()
    assert found.maps["gradient"].sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_the_map_of_a_model_that_sees_only_the_left_half_is_zero_on_the_right(name):
    model_type, fields = CASES[name]
    model, processor = build(model_type, **fields)
    merge = processor.image_processor.merge_size

    def see_the_left_half(_, args, kwargs):
        pixels = kwargs.get("pixel_values")
        if pixels is None:  # a decode step
            return args, kwargs
        if pixels.ndim == 2:
            grids = kwargs["image_grid_thw"]
            left = (patch_places(grids, merge)[:, 1] < grids[0, 2] // 2)[:, None]
        else:
            left = torch.arange(32) < 16
        if pixels.ndim == 5:  # the whole picture, then two tiles side by side
            left = torch.stack((left, torch.ones_like(left), torch.zeros_like(left)))[:, None, None]
        return args, {**kwargs, "pixel_values": pixels * left}

    model.model.register_forward_pre_hook(see_the_left_half, with_kwargs=True)
    found = explain(model, processor, picture(), QUESTION, answer=ANSWER).maps["gradient"]
    left, right = found.chunk(2, dim=1)
    assert left.sum() > 0
    assert (right == 0).all()


@pytest.mark.parametrize("name", SHOW_ATTENTION)
def test_attention_is_that_of_a_plain_pass_over_the_whole_text(name, pairs):
    model, processor = pairs[name]
    asked = ask(model, processor, picture(), QUESTION, ANSWER, 1)
    found = looking.attention_to_image(looking.twin_of(model), asked)
    plain = looking.twin_of(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = plain.model(
            input_ids=asked.input_ids,
            attention_mask=torch.ones_like(asked.input_ids),
            output_attentions=True,
            **asked.vision_inputs,
        )
    image = asked.input_ids[0] == model.config.image_token_id
    assert len(found) == len(outputs.attentions) == model.config.text_config.num_hidden_layers
    for values, expected in zip(found, outputs.attentions, strict=True):
        rows = expected[0, :, asked.prompt_length - 1 : -1].mean(dim=(0, 1))
        torch.testing.assert_close(values, rows[image], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHOW_ATTENTION)
def test_attention_maps_hold_what_the_placed_tokens_get(name, pairs):
    model, processor = pairs[name]
    found = explain(model, processor, picture(64, 64), QUESTION, answer=ANSWER)
    twin = looking.twin_of(model)
    asked = ask(twin, processor, picture(64, 64), QUESTION, ANSWER, 1)
    last = looking.attention_to_image(twin, asked)[-1]
    assert found.maps["attention_late"].sum() <= last.sum() + 1e-5 <= 1 + 1e-5
    if len(found.boxes) == len(last):
        torch.testing.assert_close(found.maps["attention_late"].sum(), last.sum())


@pytest.mark.parametrize("name", SHOW_ATTENTION)
def test_every_placeholder_has_an_entry_among_the_places(name, pairs):
    model, processor = pairs[name]
    for size in ((64, 32), (40, 90), (100, 100)):
        asked = ask(model, processor, picture(*size), QUESTION, ANSWER, 1)
        with torch.no_grad():
            outputs = model.model(input_ids=asked.input_ids, **asked.vision_inputs)
        (places,) = model.model.token_places(asked.vision_inputs, outputs.fusion_outputs)
        views = len(processor.image_processor.view_regions(size[1], size[0]))
        assert places.shape == (int((asked.input_ids == model.config.image_token_id).sum()), 5)
        assert places[:, 0].max() == views - 1
        inside = places[places[:, 0] >= 0, 1:]
        assert (inside[:, :2] < inside[:, 2:]).all() and inside.min() >= 0 and inside.max() <= 1


def state_of(model) -> dict:
    """Everything about a model that `explain` might have touched."""
    configs = [model.config, model.config.text_config, model.config.vision_config]
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "configs": [config.to_dict() for config in configs],
        "attention": [config._attn_implementation for config in configs],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "generation": model.generation_config.to_dict(),
    }


def assert_same_state(before: dict, after: dict) -> None:
    weights, now = before.pop("state"), after.pop("state")
    assert before == after
    assert weights.keys() == now.keys() and all(torch.equal(weights[name], now[name]) for name in weights)


@pytest.mark.parametrize("model_type", ZOO)
def test_nothing_about_the_model_changes(model_type):
    model, processor = build(model_type)
    model.train()
    model.set_trainable_parts(["connector"])
    model.lm_head.eval()
    before = state_of(model)
    explain(model, processor, picture(), QUESTION, max_new_tokens=2)
    assert_same_state(before, state_of(model))


def test_nothing_about_the_model_changes_when_something_fails(monkeypatch):
    model, processor = build("zoo_llava")
    before = state_of(model.train())

    def fail(twin, asked):
        raise RuntimeError("out of memory")

    for name in ("attention_to_image", "gradient_of_answer"):
        monkeypatch.setitem(explain.__globals__, name, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            explain(model, processor, picture(), QUESTION, answer=ANSWER)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("model_type", ZOO)
def test_frozen_models_are_explained_even_in_inference_mode(model_type, pairs):
    model, processor = pairs[model_type]
    expected = explain(model, processor, picture(), QUESTION, answer=ANSWER).maps
    frozen = looking.twin_of(model)
    state = [parameter.requires_grad for parameter in model.parameters()]
    frozen.requires_grad_(False)
    try:
        with torch.inference_mode():
            found = explain(frozen, processor, picture(), QUESTION, answer=ANSWER).maps
    finally:
        for parameter, wanted in zip(model.parameters(), state, strict=True):
            parameter.requires_grad_(wanted)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name])


def test_half_precision_gives_maps_too():
    model, processor = build("zoo_mrope")
    found = explain(model.to(torch.bfloat16), processor, picture(), QUESTION, answer=ANSWER)
    assert all(values.dtype == torch.float32 and values.sum() > 0 for values in found.maps.values())


# ---------------------------------------------------------------------------------------------------------------------
# What the maps mean
# ---------------------------------------------------------------------------------------------------------------------


def test_the_gradient_says_how_the_answer_changes_with_a_patch():
    model, processor = build("zoo_llava")
    model.double()
    for parameter in model.model.language_model.parameters():  # so that every token of the answer has a say of its own
        parameter.data *= 6 if parameter.ndim == 2 else 1
    found = explain(model, processor, picture(32, 32), QUESTION, answer=ANSWER).maps["gradient"]
    asked = ask(model, processor, picture(32, 32), QUESTION, ANSWER, 1)
    step = 0.05

    def log_probability(factor: float) -> float:
        pixels = asked.vision_inputs["pixel_values"].double().clone()
        pixels[..., 8:16, 24:32] *= factor  # the patch in row 1, column 3
        logits = model(asked.input_ids, pixel_values=pixels).logits[:, asked.prompt_length - 1 : -1]
        answer = asked.input_ids[:, asked.prompt_length :, None]
        return float(logits.log_softmax(dim=-1).gather(2, answer).sum())

    with torch.no_grad():
        change = (log_probability(1 + step) - log_probability(1 - step)) / (2 * step)
    assert float(found[1, 3]) == pytest.approx(abs(change), rel=1e-2)


def test_the_map_has_the_shape_of_the_grid(pairs):
    found = explain(*pairs["zoo_llava"], picture(50, 90), QUESTION, answer=ANSWER)
    assert found.maps["attention_late"].shape == found.maps["gradient"].shape == (4, 4)
    model, processor = pairs["zoo_mrope"]
    rows, columns = processor.image_processor.patch_grid(96, 64)[1:]
    found = explain(model, processor, picture(64, 96), QUESTION, answer=ANSWER)
    assert found.maps["gradient"].shape == (rows, columns)
    side = model.config.spatial_merge_size
    assert found.maps["attention_late"].shape == (rows // side, columns // side)


def test_maps_of_tiles_are_as_fine_as_the_tiles(pairs):
    found = explain(*pairs["tiles"], picture(64, 32), QUESTION, answer=ANSWER)
    assert found.maps["attention_late"].shape == found.maps["gradient"].shape == (4, 8)
    assert len(found.boxes) == 16 + 32  # newlines have no place


def test_the_layers_of_an_attention_map_are_named(pairs):
    found = explain(*pairs["zoo_llava"], picture(), QUESTION, answer=ANSWER)
    assert found.labels["attention_middle"] == "attention, layer 1 of 2"
    assert found.labels["attention_late"] == "attention, layer 2 of 2"


def test_depths_are_the_middle_and_the_last_third():
    assert looking.depths(24) == {"attention_middle": range(8, 16), "attention_late": range(16, 24)}
    assert looking.depths(1) == {"attention_late": range(0, 1)}


def test_tokens_without_a_place_have_gradients_alone(pairs):
    for name in ("zoo_blip2", "zoo_flamingo"):
        found = explain(*pairs[name], picture(), QUESTION, answer=ANSWER)
        assert list(found.maps) == ["gradient"] and found.boxes is None


class Spotted(ZooLlavaModel):
    """Reports a map from its fusion, and stands its tokens in two boxes."""

    def fuse(self, inputs_embeds, features, context):
        if features is not None:
            context.fusion_outputs = torch.tensor([[-1.0, 0.0, 3.0]])
        return super().fuse(inputs_embeds, features, context)

    def fusion_maps(self, fusion_outputs):
        return [{"spot": fusion_outputs}]

    def token_places(self, vision_inputs, fusion_outputs):
        assert fusion_outputs is not None
        left, right = [0.0, 0.0, 0.0, 1.0, 0.25], [0.0, 0.0, 0.25, 1.0, 1.0]
        return [torch.tensor([left] * 4 + [right] * 12)]


def test_maps_and_places_that_fusion_reports_are_shown():
    model, processor = build("zoo_llava")
    model.model.__class__ = Spotted
    found = explain(model, processor, picture(), QUESTION, answer=ANSWER)
    assert list(found.maps) == ["spot", "attention_middle", "attention_late", "gradient"]
    assert found.maps["spot"].tolist() == [[0.0, 1.0, 4.0]]  # lifted to 0
    assert found.maps["attention_late"].shape == (1, 4)
    assert found.boxes[0].tolist() == [0.0, 0.0, 1.0, 0.25]


def test_maps_of_fusion_over_a_padded_view_are_laid_over_the_picture():
    model, processor = build("zoo_llava")
    model.model.__class__ = Spotted
    model.model.fusion_maps = lambda outputs: [{"rows": torch.arange(8.0)[:, None].expand(8, 4)}]
    processor.image_processor.do_pad_to_square = True
    found = explain(model, processor, picture(64, 32), QUESTION, answer=ANSWER)
    assert found.maps["rows"].tolist() == [[float(row)] * 4 for row in (2, 3, 4, 5)]


def test_places_that_do_not_fit_the_placeholders_are_an_error():
    class Short(Spotted):
        def token_places(self, vision_inputs, fusion_outputs):
            return [super().token_places(vision_inputs, fusion_outputs)[0][:-1]]

    model, processor = build("zoo_llava")
    model.model.__class__ = Short
    with pytest.raises(ExplainError, match="gives 15 places, the image has 16"):
        explain(model, processor, picture(), QUESTION, answer=ANSWER)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


VIEWS = {
    "squashed": {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    "cropped": {"size": {"shortest_edge": 64}, "crop_size": {"height": 57, "width": 50}},
    "padded": {"size": {"height": 64, "width": 64}, "do_center_crop": False, "do_pad_to_square": True},
    "crop larger than the picture": {"do_resize": False, "crop_size": {"height": 251, "width": 260}},
    "tiles": {
        "size": {"height": 64, "width": 64},
        "do_center_crop": False,
        "image_grid_pinpoints": [[64, 128], [128, 64], [128, 128]],
    },
    "covering": {"size": {"height": 64, "width": 64}, "do_center_crop": False, "max_tiles": 6},
    "covering, padded": {
        "size": {"height": 64, "width": 64},
        "do_center_crop": False,
        "max_tiles": 6,
        "do_pad_to_square": True,
    },
}


@pytest.mark.parametrize("size", [(120, 240), (233, 90), (200, 200)])
@pytest.mark.parametrize("name", VIEWS)
def test_regions_say_what_views_show(name, size):
    processor = ZooImageProcessor(**VIEWS[name], do_rescale=False, do_normalize=False, image_mean=[0.0] * 3)
    views = processor(ramp(size[1], size[0]), return_tensors="pt")["pixel_values"]
    views = views.flatten(0, -4)
    regions = processor.view_regions(*size)
    assert len(regions) == len(views)
    for view, ((top, left, bottom, right), part) in zip(views, regions, strict=True):
        height, width = view.shape[1:]
        y = top + (torch.arange(height) + 0.5) / height * (bottom - top) - 0.5
        x = left + (torch.arange(width) + 0.5) / width * (right - left) - 0.5
        margin = 2 * max((bottom - top) / height, (right - left) / width, 1)
        rows, columns = (
            (y > part[0] + margin) & (y < part[2] - margin),
            (x > part[1] + margin) & (x < part[3] - margin),
        )
        inside = rows[:, None] & columns
        rows, columns = (
            (y < part[0] - margin) | (y > part[2] + margin),
            (x < part[1] - margin) | (x > part[3] + margin),
        )
        outside = rows[:, None] | columns
        assert inside.any()
        assert (view[2][inside] > 250).all() and (view[2][outside] < 5).all()
        slack = 0.5 * margin
        assert (view[0] - y[:, None])[inside].abs().max() < slack
        assert (view[1] - x[None])[inside].abs().max() < slack


def test_at_native_resolution_one_view_shows_the_whole_picture():
    processor = tiny_processor("zoo_mrope").image_processor
    assert processor.view_regions(100, 33) == [((0, 0, 100, 33), (0, 0, 100, 33))]


@pytest.mark.parametrize("name", ["tiles", "tiles-flat", "tiles-spatial", "covering-tiles", "deepstack"])
@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
def test_tokens_of_all_views_cover_the_picture_once_each(name, size, pairs):
    boxes = explain(*pairs[name], picture(*size), QUESTION, answer=ANSWER).boxes
    boxes = Boxes(boxes, boxes)
    rows, columns = boxes.grid
    areas = (boxes.part[:, 2:] - boxes.part[:, :2]).prod(dim=1) * rows * columns
    views = 1.0 if name == "deepstack" else 2.0  # the whole picture, and its tiles
    torch.testing.assert_close(spread(areas, boxes, boxes.grid), torch.full(boxes.grid, views))


def test_spread_keeps_the_sum_and_average_the_value():
    edges = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 0.25], [0.5, 0.25, 1.0, 1.0]])
    boxes, values = Boxes(edges, edges), torch.tensor([1.0, 2.0, 3.0])
    assert boxes.grid == (2, 4)
    assert spread(values, boxes, (2, 4)).tolist() == [[0.25] * 4, [2.0, 1.0, 1.0, 1.0]]
    assert average(values, boxes, (2, 4)).tolist() == [[1.0] * 4, [2.0, 3.0, 3.0, 3.0]]


def test_what_lies_in_padding_is_lost():
    padded = ViewRegion((-32, 0, 96, 128), (0, 0, 64, 128))  # a wide picture in a square
    boxes = boxes_on_picture(grid_places((4, 4)), [padded], (64, 128))
    assert boxes.grid == (2, 4)
    assert boxes.seen.tolist() == [False] * 4 + [True] * 8 + [False] * 4
    values = torch.arange(16.0)
    assert spread(values, boxes, (2, 4)).tolist() == [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]


def test_a_box_that_is_half_padding_gives_half_of_its_amount():
    padded = ViewRegion((0, -16, 64, 112), (0, 0, 64, 96))
    boxes = boxes_on_picture(grid_places((1, 4)), [padded], (64, 96))
    assert boxes.grid == (1, 3)
    found = spread(torch.tensor([2.0, 4.0, 6.0, 8.0]), boxes, (1, 3))
    torch.testing.assert_close(found, torch.tensor([[3.0, 5.0, 7.0]]))


def test_places_of_a_grid_whose_last_squares_are_smaller():
    places = grid_places((3, 2), side=2, view=5)
    third = pytest.approx(2 / 3)
    assert places.tolist() == [[5.0, 0.0, 0.0, third, 1.0], [5.0, third, 0.0, 1.0, 1.0]]


# ---------------------------------------------------------------------------------------------------------------------
# Question and answer
# ---------------------------------------------------------------------------------------------------------------------


def test_without_an_answer_the_models_own_is_explained(llava):
    model, processor = llava
    asked = ask(model, processor, picture(), QUESTION, None, 5)
    batch = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )
    own = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert asked.prompt_length == batch["input_ids"].shape[1]
    assert torch.equal(asked.input_ids, own[:, : asked.input_ids.shape[1]])


def test_an_answer_that_ends_at_once_is_explained_as_its_end(llava):
    model, processor = llava
    model = looking.twin_of(model)
    first = ask(model, processor, picture(), QUESTION, None, 1).input_ids[0, -1]
    model.generation_config.eos_token_id = [int(first), 2]
    asked = ask(model, processor, picture(), QUESTION, None, 5)
    assert asked.input_ids[0, asked.prompt_length :].tolist() == [int(first)]


def test_the_token_that_ends_an_answer_is_not_explained(llava):
    model, processor = looking.twin_of(llava[0]), llava[1]
    own = ask(model, processor, picture(), QUESTION, None, 6)
    ids = own.input_ids[0, own.prompt_length :].tolist()
    end = next(place for place in range(1, 6) if ids[place] not in ids[:place])
    model.generation_config.eos_token_id = ids[end]
    asked = ask(model, processor, picture(), QUESTION, None, 6)
    assert asked.input_ids[0, asked.prompt_length :].tolist() == ids[:end]


def test_a_given_answer_stands_behind_the_prompt(llava):
    model, processor = llava
    asked = ask(model, processor, picture(), QUESTION, f" {ANSWER}\n", 1)
    own = ask(model, processor, picture(), QUESTION, None, 1)
    assert torch.equal(asked.input_ids[:, : asked.prompt_length], own.input_ids[:, : own.prompt_length])
    assert processor.tokenizer.decode(asked.input_ids[0, asked.prompt_length :]).strip() == asked.answer == ANSWER


def test_the_white_space_of_the_template_stands_before_the_answer(llava):
    model, processor = llava
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<image>? {% else %}A:  {{ m.content[0].text }}!{% endif %}"
    )
    processor = tiny_processor("zoo_llava", model.config)
    processor.chat_template = template + "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    asked = ask(model, processor, picture(), QUESTION, ANSWER, 1)
    assert processor.tokenizer.decode(asked.input_ids[0, asked.prompt_length :]) == f"  {ANSWER}"


def test_without_a_chat_template_the_question_is_the_prompt(llava):
    model, processor = llava[0], tiny_processor("zoo_llava", llava[0].config)
    processor.chat_template = None
    found = explain(model, processor, picture(), "<image> What?", answer=ANSWER)
    assert found.answer == ANSWER
    with pytest.raises(ExplainError, match=r"holds 0 image tokens <image>.*no chat template"):
        explain(model, processor, picture(), "What?", answer=ANSWER)
    with pytest.raises(ExplainError, match="nothing is asked"):
        explain(model, processor, picture(), "What? <image>", answer=ANSWER)


def test_a_template_that_drops_images_is_an_error(llava):
    processor = tiny_processor("zoo_llava", llava[0].config)
    processor.chat_template = "{% for m in messages %}Q: ?{% endfor %}"
    with pytest.raises(ExplainError, match="expected one: the chat template drops"):
        explain(llava[0], processor, picture(), QUESTION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "one image, got none"),
        ({"image": []}, "one image, got 0"),
        ({"image": [picture(), picture()]}, "one image, got 2"),
        ({"question": "  "}, "question has no text"),
        ({"question": None}, "question has no text"),
        ({"question": "what is <image>?"}, "question holds the image token"),
        ({"answer": ""}, "answer has no text"),
        ({"answer": "<image>"}, "answer holds the image token"),
        ({"out": "map.jpg"}, "ends in .png"),
    ],
)
def test_what_cannot_be_explained_is_an_error_by_name(arguments, message, llava):
    with pytest.raises(ExplainError, match=message):
        explain(*llava, **{"image": picture(), "question": QUESTION, "answer": ANSWER, **arguments})


def test_models_and_processors_of_others_are_errors_by_name(llava):
    model, processor = llava
    with pytest.raises(ExplainError, match="got ZooLlavaModel"):
        explain(model.model, processor, picture(), QUESTION)
    with pytest.raises(ExplainError, match="takes the model's processor"):
        explain(model, processor.tokenizer, picture(), QUESTION)
    other = tiny_config("zoo_llava", image_token_id=7)
    with pytest.raises(ExplainError, match="expects 7"):
        explain(ZOO["zoo_llava"].head(other), processor, picture(), QUESTION)


def test_pictures_are_bounded_and_upright(llava, tmp_path):
    model, processor = llava[0], tiny_processor("zoo_llava", llava[0].config)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(64, 32).save(tmp_path / "turned.jpg", exif=exif)
    found = explain(model, processor, str(tmp_path / "turned.jpg"), QUESTION, answer=ANSWER)
    assert found.image.size == (32, 64)
    processor.image_processor.max_image_pixels = 100
    with pytest.raises(ImageError, match="The image has 32 x 64 pixels, more than max_image_pixels=100"):
        explain(model, processor, picture(), QUESTION, answer=ANSWER)
    with pytest.raises(ImageError, match="could not be opened"):
        explain(model, processor, str(tmp_path / "missing.png"), QUESTION)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_pictures_of_any_kind_are_drawn(mode, llava):
    given, drawn = read_picture(llava[1], PIL.Image.new(mode, (20, 10)))
    assert given.mode == mode and drawn.mode == "RGB" and drawn.size == (20, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def explanation() -> Explanation:
    maps = {"relevance": torch.rand(3, 5), "gradient": torch.zeros(6, 10)}
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]])
    return Explanation("What does $x_1 cost, and $y^? 図", "$3", picture(), maps, {"gradient": "of $y^"}, boxes)


def test_the_figure_shows_picture_tokens_and_every_map(explanation):
    figure = explanation.figure()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["picture", "2 tokens", "relevance", "of $y^"]
    assert figure.get_suptitle() == "Question: What does $x_1 cost, and $y^? 図\nAnswer: $3"
    assert explanation.to_image().mode == "RGB"


def test_long_questions_are_cut(explanation):
    long = Explanation("why " * 1000, "", explanation.image, explanation.maps)
    title = long.figure().get_suptitle().split("\n")
    assert len(title) == drawing.LINES + 1 and title[-2].endswith("…") and title[-1] == "Answer: (none)"


def test_the_picture_is_written_whole_or_not_at_all(explanation, tmp_path, monkeypatch):
    target = tmp_path / "new" / "map.png"
    explanation.save(target)
    written = target.read_bytes()
    assert PIL.Image.open(target).format == "PNG"

    def fail(*args):
        raise OSError("no space left")

    for owner, name in ((drawing, "png"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(owner, name, fail)
            explanation.save(target)
    assert target.read_bytes() == written
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["map.png"]


def test_a_folder_is_no_picture(explanation, tmp_path):
    (tmp_path / "map.png").mkdir()
    with pytest.raises(ExplainError, match=r"ends in \.png"):
        explanation.save(tmp_path / "map.png")


def test_the_command_writes_a_map_and_says_the_answer(tiny_folder, tmp_path, capsys):
    image, out = tmp_path / "page.png", tmp_path / "map.png"
    picture().save(image)
    command = ["explain", str(tiny_folder), str(image), QUESTION, "--out", str(out), "--answer", ANSWER]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    assert PIL.Image.open(out).format == "PNG"
    assert cli.main(["explain", str(tiny_folder), str(tmp_path / "no.png"), QUESTION, "--out", str(out)]) == 1
