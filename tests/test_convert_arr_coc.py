"""M-RoPE to ARR-COC and back: the same numbers at a budget of all tokens, and nothing silent on the way."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import test_convert_mrope as qwen
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from conversion import arr_coc, engine, mrope, parity
from conversion.engine import ConversionError
from vlm_zoo import AutoModelForVision2Seq
from vlm_zoo.models.arr_coc import ZooArrCocConfig, ZooArrCocForConditionalGeneration, ZooArrCocProcessor
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.testing import tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from vlm_zoo.testing.tiny import TINY_TEXT


BUDGET = 5
LADDER = {"ladder": [1, 2]}
THREE_LAYERS = {**TINY_TEXT["qwen3"], "num_hidden_layers": 3}
# Towers of all kinds, layouts of all kinds; of DINOv2 files have other names than models.
SOURCES = {
    "qwen3_vl": {"vision": "qwen3_vl", "text_config": THREE_LAYERS, "deepstack_layers": [1]},
    "qwen2_5_vl": {"vision": "qwen2_5_vl", "video_time": "seconds", "mrope_layout": "chunked"},
    "siglip2": {"vision": "siglip2", "text": "qwen3", "spatial_merge_size": 1},
    "dinov2": {"vision": "dinov2", "text": "gpt2", "mrope_layout": "none"},
}
FILES = ("processor_config.json", "tokenizer.json", "chat_template.jinja")


def mrope_model(kind="qwen3_vl", **overrides):
    """A tiny model of M-RoPE, every parameter random; always the same."""
    torch.manual_seed(0)
    model = tiny_model("mrope", **SOURCES[kind], **overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model, folder):
    model.save_pretrained(folder)
    tiny_processor("mrope", model.config).save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    home = tmp_path_factory.mktemp("sources")
    for kind in SOURCES:
        save(mrope_model(kind), home / kind)
    return home


@pytest.fixture
def source(sources, tmp_path):
    """A copy of one source to damage."""
    return Path(shutil.copytree(sources / "qwen3_vl", tmp_path / "source"))


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    home = tmp_path_factory.mktemp("converted")
    for kind in SOURCES:
        arr_coc.convert(sources / kind, home / kind, budget=BUDGET, fields=LADDER)
    return home


def weights(folder):
    return {
        name: tensor for path in Path(folder).glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def fusion_of(folder):
    return {name: tensor for name, tensor in weights(folder).items() if name.startswith(arr_coc.FUSION)}


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def damage(folder, edit):
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def batch_of(model, side="left"):
    """Three images of different sizes in the first row, one in the second, none in the third."""
    merge, values = model.config.spatial_merge_size, 3 * 8 * 8
    cells = torch.tensor([[1, 2, 3], [1, 4, 2], [1, 1, 1], [1, 3, 5]])
    image = model.config.image_token_id
    first, second, third, last = ([image] * int(grid.prod()) for grid in cells)
    rows = [[5, 6, *first, 7, *second, 8, *third, 9], [3, *last, 11, 12], [20, 21, 22, 23]]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    grids = cells * torch.tensor([1, merge, merge])
    pixels = torch.randn(int(grids.prod(dim=1).sum()), values, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": grids}


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_budget_of_all_tokens_gives_the_logits_of_mrope_bit_for_bit(kind, side):
    source = mrope_model(kind)
    zoo, batch = arr_coc.from_mrope(source, token_budget=1.0), batch_of(source, side)
    with torch.no_grad():
        assert torch.equal(source(**batch).logits, zoo(**batch).logits)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_budget_of_all_tokens_gives_the_greedy_text_of_mrope(kind):
    source = mrope_model(kind)
    zoo, batch = arr_coc.from_mrope(source, token_budget=1000), batch_of(source)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(source.generate(**batch, **options), zoo.generate(**batch, **options))


def test_the_model_in_memory_keeps_dtype_mode_and_attention_and_shares_nothing():
    source = mrope_model().to(torch.bfloat16).train()
    zoo = arr_coc.from_mrope(source, token_budget=BUDGET)
    assert {parameter.dtype for parameter in zoo.parameters()} == {torch.bfloat16} and zoo.training
    assert zoo.config.text_config._attn_implementation == source.config.text_config._attn_implementation
    assert zoo.lm_head.weight.data_ptr() != source.lm_head.weight.data_ptr()


def test_the_fusion_starts_as_that_of_a_new_model():
    zoo = arr_coc.from_mrope(mrope_model(), seed=3)
    new = ZooArrCocForConditionalGeneration(zoo.config)
    theirs, ours = new.model.fusion.state_dict(), zoo.model.fusion.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert bool(tensor.any()) == bool(ours[name].any()), name
        if tensor.numel() > 100 and tensor.any():
            assert 0.8 < tensor.std() / ours[name].std() < 1.25, name


def test_the_seed_decides_the_fusion_and_nothing_else_does():
    source, zoos = mrope_model(), []
    for seed in (0, 0, 1):
        torch.rand(1)
        zoos.append(arr_coc.from_mrope(source, seed=seed).model.fusion.state_dict())
    assert same_bits(zoos[0], zoos[1]) and not same_bits(zoos[0], zoos[2])


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    source = mrope_model()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    arr_coc.from_mrope(source)
    assert torch.equal(torch.rand(3), expected)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_every_stage_of_the_proof_is_exactly_equal(kind, converted):
    report = json.loads((converted / kind / parity.REPORT).read_text())
    stages = [stage["stage"] for stage in report["stages"]]
    assert stages == ["input_ids", "pixels", *parity.STAGES, "greedy_text", "own_budget"]
    assert report["passed"] and report["image_sensitivity"] > 1e-3
    assert {stage["max_abs_diff"] for stage in report["stages"] if "max_abs_diff" in stage} == {0.0}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_way_there_keeps_every_bit(kind, sources, converted):
    before, after = weights(sources / kind), weights(converted / kind)
    names = json.loads((converted / kind / engine.RECORD).read_text())["names"]
    assert names.keys() == before.keys()
    assert same_bits(before, {name: after[renamed] for name, renamed in names.items()})
    assert {name for name in after if not name.startswith(arr_coc.FUSION)} == set(names.values())


@pytest.mark.parametrize("kind", SOURCES)
def test_the_way_back_is_exact(kind, sources, converted, tmp_path):
    report = arr_coc.reverse(converted / kind, tmp_path / "back")
    assert report["passed"] and same_bits(weights(sources / kind), weights(tmp_path / "back"))
    for name in ("config.json", "generation_config.json", *FILES):
        assert (tmp_path / "back" / name).read_text() == (sources / kind / name).read_text(), name


def test_tokens_and_pixels_are_those_of_the_source(sources, converted):
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (converted / "siglip2" / name).read_text() == (sources / "siglip2" / name).read_text()
    found = [
        AutoProcessor.from_pretrained(home / "siglip2").image_processor.to_dict() for home in (sources, converted)
    ]
    for settings in found:
        settings.pop("auto_map")
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_converted_model_answers_a_chat_with_as_many_tokens_as_the_budget_says(kind, converted):
    model = AutoModelForVision2Seq.from_pretrained(converted / kind)
    processor = AutoProcessor.from_pretrained(converted / kind)
    assert type(model) is ZooArrCocForConditionalGeneration and type(processor) is ZooArrCocProcessor
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    content = [{"type": "image", "image": PIL.Image.fromarray(pixels)}, {"type": "text", "text": "Eh?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == BUDGET
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_converted_folder_says_where_it_came_from_what_is_new_and_what_images_cost(converted):
    card = (converted / "qwen3_vl" / "README.md").read_text()
    count = len(fusion_of(converted / "qwen3_vl"))
    assert "Converted from `qwen3_vl` (`zoo_mrope`) by `python -m conversion.arr_coc`" in card
    assert f"New are the {count} tensors of `model.fusion`" in card and "seed 0 and not trained" in card
    assert "A budget of 5 keeps 5 of 441 of a picture of 336 x 336" in card
    assert (converted / "qwen3_vl" / "arr_coc.py").is_file() and (converted / "qwen3_vl" / "detail_vlm.py").is_file()
    assert not (converted / "qwen3_vl" / "mrope.py").exists()


def test_the_report_counts_the_tokens_of_pictures(converted):
    found = json.loads((converted / "siglip2" / parity.REPORT).read_text())["own_budget"]
    assert found["token_budget"] == BUDGET
    assert found["pictures"][1] == {"height": 480, "width": 640, "native": 1230, "tokens": BUDGET}


def test_a_share_of_the_tokens_is_a_budget_too(sources, tmp_path):
    report = arr_coc.convert(sources / "siglip2", tmp_path / "zoo", budget=0.25)
    assert [picture["tokens"] / picture["native"] for picture in report["own_budget"]["pictures"]] == pytest.approx(
        [0.25] * 3, abs=1e-3
    )
    assert AutoProcessor.from_pretrained(tmp_path / "zoo").token_budget == 0.25


def test_the_generation_config_is_the_sources(source, tmp_path):
    edit_json(source / "generation_config.json", temperature=0.3, do_sample=True, suppress_tokens=[7])
    arr_coc.convert(source, tmp_path / "zoo", verify=False)
    found = json.loads((tmp_path / "zoo" / "generation_config.json").read_text())
    assert found["temperature"] == 0.3 and 7 in found["suppress_tokens"] and 259 in found["suppress_tokens"]


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    save(mrope_model().to(torch.bfloat16), tmp_path / "source")
    assert arr_coc.convert(tmp_path / "source", tmp_path / "zoo", budget=BUDGET)["passed"]
    found = weights(tmp_path / "zoo")
    assert found.pop("model.fusion.forwards").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_shards_are_read_and_written(sources, converted, tmp_path):
    mrope_model().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    tiny_processor("mrope", mrope_model().config).save_pretrained(tmp_path / "source")
    options = {"budget": BUDGET, "fields": LADDER, "verify": False}
    arr_coc.convert(tmp_path / "source", tmp_path / "zoo", shard_bytes=100_000, **options)
    assert len(list((tmp_path / "zoo").glob("model-*.safetensors"))) > 2
    assert same_bits(weights(tmp_path / "zoo"), weights(converted / "qwen3_vl"))


def test_a_tied_head_goes_there_and_back(tmp_path):
    save(mrope_model(tie_word_embeddings=True), tmp_path / "source")
    assert arr_coc.convert(tmp_path / "source", tmp_path / "zoo", budget=BUDGET)["passed"]
    assert "lm_head.weight" not in weights(tmp_path / "zoo")
    assert arr_coc.reverse(tmp_path / "zoo", tmp_path / "back")["passed"]
    assert same_bits(weights(tmp_path / "source"), weights(tmp_path / "back"))


# --- config ----------------------------------------------------------------------------------------------------------


def test_pixel_statistics_are_those_of_the_image_processor(source, tmp_path):
    processor = AutoProcessor.from_pretrained(source)
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    processor.save_pretrained(source)
    arr_coc.convert(source, tmp_path / "zoo", verify=False)
    config = ZooArrCocConfig.from_pretrained(tmp_path / "zoo")
    assert (config.image_mean, config.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_pixels_that_are_not_normalised_have_no_statistics():
    processor = ZooImageProcessor(do_normalize=False)
    assert arr_coc.pixel_statistics(processor) == {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def test_response_tokens_that_the_source_lacks_are_read_from_its_chat_template(source, tmp_path):
    expected = json.loads((source / "config.json").read_text())["response_token_ids"]
    edit_json(source / "config.json", response_token_ids=None)
    arr_coc.convert(source, tmp_path / "zoo", budget=BUDGET)
    assert expected and ZooArrCocConfig.from_pretrained(tmp_path / "zoo").response_token_ids == expected
    arr_coc.reverse(tmp_path / "zoo", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["response_token_ids"] is None


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ nonsense(", None])
def test_a_template_that_does_not_show_where_answers_begin_is_refused_with_ways_out(template, source, tmp_path):
    edit_json(source / "config.json", response_token_ids=None)
    (source / "chat_template.jinja").unlink()
    if template is not None:
        (source / "chat_template.jinja").write_text(template)
    with pytest.raises(ConversionError, match=r"chat template (fails|does not open answers)"):
        arr_coc.convert(source, tmp_path / "zoo")
    if template != "{{ nonsense(":
        arr_coc.convert(source, tmp_path / "one", fields={"response_token_ids": [5, 6]})
        blind = arr_coc.convert(source, tmp_path / "other", fields={"scorers": ["propositional", "perspectival"]})
        assert blind["stages"][-1]["stage"] == "own_budget" and blind["passed"]


def test_fields_of_arr_coc_can_be_set(source, tmp_path):
    fields = {"gate": "none", "ladder": [0, 2, 4], "token_order": "relevance"}
    arr_coc.convert(source, tmp_path / "zoo", budget=64, fields=fields)
    config = ZooArrCocConfig.from_pretrained(tmp_path / "zoo")
    assert (config.token_budget, config.gate, config.ladder) == (64, "none", [0, 2, 4])


def test_fields_that_the_source_decides_cannot_be_set(source, tmp_path):
    with pytest.raises(ConversionError, match=r"spatial_merge_size cannot be set, .* token_budget, ladder"):
        arr_coc.convert(source, tmp_path / "zoo", fields={"spatial_merge_size": 1})


@pytest.mark.parametrize("fields", [{"token_budget": 0}, {"token_budget": "many"}, {"gate": "wide"}, {"ladder": [3]}])
def test_values_that_are_no_config_are_refused(fields, source, tmp_path):
    with pytest.raises(ConversionError, match="is no config of ARR-COC"):
        arr_coc.convert(source, tmp_path / "zoo", fields=fields)
    assert not (tmp_path / "zoo").exists()


# --- incomplete sources ----------------------------------------------------------------------------------------------


def test_a_source_without_processor_converts_as_a_model_with_warnings(source, tmp_path, caplog):
    for name in (*FILES, "tokenizer_config.json"):
        (source / name).unlink()
    edit_json(source / "config.json", response_token_ids=None)
    report = arr_coc.convert(source, tmp_path / "zoo", budget=BUDGET)
    assert "no tokenizer and no image processor" in caplog.text and "no response_token_ids" in caplog.text
    assert "How pixels were normalised is not known" in caplog.text
    assert report["passed"] and "own_budget" not in [stage["stage"] for stage in report["stages"]]
    assert not (tmp_path / "zoo" / "processor_config.json").exists()
    assert arr_coc.reverse(tmp_path / "zoo", tmp_path / "back")["passed"]


def test_substitutes_complete_a_source_without_processor(source, sources, tmp_path):
    for name in (*FILES, "tokenizer_config.json"):
        (source / name).unlink()
    report = arr_coc.convert(
        source, tmp_path / "zoo", tokenizer=sources / "dinov2", image_processor=sources / "qwen3_vl"
    )
    assert report["stages"][0]["stage"] == "input_ids" and report["passed"]
    assert AutoProcessor.from_pretrained(tmp_path / "zoo").token_budget == 200


def test_an_image_processor_of_another_checkpoint_is_refused(source, sources, tmp_path):
    with pytest.raises(ConversionError, match=r"are \(8, 1, 1\) in the image processor and \(8, 2, 2\) in the model"):
        arr_coc.convert(source, tmp_path / "zoo", image_processor=sources / "siglip2")


def test_an_image_processor_of_another_kind_is_refused(source, tmp_path):
    qwen.image_processor().save_pretrained(tmp_path / "pixels")
    with pytest.raises(ConversionError, match="has a Qwen2VLImageProcessor, expected a ZooImageProcessor"):
        arr_coc.convert(source, tmp_path / "zoo", image_processor=tmp_path / "pixels")


def test_a_tokenizer_of_another_checkpoint_is_refused(source, tmp_path):
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.add_tokens(["other", "<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "words")
    edit_json(source / "config.json", image_token_id=300)
    with pytest.raises(ConversionError, match="image_token_id is 300, the tokenizer has 261 tokens"):
        arr_coc.convert(source, tmp_path / "zoo", tokenizer=tmp_path / "words")
    with pytest.raises(ConversionError, match="'<image>' is 259, the model's image_token_id is 300"):
        arr_coc.convert(source, tmp_path / "zoo")


# --- the way back ----------------------------------------------------------------------------------------------------


def test_a_trained_fusion_stays_behind_and_the_rest_goes_back_as_it_was(sources, converted, tmp_path):
    zoo = Path(shutil.copytree(converted / "qwen3_vl", tmp_path / "zoo"))
    names = list(fusion_of(zoo))
    damage(zoo, lambda tensors: tensors.update({name: tensors[name] + 1 for name in names}))
    arr_coc.reverse(zoo, tmp_path / "back")
    assert same_bits(weights(tmp_path / "back"), weights(sources / "qwen3_vl"))


def test_a_trained_model_goes_back_with_its_own_weights(converted, tmp_path):
    model = AutoModelForVision2Seq.from_pretrained(converted / "qwen3_vl")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained")
    AutoProcessor.from_pretrained(converted / "qwen3_vl").save_pretrained(tmp_path / "trained")
    assert arr_coc.reverse(tmp_path / "trained", tmp_path / "back")["passed"]
    back = AutoModelForVision2Seq.from_pretrained(tmp_path / "back")
    assert type(back).__name__ == "ZooMropeForConditionalGeneration"
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_tokens_that_learned_their_places_do_not_go_back(converted, tmp_path):
    zoo = Path(shutil.copytree(converted / "dinov2", tmp_path / "zoo"))
    damage(zoo, lambda tensors: tensors["model.fusion.place_code.place_gate"].add_(1.0))
    with pytest.raises(ConversionError, match=r"from the stage 'language_model\.first_layer' on"):
        arr_coc.reverse(zoo, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_model_that_was_built_goes_to_mrope(tmp_path):
    config = tiny_config("arr_coc", **SOURCES["qwen3_vl"])
    ZooArrCocForConditionalGeneration(config).save_pretrained(tmp_path / "built")
    tiny_processor("arr_coc", config).save_pretrained(tmp_path / "built")
    assert arr_coc.reverse(tmp_path / "built", tmp_path / "back")["passed"]


# --- other formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", qwen.KINDS)
def test_a_checkpoint_of_qwen_gets_there_in_two_steps(kind, tmp_path):
    qwen.upstream(kind).save_pretrained(tmp_path / "source")
    qwen.image_processor().save_pretrained(tmp_path / "source")
    qwen.qwen_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match=r"first: python -m conversion\.mrope"):
        arr_coc.convert(tmp_path / "source", tmp_path / "zoo")
    mrope.convert(tmp_path / "source", tmp_path / "step")
    report = arr_coc.convert(tmp_path / "step", tmp_path / "zoo", budget=3, fields=LADDER)
    assert report["passed"] and report["stages"][-1]["tokens"] == 3
    assert ZooArrCocConfig.from_pretrained(tmp_path / "zoo").response_token_ids
    assert AutoProcessor.from_pretrained(tmp_path / "zoo").video_token == "<|video_pad|>"


def test_a_checkpoint_of_the_other_direction_is_refused(sources, converted, tmp_path):
    with pytest.raises(ConversionError, match=r"'zoo_arr_coc'; this direction reads 'zoo_mrope'\. --reverse is"):
        arr_coc.convert(converted / "siglip2", tmp_path / "zoo")
    with pytest.raises(ConversionError, match="'zoo_mrope'; this direction reads 'zoo_arr_coc'"):
        arr_coc.reverse(sources / "siglip2", tmp_path / "zoo")


# --- nothing silent --------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(source, tmp_path):
    def edit(tensors):
        del tensors["model.connector.merger.norm.bias"]
        tensors |= {"extra": torch.ones(1), "lm_head.weight": torch.ones(3, 48)}

    damage(source, edit)
    with pytest.raises(ConversionError) as caught:
        arr_coc.convert(source, tmp_path / "zoo")
    assert caught.value.problems == {
        "unknown": ["extra"],
        "missing": ["model.connector.merger.norm.bias"],
        "wrong shape": ["lm_head.weight is [3, 48], expected [320, 48]"],
    }
    assert not (tmp_path / "zoo").exists()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("model.vision_tower.blocks.0.mlp.linear_fc1.bias", "vision_tower"),
        ("model.connector.deepstack_mergers.0.linear_1.bias", "connector"),
        ("model.language_model.layers.0.mlp.down_proj.weight", "language_model.first_layer"),
        ("lm_head.weight", "logits"),
    ],
)
def test_a_swapped_weight_is_reported_at_its_stage(name, stage, sources, converted, tmp_path):
    zoo = Path(shutil.copytree(converted / "qwen3_vl", tmp_path / "zoo"))
    damage(zoo, lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    with pytest.raises(ConversionError, match=f"from the stage '{stage}' on"):
        arr_coc.verify(sources / "qwen3_vl", zoo)


def test_a_change_that_rounding_could_hide_does_not_pass_the_proof(sources, converted, tmp_path):
    zoo = Path(shutil.copytree(converted / "qwen3_vl", tmp_path / "zoo"))
    damage(zoo, lambda tensors: tensors["lm_head.weight"].mul_(1 + 2**-22))
    with pytest.raises(ConversionError, match="from the stage 'logits' on"):
        arr_coc.verify(sources / "qwen3_vl", zoo)


def test_a_fusion_that_does_not_work_is_found_at_its_own_budget(sources, converted, tmp_path):
    zoo = Path(shutil.copytree(converted / "qwen3_vl", tmp_path / "zoo"))
    damage(zoo, lambda tensors: tensors["model.fusion.scorers.propositional.weight"].fill_(torch.nan))
    with pytest.raises(ConversionError, match="from the stage 'own_budget' on"):
        arr_coc.verify(sources / "qwen3_vl", zoo)


def test_a_proof_of_an_existing_folder_tells_the_costs_of_its_own_budget(sources, converted):
    report = arr_coc.verify(sources / "siglip2", converted / "siglip2")
    assert report["passed"] and report["own_budget"]["token_budget"] == BUDGET


def test_an_interrupted_conversion_leaves_nothing_and_starts_again(sources, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ZooArrCocProcessor, "save_pretrained", interrupt)
        arr_coc.convert(sources / "siglip2", tmp_path / "zoo")
    assert list(tmp_path.iterdir()) == []
    arr_coc.convert(sources / "siglip2", tmp_path / "zoo", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_a_conversion_that_does_not_pass_leaves_only_its_report(sources, tmp_path, monkeypatch):
    seen = arr_coc.AtAllTokens.get_image_features

    def shifted(self, **kwargs):
        outputs = seen(self, **kwargs)
        outputs.pooler_output = [feature.roll(1, 0) for feature in outputs.pooler_output]
        return outputs

    monkeypatch.setattr(arr_coc.AtAllTokens, "get_image_features", shifted)
    with pytest.raises(ConversionError, match="from the stage 'connector' on"):
        arr_coc.convert(sources / "siglip2", tmp_path / "zoo", budget=BUDGET)
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.parity.json"]


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_converts_proves_and_goes_back(sources, tmp_path, capsys):
    source, zoo, back = str(sources / "qwen3_vl"), str(tmp_path / "zoo"), str(tmp_path / "back")
    options = ["--budget", "7", "--set", "ladder=[1, 3]", "--set", "gate=none", "--seed", "2"]
    assert arr_coc.main([source, zoo, *options]) == 0
    shown = capsys.readouterr().out
    assert "logits                           0.00e+00" in shown and "A budget of 7 keeps 7 of 441" in shown
    config = ZooArrCocConfig.from_pretrained(zoo)
    assert (config.token_budget, config.ladder, config.gate) == (7, [1, 3], "none")
    assert "seed 2" in (tmp_path / "zoo" / "README.md").read_text()
    assert arr_coc.main([source, zoo, "--verify"]) == 0
    assert arr_coc.main([source, zoo]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert arr_coc.main([zoo, back, "--reverse"]) == 0
    assert "dropped: model.fusion.adapters.0.down.bias, " in capsys.readouterr().out
    assert same_bits(weights(source), weights(back))


def test_a_dry_run_shows_the_key_map_and_writes_nothing(sources, converted, tmp_path, capsys):
    assert arr_coc.main([str(sources / "siglip2"), "--dry-run", "--budget", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "lm_head.weight -> lm_head.weight  float32[320, 48]\n" in shown
    assert "model.fusion.forwards -> model.fusion.forwards  int64[]  (new)" in shown
    assert arr_coc.main([str(converted / "dinov2"), "--dry-run", "--reverse"]) == 0
    shown = capsys.readouterr().out
    assert "model.fusion.forwards -> (dropped)" in shown
    assert (
        "layer.0.attention.q_proj.bias -> model.vision_tower.encoder.layer.0.attention.attention.query.bias" in shown
    )
    assert list(tmp_path.iterdir()) == []


def test_a_field_without_a_value_is_an_error_of_usage(sources, tmp_path, capsys):
    with pytest.raises(SystemExit):
        arr_coc.main([str(sources / "siglip2"), str(tmp_path / "zoo"), "--set", "gate"])
    assert "expected FIELD=VALUE, got gate" in capsys.readouterr().err
