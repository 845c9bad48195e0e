"""What is measured: callables, tensors and explanations in, figures out; the same code for every method."""

from bla.metrics.accuracy import Accuracy
from bla.metrics.cells import is_affine, read_cells
from bla.metrics.judging import Curve, Ranked, judge_methods
from bla.metrics.leakage import Evaluator, mask_probe, retrained, train_evaluator
from bla.metrics.localisation import localise
from bla.metrics.metric import Metric
from bla.metrics.ranking import masks_by_size, places, top_cells
from bla.metrics.several import SeveralLabels, decided, scorer, together
from bla.metrics.size import size_summary

__all__ = [
    "Accuracy",
    "Curve",
    "Evaluator",
    "Metric",
    "Ranked",
    "SeveralLabels",
    "decided",
    "is_affine",
    "judge_methods",
    "localise",
    "mask_probe",
    "masks_by_size",
    "places",
    "read_cells",
    "retrained",
    "scorer",
    "size_summary",
    "together",
    "top_cells",
    "train_evaluator",
]
