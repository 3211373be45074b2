"""What the LLaVA papers say: the projector, the feature layers, and AnyRes."""

import random

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from vlm_zoo.models.llava import ZooLlavaConfig
from vlm_zoo.testing import check_vlm, tiny_config, tiny_model, tiny_processor
from vlm_zoo.testing.promises import Subject


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def anyres(**fields) -> Subject:
    torch.manual_seed(0)
    model = tiny_model("zoo_llava", image_grid_pinpoints=PINPOINTS, **fields)
    return Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-5)


@pytest.fixture(scope="module")
def next_model() -> LlavaNextForConditionalGeneration:
    config = tiny_config("zoo_llava")
    fields = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            **fields,
            image_token_index=config.image_token_id,
            vision_feature_layer=-1,
            image_grid_pinpoints=PINPOINTS,
        )
    ).eval()


@pytest.fixture(scope="module")
def next_processor() -> LlavaNextProcessor:
    ours = tiny_processor("zoo_llava")
    size = {"shortest_edge": 32}
    images = LlavaNextImageProcessorPil(
        size=size, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images,
        ours.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


# --- projector -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "biases"), [(1, True), (1, False), (2, True), (3, True)])
def test_the_projector_has_as_many_linear_layers_as_asked(layers, biases):
    model = tiny_model("zoo_llava", projector_num_layers=layers, multimodal_projector_bias=biases)
    linears = list(model.model.connector.layers)
    assert len(linears) == layers
    assert all((linear.bias is not None) == biases for linear in linears)
    assert (linears[0].in_features, linears[-1].out_features) == (32, 48)


def test_one_linear_layer_is_a_matrix_product():
    connector = tiny_model("zoo_llava", projector_num_layers=1, multimodal_projector_bias=False).model.connector
    patches = torch.randn(2, 5, 32)
    torch.testing.assert_close(connector(patches), patches @ connector.layers[0].weight.T)


def test_several_feature_layers_widen_the_projector():
    model = tiny_model("zoo_llava", vision_feature_layer=[-2, -1])
    assert model.model.connector.layers[0].in_features == 64


def test_full_selection_keeps_the_prefix_token():
    model = tiny_model("zoo_llava", vision_feature_select_strategy="full")
    subject = Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-5)
    assert len(subject.model.get_image_features(torch.zeros(1, 3, 32, 32)).pooler_output[0]) == 17
    check_vlm(subject.model, subject.processor, only="one count").raise_if_failed()


def test_a_projector_without_layers_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="at least 1, got 0"):
        tiny_config("zoo_llava", projector_num_layers=0)


# --- AnyRes ----------------------------------------------------------------------------------------------------------


def test_token_counts_equal_those_of_transformers(next_processor):
    randomness = random.Random(0)
    sizes = [(randomness.randint(1, 400), randomness.randint(1, 400)) for _ in range(300)]
    expected = next_processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    found = anyres().processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    assert found == expected


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (64, 64), (33, 200), (200, 33), (5, 7), (64, 32)])
def test_features_of_a_tiled_image_equal_those_of_transformers(size, next_model):
    subject = anyres()
    batch = subject.batch([{"text": "<image>", "images": [subject.image(0, *size)]}])
    state = subject.model.state_dict()
    renamed = {
        name.replace("connector.layers.0.", "multi_modal_projector.linear_1.")
        .replace("connector.layers.1.", "multi_modal_projector.linear_2.")
        .replace("connector.image_newline", "image_newline"): value
        for name, value in state.items()
    }
    next_model.load_state_dict(renamed, strict=False)
    with torch.no_grad():
        pixels = {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}
        ours = subject.model.get_image_features(**pixels).pooler_output[0]
        theirs = next_model.get_image_features(**pixels).pooler_output[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("merge_type", ["spatial_unpad", "spatial", "flat"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_counts_and_features_agree_for_every_way_to_join_tiles(merge_type, strategy):
    subject = anyres(merge_type=merge_type, vision_feature_select_strategy=strategy)
    check_vlm(subject.model, subject.processor, only="one count").raise_if_failed()


def test_the_contract_holds_with_tiles():
    subject = anyres()
    report = check_vlm(subject.model, subject.processor, only="ragged batch")
    report.raise_if_failed()
    for only in ("beams", "interleaved", "encoded images", "wrong counts", "max_length"):
        check_vlm(subject.model, subject.processor, only=only).raise_if_failed()


def test_an_image_does_not_depend_on_the_tiles_of_its_neighbours():
    subject = anyres()
    small = {"text": "a <image> b", "images": [subject.image(0, 30, 30)]}
    large = {"text": "<image>", "images": [subject.image(1, 30, 200)]}
    together = subject.batch([small, large], side="right")
    alone = subject.batch([small])
    length = alone["input_ids"].shape[1]
    subject.close(subject.logits(together)[0, :length], subject.logits(alone)[0], "the small image")


def test_the_newline_vector_reaches_the_logits():
    subject = anyres()
    batch = subject.batch(subject.ragged[:1])
    before = subject.logits(batch)
    with torch.no_grad():
        subject.model.model.connector.image_newline.add_(1.0)
    assert (subject.logits(batch) - before).abs().max() > 1e-4


def test_initialisation_covers_the_newline_vector():
    newline = anyres().model.model.connector.image_newline
    assert torch.isfinite(newline).all() and 0 < newline.abs().max() < 1


def test_tiles_without_sizes_are_refused_with_the_cause():
    subject = anyres()
    batch = subject.batch(subject.ragged[:1])
    with pytest.raises(ValueError, match=r"image_sizes \[I, 2\]; got .* and None"):
        subject.model(**{name: value for name, value in batch.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match="differ in image_grid_pinpoints"):
        subject.model(**{**batch, "pixel_values": batch["pixel_values"][:, :1]})


def test_tiles_for_a_model_without_pinpoints_are_refused():
    model = tiny_model("zoo_llava")
    with pytest.raises(ValueError, match="no image_grid_pinpoints"):
        model.get_image_features(torch.zeros(1, 3, 3, 32, 32))


def test_pinpoints_that_are_no_whole_tiles_are_refused():
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"\[40, 64\].*multiples of the tower's image size 32"
    ):
        tiny_config("zoo_llava", image_grid_pinpoints=[[40, 64]])


def test_the_config_builds_without_arguments():
    config = ZooLlavaConfig()
    assert config.vision_config.hidden_size == 1024 and config.text_config.model_type == "llama"
    assert config.image_token_id < config.text_config.vocab_size


def test_a_blank_image_stands_in_for_tiles():
    model = anyres().model
    features = model.get_image_features(**model.model.dummy_vision_inputs()).pooler_output
    assert len(features) == 1 and torch.isfinite(features[0]).all()
