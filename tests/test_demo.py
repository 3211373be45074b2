"""The demo end to end at a minute size, and its pieces."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlm_zoo
from vlm_zoo import cli, data
from vlm_zoo.demo import run
from vlm_zoo.demo.parts import enlarge, write_parts
from vlm_zoo.demo.recipe import FAST, FULL, Recipe
from vlm_zoo.demo.run import claim
from vlm_zoo.demo.train import AugmentingCollator
from vlm_zoo.saving import writing_folder


MINUTE = dataclasses.replace(
    FULL, sample=6, stages=tuple(dataclasses.replace(s, epochs=0.004, batch_size=16) for s in FULL.stages)
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, run(out, recipe=MINUTE)


def test_the_demo_leaves_a_report_with_scores_beside_blind(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {"accuracy", "blind_accuracy", "accuracy_by_task", "blind_accuracy_by_task", "sample_rows"} <= report.keys()
    assert [stage["name"] for stage in report["stages"]] == ["alignment", "instruction"]
    assert report["sample_rows"] == 6 and report["stages"][0]["losses"]
    assert sum(score["rows"] for score in report["stages"][1]["validation"]["tasks"].values()) == 6


def test_the_page_holds_its_pictures_and_loads_nothing(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') >= 3
    assert "http://" not in page and 'src="http' not in page and "<script" not in page


def test_the_trained_folder_opens_and_has_what_the_hub_needs(finished):
    out, report = finished
    model = vlm_zoo.AutoModelForVision2Seq.from_pretrained(report["model"])
    assert model.config.vision_config.image_size == 96
    names = {path.name for path in (out / "instruction").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "chat_template.jinja", "README.md"} <= names
    assert {"generation_config.json", "tokenizer.json", "llava.py", "modeling_vlm.py"} <= names


def test_a_finished_stage_is_not_trained_again(finished, monkeypatch):
    out, report = finished
    before = (out / "instruction" / "model.safetensors").stat().st_mtime_ns
    again = run(out, recipe=MINUTE)
    assert (out / "instruction" / "model.safetensors").stat().st_mtime_ns == before
    assert again["accuracy"] == report["accuracy"]


def test_a_folder_of_another_run_is_refused(tmp_path):
    claim(tmp_path / "a", {"arch": "llava", "recipe": 1})
    with pytest.raises(ValueError, match="with other settings"):
        claim(tmp_path / "a", {"arch": "llava", "recipe": 2})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        claim(tmp_path, {"arch": "llava"})


def test_an_unknown_architecture_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="Unknown architecture 'nope'; the zoo has llava"):
        run(tmp_path, "nope")


def test_the_command_line_says_what_is_wrong_and_fails(tmp_path, caplog):
    assert cli.main(["demo", "--arch", "nope", "--out", str(tmp_path)]) == 1
    assert "Unknown architecture 'nope'" in caplog.text


@pytest.mark.parametrize("recipe", [FULL, FAST], ids=["full", "fast"])
def test_recipes_name_embedded_data_and_real_parts(recipe: Recipe):
    for stage in recipe.stages:
        assert data.path(stage.dataset).is_dir()
        assert stage.image_size % recipe.vision["image_size"] == 0


def test_a_larger_tower_repeats_its_positions_and_keeps_all_else(tmp_path):
    vision, language = write_parts(FULL, tmp_path / "parts")
    vlm_zoo.build("llava", vision, language, tmp_path / "built", vision_feature_layer=-1)
    larger = AutoModelForImageTextToText.from_pretrained(enlarge(tmp_path / "built", 96, tmp_path / "large"))
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "built")
    old, new = small.state_dict(), larger.state_dict()
    (table,) = [name for name in old if "position_embedding" in name]
    grid = new[table].view(6, 6, -1)
    torch.testing.assert_close(grid[:3, :3], old[table].view(3, 3, -1))
    torch.testing.assert_close(grid[3:, :3], grid[:3, :3])
    assert all(torch.equal(old[name], new[name]) for name in old if name != table)
    processor = AutoProcessor.from_pretrained(tmp_path / "large")
    assert processor.num_image_tokens(96, 96) == 36
    with pytest.raises(ValueError, match="no multiple of 48"):
        enlarge(tmp_path / "built", 100, tmp_path / "odd")


def test_augmentation_moves_and_colours_but_keeps_the_size(tiny_folder):
    collator = AugmentingCollator(AutoProcessor.from_pretrained(tiny_folder), shift=2, colour=0.3, seed=1)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 30, 3), dtype=np.uint8))
    changed = collator.augment(image)
    assert changed.size == image.size and np.asarray(changed).std() > 0
    assert (np.asarray(changed) != np.asarray(image)).any()


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), writing_folder(tmp_path / "out") as path:
        (path / "half").write_text("…")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with writing_folder(tmp_path / "out") as path:
        (path / "whole").write_text("…")
    assert (tmp_path / "out" / "whole").exists()
    with pytest.raises(FileExistsError, match="not empty"), writing_folder(tmp_path / "out"):
        pass
