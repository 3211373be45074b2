"""What Ovis says: probabilities over visual words, a table of their embeddings, indicators, and a covering grid."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.image_utils import PILImageResampling

from vlm_zoo.models import modeling_vlm, vet
from vlm_zoo.models.geometry_vlm import covering_grid
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.vet import VisualEmbeddingTable, VisualHead, ZooVetConfig, join_neighbours, layout
from vlm_zoo.testing import check_vlm, tiny_config, tiny_model, tiny_processor
from vlm_zoo.testing.promises import Subject


FUNCTIONS = ["softmax", "st_argmax", "gumbel_argmax"]
WIDE = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "image_size": [32, 48], "patch_size": 8}


def gradients(module, compute):
    """What is computed, and the gradients of all parameters; the embeddings are weighted, so that each one counts."""
    module.zero_grad()
    embeddings = compute()
    torch.manual_seed(1)
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    return [embeddings.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


def assert_all_close(found, expected, **tolerances):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


def subject_of(**fields) -> Subject:
    model = tiny_model("zoo_vet", **fields)
    return Subject(model, tiny_processor("zoo_vet", model.config), tolerance=1e-5)


# --- the head --------------------------------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_normed_scores():
    connector = tiny_model("zoo_vet").model.connector
    groups = torch.randn(5, 32)
    expected = nn.functional.layer_norm(groups @ connector.head.weight.T, (507,)).softmax(-1)
    torch.testing.assert_close(connector.tokenize(groups), expected)


def test_a_head_without_its_norm_takes_the_scores_as_they_are():
    connector = tiny_model("zoo_vet", head_layer_norm=False).model.connector
    groups = torch.randn(5, 32)
    torch.testing.assert_close(connector.tokenize(groups), (groups @ connector.head.weight.T).softmax(-1))


def test_a_token_is_the_mean_of_the_words_under_their_probabilities():
    connector = tiny_model("zoo_vet").model.connector
    groups = torch.randn(5, 32)
    expected = connector.tokenize(groups) @ connector.table.weight[:507]
    torch.testing.assert_close(connector(groups), expected)


@pytest.mark.parametrize("function", ["st_argmax", "gumbel_argmax"])
def test_a_token_is_the_most_probable_word_where_one_is_chosen(function):
    connector = tiny_model("zoo_vet", tokenize_function=function).model.connector
    groups = torch.randn(5, 32)
    best = connector.tokenize(groups).argmax(-1)
    assert torch.equal(connector(groups), connector.table.weight[best])
    with torch.no_grad():
        assert torch.equal(connector(groups), connector.table.weight[best])


def test_sampled_words_differ_from_draw_to_draw_in_training_alone():
    connector = tiny_model("zoo_vet", tokenize_function="gumbel_argmax").model.connector
    groups = torch.randn(5, 32)
    assert torch.equal(connector(groups), connector(groups))
    connector.train()
    assert not torch.equal(connector(groups), connector(groups))


def straight_through(connector, scores):
    """The formula of transformers and of torch's `gumbel_softmax`: ones and zeros, with the softmax's gradient."""
    soft = scores.softmax(-1)
    hard = nn.functional.one_hot(soft.argmax(-1), scores.shape[-1]).to(soft.dtype)
    return (hard - soft.detach() + soft) @ connector.table.weight[:507]


def test_a_chosen_word_has_the_gradients_of_the_straight_through_formula():
    connector = tiny_model("zoo_vet", tokenize_function="st_argmax").model.connector
    groups = torch.randn(5, 32)
    found = gradients(connector, lambda: connector(groups))
    expected = gradients(connector, lambda: straight_through(connector, connector.scores(groups)))
    assert_all_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_sampled_word_has_the_gradients_of_torchs_gumbel_softmax():
    connector = tiny_model("zoo_vet", tokenize_function="gumbel_argmax", tau=0.7).model.connector.train()
    groups = torch.randn(5, 32)

    def expected():
        torch.manual_seed(2)
        drawn = nn.functional.gumbel_softmax(connector.scores(groups), tau=0.7, hard=True)
        return drawn @ connector.table.weight[:507]

    def found():
        torch.manual_seed(2)
        return connector(groups)

    assert_all_close(gradients(connector, found), gradients(connector, expected), atol=1e-5, rtol=1e-4)


def test_sampled_words_follow_their_probabilities():
    connector = tiny_model("zoo_vet", tokenize_function="gumbel_argmax").model.connector.train()
    with torch.no_grad():
        connector.norm.weight.mul_(3.0)
        group = torch.randn(1, 32)
        drawn = connector(group.expand(20_000, -1))
        shares = (drawn[:, :1] == connector.table.weight[:507, 0]).float().mean(0)  # rows differ in their first number
        expected = connector.tokenize(group)[0]
    assert expected.max() > 0.1
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("function", ["st_argmax", "gumbel_argmax"])
def test_a_frozen_head_leaves_the_table_to_train(function, monkeypatch):
    connector = tiny_model("zoo_vet", tokenize_function=function).model.connector
    connector.head.requires_grad_(False)
    connector.norm.requires_grad_(False)
    monkeypatch.setattr(torch.Tensor, "softmax", None)  # no gradient asks for the mean, so it is not computed
    groups = torch.randn(5, 32)
    connector(groups).sum().backward()
    counts = connector.scores(groups).argmax(-1).bincount(minlength=512)
    assert torch.equal(connector.table.weight.grad, counts[:, None].float().expand(-1, 48))


def test_a_frozen_connector_keeps_nothing_and_computes_nothing_twice(monkeypatch):
    connector = tiny_model("zoo_vet").model.connector.requires_grad_(False)
    monkeypatch.setattr(vet, "CHUNK_ENTRIES", 2 * 507)
    monkeypatch.setattr(vet, "checkpoint", None)
    assert connector(torch.randn(9, 32)).shape == (9, 48)


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_looks_up_ids_and_averages_probabilities():
    table = VisualEmbeddingTable(6, 4)
    ids = torch.tensor([[1, 5], [0, 2]])
    assert torch.equal(table(ids), table.weight[ids])
    probabilities = torch.eye(6)[[4, 2]]
    torch.testing.assert_close(table(probabilities), table.weight[[4, 2]])
    torch.testing.assert_close(table(probabilities[None]), table.weight[[4, 2]][None])


@pytest.mark.parametrize("words", [5, 7])
def test_probabilities_of_other_words_than_the_tables_are_refused(words):
    with pytest.raises(ValueError, match=f"Got probabilities of {words} words, the table has 6 rows"):
        VisualEmbeddingTable(6, 4)(torch.zeros(1, words))


def test_the_table_starts_with_the_variance_of_ovis_at_every_width():
    for words in (64, 4096):
        weight = tiny_model("zoo_vet", visual_vocab_size=words).model.connector.table.weight
        assert abs(weight.mean()) < 0.05 and 0.95 < weight.std() < 1.05


def test_a_batch_looks_its_indicators_up_once():
    model = tiny_model("zoo_vet").model
    looked_up = []
    model.connector.table.register_forward_pre_hook(lambda module, args: looked_up.append(args[0].dtype))
    model.get_image_features(torch.randn(3, 3, 32, 32))
    assert looked_up == [torch.float32, torch.int64]


# --- large vocabularies ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("words", [5, 511, 512, 600, 1024, 1531])
def test_a_head_in_blocks_is_a_linear_layer(words):
    head, groups = VisualHead(24, words), torch.randn(7, 24)
    torch.testing.assert_close(head(groups), nn.functional.linear(groups, head.weight))


def test_a_head_has_the_gradients_of_a_linear_layer():
    head, groups = VisualHead(24, 1031), torch.randn(7, 24, requires_grad=True)
    scores = head(groups)
    gradient = torch.randn_like(scores)
    scores.backward(gradient)
    torch.testing.assert_close(groups.grad, gradient @ head.weight)
    torch.testing.assert_close(head.weight.grad, gradient.t() @ groups)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_compiled_connector_computes_the_same(function):
    connector = tiny_model("zoo_vet", tokenize_function=function).model.connector
    groups = torch.randn(9, 32)
    compiled = torch.compile(connector, backend="aot_eager", fullgraph=True)
    found, expected = (gradients(connector, lambda run=run: run(groups)) for run in (compiled, connector))
    assert_all_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_gradients_exist():
    connector = tiny_model("zoo_vet", tokenize_function="st_argmax", visual_vocab_size=16).model.connector.double()
    groups = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(connector(groups).square().sum(), groups, create_graph=True)
    first.square().sum().backward()
    assert groups.grad.abs().max() > 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_tokens_in_chunks_equal_tokens_at_once(function, monkeypatch):
    connector = tiny_model("zoo_vet", tokenize_function=function).model.connector
    groups, results = torch.randn(9, 32), []
    for entries, count in ((vet.CHUNK_ENTRIES, 1), (2 * 507, 5)):
        monkeypatch.setattr(vet, "CHUNK_ENTRIES", entries)
        assert len(connector.chunks(groups, entries)) == count
        results.append(gradients(connector, lambda: connector(groups)))
        with torch.no_grad():
            torch.testing.assert_close(connector(groups), results[-1][0])
    assert_all_close(*results, atol=1e-5, rtol=1e-4)


def test_chunks_are_an_eighth_where_nothing_is_kept(monkeypatch):
    connector = tiny_model("zoo_vet").model.connector
    monkeypatch.setattr(vet, "CHUNK_ENTRIES", 16 * 507)
    assert [len(chunk) for chunk in connector.chunks(torch.zeros(9, 32))] == [2, 2, 2, 2, 1]
    assert [len(chunk) for chunk in connector.chunks(torch.zeros(9, 32), vet.CHUNK_ENTRIES)] == [9]


def test_a_chunk_draws_the_same_words_when_it_is_computed_again(monkeypatch):
    connector = tiny_model("zoo_vet", tokenize_function="gumbel_argmax").model.connector.train()
    monkeypatch.setattr(vet, "CHUNK_ENTRIES", 2 * 507)
    embeddings = connector(torch.randn(9, 32))
    embeddings.sum().backward()
    drawn = {tuple(row) for row in embeddings.tolist()}
    touched = connector.table.weight.grad.abs().sum(-1).nonzero().flatten()
    assert {tuple(row) for row in connector.table.weight[touched].tolist()} == drawn


@pytest.mark.parametrize("function", ["softmax", "st_argmax"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_float32_to_its_own_precision(function, autocast):
    connector = tiny_model("zoo_vet", tokenize_function=function).model.connector
    groups = torch.randn(9, 32)
    expected = gradients(connector, lambda: connector(groups))
    connector = connector if autocast else connector.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(connector, lambda: connector(groups).float())
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("max_tiles", [None, 4])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_text_alone_touches_every_vision_parameter_where_ranks_train_together(function, max_tiles, monkeypatch):
    monkeypatch.setattr(modeling_vlm, "is_sharded", lambda: True)
    model = tiny_model("zoo_vet", tokenize_function=function, max_tiles=max_tiles).train()
    ids = torch.randint(3, 200, (2, 6))
    model(ids, labels=ids).loss.backward()
    vision = [*model.model.vision_tower.parameters(), *model.model.connector.parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in vision)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_checkpointing_keeps_the_gradients(function):
    model = tiny_model("zoo_vet", tokenize_function=function).train()
    pixels = torch.randn(2, 3, 32, 32)

    def features():
        torch.manual_seed(3)
        return torch.cat(model.get_image_features(pixels).pooler_output)

    vision = nn.ModuleList([model.model.vision_tower, model.model.connector])
    expected = gradients(vision, features)
    model.gradient_checkpointing_enable()
    assert_all_close(gradients(vision, features), expected)


# --- neighbours ------------------------------------------------------------------------------------------------------


def test_neighbours_stand_side_by_side_and_zeros_fill_the_last_row_and_column():
    patches = torch.arange(1.0, 10.0).view(1, 9, 1)
    expected = [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]
    assert join_neighbours(patches, (3, 3), 2).tolist() == [expected]


def test_neighbours_of_a_grid_that_is_no_square():
    patches = torch.arange(1.0, 9.0).view(1, 8, 1)
    assert join_neighbours(patches, (2, 4), 2).tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]]
    assert join_neighbours(patches[:, :6], (3, 2), 2).tolist() == [[[1, 2, 3, 4], [5, 6, 0, 0]]]
    assert join_neighbours(patches[:, :6], (2, 3), 2).tolist() == [[[1, 2, 4, 5], [3, 0, 6, 0]]]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("indicators", [0, 2, 5])
@pytest.mark.parametrize("max_tiles", [None, 4])
def test_counts_and_features_agree(stride, indicators, max_tiles):
    subject = subject_of(hidden_stride=stride, num_visual_indicators=indicators, max_tiles=max_tiles)
    check_vlm(subject.model, subject.processor, only="one count").raise_if_failed()


# --- indicators ------------------------------------------------------------------------------------------------------


def spelled(grid, indicators):
    names = ["<start>", "<whole>", "<column>", "<row>", "<end>"] if indicators == 5 else ["<start>", "<end>"]
    return "".join(names[number] if kind == "indicator" else str(number) for kind, number in layout(grid, indicators))


def test_a_tiled_image_is_laid_out_as_ovis_lays_it_out():
    expected = "<start>0<whole>1<column>2<column>3<row>4<column>5<column>6<end>"
    assert spelled((2, 3), 5) == expected
    assert spelled((2, 1), 5) == "<start>0<whole>1<row>2<end>"
    assert spelled((1, 2), 5) == "<start>0<whole>1<column>2<end>"


def test_an_image_of_one_view_has_three_indicators():
    assert spelled((1, 1), 5) == "<start>0<whole><end>"


def test_two_indicators_stand_around_the_image_and_none_leave_it_alone():
    assert spelled((2, 1), 2) == "<start>012<end>"
    assert spelled((2, 1), 0) == "012"


def test_indicators_are_the_last_rows_of_the_table():
    model = tiny_model("zoo_vet").model
    (features,) = model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output
    assert len(features) == 19
    assert torch.equal(features[[0, 17, 18]], model.connector.table.weight[[507, 508, 511]])


def test_no_patch_becomes_an_indicator():
    model = tiny_model("zoo_vet")
    (words,) = model.visual_words(torch.randn(1, 3, 32, 32), top_k=507)
    assert words.ids.max() == 506 and words.ids.shape == (16, 507)


# --- tiles -----------------------------------------------------------------------------------------------------------


def test_covering_grids_are_those_of_transformers():
    reference = pytest.importorskip("transformers.models.ovis2.image_processing_pil_ovis2")
    randomness = random.Random(0)
    for _ in range(1000):
        longest, tile = randomness.choice([(40, 7), (3000, 448), (1500, 384)])
        size = (randomness.randint(1, longest), randomness.randint(1, longest))
        most = randomness.choice([1, 2, 4, 6, 9, 12])
        assert covering_grid(size, tile, most) == reference.get_min_tile_covering_grid(size, tile, most)


def test_a_wide_picture_gets_columns():
    assert covering_grid((448, 896), 448, 9) == (1, 2)
    assert covering_grid((896, 448), 448, 9) == (2, 1)


def test_the_whole_picture_comes_first_and_tiles_keep_their_place():
    processor = ZooImageProcessor(
        size={"height": 8, "width": 8}, do_center_crop=False, max_tiles=4, do_normalize=False, do_pad_to_square=True
    )
    array = np.zeros((8, 16, 3), dtype=np.uint8)
    array[:, :8, 0], array[:, 8:, 1] = 255, 255
    batch = processor(PIL.Image.fromarray(array), return_tensors="pt")
    whole, left, right = batch["pixel_values"][0]
    assert batch["image_sizes"].tolist() == [[8, 16]]
    assert (left[0] == 1).all() and (right[1] == 1).all() and (left[1] == 0).all()
    assert whole[:, 3, 0].tolist() == [1, 0, 0] and whole[:, 4, 7].tolist() == [0, 1, 0]
    padding = torch.tensor(processor.image_mean).view(3, 1, 1)
    assert ((whole[:, [0, 1, 6, 7]] - padding).abs() < 1 / 255).all()


def test_squashed_tiles_are_those_of_transformers_where_rows_equal_columns():
    reference = pytest.importorskip("transformers.models.ovis2.image_processing_pil_ovis2")
    settings = {"size": {"height": 16, "width": 16}, "resample": PILImageResampling.BICUBIC}
    peer = reference.Ovis2ImageProcessorPil(**settings, crop_to_patches=True, max_patches=9)
    ours = ZooImageProcessor(**settings, do_center_crop=False, max_tiles=9)
    level = 1 / 255 / torch.tensor(ours.image_std).view(3, 1, 1)
    for size, grid in (((12, 14), (1, 1)), ((33, 30), (2, 2)), ((47, 46), (3, 3))):
        array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        expected = peer(PIL.Image.fromarray(array), return_tensors="pt")
        (found,) = ours(PIL.Image.fromarray(array), return_tensors="pt")["pixel_values"]
        assert tuple(expected["grids"][0].tolist()) == grid == ours.tile_grid(*size)
        assert found.shape == expected["pixel_values"].shape
        assert ((found - expected["pixel_values"]).abs() / level).max() <= 1.01


def test_padding_has_the_colour_that_normalises_to_nearly_nothing():
    processor = ZooImageProcessor(
        size={"height": 8, "width": 8}, do_center_crop=False, max_tiles=1, do_pad_to_square=True
    )
    array = np.full((4, 16, 3), 255, dtype=np.uint8)
    (view,) = processor(PIL.Image.fromarray(array), return_tensors="pt")["pixel_values"][0]
    assert view[:, :3].abs().max() < 0.01 and view[:, 3:5].min() > 1.5


@pytest.mark.parametrize("max_tiles", [None, 4])
def test_pictures_keep_their_aspect_ratio(max_tiles):
    processor = tiny_processor("zoo_vet", tiny_config("zoo_vet", max_tiles=max_tiles))
    white = PIL.Image.new("RGB", (32, 16), "white")
    pixels = processor.image_processor(white, return_tensors="pt")["pixel_values"].view(3, 32, 32)
    assert pixels[:, [*range(8), *range(24, 32)]].abs().max() < 0.02 and pixels[:, 8:24].min() > 1.5


def test_tiles_of_two_kinds_at_once_are_refused():
    with pytest.raises(ValueError, match="expected one of them"):
        ZooImageProcessor(size={"height": 8, "width": 8}, max_tiles=2, image_grid_pinpoints=[[8, 16]])


def test_an_image_does_not_depend_on_the_tiles_of_its_neighbours():
    subject = subject_of(max_tiles=4)
    small = {"text": "a <image> b", "images": [subject.image(0, 30, 30)]}
    large = {"text": "<image>", "images": [subject.image(1, 30, 90)]}
    together, alone = subject.batch([small, large], side="right"), subject.batch([small])
    length = alone["input_ids"].shape[1]
    subject.close(subject.logits(together)[0, :length], subject.logits(alone)[0], "the small image")


@pytest.mark.parametrize("only", ["ragged batch", "beams", "interleaved", "encoded images", "wrong counts"])
def test_the_contract_holds_with_tiles_and_neighbours(only):
    subject = subject_of(max_tiles=4, hidden_stride=2)
    check_vlm(subject.model, subject.processor, only=only).raise_if_failed()


def test_tiles_without_sizes_are_refused_with_the_cause():
    subject = subject_of(max_tiles=4)
    batch = subject.batch([{"text": "<image>", "images": [subject.image(0, 40, 90)]}])
    with pytest.raises(ValueError, match=r"image_sizes \[I, 2\]; got .* and None"):
        subject.model(**{name: value for name, value in batch.items() if name != "image_sizes"})
    with pytest.raises(ValueError, match="differ in max_tiles"):
        subject.model(**{**batch, "pixel_values": batch["pixel_values"][:, :1]})


def test_tiles_for_a_model_without_them_are_refused():
    with pytest.raises(ValueError, match="no max_tiles"):
        tiny_model("zoo_vet").get_image_features(torch.zeros(1, 3, 3, 32, 32))


@pytest.mark.parametrize("sizes", [torch.zeros(0, 2), torch.tensor([[0, 40]]), torch.tensor([[40]])])
def test_sizes_that_are_none_are_refused(sizes):
    model = tiny_model("zoo_vet", max_tiles=4)
    with pytest.raises(ValueError, match="a height and a width of at least 1 for each image, got"):
        model.get_image_features(torch.zeros(1, 1, 3, 32, 32), image_sizes=sizes)


def test_sizes_of_other_images_are_refused():
    model = tiny_model("zoo_vet", max_tiles=4)
    with pytest.raises(ValueError, match=r"asks for \[1, 1\] views, pixel_values holds 1 images"):
        model.get_image_features(torch.zeros(1, 1, 3, 32, 32), image_sizes=torch.tensor([[30, 30], [30, 30]]))


def test_a_blank_image_stands_in_for_tiles():
    model = tiny_model("zoo_vet", max_tiles=4)
    (features,) = model.get_image_features(**model.model.dummy_vision_inputs()).pooler_output
    assert len(features) == 19 and torch.isfinite(features).all()


# --- words and towers ------------------------------------------------------------------------------------------------


def test_words_are_read_out_best_first_image_by_image():
    subject = subject_of(max_tiles=4)
    rows = [{"text": "<image><image>", "images": [subject.image(0, 30, 30), subject.image(1, 30, 60)]}]
    batch = subject.batch(rows)
    images = {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}
    small, large = subject.model.visual_words(**images, top_k=3)
    assert small.ids.shape == (16, 3) and large.ids.shape == (48, 3)
    patches = subject.model.model.see(torch.cat((images["pixel_values"][0, :1], images["pixel_values"][1])))[1]
    expected = subject.model.model.connector.tokenize(patches.flatten(0, 1)).topk(3)
    assert torch.equal(torch.cat((small.ids, large.ids)), expected.indices)
    torch.testing.assert_close(torch.cat((small.probabilities, large.probabilities)), expected.values)
    assert not small.probabilities.requires_grad


def test_all_words_of_a_token_have_probability_one_together():
    (words,) = tiny_model("zoo_vet").visual_words(torch.randn(1, 3, 32, 32), top_k=507)
    torch.testing.assert_close(words.probabilities.sum(-1), torch.ones(16))


def test_words_are_the_same_in_chunks(monkeypatch):
    model, pixels = tiny_model("zoo_vet"), torch.randn(2, 3, 32, 32)
    whole = model.visual_words(pixels, top_k=2)
    monkeypatch.setattr(vet, "CHUNK_ENTRIES", 8 * 3 * 507)
    for one, other in zip(whole, model.visual_words(pixels, top_k=2), strict=True):
        assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("top_k", [0, 508])
def test_more_words_than_there_are_are_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, expected 1 to 507"):
        tiny_model("zoo_vet").visual_words(torch.randn(1, 3, 32, 32), top_k=top_k)


def test_the_words_that_are_read_out_are_those_that_are_looked_up():
    model = tiny_model("zoo_vet", tokenize_function="st_argmax", num_visual_indicators=0)
    pixels = torch.randn(2, 3, 32, 32)
    for words, features in zip(
        model.visual_words(pixels), model.get_image_features(pixels).pooler_output, strict=True
    ):
        assert torch.equal(model.model.connector.table(words.ids[:, 0]), features)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("norm", [False, True])
def test_any_tower_is_read_with_and_without_its_last_norm(vision, norm):
    model = tiny_model("zoo_vet", vision=vision, tower_norm=norm).model
    pixels = torch.randn(1, 3, 32, 32)
    outputs, patches = model.see(pixels)
    assert patches.shape == (1, 16, 32)
    prefix = model.config.num_prefix_tokens
    assert torch.equal(patches, (outputs.last_hidden_state if norm else outputs.hidden_states[-1])[:, prefix:])
    model.connector(patches.flatten(0, 1)).sum().backward()
    unused = [name for name, parameter in model.vision_tower.named_parameters() if parameter.grad is None]
    assert not unused


def test_the_last_norm_of_a_tower_is_built_where_it_is_used():
    names = {
        norm: dict(tiny_model("zoo_vet", vision="siglip", tower_norm=norm).named_parameters())
        for norm in (False, True)
    }
    assert any("post_layernorm" in name for name in names[True])
    assert not any("post_layernorm" in name for name in names[False])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_visual_indicators": 3}, "expected 5"),
        ({"visual_vocab_size": 5}, "leaves no visual word"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"hidden_stride": 0}, "hidden_stride must be at least 1"),
        ({"hidden_stride": 2, "vision_feature_select_strategy": "full"}, "without neighbours"),
        ({"max_tiles": 0}, "max_tiles must be at least 1"),
        ({"max_tiles": 4, "vision_config": WIDE}, "Tiles are squares, but this tower sees 32 x 48 pixels"),
        ({"tokenize_function": "argmax"}, "tokenize_function"),
        ({"tower_norm": True, "vision_feature_layer": -2}, "expected -1"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config("zoo_vet", **fields)


def test_the_config_builds_without_arguments():
    config = ZooVetConfig()
    assert config.visual_vocab_size == 16384 and config.num_visual_words == 16379


def test_adapters_train_the_head():
    peft = pytest.importorskip("peft")
    model = tiny_model("zoo_vet")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["connector.head"], init_lora_weights=False))
    adapted.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output[0].sum().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora" in name]
    assert len(gradients) == 2 and all(gradient.abs().max() > 0 for gradient in gradients)
