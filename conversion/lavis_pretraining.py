"""LAVIS' BLIP-2 after its first stage, which has no language model, to the zoo's model for that stage.

    model = stage_1_from_lavis("blip2_pretrained.pth")
    model.save_pretrained("stage-1")

LAVIS opens a text with the token [CLS], or with [DEC] where it is to be generated; in the zoo these are two embeddings
beside the vocabulary (`marks`), so captions are tokenised without [CLS]. The head for words shares the embeddings. The
projection into a language model does not exist yet, and is new.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from vlm_zoo.models.blip2 import ZooBlip2Config
from vlm_zoo.models.blip2_pretraining import ZooBlip2ForPretraining
from vlm_zoo.models.parts_vlm import build_part

from . import engine, lavis
from .edits import AddKeyBias
from .engine import ConversionError, Table, Target, TensorInfo


CLS_TOKEN_ID = 101  # in the vocabulary of bert-base-uncased
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
MARKS = f"[CLS] and [DEC] of {WORDS}"

FROM_STAGE_1: Table = (
    *lavis.FROM_LAVIS,
    *lavis.QFORMER,
    (r"^\[CLS\] and \[DEC\] of .+$", "model.connector.qformer.marks.weight"),
    (r"^vision_proj\.(.+)$", r"image_projection.\1"),
    (r"^text_proj\.(.+)$", r"text_projection.\1"),
    (r"^itm_head\.(.+)$", r"itm_head.\1"),
    (r"^temp$", "temperature"),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.(.+)$", r"text_head.dense.\1"),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.(.+)$", r"text_head.norm.\1"),
    (r"^Qformer\.cls\.predictions\.(bias|decoder\.weight|decoder\.bias)$", r"text_head.\1"),
)
TIED = {
    "text_head.decoder.weight": "model.connector.qformer.word_embeddings.weight",
    "text_head.decoder.bias": "text_head.bias",
}


def stage_1_from_lavis(
    path: str | Path,
    *,
    text_config: PreTrainedConfig | None = None,
    vision_tower: str | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
    cls_token_id: int = CLS_TOKEN_ID,
) -> ZooBlip2ForPretraining:
    """
    Reads a checkpoint of stage 1, in float32 and in eval mode.

    Args:
        path: the save.
        text_config: of the language model that stage 2 shall have; it decides the width of the new projection.
        vision_tower: file; by default `eva_vit_g.pth` beside the save.
        vision_heads, qformer_heads: attention heads, where they are not those of the released checkpoint.
        cls_token_id: of the Q-Former's tokenizer; [DEC] is its last token.

    Raises:
        ConversionError: tensors that are unknown, missing, duplicated or wrongly shaped, all of them listed.
    """
    saved = engine.read_file(Path(path))
    if "itm_head.weight" not in saved:
        raise ConversionError(f"{path} has no itm_head: it is not of stage 1.")
    tensors = {**({} if lavis.TOWER_SAVED in saved else lavis.read_tower(Path(path), vision_tower)), **saved}
    given = {} if text_config is None else {"text_config": text_config}
    sizes = lavis.read_sizes(tensors, vision_heads, qformer_heads)
    config = ZooBlip2Config(
        **{**sizes, **given, "text_conditioned": False, "architectures": ["ZooBlip2ForPretraining"]},
        image_text_hidden_size=saved["vision_proj.weight"].shape[0],
    )
    target = stage_1_target(config)
    tensors = with_marks(lavis.join_biases(tensors), cls_token_id)
    biases = lavis.tower_biases(target)
    plan = engine.plan_tensors(tensors, FROM_STAGE_1, target, str(path), lavis.shapes_before(target))
    state = {
        plan.names[name]: tensor for name, tensor in engine.read_tensors({name: tensors[name] for name in plan.kept()})
    }
    state |= {name: AddKeyBias().apply(state[name]) for name in biases}
    model = ZooBlip2ForPretraining.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model.eval()


def with_marks(tensors: Mapping[str, TensorInfo], cls_token_id: int) -> dict[str, TensorInfo]:
    """The tensors, and once more the rows of the two tokens that open a text."""
    words = tensors[WORDS]
    rows = [
        replace(words, shape=(1, words.shape[1]), rows=(row, row + 1)) for row in (cls_token_id, words.shape[0] - 1)
    ]
    return {**tensors, MARKS: engine.join_rows(rows)}


def stage_1_target(config: ZooBlip2Config) -> Target:
    """What the model of stage 1 asks for, without the projection that no file has yet."""
    with torch.device("meta"):
        state = ZooBlip2ForPretraining(config).state_dict()
        tower = build_part(config.vision_config, "vision tower")
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items() if ".connector.projection." not in name}
    return Target(
        wanted=wanted,
        unused={name: wanted[twin] for name, twin in TIED.items()},
        tied=TIED,
        ignored=lavis.IGNORED,
        renamings={"model.vision_tower.": engine.renamings_of(tower)},
    )
