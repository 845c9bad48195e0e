"""Methods to compare: by existing libraries, trained by us, and controls. Photos in, rankings of cells out."""

from bla.comparison.methods.controls import another_images, centre_disc, feature_norm, random_cells
from bla.comparison.methods.libraries import grad_cam_family, integrated_gradients, occlusion, refine_cam, score_cam
from bla.comparison.methods.logits import c_minus_e, cam, smoothed
from bla.comparison.methods.method import RUN, Batch, Cells, ComparisonError, Method, PooledClassifier
from bla.comparison.methods.sampled import kernel_shap, rise
from bla.comparison.methods.trained import l2x, learned_mask, softmax_attention

__all__ = [
    "RUN", "Batch", "Cells", "ComparisonError", "Method", "PooledClassifier", "another_images", "c_minus_e", "cam",
    "centre_disc", "feature_norm", "grad_cam_family", "integrated_gradients", "kernel_shap", "l2x", "learned_mask",
    "occlusion", "random_cells", "refine_cam", "rise", "score_cam", "smoothed", "softmax_attention",
]  # fmt: skip
