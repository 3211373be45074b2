"""The checks behind `check_vlm`, one function for each promise."""

import copy
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin, StoppingCriteria
from trl import SFTConfig, SFTTrainer

from ..models.modeling_vlm import VISION_INPUTS, ZooModel, ZooPreTrainedModel
from ..training import ZooDataCollator, trainable_parts
from .contract import NotApplicable, promise, require


@dataclass
class Subject:
    """A model under test, and inputs made for it."""

    model: PreTrainedModel
    processor: ProcessorMixin
    tolerance: float

    def __post_init__(self):
        self.model = opened(self.model)

    def image(self, seed: int = 0, height: int = 40, width: int = 56) -> Image.Image:
        pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    @property
    def image_token(self) -> str:
        return self.processor.image_token

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @cached_property
    def ragged(self) -> list[dict]:
        """Rows of every kind: one image, two images, none."""
        token = self.image_token
        two = [self.image(2), self.image(3, 64, 32)]
        return [
            {"text": self.asked("what is it?"), "images": [self.image(1)]},
            {"text": f"first {token} and then {token} which is larger, the one or the other?", "images": two},
            {"text": "no image here", "images": []},
        ]

    def asked(self, question: str) -> str:
        """A prompt with one image, by the chat template where there is one: connectors may read the question in it."""
        if self.processor.chat_template is None:
            return f"{self.image_token} {question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def batch(self, rows: list[dict], side: str = "left"):
        images = [row["images"] for row in rows]
        return self.processor(
            text=[row["text"] for row in rows],
            images=images if any(images) else None,
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )

    def logits(self, batch, **kwargs) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**batch, **kwargs).logits

    def generate(self, batch, **kwargs) -> torch.Tensor:
        """The new tokens of a greedy answer of six tokens, unless options say otherwise."""
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
        return self.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]

    def first_logits(self, batch, **kwargs) -> torch.Tensor:
        """The logits from which `generate` takes its first token, `float[B, V]`."""
        outputs = self.model.generate(
            **batch, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
        )
        return outputs.logits[0]

    def close(self, one: torch.Tensor, other: torch.Tensor, what: str) -> str:
        require(one.shape == other.shape, f"{what}: shapes {tuple(one.shape)} and {tuple(other.shape)}")
        difference = (one - other).abs().max().item() if one.numel() else 0.0
        require(difference <= self.tolerance, f"{what}: differ by {difference:.2e}, allowed {self.tolerance:.0e}")
        return f"max difference {difference:.1e}"

    def zoo_only(self, what: str) -> None:
        if not isinstance(self.model, ZooPreTrainedModel):
            raise NotApplicable(f"{what} is a property of the zoo's own models")

    def training_rows(self) -> Dataset:
        rows = []
        for seed in range(4):
            question = {"role": "user", "content": "What is it?"}
            answer = {"role": "assistant", "content": "A cat." if seed % 2 else "Two dogs."}
            rows.append({"images": [self.image(seed)], "messages": [question, answer]})
        return Dataset.from_list(rows)


def opened(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy without closed gates: parameters between tower and language model that start at zero, so
    that a fresh model computes what its language model computes. Behind a closed gate no promise could be broken."""
    closed = [name for name, parameter in model.named_parameters() if is_gate(model, name) and not parameter.any()]
    if closed:
        model = copied(model)
        with torch.no_grad():
            for name in closed:
                model.get_parameter(name).fill_(0.5)
    return model


def is_gate(model: PreTrainedModel, name: str) -> bool:
    return isinstance(model, ZooPreTrainedModel) and name.endswith("_gate") and model.part_of(name) == "fusion"


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same weights."""
    return copy.deepcopy(model)


def lasting(config: dict) -> dict:
    """A config without what loading itself writes into it."""
    return {
        name: lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in ("_name_or_path", "dtype")
    }


# --- what it computes ------------------------------------------------------------------------------------------------


@promise("text-only input gives the language model's own logits")
def text_only_is_the_language_model(subject: Subject) -> str:
    base = subject.model.base_model
    if isinstance(base, ZooModel) and not base.keeps_text:
        raise NotApplicable("the config of this model lets text without images pass more than the language model")
    config = subject.model.config.get_text_config()
    language_model = AutoModelForCausalLM.from_config(config).eval()
    decoder = subject.model.get_decoder()
    language_model.base_model.load_state_dict(decoder.state_dict())
    language_model.get_output_embeddings().load_state_dict(subject.model.get_output_embeddings().state_dict())
    details = []
    for side in ("left", "right"):
        batch = subject.batch([{"text": text, "images": []} for text in ("short", "rather longer text")], side)
        with torch.no_grad():
            own = language_model(**batch).logits
        mask = batch["attention_mask"].bool()
        details.append(subject.close(subject.logits(batch)[mask], own[mask], f"{side}-padded text"))
    return details[-1]


@promise("logits depend on the image")
def logits_depend_on_the_image(subject: Subject) -> str:
    rows = [subject.ragged[0], {**subject.ragged[0], "images": [subject.image(9)]}]
    logits = subject.logits(subject.batch(rows))
    change = (logits[0, -1] - logits[1, -1]).abs().max().item()
    require(change > 1e-6, f"another image changes the last logits by {change:.1e}")
    return f"another image changes the last logits by {change:.1e}"


@promise("one hidden state per token")
def one_hidden_state_per_token(subject: Subject) -> str:
    batch = subject.batch(subject.ragged)
    with torch.no_grad():
        hidden = subject.model.base_model(**batch).last_hidden_state
    require(
        hidden.shape[:2] == batch["input_ids"].shape,
        f"{tuple(batch['input_ids'].shape)} tokens gave hidden states {tuple(hidden.shape)}",
    )
    return f"{tuple(hidden.shape)}"


@promise("placeholders, num_image_tokens and features have one count")
def counts_agree(subject: Subject) -> str:
    randomness = random.Random(0)
    sizes = [(randomness.randint(20, 90), randomness.randint(20, 90)) for _ in range(12)]
    estimate = subject.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    for (height, width), expected in zip(sizes, estimate, strict=True):
        batch = subject.batch([{"text": f"a {subject.image_token} b", "images": [subject.image(0, height, width)]}])
        found = (batch["input_ids"] == subject.image_token_id).sum().item()
        vision = {name: batch[name] for name in VISION_INPUTS if name in batch}
        with torch.no_grad():
            features = subject.model.get_image_features(**vision, return_dict=True).pooler_output
        base = subject.model.base_model
        if isinstance(base, ZooModel):
            (per_image,) = base.placeholders_of(list(features), vision)
        else:
            per_image = len(features[0])
        require(
            found == expected == per_image,
            f"{height}x{width}: {found} placeholders, estimate {expected}, features for {per_image}",
        )
    return f"{len(sizes)} sizes, {min(estimate)} to {max(estimate)} tokens"


@promise("a left-padded ragged batch equals its rows alone")
def batch_equals_rows(subject: Subject) -> str:
    together = subject.batch(subject.ragged)
    logits, answers = subject.logits(together), subject.generate(together)
    worst = ""
    for index, row in enumerate(subject.ragged):
        alone = subject.batch([row])
        length = alone["input_ids"].shape[1]
        worst = subject.close(logits[index, -length:], subject.logits(alone)[0], f"row {index}")
        require(torch.equal(answers[index], subject.generate(alone)[0]), f"row {index} is answered differently alone")
    return worst


@promise("eager and sdpa attention agree")
def attention_backends_agree(subject: Subject) -> str:
    batch = subject.batch(subject.ragged)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = copied(subject.model)
        model.set_attn_implementation(implementation)
        outputs.append(Subject(model, subject.processor, subject.tolerance).logits(batch))
    mask = batch["attention_mask"].bool()
    return subject.close(outputs[0][mask], outputs[1][mask], "eager and sdpa")


@promise("bfloat16 runs")
def bfloat16_runs(subject: Subject) -> str:
    model = copied(subject.model).to(torch.bfloat16)
    half = Subject(model, subject.processor, subject.tolerance)
    batch = half.batch(half.ragged)
    logits = half.logits(batch)
    require(logits.dtype == torch.bfloat16, f"logits come as {logits.dtype}")
    require(bool(torch.isfinite(logits[batch["attention_mask"].bool()]).all()), "logits are not finite")
    half.generate(batch)
    return ""


# --- generation ------------------------------------------------------------------------------------------------------


@promise("cached generation equals uncached")
def cache_changes_nothing(subject: Subject) -> str:
    batch = subject.batch(subject.ragged)
    plain, logits = subject.generate(batch, use_cache=False), subject.first_logits(batch, use_cache=False)
    for name, options in {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
    }.items():
        require(torch.equal(subject.generate(batch, **options), plain), f"a {name} cache changes the answer")
        subject.close(subject.first_logits(batch, **options), logits, f"first logits with a {name} cache")
    return "dynamic and static"


@promise("beams and return sequences repeat the right images")
def beams_and_samples(subject: Subject) -> str:
    batch = subject.batch(subject.ragged)
    beams = subject.generate(batch, num_beams=3, num_return_sequences=2)
    samples = subject.generate(batch, do_sample=True, top_k=1, num_return_sequences=2)
    for index, row in enumerate(subject.ragged):
        alone = subject.batch([row])
        own = subject.generate(alone, num_beams=3, num_return_sequences=2)
        require(torch.equal(beams[2 * index : 2 * index + 2], own), f"the beams of row {index} differ from its own")
        greedy = subject.generate(alone)[0]
        for sample in samples[2 * index : 2 * index + 2]:
            require(torch.equal(sample, greedy), f"a top-1 sample of row {index} differs from its greedy answer")
    return ""


@promise("two interleaved generations do not disturb each other")
def interleaved_generations(subject: Subject) -> str:
    first, second = subject.batch(subject.ragged[:1]), subject.batch(subject.ragged[1:])
    expected = subject.generate(first)

    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            subject.generate(second, max_new_tokens=3, min_new_tokens=3)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    found = subject.generate(first, stopping_criteria=[Interrupt()])
    require(torch.equal(found, expected), "another generation between the steps changes the answer")
    return ""


@promise("encoded images can be reused")
def encoded_images_are_reused(subject: Subject) -> str:
    batch = subject.batch(subject.ragged)
    vision = {name: batch[name] for name in VISION_INPUTS if name in batch}
    rest = {name: value for name, value in batch.items() if name not in vision}
    with torch.no_grad():
        encoded = subject.model.get_image_features(**vision, return_dict=True)
    expected = subject.generate(batch)
    several = subject.generate(batch, num_return_sequences=2, do_sample=True, top_k=1)
    found = subject.generate(
        rest, mm_encoder_outputs={"image": encoded}, num_return_sequences=2, do_sample=True, top_k=1
    )
    require(torch.equal(found, several), "samples from encoded images differ")
    again = subject.generate(rest, mm_encoder_outputs={"image": encoded})
    require(torch.equal(again, expected), "a second use of the encoded images differs")
    return ""


@promise("placeholders cannot be sampled")
def placeholders_are_not_sampled(subject: Subject) -> str:
    model = copied(subject.model)
    head = model.get_output_embeddings()
    with torch.no_grad():  # a head that wants nothing but the placeholder
        head.weight.zero_()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
        head.bias[subject.image_token_id] = 100.0
    answer = Subject(model, subject.processor, subject.tolerance).generate(subject.batch(subject.ragged))
    require(not bool((answer == subject.image_token_id).any()), "a placeholder was generated")
    return ""


# --- bad input -------------------------------------------------------------------------------------------------------


@promise("wrong counts raise with the cause named")
def wrong_counts_raise(subject: Subject) -> str:
    batch = subject.batch(subject.ragged[1:2])
    longer = torch.cat([batch["input_ids"], torch.full((1, 1), subject.image_token_id)], dim=1)
    shorter = batch["input_ids"].clone()
    shorter[shorter == subject.image_token_id] = subject.processor.tokenizer.eos_token_id
    for name, ids in (("one more placeholder", longer), ("no placeholder", shorter)):
        wrong = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            subject.logits(wrong)
        except ValueError as error:
            require("Image features and image tokens do not match" in str(error), f"{name}: '{error}'")
            if isinstance(subject.model, ZooPreTrainedModel):
                require("Likely cause" in str(error) and "row" in str(error), f"{name} is not explained: '{error}'")
        else:
            require(False, f"{name} was accepted")
    if isinstance(subject.model, ZooPreTrainedModel):
        alone = {name: batch[name] for name in ("input_ids", "attention_mask")}
        empty = {**alone, **{name: batch[name][:0] for name in VISION_INPUTS if name in batch}}
        for name, call, inputs in (("generate", subject.generate, alone), ("forward", subject.logits, empty)):
            try:
                call(inputs)
            except ValueError as error:
                require("images are missing" in str(error), f"{name} without images: '{error}'")
            else:
                require(False, f"{name} accepted placeholders without images")
    for text, images in (
        ("none", [subject.image()]),
        (f"{subject.image_token} two", [subject.image(), subject.image()]),
    ):
        try:
            subject.processor(text=[text], images=[images], return_tensors="pt")
        except ValueError:
            continue
        require(False, f"the processor accepted {len(images)} image(s) for '{text}'")
    return ""


@promise("every max_length gives a valid batch or a typed error")
def every_max_length(subject: Subject) -> str:
    row = subject.ragged[0]
    full = subject.batch([row])["input_ids"].shape[1]
    valid = 0
    for length in range(1, full + 2):
        try:
            batch = subject.processor(
                text=[row["text"]], images=[row["images"]], truncation=True, max_length=length, return_tensors="pt"
            )
        except ValueError:
            continue
        subject.logits(batch)
        valid += 1
    require(valid > 0, f"no max_length up to {full + 1} is accepted")
    return f"{valid} of {full + 1} lengths are valid, the others raise ValueError"


# --- training --------------------------------------------------------------------------------------------------------


@promise("gradient checkpointing keeps the loss and the gradients")
def gradient_checkpointing_keeps_the_loss(subject: Subject) -> str:
    batch = subject.batch(subject.ragged, side="right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == subject.image_token_id, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    results = []
    for checkpointing in (False, True):
        model = copied(subject.model).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)  # the same dropout
        loss = model(**batch, labels=labels).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (loss, others) = results
    require(abs(plain - loss) < 1e-5, f"loss {plain:.6f} without and {loss:.6f} with gradient checkpointing")
    require(gradients.keys() == others.keys(), f"gradients of {gradients.keys() ^ others.keys()} appear in one alone")
    worst = max((gradients[name] - others[name]).abs().max().item() for name in gradients)
    require(worst < subject.tolerance, f"gradients differ by {worst:.1e}")
    return f"loss {loss:.4f}, gradients differ by {worst:.1e}"


@promise("a TRL step trains exactly the declared parts")
def trl_trains_the_declared_parts(subject: Subject) -> str:
    subject.zoo_only("training by parts")
    details = []
    present = list(trainable_parts(subject.model))
    for parts in (["connector"], [part for part in present if part != "vision"], present):
        model = copied(subject.model)
        model.set_trainable_parts(parts)
        wanted = {part for part, count in trainable_parts(model).items() if count}
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            _trainer(subject, model, folder, data_collator=ZooDataCollator(subject.processor)).train()
        moved = {model.part_of(n) for n, p in model.named_parameters() if not torch.equal(before[n], p.detach())}
        require(moved == wanted, f"declared {sorted(wanted)}, trained {sorted(moved)}")
        details.append("+".join(parts))
    return "; ".join(details)


@promise("image tokens carry no label")
def image_tokens_carry_no_label(subject: Subject) -> str:
    rows = [dict(row) for row in subject.training_rows()]
    with tempfile.TemporaryDirectory() as folder:
        shipped = _trainer(subject, copied(subject.model), folder).data_collator
    for name, collator in (("the zoo's", ZooDataCollator(subject.processor)), ("TRL's", shipped)):
        batch = collator(copy.deepcopy(rows))
        labels = batch["labels"]
        require(bool((labels != -100).any()), f"{name} collator labels nothing")
        require(not bool((labels == subject.image_token_id).any()), f"{name} collator labels placeholders")
        require(not bool((labels[batch["attention_mask"] == 0] != -100).any()), f"{name} collator labels padding")
    return "the zoo's collator, and TRL's with the shipped settings"


def _trainer(subject: Subject, model: PreTrainedModel, folder: str, **kwargs) -> SFTTrainer:
    settings = SFTConfig(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=0,
        assistant_only_loss=True,
        max_length=None,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = subject.training_rows()
    return SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=subject.processor, **kwargs)


# --- saving ----------------------------------------------------------------------------------------------------------


@promise("config, processor and weights survive saving and loading")
def round_trip(subject: Subject) -> str:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        subject.processor.save_pretrained(folder)
        again, info = type(subject.model).from_pretrained(folder, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder)
        files = sorted(os.listdir(folder))
    problems = {name: keys for name, keys in info.items() if keys}
    require(not problems, f"loading reports {problems}")
    require(lasting(again.config.to_dict()) == lasting(subject.model.config.to_dict()), "the config changed")
    require(type(processor) is type(subject.processor), f"the processor came back as {type(processor).__name__}")
    require(processor.to_dict() == subject.processor.to_dict(), "the processor changed")
    require(processor.chat_template == subject.processor.chat_template, "the chat template changed")
    batch = subject.batch(subject.ragged)
    loaded = Subject(again.eval(), processor, subject.tolerance)
    same = loaded.batch(loaded.ragged)
    require(set(same) == set(batch) and all(torch.equal(same[name], batch[name]) for name in batch), "batches differ")
    require(torch.equal(loaded.logits(same), subject.logits(batch)), "logits differ after loading")
    return ", ".join(name for name in files if not name.endswith(".py"))


@promise("checkpoints carry their code through every door")
def checkpoints_carry_their_code(subject: Subject) -> str:
    """The model's own folder, a TRL checkpoint of it, and what a process without the zoo saved again from each: all
    are opened in a process without the zoo and must give the same logits."""
    subject.zoo_only("code in the checkpoint")
    batch = subject.batch(subject.ragged[:2])
    with tempfile.TemporaryDirectory() as root:
        plain, trained = f"{root}/plain", f"{root}/trained"
        subject.model.save_pretrained(plain)
        subject.processor.save_pretrained(plain)
        student = copied(subject.model)
        trainer = _trainer(subject, student, trained)
        trainer.train()
        trainer.save_model(trained)
        student = type(subject.model).from_pretrained(trained).eval()  # the trainer's own still runs under autocast
        save_file({name: value.contiguous() for name, value in batch.items()}, f"{root}/batch.safetensors")
        models = {"plain": subject.model, "trained": student}
        for generation in (0, 1):  # what was saved here, then what the foreign process saved
            _open_without_the_zoo(root, generation)
            for name, model in models.items():
                with torch.no_grad():
                    expected = {"hidden": model.base_model(**batch).last_hidden_state, "logits": model(**batch).logits}
                for door in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"):
                    found = load_file(f"{root}/{name}.{generation}.{door}.safetensors")
                    require(("logits" in found) == (door != "AutoModel"), f"{door} gave {sorted(found)}")
                    for what, values in found.items():
                        place = f"{name} checkpoint, generation {generation}, {what} through {door}"
                        subject.close(values, expected[what], place)
    return "own, TRL's, and both saved again elsewhere, through each of three doors and with their processors"


_FOREIGN = """
import json, sys
root, generation = sys.argv[1], int(sys.argv[2])
import torch, transformers
from safetensors.torch import load_file, save_file
assert "vlm_zoo" not in sys.modules
batch = load_file(f"{root}/batch.safetensors")
for name in ("plain", "trained"):
    folder = f"{root}/{name}" if generation == 0 else f"{root}/{name}.again"
    for door in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"):
        model = getattr(transformers, door).from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            hidden = model.base_model(**batch).last_hidden_state.contiguous()
        save_file({"hidden": hidden}, f"{root}/{name}.{generation}.{door}.safetensors")
        if door == "AutoModel":
            assert model.base_model is model, type(model)
            continue
        with torch.no_grad():
            logits = model(**batch).logits.contiguous()
        save_file({"hidden": hidden, "logits": logits}, f"{root}/{name}.{generation}.{door}.safetensors")
        model.save_pretrained(f"{root}/{name}.again")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    doors = set(config.auto_map)
    wanted = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
              "AutoModelForVision2Seq", "AutoProcessor"}
    assert wanted <= doors, wanted - doors
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__.endswith("Processor"), type(processor)
    transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.save_pretrained(f"{root}/{name}.again")
    assert "vlm_zoo" not in sys.modules
"""


def _open_without_the_zoo(root: str, generation: int) -> None:
    """Runs `_FOREIGN` in a process that cannot import the zoo: isolated, in another folder, the package blocked."""
    block = (
        "import importlib.abc, sys\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'vlm_zoo': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": f"{root}/modules", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    process = subprocess.run(
        [sys.executable, "-I", "-c", block + _FOREIGN, root, str(generation)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    last = process.stderr.strip().splitlines()[-1:] or [json.dumps(process.returncode)]
    require(process.returncode == 0, f"generation {generation} does not open without the zoo: {last[0]}")
