"""ARR-COC: what a question asks for keeps its detail, the rest is compressed, and the number of tokens is exact.

Source: github.com/djwar42/arr-coc-0-1 ("Adaptive Relevance Realization - Contexts Optical Compression") gives the idea
and the words; its scores only feed a top-k and cannot learn. The formulas are the zoo's own. Noise in place of detail
as a gradient for selection: AutoSelect (huggingface.co/papers/2603.07135).

Map of names:
    three ways of knowing                   `PropositionalScorer`, `PerspectivalScorer`, `ParticipatoryScorer`
    opponent processing, balancing          `OpponentBalancer`: three tensions
    attending, 64 to 400 tokens             `detail_vlm`: regions with ladders 2 x 2, 3 x 3, 5 x 5 under `token_budget`
    procedural knowing, quality adapter     `QualityAdapter`
    texture array of 13 channels            `texture_vlm`

    get_image_features     native tokens, and the texture of their cells    the same for every question
    fuse                   question -> relevance -> allocation -> pooled tokens with their boxes
                           -> gate (training) -> adapter -> sequence, positions in the middle of each box

With a budget of all native tokens this is M-RoPE with the same weights.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import publish
from .detail_vlm import Allocation, DetailTable, allocate, budget_of, detail_table, overlaps, pooling, uniform_boxes
from .layers import compact
from .modeling_vlm import FuseContext, WholePrompt, ZooImageOutput
from .multi_axis_vlm import (
    NO_GRIDS,
    MultiAxisConfig,
    MultiAxisForConditionalGeneration,
    MultiAxisModel,
    MultiAxisProcessor,
)
from .native_vlm import in_squares, patch_geometry
from .positions_vlm import Runs, runs_of_grids
from .relevance_vlm import (
    SCORERS,
    TENSIONS,
    Balance,
    OpponentBalancer,
    ParticipatoryScorer,
    PerspectivalScorer,
    Pictures,
    PropositionalScorer,
)
from .texture_vlm import TEXTURE_CHANNELS, texture_of_patches


_ENTROPIES = 4
_STATISTICS = len(TEXTURE_CHANNELS) + _ENTROPIES  # of a cell, behind its token


@strict
class ZooArrCocConfig(MultiAxisConfig):
    r"""
    Configuration of ARR-COC; native resolution, positions, mergers and DeepStack are those of `MultiAxisConfig`.

    token_budget (`int` or `float`):
        Visual tokens of an image, or of each time step of a clip; at most its native tokens. A float is a share of
        those.
    ladder (`list[int]`):
        Sides of the grids of tokens that a region may have, ascending; a region is a square of the last one's cells. A
        0 at the beginning drops a region instead of compressing it.
    coarse_share (`float`): share of the budget that the coarsest level may take; else regions become larger.
    allocation (`"relevance"`, `"uniform"` or `"random"`):
        Who decides: relevance, or for comparison nobody: the same detail everywhere, or in random regions.
    weighted_pooling (`bool`): whether more active cells of a region weigh more in its pooled tokens.
    token_order (`"raster"` or `"relevance"`): of the tokens: region by region, or the most relevant regions first.
    scorers (`list[str]`): the maps that count, of propositional, perspectival and participatory.
    fixed_tensions (`list[float]`, *optional*):
        Three numbers between 0 and 1 instead of learned tensions: compress, exploit, focus.
    relevance_heads, relevance_head_dim (`int`): of the attention between question and content.
    gate (`"noise"`, `"attn_bias"`, `"multiply"`, `"crossfade"` or `"none"`):
        How gradients reach the scorers: noise in place of the detail of regions that were nearly not chosen, a bias on
        attention to them, or, as ablations, tokens scaled or blurred by the membership, or not at all. Evaluation is
        the same for all.
    gate_temperature (`float`): of the memberships.
    exploration (`float`): strength of the Gumbel noise on relevance with which training begins.
    exploration_steps (`int`): training forwards until there is none.
    tension_coefficient (`float`): of the mean squared distance of the tensions from 0.5, an auxiliary loss.
    entropy_coefficient (`float`):
        Of the mean entropy of the regions' shares, between 0 and 1, an auxiliary loss. Auxiliary losses are added to
        the gradient once a forward, whatever the trainer divides the main loss by: four forwards of one row add up to
        four times what one forward of four rows adds.
    image_mean, image_std (`list[float]`): how pixels were normalised.
    """

    model_type = "zoo_arr_coc"

    token_budget: int | float = 200
    ladder: list[int] | None = None
    coarse_share: float | int = 0.5
    allocation: Literal["relevance", "uniform", "random"] = "relevance"
    weighted_pooling: bool = True
    token_order: Literal["raster", "relevance"] = "raster"
    scorers: list[str] | None = None
    fixed_tensions: list[float | int] | None = None
    relevance_heads: int = 4
    relevance_head_dim: int = 64
    gate: Literal["noise", "attn_bias", "multiply", "crossfade", "none"] = "noise"
    gate_temperature: float | int = 1.0
    exploration: float | int = 1.0
    exploration_steps: int = 1000
    tension_coefficient: float | int = 1e-4
    entropy_coefficient: float | int = 0.0
    image_mean: list[float | int] | None = None
    image_std: list[float | int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.ladder = [2, 3, 5] if self.ladder is None else list(self.ladder)
        self.scorers = list(SCORERS) if self.scorers is None else list(self.scorers)
        self.image_mean = [0.5] * 3 if self.image_mean is None else list(self.image_mean)
        self.image_std = [0.5] * 3 if self.image_std is None else list(self.image_std)

    def validate_budget(self):
        """Part of `@strict` validation: a budget and a ladder."""
        budget, ladder = self.token_budget, self.ladder or []
        if budget <= 0 or (isinstance(budget, float) and budget > 1):
            raise ValueError(f"token_budget is {budget}, expected a whole number of tokens or a share up to 1.0.")
        if len(ladder) < 2 or ladder != sorted(set(ladder)) or ladder[0] < 0 or ladder[-1] < 1:
            raise ValueError(f"ladder is {ladder}, expected at least two ascending sides, such as [2, 3, 5].")
        if not 0 < self.coarse_share <= 1:
            raise ValueError(f"coarse_share is {self.coarse_share}, expected more than 0 and at most 1.")

    def validate_relevance(self):
        """Part of `@strict` validation: scorers, tensions, gate."""
        unknown = set(self.scorers or []) - set(SCORERS)
        if unknown or not self.scorers or len(set(self.scorers)) != len(self.scorers):
            raise ValueError(f"scorers is {self.scorers}, expected some of {', '.join(SCORERS)}.")
        fixed = self.fixed_tensions
        if fixed is not None and (len(fixed) != len(TENSIONS) or not all(0 <= tension <= 1 for tension in fixed)):
            raise ValueError(f"fixed_tensions is {fixed}, expected {len(TENSIONS)} numbers from 0 to 1: {TENSIONS}.")
        for name in ("gate_temperature", "exploration_steps", "relevance_heads", "relevance_head_dim"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0.")
        for name in ("exploration", "tension_coefficient", "entropy_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more.")

    @classmethod
    def small_fields(cls, width: int, from_scratch: bool = False) -> dict:
        fields = {"ladder": [1, 2], "relevance_head_dim": 16, "exploration_steps": 500}
        budget = 0.5 if from_scratch else 6
        return {**super().small_fields(width, from_scratch), **fields, "token_budget": budget}

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds to the gradient of the main loss."""
        learned = self.fixed_tensions is None and self.tension_coefficient > 0
        return self.allocation == "relevance" and (learned or self.entropy_coefficient > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ImageRelevance:
    """
    What became of an image, or of one time step of a clip, of h x w cells.

    image: its number in the batch. relevance_map (`float[h, w]`): activation of the cells. propositional_map,
    perspectival_map, participatory_map (`float[h, w]`): of the scorers that count. balance (`float[3]`): the tensions.
    shares (`float[rows, columns]`): of the regions, in the sum 1. levels (`int[rows, columns]`): how far up the ladder
    each region came. region_side: in cells. boxes (`float[K, 4]`): top, left, bottom and right of each token in cells.
    positions (`float[K, 2]`): row and column of each token. token_regions (`int[K]`): the region of each token.
    """

    image: int
    size: tuple[int, int]
    boxes: torch.Tensor
    positions: torch.Tensor
    relevance_map: torch.Tensor | None = None
    propositional_map: torch.Tensor | None = None
    perspectival_map: torch.Tensor | None = None
    participatory_map: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    region_side: int | None = None
    token_regions: torch.Tensor | None = None

    @property
    def tensions(self) -> dict[str, float] | None:
        """The tensions by name, from 0 to 1: 1 for the first of the two words."""
        return None if self.balance is None else dict(zip(TENSIONS, self.balance.tolist(), strict=True))

    @property
    def tokens_per_region(self) -> torch.Tensor | None:
        """`int[rows, columns]`."""
        if self.levels is None:
            return None
        return torch.bincount(self.token_regions, minlength=self.levels.numel()).view_as(self.levels)

    def maps(self) -> dict[str, torch.Tensor]:
        """The maps that there are, by name, `float[h, w]` each."""
        found = {name: getattr(self, f"{name}_map") for name in ("relevance", *SCORERS)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass
class ArrCocOutput:
    """
    What fusion reports: `images`, one for each image or time step in the order of the batch, and `auxiliary_loss`,
    whose gradient this forward brought along, or `None`.
    """

    images: list[ImageRelevance]
    auxiliary_loss: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Fusion
# ---------------------------------------------------------------------------------------------------------------------


class QualityAdapter(nn.Module):
    """
    Tells pooled tokens apart from native ones: a bottleneck that knows the level and the area of a token, behind a
    gate that starts closed. Native tokens stay as they are.
    """

    def __init__(self, width: int, levels: int, level_width: int = 16):
        super().__init__()
        self.levels = nn.Embedding(levels, level_width)
        self.norm = nn.LayerNorm(width + level_width)
        self.down = nn.Linear(width + level_width + 1, max(width // 4, 1))
        self.up = nn.Linear(max(width // 4, 1), width)
        self.level_gate = nn.Parameter(torch.zeros(levels))

    def forward(self, tokens: torch.Tensor, level: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """`float[G, K, Dt]` to the same; `level` int[G, K], `cells` float[G, K] is the area of each token."""
        level = level.clamp(max=len(self.level_gate) - 1)
        context = torch.cat((tokens, self.levels(level).to(tokens.dtype)), dim=-1)
        context = torch.cat((self.norm(context), cells.log2()[..., None].to(context.dtype)), dim=-1)
        change = self.up(nn.functional.gelu(self.down(context)))
        gate = self.level_gate[level] * (cells > 1)
        return tokens + gate[..., None].to(tokens.dtype) * change


class PlaceCode(nn.Module):
    """A code of rows and columns for language models without axes, behind a gate that starts closed."""

    def __init__(self, width: int):
        super().__init__()
        self.place_gate = nn.Parameter(torch.zeros(width))

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """`float[K, 2]` to `float[K, Dt]`."""
        width = len(self.place_gate)
        count = -(-width // 4)
        turns = places[:, :, None] * 10000.0 ** (-torch.arange(count, device=places.device) / count)
        return torch.cat((turns.sin(), turns.cos()), dim=-1).flatten(1)[:, :width] * self.place_gate


class ArrCocFusion(nn.Module):
    """Scorers, balancer and adapters: everything that M-RoPE does not have."""

    def __init__(self, config: ZooArrCocConfig):
        super().__init__()
        width = config.text_config.hidden_size
        if config.allocation == "relevance":
            heads = config.relevance_heads, config.relevance_head_dim
            known = {
                "propositional": PropositionalScorer,
                "perspectival": lambda: PerspectivalScorer(width),
                "participatory": lambda: ParticipatoryScorer(width, *heads),
            }
            self.scorers = nn.ModuleDict({name: known[name]() for name in SCORERS if name in config.scorers})
            self.balancer = OpponentBalancer(width, config.fixed_tensions)
        streams = 1 + len(config.deepstack_layers or [])
        self.adapters = nn.ModuleList(QualityAdapter(width, len(config.ladder)) for _ in range(streams))
        if config.mrope_layout == "none":
            self.place_code = PlaceCode(width)
        # How often training went through here: the schedule of exploration, kept with the weights
        self.register_buffer("forwards", torch.zeros((), dtype=torch.long))

    def score(self, pictures: Pictures, table: DetailTable) -> tuple[torch.Tensor, Balance]:
        """The three maps `float[G, 3, N]`, zeros for scorers that do not count, and their balance."""
        maps = pictures.texture.new_zeros(len(pictures.tokens), len(SCORERS), pictures.texture.shape[1]).float()
        question = pictures.tokens.new_zeros(len(pictures.tokens), pictures.tokens.shape[2])
        found = dict.fromkeys(SCORERS, maps[:, 0])
        for name, scorer in self.scorers.items():
            found[name] = scorer(pictures)
        if "participatory" in self.scorers:
            found["participatory"], question = found["participatory"]
        maps = torch.stack([found[name] for name in SCORERS], dim=1)
        grid = table.regions.rows, table.regions.columns
        return maps, self.balancer(maps, question, pictures, table.region_of_cell, grid)

    def adapt(self, tokens: torch.Tensor, level: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """`float[G, K, Dt * (1 + layers)]` to the same, each stream through its own adapter."""
        streams = tokens.chunk(len(self.adapters), dim=-1)
        pairs = zip(self.adapters, streams, strict=True)
        return torch.cat([adapter(stream, level, cells) for adapter, stream in pairs], dim=-1)


class _AddedLoss(torch.autograd.Function):
    """Passes a tensor on, and in the backward pass gives a loss its gradient of one."""

    @staticmethod
    def forward(ctx, carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.like = loss.shape, loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        shape, dtype = ctx.like
        return gradient, torch.ones(shape, dtype=dtype, device=gradient.device)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What is asked about each picture, `float[F, Q, Dt]` and `bool[F, Q]`; see `relevance_vlm.Pictures`."""

    tokens: torch.Tensor
    asked: torch.Tensor


class Kept(NamedTuple):
    """
    What G pictures of one size end as, B tokens each.

    tokens (`float[G, B, Dt * (1 + layers)]`), boxes (`float[G, B, 4]`). log_membership (`float[G, B]`): 0, with the
    gradient of how safely each was chosen. reports: of each. losses (`float[2]`): squared tensions and entropy, the
    means over the pictures.
    """

    tokens: torch.Tensor
    boxes: torch.Tensor
    log_membership: torch.Tensor
    reports: list[ImageRelevance]
    losses: torch.Tensor | None


class ZooArrCocModel(MultiAxisModel):
    """Vision tower, mergers, relevance, language model."""

    config: ZooArrCocConfig

    def build_connector(self, config: ZooArrCocConfig) -> None:
        super().build_connector(config)
        self.fusion = ArrCocFusion(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        scorers = PropositionalScorer, PerspectivalScorer, ParticipatoryScorer
        if isinstance(module, (*scorers, OpponentBalancer, QualityAdapter, PlaceCode)):
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)
        if isinstance(module, OpponentBalancer) and module.fixed_tensions is None:  # neutral
            init.zeros_(module.tensions.weight)
            init.zeros_(module.tensions.bias)
        if isinstance(module, ArrCocFusion):
            init.zeros_(module.forwards)

    @property
    def reads_question(self) -> bool:
        return self.config.allocation == "relevance" and "participatory" in self.config.scorers

    @property
    def reads_prompt(self) -> bool:
        return True  # which of its images a cache holds

    @property
    def places_features(self) -> bool:
        return False

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        image_position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> ZooImageOutput:
        """
        Images and clips to native tokens with the texture of their cells: the same for every question and budget.

        Args:
            pixel_values, image_grid_thw, image_position_ids: see `MultiAxisModel.get_image_features`.

        Returns:
            The tower's output with `pooler_output`: one `float[N, Dt * (1 + layers) + 17]` for each image, the
            statistics of `texture_vlm` behind the tokens of the native resolution.
        """
        outputs = super().get_image_features(
            pixel_values, image_grid_thw, image_position_ids, **{**kwargs, "return_dict": True}
        )
        config, grids = self.config, outputs.vision_inputs["image_grid_thw"]
        with torch.no_grad():
            texture = texture_of_patches(
                pixel_values,
                grids.to(pixel_values.device),
                patch_geometry(config.vision_config),
                config.spatial_merge_size,
                config.image_mean,
                config.image_std,
            )
        tokens = outputs.pooler_output
        textures = texture.to(tokens[0].device, tokens[0].dtype).split([len(token) for token in tokens])
        outputs.pooler_output = [torch.cat(pair, dim=-1) for pair in zip(tokens, textures, strict=True)]
        return outputs

    def placeholders_of(self, features: list[torch.Tensor], vision_inputs: dict[str, torch.Tensor]) -> list[int]:
        if not features:
            return []
        grids = self.cells(vision_inputs)
        if [math.prod(grid) for grid in grids] != [len(feature) for feature in features]:
            raise ValueError(
                f"Encoded images have {[len(feature) for feature in features]} tokens, their grids are {grids}: give "
                "mm_encoder_outputs as get_image_features of this model returns them."
            )
        return [grid[0] * budget_of(grid[1] * grid[2], self.config.token_budget) for grid in grids]

    def cells(self, vision_inputs: dict[str, torch.Tensor]) -> list[list[int]]:
        """Time steps, rows and columns of cells of each image."""
        if "image_grid_thw" not in vision_inputs:
            raise ValueError(NO_GRIDS)
        return in_squares(vision_inputs["image_grid_thw"], self.config.spatial_merge_size).tolist()

    def runs(self, vision_inputs: dict[str, torch.Tensor], device: torch.device) -> Runs:
        """As in the frame, with as many tokens as the budget says, all of them at the corner of their time step:
        `fuse` knows how far from it each one stands."""
        grids, times = self.grids_and_times(vision_inputs, device)
        budgets = [budget_of(height * width, self.config.token_budget) for _, height, width in grids.tolist()]
        budgets = torch.tensor(budgets, device=device)
        steps = torch.stack((grids[:, 0], torch.ones_like(budgets), budgets), dim=1)
        runs = runs_of_grids(steps, times, self.config.positions_after_image, sides=grids[:, 1:].amax(dim=1))
        return runs._replace(places=runs.places * runs.places.new_tensor([[1], [0], [0]]))

    # --- relevance -----------------------------------------------------------------------------------------------

    @property
    def learns_relevance(self) -> bool:
        """Whether this forward has a gradient for scorers, so that there is noise on what they choose."""
        if not (self.training and torch.is_grad_enabled()) or self.config.allocation != "relevance":
            return False
        modules = (self.fusion.scorers, self.fusion.balancer)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def compress(self, native: torch.Tensor, size: tuple[int, int], budget: int, question: Question | None) -> Kept:
        """
        Pictures of one size under their budget.

        Args:
            native (`float[G, N, Dt * (1 + layers) + 17]`): as `get_image_features` gives them.
            size: height and width in cells.
            budget: tokens of each, at most N.
            question: of each; without one every question is empty.
        """
        tokens, texture = native[..., :-_STATISTICS], native[..., -_STATISTICS:]
        count, device = len(native), native.device
        whole = budget == math.prod(size)
        if whole or self.config.allocation == "uniform":
            boxes = uniform_boxes(*size, budget, device).expand(count, -1, -1)
            if not whole:
                level = torch.zeros(boxes.shape[:2], dtype=torch.long, device=device)
                tokens = self.fusion.adapt(pool(tokens, pooling(boxes, *size)), level, areas(boxes))
            reports = [ImageRelevance(image=-1, size=size, boxes=box, positions=centres(box)) for box in boxes]
            return Kept(tokens, boxes, boxes.new_zeros(count, budget), reports, None)
        config = self.config
        table = detail_table(*size, tuple(config.ladder), budget, config.coarse_share, device)
        maps = balance = losses = None
        if config.allocation == "random":
            relevance, activation = random_relevance(texture, table)
        else:
            with torch.autocast(device.type, enabled=False):
                maps, balance = self.look(tokens, texture, table, size, question)
            relevance = balance.relevance
            losses = torch.stack(((balance.tensions - 0.5).square().mean(), mean_entropy(relevance)))
            activation = balance.activation
        chosen = relevance, activation
        if self.learns_relevance:
            chosen = tuple(values + self.exploration * gumbel(values) for values in chosen)
        allocation = allocate(table, *chosen, budget, config.gate_temperature)
        if config.token_order == "relevance":
            allocation = most_relevant_first(allocation, chosen[0])
        weight = torch.ones_like(activation)
        if balance is not None and config.weighted_pooling:
            weight = within_regions(activation.detach() if config.gate == "none" else activation, table)
        weights = pooling(allocation.boxes, *size) * weight[:, None]
        kept, log_membership = self.gate(tokens, pool(tokens, weights), weight, size, table, allocation)
        kept = self.fusion.adapt(kept, allocation.level, areas(allocation.boxes))
        reports = [
            report_of(number, size, table, allocation, relevance, maps, balance, config.scorers)
            for number in range(count)
        ]
        return Kept(kept, allocation.boxes, log_membership, reports, losses)

    def look(
        self,
        tokens: torch.Tensor,
        texture: torch.Tensor,
        table: DetailTable,
        size: tuple[int, int],
        question: Question | None,
    ) -> tuple[torch.Tensor, Balance]:
        """The maps `float[G, 3, N]` of pictures of one size, and their balance."""
        tokens = tokens[..., : self.config.text_config.hidden_size]
        if question is None:
            question = Question(tokens[:, :1] * 0, torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device))
        split = len(TEXTURE_CHANNELS)
        pictures = Pictures(size, tokens, texture[..., :split], texture[..., split:], *question)
        return self.fusion.score(pictures, table)

    @property
    def exploration(self) -> float:
        """Strength of the noise on relevance in this forward."""
        done = int(self.fusion.forwards) / self.config.exploration_steps
        return self.config.exploration * max(0.0, 1.0 - done)

    def gate(
        self,
        tokens: torch.Tensor,
        kept: torch.Tensor,
        weight: torch.Tensor,
        size: tuple[int, int],
        table: DetailTable,
        allocation: Allocation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Lets gradients reach the relevance; in evaluation tokens pass unchanged.

        Args:
            tokens (`float[G, N, C]`): native ones. kept (`float[G, B, C]`): pooled ones.
            weight (`float[G, N]`): of the cells when they are pooled.

        Returns:
            Tokens `float[G, B, C]`, and what `Kept` calls log_membership.
        """
        nothing, kind = torch.zeros_like(allocation.membership), self.config.gate
        if not self.learns_relevance or kind == "none":
            return kept, nothing
        membership = allocation.membership.clamp(min=1e-4)
        if kind == "attn_bias":
            logarithm = membership.log()
            return kept, logarithm - logarithm.detach()
        member = membership[..., None].to(kept.dtype)
        if kind == "multiply":
            return kept * (1 + member - member.detach()), nothing
        coarse = self.coarsest(tokens, weight, size, table, allocation.boxes)
        detail = kept - coarse
        if kind == "crossfade":
            return coarse + detail * (1 + member - member.detach()), nothing
        strength = (
            detail.detach().unflatten(-1, (len(self.fusion.adapters), -1)).square().mean(-1, keepdim=True).sqrt()
        )
        noise = (torch.randn_like(detail).unflatten(-1, (len(self.fusion.adapters), -1)) * strength).flatten(-2)
        return coarse + member.sqrt() * detail + (1 - member).clamp(min=1e-6).sqrt() * noise, nothing

    def coarsest(
        self,
        tokens: torch.Tensor,
        weight: torch.Tensor,
        size: tuple[int, int],
        table: DetailTable,
        boxes: torch.Tensor,
    ) -> torch.Tensor:
        """What boxes `float[G, B, 4]` would show without detail, `float[G, B, C]`; nothing where the ladder drops
        regions."""
        base = table.boxes[table.level == 0]
        if len(base) == 0:
            return tokens.new_zeros(*boxes.shape[:2], tokens.shape[2])
        return pool(pool(tokens, pooling(base, *size) * weight[:, None]), overlaps(boxes, base[None]))

    # --- fuse ----------------------------------------------------------------------------------------------------

    def fuse(
        self, inputs_embeds: torch.Tensor, features: list[torch.Tensor] | None, context: FuseContext
    ) -> tuple[dict[str, Any], Any]:
        """As in the frame, after relevance has decided which tokens there are and where they stand."""
        prompt = context.carry if isinstance(context.carry, WholePrompt) else None
        context.carry = None if prompt is not None else context.carry
        if features is None:
            return super().fuse(inputs_embeds, None, context)
        visual = self.placeholder_mask(context.input_ids, inputs_embeds)  # bool[B, T]
        expected = self.placeholders_of(features, context.vision_inputs)
        whole = visual if prompt is None else self.placeholder_mask(prompt.input_ids, None)
        if int(whole.sum()) != sum(expected):  # behind a cache that holds the other images, or a mistake
            whole = visual
        from_start = context.past_key_values is None or whole.shape[1] > visual.shape[1]
        self.check_placeholders(whole, expected, whole_rows=from_start)
        kept, loss = self.compress_all(features, expected, whole, prompt, context)

        tokens = torch.cat([tokens for tokens, _, _ in kept])
        boxes = torch.cat([boxes for _, boxes, _ in kept])
        bias = torch.cat([bias for _, _, bias in kept])
        places = centres(boxes)  # float[K, 2]
        if self.config.mrope_layout == "none":
            code = self.fusion.place_code(places).to(tokens.dtype)
            tokens = tokens + nn.functional.pad(code, (0, tokens.shape[1] - code.shape[1]))
        cached = 0 if context.past_key_values is None else whole.shape[1] - visual.shape[1]
        here = whole.nonzero()[:, 1] >= cached
        pieces = [tokens[own] for tokens, own in zip(tokens.split(expected), here.split(expected), strict=True)]
        lm_inputs, carry = super().fuse(inputs_embeds, pieces, context)
        if self.config.mrope_layout != "none":
            corners = lm_inputs.get("position_ids", context.position_ids)
            moved = nn.functional.pad(places[here].T, (0, 0, 1, 0)).to(corners.device)  # float[3, K]
            lm_inputs["position_ids"] = corners + torch.zeros_like(corners, dtype=torch.float32).masked_scatter(
                visual.to(corners.device), moved
            )
        if self.learns_relevance and self.config.gate == "attn_bias":
            lm_inputs["attention_mask"] = self.biased_mask(lm_inputs["inputs_embeds"], visual, bias, context)
        if self.training and torch.is_grad_enabled():
            lm_inputs["inputs_embeds"] = self._trained(lm_inputs["inputs_embeds"], loss)
        return lm_inputs, carry

    def compress_all(
        self,
        features: list[torch.Tensor],
        expected: list[int],
        placeholders: torch.Tensor,
        prompt: WholePrompt | None,
        context: FuseContext,
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], torch.Tensor | None]:
        """
        All images of a batch under their budgets.

        Args:
            features: as `get_image_features` gives them. expected: placeholders of each image.
            placeholders (`bool[B, T]`): of all of them. prompt, context: what the question is read from.

        Returns:
            Tokens, boxes and `log_membership` of each image or time step, and the auxiliary loss.
        """
        grids = self.cells(context.vision_inputs)
        frames, images, groups = [], [], defaultdict(list)
        for image, (feature, (_, height, width)) in enumerate(zip(features, grids, strict=True)):
            for frame in feature.split(height * width):
                groups[height, width].append(len(frames))
                frames.append(frame)
                images.append(image)
        budgets = {size: budget_of(math.prod(size), self.config.token_budget) for size in groups}
        question = None
        if self.reads_question and any(budget < math.prod(size) for size, budget in budgets.items()):
            question = self.question_of(images, expected, placeholders, prompt, context)
        kept, reports, losses = [None] * len(frames), [None] * len(frames), []
        for size, numbers in groups.items():
            native = torch.stack([frames[number] for number in numbers])
            own = None if question is None else Question(question.tokens[numbers], question.asked[numbers])
            found = self.compress(native, size, budgets[size], own)
            for number, *parts, report in zip(
                numbers, found.tokens, found.boxes, found.log_membership, found.reports, strict=True
            ):
                report.image = images[number]
                kept[number], reports[number] = tuple(parts), report
            if found.losses is not None:
                losses.append(found.losses * len(numbers))
        loss = None
        if losses and self.learns_relevance and self.config.has_auxiliary_loss:
            coefficients = (self.config.tension_coefficient, self.config.entropy_coefficient)
            loss = (torch.stack(losses).sum(0) / len(frames) * losses[0].new_tensor(coefficients)).sum()
        if self.learns_relevance:
            self.fusion.forwards.add_(1)
        context.fusion_outputs = ArrCocOutput(reports, None if loss is None else loss.detach())
        return kept, loss

    def question_of(
        self,
        images: list[int],
        expected: list[int],
        placeholders: torch.Tensor,
        prompt: WholePrompt | None,
        context: FuseContext,
    ) -> Question:
        """The question of each picture; the arguments are those of `compress_all`, `images` says whose each one is."""
        ids, asked = compact(*self.question(replace(context, carry=prompt)))
        ends = placeholders.sum(dim=1).cumsum(0)  # placeholders up to each row, int[B]
        before = torch.tensor([0, *expected[:-1]], device=ends.device).cumsum(0)
        row = torch.searchsorted(ends, before[torch.tensor(images, device=ends.device)], right=True)
        return Question(self.get_input_embeddings()(ids)[row], asked[row])

    def biased_mask(
        self, inputs_embeds: torch.Tensor, visual: torch.Tensor, bias: torch.Tensor, context: FuseContext
    ) -> torch.Tensor:
        """A causal mask `float[B, 1, T, T]` that adds nothing to attention to visual tokens but the gradient of their
        memberships."""
        text = self.config.text_config
        kernel, window = self.language_model.config._attn_implementation, getattr(text, "sliding_window", None)
        if kernel not in ("eager", "sdpa"):
            raise ValueError(
                f"gate 'attn_bias' needs attention that takes a mask of its own, eager or sdpa, not {kernel}."
            )
        rows, length = visual.shape
        if window is not None and window < length:
            raise ValueError(
                f"gate 'attn_bias' cannot be used with sliding windows of {window} in sequences of {length}: choose "
                "gate 'noise'."
            )
        seen = torch.ones(length, length, dtype=torch.bool, device=visual.device).tril()[None, None]
        if context.attention_mask is not None:
            seen = seen & context.attention_mask[:, None, None, :].bool()
        seen = seen | torch.eye(length, dtype=torch.bool, device=visual.device)  # padding looks at itself
        keys = inputs_embeds.new_zeros(rows, length).masked_scatter(visual, bias.to(inputs_embeds.dtype))
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.where(seen, keys[:, None, None, :], lowest)

    def _trained(self, inputs_embeds: torch.Tensor, loss: torch.Tensor | None) -> torch.Tensor:
        """Embeddings through which every parameter of the fusion takes part and the auxiliary loss is trained."""
        zero = sum(parameter.sum() * 0.0 for parameter in self.fusion.parameters() if parameter.requires_grad)
        inputs_embeds = inputs_embeds + zero
        if loss is None or not loss.requires_grad:
            return inputs_embeds
        device = inputs_embeds.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if half or inputs_embeds.dtype == torch.float16:
            raise ValueError(
                "Training in float16 scales the main loss, which the auxiliary loss of ARR-COC does not see: train in "
                "bfloat16, or set tension_coefficient and entropy_coefficient to 0."
            )
        return _AddedLoss.apply(inputs_embeds, loss)

    def fuse_nothing(
        self, inputs_embeds: torch.Tensor, blank: list[torch.Tensor], context: FuseContext
    ) -> tuple[dict[str, Any], Any]:
        return super().fuse_nothing(self._trained(inputs_embeds, None), blank, context)

    # --- explain -------------------------------------------------------------------------------------------------

    def token_places(self, vision_inputs: dict[str, torch.Tensor], fusion_outputs: ArrCocOutput) -> list[torch.Tensor]:
        """As in the frame: the boxes of the tokens."""
        places = [[] for _ in vision_inputs["image_grid_thw"]]
        for report in fusion_outputs.images:
            rows, columns = report.size
            shares = report.boxes / report.boxes.new_tensor([rows, columns, rows, columns])
            places[report.image].append(nn.functional.pad(shares, (1, 0)))
        return [torch.cat(own) for own in places]

    def fusion_maps(self, fusion_outputs: ArrCocOutput) -> list[dict[str, torch.Tensor]]:
        """As in the frame: relevance, the scorers' maps, and how far up the ladder the region of each cell came."""
        maps, images = [], set()
        for report in fusion_outputs.images:
            if report.image in images:  # a later time step of a clip
                continue
            images.add(report.image)
            own = report.maps()
            if report.levels is not None:
                side, (rows, columns) = report.region_side, report.size
                own["level"] = report.levels.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns]
            maps.append(own)
        return maps


class ZooArrCocForConditionalGeneration(MultiAxisForConditionalGeneration, GenerationMixin):
    """ARR-COC with the language model's head."""

    config: ZooArrCocConfig
    base_model_class = ZooArrCocModel


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def centres(boxes: torch.Tensor) -> torch.Tensor:
    """Row and column of the middle of boxes `float[…, 4]`, so that a native token has those of its cell."""
    return (boxes[..., :2] + boxes[..., 2:] - 1) / 2


def areas(boxes: torch.Tensor) -> torch.Tensor:
    """Areas of boxes `float[…, 4]` in cells."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def pool(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted means: of `float[G, N, C]` by `float[G, K, N]` to `float[G, K, C]`."""
    return (weights / weights.sum(dim=-1, keepdim=True)).to(tokens.dtype) @ tokens


def gumbel(like: torch.Tensor) -> torch.Tensor:
    """Gumbel noise."""
    return -torch.empty_like(like).exponential_().clamp(min=1e-20).log()


def within_regions(activation: torch.Tensor, table: DetailTable) -> torch.Tensor:
    """How much the cells of a region weigh against each other, `float[G, N]` to the same."""
    means = activation.new_zeros(len(activation), len(table.whole)).index_add(1, table.region_of_cell, activation)
    means = (means / table.whole)[:, table.region_of_cell]
    return (activation - means).clamp(-2, 2).exp()


def mean_entropy(relevance: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the shares of regions, between 0 and 1."""
    logarithms = relevance.log_softmax(dim=-1)
    return -(logarithms.exp() * logarithms).sum(-1).mean() / math.log(max(relevance.shape[1], 2))


def random_relevance(texture: torch.Tensor, table: DetailTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers for regions `float[G, R]` and cells `float[G, N]`, the same for the same picture."""
    found = []
    for picture in texture:
        generator = torch.Generator().manual_seed(int(picture.double().sum() * 2**20))
        found.append(torch.randn(len(table.whole) + len(picture), generator=generator))
    values = torch.stack(found).to(texture.device)
    return values[:, : len(table.whole)], values[:, len(table.whole) :]


def most_relevant_first(allocation: Allocation, relevance: torch.Tensor) -> Allocation:
    """The tokens in the order of their regions' relevance."""
    order = relevance.gather(1, allocation.region).argsort(dim=1, descending=True, stable=True)
    return Allocation(
        allocation.boxes.gather(1, order[..., None].expand_as(allocation.boxes)),
        allocation.region.gather(1, order),
        allocation.level.gather(1, order),
        allocation.levels,
        allocation.membership.gather(1, order),
    )


def report_of(
    number: int,
    size: tuple[int, int],
    table: DetailTable,
    allocation: Allocation,
    relevance: torch.Tensor,
    maps: torch.Tensor | None,
    balance: Balance | None,
    scorers: list[str],
) -> ImageRelevance:
    """The report of one of several pictures."""
    grid = table.regions.rows, table.regions.columns
    report = ImageRelevance(
        image=-1,
        size=size,
        boxes=allocation.boxes[number],
        positions=centres(allocation.boxes[number]),
        shares=relevance[number].detach().softmax(dim=-1).view(grid),
        levels=allocation.levels[number].view(grid),
        region_side=table.regions.side,
        token_regions=allocation.region[number],
    )
    if balance is not None:
        report.relevance_map = balance.activation[number].detach().view(size)
        report.balance = balance.tensions[number].detach()
        for scorer in scorers:
            setattr(report, f"{scorer}_map", maps[number, SCORERS.index(scorer)].detach().view(size))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------


class ZooArrCocProcessor(MultiAxisProcessor):
    r"""
    Images, clips and text to a batch for ARR-COC.

    token_budget (`int` or `float`): as in the config; a model and its processor must have the same.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        token_budget: int | float = 200,
        video_time: str = "timestamps",
        tokens_per_second: float = 2.0,
        frame_start: str = "",
        frame_end: str = "",
        chat_template=None,
    ):
        self.token_budget = token_budget
        super().__init__(
            image_processor,
            tokenizer,
            video_time=video_time,
            tokens_per_second=tokens_per_second,
            frame_start=frame_start,
            frame_end=frame_end,
            chat_template=chat_template,
        )

    @classmethod
    def fields_from(cls, config: ZooArrCocConfig) -> dict:
        return {**super().fields_from(config), "token_budget": config.token_budget}

    @classmethod
    def image_fields_from(cls, config: ZooArrCocConfig) -> dict:
        return {**super().image_fields_from(config), "image_mean": config.image_mean, "image_std": config.image_std}

    def tokens_of_frame(self, rows: int, columns: int, **images_kwargs) -> int:
        return budget_of(super().tokens_of_frame(rows, columns, **images_kwargs), self.token_budget)


publish(ZooArrCocConfig)
