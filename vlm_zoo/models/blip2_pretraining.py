"""BLIP-2's first stage: the Q-Former learns from captions what of an image words can say. No language model.

Paper: BLIP-2 (huggingface.co/papers/2301.12597), section 3.2 and figure 2; the formulas follow its authors' release.

Paper map:
    image-text contrast (ITC)           `ZooBlip2ForPretraining.embed_images`, `embed_texts`; `similarity`
    image-text matching (ITM)           `ZooBlip2ForPretraining.match`; `sample_negatives`
    image-grounded generation (ITG)     `ZooBlip2ForPretraining.generate_captions`
    the masks of figure 2               `qformer_mask` in `blip2.py`

Deviations: in evaluation mode the hardest negatives are taken instead of random ones. A caption that is word for word
that of another image is no negative of that image. The temperature is never used below 0.01. [CLS] and [DEC] are two
embeddings of the Q-Former, not tokens, so that a batch is nothing but tokenised captions, of whatever vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .blip2 import Blip2Connector, QFormer, ZooBlip2Config, ZooBlip2Model, compact, qformer_mask
from .modeling_vlm import ZooPreTrainedModel, is_sharded


LABEL_SMOOTHING = 0.1
LOWEST_TEMPERATURE = 0.01
EVEN_CHANCE = 1e-4  # added to each negative's probability, so that each can be drawn


@dataclass
class ZooBlip2PretrainingOutput(ModelOutput):
    """
    Output of stage 1; W ranks train together.

    loss: the sum of the three.
    itc_loss, itm_loss, itg_loss: contrast, matching and generation.
    logits_per_image (`float[B, W * B]`): this rank's images against all captions, divided by the temperature.
    logits_per_text (`float[B, W * B]`): this rank's captions against all images.
    itm_logits (`float[B + 2 * R, 2]`): "no" and "yes" for the B pairs of the batch, then for R captions with a foreign
        image, then for R images with a foreign caption; R rows have a possible negative, all or nearly all.
    """

    loss: torch.FloatTensor | None = None
    itc_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    itg_loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None


class Blip2Reader(ZooBlip2Model):
    """Tower and connector of a BLIP-2 under their own names, without a language model."""

    def __init__(self, config: ZooBlip2Config):
        ZooPreTrainedModel.__init__(self, config)
        self.build_tower(config)
        self.build_connector(config)
        self.post_init()

    def build_connector(self, config: ZooBlip2Config) -> None:
        self.connector = Blip2Connector(config, pretraining=True)

    def forward(self, *args, **kwargs):
        """There is nothing to run without a language model."""
        raise ValueError("This is the tower and the Q-Former of stage 1: call ZooBlip2ForPretraining.")

    def get_input_embeddings(self) -> nn.Module:
        return self.connector.qformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.connector.qformer.word_embeddings = value


class Blip2TextHead(nn.Module):
    """BERT's head for words: a transform, then the word embeddings as decoder."""

    def __init__(self, config: ZooBlip2Config):
        super().__init__()
        self.dense = nn.Linear(config.qformer_hidden_size, config.qformer_hidden_size)
        self.act = ACT2FN[config.qformer_hidden_act]
        self.norm = nn.LayerNorm(config.qformer_hidden_size, eps=config.qformer_layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocabulary_of_queries))

    def forward(self, states: torch.Tensor, words: nn.Embedding) -> torch.Tensor:
        """`float[…, D]` to `float[…, V]`."""
        return F.linear(self.norm(self.act(self.dense(states))), words.weight, self.bias)


class ZooBlip2ForPretraining(ZooPreTrainedModel):
    """
    Stage 1 of BLIP-2: contrast, matching and generation on images with captions.

    Its tower and connector have the names that they have in `ZooBlip2ForConditionalGeneration`, so either starts from
    the other's folder:

    ```python
    >>> model = ZooBlip2ForPretraining.from_pretrained("built")
    >>> Trainer(model, settings, train_dataset=rows, data_collator=CaptionCollator(processor)).train()
    >>> model.save_pretrained("stage-1")
    >>> ZooBlip2ForConditionalGeneration.from_pretrained("built", parts_from={"connector": "stage-1"})
    ```

    Negatives come from the batch, and from those of the other ranks: gradient accumulation does not add to them.
    """

    config: ZooBlip2Config
    _auto_class = "AutoModelForPreTraining"
    _keys_to_ignore_on_load_unexpected = [r"^model\.language_model\.", r"^lm_head\."]

    def __init__(self, config: ZooBlip2Config):
        super().__init__(config)
        self.model = Blip2Reader(config)
        width, shared = config.qformer_hidden_size, config.image_text_hidden_size
        self.image_projection = nn.Linear(width, shared)
        self.text_projection = nn.Linear(width, shared)
        self.itm_head = nn.Linear(width, 2)
        self.text_head = Blip2TextHead(config)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
        elif isinstance(module, Blip2TextHead):
            init.zeros_(module.bias)
        elif module is self:
            init.constant_(module.temperature, 0.07)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Refused: the vocabulary is that of the model whose stage 1 this is."""
        raise ValueError(
            "Stage 1 reads captions in the vocabulary of the model that it prepares: resize that one, and start stage "
            "1 from its folder."
        )

    def part_of(self, name: str) -> str:
        """The part (a key of `PARTS`) that a parameter belongs to; word embeddings are the connector's here."""
        for part, prefix in (("vision", "model.vision_tower."), ("connector", "model.connector.")):
            if name.startswith(prefix):
                return part
        return "head"

    # --- the three passes ----------------------------------------------------------------------------------------

    @property
    def qformer(self) -> QFormer:
        return self.model.connector.qformer

    def see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images as the Q-Former sees them, `float[I, C, H, W]` to `float[I, N, Dv]`."""
        return self.model.connector.normalise(self.model.see(pixel_values)[1])

    def check_pairs(self, pixel_values: torch.Tensor, ids: torch.Tensor) -> None:
        """Raises `ValueError` unless there are as many images as texts, and any at all."""
        if len(pixel_values) != len(ids) or len(ids) == 0:
            raise ValueError(f"Got {len(pixel_values)} images and {len(ids)} captions: expected one of each.")

    def read(self, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions with their padding moved to the right, `int[B, L]` and `bool[B, L]`."""
        return compact(ids, torch.ones_like(ids) if attention_mask is None else attention_mask)

    def embed_images(self, features: torch.Tensor) -> tuple[torch.Tensor, list]:
        """
        The pass of queries without text.

        Args:
            features (`float[I, N, Dv]`): of `see`.

        Returns:
            A unit vector for each query of each image, `float[I, Q, P]`, and the keys and values of every layer.
        """
        states, keys_values = self.qformer(self.model.connector.queries(len(features)), features)
        return F.normalize(self.image_projection(states).float(), dim=-1), keys_values

    def embed_texts(self, ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """The pass of text without queries: a unit vector for each text, `float[B, P]`, read at its [CLS]."""
        mask = qformer_mask("unimodal", 0, F.pad(text_mask, (1, 0), value=True))
        states, _ = self.qformer(text=self.qformer.embed(ids, QFormer.CLS), mask=mask)
        return F.normalize(self.text_projection(states[:, 0]).float(), dim=-1)

    def match(self, features: torch.Tensor, ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """
        The pass of queries and text that see each other.

        Args:
            features (`float[B, N, Dv]`): of `see`.
            ids (`int[B, L]`), text_mask (`bool[B, L]`): a text for each image, of `read`.

        Returns:
            `float[B, 2]`: logits of "no" and "yes", the mean over queries.
        """
        queries = self.model.connector.queries(len(features))
        mask = qformer_mask("bidirectional", queries.shape[1], F.pad(text_mask, (1, 0), value=True))
        states, _ = self.qformer(queries, features, self.qformer.embed(ids, QFormer.CLS), mask)
        return self.itm_head(states[:, : queries.shape[1]]).mean(dim=1).float()

    def generate_captions(self, keys_values: list, ids: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        """
        The pass of text that sees its own past, and the queries of an earlier pass.

        Args:
            keys_values: of `embed_images`.
            ids (`int[B, L]`), text_mask (`bool[B, L]`): of `read`.

        Returns:
            `float[B, 1 + L, V]`: logits of the token after [DEC], and after each token.
        """
        queries = self.config.num_query_tokens
        mask = qformer_mask("causal", queries, F.pad(text_mask, (1, 0), value=True))[:, queries:]
        states, _ = self.qformer(text=self.qformer.embed(ids, QFormer.DEC), mask=mask, past=keys_values)
        return self.text_head(states, self.qformer.word_embeddings)

    # --- training ------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> ZooBlip2PretrainingOutput:
        """
        The three losses of a batch of images, each with its caption.

        Args:
            pixel_values: `float[B, C, H, W]`.
            input_ids (`int[B, L]`): the captions and nothing else; [CLS] and [DEC] are put before them here.
            attention_mask (`int[B, L]`): zero at padding, on either side.
            return_loss: `False` gives the contrastive logits alone.

        Raises:
            ValueError: when images and captions differ in number, here or between the ranks.
        """
        self.check_pairs(pixel_values, input_ids)
        ids, text_mask = self.read(input_ids, attention_mask)
        features = self.see(pixel_values)
        images, keys_values = self.embed_images(features)
        texts = self.embed_texts(ids, text_mask)
        own, first = (features, ids, text_mask), 0  # `first` is the place of this rank's rows among those of all
        everyone, all_images, all_texts = own, images, texts
        if is_sharded():
            first = torch.distributed.get_rank() * len(ids)
            all_ids, all_masks = gather_texts(ids, text_mask)  # before the others: it checks the number of rows
            everyone = (Gather.apply(features), all_ids, all_masks)
            all_images, all_texts = Gather.apply(images), Gather.apply(texts)
        temperature = self.temperature.float()
        # Its value has a floor, its gradient has none: at the floor it can still rise.
        temperature = temperature + (temperature.clamp(min=LOWEST_TEMPERATURE) - temperature).detach()
        per_image = similarity(images, all_texts) / temperature
        per_text = similarity(all_images, texts).T / temperature
        if not return_loss:
            return ZooBlip2PretrainingOutput(logits_per_image=per_image, logits_per_text=per_text)

        targets = first + torch.arange(len(ids), device=ids.device)
        itc = sum(F.cross_entropy(one, targets, label_smoothing=LABEL_SMOOTHING) for one in (per_image, per_text)) / 2
        choose = sample_negatives if self.training else hardest_negatives
        itm_logits = self.match(*with_negatives(own, everyone, per_image, per_text, choose))
        is_pair = torch.arange(len(itm_logits), device=ids.device) < len(ids)
        itm = F.cross_entropy(itm_logits, is_pair.long())
        logits = self.generate_captions(keys_values, ids, text_mask)[:, :-1]  # nothing follows the last token
        words = text_mask.any()  # captions may all be empty
        itg = F.cross_entropy(logits[text_mask].float(), ids[text_mask]) if words else logits.sum() * 0.0
        losses = {"itc_loss": itc, "itm_loss": itm, "itg_loss": itg}
        return ZooBlip2PretrainingOutput(
            loss=sum(losses.values()),
            **losses,
            logits_per_image=per_image,
            logits_per_text=per_text,
            itm_logits=itm_logits,
        )

    # --- use -----------------------------------------------------------------------------------------------------

    def get_image_text_similarity(
        self, pixel_values: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cosine of every image with every text, the best of its queries: `float[I, B]`."""
        images, _ = self.embed_images(self.see(pixel_values))
        return similarity(images, self.embed_texts(*self.read(input_ids, attention_mask)))

    def get_match_probability(
        self, pixel_values: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """How probably each text belongs to the image of its row: `float[B]`."""
        self.check_pairs(pixel_values, input_ids)
        logits = self.match(self.see(pixel_values), *self.read(input_ids, attention_mask))
        return logits.softmax(dim=-1)[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """The cosine of each text with the query that is nearest to it: `float[I, Q, P]`, `float[B, P]` to
    `float[I, B]`."""
    return (images @ texts.T).amax(dim=1)


def same_text(
    ids: torch.Tensor, mask: torch.Tensor, other_ids: torch.Tensor, other_mask: torch.Tensor
) -> torch.Tensor:
    """`bool[B, C]`: whether text i of the one (`int[B, L]`) is, token for token, text j of the other (`int[C, M]`)."""
    width = max(ids.shape[1], other_ids.shape[1])
    one, other = (
        padded_ids.masked_fill(~padded_mask, -1)
        for padded_ids, padded_mask in (pad_texts(ids, mask, width), pad_texts(other_ids, other_mask, width))
    )
    return (one[:, None] == other[None]).all(dim=-1)


def pad_texts(ids: torch.Tensor, mask: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts `int[B, L]` and their mask with padding at the right, `int[B, width]` and `bool[B, width]`."""
    room = (0, width - ids.shape[1])
    return F.pad(ids, room), F.pad(mask, room, value=False)


def with_negatives(
    own: tuple, everyone: tuple, per_image: torch.Tensor, per_text: torch.Tensor, choose: Callable
) -> tuple:
    """
    The pairs of a batch, and two wrong pairs for each of their rows that has a possible negative.

    Args:
        own: features `float[B, N, Dv]`, captions `int[B, L]` and their mask `bool[B, L]`.
        everyone: the same of all ranks, C rows and their own width.
        per_image, per_text (`float[B, C]`): the contrast, from which negatives are drawn.
        choose: `sample_negatives` or `hardest_negatives`.

    Returns:
        Features, captions and mask, B + 2 R rows: the pairs, captions with foreign images, images with foreign
        captions.
    """
    features, ids, mask = own
    all_features, all_ids, all_masks = everyone
    allowed = ~same_text(ids, mask, all_ids, all_masks)
    rows = allowed.any(dim=1).nonzero()[:, 0]
    image_of_text = choose(per_text[rows], allowed[rows])
    text_of_image = choose(per_image[rows], allowed[rows])
    ids, mask = pad_texts(ids, mask, all_ids.shape[1])
    return (
        torch.cat((features, all_features[image_of_text], features[rows])),
        torch.cat((ids, ids[rows], all_ids[text_of_image])),
        torch.cat((mask, mask[rows], all_masks[text_of_image])),
    )


@torch.no_grad()
def sample_negatives(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """
    Draws a negative for each row, the more often the more it resembles a positive.

    Args:
        logits (`float[R, C]`): of the contrast.
        allowed (`bool[R, C]`): which columns are negatives of a row; at least one in each.

    Returns:
        `int[R]`: columns.
    """
    if len(logits) == 0:
        return torch.zeros(0, dtype=torch.long, device=logits.device)
    weights = (logits.softmax(dim=1) + EVEN_CHANCE).masked_fill(~allowed, 0.0)
    return torch.multinomial(weights, 1)[:, 0]


def hardest_negatives(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The negative of each row that resembles a positive most: what an evaluation takes, whose loss must not be a
    matter of luck. Shapes as in `sample_negatives`."""
    return logits.masked_fill(~allowed, -torch.inf).argmax(dim=1)


class Gather(torch.autograd.Function):
    """The rows of all ranks, one rank after the other; a gradient finds its way back to the rank it belongs to."""

    @staticmethod
    def forward(context, tensor: torch.Tensor) -> torch.Tensor:
        context.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()  # reduced in place, and others may hold the one handed in
        torch.distributed.all_reduce(gradient)
        first = torch.distributed.get_rank() * context.rows
        return gradient[first : first + context.rows]


def gather_texts(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The texts of all ranks, one rank after the other, padded to the longest.

    Raises:
        ValueError: when the ranks do not have the same number of rows.
    """
    shape = torch.tensor([ids.shape], device=ids.device)  # [1, 2]
    shapes = Gather.apply(shape).tolist()
    if len({rows for rows, _ in shapes}) > 1:
        raise ValueError(
            f"The ranks have {[rows for rows, _ in shapes]} captions, expected as many on each: set "
            "dataloader_drop_last, or leave the batches to accelerate."
        )
    ids, mask = pad_texts(ids, mask, max(length for _, length in shapes))
    return Gather.apply(ids), Gather.apply(mask.long()).bool()
