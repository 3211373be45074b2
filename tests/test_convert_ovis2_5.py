"""Visual embedding tables at native resolution: the numbers and folders of the upstream Ovis 2.5."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipImageProcessorPil

from conversion import engine, ovis2_5, parity, vet
from conversion.engine import ConversionError
from vlm_zoo.models.vet import ZooVetForConditionalGeneration, ZooVetProcessor
from vlm_zoo.testing.tiny import tiny_tokenizer


ORACLE = Path(__file__).parent / "oracles" / "ovisv2.5_navit_full"
TOLERANCE = 5e-6
TOKEN = 32  # pixels, as released
VIT = "visual_tokenizer.vit.vision_model."
TINY_TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
OWN = (ovis2_5.ATOM, ovis2_5.INDICATORS)


# --- oracle ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    return load_file(ORACLE / "oracle.safetensors")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The oracle's model, out of a converted folder."""
    folder = tmp_path_factory.mktemp("oracle") / "zoo"
    vet.convert(ORACLE, folder)
    return parity.load_strictly(ZooVetForConditionalGeneration, folder)


def images_of(oracle):
    return {"pixel_values": oracle["in.pixel_values"], "image_grid_thw": oracle["in.grid_thws"]}


@torch.no_grad()
def test_two_images_of_different_sizes_give_the_upstreams_logits(oracle, opened):
    logits = vet.ZooStages(opened, *OWN)(input_ids=oracle["in.input_ids"], **images_of(oracle)).logits
    difference = (logits[..., :120] - oracle["out.logits"]).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    assert difference <= TOLERANCE


@torch.no_grad()
def test_what_proofs_compare_with_gives_the_upstreams_logits(oracle):
    logits = vet.open_source(ORACLE).load()(oracle["in.input_ids"], **images_of(oracle)).logits
    difference = (logits - oracle["out.logits"]).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    assert difference <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bilinear", None])
def test_with_positions_of_another_kind_the_numbers_are_others(mode, oracle, opened, monkeypatch):
    monkeypatch.setattr(opened.config, "position_interpolation", mode)
    logits = vet.ZooStages(opened, *OWN)(input_ids=oracle["in.input_ids"], **images_of(oracle)).logits
    assert (logits[..., :120] - oracle["out.logits"]).abs().max() > 10 * TOLERANCE


@torch.no_grad()
def test_images_that_change_places_change_the_logits(oracle, opened):
    inputs = {"input_ids": oracle["in.input_ids"], **images_of(oracle)}
    stages = vet.ZooStages(opened, *OWN)
    turned = stages(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (turned - stages(**inputs).logits)[:, -1].abs().max() > 1e-2


# --- folders ---------------------------------------------------------------------------------------------------------


def write_upstream(folder, dtype=torch.float32, model_type="ovis2_5", vocab_size=320, tied=False, **vit):
    """The folder that AIDC-AI's code would write of a tiny Ovis 2.5 with the released patches, all of it random."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape, mean=0.0, std=0.2):
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype)

    def norm(name, width):
        return {f"{name}.weight": random(width, mean=1.0), f"{name}.bias": random(width)}

    def linear(name, inputs, outputs, bias=True):
        weight = {f"{name}.weight": random(outputs, inputs)}
        return {**weight, f"{name}.bias": random(outputs)} if bias else weight

    tensors = {
        "vte.weight": random(64, 32),
        **linear("visual_tokenizer.head.0", 96, 60, bias=False),
        **norm("visual_tokenizer.head.1", 60),
        f"{VIT}embeddings.patch_embedding.weight": random(24, 3, 16, 16, std=0.05),
        f"{VIT}embeddings.patch_embedding.bias": random(24),
        f"{VIT}embeddings.position_embedding.weight": random(16, 24),
        **norm(f"{VIT}post_layernorm", 24),
        "llm.model.embed_tokens.weight": random(vocab_size, 32),
        "llm.model.norm.weight": random(32, mean=1.0),
    }
    if not tied:
        tensors |= linear("llm.lm_head", 32, vocab_size, bias=False)
    for number in range(2):
        layer = f"{VIT}encoder.layers.{number}."
        for part in ("q", "k", "v", "out"):
            tensors |= linear(f"{layer}self_attn.{part}_proj", 24, 24)
        tensors |= {**norm(f"{layer}layer_norm1", 24), **norm(f"{layer}layer_norm2", 24)}
        tensors |= {**linear(f"{layer}mlp.fc1", 24, 40), **linear(f"{layer}mlp.fc2", 40, 24)}
        block = f"llm.model.layers.{number}."
        for part, outputs in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            tensors |= linear(f"{block}self_attn.{part}_proj", 32, outputs, bias=False)
        for part, inputs, outputs in (("gate", 32, 48), ("up", 32, 48), ("down", 48, 32)):
            tensors |= linear(f"{block}mlp.{part}_proj", inputs, outputs, bias=False)
        for name, width in {"self_attn.q_norm": 8, "self_attn.k_norm": 8}.items():
            tensors[f"{block}{name}.weight"] = random(width, mean=1.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = random(32, mean=1.0)
    if vit.get("num_patches", -1) > 0:
        tensors[f"{VIT}embeddings.patch_embedding.weight"] = random(24, 768, std=0.05)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llm = {
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    tower = {
        "model_type": "siglip2_navit",
        **TINY_TOWER,
        "num_patches": -1,
        "image_size": 64,
        "patch_size": 16,
        "window_size": 112,
        **vit,
    }
    settings = {
        "model_type": model_type,
        "architectures": ["Ovis2_5"],
        "auto_map": {"AutoModelForCausalLM": "modeling_ovis2_5.Ovis2_5"},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_size": 32,
        "visual_vocab_size": 64,
        "llm_config": llm,
        "vit_config": tower,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer(None).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=3).save_pretrained(folder)
    return folder


def weights(folder):
    return {
        name: tensor for path in Path(folder).glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def picture(height, width, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rewrite(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    return write_upstream(tmp_path_factory.mktemp("sources") / "ovis2_5")


@pytest.fixture(scope="module")
def converted(upstream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "zoo"
    vet.convert(upstream, folder)
    return folder


@pytest.fixture(scope="module")
def bare(upstream, tmp_path_factory):
    """A source without processor, whose images are small, and what it is converted to."""
    home = tmp_path_factory.mktemp("bare")
    (home / "source").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(upstream / name, home / "source" / name)
    vet.convert(home / "source", home / "zoo", verify=False)
    return home / "source", home / "zoo"


@pytest.fixture
def source(upstream, tmp_path):
    """A copy to damage."""
    return shutil.copytree(upstream, tmp_path / "source")


def test_a_converted_folder_carries_its_processor_its_card_and_its_proof(converted):
    report = json.loads((converted / parity.REPORT).read_text())
    assert [row["stage"] for row in report["stages"]] == ["input_ids", "pixels", *parity.STAGES, "greedy_text"]
    print({row["stage"]: row["max_abs_diff"] for row in report["stages"][2:-1]})
    assert all(row["max_abs_diff"] <= 2 * TOLERANCE for row in report["stages"][2:-1])
    assert report["passed"] and report["rows"] == 9 and report["image_sensitivity"] > 1e-2
    assert isinstance(AutoProcessor.from_pretrained(converted), ZooVetProcessor)
    assert "`ovis2_5`" in (converted / "README.md").read_text()


def test_the_config_says_what_the_source_is(converted):
    config = AutoModelForImageTextToText.from_pretrained(converted).config
    assert config.native_resolution and config.position_interpolation == "bicubic"
    assert config.num_visual_indicators == 4 and config.tokenize_function == "softmax" and config.head_layer_norm
    assert (config.min_image_tokens, config.max_image_tokens) == (196, 2352)
    vision = config.vision_config
    assert (vision.model_type, vision.temporal_patch_size, vision.spatial_merge_size) == ("qwen3_vl_vision", 1, 2)
    assert vision.num_position_embeddings == 16 and vision.deepstack_visual_indexes == []


def test_the_way_there_keeps_every_bit(upstream, converted):
    source, zoo = weights(upstream), weights(converted)
    zoo |= load_file(converted / engine.DROPPED)
    for name in [name for name in source if ".self_attn.q_proj." in name and name.startswith(VIT)]:
        parts = [source.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        source[name.replace("q_proj", "qkv")] = torch.cat(parts)
    names = json.loads((converted / engine.RECORD).read_text())["names"]
    assert names.keys() == source.keys() and set(names.values()) == zoo.keys()
    assert all(torch.equal(tensor.view_as(zoo[names[name]]), zoo[names[name]]) for name, tensor in source.items())


def test_only_the_towers_last_norm_is_kept_aside(converted):
    names = {f"model.vision_tower.post_layernorm.{part}" for part in ("weight", "bias")}
    assert load_file(converted / engine.DROPPED).keys() == names


@pytest.mark.parametrize(
    "fields",
    [
        {"num_patches": 16, "hidden_act": "gelu", "model_type": "ovis"},
        {"fullatt_block_indexes": "0|1", "tied": True},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_variants_convert_with_proof(fields, tmp_path):
    report = vet.convert(write_upstream(tmp_path / "source", **fields), tmp_path / "zoo")
    assert report["passed"]
    assert {tensor.dtype for tensor in weights(tmp_path / "zoo").values()} == {fields.get("dtype", torch.float32)}
    assert ("lm_head.weight" in weights(tmp_path / "zoo")) != fields.get("tied", False)


def test_what_the_towers_config_leaves_out_is_usual(source):
    before = vet.open_source(source).config.to_dict()
    rewrite(source / "config.json", lambda content: content["vit_config"].update(ovis2_5.TOWER_DEFAULTS | TINY_TOWER))
    assert vet.open_source(source).config.to_dict() == before


def test_a_vocabulary_without_room_grows_by_the_mean_embedding(tmp_path):
    words = len(tiny_tokenizer(None))
    folder = write_upstream(tmp_path / "source", vocab_size=words)
    assert vet.convert(folder, tmp_path / "zoo")["passed"]
    before, after = weights(folder)["llm.lm_head.weight"], weights(tmp_path / "zoo")["lm_head.weight"]
    assert torch.equal(after[:-1], before) and len(after) == words + 1
    torch.testing.assert_close(after[-1], before.mean(0))


# --- processors ------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_source(upstream, converted):
    processor = AutoProcessor.from_pretrained(converted)
    generator = np.random.default_rng(0)
    for height, width in (np.exp(generator.uniform(np.log(TOKEN), np.log(4000), (2000, 2)))).astype(int).tolist():
        expected = ovis2_5.original_size(height, width, TOKEN)
        assert processor.image_processor.processed_size(height, width) == expected, (height, width)


def test_ids_and_pixels_are_those_of_the_source(upstream, converted):
    before = vet.open_source(upstream).processor
    zoo = vet.ZooPrompts(AutoProcessor.from_pretrained(converted), *OWN)
    for size in [(448, 448), (200, 300), (500, 470), (40, 300), (1400, 1800)]:
        call = {"images": [picture(*size)], "text": ["What <image>\nis it?"]}
        expected, found = before(**call), zoo(**call)
        for name in ("input_ids", "attention_mask", "image_grid_thw"):
            assert torch.equal(expected[name], found[name]), (name, size)
        levels = (expected["pixel_values"] - found["pixel_values"]).abs() * 127.5
        # Two correct resizers differ by one, and where a picture grows much in a few of a hundred thousand by two
        assert levels.max() <= 2.1 and (levels > 1.1).double().mean() <= 5e-5, size


def prompts_with(*levels):
    """What stands for a processor: pixels of zeros, but for values at these 8-bit levels."""
    pixels = torch.zeros(1, 3, 256, 256)
    pixels.view(-1)[: len(levels)] = torch.tensor(levels) / 127.5
    batch = {"input_ids": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2), "pixel_values": pixels}
    part = Mock(return_value=batch)
    part.image_processor = Mock(rescale_factor=1 / 255, image_std=[0.5, 0.5, 0.5])
    return part


@pytest.mark.parametrize(
    ("levels", "equal"),
    [([1.0] * 9, True), ([2.0], True), ([2.0, 2.0], False), ([3.0], False), ([float("nan")], False)],
)
def test_a_report_on_pixels_names_the_limits_that_decide(levels, equal):
    (_, pixels), _ = parity.compare_processors(prompts_with(), prompts_with(*levels), "", [(256, 256)], 0)
    assert pixels["equal"] is equal
    if pixels["max_abs_diff"] is not None:
        assert pixels["share_above_limit"] == sum(level > pixels["limit"] for level in levels) / (3 * 256 * 256)
        within = pixels["max_abs_diff"] <= pixels["rare_limit"]
        assert equal == (within and pixels["share_above_limit"] <= pixels["rare_share"])


def test_frames_of_a_clip_have_the_size_of_pictures(converted):
    processor = AutoProcessor.from_pretrained(converted)
    frames = [picture(130, 200, seed) for seed in range(3)]
    batch = processor(videos=[frames], text=["a <video>b"], return_tensors="pt", do_sample_frames=False)
    height, width = ovis2_5.original_size(130, 200, TOKEN)
    assert batch["image_grid_thw"].tolist() == [[3, height // 16, width // 16]]
    stills = processor(images=frames, text=["<image>" * 3], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], stills["pixel_values"])


@torch.no_grad()
def test_a_clip_through_the_processor_has_the_sources_logits(upstream, converted):
    processor = AutoProcessor.from_pretrained(converted)
    model = parity.load_strictly(ZooVetForConditionalGeneration, converted)
    frames = [picture(448, 448, seed) for seed in range(2)]
    batch = processor(videos=[frames], text=["a <video>b"], return_tensors="pt", do_sample_frames=False)
    assert batch["image_grid_thw"].tolist() == [[2, 28, 28]]
    words, ids = processor.tokenizer, batch["input_ids"][0].tolist()
    before, after = (words(part, add_special_tokens=False)["input_ids"] for part in ("a ", "b"))
    assert ids == [*before, *[processor.image_token_id] * (2 * 196 + 2), *after]
    own = torch.tensor([[*before, -303, *[-300] * 2 * 196, -304, *after]])
    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    expected = vet.open_source(upstream).load()(own, **images).logits
    difference = (model(**batch).logits - expected).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}, of {expected.abs().max():.1f}")
    assert difference <= TOLERANCE * max(1.0, expected.abs().max())


def test_a_converted_model_and_processor_answer_a_chat(converted):
    model, zoo = (door.from_pretrained(converted) for door in (AutoModelForImageTextToText, AutoProcessor))
    image = {"type": "image", "image": picture(100, 60)}
    question = [{"role": "user", "content": [image, {"type": "text", "text": "Eh?"}]}]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = zoo.apply_chat_template(question, add_generation_prompt=True, **call)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_source_without_processor_converts_as_a_model_with_a_warning(bare, tmp_path, caplog):
    assert vet.convert(bare[0], tmp_path / "zoo")["passed"]
    assert "no tokenizer and no image processor" in caplog.text
    assert not (tmp_path / "zoo" / "processor_config.json").exists()


# --- nothing silent --------------------------------------------------------------------------------------------------


def test_a_swapped_weight_is_reported_at_its_stage(bare, tmp_path):
    for name, stage in {
        "model.vision_tower.blocks.0.attn.qkv.weight": "vision_tower",
        "model.vision_tower.pos_embed.weight": "vision_tower",
        "model.connector.head.weight": "connector",
        "model.language_model.layers.0.mlp.down_proj.weight": "language_model.first_layer",
    }.items():
        zoo = shutil.copytree(bare[1], tmp_path / name)
        tensors = weights(zoo)
        tensors[name] = tensors[name].flip(0)
        save_file(tensors, zoo / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
            vet.verify(bare[0], zoo)


@pytest.mark.parametrize("rows", [[-3, -4], [-1, -2]], ids=["image", "clip"])
def test_indicators_in_another_order_are_noticed(rows, bare, tmp_path):
    zoo = shutil.copytree(bare[1], tmp_path / "zoo")
    tensors = weights(zoo)
    table = tensors["model.connector.table.weight"]
    table[rows] = table[rows[::-1]].clone()
    save_file(tensors, zoo / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"from the stage 'language_model\.first_layer' on"):
        vet.verify(bare[0], zoo)


def test_all_problems_are_told_at_once(source, tmp_path):
    tensors = weights(source)
    del tensors[f"{VIT}encoder.layers.1.self_attn.k_proj.bias"]
    tensors |= {"extra": torch.ones(1), "vte.weight": torch.ones(64, 31)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError) as caught:
        vet.convert(source, tmp_path / "zoo")
    assert caught.value.problems == {
        "unknown": ["extra", *(f"{VIT}encoder.layers.1.self_attn.{part}_proj.bias" for part in "qv")],
        "missing": ["model.vision_tower.blocks.1.attn.qkv.bias"],
        "wrong shape": ["vte.weight is [64, 31], expected [64, 32]"],
    }


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"fullatt_block_indexes": "1"}, r"fullatt_block_indexes is '1', .* within windows in the layers \[0\]"),
        ({"use_rope": False}, "use_rope is False, expected True"),
        ({"preserve_original_pe": False}, "preserve_original_pe is False, expected True"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, expected 1e-06"),
        ({"temporal_patch_size": 2}, "temporal_patch_size is 2, expected 1"),
        ({"model_type": "aimv2"}, "The tower is of model type 'aimv2'; this reads 'siglip2_navit'"),
        ({"patch_size": 8}, r"patch_embedding\.weight is \[24, 3, 16, 16\], expected \[24, 3, 1, 8, 8\]"),
    ],
)
def test_a_tower_that_the_zoo_has_not_is_refused_by_name(tower, message, source, tmp_path):
    rewrite(source / "config.json", lambda content: content["vit_config"].update(tower))
    with pytest.raises(ConversionError, match=message):
        vet.convert(source, tmp_path / "zoo")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("visual_tokenizer.head.0.weight"), r"no visual_tokenizer\.head\.0\.weight"),
        (lambda tensors: tensors.update({"vte.weight": torch.ones(65, 32)}), "leaves 5 indicators, expected 4"),
        (
            lambda tensors: tensors.update({f"{VIT}embeddings.position_embedding.weight": torch.ones(15, 24)}),
            "a table of 15 positions, expected that of a square",
        ),
    ],
)
def test_tensors_of_another_model_are_refused_by_name(edit, message, source, tmp_path):
    tensors = weights(source)
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        vet.convert(source, tmp_path / "zoo")


def test_keys_that_a_config_lacks_are_named(source, tmp_path):
    def cut(content):
        del content["llm_config"], content["visual_vocab_size"]

    rewrite(source / "config.json", cut)
    with pytest.raises(ConversionError) as caught:
        vet.convert(source, tmp_path / "zoo")
    missing = ["llm_config.model_type", "llm_config.vocab_size", "visual_vocab_size"]
    assert caught.value.problems == {"missing keys": missing}


def test_tiles_are_refused(source, tmp_path):
    with pytest.raises(ConversionError, match=r"max_tiles is 4, but Ovis 2\.5 cuts no tiles"):
        vet.convert(source, tmp_path / "zoo", max_tiles=4)


def test_the_command_line_converts_and_shows_the_key_map(upstream, tmp_path, capsys):
    assert vet.main([str(upstream), str(tmp_path / "zoo"), "--no-verify"]) == 0
    assert vet.main([str(upstream), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "layers.0.self_attn.qkv.weight -> model.vision_tower.blocks.0.attn.qkv.weight  float32[72, 24]" in shown
    assert "model.vision_tower.post_layernorm.weight  float32[24]  (kept aside)" in shown
