"""Relevance: what the three scorers see, and how three tensions weigh it."""

import math

import pytest
import torch

from vlm_zoo.models.relevance_vlm import (
    SCORERS,
    TENSIONS,
    OpponentBalancer,
    ParticipatoryScorer,
    PerspectivalScorer,
    Pictures,
    PropositionalScorer,
    blur,
    pooled,
    standardised,
    statistics,
)
from vlm_zoo.models.texture_vlm import cell_statistics


WIDTH, SIZE = 16, (6, 8)
CELLS = SIZE[0] * SIZE[1]
# Regions of 2 x 2 cells
REGIONS = (3, 4)
REGION_OF_CELL = torch.tensor([row // 2 * 4 + column // 2 for row in range(6) for column in range(8)])
IN_REGIONS = (REGION_OF_CELL, REGIONS)


def random_pictures(count=2, size=SIZE, question=5, asked=None):
    """Pictures of noise and as many questions; `asked` says how many tokens each of them has, by default all."""
    cells = size[0] * size[1]
    lengths = torch.tensor([question] * count if asked is None else asked)
    return Pictures(
        size,
        torch.randn(count, cells, WIDTH),
        torch.rand(count, cells, 13),
        torch.rand(count, cells, 4),
        torch.randn(count, question, WIDTH),
        torch.arange(question) < lengths[:, None],
    )


def constant_pictures(size=SIZE):
    """A picture of one colour, whose tokens are all the same."""
    texture, entropies = cell_statistics(torch.full((1, 3, 8 * size[0], 8 * size[1]), 0.3), 8)
    tokens = torch.randn(1, 1, WIDTH).expand(1, size[0] * size[1], WIDTH)
    question = torch.randn(1, 5, WIDTH)
    return Pictures(size, tokens, texture, entropies, question, torch.ones(1, 5, dtype=torch.bool))


def scorer(name):
    """A scorer whose every parameter is random."""
    torch.manual_seed(1)
    module = {
        "propositional": PropositionalScorer,
        "perspectival": lambda: PerspectivalScorer(WIDTH),
        "participatory": lambda: ParticipatoryScorer(WIDTH, heads=2, head_dim=4),
    }[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    torch.manual_seed(0)
    return module


def map_of(module, pictures):
    found = module(pictures)
    return found[0] if isinstance(found, tuple) else found


def balance_of(tensions, maps, pictures=None):
    balancer = OpponentBalancer(WIDTH, list(tensions))
    question = torch.zeros(len(maps), WIDTH)
    return balancer(maps, question, pictures or random_pictures(len(maps)), *IN_REGIONS)


def relevance_of(balancer, activation, focus):
    tensions = torch.tensor([[0.5, 0.5, focus]]).expand(len(activation), 3)
    return balancer.relevance(activation, tensions, *IN_REGIONS)


# --- propositional ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_information_is_the_mean_of_the_entropies_until_weights_are_learned():
    pictures = random_pictures()
    torch.testing.assert_close(PropositionalScorer()(pictures), pictures.entropies.mean(dim=2))


@torch.no_grad()
def test_learned_weights_prefer_one_entropy_to_the_others():
    pictures, module = random_pictures(), PropositionalScorer()
    module.weight[2] = 50.0
    torch.testing.assert_close(module(pictures), pictures.entropies[..., 2], atol=0.05, rtol=0)


@torch.no_grad()
def test_a_flat_picture_says_little_and_noise_says_much():
    grey = torch.rand(1, 1, 48, 48).expand(1, 3, 48, 48)
    module = PropositionalScorer()
    module.weight[0] = 50.0  # lightness
    flat, noisy = (
        module(random_pictures(1)._replace(entropies=cell_statistics(picture, 16)[1]))
        for picture in (torch.full((1, 3, 48, 48), 0.3), grey)
    )
    assert flat.max() <= 0.26 and noisy.min() > 0.8


# --- perspectival ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_nothing_stands_out_in_a_constant_picture():
    module = scorer("perspectival")
    module.centre.zero_()
    assert module(constant_pictures()).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("odd", [0, 7, 19, 28, 47])
@pytest.mark.parametrize("what", ["tokens", "texture"])
def test_the_one_odd_cell_stands_out_most(what, odd):
    module, pictures = scorer("perspectival"), constant_pictures()
    module.centre.zero_()
    values = getattr(pictures, what).clone()
    values[:, odd] = torch.rand(values.shape[2])
    assert module(pictures._replace(**{what: values})).argmax() == odd


@torch.no_grad()
def test_salience_moves_with_what_stands_out():
    module, pictures = scorer("perspectival"), constant_pictures((12, 12))
    module.centre.zero_()
    maps = []
    for row, column in ((4, 5), (7, 6)):  # so far from the borders that their neighbours are as many
        tokens = pictures.tokens.clone()
        tokens[:, 12 * row + column] = torch.arange(WIDTH) % 5
        found = module(pictures._replace(tokens=tokens)).view(12, 12)
        maps.append(found[row - 2 : row + 3, column - 2 : column + 3])
    torch.testing.assert_close(*maps)


@torch.no_grad()
def test_where_a_cell_is_does_not_make_it_salient():
    module, pictures = scorer("perspectival"), random_pictures()
    module.centre.zero_()
    expected = module(pictures)
    pictures.texture[..., 9:12] = torch.rand(2, CELLS, 3)
    assert torch.equal(module(pictures), expected)


@torch.no_grad()
def test_a_learned_weight_looks_to_the_middle():
    module, pictures = PerspectivalScorer(WIDTH), constant_pictures()
    module.centre.fill_(1.0)
    found = module(pictures).view(SIZE)
    assert found[2:4, 3:5].min() > found[0].max()
    torch.testing.assert_close(found.flatten(), 1 - pictures.texture[0, :, 11])


def test_a_blur_is_the_mean_of_the_neighbours_that_there_are():
    grid = torch.arange(12.0).view(3, 4)
    found = blur(grid.reshape(1, 12, 1), (3, 4), 3)[0, :, 0].view(3, 4)
    assert found[0, 0] == grid[:2, :2].mean() and found[1, 2] == grid[:, 1:].mean()


# --- participatory ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_questions_have_two_maps():
    module, pictures = scorer("participatory"), random_pictures(1)
    other = pictures._replace(question=torch.randn(1, 5, WIDTH))
    first, second = (module(each)[0] for each in (pictures, other))
    assert torch.corrcoef(torch.stack((first[0], second[0])))[0, 1] < 0.9


@torch.no_grad()
@pytest.mark.parametrize("name", SCORERS[:2])
def test_the_other_two_do_not_hear_the_question(name):
    module, pictures = scorer(name), random_pictures()
    other = pictures._replace(question=torch.randn(2, 5, WIDTH))
    assert torch.equal(module(pictures), module(other))


@torch.no_grad()
def test_permuting_the_cells_permutes_what_the_question_finds():
    module, pictures, order = scorer("participatory"), random_pictures(), torch.randperm(CELLS)
    moved = pictures._replace(tokens=pictures.tokens[:, order], texture=pictures.texture[:, order])
    torch.testing.assert_close(module(moved)[0], module(pictures)[0][:, order])


@torch.no_grad()
@pytest.mark.parametrize("what", ["tokens", "texture"])
def test_a_question_looks_at_content_and_at_texture(what):
    module, pictures = scorer("participatory"), random_pictures()
    other = pictures._replace(**{what: torch.rand_like(getattr(pictures, what))})
    assert (module(pictures)[0] - module(other)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_an_empty_question_finds_nothing():
    found, question = scorer("participatory")(random_pictures(2, asked=[0, 3]))
    assert not found[0].any() and not question[0].any()
    assert found[1].any() and question[1].any()


@torch.no_grad()
def test_padding_of_a_question_is_not_read():
    module, pictures = scorer("participatory"), random_pictures(2, asked=[5, 3])
    padded = pictures._replace(question=torch.where(pictures.asked[..., None], pictures.question, 100.0))
    short = Pictures(SIZE, *(part[1:] for part in pictures[1:4]), pictures.question[1:, :3], pictures.asked[1:, :3])
    for one, other, alone in zip(module(pictures), module(padded), module(short), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one[1:], alone)


@torch.no_grad()
def test_the_map_is_the_soft_maximum_over_the_questions_tokens_in_the_mean_over_heads():
    module, pictures = scorer("participatory"), random_pictures(1)
    module.log_temperature.fill_(-0.7)
    question = module.question_norm(pictures.question)[0]
    importance = module.importance(question)[:, 0].softmax(dim=0)
    content = module.content_norm(torch.cat((pictures.tokens, module.texture(pictures.texture)), dim=-1))[0]
    tau, heads = math.exp(-0.7), []
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        scores = (question @ module.query.weight[rows].T) @ (content @ module.key.weight[rows].T).T / 2
        heads.append(tau * (importance[:, None] * (scores / tau).exp()).sum(dim=0).log())
    found, summary = module(pictures)
    torch.testing.assert_close(found[0], torch.stack(heads).mean(dim=0))
    torch.testing.assert_close(summary[0], importance @ question)


# --- all scorers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SCORERS)
def test_a_picture_has_the_map_that_it_has_alone(name):
    module, pictures = scorer(name), random_pictures(4, asked=[5, 2, 0, 3])
    together = map_of(module, pictures)
    for number in range(4):
        alone = map_of(module, Pictures(SIZE, *(part[number : number + 1] for part in pictures[1:])))
        torch.testing.assert_close(alone[0], together[number], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", ["noise", "constant", "blank", "silent"])
def test_every_parameter_of_a_scorer_has_a_finite_gradient(name, kind):
    pictures = constant_pictures() if kind in ("constant", "blank") else random_pictures(1)
    if kind == "blank":
        zeros = torch.zeros_like
        pictures = Pictures(SIZE, *map(zeros, pictures[1:4]), zeros(pictures.question), pictures.asked)
    if kind == "silent":
        pictures = pictures._replace(asked=torch.zeros_like(pictures.asked))
    pictures = pictures._replace(tokens=pictures.tokens.detach().clone().requires_grad_())
    module = scorer(name)
    weights = torch.randn(1, CELLS)
    found = map_of(module, pictures)
    (standardised(found[:, None])[:, 0] * weights).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        if kind == "noise":
            assert parameter.grad.any()
    assert pictures.tokens.grad is None or pictures.tokens.grad.isfinite().all()


# --- balancer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_standardised_maps_have_mean_0_and_deviation_1_and_constant_ones_are_0():
    maps = torch.cat((3 * torch.randn(2, 2, CELLS) + 5, torch.full((2, 1, CELLS), 0.3)), dim=1)
    found = standardised(maps)
    torch.testing.assert_close(found.mean(dim=2), torch.zeros(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, :2].std(dim=2, correction=0), torch.ones(2, 2), atol=0.02, rtol=0)
    assert found[:, 2].abs().max() < 0.01
    maps[0, 0, 0] = 1e4
    assert standardised(maps).abs().max() == 4


@torch.no_grad()
def test_statistics_are_mean_maximum_deviation_and_quadrants_of_each_map():
    maps = torch.randn(2, 3, CELLS)
    found = statistics(maps, SIZE).view(2, 3, 7)
    grid = maps.view(2, 3, *SIZE)
    torch.testing.assert_close(found[..., 0], maps.mean(dim=2))
    torch.testing.assert_close(found[..., 1], maps.amax(dim=2))
    torch.testing.assert_close(found[..., 2], maps.std(dim=2, correction=0))
    torch.testing.assert_close(found[..., 4], grid[..., :3, 4:].mean(dim=(2, 3)))
    torch.testing.assert_close(found[..., 5], grid[..., 3:, :4].mean(dim=(2, 3)))
    for size in ((1, 5), (7, 1), (1, 1), (3, 5)):
        assert statistics(torch.randn(2, 3, size[0] * size[1]), size).isfinite().all()


@torch.no_grad()
def test_compressing_without_exploiting_is_information_alone_whatever_is_asked():
    maps = torch.randn(2, 3, CELLS)
    other = maps.clone()
    other[:, 1:] = torch.randn(2, 2, CELLS)
    found, again = (balance_of((1.0, 0.5, 0.5), each).activation for each in (maps, other))
    assert torch.equal(found, again)
    torch.testing.assert_close(found, standardised(maps)[:, 0])


@torch.no_grad()
def test_particularizing_without_exploiting_is_the_question_alone():
    maps = torch.randn(2, 3, CELLS)
    other = maps.clone()
    other[:, :2] = torch.randn(2, 2, CELLS)
    found, again = (balance_of((0.0, 0.5, 0.5), each).activation for each in (maps, other))
    assert torch.equal(found, again)
    torch.testing.assert_close(found, standardised(maps)[:, 2])


@torch.no_grad()
@pytest.mark.parametrize("exploit", [0.6, 1.0])
def test_exploring_is_exploiting_turned_around(exploit):
    maps = torch.randn(2, 3, CELLS)
    follow, neutral, flee = (
        balance_of((0.3, tension, 0.5), maps).activation for tension in (exploit, 0.5, 1 - exploit)
    )
    torch.testing.assert_close(follow - neutral, neutral - flee)
    torch.testing.assert_close(follow - neutral, (2 * exploit - 1) * standardised(maps)[:, 1])


@torch.no_grad()
def test_tensions_are_read_from_the_question_the_picture_and_its_maps():
    balancer, maps, pictures = OpponentBalancer(WIDTH), torch.randn(2, 3, CELLS), random_pictures()
    question = torch.randn(2, WIDTH)
    tensions = balancer(maps, question, pictures, *IN_REGIONS).tensions
    assert tensions.shape == (2, len(TENSIONS)) and (tensions > 0).all() and (tensions < 1).all()
    assert not torch.equal(tensions[0], tensions[1])
    for other in (
        balancer(maps, torch.randn(2, WIDTH), pictures, *IN_REGIONS),
        balancer(maps, question, random_pictures(), *IN_REGIONS),
        balancer(2 * maps, question, pictures, *IN_REGIONS),
    ):
        assert (other.tensions - tensions).abs().max() > 1e-4


@torch.no_grad()
def test_a_picture_has_the_balance_that_it_has_alone():
    balancer, maps, pictures = OpponentBalancer(WIDTH), torch.randn(4, 3, CELLS), random_pictures(4)
    question = torch.randn(4, WIDTH)
    together = balancer(maps, question, pictures, *IN_REGIONS)
    for number in range(4):
        own = slice(number, number + 1)
        picture = Pictures(SIZE, *(part[own] for part in pictures[1:]))
        for one, other in zip(balancer(maps[own], question[own], picture, *IN_REGIONS), together, strict=True):
            torch.testing.assert_close(one, other[own])


@torch.no_grad()
def test_equal_tensions_give_a_picture_the_same_relevance_to_the_bit_in_any_batch():
    balancer, activation, tensions = OpponentBalancer(WIDTH), torch.randn(400, CELLS), torch.rand(400, 3)
    together = balancer.relevance(activation, tensions, *IN_REGIONS)
    for number in range(400):
        own = slice(number, number + 1)
        assert torch.equal(balancer.relevance(activation[own], tensions[own], *IN_REGIONS), together[own])


@pytest.mark.parametrize("kind", ["noise", "constant", "blank"])
def test_every_parameter_of_the_balancer_has_a_finite_gradient(kind):
    balancer = OpponentBalancer(WIDTH)
    pictures = random_pictures(1) if kind == "noise" else constant_pictures()
    maps = torch.randn(1, 3, CELLS) if kind == "noise" else torch.full((1, 3, CELLS), 0.3)
    question = torch.randn(1, WIDTH)
    if kind == "blank":
        maps, question = torch.zeros_like(maps), torch.zeros_like(question)
        pictures = pictures._replace(tokens=torch.zeros_like(pictures.tokens))
    maps.requires_grad_()
    balance = balancer(maps, question, pictures, *IN_REGIONS)
    ((balance.relevance * torch.randn(1, 12)).sum() + (balance.activation * torch.randn(1, CELLS)).sum()).backward()
    assert maps.grad.isfinite().all()
    for name, parameter in balancer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert kind != "noise" or parameter.grad.any(), name


# --- relevance of regions --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_relevance_of_a_region_is_the_soft_maximum_of_its_cells_without_the_mean():
    activation = torch.randn(2, CELLS)
    found = relevance_of(OpponentBalancer(WIDTH, [0.5] * 3), activation, 0.5)
    regions = activation.view(2, 3, 2, 4, 2).transpose(2, 3).reshape(2, 12, 4)
    expected = 0.5 * ((regions / 0.5).exp().mean(dim=2)).log()
    torch.testing.assert_close(found, expected - expected.mean(dim=1, keepdim=True), atol=0.02, rtol=0)


@torch.no_grad()
def test_relevance_does_not_change_when_every_cell_is_as_much_more_active():
    balancer, activation = OpponentBalancer(WIDTH, [0.5] * 3), torch.randn(2, CELLS)
    one, other = (relevance_of(balancer, each, 0.7) for each in (activation, activation + 3))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_shares_of_regions_have_less_entropy_the_more_focus_there_is():
    balancer, activation = OpponentBalancer(WIDTH, [0.5] * 3), torch.randn(3, CELLS)
    entropies = []
    for focus in torch.linspace(0, 1, 9).tolist():
        logarithms = relevance_of(balancer, activation, focus).log_softmax(dim=1)
        entropies.append(-(logarithms.exp() * logarithms).sum(dim=1))
    assert (torch.stack(entropies).diff(dim=0) < 0).all()
    assert (entropies[0] > 0.95 * math.log(12)).all()  # nearly uniform


@torch.no_grad()
def test_focus_makes_differences_four_times_as_large_and_its_opposite_a_quarter():
    balancer, activation = OpponentBalancer(WIDTH, [0.5] * 3), torch.randn(2, CELLS)
    balancer.inhibition.fill_(-50.0)
    wide, neutral, sharp = (relevance_of(balancer, activation, focus) for focus in (0.0, 0.5, 1.0))
    torch.testing.assert_close(sharp, 4 * neutral)
    torch.testing.assert_close(wide, neutral / 4)


@torch.no_grad()
def test_diversity_inhibits_the_neighbours_of_what_is_relevant():
    balancer, activation = OpponentBalancer(WIDTH, [0.5] * 3), torch.zeros(1, CELLS)
    activation[0, REGION_OF_CELL == 5] = 3.0  # in the second row and column of regions
    before = relevance_of(balancer, activation, 0.2)[0]
    assert before[4] - before[11] == pytest.approx(0.0, abs=0.01)
    balancer.inhibition.fill_(6.0)
    after = relevance_of(balancer, activation, 0.2)[0]
    assert after[4] < after[11] - 0.1
    focused = relevance_of(balancer, activation, 1.0)[0]
    assert focused[4] == pytest.approx(focused[11].item(), abs=1e-5)


def test_a_pool_is_the_logarithm_of_the_mean_exponential_of_its_group():
    values, group = torch.tensor([[1.0, 2.0, 3.0, 200.0]]), torch.tensor([1, 0, 1, 2])
    expected = [2.0, math.log((math.exp(1) + math.exp(3)) / 2), 200.0]
    assert pooled(values, group, 3)[0].tolist() == pytest.approx(expected)
    assert pooled(values + 500, group, 3).isfinite().all()
