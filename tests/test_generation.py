"""Decoding beyond the contract: assistants, lookup, chunks, embeddings, compiled steps."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache

from vlm_zoo import ZOO
from vlm_zoo.testing import tiny_model, tiny_processor
from vlm_zoo.testing.promises import Subject


@pytest.fixture(scope="module", params=[None, [[32, 64], [64, 64]]], ids=["fixed", "anyres"])
def subject(request) -> Subject:
    torch.manual_seed(0)
    model = tiny_model("zoo_llava", image_grid_pinpoints=request.param)
    return Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-4)


def test_an_assistant_that_sees_the_image_changes_nothing(subject):
    batch = subject.batch(subject.ragged[:1])
    assistant = tiny_model("zoo_llava", image_grid_pinpoints=subject.model.config.image_grid_pinpoints)
    assert torch.equal(subject.generate(batch, assistant_model=assistant), subject.generate(batch))


def test_a_text_only_assistant_changes_nothing(subject):
    batch = subject.batch(subject.ragged[:1])
    assistant = AutoModelForCausalLM.from_config(subject.model.config.text_config).eval()
    assert torch.equal(subject.generate(batch, assistant_model=assistant), subject.generate(batch))


def test_prompt_lookup_changes_nothing_though_the_prompt_is_full_of_placeholders(subject):
    batch = subject.batch(subject.ragged[:1])
    assert torch.equal(subject.generate(batch, prompt_lookup_num_tokens=3), subject.generate(batch))


def test_prefill_in_chunks_changes_nothing(subject):
    batch = subject.batch(subject.ragged)
    assert torch.equal(subject.generate(batch, prefill_chunk_size=7), subject.generate(batch))


def test_generation_from_embeddings_equals_that_from_ids(subject):
    batch = subject.batch(subject.ragged)
    expected = subject.generate(batch)
    ids = batch.pop("input_ids")
    embeds = subject.model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(subject.model.generate(inputs_embeds=embeds, **batch, **options), expected)


def test_a_conversation_goes_on_from_its_cache(subject):
    row = subject.ragged[0]
    first = subject.batch([row])
    cache = DynamicCache(config=subject.model.config.get_text_config())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answered = subject.model.generate(**first, past_key_values=cache, **options)
    more = subject.processor.tokenizer(" and now?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    longer = torch.cat([answered, more], dim=1)
    mask = torch.ones_like(longer)
    from_cache = subject.model.generate(input_ids=longer, attention_mask=mask, past_key_values=cache, **options)
    vision = {name: value for name, value in first.items() if name not in ("input_ids", "attention_mask")}
    whole = subject.model.generate(input_ids=longer, attention_mask=mask, **vision, **options)
    assert torch.equal(from_cache, whole)


@pytest.mark.parametrize("model_type", ZOO)
def test_a_conversation_with_a_new_image_goes_on_from_its_cache_given_all_images(model_type):
    torch.manual_seed(0)
    model = tiny_model(model_type)
    subject = Subject(model, tiny_processor(model_type, model.config), tolerance=1e-4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    first, second = subject.image(1), subject.image(2, 64, 48)
    cache = DynamicCache(config=model.config.get_text_config())
    batch = subject.batch([{"text": subject.asked("what?"), "images": [first]}])
    answered = model.generate(**batch, past_key_values=cache, **options)
    again = subject.batch([{"text": f"and {subject.image_token} this?", "images": [second]}])
    both = subject.batch([{"text": subject.image_token * 2, "images": [first, second]}])
    ids = torch.cat([answered, again["input_ids"]], dim=1)
    rest = {name: value for name, value in both.items() if name not in ("input_ids", "attention_mask")}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}
    from_cache = model.generate(**whole, past_key_values=cache, **options)
    assert torch.equal(from_cache, model.generate(**whole, **options))


def test_places_behind_images_in_a_cache_need_those_images():
    model = tiny_model("zoo_mrope")
    subject = Subject(model, tiny_processor("zoo_mrope", model.config), tolerance=1e-4)
    batch = subject.batch(subject.ragged[:1])
    cache = DynamicCache(config=model.config.get_text_config())
    ids = model.generate(**batch, past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="give all images of the prompt again"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)


def test_a_direct_step_with_a_cache_equals_one_pass(subject):
    batch = subject.batch(subject.ragged[:1])
    logits = subject.logits(batch)
    head = {**batch, "input_ids": batch["input_ids"][:, :-2], "attention_mask": batch["attention_mask"][:, :-2]}
    with torch.no_grad():
        prefill = subject.model(**head, use_cache=True)
        step = subject.model(
            input_ids=batch["input_ids"][:, -2:],
            attention_mask=batch["attention_mask"],
            past_key_values=prefill.past_key_values,
        )
    subject.close(step.logits, logits[:, -2:], "two tokens after the cache")


def test_images_are_encoded_once_for_many_samples(subject, monkeypatch):
    calls = []
    see = subject.model.model.see
    monkeypatch.setattr(subject.model.model, "see", lambda *a, **k: calls.append(1) or see(*a, **k))
    subject.generate(subject.batch(subject.ragged), num_beams=2, num_return_sequences=2)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("zoo_llava", {}), ("zoo_llava", {"image_grid_pinpoints": [[32, 64], [64, 64]]}), ("zoo_mrope", {})],
)
def test_the_decode_step_compiles_whole_and_once(model_type, fields):
    torch.manual_seed(0)
    model = tiny_model(model_type, **fields)
    subject = Subject(model, tiny_processor(model_type, model.config), tolerance=1e-4)
    batch = subject.batch(subject.ragged)
    expected = subject.generate(batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_config = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compile_config}
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(subject.generate(batch, **options), expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        subject.generate(batch, **options)
    assert graphs >= 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_decode_step_gives_the_same_answer():
    torch.manual_seed(0)
    model = tiny_model("zoo_llava")
    subject = Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-4)
    batch = subject.batch(subject.ragged)
    compile_config = CompileConfig(fullgraph=True, dynamic=False)
    compile_config._compile_all_devices = True
    found = subject.generate(batch, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, subject.generate(batch))
