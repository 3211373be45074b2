"""BLIP-2: the Q-Former beside transformers', what it may look at, its initialisation, and its processor."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from vlm_zoo import build
from vlm_zoo.building import BuildError
from vlm_zoo.models import blip2, modeling_vlm
from vlm_zoo.models.blip2 import ZooBlip2Config, ZooBlip2Model, ZooBlip2Processor
from vlm_zoo.models.layers import attend, compact
from vlm_zoo.testing import (
    TINY_TEXT,
    TINY_VISION,
    check_vlm,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from vlm_zoo.testing.contract import PROMISES
from vlm_zoo.testing.promises import Subject
from vlm_zoo.training import ZooDataCollator


IMAGE_TOKEN_ID = 300
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
MARKER = tiny_tokenizer()("ASSISTANT:", add_special_tokens=False)["input_ids"]

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 32,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 2,
}

# The names of transformers, and those of the zoo.
RENAMING = [
    (r"^vision_model\.post_layernorm\.", "model.connector.vision_norm."),
    (r"^vision_model\.", "model.vision_tower."),
    (r"^query_tokens", "model.connector.query_tokens"),
    (r"^language_projection\.", "model.connector.projection."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^qformer\.(embeddings\.)?layernorm\.", "model.connector.qformer.norm."),
    (r"^(qformer\.)?embeddings\.(word|position)_embeddings", r"model.connector.qformer.\2_embeddings"),
    (r"^qformer\.encoder\.layer\.", "model.connector.qformer.layers."),
    (r"\.attention\.attention\.", ".self_attention."),
    (r"\.crossattention\.attention\.", ".cross_attention."),
    (r"\.attention\.output\.dense\.", ".self_attention.dense."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.dense."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.norm."),
    (r"\.intermediate_query\.dense\.", ".query_feed_forward.up."),
    (r"\.output_query\.dense\.", ".query_feed_forward.down."),
    (r"\.output_query\.LayerNorm\.", ".query_feed_forward.norm."),
    (r"\.intermediate\.dense\.", ".text_feed_forward.up."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.text_feed_forward.down."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", r"\1.text_feed_forward.norm."),
]


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random, biases, norms and queries among them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + float(norm))
    return model.eval()


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of transformers under the names of the zoo."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMING:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def parity_config(vision_type: str, text: str, **overrides) -> ZooBlip2Config:
    return tiny_config(
        "blip2",
        text=text,
        vision_config={"model_type": vision_type, **VISION},
        image_token_id=IMAGE_TOKEN_ID,
        num_query_tokens=6,
        vision_layer_norm_eps=1e-6,
        **{
            f"qformer_{name}": QFORMER[name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
                "cross_attention_frequency",
            )
        },
        **overrides,
    )


def zoo_model(config: ZooBlip2Config, theirs: PreTrainedModel):
    from vlm_zoo import ZOO

    model = ZOO["zoo_blip2"].head(config).eval()
    own = model.state_dict()
    state = renamed(theirs.state_dict())
    surplus = [name for name in state if name not in own]
    last = f"layers.{QFORMER['num_hidden_layers'] - 1}.text_feed_forward"
    assert all(last in name for name in surplus), surplus  # nothing reads it
    model.load_state_dict({name: state[name] for name in own})
    return model


def prompts(lengths=(9, 5)) -> dict[str, torch.Tensor]:
    """Left-padded rows with one image each."""
    width = max(lengths) + 6
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length - 6 :] = torch.cat((torch.full((6,), IMAGE_TOKEN_ID), torch.randint(5, 250, (length,))))
        mask[row, -length - 6 :] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(len(lengths), 3, 32, 32)}


def compare(ours, theirs, batch) -> None:
    with torch.no_grad():
        own, other = ours(**batch).logits, theirs(**batch).logits
    real = batch["attention_mask"].bool()
    difference = (own - other)[real].abs().max().item()
    spread = other[real].std().item()
    print(f"{type(theirs).__name__}: logits differ by {difference:.1e} at a spread of {spread:.2f}")
    assert spread > 0.1 and difference < 5e-6
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    answers = ours.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    reference = theirs.generate(**batch, **options)[:, -8:]
    assert torch.equal(answers, reference)


# --- parity ----------------------------------------------------------------------------------------------------------


def test_logits_and_greedy_answers_equal_those_of_transformers_blip2():
    theirs = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config=TINY_TEXT["opt"],
            num_query_tokens=6,
            image_token_index=IMAGE_TOKEN_ID,
        )
    )
    ours = zoo_model(parity_config("blip_2_vision_model", "opt"), randomised(theirs))
    batch = prompts()
    compare(ours, theirs, batch)
    with torch.no_grad():
        queries = torch.stack(ours.get_image_features(batch["pixel_values"]).pooler_output)
        expected = theirs.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    if not isinstance(expected, torch.Tensor):
        expected = expected.last_hidden_state
    if expected.shape[-1] == QFORMER["hidden_size"]:
        expected = theirs.language_projection(expected)
    difference = (queries - expected).abs().max().item()
    print(f"Q-Former: image tokens differ by {difference:.1e}")
    assert difference < 5e-6


def test_logits_and_greedy_answers_equal_those_of_transformers_instructblip():
    theirs = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config=TINY_TEXT["llama"],
            num_query_tokens=6,
            image_token_index=IMAGE_TOKEN_ID,
        )
    )
    config = parity_config("instructblip_vision_model", "llama", text_conditioned=True, qformer_vocab_size=100)
    ours = zoo_model(config, randomised(theirs))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    questions = {"qformer_input_ids": torch.randint(0, 100, (2, 7)), "qformer_attention_mask": mask}
    compare(ours, theirs, {**prompts(), **questions})


# --- config ----------------------------------------------------------------------------------------------------------


def test_the_config_builds_without_arguments():
    config = ZooBlip2Config()
    assert (config.num_query_tokens, config.qformer_hidden_size, config.qformer_num_hidden_layers) == (32, 768, 12)
    assert config.vision_feature_select_strategy == "full"
    assert config.vocabulary_of_queries == config.text_config.vocab_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_query_tokens": 0}, "num_query_tokens must be at least 1, got 0"),
        ({"qformer_cross_attention_frequency": 0}, "qformer_cross_attention_frequency must be at least 1"),
        ({"qformer_num_attention_heads": 5}, "32 is no multiple of qformer_num_attention_heads 5"),
        ({"qformer_vocab_size": 0}, "qformer_vocab_size must be at least 1, or None, got 0"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config("blip2", **fields)


def test_an_encoder_decoder_is_refused_by_the_config():
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"t5.*encoder-decoder.*hidden state for every token"
    ):
        tiny_config("blip2", text_config={"model_type": "t5", "d_model": 48, "num_layers": 1, "num_heads": 4})


def test_an_encoder_decoder_is_refused_by_build(tmp_path):
    from transformers import AutoModel

    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=300, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tiny_tokenizer(image_token=None).save_pretrained(tmp_path / "t5")
    AutoModel.from_config(tiny_config("blip2").vision_config).save_pretrained(tmp_path / "clip")
    with pytest.raises(BuildError, match="encoder-decoder"):
        build("blip2", str(tmp_path / "clip"), str(tmp_path / "t5"), str(tmp_path / "out"))


# --- Q-Former --------------------------------------------------------------------------------------------------------


def test_every_second_layer_looks_at_the_image():
    qformer = tiny_model("blip2", qformer_num_hidden_layers=5).model.connector.qformer
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True, False, True]
    qformer = tiny_model("blip2", qformer_num_hidden_layers=3, qformer_cross_attention_frequency=1).model.connector
    assert all(layer.cross_attention is not None for layer in qformer.qformer.layers)


def test_a_q_former_that_reads_no_text_has_no_weights_for_it():
    names = [name for name, _ in tiny_model("blip2").named_parameters()]
    assert not any("text_feed_forward" in name or "word_embeddings" in name for name in names)


def test_image_features_may_have_any_width():
    fields = {"vision_feature_layer": [-2, -1], "qformer_hidden_size": 16, "num_query_tokens": 9}
    connector = tiny_model("blip2", **fields).model.connector
    assert connector.vision_norm.normalized_shape == (64,)
    assert connector.qformer.layers[0].cross_attention.key.in_features == 64
    assert connector(torch.randn(2, 17, 64)).shape == (2, 9, 48)


def test_the_norms_have_the_epsilons_of_the_config():
    connector = tiny_model("blip2", vision_layer_norm_eps=0.1, qformer_layer_norm_eps=0.2).model.connector
    norms = {name: module.eps for name, module in connector.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert norms.pop("vision_norm") == 0.1 and set(norms.values()) == {0.2}


def test_without_the_vision_norm_features_pass_as_they_are():
    connector = tiny_model("blip2", vision_layer_norm=False).model.connector
    patches = torch.randn(1, 17, 32)
    assert not hasattr(connector, "vision_norm") and torch.equal(connector.normalise(patches), patches)


def test_marked_tokens_are_moved_to_the_left_in_their_order():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    found, kept = compact(ids, mask)
    assert found.tolist() == [[2, 4, 0], [5, 6, 7], [0, 0, 0]]
    assert kept.tolist() == [[True, True, False], [True, True, True], [False] * 3]
    assert compact(ids, mask, limit=2)[0].tolist() == [[2, 4], [6, 7], [0, 0]]
    assert compact(ids[2:], mask[2:])[0].shape == (1, 1)


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"text_conditioned": True, "response_token_ids": MARKER}])
@pytest.mark.parametrize("vision_type", ["clip_vision_model", "blip_2_vision_model"])
def test_a_fresh_model_has_different_queries_and_sane_gradients(vision_type, fields):
    vision = {"model_type": vision_type, **VISION}
    model = tiny_model("blip2", vision_config=vision, qformer_num_hidden_layers=4, **fields)
    queries = model.model.connector.query_tokens.detach()[0]
    assert torch.cdist(queries, queries).fill_diagonal_(1.0).min() > 1e-2
    assert 0.015 < queries.std() < 0.025
    subject = Subject(model, tiny_processor("blip2", model.config), 1e-5)
    batch = subject.batch([{"text": "<image> What? ASSISTANT: a cat", "images": [subject.image()]}])
    model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == 259, -100)).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    worst = max(norms, key=norms.get)
    print(f"largest gradient norm {norms[worst]:.2f} at {worst}")
    assert norms[worst] < 1e3
    assert all(norms[name] > 1e-8 for name in norms if name.endswith(("query_tokens", "dense.weight")))
    weights = model.model.vision_tower.state_dict()
    assert max(value.std() for name, value in weights.items() if name.endswith("mlp.fc1.weight")) > 1e-3


@pytest.mark.parametrize("fields", [{}, {"text_conditioned": True, "response_token_ids": MARKER}])
def test_every_parameter_of_the_connector_receives_a_gradient(fields):
    model = tiny_model("blip2", **fields)
    subject = Subject(model, tiny_processor("blip2", model.config), 1e-5)
    model(**subject.batch(subject.ragged)).logits.sum().backward()
    assert [name for name, p in model.model.connector.named_parameters() if p.grad is None] == []


def test_weights_missing_from_a_folder_are_initialised_like_new_ones(tmp_path):
    tiny_model("blip2").save_pretrained(tmp_path)
    fields = {"text_conditioned": True}
    model, info = ZooBlip2Model.from_pretrained(tmp_path, output_loading_info=True, **fields)
    assert any("word_embeddings" in name for name in info["missing_keys"])
    qformer = model.connector.qformer
    assert torch.isfinite(qformer.word_embeddings.weight).all() and 0.01 < qformer.word_embeddings.weight.std() < 0.03
    assert torch.equal(qformer.layers[0].text_feed_forward.norm.weight, torch.ones(32))


# --- the question ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditioned() -> Subject:
    torch.manual_seed(0)
    model = tiny_model("blip2", text_conditioned=True, response_token_ids=MARKER)
    with torch.no_grad():  # large enough for a question to matter
        model.model.connector.qformer.word_embeddings.weight.normal_()
    return Subject(model, tiny_processor("blip2", model.config), tolerance=1e-4)


def image_tokens(subject: Subject, batch, **kwargs) -> torch.Tensor:
    """What the language model reads in the place of the images, `float[sum(K), Dt]`."""
    found = {}

    def keep(module, arguments, output):
        found["tokens"] = output.flatten(0, 1)

    handle = subject.model.model.connector.register_forward_hook(keep)
    try:
        subject.logits(batch, **kwargs)
    finally:
        handle.remove()
    return found["tokens"]


def row(subject: Subject, question: str, answer: str = "a cat") -> dict:
    return {"text": f"USER: <image>{question}\nASSISTANT: {answer}", "images": [subject.image(1)]}


@pytest.mark.parametrize("text", PROMISES)
def test_a_text_conditioned_model_keeps_the_promise(text, conditioned):
    check_vlm(conditioned.model, conditioned.processor, only=text).raise_if_failed()


def test_the_answer_changes_no_image_token(conditioned):
    one = image_tokens(conditioned, conditioned.batch([row(conditioned, "What is it?", "a cat")]))
    other = image_tokens(conditioned, conditioned.batch([row(conditioned, "What is it?", "ASSISTANT: no, a dog!")]))
    assert torch.equal(one, other)


def test_the_question_changes_the_image_tokens(conditioned):
    one = image_tokens(conditioned, conditioned.batch([row(conditioned, "What is it?")]))
    other = image_tokens(conditioned, conditioned.batch([row(conditioned, "How many?")]))
    assert (one - other).abs().max() > 1e-3


def test_a_row_without_a_response_shows_no_question(conditioned):
    texts = ("<image> What is it?", "<image> How many are there?")
    tokens = [
        image_tokens(conditioned, conditioned.batch([{"text": text, "images": [conditioned.image(1)]}]))
        for text in texts
    ]
    torch.testing.assert_close(*tokens)
    model = conditioned.model.model
    features = torch.stack(model.get_image_features(conditioned.batch([row(conditioned, "?")])["pixel_values"])[1])
    torch.testing.assert_close(tokens[0], model.connector(features)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_do_not_change_the_image_tokens(side, conditioned):
    rows = [row(conditioned, "What is it?"), row(conditioned, "And which of the many is the largest one of all?")]
    together = image_tokens(conditioned, conditioned.batch(rows, side))
    alone = torch.cat([image_tokens(conditioned, conditioned.batch([own])) for own in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_several_images_of_a_row_share_its_question(conditioned):
    image = conditioned.image(1)
    two = {"text": "USER: <image><image>What?\nASSISTANT:", "images": [image, image]}
    other = {"text": "USER: <image>Where?\nASSISTANT:", "images": [image]}
    tokens = image_tokens(conditioned, conditioned.batch([two, other])).unflatten(0, (3, -1))
    torch.testing.assert_close(tokens[0], tokens[1])
    assert (tokens[1] - tokens[2]).abs().max() > 1e-3


def test_of_a_long_question_the_end_is_read(conditioned):
    model = tiny_model(
        "blip2", text_conditioned=True, response_token_ids=MARKER, qformer_max_position_embeddings=6
    ).eval()
    short = Subject(model, conditioned.processor, 1e-5)
    tokens = [image_tokens(short, short.batch([row(short, text)])) for text in ("abcdefghijkl", "zzzzdefghijkl")]
    torch.testing.assert_close(*tokens)
    assert (tokens[0] - image_tokens(short, short.batch([row(short, "abcdefghijkz")]))).abs().max() > 1e-6


def test_one_encoded_image_serves_two_questions(conditioned):
    texts = ["USER: <image>What?\nASSISTANT:", "USER: <image>How many are there?\nASSISTANT:"]
    image = conditioned.image(4)
    batches = [conditioned.batch([{"text": text, "images": [image]}]) for text in texts]
    encoded = {"image": conditioned.model.get_image_features(batches[0]["pixel_values"])}
    for batch in batches:
        rest = {name: value for name, value in batch.items() if name != "pixel_values"}
        found = conditioned.generate(rest, mm_encoder_outputs=encoded)
        assert torch.equal(found, conditioned.generate(batch))
        torch.testing.assert_close(conditioned.logits(rest, mm_encoder_outputs=encoded), conditioned.logits(batch))


def test_questions_from_embeddings_alone_are_refused(conditioned):
    batch = dict(conditioned.batch([row(conditioned, "What?")]))
    embeds = conditioned.model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="reads the question from input_ids"):
        conditioned.model(**batch, inputs_embeds=embeds)


def test_a_batch_of_text_touches_the_whole_connector_when_ranks_train_together(conditioned, monkeypatch):
    monkeypatch.setattr(modeling_vlm, "is_sharded", lambda: True)
    batch = conditioned.batch([{"text": "no image", "images": []}])
    expected = conditioned.logits(batch)
    conditioned.model.train()
    try:
        logits = conditioned.model(**batch).logits
        logits.sum().backward()
    finally:
        conditioned.model.eval()
    torch.testing.assert_close(logits, expected)
    assert [name for name, p in conditioned.model.model.connector.named_parameters() if p.grad is None] == []
    conditioned.model.zero_grad()


def test_the_q_formers_words_follow_a_resized_vocabulary():
    for use_head in (True, False):
        head = tiny_model("blip2", text_conditioned=True, response_token_ids=MARKER)
        model = head if use_head else head.model
        words = head.model.connector.qformer.word_embeddings.weight.detach().clone()
        model.resize_token_embeddings(384)
        resized = head.model.connector.qformer.word_embeddings
        assert resized.num_embeddings == 384 and torch.equal(resized.weight[:320], words)
        assert 0 < resized.weight[320:].std() < 0.1
        model.resize_token_embeddings(300)
        assert head.model.connector.qformer.word_embeddings.num_embeddings == 300


def test_a_vocabulary_of_the_q_formers_own_is_not_resized():
    model = tiny_model("blip2", text_conditioned=True, qformer_vocab_size=77)
    model.resize_token_embeddings(384)
    assert model.model.connector.qformer.word_embeddings.num_embeddings == 77


# --- a tokenizer of the Q-Former's own -------------------------------------------------------------------------------


def two_tokenizers(**fields) -> ZooBlip2Processor:
    ours = tiny_processor("blip2")
    other = tiny_tokenizer(image_token=None)
    other.model_max_length = 64
    return ZooBlip2Processor(
        ours.image_processor,
        ours.tokenizer,
        other,
        chat_template=ours.chat_template,
        **{**ZooBlip2Processor.fields_from(tiny_config("blip2")), **fields},
    )


@pytest.fixture(scope="module")
def instructed() -> Subject:
    torch.manual_seed(0)
    model = tiny_model("blip2", text_conditioned=True, qformer_vocab_size=260)
    with torch.no_grad():
        model.model.connector.qformer.word_embeddings.weight.normal_()
    return Subject(model, two_tokenizers(), tolerance=1e-4)


def questions_in(processor: ZooBlip2Processor, batch) -> list[str]:
    return processor.qformer_tokenizer.batch_decode(batch["qformer_input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("text", PROMISES)
def test_a_model_with_two_tokenizers_keeps_the_promise(text, instructed):
    check_vlm(instructed.model, instructed.processor, only=text).raise_if_failed()


def test_the_second_tokenizer_reads_the_prompt_alone(instructed):
    processor, image = instructed.processor, instructed.image()
    texts = ["USER: <image>What?\nASSISTANT: A cat.", "USER: no image, and longer\nASSISTANT:"]
    for options in ({}, {"truncation": True, "max_length": 64}):
        batch = processor(
            images=[[image], []], text=texts, padding=True, padding_side="left", return_tensors="pt", **options
        )
        assert questions_in(processor, batch) == ["USER: What?", "USER: no image, and longer"]
        assert batch["qformer_input_ids"].shape == batch["qformer_attention_mask"].shape
    assert "qformer_input_ids" not in processor(text=texts[1:], return_tensors="pt")
    unpadded = processor(images=[image], text=texts[0])
    assert isinstance(unpadded["qformer_input_ids"][0], list) and len(unpadded["qformer_input_ids"]) == 1


def test_a_text_without_response_is_all_prompt(instructed):
    assert instructed.processor.prompt_of("<image> a photo of") == "a photo of"
    marked = two_tokenizers(response_marker="Answer:")
    assert marked.prompt_of("Question: what? Answer: a cat") == "Question: what?"


def test_chat_messages_and_whole_conversations_give_the_same_question(instructed):
    processor = instructed.processor
    question = {"role": "user", "content": [{"type": "image", "image": instructed.image()},
                                            {"type": "text", "text": "What is it?"}]}  # fmt: skip
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = processor.apply_chat_template([[question]], add_generation_prompt=True, **options)
    whole = processor.apply_chat_template([[question, answer]], **options)
    assert torch.equal(asked["qformer_input_ids"], whole["qformer_input_ids"])
    assert questions_in(processor, whole) == ["USER: \nWhat is it?"]


def test_the_second_tokenizers_own_limit_cuts_the_question(instructed):
    batch = instructed.batch([{"text": "<image>" + "long " * 40, "images": [instructed.image()]}])
    assert batch["qformer_input_ids"].shape == (1, 64)


def test_padding_of_the_question_on_either_side_gives_the_same_tokens(instructed):
    batch = dict(instructed.batch([row(instructed, "What?"), row(instructed, "Which of them is larger?")]))
    expected = image_tokens(instructed, batch)
    ids, mask = batch["qformer_input_ids"], batch["qformer_attention_mask"]
    batch["qformer_input_ids"] = torch.nn.functional.pad(ids, (3, 2), value=1)
    batch["qformer_attention_mask"] = torch.nn.functional.pad(mask, (3, 2))
    torch.testing.assert_close(image_tokens(instructed, batch), expected)
    wordless = dict(batch, qformer_attention_mask=torch.zeros_like(batch["qformer_attention_mask"]))
    assert (image_tokens(instructed, wordless) - expected).abs().max() > 1e-3


def test_a_processor_with_two_tokenizers_survives_saving(instructed, tmp_path):
    instructed.processor.save_pretrained(tmp_path)
    instructed.model.save_pretrained(tmp_path)
    assert (tmp_path / "qformer_tokenizer" / "tokenizer.json").exists()
    for again in (ZooBlip2Processor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert again.to_dict() == instructed.processor.to_dict()
        assert again.qformer_tokenizer.get_vocab() == instructed.processor.qformer_tokenizer.get_vocab()
        assert again.qformer_tokenizer.model_max_length == 64
        batch, expected = (
            Subject(instructed.model, p, 0).batch(instructed.ragged) for p in (again, instructed.processor)
        )
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_processor_with_one_tokenizer_writes_one(tmp_path):
    tiny_processor("blip2").save_pretrained(tmp_path)
    assert not (tmp_path / "qformer_tokenizer").exists()
    assert AutoProcessor.from_pretrained(tmp_path).qformer_tokenizer is None


def test_missing_questions_are_an_error_that_names_them(instructed):
    batch = dict(instructed.batch([row(instructed, "What?"), row(instructed, "Where?")]))
    del batch["qformer_attention_mask"]
    ids = batch.pop("qformer_input_ids")
    with pytest.raises(ValueError, match=r"needs qformer_input_ids and qformer_attention_mask.*2 rows; got none"):
        instructed.model(**batch)
    with pytest.raises(ValueError, match="2 rows; got 1"):
        instructed.model(**batch, qformer_input_ids=ids[:1])


def test_ids_beyond_the_q_formers_vocabulary_are_refused(instructed):
    batch = dict(instructed.batch([row(instructed, "What?")]))
    batch["qformer_input_ids"] = batch["qformer_input_ids"] + 250
    with pytest.raises(ValueError, match="reads ids from 0 to 259, got"):
        instructed.model(**batch)


def test_questions_for_a_q_former_that_reads_none_are_refused(conditioned):
    questions = {"qformer_input_ids": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="Got qformer_input_ids, but the Q-Former of this model reads no vocabulary"):
        conditioned.model(**conditioned.batch([row(conditioned, "What?")]), **questions)
    plain = tiny_model("blip2")
    with pytest.raises(ValueError, match="reads no text at all"):
        plain(**conditioned.batch([row(conditioned, "What?")]), **questions)


# --- TRL's trainers --------------------------------------------------------------------------------------------------


def training_rows(count: int = 4) -> list[dict]:
    made = []
    for seed in range(count):
        pixels = np.random.RandomState(seed).randint(0, 256, (40, 50, 3), dtype=np.uint8)
        question = [{"role": "user", "content": f"What is number {seed * 'very '}{seed}?"}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("A cat.", "Two large dogs."))
        made.append({"images": [Image.fromarray(pixels)], "prompt": question, "chosen": chosen, "rejected": rejected})
    return made


def of_messages(rows: list[dict]) -> Dataset:
    return Dataset.from_list([{"images": r["images"], "messages": r["prompt"] + r["chosen"]} for r in rows])


def of_completions(rows: list[dict]) -> Dataset:
    return Dataset.from_list([{"images": r["images"], "prompt": r["prompt"], "completion": r["chosen"]} for r in rows])


@pytest.fixture
def trainable(request, tmp_path):
    """A fresh model that reads questions, with one tokenizer or two, and its processor, from a folder."""
    own = {"qformer_vocab_size": 260} if request.param == "two" else {"response_token_ids": MARKER}
    model = tiny_model("blip2", text_conditioned=True, **own)
    model.save_pretrained(tmp_path / "fresh")
    processor = two_tokenizers() if request.param == "two" else tiny_processor("blip2", model.config)
    processor.save_pretrained(tmp_path / "fresh")
    return type(model).from_pretrained(tmp_path / "fresh"), AutoProcessor.from_pretrained(tmp_path / "fresh")


def check_training(trainer, model) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".qformer." in name}
    loss = trainer.train().training_loss
    assert np.isfinite(loss)
    words = "model.connector.qformer.word_embeddings.weight"
    after = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert words in before and still == []


SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_length": None, **QUIET}


@pytest.mark.parametrize("trainable", ["one", "two"], indirect=True)
@pytest.mark.parametrize("shape", [of_messages, of_completions])
def test_sft_trains_the_q_former_on_questions(shape, trainable, tmp_path):
    model, processor = trainable
    settings = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=shape is of_messages, **SETTINGS)
    rows = shape(training_rows())
    check_training(SFTTrainer(model, settings, train_dataset=rows, processing_class=processor), model)


@pytest.mark.parametrize("trainable", ["one", "two"], indirect=True)
def test_the_zoos_collator_keeps_the_questions(trainable, tmp_path):
    model, processor = trainable
    settings = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, **SETTINGS)
    trainer = SFTTrainer(
        model,
        settings,
        train_dataset=of_messages(training_rows()),
        processing_class=processor,
        data_collator=ZooDataCollator(processor),
    )
    check_training(trainer, model)


@pytest.mark.parametrize("trainable", ["one", "two"], indirect=True)
def test_dpo_trains_the_q_former_on_questions(trainable, tmp_path):
    model, processor = trainable
    settings = DPOConfig(output_dir=str(tmp_path), **SETTINGS)
    trainer = DPOTrainer(
        model, args=settings, train_dataset=Dataset.from_list(training_rows()), processing_class=processor
    )
    check_training(trainer, model)


def online_trainer(kind, settings_of, model, processor, folder):
    prompts = Dataset.from_list([{"images": r["images"], "prompt": r["prompt"]} for r in training_rows(2)])
    settings = {**SETTINGS, "num_generations": 2, "max_completion_length": 6}
    settings.pop("max_length")
    return kind(
        model=model,
        args=settings_of(output_dir=str(folder), **settings),
        reward_funcs=lambda completions, **kwargs: [float(len(str(completion))) for completion in completions],
        train_dataset=prompts,
        processing_class=processor,
    )


@pytest.mark.parametrize("trainable", ["one"], indirect=True)
@pytest.mark.parametrize(("kind", "settings_of"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_online_training_reads_questions_from_the_prompt(kind, settings_of, trainable, tmp_path):
    trainer = online_trainer(kind, settings_of, *trainable, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("trainable", ["two"], indirect=True)
@pytest.mark.parametrize(("kind", "settings_of"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_online_training_refuses_a_second_tokenizer_by_name(kind, settings_of, trainable, tmp_path):
    trainer = online_trainer(kind, settings_of, *trainable, tmp_path)
    with pytest.raises((TypeError, ValueError), match="qformer_input_ids"):
        trainer.train()


@pytest.mark.parametrize("text", ["qwen3", "opt"])
def test_other_language_models_keep_the_main_promises(text):
    model = tiny_model("blip2", vision="siglip", text=text)
    processor = tiny_processor("blip2", model.config)
    for only in ("ragged batch", "cached generation", "one count"):
        check_vlm(model, processor, only=only).raise_if_failed()
    assert TINY_VISION["siglip"]["hidden_size"] == model.model.connector.vision_norm.normalized_shape[0]


# --- the question in generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama", "gemma3"])
def test_a_static_cache_hides_no_padding_from_the_question(text):
    model = tiny_model("blip2", text=text, text_conditioned=True)
    subject = Subject(model, tiny_processor("blip2", model.config), 1e-4)
    short, long = ({"text": subject.asked(what), "images": [subject.image(1)]} for what in ("What?", "What " * 9))
    batch = subject.batch([short, long])
    static = subject.first_logits(batch, cache_implementation="static", disable_compile=True)
    subject.close(static, subject.first_logits(batch), "static and dynamic")
    subject.close(static[:1], subject.first_logits(subject.batch([short])), "in a batch and alone")


def test_a_second_turn_over_a_kept_cache_reads_the_question_of_the_first():
    model = tiny_model("blip2", text_conditioned=True)
    subject = Subject(model, tiny_processor("blip2", model.config), 1e-4)
    first = {"text": "USER: Can you see?\nASSISTANT: yes</s>\n", "images": []}
    both = {"text": first["text"] + "USER: <image>Where is it?\nASSISTANT:", "images": [subject.image(1)]}
    cache = model(**subject.batch([first]), use_cache=True).past_key_values
    batch = subject.batch([both])
    subject.close(subject.first_logits(batch, past_key_values=cache), subject.first_logits(batch), "kept cache")


def test_padding_that_cannot_be_read_is_refused():
    model = tiny_model("blip2", text_conditioned=True)
    subject = Subject(model, tiny_processor("blip2", model.config), 1e-4)
    batch = subject.batch([{"text": subject.asked("What?"), "images": [subject.image(1)]}])
    length = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match=r"attention_mask int\[B, T\] shows no padding, got \[1, 1, "):
        model(**{**batch, "attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).tril()})


def test_the_attention_of_the_q_former_follows_the_model(monkeypatch):
    model, seen = tiny_model("blip2"), []

    def spy(*args, implementation, **kwargs):
        seen.append(implementation)
        return attend(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(blip2, "attend", spy)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.get_image_features(torch.randn(1, 3, 32, 32))
        assert set(seen) == {implementation}
        seen.clear()


def test_a_vocabulary_that_is_not_resized_keeps_its_embeddings():
    model = tiny_model("blip2", text_conditioned=True)
    words = model.model.connector.qformer.word_embeddings
    model.resize_token_embeddings(model.config.text_config.vocab_size)
    assert model.model.connector.qformer.word_embeddings is words
