"""Methods beside one another: named ones, functions, objects of other libraries, on this classifier or the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import bla
from bla.comparison.methods import ComparisonError
from bla.data.photo import DataError
from bla.metrics import top_cells
from bla.metrics.pixels import kept_and_removed
from bla.model.classifier import ExplainableClassifier
from small import CLASSES, Tiny, some_photos


@pytest.fixture(scope="module")
def wrapped() -> ExplainableClassifier:
    return bla.explainable(Tiny(), classes=CLASSES)


def gradient(model: nn.Module, pixels: Tensor, target: int) -> Tensor:
    return torch.autograd.grad(model(pixels)[0, target], pixels)[0].abs()


PHOTOS = some_photos(3)


def test_each_method_is_cut_to_the_same_area_and_its_figures_are_counted(wrapped: ExplainableClassifier) -> None:
    found = bla.compare(wrapped, PHOTOS, ["c-e", "random", gradient])
    assert list(found.explanations) == ["BLA", "c - E", "random cells", "gradient"]
    plain = wrapped.explain(PHOTOS)
    for name, each in found.explanations.items():
        assert [one.size for one in each] == [one.size for one in plain]
        assert [one.method for one in each] == [name] * 3
        assert [one.classifier for one in each] == [one.classifier for one in plain]
        figures = found.figures[name]
        assert figures.agreement == pytest.approx(np.mean([bool(one.agrees) for one in each]))
        pixels = wrapped.pixels(np.stack([wrapped.transform.read(photo).pixels for photo in PHOTOS]))
        masks = torch.tensor(np.stack([one.selected for one in each]))
        targets = torch.tensor([one.classifier.index for one in plain if one.classifier])
        slow = kept_and_removed(Tiny().eval(), pixels, masks, targets)
        assert figures.kept == pytest.approx(slow["kept"].mean())
        assert figures.removed == pytest.approx(slow["removed"].mean())
    assert np.array_equal(found.explanations["BLA"][1].selected, plain[1].selected)


def test_a_functions_map_is_averaged_over_cells(wrapped: ExplainableClassifier) -> None:
    def rows(model: nn.Module, pixels: Tensor, target: int) -> Any:
        assert model(pixels).shape == (1, 3)
        assert 0 <= target < 3
        return np.arange(pixels.shape[2])[:, None] + np.zeros(pixels.shape[3])

    (one, *_) = bla.compare(wrapped, PHOTOS, {"downwards": rows}, size=5).explanations["downwards"]
    assert one.selected.tolist() == [[False] * 5, [False] * 5, [True] * 5]
    assert one.unbounded[:, 0].tolist() == [3.5, 11.5, 19.5]


def test_objects_of_other_libraries_on_the_original_are_taken_as_they_are(wrapped: ExplainableClassifier) -> None:
    from captum.attr import IntegratedGradients, LayerGradCam
    from pytorch_grad_cam import GradCAM

    model = Tiny().eval()
    given = [GradCAM(model, [model.stem]), LayerGradCam(model, model.stem), IntegratedGradients(model)]
    found = bla.compare(wrapped, PHOTOS, given, size=4)
    assert list(found.explanations) == ["BLA", "GradCAM", "LayerGradCam", "IntegratedGradients"]
    pixels = wrapped.pixels(wrapped.transform.read(PHOTOS[0]).pixels[None])
    target = model(pixels).argmax().item()
    expected = LayerGradCam(model, model.stem).attribute(pixels, target=target)[0].detach()
    assert torch.equal(
        torch.tensor(found.explanations["LayerGradCam"][0].selected), top_cells(expected, torch.tensor([4]))[0]
    )


def test_other_libraries_run_on_a_wrapped_classifier_as_on_the_original(wrapped: ExplainableClassifier) -> None:
    from captum.attr import IntegratedGradients, LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    pixels = wrapped.pixels(wrapped.transform.read(PHOTOS[0]).pixels[None])
    with GradCAM(wrapped, [wrapped.trunk]) as library:
        assert library(pixels, [ClassifierOutputTarget(1)]).shape == (1, 24, 40)
    assert LayerGradCam(wrapped, wrapped.trunk).attribute(pixels, target=1).shape == (1, 1, 3, 5)
    gradients = IntegratedGradients(wrapped).attribute(pixels, target=1, n_steps=4)
    assert gradients.abs().sum() > 0
    assert not [module for module in wrapped.modules() if module._forward_hooks or module._backward_hooks]
    assert not pixels.requires_grad
    assert all(parameter.grad is None for parameter in wrapped.parameters())


def test_it_shows_itself_saves_and_reports(wrapped: ExplainableClassifier, tmp_path: Path) -> None:
    for index, photo in enumerate(PHOTOS):
        photo.save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    found = bla.compare(wrapped, tmp_path, ["centre"])
    assert [Path(one.image).name for one in found.explanations["BLA"]] == ["0.png", "1.png", "2.png"]
    assert [Path(failure.image).name for failure in found.failures] == ["broken.png"]
    head, names, own, centre, legend = repr(found).splitlines()
    assert head == "3 photos, each method cut to the same number of regions"
    assert "Removed: it still does without them" in legend
    assert names.split()[::2] == ["agreement", "kept", "removed", "ms", "photo"]
    assert (own.split()[0], centre.split()[:2]) == ("BLA", ["centre", "disc"])
    assert "data:image/jpeg;base64," in found._repr_html_()
    page = found.save(tmp_path / "page.html").read_text()
    assert "centre disc" in page
    assert "http" not in page
    assert json.loads(found.save(tmp_path / "all.json").read_text())["figures"]["BLA"]["agreement"] == 1
    with Image.open(found.save(tmp_path / "picture.png")) as picture:
        assert picture.width == 2 * 260 + 3 * 16


def test_defaults_and_refusals(wrapped: ExplainableClassifier) -> None:
    assert repr(bla.compare(wrapped, PHOTOS[0], "centre")).startswith("1 photo, each")
    assert list(bla.compare(wrapped, PHOTOS[0]).figures) == ["BLA", "Grad-CAM", "centre disc", "random cells"]
    for methods, message in (
        ("gradcam", r"or functions, got 'gradcam'; did you mean 'grad-cam'"),
        (["l2x"], "expected methods among random, centre"),
        ([3], "expected a method's name, a function .* got int"),
        ([lambda model, pixels, target: pixels[0, 0, 0]], r"expected a finite map \(h, w\) of one photo, got \(40,\)"),
    ):
        with pytest.raises(ComparisonError, match=message):
            bla.compare(wrapped, PHOTOS, methods)
    with pytest.raises(ComparisonError, match=r"got Tiny: bla\.explainable wraps it"):
        bla.compare(Tiny(), PHOTOS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="photos that can be read, got none of 1"):
        bla.compare(wrapped, "nowhere.png", ["centre"])
