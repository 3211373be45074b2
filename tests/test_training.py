"""Labels, parts, stages, and TRL's trainers on folders of the zoo."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.scripts.dpo import make_parser as dpo_parser
from trl.scripts.sft import make_parser as sft_parser

from vlm_zoo import ZOO, data
from vlm_zoo.testing import TINY_TEXT, tiny_model, tiny_processor
from vlm_zoo.training import (
    STAGES,
    LeanSFTTrainer,
    ZooDataCollator,
    freeze,
    lora_targets,
    sft,
    stage,
    trainable_parts,
)


EXAMPLES = Path(__file__).parents[1] / "examples"
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def rows(count: int = 4, images: int = 1) -> list[dict]:
    made = []
    for seed in range(count):
        pixels = np.random.RandomState(seed).randint(0, 256, (40, 50, 3), dtype=np.uint8)
        question = {"role": "user", "content": f"What is number {seed}?"}
        answer = {"role": "assistant", "content": "A cat." if seed % 2 else "Two dogs."}
        made.append({"images": [Image.fromarray(pixels)] * images, "messages": [question, answer]})
    return made


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("zoo_llava")


def changed_parts(model, before) -> set[str]:
    return {model.part_of(name) for name, p in model.named_parameters() if not torch.equal(before[name], p.detach())}


# --- collator --------------------------------------------------------------------------------------------------------


def test_labels_are_the_answers_with_their_end_of_turn(processor):
    batch = ZooDataCollator(processor)(rows(2))
    for labels, answer in zip(batch["labels"], (" Two dogs.</s>", " A cat.</s>"), strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == answer


def test_placeholders_carry_no_label_even_when_everything_else_does(processor):
    batch = ZooDataCollator(processor, assistant_only_loss=False)(rows(2, images=2))
    placeholders = batch["input_ids"] == processor.image_token_id
    assert placeholders.sum() == 2 * 2 * 16
    assert (batch["labels"][placeholders] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != -100).sum() == (batch["attention_mask"].bool() & ~placeholders).sum()


def test_rows_with_and_without_images_mix(processor):
    mixed = rows(3)
    mixed[1]["images"] = []
    batch = ZooDataCollator(processor)(mixed)
    assert len(batch["pixel_values"]) == 2
    assert [(ids == processor.image_token_id).sum().item() for ids in batch["input_ids"]] == [16, 0, 16]


def test_prompt_and_completion_label_the_completion(processor):
    row = rows(1)[0]
    example = {"images": row["images"], "prompt": row["messages"][:1], "completion": row["messages"][1:]}
    labels = ZooDataCollator(processor)([example])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]).strip().startswith("Two dogs.</s>")


def test_plain_text_rows_are_collated(processor):
    example = {"images": rows(1)[0]["images"], "text": "<image> a page"}
    labels = ZooDataCollator(processor)([example])["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == " a page"


def test_an_empty_batch_is_a_clear_error(processor):
    with pytest.raises(ValueError, match="empty batch"):
        ZooDataCollator(processor)([])


def test_truncation_that_cuts_placeholders_is_a_clear_error(processor):
    with pytest.raises(ValueError, match=r"[Mm]ismatch in .image. token count"):
        ZooDataCollator(processor, max_length=12)(rows(1))


# --- parts -----------------------------------------------------------------------------------------------------------


def test_freeze_reports_what_trains():
    model = tiny_model("zoo_llava")
    counts = freeze(model, ["connector"])
    assert counts["connector"] == sum(p.numel() for p in model.model.connector.parameters())
    assert counts == trainable_parts(model)
    assert sum(counts.values()) == counts["connector"]


@pytest.mark.parametrize("text", TINY_TEXT)
def test_lora_reaches_the_named_part_alone(text):
    model = tiny_model("zoo_llava", text=text)
    adapted = LoraConfig(target_modules=lora_targets(model, ["language"]), r=2)
    from peft import get_peft_model

    names = [name for name, p in get_peft_model(model, adapted).named_parameters() if p.requires_grad]
    assert names and all(".language_model." in name for name in names)


def test_a_part_without_linear_layers_has_no_lora_targets():
    with pytest.raises(ValueError, match=r"\['embeddings'\].*no linear layer"):
        lora_targets(tiny_model("zoo_llava"), ["embeddings"])
    with pytest.raises(ValueError, match=r"Unknown part\(s\) \['projector'\]"):
        lora_targets(tiny_model("zoo_llava"), ["projector"])


# --- stages and examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_accepted_by_trl(name, tmp_path):
    settings = SFTConfig(output_dir=str(tmp_path), **{**stage(name), **QUIET})
    assert settings.assistant_only_loss and settings.max_length is None
    assert set(settings.model_init_kwargs["trainable_parts"]) >= {"connector"}


def test_an_unknown_stage_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="Unknown stage 'pretraining'; the stages are alignment, instruction"):
        stage("pretraining")


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_example_settings_are_all_understood_by_trl(file):
    parser = {"sft": sft_parser, "dpo": dpo_parser}[file.removesuffix(".yaml").rpartition("_")[2]]
    arguments = ["--config", str(EXAMPLES / file), "--use_cpu", "true", "--bf16", "false"]
    parser().parse_args_and_config(args=arguments, fail_with_unknown_args=True)


def test_every_architecture_has_settings_for_both_trainers():
    names = {path.stem for path in EXAMPLES.glob("*.yaml")}
    assert names >= {f"{entry.name}_{kind}" for entry in ZOO.values() for kind in ("sft", "dpo")}


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.glob("*_sft.yaml")))
def test_the_sft_examples_label_answers_alone(file):
    settings = yaml.safe_load((EXAMPLES / file).read_text(encoding="utf-8"))
    assert settings["assistant_only_loss"] is True and settings["max_length"] is None


@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_the_examples_train_parts_that_exist(file):
    settings = yaml.safe_load((EXAMPLES / file).read_text(encoding="utf-8"))
    model = tiny_model(f"zoo_{file.rpartition('_')[0]}")
    counts = freeze(model, settings["model_init_kwargs"]["trainable_parts"])
    assert all(counts[part] for part in settings["model_init_kwargs"]["trainable_parts"] if part != "head")


# --- TRL's trainers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
def test_sft_trains_a_folder_with_and_without_trusting_its_code(trust, tiny_folder, tmp_path):
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        trust_remote_code=trust,
        assistant_only_loss=True,
        max_length=None,
        model_init_kwargs={"trainable_parts": ["connector"]},
        **QUIET,
    )
    trainer = SFTTrainer(model=str(tiny_folder), args=settings, train_dataset=Dataset.from_list(rows()))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert changed_parts(trainer.model, before) == {"connector"}
    trainer.save_model()
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "ZooLlavaProcessor"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, dict(trainer.model.named_parameters())[name])


def test_the_lean_trainer_has_the_loss_of_trls(tiny_folder, tmp_path):
    losses = []
    for kind in (SFTTrainer, LeanSFTTrainer):
        settings = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            logging_steps=1,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            assistant_only_loss=True,
            max_length=None,
            **QUIET,
        )
        trainer = kind(model=str(tiny_folder), args=settings, train_dataset=Dataset.from_list(rows(12)))
        trainer.train()
        losses.append([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # the log rounds to four digits


def test_gradient_accumulation_changes_no_loss(tiny_folder, tmp_path):
    losses = []
    for size, accumulation in ((4, 1), (1, 4)):
        settings = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            assistant_only_loss=True,
            max_length=None,
            **QUIET,
        )
        trainer = LeanSFTTrainer(model=str(tiny_folder), args=settings, train_dataset=Dataset.from_list(rows(4)))
        trainer.train()
        losses.append(float(trainer.state.log_history[0]["loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_a_lora_adapter_trains_saves_and_loads(tiny_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    adapter = LoraConfig(
        r=2, target_modules=lora_targets(model, ["language"]), modules_to_save=["connector"], task_type="CAUSAL_LM"
    )
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, assistant_only_loss=True, max_length=None, **QUIET
    )
    trainer = SFTTrainer(
        model=str(tiny_folder), args=settings, train_dataset=Dataset.from_list(rows()), peft_config=adapter
    )
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    batch = ZooDataCollator(AutoProcessor.from_pretrained(tiny_folder))(rows(2))
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, trainer.model(**batch).logits, atol=1e-4, rtol=1e-4)


def test_dpo_trains_on_the_embedded_pairs(tiny_folder, tmp_path):
    pairs = load_dataset(str(data.path("emoji_preference")), split="train").select(range(4))
    settings = DPOConfig(output_dir=str(tmp_path), max_steps=1, max_length=None, learning_rate=1e-2, **QUIET)
    trainer = DPOTrainer(model=str(tiny_folder), args=settings, train_dataset=pairs)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert changed_parts(trainer.model, before) >= {"vision", "connector", "language"}


def test_grpo_samples_and_trains(tiny_folder, tmp_path):
    prompts = [{"images": row["images"], "prompt": row["messages"][:1]} for row in rows(2)]

    def reward_length(completions, **kwargs):
        return [float(len(str(completion))) for completion in completions]

    settings = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=6,
        learning_rate=1e-2,
        **QUIET,
    )
    trainer = GRPOTrainer(
        model=str(tiny_folder),
        args=settings,
        reward_funcs=reward_length,
        train_dataset=Dataset.from_list(prompts),
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_vlm_zoo_sft_trains_from_a_yaml_file(tiny_folder, tmp_path):
    arguments = ["--config", str(EXAMPLES / "llava_sft.yaml"), "--model_name_or_path", str(tiny_folder)]
    arguments += ["--dataset_name", str(data.path("emoji_tiles")), "--output_dir", str(tmp_path)]
    arguments += ["--trust_remote_code", "false", "--use_cpu", "true", "--bf16", "false"]
    trainer = sft.main([*arguments, "--max_steps", "1", "--per_device_train_batch_size", "2"])
    assert isinstance(trainer.data_collator, ZooDataCollator)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "dataset"), [("sft", "emoji_tiles"), ("dpo", "emoji_preference")])
def test_the_trl_command_trains_a_folder_without_the_zoo(command, dataset, tiny_folder, tmp_path):
    arguments = ["--config", str(EXAMPLES / f"llava_{command}.yaml"), "--model_name_or_path", str(tiny_folder)]
    arguments += ["--dataset_name", str(data.path(dataset)), "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu", "true", "--bf16", "false"]
    program = Path(sys.executable).with_name("trl")
    subprocess.run([program, command, *arguments], cwd=tmp_path, check=True, timeout=280)
    assert (tmp_path / "out" / "llava.py").exists()
