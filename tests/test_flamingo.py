"""What the Flamingo papers say: the resampler, who sees which image, gates, and decoding with images held once."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset, Features, Value
from datasets import Image as Picture
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from vlm_zoo.models import flamingo, modeling_vlm
from vlm_zoo.models.flamingo import (
    FlamingoBlock,
    FlamingoFusion,
    PerceiverLayer,
    ZooFlamingoConfig,
    ZooFlamingoProcessor,
    media_mask,
)
from vlm_zoo.testing import TINY_TEXT, TINY_VISION, tiny_config, tiny_model, tiny_processor
from vlm_zoo.testing.promises import Subject
from vlm_zoo.training import ZooDataCollator, lora_targets


QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
SIZES = {"num_latents": 9, "resampler_depth": 1, "cross_attention_interval": 1, "gate_init": 0.0}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def fresh(**fields) -> PreTrainedModel:
    """A model as it is built, its gates closed."""
    torch.manual_seed(0)
    return tiny_model("flamingo", **{**SIZES, **fields})


def subject_of(**fields) -> Subject:
    """A model with open gates."""
    model = fresh(**fields)
    return Subject(model, tiny_processor("flamingo", model.config), tolerance=1e-5)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of()


@pytest.fixture(scope="module", params=[True, False], ids=["immediate", "all"])
def either(request) -> Subject:
    """Tokens that see the last image, and tokens that see all images."""
    return subject_of(only_immediate_media=request.param)


def language_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The wrapped language model on its own."""
    alone = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    alone.base_model.load_state_dict(model.model.language_model.state_dict())
    alone.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    return alone


def logits_without_images(model: PreTrainedModel, batch) -> torch.Tensor:
    with torch.no_grad():
        return language_model_of(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def perturb(module: nn.Module) -> nn.Module:
    """Moves every parameter away from where initialisation put it, norms and gates among them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def placeholders(subject: Subject, batch) -> torch.Tensor:
    return batch["input_ids"] == subject.image_token_id


def clip_batch(subject: Subject, clips: list[list]):
    """One row for each clip."""
    texts = [f"look {subject.image_token} what is it?" for _ in clips]
    return subject.processor(text=texts, images=[[clip] for clip in clips], padding=True, return_tensors="pt")


def counted(monkeypatch, owner: type, name: str) -> list:
    """Counts the calls of a method."""
    calls, method = [], getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(1)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


# --- resampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_latents_look_at_features_and_at_themselves(attention, qk_norm):
    config = tiny_config("flamingo", resampler_num_heads=2, resampler_head_dim=12, resampler_qk_norm=qk_norm)
    config._attn_implementation = attention
    layer = perturb(PerceiverLayer(config))
    latents, media = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    own = F.layer_norm(latents, (32,), layer.latents_norm.weight, layer.latents_norm.bias)
    seen = torch.cat((F.layer_norm(media, (32,), layer.media_norm.weight, layer.media_norm.bias), own), dim=1)
    heads = []
    for head in (slice(0, 12), slice(12, 24)):
        query, key = own @ layer.query.weight[head].T, seen @ layer.key.weight[head].T
        if qk_norm:
            query = F.layer_norm(query, (12,), layer.query_norm.weight, layer.query_norm.bias)
            key = F.layer_norm(key, (12,), layer.key_norm.weight, layer.key_norm.bias)
        weights = (query @ key.transpose(1, 2) / 12**0.5).softmax(dim=-1)
        assert weights.shape == (2, 9, 5 + 9)
        heads.append(weights @ (seen @ layer.value.weight[head].T))
    states = latents + torch.cat(heads, dim=-1) @ layer.output.weight.T
    normed = F.layer_norm(states, (32,), layer.feed_forward_norm.weight, layer.feed_forward_norm.bias)
    expected = states + F.gelu(normed @ layer.feed_forward_in.weight.T) @ layer.feed_forward_out.weight.T
    torch.testing.assert_close(layer(latents, media, None), expected, atol=1e-5, rtol=1e-5)


def test_an_image_becomes_as_many_latents_as_asked_whatever_its_frames(subject):
    features = subject.model.get_image_features(
        torch.randn(4, 3, 32, 32), image_grid_thw=torch.tensor([[3, 1, 1], [1, 1, 1]])
    ).pooler_output
    assert [feature.shape for feature in features] == [(9, 32), (9, 32)]


def test_latents_start_apart(subject):
    latents = subject.model.model.connector.latents
    assert (torch.cdist(latents, latents) + 100 * torch.eye(9)).min() > 1


def test_a_clip_of_one_frame_is_an_image(subject):
    pixels = torch.randn(2, 3, 32, 32)
    images = subject.model.get_image_features(pixels).pooler_output
    clips = subject.model.get_image_features(pixels, image_grid_thw=torch.ones(2, 3, dtype=torch.long)).pooler_output
    assert torch.equal(torch.stack(images), torch.stack(clips))


@pytest.mark.parametrize("embeddings", [8, 0])
def test_the_order_of_frames_counts_where_they_have_embeddings(embeddings):
    model = fresh(num_frame_embeddings=embeddings)
    pixels, grid = torch.randn(3, 3, 32, 32), torch.tensor([[3, 1, 1]])
    forwards, backwards = (
        model.get_image_features(frames, image_grid_thw=grid).pooler_output[0] for frames in (pixels, pixels.flip(0))
    )
    difference = (forwards - backwards).abs().max()
    assert difference > 1e-3 if embeddings else difference < 1e-5


def test_all_patches_of_a_frame_get_its_embedding(subject):
    connector = subject.model.model.connector
    assert torch.equal(connector.time([2, 1, 3]), connector.frame_embeddings[[0, 1, 0, 0, 1, 2]])


def test_more_frames_than_embeddings_get_interpolated_ones():
    connector = fresh(num_frame_embeddings=3).model.connector
    one, two, three = connector.frame_embeddings
    expected = torch.stack([one, (one + two) / 2, two, (two + three) / 2, three])
    torch.testing.assert_close(connector.time([5]), expected)
    assert torch.equal(connector.time([3]), connector.frame_embeddings)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_clips_of_different_lengths_equal_each_alone(attention):
    model = fresh(num_frame_embeddings=2)
    model.set_attn_implementation(attention)
    frames = [2, 1, 3]
    pixels = torch.randn(6, 3, 32, 32)
    together = model.get_image_features(pixels, image_grid_thw=torch.tensor([[n, 1, 1] for n in frames]))
    for found, clip in zip(together.pooler_output, pixels.split(frames), strict=True):
        alone = model.get_image_features(clip, image_grid_thw=torch.tensor([[len(clip), 1, 1]])).pooler_output[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_without_a_resampler_the_features_of_the_tower_are_seen():
    model = fresh(resampler_depth=0, num_frame_embeddings=0)
    assert not list(model.model.connector.parameters())
    pixels = torch.randn(2, 3, 32, 32)
    features = model.get_image_features(pixels).pooler_output
    assert torch.equal(torch.stack(features), model.model.see(pixels)[1])


def test_a_model_without_a_resampler_answers_about_its_images():
    subject = subject_of(resampler_depth=0, num_frame_embeddings=0)
    rows = [subject.ragged[0], {**subject.ragged[0], "images": [subject.image(9)]}]
    logits = subject.logits(subject.batch(rows))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-4


def test_a_model_without_a_resampler_takes_no_clips():
    with pytest.raises(ValueError, match="images, not clips"):
        fresh(resampler_depth=0).get_image_features(
            torch.zeros(2, 3, 32, 32), image_grid_thw=torch.tensor([[2, 1, 1]])
        )


@pytest.mark.parametrize("vision", TINY_VISION)
def test_every_tower_is_looked_at(vision):
    subject = subject_of(vision=vision, vision_feature_layer=[1, 2])
    assert subject.model.model.fusion.blocks[0].media.key.in_features == 64
    rows = [subject.ragged[0], {**subject.ragged[0], "images": [subject.image(9)]}]
    logits = subject.logits(subject.batch(rows))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-4


# --- a fresh model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", TINY_TEXT)
def test_a_fresh_model_computes_exactly_what_its_language_model_computes(text, attention):
    model = fresh(text=text)
    model.set_attn_implementation(attention)
    processor = tiny_processor("flamingo", model.config)
    subject = Subject(model, processor, tolerance=0)
    subject.model = model  # as it is, gates closed
    batch = subject.batch(subject.ragged)
    alone = language_model_of(model)
    alone.set_attn_implementation(attention)
    with torch.no_grad():
        expected = alone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert batch["input_ids"].shape[1] > 3 * TINY_TEXT["gemma3"]["sliding_window"]
    assert torch.equal(subject.logits(batch), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"feed_forward_without_media": True},
        {"only_immediate_media": False},
        {"gate_type": "vector", "gated_feed_forward": True, "feed_forward_act": "silu"},
        {"cross_attention_norm": "rms_norm", "cross_attention_qk_norm": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_no_option_opens_the_gates_of_a_fresh_model(fields):
    model = fresh(**fields)
    subject = Subject(model, tiny_processor("flamingo", model.config), tolerance=0)
    subject.model = model
    batch = subject.batch(subject.ragged)
    assert torch.equal(subject.logits(batch), logits_without_images(model, batch))


@pytest.mark.parametrize("text", TINY_TEXT)
def test_open_gates_let_the_image_through_in_every_decoder(text):
    subject = subject_of(text=text)
    rows = [subject.ragged[0], {**subject.ragged[0], "images": [subject.image(9)]}]
    logits = subject.logits(subject.batch(rows))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cross_attention_norm": "rms_norm", "cross_attention_norm_eps": 1e-2},
        {"cross_attention_qk_norm": True},
        {"cross_attention_norm": "rms_norm", "cross_attention_qk_norm": True},
        {"gated_feed_forward": True, "feed_forward_act": "silu", "feed_forward_size": 40},
    ],
    ids=str,
)
def test_a_block_is_what_the_paper_says(fields):
    config = tiny_config("flamingo", cross_attention_num_heads=2, cross_attention_head_dim=12, **fields)
    block = perturb(FlamingoBlock(config))
    with torch.no_grad():
        block.attention_gate.fill_(0.7)
        block.feed_forward_gate.fill_(-0.4)

    def normed(states: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        if config.cross_attention_norm == "rms_norm":
            scale = (states.square().mean(dim=-1, keepdim=True) + config.cross_attention_norm_eps).rsqrt()
            return states * scale * norm.weight
        return F.layer_norm(states, states.shape[-1:], norm.weight, norm.bias, config.cross_attention_norm_eps)

    states, media = torch.randn(1, 3, 48), torch.randn(1, 4, 32)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    sees = torch.tensor([True, True, False])[None, :, None]
    heads = []
    for head in (slice(0, 12), slice(12, 24)):
        query = normed(states, block.attention_norm) @ block.query.weight[head].T
        key = media @ block.media.key.weight[head].T
        if config.cross_attention_qk_norm:
            query, key = normed(query, block.query_norm), normed(key, block.media.key_norm)
        weights = (query @ key.transpose(1, 2) / 12**0.5).masked_fill(~mask, -torch.inf).softmax(dim=-1)
        heads.append(weights @ (media @ block.media.value.weight[head].T))
    attended = states + np.tanh(0.7) * (torch.cat(heads, dim=-1) @ block.output.weight.T)
    inner = normed(attended, block.feed_forward_norm)
    if config.gated_feed_forward:
        inner = F.silu(inner @ block.feed_forward_gate_in.weight.T) * (inner @ block.feed_forward_in.weight.T)
        assert inner.shape[-1] == 40
    else:
        inner = F.gelu(inner @ block.feed_forward_in.weight.T)
    expected = attended + np.tanh(-0.4) * (inner @ block.feed_forward_out.weight.T)
    found = block(states, *block.media(media), mask[None, None], sees)
    torch.testing.assert_close(found[:, :2], expected[:, :2], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[:, 2], states[:, 2])


def test_vector_gates_open_channel_by_channel():
    block = FlamingoBlock(tiny_config("flamingo", gate_type="vector"))
    with torch.no_grad():
        block.attention_gate.zero_()[7] = 1.0
        block.feed_forward_gate.zero_()
    states, media = torch.randn(1, 2, 48), torch.randn(1, 4, 32)
    found = block(states, *block.media(media), None, torch.ones(1, 2, 1, dtype=torch.bool))
    assert ((found - states).abs().amax(dim=(0, 1)) > 0).nonzero().flatten().tolist() == [7]


def test_gates_start_where_the_config_says():
    model = fresh(gate_init=0.25)
    for block in model.model.fusion.blocks:
        assert block.attention_gate.item() == block.feed_forward_gate.item() == 0.25


@pytest.mark.parametrize(
    ("depth", "fields", "expected"),
    [
        (8, {"cross_attention_interval": 1}, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, {"cross_attention_interval": 4}, [3, 7]),
        (7, {"cross_attention_interval": 4}, [3]),
        (2, {"cross_attention_interval": 4}, [1]),
        (8, {"cross_attention_layers": [0, 5]}, [0, 5]),
    ],
)
def test_blocks_stand_before_every_nth_layer(depth, fields, expected):
    text = {**TINY_TEXT["llama"], "num_hidden_layers": depth}
    assert tiny_config("flamingo", text_config=text, **fields).gated_layers == expected


def test_a_block_runs_before_its_layer_and_before_no_other():
    subject = subject_of(cross_attention_layers=[1])
    batch = subject.batch(subject.ragged[:1])
    with torch.no_grad():
        entering = subject.model(**batch, output_hidden_states=True).hidden_states[1]
        alone = language_model_of(subject.model)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        media = subject.model.model.fusion.look_at(
            torch.stack(subject.model.get_image_features(batch["pixel_values"]).pooler_output)
        )
        sees = placeholders(subject, batch).cumsum(dim=1)[:, :, None] > 0
        fused = subject.model.model.fusion.blocks[0](entering, media[0][0], media[1][0], None, sees)
        layer = language_model_of(subject.model).base_model.layers[1]
        rotary = language_model_of(subject.model).base_model.rotary_emb
        positions = torch.arange(entering.shape[1])[None]
        expected = layer(fused, position_embeddings=rotary(fused, positions), position_ids=positions)
        found = subject.model.model(**batch).last_hidden_state
    assert torch.equal(entering, alone.hidden_states[1])
    torch.testing.assert_close(found, subject.model.model.language_model.norm(expected), atol=1e-5, rtol=1e-5)


# --- who sees which image --------------------------------------------------------------------------------------------


def table(time: list[list[int]], order: list[list[int]], only_immediate: bool) -> list:
    return media_mask(torch.tensor(time), torch.tensor(order), only_immediate).int().tolist()


def test_a_token_sees_the_immediately_preceding_image():
    # text, image, text, image, text
    cells = [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    assert table([[0, 1, 1, 2, 2]], [[1, 2]], only_immediate=True) == [cells]


def test_a_token_sees_all_preceding_images_when_asked():
    cells = [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
    assert table([[0, 1, 1, 2, 2]], [[1, 2]], only_immediate=False) == [cells]


def test_of_adjacent_images_text_sees_the_last():
    # image, image, text
    assert table([[1, 2, 2]], [[1, 2]], only_immediate=True) == [[[1, 0], [0, 1], [0, 1]]]
    assert table([[1, 2, 2]], [[1, 2]], only_immediate=False) == [[[1, 0], [1, 1], [1, 1]]]


def test_slots_that_pad_a_row_are_never_seen():
    # image and text; only text; padding, image, image
    time, order = [[1, 1, 1], [0, 0, 0], [0, 1, 2]], [[1, 0], [0, 0], [1, 2]]
    nothing = [[0, 0], [0, 0], [0, 0]]
    assert table(time, order, only_immediate=True) == [
        [[1, 0], [1, 0], [1, 0]],
        nothing,
        [[0, 0], [1, 0], [0, 1]],
    ]
    assert table(time, order, only_immediate=False) == [
        [[1, 0], [1, 0], [1, 0]],
        nothing,
        [[0, 0], [1, 0], [1, 1]],
    ]


def test_on_decode_a_token_sees_the_image_that_was_kept():
    # the third image of a row that has had three, none of a row that has had none
    assert table([[3], [0]], [[3], [0]], only_immediate=True) == [[[1]], [[0]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_a_batch_is_that_of_its_rows(either, side, monkeypatch):
    steps, forward = [], FlamingoFusion.forward

    def record(self, position, states, media):
        steps.append(media)
        return forward(self, position, states, media)

    monkeypatch.setattr(FlamingoFusion, "forward", record)
    batch = either.batch(either.ragged, side)
    either.logits(batch)
    ids, latents = batch["input_ids"].tolist(), either.model.config.num_latents
    expected, sees = [], []
    for row in ids:
        so_far, cells = 0, []
        for token in row:
            so_far += token == either.image_token_id
            first = max(so_far - 1, 0) if either.model.config.only_immediate_media else 0
            cells.append([first <= image < so_far for image in range(2)])
        sees.append([any(cell) for cell in cells])
        # a token that sees nothing looks at everything, and what it finds is thrown away
        expected.append([cell if any(cell) else [True, True] for cell in cells])
    expected = torch.tensor(expected).repeat_interleave(latents, dim=-1)[:, None]
    assert len(steps) == 2 and all(torch.equal(step.mask, expected) for step in steps)
    assert torch.equal(steps[0].sees[:, :, 0], torch.tensor(sees))


def states_after_the_first_block(subject: Subject, rows: list[dict]) -> torch.Tensor:
    """`float[B, T, Dt]`, what enters the first layer: here a token knows of images what its block showed it."""
    found = []
    handle = subject.model.model.fusion.blocks[0].register_forward_hook(lambda *args: found.append(args[-1]))
    subject.logits(subject.batch(rows))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("changed", [0, 1])
def test_text_sees_only_the_preceding_image(either, changed):
    images = [either.image(2), either.image(3)]
    row = {"text": "a <image> b <image> c", "images": images}
    other = {**row, "images": [either.image(9) if index == changed else image for index, image in enumerate(images)]}
    states = states_after_the_first_block(either, [row, other])
    moved = (states[0] - states[1]).abs().amax(dim=-1) > 1e-6
    first, second = placeholders(either, either.batch([row]))[0].nonzero().flatten().tolist()
    expected = torch.zeros_like(moved)
    if changed == 1:
        expected[second:] = True
    else:
        expected[first : second if either.model.config.only_immediate_media else None] = True
    assert moved.tolist() == expected.tolist()


@pytest.mark.parametrize("text", TINY_TEXT)
def test_tokens_before_any_image_get_exactly_what_the_language_model_gives_them(text):
    subject = subject_of(text=text)
    batch = subject.batch(subject.ragged)
    blind = (placeholders(subject, batch).cumsum(dim=1) == 0) & batch["attention_mask"].bool()
    assert blind.sum(dim=1).tolist()[2] == len("no image here") and (blind.sum(dim=1) > 0).all()
    assert torch.equal(subject.logits(batch)[blind], logits_without_images(subject.model, batch)[blind])


def test_a_text_only_batch_gets_exactly_what_the_language_model_gives_it(subject):
    batch = subject.batch(subject.ragged[2:])
    assert torch.equal(subject.logits(batch), logits_without_images(subject.model, batch))


def test_the_feed_forward_runs_on_every_token_when_asked():
    subject = subject_of(feed_forward_without_media=True)
    batch = subject.batch(subject.ragged)
    logits, own = subject.logits(batch), logits_without_images(subject.model, batch)
    blind = (placeholders(subject, batch).cumsum(dim=1) == 0) & batch["attention_mask"].bool()
    assert ((logits - own).abs().amax(dim=-1)[blind] > 1e-4).all()
    text = subject.batch(subject.ragged[2:])
    torch.testing.assert_close(subject.logits(text)[0], logits[2, -text["input_ids"].shape[1] :])


def test_tokens_before_any_image_see_no_image_though_the_feed_forward_runs():
    subject = subject_of(feed_forward_without_media=True)
    rows = [subject.ragged[0], {**subject.ragged[0], "images": [subject.image(9)]}, subject.ragged[2]]
    batch = subject.batch(rows)
    logits = subject.logits(batch)
    first = placeholders(subject, batch)[0].nonzero().item()
    assert torch.equal(logits[0, :first], logits[1, :first])
    assert not torch.equal(logits[0, first], logits[1, first])
    another = subject.batch([*rows[1:2], *rows])
    assert torch.equal(subject.logits(another)[3], logits[2])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["ragged", "text alone", "no image first"])
def test_nothing_is_ever_not_a_number(kind, everywhere, attention):
    subject = subject_of(feed_forward_without_media=everywhere)
    model = subject.model.train()
    model.set_attn_implementation(attention)
    rows = {"ragged": subject.ragged, "text alone": subject.ragged[2:], "no image first": subject.ragged[::-1]}[kind]
    batch = subject.batch(rows)
    logits = model(**batch).logits
    loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    loss.backward()
    assert torch.isfinite(logits[batch["attention_mask"].bool()]).all() and torch.isfinite(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.any() for name, gradient in gradients.items() if ".fusion." in name) or kind == "text alone"


def test_few_shots_through_the_chat_template(subject):
    images = [subject.image(seed) for seed in range(3)]
    messages = []
    for image, answer in zip(images, ("A cat.", "Two dogs.", None), strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    batch = subject.processor.apply_chat_template(messages, tokenize=True, **options)
    assert placeholders(subject, batch).sum() == len(batch["pixel_values"]) == 3
    text = subject.processor.apply_chat_template(messages, add_generation_prompt=True)
    raw = subject.processor(text=text, images=images, return_tensors="pt")
    assert torch.equal(raw["input_ids"], batch["input_ids"]) and torch.equal(
        raw["pixel_values"], batch["pixel_values"]
    )
    assert subject.generate(batch).shape == (1, 6)


def test_few_shots_through_raw_text_all_reach_the_answer(subject):
    images = [subject.image(seed) for seed in range(3)]
    text = "<image> a cat. <image> two dogs. <image>"
    batch = subject.processor(text=text, images=images, return_tensors="pt")
    assert placeholders(subject, batch).sum() == 3
    logits = subject.logits(batch)
    for shot in range(3):  # the first two through what the language model remembers of them
        others = [subject.image(9) if index == shot else image for index, image in enumerate(images)]
        changed = subject.logits(subject.processor(text=text, images=others, return_tensors="pt"))
        assert (changed[0, -1] - logits[0, -1]).abs().max() > 1e-6


# --- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_keys_and_values_of_an_image_are_computed_once_for_an_answer(either, options, monkeypatch):
    calls = counted(monkeypatch, FlamingoFusion, "look_at")
    resampled = counted(monkeypatch, flamingo.PerceiverResampler, "forward")
    either.generate(either.batch(either.ragged), max_new_tokens=8, min_new_tokens=8, **options)
    assert len(calls) == len(resampled) == 1


def test_only_the_last_image_is_kept_where_only_the_last_is_seen(subject):
    with torch.no_grad():
        carry = subject.model(**subject.batch(subject.ragged), use_cache=True).carry
    latents = subject.model.config.num_latents
    assert [key.shape[2] for key in carry.keys] == [value.shape[2] for value in carry.values] == [latents] * 2
    assert carry.order.tolist() == [[1], [2], [0]] and carry.seen.tolist() == [1, 2, 0]


def test_all_images_are_kept_where_all_are_seen():
    subject = subject_of(only_immediate_media=False)
    with torch.no_grad():
        carry = subject.model(**subject.batch(subject.ragged), use_cache=True).carry
    assert [key.shape[2] for key in carry.keys] == [2 * subject.model.config.num_latents] * 2
    assert carry.order.tolist() == [[1, 0], [1, 2], [0, 0]]


@pytest.mark.parametrize("text", TINY_TEXT)
def test_an_answer_with_the_cache_equals_one_without(text):
    subject = subject_of(text=text)
    batch = subject.batch(subject.ragged)
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    assert torch.equal(subject.generate(batch, **options), subject.generate(batch, use_cache=False, **options))


def test_beams_follow_their_row(either):
    together = either.generate(either.batch(either.ragged), num_beams=3)
    for index, row in enumerate(either.ragged):
        assert torch.equal(together[index], either.generate(either.batch([row]), num_beams=3)[0])


def test_samples_follow_their_row(either):
    batch = either.batch(either.ragged)
    greedy = either.generate(batch)
    samples = either.generate(batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(samples, greedy.repeat_interleave(2, dim=0))


class Loop:
    """A greedy decode loop of one's own, one token a step."""

    def __init__(self, subject: Subject, batch, carried: bool = True):
        self.model, self.carried = subject.model, carried
        self.mask, self.tokens, self.logits = batch["attention_mask"], [], []
        self.keep(self.run(**batch))

    def run(self, **inputs):
        with torch.no_grad():
            return self.model(**inputs, use_cache=True)

    def keep(self, outputs) -> None:
        self.outputs = outputs
        self.logits.append(outputs.logits[:, -1])
        scores = outputs.logits[:, -1].clone()
        scores[:, [self.model.config.image_token_id, self.model.config.eos_token_id]] = -torch.inf
        self.tokens.append(scores.argmax(dim=-1, keepdim=True))

    def step(self) -> None:
        self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        carry = {"carry": self.outputs.carry} if self.carried else {}
        positions = self.mask.cumsum(dim=1)[:, -1:] - 1
        past = self.outputs.past_key_values
        inputs = {"input_ids": self.tokens[-1], "attention_mask": self.mask, "position_ids": positions}
        self.keep(self.run(**inputs, past_key_values=past, **carry))

    @property
    def answer(self) -> torch.Tensor:
        return torch.cat(self.tokens, dim=1)


def left_positions(batch) -> dict:
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


def test_a_loop_that_hands_the_carry_on_equals_generate(either):
    batch = either.batch(either.ragged)
    loop = Loop(either, left_positions(batch))
    for _ in range(5):
        loop.step()
    assert torch.equal(loop.answer, either.generate(batch))


def test_without_the_carry_new_tokens_see_no_image(subject):
    batch = subject.batch(subject.ragged[:1])
    loop = Loop(subject, batch, carried=False)
    closed = Subject(copy.deepcopy(subject.model), subject.processor, tolerance=0)
    prefilled = copy.deepcopy(loop.outputs.past_key_values)
    loop.step()
    with torch.no_grad():
        for block in closed.model.model.fusion.blocks:
            block.attention_gate.zero_()
            block.feed_forward_gate.zero_()
        step = closed.model(input_ids=loop.tokens[0], attention_mask=loop.mask, past_key_values=prefilled)
    assert torch.equal(loop.logits[1], step.logits[:, -1])
    carried = Loop(subject, batch)
    carried.step()
    assert (carried.logits[1] - loop.logits[1]).abs().max() > 1e-4


def test_interleaved_answers_do_not_disturb_each_other(either):
    batches = [either.batch([row]) for row in either.ragged]
    loops = [Loop(either, batch) for batch in batches]
    for _ in range(5):
        for loop in loops:
            loop.step()
    for batch, loop in zip(batches, loops, strict=True):
        assert torch.equal(loop.answer, either.generate(batch))


@pytest.mark.parametrize("cut", ["text", "images"])
def test_a_prompt_read_in_two_steps_equals_one(either, cut):
    row = either.ragged[1]
    batch = either.batch([row])
    first, second = placeholders(either, batch)[0].nonzero().flatten().tolist()
    place, images = {"text": (second + 3, 2), "images": (second - 3, 1)}[cut]
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    with torch.no_grad():
        start = either.model(
            input_ids=ids[:, :place], attention_mask=mask[:, :place], pixel_values=pixels[:images], use_cache=True
        )
        rest = either.model(
            input_ids=ids[:, place:],
            attention_mask=mask,
            pixel_values=pixels[images:] if images < 2 else None,
            past_key_values=start.past_key_values,
            carry=start.carry,
        )
    assert first < place
    either.close(torch.cat((start.logits, rest.logits), dim=1), either.logits(batch), "two steps")


def test_a_static_cache_changes_nothing(either):
    batch = either.batch(either.ragged)
    assert torch.equal(either.generate(batch, cache_implementation="static"), either.generate(batch))


def second_question(subject: Subject, row: dict, images: int = 0):
    """A first answer with its cache, and the longer prompt with all its images."""
    first = subject.batch([row])
    cache = DynamicCache(config=subject.model.config.get_text_config())
    answered = subject.model.generate(**first, past_key_values=cache, **GREEDY)
    more = " and now?" + " look <image>" * images
    ids = subject.processor.tokenizer(more, return_tensors="pt", add_special_tokens=False)["input_ids"]
    longer = torch.cat((answered, ids), dim=1)
    new = [subject.image(7 + index) for index in range(images)]
    batch = subject.batch(
        [{"text": "a" + "<image>" * (len(row["images"]) + images), "images": [*row["images"], *new]}]
    )
    return cache, {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_second_question_over_the_cache_equals_answering_from_scratch(either, images, beams):
    cache, inputs = second_question(either, either.ragged[1], images)
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    whole = either.generate(inputs, num_beams=beams)
    assert torch.equal(either.generate(inputs, num_beams=beams, past_key_values=cache), whole)


def test_images_may_come_after_a_turn_of_text(either):
    cache, inputs = second_question(either, either.ragged[2], images=1)
    assert torch.equal(either.generate(inputs, past_key_values=cache), either.generate(inputs))


def test_a_second_question_without_the_first_ones_images_is_refused(subject):
    cache, inputs = second_question(subject, subject.ragged[1])
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"cached beginning .* 2 image tokens, but images are missing"):
        subject.generate(inputs, past_key_values=cache)


def test_a_second_question_without_any_image_goes_on_from_its_cache(subject):
    cache, inputs = second_question(subject, subject.ragged[2])
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(subject.generate(inputs, past_key_values=cache), subject.generate(inputs))


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2), slice(2, 3)], ids=["ragged", "two images", "text"])
def test_prefill_in_chunks_changes_nothing(either, rows):
    batch = either.batch(either.ragged[rows])
    assert torch.equal(either.generate(batch, prefill_chunk_size=7), either.generate(batch))


def test_prompt_lookup_changes_nothing(either):
    row = {"text": "a <image> b a <image> b a <image> b a", "images": [either.image(seed) for seed in range(3)]}
    batch = either.batch([row])
    options = {"max_new_tokens": 16, "min_new_tokens": 16}
    assert torch.equal(
        either.generate(batch, prompt_lookup_num_tokens=3, **options), either.generate(batch, **options)
    )


def test_an_assistant_changes_nothing(either):
    batch = either.batch(either.ragged[1:2])
    for assistant in (fresh(), language_model_of(either.model)):
        assert torch.equal(either.generate(batch, assistant_model=assistant), either.generate(batch))


def test_generation_from_embeddings_equals_that_from_ids(either):
    batch = either.batch(either.ragged)
    expected = either.generate(batch)
    embeds = either.model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(either.model.generate(inputs_embeds=embeds, **batch, **GREEDY), expected)


def test_encoded_images_serve_many_questions(either, monkeypatch):
    batch = either.batch(either.ragged)
    expected = either.generate(batch)
    encoded = either.model.get_image_features(batch.pop("pixel_values"))
    calls = counted(monkeypatch, type(either.model.model), "see")
    assert torch.equal(either.generate(batch, mm_encoder_outputs={"image": encoded}), expected)
    assert torch.equal(either.generate(batch, mm_encoder_outputs={"image": encoded}), expected)
    assert not calls


def test_the_decode_step_compiles_whole_and_once(either):
    batch = either.batch(either.ragged)
    expected = either.generate(batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(either.generate(batch, **options), expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        either.generate(batch, **options)
    assert graphs >= 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_a_compiled_forward_gives_the_same_logits_on_decode(subject):
    batch = subject.batch(subject.ragged[:1])
    cache = StaticCache(config=subject.model.config.get_text_config(), max_cache_len=128)
    with torch.no_grad():
        prefill = subject.model(**batch, past_key_values=cache)
        token = prefill.logits[:, -1:].argmax(dim=-1)
        mask = F.pad(batch["attention_mask"], (0, 1), value=1)
        step = {"input_ids": token, "attention_mask": mask, "carry": prefill.carry}
        steps = {name: {**step, "past_key_values": copy.deepcopy(cache)} for name in ("plain", "compiled")}
        expected = subject.model(**steps["plain"]).logits
        torch._dynamo.reset()
        found = torch.compile(subject.model, backend="eager", fullgraph=True)(**steps["compiled"]).logits
        torch._dynamo.reset()
    subject.close(found, expected, "compiled step")


@pytest.mark.slow
def test_a_whole_prompt_compiles(subject):
    batch = subject.batch(subject.ragged)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(subject.model.model, backend="eager")(**batch).last_hidden_state
        expected = subject.model.model(**batch).last_hidden_state
    torch._dynamo.reset()
    subject.close(found, expected, "compiled prompt")


@pytest.mark.slow
def test_the_compiled_decode_step_gives_the_same_answer():
    subject = subject_of()
    batch = subject.batch(subject.ragged)
    compile_config = CompileConfig(fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    found = subject.generate(batch, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, subject.generate(batch))


# --- training --------------------------------------------------------------------------------------------------------


def labelled(subject: Subject):
    batch = subject.batch(subject.ragged, side="right")
    labels = batch["input_ids"].masked_fill(placeholders(subject, batch) | (batch["attention_mask"] == 0), -100)
    return batch, labels


def gradients_of(model: PreTrainedModel, batch, labels, checkpointing: bool = False, **options) -> tuple[float, dict]:
    model = copy.deepcopy(model).train()
    torch.manual_seed(0)  # for dropout
    if checkpointing:
        model.gradient_checkpointing_enable(**options)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", TINY_TEXT)
@pytest.mark.parametrize("parts", [None, ["fusion"], ["connector", "fusion"]], ids=str)
def test_gradient_checkpointing_keeps_loss_and_gradients(text, parts):
    subject = subject_of(text=text)
    if parts is not None:
        subject.model.set_trainable_parts(parts)
    batch, labels = labelled(subject)
    loss, gradients = gradients_of(subject.model, batch, labels)
    again, others = gradients_of(subject.model, batch, labels, checkpointing=True)
    assert loss == pytest.approx(again, abs=1e-6)
    assert gradients.keys() == others.keys() and any(".fusion." in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_wraps_what_trains_and_not_a_frozen_tower(subject, monkeypatch):
    model = copy.deepcopy(subject.model)
    model.set_trainable_parts(["connector", "fusion", "language"])
    owners = {
        "blocks": type(model.model.fusion.blocks[0].act),
        "layers": type(model.model.language_model.layers[0].mlp),
        "tower": type(model.model.vision_tower.encoder.layers[0].mlp),
    }
    calls = {name: counted(monkeypatch, owner, "forward") for name, owner in owners.items()}
    batch, labels = labelled(subject)
    times = {}
    for checkpointing in (False, True):
        for count in calls.values():
            count.clear()
        gradients_of(model, batch, labels, checkpointing)
        times[checkpointing] = {name: len(count) for name, count in calls.items()}
    # two blocks and one layer of the resampler; two layers; two layers
    assert times[False] == {"blocks": 3, "layers": 2, "tower": 2}
    assert times[True] == {"blocks": 6, "layers": 4, "tower": 2}


def test_lora_finds_the_language_models_layers_by_their_own_names(subject):
    model = get_peft_model(
        copy.deepcopy(subject.model),
        LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.self_attn\.q_proj"),
    )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prefix = "base_model.model.model.language_model.layers"
    assert names == [
        f"{prefix}.{layer}.self_attn.q_proj.lora_{side}.default.weight" for layer in range(2) for side in "AB"
    ]


def test_lora_reaches_the_blocks_when_they_are_named(subject):
    targets = lora_targets(subject.model, ["fusion"])
    model = get_peft_model(copy.deepcopy(subject.model), LoraConfig(r=2, target_modules=targets))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all(".fusion.blocks." in name for name in names)
    batch, labels = labelled(subject)
    model.train()(**batch, labels=labels).loss.backward()
    gradients = {name: model.get_parameter(name).grad for name in names}
    assert all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)


def test_an_adapter_with_blocks_and_resampler_trains_and_reloads(subject, tmp_path):
    adapter = LoraConfig(
        r=2, target_modules=lora_targets(subject.model, ["language"]), modules_to_save=["fusion", "connector"]
    )
    model = get_peft_model(copy.deepcopy(subject.model), adapter)
    batch, labels = labelled(subject)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch, labels=labels).loss.backward()
    optimizer.step()
    trained = model.base_model.model.model
    for part, own in (("fusion", subject.model.model.fusion), ("connector", subject.model.model.connector)):
        saved = getattr(trained, part).modules_to_save["default"]
        assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), own.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(subject.model), tmp_path).eval()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(**batch).logits, expected, atol=1e-5, rtol=1e-4)
    assert (subject.logits(batch) - expected).abs().max() > 1e-4


def test_training_the_fusion_trains_the_blocks_alone(subject):
    model = copy.deepcopy(subject.model)
    model.set_trainable_parts(["fusion"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if name.startswith("model.fusion.")}
    batch, labels = labelled(subject)
    _, gradients = gradients_of(model, batch, labels)
    assert gradients.keys() == trainable and all(gradient.any() for gradient in gradients.values())


def test_behind_closed_gates_the_gates_learn_first():
    model = fresh()
    subject = Subject(model, tiny_processor("flamingo", model.config), tolerance=0)
    _, gradients = gradients_of(model, *labelled(subject))
    fusion = {name: gradient.any().item() for name, gradient in gradients.items() if ".fusion." in name}
    assert {name for name, moved in fusion.items() if moved} == {name for name in fusion if name.endswith("_gate")}


def test_a_text_only_batch_trains_no_block_but_the_language_model(subject):
    batch = subject.batch(subject.ragged[2:])
    _, gradients = gradients_of(subject.model, batch, batch["input_ids"])
    assert gradients and all(name.startswith(("model.language_model.", "lm_head.")) for name in gradients)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_text_only_batch_of_a_sharded_training_touches_every_part_and_changes_nothing(everywhere, monkeypatch):
    model = subject_of(feed_forward_without_media=everywhere).model.train()
    subject = Subject(model, tiny_processor("flamingo", model.config), tolerance=1e-5)
    batch = subject.batch(subject.ragged[2:])
    plain = model(**batch).logits
    model(**batch).logits.square().sum().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(modeling_vlm, "is_sharded", lambda: True)
    logits = model(**batch).logits
    assert torch.equal(logits, plain)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name in own:
            torch.testing.assert_close(parameter.grad, own[name])
        else:
            assert not parameter.grad.any(), name


def images_rows(count: int = 4, frames: int = 1) -> list[dict]:
    rows = []
    for seed in range(count):
        pixels = np.random.RandomState(seed).randint(0, 256, (frames, 40, 50, 3), dtype=np.uint8)
        question = {"role": "user", "content": f"What is number {seed}?"}
        answer = {"role": "assistant", "content": "A cat." if seed % 2 else "Two dogs."}
        clip = [Image.fromarray(frame) for frame in pixels]
        rows.append({"images": [clip if frames > 1 else clip[0]], "messages": [question, answer]})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved fresh model with its processor."""
    folder = tmp_path_factory.mktemp("tiny") / "flamingo"
    model = fresh()
    model.save_pretrained(folder)
    tiny_processor("flamingo", model.config).save_pretrained(folder)
    return folder


def gates(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.endswith("_gate")])


def test_an_sft_step_opens_the_gates(folder, tmp_path):
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
        assistant_only_loss=True,
        max_length=None,
        model_init_kwargs={"trainable_parts": ["connector", "fusion"]},
        **QUIET,
    )
    trainer = SFTTrainer(model=str(folder), args=settings, train_dataset=Dataset.from_list(images_rows()))
    assert not gates(trainer.model).any()
    trainer.train()
    assert gates(trainer.model).all()


def test_a_dpo_step_opens_the_gates(folder, tmp_path):
    pairs = [
        {"images": row["images"], "prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": other}
        for row, other in zip(images_rows(), [[{"role": "assistant", "content": "No."}]] * 4, strict=True)
    ]
    settings = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, max_length=None, learning_rate=1e-2, warmup_steps=0, **QUIET
    )
    trainer = DPOTrainer(model=str(folder), args=settings, train_dataset=Dataset.from_list(pairs))
    trainer.train()
    assert gates(trainer.model).all()


def test_a_grpo_step_opens_the_gates(folder, tmp_path):
    prompts = [{"images": row["images"], "prompt": row["messages"][:1]} for row in images_rows(2)]

    def reward_the_later(completions, **kwargs):
        return [float(index) for index in range(len(completions))]

    settings = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=6,
        learning_rate=1e-2,
        warmup_steps=0,
        **QUIET,
    )
    trainer = GRPOTrainer(
        model=str(folder),
        args=settings,
        reward_funcs=reward_the_later,
        train_dataset=Dataset.from_list(prompts),
    )
    trainer.train()
    assert gates(trainer.model).all()


def test_an_evaluation_gathers_logits_and_no_carry(subject, tmp_path):
    settings = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, label_names=["labels"])
    trainer = Trainer(model=subject.model, args=settings, compute_metrics=lambda prediction: {})
    batch, labels = labelled(subject)
    loss, outputs, _ = trainer.prediction_step(subject.model, {**batch, "labels": labels}, prediction_loss_only=False)
    assert torch.isfinite(loss)
    assert [len(output.shape) for output in outputs] == [3, 2]  # logits and image_hidden_states


# --- the wrapped language model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TINY_TEXT)
def test_the_language_model_reads_back_as_a_plain_one(text, tmp_path):
    subject = subject_of(text=text)
    subject.model.model.language_model.save_pretrained(tmp_path)
    batch = subject.batch(subject.ragged[2:])
    with torch.no_grad():
        expected = subject.model.model(**batch).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state, expected)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        if not whole.config.tie_word_embeddings:
            whole.get_output_embeddings().load_state_dict(subject.model.lm_head.state_dict())
        torch.testing.assert_close(whole(**batch).logits, subject.logits(batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("text", TINY_TEXT)
def test_the_language_model_keeps_the_names_of_its_weights(text):
    model = fresh(text=text)
    plain = AutoModel.from_config(model.config.text_config)
    names = {name.removeprefix("model.language_model.") for name in model.state_dict() if ".language_model." in name}
    assert names == set(plain.state_dict())


def test_a_copy_has_blocks_of_its_own(subject):
    batch = subject.batch(subject.ragged)
    before = subject.logits(batch)
    twin = Subject(copy.deepcopy(subject.model), subject.processor, tolerance=0)
    assert torch.equal(twin.logits(batch), before)
    with torch.no_grad():
        for block in twin.model.model.fusion.blocks:
            block.attention_gate.fill_(-1.0)
    assert not torch.equal(twin.logits(batch), before)
    assert torch.equal(subject.logits(batch), before)


def test_a_pickled_model_has_blocks_of_its_own():
    model = fresh(gate_init=0.5)
    twin = pickle.loads(pickle.dumps(model))
    subject = Subject(model, tiny_processor("flamingo", model.config), tolerance=0)
    batch = subject.batch(subject.ragged)
    before = subject.logits(batch)
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, before)
        for block in twin.model.fusion.blocks:
            block.attention_gate.fill_(-1.0)
        assert not torch.equal(twin(**batch).logits, before)
    assert torch.equal(subject.logits(batch), before)


def test_calling_the_language_model_itself_is_a_clear_error(subject):
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer was called without media\. Call the vision"):
        subject.model.model.language_model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_a_decoder_that_drops_what_its_layers_need_is_named():
    subject = subject_of(text_config={"model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 4})
    with pytest.raises(ValueError, match=r"BloomBlock .* does not hand keyword arguments on to its layers"):
        subject.logits(subject.batch(subject.ragged))


def test_modules_that_must_stay_whole_exist(subject):
    kinds = {type(module).__name__ for module in subject.model.modules()}
    assert set(type(subject.model.model)._no_split_modules) <= kinds


def test_every_module_that_stays_whole_may_be_sharded_alone(subject, tmp_path):
    batch, labels = labelled(subject)
    loss, gradients = gradients_of(subject.model, batch, labels)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, mesh = copy.deepcopy(subject.model).train(), init_device_mesh("cpu", (1,))
        for module in reversed(list(model.modules())):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = model(**batch, labels=labels).loss
        found.backward()
        sharded = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        torch.distributed.destroy_process_group()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert sharded.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(sharded[name], gradient, atol=1e-6, rtol=1e-4)


def test_parts_may_lie_on_different_devices(subject, tmp_path):
    batch = subject.batch(subject.ragged)
    expected = subject.logits(batch)
    places = {
        "model.vision_tower": "cpu",
        "model.connector": "disk",
        "model.fusion.blocks.0": "cpu",
        "model.fusion.blocks.1": "disk",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    model = dispatch_model(
        copy.deepcopy(subject.model), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_half_precision_reaches_the_image(subject):
    half = Subject(copy.deepcopy(subject.model).to(torch.bfloat16), subject.processor, tolerance=0)
    rows = [subject.ragged[1], {**subject.ragged[1], "images": [subject.image(9), subject.image(8)]}]
    batch = half.batch(rows)
    logits = half.logits(batch)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-3
    assert half.generate(batch).shape == (2, 6)


# --- processor -------------------------------------------------------------------------------------------------------


def test_an_image_is_one_placeholder_whatever_its_size(subject):
    rows = [{"text": "<image>", "images": [subject.image(0, *size)]} for size in ((20, 30), (300, 40))]
    batch = subject.batch(rows)
    assert placeholders(subject, batch).sum(dim=1).tolist() == [1, 1]
    assert subject.processor.num_image_tokens(1000, 2000) == 1
    assert "image_grid_thw" not in batch


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_a_list_in_place_of_an_image_is_a_clip(subject, tensors):
    frames = [subject.image(seed) for seed in range(4)]
    batch = subject.processor(
        text=["a <image> b <image>", "<image>"],
        images=[[frames[:2], frames[2]], [frames[3:]]],
        padding=True,
        return_tensors=tensors,
    )
    flat = subject.processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    grid = [[2, 1, 1], [1, 1, 1], [1, 1, 1]]
    if tensors is None:
        assert isinstance(batch["input_ids"], list)
    assert torch.equal(batch["image_grid_thw"], torch.tensor(grid))
    assert torch.equal(torch.stack(list(batch["pixel_values"])), flat)
    assert [list(row).count(subject.image_token_id) for row in torch.as_tensor(batch["input_ids"]).tolist()] == [2, 1]


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_a_batch_of_clips_of_one_frame_is_one_of_images(subject, tensors):
    image = subject.image()
    clips = subject.processor(text=["a <image> b"], images=[[[image]]], return_tensors=tensors)
    images = subject.processor(text=["a <image> b"], images=[[image]], return_tensors=tensors)
    assert torch.equal(torch.stack(list(clips["pixel_values"])), torch.stack(list(images["pixel_values"])))
    assert clips["image_grid_thw"].tolist() == [[1, 1, 1]]


def test_a_batch_of_numpy_has_grids_of_numpy(subject):
    frames = [subject.image(seed) for seed in range(2)]
    batch = subject.processor(text=["<image>"], images=[[frames]], return_tensors="np")
    assert isinstance(batch["image_grid_thw"], np.ndarray) and batch["image_grid_thw"].tolist() == [[2, 1, 1]]


def test_a_video_gives_a_frame_for_each_frame_embedding(subject):
    assert subject.processor.num_frames == subject.model.config.num_frame_embeddings == 8
    frames = [subject.image(seed) for seed in range(15)]
    for options, count in (({}, 8), ({"num_frames": 3}, 3), ({"fps": 1, "video_metadata": [{"fps": 3}]}, 5)):
        batch = subject.processor(text=["<video>"], videos=[frames], **options)
        assert batch["image_grid_thw"].tolist() == [[count, 1, 1]]


def test_a_list_of_frames_in_place_of_an_image_is_not_sampled(subject):
    frames = [subject.image(seed) for seed in range(15)]
    batch = subject.processor(text=["<image>"], images=[[frames]])
    assert batch["image_grid_thw"].tolist() == [[15, 1, 1]]


@pytest.mark.parametrize(("embeddings", "frames"), [(3, 3), (0, 8)])
def test_the_processor_has_the_number_of_frames_from_the_config(tmp_path, embeddings, frames):
    processor = tiny_processor("flamingo", tiny_config("flamingo", num_frame_embeddings=embeddings))
    assert processor.clip_options == {"num_frames": frames}
    processor.save_pretrained(tmp_path)
    assert ZooFlamingoProcessor.from_pretrained(tmp_path).num_frames == frames


def test_a_number_of_frames_below_one_is_refused():
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        ZooFlamingoProcessor(num_frames=0)


def test_images_without_rows_are_images(subject):
    images = [subject.image(1), subject.image(2)]
    flat = subject.processor(text=["<image> a", "<image> b"], images=images, return_tensors="pt")
    rows = subject.processor(
        text=["<image> a", "<image> b"], images=[[image] for image in images], return_tensors="pt"
    )
    assert flat.keys() == rows.keys() and all(torch.equal(flat[name], rows[name]) for name in flat)


def test_a_clip_comes_through_the_chat_template(subject):
    clip = [subject.image(1), subject.image(2)]
    messages = [{"role": "user", "content": [{"type": "image", "image": clip}, {"type": "text", "text": "What?"}]}]
    batch = subject.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[2, 1, 1]] and placeholders(subject, batch).sum() == 1


def test_every_frame_of_a_clip_reaches_the_answer(subject):
    frames = [subject.image(seed) for seed in range(3)]
    clips = [frames, *([*frames[:at], subject.image(9), *frames[at + 1 :]] for at in range(3))]
    logits = subject.logits(clip_batch(subject, clips))[:, -1]
    assert ((logits[1:] - logits[0]).abs().amax(dim=-1) > 1e-6).all()


def test_rows_of_clips_equal_each_alone_in_their_answers(subject):
    clips = [[subject.image(seed) for seed in range(count)] for count in (3, 1, 2)]
    together = subject.generate(clip_batch(subject, clips))
    for index, clip in enumerate(clips):
        assert torch.equal(together[index], subject.generate(clip_batch(subject, [clip]))[0])


def test_an_empty_clip_is_refused(subject):
    with pytest.raises(ValueError, match="clip without frames"):
        subject.processor(text=["<image>"], images=[[[]]])


def test_a_clip_for_text_without_a_placeholder_is_refused(subject):
    with pytest.raises(ValueError, match="image"):
        subject.processor(text=["nothing here"], images=[[[subject.image(), subject.image()]]])


def test_rows_of_a_dataset_may_hold_clips(subject):
    batch = ZooDataCollator(subject.processor)(images_rows(2, frames=3) + images_rows(1))
    assert batch["image_grid_thw"].tolist() == [[3, 1, 1], [3, 1, 1], [1, 1, 1]] and len(batch["pixel_values"]) == 7
    assert torch.isfinite(subject.model(**batch).loss)


def test_clips_train_with_sft(folder, tmp_path):
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
        assistant_only_loss=True,
        max_length=None,
        **QUIET,
    )
    text = Value("string")
    features = Features({"images": [[Picture()]], "messages": [{"role": text, "content": text}]})
    rows = Dataset.from_list(images_rows(4, frames=2), features=features)
    trainer = SFTTrainer(model=str(folder), args=settings, train_dataset=rows)
    trainer.train()
    assert gates(trainer.model).all()


def test_the_processor_survives_saving(subject, tmp_path):
    subject.processor.save_pretrained(tmp_path)
    again = ZooFlamingoProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == subject.processor.to_dict()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[2, 1, 1]], r"counts 2 frames, pixel_values holds 3"),
        ([[2, 1, 1], [2, 1, 1]], r"counts 4 frames, pixel_values holds 3"),
        ([[3, 2, 1]], r"must hold \[frames, 1, 1\].*processor of another model"),
        ([[0, 1, 1], [3, 1, 1]], r"must hold \[frames, 1, 1\]"),
        ([[3, 1]], r"must hold \[frames, 1, 1\]"),
        ([3, 1, 1], r"must hold \[frames, 1, 1\]"),
        ([], r"must hold \[frames, 1, 1\]"),
    ],
)
def test_a_grid_that_does_not_fit_its_frames_is_refused(grid, message, subject):
    with pytest.raises(ValueError, match=message):
        subject.model.get_image_features(
            torch.zeros(3, 3, 32, 32), image_grid_thw=torch.tensor(grid, dtype=torch.long)
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_attention_layers": [0, 2]}, r"\[0, 2\].*which has 2 \(0 to 1\)"),
        ({"cross_attention_layers": [-1]}, r"\[-1\].*ascending"),
        ({"cross_attention_layers": [1, 0]}, r"\[1, 0\].*ascending"),
        ({"cross_attention_layers": [0, 0]}, r"\[0, 0\].*ascending"),
        ({"cross_attention_layers": []}, r"\[\].*ascending"),
        ({"cross_attention_interval": 0}, "cross_attention_interval must be at least 1, got 0"),
        ({"num_latents": 0}, "num_latents must be at least 1, got 0"),
        ({"resampler_depth": -1}, "resampler_depth cannot be negative, got -1"),
        ({"num_frame_embeddings": -1}, "num_frame_embeddings cannot be negative, got -1"),
        ({"cross_attention_head_dim": 0}, "cross_attention_head_dim must be at least 1, got 0"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config("flamingo", **fields)


def test_the_config_builds_without_arguments():
    config = ZooFlamingoConfig()
    assert config.gated_layers == list(range(3, 32, 4)) and config.media_width == 1024


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> a <image>", 1, "row 0 holds 2 image tokens"),
        ("<image> a", 2, "truncated text .* or more images than the text asks for"),
        ("a", 1, "no row holds an image token"),
    ],
)
def test_images_that_do_not_fit_their_placeholders_are_refused(text, images, message, subject):
    ids = subject.processor.tokenizer(text, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match=f"Image features and image tokens do not match.*{message}"):
        subject.model(input_ids=ids, pixel_values=torch.zeros(images, 3, 32, 32))


def test_a_prompt_whose_images_are_missing_is_refused(subject):
    batch = subject.batch(subject.ragged)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="images are missing"):
        subject.generate(batch)


def test_a_batch_of_another_models_processor_is_named(subject):
    batch = subject.batch(subject.ragged)
    with pytest.raises(ValueError, match=r"image_sizes.*processor of another model"):
        subject.model(**batch, image_sizes=torch.ones(3, 2))


def test_an_array_of_frames_is_a_clip():
    frames = [np.full((40, 56, 3), 60 * index, dtype=np.uint8) for index in range(3)]
    processor = tiny_processor("flamingo")
    one, other = (
        processor(images=[[clip]], text=["<image> what moves?"], return_tensors="pt")
        for clip in (np.stack(frames), [Image.fromarray(frame) for frame in frames])
    )
    assert one["image_grid_thw"].tolist() == [[3, 1, 1]]
    assert all(torch.equal(one[name], other[name]) for name in other)
