"""Level of detail under an exact budget: how many tokens each region of a grid keeps.

    grid       height x width cells, one native token each
    regions    squares of `side` cells, smaller at the edges; nothing is padded
    ladder     sides of the tokens' grid within a region, such as 2, 3, 5: the levels of detail
    singles    cells that get a native token of their own, where the budget leaves less than a whole step

Going up a level costs tokens and is worth their logarithm times the region's share, so the gain of a token is

    gain(region, level) = relevance + ln(ln(n[level + 1] / n[level]) / (n[level + 1] - n[level]))

which falls with the level. Steps are taken in the order of their gains while they fit; what is left is spent on
singles. The sum is the budget, exactly, whatever the relevance, so it is known from the size of an image alone.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch


# Relevance is compared in steps of this size, so that what differs by rounding errors alone is a tie.
_RESOLUTION = 2.0**-12


def budget_of(cells: int, token_budget: int | float) -> int:
    """How many tokens an image of so many cells ends as: a number, or a share of its cells when it is a float."""
    wanted = math.ceil(cells * token_budget - 1e-9) if isinstance(token_budget, float) else token_budget
    return max(1, min(wanted, cells))


class Regions(NamedTuple):
    """
    Regions of a grid, row by row.

    side: in cells. rows, columns: of regions. ladder: the sides of the tokens' grids. heights, widths: of each, in
    cells.
    """

    side: int
    rows: int
    columns: int
    ladder: tuple[int, ...]
    heights: list[int]
    widths: list[int]

    def tokens(self, level: int) -> list[int]:
        """Tokens of each region at a level."""
        side = self.ladder[level]
        return [min(side, height) * min(side, width) for height, width in zip(self.heights, self.widths, strict=True)]


def _cut(height: int, width: int, side: int, ladder: tuple[int, ...]) -> Regions:
    heights = [min(side, height - top) for top in range(0, height, side)]
    widths = [min(side, width - left) for left in range(0, width, side)]
    return Regions(
        side,
        len(heights),
        len(widths),
        ladder,
        [height for height in heights for _ in widths],
        widths * len(heights),
    )


@lru_cache(maxsize=4096)
def regions_of(height: int, width: int, ladder: tuple[int, ...], budget: int, coarse_share: float) -> Regions:
    """
    The regions of a grid: of the ladder's last side, and twice as large as long as the coarsest level would take more
    than its share of the budget; every doubled side is one level more.

    Args:
        height, width: of the grid, in cells.
        ladder: ascending sides; the first may be 0, which drops a region.
        budget: tokens.
        coarse_share: the largest share of the budget that the coarsest level may take.
    """
    side, sides = ladder[-1], ladder
    while True:
        regions = _cut(height, width, side, sides)
        coarsest = sum(regions.tokens(0))
        if coarsest <= coarse_share * budget:
            return regions
        if side >= max(height, width):
            # One region, and still too dear: fewer tokens at its coarsest
            return regions if coarsest <= budget else regions._replace(ladder=(1, *sides))
        side *= 2
        sides = (*sides, side)


class DetailTable(NamedTuple):
    """
    Every token that a grid may end as; M of them, region by region and there level by level, the single cells last.

    regions: see `Regions`. region, level (`int[M]`): of each token, the level of singles being that after the last.
    boxes (`float[M, 4]`): top, left, bottom and right of each in cells. cell (`int[M]`): of a single, else -1.
    region_of_cell (`int[N]`), whole (`int[R]`): the region of each cell, and how many cells a region has. costs
    (`int[R, L - 1]`): tokens that each step up adds. worth (`float[R, L - 1]`): the gain of each step without
    relevance, minus infinity where it adds nothing. last_step (`int[R, L]`): the last step that added tokens on the
    way to a level, -1 without one.
    """

    regions: Regions
    region: torch.Tensor
    level: torch.Tensor
    boxes: torch.Tensor
    cell: torch.Tensor
    region_of_cell: torch.Tensor
    whole: torch.Tensor
    costs: torch.Tensor
    worth: torch.Tensor
    last_step: torch.Tensor


def _boxes(top: int, left: int, height: int, width: int, side: int) -> list[tuple[float, float, float, float]]:
    """The boxes of a region at a level, row by row."""
    rows, columns = min(side, height), min(side, width)
    ys = [top + height * row / rows for row in range(rows + 1)] if rows else []
    xs = [left + width * column / columns for column in range(columns + 1)] if columns else []
    return [(ys[row], xs[column], ys[row + 1], xs[column + 1]) for row in range(rows) for column in range(columns)]


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # training may look at the table that inference has made
def detail_table(
    height: int, width: int, ladder: tuple[int, ...], budget: int, coarse_share: float, device: torch.device
) -> DetailTable:
    """The table of a grid; the arguments are those of `regions_of`."""
    regions = regions_of(height, width, ladder, budget, coarse_share)
    levels = len(regions.ladder)
    entries, region_of_cell = [], torch.zeros(height, width, dtype=torch.long)
    for number, (own_height, own_width) in enumerate(zip(regions.heights, regions.widths, strict=True)):
        top, left = number // regions.columns * regions.side, number % regions.columns * regions.side
        region_of_cell[top : top + own_height, left : left + own_width] = number
        for level, side in enumerate(regions.ladder):
            entries += [(number, level, box, -1) for box in _boxes(top, left, own_height, own_width, side)]
        for y in range(top, top + own_height):
            entries += [(number, levels, (y, x, y + 1, x + 1), y * width + x) for x in range(left, left + own_width)]
    tokens = torch.tensor([regions.tokens(level) for level in range(levels)]).T  # int[R, L]
    costs = tokens.diff(dim=1)
    worth = ((tokens[:, 1:] / tokens[:, :-1].double().clamp(min=0.5)).log() / costs).log()
    worth = worth.masked_fill(costs == 0, -math.inf).float()
    steps = torch.where(costs > 0, torch.arange(levels - 1), -1)
    last_step = torch.nn.functional.pad(steps, (1, 0), value=-1).cummax(dim=1).values
    numbers, level, boxes, cell = zip(*entries, strict=True)
    return DetailTable(
        regions,
        torch.tensor(numbers, device=device),
        torch.tensor(level, device=device),
        torch.tensor(boxes, dtype=torch.float32, device=device),
        torch.tensor(cell, device=device),
        region_of_cell.flatten().to(device),
        torch.bincount(region_of_cell.flatten()).to(device),
        costs,
        worth.to(device),
        last_step.to(device),
    )


class Allocation(NamedTuple):
    """
    The tokens of G grids of one size, B of each.

    boxes (`float[G, B, 4]`): top, left, bottom and right in cells. region, level (`int[G, B]`): of each token; the
    level of a single cell is that after the last. levels (`int[G, R]`): of each region. membership (`float[G, B]`):
    how safely the detail of a token was chosen, in (0, 1], with the gradient of the relevance; 1 at the coarsest
    level, which nobody chose.
    """

    boxes: torch.Tensor
    region: torch.Tensor
    level: torch.Tensor
    levels: torch.Tensor
    membership: torch.Tensor


def allocate(
    table: DetailTable, relevance: torch.Tensor, activation: torch.Tensor, budget: int, temperature: float = 1.0
) -> Allocation:
    """
    Spends the budget on regions, then on single cells. Of regions of one size the more relevant one never has less
    detail; ties go to the lower index. No grid looks at another one of the batch.

    Args:
        table: of the grids.
        relevance (`float[G, R]`): of each region, on a logarithmic scale.
        activation (`float[G, N]`): of each cell, by which singles are chosen.
        budget: tokens of each grid, at most N.
        temperature: of the memberships.
    """
    relevance, activation = relevance.float(), activation.float()
    device, grids, steps_a_region = relevance.device, len(relevance), table.costs.shape[1]
    gains = (relevance[:, :, None] + table.worth).flatten(1)  # float[G, R * (L - 1)]
    compared = (_rounded(relevance)[:, :, None] + table.worth).flatten(1)
    order = compared.argsort(dim=1, descending=True, stable=True).tolist()
    costs, left = table.costs.tolist(), budget - sum(table.regions.tokens(0))
    climbs = [_climb(steps, costs, left) for steps in order]
    levels = torch.tensor([climb.levels for climb in climbs], device=device)  # int[G, R]
    left = torch.tensor([climb.left for climb in climbs], device=device)
    bounds = torch.tensor([(climb.accepted, climb.rejected) for climb in climbs], device=device)

    native = (levels == steps_a_region) & (table.whole == torch.tensor(table.regions.tokens(-1), device=device))
    scores = _rounded(activation).masked_fill(native[:, table.region_of_cell], -math.inf)
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=device).expand_as(ranked)
    single = torch.empty_like(ranked).scatter_(1, ranked, places) < left[:, None]  # bool[G, N]
    taken = table.level == levels[:, table.region]
    taken = taken | ((table.cell >= 0) & single[:, table.cell.clamp(min=0)])  # bool[G, M]
    index = taken.nonzero()[:, 1].view(grids, budget)
    region, level, cell = table.region[index], table.level[index], table.cell[index]

    is_single = cell >= 0
    step = table.last_step[region, torch.where(is_single, 0, level)]  # int[G, B]
    gain = gains.gather(1, region * steps_a_region + step.clamp(min=0))
    # Where there was no step the gain may be minus infinity, and so may what it is compared with
    margin = torch.where(step >= 0, gain - _midpoint(gains.detach(), bounds[:, :1], bounds[:, 1:]), 0.0)
    inner = torch.cat((left[:, None] - 1, left[:, None]), dim=1)  # the last single cell, and the first that is none
    inner = torch.where(inner < places.shape[1], ranked.gather(1, inner.clamp(0, places.shape[1] - 1)), -1)
    threshold = _midpoint(activation.detach(), inner[:, :1], inner[:, 1:])
    margin = torch.where(is_single, activation.gather(1, cell.clamp(min=0)) - threshold, margin)
    membership = torch.sigmoid(margin / temperature)
    membership = torch.where(is_single | (step >= 0), membership, 1.0)
    return Allocation(table.boxes[index], region, level, levels, membership)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return (values.detach() / _RESOLUTION).round() * _RESOLUTION


class _Climb(NamedTuple):
    """Levels of the regions, tokens left over, the last step that was taken and the first that was not; -1 without."""

    levels: list[int]
    left: int
    accepted: int
    rejected: int


def _climb(order: list[int], costs: list[list[int]], left: int) -> _Climb:
    """Takes steps in this order while they fit; a region whose step does not fit goes no further."""
    width = len(costs[0])
    levels, stopped = [0] * len(costs), [False] * len(costs)
    accepted = rejected = -1
    for step in order:
        region, level = divmod(step, width)
        cost = costs[region][level]
        if stopped[region] or cost == 0:
            continue
        if cost <= left:
            left -= cost
            levels[region] = level + 1
            accepted = step
        else:
            stopped[region] = True
            rejected = step if rejected < 0 else rejected
            if left == 0:
                break
    for region, own in enumerate(costs):  # steps that add nothing
        while levels[region] < width and own[levels[region]] == 0:
            levels[region] += 1
    return _Climb(levels, left, accepted, rejected)


def _midpoint(values: torch.Tensor, last_in: torch.Tensor, first_out: torch.Tensor) -> torch.Tensor:
    """Halfway between two values of each row, `float[G, 1]`: minus infinity where nothing was left out, the second
    alone where nothing was let in."""
    inner, outer = values.gather(1, last_in.clamp(min=0)), values.gather(1, first_out.clamp(min=0))
    middle = torch.where(last_in >= 0, (inner + outer) / 2, outer)
    return torch.where(first_out >= 0, middle, -math.inf)


def uniform_boxes(height: int, width: int, budget: int, device: torch.device | None = None) -> torch.Tensor:
    """The same detail everywhere with exactly so many tokens: `float[B, 4]`, rows of equal height, cut into as many
    pieces each, or one more."""
    rows = round(math.sqrt(budget * height / width))
    rows = max(1, -(-budget // width), min(rows, height, budget))
    boxes = []
    for row in range(rows):
        pieces = (row + 1) * budget // rows - row * budget // rows
        top, bottom = row * height / rows, (row + 1) * height / rows
        boxes += [(top, piece * width / pieces, bottom, (piece + 1) * width / pieces) for piece in range(pieces)]
    return torch.tensor(boxes, dtype=torch.float32, device=device)


def overlaps(boxes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The area that boxes `float[…, A, 4]` share with boxes `float[…, C, 4]`: `float[…, A, C]`."""
    low = torch.maximum(boxes[..., :, None, :2], other[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], other[..., None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=-1)


def pooling(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """How much of each cell lies in each box: `float[…, B, 4]` to `float[…, B, N]`."""
    y = torch.arange(height, device=boxes.device, dtype=boxes.dtype)
    x = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    top, left, bottom, right = (edge[..., None] for edge in boxes.unbind(dim=-1))
    rows = (torch.minimum(bottom, y + 1) - torch.maximum(top, y)).clamp(min=0)  # [.., B, h]
    columns = (torch.minimum(right, x + 1) - torch.maximum(left, x)).clamp(min=0)
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)
