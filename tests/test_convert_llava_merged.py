"""LLaVA checkpoints that hold no whole model: delta weights, LoRA adapters and projectors, merged with their base."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

from conversion import blip2, engine, flamingo, llava, llava_merged, mrope, vet
from conversion.engine import ConversionError
from vlm_zoo.testing.tiny import tiny_tokenizer


ORACLES = Path(__file__).parent / "oracles"
WHOLE = ORACLES / "llava_v15"
CONFIG = json.loads((WHOLE / "ckpt_bin" / "config.json").read_text())
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TARGETS = ["q_proj", "v_proj", "down_proj"]
QUERY = "model.layers.0.self_attn.q_proj"
TRAINED = llava_merged.TRAINED


def weights(folder):
    tensors = {}
    for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]):
        if path.name != engine.DROPPED:
            tensors |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return tensors


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def whole_tensors():
    return weights(WHOLE / "ckpt_bin")


def projector_tensors():
    return {name: tensor for name, tensor in whole_tensors().items() if "mm_projector" in name}


def write(folder, tensors, shards=1, zipped=True, **config):
    """A folder of LLaVA's own, of weights in one file or several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "mm_vision_tower": "clip-tiny", **config}))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        torch.save({name: tensors[name] for name in part}, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def language_model(**fields):
    """A tiny language model of the checkpoint's shapes."""
    known = LlamaConfig().to_dict().keys() - {"dtype"}
    config = LlamaConfig(**{**{name: value for name, value in CONFIG.items() if name in known}, **fields})
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture
def home(tmp_path):
    """A folder with the tower, and `base`, a language model."""
    shutil.copytree(WHOLE / "clip-tiny", tmp_path / "clip-tiny")
    language_model().save_pretrained(tmp_path / "base")
    return tmp_path


@pytest.fixture
def delta(home):
    base = weights(home / "base")
    tensors = {name: tensor - base.get(name, 0) for name, tensor in whole_tensors().items()}
    return write(home / "delta", tensors)


def save_adapter(home, model, **fields):
    """A folder that training with LoRA leaves, and the language model that PEFT merges from it."""
    settings = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields}
    )
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(home / "lora")
    config = {**CONFIG, "torch_dtype": str(model.dtype).removeprefix("torch.")}
    (home / "lora" / "config.json").write_text(json.dumps(config))
    trained = {f"base_model.model.{name}": tensor for name, tensor in projector_tensors().items()}
    torch.save(trained, home / "lora" / TRAINED)
    return adapted.merge_and_unload().state_dict()


@pytest.fixture
def adapter(home):
    model = LlamaForCausalLM.from_pretrained(home / "base")
    save_adapter(home, model)
    return home / "lora"


def edit_settings(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_adapter(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def language_tensors(folder):
    """The language model of a zoo folder, by its own names."""
    return {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in weights(folder).items()
        if name.startswith(("model.language_model.", "lm_head."))
    }


def problems_of(home, source, **options):
    with pytest.raises(ConversionError) as caught:
        llava.convert(source, home / "zoo", **options)
    assert not (home / "zoo").exists()
    return caught.value.problems


# --- delta weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (1, False), (3, True)])
def test_delta_weights_become_the_sum_with_their_base(shards, zipped, home):
    base = weights(home / "base")
    delta = {name: torch.randn_like(tensor) * 0.2 for name, tensor in whole_tensors().items()}
    write(home / "delta", delta, shards, zipped)
    write(home / "sum", {name: tensor + base.get(name, 0) for name, tensor in delta.items()})
    report = llava.convert(home / "delta", home / "zoo", base_model=home / "base")
    llava.convert(home / "sum", home / "expected", verify=False)
    assert report["passed"]
    assert same_bits(weights(home / "zoo"), weights(home / "expected"))


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_one_of_half_precision_where_the_delta_is(base_dtype, home):
    base = language_model().to(base_dtype)
    base.save_pretrained(home / "base")
    delta = {name: torch.randn_like(tensor).half() for name, tensor in whole_tensors().items()}
    write(home / "delta", delta, torch_dtype="float16")
    llava.convert(home / "delta", home / "zoo", base_model=home / "base", verify=False)
    expected = {name: delta[name].clone() for name in base.state_dict()}
    for name, tensor in base.half().state_dict().items():
        expected[name] += tensor
    found = language_tensors(home / "zoo")
    assert same_bits({name: tensor[: len(expected[name])] for name, tensor in found.items()}, expected)


def test_a_base_without_the_added_tokens_adds_to_the_first_rows_only(home, delta):
    base = language_model(vocab_size=CONFIG["vocab_size"] - 3)
    base.save_pretrained(home / "base")
    before = torch.load(delta / "pytorch_model.bin", weights_only=True)
    llava.convert(delta, home / "zoo", base_model=home / "base", verify=False)
    found = language_tensors(home / "zoo")
    for name in (EMBEDDINGS, HEAD):
        rows = found[name][: CONFIG["vocab_size"]]
        assert torch.equal(rows[-3:], before[name][-3:])
        assert torch.equal(rows[:-3], before[name][:-3] + base.state_dict()[name])


def test_projector_and_tower_are_no_delta(home):
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor + 1
        for name, tensor in weights(WHOLE / "clip-tiny").items()
    }
    write(home / "delta", {**whole_tensors(), **tower})
    llava.convert(home / "delta", home / "zoo", base_model=home / "base", verify=False)
    llava.convert(home / "delta", home / "whole", verify=False)
    found, expected = weights(home / "zoo"), weights(home / "whole")
    same = {name for name in found if torch.equal(found[name], expected[name])}
    assert same == {name for name in found if name.startswith(("model.vision_tower.", "model.connector."))}


def test_buffers_of_old_files_need_no_counterpart(home, delta):
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = torch.load(delta / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, buffer: torch.rand(4)}, delta / "pytorch_model.bin")
    assert llava.convert(delta, home / "zoo", base_model=home / "base")["passed"]


def test_the_first_releases_call_themselves_llama(home, delta):
    write(home / "first", torch.load(delta / "pytorch_model.bin", weights_only=True), model_type="llama")
    assert llava.convert(home / "first", home / "zoo", base_model=home / "base")["passed"]


def test_a_base_of_other_shapes_is_refused(home, delta):
    language_model(intermediate_size=40).save_pretrained(home / "base")
    (*_, last) = found = problems_of(home, delta, base_model=home / "base")["wrong shape"]
    assert len(found) == 6
    assert last == "model.layers.1.mlp.down_proj.weight is [32, 48], the base's is [32, 40]"


def test_a_base_of_more_rows_is_refused(home, delta):
    language_model(vocab_size=CONFIG["vocab_size"] + 3).save_pretrained(home / "base")
    assert len(problems_of(home, delta, base_model=home / "base")["wrong shape"]) == 2


def test_a_base_of_another_depth_is_refused(home, delta):
    language_model(num_hidden_layers=3).save_pretrained(home / "deeper")
    language_model(num_hidden_layers=1).save_pretrained(home / "flatter")
    found = problems_of(home, delta, base_model=home / "deeper")["only in the base"]
    assert len(found) == 9 and all(name.startswith("model.layers.2.") for name in found)
    found = problems_of(home, delta, base_model=home / "flatter")["missing in the base"]
    assert len(found) == 9 and all(name.startswith("model.layers.1.") for name in found)


def test_a_llava_is_no_base_of_a_delta(home, delta):
    whole = write(home / "whole", {**weights(home / "base"), **projector_tensors()})
    assert problems_of(home, delta, base_model=whole) == {"only in the base": list(projector_tensors())}


def test_a_base_model_means_nothing_to_a_checkpoint_of_transformers(home):
    with pytest.raises(ConversionError, match="--base-model means nothing"):
        llava.convert(ORACLES / "hf457_llava", home / "zoo", base_model=home / "base")


def test_delta_and_base_are_opened_once_a_shard_however_they_are_cut(home, monkeypatch):
    tensors = whole_tensors()
    base = {name: tensor for name, tensor in tensors.items() if not llava_merged.OWN.match(name)}
    write(home / "delta", tensors, shards=3)
    write(home / "llama", base, shards=4, model_type="llama")
    found = llava_merged.read_weights(home / "delta", home / "llama").tensors
    opened, load = [], engine._load_pickle
    monkeypatch.setattr(engine, "_load_pickle", lambda path, **kwargs: opened.append(path) or load(path, **kwargs))
    dict(engine.read_tensors(found))
    assert len(opened) <= 3 + 4 + 3


def test_no_more_files_are_open_than_one_tensor_needs(home, monkeypatch):
    tensors = whole_tensors()
    base = {name: tensor for name, tensor in tensors.items() if not llava_merged.OWN.match(name)}
    write(home / "delta", tensors, shards=3)
    write(home / "llama", base, shards=4, model_type="llama")
    found, load, alive = llava_merged.read_weights(home / "delta", home / "llama").tensors, engine._load_pickle, set()

    class Shard(dict):
        def __init__(self, path, content):
            super().__init__(content)
            self.path = path
            alive.add(path)

        def __del__(self):
            alive.discard(self.path)

    monkeypatch.setattr(engine, "_load_pickle", lambda path, **kwargs: Shard(path, load(path, **kwargs)))
    counts = {len(alive) for _ in engine.read_tensors(found)}
    assert max(counts) == 2


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"layers.0.+v_proj": 5}},
        {"target_modules": r".*\.layers\.1\..*(k|o)_proj"},
        {"target_modules": [*TARGETS, "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    ],
    ids=str,
)
def test_an_adapter_is_merged_as_peft_merges_it(fields, home):
    expected = save_adapter(home, LlamaForCausalLM.from_pretrained(home / "base"), **fields)
    report = llava.convert(home / "lora", home / "zoo", base_model=home / "base")
    found = language_tensors(home / "zoo")
    difference = max((found[name][: len(expected[name])] - expected[name]).abs().max().item() for name in expected)
    print(f"largest difference of a weight: {difference:.1e}")
    assert report["passed"]
    assert difference <= 1e-7
    base = weights(home / "base")
    assert any(not torch.equal(found[name][: len(base[name])], base[name]) for name in base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_of_half_precision_is_rounded_once(dtype, home):
    language_model().to(dtype).save_pretrained(home / "base")
    base = LlamaForCausalLM.from_pretrained(home / "base", dtype=dtype)
    save_adapter(home, base)
    llava.convert(home / "lora", home / "zoo", base_model=home / "base", verify=False)
    change = load_file(home / "lora" / "adapter_model.safetensors")
    down, up = (change[f"base_model.model.{QUERY}.lora_{half}.weight"].double() for half in "AB")
    exact = weights(home / "base")[f"{QUERY}.weight"].double() + 3 * up @ down
    found = language_tensors(home / "zoo")[f"{QUERY}.weight"]
    assert found.dtype == dtype
    assert torch.equal(found, exact.float().to(dtype))


def test_a_weight_that_lies_transposed_gets_the_product_transposed():
    weight, down, up = torch.randn(6, 4), torch.randn(2, 6), torch.randn(4, 2)
    merged = llava_merged.AddLowRank(0.5, True)([weight, down, up])
    torch.testing.assert_close(merged, weight + 0.5 * (up @ down).T)


def test_what_was_trained_without_lora_replaces_the_base(home, adapter):
    others = torch.load(adapter / TRAINED, weights_only=True)
    embeddings = torch.randn(CONFIG["vocab_size"], CONFIG["hidden_size"])
    torch.save({**others, f"base_model.model.{EMBEDDINGS}": embeddings}, adapter / TRAINED)
    llava.convert(adapter, home / "zoo", base_model=home / "base", verify=False)
    found = weights(home / "zoo")
    rows = found["model.language_model.embed_tokens.weight"][: CONFIG["vocab_size"]]
    assert torch.equal(rows, embeddings)
    assert torch.equal(found["model.connector.layers.0.bias"], whole_tensors()["model.mm_projector.0.bias"])


def test_an_adapter_on_a_whole_llava_keeps_its_projector(home, adapter):
    (adapter / TRAINED).unlink()
    write(home / "whole", whole_tensors())
    llava.convert(adapter, home / "zoo", base_model=home / "whole", verify=False)
    found = weights(home / "zoo")["model.connector.layers.0.bias"]
    assert torch.equal(found, whole_tensors()["model.mm_projector.0.bias"])


@pytest.mark.parametrize("name", ["../base", "base", "absolute"])
def test_an_adapter_names_its_base_itself(name, home, adapter):
    edit_settings(adapter, base_model_name_or_path=str(home / "base") if name == "absolute" else name)
    llava.convert(adapter, home / "zoo", verify=False)
    llava.convert(adapter, home / "expected", base_model=home / "base", verify=False)
    assert same_bits(weights(home / "zoo"), weights(home / "expected"))


def test_a_base_that_is_nowhere_is_named(home, adapter):
    edit_settings(adapter, base_model_name_or_path="nobody/nothing")
    with pytest.raises(ConversionError, match=r"'nobody/nothing' is neither beside .* name it with --base-model"):
        llava.convert(adapter, home / "zoo")


def test_adapters_of_pytorch_are_read_too(home, adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    llava.convert(adapter, home / "expected", base_model=home / "base", verify=False)
    (adapter / "adapter_model.safetensors").unlink()
    llava.convert(adapter, home / "zoo", base_model=home / "base", verify=False)
    assert same_bits(weights(home / "zoo"), weights(home / "expected"))


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.q_proj.lora_A.weight", "model.norm.lora_magnitude_vector"])
def test_an_adapter_tensor_that_meets_no_base_tensor_is_named(name, home, adapter):
    edit_adapter(adapter, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(4, 32)}))
    found = problems_of(home, adapter, base_model=home / "base")["no tensor in the base"]
    assert found == [name.removesuffix(".weight")]


def test_half_an_adapter_is_named(home, adapter):
    edit_adapter(adapter, lambda tensors: tensors.pop(f"base_model.model.{QUERY}.lora_B.weight"))
    found = problems_of(home, adapter, base_model=home / "base")
    assert found == {"without its other half": [f"{QUERY}.lora_A"]}


def test_a_module_that_lacks_its_adapter_is_named(home, adapter):
    def edit(tensors):
        for half in "AB":
            del tensors[f"base_model.model.{QUERY}.lora_{half}.weight"]

    edit_adapter(adapter, edit)
    assert problems_of(home, adapter, base_model=home / "base") == {"missing": [f"{QUERY}.lora_A and B"]}


def test_another_rank_than_the_config_says_is_refused(home, adapter):
    edit_settings(adapter, rank_pattern={"layers.0.self_attn.q_proj": 2})
    (found,) = problems_of(home, adapter, base_model=home / "base")["wrong shape"]
    assert found == f"{QUERY}.weight is [32, 32], lora_A [4, 32], lora_B [32, 4], r = 2"


def test_a_base_of_other_shapes_is_refused_for_an_adapter(home, adapter):
    language_model(intermediate_size=40).save_pretrained(home / "base")
    assert len(problems_of(home, adapter, base_model=home / "base")["wrong shape"]) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"something_new": 1},
        {"r": 0},
        {"lora_alpha": None},
    ],
    ids=str,
)
def test_what_is_more_than_lora_is_refused_by_name(fields, home, adapter):
    edit_settings(adapter, **fields)
    (found,) = problems_of(home, adapter, base_model=home / "base")["refused"]
    assert found.startswith(next(iter(fields)))


def test_another_method_than_lora_is_refused(home, adapter):
    edit_settings(adapter, peft_type="IA3")
    with pytest.raises(ConversionError, match="peft_type is 'IA3'"):
        llava.convert(adapter, home / "zoo", base_model=home / "base")


def test_trained_biases_that_are_not_in_the_files_are_refused(home, adapter):
    base = weights(home / "base")
    tensors = {**base, f"{QUERY}.bias": torch.ones(32)}
    save_file(tensors, home / "base" / "model.safetensors")
    edit_settings(adapter, bias="lora_only")
    found = problems_of(home, adapter, base_model=home / "base")
    assert found == {"missing": [f"{QUERY}.bias, since bias is 'lora_only'"]}


def test_a_saved_module_that_is_not_in_the_files_is_refused(home, adapter):
    edit_settings(adapter, modules_to_save=["lm_head"])
    found = problems_of(home, adapter, base_model=home / "base")
    assert found == {"missing": ["lm_head, of modules_to_save"]}


def test_a_tensor_that_was_saved_twice_is_refused(home, adapter):
    others = torch.load(adapter / TRAINED, weights_only=True)
    torch.save({**others, "model.mm_projector.0.bias": torch.ones(32)}, adapter / TRAINED)
    (found,) = problems_of(home, adapter, base_model=home / "base")["duplicated"]
    assert found.startswith("model.mm_projector.0.bias from base_model.model.model.mm_projector.0.bias and ")


def test_an_adapter_beside_whole_weights_is_refused(home, adapter):
    torch.save(whole_tensors(), adapter / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"both weights .* and an adapter"):
        llava.convert(adapter, home / "zoo", base_model=home / "base")


def test_half_a_folder_of_an_adapter_is_refused(home, adapter):
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ConversionError, match="part of an adapter"):
        llava.convert(adapter, home / "zoo", base_model=home / "base")


# --- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stage(home):
    """A folder of the first stage: a projector and a config."""
    write(home / "stage", {})
    (home / "stage" / "pytorch_model.bin").unlink()
    torch.save(projector_tensors(), home / "stage" / "mm_projector.bin")
    return home / "stage"


def test_a_projector_alone_completes_its_language_model(home, stage):
    report = llava.convert(stage, home / "zoo", base_model=home / "base")
    write(home / "whole", {**weights(home / "base"), **projector_tensors()})
    llava.convert(home / "whole", home / "expected", verify=False)
    assert report["passed"]
    assert same_bits(weights(home / "zoo"), weights(home / "expected"))


@pytest.mark.parametrize("count", [2, CONFIG["vocab_size"]])
def test_embeddings_beside_a_projector_replace_the_last_rows(count, home, stage):
    rows = torch.randn(count, CONFIG["hidden_size"])
    torch.save({**projector_tensors(), EMBEDDINGS: rows}, stage / "mm_projector.bin")
    llava.convert(stage, home / "zoo", base_model=home / "base", verify=False)
    found = language_tensors(home / "zoo")[EMBEDDINGS][: CONFIG["vocab_size"]]
    assert torch.equal(found[-count:], rows)
    assert torch.equal(found[:-count], weights(home / "base")[EMBEDDINGS][:-count])


def test_a_projector_alone_asks_for_its_language_model(home, stage):
    with pytest.raises(ConversionError, match="--base-model names the language model"):
        llava.convert(stage, home / "zoo")


# --- what all of them share ------------------------------------------------------------------------------------------


def test_the_tokenizer_is_the_bases_where_the_source_has_none(home, adapter):
    tokenizer = tiny_tokenizer(image_token=None)
    tokenizer.save_pretrained(home / "base")
    size = {"vocab_size": len(tokenizer)}
    language_model(**size).save_pretrained(home / "base")
    (adapter / "config.json").write_text(json.dumps({**CONFIG, **size}))
    report = llava.convert(adapter, home / "zoo", base_model=home / "base")
    assert report["passed"]
    assert AutoProcessor.from_pretrained(home / "zoo").image_token_id == len(tokenizer)


def test_the_card_says_what_was_merged(home, delta):
    llava.convert(delta, home / "zoo", base_model=home / "base")
    assert "the sum of its delta weights and the base model `base`" in (home / "zoo" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["delta", "adapter", "stage"])
def test_every_tensor_of_a_merged_source_is_a_computed_one(kind, home, request):
    source = request.getfixturevalue(kind)
    tensors = llava.open_source(source, base_model=home / "base").tensors
    language = [info for name, info in tensors.items() if not name.startswith("vision tower: ")]
    assert len(language) >= 25 and all(info.combine is not None for info in language)


@pytest.mark.parametrize("kind", ["delta", "adapter", "stage"])
def test_the_way_back_holds_the_merged_weights(kind, home, request):
    source = request.getfixturevalue(kind)
    llava.convert(source, home / "zoo", base_model=home / "base")
    assert llava.reverse(home / "zoo", home / "back")["passed"]
    llava.convert(home / "back", home / "again")
    assert same_bits(weights(home / "zoo"), weights(home / "again"))


def test_a_folder_may_hold_the_checkpoint_its_base_and_its_tower(home):
    language_model().save_pretrained(home / "parts" / "llama")
    write(home / "parts" / "delta", whole_tensors())
    shutil.copytree(home / "clip-tiny", home / "parts" / "clip-tiny")
    report = llava.convert(home / "parts", home / "zoo", base_model=home / "parts" / "llama")
    assert report["passed"]


@pytest.mark.parametrize("name", ["adapter_model.bin", TRAINED])
def test_an_adapter_with_code_is_refused_and_not_run(name, home, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Exploit(home / "run")}, adapter / "adapter_model.bin")
    if name == TRAINED:
        torch.save({}, adapter / "adapter_model.bin")
        torch.save({"weight": Exploit(home / "run")}, adapter / TRAINED)
    with pytest.raises(ConversionError, match=f"{name} is refused"):
        llava.convert(adapter, home / "zoo", base_model=home / "base")
    assert not (home / "run").exists()


def test_a_projector_and_a_base_with_code_are_refused_and_not_run(home, stage):
    write(home / "evil", {"weight": Exploit(home / "run")})
    with pytest.raises(ConversionError, match=r"pytorch_model.bin is refused"):
        llava.convert(stage, home / "zoo", base_model=home / "evil")
    torch.save({"weight": Exploit(home / "run")}, stage / "mm_projector.bin")
    with pytest.raises(ConversionError, match=r"mm_projector.bin is refused"):
        llava.convert(stage, home / "zoo", base_model=home / "base")
    assert not (home / "run").exists()


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_the_command_line_names_the_base(home, delta, capsys):
    assert llava.main([str(delta), str(home / "zoo"), "--base-model", str(home / "base")]) == 0
    assert "greedy_text" in capsys.readouterr().out
    assert llava.main([str(delta), str(home / "zoo"), "--verify", "--base-model", str(home / "base")]) == 0
    assert llava.main([str(delta), str(home / "other"), "--base-model", str(home / "nothing")]) == 1
    assert "neither a folder nor a hub id" in capsys.readouterr().err


# --- files as sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "name", "file"),
    [
        (llava, "hf457_llava/ckpt", "model.safetensors"),
        (llava, "llava_v15/ckpt_bin", "pytorch_model.bin.index.json"),
        (blip2, "hf457_blip2/ckpt", "model.safetensors"),
        (flamingo, "hf457_idefics/ckpt", "model.safetensors"),
        (mrope, "hf457_qwen2_vl/ckpt", "model.safetensors"),
        (vet, "hf457_ovis2/ckpt", "model.safetensors"),
    ],
)
def test_the_file_of_a_folders_weights_is_as_good_as_the_folder(script, name, file):
    folder = ORACLES / name
    expected, found = script.open_source(folder), script.open_source(folder / file)
    assert found.tensors == expected.tensors
    assert found.plan.names == expected.plan.names


@pytest.mark.parametrize("kind", ["delta", "adapter", "stage"])
def test_the_file_of_a_part_is_as_good_as_its_folder(kind, home, request):
    source = request.getfixturevalue(kind)
    file = {"delta": "pytorch_model.bin", "adapter": "adapter_model.safetensors", "stage": "mm_projector.bin"}[kind]
    expected, found = (llava.open_source(path, base_model=home / "base") for path in (source, source / file))
    assert found.plan == expected.plan


def test_a_file_that_is_not_the_folders_weights_is_refused(home):
    source = write(home / "source", whole_tensors(), shards=2)
    save_file({"other": torch.ones(1)}, source / "other.safetensors")
    for name in ("pytorch_model-00001-of-00002.bin", "other.safetensors", "config.json"):
        with pytest.raises(ConversionError, match=r"the weights of that folder are pytorch_model.bin.index.json"):
            llava.convert(source / name, home / "zoo")
    torch.save(projector_tensors(), source / "mm_projector.bin")
    with pytest.raises(ConversionError, match=r"mm_projector.bin is not what"):
        llava.convert(source / "mm_projector.bin", home / "zoo", base_model=home / "base")


def test_a_file_without_a_config_is_refused(home):
    source = write(home / "source", whole_tensors())
    (source / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"no config.json beside it"):
        llava.convert(source / "pytorch_model.bin", home / "zoo")
