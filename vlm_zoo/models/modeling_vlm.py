"""The frame: one way through a vision-language model, in which an architecture fills in two steps.

    processor   text + images -> input_ids int[B, T] with K placeholders an image, attention_mask, pixel_values, …
    see         vision_tower(pixel_values)                        float[I, N, Dv]   any AutoModel vision tower
    align       get_image_features -> pooler_output               I x float[K, Dt]  the architecture
    fuse        (embeds, features, context) -> (LM keyword arguments, carry)        default: scatter into placeholders
    read        language_model(**lm_inputs) -> last_hidden_state  float[B, T, Dt]   any AutoModel decoder
    head        lm_head -> logits, loss                                             the language model's own

Letters used in every shape of the zoo: B rows, T tokens, I images in the batch, N patches of an image, K tokens an
image ends as, Dv and Dt the widths of tower and language model, V the vocabulary.

An architecture subclasses `ZooModel` (it must write `get_image_features`, it may write `fuse`) and
`ZooForConditionalGeneration` (usually nothing but the name of its base model). Trainers call the base model and
project `last_hidden_state` themselves, so everything that belongs to the architecture happens in the base model, its
output has one hidden state a token, and it never sees labels.
"""

import inspect
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import load_state_dict, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import torch_compilable_check

from .configuration_vlm import ZooConfig
from .parts_vlm import build_head, build_part, cut_tower, logit_transform, pair


# The vision inputs that TRL's trainers and `generate` pass on. Architectures choose among them, and add none.
VISION_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_position_ids",
)

# What a processor may add about the prompt, for connectors that read it with a vocabulary of their own.
QUERY_INPUTS = ("qformer_input_ids", "qformer_attention_mask")

# All that may come beside the prompt: also which of its tokens see which images, as a foreign processor says it.
PROMPT_INPUTS = (*QUERY_INPUTS, "image_attention_mask")

# The parts of a model that can be trained or frozen apart, and the parameter prefixes that belong to each.
PARTS = {
    "vision": ("model.vision_tower.",),
    "connector": ("model.connector.",),
    "fusion": ("model.fusion.",),
    "language": ("model.language_model.",),
    "embeddings": (),  # the input embeddings, wherever the language model keeps them
    "head": ("lm_head.",),
}


@dataclass
class ZooImageOutput(BaseModelOutputWithPooling):
    """
    Output of `get_image_features` where fusion must know more of the images than their features.

    vision_inputs: some of `VISION_INPUTS`, one row an image, which a forward with `mm_encoder_outputs` goes on with.
    """

    vision_inputs: dict[str, torch.Tensor] | None = None


@dataclass
class ZooModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of a base model.

    last_hidden_state (`float[B, T, Dt]`), past_key_values, hidden_states, attentions: as the language model returns
    them.
    router_logits: those of a mixture-of-experts language model, when asked for.
    image_hidden_states: the features of all images, one after the other, as `get_image_features` gives them;
        `float[sum(K), Dt]` where they are the tokens of the sequence, and wider where more comes beside them.
    carry: what decode steps of this architecture need from the prefill, or `None`.
    fusion_outputs: what the architecture's `fuse` reports, or `None`.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    carry: Any = None
    fusion_outputs: Any = None


@dataclass
class ZooCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of a head model: `loss`, `logits` (`float[B, T, V]`, see `ZooForConditionalGeneration.forward`), and the
    fields of `ZooModelOutputWithPast`."""

    router_logits: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    carry: Any = None
    fusion_outputs: Any = None


@dataclass
class FuseContext:
    """What `fuse` may look at besides embeddings and features; every field may be `None`. What it wants to report, it
    leaves in `fusion_outputs`."""

    input_ids: torch.LongTensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.LongTensor | None
    past_key_values: Cache | None
    mm_token_type_ids: torch.LongTensor | None
    vision_inputs: dict[str, torch.Tensor]
    query_inputs: dict[str, torch.Tensor]
    carry: Any
    fusion_outputs: Any = None


class WholePrompt(NamedTuple):
    """
    A carry that `generate` hands to the prefill of a model that reads the prompt: the prompt from its first token
    on, though `input_ids` may be what a cache does not hold yet, and its padding, though a static cache turns
    `attention_mask` into another kind. It ends with the prefill.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class ZooPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and parts, for base models and head models alike."""

    config: ZooConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """`False`: the zoo initialises through `transformers.initialization`, which respects what was loaded. Classes
        taken for custom code would skip the rules that towers and decoders have for their container modules."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """`True`: connectors read the config at every call. transformers would guess from the names of classes."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Projections into the language model keep the scale of what they read. With a fixed 0.02 a narrow language
        # model never starts to use the image.
        if isinstance(self, ZooModel) and isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)

    @classmethod
    def from_pretrained(
        cls,
        *args,
        trainable_parts: list[str] | None = None,
        parts_from: dict[str, str] | None = None,
        **kwargs,
    ):
        """
        As `PreTrainedModel.from_pretrained`, with two options that a YAML file can give as `model_init_kwargs`.

        Args:
            trainable_parts: freezes all parts but these, such as `["connector"]`.
            parts_from: folders from which single parts are taken instead, such as `{"connector": "stage-1"}`.

        Raises:
            ValueError: for an unknown part, or a folder that does not hold exactly that part.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for part, folder in (parts_from or {}).items():
            model.load_part(part, folder)
        if trainable_parts is not None:
            model.set_trainable_parts(trainable_parts)
        return loaded

    def load_part(self, part: str, folder: str) -> None:
        """
        Replaces the weights of one part by those of a saved model.

        Args:
            part: a key of `PARTS`.
            folder: of a model, safetensors and all, that the zoo saved.

        Raises:
            ValueError: for an unknown part, or when the folder lacks a weight of the part or has one of another shape.
        """
        check_parts([part])
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"The {part} is to be read from '{folder}', but there is no *.safetensors in it.")
        prefix = "model." if self.base_model is self else ""
        state = {prefix + name: tensor for name, tensor in self.state_dict(keep_vars=True).items()}
        wanted = {name for name in state if self.part_of(name) == part}
        found = {}
        for file in files:
            found.update({name: tensor for name, tensor in load_state_dict(str(file)).items() if name in wanted})
        tied = {name for name in wanted - set(found) if any(state[name] is state[other] for other in found)}
        missing = sorted(wanted - set(found) - tied)
        if missing:
            raise ValueError(
                f"'{folder}' lacks {len(missing)} of the {len(wanted)} weights of the {part}, such as {missing[0]}: "
                "was it saved by another architecture, or with other fields in its config?"
            )
        for name, tensor in found.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"The {part} of '{folder}' does not fit: {name} is {list(tensor.shape)} there and "
                    f"{list(state[name].shape)} here."
                )
        with torch.no_grad():
            for name, tensor in found.items():
                state[name].copy_(tensor)

    def part_of(self, name: str) -> str:
        """The part (a key of `PARTS`) that a parameter, named as in the head model, belongs to."""
        if not name.startswith(("model.", "lm_head.")):
            name = f"model.{name}"
        embeddings = self.get_input_embeddings()
        if any(name.endswith(f".{path}") for path in self._embedding_names(embeddings)):
            return "embeddings"
        for part, prefixes in PARTS.items():
            if name.startswith(prefixes):
                return part
        raise ValueError(f"Parameter '{name}' belongs to no part; the parts are {', '.join(PARTS)}.")

    def _embedding_names(self, embeddings: nn.Module) -> list[str]:
        base = self.base_model
        stem = next(name for name, module in base.named_modules() if module is embeddings)
        return [f"{stem}.{name}" for name, _ in embeddings.named_parameters()]

    def set_trainable_parts(self, parts: list[str]) -> None:
        """Makes exactly the named parts trainable and freezes the others; an unknown name is a `ValueError`. A head
        tied to the embeddings follows the embeddings."""
        check_parts(parts)
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point():  # quantised weights train through an adapter alone
                parameter.requires_grad_(self.part_of(name) in parts)


class ZooModel(ZooPreTrainedModel):
    """
    Vision tower, connector and language model, without a head.

    An architecture builds its connector as `self.connector` (and modules inside the language model as `self.fusion`)
    and writes `get_image_features`. It may write `build_tower`, `check_pixels`, `fuse`, `fuse_nothing`,
    `fit_images`, `placeholders_of`, `dummy_vision_inputs`, `token_places` and `fusion_maps`.
    """

    _auto_class = "AutoModel"
    query_inputs: tuple[str, ...] = ()  # those of PROMPT_INPUTS that the architecture takes

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.build_tower(config)
        self.build_connector(config)
        self.language_model = build_part(config.text_config, "language model")
        named = inspect.signature(self.get_image_features).parameters
        self._vision_input_names = [name for name in VISION_INPUTS if name in named]
        self.post_init()

    @property
    def reads_question(self) -> bool:
        """Whether the features of an image depend on the question; see `question`."""
        return False

    @property
    def reads_prompt(self) -> bool:
        """Whether `generate` hands the prefill a `WholePrompt`, as for those that read the question."""
        return self.reads_question

    @property
    def places_features(self) -> bool:
        """Whether `get_image_features` gives one feature for each placeholder. Where it gives others, a prompt with
        images cannot be cut into chunks: `generate` hands a chunk as many features as it has placeholders."""
        return True

    @property
    def keeps_text(self) -> bool:
        """Whether text without images gets exactly what the language model alone gives it."""
        return True

    def build_tower(self, config: ZooConfig) -> None:
        """Builds `self.vision_tower` without what no feature uses."""
        self.vision_tower = build_part(config.vision_config, "vision tower")
        cut_tower(self.vision_tower, config.feature_layers)

    def build_connector(self, config: ZooConfig) -> None:
        """Builds what lies between tower and language model: sets `self.connector`. The architecture writes it."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # --- see -----------------------------------------------------------------------------------------------------

    def see(self, pixel_values: torch.Tensor, **kwargs) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """
        Runs the tower and selects its features.

        A tower none of whose parameters train runs without a graph (unless the pixels themselves want a gradient).

        Args:
            pixel_values (`float[I, C, H, W]`): the images, in any float dtype.

        Returns:
            The tower's output, and the selected patch features `float[I, N, Dv * layers]`.
        """
        tower, layers = self.vision_tower, self.config.feature_layers
        self.check_pixels(pixel_values)
        pixel_values = pixel_values.to(device=tower.device, dtype=tower.dtype)
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = layers
        kwargs["return_dict"] = True
        with torch.set_grad_enabled(self.tower_needs_graph(pixel_values)):
            outputs = tower(pixel_values, **kwargs)
        features = [outputs.hidden_states[layer] for layer in layers]
        features = features[0] if len(features) == 1 else torch.cat(features, dim=-1)
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, self.config.num_prefix_tokens :]
        return outputs, features

    def tower_needs_graph(self, pixel_values: torch.Tensor) -> bool:
        """Whether anything will ask for gradients of the tower."""
        wanted = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        return wanted and torch.is_grad_enabled()

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Raises `ValueError` unless these are images of the size that a fixed-size tower was made for."""
        vision = self.config.vision_config
        channels, (height, width) = getattr(vision, "num_channels", 3), pair(vision.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (channels, height, width):
            raise ValueError(
                f"pixel_values has shape {list(pixel_values.shape)}, the vision tower takes [I, {channels}, {height}, "
                f"{width}]: were the images prepared by the processor of another model?"
            )

    # --- align ---------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Images to what the language model reads. The architecture writes it, and names among its parameters those
        `VISION_INPUTS` that it uses.

        Returns:
            The tower's output with `pooler_output`: one `float[K, Dt]` for each image.
        """
        raise NotImplementedError

    def dummy_vision_inputs(self) -> dict[str, torch.Tensor]:
        """One blank image, for a batch without images that must still touch every vision parameter."""
        height, width = pair(self.config.vision_config.image_size)
        channels = getattr(self.config.vision_config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=self.device, dtype=self.dtype)}

    def fit_images(
        self,
        vision_inputs: dict[str, torch.Tensor],
        query_inputs: dict[str, torch.Tensor],
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> dict[str, Any]:
        """
        What `get_image_features` is given, in a forward and by `generate`: by default the vision inputs as they are.
        An architecture writes it where the prompt says how images are meant, as when rows are padded with blank ones.

        Args:
            vision_inputs: `pixel_values` and what belongs to them.
            query_inputs: what came beside the prompt; see `PROMPT_INPUTS`.
            input_ids, inputs_embeds: the prompt, one of the two.
        """
        return vision_inputs

    # --- fuse ----------------------------------------------------------------------------------------------------

    def placeholders_of(self, features: list[torch.Tensor], vision_inputs: dict[str, torch.Tensor]) -> list[int]:
        """
        How many placeholders in `input_ids` stand for each image: as many as it has features, by default.

        Args:
            features: one `float[K, Dt]` for each image, as `get_image_features` gives them.
            vision_inputs: what came with them; see `ZooImageOutput`.
        """
        return [len(feature) for feature in features]

    def fuse(
        self, inputs_embeds: torch.Tensor, features: list[torch.Tensor] | None, context: FuseContext
    ) -> tuple[dict[str, Any], Any]:
        """
        Brings features into the language model; by default they replace the embeddings of their placeholders.

        Args:
            inputs_embeds (`float[B, T, Dt]`): embeddings of the tokens.
            features: one `float[K, Dt]` for each image, in the order of the placeholders, or `None` without images.
            context: the other inputs of this forward.

        Returns:
            Keyword arguments of the language model (`inputs_embeds` among them) and the carry, `None` by default.
        """
        if features is None:
            return {"inputs_embeds": inputs_embeds}, context.carry
        mask = self.placeholder_mask(context.input_ids, inputs_embeds)  # bool[B, T]
        counts = [len(feature) for feature in features]
        self.check_placeholders(mask, counts, whole_rows=context.past_key_values is None)
        flat = torch.cat(list(features), dim=0).to(inputs_embeds.device, inputs_embeds.dtype)
        mask = mask.unsqueeze(-1).to(inputs_embeds.device)
        return {"inputs_embeds": inputs_embeds.masked_scatter(mask, flat)}, context.carry

    def fuse_nothing(
        self, inputs_embeds: torch.Tensor, blank: list[torch.Tensor], context: FuseContext
    ) -> tuple[dict[str, Any], Any]:
        """
        `fuse` for a batch of text in a sharded training: every vision parameter takes part, and contributes zero.

        Args:
            blank: the features of `dummy_vision_inputs`.
        """
        zero = sum(feature.sum() for feature in blank) * 0.0
        return self.fuse(inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype), None, context)

    def question(self, context: FuseContext) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The question of each row: its text before the first response, without placeholders.

        A response starts after `config.response_token_ids`. A row without them shows no question: whether its text
        ends with an answer cannot be told, and an answer must never be looked at.

        Returns:
            Tokens `int[B, T]`, and `bool[B, T]`, true at those of the question.

        Raises:
            ValueError: without `input_ids`, without `response_token_ids` in the config, or when padding cannot be read
                from `attention_mask`.
        """
        prompt = context.carry if isinstance(context.carry, WholePrompt) else context
        ids, padding, marker = prompt.input_ids, prompt.attention_mask, self.config.response_token_ids
        if ids is None:
            raise ValueError(f"{type(self).__name__} reads the question from input_ids, which inputs_embeds replace.")
        if not marker:
            raise ValueError(
                "The config has no response_token_ids, the tokens that open a response, so the question in input_ids "
                "cannot be told from its answer. `vlm_zoo.build` reads them from the chat template."
            )
        if padding is not None and not (isinstance(padding, torch.Tensor) and padding.ndim == 2):
            kind = list(padding.shape) if isinstance(padding, torch.Tensor) else type(padding).__name__
            raise ValueError(f"The question is read where attention_mask int[B, T] shows no padding, got {kind}.")
        if ids.shape[1] < len(marker):
            return ids, torch.zeros_like(ids, dtype=torch.bool)
        opens = (ids.unfold(1, len(marker), 1) == torch.tensor(marker, device=ids.device)).all(-1)  # [B, T - len + 1]
        first = torch.where(opens.any(1), opens.int().argmax(1), 0)
        mask = torch.arange(ids.shape[1], device=ids.device) < first[:, None]
        if padding is not None:
            mask &= padding[:, -ids.shape[1] :].bool()
        return ids, mask & (ids != self.config.image_token_id)

    def placeholder_mask(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """`bool[B, T]`, true at placeholders; without ids they are recognised by their embedding."""
        if input_ids is not None and input_ids.numel() > 0:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def check_placeholders(self, mask: torch.Tensor, expected: list[int], whole_rows: bool = True) -> None:
        """
        Raises `ValueError` when placeholders and images do not match, naming rows, images and likely cause.

        Args:
            mask (`bool[B, T]`): true at placeholders.
            expected: placeholders of each image, see `placeholders_of`.
            whole_rows: whether the rows are here from start to end, so that every image lies within one of them.
        """
        if torch.compiler.is_compiling():
            torch_compilable_check(mask.sum() == sum(expected), "Image features and image tokens do not match")
            return
        found = mask.sum(dim=1).tolist()
        ends = set(accumulate(expected, initial=0))
        if sum(found) != sum(expected) or (whole_rows and any(end not in ends for end in accumulate(found))):
            raise ValueError(mismatch_message(found, expected))

    # --- show ----------------------------------------------------------------------------------------------------

    def token_places(self, vision_inputs: dict[str, torch.Tensor], fusion_outputs: Any) -> list[torch.Tensor] | None:
        """
        Where in their images tokens stand; `None`, the default, when they stand for no place.

        Args:
            vision_inputs: those of a forward.
            fusion_outputs: what `fuse` reported there.

        Returns:
            For each image `float[K, 5]`, in the order of its placeholders: the number of a view, as the image
            processor's `view_regions` lists them, and top, left, bottom and right of what the token covers, as shares
            of that view. The view is -1 where a token stands for no place, as separators do. See `grid_places`.
        """
        return None

    def fusion_maps(self, fusion_outputs: Any) -> list[dict[str, torch.Tensor]]:
        """
        What `fuse` reported as maps to be looked at: for each image their names, and `float[h, w]` over its first
        view; an empty list, the default, when there are none.
        """
        return []

    # --- read ----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_position_ids: torch.LongTensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        carry: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ZooModelOutputWithPast:
        """
        One pass from tokens and images to hidden states.

        Args:
            input_ids (`int[B, T]`): tokens, with a run of placeholders for each image.
            pixel_values: images as the processor made them; the other vision inputs belong to them.
            inputs_embeds (`float[B, T, Dt]`): instead of `input_ids`.
            qformer_input_ids, qformer_attention_mask (`int[B, L]`): the prompt of each row in the vocabulary of a
                connector that has its own.
            image_attention_mask (`int[B, T, M]`): which of its row's images a token sees, where they can be told.
            mm_encoder_outputs: `{"image": get_image_features(...)}` from an earlier call, instead of `pixel_values`.
            carry: the carry of the prefill, on decode steps.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, both `pixel_values` and
                `mm_encoder_outputs`, a vision input that this architecture does not take, or placeholders that do not
                match the features.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        vision_inputs = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "image_sizes": image_sizes,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_position_ids": image_position_ids,
        }
        vision_inputs = {name: value for name, value in vision_inputs.items() if value is not None}
        query_inputs = {
            "qformer_input_ids": qformer_input_ids,
            "qformer_attention_mask": qformer_attention_mask,
            "image_attention_mask": image_attention_mask,
        }
        query_inputs = {name: value for name, value in query_inputs.items() if value is not None}
        self._check_names(query_inputs, self.query_inputs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        features = self._features(vision_inputs, mm_encoder_outputs, query_inputs, input_ids, inputs_embeds)
        if features == []:  # an empty pixel_values says that there are no images, so there must be no placeholder
            self.check_placeholders(self.placeholder_mask(input_ids, inputs_embeds), [])
            features = None
        context = FuseContext(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            mm_token_type_ids=mm_token_type_ids,
            vision_inputs=vision_inputs or encoded_inputs(mm_encoder_outputs),
            query_inputs=query_inputs,
            carry=carry,
        )
        if features is None and self.training and is_sharded():  # ranks must run the same collectives, images or not
            blank = self.get_image_features(**self.dummy_vision_inputs(), return_dict=True).pooler_output
            lm_inputs, carry = self.fuse_nothing(inputs_embeds, list(blank), context)
        else:
            lm_inputs, carry = self.fuse(inputs_embeds, features, context)
        lm_inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **lm_inputs}
        kwargs["return_dict"] = True
        outputs = self.language_model(past_key_values=past_key_values, **lm_inputs, **kwargs)
        return ZooModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            image_hidden_states=torch.cat(list(features), dim=0) if features is not None else None,
            carry=None if isinstance(carry, WholePrompt) else carry,
            fusion_outputs=context.fusion_outputs,
        )

    def _features(self, vision_inputs, mm_encoder_outputs, query_inputs, input_ids, inputs_embeds):
        encoded = (mm_encoder_outputs or {}).get("image")
        if "pixel_values" not in vision_inputs:
            if vision_inputs:
                raise ValueError(f"Got {', '.join(vision_inputs)} without pixel_values: images are missing.")
            return None if encoded is None else list(encoded.pooler_output)
        if encoded is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs, not both.")
        if len(vision_inputs["pixel_values"]) == 0:
            return []
        self._check_names(vision_inputs, self._vision_input_names)
        fitted = self.fit_images(vision_inputs, query_inputs, input_ids, inputs_embeds)
        if len(fitted["pixel_values"]) == 0:
            return []
        return list(self.get_image_features(**fitted, return_dict=True).pooler_output)

    def _check_names(self, given: dict[str, torch.Tensor], known: list[str] | tuple[str, ...]) -> None:
        foreign = [name for name in given if name not in known]
        if foreign:
            raise ValueError(
                f"{type(self).__name__} does not take {', '.join(foreign)}, only "
                f"{', '.join((*self._vision_input_names, *self.query_inputs))}: was this batch made by the processor "
                "of another model?"
            )


class ZooForConditionalGeneration(ZooPreTrainedModel, GenerationMixin):
    """A base model with the language model's own head. An architecture sets `base_model_class`."""

    _auto_class = "AutoModelForImageTextToText"
    _tp_plan = {"lm_head": "colwise_gather_output"}
    base_model_class: type[ZooModel]

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        self.model = self.base_model_class(config)
        self.lm_head = build_head(config.text_config)
        self.logit_scale, self.logit_cap = logit_transform(config.text_config)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        # A sampled placeholder would ask for an image that is not there.
        self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See the base model's `get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`float[…, Dt]` to `float[…, V]`, scaled and capped as the language model does."""
        logits = self.lm_head(hidden_states)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = torch.tanh(logits / self.logit_cap) * self.logit_cap
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_grid_thw: torch.LongTensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.LongTensor | None = None,
        image_position_ids: torch.LongTensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        carry: Any = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ZooCausalLMOutputWithPast:
        """
        The base model's pass (see `ZooModel.forward`), then logits and loss.

        In training mode with labels, and with `logits_to_keep` left alone, only the supervised positions are
        projected: the loss is the same, `logits` is `None`. `supervised_logits_only=False` in the config turns that
        off.

        Args:
            labels (`int[B, T]`): targets, shifted here; -100 carries no loss.
            kwargs: `shift_labels` (`int[B, T]`), targets already shifted, win over `labels`. They are not named in the
                signature, where an evaluation loop would ask every batch for them.
            num_items_in_batch: what the summed loss is divided by, instead of the number of targets.
            logits_to_keep: project only the last positions, or those named.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_grid_thw=image_grid_thw,
            image_sizes=image_sizes,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            image_position_ids=image_position_ids,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            image_attention_mask=image_attention_mask,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            carry=carry,
            **{**kwargs, "return_dict": True},
        )
        hidden_states = outputs.last_hidden_state
        supervised = labels is not None or shift_labels is not None
        keep_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        logits = loss = None
        if supervised and self.training and keep_all and self.config.supervised_logits_only:
            loss = self._supervised_loss(hidden_states, labels, shift_labels, num_items_in_batch, **kwargs)
        else:
            logits = self.logits_of(slice_logits_to_keep(hidden_states, logits_to_keep))
            if supervised:
                loss = self.loss_function(
                    logits,
                    labels,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=shift_labels,
                    **kwargs,
                )
        return ZooCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
            carry=outputs.carry,
            fusion_outputs=outputs.fusion_outputs,
        )

    def _supervised_loss(self, hidden_states, labels, shift_labels, num_items_in_batch, **kwargs) -> torch.Tensor:
        """The loss of all positions, from the logits of those that carry a label."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        shift_labels = shift_labels.to(hidden_states.device)
        mask = shift_labels != -100
        if not mask.any():
            return self.logits_of(hidden_states[:1, :1]).sum() * 0.0  # keeps every parameter in the graph
        return self.loss_function(
            self.logits_of(hidden_states[mask]),  # float[S, V]
            None,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels[mask],
            **kwargs,
        )

    # --- generate ------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*VISION_INPUTS, *PROMPT_INPUTS, "mm_encoder_outputs"):
                model_inputs.pop(name, None)
        elif model_inputs.get("input_ids") is not None:
            if self.model.reads_prompt:
                model_inputs["carry"] = WholePrompt(input_ids, kwargs.get("attention_mask"))
            if is_first_iteration and self.model.places_features:
                self._leave_out_cached_images(model_inputs, input_ids)
        return model_inputs

    def _leave_out_cached_images(self, model_inputs: dict[str, Any], input_ids: torch.LongTensor) -> None:
        """Where the prompt begins in a kept cache, the features of its placeholders there are left out."""
        encoded = (model_inputs.get("mm_encoder_outputs") or {}).get("image")
        cached = input_ids.shape[1] - model_inputs["input_ids"].shape[1]
        if encoded is None or cached <= 0:
            return
        mask = self.model.placeholder_mask(input_ids, None)
        features = torch.cat(list(encoded.pooler_output))
        if len(features) != mask.sum():
            return  # images of the rest alone
        columns = mask.nonzero()[:, 1]  # of each feature, row by row as the features are
        rest = features[columns >= cached]
        rest = type(encoded)(pooler_output=[rest]) if len(rest) else None
        model_inputs["mm_encoder_outputs"] = {**model_inputs["mm_encoder_outputs"], "image": rest}

    def _prepare_generation_config(self, *args, **kwargs):
        """As in transformers; placeholders are suppressed whatever else the caller suppresses, and a prompt with
        images is prefilled in one piece where its features are not those of its placeholders."""
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if not self.model.places_features and holds_images(model_kwargs):
            generation_config.prefill_chunk_size = None
        suppressed = {self.config.image_token_id, *(generation_config.suppress_tokens or [])}
        generation_config.suppress_tokens = sorted(suppressed)
        return generation_config, model_kwargs

    def _maybe_prepare_encoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        """As in transformers; images are fitted to the prompt before they are seen."""
        pixel_values, embeds = model_kwargs.get("pixel_values"), model_kwargs.get("inputs_embeds")
        if pixel_values is not None and len(pixel_values) > 0:
            given = {name: model_kwargs[name] for name in VISION_INPUTS if model_kwargs.get(name) is not None}
            beside = {name: model_kwargs[name] for name in PROMPT_INPUTS if model_kwargs.get(name) is not None}
            fitted = self.model.fit_images(given, beside, inputs_tensor if embeds is None else None, embeds)
            others = {name: value for name, value in model_kwargs.items() if name not in VISION_INPUTS}
            model_kwargs = {**others, **(fitted if len(fitted["pixel_values"]) > 0 else {})}
        return super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """As in transformers; a prompt that does not fit its images is refused before it is answered."""
        if input_ids is not None and input_ids.numel() > 0 and model_kwargs.get("past_key_values") is None:
            encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
            features = [] if encoded is None else list(encoded.pooler_output)
            expected = self.model.placeholders_of(features, encoded_inputs(model_kwargs.get("mm_encoder_outputs")))
            self.model.check_placeholders(self.model.placeholder_mask(input_ids, None), expected)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.get("carry") is not None:
            model_kwargs["carry"] = outputs.carry
        return model_kwargs

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size, inputs_embeds=None):
        """Repeats each row's images for its beams or samples. The caller's outputs are left as they are, so that they
        serve further calls."""
        encoded = mm_encoder_output.get("image")
        if encoded is None:
            return mm_encoder_output
        features = list(encoded.pooler_output)
        mask = self.model.placeholder_mask(input_ids, inputs_embeds)
        inputs = encoded_inputs(mm_encoder_output)
        counts = self.model.placeholders_of(features, inputs)
        self.model.check_placeholders(mask, counts)
        images, start = [], 0  # the numbers of the images, row by row
        for wanted in mask.sum(dim=1).tolist():
            end, found = start, 0
            while found < wanted:
                found += counts[end]
                end += 1
            images += [*range(start, end)] * expand_size
            start = end
        expanded = {"pooler_output": [features[image] for image in images]}
        if inputs:
            expanded["vision_inputs"] = {name: value[images] for name, value in inputs.items()}
        return {**mm_encoder_output, "image": type(encoded)(**{**encoded, **expanded})}


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def holds_images(inputs: dict[str, Any]) -> bool:
    """Whether keyword arguments of a forward hold images, as pixels or encoded."""
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    return encoded is not None or any(inputs.get(name) is not None for name in VISION_INPUTS)


def encoded_inputs(mm_encoder_outputs: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """What encoded images bring along for fusion; see `ZooImageOutput`."""
    encoded = (mm_encoder_outputs or {}).get("image")
    return {} if encoded is None else encoded.get("vision_inputs") or {}


def check_parts(parts: list[str]) -> None:
    """Raises `ValueError` unless every name is a key of `PARTS`."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"Unknown part(s) {sorted(unknown)}; the parts of a model are {', '.join(PARTS)}.")


def is_sharded() -> bool:
    """Whether several ranks train together, so that all of them must touch the same parameters."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def mismatch_message(found: list[int], expected: list[int]) -> str:
    """
    Explains why the placeholders of the rows do not fit the features of the images.

    Args:
        found: placeholders in each row of `input_ids`.
        expected: placeholders that each image needs, in order.
    """
    image = 0
    where = "every row is filled and images are left over"
    for row, count in enumerate(found):
        need, first = 0, image
        while need < count and image < len(expected):
            need += expected[image]
            image += 1
        if need != count:
            images = f"image {first}" if image - first <= 1 else f"images {first} to {image - 1}"
            where = f"row {row} holds {count} image tokens, {images} of the batch would fill {need}"
            break
    total, wanted = sum(found), sum(expected)
    if total == 0:
        where = "no row holds an image token"
        cause = "the text has no placeholder: a chat template that drops images, or text made without the processor"
    elif not expected:
        cause = "images are missing"
    elif total == wanted:
        cause = "images that belong to other rows: texts and images in different orders"
    elif total < wanted:
        cause = "truncated text (a max_length that cuts placeholders) or more images than the text asks for"
    else:
        cause = "a generated placeholder, missing images, or text made by the processor of another model"
    return (
        f"Image features and image tokens do not match, tokens: {total}, features: {wanted}. "
        f"Of {len(found)} rows and {len(expected)} images, {where}. Likely cause: {cause}."
    )
