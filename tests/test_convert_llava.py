"""LLaVA conversions: the numbers of every source, exact ways back, and nothing silent on the way."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from conversion import engine, llava, llava_original, parity
from conversion.engine import ConversionError
from vlm_zoo import AutoModelForVision2Seq
from vlm_zoo.models.llava import ZooLlavaConfig, ZooLlavaForConditionalGeneration
from vlm_zoo.testing.tiny import TINY_TEXT, TINY_VISION, tiny_tokenizer


ORACLES = Path(__file__).parent / "oracles"
TOLERANCE = 1e-5
SIZE, PATCH = 32, 8
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]
IMAGE_TOKEN_ID = tiny_tokenizer().convert_tokens_to_ids("<image>")
TEMPLATE = "{% for m in messages %}{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}{% endfor %}"
IMAGE_SIZES = [(32, 32), (40, 90), (97, 35), (17, 20), (70, 66)]
VISION = {**TINY_VISION, "registers": {**TINY_VISION["dinov2"], "model_type": "dinov2_with_registers"}}
# transformers' own LLaVA ties only to `embed_tokens`.
TEXT = {name: {**config, "tie_word_embeddings": False} for name, config in TINY_TEXT.items()}
TEXT["tied"] = {**TINY_TEXT["llama"], "tie_word_embeddings": True}
TEXT["gemma2"] = {**TEXT["gemma3"], "model_type": "gemma2", "final_logit_softcapping": 3.0}
TEXT["granite"] = {**TEXT["llama"], "model_type": "granite", "logits_scaling": 4.0}


def upstream(next_style=False, vision="clip", text="llama", **fields):
    """A tiny model of transformers in which no parameter is zero or one."""
    config_class, model_class = (
        (LlavaNextConfig, LlavaNextForConditionalGeneration)
        if next_style
        else (LlavaConfig, LlavaForConditionalGeneration)
    )
    if next_style:
        fields = {"image_grid_pinpoints": PINPOINTS, **fields}
    depth = {"num_hidden_layers": 3}
    config = config_class(
        vision_config={**VISION[vision], **depth}, text_config=TEXT[text], image_token_index=IMAGE_TOKEN_ID, **fields
    )
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pixel_inputs(model, image_sizes):
    """Random pixels for images of these sizes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(image_sizes), 10, 3, SIZE, SIZE, generator=generator)
    if isinstance(model, LlavaNextForConditionalGeneration):
        return {"pixel_values": pixels, "image_sizes": torch.tensor(image_sizes)}
    return {"pixel_values": pixels[:, 0]}


def model_inputs(model, image_sizes):
    """One row with all images, text before, between and after them."""
    vision_inputs = pixel_inputs(model, image_sizes)
    ids = [5, 6, 7]
    for features in model.get_image_features(**vision_inputs, return_dict=True).pooler_output:
        ids += [IMAGE_TOKEN_ID] * len(features) + [20 + len(ids) % 50, 9]
    return {"input_ids": torch.tensor([ids]), **vision_inputs}


@torch.no_grad()
def largest_difference(source, zoo, inputs):
    difference = (source(**inputs).logits - zoo(**inputs).logits).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


def greedy(model, inputs):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE_TOKEN_ID])


def image_processor(kind="clip"):
    fields = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    if kind == "next":
        return LlavaNextImageProcessorPil(**fields, image_grid_pinpoints=PINPOINTS)
    if kind == "pad":
        return LlavaImageProcessorPil(**fields, do_pad=True)
    if kind == "siglip":
        return SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return CLIPImageProcessorPil(**fields)


def processor(kind="clip", tokenizer=None, **fields):
    processor_class = LlavaNextProcessor if kind == "next" else LlavaProcessor
    fields = {"num_additional_image_tokens": 0 if kind == "siglip" else 1, **fields}
    return processor_class(
        image_processor(kind),
        tiny_tokenizer() if tokenizer is None else tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        **fields,
    )


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def weights(folder):
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.bin")):
        if path.name != engine.DROPPED:
            tensors |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return tensors


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders that transformers wrote: LLaVA and LLaVA-NeXT, each with its processor."""
    home = tmp_path_factory.mktemp("sources")
    for name, model in (("llava", upstream()), ("next", upstream(next_style=True))):
        model.save_pretrained(home / name)
        processor("next" if name == "next" else "clip").save_pretrained(home / name)
    return home


@pytest.fixture
def source(sources, tmp_path):
    """A copy of the LLaVA source to damage."""
    shutil.copytree(sources / "llava", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    home = tmp_path_factory.mktemp("converted")
    for name in ("llava", "next"):
        llava.convert(sources / name, home / name)
    return home


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("next_style", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, [0, -2], [1, 3], [-2, -2]])
def test_any_feature_layers_give_the_logits_of_transformers(next_style, layer):
    source = upstream(next_style, vision_feature_layer=layer)
    zoo = llava.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(source, IMAGE_SIZES[:3])) <= TOLERANCE


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("vision", VISION)
def test_any_tower_and_strategy_give_the_logits_of_transformers(vision, strategy):
    source = upstream(vision=vision, vision_feature_select_strategy=strategy)
    zoo = llava.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(source, IMAGE_SIZES[:2])) <= TOLERANCE


@pytest.mark.parametrize("text", TEXT)
def test_any_language_model_gives_the_logits_of_transformers(text):
    source = upstream(text=text)
    zoo = llava.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(source, IMAGE_SIZES[:2])) <= TOLERANCE


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_an_image_of_any_size_gives_the_logits_of_llava_next(image_size):
    source = upstream(next_style=True)
    zoo = llava.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(source, [image_size])) <= TOLERANCE


def test_a_tower_without_prefix_tokens_keeps_them_all_in_llava_next():
    source = upstream(next_style=True, vision="siglip", vision_feature_select_strategy="full")
    zoo = llava.zoo_from_transformers(source)
    assert largest_difference(source, zoo, model_inputs(source, IMAGE_SIZES)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["clip", "next"])
def test_greedy_text_of_a_padded_batch_is_that_of_transformers(kind):
    source = upstream(next_style=kind == "next")
    zoo = llava.zoo_from_transformers(source)
    inputs = processor(kind)(
        images=[picture(*size) for size in IMAGE_SIZES[:3]],
        text=["one <image> and <image>", "a longer text before <image> one image"],
        return_tensors="pt",
        padding=True,
    )
    assert torch.equal(greedy(source, inputs), greedy(zoo, inputs))


def test_the_model_in_memory_shares_no_weight_with_its_source():
    source = upstream()
    zoo = llava.zoo_from_transformers(source)
    with torch.no_grad():
        source.lm_head.weight.zero_()
    assert zoo.lm_head.weight.abs().sum() > 0


def test_the_model_in_memory_keeps_dtype_mode_and_attention():
    source = upstream().to(torch.bfloat16).train()
    zoo = llava.zoo_from_transformers(source)
    assert (zoo.dtype, zoo.training) == (torch.bfloat16, True)
    assert zoo.config._attn_implementation == source.config._attn_implementation


def test_text_alone_is_that_of_transformers():
    source = upstream()
    zoo = llava.zoo_from_transformers(source)
    assert largest_difference(source, zoo, {"input_ids": torch.arange(3, 40)[None]}) <= TOLERANCE


# --- oracles ---------------------------------------------------------------------------------------------------------


def spliced_inputs(oracle, model, image_sizes):
    """The inputs of LLaVA's own code, which splices image -200 out, as the zoo takes them."""
    if "in.images" in oracle:
        vision_inputs = {"pixel_values": oracle["in.images"]}
    else:
        tiles = [oracle[name] for name in sorted(oracle) if name.startswith("in.images.")]
        most = max(map(len, tiles))
        padded = [torch.cat((views, views.new_zeros(most - len(views), *views.shape[1:]))) for views in tiles]
        sizes = torch.tensor([[height, width] for width, height in image_sizes])
        vision_inputs = {"pixel_values": torch.stack(padded), "image_sizes": sizes}
    features = iter(model.get_image_features(**vision_inputs, return_dict=True).pooler_output)
    ids = []
    for token in oracle["in.input_ids"][0].tolist():
        ids += [model.config.image_token_id] * len(next(features)) if token == -200 else [token]
    return {"input_ids": torch.tensor([ids]), **vision_inputs}


@pytest.mark.parametrize("name", sorted(path.name for path in ORACLES.glob("*llava*")))
def test_upstream_logits_come_out_of_the_converted_checkpoint(name, tmp_path):
    llava.convert(ORACLES / name, tmp_path / "zoo")
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "zoo", attn_implementation="eager")
    oracle = load_file(ORACLES / name / "oracle.safetensors")
    if name.startswith("hf"):
        inputs = {key.removeprefix("in."): value for key, value in oracle.items() if key.startswith("in.")}
    else:
        described = json.loads((ORACLES / name / "oracle.json").read_text())
        inputs = spliced_inputs(oracle, model, described["non_tensor_inputs"]["image_sizes"])
    expected = oracle["out.logits"]
    with torch.no_grad():
        found = model(**inputs).logits[..., : expected.shape[-1]]
    difference = (found - expected).abs().max().item()
    print(f"{name}: {difference:.1e}")
    assert difference <= 5e-6


@pytest.mark.parametrize("name", sorted(path.name for path in ORACLES.glob("*llava*")))
def test_upstream_checkpoints_go_back_bit_for_bit(name, tmp_path):
    llava.convert(ORACLES / name, tmp_path / "zoo", verify=False)
    llava.reverse(tmp_path / "zoo", tmp_path / "back")
    folder = engine.checkpoint_folder(ORACLES / name, {*llava.FORMATS, *llava_original.TEXT_TYPES})
    back = tmp_path / "back" / folder.relative_to(ORACLES / name)
    assert same_bits(weights(folder), weights(back))
    assert (folder / "config.json").read_bytes() == (back / "config.json").read_bytes()


def test_an_original_tower_that_is_apart_is_found_and_goes_back_apart(tmp_path):
    shutil.copytree(ORACLES / "llava_next_unpad", tmp_path / "source")
    checkpoint = tmp_path / "source" / "ckpt_safetensors" / "model.safetensors"
    language = {name: tensor for name, tensor in load_file(checkpoint).items() if "vision_tower" not in name}
    save_file(language, checkpoint)
    report = llava.convert(tmp_path / "source", tmp_path / "zoo")
    llava.reverse(tmp_path / "zoo", tmp_path / "back")
    assert report["passed"]
    assert same_bits(language, weights(tmp_path / "back" / "ckpt_safetensors"))
    assert same_bits(weights(tmp_path / "source" / "clip-tiny"), weights(tmp_path / "back" / "clip-tiny"))


def test_an_original_processor_pads_and_counts_as_transformers_does(tmp_path):
    shutil.copytree(ORACLES / "llava_v15", tmp_path / "source")
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.save_pretrained(tmp_path / "source" / "ckpt_bin")
    path = tmp_path / "source" / "ckpt_bin" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": len(tokenizer)}))
    for shard in (tmp_path / "source" / "ckpt_bin").glob("*.bin"):
        tensors = torch.load(shard, weights_only=True)
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
            tensors[name] = torch.randn(len(tokenizer), tensors[name].shape[1])
        torch.save(tensors, shard)
    report = llava.convert(tmp_path / "source", tmp_path / "zoo")
    zoo = AutoProcessor.from_pretrained(tmp_path / "zoo")
    assert report["passed"]
    assert zoo.image_processor.do_pad_to_square
    assert zoo.image_token_id == len(tokenizer)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert zoo.apply_chat_template(question, add_generation_prompt=True).endswith("USER: <image>\nWhat? ASSISTANT:")
    llava.reverse(tmp_path / "zoo", tmp_path / "back")
    back = AutoTokenizer.from_pretrained(tmp_path / "back" / "ckpt_bin")
    assert back.get_vocab() == tokenizer.get_vocab()
    assert same_bits(weights(tmp_path / "source" / "ckpt_bin"), weights(tmp_path / "back" / "ckpt_bin"))


# --- ways back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "next"])
def test_the_way_back_is_exact(name, sources, converted, tmp_path):
    report = llava.reverse(converted / name, tmp_path / "back")
    assert report["passed"]
    assert same_bits(weights(sources / name), weights(tmp_path / "back"))


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    upstream().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    llava.convert(tmp_path / "source", tmp_path / "zoo")
    llava.reverse(tmp_path / "zoo", tmp_path / "back", verify=False)
    assert AutoModelForVision2Seq.from_pretrained(tmp_path / "zoo").dtype == torch.bfloat16
    assert same_bits(weights(tmp_path / "source"), weights(tmp_path / "back"))


def test_towers_whose_modules_were_renamed_since_are_read_and_written_as_on_the_hub(tmp_path):
    model = upstream(vision="dinov2")
    model.save_pretrained(tmp_path / "source")
    assert "vision_tower.encoder.layer.0.attention.attention.query.weight" in weights(tmp_path / "source")
    llava.convert(tmp_path / "source", tmp_path / "zoo")
    llava.reverse(tmp_path / "zoo", tmp_path / "back", layout="hub")
    assert same_bits(weights(tmp_path / "source"), weights(tmp_path / "back"))


def test_a_config_goes_back_with_rope_in_the_fields_of_version_4(converted, tmp_path):
    llava.reverse(converted / "next", tmp_path / "back", layout="hub", verify=False)
    text = json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (10000.0, None)


def test_no_word_of_the_zoo_goes_back(converted, tmp_path):
    llava.reverse(converted / "next", tmp_path / "back", layout="hub", verify=False)
    texts = [path.read_text().lower() for path in (tmp_path / "back").glob("*.json")]
    assert len(texts) >= 5 and not any("zoo" in text for text in texts)


def test_the_hub_layout_is_read_by_transformers(converted, sources, tmp_path):
    llava.reverse(converted / "llava", tmp_path / "back", layout="hub")
    names = weights(tmp_path / "back").keys()
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    original = LlavaForConditionalGeneration.from_pretrained(sources / "llava")
    assert same_bits(original.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["clip", "pad", "siglip", "next"])
def test_the_processor_goes_back_too(kind, tmp_path):
    upstream(kind == "next", vision="siglip" if kind == "siglip" else "clip").save_pretrained(tmp_path / "source")
    before = processor(kind)
    before.save_pretrained(tmp_path / "source")
    llava.convert(tmp_path / "source", tmp_path / "zoo")
    llava.reverse(tmp_path / "zoo", tmp_path / "back")
    after = AutoProcessor.from_pretrained(tmp_path / "back")
    call = {"images": [picture(50, 70)], "text": ["a <image> b"], "return_tensors": "pt"}
    expected, found = before(**call), after(**call)
    assert type(after) is type(before)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_model_trained_after_its_conversion_goes_back_with_the_first_side_files(converted, sources, tmp_path):
    model = AutoModelForVision2Seq.from_pretrained(converted / "llava")
    with torch.no_grad():
        model.model.connector.layers[0].bias.add_(1)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ConversionError, match="--origin") as caught:
        llava.reverse(tmp_path / "trained", tmp_path / "back")
    assert "model.vision_tower.post_layernorm.weight" in caught.value.problems["missing"]
    llava.reverse(tmp_path / "trained", tmp_path / "back", origin=converted / "llava")
    before, after = weights(sources / "llava"), weights(tmp_path / "back")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector.linear_1.bias"}


def test_a_model_that_transformers_lacks_does_not_go_back(tmp_path):
    vision, text = {**VISION["clip"], "num_hidden_layers": 2}, TEXT["llama"]
    fields = {"image_token_id": IMAGE_TOKEN_ID, "vision_feature_layer": -1, "projector_num_layers": 3}
    config = ZooLlavaConfig(vision_config=vision, text_config=text, **fields)
    ZooLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "zoo")
    tower = {f"model.vision_tower.post_layernorm.{name}": torch.zeros(32) for name in ("weight", "bias")}
    save_file(tower, tmp_path / "zoo" / engine.DROPPED)
    with pytest.raises(ConversionError, match="projector_num_layers is 3"):
        llava.reverse(tmp_path / "zoo", tmp_path / "back")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [AutoModelForVision2Seq, AutoModelForImageTextToText])
def test_a_converted_folder_opens_through_every_door(door, converted):
    assert isinstance(door.from_pretrained(converted / "next"), ZooLlavaForConditionalGeneration)


def test_a_converted_folder_carries_its_code_its_card_and_its_proof(converted):
    report = json.loads((converted / "llava" / parity.REPORT).read_text())
    assert [row["stage"] for row in report["stages"]] == ["input_ids", "pixels", *parity.STAGES, "greedy_text"]
    assert all(row["max_abs_diff"] <= TOLERANCE for row in report["stages"][2:-1])
    assert report["image_sensitivity"] > 1e-3
    assert {"torch", "transformers", "vlm_zoo"} <= report["versions"].keys()
    assert (converted / "llava" / "llava.py").is_file()
    assert "conversion.llava" in (converted / "llava" / "README.md").read_text()


def test_the_image_token_is_suppressed_and_the_rest_of_the_generation_config_kept(source, tmp_path):
    content = {"do_sample": True, "temperature": 0.3, "eos_token_id": 2, "suppress_tokens": [7]}
    (source / "generation_config.json").write_text(json.dumps(content))
    llava.convert(source, tmp_path / "zoo", verify=False)
    llava.reverse(tmp_path / "zoo", tmp_path / "back", verify=False)
    written = json.loads((tmp_path / "zoo" / "generation_config.json").read_text())
    assert written == {**content, "suppress_tokens": [7, IMAGE_TOKEN_ID]}
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == content


def test_the_side_file_holds_what_the_zoo_does_not_build(converted):
    names = load_file(converted / "llava" / engine.DROPPED).keys()
    assert {name.split(".")[2] for name in names} == {"encoder", "post_layernorm"}
    assert all(".layers.2." in name for name in names if ".encoder." in name)


def test_small_shards_are_written_with_an_index(sources, tmp_path):
    llava.convert(sources / "llava", tmp_path / "zoo", shard_bytes=50_000)
    llava.reverse(tmp_path / "zoo", tmp_path / "back", shard_bytes=50_000)
    index = json.loads((tmp_path / "zoo" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert same_bits(weights(sources / "llava"), weights(tmp_path / "back"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_are_read_as_safetensors_are(zipped, source, tmp_path):
    tensors = weights(source)
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:30], "pytorch_model-00002-of-00002.bin": names[30:]}
    for shard, kept in shards.items():
        part = {name: tensors[name] for name in kept}
        torch.save(part, source / shard, _use_new_zipfile_serialization=zipped)
    weight_map = {name: shard for shard, kept in shards.items() for name in kept}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    llava.convert(source, tmp_path / "zoo", verify=False)
    llava.reverse(tmp_path / "zoo", tmp_path / "back", verify=False)
    assert same_bits(tensors, weights(tmp_path / "back"))


def test_buffers_of_old_files_wait_aside(source, tmp_path):
    tensors = weights(source)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(6)
    save_file(tensors, source / "model.safetensors")
    llava.convert(source, tmp_path / "zoo", verify=False)
    llava.reverse(tmp_path / "zoo", tmp_path / "back", verify=False)
    assert same_bits(tensors, weights(tmp_path / "back"))


def test_a_tied_head_that_was_saved_twice_goes_back_twice(tmp_path):
    upstream(text="tied").save_pretrained(tmp_path / "source")
    tensors = weights(tmp_path / "source")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    llava.convert(tmp_path / "source", tmp_path / "zoo")
    llava.reverse(tmp_path / "zoo", tmp_path / "back")
    assert "lm_head.weight" not in weights(tmp_path / "zoo")
    assert same_bits(tensors, weights(tmp_path / "back"))


# --- processors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "pad", "siglip", "next"])
def test_ids_and_pixels_are_those_of_the_sources_processor(kind):
    vision = "siglip" if kind == "siglip" else "clip"
    before = processor(kind)
    zoo = llava.zoo_processor(before, llava.zoo_config(upstream(kind == "next", vision=vision).config))
    level = (1 / 255) / torch.tensor(before.image_processor.image_std).view(-1, 1, 1)
    for height, width in np.random.default_rng(0).integers(9, 140, (20, 2)).tolist():
        call = {"images": [picture(height, width)], "text": ["so <image>\nwhat"], "return_tensors": "pt"}
        expected, found = before(**call), zoo(**call)
        assert torch.equal(expected["input_ids"], found["input_ids"])
        assert expected["pixel_values"].shape == found["pixel_values"].shape
        levels = ((expected["pixel_values"] - found["pixel_values"]).abs() / level).max().item()
        assert levels <= (2.01 if (height < SIZE) != (width < SIZE) else 1.01), (height, width)


def test_placeholders_follow_the_token_that_transformers_drops_from_a_tower_without_one():
    source = upstream(vision="siglip")
    zoo = llava.zoo_from_transformers(source)
    ours = llava.zoo_processor(processor("siglip"), zoo.config)
    inputs = ours(images=[picture(40, 40)], text=["<image>"], return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == (SIZE // PATCH) ** 2 - 1
    assert largest_difference(source, zoo, inputs) <= TOLERANCE


def test_a_chat_gives_the_ids_of_the_sources_processor(sources, converted):
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture(40, 60)}, {"type": "text", "text": "Eh?"}]}
    ]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, found = (
        AutoProcessor.from_pretrained(folder / "next").apply_chat_template(chat, **call)
        for folder in (sources, converted)
    )
    assert torch.equal(expected["input_ids"], found["input_ids"])


def test_an_image_token_without_a_name_gets_one():
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    zoo = llava.zoo_processor(processor(tokenizer=tokenizer), llava.zoo_config(upstream().config))
    assert zoo.tokenizer.image_token == "<image>"
    assert zoo.image_token_id == IMAGE_TOKEN_ID


def test_files_of_version_4_are_read(source, converted, tmp_path):
    settings = json.loads((source / "processor_config.json").read_text())
    pixels = settings.pop("image_processor")
    pixels["image_processor_type"] = "CLIPImageProcessor"
    (source / "preprocessor_config.json").write_text(json.dumps(pixels))
    (source / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    report = llava.convert(source, tmp_path / "zoo")
    assert report["stages"][0]["stage"] == "input_ids"
    call = {"images": [picture(40, 60)], "text": ["<image>"], "return_tensors": "pt"}
    first, second = (
        AutoProcessor.from_pretrained(folder)(**call) for folder in (tmp_path / "zoo", converted / "llava")
    )
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_a_source_without_processor_converts_as_a_model_with_a_warning(source, tmp_path, caplog):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    report = llava.convert(source, tmp_path / "zoo")
    assert "no tokenizer and no image processor" in caplog.text
    assert not (tmp_path / "zoo" / "processor_config.json").exists()
    assert report["passed"]


def test_substitutes_complete_a_source_without_processor(source, sources, tmp_path):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    llava.convert(source, tmp_path / "zoo", tokenizer=sources / "llava", image_processor=sources / "llava")
    assert (tmp_path / "zoo" / "processor_config.json").is_file()


def test_a_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_tokens(["other"])
    engine.name_image_token(tokenizer, "<image>").save_pretrained(source)
    with pytest.raises(ConversionError, match=f"is {IMAGE_TOKEN_ID + 1}, the model's image_token_id is"):
        llava.convert(source, tmp_path / "zoo")


# --- nothing silent --------------------------------------------------------------------------------------------------


def damage(folder, edit):
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def problems_of(folder, destination):
    with pytest.raises(ConversionError) as caught:
        llava.convert(folder, destination)
    assert not destination.exists()
    return caught.value.problems


def test_a_missing_tensor_is_named(source, tmp_path):
    damage(source, lambda tensors: tensors.pop("multi_modal_projector.linear_2.bias"))
    assert problems_of(source, tmp_path / "zoo") == {"missing": ["model.connector.layers.1.bias"]}


def test_a_missing_tensor_that_the_zoo_would_not_build_is_named_too(source, tmp_path):
    damage(source, lambda tensors: tensors.pop("vision_tower.post_layernorm.bias"))
    assert problems_of(source, tmp_path / "zoo") == {"missing": ["model.vision_tower.post_layernorm.bias"]}


@pytest.mark.parametrize("name", ["lora.weight", "vision_tower.encoder.layers.7.mlp.fc1.bias", "language_model.x"])
def test_an_unknown_tensor_is_named(name, source, tmp_path):
    damage(source, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert problems_of(source, tmp_path / "zoo") == {"unknown": [name]}


def test_a_wrong_shape_is_named_with_both_sides(source, tmp_path):
    damage(source, lambda tensors: tensors.update({"multi_modal_projector.linear_1.bias": torch.ones(47)}))
    (found,) = problems_of(source, tmp_path / "zoo")["wrong shape"]
    assert found == "multi_modal_projector.linear_1.bias is [47], expected [48]"


def test_two_names_of_one_tensor_are_named(source, tmp_path):
    damage(source, lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 48)}))
    (found,) = problems_of(source, tmp_path / "zoo")["duplicated"]
    assert found.startswith("lm_head.weight from ")


def test_all_problems_are_told_at_once(source, tmp_path):
    def edit(tensors):
        del tensors["multi_modal_projector.linear_2.bias"]
        tensors |= {"extra": torch.ones(1), "multi_modal_projector.linear_1.bias": torch.ones(47)}

    damage(source, edit)
    assert problems_of(source, tmp_path / "zoo").keys() == {"unknown", "missing", "wrong shape"}


def test_a_tied_config_with_two_different_tensors_is_refused(tmp_path):
    upstream().save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(ConversionError, match="two different tensors"):
        llava.convert(tmp_path / "source", tmp_path / "zoo")


def test_a_swapped_weight_is_reported_at_its_stage(sources, converted, tmp_path):
    for name, stage in {
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias": "vision_tower",
        "model.connector.layers.1.bias": "connector",
        "model.language_model.layers.0.mlp.down_proj.weight": "language_model.first_layer",
        "model.language_model.layers.1.mlp.down_proj.weight": "language_model.last_layer",
        "lm_head.weight": "logits",
    }.items():
        zoo = tmp_path / stage
        shutil.copytree(converted / "llava", zoo)
        damage(zoo, lambda tensors, name=name: tensors.update({name: tensors[name].flip(0)}))
        with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
            llava.verify(sources / "llava", zoo)
        assert json.loads((zoo / parity.REPORT).read_text())["first_failed_stage"] == stage


def test_a_conversion_that_does_not_pass_leaves_only_its_report(sources, tmp_path, monkeypatch):
    swapped = ((r"^(?:model\.)?vision_tower\.(.+)\.q_proj\.(.+)$", r"model.vision_tower.\1.k_proj.\2"),)
    swapped += ((r"^(?:model\.)?vision_tower\.(.+)\.k_proj\.(.+)$", r"model.vision_tower.\1.q_proj.\2"),)
    monkeypatch.setattr(llava, "FROM_TRANSFORMERS", (*swapped, *llava.FROM_TRANSFORMERS))
    with pytest.raises(ConversionError, match="from the stage 'vision_tower' on"):
        llava.convert(sources / "llava", tmp_path / "zoo")
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.parity.json"]


def test_an_interrupted_conversion_leaves_nothing_and_starts_again(sources, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llava, "zoo_processor", interrupt)
        llava.convert(sources / "llava", tmp_path / "zoo", verify=False)
    assert list(tmp_path.iterdir()) == []
    llava.convert(sources / "llava", tmp_path / "zoo", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_a_folder_with_files_is_not_overwritten(sources, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        llava.convert(sources / "llava", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_another_architecture_is_refused_by_name(source, tmp_path):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "blip-2"}))
    with pytest.raises(ConversionError, match="'blip-2'"):
        llava.convert(source, tmp_path / "zoo")


# --- hostile files ---------------------------------------------------------------------------------------------------


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "bare"])
def test_a_pickle_with_code_is_refused_and_not_run(protocol, source, tmp_path):
    (source / "model.safetensors").unlink()
    path, payload = source / "pytorch_model.bin", {"weight": Exploit(tmp_path / "run")}
    if protocol == "bare":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(ConversionError, match="refused"):
        llava.convert(source, tmp_path / "zoo")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hosts", "a/../../outside.safetensors", "C:\\x.bin"])
def test_an_index_that_leads_out_of_its_folder_is_refused(name, source, tmp_path):
    shutil.copy(source / "model.safetensors", tmp_path / "outside.safetensors")
    weight_map = dict.fromkeys(weights(source), name)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError, match="lies outside"):
        llava.convert(source, tmp_path / "zoo")


def test_an_index_that_disagrees_with_its_files_is_refused(source, tmp_path):
    names = sorted(weights(source))
    weight_map = dict.fromkeys([*names[1:], "invented"], "weights.safetensors")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    problems = problems_of(source, tmp_path / "zoo")
    assert problems["missing"] == ["invented in weights.safetensors"]
    assert problems["not in the index"] == [f"{names[0]} in weights.safetensors"]


def test_a_config_cannot_write_outside_the_destination(tmp_path):
    shutil.copytree(ORACLES / "llava_next_unpad", tmp_path / "source")
    path = tmp_path / "source" / "ckpt_safetensors" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mm_vision_tower": "../../clip-tiny"}))
    llava.convert(tmp_path / "source", tmp_path / "zoo", verify=False)
    llava.reverse(tmp_path / "zoo", tmp_path / "back", verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "zoo", "back"}
    assert (tmp_path / "back" / "clip-tiny" / "config.json").is_file()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_truncated_file_is_refused(suffix, source, tmp_path):
    path = source / "model.safetensors"
    if suffix == "bin":
        torch.save(weights(source), source / "pytorch_model.bin")
        path.unlink()
        path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match="truncated"):
        llava.convert(source, tmp_path / "zoo")


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_converts_proves_and_goes_back(sources, tmp_path, capsys):
    zoo, back = str(tmp_path / "zoo"), str(tmp_path / "back")
    assert llava.main([str(sources / "llava"), zoo]) == 0
    assert "greedy_text" in capsys.readouterr().out
    assert llava.main([str(sources / "llava"), zoo, "--verify"]) == 0
    assert llava.main([zoo, back, "--reverse", "--no-verify"]) == 0
    assert same_bits(weights(sources / "llava"), weights(back))


def test_a_dry_run_shows_the_key_map_and_writes_nothing(sources, tmp_path, capsys):
    assert llava.main([str(sources / "llava"), str(tmp_path / "zoo"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "multi_modal_projector.linear_2.bias -> model.connector.layers.1.bias  float32[48]" in shown
    assert "model.vision_tower.post_layernorm.bias  float32[32]  (kept aside)" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_fails_with_a_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert llava.main([str(tmp_path / "empty"), str(tmp_path / "zoo")]) == 1
    assert "no config.json" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()
