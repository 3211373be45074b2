"""The allocator: exactly the budget, more for what is more relevant, and the same answer in any company."""

import itertools
import math

import pytest
import torch

from vlm_zoo.models.detail_vlm import (
    allocate,
    budget_of,
    detail_table,
    overlaps,
    pooling,
    regions_of,
    uniform_boxes,
)


LADDERS = [(2, 3, 5), (1, 2, 4), (1, 3), (0, 1), (0, 5), (0, 1, 2)]
CPU = torch.device("cpu")


def allocated(height, width, budget, ladder=(2, 3, 5), count=1, scale=2.0, coarse_share=0.5, temperature=1.0):
    """A table and what it makes of random relevance: with them, `float[count, R]` and `float[count, N]`."""
    table = detail_table(height, width, ladder, budget, coarse_share, CPU)
    relevance = scale * torch.randn(count, len(table.whole))
    activation = torch.randn(count, height * width)
    return table, allocate(table, relevance, activation, budget, temperature), relevance, activation


def draws(count, largest=24):
    """Sizes of grids and budgets of all kinds, none above the cells of its grid."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        height, width = torch.randint(1, largest + 1, (2,), generator=generator).tolist()
        if number % 2:
            budget = int(torch.randint(1, height * width + 1, (1,), generator=generator))
        else:
            budget = budget_of(height * width, (64, 144, 200, 256, 400, 0.25, 0.1, 1.0)[number // 2 % 8])
        yield height, width, budget


def two_regions(first, second, budget, temperature=1.0):
    """4 x 8 cells as two regions, of 1 or 16 tokens each, with these relevances."""
    table = detail_table(4, 8, (1, 4), budget, 0.5, CPU)
    relevance = torch.tensor([[first, second]], requires_grad=True)
    activation = torch.linspace(-1, 1, 32)[None].requires_grad_()
    return allocate(table, relevance, activation, budget, temperature), relevance, activation


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "wanted", "budget"),
    [
        (1000, 200, 200),
        (100, 200, 100),
        (100, 1, 1),
        (100, 1.0, 100),
        (100, 0.25, 25),
        (100, 0.251, 26),
        (100, 0.07, 7),  # 100 * 0.07 is a little more than 7
        (1, 0.01, 1),
    ],
)
def test_a_whole_number_is_a_budget_and_a_float_a_share_rounded_up(cells, wanted, budget):
    assert budget_of(cells, wanted) == budget


@pytest.mark.parametrize("ladder", LADDERS)
def test_every_image_ends_as_exactly_its_budget(ladder):
    for height, width, budget in draws(60):
        table, allocation, *_ = allocated(height, width, budget, ladder, count=3)
        assert allocation.boxes.shape == (3, budget, 4)
        for boxes, region, level in zip(allocation.boxes, allocation.region, allocation.level, strict=True):
            assert len({tuple(box) for box in boxes.tolist()}) == budget  # none twice
            assert region.max() < len(table.whole) and level.max() <= len(table.regions.ladder)


def test_every_budget_of_a_grid_is_met_exactly():
    for budget in range(1, 7 * 11 + 1):
        assert allocated(7, 11, budget)[1].boxes.shape == (1, budget, 4)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0])
def test_the_budget_is_met_whatever_the_relevance(scale):
    for height, width, budget in draws(20):
        assert allocated(height, width, budget, scale=scale)[1].boxes.shape[1] == budget


@pytest.mark.parametrize("ladder", [ladder for ladder in LADDERS if ladder[0] > 0])
def test_every_cell_is_covered_once_by_its_regions_tokens(ladder):
    for height, width, budget in draws(40):
        table, allocation, *_ = allocated(height, width, budget, ladder)
        single = allocation.level[0] == len(table.regions.ladder)
        covered = pooling(allocation.boxes[0, ~single], height, width).sum(dim=0)
        torch.testing.assert_close(covered, torch.ones(height * width))


def test_a_ladder_from_zero_drops_what_it_cannot_pay_for():
    _, allocation, relevance, _ = allocated(4, 5, 7, ladder=(0, 1))
    kept = relevance[0].topk(7).indices.sort().values
    assert torch.equal(allocation.region[0], kept)
    assert allocation.levels.sum() == 7
    assert pooling(allocation.boxes, 4, 5).sum() == 7


@pytest.mark.parametrize("ladder", LADDERS)
def test_the_budget_of_all_cells_makes_every_one_native(ladder):
    for height, width in ((1, 1), (3, 7), (10, 10), (13, 11)):
        table, allocation, *_ = allocated(height, width, height * width, ladder)
        boxes = uniform_boxes(height, width, height * width)
        assert {tuple(box) for box in allocation.boxes[0].tolist()} == {tuple(box) for box in boxes.tolist()}
        assert (allocation.levels == len(table.regions.ladder) - 1).all()
        assert torch.equal(allocation.membership, torch.ones(1, height * width))


# --- regions ---------------------------------------------------------------------------------------------------------


def test_regions_are_squares_and_what_is_left_at_the_edges():
    regions = regions_of(7, 12, (2, 3, 5), 80, 0.5)
    assert (regions.side, regions.rows, regions.columns) == (5, 2, 3)
    assert regions.heights == [5, 5, 5, 2, 2, 2] and regions.widths == [5, 5, 2, 5, 5, 2]
    assert regions.tokens(1) == [9, 9, 6, 6, 6, 4]


def test_regions_double_when_the_coarsest_level_would_take_more_than_its_share():
    assert regions_of(20, 20, (2, 3, 5), 128, 0.5).side == 5  # 16 regions of 4 tokens
    wider = regions_of(20, 20, (2, 3, 5), 127, 0.5)
    assert (wider.side, wider.ladder) == (10, (2, 3, 5, 10))
    assert regions_of(20, 20, (2, 3, 5), 127, 1.0).side == 5
    assert regions_of(20, 20, (2, 3, 5), 8, 0.5).side == 20


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("coarse_share", [0.25, 0.5, 1.0])
def test_the_coarsest_level_never_takes_more_than_its_share_unless_there_is_one_region(ladder, coarse_share):
    for height, width, budget in draws(60):
        regions = regions_of(height, width, ladder, budget, coarse_share)
        coarsest, only = sum(regions.tokens(0)), regions.rows * regions.columns == 1
        assert coarsest <= (budget if only else coarse_share * budget)


def test_a_single_region_that_is_still_too_dear_becomes_one_token():
    regions = regions_of(3, 3, (2, 3, 5), 2, 0.5)
    assert regions.ladder == (1, 2, 3, 5) and regions.tokens(0) == [1]


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", LADDERS)
def test_of_regions_of_one_size_the_more_relevant_never_has_less_detail(ladder):
    seen = set()
    for height, width, budget in draws(60):
        table, allocation, relevance, _ = allocated(height, width, budget, ladder)
        sizes = list(zip(table.regions.heights, table.regions.widths, strict=True))
        for size in set(sizes):
            own = torch.tensor([number for number, other in enumerate(sizes) if other == size])
            levels = allocation.levels[0, own[relevance[0, own].argsort()]]
            assert (levels.diff() >= 0).all(), (height, width, budget)
            seen.update(levels.tolist())
    assert len(seen) >= len(ladder)


@pytest.mark.parametrize("ladder", LADDERS)
def test_ties_go_to_the_region_with_the_lower_number(ladder):
    side = 4 * ladder[-1]  # regions of one size, though they double twice
    for budget in torch.linspace(1, side * side, 20).int().tolist():
        levels = allocated(side, side, budget, ladder, scale=0.0)[1].levels[0]
        assert (levels.diff() <= 0).all(), budget


def test_relevance_that_differs_by_rounding_errors_alone_is_a_tie():
    table = detail_table(20, 20, (2, 3, 5), 200, 0.5, CPU)
    activation = torch.zeros(1, 400)
    expected = allocate(table, torch.ones(1, 16), activation, 200)
    for _ in range(20):
        noisy = torch.ones(1, 16) + 1e-6 * torch.randn(1, 16)
        found = allocate(table, noisy, activation + 1e-6 * torch.randn(1, 400), 200)
        assert torch.equal(found.boxes, expected.boxes)


def test_singles_of_equal_activation_are_the_first_cells():
    table = detail_table(4, 8, (1, 4), 12, 0.5, CPU)
    allocation = allocate(table, torch.zeros(1, 2), torch.zeros(1, 32), 12)
    singles = allocation.boxes[0, allocation.level[0] == 2]
    places = sorted((top, left) for top, left, _, _ in singles.tolist())
    assert places == [(0.0, float(left)) for left in range(8)] + [(1.0, 0.0), (1.0, 1.0)]


def test_permuting_the_relevance_of_equal_regions_permutes_their_levels():
    table = detail_table(20, 20, (2, 3, 5), 190, 0.5, CPU)
    relevance, activation = torch.randn(1, 16), torch.randn(1, 400)
    levels = allocate(table, relevance, activation, 190).levels
    assert len(levels.unique()) == 3
    for _ in range(10):
        order = torch.randperm(16)
        assert torch.equal(allocate(table, relevance[:, order], activation, 190).levels, levels[:, order])


def test_no_other_levels_of_as_many_tokens_are_worth_more():
    compared = 0
    for height, width, budget in draws(400, largest=9):
        table, allocation, relevance, _ = allocated(height, width, budget, ladder=(1, 2, 4))
        tokens = torch.tensor([table.regions.tokens(level) for level in range(len(table.regions.ladder))])  # [L, R]
        choices = list(itertools.product(range(len(tokens)), repeat=tokens.shape[1])) if len(table.whole) <= 6 else []
        own = tokens.gather(0, torch.tensor([*choices, allocation.levels[0].tolist()]))
        if not choices or own[-1].sum() < budget:  # with a rest it would be a knapsack
            continue
        worth = (relevance.double().exp() * own.log()).sum(dim=1)
        assert worth[-1] >= worth[own.sum(dim=1) <= budget].max() * (1 - 1e-4), (height, width, budget)
        compared += len(choices) > 3
    assert compared > 20


def test_what_is_left_goes_to_the_most_active_cells_that_are_not_native():
    for height, width, budget in draws(40):
        table, allocation, _, activation = allocated(height, width, budget)
        last = len(table.regions.ladder)
        single = allocation.level[0] == last
        boxes = allocation.boxes[0, single].long()
        cells = boxes[:, 0] * width + boxes[:, 1]
        native = allocation.levels[0, table.region_of_cell] == last - 1
        ranked = activation[0].masked_fill(native, -math.inf).topk(int(single.sum())).indices
        assert set(cells.tolist()) == set(ranked.tolist())
        assert torch.equal(allocation.region[0, single], table.region_of_cell[cells])


def test_tokens_are_in_raster_order_region_by_region_and_single_cells_last():
    singles = 0
    for height, width, budget in draws(60):
        table, allocation, *_ = allocated(height, width, budget)
        last = len(table.regions.ladder)
        keys = [
            (region, level == last, box[0], box[1])
            for region, level, box in zip(
                allocation.region[0].tolist(), allocation.level[0].tolist(), allocation.boxes[0].tolist(), strict=True
            )
        ]
        assert keys == sorted(keys)
        singles += sum(key[1] for key in keys)
    assert singles > 50


def test_a_tokens_box_lies_in_its_region_and_has_its_share_of_it():
    for height, width, budget in draws(30):
        table, allocation, *_ = allocated(height, width, budget)
        weights = pooling(allocation.boxes[0], height, width)
        own = table.region_of_cell == allocation.region[0, :, None]
        torch.testing.assert_close((weights * own).sum(dim=1), weights.sum(dim=1))
        tokens = torch.tensor([table.regions.tokens(level) for level in range(len(table.regions.ladder))])
        is_single = allocation.level[0] == len(tokens)
        region, level = allocation.region[0], allocation.level[0].clamp(max=len(tokens) - 1)
        expected = torch.where(is_single, 1.0, table.whole[region] / tokens[level, region])
        torch.testing.assert_close(weights.sum(dim=1), expected)


def test_levels_are_those_of_the_tokens():
    for height, width, budget in draws(30):
        table, allocation, *_ = allocated(height, width, budget)
        tokens = torch.tensor([table.regions.tokens(level) for level in range(len(table.regions.ladder))])
        mine = allocation.level[0] < len(tokens)
        counts = torch.bincount(allocation.region[0, mine], minlength=len(table.whole))
        assert torch.equal(counts, tokens.gather(0, allocation.levels)[0])


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", LADDERS)
def test_the_answer_is_the_same_to_the_bit_whatever_else_is_in_the_batch(ladder):
    for height, width, budget in draws(20):
        table, together, relevance, activation = allocated(height, width, budget, ladder, count=5)
        for number in range(5):
            own = slice(number, number + 1)
            alone = allocate(table, relevance[own], activation[own], budget)
            for field in ("boxes", "region", "level", "levels"):
                assert torch.equal(getattr(alone, field), getattr(together, field)[own]), field
            torch.testing.assert_close(alone.membership, together.membership[own])


def test_half_precision_is_decided_in_float32():
    relevance, activation = torch.randn(1, 16).bfloat16(), torch.randn(1, 400).bfloat16()
    for budget in range(190, 200):
        table = detail_table(20, 20, (2, 3, 5), budget, 0.5, CPU)
        half = allocate(table, relevance, activation, budget)
        full = allocate(table, relevance.float(), activation.float(), budget)
        assert half.membership.dtype == torch.float32
        assert all(map(torch.equal, half, full))


# --- memberships -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_membership_of_a_region_says_how_far_it_is_from_the_first_that_was_left_out(temperature):
    allocation, relevance, _ = two_regions(1.2, 0.4, budget=17, temperature=temperature)
    assert allocation.levels.tolist() == [[1, 0]]
    native = allocation.level[0] == 1
    expected = 1 / (1 + math.exp(-(1.2 - 0.4) / 2 / temperature))
    torch.testing.assert_close(allocation.membership[0, native], torch.full((16,), expected))
    assert allocation.membership[0, ~native].tolist() == [1.0]
    allocation.membership.sum().backward()
    assert relevance.grad[0, 0] > 0 and relevance.grad[0, 1] == 0


def test_the_first_region_that_was_left_out_is_the_nearest():
    table = detail_table(4, 16, (1, 4), 20, 0.5, CPU)  # one token is left for a single cell
    relevance = torch.tensor([[0.3, 1.2, -0.6, 0.5]])
    allocation = allocate(table, relevance, torch.zeros(1, 64), 20)
    assert allocation.levels.tolist() == [[0, 1, 0, 0]]
    expected = 1 / (1 + math.exp(-(1.2 - 0.5) / 2))
    assert allocation.membership[0, allocation.level[0] == 1].tolist() == pytest.approx([expected] * 16)


def test_the_membership_of_a_single_cell_says_how_far_it_is_from_the_first_that_was_left_out():
    allocation, relevance, activation = two_regions(0.0, 0.0, budget=4)
    single = allocation.level[0] == 2
    assert allocation.boxes[0, single, 1].tolist() == [6.0, 7.0]  # the two most active cells, in the last row
    threshold = (activation[0, 30] + activation[0, 29]) / 2
    torch.testing.assert_close(allocation.membership[0, single], torch.sigmoid(activation[0, 30:] - threshold))
    allocation.membership.sum().backward()
    assert activation.grad.nonzero()[:, 1].tolist() == [30, 31] and not relevance.grad.any()


def test_what_was_never_in_doubt_is_certain():
    allocation, relevance, activation = two_regions(1.2, 0.4, budget=32)
    assert allocation.membership.tolist() == [[1.0] * 32]
    allocation.membership.sum().backward()
    assert not relevance.grad.any() and not activation.grad.any()


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_memberships_have_finite_gradients_at_any_relevance(scale):
    for ladder in LADDERS:
        for height, width, budget in draws(20, largest=12):
            table = detail_table(height, width, ladder, budget, 0.5, CPU)
            relevance = (scale * torch.randn(2, len(table.whole))).requires_grad_()
            activation = (scale * torch.randn(2, height * width)).requires_grad_()
            membership = allocate(table, relevance, activation, budget).membership
            assert ((membership >= 0) & (membership <= 1)).all()
            membership.sum().backward()
            assert relevance.grad.isfinite().all() and activation.grad.isfinite().all()


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_uniform_boxes_tile_the_grid_exactly():
    for height, width, budget in [*draws(100), *((2, 20, budget) for budget in range(1, 41))]:
        boxes = uniform_boxes(height, width, budget)
        assert boxes.shape == (budget, 4)
        torch.testing.assert_close(pooling(boxes, height, width).sum(dim=0), torch.ones(height * width))
        sides = boxes[:, 2:] - boxes[:, :2]
        assert sides.min() > 0.999, (height, width, budget)  # none finer than a cell
        assert sides.prod(dim=1).max() <= 2 * sides.prod(dim=1).min() + 1e-4


def test_uniform_boxes_of_all_cells_are_the_cells():
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(7.0), indexing="ij")
    cells = torch.stack((y, x, y + 1, x + 1), dim=-1).flatten(0, 1)
    assert torch.equal(uniform_boxes(3, 7, 21), cells)


def test_pooling_weighs_cells_by_the_area_that_lies_in_the_box():
    weights = pooling(torch.tensor([[0.5, 1.0, 2.0, 2.5]]), 3, 3)
    assert weights.view(3, 3).tolist() == [[0.0, 0.5, 0.25], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


def test_overlaps_are_shared_areas():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 1.5]])
    other = torch.tensor([[1.0, 1.0, 4.0, 4.0], [2.0, 0.0, 3.0, 4.0]])
    assert overlaps(boxes, other).tolist() == [[1.0, 0.0], [1.0, 0.5]]
