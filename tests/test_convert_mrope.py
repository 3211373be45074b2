"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL conversions: the numbers of every source, and nothing silent on the way."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)

from conversion import engine, mrope, parity
from conversion.engine import ConversionError
from vlm_zoo import AutoModelForVision2Seq
from vlm_zoo.models.mrope import ZooMropeProcessor
from vlm_zoo.testing.tiny import tiny_tokenizer


ORACLES = Path(__file__).parent / "oracles"
TOLERANCE = 5e-6
IMAGE, VIDEO = 259, 260  # behind the tiny tokenizer's own
PATCH = 3 * 2 * 4 * 4
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}
# Widths differ, so that no tensor fits where another belongs; expert matrices are not square.
_TOWER = {"num_heads": 2, "patch_size": 4, "depth": 3}
_QWEN3_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    **_TOWER,
}
VISION = {
    "qwen2_vl": {"embed_dim": 24, "hidden_size": 64, "mlp_ratio": 2, **_TOWER},
    "qwen2_5_vl": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "out_hidden_size": 64,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 4,
        **_TOWER,
    },
    "qwen3_vl": _QWEN3_TOWER,
    "qwen3_vl_moe": _QWEN3_TOWER,
}
_DECODER = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(*section, **others):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **others}}


_QWEN3 = {"head_dim": 24, **_DECODER, **rope(6, 3, 3, mrope_interleaved=True)}
TEXT = {
    "qwen2_vl": {**_DECODER, **rope(2, 3, 3)},
    "qwen2_5_vl": {**_DECODER, **rope(2, 3, 3)},
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, **_QWEN3},
}


def upstream(kind="qwen3_vl", tied=False, text=None, vision=None):
    """A tiny model of transformers with eager attention, every parameter random."""
    config_class, model_class = CLASSES[kind]
    config = config_class(
        vision_config={**VISION[kind], **(vision or {})},
        text_config={**TEXT[kind], "tie_word_embeddings": tied, **(text or {})},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=tied,
    )
    model = model_class._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = parameter[0].item() if parameter.ndim == 1 and "norm" in name else 0.0
            parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def patches(grids):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(grids.prod(dim=1).sum()), PATCH, generator=generator)


def padded(rows, side="left"):
    """Ids and mask of rows of different lengths."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def picture_inputs(side="left"):
    """Three images of different sizes in the first row, one in the second; a third without any. transformers cannot
    place images with nothing between them."""
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 2], [1, 6, 10]])
    first, second, third, last = ([IMAGE] * int(grid.prod() // 4) for grid in grids)
    rows = [[5, 6, *first, 7, *second, 8, *third, 9], [3, *last, 11, 12], [20, 21, 22, 23]]
    return {**padded(rows, side), "pixel_values": patches(grids), "image_grid_thw": grids}


def clip_inputs(kind):
    """What transformers and the zoo take for a clip that is longer than wide, with an image before and after it."""
    still, clip = torch.tensor([[1, 2, 2], [1, 4, 4]]), torch.tensor([[8, 4, 4]])
    if kind.startswith("qwen3"):
        steps = [token for step in range(8) for token in (30 + step, *[VIDEO] * 4, 40)]
    else:
        steps = [VIDEO] * 32
    ids = torch.tensor([[5, *[IMAGE] * 1, 6, 7, *steps, 8, *[IMAGE] * 4, 9]])
    images, frames = patches(still), patches(clip)
    theirs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": images,
        "image_grid_thw": still,
        "pixel_values_videos": frames,
        "video_grid_thw": clip,
    }
    ours = {
        "input_ids": ids.masked_fill(ids == VIDEO, IMAGE),
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat((images[:4], frames, images[4:])),
        "image_grid_thw": torch.cat((still[:1], clip, still[1:])),
    }
    if kind == "qwen2_5_vl":
        theirs["second_per_grid_ts"] = torch.tensor([0.5])
        ours["image_position_ids"] = torch.tensor([[0] * 8, [*range(0, 16, 2)], [0] * 8])
    return theirs, ours


def with_types(inputs):
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


@torch.no_grad()
def largest_difference(source, zoo, inputs, theirs=None):
    """Of the logits at tokens that are no padding."""
    seen = inputs["attention_mask"].bool()
    expected = source(**(theirs or with_types(inputs))).logits
    difference = (expected - zoo(**inputs).logits)[seen].abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


def qwen_tokenizer():
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
        "{% else %}{% for content in message.content %}{% if content.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif content.type == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ content.text }}{% endif %}{% endfor %}{% endif %}"
        "</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def image_processor():
    size = {"shortest_edge": 8 * 8 * 2, "longest_edge": 8 * 8 * 40}
    return Qwen2VLImageProcessorPil(patch_size=4, size=size)


def picture(height, width):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def weights(folder):
    return {
        name: tensor for path in Path(folder).glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders that transformers wrote, each with its image processor and tokenizer."""
    home = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        upstream(kind).save_pretrained(home / kind)
        image_processor().save_pretrained(home / kind)
        qwen_tokenizer().save_pretrained(home / kind)
    return home


@pytest.fixture
def source(sources, tmp_path):
    """A copy of the Qwen3-VL source to damage."""
    return Path(shutil.copytree(sources / "qwen3_vl", tmp_path / "source"))


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    home = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        mrope.convert(sources / kind, home / kind)
    return home


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CLASSES)
def test_images_of_several_sizes_give_the_logits_of_transformers(kind, side):
    source = upstream(kind)
    zoo = mrope.zoo_from_transformers(source)
    assert largest_difference(source, zoo, picture_inputs(side)) <= TOLERANCE


@pytest.mark.parametrize("kind", CLASSES)
def test_a_clip_among_images_gives_the_logits_of_transformers(kind):
    source = upstream(kind)
    zoo = mrope.zoo_from_transformers(source)
    theirs, ours = clip_inputs(kind)
    assert largest_difference(source, zoo, ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_text_gives_the_logits_of_transformers(kind):
    source = upstream(kind)
    zoo = mrope.zoo_from_transformers(source)
    assert largest_difference(source, zoo, padded([[5, 6, 7, 8, 9], [3, 4, 5]])) <= TOLERANCE


@pytest.mark.parametrize("kind", CLASSES)
def test_greedy_text_of_a_padded_batch_is_that_of_transformers(kind):
    source, inputs = upstream(kind), picture_inputs()
    zoo = mrope.zoo_from_transformers(source)
    options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [IMAGE]}
    expected, found = source.generate(**with_types(inputs), **options), zoo.generate(**inputs, **options)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_about_a_clip_is_that_of_transformers(kind):
    source, (theirs, ours) = upstream(kind), clip_inputs(kind)
    zoo = mrope.zoo_from_transformers(source)
    options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [IMAGE]}
    expected, found = source.generate(**theirs, **options), zoo.generate(**ours, **options)
    length = ours["input_ids"].shape[1]
    assert torch.equal(expected[:, length:], found[:, length:])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers(kind):
    source, inputs = upstream(kind), picture_inputs()
    zoo = mrope.zoo_from_transformers(source)
    seen = inputs["attention_mask"].bool()
    for model, own in ((source, with_types(inputs)), (zoo, inputs)):
        model(**own).logits[seen].square().mean().backward()
    found = dict(zoo.named_parameters())
    for name, parameter in source.named_parameters():
        ours = found[engine.rename(name, mrope.FROM_TRANSFORMERS)].grad
        torch.testing.assert_close(ours, parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_gives_the_logits_of_transformers(kind):
    source = upstream(kind, tied=True)
    zoo = mrope.zoo_from_transformers(source)
    assert zoo.lm_head.weight is zoo.get_input_embeddings().weight
    assert largest_difference(source, zoo, picture_inputs()) <= TOLERANCE


def test_scaled_rotary_frequencies_give_the_logits_of_transformers():
    scaled = rope(2, 3, 3, rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    source = upstream("qwen2_5_vl", text=scaled)
    zoo = mrope.zoo_from_transformers(source)
    assert zoo.config.text_config.rope_parameters["rope_type"] == "yarn"
    assert largest_difference(source, zoo, picture_inputs()) <= TOLERANCE


def test_a_sliding_window_gives_the_logits_of_transformers():
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    source = upstream("qwen2_5_vl", text=window)
    zoo = mrope.zoo_from_transformers(source)
    assert zoo.config.text_config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert largest_difference(source, zoo, picture_inputs()) <= TOLERANCE


def test_a_tower_without_deeper_features_gives_the_logits_of_transformers():
    source = upstream("qwen3_vl", vision={"deepstack_visual_indexes": []})
    zoo = mrope.zoo_from_transformers(source)
    assert zoo.config.deepstack_layers is None
    assert largest_difference(source, zoo, picture_inputs()) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_another_rule_of_places_gives_other_logits(kind):
    """The comparison would show places that are wrong."""
    source, (theirs, ours) = upstream(kind), clip_inputs(kind)
    zoo = mrope.zoo_from_transformers(source)
    turned = {**ours, "image_grid_thw": ours["image_grid_thw"].clone()}
    turned["image_grid_thw"][1] = torch.tensor([8, 2, 8])
    assert largest_difference(source, zoo, turned, theirs) > 1e-3


def test_the_model_in_memory_keeps_dtype_mode_and_attention_and_shares_nothing():
    source = upstream().to(torch.bfloat16).train()
    zoo = mrope.zoo_from_transformers(source)
    configs = (zoo.config, zoo.config.vision_config, zoo.config.text_config)
    assert (zoo.dtype, zoo.training) == (torch.bfloat16, True)
    assert {config._attn_implementation for config in configs} == {"eager"}
    assert zoo.lm_head.weight.data_ptr() != source.lm_head.weight.data_ptr()


def test_the_config_says_what_belongs_to_the_axes():
    first, second, third = (mrope.zoo_config(upstream(kind).config) for kind in KINDS)
    assert (first.mrope_layout, first.mrope_section, first.video_time) == ("chunked", [2, 3, 3], "index")
    assert (second.video_time, second.tokens_per_second, second.merger_norm) == ("seconds", 4.0, "rms_norm")
    assert (third.mrope_layout, third.mrope_section, third.video_time) == ("interleaved", [6, 3, 3], "timestamps")
    assert (third.deepstack_layers, third.deepstack_places) == ([1, 2], [0, 1])
    assert [config.text_config.model_type for config in (first, second, third)] == ["qwen2", "qwen2", "qwen3"]
    assert all("mrope_section" not in config.text_config.rope_parameters for config in (first, second, third))
    assert {config.positions_after_image for config in (first, second, third)} == {"side"}


# --- oracles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_version_4_come_out_of_the_converted_checkpoint(kind, tmp_path):
    home = ORACLES / f"hf457_{kind}"
    report = mrope.convert(home / "ckpt", tmp_path / "zoo")
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "zoo", attn_implementation="eager")
    oracle = load_file(home / "oracle.safetensors")
    inputs = {name.removeprefix("in."): value for name, value in oracle.items() if name.startswith("in.")}
    with torch.no_grad():
        found = model(**inputs).logits
        moved = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    difference = (found - oracle["out.logits"]).abs().max().item()
    print(f"hf457_{kind}: {difference:.1e}")
    assert difference <= TOLERANCE
    assert (moved - oracle["out.logits"]).abs().max() > 1e-3
    assert report["passed"] and report["image_sensitivity"] > 1e-3


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_the_names_of_the_hub_are_read(kind, tmp_path):
    """There the tower lies outside of the model; early configs have the text's fields at the top."""
    home = ORACLES / f"hf457_{kind}"
    folder = tmp_path / "source"
    folder.mkdir()
    state = {}
    for name, tensor in load_file(home / "ckpt" / "model.safetensors").items():
        state[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((home / "ckpt" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw.pop("text_config"), **raw}))
    assert mrope.convert(folder, tmp_path / "zoo")["passed"]
    mrope.convert(home / "ckpt", tmp_path / "other", verify=False)
    ours, theirs = weights(tmp_path / "zoo"), weights(tmp_path / "other")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
def test_experts_are_read_as_either_version_writes_them(version, tmp_path):
    model = upstream("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "source")
    if version == 4:
        damage(tmp_path / "source", turn_experts)
    report = mrope.convert(tmp_path / "source", tmp_path / "zoo")
    zoo = AutoModelForVision2Seq.from_pretrained(tmp_path / "zoo", attn_implementation="eager")
    assert report["passed"] and largest_difference(model, zoo, picture_inputs()) <= TOLERANCE


def turn_experts(tensors):
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensors[name] = tensor.transpose(1, 2).contiguous()


def test_square_experts_are_refused_because_their_sides_cannot_be_told(tmp_path):
    upstream("qwen3_vl_moe", text={"moe_intermediate_size": 32}).save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match=r"gate_up_proj holds square matrices, \[4, 64, 64\]"):
        mrope.convert(tmp_path / "source", tmp_path / "zoo")


# --- folders and processors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_carries_its_processor_its_card_and_its_proof(kind, converted):
    folder = converted / kind
    report = json.loads((folder / parity.REPORT).read_text())
    assert [row["stage"] for row in report["stages"]] == ["input_ids", "pixels", *parity.STAGES, "greedy_text"]
    assert all(row["max_abs_diff"] <= TOLERANCE for row in report["stages"][2:-1])
    assert report["passed"] and report["image_sensitivity"] > 1e-3
    assert isinstance(AutoProcessor.from_pretrained(folder), ZooMropeProcessor)
    assert "conversion.mrope" in (folder / "README.md").read_text()
    assert (folder / "mrope.py").is_file() and (folder / "native_vlm.py").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_there_keeps_every_bit(kind, sources, converted):
    source, zoo = weights(sources / kind), weights(converted / kind)
    names = json.loads((converted / kind / engine.RECORD).read_text())["names"]
    assert names.keys() == source.keys() and set(names.values()) == zoo.keys()
    assert all(torch.equal(zoo[names[name]], tensor) for name, tensor in source.items())
    assert not (converted / kind / engine.DROPPED).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_and_processor_answer_a_chat_about_two_images(kind, converted):
    model = AutoModelForVision2Seq.from_pretrained(converted / kind)
    zoo = AutoProcessor.from_pretrained(converted / kind)
    images = [{"type": "image", "image": picture(40, 60)}, {"type": "image", "image": picture(17, 24)}]
    question = [{"role": "user", "content": [*images, {"type": "text", "text": "Eh?"}]}]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = zoo.apply_chat_template(question, add_generation_prompt=True, **call)
    assert zoo.tokenizer.decode(inputs["input_ids"][0]).startswith("user: <|vision_start|><|image_pad|>")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_ids_and_pixels_are_those_of_the_sources_processor(sources, converted):
    before = mrope.open_source(sources / "qwen3_vl").processor
    zoo = mrope.ZooFrames(AutoProcessor.from_pretrained(converted / "qwen3_vl"))
    generator = np.random.default_rng(0)
    for height, width in generator.integers(5, 140, (10, 2)).tolist():
        call = {"images": [picture(height, width)], "text": ["a<|vision_start|><|image_pad|><|vision_end|>b"]}
        expected, found = before(**call), zoo(**call, return_tensors="pt")
        assert all(torch.equal(expected[name], found[name]) for name in ("input_ids", "image_grid_thw"))
        levels = (expected["pixel_values"] - found["pixel_values"]).abs().max() * 255 * 0.2758
        assert levels <= 2.2, (height, width)


def clip_text(folder, video_token=None):
    """The text of a clip of five frames, its placeholders counted, and the batch."""
    zoo = AutoProcessor.from_pretrained(folder, **({"video_token": video_token} if video_token else {}))
    frames = [picture(16, 24)] * 5
    batch = zoo(text=["a<|vision_start|><|video_pad|><|vision_end|>b"], videos=[frames], fps=2, return_tensors="pt")
    return re.sub(r"(?:<\|image_pad\|>)+", "P", zoo.tokenizer.decode(batch["input_ids"][0])), batch


def test_frames_of_a_clip_are_told_as_transformers_tells_them(converted):
    text, batch = clip_text(converted / "qwen3_vl")
    upstream = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="P",
        _calculate_timestamps=partial(Qwen3VLProcessor._calculate_timestamps, None),
    )
    metadata = SimpleNamespace(fps=2, frames_indices=[0, 1, 2, 3, 4])
    video = {"video_grid_thw": torch.tensor([[3, 2, 2]]), "video_metadata": [metadata]}
    frames = Qwen3VLProcessor.replace_video_token(upstream, video, 0)
    assert frames.startswith("<0.2 seconds><|vision_start|>P<|vision_end|><1.2 seconds>")
    assert text == f"a<|vision_start|>{frames}<|vision_end|>b"
    assert batch["image_grid_thw"].tolist() == [[3, 4, 6]] and batch["pixel_values"].shape == (72, PATCH)


def test_the_marks_around_a_clip_can_be_taken_away_as_version_4_does(converted):
    text, _ = clip_text(converted / "qwen3_vl", "<|vision_start|><|video_pad|><|vision_end|>")
    assert text.startswith("a<0.2 seconds><|vision_start|>P<|vision_end|><1.2 seconds>")


@pytest.mark.parametrize(("kind", "ids"), [("qwen2_vl", None), ("qwen2_5_vl", [[0, 4, 8]])])
def test_a_clip_is_one_run_of_tokens_with_time_ids_where_seconds_count(kind, ids, converted):
    text, batch = clip_text(converted / kind)
    assert text == "a<|vision_start|>P<|vision_end|>b"
    assert batch.get("image_position_ids", torch.tensor([])).tolist() == (ids or [])
    model = AutoModelForVision2Seq.from_pretrained(converted / kind)
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


def test_frames_that_were_chosen_and_resized_go_in_as_they_are(converted):
    zoo, frames = AutoProcessor.from_pretrained(converted / "qwen2_vl"), [picture(64, 80)] * 2
    sizes = []
    for more in ({}, {"do_resize": False}):
        batch = zoo(text=["<|video_pad|>"], videos=[frames], do_sample_frames=False, return_tensors="pt", **more)
        sizes.append(batch["image_grid_thw"].tolist())
    assert sizes[1] == [[1, 16, 20]] and sizes[0] != sizes[1]


def test_the_pixels_of_a_clip_are_bounded_as_by_the_sources_video_processor(source, tmp_path):
    settings = {"size": {"shortest_edge": 128, "longest_edge": 4096}}
    (source / "video_preprocessor_config.json").write_text(json.dumps(settings))
    mrope.convert(source, tmp_path / "zoo", verify=False)
    assert AutoProcessor.from_pretrained(tmp_path / "zoo").image_processor.max_clip_pixels == 4096


def test_the_bounds_of_the_image_processor_are_the_configs(converted):
    model = AutoModelForVision2Seq.from_pretrained(converted / "qwen2_vl")
    assert (model.config.min_image_tokens, model.config.max_image_tokens) == (2, 40)


def test_files_of_version_5_hold_the_image_processor_in_the_processors(source, tmp_path):
    path = source / "preprocessor_config.json"
    (source / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
    path.unlink()
    assert mrope.convert(source, tmp_path / "zoo")["stages"][0]["equal"]


def test_pixel_bounds_are_read_under_their_old_names(source, tmp_path):
    path = source / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    del settings["size"]
    path.write_text(json.dumps({**settings, "min_pixels": 128, "max_pixels": 640}))
    mrope.convert(source, tmp_path / "zoo", verify=False)
    zoo = AutoProcessor.from_pretrained(tmp_path / "zoo")
    assert dict(zoo.image_processor.size) == {"shortest_edge": 128, "longest_edge": 640}


def test_a_chat_template_of_the_processor_wins(source, tmp_path):
    template = "{{ messages[0].content }}"
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    mrope.convert(source, tmp_path / "zoo", verify=False)
    assert AutoProcessor.from_pretrained(tmp_path / "zoo").chat_template == template


def test_a_source_without_processor_converts_as_a_model_with_a_warning(source, tmp_path, caplog):
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    report = mrope.convert(source, tmp_path / "zoo")
    assert "no tokenizer and no image processor" in caplog.text
    assert not (tmp_path / "zoo" / "processor_config.json").exists()
    assert report["passed"]


def test_substitutes_complete_a_source_without_processor(source, sources, tmp_path):
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    given = dict.fromkeys(("tokenizer", "image_processor"), sources / "qwen2_vl")
    mrope.convert(source, tmp_path / "zoo", **given)
    assert (tmp_path / "zoo" / "processor_config.json").is_file()


def test_a_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_tokens(["other", "<|image_pad|>"])
    tokenizer.save_pretrained(source)
    with pytest.raises(ConversionError, match=f"is {IMAGE + 1}, the model's image_token_id is {IMAGE}"):
        mrope.convert(source, tmp_path / "zoo")


def test_an_image_processor_of_another_kind_is_refused(source, tmp_path):
    path = source / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "SiglipImageProcessor"}))
    with pytest.raises(ConversionError, match="SiglipImageProcessor, expected a Qwen2VLImageProcessor"):
        mrope.convert(source, tmp_path / "zoo")


def test_an_image_processor_of_another_checkpoint_is_refused(source, tmp_path):
    path = source / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 16}))
    with pytest.raises(ConversionError, match=r"are \(16, 2, 2\) in the image processor and \(4, 2, 2\) in the model"):
        mrope.convert(source, tmp_path / "zoo")


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    upstream().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert mrope.convert(tmp_path / "source", tmp_path / "zoo")["passed"]
    assert {tensor.dtype for tensor in weights(tmp_path / "zoo").values()} == {torch.bfloat16}


def test_shards_are_read_and_written(sources, converted, tmp_path):
    upstream("qwen2_vl").save_pretrained(tmp_path / "source", max_shard_size="100KB")
    mrope.convert(tmp_path / "source", tmp_path / "zoo", shard_bytes=100_000, verify=False)
    assert len(list((tmp_path / "zoo").glob("model-*.safetensors"))) > 2
    ours, theirs = weights(tmp_path / "zoo"), weights(converted / "qwen2_vl")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- nothing silent --------------------------------------------------------------------------------------------------


def damage(folder, edit):
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_all_problems_are_told_at_once(source, tmp_path):
    def edit(tensors):
        del tensors["model.visual.deepstack_merger_list.1.linear_fc2.bias"]
        tensors |= {"extra": torch.ones(1), "model.visual.merger.norm.bias": torch.ones(23)}
        tensors["model.visual.merger.mlp.0.bias"] = torch.ones(96)

    damage(source, edit)
    with pytest.raises(ConversionError) as caught:
        mrope.convert(source, tmp_path / "zoo")
    assert caught.value.problems == {
        "unknown": ["extra"],
        "missing": ["model.connector.deepstack_mergers.1.linear_2.bias"],
        "duplicated": [
            "model.connector.merger.linear_1.bias from model.visual.merger.linear_fc1.bias and "
            "model.visual.merger.mlp.0.bias"
        ],
        "wrong shape": ["model.visual.merger.norm.bias is [23], expected [24]"],
    }
    assert not (tmp_path / "zoo").exists()


def test_a_merger_that_the_config_does_not_know_is_unknown(source, tmp_path):
    name = "model.visual.deepstack_merger_list.2.norm.bias"
    damage(source, lambda tensors: tensors.update({name: torch.ones(96)}))
    with pytest.raises(ConversionError) as caught:
        mrope.convert(source, tmp_path / "zoo")
    assert caught.value.problems == {"unknown": [name]}


def test_a_swapped_weight_is_reported_at_its_stage(sources, converted, tmp_path):
    for name, stage in {
        "model.vision_tower.blocks.0.mlp.linear_fc1.bias": "vision_tower",
        "model.connector.deepstack_mergers.1.norm.bias": "connector",
        "lm_head.weight": "logits",
    }.items():
        zoo = Path(shutil.copytree(converted / "qwen3_vl", tmp_path / name))
        damage(zoo, lambda tensors, name=name: tensors.update({name: tensors[name].flip(0)}))
        with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
            mrope.verify(sources / "qwen3_vl", zoo)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2_vl", {"mrope_section": [3, 3, 2]}),
        ("qwen2_vl", {"mrope_layout": "interleaved", "mrope_section": [4, 2, 2]}),
        ("qwen2_5_vl", {"positions_after_image": "extent"}),
        ("qwen3_vl", {"deepstack_text_layers": [0, 1], "deepstack_layers": [2, 1]}),
    ],
)
def test_a_config_with_another_rule_does_not_pass_the_proof(kind, fields, sources, converted, tmp_path):
    zoo = Path(shutil.copytree(converted / kind, tmp_path / "zoo"))
    edit_config(zoo, **fields)
    with pytest.raises(ConversionError, match="The two models differ from the stage"):
        mrope.verify(sources / kind, zoo)


def test_another_architecture_is_refused_by_name(tmp_path):
    LlavaConfig().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="'llava'; this script reads qwen2_vl"):
        mrope.convert(tmp_path / "source", tmp_path / "zoo")


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_converts_and_proves(sources, tmp_path, capsys):
    zoo = str(tmp_path / "zoo")
    assert mrope.main([str(sources / "qwen2_5_vl"), zoo]) == 0
    assert "greedy_text" in capsys.readouterr().out
    assert mrope.main([str(sources / "qwen2_5_vl"), zoo, "--verify"]) == 0
    assert mrope.main([str(sources / "qwen2_5_vl"), zoo]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_dry_run_shows_the_key_map_and_writes_nothing(sources, tmp_path, capsys):
    assert mrope.main([str(sources / "qwen2_vl"), str(tmp_path / "zoo"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "visual.merger.ln_q.weight -> model.connector.merger.norm.weight  float32[24]" in shown
    assert list(tmp_path.iterdir()) == []
