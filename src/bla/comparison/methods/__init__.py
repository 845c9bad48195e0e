"""Other methods, through existing libraries and of our own training, and controls: photos in, rankings of cells out."""

from bla.comparison.methods.controls import another_images, centre_disc, feature_norm, random_cells
from bla.comparison.methods.explained import Batch, ComparisonError, Method, PooledClassifier, untouched
from bla.comparison.methods.libraries import cam, grad_cam_family, integrated_gradients, occlusion, score_cam
from bla.comparison.methods.rivals import l2x, learned_mask, softmax_attention

__all__ = [
    "Batch",
    "ComparisonError",
    "Method",
    "PooledClassifier",
    "another_images",
    "cam",
    "centre_disc",
    "feature_norm",
    "grad_cam_family",
    "integrated_gradients",
    "l2x",
    "learned_mask",
    "occlusion",
    "random_cells",
    "score_cam",
    "softmax_attention",
    "untouched",
]
