"""M-RoPE: positions on three axes on any decoder, DeepStack, and what follows from both for decoding."""

import copy
import itertools
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Siglip2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from vlm_zoo.models.mrope import ZooMropeConfig, ZooMropeForConditionalGeneration
from vlm_zoo.models.positions_vlm import MultiAxisRope, frequency_axes, multi_axis_positions, put_axes
from vlm_zoo.models.video_vlm import Clip
from vlm_zoo.testing import tiny_config, tiny_model, tiny_processor
from vlm_zoo.testing.tiny import TINY_NATIVE_VISION, TINY_TEXT


FAMILIES = ["llama", "qwen3", "mistral", "gemma3"]
DEEP = {"deepstack_layers": [1, 2], "deepstack_text_layers": [0, 2]}
IMAGE = 259


def text_of(family, layers=4):
    fields = {**TINY_TEXT[family], "num_hidden_layers": layers}
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"] * (layers // 2)
    return fields


def model_of(family="llama", vision="qwen3_vl", **overrides):
    """A tiny model, every parameter random enough to matter."""
    model = tiny_model("mrope", vision=vision, **{"text_config": text_of(family), **overrides})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def padded(rows, side="left"):
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels_of(grids, values=3 * 8 * 8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(grids.prod(dim=1).sum()), values, generator=generator)


def inputs_of(side="left"):
    """Two rows with images of three sizes, two of them with nothing between them."""
    grids = torch.tensor([[1, 4, 6], [1, 2, 8], [1, 6, 6]])
    first, second, third = ([IMAGE] * int(grid.prod() // 4) for grid in grids)
    rows = [[5, 6, *first, *second, 9, 10, 11], [3, *third, 12]]
    return {**padded(rows, side), "pixel_values": pixels_of(grids), "image_grid_thw": grids}


# --- positions -------------------------------------------------------------------------------------------------------

_SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
_SMALL |= {"intermediate_size": 8, "vocab_size": 16}
UPSTREAM = {
    "index": (Qwen2VLConfig, Qwen2VLModel),
    "seconds": (Qwen2_5_VLConfig, Qwen2_5_VLModel),
    "timestamps": (Qwen3VLConfig, Qwen3VLModel),
}
VISION_OF = {"index": "qwen2_vl", "seconds": "qwen2_5_vl", "timestamps": "qwen3_vl"}


@pytest.fixture(scope="module")
def rules():
    """For each way to tell time, transformers' model and the zoo's, without weights."""
    found = {}
    with torch.device("meta"):
        for time, (config_class, model_class) in UPSTREAM.items():
            config = config_class(text_config=_SMALL, vision_config={"depth": 1, "deepstack_visual_indexes": []})
            zoo = tiny_model("mrope", vision=VISION_OF[time], video_time=time)
            found[time] = model_class(config), zoo.model
    return found


def mixture(seed, time, clips=True):
    """
    Rows of text, images and clips, padded at either side.

    Returns:
        Kinds `int[B, T]` (0 text, 1 image, 2 clip), the mask, the grids in patches of all in order, which of them are
        clips, and the seconds of a step of each.
    """
    draw = torch.Generator().manual_seed(seed)

    def some(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    rows, grids = [], []
    for _ in range(some(1, 4)):
        kinds = [0] * some(1, 5)
        for _ in range(some(0, 4)):
            is_clip = clips and some(0, 1) == 1
            steps, height, width = some(2, 9) if is_clip else 1, some(1, 6), some(1, 6)
            grids.append([steps, 2 * height, 2 * width])
            frames = [1] * steps if time == "timestamps" else [steps]
            for frame in frames:
                kinds += [1 + is_clip] * (frame * height * width) + [0] * some(1, 4)
        rows.append(kinds)
    batch = padded([[kind + 1 for kind in row] for row in rows], side=("left", "right")[some(0, 1)])
    mask = batch["attention_mask"]
    grids = torch.tensor(grids, dtype=torch.long).view(-1, 3)
    seconds = torch.tensor([some(1, 6) / 2 for _ in grids])
    return (batch["input_ids"] - 1) * mask, mask, grids, grids[:, 0] > 1, seconds


def placed(rules, time, kinds, mask, grids, is_clip, seconds):
    """Positions and deltas as transformers computes them, and as the zoo does."""
    upstream, zoo = rules[time]
    vision_inputs, more = {"image_grid_thw": grids}, {}
    if time == "seconds":
        a_step = (upstream.config.vision_config.tokens_per_second * seconds)[:, None]
        steps = torch.arange(int(grids[:, 0].max()) if len(grids) else 0)
        vision_inputs["image_position_ids"] = (steps * a_step).long() * is_clip[:, None]
        more = {"second_per_grid_ts": seconds[is_clip]}
    expected = upstream.get_rope_index(
        torch.zeros_like(kinds),
        mm_token_type_ids=kinds,
        image_grid_thw=grids[~is_clip],
        video_grid_thw=grids[is_clip],
        attention_mask=mask,
        **more,
    )
    return expected, zoo.positions(kinds > 0, vision_inputs, mask)


@pytest.mark.parametrize("time", UPSTREAM)
def test_positions_are_those_of_transformers_on_mixtures_of_text_images_and_clips(rules, time):
    for seed in range(50):
        (expected, _), (found, deltas) = placed(rules, time, *(sample := mixture(seed, time)))
        assert torch.equal(found, expected), seed
        mask = sample[1]
        last = (mask * torch.arange(mask.shape[1])).argmax(dim=1, keepdim=True)
        assert torch.equal(deltas, found[0].gather(1, last) + 1 - mask.sum(dim=1, keepdim=True)), seed


@pytest.mark.parametrize("time", UPSTREAM)
def test_deltas_are_those_of_transformers_on_mixtures_of_text_and_images(rules, time):
    for seed in range(50):
        (_, expected), (_, deltas) = placed(rules, time, *mixture(seed, time, clips=False))
        assert torch.equal(deltas, expected), seed


def test_positions_of_32k_tokens_are_those_of_transformers(rules):
    grids = torch.tensor([[1, 2 * (20 + number % 9), 62] for number in range(40)] + [[90, 14, 16]])
    kinds = [0]
    for steps, height, width in grids.tolist():
        kinds += [1 + (steps > 1)] * (steps * height * width // 4) + [0]
    kinds = torch.tensor([kinds + [0] * (36_000 - len(kinds))])
    sample = kinds, torch.ones_like(kinds), grids, grids[:, 0] > 1, torch.ones(len(grids))
    (expected, _), (found, _) = placed(rules, "index", *sample)
    assert (kinds > 0).sum() > 32_000 and torch.equal(found, expected)


def slow_places(visual, grids, times, mask, rule):
    """Token by token: an image's places begin after all places before it, or after its longer side."""
    positions, deltas, image = torch.zeros(3, *visual.shape, dtype=torch.long), [], 0
    for row in range(len(visual)):
        after, inside = 0, []
        for token in mask[row].nonzero().flatten().tolist():
            if not visual[row, token]:
                positions[:, row, token] = after
                after += 1
                continue
            if not inside:
                steps, height, width = grids[image].tolist()
                inside = [
                    (after + int(times[image, step]), after + y, after + x)
                    for step in range(steps)
                    for y in range(height)
                    for x in range(width)
                ]
                end = max(map(max, inside)) + 1 if rule == "extent" else after + max(height, width)
                image += 1
            positions[:, row, token] = torch.tensor(inside.pop(0))
            if not inside:
                after = end
        deltas.append([after - int(mask[row].sum())])
    return positions, torch.tensor(deltas)


@pytest.mark.parametrize("rule", ["side", "extent"])
def test_places_after_an_image_follow_either_rule(rule):
    for seed in range(30):
        kinds, mask, grids, is_clip, seconds = mixture(seed, "seconds")
        tokens = torch.cat((grids[:, :1], grids[:, 1:] // 2), dim=1)
        times = (torch.arange(9) * 2 * seconds[:, None]).long() * is_clip[:, None]
        expected = slow_places(kinds > 0, tokens, times, mask, rule)
        found = multi_axis_positions(kinds > 0, tokens, times, mask, rule)
        assert all(map(torch.equal, found, expected)), seed


@pytest.mark.parametrize(("rule", "resumes"), [("side", 4), ("extent", 10)])
def test_text_after_a_long_clip_resumes_where_the_rule_says(rule, resumes):
    visual = torch.tensor([[False] * 2 + [True] * 32 + [False] * 2])
    positions, deltas = multi_axis_positions(visual, torch.tensor([[8, 2, 2]]), after_image=rule)
    assert positions[:, 0, -2:].tolist() == [[resumes, resumes + 1]] * 3
    assert deltas.tolist() == [[resumes + 2 - 36]]


def test_the_example_of_the_docstring():
    visual = torch.tensor([[False, False, True, True, True, True, False]])
    positions, _ = multi_axis_positions(visual, torch.tensor([[1, 2, 2]]))
    assert positions[:, 0].tolist() == [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]


def test_images_with_nothing_between_them_have_places_of_their_own():
    visual = torch.ones(1, 6, dtype=torch.bool)
    positions, deltas = multi_axis_positions(visual, torch.tensor([[1, 1, 3], [1, 3, 1]]))
    assert positions[:, 0].tolist() == [[0, 0, 0, 3, 3, 3], [0, 0, 0, 3, 4, 5], [0, 1, 2, 3, 3, 3]]
    assert deltas.tolist() == [[0]]


def test_text_alone_counts_up_without_its_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    positions, deltas = multi_axis_positions(
        torch.zeros(2, 5, dtype=torch.bool), torch.empty(0, 3, dtype=torch.long), None, mask
    )
    assert positions.tolist() == [[[0, 0, 0, 1, 2], [0, 1, 2, 3, 0]]] * 3
    assert deltas.tolist() == [[0], [0]]


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def test_frequencies_are_shared_out_as_in_qwen():
    chunked, interleaved = frequency_axes("chunked", None, 64), frequency_axes("interleaved", None, 64)
    assert chunked == [0] * 16 + [1] * 24 + [2] * 24
    assert interleaved == [0, 1, 2] * 20 + [0] * 4
    assert frequency_axes("chunked", [1, 0, 2], 3) == [0, 2, 2]
    assert frequency_axes("interleaved", [4, 2, 2], 8) == [0, 1, 2, 0, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("layout", "section", "message"),
    [
        ("chunked", [16, 24, 24], r"\[16, 24, 24\] shares out 64 rotary frequencies, the language model has 8"),
        ("interleaved", [2, 4, 2], "height and width take every third of 8 frequencies at most"),
    ],
)
def test_shares_that_do_not_fit_are_refused(layout, section, message):
    with pytest.raises(ValueError, match=message):
        frequency_axes(layout, section, 8)


DECODERS = ["llama", "qwen3", "mistral", "gemma3_text", "cohere", "glm", "gpt_neox", "olmo2", "phi3"]


def decoder(kind, layout="interleaved", section=None, **fields):
    """A decoder's own rotary embedding, and the one for three axes in its place."""
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 16, **fields}
    config = AutoConfig.for_model(
        kind, intermediate_size=8, num_key_value_heads=2, head_dim=16, pad_token_id=0, **fields
    )
    model = AutoModel.from_config(config)
    own = model.rotary_emb
    kind = {"layer_type": config.layer_types[0]} if kind == "gemma3_text" else {}
    put_axes(model, config, layout, section)
    return own, model.rotary_emb, kind


@pytest.mark.parametrize("kind", DECODERS)
def test_positions_in_the_sequence_pass_through_unchanged(kind):
    own, ours, named = decoder(kind)
    positions = torch.randint(50, (2, 7))
    assert isinstance(ours, MultiAxisRope)
    found, expected = (part(torch.zeros(1), positions, **named) for part in (ours, own))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("layout", ["chunked", "interleaved"])
@pytest.mark.parametrize("kind", DECODERS)
def test_equal_places_on_all_axes_are_places_in_the_sequence(kind, layout):
    own, ours, named = decoder(kind, layout)
    positions = torch.randint(50, (2, 7))
    found, expected = (
        ours(torch.zeros(1), positions.expand(3, -1, -1), **named),
        own(torch.zeros(1), positions, **named),
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("layout", ["chunked", "interleaved"])
@pytest.mark.parametrize("kind", DECODERS)
def test_every_frequency_takes_its_axis(kind, layout):
    own, ours, named = decoder(kind, layout)
    positions = torch.randint(50, (3, 2, 7))
    by_axis = [own(torch.zeros(1), positions[axis], **named) for axis in range(3)]
    width = by_axis[0][0].shape[-1]
    axes = frequency_axes(layout, None, width // 2)
    in_pairs = torch.equal(by_axis[0][0][..., ::2], by_axis[0][0][..., 1::2])
    assert in_pairs == (kind == "cohere")
    for number, values in enumerate(ours(torch.zeros(1), positions, **named)):
        for place in range(width):
            axis = axes[place // 2 if in_pairs else place % (width // 2)]
            assert torch.equal(values[..., place], by_axis[axis][number][..., place])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_decoder_without_rotary_positions_is_refused_with_the_way_out(family):
    with pytest.raises(ValueError, match="has no rotary_emb: choose mrope_layout 'none'"):
        model_of(text_config=TINY_TEXT[family])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_without_axes_any_decoder_reads_images_at_places_in_the_sequence(family):
    model = model_of(text_config=TINY_TEXT[family], mrope_layout="none")
    inputs = inputs_of()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


# --- language models -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", ["chunked", "interleaved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_gets_exactly_what_the_language_model_gives_it(family, layout):
    model = model_of(family, mrope_layout=layout, **DEEP)
    alone = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    text = padded([[5, 6, 7, 8, 9, 10], [3, 4, 5]])
    assert torch.equal(model(**text).logits, alone(**text).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    assert torch.equal(model.generate(**text, **options), alone.generate(**text, **options))


@pytest.mark.parametrize("layout", ["chunked", "interleaved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_trains_with_axes_and_deepstack(family, layout):
    model = model_of(family, mrope_layout=layout, **DEEP).train()
    inputs = inputs_of()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, labels=labels).loss.backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert still == []
    for part in ("connector.merger", "connector.deepstack_mergers.0", "connector.deepstack_mergers.1", "vision_tower"):
        moved = [p.grad.abs().max() for name, p in model.model.named_parameters() if name.startswith(part)]
        assert (max if part == "vision_tower" else min)(moved) > 0, part  # attention hides the bias of keys


@pytest.mark.parametrize("layout", ["chunked", "interleaved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_generates_the_same_with_and_without_a_cache(family, layout):
    model, inputs = model_of(family, mrope_layout=layout, **DEEP), inputs_of()
    options = {"max_new_tokens": 30 if family == "mistral" else 12, "do_sample": False}  # beyond its window
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)
    assert len(set(cached[:, -12:].flatten().tolist())) > 2


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_axes_and_the_layout_matter(family):
    inputs = inputs_of()
    logits = [
        model_of(family, mrope_layout=layout)(**inputs).logits[:, -1] for layout in ("none", "chunked", "interleaved")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (logits[one] - logits[other]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("vision", [*TINY_NATIVE_VISION, "clip", "siglip", "dinov2"])
def test_any_tower_reads_images_of_any_size(vision):
    model, inputs = model_of(vision=vision, deepstack_layers=[1], deepstack_text_layers=[0]), inputs_of()
    moved = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits - model(**inputs).logits
    assert moved[:, -1].abs().max() > 1e-4


@torch.no_grad()
def test_rows_give_the_logits_that_they_give_alone():
    model, inputs = model_of(**DEEP), inputs_of()
    together = model(**inputs).logits[1, -11:]
    ids, grids = inputs["input_ids"][1:, -11:], inputs["image_grid_thw"][2:]
    alone = model(input_ids=ids, pixel_values=inputs["pixel_values"][-36:], image_grid_thw=grids).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_places_that_go_back_are_not_taken_for_packed_sequences(family):
    """Without a mask, one row: attention would look for sequences that start at places which do not count up."""
    model = model_of(family, **DEEP)
    grids = torch.tensor([[3, 4, 6], [1, 2, 4]])
    ids = torch.tensor([[5, *[IMAGE] * 18, 6, 7, *[IMAGE] * 2, 8, 9]])
    images = {"pixel_values": pixels_of(grids), "image_grid_thw": grids, "use_cache": False}
    bare, masked = model(ids, **images).logits, model(ids, **images, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(bare, masked, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_attention_kernels_agree():
    model, inputs = model_of(**DEEP), inputs_of()
    seen, found = inputs["attention_mask"].bool(), {}
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        found[kernel] = model(**inputs).logits[seen]
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-5, rtol=1e-4)


# --- deepstack -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("places", [[0, 1], [0, 2], [1, 2]])
def test_deeper_features_are_added_after_the_named_layers(family, places):
    model, inputs = model_of(family, deepstack_layers=[1, 2], deepstack_text_layers=places), inputs_of()
    plain = model_of(family)
    plain.load_state_dict(model.state_dict(), strict=False)
    outputs = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    tokens, *deeper = torch.cat(outputs.pooler_output).split(model.config.text_config.hidden_size, dim=-1)
    visual = inputs["input_ids"] == IMAGE

    def add(features, layer, args, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[visual] += features
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for place, features in zip(places, deeper, strict=True):
        layer = plain.model.language_model.layers[place]
        layer.register_forward_hook(lambda *args, features=features: add(features, *args))
    outputs.pooler_output = list(tokens.split([len(image) for image in outputs.pooler_output]))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = plain(**text, mm_encoder_outputs={"image": outputs}).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_each_depth_has_its_own_merger_that_matters():
    model, inputs = model_of(**DEEP), inputs_of()
    before = model(**inputs).logits[:, -1]
    for merger in model.model.connector.deepstack_mergers:
        kept = merger.linear_2.weight.clone()
        merger.linear_2.weight.zero_()
        assert (model(**inputs).logits[:, -1] - before).abs().max() > 1e-4
        merger.linear_2.weight.copy_(kept)


def test_deeper_features_travel_in_the_channels_behind_the_tokens():
    model, inputs = model_of(**DEEP), inputs_of()
    features = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]).pooler_output
    assert [list(image.shape) for image in features] == [[6, 144], [4, 144], [9, 144]]


def test_the_language_model_cannot_be_called_without_the_features():
    model = model_of(**DEEP)
    with pytest.raises(ValueError, match=r"was called without deepstack\. Call the vision-language model"):
        model.model.language_model(torch.tensor([[5, 6]]))


# --- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model, inputs, steps):
    """Greedy decoding by hand: cache, mask and carry."""
    outputs = model(**inputs, use_cache=True)
    mask, tokens = inputs["attention_mask"], []
    for _ in range(steps):
        logits = outputs.logits[:, -1].index_fill(1, torch.tensor([IMAGE]), -torch.inf)
        tokens.append(logits.argmax(dim=-1, keepdim=True))
        mask = torch.cat((mask, torch.ones_like(tokens[-1])), dim=1)
        outputs = model(tokens[-1], attention_mask=mask, past_key_values=outputs.past_key_values, carry=outputs.carry)
    return torch.cat(tokens, dim=1)


def test_a_loop_of_ones_own_decodes_what_generate_does():
    model, inputs = model_of(**DEEP), inputs_of()
    expected = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(decode(model, inputs, 8), expected[:, -8:])


def test_a_loop_without_a_mask_decodes_the_same():
    model, grids = model_of(**DEEP), torch.tensor([[1, 4, 6]])
    ids = torch.tensor([[5, *[IMAGE] * 6, 6, 7]])
    images = {"pixel_values": pixels_of(grids), "image_grid_thw": grids}
    with torch.no_grad():
        prefill = model(ids, **images, use_cache=True)
        later = model(torch.tensor([[8, 9]]), past_key_values=prefill.past_key_values, carry=prefill.carry).logits
        whole = model(torch.cat((ids, torch.tensor([[8, 9]])), dim=1), **images).logits[:, -2:]
    assert prefill.carry.tolist() == [[-3]]
    torch.testing.assert_close(later, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_conversations_in_turns_do_not_disturb_each_other():
    model, inputs = model_of(**DEEP), inputs_of()
    grids = torch.tensor([[1, 8, 8]])
    ids = torch.tensor([[5, *[IMAGE] * 16, 6, 7]])
    other = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels_of(grids)}
    other["image_grid_thw"] = grids
    apart = [model.generate(**own, max_new_tokens=6, do_sample=False, eos_token_id=None) for own in (inputs, other)]
    states = [model(**own, use_cache=True) for own in (inputs, other)]
    masks, found = [own["attention_mask"] for own in (inputs, other)], [[], []]
    for _ in range(6):
        for turn in (0, 1):
            logits = states[turn].logits[:, -1].index_fill(1, torch.tensor([IMAGE]), -torch.inf)
            token = logits.argmax(dim=-1, keepdim=True)
            found[turn].append(token)
            masks[turn] = torch.cat((masks[turn], torch.ones_like(token)), dim=1)
            states[turn] = model(
                token,
                attention_mask=masks[turn],
                past_key_values=states[turn].past_key_values,
                carry=states[turn].carry,
            )
    for turn in (0, 1):
        assert torch.equal(torch.cat(found[turn], dim=1), apart[turn][:, -6:])


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 5}, {"use_cache": False}],
    ids=["static cache", "chunks", "no cache"],
)
def test_generation_in_other_ways_gives_the_same_text(options):
    model, inputs = model_of(**DEEP), inputs_of()
    plain = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **plain, **options), model.generate(**inputs, **plain))


def turns():
    """Two turns of two rows, each with images, the first padded: what each holds, and both as one."""
    grids = torch.tensor([[1, 4, 6], [1, 2, 8], [1, 6, 6], [1, 4, 4]])
    sizes = (grids.prod(dim=1) // 4).tolist()
    images = [[IMAGE] * size for size in sizes]
    first = padded([[5, *images[0], 6, 7], [3, 4, *images[1], 8]])
    second = padded([[9, *images[2], 10, 11], [12, 13, *images[3], *[14] * 6]])
    pixels = pixels_of(grids).split(grids.prod(dim=1).tolist())
    for turn, own in ((first, [0, 1]), (second, [2, 3])):
        turn |= {"pixel_values": torch.cat([pixels[image] for image in own]), "image_grid_thw": grids[own]}
    whole = {name: torch.cat((first[name], second[name]), dim=1) for name in ("input_ids", "attention_mask")}
    order = [0, 2, 1, 3]  # row by row
    whole |= {"pixel_values": torch.cat([pixels[image] for image in order]), "image_grid_thw": grids[order]}
    return first, second, whole


@torch.no_grad()
def test_images_behind_a_cache_have_their_places_behind_it():
    model, (first, second, whole) = model_of(**DEEP), turns()
    prefill = model(**first, use_cache=True)
    behind = {"past_key_values": prefill.past_key_values, "carry": prefill.carry}
    outputs = model(**{**second, "attention_mask": whole["attention_mask"]}, **behind)
    expected = model(**whole, use_cache=True)
    length = second["input_ids"].shape[1]
    seen = second["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[seen], expected.logits[:, -length:][seen], atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.carry, expected.carry)


@torch.no_grad()
def test_generation_goes_on_from_a_cache_with_a_new_image():
    model, (first, second, whole) = model_of(**DEEP), turns()
    prefill = model(**first, use_cache=True)
    behind = {"past_key_values": prefill.past_key_values, "carry": prefill.carry}
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    images = {name: second[name] for name in ("pixel_values", "image_grid_thw")}
    options = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(**text, **images, **behind, **options)
    assert torch.equal(found, model.generate(**whole, **options))


def test_beams_of_a_batch_are_those_of_its_rows():
    model, inputs = model_of(**DEEP), inputs_of()
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(**inputs, **options)
    row = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    alone = model.generate(
        **row, pixel_values=inputs["pixel_values"][:40], image_grid_thw=inputs["image_grid_thw"][:2], **options
    )
    assert torch.equal(together[:2, : alone.shape[1]], alone)


def test_generation_goes_on_from_a_cache():
    model, grids = model_of(**DEEP), torch.tensor([[1, 4, 6]])
    ids = torch.tensor([[5, *[IMAGE] * 6, 6, 7]])
    images = {"pixel_values": pixels_of(grids), "image_grid_thw": grids}
    options = {"do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **images, max_new_tokens=8, **options)
    first = model.generate(ids, **images, max_new_tokens=4, return_dict_in_generate=True, **options)
    carry = torch.tensor([[-3]])
    again = model.generate(
        first.sequences, past_key_values=first.past_key_values, carry=carry, max_new_tokens=4, **options
    )
    assert torch.equal(again, expected)


@torch.no_grad()
def test_encoded_images_serve_for_their_pixels():
    model, inputs = model_of(**DEEP), inputs_of()
    encoded = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**text, mm_encoder_outputs={"image": encoded}).logits, model(**inputs).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**text, mm_encoder_outputs={"image": encoded}, **options)
    assert torch.equal(found, model.generate(**inputs, **options))


def test_encoded_images_without_their_grids_are_refused():
    model, inputs = model_of(), inputs_of()
    encoded = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    encoded = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for call in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match="came without image_grid_thw, so their tokens have no place"):
            call(**text, mm_encoder_outputs={"image": encoded})


@torch.no_grad()
def test_a_prompt_that_ends_with_an_image_goes_on_behind_its_longer_side():
    model, grids = model_of(), torch.tensor([[1, 4, 12], [1, 8, 4]])
    images = [[IMAGE] * int(grid.prod() // 4) for grid in grids]
    inputs = {**padded([[5, 6, *images[0]], [7, *images[1]]]), "pixel_values": pixels_of(grids)}
    inputs["image_grid_thw"] = grids
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for use_cache in (True, False):
        found = model.generate(**inputs, **options, use_cache=use_cache)
        new = found.sequences.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
        whole = model(**{**inputs, "input_ids": found.sequences, "attention_mask": mask}).logits
        torch.testing.assert_close(torch.stack(found.logits, 1), whole[:, -new - 1 : -1], rtol=0, atol=1e-5)


def test_places_of_one_axis_beside_images_are_refused():
    inputs = inputs_of()
    places = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    with pytest.raises(ValueError, match=r"position_ids are \[2, 15\], expected \[3, B, T\] beside images"):
        model_of()(**inputs, position_ids=places)


@pytest.mark.parametrize(
    ("video_time", "times", "message"),
    [
        ("seconds", None, "A clip of 3 time steps came without image_position_ids"),
        ("seconds", torch.tensor([[0, 4]]), r"torch.int64 \[1, 2\], expected integers \[1, at least 3\]"),
        ("seconds", torch.tensor([0, 4, 8]), r"\[3\], expected integers \[1, at least 3\]"),
        ("seconds", torch.tensor([[0, 4, 8]] * 2), r"\[2, 3\], expected integers \[1, at least 3\]"),
        ("seconds", torch.tensor([[0.0, 4.0, 8.0]]), "torch.float32"),
        ("seconds", torch.tensor([[0, -4, 8]]), "none below 0"),
        ("timestamps", torch.tensor([[0, 4, 8]]), "video_time is 'timestamps'"),
    ],
)
def test_time_ids_that_do_not_fit_the_clips_are_refused(video_time, times, message):
    grids = torch.tensor([[3, 4, 4]])
    with pytest.raises(ValueError, match=message):
        model_of(video_time=video_time).get_image_features(
            pixels_of(grids), image_grid_thw=grids, image_position_ids=times
        )


def test_time_ids_are_rounded_as_upstream_rounds_them():
    processor = tiny_processor("mrope", tiny_model("mrope", vision="qwen3_vl", video_time="seconds").config)
    for count, fps, rate in itertools.product((900, 311), (1.0, 3.7, 24 / 31), (2, 4, 25)):
        processor.tokens_per_second = rate
        clip = Clip([None] * count, list(range(count)), fps)
        interval = rate * torch.tensor(2 / fps)
        assert processor.time_ids(clip, count // 2) == (torch.arange(count // 2) * interval).long().tolist()


def test_a_video_is_sampled_and_timed_as_qwen3_vl_does_it():
    processor = tiny_processor("mrope", tiny_model("mrope", vision="qwen3_vl").config)
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in range(35)]
    batch = processor(text=["<video>"], videos=[frames], video_metadata={"fps": 10})
    indices = Qwen3VLVideoProcessor.sample_frames(
        SimpleNamespace(fps=2, num_frames=None, min_frames=4, max_frames=768),
        VideoMetadata(total_num_frames=35, fps=10),
    )
    times = Qwen3VLProcessor._calculate_timestamps(None, indices, 10)
    text = processor.decode(batch["input_ids"][0])
    assert [float(time) for time in re.findall(r"<([0-9.]+) seconds>", text)] == [round(time, 1) for time in times]


def test_a_word_before_a_timestamp_joins_it_as_in_the_expanded_text():
    config = tiny_model("mrope", vision="qwen3_vl").config
    backend = Tokenizer(models.BPE({"Ġ": 0, "<": 1, "Ġ<": 2, "</s>": 3}, merges=[("Ġ", "<")], unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    named = {"extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", **named)
    processor = tiny_processor("mrope", config)
    processor = type(processor)(processor.image_processor, tokenizer)
    given = {"text": ["a <video> b"], "videos": [[Image.new("RGB", (32, 32))] * 4]}
    fast, expanded = processor(**given), processor(**given, truncation=True, max_length=10_000)
    assert 2 in fast["input_ids"][0] and fast["input_ids"] == expanded["input_ids"]


@torch.no_grad()
def test_embeddings_serve_for_ids():
    model, inputs = model_of(**DEEP), inputs_of()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, model(**inputs).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(inputs_embeds=embeds, **rest, **options)
    assert torch.equal(found[:, -5:], model.generate(**inputs, **options)[:, -5:])


@torch.no_grad()
def test_places_can_be_given():
    model, inputs = model_of(**DEEP), inputs_of()
    places, _ = model.model.positions(
        inputs["input_ids"] == IMAGE, {"image_grid_thw": inputs["image_grid_thw"]}, inputs["attention_mask"]
    )
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, position_ids=places).logits, expected)
    assert not torch.equal(model(**inputs, position_ids=places + places.flip(0)).logits, expected)


# --- clips -----------------------------------------------------------------------------------------------------------


def clip_inputs(separate):
    """A clip of three steps and an image, with text between the steps where they are told by text."""
    grids = torch.tensor([[3, 4, 6], [1, 2, 2]])
    steps = [token for step in range(3) for token in (*[IMAGE] * 6, *[20 + step][: int(separate)])]
    ids = torch.tensor([[5, *steps, 6, IMAGE, 7]])
    return {"input_ids": ids, "pixel_values": pixels_of(grids), "image_grid_thw": grids}


def places_of(time, **more):
    inputs = {**clip_inputs(time == "timestamps"), **more}
    model = model_of(video_time=time)
    seen = {}
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs, states=args), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen["position_ids"] if "position_ids" in seen else seen["states"][1]


def test_frames_that_are_told_by_text_are_images_of_their_own():
    times = places_of("timestamps")[0, 0].tolist()
    assert times == [0, *[1] * 6, 4, *[5] * 6, 8, *[9] * 6, 12, 13, 14, 15]


def test_frames_are_counted_on_the_axis_of_time():
    times = places_of("index")[0, 0].tolist()
    assert times == [0, *[1] * 6, *[2] * 6, *[3] * 6, 4, 5, 6]


def test_time_ids_stand_on_the_axis_of_time():
    ids = torch.tensor([[0, 4, 8], [0, 0, 0]])
    times = places_of("seconds", image_position_ids=ids)[0, 0].tolist()
    assert times == [0, *[1] * 6, *[5] * 6, *[9] * 6, 4, 5, 6]


@pytest.mark.parametrize("time", ["timestamps", "seconds", "index"])
def test_clips_generate_the_same_with_and_without_a_cache(time):
    model, inputs = model_of(video_time=time, **DEEP), clip_inputs(time == "timestamps")
    if time == "seconds":
        inputs["image_position_ids"] = torch.tensor([[0, 4, 8], [0, 0, 0]])
    options = {"max_new_tokens": 8, "do_sample": False}
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_the_config_of_a_whole_model_is_no_towers():
    with pytest.raises(StrictDataclassError, match="of type 'siglip2', a whole model's; expected the vision_config"):
        ZooMropeConfig(vision_config=Siglip2Config(), text_config=text_of("llama"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_image_tokens": 0}, "Expected 1 <= min_image_tokens <= max_image_tokens <= max_clip_tokens, got 0"),
        ({"max_image_tokens": 3}, "got 4, 3 and 16384"),
        ({"image_size": [30, 32]}, "image_size is .30, 32., expected"),
        ({"image_size": [32]}, "image_size is .32., expected"),
        ({"max_clip_tokens": 100}, "got 4, 1280 and 100"),
        ({"vision_feature_select_strategy": "full"}, "must be 'default': prefix tokens have no place"),
        ({"tokens_per_second": 0.0}, "tokens_per_second must be above 0, got 0.0"),
        ({"spatial_merge_size": 3}, "spatial_merge_size is 3, the tower orders its patches by squares of 2"),
        ({"mrope_section": [4, 4]}, r"mrope_section is \[4, 4\], expected three numbers"),
        ({"mrope_section": [8, -1, -1]}, "expected three numbers"),
        ({"deepstack_layers": [3]}, "deepstack_layers holds 3, the tower's hidden states are 0 to 2"),
        ({"deepstack_layers": [-1]}, "deepstack_layers holds -1"),
        ({"deepstack_layers": [1], "deepstack_text_layers": [0, 1]}, r"expected 1 ascending numbers of layers"),
        ({"deepstack_layers": [0, 1], "deepstack_text_layers": [1, 0]}, r"expected 2 ascending numbers of layers"),
        ({"deepstack_layers": [0, 1], "deepstack_text_layers": [1, 1]}, r"expected 2 ascending numbers of layers"),
        ({"deepstack_layers": [1], "deepstack_text_layers": [-1]}, r"expected 1 ascending numbers of layers"),
        ({"deepstack_text_layers": [0]}, r"expected 0 ascending numbers of layers"),
        ({"deepstack_layers": [1], "deepstack_text_layers": [3]}, "which has 4 .0 to 3. and must go on .* place is 2"),
        ({"deepstack_layers": [0, 1, 2, 2]}, "added after layer 3 of the language model"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ZooMropeConfig(vision_config=TINY_NATIVE_VISION["qwen3_vl"], text_config=text_of("llama"), **fields)


@pytest.mark.parametrize("field", ["mrope_layout", "video_time", "positions_after_image", "merger_norm"])
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(field):
    with pytest.raises(StrictDataclassError, match=rf"'{field}' expected one of .*, got other"):
        ZooMropeConfig(**{field: "other"})


def test_shares_that_do_not_fit_the_language_model_are_refused():
    with pytest.raises(ValueError, match=r"\[16, 24, 24\] shares out 64 rotary frequencies, the language model has 6"):
        model_of(mrope_section=[16, 24, 24])


def test_images_without_grids_are_refused():
    model, inputs = model_of(), inputs_of()
    with pytest.raises(ValueError, match=r"pixel_values \[76, 192\] came without image_grid_thw"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


def test_pictures_of_another_processor_are_refused():
    model, inputs = model_of(), inputs_of()
    with pytest.raises(ValueError, match="pixel_values has shape"):
        model(**{**inputs, "pixel_values": torch.zeros(3, 3, 32, 32)})


def test_rows_that_do_not_fit_their_images_are_refused():
    model, inputs = model_of(), inputs_of()
    ids = inputs["input_ids"].clone()
    ids[1, -2] = 5
    with pytest.raises(ValueError, match="tokens: 18, features: 19"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match="tokens: 18, features: 19"):
        model.generate(**{**inputs, "input_ids": ids}, max_new_tokens=2)


def test_a_mask_that_shows_no_padding_is_refused():
    model, inputs = model_of(), inputs_of()
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"attention_mask int\[B, T\] shows no padding"):
        model(**{**inputs, "attention_mask": torch.ones(2, 1, length, length)})


# --- saving ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_opens_again(tmp_path):
    model, inputs = model_of("gemma3", mrope_layout="chunked", mrope_section=[2, 2, 2], **DEEP), inputs_of()
    model.save_pretrained(tmp_path)
    again = ZooMropeForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name in ("mrope_layout", "mrope_section", "deepstack_layers", "deepstack_text_layers"):
        assert getattr(again.config, name) == getattr(model.config, name)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_one_image_size_gives_every_image_the_same_tokens():
    config = tiny_config("zoo_mrope", vision="siglip", spatial_merge_size=1, image_size=[32, 48])
    processor = tiny_processor("zoo_mrope", config)
    patch = config.vision_config.patch_size
    expected = 32 // patch * 48 // patch
    assert [processor.num_image_tokens(*size) for size in ((10, 300), (500, 80))] == [expected] * 2
