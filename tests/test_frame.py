"""The frame: loss and logits, parts, carry, sharding, doors, and errors."""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    pipeline,
)

from vlm_zoo import ZOO, AutoModelForVision2Seq
from vlm_zoo.models import modeling_vlm
from vlm_zoo.models.parts_vlm import build_head, build_part, find_layers, logit_transform, measure_tower
from vlm_zoo.testing import TINY_TEXT, TINY_VISION, tiny_config, tiny_model, tiny_processor
from vlm_zoo.testing.promises import Subject


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    model = tiny_model("zoo_llava")
    return Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-5)


@pytest.fixture
def labelled(subject):
    batch = subject.batch(subject.ragged, side="right")
    labels = batch["input_ids"].clone()
    labels[(batch["attention_mask"] == 0) | (labels == subject.image_token_id)] = -100
    labels[:, :20] = -100
    return batch, labels


# --- loss and logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", [None, torch.tensor(7)])
def test_the_loss_of_supervised_positions_equals_the_full_loss(subject, labelled, normaliser):
    batch, labels = labelled
    model = copy.deepcopy(subject.model).train()
    lean = model(**batch, labels=labels, num_items_in_batch=normaliser)
    model.config.supervised_logits_only = False
    full = model(**batch, labels=labels, num_items_in_batch=normaliser)
    assert lean.logits is None and full.logits.shape == (*labels.shape, model.config.text_config.vocab_size)
    assert abs(lean.loss.item() - full.loss.item()) <= 1e-6 * max(1.0, full.loss.item())


def test_gradients_of_the_supervised_loss_equal_those_of_the_full_loss(subject, labelled):
    batch, labels = labelled
    gradients = []
    for lean in (True, False):
        model = copy.deepcopy(subject.model).train()
        model.config.supervised_logits_only = lean
        model(**batch, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


def test_shift_labels_win_over_labels(subject, labelled):
    batch, labels = labelled
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    for model in (copy.deepcopy(subject.model).train(), subject.model):
        expected = model(**batch, labels=labels).loss
        found = model(**batch, labels=torch.full_like(labels, 5), shift_labels=shifted).loss
        torch.testing.assert_close(found, expected)


def test_a_batch_without_supervised_positions_gives_a_zero_with_a_graph(subject, labelled):
    batch, labels = labelled
    model = copy.deepcopy(subject.model).train()
    loss = model(**batch, labels=torch.full_like(labels, -100)).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_eval_mode_keeps_all_logits(subject, labelled):
    batch, labels = labelled
    outputs = subject.model(**batch, labels=labels)
    assert outputs.logits.shape[:2] == labels.shape and outputs.loss is not None


def test_logits_to_keep_turns_the_lean_loss_off(subject, labelled):
    batch, labels = labelled
    model = copy.deepcopy(subject.model).train()
    assert model(**batch, logits_to_keep=3).logits.shape[1] == 3
    assert model(**batch).logits.shape[1] == labels.shape[1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "granite", "logits_scaling": 4.0}, (0.25, None)),
        ({"model_type": "cohere", "logit_scale": 0.5}, (0.5, None)),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ({"model_type": "llama"}, (1.0, None)),
    ],
)
def test_logits_are_scaled_as_the_language_model_scales_them(fields, expected):
    assert logit_transform(AutoConfig.for_model(**fields)) == expected


@pytest.mark.parametrize("text", [*TINY_TEXT, "granite", "phi", "cohere"])
def test_text_only_equals_the_language_model_of_every_family(text):
    shapes = {name: value for name, value in TINY_TEXT["llama"].items() if name != "model_type"}
    more = {
        "granite": {"model_type": "granite", "logits_scaling": 8.0, **shapes},
        "phi": {"model_type": "phi", **shapes, "num_key_value_heads": 4},
        "cohere": {"model_type": "cohere", "logit_scale": 0.3, **shapes},
    }
    model = tiny_model("zoo_llava", text_config=more.get(text, TINY_TEXT.get(text)))
    if model.lm_head.bias is not None:
        nn.init.normal_(model.lm_head.bias)
    from vlm_zoo.testing.promises import text_only_is_the_language_model

    text_only_is_the_language_model(Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-6))


def test_the_head_has_the_bias_of_its_language_model():
    assert build_head(AutoConfig.for_model("phi", hidden_size=32, vocab_size=40)).bias is not None
    assert build_head(AutoConfig.for_model(**TINY_TEXT["llama"])).bias is None


@pytest.mark.parametrize("text", TINY_TEXT)
def test_tied_embeddings_stay_tied_after_loading(text, tmp_path):
    model = tiny_model("zoo_llava", text_config={**TINY_TEXT[text], "tie_word_embeddings": True})
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForVision2Seq.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


# --- tower -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", TINY_VISION)
@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2, [0, 2], [-2, 1]])
def test_a_cut_tower_gives_the_features_of_the_whole(vision, layer, subject):
    model = tiny_model("zoo_llava", vision=vision, vision_feature_layer=layer)
    whole = AutoModel.from_config(model.config.vision_config).eval()
    whole.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 32, 32)
    states = whole(pixels, output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    expected = torch.cat([states[index] for index in layers], dim=-1)[:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(model.model.see(pixels)[1], expected)


@pytest.mark.parametrize("vision", TINY_VISION)
@pytest.mark.parametrize("layer", [-1, -2, [1, -1]])
def test_every_parameter_gets_a_gradient(vision, layer):
    model = tiny_model("zoo_llava", vision=vision, vision_feature_layer=layer).train()
    subject = Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-5)
    batch = subject.batch(subject.ragged, side="right")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_layers_after_the_last_used_one_are_not_built():
    model = tiny_model("zoo_llava", vision_feature_layer=1)
    holder, name = model.model.vision_tower.encoder, "layers"
    assert len(getattr(holder, name)) == 1
    assert not any("post_layernorm" in name for name, _ in model.named_parameters())


def test_a_frozen_tower_runs_without_a_graph(subject):
    model = copy.deepcopy(subject.model).train()
    model.set_trainable_parts(["connector", "language"])
    model.gradient_checkpointing_enable()
    pixels = subject.batch(subject.ragged)["pixel_values"]
    assert not model.model.see(pixels)[1].requires_grad
    assert model.get_image_features(pixels).pooler_output[0].requires_grad


def test_pixels_that_want_a_gradient_get_one_from_a_frozen_tower(subject):
    model = copy.deepcopy(subject.model)
    model.set_trainable_parts(["connector"])
    pixels = subject.batch(subject.ragged)["pixel_values"].requires_grad_()
    model.model.see(pixels)[1].sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(("vision", "prefix"), [("clip", 1), ("siglip", 0), ("dinov2", 1)])
def test_prefix_tokens_are_measured(vision, prefix):
    assert measure_tower(AutoConfig.for_model(**TINY_VISION[vision])) == (16, prefix)


def test_a_feature_layer_that_does_not_exist_is_an_error():
    with pytest.raises(StrictDataclassClassValidationError, match="numbered 0 to 2"):
        tiny_config("zoo_llava", vision_feature_layer=3)
    with pytest.raises(StrictDataclassClassValidationError, match="empty list"):
        tiny_config("zoo_llava", vision_feature_layer=[])


def test_parts_that_automodel_cannot_build_are_named():
    class UnknownConfig(type(AutoConfig.for_model("llama"))):
        model_type = "no_such_model"

    with pytest.raises(ValueError, match=r"vision tower of model type 'no_such_model'.*cannot be built"):
        build_part(UnknownConfig(), "vision tower")


@pytest.mark.parametrize("text", TINY_TEXT)
def test_layers_of_every_decoder_are_found(text):
    decoder = tiny_model("zoo_llava", text=text).get_decoder()
    holder, name = find_layers(decoder)
    assert len(getattr(holder, name)) == 2


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TINY_TEXT)
def test_every_parameter_belongs_to_a_part(text):
    model = tiny_model("zoo_llava", text=text)
    parts = {model.part_of(name) for name, _ in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    assert parts == {"vision", "connector", "language", "embeddings"} | (set() if tied else {"head"})


def test_from_pretrained_freezes_all_but_the_named_parts(subject, tmp_path):
    subject.model.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trainable_parts=["connector", "head"])
    trained = {model.part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"connector", "head"}
    assert "trainable_parts" not in json.loads((tmp_path / "config.json").read_text())
    assert all(p.requires_grad for p in AutoModelForImageTextToText.from_pretrained(tmp_path).parameters())


def test_an_unknown_part_is_an_error_that_lists_the_parts(subject):
    with pytest.raises(ValueError, match=r"Unknown part\(s\) \['projector'\].*vision, connector"):
        subject.model.set_trainable_parts(["projector"])


# --- sharding --------------------------------------------------------------------------------------------------------


def test_a_text_only_batch_touches_every_vision_parameter_when_ranks_train_together(subject, monkeypatch):
    model = copy.deepcopy(subject.model).train()
    batch = subject.batch([{"text": "no image", "images": []}])
    plain = model(**batch).logits
    monkeypatch.setattr(modeling_vlm, "is_sharded", lambda: True)
    logits = model(**batch).logits
    torch.testing.assert_close(logits, plain)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all((p.grad == 0).all() for p in model.model.vision_tower.parameters())


# --- doors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ZOO)
def test_every_door_opens_the_same_model(model_type, tmp_path):
    entry = ZOO[model_type]
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    tiny_processor(model_type, model.config).save_pretrained(tmp_path)
    for door in (AutoModelForVision2Seq, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(door.from_pretrained(tmp_path)) is entry.head
    assert type(AutoModel.from_pretrained(tmp_path)) is entry.model
    assert type(AutoConfig.from_pretrained(tmp_path)) is entry.config
    assert type(AutoProcessor.from_pretrained(tmp_path)) is entry.processor
    for backend in (None, "pil", "torchvision"):
        options = {} if backend is None else {"backend": backend}
        assert type(AutoImageProcessor.from_pretrained(tmp_path, **options)) is entry.image_processor


def test_vision2seq_opens_models_of_transformers(tmp_path):
    config = tiny_config("zoo_llava")
    from transformers import LlavaConfig

    fields = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    LlavaForConditionalGeneration(LlavaConfig(**fields, image_token_index=259)).save_pretrained(tmp_path)
    assert type(AutoModelForVision2Seq.from_pretrained(tmp_path)) is LlavaForConditionalGeneration
    assert type(AutoModelForVision2Seq.from_config(config)) is ZOO["zoo_llava"].head


def test_the_name_tables_know_the_zoo():
    from transformers.models.auto import modeling_auto

    for table in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        assert {model_type: entry.head.__name__ for model_type, entry in ZOO.items()}.items() <= table.items()


def test_the_pipeline_answers(subject, tmp_path):
    answerer = pipeline("image-text-to-text", model=subject.model, processor=subject.processor)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": subject.image()}, {"type": "text", "text": "What?"}]}
    ]
    outputs = answerer(text=messages, max_new_tokens=3)
    assert outputs[0]["generated_text"][-1]["role"] == "assistant"


def test_files_that_travel_with_a_checkpoint_import_siblings_only():
    for source in Path(modeling_vlm.__file__).parent.glob("*.py"):
        for line in source.read_text(encoding="utf-8").splitlines():
            assert not line.strip().startswith(("from ..", "from . import", "from vlm_zoo", "import vlm_zoo")), source


# --- bad input -------------------------------------------------------------------------------------------------------


def test_inputs_that_exclude_each_other_are_refused(subject):
    batch = subject.batch(subject.ragged)
    embeds = subject.model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        subject.model(**batch, inputs_embeds=embeds)
    encoded = {"image": subject.model.get_image_features(batch["pixel_values"])}
    with pytest.raises(ValueError, match="not both"):
        subject.model(**batch, mm_encoder_outputs=encoded)


def test_a_batch_of_another_models_processor_is_named(subject):
    batch = subject.batch(subject.ragged)
    with pytest.raises(ValueError, match=r"image_grid_thw.*processor of another model"):
        subject.model(**batch, image_grid_thw=torch.ones(3, 3, dtype=torch.long))
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="image_sizes without pixel_values"):
        subject.model(**batch, image_sizes=torch.ones(3, 2))


def test_the_mismatch_error_names_rows_and_images():
    message = modeling_vlm.mismatch_message([16, 31, 0], [16, 16, 16])
    assert "row 1 holds 31 image tokens, images 1 to 2 of the batch would fill 32" in message
    assert "truncated" in message


def test_images_without_placeholders_are_found_from_embeddings_alone(subject):
    batch = subject.batch(subject.ragged)
    embeds = subject.model.get_input_embeddings()(batch.pop("input_ids"))
    with torch.no_grad():
        logits = subject.model(inputs_embeds=embeds, **batch).logits
    torch.testing.assert_close(logits, subject.logits(subject.batch(subject.ragged)))


def test_placeholders_that_straddle_rows_are_refused(subject):
    batch = subject.batch(subject.ragged[:1] * 2)
    ids = batch["input_ids"]
    place = (ids[0] == subject.image_token_id).nonzero()[0]
    ids[0, place], ids[1, -1] = 70, subject.image_token_id
    with pytest.raises(ValueError, match="row 0 holds 15 image tokens"):
        subject.model(**batch)


def test_images_given_to_the_wrong_row_are_refused(subject):
    image = subject.image()
    with pytest.raises(ValueError, match=r"in row 0 .* Found 1 <image> tokens and 2 images"):
        subject.processor(text=["a <image> b", "<image> <image>"], images=[[image, image], [image]])


def test_placeholders_stay_suppressed_when_the_caller_suppresses_something_else(subject):
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(torch.zeros(len(model.lm_head.weight)))
        model.lm_head.bias[subject.image_token_id] = 100.0
    answer = Subject(model, subject.processor, 0).generate(subject.batch(subject.ragged), suppress_tokens=[5])
    assert not (answer == subject.image_token_id).any()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_model_builds_with_every_attention(attention, tiny_folder):
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, attn_implementation=attention)
    assert model.config.text_config._attn_implementation == attention


def test_a_model_builds_in_inference_mode():
    with torch.inference_mode():
        tiny_model("zoo_llava")


def test_parts_of_a_quantised_model_are_left_as_they_are():
    model = tiny_model("zoo_llava")
    layer = model.model.language_model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    model.set_trainable_parts(["connector", "language"])
    assert not layer.weight.requires_grad and model.model.connector.layers[0].weight.requires_grad


def test_a_tower_of_another_precision_fits():
    model = tiny_model("zoo_llava").to(torch.bfloat16)
    model.model.vision_tower.float()
    assert model.get_image_features(torch.rand(1, 3, 32, 32)).pooler_output[0].dtype == torch.bfloat16


def test_text_that_is_expanded_first_and_text_that_is_expanded_last_give_the_same_ids(subject):
    rows = subject.ragged * 2
    texts, images = [row["text"] for row in rows], [row["images"] for row in rows]
    for options in ({}, {"padding": True}, {"padding": "max_length", "max_length": 120}, {"padding_side": "left"}):
        options = {**options, "return_mm_token_type_ids": True}
        fast = subject.processor(text=list(texts), images=images, **options)
        slow = subject.processor(text=list(texts), images=images, return_text_replacement_offsets=True, **options)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert [list(row) for row in fast[name]] == [list(row) for row in slow[name]], (name, options)
