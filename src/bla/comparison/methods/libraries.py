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
from bla.model.untouched import seeing, untouched

SCORE_CAM_CHANNELS = 32
GRADIENT_STEPS = 16
REFINED_LAYERS = 2

FINER_CLASSES = 3

CamName = Literal["grad-cam", "grad-cam++", "layer-cam", "hires-cam", "finer-cam"]
_CAMS = {
    "grad-cam": ("GradCAM", "Grad-CAM"),
    "grad-cam++": ("GradCAMPlusPlus", "Grad-CAM++"),
    "layer-cam": ("LayerCAM", "LayerCAM"),
    "hires-cam": ("HiResCAM", "HiResCAM"),
    "finer-cam": ("GradCAM", "Finer-CAM"),
}


def grad_cam_family(classifier: PooledClassifier, name: CamName) -> Method:
    """Grad-CAM, Grad-CAM++, LayerCAM, HiResCAM or Finer-CAM at the last map, by grad-cam, from features alone.

    Finer-CAM (Zhang et al. 2025) is Grad-CAM of the class's logit less those of the three classes with the most similar
    logits, weighted by their probabilities.
    """
    with needs_extra("compare", ComparisonError):
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget

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
            classes = [[int(target)] for target in batch.targets]
            if name == "finer-cam":
                logits = network(features.detach())
                distances = (logits - logits.gather(1, batch.targets[:, None])).abs()
                nearest = distances.scatter(1, batch.targets[:, None], -1).argsort(dim=1, stable=True)
                classes = nearest[:, : 1 + FINER_CLASSES].tolist()
            library(
                features,
                [FinerWeightedTarget(own, near, 1) if near else ClassifierOutputTarget(own) for own, *near in classes],
            )
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


def refine_cam(classifier: PooledClassifier, layers: int = REFINED_LAYERS) -> Method:
    """RefineCAM (arXiv 2605.14641) by grad-cam: the product of Grad-CAM++ at the last layers of several resolutions.

    The layers are those that run last at each of the ``layers`` coarsest resolutions of the trunk.
    """
    with needs_extra("compare", ComparisonError):
        from pytorch_grad_cam.refine_cam import RefineCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def maps(batch: Batch) -> Tensor:
        with untouched(classifier):
            pixels = batch.seen().clone().requires_grad_(True)
            found = RefineCAM(classifier, last_layers(classifier, pixels[:1], layers))(
                pixels, [ClassifierOutputTarget(int(target)) for target in batch.targets]
            )
        return on_cells(torch.as_tensor(found).to(batch.features.device), batch)

    note = f"grad-cam {version('grad-cam')}, the last layers of the {layers} coarsest resolutions"
    return Method("refine-cam", "RefineCAM", "baseline", True, maps, note, needs_pixels=True)


def last_layers(network: PooledClassifier, pixels: Tensor, count: int) -> list[nn.Module]:
    """The modules whose maps are the last of their size, the ``count`` coarsest sizes, the finest first."""
    found: dict[int, str] = {}

    def see(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and out[0, 0].numel() > 1:
            found[out[0, 0].numel()] = name

    _, *inner = network.trunk.named_modules()
    with seeing(inner, see), torch.no_grad():
        network(pixels)
    finest_first = sorted(found.items(), reverse=True)[-count:]
    return [network.trunk.get_submodule(name) for _, name in finest_first[:-1]] + [network.cells]


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
        return on_cells(found.detach().sum(dim=1), batch)

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
        return on_cells(found.detach().mean(dim=1), batch)

    note = f"captum {version('captum')}, one cell at a time, the mean colour in its place"
    return Method("occlusion", "Occlusion", "baseline", True, maps, note, needs_pixels=True)


def on_cells(pixel_maps: Tensor, batch: Batch) -> Tensor:
    """Maps of pixels (B, h, w) as means over the cells (B, H, W)."""
    height, width = batch.features.shape[2:]
    return functional.adaptive_avg_pool2d(pixel_maps[:, None].float(), (height, width))[:, 0]
