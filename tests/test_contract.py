"""The contract over the whole registry."""

import pytest

from vlm_zoo import ZOO
from vlm_zoo.testing import check_vlm, tiny_model, tiny_processor
from vlm_zoo.testing.contract import PROMISES
from vlm_zoo.testing.promises import Subject


@pytest.fixture(scope="module")
def subjects() -> dict:
    models = {model_type: tiny_model(model_type) for model_type in ZOO}
    return {name: (model, tiny_processor(name, model.config)) for name, model in models.items()}


@pytest.mark.parametrize("text", PROMISES)
@pytest.mark.parametrize("model_type", ZOO)
def test_architecture_keeps_the_promise(model_type, text, subjects):
    check_vlm(*subjects[model_type], only=text).raise_if_failed()


# Architectures whose towers and positions can be quite different from those of the tiny default.
VARIANTS = {
    "mrope-deepstack": ("zoo_mrope", {"vision": "qwen3_vl", "text": "qwen3", "deepstack_layers": [1]}),
    "mrope-windows": ("zoo_mrope", {"vision": "qwen2_5_vl", "text": "gemma3", "mrope_layout": "chunked"}),
    "arr_coc-deepstack": (
        "zoo_arr_coc",
        {"vision": "qwen3_vl", "text": "qwen3", "deepstack_layers": [1], "token_budget": 5, "gate": "attn_bias"},
    ),
    "arr_coc-drops": ("zoo_arr_coc", {"vision": "qwen2_5_vl", "ladder": [0, 1], "token_order": "relevance"}),
    "arr_coc-no-axes": ("zoo_arr_coc", {"text": "opt", "mrope_layout": "none", "token_budget": 0.5}),
    "vet-native": ("zoo_vet", {"vision": "qwen3_vl", "hidden_stride": 2, "num_visual_indicators": 4}),
}


@pytest.fixture(scope="module")
def variants() -> dict:
    models = {name: tiny_model(model_type, **fields) for name, (model_type, fields) in VARIANTS.items()}
    return {name: (model, tiny_processor(VARIANTS[name][0], model.config)) for name, model in models.items()}


@pytest.mark.parametrize("text", [text for text in PROMISES if "door" not in text])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_keeps_the_promise(name, text, variants):
    check_vlm(*variants[name], only=text).raise_if_failed()


@pytest.mark.parametrize("name", ["zoo_arr_coc", *(name for name in VARIANTS if name.startswith("arr_coc"))])
def test_the_contracts_images_exceed_the_budget(name, subjects, variants):
    subject = Subject(*{**subjects, **variants}[name], tolerance=1e-4)
    batch = subject.batch(subject.ragged)
    cells = batch["image_grid_thw"].prod(dim=1).sum() // 4
    assert (batch["input_ids"] == subject.image_token_id).sum() < cells


@pytest.mark.parametrize("model_type", ZOO)
def test_tiny_models_are_tiny(model_type, subjects):
    model, processor = subjects[model_type]
    text = model.config.text_config
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert text.num_hidden_layers <= 2 and model.config.vision_config.num_hidden_layers <= 2
    assert text.vocab_size >= len(processor.tokenizer)
    assert None not in (text.pad_token_id, text.bos_token_id, text.eos_token_id)
    assert text.max_position_embeddings >= 512
    assert 20 < model.config.image_token_id < text.vocab_size - 15


def test_a_broken_model_is_reported_not_hidden(subjects):
    model, processor = subjects["zoo_llava"]

    class Deaf(type(model)):
        def get_image_features(self, *args, **kwargs):
            features = super().get_image_features(*args, **kwargs)
            features.pooler_output = [feature[:-1] for feature in features.pooler_output]
            return features

    deaf = Deaf(model.config).eval()
    report = check_vlm(deaf, processor, only="one count")
    assert report.broken and "placeholders" in report.broken[0].detail
    assert "broken" in str(report)


def test_the_contract_runs_on_a_model_of_transformers():
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from vlm_zoo.testing import tiny_config

    config = tiny_config("zoo_llava")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            vision_feature_layer=-1,
        )
    ).eval()
    ours = tiny_processor("zoo_llava", config)
    processor = LlavaProcessor(
        ours.image_processor,
        ours.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=ours.chat_template,
    )
    report = check_vlm(model, processor)
    outcomes = {check.promise: check.outcome for check in report.checks}
    assert outcomes["logits depend on the image"] == "kept"
    assert outcomes["checkpoints carry their code through every door"] == "skipped"
    assert outcomes["placeholders cannot be sampled"] == "broken"


def test_rows_of_every_kind_are_in_the_batch(subjects):
    subject = Subject(*subjects["zoo_llava"], tolerance=1e-4)
    assert [len(row["images"]) for row in subject.ragged] == [1, 2, 0]
