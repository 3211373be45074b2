"""Flamingo conversions: the numbers of IDEFICS and of OpenFlamingo, and nothing silent on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlamaConfig,
    OPTConfig,
)

from conversion import engine, flamingo, openflamingo, openflamingo_model, parity
from conversion.engine import ConversionError
from vlm_zoo.models.flamingo import ZooFlamingoForConditionalGeneration
from vlm_zoo.testing.tiny import TINY_VISION, tiny_tokenizer


ORACLES = Path(__file__).parent / "oracles"
TOLERANCE = 5e-6
VOCAB_SIZE, SIZE = 120, 16
IMAGE = VOCAB_SIZE + 1
TOWER = {"vision_heads": 2, "vision_act": "gelu"}
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 259}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
LANGUAGE_MODELS = {
    "llama": LlamaConfig(**TEXT, intermediate_size=48),
    "opt": OPTConfig(**TEXT, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**TEXT, intermediate_size=48),
}


def randomise(model, seed=1):
    """Every parameter random, none zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if any(word in name for word in ("alpha", "gate.", "_gate")) and parameter.numel() <= 64:
                parameter.copy_(noise)  # zero closes a gate and hides what is behind
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def idefics(**fields):
    """A tiny IDEFICS of transformers."""
    perceiver = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
    config = IdeficsConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        vision_config={
            "embed_dim": 24,
            "image_size": SIZE,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 4,
        },
        **{
            "additional_vocab_size": 2,
            "cross_layer_interval": 2,
            "use_resampler": True,
            "perceiver_config": {**perceiver, "qk_layer_norms_perceiver": fields.pop("perceiver_norm", True)},
            **fields,
        },
    )
    torch.manual_seed(0)
    return randomise(IdeficsForVisionText2Text._from_config(config, attn_implementation="eager"))


def ragged_batch():
    """Rows of several images, side by side or apart, text before the first of them, and a row without any."""
    rows = [
        [5, 6, 7, IMAGE, 8, 9, IMAGE, 10, 11, 12, IMAGE, 13, 14],
        [1, 20, 21, 22, IMAGE, 23, 24],
        [IMAGE, IMAGE, 33, 34, 35, 36, 37, 38, 39],
        [40, 41, 42, 43],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(int((ids == IMAGE).sum()), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": mask}, pixels


@torch.no_grad()
def largest_difference(source, zoo, text, pixels):
    images = flamingo.idefics_inputs(text["input_ids"], pixels, IMAGE)
    expected, found = source(**text, **images).logits, zoo(**text, pixel_values=pixels).logits
    difference = (expected - found).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_layer_norms": True},
        {"qk_layer_norms": True, "perceiver_norm": False},
        {"perceiver_norm": False},
        {"alpha_type": "vector"},
        {"use_resampler": False},
        {"cross_layer_interval": 1},
        {"tie_word_embeddings": True},
        {"additional_vocab_size": 5},
        {"hidden_act": "gelu"},
    ],
    ids=lambda fields: ", ".join(f"{name}={value}" for name, value in fields.items()) or "default",
)
def test_logits_and_greedy_text_are_those_of_idefics(fields):
    source = idefics(**fields)
    zoo = flamingo.zoo_from_transformers(source)
    text, pixels = ragged_batch()
    assert largest_difference(source, zoo, text, pixels) <= TOLERANCE
    images = flamingo.idefics_inputs(text["input_ids"], pixels, IMAGE)
    options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": [IMAGE]}
    expected, found = (
        source.generate(**text, **images, **options),
        zoo.generate(**text, pixel_values=pixels, **options),
    )
    assert torch.equal(expected, found)


def test_the_images_of_the_comparison_matter():
    source = idefics()
    text, pixels = ragged_batch()
    with torch.no_grad():
        logits = [
            source(**text, **flamingo.idefics_inputs(text["input_ids"], shown, IMAGE)).logits
            for shown in (pixels, -pixels)
        ]
    assert (logits[0] - logits[1])[:3, -1].abs().amax(dim=-1).min() > 0.1


def test_all_preceding_images_are_seen_as_idefics_sees_them_under_such_a_mask():
    source = idefics()
    zoo = flamingo.zoo_from_transformers(source)
    zoo.config.only_immediate_media = False
    text, pixels = ragged_batch()
    images = flamingo.idefics_inputs(text["input_ids"], pixels, IMAGE, only_immediate_media=False)
    with torch.no_grad():
        difference = source(**text, **images).logits - zoo(**text, pixel_values=pixels).logits
    assert difference.abs().max() <= TOLERANCE


def test_text_alone_is_that_of_idefics():
    source = idefics()
    zoo = flamingo.zoo_from_transformers(source)
    ids = torch.arange(3, 40)[None]
    blank = {"pixel_values": torch.zeros(1, 1, 3, SIZE, SIZE), "image_attention_mask": torch.zeros(1, 37, 1)}
    with torch.no_grad():
        difference = source(input_ids=ids, **blank).logits - zoo(input_ids=ids).logits
    assert difference.abs().max() <= TOLERANCE


def test_the_mask_made_for_idefics_is_that_of_its_own_processor(idefics_folder):
    processor = IdeficsProcessor.from_pretrained(idefics_folder)
    image = processor.image_token_id
    batch = processor(
        text=[["a", picture(20, 20), "b", picture(20, 30, 1), picture(30, 20, 2), "c"], ["d", picture(9, 9, 3), "e"]]
    )
    counts = (batch["input_ids"] == image).sum(dim=1).tolist()
    pixels = torch.cat([row[:count] for row, count in zip(batch["pixel_values"], counts, strict=True)])
    made = flamingo.idefics_inputs(batch["input_ids"], pixels, image)
    assert torch.equal(made["pixel_values"], batch["pixel_values"])
    assert torch.equal(made["image_attention_mask"], batch["image_attention_mask"])


# --- IDEFICS' own inputs ---------------------------------------------------------------------------------------------

END = 2  # of a sequence


@pytest.fixture(scope="module")
def both():
    source = idefics()
    return source, flamingo.zoo_from_transformers(source)


def documents():
    """A row of two documents and a shorter one; what follows an end of sequence sees no image until the next."""
    rows = [[5, IMAGE, 6, 7, END, 8, 9, IMAGE, 10, 11], [IMAGE, 12, IMAGE, 13, END, 14]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    text = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    images = flamingo.idefics_inputs(ids, pixels, IMAGE)
    images["image_attention_mask"][0, 5:7] = 0
    images["image_attention_mask"][1, -1] = 0
    return text, images


@torch.no_grad()
def test_padded_images_and_their_mask_give_the_same_numbers_as_images_in_a_row(both):
    text, pixels = ragged_batch()
    images = flamingo.idefics_inputs(text["input_ids"], pixels, IMAGE)
    expected = both[1](**text, pixel_values=pixels).logits
    assert torch.equal(both[1](**text, **images).logits, expected)
    assert torch.equal(both[1](**text, pixel_values=images["pixel_values"]).logits, expected)


@torch.no_grad()
def test_after_an_end_of_sequence_the_mask_may_hide_images(both):
    text, images = documents()
    expected, found = (model(**text, **images).logits for model in both)
    there = text["attention_mask"].bool()
    assert (expected - found)[there].abs().max() <= TOLERANCE
    without = both[1](**text, pixel_values=images["pixel_values"]).logits
    assert (without - found)[:, -1].abs().amax(dim=-1).min() > 1e-2


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("batch", [ragged_batch, documents])
def test_idefics_own_inputs_generate_its_text(batch, options, both):
    text, images = batch()
    if isinstance(images, torch.Tensor):
        images = flamingo.idefics_inputs(text["input_ids"], images, IMAGE)
    if "num_return_sequences" in options:
        options = {**options, "num_beams": 2}
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE], "eos_token_id": 119, **options}
    expected, found = (model.generate(**text, **images, **options) for model in both)
    assert torch.equal(expected, found)


def test_an_answer_goes_on_from_a_cache_under_the_mask_of_the_whole_prompt(both):
    text, images = documents()
    options = {"do_sample": False, "eos_token_id": 119, "return_dict_in_generate": True}
    first = both[1].generate(**text, **images, max_new_tokens=2, **options)
    more = torch.cat((first.sequences, torch.tensor([[15, 16], [17, 18]])), dim=1)
    seen = torch.cat((text["attention_mask"], torch.ones(2, 4, dtype=torch.long)), dim=1)
    again = {"input_ids": more, "attention_mask": seen, **images, "max_new_tokens": 4, **options}
    expected = both[1].generate(**again).sequences
    assert torch.equal(both[1].generate(**again, past_key_values=first.past_key_values).sequences, expected)


@torch.no_grad()
def test_a_loop_of_ones_own_may_hand_the_last_row_of_the_mask_on(both):
    zoo, (text, images) = both[1], documents()
    ids, mask = text["input_ids"], images["image_attention_mask"]
    out = zoo(**text, **images, use_cache=True)
    token = torch.tensor([[20], [21]])
    step = zoo(
        token,
        attention_mask=torch.nn.functional.pad(text["attention_mask"], (0, 1), value=1),
        image_attention_mask=mask[:, -1:],
        past_key_values=out.past_key_values,
        carry=out.carry,
    )
    whole = zoo(
        torch.cat((ids, token), dim=1),
        attention_mask=torch.nn.functional.pad(text["attention_mask"], (0, 1), value=1),
        **images,
    )
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=0)


def test_text_with_blank_images_alone_is_text(both):
    ids = torch.arange(3, 40)[None]
    blank = {"pixel_values": torch.zeros(1, 1, 3, SIZE, SIZE), "image_attention_mask": torch.zeros(1, 37, 1).long()}
    with torch.no_grad():
        assert torch.equal(both[1](ids, **blank).logits, both[1](ids).logits)
    generated = both[1].generate(input_ids=ids, **blank, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, both[1].generate(input_ids=ids, max_new_tokens=3, do_sample=False))


def padded(edit):
    """The text and images of `documents`, after a damage."""
    text, images = documents()
    edit(images)
    return {**text, **images}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda images: images["image_attention_mask"][0, 8].copy_(torch.tensor([1, 0])),
            r"token 8 of row 0 .* \[0\]",
        ),
        (lambda images: images["image_attention_mask"][0, 3].zero_(), r"token 3 of row 0 .* \[\] of .* \[0\]"),
        (lambda images: images["image_attention_mask"][1, 6].fill_(1), r"token 6 of row 1 .* \[0, 1\]"),
        (lambda images: images.update(image_attention_mask=images["image_attention_mask"][:1]), r"\[1, 10, 2\]"),
        (lambda images: images.update(pixel_values=images["pixel_values"][:, :1]), "Row 0 has 2 image tokens"),
        (lambda images: images.update(pixel_values=images["pixel_values"][:1]), "holds 1 rows of images"),
        (lambda images: images.pop("pixel_values"), "pixel_values is missing"),
        (lambda images: images.update(image_grid_thw=torch.tensor([[1, 1, 1]] * 4)), "image_grid_thw"),
    ],
)
def test_a_mask_or_images_that_say_otherwise_than_the_image_tokens_are_refused(edit, message, both):
    with pytest.raises(ValueError, match=message):
        both[1](**padded(edit))


def test_images_beyond_the_image_tokens_must_be_blank_or_masked(both):
    text, pixels = ragged_batch()
    images = flamingo.idefics_inputs(text["input_ids"], pixels, IMAGE)
    images["pixel_values"][1, 1:] = 1.0
    with torch.no_grad():
        expected = both[1](**text, pixel_values=pixels).logits
        assert torch.equal(both[1](**text, **images).logits, expected)
    with pytest.raises(ValueError, match="Row 1 has 1 image tokens"):
        both[1](**text, pixel_values=images["pixel_values"])


# --- models in memory ------------------------------------------------------------------------------------------------


def test_the_model_in_memory_shares_no_weight_with_its_source():
    source = idefics()
    zoo = flamingo.zoo_from_transformers(source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in zoo.parameters())


def test_the_model_in_memory_keeps_dtype_mode_and_attention():
    source = idefics().to(torch.bfloat16).train()
    zoo = flamingo.zoo_from_transformers(source)
    assert (zoo.dtype, zoo.training, zoo.config._attn_implementation) == (torch.bfloat16, True, "eager")


def test_an_idefics_without_added_tokens_needs_its_image_token_named():
    source = idefics(additional_vocab_size=0)
    with pytest.raises(ConversionError, match="has 0 additional tokens"):
        flamingo.zoo_from_transformers(source)
    assert flamingo.zoo_from_transformers(source, image_token_id=7).config.image_token_id == 7


# --- oracles ---------------------------------------------------------------------------------------------------------


def oracle_difference(name, zoo, **inputs):
    expected = load_file(ORACLES / name / "oracle.safetensors")["out.logits"]
    model = AutoModelForImageTextToText.from_pretrained(zoo, attn_implementation="eager")
    with torch.no_grad():
        difference = (model(**inputs).logits - expected).abs().max().item()
    print(f"{name}: {difference:.1e}")
    return difference


def test_an_idefics_of_version_4_gives_its_logits(tmp_path):
    oracle = load_file(ORACLES / "hf457_idefics" / "oracle.safetensors")
    report = flamingo.convert(ORACLES / "hf457_idefics", tmp_path / "zoo")
    inputs = {"input_ids": oracle["in.input_ids"], "pixel_values": oracle["in.pixel_values"][0]}
    assert report["passed"] and report["image_sensitivity"] > 1e-2
    assert oracle_difference("hf457_idefics", tmp_path / "zoo", **inputs) <= TOLERANCE


def test_an_idefics_of_version_4_takes_its_own_inputs(tmp_path):
    home = ORACLES / "hf457_idefics"
    inputs = {
        name.removeprefix("in."): tensor
        for name, tensor in load_file(home / "oracle.safetensors").items()
        if name.startswith("in.")
    }
    flamingo.convert(home, tmp_path / "zoo", verify=False)
    assert oracle_difference(home.name, tmp_path / "zoo", **inputs) <= TOLERANCE
    source = IdeficsForVisionText2Text.from_pretrained(home / "ckpt", attn_implementation="eager")
    zoo = AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo", attn_implementation="eager")
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [zoo.config.image_token_id]}
    assert torch.equal(source.generate(**inputs, **options), zoo.generate(**inputs, **options))


@pytest.mark.parametrize("save", ["", "checkpoint.pt", "full.pt"])
def test_a_save_of_openflamingo_gives_its_logits(save, tmp_path):
    home = ORACLES / "openflamingo_llama_every2"
    oracle = load_file(home / "oracle.safetensors")
    report = flamingo.convert(home / save, tmp_path / "zoo")
    inputs = {"input_ids": oracle["in.lang_x"], "pixel_values": oracle["in.vision_x"].flatten(0, 2)}
    assert report["passed"] and report["image_sensitivity"] > 1e-2
    assert oracle_difference(home.name, tmp_path / "zoo", **inputs) <= TOLERANCE


def test_the_code_that_stands_in_for_openflamingos_gives_its_logits():
    home = ORACLES / "openflamingo_llama_every2"
    oracle = load_file(home / "oracle.safetensors")
    source = flamingo.open_source(home, **TOWER)
    model = source.load()
    with torch.no_grad():
        rows = [
            model(ids[None], pixels.flatten(0, 1)).logits
            for ids, pixels in zip(oracle["in.lang_x"], oracle["in.vision_x"], strict=True)
        ]
    assert (torch.cat(rows) - oracle["out.logits"]).abs().max() <= TOLERANCE


# --- IDEFICS folders -------------------------------------------------------------------------------------------------


def idefics_processor():
    tokenizer = tiny_tokenizer(image_token=None)
    words = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer.add_tokens(words, special_tokens=True)
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=SIZE), tokenizer, add_end_of_utterance_token=False)


@pytest.fixture(scope="module")
def idefics_folder(tmp_path_factory):
    """An IDEFICS with its processor, as transformers writes them."""
    folder = tmp_path_factory.mktemp("idefics")
    vocabulary = len(tiny_tokenizer(image_token=None))
    model = idefics(additional_vocab_size=vocabulary + 3 - VOCAB_SIZE)
    model.save_pretrained(folder)
    idefics_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(idefics_folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("converted") / "zoo"
    flamingo.convert(idefics_folder, destination)
    return destination


@pytest.fixture
def source(idefics_folder, tmp_path):
    """A copy to damage."""
    shutil.copytree(idefics_folder, tmp_path / "source")
    return tmp_path / "source"


def test_the_proof_covers_processor_and_every_stage(converted):
    report = json.loads((converted / parity.REPORT).read_text())
    assert report["passed"]
    assert [row["stage"] for row in report["stages"]] == [
        "input_ids", "pixels", "vision_tower", "connector", "language_model.first_layer", "language_model.last_layer",
        "logits", "greedy_text",
    ]  # fmt: skip


def test_the_image_token_is_the_tokenizers(converted):
    processor = AutoProcessor.from_pretrained(converted)
    model = AutoModelForImageTextToText.from_pretrained(converted)
    assert model.config.image_token_id == processor.image_token_id != IMAGE


def test_a_chat_reads_as_idefics_was_instructed(converted):
    processor = AutoProcessor.from_pretrained(converted)
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    chat = [
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        {"role": "user", "content": "Why?"},
    ]
    around = "<fake_token_around_image>"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        f"User: {around}<image>{around}<image>{around}What?<end_of_utterance>\nAssistant: That.<end_of_utterance>\n"
        "User: Why?<end_of_utterance>\nAssistant:"
    )


def test_a_converted_folder_opens_and_answers(converted):
    processor = AutoProcessor.from_pretrained(converted)
    model = AutoModelForImageTextToText.from_pretrained(converted)
    batch = processor(images=[[picture(30, 40), picture(40, 30)]], text=["<image>a<image>b"], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def test_a_source_without_processor_converts_as_a_model_with_a_warning(source, tmp_path, caplog):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink(missing_ok=True)
    report = flamingo.convert(source, tmp_path / "zoo")
    assert report["passed"] and "no tokenizer and no image processor" in caplog.text
    assert not (tmp_path / "zoo" / "processor_config.json").exists()


def test_substitutes_complete_a_source_without_processor(source, idefics_folder, tmp_path):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink(missing_ok=True)
    flamingo.convert(source, tmp_path / "zoo", verify=False, tokenizer=idefics_folder, image_processor=idefics_folder)
    assert (tmp_path / "zoo" / "processor_config.json").is_file()


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    idefics().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    flamingo.convert(tmp_path / "source", tmp_path / "zoo")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo").dtype == torch.bfloat16


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {"use_resampler": False}, {"alpha_type": "vector"}])
def test_any_idefics_converts_from_its_folder(fields, tmp_path):
    idefics(**fields).save_pretrained(tmp_path / "source", max_shard_size="50KB")
    assert flamingo.convert(tmp_path / "source", tmp_path / "zoo", shard_bytes=60_000)["passed"]


def test_buffers_of_old_files_wait_in_the_side_file(source, tmp_path):
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.vision_model.embeddings.position_ids",
             "model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq"]  # fmt: skip
    damage(source, lambda tensors: tensors.update(dict.fromkeys(names, torch.ones(4)) | {names[0]: torch.zeros(4)}))
    flamingo.convert(source, tmp_path / "zoo", verify=False)
    kept = load_file(tmp_path / "zoo" / engine.DROPPED)
    assert {"model.vision_tower.embeddings.position_ids", "model.vision_tower.post_layernorm.bias"} <= kept.keys()


# --- saves of OpenFlamingo -------------------------------------------------------------------------------------------


def openflamingo_save(home, kind="llama", frames=0, added=3, every=2):
    """Writes a random checkpoint as a training of OpenFlamingo does, its tower and language model beside it."""
    text, decoder = LANGUAGE_MODELS[kind], openflamingo.DECODERS[kind]
    torch.manual_seed(0)
    language = randomise(AutoModelForCausalLM.from_config(text))
    language.save_pretrained(home / "llm")
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=4
    )
    tower = nn.Module()
    tower.visual = openflamingo_model.OpenClipVisual(vision)
    tower.visual.ln_post = nn.LayerNorm(24)
    tower.visual.proj = nn.Parameter(torch.empty(24, 8))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch.save(tower.visual.state_dict(), home / "open_clip_visual.pt")
    shape = flamingo.ZooFlamingoConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1, num_latents=6, resampler_depth=2,
        resampler_intermediate_size=96, feed_forward_size=128, num_frame_embeddings=frames,
    )  # fmt: skip
    trained = nn.Module()
    trained.perceiver = openflamingo_model.OriginalResampler(shape)
    gated = range(every - 1, text.num_hidden_layers, every)
    trained.blocks = nn.ModuleDict({str(layer): openflamingo_model.OriginalBlock(shape) for layer in gated})
    for parameter in trained.parameters():
        nn.init.normal_(parameter, std=0.4)
    layer_name = rf"lang_encoder.{decoder.layers}.\1.gated_cross_attn_layer."
    table = ((r"^blocks\.(\d+)\.", layer_name), (r"^perceiver\.", "perceiver."))
    state = {engine.rename(name, table): tensor for name, tensor in trained.state_dict().items()}
    embeddings = torch.randn(text.vocab_size + added, text.hidden_size) * 0.2
    state[f"lang_encoder.{decoder.body}.{decoder.embeddings}.weight"] = embeddings
    if kind == "opt":  # positions have "embed" in their name, and the head is tied
        state["lang_encoder.lm_head.weight"] = embeddings
        name = "model.decoder.embed_positions.weight"
        state[f"lang_encoder.{name}"] = language.state_dict()[name] + 0.1
    if kind == "gpt_neox":
        state["lang_encoder.embed_out.weight"] = torch.randn(embeddings.shape) * 0.2
        state["lang_encoder.gpt_neox.layers.0.decoder_layer.attention.bias"] = torch.ones(1, 1, 8, 8)
    torch.save(state, home / "checkpoint.pt")
    return home


def edit_save(home, edit, name="checkpoint.pt"):
    state = torch.load(home / name, weights_only=True)
    torch.save(edit(state) or state, home / name)


@pytest.mark.parametrize("frames", [0, 4])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_any_language_model_and_clips_give_what_openflamingo_computes(kind, frames, tmp_path):
    openflamingo_save(tmp_path, kind, frames)
    report = flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)
    print(parity.table(report))
    (logits,) = (row for row in report["stages"] if row["stage"] == "logits")
    assert report["passed"] and report["image_sensitivity"] > 1e-2 and logits["max_abs_diff"] <= TOLERANCE


@pytest.mark.parametrize("every", [1, 3])
def test_blocks_stand_before_every_nth_layer(every, tmp_path):
    openflamingo_save(tmp_path, every=every)
    assert flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)["passed"]
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo").config
    assert config.cross_attention_layers == list(range(every - 1, 3, every))


def test_an_untrained_head_gets_rows_for_the_added_tokens(tmp_path):
    openflamingo_save(tmp_path)
    flamingo.convert(tmp_path, tmp_path / "zoo", verify=False, **TOWER)
    before = load_file(tmp_path / "llm" / "model.safetensors")["lm_head.weight"]
    after = load_file(tmp_path / "zoo" / "model.safetensors")["lm_head.weight"]
    assert after.shape[0] == before.shape[0] + 3 and torch.equal(after[: len(before)], before)
    assert torch.allclose(after[-1], before.mean(dim=0), atol=1e-6)


def test_what_trained_stands_in_for_what_it_was_trained_from(tmp_path):
    openflamingo_save(tmp_path, "opt")
    flamingo.convert(tmp_path, tmp_path / "zoo", verify=False, **TOWER)
    trained = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    zoo = load_file(tmp_path / "zoo" / "model.safetensors")
    for name in ("embed_tokens", "embed_positions"):
        found = zoo[f"model.language_model.decoder.{name}.weight"]
        assert torch.equal(found, trained[f"lang_encoder.model.decoder.{name}.weight"])


def test_a_training_save_of_several_ranks_is_read_without_its_optimiser(tmp_path):
    openflamingo_save(tmp_path)
    flamingo.convert(tmp_path, tmp_path / "plain", verify=False, **TOWER)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    (tmp_path / "checkpoint.pt").unlink()
    training = {"epoch": 3, "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{}]}}
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({**training, "model_state_dict": wrapped}, tmp_path / "checkpoint_10.pt")
    torch.save({**training, "model_state_dict": {}}, tmp_path / "checkpoint_9.pt")
    assert flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)["passed"]
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "zoo"))
    assert plain.keys() == found.keys() and all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_save_may_lie_in_its_language_models_folder(tmp_path):
    openflamingo_save(tmp_path)
    for path in (tmp_path / "llm").iterdir():
        shutil.move(path, tmp_path / path.name)
    (tmp_path / "llm").rmdir()
    assert flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)["passed"]


def test_a_tower_in_transformers_format_says_all_itself(tmp_path):
    openflamingo_save(tmp_path)
    (tmp_path / "open_clip_visual.pt").unlink()
    depth = {**TINY_VISION["clip"], "hidden_size": 24, "image_size": SIZE, "patch_size": 4}
    randomise(CLIPVisionModel(CLIPVisionConfig(**depth))).save_pretrained(tmp_path / "clip-tiny")
    assert flamingo.convert(tmp_path, tmp_path / "zoo")["passed"]


def test_a_whole_open_clip_file_may_be_named(tmp_path):
    (tmp_path / "save").mkdir()
    openflamingo_save(tmp_path / "save")
    visual = torch.load(tmp_path / "save" / "open_clip_visual.pt", weights_only=True)
    text = {"token_embedding.weight": torch.ones(3), "positional_embedding": torch.ones(3, 2)}
    torch.save({**text, **{f"visual.{name}": tensor for name, tensor in visual.items()}}, tmp_path / "open_clip.bin")
    (tmp_path / "save" / "open_clip_visual.pt").unlink()
    report = flamingo.convert(
        tmp_path / "save", tmp_path / "zoo", vision_tower=str(tmp_path / "open_clip.bin"), **TOWER
    )
    assert report["passed"]


def test_a_gated_layer_under_its_alias_alone_is_read(tmp_path):
    openflamingo_save(tmp_path)
    flamingo.convert(tmp_path, tmp_path / "plain", verify=False, **TOWER)
    proper, alias = "lang_encoder.model.layers.1.gated_cross_attn_layer.", "lang_encoder.gated_cross_attn_layers.1."
    edit_save(tmp_path, lambda state: {name.replace(proper, alias): tensor for name, tensor in state.items()})
    flamingo.convert(tmp_path, tmp_path / "zoo", verify=False, **TOWER)
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "zoo"))
    assert plain.keys() == found.keys() and all(torch.equal(plain[name], found[name]) for name in plain)


def test_an_openflamingo_with_a_tokenizer_gets_its_processor(tmp_path):
    openflamingo_save(tmp_path, added=2)  # the tokenizer pads, so that no <PAD> is added
    tiny_tokenizer(image_token=None).save_pretrained(tmp_path / "llm")
    report = flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)
    processor = AutoProcessor.from_pretrained(tmp_path / "zoo")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo")
    assert [row["stage"] for row in report["stages"]][:2] == ["input_ids", "pixels"]
    assert model.config.image_token_id == processor.image_token_id == 260
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|endofchunk|>") == 259
    shot = [{"type": "image"}, {"type": "text", "text": "An image of"}]
    chat = [{"role": "user", "content": shot}, {"role": "assistant", "content": " a dog"}]
    chat.append({"role": "user", "content": shot})
    expected = "<image>An image of a dog<|endofchunk|><image>An image of"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected


# --- nothing silent --------------------------------------------------------------------------------------------------


def damage(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def problems_of(folder, destination, **options):
    with pytest.raises(ConversionError) as caught:
        flamingo.convert(folder, destination, **options)
    assert not destination.exists()
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "zoo"),
    [
        ("model.gated_cross_attn_layers.1.alpha_dense", "model.fusion.blocks.1.feed_forward_gate"),
        ("model.perceiver_resampler.blocks.0.1.fc.weight", "model.connector.layers.0.feed_forward_in.weight"),
        ("model.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
    ],
)
def test_a_missing_tensor_is_named(name, zoo, source, tmp_path):
    damage(source, lambda tensors: tensors.pop(name))
    assert problems_of(source, tmp_path / "zoo") == {"missing": [zoo]}


def test_a_missing_half_of_the_vocabulary_is_a_wrong_shape(source, tmp_path):
    damage(source, lambda tensors: tensors.pop("model.embed_tokens.additional_embedding.weight"))
    (found,) = problems_of(source, tmp_path / "zoo")["wrong shape"]
    assert found == "model.embed_tokens.weight is [120, 32], expected [262, 32]"


@pytest.mark.parametrize("name", ["model.gated_cross_attn_layers.2.alpha_dense", "model.extra", "lora.weight"])
def test_an_unknown_tensor_is_named(name, source, tmp_path):
    damage(source, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert problems_of(source, tmp_path / "zoo") == {"unknown": [name]}


def test_a_tensor_of_openflamingo_under_two_names_is_named(tmp_path):
    openflamingo_save(tmp_path)
    edit_save(tmp_path, lambda state: state.update({"module.perceiver.latents": state["perceiver.latents"] + 1}))
    assert problems_of(tmp_path, tmp_path / "zoo", **TOWER)["duplicated"] == [
        "model.connector.latents from perceiver.latents and module.perceiver.latents"
    ]


def test_two_values_of_one_tensor_in_a_full_save_are_named(tmp_path):
    openflamingo_save(tmp_path)
    proper, alias = "lang_encoder.model.layers.1.gated_cross_attn_layer.ff_gate", "gated_cross_attn_layers.1.ff_gate"
    edit_save(tmp_path, lambda state: state.update({f"lang_encoder.{alias}": state[proper] + 1}))
    assert problems_of(tmp_path, tmp_path / "zoo") == {"duplicated": [f"lang_encoder.{alias} and {proper}"]}


@pytest.mark.parametrize("name", ["perceiver.media_time_embs", "lang_encoder.model.layers.1.gated_cross_attn_layer.x"])
def test_an_unknown_tensor_of_openflamingo_is_named(name, tmp_path):
    openflamingo_save(tmp_path)
    edit_save(tmp_path, lambda state: state.update({name: torch.ones(3)}))
    assert problems_of(tmp_path, tmp_path / "zoo", **TOWER) == {"unknown": [name]}


def test_a_missing_tensor_of_openflamingo_is_named(tmp_path):
    openflamingo_save(tmp_path)
    edit_save(tmp_path, lambda state: {name: state[name] for name in state if name != "perceiver.norm.bias"})
    assert problems_of(tmp_path, tmp_path / "zoo", **TOWER) == {"missing": ["model.connector.norm.bias"]}


def test_what_a_file_of_open_clip_does_not_say_is_assumed_aloud(tmp_path, caplog):
    flamingo.convert(openflamingo_save(tmp_path), tmp_path / "zoo", verify=False)
    assert "is 24 wide, and the file does not say how many heads it has: 2 are assumed; --vision-heads" in caplog.text
    assert "gelu is assumed; --vision-act" in caplog.text


@pytest.mark.parametrize(
    ("width", "heads", "act"), [(768, 12, "gelu"), (1024, 16, "quick_gelu"), (1280, 16, "gelu"), (1664, 16, "gelu")]
)
def test_towers_of_open_clip_have_their_heads(width, heads, act, caplog):
    shapes = {"conv1.weight": (width, 3, 14, 14), "positional_embedding": (257, width)}
    shapes["transformer.resblocks.0.mlp.c_fc.weight"] = (4 * width, width)
    infos = {name: engine.TensorInfo(Path(), name, shape, torch.float32) for name, shape in shapes.items()}
    config = openflamingo.open_clip_config({f"{openflamingo.TOWER}{name}": infos[name] for name in infos}, None, None)
    assert (config.num_attention_heads, config.hidden_act, config.image_size) == (heads, act, 224)
    assert "heads" not in caplog.text and f"{act} is assumed" in caplog.text


def test_a_json_file_beside_the_save_may_say_it(tmp_path):
    openflamingo_save(tmp_path)
    facts = {"vision_heads": 3, "vision_hidden_act": "quick_gelu"}
    (tmp_path / "notes.json").write_text(json.dumps(facts))
    (tmp_path / "list.json").write_text("[]")
    flamingo.convert(tmp_path, tmp_path / "zoo", verify=False)
    vision = AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo").config.vision_config
    assert (vision.num_attention_heads, vision.hidden_act) == (3, "quick_gelu")


def test_a_missing_language_model_is_asked_for(tmp_path):
    openflamingo_save(tmp_path)
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-llm")
    shutil.move(tmp_path / "llm", elsewhere)
    with pytest.raises(ConversionError, match="--language-model"):
        flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)
    flamingo.convert(tmp_path, tmp_path / "zoo", verify=False, language_model=str(elsewhere), **TOWER)
    assert (tmp_path / "zoo" / "model.safetensors").is_file()


def test_a_missing_tower_is_asked_for(tmp_path):
    openflamingo_save(tmp_path)
    (tmp_path / "open_clip_visual.pt").unlink()
    with pytest.raises(ConversionError, match="--vision-tower"):
        flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)


def test_a_language_model_that_hands_nothing_on_to_its_layers_is_refused(tmp_path):
    openflamingo_save(tmp_path)
    path = tmp_path / "llm" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "mpt"}))
    with pytest.raises(ConversionError, match="of type 'mpt'; known are llama, opt, gpt_neox"):
        flamingo.convert(tmp_path, tmp_path / "zoo", language_model=str(tmp_path / "llm"), **TOWER)


def test_an_image_token_that_nothing_says_is_asked_for(tmp_path):
    openflamingo_save(tmp_path, added=40)
    with pytest.raises(ConversionError, match="--image-token-id"):
        flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)
    flamingo.convert(tmp_path, tmp_path / "zoo", verify=False, image_token_id=260, **TOWER)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo").config.image_token_id == 260


def test_a_tokenizer_of_another_language_model_is_refused(tmp_path):
    openflamingo_save(tmp_path, added=3)
    tiny_tokenizer(image_token=None).save_pretrained(tmp_path / "llm")
    with pytest.raises(ConversionError, match="has 261 tokens with those that OpenFlamingo adds, the checkpoint 262"):
        flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    openflamingo_save(tmp_path)
    torch.save({"perceiver.latents": Exploit()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConversionError, match="refused"):
        flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)
    assert not (tmp_path / "run").exists()


def test_options_of_openflamingo_mean_nothing_to_an_idefics(source, tmp_path):
    with pytest.raises(ConversionError, match="--vision-heads mean nothing"):
        flamingo.convert(source, tmp_path / "zoo", vision_heads=2)


def test_an_image_processor_means_nothing_to_an_openflamingo(tmp_path):
    with pytest.raises(ConversionError, match="--image-processor means nothing"):
        flamingo.convert(openflamingo_save(tmp_path), tmp_path / "zoo", image_processor=str(tmp_path))


def test_another_architecture_is_refused_by_name(source, tmp_path):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llava"}))
    with pytest.raises(ConversionError, match="'llava'"):
        flamingo.convert(source, tmp_path / "zoo")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower"),
        ("model.connector.latents", "connector"),
        ("model.fusion.blocks.0.query.weight", "language_model.first_layer"),
        ("model.fusion.blocks.1.feed_forward_gate_in.weight", "language_model.last_layer"),
        ("lm_head.weight", "logits"),
    ],
)
def test_a_swapped_weight_is_reported_at_its_stage(name, stage, tmp_path):
    flamingo.convert(ORACLES / "hf457_idefics", tmp_path / "zoo", verify=False)
    damage(tmp_path / "zoo", lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
        flamingo.verify(ORACLES / "hf457_idefics", tmp_path / "zoo")


def test_keys_for_values_are_found_by_the_proof(tmp_path, monkeypatch):
    openflamingo_save(tmp_path)
    swapped = ((r"\.to_kv\.", (".to_v.", ".to_k.")), *openflamingo.SPLIT[1:])
    monkeypatch.setattr(openflamingo, "SPLIT", swapped)
    with pytest.raises(ConversionError, match="from the stage 'connector' on"):
        flamingo.convert(tmp_path, tmp_path / "zoo", **TOWER)
    assert not (tmp_path / "zoo").exists() and (tmp_path / "zoo.parity.json").is_file()


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_converts_and_proves(idefics_folder, tmp_path, capsys):
    zoo = str(tmp_path / "zoo")
    assert flamingo.main([str(idefics_folder), zoo]) == 0
    assert "greedy_text" in capsys.readouterr().out
    assert flamingo.main([str(idefics_folder), zoo, "--verify"]) == 0


def test_the_command_line_takes_what_a_save_does_not_say(tmp_path, capsys):
    home, zoo = str(openflamingo_save(tmp_path, added=40)), str(tmp_path / "zoo")
    assert flamingo.main([home, zoo]) == 1
    assert "--image-token-id" in capsys.readouterr().err
    options = {"--image-token-id": "260", "--vision-heads": "3", "--vision-act": "quick_gelu"}
    assert flamingo.main([home, zoo, "--no-verify", *(word for pair in options.items() for word in pair)]) == 0
    vision = AutoModelForImageTextToText.from_pretrained(zoo).config.vision_config
    assert (vision.num_attention_heads, vision.hidden_act) == (3, "quick_gelu")


def test_a_dry_run_shows_the_key_map_and_writes_nothing(idefics_folder, tmp_path, capsys):
    assert flamingo.main([str(idefics_folder), str(tmp_path / "zoo"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "model.embed_tokens.weight -> model.language_model.embed_tokens.weight  float32[262, 32]" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_zoo_builds_what_a_conversion_writes(converted):
    model, info = ZooFlamingoForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()) and model.config.feed_forward_without_media
