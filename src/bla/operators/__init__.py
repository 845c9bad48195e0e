"""Scores to weights and subsets: bounded logits and their rivals, as functions and as operators; imports torch alone.

Two layers. Functions give the weights of the paper: :func:`bound`, :func:`bound_at_size`, :func:`bounded_soft`,
:func:`bounded_hard`, :func:`gumbel_soft`, :func:`top_hard`. A :class:`SubsetOperator` is a general-purpose selection
with one interface, ``soft``, ``hard``, ``size`` and ``expected_size``, whatever the items are.
``docs/background/subset-selection.md`` says which to choose.
"""

from bla.operators.bounded import BoundedLogits
from bla.operators.fixed import GumbelMaximum, RelaxedTopK, StraightThroughTopK
from bla.operators.sparse import Entmax15, HardConcrete, Sparsemax
from bla.operators.subset import SubsetOperator
from bla.operators.weights import (
    AUTO_THRESHOLD_MASS,
    GumbelVariant,
    best,
    bound,
    bound_at_size,
    bounded_hard,
    bounded_soft,
    gumbel_soft,
    memberships,
    normalised,
    straight_through,
    top_hard,
)

__all__ = [
    "AUTO_THRESHOLD_MASS", "BoundedLogits", "Entmax15", "GumbelMaximum", "GumbelVariant", "HardConcrete",
    "RelaxedTopK", "Sparsemax", "StraightThroughTopK", "SubsetOperator", "best", "bound", "bound_at_size",
    "bounded_hard", "bounded_soft", "gumbel_soft", "memberships", "normalised", "straight_through", "top_hard",
]  # fmt: skip
