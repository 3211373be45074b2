"""`build`: any tower with any decoder, each of them as it was, in a folder that loads everywhere."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import trl
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ConvNextConfig,
    Dinov2WithRegistersConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Siglip2Config,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    T5Config,
)
from trl.chat_template_utils import get_training_chat_template

import vlm_zoo
from vlm_zoo import building
from vlm_zoo.building import BuildError, build
from vlm_zoo.chat_templates import plain_template
from vlm_zoo.models.parts_vlm import build_part, measure_tower
from vlm_zoo.testing import TINY_NATIVE_VISION, TINY_TEXT, TINY_VISION, tiny_tokenizer


# Each family's own template, as TRL ships it, and the special tokens in it; the last one ends a turn.
TEMPLATES = {
    "llama": ("llama3", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": ("qwen3", "<|im_start|>", "<|im_end|>"),
    "gemma3": ("gemma3", "<start_of_turn>", "<end_of_turn>"),
    "opt": (None,),
    "gpt2": (None,),
}
TOWERS = ("clip", "clip composite", "siglip", "siglip composite", "dinov2")
PAIRS = list(product(TOWERS, TEMPLATES))
_TEXT_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def make_tokenizer(family: str):
    template, *special = TEMPLATES[family]
    tokenizer = tiny_tokenizer(image_token=None)
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": special})
    if template:
        tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def save_language_model(folder: Path, family: str, tokenizer=None, **overrides) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(**{**TINY_TEXT[family], **overrides})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (tokenizer or make_tokenizer(family)).save_pretrained(folder)
    return folder


def make_tower(name: str):
    torch.manual_seed(2)
    kind = name.split()[0]
    if "composite" not in name:
        return AutoModel.from_config(AutoConfig.for_model(**TINY_VISION[kind]))
    if kind == "clip":
        return CLIPModel(CLIPConfig(vision_config=TINY_VISION[kind], text_config=_TEXT_TOWER, projection_dim=32))
    return SiglipModel(SiglipConfig(vision_config=TINY_VISION[kind], text_config=_TEXT_TOWER))


class Parts:
    """Tiny checkpoints and what is built of them, each made once."""

    def __init__(self, root: Path):
        self.root = root
        self.vision, self.language, self.built, self.reloaded = map(
            cache, (self._vision, self._language, self._built, self._reloaded)
        )

    def _vision(self, name: str) -> str:
        folder = self.root / "vision" / name
        make_tower(name).save_pretrained(folder)
        return str(folder)

    def _language(self, family: str) -> str:
        return str(save_language_model(self.root / "language" / family, family))

    def out(self, vision: str, family: str) -> Path:
        return self.root / "out" / f"{vision}-{family}"

    def _built(self, vision: str, family: str):
        return build("llava", self.vision(vision), self.language(family), self.out(vision, family))

    def _reloaded(self, vision: str, family: str):
        self.built(vision, family)
        out = self.out(vision, family)
        return AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    return Parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def image():
    return Image.effect_noise((50, 40), 60).convert("RGB")


def ask(processor, image):
    prompt = processor.apply_chat_template(_QUESTION, add_generation_prompt=True)
    return processor(images=[image], text=[prompt], return_tensors="pt")


# --- what the parts were ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "family"), PAIRS)
@torch.no_grad()
def test_text_gets_the_logits_of_the_language_model(parts, vision, family):
    model, processor = parts.built(vision, family)
    causal = AutoModelForCausalLM.from_pretrained(parts.language(family))
    batch = processor.tokenizer(["Hello there.", "A somewhat longer text."], padding=True, return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits, causal(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("vision", TOWERS)
@torch.no_grad()
def test_image_features_are_the_towers_own_hidden_states_through_the_connector(parts, vision):
    model, _ = parts.built(vision, "llama")
    tower = make_tower(vision)
    tower = getattr(tower, "vision_model", tower).eval()
    pixels = torch.randn(2, 3, 32, 32)
    prefix = 0 if vision.startswith("siglip") else 1
    hidden_states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, prefix:]
    features = torch.stack(list(model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(features, model.model.connector(hidden_states), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_tower_is_found_inside_a_vision_language_model(parts, tmp_path):
    config = LlavaConfig(vision_config=TINY_VISION["clip"], text_config=TINY_TEXT["llama"], image_token_index=300)
    other = LlavaForConditionalGeneration(config).eval()
    other.save_pretrained(tmp_path / "llava")
    model, _ = build("llava", tmp_path / "llava", parts.language("gpt2"))
    pixels = torch.randn(1, 3, 32, 32)
    expected = other.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.model.see(pixels)[1], expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["mrope", "vet"])
@pytest.mark.parametrize("vision", TINY_NATIVE_VISION)
def test_a_tower_of_patches_is_built_into_an_architecture_of_native_resolution(parts, tmp_path, image, vision, arch):
    tower = build_part(AutoConfig.for_model(**TINY_NATIVE_VISION[vision]), "vision tower")
    tower.save_pretrained(tmp_path / "vision")
    fields = {"hidden_stride": 2, "visual_vocab_size": 512} if arch == "vet" else {}
    model, processor = build(arch, tmp_path / "vision", parts.language("llama"), tmp_path / "built", **fields)
    batch = ask(processor, image)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "built")
    torch.testing.assert_close(model(**batch).logits, again(**batch).logits, rtol=0, atol=1e-6)
    kept = dict(model.model.vision_tower.named_parameters())
    assert kept and all(torch.equal(kept[name], dict(tower.named_parameters())[name]) for name in kept)


def test_a_tower_is_found_inside_a_model_of_native_resolution(parts, tmp_path):
    tiny = {name: TINY_NATIVE_VISION["qwen2_vl"][name] for name in ("depth", "embed_dim", "num_heads", "patch_size")}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {
        "intermediate_size": 32,
        "vocab_size": 40,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    }
    config = Qwen2VLConfig(vision_config={**tiny, "hidden_size": 32}, text_config=text)
    whole = Qwen2VLForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    model, _ = build("mrope", tmp_path / "whole", parts.language("llama"))
    name = "blocks.1.attn.qkv.weight"
    assert torch.equal(model.model.vision_tower.get_parameter(name), whole.model.visual.get_parameter(name))


def test_a_decoder_is_found_inside_a_vision_language_model(parts, tmp_path):
    config = Gemma3Config(
        vision_config=TINY_VISION["siglip"],
        text_config=TINY_TEXT["gemma3"],
        mm_tokens_per_image=4,
        image_token_index=300,
    )
    other = Gemma3ForConditionalGeneration(config).eval()
    other.save_pretrained(tmp_path / "gemma3")
    make_tokenizer("gemma3").save_pretrained(tmp_path / "gemma3")
    model, _ = build("llava", parts.vision("clip"), tmp_path / "gemma3")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_registers_count_as_prefix_tokens(parts, tmp_path):
    fields = {name: value for name, value in TINY_VISION["dinov2"].items() if name != "model_type"}
    config = Dinov2WithRegistersConfig(**fields, num_register_tokens=3)
    AutoModel.from_config(config).save_pretrained(tmp_path / "vision")
    model, processor = build("llava", tmp_path / "vision", parts.language("opt"))
    assert measure_tower(config) == (16, 4)
    assert model.config.num_prefix_tokens == processor.num_prefix_tokens == 4
    assert processor.num_image_tokens(40, 50) == 16


def test_parts_are_not_copied_in_memory(parts, monkeypatch):
    loaded = []
    load = building._load_language_model
    monkeypatch.setattr(building, "_load_language_model", lambda source: loaded.append(load(source)) or loaded[0])
    model, _ = build("llava", parts.vision("clip"), parts.language("qwen3"))
    expected = {parameter.data_ptr() for parameter in loaded[0].parameters()}
    assert {parameter.data_ptr() for parameter in model.model.language_model.parameters()} <= expected


def test_the_dtype_is_the_language_models_unless_given(parts, tmp_path):
    folder = save_language_model(tmp_path / "bf16", "llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    dtypes = [
        {parameter.dtype for parameter in build("llava", parts.vision("clip"), folder, dtype=dtype)[0].parameters()}
        for dtype in (None, "float32")
    ]
    assert dtypes == [{torch.bfloat16}, {torch.float32}]


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "family"), PAIRS)
@torch.no_grad()
def test_a_saved_model_gives_equal_logits(parts, image, vision, family):
    model, processor = parts.built(vision, family)
    reloaded, reloaded_processor = parts.reloaded(vision, family)
    expected = model(**ask(processor, image)).logits
    torch.testing.assert_close(reloaded(**ask(reloaded_processor, image)).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_saved_processor_is_the_built_one(parts, family):
    _, processor = parts.built("clip", family)
    _, reloaded = parts.reloaded("clip", family)
    assert reloaded.to_dict() == processor.to_dict()
    assert reloaded.chat_template == reloaded.tokenizer.chat_template == processor.chat_template
    assert reloaded.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map


def test_the_folder_holds_what_a_hub_repository_needs(parts):
    parts.built("siglip", "qwen3")
    files = {path.name for path in parts.out("siglip", "qwen3").iterdir()}
    assert files == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "configuration_vlm.py",
        "generation_config.json",
        "geometry_vlm.py",
        "image_processing_vlm.py",
        "layers.py",
        "llava.py",
        "model.safetensors",
        "modeling_vlm.py",
        "parts_vlm.py",
        "processing_vlm.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_vlm.py",
    }


def test_every_door_opens_the_folder(parts):
    parts.built("clip", "llama")
    out = parts.out("clip", "llama")
    head = vlm_zoo.ZOO["zoo_llava"].head
    for door in (AutoModelForImageTextToText, AutoModelForMultimodalLM, vlm_zoo.AutoModelForVision2Seq):
        assert type(door.from_pretrained(out)) is head
    assert type(AutoImageProcessor.from_pretrained(out)) is vlm_zoo.ZOO["zoo_llava"].image_processor
    assert set(json.loads((out / "config.json").read_text())["auto_map"]) > {"AutoConfig", "AutoModel"}


def test_the_folder_answers_where_the_zoo_is_not_installed(parts, image, tmp_path):
    model, processor = parts.built("dinov2", "llama")
    image.save(tmp_path / "image.png")
    code = (
        "import sys, torch; sys.modules['vlm_zoo'] = None\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "batch = processor(images=[Image.open('image.png')], text=['<image> What?'], return_tensors='pt')\n"
        "torch.save(model(**batch).logits.detach(), 'logits.pt')\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(parts.out("dinov2", "llama"))]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    batch = processor(images=[image], text=["<image> What?"], return_tensors="pt")
    expected = model(**batch).logits.detach()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_nothing_in_the_folder_says_where_the_parts_lay(parts):
    parts.built("clip", "opt")
    written = [path.read_bytes() for path in parts.out("clip", "opt").iterdir()]
    assert not any(str(parts.root).encode() in content for content in written)


def test_the_model_card_names_parts_doors_and_licences(parts):
    parts.built("clip composite", "qwen3")
    card = (parts.out("clip composite", "qwen3") / "README.md").read_text()
    for expected in ("`clip composite`", "`qwen3`", "`llava`", "AutoModelForVision2Seq", "AutoModelForMultimodalLM"):
        assert expected in card
    assert "licences of their\nsources" in card


def test_hub_ids_become_base_models_of_the_card(parts):
    model, _ = parts.built("clip", "qwen3")
    card = building._model_card(vlm_zoo.ZOO["zoo_llava"], "mine", "openai/clip", "Qwen/Qwen3-0.6B", model)
    assert "base_model:\n- Qwen/Qwen3-0.6B\n- openai/clip\n" in card


def test_a_folder_with_anything_in_it_is_refused(parts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match="is not empty"):
        build("llava", parts.vision("clip"), parts.language("llama"), tmp_path)


def test_overwrite_replaces_a_checkpoint_of_the_zoo_and_nothing_else(parts, tmp_path):
    parts.built("clip", "gpt2")
    out = tmp_path / "out"
    shutil.copytree(parts.out("clip", "gpt2"), out)
    (out / "stale.bin").write_text("old")
    build("llava", parts.vision("clip"), parts.language("gpt2"), out, overwrite=True)
    assert not (out / "stale.bin").exists() and (out / "config.json").exists()
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(BuildError, match="something else than a checkpoint of the zoo"):
        build("llava", parts.vision("clip"), parts.language("gpt2"), parts.language("gpt2"), overwrite=True)


def test_an_interrupted_save_leaves_nothing_behind(parts, tmp_path, monkeypatch):
    processor = vlm_zoo.ZOO["zoo_llava"].processor

    def interrupt(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(processor, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build("llava", parts.vision("clip"), parts.language("gpt2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_the_image_token_is_named_and_special(parts):
    model, _ = parts.built("clip", "llama")
    tokenizer = AutoTokenizer.from_pretrained(parts.out("clip", "llama"))
    assert tokenizer.image_token == "<image>"
    assert tokenizer.decode(tokenizer("a <image>")["input_ids"], skip_special_tokens=True) == "a "
    assert model.config.image_token_id == tokenizer.image_token_id


def test_special_tokens_of_the_language_model_stay(parts):
    _, processor = parts.reloaded("clip", "llama")
    assert set(TEMPLATES["llama"][1:]) <= set(processor.tokenizer.extra_special_tokens)


def test_a_special_token_that_exists_is_reused(parts, tmp_path):
    tokenizer = make_tokenizer("llama")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|vision|>"]}, replace_extra_special_tokens=False)
    folder = save_language_model(tmp_path / "lm", "llama", tokenizer)
    _, processor = build("llava", parts.vision("clip"), folder, image_token="<|vision|>")
    assert len(processor.tokenizer) == len(tokenizer)
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<|vision|>")


@pytest.mark.parametrize(("image_token", "use"), [("A", "an ordinary token"), ("</s>", "its eos_token")])
def test_a_token_with_a_meaning_is_refused_as_image_token(parts, image_token, use):
    with pytest.raises(BuildError, match=f"has a meaning already.*{use}"):
        build("llava", parts.vision("clip"), parts.language("llama"), image_token=image_token)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_full_vocabulary_grows_by_rows_at_the_mean(parts, tmp_path, family):
    size = len(make_tokenizer(family))
    folder = save_language_model(tmp_path / "lm", family, vocab_size=size)
    causal = AutoModelForCausalLM.from_pretrained(folder)
    model, processor = build("llava", parts.vision("clip"), folder, tmp_path / "out")
    new = processor.image_token_id
    assert new >= size and model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) > new
    for table, before in (
        (model.get_input_embeddings().weight, causal.get_input_embeddings().weight),
        (model.lm_head.weight, causal.lm_head.weight),
    ):
        torch.testing.assert_close(table[:size], before, rtol=0, atol=0)
        torch.testing.assert_close(table[new], before.mean(dim=0))
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(reloaded(input_ids=ids).logits[..., :size], causal(input_ids=ids).logits)


@pytest.mark.parametrize(("size", "expected"), [(262, 264), (256 + 64, 320)])
def test_the_vocabulary_stays_as_aligned_as_it_was(parts, tmp_path, size, expected):
    folder = save_language_model(tmp_path / "lm", "llama", vocab_size=size)  # ids 0 to 261 are taken
    assert build("llava", parts.vision("clip"), folder)[0].config.text_config.vocab_size == expected


def test_no_other_new_row_is_taken_for_an_image(parts, tmp_path):
    tokenizer = make_tokenizer("gpt2")
    tokenizer.pad_token = None
    folder = save_language_model(tmp_path / "lm", "gpt2", tokenizer, vocab_size=256, dtype="bfloat16")
    model, processor = build("llava", parts.vision("clip"), folder, dtype=torch.bfloat16)
    everything = model.get_input_embeddings()(torch.arange(model.config.text_config.vocab_size))[None]
    found = model.model.placeholder_mask(None, everything)[0].nonzero().flatten().tolist()
    assert found == [processor.image_token_id]


@pytest.mark.parametrize(
    ("pad", "unk", "expected"),
    [
        ("<s>", None, "<s>"),  # its own
        (None, "<s>", "<s>"),  # the unknown token
        ("</s>", None, "<pad>"),  # never the end of the sequence
        (None, "</s>", "<pad>"),
        ("<|eot_id|>", None, "<pad>"),  # nor the end of a turn
    ],
)
def test_padding_never_ends_a_turn(parts, tmp_path, caplog, pad, unk, expected):
    tokenizer = make_tokenizer("llama")
    tokenizer.pad_token, tokenizer.unk_token = pad, unk
    folder = save_language_model(tmp_path / "lm", "llama", tokenizer)
    model, processor = build("llava", parts.vision("clip"), folder)
    assert processor.tokenizer.pad_token == expected
    assert (
        model.generation_config.pad_token_id
        == model.config.text_config.pad_token_id
        == processor.tokenizer.pad_token_id
    )
    assert ("the built model pads with" in caplog.text) is (pad != expected)


# --- talking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_image_becomes_its_placeholders_where_the_message_has_it(parts, image, family):
    _, processor = parts.reloaded("clip", family)
    batch = ask(processor, image)
    ids = batch["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 16
    assert "What is this?" in processor.tokenizer.decode(ids[ids.index(processor.image_token_id) :])


@pytest.mark.parametrize("family", TEMPLATES)
def test_only_the_answer_and_its_end_are_learned(parts, image, family):
    _, processor = parts.reloaded("clip", family)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    learned = processor.tokenizer.decode(batch["input_ids"][batch["assistant_masks"].bool()])
    end = TEMPLATES[family][-1] or "</s>"
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert learned.strip() == f"{thought}A cat.{end}"


@pytest.mark.parametrize("family", TEMPLATES)
def test_trl_trains_with_the_template_as_it_is(parts, family):
    _, processor = parts.reloaded("clip", family)
    assert get_training_chat_template(processor) is None


@pytest.mark.parametrize("family", TEMPLATES)
def test_generation_stops_at_the_end_of_a_turn_and_samples_no_placeholder(parts, family):
    model, processor = parts.reloaded("clip", family)
    generation = model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    end = processor.tokenizer.convert_tokens_to_ids(TEMPLATES[family][-1] or "</s>")
    assert end in ends and 2 in ends
    assert generation.suppress_tokens == [processor.image_token_id] and generation.bos_token_id == 1


def test_the_language_models_way_to_generate_is_kept(parts, tmp_path):
    folder = save_language_model(tmp_path / "lm", "llama")
    causal = AutoModelForCausalLM.from_pretrained(folder)
    causal.generation_config.update(do_sample=True, temperature=0.6, top_k=20, suppress_tokens=[5])
    causal.generation_config.save_pretrained(folder)
    model, processor = build("llava", parts.vision("clip"), folder)
    generation = model.generation_config
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.6, 20)
    assert generation.suppress_tokens == [5, processor.image_token_id]


def test_sampling_flags_without_sampling_are_dropped(parts, tmp_path):
    folder = save_language_model(tmp_path / "lm", "gpt2")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}))
    model, _ = build("llava", parts.vision("clip"), folder, tmp_path / "out")
    assert (model.generation_config.temperature, model.generation_config.top_p) == (None, None)


def test_a_chat_template_can_be_given_as_file_or_text(parts, tmp_path):
    template = plain_template("<image>").replace("USER", "HUMAN")
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, tmp_path / "chat.jinja", str(tmp_path / "chat.jinja")):
        _, processor = build("llava", parts.vision("clip"), parts.language("llama"), chat_template=given)
        assert processor.chat_template == template


def test_the_chat_template_writes_videos_where_the_architecture_takes_clips(parts):
    _, processor = build("flamingo", parts.vision("clip"), parts.language("qwen3"))
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    assert "<video>\nWhat moves?" in processor.apply_chat_template(messages)
    _, processor = parts.built("clip", "qwen3")
    with pytest.raises(TemplateError, match="Content of type video: expected image or text"):
        processor.apply_chat_template(messages)


def test_a_chat_template_that_cannot_be_extended_asks_for_another(parts, tmp_path):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template += "{# a revision that nobody knows #}"
    folder = save_language_model(tmp_path / "lm", "qwen3", tokenizer)
    with pytest.raises(BuildError, match="--chat-template"):
        build("llava", parts.vision("clip"), folder)


def test_a_given_chat_template_that_does_not_exist_is_refused(parts):
    with pytest.raises(BuildError, match=r"cannot be read from 'nowhere\.jinja'"):
        build("llava", parts.vision("clip"), parts.language("llama"), chat_template="nowhere.jinja")


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_pixels_are_prepared_as_the_towers_folder_says(parts, tmp_path):
    shutil.copytree(parts.vision("clip"), tmp_path / "vision")
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2).save_pretrained(
        tmp_path / "vision"
    )
    _, processor = build("llava", tmp_path / "vision", parts.language("llama"))
    found = processor.image_processor
    assert (list(found.image_mean), list(found.image_std), found.resample) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 2)
    assert dict(found.size) == {"height": 32, "width": 32}


def test_the_preprocessing_inside_of_a_saved_processor_is_read_too(parts, tmp_path):
    shutil.copytree(parts.vision("clip composite"), tmp_path / "vision")
    saved = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}
    (tmp_path / "vision" / "processor_config.json").write_text(json.dumps(saved))
    _, processor = build("llava", tmp_path / "vision", parts.language("gpt2"))
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(("vision", "mean"), [("clip", 0.48145466), ("siglip composite", 0.5), ("dinov2", 0.485)])
def test_a_tower_without_a_preprocessing_config_gets_what_is_usual_for_its_type(parts, caplog, vision, mean):
    _, processor = build("llava", parts.vision(vision), parts.language("gpt2"))
    assert processor.image_processor.image_mean[0] == mean
    assert "brings no image_mean and image_std" in caplog.text


# --- options ---------------------------------------------------------------------------------------------------------


def test_fields_of_the_config_can_be_given(parts, image):
    pinpoints = [[32, 64], [64, 32]]
    model, processor = build(
        "zoo_llava",
        parts.vision("clip"),
        parts.language("llama"),
        vision_feature_layer=[-1, 0],
        projector_num_layers=1,
        image_grid_pinpoints=pinpoints,
    )
    assert model.model.connector.layers[0].in_features == 64 and len(model.model.connector.layers) == 1
    assert processor.image_processor.image_grid_pinpoints == pinpoints
    model(**ask(processor, image))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision_feature_lair": -1}, "has no field 'vision_feature_lair'; it has .*vision_feature_layer"),
        ({"image_token_id": 3}, "image_token_id cannot be given"),
        ({"vision_feature_layer": 7}, "vision_feature_layer 7 does not exist"),
        ({"dtype": "int8"}, "'int8' is not a dtype for weights"),
        ({"chat_template": "{{ 1 }}"}, "loses what was said"),
    ],
)
def test_options_that_make_no_sense_are_refused(parts, overrides, message):
    with pytest.raises(BuildError, match=message):
        build("llava", parts.vision("clip"), parts.language("llama"), **overrides)


def test_an_unknown_architecture_is_told_which_there_are():
    with pytest.raises(BuildError, match=r"Unknown architecture 'lava'; the zoo has .*llava"):
        build("lava", "vision", "language")


def test_both_parts_must_be_named(parts):
    with pytest.raises(BuildError, match="No language model was named"):
        build("llava", parts.vision("clip"))


# --- parts that do not fit -------------------------------------------------------------------------------------------


def save_config(folder: Path, config, **extra) -> Path:
    config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **extra}))
    return folder


def test_mixed_up_parts_are_recognised(parts):
    with pytest.raises(BuildError, match=r"The vision tower .*\(llama\) is a language model.*mixed up"):
        build("llava", parts.language("llama"), parts.vision("clip"))
    with pytest.raises(BuildError, match=r"The language model .*\(siglip_vision_model\) is a vision model.*mixed up"):
        build("llava", parts.vision("clip"), parts.vision("siglip"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "encoder-decoder, expected a decoder: trainers need one hidden state for every token"),
        (BertConfig(), "is an encoder, expected a decoder"),
        (LlavaConfig(), "none that AutoModelForCausalLM opens"),
    ],
)
def test_a_language_model_must_be_a_decoder(parts, tmp_path, config, message):
    with pytest.raises(BuildError, match=message):
        build("llava", parts.vision("clip"), save_config(tmp_path / "lm", config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Siglip2Config(), "patches of images of any size.*expected one that takes images of one size"),
        (ConvNextConfig(), "has no hidden_size"),
        (
            SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4),
            "makes 16 features of an image, expected 64",
        ),
    ],
)
def test_a_vision_tower_must_turn_one_image_into_its_patches(parts, tmp_path, config, message):
    folder = save_config(tmp_path / "vision", config)
    if isinstance(config, SwinConfig):
        AutoModel.from_config(config).save_pretrained(folder)
        CLIPImageProcessorPil().save_pretrained(folder)
    with pytest.raises(BuildError, match=message):
        build("llava", folder, parts.language("llama"))


def test_a_missing_folder_is_named(parts):
    with pytest.raises(
        BuildError, match="The vision tower is to be read from '/no/such/tower', but there is no such folder"
    ):
        build("llava", "/no/such/tower", parts.language("llama"))
    with pytest.raises(BuildError, match="The config of the language model cannot be read from 'no/such'"):
        build("llava", parts.vision("clip"), "no/such")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_model_without_a_tokenizer_is_refused(parts, tmp_path, family):
    shutil.copytree(parts.language(family), tmp_path / "lm", ignore=shutil.ignore_patterns("token*", "*.jinja"))
    with pytest.raises(BuildError, match="brings no tokenizer"):
        build("llava", parts.vision("clip"), tmp_path / "lm")


def test_a_quantised_part_is_refused(parts, tmp_path):
    config = AutoConfig.from_pretrained(parts.language("llama"))
    folder = save_config(tmp_path / "lm", config, quantization_config={"quant_method": "awq"})
    with pytest.raises(BuildError, match=r"is quantised\. Build from full-precision weights"):
        build("llava", parts.vision("clip"), folder)


def test_a_part_that_exists_only_as_remote_code_is_refused(parts, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "my_tower", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}})
    )
    with pytest.raises(BuildError, match="exists only as code of its own repository"):
        build("llava", tmp_path, parts.language("llama"))


@pytest.mark.parametrize("part", ["vision tower", "language model"])
def test_a_checkpoint_with_missing_weights_is_refused(parts, tmp_path, part):
    vision, language = parts.vision("clip"), parts.language("llama")
    source = Path(vision if part == "vision tower" else language)
    shutil.copytree(source, tmp_path / "part")
    content = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(
        json.dumps({**content, "num_hidden_layers": 4, "layer_types": None})
    )
    with pytest.raises(BuildError, match=f"The {part} .* lacks .* weights that its config asks for"):
        build("llava", *((tmp_path / "part", language) if part == "vision tower" else (vision, tmp_path / "part")))


def test_a_language_model_whose_logits_the_zoo_does_not_reproduce_is_refused(parts, monkeypatch):
    causal = type(AutoModelForCausalLM.from_pretrained(parts.language("llama")))
    forward = causal.forward

    def doubled(self, **kwargs):
        outputs = forward(self, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    monkeypatch.setattr(causal, "forward", doubled)
    with pytest.raises(BuildError, match="treats its logits as the zoo does not know"):
        build("llava", parts.vision("clip"), parts.language("llama"))
