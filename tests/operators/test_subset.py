"""Subset operators: one list of them all, rivals included; masks, gradients, ties, slow versions, exact enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from benchmarks.operators.rivals import LapSum, PerturbedTopK, Simple, marginals, sampled
from bla.operators import (
    BoundedLogits,
    Entmax15,
    GumbelMaximum,
    HardConcrete,
    RelaxedTopK,
    Sparsemax,
    StraightThroughTopK,
    SubsetOperator,
    bound,
    bounded_hard,
    bounded_soft,
    normalised,
    straight_through,
)

SMOOTH = [
    BoundedLogits(),
    BoundedLogits(temperature=0.1),
    BoundedLogits(k=3),
    BoundedLogits(noise=1.0),
    BoundedLogits(gate=True),
    BoundedLogits(threshold="auto"),
    BoundedLogits(threshold=0.1),
    GumbelMaximum(3),
    RelaxedTopK(3),
    RelaxedTopK(3, noise=0.0, temperature=1.0),
    Sparsemax(),
    Entmax15(),
    HardConcrete(),
    LapSum(3),
]
JUMPING = [
    BoundedLogits(straight_through=True, noise=1.0),
    BoundedLogits(straight_through=True, k=3),
    StraightThroughTopK(3),
    PerturbedTopK(3),
    Simple(3),
]
ALL = SMOOTH + JUMPING
MASKABLE = [operator for operator in ALL if not isinstance(operator, Simple)]
FIXED = [operator for operator in ALL if getattr(operator, "k", None)]
SCORES = torch.tensor([[2.0, -1.0, -1.3, 0.5, -0.2, -0.9], [-0.3, -0.8, -0.1, -1.5, -2.0, -0.6]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False, True, False, True], [True, True, False, False, False, False]])


def die(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


each = pytest.mark.parametrize("operator", ALL, ids=str)


@each
def test_shapes_types_and_sizes(operator: SubsetOperator) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        scores = SCORES.reshape(2, 1, 6).to(dtype)
        soft, hard = operator.soft(scores, generator=die()), operator.hard(scores)
        assert soft.shape == hard.shape == scores.shape
        assert soft.dtype == hard.dtype == dtype
        assert soft.isfinite().all()
        assert (soft > -1e-6).all()
        assert set(hard.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(operator.size(scores), hard.sum(-1))
        assert (operator.size(scores) >= 1).all()
        assert operator.expected_size(scores).shape == (2, 1)


@each
def test_draws_are_the_generators(operator: SubsetOperator) -> None:
    assert torch.equal(operator.soft(SCORES, generator=die(3)), operator.soft(SCORES, generator=die(3)))


@pytest.mark.parametrize("operator", SMOOTH, ids=str)
def test_gradients(operator: SubsetOperator) -> None:
    scores = SCORES.clone().requires_grad_()
    assert gradcheck(lambda values: operator.soft(values, generator=die()), (scores,))
    assert gradcheck(operator.expected_size, (scores,))
    assert gradcheck(lambda values: operator.soft(values, MASK, die()), (scores,), fast_mode=True)


@pytest.mark.parametrize("operator", [BoundedLogits(), BoundedLogits(k=2), HardConcrete(), GumbelMaximum(2)], ids=str)
def test_gradients_where_scores_tie_and_are_clipped(operator: SubsetOperator) -> None:
    # ties below the bound; and well over it, where cells are clipped together
    scores = torch.tensor([[-1.0, -1.0, 3.0, 2.0, 0.4, -7.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda values: operator.soft(values, generator=die()), (scores,))


@pytest.mark.parametrize("operator", MASKABLE, ids=str)
def test_padding_has_no_weight_and_no_gradient(operator: SubsetOperator) -> None:
    for filling in (0.0, 99.0, -99.0, math.inf, math.nan):
        scores = SCORES.masked_fill(~MASK, filling).requires_grad_()
        soft, hard = operator.soft(scores, MASK, die()), operator.hard(scores, MASK)
        weight = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(2, 6)
        (gradient,) = torch.autograd.grad((soft * weight).sum() + operator.expected_size(scores, MASK).sum(), scores)
        for values in (soft, hard, gradient):
            assert values.isfinite().all()
            assert (values[~MASK] == 0).all()
        assert (hard.sum(-1) >= 1).all()


@pytest.mark.parametrize("operator", MASKABLE, ids=str)
def test_padding_changes_nothing(operator: SubsetOperator) -> None:
    """Three items alone, and among padding."""
    alone = torch.tensor([0.5, -1.0, -0.2], dtype=torch.float64)
    padded = torch.tensor([9.0, 0.5, -1.0, 7.0, -0.2], dtype=torch.float64)
    mask = torch.tensor([False, True, True, False, True])
    assert torch.equal(operator.hard(padded, mask)[mask], operator.hard(alone))
    assert torch.allclose(operator.expected_size(padded, mask), operator.expected_size(alone))
    noisy = getattr(operator, "noise", 0) or isinstance(operator, (GumbelMaximum, HardConcrete, PerturbedTopK))
    if not noisy:
        assert torch.allclose(operator.soft(padded, mask)[mask], operator.soft(alone), atol=1e-3)


@each
def test_nothing_to_select_from_is_refused(operator: SubsetOperator) -> None:
    with pytest.raises(ValueError, match="all padding"):
        operator.soft(SCORES, MASK & torch.tensor([[True], [False]]))
    with pytest.raises(ValueError, match="boolean mask"):
        operator.hard(SCORES, MASK.long())
    with pytest.raises(ValueError, match="at least one item"):
        operator.hard(torch.empty(3, 0))


@each
def test_what_is_broken_stays_broken(operator: SubsetOperator) -> None:
    scores = SCORES.clone()
    scores[0, 1] = math.nan
    hard = operator.hard(scores)
    assert hard[0].isnan().all()
    assert torch.equal(hard[1], operator.hard(SCORES)[1])


@pytest.mark.parametrize("operator", FIXED, ids=str)
def test_fixed_sizes(operator: SubsetOperator) -> None:
    assert operator.hard(SCORES).tolist() == [[1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 1]]
    assert operator.hard(torch.zeros(5)).tolist() == [1, 1, 1, 0, 0], "ties go to the first"
    assert operator.expected_size(SCORES).tolist() == [3, 3]
    for call in (operator.hard, operator.soft):
        with pytest.raises(ValueError, match="from 1 to 2, the number of items, got 3"):
            call(SCORES[:, :2])


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12), st.sampled_from([0.1, 1.0, 4.0]))
def test_bounded_logits_are_the_papers(values: list[float], temperature: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    z = bound(scores)
    operator = BoundedLogits(temperature=temperature)
    assert torch.allclose(normalised(operator.soft(scores)), bounded_soft(z, temperature=temperature))
    assert torch.allclose(normalised(operator.hard(scores)), bounded_hard(z))
    assert torch.allclose(BoundedLogits(temperature=temperature, gate=True).soft(scores) / 2,
                          bounded_soft(z, temperature=temperature, gate=True))  # fmt: skip
    thresholded = BoundedLogits(temperature=temperature, threshold="auto")
    expected = bounded_soft(z, temperature=temperature, threshold="auto")
    assert torch.allclose(thresholded.soft(scores) * expected.amax(), expected), "relative to the largest"


def test_clipped_items_get_the_price_but_no_other_gradient() -> None:
    scores = torch.tensor([2.0, 1.0, -0.5], requires_grad=True)
    operator = BoundedLogits()
    (task,) = torch.autograd.grad((operator.soft(scores) * torch.tensor([1.0, 2.0, 3.0])).sum(), scores)
    (price,) = torch.autograd.grad(operator.expected_size(scores), scores)
    assert task[:2].tolist() == [0, 0]
    assert task[2] > 0
    assert (price > 0).all()


def test_expected_sizes_are_expectations() -> None:
    scores = torch.tensor([1.5, -0.5, 0.3, -2.0]).expand(40_000, 4)
    bounded = BoundedLogits(noise=0.7, straight_through=True)
    gates = HardConcrete().soft(scores, generator=die())
    assert (gates > 0).sum(-1).double().mean().item() == pytest.approx(
        HardConcrete().expected_size(scores[0]).item(), abs=0.02
    )
    # where nothing is drawn to the bound the largest item is taken, which the expectation leaves out
    values = bounded.soft(scores, generator=die())
    probability = torch.sigmoid(scores[0] / 0.7)
    nothing = (1 - probability).prod()
    assert values.sum(-1).mean().item() == pytest.approx((bounded.expected_size(scores[0]) + nothing).item(), abs=0.02)


def subsets(n: int, k: int) -> Tensor:
    chosen = list(itertools.combinations(range(n), k))
    return torch.stack([torch.zeros(n, dtype=torch.float64).index_fill(0, torch.tensor(c), 1.0) for c in chosen])


def test_simple_against_enumeration() -> None:
    scores = SCORES[0].clone().requires_grad_()
    every = subsets(6, 3)
    probability = torch.softmax(every @ scores, dim=0)
    assert torch.allclose(marginals(scores, 3), probability @ every)
    draws = sampled(scores.detach().expand(20_000, 6), 3, die())
    assert (draws.sum(-1) == 3).all()
    assert torch.allclose(draws.mean(0), (probability @ every).detach(), atol=0.015)
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64)
    (exact,) = torch.autograd.grad(probability @ (every @ weight), scores)
    (ours,) = torch.autograd.grad(Simple(3).soft(scores, generator=die()) @ weight, scores)
    assert torch.allclose(ours, exact), "of a linear loss SIMPLE has no bias and no variance"


def test_perturbed_top_k_against_finite_differences() -> None:
    scores = torch.tensor([0.3, -0.2, 0.1, -0.4], dtype=torch.float64)
    weight = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    many = PerturbedTopK(2, draws=50_000)

    def value(shift: Tensor) -> Tensor:
        return many.soft(scores + shift, generator=die()) @ weight

    shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(value(shift), shift)
    step = 0.1 * torch.eye(4, dtype=torch.float64)
    differences = torch.stack([(value(row) - value(-row)) / 0.2 for row in step])
    assert torch.allclose(ours, differences, atol=0.1)


def test_lapsum_sums_to_k() -> None:
    assert LapSum(3).soft(SCORES).sum(-1).tolist() == pytest.approx([3, 3])


def test_sparsemax_by_hand() -> None:
    # projection of (1, .5, -1): the first two, both less .25
    assert Sparsemax().soft(torch.tensor([1.0, 0.5, -1.0])).tolist() == pytest.approx([1, 1 / 3, 0])
    assert Sparsemax().size(torch.tensor([1.0, 0.5, -1.0])) == 2


def test_relaxed_top_k_by_hand() -> None:
    scores = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    first = torch.tensor([0.5, 0.3, 0.2])
    left = first * (1 - first)
    assert torch.allclose(RelaxedTopK(2, temperature=1.0, noise=0.0).soft(scores), first + left / left.sum())


def test_straight_through_has_the_soft_gradient() -> None:
    relaxed, jumping = BoundedLogits(), BoundedLogits(straight_through=True)
    scores = SCORES.clone().requires_grad_()
    weight = torch.linspace(1, 2, 6, dtype=torch.float64)
    gradients = [torch.autograd.grad((o.soft(scores) * weight).sum(), scores)[0] for o in (relaxed, jumping)]
    assert torch.equal(*gradients)
    assert torch.equal(jumping.soft(SCORES), jumping.hard(SCORES))
    assert torch.equal(straight_through(SCORES, SCORES), SCORES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: BoundedLogits(temperature=0), "temperature > 0, got 0"),
        (lambda: BoundedLogits(noise=-1), "noise >= 0, got -1"),
        (lambda: BoundedLogits(k=0), "k > 0, got 0"),
        (lambda: BoundedLogits(gate=True, threshold="auto"), "no threshold with the sigmoid gate"),
        (lambda: BoundedLogits(threshold=2.0), "number in"),
        (lambda: GumbelMaximum(0), "k > 0, got 0"),
        (lambda: HardConcrete(beta=0), "beta > 0, got 0"),
        (lambda: Sparsemax(temperature=-1), "temperature > 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]
