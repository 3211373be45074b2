"""BLIP-2: a small transformer with learned queries, the Q-Former, reads the image; its queries become tokens.

Papers: BLIP-2 (huggingface.co/papers/2301.12597), InstructBLIP (huggingface.co/papers/2305.06500).

Paper map:
    BLIP-2 section 3.1, the Q-Former                 `QFormer`, with `Blip2Connector.query_tokens`
    BLIP-2 section 3.2 (stage 1), losses and masks   `ZooBlip2ForPretraining` in `blip2_pretraining.py`; `qformer_mask`
    BLIP-2 section 3.3 (stage 2), decoder-based LLM  `ZooBlip2ForConditionalGeneration`
    InstructBLIP section 2.3, the question inside    `text_conditioned=True`; `ZooBlip2Model.fuse`

Deviations: queries start as noise, never as zeros, whose layer norm has gradients of 1e6 and more. A question is read,
by default, as the language model's ids with embeddings of the Q-Former's own; InstructBLIP's second tokenizer is an
option (`qformer_vocab_size`). The last layer has no feed-forward for text where nothing reads what it would compute.
An encoder-decoder as language model (the papers' FLAN-T5) is refused, see `ZooConfig.validate_language_model`.
"""

import os
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BatchFeature, GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import ZooConfig, publish
from .layers import attend, compact, split_heads
from .modeling_vlm import QUERY_INPUTS, FuseContext, ZooForConditionalGeneration, ZooModel
from .processing_vlm import ZooProcessor


@strict
class ZooBlip2Config(ZooConfig):
    r"""
    Configuration of BLIP-2 and InstructBLIP; the fields that all architectures share are those of `ZooConfig`.

    num_query_tokens (`int`): learned queries, and tokens that an image becomes.
    text_conditioned (`bool`):
        Whether the question joins the queries in the Q-Former: InstructBLIP.
    qformer_vocab_size (`int`, *optional*):
        Vocabulary of a Q-Former with a tokenizer of its own. `None` gives it the language model's.
    qformer_max_position_embeddings (`int`):
        The longest text that the Q-Former reads. Of a longer question it reads the end.
    qformer_hidden_size, qformer_num_hidden_layers, qformer_num_attention_heads, qformer_intermediate_size,
    qformer_hidden_act, qformer_hidden_dropout, qformer_attention_dropout, qformer_layer_norm_eps:
        Sizes of the Q-Former; the defaults are those of BERT-base.
    qformer_cross_attention_frequency (`int`):
        Layers whose index it divides look at the image.
    vision_layer_norm (`bool`), vision_layer_norm_eps (`float`):
        A layer norm between tower and Q-Former.
    image_text_hidden_size (`int`): width of the space in which stage 1 compares images and texts.
    """

    model_type = "zoo_blip2"

    vision_feature_select_strategy: Literal["default", "full"] = "full"
    num_query_tokens: int = 32
    text_conditioned: bool = False
    qformer_vocab_size: int | None = None
    qformer_max_position_embeddings: int = 512
    qformer_hidden_size: int = 768
    qformer_num_hidden_layers: int = 12
    qformer_num_attention_heads: int = 12
    qformer_intermediate_size: int = 3072
    qformer_hidden_act: str = "gelu"
    qformer_hidden_dropout: float = 0.1
    qformer_attention_dropout: float = 0.1
    qformer_layer_norm_eps: float = 1e-12
    qformer_cross_attention_frequency: int = 2
    vision_layer_norm: bool = True
    vision_layer_norm_eps: float = 1e-5
    image_text_hidden_size: int = 256

    def validate_qformer(self):
        """Part of `@strict` validation."""
        sizes = (
            "num_query_tokens",
            "qformer_max_position_embeddings",
            "qformer_hidden_size",
            "qformer_num_hidden_layers",
            "qformer_num_attention_heads",
            "qformer_intermediate_size",
            "qformer_cross_attention_frequency",
            "image_text_hidden_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.qformer_vocab_size is not None and self.qformer_vocab_size < 1:
            raise ValueError(f"qformer_vocab_size must be at least 1, or None, got {self.qformer_vocab_size}.")
        if self.qformer_hidden_size % self.qformer_num_attention_heads:
            raise ValueError(
                f"qformer_hidden_size {self.qformer_hidden_size} is no multiple of qformer_num_attention_heads "
                f"{self.qformer_num_attention_heads}."
            )

    @property
    def vocabulary_of_queries(self) -> int:
        """Size of the vocabulary in which the Q-Former reads text."""
        return self.text_config.vocab_size if self.qformer_vocab_size is None else self.qformer_vocab_size

    def validate_qformer_act(self):
        """Part of `@strict` validation."""
        if self.qformer_hidden_act not in ACT2FN:
            raise ValueError(f"qformer_hidden_act '{self.qformer_hidden_act}' is no activation of transformers.")

    def own_doors(self) -> dict[str, str]:
        """A folder of stage 1 opens as that, too."""
        if self.architectures != ["ZooBlip2ForPretraining"]:
            return {}
        return {"AutoModelForPreTraining": "blip2_pretraining.ZooBlip2ForPretraining"}

    @classmethod
    def small_fields(cls, width: int, from_scratch: bool = False) -> dict:
        return {
            "num_query_tokens": 16,
            "qformer_hidden_size": width,
            "qformer_num_hidden_layers": 2,
            "qformer_num_attention_heads": 4,
            "qformer_intermediate_size": 2 * width,
            "qformer_hidden_dropout": 0.0,
            "qformer_attention_dropout": 0.0,
            "image_text_hidden_size": width,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Q-Former
# ---------------------------------------------------------------------------------------------------------------------


def qformer_mask(
    objective: Literal["unimodal", "bidirectional", "causal"], num_queries: int, text_mask: torch.Tensor
) -> torch.Tensor:
    """
    Who sees whom among [queries; text], figure 2 of BLIP-2.

    With two queries and three tokens, the last of them padding (rows look, columns are seen, . is no):

        unimodal       bidirectional   causal
        q q . . .      q q t t .       q q . . .
        q q . . .      q q t t .       q q . . .
        . . t t .      q q t t .       q q t . .
        . . t t .      q q t t .       q q t t .
        . . t t t      q q t t t       q q t t t

    Padding is seen by itself alone, so that nobody sees nothing.

    Args:
        objective: `"unimodal"` (contrast), `"bidirectional"` (matching, and questions) or `"causal"` (captioning).
        num_queries: Q, 0 for text alone.
        text_mask (`bool[B, L]`): false at padding.

    Returns:
        `bool[B, Q + L, Q + L]`
    """
    length = text_mask.shape[1]
    total = num_queries + length
    is_text = torch.arange(total, device=text_mask.device) >= num_queries
    looks, seen = is_text[:, None], is_text[None, :]
    if objective == "unimodal":
        mask = looks == seen
    elif objective == "bidirectional":
        mask = torch.ones(total, total, dtype=torch.bool, device=text_mask.device)
    elif objective == "causal":
        mask = ~seen | (looks & torch.ones_like(looks.expand(total, total)).tril())
    else:
        raise ValueError(f"Unknown objective '{objective}'; expected unimodal, bidirectional or causal.")
    real = nn.functional.pad(text_mask.bool(), (num_queries, 0), value=True)  # [B, Q + L]
    return (mask & real[:, None, :]) | torch.eye(total, dtype=torch.bool, device=text_mask.device)


class QFormerAttention(nn.Module):
    """Self-attention, or cross-attention to a source of another width, with its residual and layer norm."""

    def __init__(self, config: ZooBlip2Config, source_width: int | None = None):
        super().__init__()
        self.config = config
        width = config.qformer_hidden_size
        self.head_dim = width // config.qformer_num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width or width, width)
        self.value = nn.Linear(source_width or width, width)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.qformer_layer_norm_eps)
        self.dropout = nn.Dropout(config.qformer_hidden_dropout)

    def forward(
        self,
        states: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor | None = None,
        past: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            states (`float[B, T, D]`): what looks.
            source (`float[B, S, any]`): what is looked at.
            mask (`bool[B, T, P + S]`): true where it may be seen.
            past (`float[B, H, P, D / H]`, twice): keys and values of P positions before the source.

        Returns:
            `float[B, T, D]`, and the keys and values of the source.
        """
        query = split_heads(self.query(states), self.head_dim)
        key, value = (split_heads(project(source), self.head_dim) for project in (self.key, self.value))
        keys, values = key, value
        if past is not None:
            keys, values = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        attended = attend(
            query,
            keys,
            values,
            None if mask is None else mask.unsqueeze(1),
            implementation=self.config._attn_implementation,
            dropout=self.config.qformer_attention_dropout if self.training else 0.0,
        )
        return self.norm(self.dropout(self.dense(attended)) + states), key, value


class QFormerFeedForward(nn.Module):
    """Two linear layers with their residual and layer norm."""

    def __init__(self, config: ZooBlip2Config):
        super().__init__()
        self.up = nn.Linear(config.qformer_hidden_size, config.qformer_intermediate_size)
        self.act = ACT2FN[config.qformer_hidden_act]
        self.down = nn.Linear(config.qformer_intermediate_size, config.qformer_hidden_size)
        self.norm = nn.LayerNorm(config.qformer_hidden_size, eps=config.qformer_layer_norm_eps)
        self.dropout = nn.Dropout(config.qformer_hidden_dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dropout(self.down(self.act(self.up(states)))) + states)


class QFormerLayer(GradientCheckpointingLayer):
    """One layer: all attend to each other, queries to the image, and each kind has a feed-forward of its own."""

    def __init__(self, config: ZooBlip2Config, cross_attention: bool, text: bool):
        super().__init__()
        self.self_attention = QFormerAttention(config)
        self.cross_attention = None
        if cross_attention:
            width = config.vision_config.hidden_size * len(config.feature_layers)
            self.cross_attention = QFormerAttention(config, source_width=width)
        self.query_feed_forward = QFormerFeedForward(config)
        self.text_feed_forward = QFormerFeedForward(config) if text else None

    def forward(
        self,
        states: torch.Tensor,
        num_queries: int,
        features: torch.Tensor | None,
        mask: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states, key, value = self.self_attention(states, states, mask, past)
        queries, text = states[:, :num_queries], states[:, num_queries:]
        outputs = []
        if num_queries:
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, features)[0]
            outputs.append(self.query_feed_forward(queries))
        if text.shape[1] and self.text_feed_forward is not None:
            outputs.append(self.text_feed_forward(text))
        return torch.cat(outputs, dim=1), key, value


class QFormer(nn.Module):
    """
    A BERT whose sequence is [queries; text] and whose queries look at an image.

    Args:
        config: of the model.
        text: whether it reads text.
        pretraining: whether it is in stage 1, which reads what the text becomes and opens texts with one of two marks.
    """

    CLS, DEC = 0, 1  # rows of `marks`: before a text to be compared, and before a text to be generated

    def __init__(self, config: ZooBlip2Config, text: bool, pretraining: bool):
        super().__init__()
        self.config = config
        width = config.qformer_hidden_size
        if text:
            self.word_embeddings = nn.Embedding(config.vocabulary_of_queries, width)
            self.position_embeddings = nn.Embedding(config.qformer_max_position_embeddings, width)
        if pretraining:
            self.marks = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=config.qformer_layer_norm_eps)
        self.dropout = nn.Dropout(config.qformer_hidden_dropout)
        last = config.qformer_num_hidden_layers - 1
        self.layers = nn.ModuleList(
            QFormerLayer(
                config,
                cross_attention=index % config.qformer_cross_attention_frequency == 0,
                text=text and (index < last or pretraining),
            )
            for index in range(config.qformer_num_hidden_layers)
        )

    def embed(self, ids: torch.Tensor, mark: int | None = None) -> torch.Tensor:
        """
        Tokens to embeddings with positions, `int[B, L]` to `float[B, L, D]`, or one longer with a mark before them.

        Raises:
            ValueError: for ids outside the vocabulary, or more tokens than there are positions.
        """
        vocabulary, positions = self.word_embeddings.num_embeddings, self.position_embeddings.num_embeddings
        if not torch.compiler.is_compiling() and (ids.max() >= vocabulary or ids.min() < 0):
            raise ValueError(
                f"The Q-Former reads ids from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}: was "
                "the text made by the tokenizer of another model?"
            )
        words = self.word_embeddings(ids)
        if mark is not None:
            words = torch.cat((self.marks.weight[mark].expand(len(words), 1, -1), words), dim=1)
        if words.shape[1] > positions:
            raise ValueError(
                f"The Q-Former has {positions} positions (qformer_max_position_embeddings), the text takes "
                f"{words.shape[1]}."
            )
        return words + self.position_embeddings.weight[: words.shape[1]]

    def forward(
        self,
        queries: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        past: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """
        One pass over [queries; text]; either may be absent.

        Args:
            queries (`float[B, Q, D]`), features (`float[B, N, Dv]`): the queries, and the image they look at.
            text (`float[B, L, D]`): embeddings of `embed`.
            mask (`bool[B, T, S]`): see `qformer_mask`; `None` lets everyone see everyone.
            past: keys and values of every layer, of an earlier pass whose positions stand before these.

        Returns:
            `float[B, T, D]` (the queries alone where the last layer has nothing for text), and keys and values of
            every layer.
        """
        num_queries = 0 if queries is None else queries.shape[1]
        states = torch.cat([part for part in (queries, text) if part is not None], dim=1)
        states = self.dropout(self.norm(states))
        keys_values = []
        for index, layer in enumerate(self.layers):
            states, key, value = layer(states, num_queries, features, mask, None if past is None else past[index])
            keys_values.append((key, value))
        return states, keys_values


class Blip2Connector(nn.Module):
    """Normalises patch features, gathers them in the queries, and projects those into the language model."""

    def __init__(self, config: ZooBlip2Config, pretraining: bool = False):
        super().__init__()
        self.config = config
        if config.vision_layer_norm:
            width = config.vision_config.hidden_size * len(config.feature_layers)
            self.vision_norm = nn.LayerNorm(width, eps=config.vision_layer_norm_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_hidden_size))
        self.qformer = QFormer(config, text=config.text_conditioned or pretraining, pretraining=pretraining)
        self.projection = nn.Linear(config.qformer_hidden_size, config.text_config.hidden_size)
        if pretraining:  # saved for stage 2, which trains it; no optimiser waits for its gradient
            for name, parameter in list(self.projection.named_parameters()):
                delattr(self.projection, name)
                self.projection.register_buffer(name, parameter.detach())

    def normalise(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features of the tower as the Q-Former sees them, `float[I, N, Dv]`."""
        patches = patches.to(self.query_tokens.dtype)
        return self.vision_norm(patches) if self.config.vision_layer_norm else patches

    def queries(self, count: int) -> torch.Tensor:
        """The learned queries for each of `count` images, `float[I, Q, D]`."""
        return self.query_tokens.expand(count, -1, -1)

    def forward(
        self, features: torch.Tensor, ids: torch.Tensor | None = None, text_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            features (`float[I, N, Dv]`): patch features of the tower.
            ids (`int[I, L]`), text_mask (`bool[I, L]`): the question about each image, where there is one to be read.

        Returns:
            `float[I, Q, Dt]`
        """
        features, queries = self.normalise(features), self.queries(len(features))
        if ids is None:
            states, _ = self.qformer(queries, features)
        else:
            mask = qformer_mask("bidirectional", queries.shape[1], text_mask)
            states, _ = self.qformer(queries, features, self.qformer.embed(ids), mask)
        return self.projection(states[:, : queries.shape[1]])


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class Blip2Vocabulary:
    """Embeddings of the Q-Former that follow the language model's vocabulary when it is resized."""

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As `PreTrainedModel.resize_token_embeddings`."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        config, qformer = self.config, self.base_model.connector.qformer
        follows = config.text_conditioned and config.qformer_vocab_size is None
        if follows and qformer.word_embeddings.num_embeddings != config.vocabulary_of_queries:
            old = qformer.word_embeddings
            new = nn.Embedding(config.vocabulary_of_queries, old.embedding_dim).to(old.weight.device, old.weight.dtype)
            kept = min(new.num_embeddings, old.num_embeddings)
            with torch.no_grad():
                new.weight.normal_(mean=0.0, std=float(old.weight.float().std()))
                new.weight[:kept] = old.weight[:kept]
            new.weight.requires_grad_(old.weight.requires_grad)
            qformer.word_embeddings = new
        return embeddings


class ZooBlip2Model(Blip2Vocabulary, ZooModel):
    """Vision tower, Q-Former, language model."""

    config: ZooBlip2Config
    query_inputs = QUERY_INPUTS
    # What stage 1 trains beyond this model. A folder of a text-conditioned model that is opened without
    # `text_conditioned` loses its text branch in silence too.
    _keys_to_ignore_on_load_unexpected = [
        r"connector\.qformer\.(marks|word_embeddings|position_embeddings)\.",
        r"connector\.qformer\.layers\.\d+\.text_feed_forward\.",
        r"^(image_projection|text_projection|itm_head|text_head)\.",
        r"^temperature$",
    ]

    @property
    def reads_question(self) -> bool:
        return self.config.text_conditioned

    @property
    def places_features(self) -> bool:
        return not self.config.text_conditioned

    def build_connector(self, config: ZooBlip2Config) -> None:
        self.connector = Blip2Connector(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Blip2Connector):
            init.normal_(module.query_tokens, mean=0.0, std=0.02)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Images to tokens; or, when the question has a say in those, to what the Q-Former reads, so that one encoded
        image serves several questions.

        Args:
            pixel_values: `float[I, C, H, W]`.

        Returns:
            The tower's output with `pooler_output`: for each image one `float[Q, Dt]`, or with `text_conditioned` one
            `float[N, Dv]`.
        """
        outputs, patches = self.see(pixel_values, **kwargs)
        outputs.pooler_output = self.align(patches)
        return outputs

    def align(self, patches: torch.Tensor) -> list[torch.Tensor]:
        """
        The second half of `get_image_features`, which trains where the tower is frozen: from patches that were kept,
        `mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=model.align(patches))}`.

        Args:
            patches (`float[I, N, Dv]`): of `see`.
        """
        return list(patches if self.config.text_conditioned else self.connector(patches))

    def placeholders_of(self, features: list[torch.Tensor], vision_inputs: dict[str, torch.Tensor]) -> list[int]:
        if self.config.text_conditioned:
            return [self.config.num_query_tokens] * len(features)
        return super().placeholders_of(features, vision_inputs)

    def fuse(self, inputs_embeds, features, context: FuseContext):
        """As in the frame, after the Q-Former has read each image with the question of its row."""
        self._check_query_inputs(context)
        if features is None or not self.config.text_conditioned:
            return super().fuse(inputs_embeds, features, context)
        mask = self.placeholder_mask(context.input_ids, inputs_embeds)  # bool[B, T]
        counts = self.placeholders_of(features, context.vision_inputs)
        self.check_placeholders(mask, counts, whole_rows=context.past_key_values is None)
        ids, text_mask = self.questions(context, rows=len(mask))
        ends = (mask.sum(1).cumsum(0) // self.config.num_query_tokens).to(ids.device)  # images up to each row, int[B]
        row_of_image = torch.searchsorted(ends, torch.arange(len(features), device=ends.device), right=True)  # int[I]
        device = self.connector.query_tokens.device
        stacked = torch.stack([feature.to(device, self.connector.query_tokens.dtype) for feature in features])
        tokens = self.connector(stacked, ids[row_of_image].to(device), text_mask[row_of_image].to(device))
        return super().fuse(inputs_embeds, list(tokens), context)

    def fuse_nothing(self, inputs_embeds, blank, context: FuseContext):
        if self.config.text_conditioned:
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.connector.query_tokens.device)
            blank = list(self.connector(torch.stack(blank), ids, ids == 0))
        return super().fuse_nothing(inputs_embeds, blank, context)

    def questions(self, context: FuseContext, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What each row asks, in the vocabulary of the Q-Former: `int[B, L]`, and `bool[B, L]`, false at padding.

        Raises:
            ValueError: without what the question is read from.
        """
        limit = self.config.qformer_max_position_embeddings
        if self.config.qformer_vocab_size is None:
            return compact(*self.question(context), limit)
        ids = context.query_inputs.get("qformer_input_ids")
        if ids is None or len(ids) != rows:
            raise ValueError(
                "The Q-Former has a vocabulary of its own (qformer_vocab_size), so it needs qformer_input_ids and "
                f"qformer_attention_mask with one question for each of the {rows} rows; got "
                f"{'none' if ids is None else len(ids)}. The processor makes them when it has a qformer_tokenizer; "
                "trainers that do not pass them on, such as TRL's GRPO and RLOO, cannot train this model."
            )
        return compact(ids, context.query_inputs.get("qformer_attention_mask", torch.ones_like(ids)), limit)

    def _check_query_inputs(self, context: FuseContext) -> None:
        if context.query_inputs and not (self.config.text_conditioned and self.config.qformer_vocab_size is not None):
            why = "no vocabulary of its own (qformer_vocab_size)" if self.config.text_conditioned else "no text at all"
            raise ValueError(
                f"Got {', '.join(context.query_inputs)}, but the Q-Former of this model reads {why}: was this batch "
                "made by the processor of another model?"
            )


class ZooBlip2ForConditionalGeneration(Blip2Vocabulary, ZooForConditionalGeneration, GenerationMixin):
    """BLIP-2 with the language model's head."""

    config: ZooBlip2Config
    base_model_class = ZooBlip2Model
    _keys_to_ignore_on_load_unexpected = ZooBlip2Model._keys_to_ignore_on_load_unexpected


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------


class ZooBlip2Processor(ZooProcessor):
    r"""
    Images and text to a batch for BLIP-2.

    qformer_tokenizer (`PreTrainedTokenizerBase`, *optional*):
        Tokenizer of a Q-Former with a vocabulary of its own; it is saved in a folder beside the processor's files.
        With it, batches with images hold `qformer_input_ids` and `qformer_attention_mask`: the prompt of each row.
    num_query_tokens (`int`): as in the config.
    response_marker (`str`, *optional*):
        Where a response starts: the prompt is the text before its first occurrence, and the whole text where it does
        not occur. By default what the chat template opens the assistant's turn with.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        qformer_tokenizer=None,
        num_query_tokens: int = 32,
        response_marker: str | None = None,
        chat_template=None,
    ):
        self._qformer_tokenizer = qformer_tokenizer
        self.num_query_tokens = num_query_tokens
        self.response_marker = response_marker
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def fields_from(cls, config: ZooBlip2Config) -> dict:
        return {"num_query_tokens": config.num_query_tokens}

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        return self.num_query_tokens

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """As in the frame; with a `qformer_tokenizer` and images also the prompts in its vocabulary."""
        batch = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if self.qformer_tokenizer is None or images is None or text is None:
            return batch
        settings = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        tensors = settings.get("return_tensors")
        marker = self._marker()  # the chat template is rendered once, not for every row
        encoded = self.qformer_tokenizer(
            [self.prompt_of(sample, marker) for sample in ([text] if isinstance(text, str) else text)],
            padding=tensors is not None or settings.get("padding") not in (None, False, "do_not_pad"),
            truncation=True,
            return_tensors=tensors,
        )
        for name in ("input_ids", "attention_mask"):
            batch[f"qformer_{name}"] = encoded[name]
        return batch

    def prompt_of(self, text: str, marker: str | None = None) -> str:
        """What stands before the first response, which starts at `marker`, by default the processor's own; without
        image tokens and the token that opens a text."""
        if not isinstance(text, str):
            raise ValueError(f"The Q-Former's tokenizer reads plain text, got a {type(text).__name__}.")
        marker = self._marker() if marker is None else marker
        if marker:
            text = text.partition(marker)[0]
        for token in filter(None, (self.image_token, self.tokenizer.bos_token)):
            text = text.replace(token, "")
        return text.strip()

    def _marker(self) -> str:
        """`response_marker`, or the text with which the chat template opens the assistant's turn; empty without
        either."""
        if self.response_marker is not None:
            return self.response_marker
        if self.chat_template is None:
            return ""
        asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        before, after = (self.apply_chat_template(asked, add_generation_prompt=prompt) for prompt in (False, True))
        pairs = enumerate(zip(before, after, strict=False))
        return after[next((place for place, (one, other) in pairs if one != other), len(before)) :].strip()

    # --- the second tokenizer, which most processors do not have --------------------------------------------------

    @property
    def qformer_tokenizer(self):
        """The Q-Former's own tokenizer, or `None`."""
        return self._qformer_tokenizer

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, *(() if self.qformer_tokenizer is None else QUERY_INPUTS)]

    @property
    def caption_tokenizer(self):
        return self.tokenizer if self.qformer_tokenizer is None else self.qformer_tokenizer

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "qformer_tokenizer"]

    def to_dict(self) -> dict:
        """As in transformers; of the second tokenizer it names the folder."""
        folder = {} if self.qformer_tokenizer is None else {"qformer_tokenizer": "qformer_tokenizer"}
        return {**super().to_dict(), **folder}

    def to_json_file(self, json_file_path) -> None:
        """Writes the processor's file, and beside it the second tokenizer."""
        if self.qformer_tokenizer is not None:
            folder = os.path.dirname(json_file_path)
            self.qformer_tokenizer.save_pretrained(os.path.join(folder, "qformer_tokenizer"))
        super().to_json_file(json_file_path)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        given = kwargs.copy()
        arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        if (processor_dict or {}).get("qformer_tokenizer"):
            name = "qformer_tokenizer"
            arguments.append(cls._load_tokenizer_from_pretrained(name, pretrained_model_name_or_path, **given))
        return arguments

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict, **kwargs):
        fields = {name: value for name, value in processor_dict.items() if name != "qformer_tokenizer"}
        return super().from_args_and_dict(args, fields, **kwargs)


publish(ZooBlip2Config)
