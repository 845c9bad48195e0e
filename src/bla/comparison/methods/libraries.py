"""Methods by other people's libraries: the CAM family by grad-cam, gradients and occlusion by captum.

The CAM family works at the last feature map, before the average. Each image of a batch has its own target. Maps rank
cells before the library rectifies or scales them: what a ReLU sets to 0 would tie.
"""

from __future__ import annotations

import contextlib
import io
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla import needs_extra
from bla.comparison.methods.method import Batch, ComparisonError, Method, PooledClassifier
from bla.metrics import is_affine
from bla.model.untouched import untouched

SCORE_CAM_CHANNELS = 32
GRADIENT_STEPS = 16

CamName = Literal["grad-cam", "grad-cam++", "layer-cam", "hires-cam"]
_CAMS = {
    "grad-cam": ("GradCAM", "Grad-CAM"),
    "grad-cam++": ("GradCAMPlusPlus", "Grad-CAM++"),
    "layer-cam": ("LayerCAM", "LayerCAM"),
    "hires-cam": ("HiResCAM", "HiResCAM"),
}


def cam(classifier: PooledClassifier) -> Method:
    r"""Class activation maps (Zhou et al. 2016): :math:`M_n = W_c \cdot F_n`, the head's logit at each cell.

    A ComparisonError if the head is not affine: then there is no such W.
    """
    head = classifier.head
    channels = next((module.in_features for module in head.modules() if isinstance(module, nn.Linear)), None)
    with untouched(head):
        linear = channels is not None and is_affine(head, channels, next(head.parameters()))
    if not linear:
        raise ComparisonError("expected a linear head for cam, got another: compare grad-cam, which takes any")

    def maps(batch: Batch) -> Tensor:
        cells = batch.features.flatten(2).transpose(1, 2).float()
        with untouched(head), torch.no_grad():
            logits = head(cells.flatten(0, 1)) - head(cells[:1, 0] * 0)
        own = batch.targets[:, None, None].expand(-1, cells.shape[1], 1)
        found: Tensor = logits.reshape(*cells.shape[:2], -1).gather(2, own).squeeze(2)
        return found.reshape(-1, *batch.features.shape[2:])

    return Method("cam", "CAM", "baseline", True, maps, "the linear head's logit at each cell")


def grad_cam_family(classifier: PooledClassifier, name: CamName) -> Method:
    """Grad-CAM, Grad-CAM++, LayerCAM or HiResCAM at the last map, by grad-cam, from features alone."""
    with needs_extra("compare", ComparisonError):
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    kind, title = _CAMS[name]
    network = nn.Sequential(classifier.cells, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier.head)

    def maps(batch: Batch) -> Tensor:
        raw: list[Any] = []
        with untouched(network):
            features = batch.features.float().clone().requires_grad_(True)
            library = getattr(pytorch_grad_cam, kind)(model=network, target_layers=[classifier.cells])
            weighted = library.get_cam_image

            def unrectified(*arguments: Any, **named: Any) -> Any:
                raw.append(weighted(*arguments, **named))
                return raw[-1]

            library.get_cam_image = unrectified
            library(features, [ClassifierOutputTarget(int(target)) for target in batch.targets])
            del library.get_cam_image  # a cycle, which would keep the features
        return torch.as_tensor(raw[0]).float().to(batch.features.device)

    return Method(name, title, "baseline", True, maps, f"grad-cam {version('grad-cam')}, last map, unrectified")


def score_cam(classifier: PooledClassifier, channels: int = SCORE_CAM_CHANNELS) -> Method:
    """Score-CAM (Wang et al. 2020) by grad-cam, on the ``channels`` channels with the largest mean in each photo."""
    with needs_extra("compare", ComparisonError):
        from pytorch_grad_cam import ScoreCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def maps(batch: Batch) -> Tensor:
        with untouched(classifier), torch.no_grad():
            library = ScoreCAM(classifier, [classifier.cells])
            count = min(channels, batch.features.shape[1])
            best = batch.features.mean(dim=(2, 3)).topk(count, dim=1).indices
            index = best[:, :, None, None].expand(-1, -1, *batch.features.shape[2:])
            chosen = batch.features.gather(1, index).float().cpu().numpy()
            targets = [ClassifierOutputTarget(int(target)) for target in batch.targets]
            with contextlib.redirect_stderr(io.StringIO()):  # the library's progress bars
                weights = library.get_cam_weights(batch.seen(), None, targets, chosen, None)
        found = (np.asarray(weights)[:, :, None, None] * chosen).sum(axis=1)
        return torch.from_numpy(found).to(batch.features)

    note = f"grad-cam {version('grad-cam')}, capped to the {channels} channels of the largest mean"
    return Method("score-cam", "Score-CAM", "baseline", True, maps, note, needs_pixels=True)


def integrated_gradients(classifier: PooledClassifier, steps: int = GRADIENT_STEPS) -> Method:
    """Integrated gradients (Sundararajan et al. 2017) by captum, from the mean colour, summed over cells."""
    with needs_extra("compare", ComparisonError):
        from captum.attr import IntegratedGradients

    def maps(batch: Batch) -> Tensor:
        with untouched(classifier):
            pixels = batch.seen().clone()
            found = IntegratedGradients(classifier).attribute(
                pixels, baselines=0.0, target=batch.targets, n_steps=steps, internal_batch_size=max(16, len(pixels))
            )
        return _on_cells(found.detach().sum(dim=1), batch)

    note = f"captum {version('captum')}, {steps} steps from the mean colour, summed over colours and the cell's pixels"
    return Method("integrated-gradients", "Integrated gradients", "baseline", True, maps, note, needs_pixels=True)


def occlusion(classifier: PooledClassifier) -> Method:
    """Occlusion (Zeiler & Fergus 2014) by captum: how far the logit drops when a cell is set to the mean colour."""
    with needs_extra("compare", ComparisonError):
        from captum.attr import Occlusion

    def maps(batch: Batch) -> Tensor:
        pixels, (height, width) = batch.seen(), batch.features.shape[2:]
        window = (3, -(-pixels.shape[2] // height), -(-pixels.shape[3] // width))
        with untouched(classifier), torch.no_grad():
            found = Occlusion(classifier).attribute(
                pixels.clone(), sliding_window_shapes=window, strides=window, baselines=0.0, target=batch.targets
            )
        return _on_cells(found.detach().mean(dim=1), batch)

    note = f"captum {version('captum')}, one cell at a time, the mean colour in its place"
    return Method("occlusion", "Occlusion", "baseline", True, maps, note, needs_pixels=True)


def _on_cells(pixel_maps: Tensor, batch: Batch) -> Tensor:
    height, width = batch.features.shape[2:]
    return functional.adaptive_avg_pool2d(pixel_maps[:, None].float(), (height, width))[:, 0]
