"""Relevance: where in a picture is what a question asks for?

    three scorers      propositional (information), perspectival (salience), participatory (question and content)
    balancer           three opponent tensions, read from question and picture, weigh the three maps
    activation         float[G, N], of each cell
    relevance          float[G, R], of each region of cells, on a logarithmic scale

Everything is computed for each picture by itself: no statistic looks at another one of the batch. G pictures of one
size have N = height * width cells, row by row.

The ideas are those of John Vervaeke's account of relevance realisation (github.com/djwar42/arr-coc-0-1 applies them to
pictures); these formulas are the zoo's own, differentiable throughout.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


# What is counted as a change of texture between a cell and its surroundings: colours, edges, local contrast.
_CONTRASTED = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12)
_ECCENTRICITY = 11
_PROJECTIONS = 8

# Where softplus is 1, and where it is next to nothing: where learned weights start.
_SOFTPLUS_ONE = 0.541324854612918
_SOFTPLUS_NOTHING = -5.0

# Statistics of each map that the balancer sees: mean, maximum, deviation, and the means of four quadrants.
_MAP_STATISTICS = 7

SCORERS = ("propositional", "perspectival", "participatory")
TENSIONS = ("compress_particularize", "exploit_explore", "focus_diversify")


class Pictures(NamedTuple):
    """
    G pictures of one size, and what is asked about each.

    size: height and width in cells. tokens (`float[G, N, Dt]`): native tokens. texture (`float[G, N, 13]`), entropies
    (`float[G, N, 4]`): statistics of the cells' pixels, see `texture_vlm`. question (`float[G, Q, Dt]`), asked
    (`bool[G, Q]`): its tokens, and which of them are no padding.
    """

    size: tuple[int, int]
    tokens: torch.Tensor
    texture: torch.Tensor
    entropies: torch.Tensor
    question: torch.Tensor
    asked: torch.Tensor


def blur(maps: torch.Tensor, size: tuple[int, int], side: int) -> torch.Tensor:
    """The mean of `side` x `side` neighbours, at borders of those that are there: `float[G, N, C]` to the same."""
    grid = maps.transpose(1, 2).unflatten(2, size)
    smooth = F.avg_pool2d(grid, side, stride=1, padding=side // 2, count_include_pad=False)
    return smooth.flatten(2).transpose(1, 2)


class PropositionalScorer(nn.Module):
    """How much there is to know: the entropies of lightness, two colour axes and edge strength within a cell."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, pictures: Pictures) -> torch.Tensor:
        """`float[G, N]`, between 0 and 1."""
        weight = F.softplus(self.weight.float())
        return pictures.entropies.float() @ (weight / weight.sum())


class PerspectivalScorer(nn.Module):
    """What stands out: how far a cell differs from its 5 x 5 neighbours, in texture and in what the tower saw."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.projection = nn.Linear(width, _PROJECTIONS, bias=False)
        self.weight = nn.Parameter(torch.zeros(len(_CONTRASTED) + _PROJECTIONS))
        self.centre = nn.Parameter(torch.zeros(1))

    def forward(self, pictures: Pictures) -> torch.Tensor:
        """`float[G, N]`."""
        seen = self.projection(self.norm(pictures.tokens).to(self.projection.weight.dtype)).float()
        texture = pictures.texture.float()
        surface = torch.cat((texture[..., _CONTRASTED], seen), dim=-1)
        contrast = (surface - blur(surface, pictures.size, 5)).abs()
        weight = F.softplus(self.weight.float())
        return contrast @ (weight / weight.sum()) + self.centre.float() * (1 - texture[..., _ECCENTRICITY])


class ParticipatoryScorer(nn.Module):
    """
    What the question is about: attention of its tokens to the content of the cells.

    tau * log sum_i importance_i exp(query_i . key_j / tau), in the mean over heads.
    """

    def __init__(self, width: int, heads: int, head_dim: int, texture: int = 13, texture_width: int = 32):
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        self.question_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.importance = nn.Linear(width, 1, bias=False)
        self.texture = nn.Linear(texture, texture_width)
        self.content_norm = nn.LayerNorm(width + texture_width)
        self.key = nn.Linear(width + texture_width, heads * head_dim, bias=False)
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def read(self, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """The question's tokens after their norm, `float[G, Q, Dt]`, and the logarithms of their shares in it,
        `float[G, Q]`."""
        question = self.question_norm(pictures.question.to(self.query.weight.dtype))
        importance = self.importance(question)[..., 0].float().masked_fill(~pictures.asked, -torch.inf)
        importance = torch.where(pictures.asked.any(dim=1, keepdim=True), importance, 0.0)
        return question, importance.log_softmax(dim=-1)

    def forward(self, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """The map `float[G, N]`, and the question in one vector `float[G, Dt]`; zeros where nothing is asked."""
        question, importance = self.read(pictures)
        dtype = self.key.weight.dtype
        content = torch.cat((pictures.tokens.to(dtype), self.texture(pictures.texture.to(dtype))), dim=-1)
        query = self.query(question).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [G, H, Q, D]
        key = self.key(self.content_norm(content)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = (query @ key.transpose(-1, -2)).float() * self.scale  # [G, H, Q, N]
        tau = self.log_temperature.float().exp()
        scores = (scores / tau + importance[:, None, :, None]).logsumexp(dim=2) * tau
        silent = ~pictures.asked.any(dim=1, keepdim=True)
        pooled_question = (importance.exp()[..., None] * question.float()).sum(dim=1)
        return scores.mean(dim=1).masked_fill(silent, 0.0), pooled_question.masked_fill(silent, 0.0)


class Balance(NamedTuple):
    """activation (`float[G, N]`): of each cell. tensions (`float[G, 3]`): from 0 to 1, in the order of `TENSIONS`.
    relevance (`float[G, R]`): of each region."""

    activation: torch.Tensor
    tensions: torch.Tensor
    relevance: torch.Tensor


class OpponentBalancer(nn.Module):
    """
    Weighs the three maps by three tensions, each between two opposite ways to look.

        c  compress (1: information wherever it is) or particularize (0: what the question is about)
        e  exploit (1: follow what stands out) or explore (0: look where nothing does); without effect at 0.5
        f  focus (1: few regions) or diversify (0: many, and not side by side)

    activation = c * propositional + (1 - c) * participatory + weight * (2 e - 1) * perspectival, of standardised maps
    """

    def __init__(self, width: int, fixed_tensions: list[float] | None = None, hidden: int = 64):
        """
        Args:
            fixed_tensions: instead of those that are read from question and picture.
        """
        super().__init__()
        self.fixed_tensions = fixed_tensions
        if fixed_tensions is None:
            self.norm = nn.LayerNorm(2 * width)
            self.hidden = nn.Linear(2 * width + _MAP_STATISTICS * len(SCORERS), hidden)
            self.tensions = nn.Linear(hidden, len(TENSIONS))
        self.salience = nn.Parameter(torch.zeros(1))
        self.inhibition = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        maps: torch.Tensor,
        pooled_question: torch.Tensor,
        pictures: Pictures,
        region_of_cell: torch.Tensor,
        regions: tuple[int, int],
    ) -> Balance:
        """
        Args:
            maps (`float[G, 3, N]`): of the scorers, in the order of `SCORERS`.
            pooled_question (`float[G, Dt]`): the question in one vector.
            pictures: see there.
            region_of_cell (`int[N]`): the region of each cell.
            regions: rows and columns of them.
        """
        standard = standardised(maps)
        if self.fixed_tensions is None:
            context = torch.cat((pooled_question, pictures.tokens.mean(dim=1)), dim=-1).to(self.hidden.weight.dtype)
            context = torch.cat((self.norm(context), statistics(maps, pictures.size).to(context.dtype)), dim=-1)
            tensions = torch.sigmoid(self.tensions(F.gelu(self.hidden(context))).float())
        else:
            tensions = maps.new_tensor(self.fixed_tensions).expand(len(maps), len(TENSIONS))
        propositional, perspectival, participatory = standard.unbind(dim=1)
        compress, exploit, _ = tensions[..., None].unbind(dim=1)  # [G, 1]
        activation = compress * propositional + (1 - compress) * participatory
        activation = activation + F.softplus(self.salience.float() + _SOFTPLUS_ONE) * (2 * exploit - 1) * perspectival
        return Balance(activation, tensions, self.relevance(activation, tensions, region_of_cell, regions))

    def relevance(
        self,
        activation: torch.Tensor,
        tensions: torch.Tensor,
        region_of_cell: torch.Tensor,
        regions: tuple[int, int],
        softness: float = 0.5,
    ) -> torch.Tensor:
        """Relevance of regions, `float[G, R]`: a soft maximum of their cells, less that of their neighbours when the
        tension asks for diversity, and sharper when it asks for focus."""
        level = pooled(activation / softness, region_of_cell, regions[0] * regions[1]) * softness
        level = level - level.mean(dim=1, keepdim=True)
        focus = tensions[:, 2:]
        around = blur(level[..., None], regions, 3)[..., 0]
        inhibition = F.softplus(self.inhibition.float() + _SOFTPLUS_NOTHING)
        sharpness = ((2 * focus - 1) * math.log(4)).exp()  # not a power, which on a CPU rounds by the batch
        return (level - inhibition * (1 - focus) * around) * sharpness


def standardised(maps: torch.Tensor) -> torch.Tensor:
    """Maps `float[G, 3, N]` with mean 0 and deviation 1 each, within -4 and 4; a constant map is 0."""
    centred = maps - maps.mean(dim=-1, keepdim=True)
    return (centred / deviation_of(maps)[..., None]).clamp(-4, 4)


def deviation_of(maps: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the cells, `float[G, 3, N]` to `float[G, 3]`, with a gradient for constant maps too."""
    return (maps.var(dim=-1, correction=0) + 1e-10).sqrt()


def statistics(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mean, maximum, deviation and quadrant means of each map: `float[G, 3, N]` to `float[G, 21]`."""
    quadrants = F.adaptive_avg_pool2d(maps.unflatten(2, size), 2).flatten(2)
    rest = torch.stack((maps.mean(-1), maps.amax(-1), deviation_of(maps)), dim=-1)
    return torch.cat((rest, quadrants), dim=-1).flatten(1)


def pooled(values: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """log mean exp of the values of each group: `float[G, N]` to `float[G, groups]`."""
    nothing, numbers = values.new_zeros(len(values), groups), group.expand_as(values)
    highest = nothing.scatter_reduce(1, numbers, values.detach(), "amax", include_self=False)
    sums = nothing.index_add(1, group, (values - highest[:, group]).exp())
    return (sums / torch.bincount(group, minlength=groups)).log() + highest
