"""Visual embedding tables: the numbers of transformers' Ovis2 and of the upstream Ovis 1.6 and 2."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig

from conversion.engine import ConversionError
from conversion.vet import one_placeholder, read_upstream, zoo_config, zoo_from_transformers


ORACLES = Path(__file__).parent / "oracles"
TOLERANCE = 5e-6
IMAGE, INDICATORS = 120, (121, 122, 123, 124, 125)
START, WHOLE, COLUMN, ROW, END = INDICATORS


def ovis2(image_size=16, **vision):
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
            vocab_size=128,
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
        vocab_size=128,
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


@pytest.mark.parametrize(("name", "size"), [("ovisv1.6_siglip_stride2", 20), ("ovisv2.0_aimv2", 16)])
def test_an_upstream_ovis_gives_its_logits(name, size):
    oracle = load_file(ORACLES / name / "oracle.safetensors")
    zoo = read_upstream(ORACLES / name / "ckpt", image_token_id=119)
    zoo.set_attn_implementation("eager")
    images = {"pixel_values": oracle["in.pixel_values"][None], "image_sizes": torch.tensor([[2 * size, 2 * size]])}
    expected, (before, after) = oracle["out.logits"], ([5, 6], [7, 8, 9])
    image = expected.shape[1] - len(before + after)
    ids = torch.tensor([[*before, *[119] * image, *after]])
    with torch.no_grad():
        logits, features = zoo(ids, **images).logits, zoo.get_image_features(**images).pooler_output[0]
    # Gemma 2's factor, see the conversion
    scale = 32**0.5 if zoo.config.text_config.model_type == "gemma2" else 1.0
    embeddings = oracle["out.inputs_embeds"][0, len(before) : -len(after)] * scale
    print(f"{name}: {(features - embeddings).abs().max():.1e}, logits {(logits - expected).abs().max():.1e}")
    assert (features - embeddings).abs().max() <= TOLERANCE
    # Logits of Ovis 1.6 reach 6.7, and upstream's own are 1e-5 from those in float64: the limit grows with them
    assert (logits - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max())


@pytest.mark.parametrize(("name", "size"), [("ovisv1.6_siglip_stride2", 20), ("ovisv2.0_aimv2", 16)])
def test_the_visual_words_of_an_upstream_ovis_are_its_own(name, size):
    oracle = load_file(ORACLES / name / "oracle.safetensors")
    zoo = read_upstream(ORACLES / name / "ckpt", image_token_id=119)
    sizes = torch.tensor([[2 * size, 2 * size]])
    (words,) = zoo.visual_words(oracle["in.pixel_values"][None], image_sizes=sizes, top_k=3)
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


def test_what_was_read_saves_and_opens_again(tmp_path):
    zoo = read_upstream(ORACLES / "ovisv2.0_aimv2" / "ckpt", image_token_id=119, max_tiles=None)
    zoo.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 16, 16)
    ours, theirs = (model.get_image_features(pixels).pooler_output[0] for model in (zoo, again))
    assert torch.equal(ours, theirs)


def test_a_missing_tensor_is_named(tmp_path):
    folder = shutil.copytree(ORACLES / "ovisv2.0_aimv2" / "ckpt", tmp_path / "ckpt")
    raw = json.loads((folder / "config.json").read_text())
    raw["visual_tokenizer_config"]["backbone_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConversionError, match=r"missing.*encoder\.layers\.2\."):
        read_upstream(folder, image_token_id=119)


def test_native_resolution_is_refused_by_name(tmp_path):
    folder = shutil.copytree(ORACLES / "ovisv2.0_aimv2" / "ckpt", tmp_path / "ckpt")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "ovis2_5"}))
    with pytest.raises(ConversionError, match=r"ovis2_5.*no tower"):
        read_upstream(folder, image_token_id=119)
