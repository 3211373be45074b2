"""BLIP-2 and InstructBLIP conversions: the numbers of every source, LAVIS' parts, and nothing silent on the way."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaTokenizer,
    LlavaConfig,
    T5Config,
)
from transformers.models.bert.modeling_bert import BertConfig, BertLMPredictionHead

from conversion import blip2, engine, flow, lavis, parity
from conversion.edits import AddKeyBias
from conversion.engine import ConversionError
from conversion.lavis_pretraining import stage_1_from_lavis
from vlm_zoo import AutoModelForVision2Seq
from vlm_zoo.models.blip2 import ZooBlip2Config, ZooBlip2ForConditionalGeneration, ZooBlip2Processor
from vlm_zoo.testing.tiny import TINY_TEXT, tiny_tokenizer


ORACLES = Path(__file__).parent / "oracles"
NAMES = ["hf457_blip2", "hf457_instructblip", "lavis_blip2_opt", "lavis_instructblip_vicuna"]
TOLERANCE = 5e-6
SIZE, QUERIES = 32, 6
IMAGE_TOKEN_ID = tiny_tokenizer().convert_tokens_to_ids("<image>")
KINDS = {
    "blip2": (Blip2Config, Blip2ForConditionalGeneration),
    "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
}
# All widths differ, so that no tensor fits where another belongs.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 270,
    "max_position_embeddings": 128,
}


def randomised(model):
    """Every parameter random, biases and queries among them, norms around the zero or one that they start from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = parameter[0].item() if "norm" in name.lower() else 0.0
            parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def upstream(kind="blip2", text="llama", tied=False, **qformer):
    """A tiny random model of transformers, with eager attention."""
    config_class, model_class = KINDS[kind]
    config = config_class(
        vision_config=VISION,
        qformer_config={**QFORMER, **qformer},
        text_config={**TINY_TEXT[text], "tie_word_embeddings": tied},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN_ID,
    )
    model = randomised(model_class(config))
    model.set_attn_implementation("eager")
    return model


def model_inputs(kind="blip2", before=0):
    """Three rows with an image each, padded at the left, and a question each, padded at the right."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 250, (3, 16), generator=generator), torch.ones(3, 16, dtype=torch.long)
    for row, padding in enumerate((0, 3, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
        ids[row, padding + before : padding + before + QUERIES] = IMAGE_TOKEN_ID
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(3, 3, SIZE, SIZE, generator=generator),
    }
    if kind == "instructblip":
        asked = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
        inputs |= {
            "qformer_input_ids": torch.randint(1, 200, (3, 9), generator=generator) * asked,
            "qformer_attention_mask": asked,
        }
    return inputs


@torch.no_grad()
def largest_difference(source, zoo, inputs):
    """Of the logits at tokens that are no padding."""
    seen = inputs["attention_mask"].bool()
    difference = (source(**inputs).logits - zoo(**inputs).logits)[seen].abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


def processor(kind="blip2", tokenizer=None):
    tokenizer = opening_tokenizer() if tokenizer is None else tokenizer
    pixels = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    if kind == "instructblip":
        return InstructBlipProcessor(pixels, tokenizer, tiny_tokenizer(image_token=None), num_query_tokens=QUERIES)
    return Blip2Processor(pixels, tokenizer, num_query_tokens=QUERIES)


def opening_tokenizer(image_token="<image>"):
    """A tokenizer that opens every text with a token, as those of OPT and Vicuna do."""
    tokenizer = tiny_tokenizer(image_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def picture(height, width):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def weights(folder):
    return {
        name: tensor for path in Path(folder).glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders that transformers wrote, each with its processor."""
    home = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        upstream(kind).save_pretrained(home / kind)
        processor(kind).save_pretrained(home / kind)
    return home


@pytest.fixture
def source(sources, tmp_path):
    """A copy of the InstructBLIP source to damage."""
    shutil.copytree(sources / "instructblip", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    home = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        blip2.convert(sources / kind, home / kind)
    return home


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TINY_TEXT)
def test_any_language_model_gives_the_logits_of_transformers(text, kind):
    source = upstream(kind, text)
    zoo = blip2.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(kind)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_gives_the_logits_of_transformers(kind):
    source = upstream(kind, "opt", tied=True)
    zoo = blip2.zoo_from_transformers(source)
    assert zoo.lm_head.weight is zoo.get_input_embeddings().weight
    assert largest_difference(source, zoo, model_inputs(kind)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_amid_text_gives_the_logits_of_transformers(kind):
    source = upstream(kind)
    zoo = blip2.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(kind, before=4)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_of_a_padded_batch_is_that_of_transformers(kind):
    source = upstream(kind)
    zoo = blip2.zoo_from_transformers(source)
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN_ID]}
    expected, found = (model.generate(**model_inputs(kind), **options) for model in (source, zoo))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("frequency", [1, 3])
def test_any_frequency_of_cross_attention_gives_the_logits_of_transformers(frequency):
    source = upstream(cross_attention_frequency=frequency)
    zoo = blip2.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs()) <= TOLERANCE


def test_feed_forwards_for_text_that_nothing_reads_are_left_out():
    source = upstream(use_qformer_text_input=True)
    zoo = blip2.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs()) <= TOLERANCE


def test_the_model_in_memory_shares_no_weight_with_its_source():
    source = upstream()
    zoo = blip2.zoo_from_transformers(source)
    with torch.no_grad():
        source.query_tokens.zero_()
    assert zoo.model.connector.query_tokens.abs().sum() > 0


def test_the_model_in_memory_keeps_dtype_mode_and_attention():
    source = upstream().to(torch.bfloat16).train()
    zoo = blip2.zoo_from_transformers(source)
    configs = (zoo.config, zoo.config.vision_config, zoo.config.text_config)
    assert (zoo.dtype, zoo.training) == (torch.bfloat16, True)
    assert {config._attn_implementation for config in configs} == {"eager"}


@pytest.mark.parametrize("config_class", [Blip2Config, InstructBlipConfig])
def test_an_encoder_decoder_is_refused_with_the_reason(config_class):
    config = config_class(text_config=T5Config().to_dict(), image_token_index=5)
    with pytest.raises(ConversionError, match=r"\(t5\) is an encoder-decoder.* one hidden state for every token"):
        blip2.zoo_config(config)


def test_a_config_without_image_token_is_refused():
    with pytest.raises(ConversionError, match="no image_token_index"):
        blip2.zoo_config(Blip2Config())


# --- oracles ---------------------------------------------------------------------------------------------------------


def oracle_inputs(oracle, image_token_id):
    """The inputs of an oracle; LAVIS puts the queries before the text, and sees 1 as padding."""
    if "in.input_ids" in oracle:
        return {name.removeprefix("in."): value for name, value in oracle.items() if name.startswith("in.")}
    text = oracle["in.llm_ids"] if "in.llm_ids" in oracle else oracle["in.text_ids"]
    image = torch.full((len(text), QUERIES), image_token_id)
    ids = torch.cat((image, text), dim=1)
    asked = {"qformer_input_ids": oracle["in.qformer_ids"]} if "in.qformer_ids" in oracle else {}
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "pixel_values": oracle["in.image"], **asked}


@pytest.mark.parametrize("name", NAMES)
def test_upstream_logits_come_out_of_the_converted_checkpoint(name, tmp_path):
    report = blip2.convert(ORACLES / name, tmp_path / "zoo")
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "zoo", attn_implementation="eager")
    oracle = load_file(ORACLES / name / "oracle.safetensors")
    inputs, expected = oracle_inputs(oracle, model.config.image_token_id), oracle["out.logits"]
    with torch.no_grad():
        found = model(**inputs).logits[..., : expected.shape[-1]]
        moved = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits[..., : expected.shape[-1]]
    difference = (found - expected).abs().max().item()
    print(f"{name}: {difference:.1e}")
    assert difference <= TOLERANCE
    assert (moved - expected).abs().max() > 1e-3
    assert report["passed"] and report["image_sensitivity"] > 1e-3


# --- LAVIS -----------------------------------------------------------------------------------------------------------

# Names of transformers, and those of LAVIS; all that match apply.
TO_LAVIS = (
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
    (r"^(visual_encoder\..+)\.self_attn\.projection\.", r"\1.attn.proj."),
    (r"^(visual_encoder\..+)\.self_attn\.", r"\1.attn."),
    (r"^(visual_encoder\..+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^qformer\.(?:embeddings\.)?layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^(?:qformer\.)?embeddings\.(word|position)_", r"Qformer.bert.embeddings.\1_"),
    (r"^qformer\.encoder\.", "Qformer.bert.encoder."),
    (r"attention\.attention\.", "attention.self."),
    (r"^vision_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
)


def lavis_state(model, prefix="llm"):
    """The weights of a model of transformers as LAVIS would save them all."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^language_projection\.", f"{prefix}_proj.", name)
        name = re.sub(r"^language_model\.", f"{prefix}_model.", name)
        for pattern, replacement in TO_LAVIS:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".attn.qkv.bias"):
            state[name.replace("qkv.bias", "q_bias")], _, state[name.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
        else:
            state[name] = tensor
    return {name: tensor.clone() for name, tensor in state.items()}


def without_key_bias(model):
    """LAVIS' tower has no bias of keys, and an epsilon of its own after the last layer."""
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias.chunk(3)[1].zero_()
    model.vision_model.post_layernorm.eps = 1e-5
    return model


def write_lavis(folder, model, prefix="llm", whole=False):
    """A LAVIS folder: what trained, the tower and the language model; or all of it in one save."""
    folder.mkdir()
    state = lavis_state(model, prefix)
    model.language_model.save_pretrained(folder / "llm")
    tower = {name: state.pop(name) for name in list(state) if name.startswith("visual_encoder.")}
    torch.save(
        {name.removeprefix("visual_encoder."): tensor for name, tensor in tower.items()}, folder / "eva_vit_g.pth"
    )
    language = {name: state.pop(name) for name in list(state) if name.startswith(f"{prefix}_model.")}
    if whole:
        state |= {**tower, **language}
        (folder / "eva_vit_g.pth").unlink()
        (folder / "llm" / "model.safetensors").unlink()
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}}, folder / "checkpoint_best.pth")
    return folder


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """LAVIS folders of the same models, in parts and whole."""
    home = tmp_path_factory.mktemp("lavis")
    for kind, text, prefix in (("blip2", "opt", "opt"), ("instructblip", "llama", "llm")):
        model = without_key_bias(upstream(kind, text))
        write_lavis(home / kind, model, prefix)
        write_lavis(home / f"{kind}_whole", model, prefix, whole=True)
    return home


@pytest.mark.parametrize(("kind", "text"), [("blip2", "opt"), ("instructblip", "llama")])
def test_a_save_gives_the_logits_of_transformers_with_lavis_epsilon(kind, text, saves, tmp_path):
    assert blip2.convert(saves / kind, tmp_path / "zoo")["passed"]
    zoo = parity.load_strictly(ZooBlip2ForConditionalGeneration, tmp_path / "zoo")
    source, inputs = without_key_bias(upstream(kind, text)), model_inputs(kind)
    with torch.no_grad():
        difference = (source(**inputs).logits - _with_image_token(zoo, inputs)[..., :320]).abs()
    print(f"largest difference of the logits: {difference[inputs['attention_mask'].bool()].max():.1e}")
    assert difference[inputs["attention_mask"].bool()].max() <= TOLERANCE


def _with_image_token(zoo, inputs):
    ids, image = inputs["input_ids"], zoo.config.image_token_id
    return zoo(**{**inputs, "input_ids": ids.masked_fill(ids == IMAGE_TOKEN_ID, image)}).logits


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_one_save_of_everything_give_the_same_weights(kind, saves, tmp_path):
    blip2.convert(saves / kind, tmp_path / "parts", verify=False)
    blip2.convert(saves / f"{kind}_whole", tmp_path / "whole")
    assert same_bits(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_save_is_found_by_its_file_and_its_parts_by_options(saves, tmp_path):
    shutil.copytree(saves / "blip2", tmp_path / "home")
    (tmp_path / "home" / "eva_vit_g.pth").rename(tmp_path / "tower.pth")
    (tmp_path / "home" / "llm").rename(tmp_path / "opt")
    file = tmp_path / "home" / "checkpoint_best.pth"
    with pytest.raises(ConversionError, match="--language-model"):
        blip2.convert(file, tmp_path / "zoo")
    with pytest.raises(ConversionError, match="--vision-tower"):
        blip2.convert(file, tmp_path / "zoo", language_model=tmp_path / "opt")
    options = {"language_model": tmp_path / "opt", "vision_tower": tmp_path / "tower.pth"}
    blip2.convert(file, tmp_path / "zoo", verify=False, **options)
    blip2.convert(saves / "blip2", tmp_path / "same", verify=False)
    assert same_bits(weights(tmp_path / "zoo"), weights(tmp_path / "same"))


def test_what_trained_stands_in_for_the_part_that_it_was_trained_from(saves, tmp_path):
    shutil.copytree(saves / "blip2", tmp_path / "home")
    path = tmp_path / "home" / "checkpoint_best.pth"
    content = torch.load(path, weights_only=True)
    content["model"]["visual_encoder.blocks.0.norm1.bias"] = torch.full((32,), 7.0)
    torch.save(content, path)
    blip2.convert(tmp_path / "home", tmp_path / "zoo")
    assert (weights(tmp_path / "zoo")["model.vision_tower.encoder.layers.0.layer_norm1.bias"] == 7).all()


def test_several_saves_in_a_folder_are_listed(saves, tmp_path):
    shutil.copytree(saves / "blip2", tmp_path / "home")
    shutil.copy(tmp_path / "home" / "checkpoint_best.pth", tmp_path / "home" / "checkpoint_3.pth")
    with pytest.raises(ConversionError, match=r"name one of them: checkpoint_3\.pth, checkpoint_best\.pth"):
        blip2.convert(tmp_path / "home", tmp_path / "zoo")


def test_a_save_with_flan_t5_is_refused_with_the_reason(tmp_path):
    state = {"query_tokens": torch.ones(1, 4, 8), "t5_proj.weight": torch.ones(8, 8)}
    torch.save({"model": state}, tmp_path / "blip2_t5.pth")
    with pytest.raises(ConversionError, match=r"\(t5\) is an encoder-decoder"):
        blip2.convert(tmp_path, tmp_path / "zoo")


def test_heads_that_no_shape_shows_are_assumed_with_a_warning_or_given(saves, caplog):
    source = blip2.open_source(saves / "blip2")
    assert (source.config.vision_config.num_attention_heads, source.config.qformer_num_attention_heads) == (2, 2)
    assert "2 are assumed; --vision-heads" in caplog.text and "2 are assumed; --qformer-heads" in caplog.text
    caplog.clear()
    source = blip2.open_source(saves / "blip2", vision_heads=4, qformer_heads=3)
    assert (source.config.vision_config.num_attention_heads, source.config.qformer_num_attention_heads) == (4, 3)
    assert "heads" not in caplog.text


@pytest.mark.parametrize(("width", "heads"), [(24, 2), (128, 2), (176, 2), (704, 11)])
def test_heads_of_a_width_that_no_release_has_are_never_assumed_silently(width, heads, caplog):
    assert flow.attention_heads("tower", "--vision-heads", width, lavis.TOWER_HEADS, None) == heads
    assert f"No released tower is {width} wide" in caplog.text and f"{heads} are assumed" in caplog.text


def test_the_shapes_of_the_released_checkpoint_give_the_released_sizes(caplog):
    shapes = {
        "query_tokens": (1, 32, 768),
        "eva_vit_g: patch_embed.proj.weight": (1408, 3, 14, 14),
        "eva_vit_g: pos_embed": (1, 257, 1408),
        **{f"eva_vit_g: blocks.{index}.mlp.fc1.weight": (6144, 1408) for index in range(40)},
        "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight": (3072, 768),
        **{f"Qformer.bert.encoder.layer.{index}.attention.self.key.bias": (768,) for index in range(12)},
        **{f"Qformer.bert.encoder.layer.{index}.crossattention.self.key.bias": (768,) for index in range(0, 12, 2)},
    }
    tensors = {name: engine.TensorInfo(Path(), name, shape, torch.float32) for name, shape in shapes.items()}
    released, config = Blip2Config(), ZooBlip2Config(**lavis.read_sizes(tensors))
    assert config.vision_config.to_dict() == released.vision_config.to_dict()
    for name, zoo in blip2.QFORMER_FIELDS.items():
        assert getattr(config, f"qformer_{zoo}") == getattr(released.qformer_config, name), name
    assert "heads" not in caplog.text


def test_the_bias_of_keys_goes_and_comes_back_exactly():
    bias = torch.randn(10)
    whole = AddKeyBias().apply(bias)
    assert whole.shape == (15,) and not whole[5:10].any()
    assert torch.equal(AddKeyBias().undo(whole, len(bias)), bias)


def test_a_bias_of_keys_that_would_be_lost_is_refused():
    with pytest.raises(ConversionError, match="1 of 5 are not zero"):
        AddKeyBias().undo(torch.arange(15) == 7, 10)


def test_a_tower_with_a_layer_more_than_lavis_builds_loses_it_to_the_side_file(saves, tmp_path, monkeypatch):
    monkeypatch.setattr(lavis, "TOWER_DEPTH", {32: 39})
    shutil.copytree(saves / "blip2", tmp_path / "home")
    tower = torch.load(tmp_path / "home" / "eva_vit_g.pth", weights_only=True)
    layer = {name: tensor for name, tensor in tower.items() if name.startswith("blocks.0.")}
    for index in range(3, 40):
        tower |= {name.replace("blocks.0.", f"blocks.{index}."): tensor for name, tensor in layer.items()}
    tower |= {"norm.weight": torch.ones(32), "head.bias": torch.ones(5)}
    torch.save(tower, tmp_path / "home" / "eva_vit_g.pth")
    blip2.convert(tmp_path / "home", tmp_path / "zoo", verify=False)
    dropped = load_file(tmp_path / "zoo" / engine.DROPPED).keys()
    kept = weights(tmp_path / "zoo").keys()
    assert {"model.vision_tower.norm.weight", "model.vision_tower.head.bias"} <= dropped
    assert "model.vision_tower.encoder.layers.39.layer_norm1.bias" in dropped
    assert "model.vision_tower.encoder.layers.38.layer_norm1.bias" in kept


def test_position_ids_wait_aside(tmp_path):
    blip2.convert(ORACLES / "lavis_blip2_opt", tmp_path / "zoo", verify=False)
    assert list(load_file(tmp_path / "zoo" / engine.DROPPED)) == ["model.connector.qformer.position_ids"]


@pytest.mark.parametrize(
    ("edit", "kind", "named"),
    [
        (lambda state: state.pop("ln_vision.bias"), "missing", "model.connector.vision_norm.bias"),
        (lambda state: state.update({"Qformer.extra": torch.ones(2)}), "unknown", "Qformer.extra"),
        (
            lambda state: state.update({"opt_proj.bias": torch.ones(2)}),
            "wrong shape",
            "opt_proj.bias is [2], expected",
        ),
        (lambda state: state.update({"llm_proj.bias": torch.ones(48)}), "duplicated", "model.connector.projection."),
    ],
)
def test_a_damaged_save_is_described(edit, kind, named, saves, tmp_path):
    shutil.copytree(saves / "blip2", tmp_path / "home")
    path = tmp_path / "home" / "checkpoint_best.pth"
    content = torch.load(path, weights_only=True)
    edit(content["model"])
    torch.save(content, path)
    with pytest.raises(ConversionError) as caught:
        blip2.convert(tmp_path / "home", tmp_path / "zoo")
    assert [problem[: len(named)] for problem in caught.value.problems[kind]] == [named]
    assert not (tmp_path / "zoo").exists()


def test_a_bias_without_its_partner_is_named(saves, tmp_path):
    shutil.copytree(saves / "blip2", tmp_path / "home")
    path = tmp_path / "home" / "eva_vit_g.pth"
    tower = torch.load(path, weights_only=True)
    del tower["blocks.1.attn.v_bias"]
    torch.save(tower, path)
    with pytest.raises(ConversionError) as caught:
        blip2.convert(tmp_path / "home", tmp_path / "zoo")
    (found,) = caught.value.problems["wrong shape"]
    assert found == "eva_vit_g: blocks.1.attn.q_bias is [32], expected [64]"


def test_a_save_with_a_tokenizer_gets_its_processor(saves, tmp_path):
    shutil.copytree(saves / "blip2", tmp_path / "home")
    opening_tokenizer(image_token=None).save_pretrained(tmp_path / "home" / "llm")
    report = blip2.convert(tmp_path / "home", tmp_path / "zoo")
    zoo = AutoProcessor.from_pretrained(tmp_path / "zoo")
    settings = json.loads((tmp_path / "zoo" / "generation_config.json").read_text())
    line_break = tiny_tokenizer()("\n", add_special_tokens=False)["input_ids"]
    assert [row["stage"] for row in report["stages"][:2]] == ["input_ids", "pixels"]
    assert (zoo.image_token, zoo.num_query_tokens) == ("<image>", QUERIES)
    assert zoo.image_token_id == len(tiny_tokenizer(image_token=None))  # a row that the language model has
    assert [settings["eos_token_id"]] == line_break
    assert settings["suppress_tokens"] == [zoo.image_token_id]


def test_the_tokenizer_of_an_instructblip_opens_with_what_ends_a_text(saves, tmp_path):
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    vicuna = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    vicuna.save_pretrained(tmp_path / "words")
    tiny_tokenizer(image_token=None).save_pretrained(tmp_path / "questions")
    options = {"tokenizer": tmp_path / "words", "qformer_tokenizer": tmp_path / "questions"}
    report = blip2.convert(saves / "instructblip", tmp_path / "zoo", **options)
    zoo = AutoProcessor.from_pretrained(tmp_path / "zoo")
    assert report["stages"][0] == {"stage": "input_ids", "dtype": "int64", "equal": True}
    assert (zoo.tokenizer.bos_token, zoo.tokenizer.unk_token, zoo.tokenizer.pad_token) == ("</s>", "</s>", "[PAD]")
    assert vicuna("?")["input_ids"][:1] == [1] and zoo.tokenizer("?")["input_ids"][:1] == [2]
    assert zoo.image_token_id == len(vicuna) + 1  # behind the padding that LAVIS adds
    assert (tmp_path / "zoo" / "qformer_tokenizer" / "tokenizer.json").is_file()


def test_a_vocabulary_without_room_grows_by_the_mean_embedding(saves, tmp_path):
    blip2.convert(saves / "blip2", tmp_path / "zoo")
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "zoo")
    embeddings = model.get_input_embeddings().weight
    assert model.config.image_token_id == 320 and embeddings.shape == (321, 48)
    torch.testing.assert_close(embeddings[320], embeddings[:320].mean(dim=0))


# --- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """transformers' model for retrieval, and the same weights as LAVIS saves them, with a head for words."""
    home = tmp_path_factory.mktemp("stage_1")
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=20,
    )
    model = without_key_bias(randomised(Blip2ForImageTextRetrieval(config)))
    model.set_attn_implementation("eager")
    words = model.embeddings.word_embeddings.weight
    head = randomised(BertLMPredictionHead(BertConfig(vocab_size=QFORMER["vocab_size"], hidden_size=24)))
    state = lavis_state(model)
    tower = {name: state.pop(name) for name in list(state) if name.startswith("visual_encoder.")}
    torch.save(
        {name.removeprefix("visual_encoder."): tensor for name, tensor in tower.items()}, home / "eva_vit_g.pth"
    )
    state |= {f"Qformer.cls.predictions.{name}": tensor for name, tensor in head.state_dict().items()}
    state["Qformer.cls.predictions.decoder.weight"] = words.detach().clone()
    state["Qformer.cls.predictions.decoder.bias"] = head.bias.detach().clone()
    state |= {"Qformer.bert.embeddings.position_ids": torch.arange(128)[None], "temp": torch.tensor(0.05)}
    torch.save({"model": state}, home / "blip2_pretrained.pth")
    return model, head, home / "blip2_pretrained.pth"


def captions():
    """Captions as LAVIS' tokenizer makes them, [CLS] first, and without it."""
    ids = torch.randint(2, 200, (3, 8))
    ids[:, 0] = 101
    mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).long()
    return ids, mask, torch.randn(3, 3, SIZE, SIZE)


@torch.no_grad()
def test_stage_1_compares_images_and_texts_as_transformers_does(stage_1):
    upstream_model, _, path = stage_1
    zoo = stage_1_from_lavis(path)
    ids, mask, pixels = captions()
    expected = upstream_model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits_per_image
    found = zoo.get_image_text_similarity(pixels, ids[:, 1:], mask[:, 1:])
    print(f"largest difference of the similarities: {(expected - found).abs().max():.1e}")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_stage_1_matches_images_and_texts_as_transformers_does(stage_1):
    upstream_model, _, path = stage_1
    zoo = stage_1_from_lavis(path)
    ids, mask, pixels = captions()
    asked = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "use_image_text_matching_head": True}
    expected = upstream_model(**asked).logits_per_image
    found = zoo.match(zoo.see(pixels), ids[:, 1:], mask[:, 1:].bool())
    print(f"largest difference of the logits: {(expected - found).abs().max():.1e}")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_stage_1_has_berts_head_for_words_and_two_rows_of_its_vocabulary_as_marks(stage_1):
    upstream_model, head, path = stage_1
    zoo = stage_1_from_lavis(path)
    words, states = upstream_model.embeddings.word_embeddings.weight, torch.randn(2, 24)
    assert torch.equal(zoo.qformer.marks.weight, words[[101, -1]])
    torch.testing.assert_close(
        zoo.text_head(states, zoo.qformer.word_embeddings), head.transform(states) @ words.T + head.bias
    )
    assert zoo.temperature == 0.05


def test_stage_1_starts_stage_2(stage_1, tmp_path):
    torch.manual_seed(0)
    config = upstream(text="opt").config.text_config
    stage_1_from_lavis(stage_1[2], text_config=config).save_pretrained(tmp_path / "stage-1")
    blip2.zoo_from_transformers(upstream(text="opt")).save_pretrained(tmp_path / "built")
    parts = {"connector": tmp_path / "stage-1"}
    model = ZooBlip2ForConditionalGeneration.from_pretrained(tmp_path / "built", parts_from=parts)
    assert torch.equal(model.model.connector.query_tokens, stage_1[0].query_tokens)


def test_the_command_line_names_what_reads_stage_1(stage_1, tmp_path):
    with pytest.raises(ConversionError, match=r"conversion\.lavis_pretraining"):
        blip2.convert(stage_1[2], tmp_path / "zoo")


# --- folders and processors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_carries_its_processor_its_card_and_its_proof(kind, converted):
    folder = converted / kind
    report = json.loads((folder / parity.REPORT).read_text())
    assert [row["stage"] for row in report["stages"]] == ["input_ids", "pixels", *parity.STAGES, "greedy_text"]
    assert all(row["max_abs_diff"] <= TOLERANCE for row in report["stages"][2:-1])
    assert report["passed"] and report["image_sensitivity"] > 1e-3
    assert isinstance(AutoProcessor.from_pretrained(folder), ZooBlip2Processor)
    assert (folder / "qformer_tokenizer").is_dir() == (kind == "instructblip")
    assert "conversion.blip2" in (folder / "README.md").read_text()
    assert (folder / "blip2.py").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_there_keeps_every_bit(kind, sources, converted):
    source, zoo = weights(sources / kind), weights(converted / kind)
    if kind == "instructblip":
        zoo |= load_file(converted / kind / engine.DROPPED)
    record = json.loads((converted / kind / engine.RECORD).read_text())
    assert record["names"].keys() == source.keys() and set(record["names"].values()) == zoo.keys()
    assert same_bits({record["names"][name]: tensor for name, tensor in source.items()}, zoo)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_and_processor_answer_a_chat(kind, converted):
    model = AutoModelForVision2Seq.from_pretrained(converted / kind)
    zoo = AutoProcessor.from_pretrained(converted / kind)
    image = {"type": "image", "image": picture(40, 60)}
    question = [{"role": "user", "content": [image, {"type": "text", "text": "Eh?"}]}]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = zoo.apply_chat_template(question, add_generation_prompt=True, **call)
    assert ("qformer_input_ids" in inputs) == (kind == "instructblip")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert model.config.response_token_ids == tiny_tokenizer()("ASSISTANT:", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_pixels_are_those_of_the_sources_processor(kind, sources, converted):
    before = blip2.open_source(sources / kind).processor
    zoo = blip2.ZooPrompts(AutoProcessor.from_pretrained(converted / kind))
    generator = np.random.default_rng(0)
    for height, width in generator.integers(9, 140, (10, 2)).tolist():
        call = {"images": [picture(height, width)], "text": ["<image>Question: what?\nAnswer:"]}
        expected, found = before(**call), zoo(**call)
        assert expected.keys() - {"pixel_values"} == found.keys() - {"pixel_values"}
        assert all(torch.equal(expected[name], found[name]) for name in found if name != "pixel_values")
        levels = (expected["pixel_values"] - found["pixel_values"]).abs().max() * 255 * 0.2758
        assert levels <= (2.2 if (height < SIZE) != (width < SIZE) else 1.1), (height, width)


def test_files_of_version_4_are_read(source, converted, tmp_path):
    settings = json.loads((source / "processor_config.json").read_text())
    (source / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (source / "processor_config.json").write_text(json.dumps({"processor_class": "InstructBlipProcessor"}))
    report = blip2.convert(source, tmp_path / "zoo")
    assert report["stages"][0] == {"stage": "input_ids", "dtype": "int64", "equal": True}


def test_a_source_without_processor_converts_as_a_model_with_a_warning(source, tmp_path, caplog):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    shutil.rmtree(source / "qformer_tokenizer")
    report = blip2.convert(source, tmp_path / "zoo")
    assert "no tokenizer and no image processor and no qformer tokenizer" in caplog.text
    assert "--qformer-tokenizer" in caplog.text
    assert not (tmp_path / "zoo" / "processor_config.json").exists()
    assert report["passed"]


def test_substitutes_complete_a_source_without_processor(source, sources, tmp_path):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    given = dict.fromkeys(("tokenizer", "image_processor"), sources / "blip2")
    blip2.convert(source, tmp_path / "zoo", **given)
    assert (tmp_path / "zoo" / "processor_config.json").is_file()


def test_a_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_tokens(["other"])
    engine.name_image_token(tokenizer, "<image>").save_pretrained(source)
    with pytest.raises(ConversionError, match=f"is {IMAGE_TOKEN_ID + 1}, the model's image_token_id is"):
        blip2.convert(source, tmp_path / "zoo")


def test_a_q_former_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_tokens([f"word {index}" for index in range(20)])
    tokenizer.save_pretrained(source / "qformer_tokenizer")
    with pytest.raises(ConversionError, match="has 279 tokens, the Q-Former reads 270"):
        blip2.convert(source, tmp_path / "zoo")


def test_an_image_processor_of_another_kind_is_refused(source, tmp_path):
    settings = json.loads((source / "processor_config.json").read_text())
    settings["image_processor"]["image_processor_type"] = "SiglipImageProcessor"
    (source / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="SiglipImageProcessor, expected a BlipImageProcessor"):
        blip2.convert(source, tmp_path / "zoo")


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    upstream().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    assert blip2.convert(tmp_path / "source", tmp_path / "zoo")["passed"]
    assert {tensor.dtype for tensor in weights(tmp_path / "zoo").values()} == {torch.bfloat16}


def test_shards_are_read_and_written(sources, converted, tmp_path):
    upstream("instructblip").save_pretrained(tmp_path / "source", max_shard_size="50KB")
    blip2.convert(tmp_path / "source", tmp_path / "zoo", shard_bytes=50_000, verify=False)
    assert len(list((tmp_path / "zoo").glob("model-*.safetensors"))) > 2
    assert same_bits(weights(tmp_path / "zoo"), weights(converted / "instructblip"))


# --- nothing silent --------------------------------------------------------------------------------------------------


def damage(folder, edit):
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def problems_of(folder, destination):
    with pytest.raises(ConversionError) as caught:
        blip2.convert(folder, destination)
    assert not destination.exists()
    return caught.value.problems


def test_all_problems_are_told_at_once(source, tmp_path):
    def edit(tensors):
        del tensors["qformer.encoder.layer.1.output_query.dense.bias"]
        tensors |= {"extra": torch.ones(1), "language_projection.bias": torch.ones(47)}

    damage(source, edit)
    assert problems_of(source, tmp_path / "zoo") == {
        "unknown": ["extra"],
        "missing": ["model.connector.qformer.layers.1.query_feed_forward.down.bias"],
        "wrong shape": ["language_projection.bias is [47], expected [48]"],
    }


def test_a_missing_tensor_that_the_zoo_would_not_build_is_named_too(source, tmp_path):
    damage(source, lambda tensors: tensors.pop("qformer.encoder.layer.2.output.dense.bias"))
    assert problems_of(source, tmp_path / "zoo") == {
        "missing": ["model.connector.qformer.layers.2.text_feed_forward.down.bias"]
    }


def test_a_layer_of_text_in_a_blip2_is_unknown(sources, tmp_path):
    shutil.copytree(sources / "blip2", tmp_path / "source")
    name = "qformer.encoder.layer.0.intermediate.dense.bias"
    damage(tmp_path / "source", lambda tensors: tensors.update({name: torch.ones(40)}))
    assert problems_of(tmp_path / "source", tmp_path / "zoo") == {"unknown": [name]}


def test_a_swapped_weight_is_reported_at_its_stage(sources, converted, tmp_path):
    for name, stage in {
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias": "vision_tower",
        "model.connector.vision_norm.bias": "connector",
        "model.connector.qformer.layers.1.text_feed_forward.up.bias": "connector",
        "model.language_model.layers.0.mlp.down_proj.weight": "language_model.first_layer",
        "model.language_model.layers.1.mlp.down_proj.weight": "language_model.last_layer",
        "lm_head.weight": "logits",
    }.items():
        zoo = tmp_path / name
        shutil.copytree(converted / "instructblip", zoo)
        damage(zoo, lambda tensors, name=name: tensors.update({name: tensors[name].flip(0)}))
        with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
            blip2.verify(sources / "instructblip", zoo)
        assert json.loads((zoo / parity.REPORT).read_text())["first_failed_stage"] == stage


def test_a_model_for_retrieval_is_refused_by_name(sources, tmp_path):
    shutil.copytree(sources / "blip2", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["Blip2ForImageTextRetrieval"]}))
    with pytest.raises(ConversionError, match="is a Blip2ForImageTextRetrieval, expected a Blip2ForConditional"):
        blip2.convert(tmp_path / "source", tmp_path / "zoo")


def test_another_architecture_is_refused_by_name(tmp_path):
    LlavaConfig().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="'llava'"):
        blip2.convert(tmp_path / "source", tmp_path / "zoo")


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_converts_and_proves(sources, tmp_path, capsys):
    zoo = str(tmp_path / "zoo")
    assert blip2.main([str(sources / "blip2"), zoo]) == 0
    assert "greedy_text" in capsys.readouterr().out
    assert blip2.main([str(sources / "blip2"), zoo, "--verify"]) == 0
    assert blip2.main([str(sources / "blip2"), zoo]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_dry_run_shows_the_key_map_and_writes_nothing(saves, tmp_path, capsys):
    assert blip2.main([str(saves / "instructblip"), str(tmp_path / "zoo"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "eva_vit_g: blocks.0.attn.q_bias -> model.vision_tower.encoder.layers.0.self_attn.qkv.bias" in shown
    assert "layers.2.text_feed_forward.up.bias  float32[40]  (kept aside)" in shown
    assert list(tmp_path.iterdir()) == []
