"""The benchmark's machinery: equality before the clock, turns, memory, table. Nothing here asserts a time."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from vlm_zoo import cli
from vlm_zoo.bench import (
    Row,
    Scale,
    arr_coc_rows,
    blip2_rows,
    engine,
    flamingo_rows,
    measure,
    mrope_rows,
    peak,
    rows,
    run,
    table,
    vet_rows,
)
from vlm_zoo.bench.engine import Case, Entry, Equality, NotRun, close, same
from vlm_zoo.bench.measure import Timing, one_thread, peak_of, take_turns
from vlm_zoo.models.modeling_vlm import ZooPreTrainedModel
from vlm_zoo.models.mrope import ZooMropeModel


TINY = Scale(
    rounds=2,
    seconds=0.0,
    dtype=torch.float32,
    image_size=56,
    tower_width=64,
    tower_layers=2,
    deep_tower_layers=3,
    frozen_tower_layers=2,
    text_width=64,
    text_layers=2,
    decoder_width=64,
    decoder_layers=2,
    vocab_size=700,
    small_vocab_size=300,
    prompt_tokens=8,
    answer_tokens=6,
    new_tokens=4,
    visual_vocab_size=700,
    visual_features=24,
    visual_embeddings=32,
    texts=4,
    picture=(90, 160),
    photo=(48, 64),
)
EQUAL = Equality(True, "all equal")


def case(compare=lambda: EQUAL, **fields) -> Case:
    steps = {"ours": lambda: None, "theirs": lambda: None}
    return Case(**{"peer": "someone", "limit": "none", "compare": compare, **steps, **fields})


@pytest.fixture
def registry(monkeypatch) -> dict[str, Entry]:
    """Rows of a test's own, at a tiny scale."""
    engine.find_rows()
    entries: dict[str, Entry] = {}
    monkeypatch.setattr(engine, "ROWS", entries)
    monkeypatch.setattr(engine, "SCALES", {"full": TINY, "quick": TINY})
    return entries


# --- the rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [entry.name for entry in engine.find_rows()])
def test_both_sides_of_a_row_are_equal(name):
    try:
        built = engine.ROWS[name].build(TINY)
    except NotRun as reason:
        pytest.skip(str(reason))
    equality = built.compare()
    assert equality.equal, equality.text
    for step in built.steps().values():
        step()


@pytest.mark.parametrize("name", ["loss_152k", "frozen_tower", "frozen_tower_stage_2", "unused_layer", "decode"])
def test_other_weights_make_a_row_unequal(name, monkeypatch):
    convert = rows.zoo_from_transformers

    def spoiled(peer):
        model = convert(peer)
        with torch.no_grad():
            for parameter in (*model.model.connector.parameters(), *model.lm_head.parameters()):
                nn.init.normal_(parameter)
        return model

    monkeypatch.setattr(rows, "zoo_from_transformers", spoiled)
    assert not engine.ROWS[name].build(TINY).compare().equal


@pytest.mark.parametrize("name", ["blip2_step", "blip2_step_uncached", "blip2_prefill", "blip2_decode"])
def test_other_weights_make_a_row_of_blip2_unequal(name, monkeypatch):
    convert = blip2_rows.zoo_from_transformers

    def spoiled(peer):
        model = convert(peer)
        with torch.no_grad():
            for parameter in model.model.connector.parameters():
                parameter.add_(torch.randn_like(parameter))
        return model

    monkeypatch.setattr(blip2_rows, "zoo_from_transformers", spoiled)
    assert not engine.ROWS[name].build(TINY).compare().equal


def test_a_connector_without_its_norm_makes_a_row_of_blip2_unequal(monkeypatch):
    training = blip2_rows.Training(TINY)
    monkeypatch.setattr(type(training.ours.model.connector), "normalise", lambda self, patches: patches)
    assert not training.compare().equal


@pytest.mark.parametrize("part", ["connector", "fusion", "language_model"])
def test_other_weights_make_a_row_of_flamingo_unequal(part, monkeypatch):
    convert = flamingo_rows.zoo_from_transformers

    def spoiled(peer):
        model = convert(peer)
        with torch.no_grad():
            for parameter in model.model.get_submodule(part).parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    monkeypatch.setattr(flamingo_rows, "zoo_from_transformers", spoiled)
    assert not engine.ROWS["idefics_decode_resampled"].build(TINY).compare().equal


@pytest.mark.parametrize("part", ["head", "norm", "table"])
@pytest.mark.parametrize("name", ["visual_head", "visual_head_softmax_training"])
def test_other_weights_make_a_row_of_the_visual_head_unequal(name, part, monkeypatch):
    class Spoiled(vet_rows.Ovis2Head):
        def forward(self, features):
            spoiled = {"head": self.tower.head_linear, "norm": self.tower.head_norm, "table": self.table}[part]
            with torch.no_grad():
                spoiled.weight.mul_(torch.randn_like(spoiled.weight))
            return super().forward(features)

    monkeypatch.setattr(vet_rows, "Ovis2Head", Spoiled)
    assert not engine.ROWS[name].build(TINY).compare().equal


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mrope_tower", "vision_tower"),
        ("mrope_tower", "connector.merger"),
        ("mrope_prefill", "language_model"),
        ("mrope_prefill_deepstack", "connector.deepstack_mergers"),
        ("mrope_decode", "language_model"),
        ("mrope_step", "vision_tower.patch_embed"),
    ],
)
def test_other_weights_make_a_row_of_mrope_unequal(name, part, monkeypatch):
    convert = mrope_rows.zoo_from_transformers

    def spoiled(peer):
        model = convert(peer)
        with torch.no_grad():
            for parameter in model.model.get_submodule(part).parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    monkeypatch.setattr(mrope_rows, "zoo_from_transformers", spoiled)
    assert not engine.ROWS[name].build(TINY).compare().equal


@pytest.mark.parametrize("name", ["mrope_positions", "mrope_positions_padded"])
def test_other_positions_make_a_row_unequal(name, monkeypatch):
    count = ZooMropeModel.positions

    def shifted(self, *inputs):
        positions, deltas = count(self, *inputs)
        return positions + 1, deltas

    monkeypatch.setattr(ZooMropeModel, "positions", shifted)
    assert not engine.ROWS[name].build(TINY).compare().equal


@pytest.mark.parametrize("name", ["mrope_patch_embedding", "mrope_pixels", "mrope_tower"])
def test_a_still_image_whose_second_frame_differs_makes_a_row_unequal(name, monkeypatch):
    def doubled(patches):
        return torch.stack((patches.unflatten(1, (3, -1)), 0.5 * patches.unflatten(1, (3, -1))), dim=2).flatten(1)

    monkeypatch.setattr(mrope_rows, "doubled", doubled)
    assert not engine.ROWS[name].build(TINY).compare().equal


def test_tokens_continued_with_another_carry_make_a_row_unequal(monkeypatch):
    prefill = mrope_rows.Sides.prefill

    def forgetful(*inputs):
        *outputs, carried = prefill(*inputs)
        return (*outputs, {name: torch.zeros_like(carry) for name, carry in carried.items()})

    monkeypatch.setattr(mrope_rows.Sides, "prefill", forgetful)
    assert not engine.ROWS["mrope_decode"].build(TINY).compare().equal


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("arr_coc_language_144", "language_model"),
        ("arr_coc_prefill_64", "vision_tower"),
        ("arr_coc_relevance_288", "connector"),
        ("arr_coc_texture", "connector"),
    ],
)
def test_other_weights_make_a_row_of_arr_coc_unequal(name, part, monkeypatch):
    convert = arr_coc_rows.from_mrope

    def spoiled(peer, **fields):
        model = convert(peer, **fields)
        with torch.no_grad():
            for parameter in model.model.get_submodule(part).parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    monkeypatch.setattr(arr_coc_rows, "from_mrope", spoiled)
    assert not engine.ROWS[name].build(TINY).compare().equal


def test_steps_of_arr_coc_that_do_not_make_up_its_forward_make_a_row_unequal(monkeypatch):
    encode = arr_coc_rows.Sides.encode
    monkeypatch.setattr(arr_coc_rows.Sides, "encode", lambda *inputs: [found.flip(0) for found in encode(*inputs)])
    equality = engine.ROWS["arr_coc_relevance_144"].build(TINY).compare()
    assert not equality.equal and "hidden states step by step" in equality.text


def test_other_pixel_statistics_make_the_row_of_the_texture_unequal(monkeypatch):
    convert = arr_coc_rows.from_mrope
    other = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    monkeypatch.setattr(arr_coc_rows, "from_mrope", lambda peer, **fields: convert(peer, **{**fields, **other}))
    equality = engine.ROWS["arr_coc_texture"].build(TINY).compare()
    assert not equality.equal and "mean colours of the cells" in equality.text


def test_the_budgets_of_the_rows_are_those_of_their_names():
    parts = (arr_coc_rows.HALF, arr_coc_rows.QUARTER, arr_coc_rows.NINTH)
    assert [Scale().image_tokens // part for part in parts] == [288, 144, 64]


def test_the_images_of_a_row_have_several_shapes_and_the_same_number_of_tokens():
    grids = mrope_rows.image_grids(TINY)
    assert len(grids.unique(dim=0)) == 3 and (grids % 2 == torch.tensor([1, 0, 0])).all()
    assert (grids.prod(dim=1) == TINY.image_tokens).all()


def test_a_mask_that_shows_other_images_makes_a_row_unequal(monkeypatch):
    wrong = functools.partial(flamingo_rows.idefics_inputs, only_immediate_media=True)
    monkeypatch.setattr(flamingo_rows, "idefics_inputs", lambda ids, pixels, image, _: wrong(ids, pixels, image))
    assert not engine.ROWS["idefics_decode_all_images"].build(TINY).compare().equal


def test_a_tower_with_a_graph_makes_the_frozen_row_unequal(monkeypatch):
    monkeypatch.setattr(ZooPreTrainedModel, "set_trainable_parts", lambda self, parts: None)
    equality = engine.ROWS["frozen_tower"].build(TINY).compare()
    assert not equality.equal and "have graph" in equality.text


def test_the_photo_is_the_same_each_time():
    assert rows.photo((30, 40)).tobytes() == rows.photo((30, 40)).tobytes() != rows.photo((30, 40), 1).tobytes()


# --- equality first --------------------------------------------------------------------------------------------------


def test_a_row_without_equality_is_invalid_and_never_timed(registry):
    ran = []
    step = {"ours": lambda: ran.append("ours"), "theirs": lambda: ran.append("theirs")}
    registry["odd"] = Entry("odd", lambda scale: case(lambda: Equality(False, "loss: 1 and 2"), **step))
    (found,) = run()
    assert found.invalid and found.ratio is None and not ran
    assert "odd  INVALID" in table([found]) and "loss: 1 and 2" in table([found])


def test_equality_is_shown_before_the_clock_runs(registry):
    order = []
    registry["row"] = Entry(
        "row",
        lambda scale: case(
            lambda: order.append("compare") or EQUAL,
            ours=lambda: order.append("ours"),
            theirs=lambda: order.append("peer"),
        ),
    )
    run()
    assert order[0] == "compare" and order.count("compare") == 1 and {"ours", "peer"} <= set(order[1:])


def test_a_failing_row_is_invalid_and_the_others_go_on(registry):
    def fails():
        raise RuntimeError("no such kernel")

    registry["bad"] = Entry("bad", lambda scale: case(ours=fails))
    registry["good"] = Entry("good", lambda scale: case())
    bad, good = run()
    assert bad.invalid and bad.note == "RuntimeError: no such kernel"
    assert not good.invalid and good.ratio is not None


def test_a_row_that_cannot_run_says_why(registry):
    def unavailable(scale):
        raise NotRun("torchvision cannot be imported")

    registry["row"] = Entry("row", unavailable)
    (found,) = run()
    assert not found.invalid
    assert "row  not run" in table([found]) and "torchvision cannot be imported" in table([found])


def test_an_unknown_row_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown row\(s\) nonsense; there are .*pixels_1080p, "):
        run(only=["decode", "nonsense"])


def test_close_tensors_are_equal_up_to_what_is_allowed():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    assert close("x", one, other, 0.5).equal and not close("x", one, other, 0.4).equal
    assert close("x", one, other, 0.2, relative=True).equal and not close("x", one, other, 0.1, relative=True).equal
    assert not close("x", one, other[:1], 9.0).equal


def test_nan_is_never_equal():
    assert not close("x", torch.tensor([float("nan")]), torch.tensor([float("nan")]), 1.0).equal


def test_same_means_bit_for_bit():
    assert same("x", torch.ones(2), torch.ones(2)).equal
    assert not same("x", torch.ones(2), torch.ones(2) + 1e-7).equal
    assert same("x", "text", "text").equal and not same("x", "text", "other").equal


def test_joined_equalities_hold_only_together():
    joined = EQUAL & Equality(False, "not this one")
    assert not joined.equal and joined.text == "all equal; not this one"


# --- turns -----------------------------------------------------------------------------------------------------------


def constant_clock(step) -> float:
    step()
    return 1.0


def test_every_other_round_goes_in_the_opposite_order():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    take_turns(steps, rounds=3, clock=constant_clock)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"  # the first does not count


def test_rounds_go_on_until_enough_time_is_spent():
    steps = {"ours": lambda: None, "peer": lambda: None}
    assert take_turns(steps, rounds=2, seconds=0.013, clock=constant_clock).rounds == 7
    assert take_turns(steps, rounds=2, seconds=9.0, clock=constant_clock).rounds == 20
    assert take_turns(steps, rounds=2, seconds=0.0, clock=constant_clock).rounds == 2


def test_the_ratio_is_the_median_of_ratios_within_a_round():
    timing = Timing({"ours": [1.0, 2.0, 10.0], "peer": [2.0, 6.0, 10.0]})
    assert timing.ratios("peer", "ours") == [2.0, 3.0, 1.0]
    assert timing.ratio("peer", "ours") == (2.0, (1.5, 2.5))
    assert timing.median("ours") == 2.0


def test_one_round_has_a_ratio_without_spread():
    assert Timing({"ours": [2.0], "peer": [3.0]}).ratio("peer", "ours") == (1.5, (1.5, 1.5))


def test_one_thread_is_a_loan():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_row_may_ask_for_more_rounds(registry):
    registry["row"] = Entry("row", lambda scale: case(), rounds=3)
    assert run()[0].rounds == 6


def test_parts_and_limit_are_timed_beside_the_two_sides(registry):
    built = case(limit_step=lambda: None, parts={"whole": lambda: None}, note="whole {whole}, limit {limit}")
    registry["row"] = Entry("row", lambda scale: built)
    (found,) = run()
    assert found.limit_ratio is not None
    assert found.note.startswith("whole ") and found.note.endswith(" ms") and "{" not in found.note


def test_a_known_limit_needs_no_clock(registry):
    registry["row"] = Entry("row", lambda scale: case(limit_ratio=1.25))
    assert run()[0].limit_ratio == 1.25


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_weighed_for_rows_that_ask_for_it(registry, monkeypatch):
    asked = []

    def weigh(row, step, scale, device):
        asked.append((row, step, scale, device))
        return {"ours": 2**20, "peer": 4 * 2**20}[step]

    monkeypatch.setattr(engine, "peak_memory", weigh)
    registry["lean"] = Entry("lean", lambda scale: case(), memory_target=0.3)
    registry["other"] = Entry("other", lambda scale: case())
    lean, other = run()
    assert asked == [("lean", "ours", "full", "cpu"), ("lean", "peer", "full", "cpu")]
    assert lean.memory_ratio == 0.25 and lean.memory_mib == {"ours": 1.0, "peer": 4.0} and other.memory_ratio is None
    assert "0.25 of the peer's (ours 1 MiB, peer 4 MiB); target 0.30 reached" in table([lean])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets an earlier peak")
def test_the_peak_is_that_of_the_step_alone():
    def use(mebibytes: int) -> None:
        bytearray(b"x") * (mebibytes * 2**20)

    use(256)
    assert 60 <= peak_of(lambda: use(64)) / 2**20 <= 100


def test_the_child_prints_the_peak_of_one_step(registry, capsys):
    ran = []
    steps = {"ours": lambda: ran.append("ours"), "theirs": lambda: ran.append("peer")}
    registry["row"] = Entry("row", lambda scale: case(**steps))
    peak.main("row", "peer", "full", "cpu")
    assert json.loads(capsys.readouterr().out)["peak"] >= 0 and ran == ["peer"]


def test_a_measurement_that_fails_says_what_the_child_said(monkeypatch):
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nMemoryError: too large\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    with pytest.raises(RuntimeError, match=r"row \(ours\) could not be measured: MemoryError: too large"):
        measure.peak_memory("row", "ours", "full")


@pytest.mark.slow
def test_a_child_measures_a_real_row():
    assert measure.peak_memory("processor_text", "ours", "quick") > 0


# --- the table -------------------------------------------------------------------------------------------------------


def filled(**fields) -> Row:
    numbers = {"ours_ms": 2.0, "peer_ms": 5.0, "ratio": 2.5, "spread": (2.4, 2.6), "rounds": 7, "limit_ratio": 3.0}
    words = {"peer": "SomeProcessor", "limit": "reading alone", "equality": "ids equal", "note": "on a small tree"}
    return Row(**{"name": "row", "scale": "full", **numbers, **words, **fields})


def test_the_table_shows_numbers_and_what_they_mean():
    text = table([filled(target=2.2)])
    for expected in ("2 ms", "5 ms", "2.50x", "[2.40, 2.60]", "3.00x", "2.20x reached", "SomeProcessor", "ids equal",
                     "reading alone", "on a small tree", "process CPU time at one thread"):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    ("target", "verdict"), [(2.5, "reached"), (2.55, "within spread"), (2.7, "missed"), (None, "")]
)
def test_a_target_is_reached_within_the_spread_or_missed(target, verdict):
    assert filled(target=target).verdict == verdict


def test_targets_are_those_of_the_full_sizes(registry):
    registry["row"] = Entry("row", lambda scale: case(), target=2.0)
    assert run()[0].target == 2.0 and run(quick=True)[0].target is None
    assert "Smaller sizes" in table(run(quick=True)) and "Smaller sizes" not in table(run())


def test_an_empty_table_prints():
    assert "ratio = peer / ours" in table([])


def test_the_command_prints_the_table_and_writes_json(registry, tmp_path, capsys):
    registry["row"] = Entry("row", lambda scale: case(), target=0.0)
    registry["odd"] = Entry("odd", lambda scale: case(lambda: Equality(False, "differ")))
    path = tmp_path / "bench.json"
    assert cli.main(["bench", "--only", "row", "--json", str(path)]) == 0
    (found,) = json.loads(path.read_text())
    assert found["name"] == "row" and found["verdict"] == "reached" and found["spread"][0] <= found["ratio"]
    assert "all equal" in capsys.readouterr().out
    assert cli.main(["bench", "--quick"]) == 1  # a row is invalid
    assert cli.main(["bench", "--only", "nonsense"]) == 1
