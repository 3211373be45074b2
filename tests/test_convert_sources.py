"""The table of sources is measured, not asserted."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import sources
from conversion.engine import ConversionError


ORACLES = Path(__file__).parent / "oracles"


def test_every_checkpoint_finds_the_script_that_reads_it():
    found = {path.name: sources.script_of(path).__name__ for path in sorted(ORACLES.iterdir())}
    assert {name.rpartition(".")[2] for name in found.values()} == set(sources.SCRIPTS)
    assert found["lavis_blip2_opt"] == "conversion.blip2"
    assert found["openflamingo_llama_every2"] == "conversion.flamingo"


def test_a_checkpoint_that_no_script_reads_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "fuyu"}')
    with pytest.raises(ConversionError, match="fuyu"):
        sources.script_of(tmp_path)


def test_the_table_has_a_row_for_each_checkpoint(tmp_path, capsys):
    shutil.copytree(ORACLES / "hf457_qwen2_vl", tmp_path / "one" / "qwen")
    assert sources.main([str(tmp_path / "one"), "--out", str(tmp_path / "out")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| qwen")]
    assert "transformers' Qwen2VLForConditionalGeneration" in row and row.endswith("| bit for bit |")


def test_a_tensor_that_went_back_otherwise_is_named(tmp_path):
    (path,) = (ORACLES / "hf457_qwen2_vl").rglob("model.safetensors")
    for folder in ("source", "back"):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder)
    assert not list(sources.differing(tmp_path / "source", tmp_path / "back"))
    changed = load_file(path)
    changed["model.norm.weight"][0] = torch.nextafter(changed["model.norm.weight"][0], torch.tensor(9.0))
    save_file(changed, tmp_path / "back" / "model.safetensors")
    assert list(sources.differing(tmp_path / "source", tmp_path / "back")) == ["model.safetensors: model.norm.weight"]


def test_a_checkpoint_that_cannot_be_converted_is_the_exit_status(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llava"}')
    assert sources.main([str(tmp_path)]) == 1
    assert "error" in capsys.readouterr().err
