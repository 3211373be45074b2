"""The way back of every source: the same files, tensor by tensor and bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import edits, engine, sources, way_back
from conversion.edits import AddKeyBias, CutRows, FillRows, Scale, Transpose
from conversion.engine import ConversionError
from vlm_zoo import AutoModelForVision2Seq


ORACLES = Path(__file__).parent / "oracles"
NAMES = sorted(path.name for path in ORACLES.iterdir())
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def script(name):
    """The conversion that reads an oracle."""
    return sources.script_of(ORACLES / name)


def numbers(path):
    """The tensors of a file, those of a training save too."""
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("model", content)


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# --- every source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_was_read_goes_back_bit_for_bit(name, converted_oracle, tmp_path):
    script(name).reverse(converted_oracle(name), tmp_path / "back", verify=False)
    read = {file["path"] for file in json.loads((converted_oracle(name) / engine.RECORD).read_text())["files"]}
    assert read == {
        path.relative_to(tmp_path / "back").as_posix()
        for path in (tmp_path / "back").rglob("*")
        if path.suffix in WEIGHTS
    }
    assert all(same_bits(numbers(ORACLES / name / path), numbers(tmp_path / "back" / path)) for path in read)


@pytest.mark.parametrize("name", NAMES)
def test_configs_and_tokenizers_go_back_byte_by_byte(name, converted_oracle, tmp_path):
    script(name).reverse(converted_oracle(name), tmp_path / "back", verify=False)
    beside = [path for path in (tmp_path / "back").rglob("*") if path.is_file() and path.suffix not in WEIGHTS]
    assert all((ORACLES / name / path.relative_to(tmp_path / "back")).read_bytes() == path.read_bytes()
               for path in beside)  # fmt: skip
    assert len(beside) >= 1


@pytest.mark.parametrize("name", ["lavis_blip2_opt", "openflamingo_llama_every2", "llava_v15", "ovisv2.0_aimv2"])
def test_what_went_back_is_read_and_proven_again(name, converted_oracle, tmp_path):
    report = script(name).reverse(converted_oracle(name), tmp_path / "back")
    assert report["passed"] and (tmp_path / "back" / "parity.json").is_file()


def test_a_training_save_keeps_its_tensors_under_the_key_that_it_had(converted_oracle, tmp_path):
    script("lavis_blip2_opt").reverse(converted_oracle("lavis_blip2_opt"), tmp_path / "back", verify=False)
    (save,) = (tmp_path / "back").glob("*trainable.pth")
    assert torch.load(save, weights_only=True).keys() == {"model"}


# --- parts elsewhere -------------------------------------------------------------------------------------------------


def test_parts_that_were_named_go_back_to_where_they_are_looked_for(tmp_path):
    name = "lavis_blip2_opt"
    shutil.copytree(ORACLES / name, tmp_path / "all")
    (tmp_path / "save").mkdir()
    shutil.move(tmp_path / "all" / "blip2_trainable.pth", tmp_path / "save" / "stage2.pth")
    parts = {"language_model": tmp_path / "all" / "llm", "vision_tower": tmp_path / "all" / "eva_vit_g.pth"}
    script(name).convert(tmp_path / "save" / "stage2.pth", tmp_path / "zoo", **parts, verify=False)
    report = script(name).reverse(tmp_path / "zoo", tmp_path / "back")
    assert report["passed"]
    assert same_bits(numbers(parts["vision_tower"]), numbers(tmp_path / "back" / "eva_vit_g.pth"))
    assert (tmp_path / "back" / "llm" / "config.json").is_file() and (tmp_path / "back" / "stage2.pth").is_file()


def test_files_beside_a_save_that_belong_to_others_are_not_carried_along(tmp_path):
    shutil.copytree(ORACLES / "lavis_blip2_opt", tmp_path / "source")
    (tmp_path / "source" / "passwords.json").write_text("{}")
    script("lavis_blip2_opt").convert(tmp_path / "source", tmp_path / "zoo", verify=False)
    assert not list((tmp_path / "zoo").rglob("passwords.json"))


# --- later states ----------------------------------------------------------------------------------------------------


def trained(folder, name, change):
    model = AutoModelForVision2Seq.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name).add_(change)
    return model


def test_training_changes_only_what_was_trained(converted_oracle, tmp_path):
    name, changed = "hf457_qwen2_vl", "model.connector.merger.linear_1.bias"
    trained(converted_oracle(name), changed, 1.0).save_pretrained(tmp_path / "trained")
    script(name).reverse(tmp_path / "trained", tmp_path / "back", origin=converted_oracle(name))
    (path,) = ORACLES.joinpath(name).rglob("model.safetensors")
    before, after = numbers(path), numbers(tmp_path / "back" / path.relative_to(ORACLES / name))
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["visual.merger.mlp.0.bias"]


def test_a_later_state_without_its_origin_says_how_to_name_it(converted_oracle, tmp_path):
    name = "hf457_qwen2_vl"
    trained(converted_oracle(name), "model.connector.merger.linear_1.bias", 1.0).save_pretrained(tmp_path / "trained")
    with pytest.raises(ConversionError, match="--origin"):
        script(name).reverse(tmp_path / "trained", tmp_path / "back")


def test_a_bias_of_keys_that_was_trained_does_not_go_back_to_a_tower_without_one(converted_oracle, tmp_path):
    name = "lavis_blip2_opt"
    bias = "model.vision_tower.encoder.layers.0.self_attn.qkv.bias"
    trained(converted_oracle(name), bias, 1.0).save_pretrained(tmp_path / "trained")
    with pytest.raises(ConversionError, match="was it trained"):
        script(name).reverse(tmp_path / "trained", tmp_path / "back", origin=converted_oracle(name))
    assert not (tmp_path / "back").exists()


def test_a_model_of_another_shape_does_not_go_back(converted_oracle, tmp_path):
    name = "hf457_qwen2_vl"
    shutil.copytree(converted_oracle(name), tmp_path / "zoo")
    config = json.loads((tmp_path / "zoo" / "config.json").read_text())
    (tmp_path / "zoo" / "config.json").write_text(json.dumps({**config, "max_image_tokens": 7}))
    with pytest.raises(ConversionError) as caught:
        script(name).reverse(tmp_path / "zoo", tmp_path / "back")
    assert caught.value.problems == {"changed": ["max_image_tokens"]}


# --- records are not trusted -----------------------------------------------------------------------------------------


def edited_record(folder, target, edit):
    shutil.copytree(folder, target)
    record = json.loads((target / engine.RECORD).read_text())
    edit(record)
    (target / engine.RECORD).write_text(json.dumps(record))
    return target


@pytest.mark.parametrize("path", ["../evil.safetensors", "/tmp/evil.safetensors", "C:\\evil.safetensors", "a/../../b"])
def test_a_record_cannot_write_outside_the_folder(path, converted_oracle, tmp_path):
    zoo = edited_record(
        converted_oracle("hf457_llava"), tmp_path / "zoo", lambda record: record["files"][0].update(path=path)
    )
    with pytest.raises(ConversionError, match="outside"):
        script("hf457_llava").reverse(zoo, tmp_path / "deep" / "back", verify=False)
    assert not [file for file in tmp_path.rglob("*") if "evil" in file.name]


def test_a_record_cannot_copy_from_outside_the_folder(converted_oracle, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    zoo = edited_record(
        converted_oracle("hf457_llava"), tmp_path / "zoo", lambda record: record["beside"].append("../../secret.json")
    )
    with pytest.raises(ConversionError, match="outside"):
        script("hf457_llava").reverse(zoo, tmp_path / "back", verify=False)


def test_a_folder_of_another_script_is_refused_by_name(converted_oracle, tmp_path):
    with pytest.raises(ConversionError, match=r"conversion\.mrope"):
        script("hf457_ovis2").reverse(
            edited_record(
                converted_oracle("hf457_ovis2"), tmp_path / "zoo", lambda record: record.update(script="mrope")
            ),
            tmp_path / "back",
        )


@pytest.mark.parametrize("name", ["files", "edits", "names", "settings", "computed"])
def test_a_damaged_record_is_named(name, converted_oracle, tmp_path):
    zoo = edited_record(converted_oracle("hf457_llava"), tmp_path / "zoo", lambda record: record.update({name: 7}))
    with pytest.raises(ConversionError, match=r"conversion\.json"):
        script("hf457_llava").reverse(zoo, tmp_path / "back")


def test_tensors_that_are_nowhere_are_listed(converted_oracle, tmp_path):
    zoo = edited_record(converted_oracle("hf457_llava"), tmp_path / "zoo", lambda record: None)
    (zoo / engine.DROPPED).unlink()
    with pytest.raises(ConversionError) as caught:
        script("hf457_llava").reverse(zoo, tmp_path / "back")
    assert any(name.startswith("model.vision_tower.") for name in caught.value.problems["missing"])


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_shows_where_every_tensor_goes_back_to(converted_oracle, capsys):
    assert script("ovisv2.0_aimv2").main([str(converted_oracle("ovisv2.0_aimv2")), "--reverse", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" + " in line and ".attn.qkv.weight" in line for line in lines) >= 1


def test_the_command_line_goes_back(converted_oracle, tmp_path, capsys):
    name = "hf457_idefics"
    assert script(name).main([str(converted_oracle(name)), str(tmp_path / "back"), "--reverse"]) == 0
    assert "logits" in capsys.readouterr().out


def test_an_error_on_the_way_back_leaves_nothing_that_looks_finished(converted_oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(way_back, "assembled", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script("hf457_llava").reverse(converted_oracle("hf457_llava"), tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


# --- edits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (FillRows(7), torch.randn(5, 3)),
        (CutRows(3), torch.randn(5, 3)),
        (AddKeyBias(), torch.randn(10)),
        (Transpose(), torch.randn(2, 3, 4)),
        (Scale(1.7), torch.randn(5, 3)),
        (Scale(1.7), torch.randn(5, 3).bfloat16()),
    ],
)
def test_every_edit_is_undone_exactly_from_its_record(edit, tensor):
    again = edits.from_record(json.loads(json.dumps(edit.record())))
    assert again == edit
    original = None if edit.is_exact else tensor
    assert torch.equal(again.undo(again.apply(tensor), tensor.shape[0], original), tensor)


def test_a_scaled_table_that_was_trained_goes_back_as_it_is_now():
    table = torch.randn(5, 3).bfloat16()
    back = Scale(2.0).undo(Scale(2.0).apply(table) + 2, 5, table)
    assert back.dtype == torch.bfloat16 and torch.equal(back, (table.float() + 1).bfloat16())


def test_cut_rows_come_back_behind_the_trained_ones():
    matrix = torch.randn(5, 3)
    assert torch.equal(CutRows(3).undo(matrix[:3] + 1, 5, matrix), torch.cat((matrix[:3] + 1, matrix[3:])))


@pytest.mark.parametrize("record", [{"kind": "no such"}, {"kind": "fill_rows"}, {}])
def test_an_edit_that_is_unknown_or_incomplete_is_refused(record):
    with pytest.raises(ConversionError):
        edits.from_record(record)


# --- second names ----------------------------------------------------------------------------------------------------


def test_a_second_name_of_a_tensor_is_no_second_copy(converted_oracle):
    record = json.loads((converted_oracle("openflamingo_llama_every2") / engine.RECORD).read_text())
    (full,) = (file for file in record["files"] if file["path"] == "full.pt")
    kept = engine.read_file(converted_oracle("openflamingo_llama_every2") / engine.DROPPED)
    aliases = [name for name in full["tensors"] if "old_decoder_blocks" in name]
    assert aliases and not any(alias in key for alias in aliases for key in kept)


def test_a_tensor_that_nothing_reads_waits_in_the_side_file(converted_oracle):
    # What trained stands in for what a whole save holds of it
    kept = load_file(converted_oracle("openflamingo_llama_every2") / engine.DROPPED)
    replaced = f"{way_back.UNREAD}full.pt: perceiver.latents"
    assert torch.equal(kept[replaced], numbers(ORACLES / "openflamingo_llama_every2" / "full.pt")["perceiver.latents"])


def test_a_tensor_of_one_value_is_nobodys_twin(tmp_path):
    save_file({"read": torch.zeros(4), "unread": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert way_back.twins_of(engine.read_file(tmp_path / "model.safetensors"), ["unread"]) == {}
