"""Parity reports: two implementations on the same inputs, compared stage by stage.

The stages follow the data: ids and pixels, vision tower, connector, the language model's first and last layer,
logits, greedy text. The first stage that differs is where a conversion went wrong; what follows is a consequence.
"""

import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import tokenizers
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

import vlm_zoo

from .engine import ConversionError, write_json


REPORT = "parity.json"
TOLERANCE = 1e-5
NEW_TOKENS = 16
# Two correct resizers differ by one 8-bit level, by two where one side grows and the other shrinks, and elsewhere by
# two in at most this share of an image's values, ten of a million. The limits have room for float32's rounding.
ONE_LEVEL, TWO_LEVELS = 1.01, 2.01
RARE = 1e-5
# Grids of images and clips in a row at native resolution, in tokens.
NATIVE_GRIDS = (
    [[1, 2, 3]],
    [[1, 2, 2], [1, 1, 5], [1, 4, 2]],
    [[3, 2, 3]],
    [[1, 2, 4], [2, 3, 2], [1, 2, 2]],
)
# What an image's features are made of beside its pixels.
VISION_INPUTS = ("image_sizes", "image_grid_thw", "qformer_input_ids", "qformer_attention_mask")
STAGES = ("vision_tower", "connector", "language_model.first_layer", "language_model.last_layer", "logits")


@dataclass
class Row:
    """
    A text and its image.

    inputs: `input_ids` and what else the language model takes.
    vision_inputs: `pixel_values` and what belongs to them.
    """

    inputs: dict[str, torch.Tensor]
    vision_inputs: dict[str, torch.Tensor]


def versions() -> dict[str, str]:
    """What the numbers of a report depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "pillow": PIL.__version__,
        "vlm_zoo": vlm_zoo.__version__,
    }


def load_strictly(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Loads float32 and eager; a tensor that is missing or left over is an error, not a line in a log."""
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
    if problems:
        raise ConversionError(f"{model_class.__name__} does not load {folder} completely:", problems)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def probe_sizes(size: int) -> list[tuple[int, int]]:
    """Heights and widths that a tower of this size treats differently: its own, wide, tall, small."""
    return [(size, size), (size + size // 2, 3 * size), (2 * size + 1, size + 3), (size // 2 + 1, size // 2 + 2)]


def plain_tokens(config: PreTrainedConfig) -> torch.Tensor:
    """The tokens `int[N]` of a zoo model that mean nothing but text."""
    text = config.text_config
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    special = {config.image_token_id, text.pad_token_id, text.bos_token_id, *ends}
    return torch.tensor([token for token in range(min(text.vocab_size, 30000)) if token not in special])


def random_text(plain: torch.Tensor, counts: Iterable[int], generator: torch.Generator) -> list[torch.Tensor]:
    """Pieces of text of these lengths, `int[T]` each, out of plain tokens."""
    return [plain[torch.randint(len(plain), (count,), generator=generator)] for count in counts]


def text_inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row of tokens, `int[T]`, as a model takes it."""
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def compare(stage: str, source: torch.Tensor, zoo: torch.Tensor, tolerance: float = TOLERANCE) -> dict:
    """
    One stage of a report.

    The limit is `tolerance` for values up to 1 and grows with the source's largest value, as float32's steps do.
    """
    row = {"stage": stage, "dtype": str(source.dtype).removeprefix("torch."), "shape": list(source.shape)}
    if source.shape != zoo.shape:
        return {**row, "zoo_shape": list(zoo.shape), "max_abs_diff": None, "mean_abs_diff": None, "equal": False}
    difference = (source.double() - zoo.double()).abs()
    peak = source.abs().max().item()
    limit = tolerance * max(1.0, peak)
    largest, mean = difference.max().item(), difference.mean().item()
    finite = math.isfinite(largest)
    return {
        **row,
        "max_abs_diff": largest if finite else None,
        "mean_abs_diff": mean if finite else None,
        "max_abs_value": peak,
        "limit": limit,
        "equal": finite and largest <= limit,
    }


@torch.no_grad()
def record_stages(model: nn.Module, row: Row, layers: list[int]) -> dict[str, torch.Tensor]:
    """
    Runs a model once and returns what each of `STAGES` computed, `float[tokens, width]`.

    Args:
        model: its tower is `model.model.vision_tower`, its features come from `model.get_image_features`.
        row: the inputs.
        layers: the tower's hidden states that are used, as non-negative indices.
    """
    seen = []

    def keep(module, args, outputs):
        seen.append(torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1))

    handle = model.model.vision_tower.register_forward_hook(keep)
    try:
        features = model.get_image_features(**row.vision_inputs, return_dict=True).pooler_output
    finally:
        handle.remove()
    outputs = model(**row.inputs, **row.vision_inputs, output_hidden_states=True, return_dict=True)
    return {
        "vision_tower": seen[0].flatten(0, -2),
        "connector": torch.cat(list(features)),
        "language_model.first_layer": outputs.hidden_states[1].flatten(0, -2),
        "language_model.last_layer": outputs.hidden_states[-1].flatten(0, -2),
        "logits": outputs.logits.flatten(0, -2),
    }


def greedy_ids(model: nn.Module, row: Row, image_token_id: int) -> list[int]:
    """The new tokens of a greedy generation; the image token is suppressed, as the zoo always does."""
    own = model.generation_config.suppress_tokens or []
    ids = model.generate(
        **row.inputs,
        **row.vision_inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=sorted({*own, image_token_id}),
    )
    return ids[0, row.inputs["input_ids"].shape[1] :].tolist()


def compare_models(
    load_source: Callable[[], nn.Module],
    load_zoo: Callable[[], PreTrainedModel],
    config: PreTrainedConfig,
    rows: list[Row] | Callable[[nn.Module], list[Row]],
    decode: Callable[[list[int]], str] | None = None,
    vocab_size: int | None = None,
) -> dict:
    """
    Compares what two implementations compute; they are loaded one after the other.

    Args:
        load_source, load_zoo: return the models.
        config: the zoo's config.
        rows: the inputs, or what makes them once the source is there.
        decode: ids to text; without it the greedy text is reported as ids.
        vocab_size: how many logits are compared, where the zoo's model has more of them than the source.

    Returns:
        `stages`, `greedy_text`, and `image_sensitivity`: how far the last logits of the first row move when its image
        is inverted. A proof on images that move nothing would be none.

    Raises:
        ConversionError: the source's own implementation fails.
    """
    source = load_source()
    try:
        rows = rows(source) if callable(rows) else rows
        expected, written = _run(source, rows, config)
        first = rows[0]
        inverted = {**first.vision_inputs, "pixel_values": -first.vision_inputs["pixel_values"]}
        moved = record_stages(source, Row(first.inputs, inverted), config.feature_layers)["logits"]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConversionError(f"The source's own implementation fails: {error}") from error
    last = len(moved) - 1
    sensitivity = (moved[last] - expected["logits"][last]).abs().max().item()
    del source
    found, ours = _run(load_zoo(), rows, config)
    found["logits"] = found["logits"][:, :vocab_size]
    texts = [[decode(ids) for ids in tokens] if decode else tokens for tokens in (written, ours)]
    return {
        "rows": len(rows),
        "stages": [
            *(compare(stage, expected[stage], found[stage]) for stage in STAGES),
            {"stage": "greedy_text", "dtype": "int64", "tokens": sum(map(len, written)), "equal": written == ours},
        ],
        "greedy_text": dict(zip(("source", "zoo"), texts, strict=True)),
        "image_sensitivity": sensitivity,
    }


def _run(model: nn.Module, rows: list[Row], config: PreTrainedConfig) -> tuple[dict, list[list[int]]]:
    recorded = [record_stages(model, row, config.feature_layers) for row in rows]
    stages = {stage: torch.cat([record[stage] for record in recorded]) for stage in STAGES}
    return stages, [greedy_ids(model, row, config.image_token_id) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def compare_processors(
    source: ProcessorMixin, zoo: ProcessorMixin, prompt: str, sizes: Iterable[tuple[int, int]], tower_size: int
) -> tuple[list[dict], list[Row]]:
    """
    Compares ids and pixels of random images; what two correct resizers may differ by is said at `RARE`.

    Args:
        source, zoo: the processors.
        prompt: a text with one image token.
        sizes: heights and widths of the images.
        tower_size: edge of what the tower reads.

    Returns:
        The stages `input_ids` and `pixels`, and the rows as the source's processor makes them. Of pixels, `limit` is
        what all may differ by, that of the image with the largest, `share_above_limit` the largest share of an image's
        values above its own, at most `rare_share`, and `rare_limit` what these may differ by.
    """
    generator, rows = np.random.default_rng(0), []
    ids_equal, limit, peaks, shares, means = True, ONE_LEVEL, [], [], []
    level = source.image_processor.rescale_factor / torch.as_tensor(source.image_processor.image_std).view(-1, 1, 1)
    for height, width in sizes:
        image = PIL.Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs, ours = (part(images=[image], text=[prompt], return_tensors="pt") for part in (source, zoo))
        ids_equal &= all(
            torch.equal(theirs[name], ours[name])
            for name in ("input_ids", "attention_mask", *VISION_INPUTS)
            if name in theirs
        )
        allowed = TWO_LEVELS if (height < tower_size) != (width < tower_size) else ONE_LEVEL
        difference = (theirs["pixel_values"] - ours["pixel_values"]).abs()
        if difference.ndim == 2:  # patches, channel by channel
            difference = difference.unflatten(1, (len(level), -1, 1))
        levels = (difference / level).double()
        peaks.append(levels.max().item())
        shares.append((levels > allowed).double().mean().item())
        means.append(levels.mean().item())
        limit = max(limit, allowed)
        rows.append(
            Row(
                {name: theirs[name] for name in ("input_ids", "attention_mask")},
                {name: theirs[name] for name in ("pixel_values", *VISION_INPUTS) if name in theirs},
            )
        )
    finite = all(map(math.isfinite, peaks))
    pixels = {
        "stage": "pixels",
        "dtype": "float32",
        "unit": "8-bit levels",
        "max_abs_diff": max(peaks) if finite else None,
        "mean_abs_diff": sum(means) / len(means) if finite else None,
        "limit": limit,
        "share_above_limit": max(shares),
        "rare_limit": TWO_LEVELS,
        "rare_share": RARE,
        "equal": finite and max(peaks) <= TWO_LEVELS and max(shares) <= RARE,
    }
    return [{"stage": "input_ids", "dtype": "int64", "equal": ids_equal}, pixels], rows


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


def make_report(source: str, compared_with: str, inputs: str, results: Mapping, before: Iterable[dict] = ()) -> dict:
    """
    The whole report, `passed` or not, with the first stage that is not equal.

    Args:
        source: the checkpoint.
        compared_with: whose implementation the zoo's was compared with.
        inputs: what the two were given.
        results: of `compare_models`.
        before: stages that were compared before.
    """
    stages = [*before, *results["stages"]]
    failed = [row["stage"] for row in stages if not row["equal"]]
    return {
        "source": source,
        "passed": not failed,
        "first_failed_stage": failed[0] if failed else None,
        "compared_with": f"{compared_with}, float32, eager attention",
        "inputs": inputs,
        "tolerance": TOLERANCE,
        **results,
        "stages": stages,
        "versions": versions(),
    }


def file_report(report: dict, path: Path) -> None:
    """Writes a report; one that did not pass is a `ConversionError` that names its first stage."""
    write_json(path, report)
    if not report["passed"]:
        raise ConversionError(
            f"The two models differ from the stage '{report['first_failed_stage']}' on ({path}):\n{table(report)}"
        )


def table(report: dict) -> str:
    """The stages of a report as lines of text."""
    lines = [f"{'stage':<28} {'max |diff|':>12} {'mean |diff|':>12}  equal"]
    for row in report["stages"]:
        numbers = [row.get(name) for name in ("max_abs_diff", "mean_abs_diff")]
        cells = " ".join(f"{'-' if number is None else format(number, '.2e'):>12}" for number in numbers)
        lines.append(f"{row['stage']:<28} {cells}  {'yes' if row['equal'] else 'NO'}")
    return "\n".join(lines)
