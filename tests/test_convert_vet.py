"""Visual embedding tables: the numbers and folders of transformers' Ovis2 and of the upstream Ovis 1.6 and 2."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    Qwen2Config,
)
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from conversion import engine, ovis, parity, vet
from conversion.engine import ConversionError
from conversion.vet import one_placeholder, zoo_config, zoo_from_transformers
from vlm_zoo.models.vet import ZooVetConfig, ZooVetForConditionalGeneration, ZooVetProcessor
from vlm_zoo.testing.tiny import tiny_tokenizer


ORACLES = Path(__file__).parent / "oracles"
TOLERANCE = 5e-6
SIZE, TEXT_IDS = 16, len(tiny_tokenizer(None))
IMAGE, *INDICATORS = range(TEXT_IDS, TEXT_IDS + 6)
START, WHOLE, COLUMN, ROW, END = INDICATORS


def ovis2(image_size=SIZE, vocab_size=320, **vision):
    """A tiny Ovis2 of transformers, every parameter random. It fails at an odd number of patches a side with a stride:
    for those Ovis 1.6 stands, below."""
    config = Ovis2Config(
        vision_config=Ovis2VisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=4,
            **{"vocab_size": 64, "hidden_stride": 2, **vision},
        ),
        text_config=Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=vocab_size,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    model = Ovis2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rows(tokens, tiles=False):
    """Ids of two rows as Ovis2 takes them: an image in each, with as many tokens a view."""
    view = [IMAGE] * tokens
    image = [START, *view, WHOLE]
    if tiles:
        image += [*view, COLUMN, *view, ROW, *view, COLUMN, *view]
    image.append(END)
    return torch.tensor([[5, 6, *image, 7, 8], [9, *image, 10, 11, 12]])


@torch.no_grad()
def largest_difference(model, zoo, ids, views, **inputs):
    """Of the logits; `views` float[P, C, H, W] are those of both images."""
    expected = model(ids, pixel_values=views).logits
    pixels = views if zoo.config.max_tiles is None else views.unflatten(0, (2, -1))
    found = zoo(one_placeholder(ids, INDICATORS, IMAGE), pixel_values=pixels, **inputs).logits
    difference = (expected - found).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["softmax", "st_argmax"])
@pytest.mark.parametrize(("stride", "tokens"), [(1, 16), (2, 4)])
def test_logits_are_those_of_ovis2(function, stride, tokens):
    model = ovis2(tokenize_function=function, hidden_stride=stride)
    zoo = zoo_from_transformers(model)
    views = torch.randn(2, 3, 16, 16)
    assert largest_difference(model, zoo, rows(tokens), views) <= TOLERANCE


def test_logits_of_tiled_images_are_those_of_ovis2():
    model = ovis2()
    zoo = zoo_from_transformers(model, max_tiles=4)
    sizes = torch.tensor([[32, 32]] * 2)
    assert largest_difference(model, zoo, rows(4, tiles=True), torch.randn(10, 3, 16, 16), image_sizes=sizes) <= 5e-6


def test_greedy_text_is_that_of_ovis2():
    model = ovis2()
    zoo, ids, views = zoo_from_transformers(model), rows(4), torch.randn(2, 3, 16, 16)
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE]}
    ours = zoo.generate(one_placeholder(ids, INDICATORS, IMAGE), pixel_values=views, **options)
    theirs = model.generate(input_ids=ids, pixel_values=views, **options)
    assert torch.equal(ours[:, ids.shape[1] :], theirs[:, ids.shape[1] :])


def test_ids_and_flat_views_of_ovis2_give_its_logits():
    model = ovis2()
    zoo = zoo_from_transformers(model)
    ids, views = rows(4), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, expected = (each(input_ids=ids, pixel_values=views).logits for each in (zoo, model))
        own = zoo(one_placeholder(ids, INDICATORS, IMAGE), pixel_values=views).logits
    assert (found - expected).abs().max() <= TOLERANCE
    assert torch.equal(found, own)


@pytest.mark.parametrize("max_tiles", [None, 4])
def test_flat_views_of_tiled_images_give_the_logits_of_ovis2(max_tiles):
    model = ovis2()
    zoo = zoo_from_transformers(model, max_tiles=max_tiles)
    inputs = {"input_ids": rows(4, tiles=True), "pixel_values": torch.randn(10, 3, 16, 16)}
    with torch.no_grad():
        assert (zoo(**inputs).logits - model(**inputs).logits).abs().max() <= TOLERANCE


@torch.no_grad()
def test_embedded_ids_of_ovis2_give_its_logits():
    model = ovis2()
    zoo = zoo_from_transformers(model)
    ids, views = rows(4), torch.randn(2, 3, 16, 16)
    embeds = zoo.get_input_embeddings()(ids)
    expected = zoo(ids, pixel_values=views).logits
    assert torch.equal(zoo(inputs_embeds=embeds, pixel_values=views).logits, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
def test_ids_and_flat_views_of_ovis2_generate_its_text(options):
    model = ovis2()
    zoo = zoo_from_transformers(model)
    inputs = {"input_ids": rows(4, tiles=True), "pixel_values": torch.randn(10, 3, 16, 16)}
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE], **options}
    expected = model.generate(**inputs, **options)
    assert torch.equal(zoo.generate(**inputs, **options), expected)
    in_chunks = zoo.generate(**inputs, **options, prefill_chunk_size=5) if not options.get("num_beams") else expected
    assert torch.equal(in_chunks, expected)


def test_an_answer_goes_on_from_a_cache_with_ids_of_ovis2():
    zoo, ids, views = zoo_from_transformers(ovis2()), rows(4), torch.randn(2, 3, 16, 16)
    options = {"do_sample": False, "eos_token_id": 319, "return_dict_in_generate": True}
    first = zoo.generate(ids, pixel_values=views, max_new_tokens=2, **options)
    more = torch.cat((first.sequences, torch.tensor([[15, 16], [17, 18]])), dim=1)
    again = {"inputs": more, "pixel_values": views, "max_new_tokens": 4, **options}
    expected = zoo.generate(**again).sequences
    assert torch.equal(zoo.generate(**again, past_key_values=first.past_key_values).sequences, expected)


@torch.no_grad()
def test_ids_of_indicators_are_words_in_text_alone():
    model = ovis2()
    zoo, ids = zoo_from_transformers(model), torch.tensor([[5, START, 6, COLUMN, 7]])
    assert (zoo(ids).logits - model(ids).logits).abs().max() <= TOLERANCE


def test_ids_of_indicators_beside_too_few_patches_are_refused():
    zoo, ids = zoo_from_transformers(ovis2()), rows(4)
    with pytest.raises(ValueError, match="row 0 holds 3 image tokens"):
        zoo(ids[:1, [0, 1, 2, 3, 4, 5, 7, 8]], pixel_values=torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [1, 2, 3, 4, 4], [1, 2, 3, 4, IMAGE]])
def test_every_indicator_has_an_id_of_its_own_or_none_has(ids):
    fields = zoo_config(ovis2().config).to_dict()
    with pytest.raises(StrictDataclassError, match="indicator_token_ids is"):
        ZooVetConfig(**{**fields, "indicator_token_ids": ids})


def test_sampled_words_are_those_of_ovis2():
    model = ovis2(tokenize_function="gumbel_argmax").train()
    zoo, ids, views = zoo_from_transformers(model), rows(4), torch.randn(2, 3, 16, 16)
    torch.manual_seed(3)
    expected = model(ids, pixel_values=views).logits
    torch.manual_seed(3)
    found = zoo(one_placeholder(ids, INDICATORS, IMAGE), pixel_values=views).logits
    assert (expected - found).abs().max() <= TOLERANCE


@pytest.mark.parametrize("function", ["softmax", "st_argmax"])
def test_gradients_are_those_of_ovis2(function):
    model = ovis2(tokenize_function=function)
    zoo, ids, views = zoo_from_transformers(model), rows(4), torch.randn(2, 3, 16, 16)
    model(ids, pixel_values=views).logits.square().mean().backward()
    zoo(one_placeholder(ids, INDICATORS, IMAGE), pixel_values=views).logits.square().mean().backward()
    theirs = model.model
    pairs = {
        "head": (zoo.model.connector.head.weight, theirs.vision_tower.head_linear.weight),
        "norm": (zoo.model.connector.norm.weight, theirs.vision_tower.head_norm.weight),
        "table": (zoo.model.connector.table.weight, theirs.visual_embeddings_table.weight),
        "tower": (
            zoo.model.vision_tower.embeddings.patch_embed.weight,
            theirs.vision_tower.transformer.embeddings.patch_embedding.weight,
        ),
    }
    for ours, peer in pairs.values():
        assert peer.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, peer.grad, atol=1e-6, rtol=1e-4)


def test_the_images_of_the_comparison_matter():
    zoo = zoo_from_transformers(ovis2())
    ids, views = one_placeholder(rows(4), INDICATORS, IMAGE), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        moved = zoo(ids, pixel_values=views).logits - zoo(ids, pixel_values=-views).logits
    assert moved[:, -1].abs().max() > 1e-2


def test_without_the_towers_norm_the_numbers_are_others():
    model = ovis2()
    zoo = zoo_from_transformers(model)
    zoo.config.tower_norm = False
    assert largest_difference(model, zoo, rows(4), torch.randn(2, 3, 16, 16)) > 1e-3


def test_the_model_in_memory_keeps_dtype_mode_and_attention():
    model = ovis2().to(torch.bfloat16).train()
    zoo = zoo_from_transformers(model)
    assert zoo.dtype == torch.bfloat16 and zoo.training and zoo.config._attn_implementation == "eager"
    assert zoo.model.connector.table.weight.data_ptr() != model.model.visual_embeddings_table.weight.data_ptr()


def test_the_config_says_that_transformers_norms():
    config = zoo_config(ovis2().config, max_tiles=9)
    assert config.tower_norm and config.max_tiles == 9 and config.num_visual_indicators == 5


# --- oracles ---------------------------------------------------------------------------------------------------------


UPSTREAM = {"ovisv1.6_siglip_stride2": 20, "ovisv2.0_aimv2": 16}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The models of the upstream's oracles, out of converted folders."""
    home = tmp_path_factory.mktemp("oracles")
    models = {}
    for name in UPSTREAM:
        vet.convert(ORACLES / name, home / name)
        models[name] = parity.load_strictly(ZooVetForConditionalGeneration, home / name)
    return models


def oracle_images(oracle, name):
    side = 2 * UPSTREAM[name]
    return {"pixel_values": oracle["in.pixel_values"][None], "image_sizes": torch.tensor([[side, side]])}


@pytest.mark.parametrize("name", UPSTREAM)
def test_an_upstream_ovis_gives_its_logits(name, opened):
    oracle, zoo = load_file(ORACLES / name / "oracle.safetensors"), opened[name]
    images = oracle_images(oracle, name)
    expected, (before, after) = oracle["out.logits"], ([5, 6], [7, 8, 9])
    image = expected.shape[1] - len(before + after)
    ids = torch.tensor([[*before, *[zoo.config.image_token_id] * image, *after]])
    with torch.no_grad():
        logits = zoo(ids, **images).logits[..., : expected.shape[-1]]
        features = zoo.get_image_features(**images).pooler_output[0]
    # Gemma 2's factor, see the conversion
    scale = 32**0.5 if zoo.config.text_config.model_type == "gemma2" else 1.0
    embeddings = oracle["out.inputs_embeds"][0, len(before) : -len(after)] * scale
    print(f"{name}: {(features - embeddings).abs().max():.1e}, logits {(logits - expected).abs().max():.1e}")
    assert (features - embeddings).abs().max() <= TOLERANCE
    # Logits of Ovis 1.6 reach 6.7, and upstream's own are 1e-5 from those in float64: the limit grows with them
    assert (logits - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_proofs_compare_with_gives_the_upstreams_logits(name):
    oracle, source = load_file(ORACLES / name / "oracle.safetensors"), vet.open_source(ORACLES / name)
    expected, (before, after) = oracle["out.logits"], ([5, 6], [7, 8, 9])
    image = vet.image_ids((2, 2), vet.tokens_of_view(source.config), ovis.ATOM, ovis.INDICATORS).tolist()
    ids = torch.tensor([[*before, *image, *after]])
    with torch.no_grad():
        logits = source.load()(ids, oracle["in.pixel_values"]).logits
    assert (logits - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_visual_words_of_an_upstream_ovis_are_its_own(name, opened):
    oracle = load_file(ORACLES / name / "oracle.safetensors")
    (words,) = opened[name].visual_words(**oracle_images(oracle, name), top_k=3)
    expected = oracle["out.visual_tokens"].flatten(0, 1).topk(3)
    assert torch.equal(words.ids, expected.indices)
    torch.testing.assert_close(words.probabilities, expected.values)


def test_an_ovis2_of_version_4_gives_its_logits():
    home = ORACLES / "hf457_ovis2"
    oracle = load_file(home / "oracle.safetensors")
    model = Ovis2ForConditionalGeneration.from_pretrained(home / "ckpt", attn_implementation="eager").eval()
    zoo = zoo_from_transformers(model)
    # Its rows lack the indicator after the whole picture, which an image of the zoo has: the features go in apart
    features = zoo.get_image_features(oracle["in.pixel_values"])
    start, *view = features.pooler_output[0][:-2]
    features.pooler_output = [torch.stack((start, *view, features.pooler_output[0][-1]))]
    ids = one_placeholder(oracle["in.input_ids"], range(101, 106), 100)
    with torch.no_grad():
        logits = zoo(ids, attention_mask=oracle["in.attention_mask"], mm_encoder_outputs={"image": features}).logits
    difference = (logits - oracle["out.logits"]).abs().max().item()
    print(f"hf457_ovis2: {difference:.1e}")
    assert difference <= TOLERANCE


def test_an_ovis2_of_version_4_takes_its_own_inputs(tmp_path):
    home = ORACLES / "hf457_ovis2"
    oracle = load_file(home / "oracle.safetensors")
    inputs = {name.removeprefix("in."): tensor for name, tensor in oracle.items() if name.startswith("in.")}
    vet.convert(home, tmp_path / "zoo", verify=False)
    zoo = AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo", attn_implementation="eager")
    with torch.no_grad():
        difference = (zoo(**inputs).logits - oracle["out.logits"]).abs().max().item()
    print(f"hf457_ovis2 with its own ids: {difference:.1e}")
    assert difference <= TOLERANCE
    source = Ovis2ForConditionalGeneration.from_pretrained(home / "ckpt", attn_implementation="eager")
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [zoo.config.image_token_id]}
    assert torch.equal(zoo.generate(**inputs, **options), source.generate(**inputs, **options))


# --- folders and processors ------------------------------------------------------------------------------------------

KINDS = ["ovis2", "ovis2_tiles", "ovis"]
TO_UPSTREAM = (
    (r"^model\.language_model\.", "llm.model."),
    (r"^lm_head\.", "llm.lm_head."),
    (r"^model\.visual_embeddings_table\.", "vte."),
    (r"^model\.vision_tower\.head_linear\.", "visual_tokenizer.head.0."),
    (r"^model\.vision_tower\.head_norm\.", "visual_tokenizer.head.1."),
    (r"^model\.vision_tower\.transformer\.rms_norm", "visual_tokenizer.backbone.trunk.post_trunk_norm"),
    (r"^model\.vision_tower\.transformer\.embeddings\.patch_embedding", "PREPROCESSOR.patchifier.proj"),
    (r"^model\.vision_tower\.transformer\.embeddings\.rms_norm", "PREPROCESSOR.patchifier.norm"),
    (r"^model\.vision_tower\.transformer\.embeddings\.position_embedding\.weight", "PREPROCESSOR.pos_embed"),
    (r"^PREPROCESSOR", "visual_tokenizer.backbone.preprocessor"),
    (r"^model\.vision_tower\.transformer\.encoder\.layers\.", "visual_tokenizer.backbone.trunk.blocks."),
    (r"rms_norm([12])", r"norm_\1"),
    (r"attention\.out_proj", "attn.proj"),
    (r"ffn\.gate_proj", "mlp.fc1"),
    (r"ffn\.up_proj", "mlp.fc3"),
    (r"ffn\.down_proj", "mlp.fc2"),
)


def image_tokenizer():
    """A tokenizer with the tokens of transformers' processor."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": [vet.ATOM, *vet.INDICATORS]})
    return tokenizer


def write_transformers(folder, tiles=None, **fields):
    ovis2(**fields).save_pretrained(folder)
    pixels = Ovis2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, crop_to_patches=tiles is not None, max_patches=tiles or 12
    )
    Ovis2Processor(pixels, image_tokenizer(), image_seq_length=4).save_pretrained(folder)
    return folder


def write_upstream(folder, dtype=torch.float32, **fields):
    """The folder that AIDC-AI's code would write of such a model."""
    model = ovis2(**fields)
    tensors = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in TO_UPSTREAM:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor[None] if name.endswith("pos_embed") else tensor
    for layer in range(2):
        block = f"visual_tokenizer.backbone.trunk.blocks.{layer}."
        parts = [tensors.pop(f"{block}attention.{part}_proj.weight") for part in "qkv"]
        tensors[f"{block}attn.qkv.weight"] = torch.cat(parts)
    folder.mkdir()
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vision = model.config.vision_config
    settings = {
        "model_type": "ovis",
        "architectures": ["Ovis"],
        "auto_map": {"AutoConfig": "configuration_ovis.OvisConfig", "AutoModelForCausalLM": "modeling_ovis.Ovis"},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "llm_config": model.config.text_config.to_dict(),
        "visual_tokenizer_config": {
            "vocab_size": vision.vocab_size,
            "hidden_stride": vision.hidden_stride,
            "tokenize_function": vision.tokenize_function,
            "tau": 1,
            "backbone_config": {
                "model_type": "aimv2",
                **{name: getattr(vision, name) for name in ovis.AIMV2_FIELDS},
            },
        },
    }
    settings["llm_config"].pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer(None).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, do_center_crop=False).save_pretrained(folder)
    return folder


def weights(folder):
    return {
        name: tensor for path in Path(folder).glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def picture(height, width):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rewrite(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of every kind, each with its processor."""
    home = tmp_path_factory.mktemp("sources")
    write_transformers(home / "ovis2")
    write_transformers(home / "ovis2_tiles", tiles=9)
    write_upstream(home / "ovis")
    return home


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    home = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        vet.convert(sources / kind, home / kind)
    return home


@pytest.fixture
def source(sources, tmp_path):
    """A function that copies a source to damage."""
    return lambda kind: shutil.copytree(sources / kind, tmp_path / "source")


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_folder_carries_its_processor_its_card_and_its_proof(kind, converted):
    folder = converted / kind
    report = json.loads((folder / parity.REPORT).read_text())
    assert [row["stage"] for row in report["stages"]] == ["input_ids", "pixels", *parity.STAGES, "greedy_text"]
    assert all(row["max_abs_diff"] <= TOLERANCE for row in report["stages"][2:-1])
    assert report["passed"] and report["image_sensitivity"] > 1e-3
    assert isinstance(AutoProcessor.from_pretrained(folder), ZooVetProcessor)
    assert "conversion.vet" in (folder / "README.md").read_text()
    assert (folder / "vet.py").is_file()


@pytest.mark.parametrize("kind", ["ovis2", "ovis"])
def test_the_way_there_keeps_every_bit(kind, sources, converted):
    source, zoo = weights(sources / kind), weights(converted / kind)
    dropped = converted / kind / engine.DROPPED
    zoo |= load_file(dropped) if dropped.is_file() else {}
    names = json.loads((converted / kind / engine.RECORD).read_text())["names"]
    assert set(names.values()) == zoo.keys()
    if kind == "ovis":
        for name in [name for name in source if ".qkv." in name]:
            for part, tensor in zip("qkv", source.pop(name).chunk(3), strict=True):
                source[name.replace(".qkv.", f".qkv.{part}.")] = tensor
    assert names.keys() == source.keys()
    assert all(torch.equal(tensor.view_as(zoo[names[name]]), zoo[names[name]]) for name, tensor in source.items())


@pytest.mark.parametrize(
    ("kind", "most", "views"), [("ovis2", None, 1), ("ovis2_tiles", 9, 5), ("ovis", 9, 5), ("ovis", 1, 1)]
)
def test_tiles_are_those_of_the_source_or_as_asked_for(kind, most, views, sources, tmp_path):
    options = {"max_tiles": 1} if most == 1 else {}
    vet.convert(sources / kind, tmp_path / "zoo", verify=False, **options)
    model, zoo = (door.from_pretrained(tmp_path / "zoo") for door in (AutoModelForImageTextToText, AutoProcessor))
    batch = zoo(images=[picture(32, 32)], text=[zoo.image_token], return_tensors="pt")
    assert model.config.max_tiles == zoo.image_processor.max_tiles == most
    assert (1 if most is None else batch["pixel_values"].shape[1]) == views
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_and_processor_answer_a_chat(kind, converted):
    model, zoo = (door.from_pretrained(converted / kind) for door in (AutoModelForImageTextToText, AutoProcessor))
    image = {"type": "image", "image": picture(40, 60)}
    question = [{"role": "user", "content": [image, {"type": "text", "text": "Eh?"}]}]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = zoo.apply_chat_template(question, add_generation_prompt=True, **call)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert model.config.response_token_ids == zoo.tokenizer("ASSISTANT:", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_pixels_are_those_of_the_source(kind, sources, converted):
    before = vet.open_source(sources / kind).processor
    own = (IMAGE, tuple(INDICATORS)) if kind != "ovis" else (ovis.ATOM, ovis.INDICATORS)
    processor = AutoProcessor.from_pretrained(converted / kind)
    zoo, compared = vet.ZooPrompts(processor, *own), set()
    for size in np.random.default_rng(0).integers(9, 70, (40, 2)).tolist():
        grid = processor.image_processor.tile_grid(*size) or (1, 1)
        if kind == "ovis2_tiles" and grid[0] != grid[1]:
            continue
        call = {"images": [picture(*size)], "text": ["What <image>\nis it?"]}
        expected, found = before(**call), zoo(**call)
        assert all(torch.equal(expected[name], found[name]) for name in ("input_ids", "attention_mask", "image_sizes"))
        levels = (expected["pixel_values"] - found["pixel_values"]).abs() * 255 * 0.2758
        # Two where one side grows and the other shrinks, and in a few values of a million
        assert levels.max() <= 2.1 and (levels > 1.1).sum() <= (levels.numel() if min(size) < SIZE else 2), size
        compared.add(grid)
    assert len(compared) >= {"ovis2": 1, "ovis2_tiles": 3, "ovis": 8}[kind]


def test_a_chat_template_of_the_source_writes_the_zoos_image_token(source, tmp_path):
    folder = source("ovis2")
    turn = "{{ '<|' + m.role + '|>' }}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    turn += "{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}{% endif %}{{ '</s>' }}"
    template = (
        f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
    )
    (folder / "chat_template.jinja").write_text(template)
    vet.convert(folder, tmp_path / "zoo", verify=False)
    zoo = AutoProcessor.from_pretrained(tmp_path / "zoo")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Eh?"}]}]
    assert zoo.apply_chat_template(chat, add_generation_prompt=True) == "<|user|><IMG_ATOM>\nEh?</s><|assistant|>"


def test_a_vocabulary_without_room_grows_by_the_mean_embedding(tmp_path):
    folder = write_upstream(tmp_path / "source", vocab_size=TEXT_IDS)
    assert vet.convert(folder, tmp_path / "zoo")["passed"]
    before, after = weights(folder), weights(tmp_path / "zoo")
    for old, new in (
        ("llm.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("llm.lm_head.weight", "lm_head.weight"),
    ):
        assert len(after[new]) == TEXT_IDS + 1
        assert torch.equal(after[new][:-1], before[old])
        torch.testing.assert_close(after[new][-1], before[old].mean(0))


def test_the_factor_of_gemma_2_is_part_of_a_table_that_does_not_round(tmp_path):
    folder = shutil.copytree(ORACLES / "ovisv1.6_siglip_stride2" / "ckpt", tmp_path / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in weights(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert vet.convert(folder, tmp_path / "zoo")["passed"]
    zoo = weights(tmp_path / "zoo")
    assert zoo.pop(ovis.TABLE).dtype == torch.float32
    assert {tensor.dtype for tensor in zoo.values()} == {torch.bfloat16}


@pytest.mark.parametrize("write", [write_transformers, write_upstream])
def test_a_source_that_samples_is_proven_by_its_most_probable_words(write, tmp_path):
    folder = write(tmp_path / "source", tokenize_function="gumbel_argmax")
    assert vet.convert(folder, tmp_path / "zoo")["passed"]
    assert json.loads((tmp_path / "zoo" / "config.json").read_text())["tokenize_function"] == "gumbel_argmax"


def test_a_head_that_only_the_config_ties_stays_its_own(tmp_path):
    report = vet.convert(ORACLES / "hf457_ovis2", tmp_path / "zoo")
    zoo = AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo")
    assert report["passed"] and not zoo.config.tie_word_embeddings
    assert not torch.equal(zoo.lm_head.weight, zoo.get_input_embeddings().weight)


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    folder = write_upstream(tmp_path / "source", dtype=torch.bfloat16)
    assert vet.convert(folder, tmp_path / "zoo")["passed"]
    assert {tensor.dtype for tensor in weights(tmp_path / "zoo").values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "zoo").dtype == torch.bfloat16


def test_a_dtype_may_have_the_name_of_version_5(source):
    folder = source("ovis")
    rewrite(folder / "config.json", lambda content: content.update(torch_dtype=None, dtype="bfloat16"))
    assert vet.open_source(folder).config.dtype == torch.bfloat16


def test_shards_are_read_and_written(converted, tmp_path):
    ovis2().save_pretrained(tmp_path / "source", max_shard_size="50KB")
    vet.convert(tmp_path / "source", tmp_path / "zoo", shard_bytes=50_000, verify=False)
    assert len(list((tmp_path / "zoo").glob("model-*.safetensors"))) > 2
    found, expected = weights(tmp_path / "zoo"), weights(converted / "ovis2")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("kind", ["ovis2", "ovis"])
def test_a_source_without_processor_converts_as_a_model_with_a_warning(kind, source, tmp_path, caplog):
    folder = source(kind)
    for path in folder.glob("*"):
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()
    assert vet.convert(folder, tmp_path / "zoo")["passed"]
    assert "no tokenizer and no image processor" in caplog.text
    assert not (tmp_path / "zoo" / "processor_config.json").exists()


def test_substitutes_complete_a_source_without_processor(sources, tmp_path):
    ovis2().save_pretrained(tmp_path / "source")
    given = dict.fromkeys(("tokenizer", "image_processor"), sources / "ovis2_tiles")
    report = vet.convert(tmp_path / "source", tmp_path / "zoo", **given)
    assert report["passed"]
    assert AutoProcessor.from_pretrained(tmp_path / "zoo").image_processor.max_tiles == 9


# --- nothing silent --------------------------------------------------------------------------------------------------


def problems_of(folder, destination):
    with pytest.raises(ConversionError) as caught:
        vet.convert(folder, destination)
    assert not destination.exists()
    return caught.value.problems


def test_all_problems_are_told_at_once(source, tmp_path):
    folder = source("ovis2")
    tensors = weights(folder)
    del tensors["model.vision_tower.head_norm.bias"]
    tensors |= {"extra": torch.ones(1), "model.visual_embeddings_table.weight": torch.ones(64, 31)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert problems_of(folder, tmp_path / "zoo") == {
        "unknown": ["extra"],
        "missing": ["model.connector.norm.bias"],
        "wrong shape": ["model.visual_embeddings_table.weight is [64, 31], expected [64, 32]"],
    }


def test_a_missing_tensor_of_an_upstream_is_named(source, tmp_path):
    folder = source("ovis")
    tensors = weights(folder)
    del tensors["visual_tokenizer.backbone.trunk.post_trunk_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert problems_of(folder, tmp_path / "zoo") == {"missing": ["model.vision_tower.rms_norm.weight"]}


@pytest.mark.parametrize("kind", ["ovis2", "ovis"])
def test_a_swapped_weight_is_reported_at_its_stage(kind, sources, converted, tmp_path):
    for name, stage in {
        "model.vision_tower.encoder.layers.0.ffn.up_proj.weight": "vision_tower",
        "model.connector.head.weight": "connector",
        "model.connector.norm.bias": "connector",
        "model.connector.table.weight": "connector",
        "model.language_model.layers.0.mlp.down_proj.weight": "language_model.first_layer",
        "lm_head.weight": "logits",
    }.items():
        zoo = shutil.copytree(converted / kind, tmp_path / name)
        tensors = weights(zoo)
        tensors[name] = tensors[name].flip(0)
        save_file(tensors, zoo / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
            vet.verify(sources / kind, zoo)


@pytest.mark.parametrize("kind", ["ovis2", "ovis"])
def test_indicators_in_another_order_are_noticed(kind, sources, converted, tmp_path):
    zoo = shutil.copytree(converted / kind, tmp_path / "zoo")
    tensors = weights(zoo)
    tensors["model.connector.table.weight"][-5:] = tensors["model.connector.table.weight"][-5:].flip(0)
    save_file(tensors, zoo / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"from the stage 'language_model\.first_layer' on"):
        vet.verify(sources / kind, zoo)


def test_a_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    folder = source("ovis2")
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_tokens(["other", vet.ATOM, *vet.INDICATORS], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConversionError, match="tokenizer and model belong to different checkpoints"):
        vet.convert(folder, tmp_path / "zoo")


def test_an_image_processor_of_another_kind_is_refused(source, sources, tmp_path):
    with pytest.raises(ConversionError, match="is a CLIPImageProcessor, expected an Ovis2ImageProcessor"):
        vet.convert(source("ovis2"), tmp_path / "zoo", image_processor=sources / "ovis")


def test_tiles_by_aspect_ratio_are_refused(source, tmp_path):
    folder = source("ovis2_tiles")
    rewrite(
        folder / "processor_config.json",
        lambda content: content["image_processor"].update(use_covering_area_grid=False),
    )
    with pytest.raises(ConversionError, match="chooses tiles by the aspect ratio"):
        vet.convert(folder, tmp_path / "zoo")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.update(model_type="ovis2_5"), "model type 'ovis2_5', this reads 'ovis'"),
        (lambda content: content["visual_tokenizer_config"].update(vocab_size=61), "has 2 indicators .* 1.0 and 1.5"),
        (lambda content: content["visual_tokenizer_config"].update(hd_booster="s2wrapper"), "s2wrapper"),
        (
            lambda content: content["visual_tokenizer_config"]["backbone_config"].update(model_type="dinov2"),
            "The tower is of model type 'dinov2'; this reads clip_vision_model",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(edit, message, source, tmp_path):
    folder = source("ovis")
    rewrite(folder / "config.json", edit)
    with pytest.raises(ConversionError, match=message):
        vet.convert(folder, tmp_path / "zoo")


VISUAL = "visual_tokenizer_config"


@pytest.mark.parametrize(
    ("edit", "missing"),
    [
        (
            lambda content: [content.pop(name) for name in list(content) if name != "model_type"],
            [
                "llm_config.model_type",
                "llm_config.vocab_size",
                f"{VISUAL}.vocab_size",
                f"{VISUAL}.tokenize_function",
                f"{VISUAL}.backbone_config.model_type",
            ],
        ),
        (lambda content: content[VISUAL].pop("tokenize_function"), [f"{VISUAL}.tokenize_function"]),
        (
            lambda content: content[VISUAL]["backbone_config"].pop("qkv_bias"),
            [f"{VISUAL}.backbone_config.qkv_bias"],
        ),
    ],
)
def test_keys_that_a_config_lacks_are_named(edit, missing, source, tmp_path):
    folder = source("ovis")
    rewrite(folder / "config.json", edit)
    assert problems_of(folder, tmp_path / "zoo") == {"missing keys": missing}


def test_an_upstream_without_a_head_is_refused(source, tmp_path):
    folder = source("ovis")
    tensors = weights(folder)
    del tensors["visual_tokenizer.head.0.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"no visual_tokenizer\.head\.0\.weight"):
        vet.convert(folder, tmp_path / "zoo")


def test_another_architecture_is_refused_by_name(tmp_path):
    LlavaConfig().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match="'llava'"):
        vet.convert(tmp_path / "source", tmp_path / "zoo")


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_converts_and_proves(sources, tmp_path, capsys):
    zoo = str(tmp_path / "zoo")
    assert vet.main([str(sources / "ovis"), zoo, "--max-tiles", "4"]) == 0
    assert "greedy_text" in capsys.readouterr().out
    assert vet.main([str(sources / "ovis"), zoo, "--max-tiles", "4", "--verify"]) == 0
    assert vet.main([str(sources / "ovis"), zoo]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_dry_run_shows_the_key_map_and_writes_nothing(sources, tmp_path, capsys):
    assert vet.main([str(sources / "ovis"), str(tmp_path / "zoo"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "blocks.0.attn.qkv.k.weight -> model.vision_tower.encoder.layers.0.attention.k_proj.weight" in shown
    assert "model.vision_tower.rms_norm.weight  float32[24]  (kept aside)" in shown
    assert list(tmp_path.iterdir()) == []
