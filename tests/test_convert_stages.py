"""A weight at another's place is reported at the stage that it belongs to, whatever the source."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conversion import parity, sources
from conversion.engine import ConversionError


ORACLES = Path(__file__).parent / "oracles"
NAMES = sorted(path.name for path in ORACLES.iterdir())
# One source of each script is damaged at all stages, every other one at one of them. Where head and embeddings are one
# tensor, as in `hf457_blip2`, the first layer reads it before the head.
WHOLE = ("hf457_instructblip", "hf457_idefics", "llava_next_unpad", "hf457_qwen3_vl", "hf457_ovis2")
OTHERS = {
    "hf457_blip2": "language_model.last_layer",
    "lavis_blip2_opt": "language_model.first_layer",
    "lavis_instructblip_vicuna": "logits",
    "openflamingo_llama_every2": "connector",
    "hf457_llava": "logits",
    "hf457_llava_next": "language_model.first_layer",
    "llava_v10_linear": "connector",
    "llava_v15": "language_model.last_layer",
    "hf457_qwen2_vl": "vision_tower",
    "hf457_qwen2_5_vl": "connector",
    "ovisv1.6_siglip_stride2": "vision_tower",
    "ovisv2.0_aimv2": "language_model.first_layer",
    "ovisv2.5_navit_full": "vision_tower",
}
CASES = [*((name, stage) for name in WHOLE for stage in parity.STAGES), *OTHERS.items()]
# Where the tensors of a stage are, and how the name of the one ends that is damaged: the first that is there.
PREFIXES = {"vision_tower": "model.vision_tower.", "connector": "model.connector.", "logits": "lm_head."}
ENDS = {
    "vision_tower": ("0.mlp.fc1.weight", "0.mlp.linear_fc1.weight", "0.mlp.up_proj.weight", "0.ffn.up_proj.weight"),
    "connector": (".projection.weight", ".latents", ".head.weight", ".merger.linear_1.weight", ".layers.0.weight"),
    "language_model.first_layer": (".layers.0.self_attn.q_proj.weight",),
    "language_model.last_layer": ("language_model.norm.weight", "decoder.final_layer_norm.weight"),
    "logits": ("lm_head.weight",),
}


def script(name):
    """The conversion that reads an oracle."""
    return sources.script_of(ORACLES / name)


def tensor_of(stage, tensors):
    """The tensor that is damaged at a stage."""
    prefix = PREFIXES.get(stage, "model.language_model.")
    found = [key for end in ENDS[stage] for key in tensors if key.startswith(prefix) and key.endswith(end)]
    return found[0]


def first_failed_stage(name, folder, damage):
    """Where the proof of a converted folder says that it differs, after a damage to its tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError) as caught:
        script(name).verify(ORACLES / name, folder)
    report = json.loads((folder / parity.REPORT).read_text())
    assert not report["passed"] and f"from the stage '{report['first_failed_stage']}' on" in str(caught.value)
    return report["first_failed_stage"]


def test_every_source_is_damaged():
    assert {name for name, _ in CASES} == set(NAMES)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_rows_in_another_order_are_reported_at_their_stage(name, stage, converted_oracle, tmp_path):
    zoo = shutil.copytree(converted_oracle(name), tmp_path / "zoo")

    def damage(tensors):
        key = tensor_of(stage, tensors)
        tensors[key] = tensors[key].flip(0)

    assert first_failed_stage(name, zoo, damage) == stage


@pytest.mark.parametrize(
    ("name", "one", "other", "stage"),
    [
        (
            "lavis_blip2_opt",
            "model.connector.qformer.layers.0.self_attention.key.weight",
            "model.connector.qformer.layers.0.self_attention.value.weight",
            "connector",
        ),
        (
            "hf457_idefics",
            "model.fusion.blocks.0.media.key.weight",
            "model.fusion.blocks.0.media.value.weight",
            "language_model.first_layer",
        ),
        (
            "openflamingo_llama_every2",  # its first block stands before the second layer
            "model.fusion.blocks.0.attention_gate",
            "model.fusion.blocks.0.feed_forward_gate",
            "language_model.last_layer",
        ),
        (
            "llava_v15",
            "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
            "model.vision_tower.encoder.layers.0.self_attn.k_proj.weight",
            "vision_tower",
        ),
        (
            "hf457_qwen3_vl",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.3.mlp.up_proj.weight",
            "language_model.first_layer",
        ),
        (
            "ovisv2.5_navit_full",
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
            "language_model.first_layer",
        ),
    ],
)
def test_tensors_at_each_others_places_are_reported_at_the_first_of_their_stages(
    name, one, other, stage, converted_oracle, tmp_path
):
    zoo = shutil.copytree(converted_oracle(name), tmp_path / "zoo")
    exchange = {one: other, other: one}
    assert first_failed_stage(name, zoo, lambda tensors: tensors.update(
        {key: tensors[source] for key, source in exchange.items()}
    )) == stage  # fmt: skip


def test_a_norm_that_only_one_of_two_towers_applies_belongs_to_its_tower(converted_oracle, tmp_path):
    zoo, key = shutil.copytree(converted_oracle("hf457_ovis2"), tmp_path / "zoo"), "model.vision_tower.rms_norm.weight"
    assert first_failed_stage("hf457_ovis2", zoo, lambda tensors: tensors.update({key: tensors[key].flip(0)})) == (
        "vision_tower"
    )


def test_deepstack_features_belong_to_the_connector(converted_oracle, tmp_path):
    zoo = shutil.copytree(converted_oracle("hf457_qwen3_vl"), tmp_path / "zoo")

    def damage(tensors):
        (key, *_) = [key for key in tensors if "deepstack" in key and key.endswith("linear_2.weight")]
        tensors[key] = tensors[key].flip(0)

    assert first_failed_stage("hf457_qwen3_vl", zoo, damage) == "connector"
