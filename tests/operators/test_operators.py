"""Operators: against slow versions of the paper's formulas, cases by hand, properties, gradients, broken input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from bla.operators import best, bound, bound_at_size, bounded_hard, bounded_soft, gumbel_soft, top_hard

INF, NAN = math.inf, math.nan


# The paper's formulas, slowly: one map as a list, in its own signs (the score u = -a).


def slow_bound(u: list[float]) -> list[float]:
    return [-max(value, 0.0) for value in u]


def slow_softmax(values: list[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def slow_soft(
    z: list[float], temperature: float = 0.1, threshold: float | Literal["auto"] = 0.0, gate: bool = False
) -> list[float]:
    if gate:
        return [math.exp(temperature * value) / (1 + math.exp(temperature * value)) for value in z]
    gamma = 0.98 / len(z) if threshold == "auto" else threshold
    return [max(weight - gamma, 0.0) for weight in slow_softmax([temperature * value for value in z])]


def slow_hard(z: list[float], gate: bool = False) -> list[float]:
    chosen = [value == max(z) for value in z]
    return [(1.0 if gate else 1 / sum(chosen)) if cell else 0.0 for cell in chosen]


def slow_dial(u: list[float], size: int) -> list[float]:
    t = sorted(u)[size - 1]
    return [-max(value - t, 0.0) for value in u]


def slow_gumbel(u: list[float], noise: list[list[float]], temperature: float, variant: str) -> list[float]:
    draws = []
    for gumbel in noise:
        noisy = [-value + g for value, g in zip(u, gumbel, strict=True)]
        scaled = [temperature * value if variant == "official" else value / temperature for value in noisy]
        draws.append(slow_softmax(scaled))
    return [max(weights) for weights in zip(*draws, strict=True)]


def slow_top(u: list[float], size: int) -> list[float]:
    chosen = sorted(range(len(u)), key=lambda cell: (u[cell], cell))[:size]
    return [1 / size if cell in chosen else 0.0 for cell in range(len(u))]


def scores(*shape: int, seed: int, offset: float = 0.0) -> list[float]:
    values: list[float] = np.random.default_rng(seed).normal(offset, 3, shape).ravel().tolist()
    return values


MAPS = {
    "2x3, some at the bound": [2.0, -1.0, 0.0, 0.5, 3.0, -4.0],
    "3x5": scores(3, 5, seed=0),
    "7x7": scores(7, 7, seed=1),
    "5x1, ties below the bound": [1.0, 1.0, 0.25, 0.25, 7.0],
    "1x4, all clipped": [-1.0, -0.5, 0.0, -9.0],
    "4x7, none at the bound": [abs(value) + 0.1 for value in scores(4, 7, seed=2)],
    "2x2, all equal": [1.5, 1.5, 1.5, 1.5],
    "one cell at the bound": [-2.0],
    "one cell below it": [2.0],
    "far apart": [1e4, -1e4, 3.0, 5e3, 0.0],
}
maps = pytest.mark.parametrize("u", MAPS.values(), ids=MAPS)

SOFT_SETTINGS: list[dict[str, Any]] = [
    *({"temperature": temperature, "threshold": threshold} for temperature in (0.01, 0.1, 1.0, 10.0)
      for threshold in (0.0, 0.02, 0.3, "auto")),
    *({"temperature": temperature, "gate": True} for temperature in (0.01, 0.1, 1.0)),
]  # fmt: skip


def as_logits(u: list[float]) -> Tensor:
    return -torch.tensor(u, dtype=torch.float64)


def close(weights: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@maps
def test_bound_is_the_papers(u: list[float]) -> None:
    assert bound(as_logits(u)).tolist() == slow_bound(u)


@maps
def test_soft_weights_are_the_papers(u: list[float]) -> None:
    for setting in SOFT_SETTINGS:
        close(bounded_soft(bound(as_logits(u)), **setting), slow_soft(slow_bound(u), **setting))


@maps
@pytest.mark.parametrize("gate", [False, True])
def test_hard_weights_are_the_papers(u: list[float], gate: bool) -> None:
    close(bounded_hard(bound(as_logits(u)), gate=gate), slow_hard(slow_bound(u), gate))


@maps
def test_the_size_dial_is_the_designs(u: list[float]) -> None:
    for size in range(1, len(u) + 1):
        close(bound_at_size(as_logits(u), size), slow_dial(u, size))


@maps
def test_top_hard_takes_the_smallest_scores(u: list[float]) -> None:
    for size in range(1, len(u) + 1):
        close(top_hard(as_logits(u), size), slow_top(u, size))


@maps
@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_gumbel_weights_are_l2xs(u: list[float], variant: Any) -> None:
    for size, temperature in itertools.product({1, min(8, len(u)), len(u)}, (0.1, 0.5, 1.0)):
        noise = -torch.empty(size, len(u), dtype=torch.float64).exponential_(generator=seeded(5)).log()
        weights = gumbel_soft(as_logits(u), size, temperature=temperature, variant=variant, generator=seeded(5))
        close(weights, slow_gumbel(u, noise.tolist(), temperature, variant))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gumbel_noise_has_gumbels_mean_and_variance() -> None:
    # with two cells and k = 1 the winner of a nearly one-hot draw is Bernoulli(softmax(a))
    logits = torch.tensor([1.0, 0.0]).expand(20_000, 2)
    first = gumbel_soft(logits, 1, temperature=1e-3, variant="corrected", generator=seeded(0))[:, 0].mean()
    assert first.item() == pytest.approx(math.e / (1 + math.e), abs=0.01)


def test_maps_of_a_batch_are_independent_of_one_another() -> None:
    batch = torch.tensor([[2.0, -1.0, 0.0], [0.1, 0.2, -0.3]], dtype=torch.float64)
    for operator in (bound, bounded_soft, bounded_hard, lambda a: bound_at_size(a, 2), lambda a: top_hard(a, 2)):
        together = operator(batch)
        assert torch.equal(together, torch.stack([operator(row) for row in batch]))
        assert torch.equal(operator(batch.reshape(2, 1, 3)), together.reshape(2, 1, 3))


# By hand.


def test_a_map_worked_out_by_hand() -> None:
    u = torch.tensor([[2.0, -1.0, 0.0], [0.5, 3.0, -4.0]], dtype=torch.float64).flatten()
    z = bound(-u)
    assert z.tolist() == [-2, 0, 0, -0.5, -3, 0]
    # exp of a tenth of z: .818731 + 1 + 1 + .951229 + .740818 + 1 = 5.510778
    expected = [0.148569, 0.181463, 0.181463, 0.172612, 0.134431, 0.181463]
    assert bounded_soft(z).tolist() == pytest.approx(expected, abs=1e-6)
    # 0.98 / 6 = .163333, and what is left is not normalised again
    assert bounded_soft(z, threshold="auto").tolist() == pytest.approx(
        [0, 0.018129, 0.018129, 0.009279, 0, 0.018129], abs=1e-6
    )
    assert bounded_soft(z, gate=True).tolist() == pytest.approx([0.450166, 0.5, 0.5, 0.487503, 0.425557, 0.5], abs=1e-6)
    assert bounded_hard(z).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 0, 1 / 3])
    assert bounded_hard(z, gate=True).tolist() == [0, 1, 1, 0, 0, 1]
    # the second smallest score is -1: two cells at the bound
    assert bound_at_size(-u, 2).tolist() == [-3, 0, -1, -1.5, -4, 0]
    assert top_hard(-u, 2).tolist() == [0, 0.5, 0, 0, 0, 0.5]


def test_all_clipped_selects_all_and_none_clipped_selects_the_best() -> None:
    clipped = bound(torch.tensor([3.0, 0.0, 0.5]))
    assert bounded_hard(clipped).tolist() == pytest.approx([1 / 3] * 3)
    assert bounded_soft(clipped).tolist() == pytest.approx([1 / 3] * 3)
    assert bounded_hard(bound(torch.tensor([-3.0, -0.25, -0.5]))).tolist() == [0, 1, 0]
    assert bounded_hard(bound(torch.tensor([-3.0, -0.25, -0.25]))).tolist() == [0, 0.5, 0.5]


def test_one_cell_is_everything() -> None:
    for value in (-7.0, 0.0, 7.0):
        cell = torch.tensor([value])
        for weights in (bounded_soft(bound(cell)), bounded_hard(bound(cell)), top_hard(cell, 1), gumbel_soft(cell, 1)):
            assert weights.tolist() == [1.0]
        assert bound_at_size(cell, 1).tolist() == [0.0]


def test_with_ties_the_dial_keeps_all_and_top_hard_the_first() -> None:
    tied = torch.tensor([1.0, 3.0, 3.0, 3.0])
    assert (bound_at_size(tied, 2) == 0).tolist() == [False, True, True, True]
    assert top_hard(tied, 2).tolist() == [0, 0.5, 0.5, 0]
    assert top_hard(torch.zeros(300), 3).nonzero().flatten().tolist() == [0, 1, 2]
    assert top_hard(torch.tensor([-0.0, 0.0]), 1).tolist() == [1, 0]


# What the design states.


def test_soft_weight_outside_of_the_selected_cells() -> None:
    z = torch.tensor([0.0] * 8 + [-20.0] * 41)
    assert bounded_hard(z)[:8].sum().item() == pytest.approx(1)
    assert bounded_soft(z)[8:].sum().item() == pytest.approx(0.41, abs=0.005)


def test_the_threshold_is_a_price_on_size() -> None:
    def total(size: int) -> float:
        z = torch.tensor([0.0] * size + [-1e4] * (49 - size))
        assert torch.equal(bounded_soft(z, threshold="auto"), bounded_soft(z, threshold=0.98 / 49))
        return bounded_soft(z, threshold="auto").sum().item()

    assert total(49) == pytest.approx(0.02, abs=1e-6)
    assert total(8) == pytest.approx(0.84, abs=1e-6)
    assert all(total(size) > total(size + 1) for size in range(1, 49))


@pytest.mark.parametrize(("variant", "total"), [("official", 1.2), ("corrected", 7.4)])
def test_soft_sums_of_l2x_at_equal_scores(variant: Any, total: float) -> None:
    weights = gumbel_soft(torch.zeros(1000, 49), 8, variant=variant, generator=seeded(0))
    assert weights.sum(-1).mean().item() == pytest.approx(total, abs=0.05)


# Gradients.

AWAY_FROM_KINKS = [1.0, 1.0, 0.4, -0.7, -1.9, -0.7, -4.0]  # two ties, three clipped


@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "threshold": "auto"}, {"threshold": 0.05}, {"gate": True}],
    ids=str,
)
def test_gradients_of_the_bounded_weights(setting: dict[str, Any]) -> None:
    logits = torch.tensor(AWAY_FROM_KINKS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: bounded_soft(bound(a), **setting), logits)


def test_clipped_cells_pass_no_gradient_and_others_do() -> None:
    logits = torch.tensor([*AWAY_FROM_KINKS, 0.0], requires_grad=True)
    price = torch.arange(8.0) ** 2
    (gradient,) = torch.autograd.grad(bounded_soft(bound(logits)) @ price, logits)
    assert ((gradient == 0) == (logits >= 0)).all()
    dead = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(bounded_soft(bound(dead)) @ price[:3], dead)
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_gradients_of_the_size_dial(size: int) -> None:
    logits = torch.tensor([1.0, 0.2, 0.4, -0.7, -1.9, -0.9, -4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: bound_at_size(a, size), logits)
    chosen = logits.topk(size).indices
    price = torch.arange(1, 8.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(bounded_soft(bound_at_size(logits, size)) @ price, logits)
    # the cells above the moved bound are clipped; the one that it lies on carries the move
    assert (gradient[chosen[:-1]] == 0).all()
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_gradients_of_the_gumbel_weights(variant: Any) -> None:
    logits = torch.tensor([AWAY_FROM_KINKS, AWAY_FROM_KINKS[::-1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a: gumbel_soft(a, 3, temperature=0.7, variant=variant, generator=seeded(1)), logits
    )


# Broken and extreme input.

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "soft": lambda a: bounded_soft(bound(a)),
    "soft, threshold": lambda a: bounded_soft(bound(a), threshold="auto"),
    "soft, gate": lambda a: bounded_soft(bound(a), gate=True),
    "hard": lambda a: bounded_hard(bound(a)),
    "hard, gate": lambda a: bounded_hard(bound(a), gate=True),
    "dialled soft": lambda a: bounded_soft(bound_at_size(a, 2)),
    "dialled hard": lambda a: bounded_hard(bound_at_size(a, 2)),
    "official": lambda a: gumbel_soft(a, 2, generator=seeded(0)),
    "corrected": lambda a: gumbel_soft(a, 2, variant="corrected", generator=seeded(0)),
    "top": lambda a: top_hard(a, 2),
}
weights_of = pytest.mark.parametrize("operator", WEIGHTS.values(), ids=WEIGHTS)


@weights_of
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_nan_spoils_its_map_wholly_and_no_other(operator: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    maps = torch.tensor([[2.0, -1, 0, -3], [1, -1, -2, 0.5], [-2, -1, -4, -3]], dtype=dtype)
    whole = operator(maps)
    maps[1, 2] = NAN
    broken = operator(maps)
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])
    assert not whole.isnan().any()


def test_infinite_logits_are_the_limits_of_large_ones() -> None:
    logits = torch.tensor([[INF, 1.0, -INF, -2.0], [-1.0, -3.0, -INF, -INF], [INF, INF, 0.0, -1.0]])
    assert bound(logits).tolist() == [[0, 0, -INF, -2], [-1, -3, -INF, -INF], [0, 0, 0, -1]]
    assert bound_at_size(logits, 1).tolist() == [[0, -INF, -INF, -INF], [0, -2, -INF, -INF], [0, 0, -INF, -INF]]
    assert bound_at_size(logits, 4).tolist() == [[0, 0, 0, 0]] * 3
    for name in WEIGHTS.keys() - {"official", "corrected"}:
        assert torch.equal(WEIGHTS[name](logits), WEIGHTS[name](logits.clamp(-1e30, 1e30))), name


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_infinite_logits_in_a_gumbel_draw(variant: Any) -> None:
    assert gumbel_soft(torch.tensor([0.0, -INF, -1.0]), 2, variant=variant, generator=seeded(0))[1] == 0
    assert gumbel_soft(torch.tensor([0.0, INF, -1.0]), 2, variant=variant, generator=seeded(0)).isnan().all()


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_types_are_kept_and_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    narrow = (torch.randn(20, 49, generator=seeded(0)) * 3).to(dtype)
    weights = WEIGHTS[name](narrow)
    assert weights.dtype == dtype
    # noise is drawn in the type that is computed in, and another type draws other noise
    noisy = name in ("official", "corrected")
    expected = WEIGHTS[name](narrow.float() if noisy else narrow.double())
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-2)


@weights_of
def test_float64_stays_float64(operator: Callable[[Tensor], Tensor]) -> None:
    assert operator(torch.randn(3, 5, dtype=torch.float64, generator=seeded(0))).dtype == torch.float64


@weights_of
def test_autocast_changes_nothing(operator: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(4, 49, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        weights = operator(logits)
        narrow = operator(logits.bfloat16())
    assert torch.equal(weights, operator(logits))
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_inside(dtype: torch.dtype) -> None:
    # 1/49 less 0.98/49: in half precision the difference would be mostly rounding
    weights = bounded_soft(torch.zeros(49, dtype=dtype), threshold="auto")
    assert weights.tolist() == pytest.approx([0.02 / 49] * 49, rel=torch.finfo(dtype).eps)
    # 4095 ones: counted in half precision, they would come to 4096, or stick at 256
    assert bounded_hard(torch.zeros(4095, dtype=dtype))[0].item() == pytest.approx(1 / 4095, rel=torch.finfo(dtype).eps)


# Properties.

values = st.one_of(st.floats(-30, 30), st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0]))
batches = hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=values)
temperatures = st.sampled_from([0.01, 0.1, 1.0, 5.0])


@settings(max_examples=40)
@given(batches, temperatures)
def test_soft_weights_are_positive_and_sum_to_one(batch: np.ndarray, temperature: float) -> None:
    weights = bounded_soft(bound(torch.from_numpy(batch)), temperature=temperature)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(batch), dtype=torch.float64))


@settings(max_examples=40)
@given(batches, temperatures, st.floats(1e-4, 0.5))
def test_the_threshold_takes_off_what_it_says(batch: np.ndarray, temperature: float, threshold: float) -> None:
    scores = bound(torch.from_numpy(batch))
    weights = bounded_soft(scores, temperature=temperature, threshold=threshold)
    plain = bounded_soft(scores, temperature=temperature)
    torch.testing.assert_close(weights, (plain - threshold).clamp(min=0))


@settings(max_examples=40)
@given(batches)
def test_hard_weights_lie_evenly_on_the_cells_at_the_maximum(batch: np.ndarray) -> None:
    scores = bound(torch.from_numpy(batch))
    weights, ones = bounded_hard(scores), bounded_hard(scores, gate=True)
    selected = scores == scores.max(dim=-1, keepdim=True).values
    assert torch.equal(weights > 0, selected)
    assert torch.equal(ones, selected.double())
    torch.testing.assert_close(weights, ones / ones.sum(-1, keepdim=True))
    # whatever reaches the bound is selected, and nothing else where anything does
    reaches = torch.from_numpy(batch >= 0)
    assert torch.equal(selected[reaches.any(-1)], reaches[reaches.any(-1)])


@settings(max_examples=40)
@given(batches)
def test_bound_has_no_negative_zero_and_no_positive_value(batch: np.ndarray) -> None:
    logits = torch.from_numpy(batch)
    size = (batch.shape[1] + 1) // 2
    for scores in (bound(logits), bound_at_size(logits, size), bound(logits.float()), bound(logits.half())):
        assert (scores <= 0).all()
        assert not scores[scores == 0].signbit().any()


@settings(max_examples=40)
@given(batches, st.randoms(use_true_random=False), temperatures)
def test_cells_are_treated_alike(batch: np.ndarray, random: Any, temperature: float) -> None:
    logits = torch.from_numpy(batch)
    order = list(range(batch.shape[1]))
    random.shuffle(order)
    size = random.randint(1, len(order))
    assert torch.equal(bound(logits[:, order]), bound(logits)[:, order])
    dialled = bound_at_size(logits, size)
    assert torch.equal(bound_at_size(logits[:, order], size), dialled[:, order])
    for scores in (bound(logits), dialled):
        assert torch.equal(bounded_hard(scores[:, order]), bounded_hard(scores)[:, order])
        for setting in ({}, {"threshold": "auto"}, {"gate": True}):
            soft = bounded_soft(scores, temperature=temperature, **setting)
            again = bounded_soft(scores[:, order], temperature=temperature, **setting)
            torch.testing.assert_close(again, soft[:, order])


@settings(max_examples=40)
@given(batches, temperatures, st.data())
def test_more_relevant_is_never_less_weight(batch: np.ndarray, temperature: float, data: st.DataObject) -> None:
    logits = torch.from_numpy(batch)
    cell = data.draw(st.integers(0, batch.shape[1] - 1))
    raised = logits.clone()
    raised[:, cell] += data.draw(st.floats(0, 40))
    others = [index for index in range(batch.shape[1]) if index != cell]
    for setting in ({}, {"threshold": "auto"}, {"gate": True}):
        before, after = (bounded_soft(bound(a), temperature=temperature, **setting) for a in (logits, raised))
        assert (after[:, cell] >= before[:, cell] - 1e-12).all()
        assert (after[:, others] <= before[:, others] + 1e-12).all()
        order = logits[0].argsort()
        assert (before[0, order].diff() >= -1e-12).all()


@settings(max_examples=40)
@given(batches)
def test_the_size_dial(batch: np.ndarray) -> None:
    logits = torch.from_numpy(batch)
    cells = batch.shape[1]
    distinct = [len(set(row)) == cells for row in batch.tolist()]
    previous = torch.zeros_like(logits, dtype=torch.bool)
    for size in range(1, cells + 1):
        scores, weights = bound_at_size(logits, size), top_hard(logits, size)
        at_bound, chosen = scores == 0, weights > 0
        assert (chosen.sum(-1) == size).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(batch), dtype=torch.float64))
        assert (at_bound.sum(-1) >= size).all()
        assert (at_bound.sum(-1)[distinct] == size).all()
        assert (at_bound | ~chosen).all()
        # what ties with the last one chosen is at the bound, and nothing else is
        assert torch.equal(at_bound, logits >= logits.where(chosen, torch.inf).amin(-1, keepdim=True))
        assert torch.equal(bounded_hard(scores)[distinct], weights[distinct])
        assert (chosen | ~previous).all()
        previous = chosen


@settings(max_examples=40)
@given(batches, st.data())
def test_sizes_that_differ_from_row_to_row(batch: np.ndarray, data: st.DataObject) -> None:
    logits = torch.from_numpy(batch).round()  # with ties
    sizes = data.draw(st.lists(st.integers(1, batch.shape[1]), min_size=len(batch), max_size=len(batch)))
    for operator in (bound_at_size, best, top_hard):
        together = operator(logits, torch.tensor(sizes)[:, None])
        assert torch.equal(together, torch.stack([operator(row, k) for row, k in zip(logits, sizes, strict=True)]))


@settings(max_examples=40)
@given(batches, st.sampled_from(["official", "corrected"]), st.integers(0, 99))
def test_gumbel_weights_sum_to_between_one_and_size(batch: np.ndarray, variant: Any, seed: int) -> None:
    logits = torch.from_numpy(batch)
    for size in {1, (batch.shape[1] + 1) // 2, batch.shape[1]}:
        weights = gumbel_soft(logits, size, variant=variant, generator=seeded(seed))
        assert ((weights >= 0) & (weights <= 1)).all()
        assert ((weights.sum(-1) > 1 - 1e-9) & (weights.sum(-1) < size + 1e-9)).all()


# Refusals.


@pytest.mark.parametrize("operator", [bound_at_size, gumbel_soft, top_hard])
@pytest.mark.parametrize("size", [-1, 0, 6])
def test_sizes_out_of_range_are_refused(operator: Callable[[Tensor, int], Tensor], size: int) -> None:
    with pytest.raises(ValueError, match=f"expected a size from 1 to 5, the number of items, got {size}"):
        operator(torch.zeros(2, 5), size)


def test_unknown_variants_and_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="expected variant 'official' or 'corrected', got 'best'"):
        gumbel_soft(torch.zeros(5), 2, variant="best")  # type: ignore[arg-type]
    for threshold in (0.02, "auto"):
        with pytest.raises(ValueError, match=f"no threshold with the sigmoid gate, got {threshold}"):
            bounded_soft(torch.zeros(5), threshold=threshold, gate=True)
