"""Scores to subsets: bounded logits and their rivals. Tensors in, tensors out; imports torch alone.

Two layers. Functions give the weights of the paper: :func:`bound`, :func:`bounded_soft`, :func:`bounded_hard`,
:func:`gumbel_soft`, :func:`top_hard`. A :class:`SubsetOperator` is one general-purpose selection with a single
interface, ``soft``, ``hard``, ``size`` and ``expected_size``, whatever the items are. ``docs/subset-selection.md``
says which to choose.
"""

from bla.operators.bounded import BoundedLogits
from bla.operators.fixed import GumbelMaximum, RelaxedTopK, StraightThroughTopK
from bla.operators.sparse import Entmax15, HardConcrete, Sparsemax
from bla.operators.subset import SubsetOperator, normalised
from bla.operators.weights import (
    AUTO_THRESHOLD_MASS,
    GumbelVariant,
    bound,
    bound_at_size,
    bounded_hard,
    bounded_soft,
    gumbel_soft,
    straight_through,
    top_hard,
)

__all__ = [
    "AUTO_THRESHOLD_MASS",
    "BoundedLogits",
    "Entmax15",
    "GumbelMaximum",
    "GumbelVariant",
    "HardConcrete",
    "RelaxedTopK",
    "Sparsemax",
    "StraightThroughTopK",
    "SubsetOperator",
    "bound",
    "bound_at_size",
    "bounded_hard",
    "bounded_soft",
    "gumbel_soft",
    "normalised",
    "straight_through",
    "top_hard",
]
