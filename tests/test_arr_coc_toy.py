"""The toy of ARR-COC: scorers learn from the answer's loss alone."""

import pytest


@pytest.fixture(scope="module")
def toy(example):
    return example("arr_coc_toy")


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["noise", "attn_bias"])
def test_scorers_learn_where_the_answer_is(toy, gate):
    accuracy, named_region_native = toy.run(gate, seed=0, steps=600)
    assert named_region_native > 0.9 and accuracy > 0.9


@pytest.mark.slow
def test_a_hard_choice_without_a_gate_learns_nothing(toy):
    accuracy, named_region_native = toy.run("none", seed=0, steps=600)
    assert named_region_native < 0.25 and accuracy < 0.6


def test_the_pattern_shows_at_native_detail_alone(toy):
    model = toy.Toy("none", steps=1).eval()
    native, marker, _, _ = model.pictures(4)
    pooled = native[..., : model.markers.shape[1]].unflatten(1, (3, 4, 3, 4)).mean(dim=(2, 4)).flatten(1, 2)
    distances = (pooled[:, :, None] - model.markers).norm(dim=-1).min(dim=-1).values
    assert distances.max() < 1e-5
    assert model(native, marker)[1].sum(dim=1).tolist() == [1, 1, 1, 1]
