"""Faithfulness on cells by hand and against a slow loop; sizes, ties, curves; each map is read once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bla.metrics import Ranked, is_affine, judge_methods, places, read_cells, top_cells
from bla.metrics.fitting import Rows


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_top_cells_are_the_largest_and_ties_go_to_the_first(batch: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranking = torch.randint(4, (batch, rows, columns), generator=generator).float()
    sizes = torch.randint(1, rows * columns + 1, (batch,), generator=generator)
    chosen = top_cells(ranking, sizes)
    for image in range(batch):
        flat = ranking[image].flatten().tolist()
        expected = sorted(range(len(flat)), key=lambda cell: (-flat[cell], cell))[: int(sizes[image])]
        assert chosen[image].flatten().nonzero()[:, 0].tolist() == sorted(expected)
    assert torch.equal(top_cells(ranking, 1), places(ranking) == 0)


def test_sizes_and_rankings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="sizes from 1 to 6"):
        top_cells(torch.rand(2, 2, 3), torch.tensor([1, 7]))
    with pytest.raises(ValueError, match="finite rankings"):
        top_cells(torch.full((1, 2, 3), math.nan), 1)


def test_by_hand_on_a_map_that_is_not_square() -> None:
    # one image, two classes; logits are the mean of the cells: cells (2, 0), (0, 1), (0, 1)
    features = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]]])
    ranking, selected = torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([[[True, False, False]]])

    def head(pooled: Tensor) -> Tensor:
        return pooled

    values, curves = judge_methods(features, {"own": Ranked(ranking, selected, head)}, torch.tensor([1]), judge=head)
    found = {name: value.item() for name, value in values["own"].items()}
    whole = 1 / (1 + math.exp(0))  # both logits are 2/3: a tie, which goes to class 0
    kept, left = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    assert found["agreement"] == 1
    assert found["accuracy"] == 0
    assert found["loss"] == pytest.approx(2 + math.log(1 + math.exp(-2)))
    assert found["sufficiency"] == pytest.approx(whole - kept)
    assert found["comprehensiveness"] == pytest.approx(whole - left)
    assert curves["own"].sizes == (1, 2, 3)
    # from 1, 2, 3 best cells: (2, 0), (1, .5), (2/3, 2/3); from the others: (0, 1), (0, 1), nothing, which ties at 0
    assert curves["own"].kept.tolist() == [[False, False, False]]
    assert curves["own"].left.tolist() == [[True, True, False]]
    assert found["area_left"] == pytest.approx(2 / 3)
    assert {"accuracy", "agreement", "loss", "sufficiency", "comprehensiveness", "area", "area_left"} <= set(found)


@given(st.booleans(), st.integers(0, 20))
def test_equals_a_slow_loop_whatever_the_batches_and_the_head(affine: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(7, 5, 2, 3, generator=generator)
    ranking = torch.randn(7, 2, 3, generator=generator)
    selected = top_cells(ranking, torch.randint(1, 7, (7,), generator=generator))
    labels = torch.randint(4, (7,), generator=generator)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(5, 4)) if affine else nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        judge = nn.Linear(5, 4)
    assert is_affine(head, 5, features) == affine
    methods = {"a": Ranked(ranking, selected, head), "b": Ranked(-ranking, ~selected | (places(ranking) == 5), judge)}
    values, curves = judge_methods(lambda rows: features[rows], methods, labels, judge=judge, batch_size=3)
    with torch.no_grad():
        for image in range(7):
            cells = features[image].flatten(1).T
            whole, kept = head(cells.mean(0)), head(cells[selected[image].flatten()].mean(0))
            rest = cells[~selected[image].flatten()]
            left = head(rest.mean(0) if len(rest) else torch.zeros(5))
            c = whole.argmax()
            assert values["a"]["accuracy"][image] == (kept.argmax() == labels[image])
            assert values["a"]["agreement"][image] == (kept.argmax() == c)
            assert values["a"]["loss"][image].item() == pytest.approx(
                -kept.log_softmax(0)[labels[image]].item(), abs=1e-5
            )
            sufficiency, comprehensiveness = (
                whole.softmax(0)[c] - kept.softmax(0)[c],
                whole.softmax(0)[c] - left.softmax(0)[c],
            )
            assert values["a"]["sufficiency"][image].item() == pytest.approx(sufficiency.item(), abs=1e-5)
            assert values["a"]["comprehensiveness"][image].item() == pytest.approx(comprehensiveness.item(), abs=1e-5)
            best = ranking[image].flatten().argsort(descending=True)
            for place, size in enumerate(curves["a"].sizes[:-1]):
                assert curves["a"].kept[image, place] == (judge(cells[best[:size]].mean(0)).argmax() == labels[image])
                assert curves["a"].left[image, place] == (judge(cells[best[size:]].mean(0)).argmax() == labels[image])
            own = judge(cells[selected[image].flatten()].mean(0)).argmax()
            assert values["a"]["evaluator"][image] == (own == labels[image])


def test_without_labels_there_is_no_accuracy() -> None:
    ranking = torch.rand(3, 2, 2)
    values, curves = judge_methods(
        torch.rand(3, 4, 2, 2), {"a": Ranked(ranking, top_cells(ranking, 1), nn.Linear(4, 2))}, None
    )
    assert set(values["a"]) == {"agreement", "sufficiency", "comprehensiveness"}
    assert not curves


def test_masks_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks of shape \(batch, sets, height, width\)"):
        read_cells(lambda pooled: pooled, torch.rand(1, 2, 3, 4), torch.ones(1, 1, 4, 3, dtype=torch.bool))


def test_all_methods_together_read_each_map_once() -> None:
    """What ten thousand images in a minute rest on: linear heads read each cell once, and not each method's sets."""
    maps, ranking = torch.rand(100, 16, 7, 7), torch.rand(100, 7, 7)
    head, judge = nn.Linear(16, 10), nn.Linear(16, 10)
    rows_read: list[int] = []
    vectors = {head: 0, judge: 0}

    def features(rows: Rows) -> Tensor:
        rows_read.extend(rows.tolist())
        return maps[rows]

    def counted(module: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        vectors[module] += len(given[0])

    for module in vectors:
        module.register_forward_hook(counted)
    methods = {str(index): Ranked(ranking.roll(index, 0), top_cells(ranking, 12), head) for index in range(6)}
    judge_methods(features, methods, torch.randint(10, (100,)), judge=judge, batch_size=50)
    assert rows_read == [0, *range(100)], "the first one also says how many channels there are"
    linear = 4 * 16  # vectors that show a head to be affine
    assert set(vectors.values()) == {100 * 49 + 2 + linear}, "every cell, and an empty set a batch"
