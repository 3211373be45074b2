"""Stage 1 of BLIP-2: who sees whom, the three losses, several ranks, training, and the way into stage 2."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_blip2 import QFORMER, VISION, parity_config, randomised, renamed
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Trainer,
    TrainingArguments,
)

from vlm_zoo.models.blip2 import QFormer, ZooBlip2ForConditionalGeneration, ZooBlip2Model, qformer_mask
from vlm_zoo.models.blip2_pretraining import ZooBlip2ForPretraining, same_text, sample_negatives
from vlm_zoo.testing import TINY_TEXT, tiny_config, tiny_model, tiny_processor
from vlm_zoo.training import CaptionCollator


def pretraining_model(**fields) -> ZooBlip2ForPretraining:
    return ZooBlip2ForPretraining(tiny_config("blip2", **fields)).eval()


def batch_of(rows: int = 4, length: int = 7) -> dict[str, torch.Tensor]:
    """Ragged captions, padded at the right, each with an image of its own."""
    ids = torch.randint(5, 250, (rows, length))
    mask = torch.arange(length) < length - torch.arange(rows)[:, None] % (length - 1)
    return {
        "pixel_values": torch.randn(rows, 3, 32, 32),
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
    }


@pytest.fixture
def model() -> ZooBlip2ForPretraining:
    return pretraining_model()


# --- masks -----------------------------------------------------------------------------------------------------------

DRAWN = {
    "unimodal": """
        q q . . .
        q q . . .
        . . t t .
        . . t t .
        . . t t t""",
    "bidirectional": """
        q q t t .
        q q t t .
        q q t t .
        q q t t .
        q q t t t""",
    "causal": """
        q q . . .
        q q . . .
        q q t . .
        q q t t .
        q q t t t""",
}


@pytest.mark.parametrize("objective", DRAWN)
def test_each_mask_is_cell_by_cell_the_one_drawn(objective):
    mask = qformer_mask(objective, 2, torch.tensor([[True, True, False]]))
    drawn = [[cell != "." for cell in line.split()] for line in DRAWN[objective].split("\n") if line.strip()]
    assert mask[0].tolist() == drawn


@pytest.mark.parametrize("objective", DRAWN)
def test_masks_without_padding_and_without_queries(objective):
    mask = qformer_mask(objective, 0, torch.ones(2, 3, dtype=torch.bool))
    expected = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(mask, (expected.tril() if objective == "causal" else expected).expand(2, 3, 3))


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="Unknown objective 'prefix'"):
        qformer_mask("prefix", 2, torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("objective", DRAWN)
def test_gradients_reach_exactly_where_the_mask_lets_them(objective, implementation):
    model = pretraining_model(qformer_num_hidden_layers=3, num_query_tokens=2)
    model.set_attn_implementation(implementation)
    text_mask = torch.tensor([[True, True, True, False]])
    queries = model.model.connector.queries(1).detach().requires_grad_()
    text = model.qformer.embed(torch.tensor([[7, 8, 9, 0]])).detach().requires_grad_()
    mask = qformer_mask(objective, 2, text_mask)
    states, _ = model.qformer(queries, torch.randn(1, 17, 32), text, mask)
    reaches = torch.zeros(6, 6, dtype=torch.bool)
    for position in range(6):
        target = states[0, position] @ torch.randn(32)
        gradients = torch.autograd.grad(target, (queries, text), retain_graph=True, allow_unused=True)
        norms = torch.cat([gradient[0].norm(dim=-1) for gradient in gradients])
        reaches[position] = norms > 0
    assert torch.equal(reaches, mask[0])


def test_the_unimodal_mask_equals_two_separate_passes(model):
    batch = batch_of(2)
    ids, text_mask = model.read(batch["input_ids"], batch["attention_mask"])
    features = model.see(batch["pixel_values"])
    text, queries = model.qformer.embed(ids), model.model.connector.queries(2)
    together, _ = model.qformer(queries, features, text, qformer_mask("unimodal", queries.shape[1], text_mask))
    images, _ = model.qformer(queries, features)
    texts, _ = model.qformer(text=text, mask=qformer_mask("unimodal", 0, text_mask))
    torch.testing.assert_close(together[:, : queries.shape[1]], images, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[:, queries.shape[1] :][text_mask], texts[text_mask], atol=1e-6, rtol=1e-5)


def test_cached_queries_equal_one_pass_with_the_causal_mask(model):
    batch = batch_of(3)
    ids, text_mask = model.read(batch["input_ids"], batch["attention_mask"])
    features = model.see(batch["pixel_values"])
    _, keys_values = model.embed_images(features)
    cached = model.generate_captions(keys_values, ids, text_mask)
    queries = model.model.connector.queries(3)
    mask = qformer_mask("causal", queries.shape[1], F.pad(text_mask, (1, 0), value=True))
    states, _ = model.qformer(queries, features, model.qformer.embed(ids, QFormer.DEC), mask)
    plain = model.text_head(states[:, queries.shape[1] :], model.qformer.word_embeddings)
    real = F.pad(text_mask, (1, 0), value=True)
    torch.testing.assert_close(cached[real], plain[real], atol=1e-5, rtol=1e-5)


# --- generation ------------------------------------------------------------------------------------------------------


def test_a_predicted_word_sees_no_later_word(model):
    batch = batch_of(1)
    text_mask = torch.ones(1, 7, dtype=torch.bool)
    _, keys_values = model.embed_images(model.see(batch["pixel_values"]))
    before = model.generate_captions(keys_values, batch["input_ids"], text_mask)
    for place in range(7):
        changed = batch["input_ids"].clone()
        changed[0, place] = 3
        after = model.generate_captions(keys_values, changed, text_mask)
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        assert (after[:, place + 1] - before[:, place + 1]).abs().max() > 1e-6


def test_the_first_word_is_predicted_from_the_image(model):
    one, other = batch_of(1), batch_of(1)
    text_mask = torch.ones(1, 7, dtype=torch.bool)
    logits = [
        model.generate_captions(model.embed_images(model.see(b["pixel_values"]))[1], one["input_ids"], text_mask)[:, 0]
        for b in (one, other)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_the_generation_loss_counts_every_real_word_once(model):
    batch = batch_of(3)
    ids, text_mask = batch["input_ids"], batch["attention_mask"].bool()
    _, keys_values = model.embed_images(model.see(batch["pixel_values"]))
    logits = model.generate_captions(keys_values, ids, text_mask)
    total, count = 0.0, 0
    for row in range(3):
        for place in range(int(text_mask[row].sum())):
            total, count = total - logits[row, place].log_softmax(-1)[ids[row, place]], count + 1
    torch.testing.assert_close(model(**batch).itg_loss, total / count)


# --- contrast --------------------------------------------------------------------------------------------------------


def test_the_similarity_is_that_of_the_nearest_query(model):
    batch = batch_of(3)
    images, _ = model.embed_images(model.see(batch["pixel_values"]))
    texts = model.embed_texts(*model.read(batch["input_ids"], batch["attention_mask"]))
    expected = torch.stack([torch.stack([(image @ text).max() for text in texts]) for image in images])
    torch.testing.assert_close(model.get_image_text_similarity(**batch), expected)


def test_the_contrast_is_smoothed_over_both_directions(model):
    model = randomised(model)
    with torch.no_grad():
        model.temperature.fill_(0.05)
    batch = batch_of(3)
    logits = model.get_image_text_similarity(**batch) / 0.05
    outputs = model(**batch)
    torch.testing.assert_close(outputs.logits_per_image, logits)
    torch.testing.assert_close(outputs.logits_per_text, logits.T)
    smooth, plain = (
        sum(F.cross_entropy(one, torch.arange(3), label_smoothing=amount) for one in (logits, logits.T)) / 2
        for amount in (0.1, 0.0)
    )
    assert (smooth - plain).abs() > 1e-3
    torch.testing.assert_close(outputs.itc_loss, smooth)
    torch.testing.assert_close(outputs.loss, outputs.itc_loss + outputs.itm_loss + outputs.itg_loss)


def test_the_temperature_has_a_floor_from_which_it_can_rise(model):
    with torch.no_grad():
        model.temperature.fill_(-1.0)
    batch = batch_of(3)
    outputs = model(**batch)
    assert outputs.logits_per_image.abs().max() <= 100.001
    torch.testing.assert_close(outputs.logits_per_image, model.get_image_text_similarity(**batch) / 0.01)
    outputs.itc_loss.backward()
    assert model.temperature.grad < 0  # an optimiser would raise it


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, model):
    batch = batch_of(3)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = {
        **batch,
        "input_ids": F.pad(batch["input_ids"], pad, value=9),
        "attention_mask": F.pad(batch["attention_mask"], pad),
    }
    for name in ("itc_loss", "itg_loss"):
        torch.testing.assert_close(model(**padded)[name], model(**batch)[name])
    torch.testing.assert_close(model.get_match_probability(**padded), model.get_match_probability(**batch))


RANK = """
import sys
rank, folder = int(sys.argv[1]), sys.argv[2]
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from vlm_zoo.models.blip2_pretraining import ZooBlip2ForPretraining
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model = ZooBlip2ForPretraining.from_pretrained(f"{folder}/model")
batch = {name: tensor[3 * rank : 3 * rank + 3] for name, tensor in load_file(f"{folder}/batch.safetensors").items()}
length = int(batch["attention_mask"].sum(1).max())  # ranks pad to their own longest
batch = {**batch, "input_ids": batch["input_ids"][:, :length], "attention_mask": batch["attention_mask"][:, :length]}
outputs = model(**batch)
assert outputs.itm_logits.shape == (9, 2)
outputs.itc_loss.backward(retain_graph=True)
found = {"loss": outputs.itc_loss.detach().reshape(1), "logits": outputs.logits_per_image.detach()}
for name, parameter in model.named_parameters():
    if parameter.grad is not None:
        torch.distributed.all_reduce(parameter.grad)
        found[f"grad.{name}"] = parameter.grad / 2
(outputs.itm_loss + outputs.itg_loss).backward()
try:
    model(**{name: tensor[: 3 - rank] for name, tensor in batch.items()})
except ValueError as error:
    assert "[3, 2] captions" in str(error), error
else:
    raise AssertionError("unequal ranks were accepted")
save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{folder}/rank{rank}.safetensors")
torch.distributed.barrier()  # a rank that leaves first can take the other with it
torch.distributed.destroy_process_group()
"""


def test_two_ranks_contrast_like_one_with_the_whole_batch(model, tmp_path):
    batch = batch_of(6)
    save_file(batch, tmp_path / "batch.safetensors")
    model.save_pretrained(tmp_path / "model")
    root = Path(__file__).parents[1]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], cwd=root, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()[-2000:]
    outputs = model(**batch)
    outputs.itc_loss.backward()
    parts = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part["logits"] for part in parts]), outputs.logits_per_image)
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"])[0] / 2, outputs.itc_loss)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == {name.removeprefix("grad.") for name in parts[0] if name.startswith("grad.")}
    for name, gradient in expected.items():
        torch.testing.assert_close(parts[0][f"grad.{name}"], gradient, atol=1e-5, rtol=1e-4)


# --- matching --------------------------------------------------------------------------------------------------------


def test_negatives_are_never_the_positive_nor_a_caption_of_the_same_words():
    ids = torch.tensor([[1, 2, 0], [1, 2, 3], [1, 2, 9], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    same = same_text(ids, mask, ids, mask)
    assert same.tolist() == [[True, False, True, False], [False, True, False, False],
                             [True, False, True, False], [False, False, False, True]]  # fmt: skip
    logits = torch.zeros(4, 4) + 50 * same  # the forbidden ones are the most alike
    for _ in range(50):
        drawn = sample_negatives(logits, ~same)
        assert not same[torch.arange(4), drawn].any()


def test_negatives_that_resemble_the_positive_are_drawn_more_often():
    logits = torch.tensor([[9.0, 3.0, 0.0]]).expand(2000, 3)
    drawn = sample_negatives(logits, torch.tensor([[False, True, True]]).expand(2000, 3))
    assert 0.85 < (drawn == 1).float().mean() < 0.99


def test_texts_of_other_lengths_are_compared_without_their_padding():
    one, other = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 0, 0], [1, 2, 3, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    assert same_text(one, torch.ones(1, 2, dtype=torch.bool), other, mask).tolist() == [[True, False]]


def test_matching_compares_pairs_then_foreign_images_then_foreign_texts(model, monkeypatch):
    seen = {}

    def keep(features, ids, text_mask):
        seen.update(features=features, ids=ids)
        return torch.zeros(len(ids), 2)

    monkeypatch.setattr(model, "match", keep)
    batch = batch_of(4)
    outputs = model(**batch)
    features = model.see(batch["pixel_values"])
    assert seen["ids"].shape[0] == 12
    torch.testing.assert_close(seen["features"][:4], features)
    torch.testing.assert_close(seen["features"][8:], features)
    assert torch.equal(seen["ids"][:8], batch["input_ids"].repeat(2, 1))
    for row in range(4):
        assert (seen["features"][4 + row] - features[row]).abs().max() > 1e-3
        assert not torch.equal(seen["ids"][8 + row], batch["input_ids"][row])
    torch.testing.assert_close(outputs.itm_loss, torch.tensor(2.0).log())


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_without_any_negative_still_trains(rows, model):
    batch = batch_of(rows)
    batch = {**batch, "input_ids": batch["input_ids"][:1].expand(rows, -1), "attention_mask": torch.ones(rows, 7)}
    outputs = model(**batch)
    assert outputs.itm_logits.shape == (rows, 2) and torch.isfinite(outputs.loss)
    outputs.loss.backward()


def test_only_the_row_without_a_negative_goes_without(model):
    batch = batch_of(3)
    batch["input_ids"][1] = batch["input_ids"][0]
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    assert model(**batch).itm_logits.shape == (9, 2)  # the third caption serves both


# --- parity ----------------------------------------------------------------------------------------------------------


def test_contrast_and_matching_equal_those_of_transformers():
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        text_config=TINY_TEXT["opt"],
        num_query_tokens=6,
        image_text_hidden_size=16,
        image_token_index=None,
    )
    theirs = randomised(Blip2ForImageTextRetrieval(config))
    ours = ZooBlip2ForPretraining(
        parity_config("blip_2_vision_model", "opt", qformer_vocab_size=100, image_text_hidden_size=16)
    ).eval()
    state = renamed(theirs.state_dict())
    state = {name.replace("vision_projection", "image_projection"): tensor for name, tensor in state.items()}
    report = ours.load_state_dict(state, strict=False)
    assert report.unexpected_keys == []
    assert {name.split(".")[0] for name in report.missing_keys if "connector" not in name} == {
        "text_head",
        "temperature",
    }
    cls = 3
    with torch.no_grad():
        ours.qformer.marks.weight[QFormer.CLS] = ours.qformer.word_embeddings.weight[cls]
    batch = batch_of(3)
    batch["input_ids"] = batch["input_ids"] % 100
    marked = {
        "pixel_values": batch["pixel_values"],
        "input_ids": F.pad(batch["input_ids"], (1, 0), value=cls),
        "attention_mask": F.pad(batch["attention_mask"], (1, 0), value=1),
    }
    with torch.no_grad():
        contrast = theirs(**marked).logits_per_image
        matching = theirs(**marked, use_image_text_matching_head=True).logits_per_image
        own_contrast = ours.get_image_text_similarity(**batch)
        own_matching = ours.match(
            ours.see(batch["pixel_values"]), *ours.read(batch["input_ids"], batch["attention_mask"])
        )
        probability = ours.get_match_probability(**batch)
    differences = [(own_contrast - contrast).abs().max().item(), (own_matching - matching).abs().max().item()]
    print(f"ITC differs by {differences[0]:.1e}, ITM by {differences[1]:.1e}")
    assert max(differences) < 5e-6
    torch.testing.assert_close(probability, matching.softmax(-1)[:, 1], atol=5e-6, rtol=0)


# --- training --------------------------------------------------------------------------------------------------------


def captions(count: int = 8) -> list[dict]:
    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
    made = []
    for index in range(count):
        name, colour = list(colours.items())[index % 4]
        pixels = np.full((32, 32, 3), colour, dtype=np.uint8) + np.uint8(index)
        question = {"role": "user", "content": "Describe it."}
        answer = {"role": "assistant", "content": f"{name} square"}
        made.append({"images": [Image.fromarray(pixels)], "messages": [question, answer]})
    return made


def test_the_collator_reads_captions_wherever_they_stand():
    processor = tiny_processor("blip2")
    image = captions(1)[0]["images"][0]
    parts = [{"type": "text", "text": "a cat"}]
    rows = [
        {"images": [image], "caption": "a cat"},
        {"image": image, "text": "a cat"},
        {"images": [image], "messages": [{"role": "assistant", "content": "a cat"}]},
        {"images": [image], "messages": [{"role": "assistant", "content": parts}]},
        {"images": [image], "caption": "a larger cat"},
    ]
    batch = CaptionCollator(processor)(rows)
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 13)
    texts = [processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(
        batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert texts == ["a cat</s>"] * 4 + ["a larger cat</s>"]
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [0] * 7  # at the right
    cut = CaptionCollator(processor, max_length=4)(rows)["input_ids"]
    assert processor.tokenizer.decode(cut[0]) == "a c</s>"


def test_rows_that_are_no_captions_are_refused():
    collate = CaptionCollator(tiny_processor("blip2"))
    row = captions(1)[0]
    with pytest.raises(ValueError, match="empty batch"):
        collate([])
    with pytest.raises(ValueError, match="one image, this row has 2"):
        collate([{**row, "images": row["images"] * 2}])
    with pytest.raises(ValueError, match="and 0 answers"):
        collate([{"images": row["images"], "messages": row["messages"][:1]}])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_one_learns_in_transformers_trainer(checkpointing, tmp_path):
    model, processor = pretraining_model(), tiny_processor("blip2")
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=25,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=5,
        gradient_checkpointing=checkpointing,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    rows = captions(16)
    collate = CaptionCollator(processor)
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows[:4], data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    found = model.get_image_text_similarity(**collate(rows[:4])).argmax(dim=1)
    assert found.tolist() == [0, 1, 2, 3]


def test_every_trainable_parameter_receives_a_gradient():
    model = pretraining_model().train()
    model(**batch_of()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert max(norms.values()) < 1e3


def test_images_and_captions_must_be_as_many(model):
    batch = batch_of(3)
    with pytest.raises(ValueError, match="Got 2 images and 3 captions"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})


def test_a_caption_longer_than_the_positions_is_refused():
    model = pretraining_model(qformer_max_position_embeddings=7)
    with pytest.raises(ValueError, match=r"7 positions \(qformer_max_position_embeddings\), the text takes 8"):
        model(**batch_of(2))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_stage_one_folder_gives_back_every_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = ZooBlip2ForPretraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch = batch_of(2)
    torch.testing.assert_close(
        again.eval()(**batch, return_loss=False).logits_per_image, model(**batch).logits_per_image
    )
    assert (tmp_path / "blip2_pretraining.py").exists() and (tmp_path / "blip2.py").exists()
    assert again.config.auto_map["AutoModelForImageTextToText"] == "blip2.ZooBlip2ForConditionalGeneration"


def test_stage_one_starts_from_a_built_folder(tmp_path):
    built = tiny_model("blip2")
    built.save_pretrained(tmp_path)
    model, info = ZooBlip2ForPretraining.from_pretrained(
        tmp_path, output_loading_info=True, trainable_parts=["connector", "head"]
    )
    assert info["unexpected_keys"] == set()
    assert not info["missing_keys"] & built.state_dict().keys()
    own, other = model.model.state_dict(), built.model.state_dict()
    shared = [name for name in own if name in other]
    assert "connector.projection.weight" in shared and "connector.query_tokens" in shared
    assert all(torch.equal(own[name], other[name]) for name in shared)
    assert model.temperature.item() == pytest.approx(0.07) and model.text_head.bias.abs().sum() == 0
    assert torch.isfinite(model.qformer.marks.weight).all() and model.qformer.marks.weight.std() > 0.01
    trained = {model.part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"connector", "head"}
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())


@pytest.mark.parametrize("conditioned", [False, True])
def test_stage_two_starts_from_stage_one(conditioned, model, tmp_path):
    fields = {"text_conditioned": conditioned, "response_token_ids": [5]}
    built = tiny_model("blip2", **fields)
    built.save_pretrained(tmp_path / "built")
    model.save_pretrained(tmp_path / "stage-1")
    second = ZooBlip2ForConditionalGeneration.from_pretrained(
        tmp_path / "built", parts_from={"connector": tmp_path / "stage-1"}
    )
    state = model.state_dict()
    for name, tensor in second.state_dict().items():
        expected = state[name] if ".connector." in name else built.state_dict()[name]
        assert torch.equal(tensor, expected), name
    assert any("text_feed_forward" in name for name in second.state_dict()) == conditioned


@pytest.mark.parametrize("kind", [ZooBlip2ForConditionalGeneration, ZooBlip2Model, AutoModelForImageTextToText])
def test_a_stage_one_folder_opens_as_a_model_with_a_fresh_language_model(kind, model, tmp_path):
    model.save_pretrained(tmp_path)
    second, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == set()
    assert all("language_model" in name or name.startswith("lm_head") for name in info["missing_keys"])
    assert torch.equal(second.base_model.connector.query_tokens, model.model.connector.query_tokens)


def test_the_vocabulary_is_not_resized_in_stage_one(model):
    with pytest.raises(ValueError, match="resize that one"):
        model.resize_token_embeddings(400)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_stage_1_opens_as_stage_1(tmp_path):
    model = ZooBlip2ForPretraining(tiny_config("blip2")).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(again) is ZooBlip2ForPretraining
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters())


def test_a_folder_of_stage_1_opens_as_stage_1_where_the_zoo_is_not_installed(tmp_path):
    ZooBlip2ForPretraining(tiny_config("blip2")).save_pretrained(tmp_path / "stage-1")
    program = (
        "import sys; sys.modules['vlm_zoo'] = None\n"
        "from transformers import AutoModelForPreTraining\n"
        "model = AutoModelForPreTraining.from_pretrained('stage-1', trust_remote_code=True)\n"
        "assert type(model).__name__ == 'ZooBlip2ForPretraining'\n"
        "model.save_pretrained('again')\n"
        "AutoModelForPreTraining.from_pretrained('again', trust_remote_code=True)\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-I", "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


# --- bad input and evaluation ----------------------------------------------------------------------------------------


def test_an_evaluation_has_one_loss(captioned):
    model, batch = captioned
    losses = {model.eval()(**batch).loss.item() for _ in range(3)}
    assert len(losses) == 1


def test_captions_without_a_word_have_a_finite_loss(captioned):
    model, batch = captioned
    outputs = model.eval()(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
    assert outputs.itg_loss == 0 and torch.isfinite(outputs.loss)


def test_a_mask_of_another_width_and_pairs_of_other_numbers_are_refused(captioned):
    model, batch = captioned
    with pytest.raises(ValueError, match=r"expected \[B, T\], the same for both"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, :-1]})
    with pytest.raises(ValueError, match="Got 3 images and 4 captions"):
        model.get_match_probability(batch["pixel_values"][:3], batch["input_ids"])
    with pytest.raises(ValueError, match="Got 0 images and 0 captions"):
        model(batch["pixel_values"][:0], batch["input_ids"][:0])
    with pytest.raises(ValueError, match="max_length must leave room"):
        CaptionCollator(tiny_processor("blip2"), max_length=1)


@pytest.fixture
def captioned():
    model = ZooBlip2ForPretraining(tiny_config("blip2"))
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "input_ids": torch.randint(5, 60, (4, 6))}
    return model, {**batch, "attention_mask": torch.ones(4, 6, dtype=torch.long)}
