"""What every architecture of the zoo does with every family of parts: build, train with TRL, save, open, answer."""

from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset, load_dataset
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig

from vlm_zoo import ZOO, BuildError, build, data
from vlm_zoo.models.multi_axis_vlm import MultiAxisConfig
from vlm_zoo.testing import TINY_TEXT, TINY_VISION, tiny_model, tiny_processor, tiny_tokenizer
from vlm_zoo.testing.promises import opened
from vlm_zoo.training import LeanSFTTrainer, ZooDataCollator


QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
WITHOUT_ROPE = ("opt", "gpt2")
PAIRS = [("clip", text) for text in TINY_TEXT] + [(vision, "llama") for vision in TINY_VISION if vision != "clip"]


def picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8, generator=generator).numpy())


def rows(count: int = 4) -> list[dict]:
    return [
        {
            "images": [picture(seed)],
            "messages": [
                {"role": "user", "content": f"What is number {seed}?"},
                {"role": "assistant", "content": "A cat." if seed % 2 else "Two dogs."},
            ],
        }
        for seed in range(count)
    ]


@pytest.fixture(scope="module", params=ZOO)
def folder(request, tmp_path_factory):
    """A saved tiny model of each architecture, with open gates, and its processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("folder") / request.param
    model = opened(tiny_model(request.param))
    model.save_pretrained(path)
    tiny_processor(request.param, model.config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of towers and language models, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("parts"), {}

    def part(kind: str, name: str):
        if (kind, name) not in made:
            made[kind, name] = root / kind / name
            if kind == "vision":
                AutoModel.from_config(AutoConfig.for_model(**TINY_VISION[name])).save_pretrained(made[kind, name])
            else:
                config = AutoConfig.for_model(**TINY_TEXT[name])
                AutoModelForCausalLM.from_config(config).save_pretrained(made[kind, name])
                tiny_tokenizer(image_token=None).save_pretrained(made[kind, name])
        return made[kind, name]

    return part


def trained_parts(trainer) -> set[str]:
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = trainer.model.named_parameters()
    return {trainer.model.part_of(name) for name, p in after if not torch.equal(before[name], p.detach())}


def options(model_type: str, text: str) -> dict:
    """Fields for tiny parts; positions on three axes are rotary."""
    has_axes = issubclass(ZOO[model_type].config, MultiAxisConfig)
    axes = {"mrope_layout": "none"} if has_axes and text in WITHOUT_ROPE else {}
    return {**ZOO[model_type].config.small_fields(32), **axes}


@pytest.mark.parametrize(("vision", "text"), PAIRS)
@pytest.mark.parametrize("model_type", ZOO)
def test_any_parts_are_built_trained_saved_and_answer_alike_after_loading(model_type, vision, text, parts, tmp_path):
    fields = options(model_type, text)
    build(model_type, parts("vision", vision), parts("text", text), tmp_path / "built", **fields)
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, assistant_only_loss=True, max_length=None, **QUIET
    )
    trainer = LeanSFTTrainer(model=str(tmp_path / "built"), args=settings, train_dataset=Dataset.from_list(rows()))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    batch = processor(images=[picture(7)], text=[prompt], return_tensors="pt")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    answers = [
        model.eval().float().generate(**batch, max_new_tokens=4, do_sample=False) for model in (trainer.model, again)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("text", TINY_TEXT)
@pytest.mark.parametrize("model_type", ZOO)
@torch.no_grad()
def test_a_built_model_keeps_the_logits_of_its_language_model(model_type, text, parts):
    model, processor = build(model_type, parts("vision", "clip"), parts("text", text), **options(model_type, text))
    batch = processor.tokenizer(["Hello there.", "A somewhat longer text."], padding=True, return_tensors="pt")
    causal = AutoModelForCausalLM.from_pretrained(parts("text", text))
    torch.testing.assert_close(model(**batch).logits, causal(**batch).logits, rtol=0, atol=1e-6)


def test_preference_training_moves_every_part(folder, tmp_path):
    pairs = load_dataset(str(data.path("emoji_preference")), split="train").select(range(4))
    settings = DPOConfig(output_dir=str(tmp_path), max_steps=1, max_length=None, learning_rate=1e-2, **QUIET)
    trainer = DPOTrainer(model=str(folder), args=settings, train_dataset=pairs)
    assert trained_parts(trainer) >= {"vision", "connector", "language"}


def test_group_relative_training_samples_and_trains(folder, tmp_path):
    def reward_some(completions, **kwargs):
        return [float(index % 2) for index in range(len(completions))]

    settings = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=6,
        learning_rate=1e-2,
        beta=0.1,
        **QUIET,
    )
    prompts = [{"images": row["images"], "prompt": row["messages"][:1]} for row in rows(2)]
    trainer = GRPOTrainer(
        model=str(folder), args=settings, reward_funcs=reward_some, train_dataset=Dataset.from_list(prompts)
    )
    assert trained_parts(trainer) >= {"vision", "connector", "language"}


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed, and GRPO's use_vllm needs it")
def test_group_relative_training_samples_through_vllm(folder, tmp_path):
    if AutoConfig.from_pretrained(folder).model_type == "zoo_flamingo":
        pytest.skip("vLLM's transformers backend serves no model whose decoder has cross-attention")
    settings = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_generations=2, per_device_train_batch_size=2, use_vllm=True,
        vllm_mode="colocate", max_completion_length=6, report_to=[], trust_remote_code=True,
    )  # fmt: skip
    prompts = [{"images": row["images"], "prompt": row["messages"][:1]} for row in rows(2)]
    trainer = GRPOTrainer(
        model=str(folder), args=settings, reward_funcs=lambda completions, **kwargs: [0.0, 1.0],
        train_dataset=Dataset.from_list(prompts),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


def test_placeholders_are_never_labelled(folder):
    processor = AutoProcessor.from_pretrained(folder)
    batch = ZooDataCollator(processor, assistant_only_loss=False)(rows(2))
    placeholders = batch["input_ids"] == processor.image_token_id
    assert placeholders.any() and (batch["labels"][placeholders] == -100).all()


def test_a_part_taken_from_another_checkpoint_replaces_that_part_alone(folder):
    model_type = AutoConfig.from_pretrained(folder).model_type
    other = opened(tiny_model(model_type))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    own = AutoModelForImageTextToText.from_pretrained(folder)
    other.save_pretrained(folder.parent / f"{model_type}.other")
    mixed = type(own).from_pretrained(folder, parts_from={"connector": str(folder.parent / f"{model_type}.other")})
    sources = {name: (p, dict(other.named_parameters())[name]) for name, p in own.named_parameters()}
    for name, parameter in mixed.named_parameters():
        assert torch.equal(parameter, sources[name][mixed.part_of(name) == "connector"]), name


def test_a_part_of_another_shape_is_refused(folder, tmp_path):
    model_type = AutoConfig.from_pretrained(folder).model_type
    wider = {**TINY_VISION["clip"], "hidden_size": 64}
    tiny_model(model_type, vision_config=wider).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"connector of .* does not fit"):
        ZOO[model_type].head.from_pretrained(folder, parts_from={"connector": str(tmp_path)})
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        ZOO[model_type].head.from_pretrained(folder, parts_from={"connector": str(tmp_path / "nowhere")})


@pytest.mark.parametrize("model_type", ZOO)
def test_an_encoder_decoder_is_refused_by_the_config(model_type):
    with pytest.raises(StrictDataclassClassValidationError, match="encoder-decoder, expected a decoder"):
        ZOO[model_type].config(text_config={"model_type": "t5"})


def test_a_model_that_reads_the_question_is_not_built_where_no_question_can_be_read(parts, tmp_path):
    small = ZOO["zoo_blip2"].config.small_fields(32)
    bare = tmp_path / "bare.jinja"
    bare.write_text(
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    sources = parts("vision", "clip"), parts("text", "llama")
    with pytest.raises(BuildError, match=r"No question about an image passes .* no response_token_ids"):
        build("blip2", *sources, chat_template=bare, text_conditioned=True, **small)
    with pytest.raises(BuildError, match=r"No question about an image passes .* needs qformer_input_ids"):
        build("blip2", *sources, text_conditioned=True, qformer_vocab_size=100, **small)
