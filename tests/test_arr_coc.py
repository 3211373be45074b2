"""ARR-COC: exactly the budget, detail where the question points, M-RoPE when everything fits, and how it learns."""

import copy
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from vlm_zoo import build
from vlm_zoo.models import modeling_vlm
from vlm_zoo.models.arr_coc import (
    ArrCocOutput,
    QualityAdapter,
    ZooArrCocConfig,
    ZooArrCocForConditionalGeneration,
    within_regions,
)
from vlm_zoo.models.detail_vlm import allocate, budget_of, detail_table, pooling
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.modeling_vlm import WholePrompt
from vlm_zoo.models.relevance_vlm import SCORERS, TENSIONS
from vlm_zoo.models.texture_vlm import TEXTURE_CHANNELS
from vlm_zoo.models.video_vlm import Clip
from vlm_zoo.testing import TINY_TEXT, TINY_VISION, tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from vlm_zoo.testing.tiny import TINY_NATIVE_VISION
from vlm_zoo.training import lora_targets


IMAGE, WIDTH = 259, 48
MARKER = tiny_config("arr_coc").response_token_ids
DEEP = {"text_config": {**TINY_TEXT["llama"], "num_hidden_layers": 4}, "deepstack_layers": [1, 2]}
BUDGET = 13
# Patches of each image; two of them are cells of 4 x 6 and 6 x 4, above the budget, the last is one of 2 x 3
GRIDS = ((1, 8, 12), (1, 12, 8), (1, 4, 6))
GATES = ("noise", "attn_bias", "multiply", "crossfade", "none")
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def model_of(kind="arr_coc", vision="qwen3_vl", **overrides):
    """A tiny model, every parameter random enough to matter."""
    fields = {"token_budget": BUDGET, "ladder": [1, 2]} if kind == "arr_coc" else {}
    torch.manual_seed(0)
    model = tiny_model(kind, vision=vision, **{**fields, **overrides})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def mrope_of(model):
    """M-RoPE with the weights of an ARR-COC model."""
    names = ("text_config", "mrope_layout", "video_time", "positions_after_image", "deepstack_layers")
    base = tiny_model("mrope", vision="qwen3_vl", **{name: getattr(model.config, name) for name in names})
    missing, unknown = base.load_state_dict(model.state_dict(), strict=False)
    assert not missing and {name.split(".")[1] for name in unknown} == {"fusion"}
    return base


@cache
def pixels(number, frames=1):
    """The patches of one image or clip, smooth in places, so that its cells differ."""
    _, height, width = GRIDS[number]
    generator = torch.Generator().manual_seed(number)
    patches = torch.randn(frames * height * width, 3 * 8 * 8, generator=generator)
    return (patches * torch.rand(len(patches), 1, generator=generator)).clamp(-1, 1)


def row(images=(0,), question=(9, 10, 11), answer=(20, 21, 22)):
    return {"images": images, "question": question, "answer": answer}


def batch_of(model, *rows, side="left"):
    """Rows of images, questions and answers, as a batch with as many placeholders as the model's budget asks for."""
    lines = []
    for each in rows:
        counts = [budget_of(math.prod(GRIDS[image]) // 4, budget_in(model)) for image in each["images"]]
        images = [token for place, count in enumerate(counts) for token in (*[IMAGE] * count, 30 + place)]
        lines.append([5, *images, *each["question"], *MARKER, *each["answer"]])
    longest = max(map(len, lines))
    ids, mask = torch.zeros(2, len(lines), longest, dtype=torch.long)
    for number, line in enumerate(lines):
        place = slice(longest - len(line), None) if side == "left" else slice(len(line))
        ids[number, place], mask[number, place] = torch.tensor(line), 1
    images = [image for each in rows for image in each["images"]]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([pixels(image) for image in images]),
        "image_grid_thw": torch.tensor([GRIDS[image] for image in images]),
    }


def budget_in(model):
    return getattr(model.config, "token_budget", 1.0)


def several():
    """Rows of every kind: one image, two, and one that is smaller than the budget."""
    return row(), row((1, 0), question=(12, 13)), row((2,), question=(14, 15, 16, 17), answer=(23,))


def reports(model, inputs):
    with torch.no_grad():
        return model(**inputs).fusion_outputs.images


def seen_by_language_model(model, inputs):
    """The keyword arguments with which the language model was called."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen


def same(one, other):
    """Whether two reports say the same, to the bit."""
    fields = ("boxes", "positions", "levels", "shares", "balance", "token_regions", *(f"{name}_map" for name in MAPS))
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all(first is second is None or torch.equal(first, second) for first, second in pairs)


MAPS = ("relevance", *SCORERS)


# --- all native tokens: M-RoPE ---------------------------------------------------------------------------------------

WHOLE = {
    "interleaved": {},
    "chunked": {"mrope_layout": "chunked"},
    "no axes": {"mrope_layout": "none"},
    "deepstack": DEEP,
}


def whole_model(budget, **fields):
    """A model that keeps all tokens; the code of places begins behind a closed gate."""
    model = model_of(token_budget=budget, **fields)
    if model.config.mrope_layout == "none":
        nn.init.zeros_(model.model.fusion.place_code.place_gate)
    return model


@pytest.mark.parametrize("budget", [24, 1000, 1.0])
@pytest.mark.parametrize("name", WHOLE)
def test_with_a_budget_of_all_tokens_it_is_m_rope_to_the_bit(name, budget):
    model = whole_model(budget, **WHOLE[name])
    base, inputs = mrope_of(model), batch_of(model, *several())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), base.generate(**inputs, **options))


def test_with_a_budget_of_all_tokens_it_trains_as_m_rope_does():
    model = whole_model(1.0, **DEEP).train()
    base, inputs = mrope_of(model).train(), batch_of(model, *several())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    for each in (model, base):
        each(**inputs, labels=labels).loss.backward()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


def clip_inputs(model, time):
    """A clip of three time steps and a still, with text between the steps where they are told by text."""
    per_step = budget_of(24, budget_in(model))
    steps = [token for step in range(3) for token in (*[IMAGE] * per_step, *[40 + step][: int(time == "timestamps")])]
    still = budget_of(24, budget_in(model))
    ids = torch.tensor([[5, *steps, 6, *[IMAGE] * still, 7, 8, *MARKER, 9]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat((pixels(0, frames=3), pixels(1))),
        "image_grid_thw": torch.tensor([[3, 8, 12], [1, 12, 8]]),
    }
    if time == "seconds":
        inputs["image_position_ids"] = torch.tensor([[0, 4, 8], [0, 0, 0]])
    return inputs


@pytest.mark.parametrize("time", ["timestamps", "seconds", "index"])
def test_clips_with_a_budget_of_all_tokens_are_those_of_m_rope(time):
    model = whole_model(1.0, video_time=time)
    base, inputs = mrope_of(model), clip_inputs(model, time)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), base.generate(**inputs, **options))


def test_a_model_opened_from_m_rope_begins_neutral(tmp_path):
    model = whole_model(1.0, mrope_layout="none")
    base, inputs = mrope_of(model), batch_of(model, *several())
    base.save_pretrained(tmp_path)
    found = ZooArrCocForConditionalGeneration.from_pretrained(tmp_path, config=model.config).eval()
    with torch.no_grad():
        assert torch.equal(found(**inputs).logits, base(**inputs).logits)
    fusion = found.model.fusion
    for values in (
        *(adapter.level_gate for adapter in fusion.adapters),
        fusion.place_code.place_gate,
        fusion.forwards,
        fusion.scorers["propositional"].weight,
        fusion.scorers["perspectival"].weight,
        fusion.scorers["perspectival"].centre,
        fusion.scorers["participatory"].log_temperature,
        *fusion.balancer.tensions.parameters(),
        fusion.balancer.salience,
        fusion.balancer.inhibition,
    ):
        assert not values.any()
    assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in fusion.parameters())


# --- exactly the budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 5, 13, 23, 0.5, 0.9])
@pytest.mark.parametrize("ladder", [[1, 2], [2, 3, 5], [0, 1], [0, 2]])
def test_every_image_ends_as_exactly_its_budget(budget, ladder):
    model = model_of(token_budget=budget, ladder=ladder)
    inputs = batch_of(model, *several())
    found = reports(model, inputs)
    for report, grid in zip(found, (GRIDS[0], GRIDS[1], GRIDS[0], GRIDS[2]), strict=True):
        cells = grid[1] * grid[2] // 4
        wanted = budget_of(cells, budget)
        assert len(report.boxes) == len(report.positions) == wanted
        assert wanted == cells or report.tokens_per_region.sum() == wanted
        assert report.size == (grid[1] // 2, grid[2] // 2)


def test_the_output_names_what_became_of_every_image():
    model = model_of()
    output = model(**batch_of(model, *several())).fusion_outputs
    assert isinstance(output, ArrCocOutput) and output.auxiliary_loss is None
    assert [report.image for report in output.images] == [0, 1, 2, 3]
    for report, size in zip(output.images[:3], [(4, 6), (6, 4), (4, 6)], strict=True):
        regions = (size[0] // 2, size[1] // 2)
        assert set(report.maps()) == set(MAPS)
        assert all(values.shape == size and not values.requires_grad for values in report.maps().values())
        assert list(report.tensions) == list(TENSIONS) and all(0 < value < 1 for value in report.tensions.values())
        assert report.levels.shape == report.shares.shape == report.tokens_per_region.shape == regions
        assert report.shares.sum() == pytest.approx(1) and report.region_side == 2
        assert report.levels.unique().tolist() == [0, 1]
    small = output.images[3]
    assert small.maps() == {} and small.levels is small.tensions is small.tokens_per_region is None
    assert len(small.boxes) == 6


def test_more_relevant_regions_have_more_tokens():
    model = model_of()
    for report in reports(model, batch_of(model, *several()))[:3]:
        order = report.shares.flatten().argsort()
        assert (report.levels.flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_can_count_alone(name):
    model = model_of(scorers=[name])
    report = reports(model, batch_of(model, row()))[0]
    assert set(report.maps()) == {"relevance", name}


def test_tensions_are_neutral_until_they_are_learned():
    model = tiny_model("arr_coc", vision="qwen3_vl", token_budget=BUDGET)
    for report in reports(model, batch_of(model, *several()))[:3]:
        assert list(report.tensions.values()) == [0.5, 0.5, 0.5]


def test_fixed_tensions_are_those_of_every_image():
    model = model_of(fixed_tensions=[1, 0.25, 0.75])
    for report in reports(model, batch_of(model, *several()))[:3]:
        assert list(report.tensions.values()) == [1.0, 0.25, 0.75]


def test_a_processor_with_another_budget_is_refused():
    model = model_of()
    inputs = batch_of(model_of(token_budget=BUDGET - 1), row(), row((1,)))
    for call in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match="tokens: 24, features: 26"):
            call(**inputs)


def test_processor_and_model_of_different_budgets_do_not_fit():
    model = tiny_model("arr_coc", token_budget=5)
    processor = tiny_processor("arr_coc", tiny_config("arr_coc", token_budget=6))
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 56, 3), dtype=np.uint8))
    batch = processor(text=["<image> what is it?"], images=[[picture]], return_tensors="pt")
    with pytest.raises(ValueError, match="tokens: 6, features: 5"):
        model(**batch)


@pytest.mark.parametrize("budget", [6, 0.5, 1.0])
def test_the_processor_counts_as_the_model_does(budget):
    config = tiny_config("arr_coc", token_budget=budget)
    processor = tiny_processor("arr_coc", config)
    assert processor.token_budget == budget
    found = processor._get_num_multimodal_tokens(image_sizes=[(48, 64), (32, 32)])["num_image_tokens"]
    assert found == [budget_of(12, budget), budget_of(4, budget)]
    frames = [Image.new("RGB", (64, 48), (level, 0, 0)) for level in (0, 90, 180, 250)]
    batch = processor(text=["<video>"], videos=[frames], return_tensors="pt")
    steps, rows, columns = batch["image_grid_thw"][0].tolist()
    assert (batch["input_ids"] == IMAGE).sum() == steps * budget_of(rows * columns // 4, budget)


# --- the question, and nothing else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(5))
def test_no_token_from_the_response_on_moves_anything(place):
    model = model_of()
    answer = (20, 21, 22, *MARKER, 23)
    inputs = batch_of(model, row(answer=answer))
    before, tokens = reports(model, inputs)[0], seen_by_language_model(model, inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, place - len(answer)] = 50 + place
    after, other = reports(model, inputs)[0], seen_by_language_model(model, inputs)
    visual = inputs["input_ids"][0] == IMAGE
    assert same(before, after)
    assert torch.equal(tokens["inputs_embeds"][0, visual], other["inputs_embeds"][0, visual])
    assert torch.equal(tokens["position_ids"], other["position_ids"])


@pytest.mark.parametrize("place", range(3))
def test_every_token_of_the_question_moves_what_it_finds(place):
    model, question = model_of(), [9, 10, 11]
    before = reports(model, batch_of(model, row(question=question)))[0]
    question[place] += 40
    after = reports(model, batch_of(model, row(question=question)))[0]
    assert (before.participatory_map - after.participatory_map).abs().max() > 1e-4
    assert torch.equal(before.propositional_map, after.propositional_map)
    assert torch.equal(before.perspectival_map, after.perspectival_map)


def test_another_question_can_choose_other_regions():
    model = model_of(fixed_tensions=[0.0, 0.5, 0.5])
    levels = {
        tuple(reports(model, batch_of(model, row(question=(word, word + 1))))[0].levels.flatten().tolist())
        for word in range(40, 140, 10)
    }
    assert len(levels) > 1


def test_text_that_opens_no_response_asks_nothing():
    model = model_of()
    inputs = batch_of(model, row(answer=()))
    inputs = {**inputs, **{name: inputs[name][:, : -len(MARKER)] for name in ("input_ids", "attention_mask")}}
    assert not reports(model, inputs)[0].participatory_map.any()


def test_the_question_cannot_be_read_without_ids_or_marker():
    model = model_of()
    inputs = batch_of(model, row())
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="reads the question from input_ids"):
        model(**inputs, inputs_embeds=embeds)
    model = model_of(response_token_ids=None)
    with pytest.raises(ValueError, match="no response_token_ids"):
        model(**batch_of(model, row()))


@pytest.mark.parametrize("fields", [{"scorers": ["perspectival"]}, {"allocation": "uniform"}, {"token_budget": 1.0}])
def test_where_nobody_asks_no_question_is_needed(fields):
    model = model_of(response_token_ids=None, **fields)
    inputs = batch_of(model, *several())
    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_image_and_its_question_have_the_same_allocation_in_any_batch(side):
    model, rows = model_of(**DEEP), [*several(), row((1, 1, 2), question=(18,)), row((), question=(9,)), row((0,))]
    together = reports(model, batch_of(model, *rows, side=side))
    alone = []
    for each in rows:
        alone += reports(model, batch_of(model, each)) if each["images"] else []
    assert len(together) == len(alone) == 8
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        for name, values in one.maps().items():
            torch.testing.assert_close(values, other.maps()[name], atol=1e-5, rtol=0)
    assert not torch.equal(together[0].participatory_map, together[2].participatory_map)  # of one image


def test_images_of_one_row_have_one_question():
    model = model_of()
    first, second = reports(model, batch_of(model, row((0, 0))))
    torch.testing.assert_close(first.participatory_map, second.participatory_map)
    assert torch.equal(first.boxes, second.boxes)


# --- tokens ----------------------------------------------------------------------------------------------------------


def fused(model, inputs):
    """The visual tokens of a batch `float[K, Dt]`, with the native ones `float[N, …]` and the reports."""
    with torch.no_grad():
        native = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
        tokens = seen_by_language_model(model, inputs)["inputs_embeds"]
    return tokens[inputs["input_ids"] == IMAGE], torch.cat(native.pooler_output), reports(model, inputs)


def test_native_tokens_pass_untouched():
    model = model_of()
    kept, native, (report,) = fused(model, batch_of(model, row()))
    cells = report.boxes[:, 0] * 6 + report.boxes[:, 1]
    is_native = (report.boxes[:, 2:] - report.boxes[:, :2] == 1).all(dim=1)
    assert 4 <= is_native.sum() < BUDGET
    assert torch.equal(kept[is_native], native[cells[is_native].long(), :WIDTH])


def test_pooled_tokens_are_means_that_the_more_active_cells_dominate():
    for weighted in (True, False):
        model = model_of(weighted_pooling=weighted)
        for adapter in model.model.fusion.adapters:
            nn.init.zeros_(adapter.level_gate)
        kept, native, (report,) = fused(model, batch_of(model, row()))
        activation = report.relevance_map.flatten()
        compared = 0
        for token, box, cells in zip(kept, report.boxes, pooling(report.boxes, 4, 6), strict=True):
            own = cells.bool()
            weight = activation[own].clone() - activation[own].mean() if weighted else torch.zeros(int(own.sum()))
            weight = cells[own] * weight.clamp(-2, 2).exp()
            expected = (weight / weight.sum()) @ native[own, :WIDTH]
            torch.testing.assert_close(token, expected, atol=1e-5, rtol=0)
            compared += int((box[2:] - box[:2]).prod()) > 1
        assert compared > 2


def test_the_weight_of_a_cell_is_bounded():
    table = detail_table(2, 4, (1, 2), 5, 0.5, torch.device("cpu"))
    weight = within_regions(torch.tensor([[9.0, 1.0, 5.0, 5.0, 1.0, 1.0, 5.0, 6.0]]), table)[0]
    expected = torch.tensor([2.0, -2.0, -0.25, -0.25, -2.0, -2.0, -0.25, 0.75]).exp()
    torch.testing.assert_close(weight, expected)


def test_deeper_features_are_pooled_as_the_tokens_are():
    model = model_of(**DEEP)
    for adapter in model.model.fusion.adapters:
        nn.init.zeros_(adapter.level_gate)
    inputs = batch_of(model, row())
    _, native, (report,) = fused(model, inputs)
    with torch.no_grad():
        features = seen_by_language_model(model, inputs)["deepstack"].features
    activation, cells = report.relevance_map.flatten(), pooling(report.boxes, 4, 6)
    region = torch.tensor([y // 2 * 3 + x // 2 for y in range(4) for x in range(6)])
    means = torch.stack([activation[region == number].mean() for number in range(6)])[region]
    weights = cells * (activation - means).clamp(-2, 2).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    for depth, found in enumerate(features, start=1):
        torch.testing.assert_close(found, weights @ native[:, depth * WIDTH : (depth + 1) * WIDTH], atol=1e-5, rtol=0)


def test_the_adapter_begins_as_the_identity():
    fresh = tiny_model("arr_coc", **DEEP).model.fusion.adapters
    assert len(fresh) == 3
    tokens, level, cells = torch.randn(2, 5, WIDTH), torch.tensor([[0, 1, 2, 0, 1]] * 2), torch.rand(2, 5) * 9 + 1
    for adapter in fresh:
        assert torch.equal(adapter(tokens, level, cells), tokens)


@torch.no_grad()
def test_the_adapter_tells_levels_and_areas_apart_and_leaves_native_tokens_alone():
    adapter = QualityAdapter(WIDTH, levels=3)
    adapter.level_gate.fill_(0.5)
    tokens = torch.randn(1, 1, WIDTH).expand(1, 5, WIDTH)
    level, cells = torch.tensor([[0, 1, 0, 1, 3]]), torch.tensor([[4.0, 4.0, 9.0, 1.0, 1.0]])
    found = adapter(tokens, level, cells)[0]
    # Regions that doubled have levels more than the ladder; they count as its last
    beyond, last = (adapter(tokens, torch.full_like(level, number), 4 * cells) for number in (4, 2))
    assert torch.equal(beyond, last)
    assert torch.equal(found[3:], tokens[0, 3:])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[other]).abs().max() > 1e-3
    assert (found[0] - tokens[0, 0]).abs().max() > 1e-3


def test_features_are_the_same_for_every_question_and_budget():
    inputs = batch_of(model_of(), row())
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        one, other = (model_of(token_budget=budget).get_image_features(**images) for budget in (BUDGET, 1.0))
    (feature,) = one.pooler_output
    assert feature.shape == (24, WIDTH + len(TEXTURE_CHANNELS) + 4)
    assert torch.equal(feature, other.pooler_output[0])


def test_the_texture_is_that_of_the_picture_before_it_was_normalised(tmp_path):
    """Through `build`, which reads from the tower's folder how pixels are normalised."""
    AutoModel.from_config(AutoConfig.for_model(**TINY_VISION["clip"])).save_pretrained(tmp_path / "vision")
    ZooImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_TEXT["llama"])).save_pretrained(tmp_path / "text")
    tiny_tokenizer(image_token=None).save_pretrained(tmp_path / "text")
    model, processor = build("arr_coc", tmp_path / "vision", tmp_path / "text", token_budget=6, ladder=[1, 2])
    values = np.random.RandomState(0).randint(0, 256, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    batch = processor(images=[Image.fromarray(values)], text=["<image>"], return_tensors="pt")
    assert model.config.image_mean == list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    with torch.no_grad():
        (feature,) = model.get_image_features(
            batch["pixel_values"], image_grid_thw=batch["image_grid_thw"]
        ).pooler_output
    expected = torch.tensor(values[::16, ::16] / 255, dtype=torch.float32).flatten(0, 1)
    torch.testing.assert_close(feature[:, WIDTH : WIDTH + 3], expected, atol=1e-4, rtol=0)


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", [[1, 2], [2, 3], [1, 2, 4]])
def test_tokens_stand_in_the_middle_of_their_box_and_native_ones_where_m_rope_puts_them(ladder):
    model = model_of(ladder=ladder)
    inputs = batch_of(model, row())
    seen = seen_by_language_model(model, inputs)["position_ids"][:, 0, inputs["input_ids"][0] == IMAGE]
    whole = batch_of(mrope_of(model), row())
    base = seen_by_language_model(mrope_of(model), whole)["position_ids"][:, 0, whole["input_ids"][0] == IMAGE]
    (report,) = reports(model, inputs)
    fractional = 0
    for place, (top, left, bottom, right) in zip(seen.T, report.boxes, strict=True):
        middle = torch.stack((torch.zeros(()), (top + bottom - 1) / 2, (left + right - 1) / 2))
        torch.testing.assert_close(place, base[:, 0] + middle)
        if bottom - top == right - left == 1:
            assert torch.equal(place, base[:, int(6 * top + left)].float())
        fractional += bool((place % 1 != 0).any())
    assert fractional
    torch.testing.assert_close(report.positions, seen[1:].T - 1)  # behind one token


@pytest.mark.parametrize("side", ["left", "right"])
def test_places_of_text_do_not_depend_on_the_budget(side):
    found = []
    for budget in (1, BUDGET, 0.9, None):
        model = mrope_of(model_of()) if budget is None else model_of(token_budget=budget)
        inputs = batch_of(model, *several(), side=side)
        positions = seen_by_language_model(model, inputs)["position_ids"]
        text = (inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()
        with torch.no_grad():
            outputs = model(**inputs)
        following = inputs["attention_mask"].sum(dim=1, keepdim=True) + outputs.carry
        found.append((positions[:, text].float(), following))
    for positions, following in found[1:]:
        assert torch.equal(positions, found[0][0]) and torch.equal(following, found[0][1])


@pytest.mark.parametrize("time", ["timestamps", "seconds", "index"])
@pytest.mark.parametrize("rule", ["side", "extent"])
def test_places_of_text_around_clips_do_not_depend_on_the_budget(time, rule):
    found = []
    compressed = model_of(video_time=time, positions_after_image=rule)
    for model in (compressed, mrope_of(compressed)):
        inputs = clip_inputs(model, time)
        if time == "seconds":
            inputs["image_position_ids"] = 3 * inputs["image_position_ids"]
        positions = seen_by_language_model(model, inputs)["position_ids"][:, 0].float()
        visual = inputs["input_ids"][0] == IMAGE
        found.append((positions[:, ~visual], positions[0, visual].unique()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
def test_without_axes_a_code_tells_tokens_where_they_stand():
    model = model_of(mrope_layout="none")
    inputs = batch_of(model, row())
    kept, _, (report,) = fused(model, inputs)
    code = model.model.fusion.place_code(report.positions)
    nn.init.zeros_(model.model.fusion.place_code.place_gate)
    torch.testing.assert_close(kept - fused(model, inputs)[0], code, atol=1e-5, rtol=0)
    nn.init.ones_(model.model.fusion.place_code.place_gate)
    code = model.model.fusion.place_code(torch.tensor([[0.0, 0.0], [0.0, 1.5], [1.5, 0.0], [0.5, 0.5]]))
    assert torch.cdist(code, code).fill_diagonal_(1.0).min() > 0.1
    assert code[:, 1].tolist() == pytest.approx([math.sin(y * 10000 ** (-1 / 12)) for y in (0, 0, 1.5, 0.5)])


@pytest.mark.parametrize("text", ["opt", "gpt2"])
def test_without_axes_any_decoder_reads_compressed_images(text):
    model = model_of(text=text, mrope_layout="none")
    inputs = batch_of(model, *several())
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


# --- clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["timestamps", "seconds", "index"])
def test_every_time_step_of_a_clip_has_its_own_budget(time):
    model = model_of(video_time=time)
    found = reports(model, clip_inputs(model, time))
    assert [report.image for report in found] == [0, 0, 0, 1]
    assert [len(report.boxes) for report in found] == [BUDGET] * 4
    assert not torch.equal(found[0].relevance_map, found[1].relevance_map)


@pytest.mark.parametrize("time", ["timestamps", "seconds", "index"])
def test_clips_generate_the_same_with_and_without_a_cache(time):
    model = model_of(video_time=time, **DEEP)
    inputs, options = clip_inputs(model, time), {"max_new_tokens": 8, "do_sample": False}
    cached, whole = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


def test_a_clip_from_its_frames_asks_and_answers():
    model = tiny_model("arr_coc", vision="qwen3_vl")
    processor = tiny_processor("arr_coc", model.config)
    frames = [Image.fromarray(np.random.RandomState(n).randint(0, 256, (48, 64, 3), dtype=np.uint8)) for n in range(4)]
    content = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[text], videos=[Clip(frames, [0.0, 0.5, 1.0, 1.5], 2.0)], return_tensors="pt")
    assert len(reports(model, batch)) == 2  # two frames a patch
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def test_maps_and_places_are_those_of_the_images():
    model = model_of(video_time="timestamps")
    inputs = clip_inputs(model, "timestamps")
    output = model(**inputs).fusion_outputs
    maps = model.model.fusion_maps(output)
    assert len(maps) == 2 and set(maps[0]) == {*MAPS, "level"}
    assert torch.equal(maps[0]["relevance"], output.images[0].relevance_map)
    assert torch.equal(maps[1]["relevance"], output.images[3].relevance_map)
    assert maps[1]["level"].shape == (6, 4)
    assert torch.equal(maps[1]["level"][::2, ::2], output.images[3].levels)
    places = model.model.token_places({"image_grid_thw": inputs["image_grid_thw"]}, output)
    assert [len(own) for own in places] == [3 * BUDGET, BUDGET]
    sides = torch.tensor([6.0, 4.0, 6.0, 4.0])
    torch.testing.assert_close(places[1][:, 1:] * sides, output.images[3].boxes)


# --- the other allocations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "random"])
@pytest.mark.parametrize("fields", [{}, DEEP, {"mrope_layout": "none"}])
def test_allocations_without_relevance_keep_the_count_and_train(allocation, fields):
    model = model_of(allocation=allocation, **fields)
    inputs = batch_of(model, *several())
    found = reports(model, inputs)
    assert [len(report.boxes) for report in found] == [BUDGET, BUDGET, BUDGET, 6]
    assert all(report.maps() == {} and report.tensions is None for report in found)
    assert not hasattr(model.model.fusion, "scorers")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.model.fusion.adapters[0].parameters())
    assert model.model.fusion.forwards == 0


def test_a_uniform_allocation_covers_every_cell_alike():
    model = model_of(allocation="uniform")
    (report,) = reports(model, batch_of(model, row()))
    torch.testing.assert_close(pooling(report.boxes, 4, 6).sum(dim=0), torch.ones(24))
    areas = (report.boxes[:, 2:] - report.boxes[:, :2]).prod(dim=1)
    assert areas.max() < 2 * areas.min()


def test_a_random_allocation_is_the_same_for_a_picture_in_any_batch_and_another_for_another():
    model = model_of(allocation="random")
    together = reports(model, batch_of(model, *several()))
    alone = reports(model, batch_of(model, row(question=(60, 61))))
    assert torch.equal(together[0].boxes, alone[0].boxes) and torch.equal(together[0].boxes, together[2].boxes)
    levels = {tuple(report.levels.flatten().tolist()) for report in together[:2]}
    inputs = batch_of(model, row())
    for shift in range(1, 6):
        inputs["pixel_values"] = pixels(0).roll(shift, 0)
        levels.add(tuple(reports(model, inputs)[0].levels.flatten().tolist()))
    assert len(levels) > 2


def test_tokens_can_come_in_the_order_of_relevance():
    raster, ordered = model_of(), model_of(token_order="relevance")
    ordered.load_state_dict(raster.state_dict())
    inputs = batch_of(raster, row())
    kept, _, (plain,) = fused(raster, inputs)
    moved, _, (report,) = fused(ordered, inputs)
    assert (report.shares.flatten()[report.token_regions].diff() <= 0).all()
    order = [report.boxes.tolist().index(box) for box in plain.boxes.tolist()]
    assert order != sorted(order)
    assert torch.equal(kept, moved[order]) and torch.equal(plain.token_regions, report.token_regions[order])
    assert torch.equal(plain.levels, report.levels)


def test_a_ladder_from_zero_drops_regions_and_keeps_the_others_native():
    model = model_of(ladder=[0, 2])
    kept, native, (report,) = fused(model, batch_of(model, row()))
    cells = (report.boxes[:, 0] * 6 + report.boxes[:, 1]).long()
    assert torch.equal(kept, native[cells, :WIDTH])
    assert (report.tokens_per_region == 0).any() and (report.tokens_per_region == 4).sum() == 3
    model.train()(**batch_of(model, row()), labels=batch_of(model, row())["input_ids"]).loss.backward()
    for name, parameter in model.model.fusion.scorers.named_parameters():
        assert parameter.grad.isfinite().all(), name


# --- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, DEEP, {"mrope_layout": "none"}])
def test_another_question_about_encoded_images_is_answered_as_from_their_pixels(fields):
    model = model_of(**fields)
    inputs = batch_of(model, *several())
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    encoded = {"image": model.get_image_features(**images)}
    options = {"max_new_tokens": 5, "do_sample": False}
    for question in ((60, 61, 62), (70,)):
        inputs = batch_of(model, *({**each, "question": question, "answer": ()} for each in several()))
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model(**text, mm_encoder_outputs=encoded).logits, model(**inputs).logits)
        found = model.generate(**text, mm_encoder_outputs=encoded, **options)
        assert torch.equal(found, model.generate(**inputs, **options))


def test_images_encoded_by_another_model_are_refused():
    model, base = model_of(), mrope_of(model_of())
    inputs = batch_of(model, row())
    encoded = base.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    encoded.vision_inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"Encoded images have \[24\] tokens, their grids are \[\[1, 4, 4\]\]"):
        model(**text, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("fields", [{}, DEEP, {"mrope_layout": "none"}, {"scorers": ["propositional"]},
                                    {"allocation": "uniform"}, {"allocation": "random"}])  # fmt: skip
def test_a_second_turn_goes_on_from_the_cache_of_the_first(fields):
    model, options = model_of(**fields), {"do_sample": False, "eos_token_id": None}
    first = batch_of(model, row(answer=()), row((1, 2), question=(12, 13), answer=()))
    images = {name: first[name] for name in ("pixel_values", "image_grid_thw")}
    turn = model.generate(**first, max_new_tokens=4, return_dict_in_generate=True, **options)
    ids = torch.cat((turn.sequences, torch.tensor([[70, 71, *MARKER], [72, 73, *MARKER]])), dim=1)
    mask = nn.functional.pad(first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1)
    text = {"input_ids": ids, "attention_mask": mask}
    expected = model.generate(**text, **images, max_new_tokens=5, **options)
    found = model.generate(**text, **images, past_key_values=turn.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_an_image_of_the_second_turn_stands_behind_the_cache():
    model = model_of()
    ids = torch.tensor([[5, *[IMAGE] * BUDGET, 6, *MARKER, 7, 8, *[IMAGE] * BUDGET, 9, 10]])
    images = {"pixel_values": torch.cat((pixels(0), pixels(1))), "image_grid_thw": torch.tensor(GRIDS[:2])}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cut = BUDGET + 3 + len(MARKER)
    own = {"pixel_values": pixels(0), "image_grid_thw": torch.tensor(GRIDS[:1])}
    prefill = model(ids[:, :cut], **own, use_cache=True)
    found = model.generate(ids, **images, past_key_values=prefill.past_key_values, **options)
    assert torch.equal(found, model.generate(ids, **images, **options))


@torch.no_grad()
def test_a_prefill_of_the_beginning_reads_the_whole_question():
    model = model_of()
    ids = torch.tensor([[*[IMAGE] * BUDGET, 9, 10, 11, *MARKER]])
    images = {"pixel_values": pixels(0), "image_grid_thw": torch.tensor(GRIDS[:1])}
    expected = model.model(ids, **images).fusion_outputs.images[0]
    told = model.model(ids[:, :-1], **images, carry=WholePrompt(ids, torch.ones_like(ids))).fusion_outputs.images[0]
    alone = model.model(ids[:, :-1], **images).fusion_outputs.images[0]
    assert same(told, expected) and not same(alone, expected)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True},
                                     {"prefill_chunk_size": 5}], ids=["no cache", "static", "chunks"])  # fmt: skip
def test_generation_in_other_ways_gives_the_same_text(options):
    model = model_of(**DEEP)
    inputs, plain = batch_of(model, *several()), {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **plain, **options), model.generate(**inputs, **plain))


def test_beams_repeat_the_allocation_of_their_row():
    model, options = model_of(), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together = model.generate(**batch_of(model, *several()), **options)
    for number, each in enumerate(several()):
        alone = model.generate(**batch_of(model, each), **options)
        assert torch.equal(together[number, -5:], alone[0, -5:])


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model, inputs, seed=0):
    """Of the loss of all answers, by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model.train()(**inputs, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"ladder": [0, 1]}, DEEP])
def test_evaluation_is_the_same_for_every_gate(fields):
    logits = []
    for gate in GATES:
        model = model_of(gate=gate, **fields)
        logits.append(model(**batch_of(model, *several())).logits)
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


@pytest.mark.parametrize("ladder", [[1, 2], [0, 2], [0, 1]])
@pytest.mark.parametrize("gate", GATES[:4])
def test_every_scorer_and_the_balancer_learn_through_the_gate(gate, ladder):
    model = model_of(gate=gate, ladder=ladder, tension_coefficient=0.0)
    found = gradients(model, batch_of(model, *several()))
    for name, gradient in found.items():
        assert gradient is not None and gradient.isfinite().all(), name
        if name.startswith(("fusion.scorers", "fusion.balancer")):
            assert gradient.abs().max() > 1e-9, name


def test_every_part_of_the_fusion_learns():
    model = model_of(mrope_layout="none", tension_coefficient=0.0)
    found = gradients(model, batch_of(model, *several()))
    own = {name: gradient for name, gradient in found.items() if name.startswith("fusion")}
    assert {name.split(".")[1] for name in own} == {"scorers", "balancer", "adapters", "place_code"}
    assert all(gradient.any() for gradient in own.values())


def test_a_fresh_model_opens_its_gates_as_it_learns():
    model = tiny_model("arr_coc", vision="qwen3_vl", token_budget=BUDGET, tension_coefficient=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        inputs = batch_of(model, *several())
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss.backward()
        optimizer.step()
    for name, parameter in model.model.fusion.named_parameters():
        assert parameter.grad.any() and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("ladder", [[1, 2], [0, 1]])
def test_without_a_gate_no_gradient_reaches_the_scorers(ladder):
    model = model_of(gate="none", ladder=ladder, tension_coefficient=0.0)
    for name, gradient in gradients(model, batch_of(model, *several())).items():
        if name.startswith(("fusion.scorers", "fusion.balancer")):
            assert not gradient.any(), name


@pytest.mark.parametrize("gate", ["attn_bias", "multiply", "crossfade"])
@pytest.mark.parametrize("fields", [{}, DEEP, {"text": "qwen3"}])
def test_gates_without_noise_change_nothing_but_the_gradient(gate, fields):
    model = model_of(gate=gate, exploration=0.0, **fields)
    for side in ("left", "right"):
        inputs = batch_of(model, *several(), side=side)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        trained = model.train()(**inputs, shift_labels=labels).loss
        with torch.no_grad():
            torch.testing.assert_close(trained, model.eval()(**inputs, shift_labels=labels).loss)


def test_a_bias_on_attention_is_refused_where_no_mask_can_carry_it():
    model = model_of(gate="attn_bias", text="mistral").train()
    with pytest.raises(ValueError, match=r"sliding windows of 32 in sequences of \d+: choose gate 'noise'"):
        model(**batch_of(model, *several()))
    model = model_of(gate="attn_bias").train()
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(ValueError, match="eager or sdpa, not flex_attention"):
        model(**batch_of(model, *several()))


def gated(gate, draws=1, **fields):
    """
    A gate at work on one picture of 2 x 4 cells, with its left region native.

    Returns:
        What it makes of the tokens `float[draws, B, Dt]`, their bias, their detail, and their membership as a leaf.
    """
    model = model_of(gate=gate, **fields).train().model
    width = WIDTH * len(model.fusion.adapters)
    table = detail_table(2, 4, (1, 2), 5, 1.0, torch.device("cpu"))
    tokens = torch.randn(1, 8, width)
    allocation = allocate(table, torch.tensor([[0.8, 0.0]]), torch.zeros(1, 8), 5)
    membership = torch.tensor([[0.6] * 4 + [1.0]], requires_grad=True)
    weights = pooling(allocation.boxes, 2, 4)
    kept = (weights / weights.sum(dim=2, keepdim=True)) @ tokens
    coarse = torch.cat((tokens[:, [0, 1, 4, 5]].mean(dim=1, keepdim=True).expand(-1, 4, -1), kept[:, 4:]), dim=1)
    given = tokens, kept, torch.ones(1, 8), (2, 4), table, allocation._replace(membership=membership)
    found = [model.gate(*given) for _ in range(draws)]
    return torch.cat([each for each, _ in found]), found[0][1], (kept - coarse)[0], membership


@pytest.mark.parametrize("fields", [{}, DEEP])
def test_noise_keeps_the_strength_of_the_detail_of_every_stream(fields):
    found, _, detail, _ = gated("noise", draws=4000, **fields)
    coarse = found.mean(dim=0) - 0.6**0.5 * detail
    plain = gated("none", **fields)[0][0] - detail
    torch.testing.assert_close(coarse, plain, atol=0.1, rtol=0)
    strength = detail.unflatten(1, (-1, WIDTH)).square().mean(dim=2).sqrt().repeat_interleave(WIDTH, dim=1)
    torch.testing.assert_close(found.std(dim=0)[:4], (0.4**0.5 * strength)[:4], atol=0.1, rtol=0)
    assert found.std(dim=0)[4].max() < 1e-3


@pytest.mark.parametrize("gate", ["noise", "crossfade"])
def test_more_membership_is_more_detail(gate):
    found, _, detail, membership = gated(gate, draws=500)
    (found * detail).mean(dim=0).sum().backward()
    assert (membership.grad[0, :4] > 0.1).all()


def test_more_membership_is_a_larger_token_or_more_attention():
    found, _, _, membership = gated("multiply")
    (found * found.detach()).sum().backward()
    torch.testing.assert_close(membership.grad[0], found[0].detach().square().sum(dim=1))
    _, bias, _, membership = gated("attn_bias")
    bias.sum().backward()
    assert not bias.any()
    torch.testing.assert_close(membership.grad[0], 1 / membership[0].detach())


def test_a_low_temperature_leaves_no_doubt():
    for temperature, settled in ((1e-4, True), (1.0, False)):
        model = model_of(exploration=0.0, gate_temperature=temperature)
        inputs = batch_of(model, row())
        clean = fused(model, inputs)[0]
        trained = seen_by_language_model(model.train(), inputs)["inputs_embeds"][inputs["input_ids"] == IMAGE]
        assert bool((trained - clean).abs().max() < 0.02) == settled


def test_noise_takes_the_place_of_detail_that_was_nearly_not_chosen():
    model = model_of(exploration=0.0, gate_temperature=0.2)
    inputs = batch_of(model, row())
    clean, _, (report,) = fused(model, inputs)
    model.train()
    drawn = []
    for seed in range(200):
        torch.manual_seed(seed)
        drawn.append(seen_by_language_model(model, inputs)["inputs_embeds"][inputs["input_ids"] == IMAGE].detach())
    drawn = torch.stack(drawn)
    coarse = report.levels.flatten()[report.token_regions] == 0
    single = coarse & ((report.boxes[:, 2:] - report.boxes[:, :2]) == 1).all(dim=1)
    torch.testing.assert_close(drawn[:, coarse & ~single], clean[coarse & ~single].expand(200, -1, -1))
    spread = drawn.std(dim=0).mean(dim=1)
    assert (spread[~coarse | single] > 0.01).all()
    shares = report.shares.flatten()[report.token_regions]
    fine = (~coarse).nonzero().flatten()
    safest, riskiest = fine[shares[fine].argmax()], fine[shares[fine].argmin()]
    size = (clean[fine] - drawn[:, fine].mean(dim=0)).abs().mean(dim=1)  # how much of the detail is lost
    assert size[fine == safest] < size[fine == riskiest]


# --- when it explores ------------------------------------------------------------------------------------------------


def test_exploration_falls_to_zero_over_its_steps():
    model = model_of(exploration=2.0, exploration_steps=4).train()
    inputs, found = batch_of(model, row()), []
    for _ in range(6):
        found.append(model.model.exploration)
        model(**inputs)
    assert found == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_exploration_lets_other_regions_be_seen():
    model = model_of(exploration=5.0, gate="none").train()
    inputs = batch_of(model, row())
    levels = {tuple(model(**inputs).fusion_outputs.images[0].levels.flatten().tolist()) for _ in range(12)}
    model.config.exploration = 0.0
    settled = {tuple(model(**inputs).fusion_outputs.images[0].levels.flatten().tolist()) for _ in range(12)}
    assert len(levels) > 3 and len(settled) == 1
    assert settled == {tuple(reports(model.eval(), inputs)[0].levels.flatten().tolist())}


def test_exploration_lets_other_single_cells_be_seen():
    model = model_of(exploration=5.0, ladder=[1, 4], token_budget=5).train()  # too little for a region
    inputs = batch_of(model, row())
    singles = set()
    for _ in range(8):
        (report,) = model(**inputs).fusion_outputs.images
        assert not report.levels.any()
        singles.add(tuple(map(tuple, report.boxes.tolist())))
    assert len(singles) > 3


def test_the_steps_are_counted_saved_and_read_again(tmp_path):
    model = model_of(exploration_steps=10).train()
    inputs = batch_of(model, row())
    for _ in range(3):
        model(**inputs)
    assert model.model.fusion.forwards == 3
    model.save_pretrained(tmp_path)
    again = ZooArrCocForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.fusion.forwards == 3 and again.model.exploration == pytest.approx(0.7)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_only_training_of_the_relevance_is_counted_and_disturbed():
    model = model_of(exploration=5.0)
    inputs = batch_of(model, *several())
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(model.train()(**inputs).logits, expected)
    model.eval()(**inputs)
    assert model.model.fusion.forwards == 0
    model.train().set_trainable_parts(["connector", "language"])
    for _ in range(3):
        assert torch.equal(model(**inputs).logits, expected)
    assert model.model.fusion.forwards == 0
    model.set_trainable_parts(["fusion"])
    assert not torch.equal(model(**inputs).logits, expected)
    assert model.model.fusion.forwards == 1


def test_gradient_checkpointing_counts_a_step_once():
    model = model_of().train()
    model.gradient_checkpointing_enable()
    inputs = batch_of(model, *several())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.fusion.forwards == 1


def test_training_goes_on_after_inference_mode():
    detail_table.cache_clear()
    model = model_of()
    inputs = batch_of(model, *several())
    with torch.inference_mode():
        model(**inputs)
    assert all(gradient is not None for gradient in gradients(model, inputs).values())


def test_an_adapter_takes_the_fusion_along(tmp_path):
    model = model_of()
    inputs = batch_of(model, *several())
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    settings = LoraConfig(r=2, target_modules=lora_targets(model, ["language"]), modules_to_save=["fusion"])
    adapted = get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        adapted(**inputs, labels=labels).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, adapted.eval()(**inputs).logits)
        assert not torch.equal(again(**inputs).logits, model_of()(**inputs).logits)
    assert again.base_model.model.model.fusion.forwards == 2


# --- auxiliary losses ------------------------------------------------------------------------------------------------


def auxiliary_gradients(model, inputs):
    """Of the auxiliary loss alone, as a trainer gets it: from the base model, without labels."""
    model.zero_grad()
    outputs = model.model(**inputs)
    (outputs.last_hidden_state.sum() * 0.0).backward()
    return {name: parameter.grad for name, parameter in model.model.fusion.named_parameters()}, outputs


def balances(model, inputs):
    """What the balancer made of the compressed images, with its graph."""
    found = []
    hook = model.model.fusion.balancer.register_forward_hook(lambda module, args, balance: found.append(balance))
    model(**inputs)
    hook.remove()
    return found


@pytest.mark.parametrize("coefficients", [(3.0, 0.0), (0.0, 2.0), (3.0, 2.0)])
def test_the_auxiliary_loss_adds_its_own_gradient(coefficients):
    tension, entropy = coefficients
    model = model_of(tension_coefficient=tension, entropy_coefficient=entropy).train()
    inputs = batch_of(model, *several())  # three compressed images and one that is whole
    found, outputs = auxiliary_gradients(model, inputs)
    model.zero_grad()
    found_again = balances(model, inputs)
    tensions = torch.cat([balance.tensions for balance in found_again])
    logarithms = torch.cat([balance.relevance.log_softmax(dim=1) for balance in found_again])
    entropies = -(logarithms.exp() * logarithms).sum(dim=1) / math.log(6)
    expected = (tension * (tensions - 0.5).square().mean(dim=1) + entropy * entropies).sum() / 4
    expected.backward()
    assert outputs.fusion_outputs.auxiliary_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not outputs.fusion_outputs.auxiliary_loss.requires_grad
    for name, parameter in model.model.fusion.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], wanted, atol=1e-7, rtol=1e-4)
    assert found["balancer.tensions.bias"].abs().max() > 1e-4


def test_the_auxiliary_loss_is_beside_the_main_one():
    model = model_of(tension_coefficient=0.0, exploration=0.0)
    inputs = batch_of(model, *several())
    main = gradients(model, inputs)["fusion.balancer.tensions.bias"].clone()
    model.config.tension_coefficient = 5.0
    both = gradients(model, inputs)["fusion.balancer.tensions.bias"].clone()
    alone = auxiliary_gradients(model, inputs)[0]["balancer.tensions.bias"]
    torch.testing.assert_close(both, main + alone)
    assert alone.abs().max() > 1e-3


def test_four_forwards_of_one_row_add_four_times_what_one_of_four_rows_adds():
    model = model_of(tension_coefficient=1.0).train()
    rows = [row(question=(word,)) for word in (9, 60, 70, 80)]
    whole = auxiliary_gradients(model, batch_of(model, *rows))[0]["balancer.tensions.bias"].clone()
    model.zero_grad()
    for each in rows:
        (model.model(**batch_of(model, each)).last_hidden_state.sum() * 0.0).backward()
    found = model.model.fusion.balancer.tensions.bias.grad
    torch.testing.assert_close(found, 4 * whole, atol=1e-6, rtol=1e-4)


def test_there_is_no_auxiliary_loss_where_relevance_does_not_learn():
    model = model_of(tension_coefficient=1.0)
    inputs = batch_of(model, row())
    assert model(**inputs).fusion_outputs.auxiliary_loss is None
    model.train().set_trainable_parts(["connector"])
    assert auxiliary_gradients(model, inputs)[1].fusion_outputs.auxiliary_loss is None
    assert not any(parameter.grad.any() for parameter in model.model.connector.parameters())
    for fields in ({"fixed_tensions": [0.5] * 3}, {"tension_coefficient": 0.0}, {"token_budget": 1.0}):
        model = model_of(**fields).train()
        assert model(**batch_of(model, row())).fusion_outputs.auxiliary_loss is None


def test_an_auxiliary_loss_is_refused_in_float16_by_name():
    model = model_of().train()
    inputs = batch_of(model, row())
    refused = partial(pytest.raises, ValueError, match="Training in float16 .* train in bfloat16, or set tension_")
    with torch.autocast("cpu", dtype=torch.float16), refused():
        model(**inputs)
    half = copy.deepcopy(model).half()
    with refused():
        half(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
    half.config.tension_coefficient = 0.0
    half(**inputs)
    half.config.tension_coefficient = 1.0
    half.set_trainable_parts(["connector"])
    half(**inputs)
    half.eval()(**inputs)


# --- every parameter takes part --------------------------------------------------------------------------------------


def test_a_batch_of_small_images_touches_every_parameter():
    model = model_of().train()
    found = gradients(model, batch_of(model, row((2,)), row((2, 2))))
    assert all(gradient is not None for gradient in found.values())
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("fusion"))


def test_a_sharded_batch_of_text_touches_every_parameter(monkeypatch):
    monkeypatch.setattr(modeling_vlm, "is_sharded", lambda: True)
    model = model_of().train()
    ids = torch.tensor([[5, 9, 10, *MARKER, 20, 21]])
    model(input_ids=ids, labels=ids).loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in named.values())
    assert not any(gradient.any() for name, gradient in named.items() if "fusion" in name or "connector" in name)


def test_constant_pictures_have_finite_gradients():
    model = model_of(tension_coefficient=1.0, entropy_coefficient=1.0)
    inputs = batch_of(model, *several())
    for value in (-1.0, 0.0, 1.0):
        inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], value)
        for name, gradient in gradients(model, inputs).items():
            assert gradient.isfinite().all(), (value, name)


@pytest.mark.parametrize("fields", [{}, {"mrope_layout": "none"}])
def test_parts_may_lie_on_different_devices(fields, tmp_path):
    model = model_of(**fields)
    inputs = batch_of(model, *several())
    with torch.no_grad():
        expected = model(**inputs).logits
    places = {"model.vision_tower": "cpu", "model.connector": "disk", "model.fusion": "disk"}
    places |= {"model.language_model": "disk", "lm_head": "cpu"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_sharded_model_learns_the_same(tmp_path):
    fields = {"exploration": 0.0, "gate": "attn_bias", "tension_coefficient": 1.0}
    model = model_of(**fields)
    inputs = batch_of(model, *several())
    expected = gradients(model, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, mesh = model_of(**fields), init_device_mesh("cpu", (1,))
        for module in reversed(list(model.modules())):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = {name: gradient.full_tensor() for name, gradient in gradients(model, inputs).items()}
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


# --- half precision --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_decides_as_float32_does():
    full = model_of(ladder=[1, 2, 4])
    half = copy.deepcopy(full).to(torch.bfloat16)
    inputs = batch_of(full, *several())
    for one, other in zip(reports(full, inputs)[:3], reports(half, inputs)[:3], strict=True):
        assert other.relevance_map.dtype == other.shares.dtype == torch.float32
        assert len(other.boxes) == BUDGET
        assert (one.relevance_map - other.relevance_map).abs().max() < 0.15
        assert len({*map(tuple, one.boxes.tolist())} & {*map(tuple, other.boxes.tolist())}) >= BUDGET - 2


def test_relevance_is_in_float32_under_autocast():
    model = model_of()
    inputs = batch_of(model, *several())
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        expected = model(**text, mm_encoder_outputs={"image": features}).fusion_outputs.images
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(**text, mm_encoder_outputs={"image": features}).fusion_outputs.images
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, inputs)
    assert all(gradient.isfinite().all() for gradient in found.values())


# --- trainers --------------------------------------------------------------------------------------------------------


def picture(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (48, 80, 3), dtype=np.uint8))


def training_rows(images=1):
    made = []
    for seed in range(4):
        question = {"role": "user", "content": f"What is number {seed}?"}
        answer = {"role": "assistant", "content": "A cat." if seed % 2 else "Two dogs."}
        made.append({"images": [picture(10 * seed + n) for n in range(images)], "messages": [question, answer]})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model whose tensions are far from neutral, and its processor."""
    path = tmp_path_factory.mktemp("arr_coc")
    model = tiny_model("arr_coc", gate="none", tension_coefficient=0.0)
    nn.init.constant_(model.model.fusion.balancer.tensions.bias, 1.0)
    model.save_pretrained(path)
    tiny_processor("arr_coc", model.config).save_pretrained(path)
    return path


@pytest.mark.parametrize("coefficient", [0.0, 50.0])
def test_auxiliary_losses_reach_trls_trainer(coefficient, folder, tmp_path):
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=1e9, per_device_train_batch_size=2, assistant_only_loss=True, max_length=None,
        **QUIET,
    )  # fmt: skip
    model = ZooArrCocForConditionalGeneration.from_pretrained(folder)
    model.config.tension_coefficient = coefficient
    processor = tiny_processor("arr_coc", model.config)
    rows = Dataset.from_list(training_rows())
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=processor)
    trainer.train()
    share = 1 / (1 + math.exp(-1))
    # Two images, three tensions: the mean of their squared distances
    slope = coefficient * 2 * (share - 0.5) * share * (1 - share) / 3
    expected = torch.full((3,), 1.0 - 0.1 * slope)
    torch.testing.assert_close(model.model.fusion.balancer.tensions.bias.detach(), expected, atol=1e-4, rtol=0)
    assert model.model.fusion.forwards == 1


def test_group_relative_training_takes_several_images_a_prompt(folder, tmp_path):
    settings = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=4,
        max_completion_length=4, learning_rate=1e-2, beta=0.1, **QUIET,
    )  # fmt: skip
    rows = training_rows(images=2)
    rows[1]["images"] = rows[1]["images"][:1]
    prompts = [{"images": each["images"], "prompt": each["messages"][:1]} for each in rows]
    trainer = GRPOTrainer(
        model=str(folder), args=settings, train_dataset=Dataset.from_list(prompts),
        reward_funcs=lambda completions, **kwargs: [float(index % 2) for index in range(len(completions))],
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = trainer.model.named_parameters()
    moved = {trainer.model.part_of(name) for name, parameter in after if not torch.equal(before[name], parameter)}
    assert moved >= {"vision", "connector", "language"}


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_budget": 0}, "token_budget is 0, expected a whole number of tokens or a share up to 1.0"),
        ({"token_budget": -0.5}, "token_budget is -0.5"),
        ({"token_budget": 1.5}, "token_budget is 1.5, expected a whole number of tokens or a share"),
        ({"token_budget": True}, "token_budget"),
        ({"ladder": [5]}, r"ladder is \[5\], expected at least two ascending sides"),
        ({"ladder": []}, r"ladder is \[\]"),
        ({"ladder": [3, 2]}, r"ladder is \[3, 2\]"),
        ({"ladder": [2, 2, 5]}, r"ladder is \[2, 2, 5\]"),
        ({"ladder": [-1, 2]}, r"ladder is \[-1, 2\]"),
        ({"coarse_share": 0.0}, "coarse_share is 0.0, expected more than 0 and at most 1"),
        ({"coarse_share": 1.1}, "coarse_share is 1.1"),
        ({"scorers": []}, r"scorers is \[\], expected some of propositional, perspectival, participatory"),
        ({"scorers": ["salience"]}, r"scorers is \['salience'\]"),
        ({"scorers": ["perspectival", "perspectival"]}, "scorers is"),
        ({"fixed_tensions": [0.5, 0.5]}, "fixed_tensions is .* expected 3 numbers from 0 to 1: .*compress"),
        ({"fixed_tensions": [0.5, 0.5, 1.5]}, "fixed_tensions is"),
        ({"gate_temperature": 0}, "gate_temperature is 0, expected more than 0"),
        ({"exploration_steps": 0}, "exploration_steps is 0, expected more than 0"),
        ({"relevance_heads": 0}, "relevance_heads is 0"),
        ({"relevance_head_dim": -1}, "relevance_head_dim is -1"),
        ({"exploration": -1.0}, "exploration is -1.0, expected 0 or more"),
        ({"tension_coefficient": -1}, "tension_coefficient is -1, expected 0 or more"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient is -0.1"),
        ({"gate": "other"}, "'gate' expected one of"),
        ({"allocation": "other"}, "'allocation' expected one of"),
        ({"token_order": "other"}, "'token_order' expected one of"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ZooArrCocConfig(vision_config=TINY_NATIVE_VISION["qwen3_vl"], text_config=TINY_TEXT["llama"], **fields)


def test_numbers_can_be_written_without_a_point():
    fields = {"coarse_share": 1, "exploration": 0, "tension_coefficient": 0, "fixed_tensions": [1, 0, 1]}
    config = ZooArrCocConfig(**fields, image_mean=[0, 0, 0])
    assert all(getattr(config, name) == value for name, value in fields.items())
    assert config.ladder == [2, 3, 5] and config.scorers == list(SCORERS)


@pytest.mark.parametrize("budget", [24, 0.5, 1.0])
def test_a_budget_is_saved_as_the_kind_of_number_it_is(budget, tmp_path):
    config = tiny_config("arr_coc", token_budget=budget)
    config.save_pretrained(tmp_path)
    tiny_processor("arr_coc", config).save_pretrained(tmp_path)
    processor = type(tiny_processor("arr_coc", config)).from_pretrained(tmp_path)
    for found in (ZooArrCocConfig.from_pretrained(tmp_path).token_budget, processor.token_budget):
        assert found == budget and type(found) is type(budget)


def test_a_folder_opens_with_another_budget(folder):
    model = ZooArrCocForConditionalGeneration.from_pretrained(folder, token_budget=4)
    processor = AutoProcessor.from_pretrained(folder, token_budget=4)
    batch = processor(text=["<image> what is it?"], images=[[picture(0)]], return_tensors="pt")
    assert [len(report.boxes) for report in reports(model, batch)] == [4]
