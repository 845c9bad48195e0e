"""What is measured: callables, tensors and explanations in, figures out; the same code for every method."""

from bla.evaluation.accuracy import Accuracy
from bla.evaluation.size import size_summary

__all__ = ["Accuracy", "size_summary"]
