"""Volumes, of any number of channels, and their classifiers: a grid of three sides through all that maps go through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bla
from bla.data.masking import enlarged, filled, masked
from bla.data.photo import DataError, Transform
from bla.deploy.engine import Engine
from bla.deploy.export import export
from bla.explanations.picture import words
from bla.model.attention import BoundedLogitAttention, ClassAwareAttention, L2XAttention
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.evidence import from_all
from bla.progress import silent

SIZE = (8, 16, 24)
GRID = (2, 4, 6)
CT = Transform(SIZE, (0.4,), (0.2,), "bilinear", value_range=(-1000, 1000))


class Net(nn.Module):
    """A 2x4x6 map of 8 channels, and a way to read it."""

    def __init__(self, read: Callable[[Any, Tensor, Tensor], Tensor], channels: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Sequential(nn.Conv3d(channels, 8, 4, 4), nn.ReLU())
        self.fc, self.flat = nn.Linear(8, 3), nn.Linear(8 * 48, 3)
        nn.init.normal_(self.fc.weight, std=2)
        self.read = read

    def forward(self, volumes: Tensor) -> Tensor:
        return self.read(self, volumes, self.map(volumes))


class Tokens(nn.Module):
    """A transformer of cubes with a class token."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv3d(1, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc, self.read = nn.Linear(16, 3), read

    def forward(self, volumes: Tensor) -> Tensor:
        patches = self.patches(volumes).flatten(2).mT
        tokens = self.block(torch.cat([self.token.expand(len(patches), -1, -1), patches], dim=1))
        logits: Tensor = self.fc(self.read(tokens))
        return logits


def mean(net: Any, x: Tensor, f: Tensor) -> Tensor:
    logits: Tensor = net.fc(f.mean((2, 3, 4)))
    return logits


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: Net(mean),
    "adaptive pooling": lambda: Net(lambda n, x, f: n.fc(nn.functional.adaptive_avg_pool3d(f, 1).flatten(1))),
    "channels last": lambda: Net(lambda n, x, f: n.fc(f.permute(0, 2, 3, 4, 1).mean((1, 2, 3)))),
    "mean of tokens": lambda: Net(lambda n, x, f: n.fc(f.flatten(2).mT.mean(1))),
    "maximum": lambda: Net(lambda n, x, f: n.fc(f.amax((2, 3, 4)))),
    "flatten": lambda: Net(lambda n, x, f: n.flat(f.flatten(1))),
    "decides by values": lambda: Net(lambda n, x, f: mean(n, x, f if float(x.max()) < 1e9 else 2 * f)),
    "class token": lambda: Tokens(lambda tokens: tokens[:, 0]),
    "mean of patches": lambda: Tokens(lambda tokens: tokens[:, 1:].mean(1)),
}


def volume(seed: int = 0, shape: tuple[int, ...] = SIZE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-1000, 1000, shape, np.int16)


@pytest.fixture(scope="module")
def wrapped() -> ExplainableClassifier:
    return explainable(Net(mean).eval(), transform=CT)


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_volumes_classifier_is_split_and_explained(make: Callable[[], nn.Module]) -> None:
    net = make().eval()
    found = explainable(net, transform=CT)
    pixels = torch.randn(3, 1, *SIZE)
    with torch.no_grad():
        expected = net(pixels).softmax(-1)
        torch.testing.assert_close(from_all(found.head, found.trunk(pixels)).softmax(-1), expected, atol=1e-5, rtol=0)
    why = found.explain(pixels, target=1, check=True)
    assert [each.grid for each in why] == [GRID] * 3
    assert why[0].votes is not None
    assert why[0].votes.cells.shape == GRID
    assert bla.Explanation.from_dict(why[0].to_dict()) == why[0]
    exact = found.select(pixels, size=7).hard
    assert exact.shape == (3, *GRID)
    assert exact.flatten(1).count_nonzero(dim=1).tolist() == [7, 7, 7]


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_volumes_come_as_arrays(channels: int, dtype: type[Any]) -> None:
    low, high = (0, 255) if dtype == np.uint8 else (-1000, 1000)
    view = Transform(SIZE, (0.4,) * channels, (0.2,) * channels, value_range=(low, high))
    net = Net(mean, channels).eval()
    found = explainable(net, transform=view)
    arrays = np.random.default_rng(0).integers(low, high, (3, *SIZE, channels)).astype(dtype)
    pixels = torch.from_numpy(((arrays - float(low)) / (high - low) - 0.4) / 0.2).float().movedim(-1, 1)
    with torch.no_grad():
        expected = net(pixels).softmax(-1).amax(1)
    for images in (arrays, np.moveaxis(arrays, -1, 1), list(arrays), pixels, torch.from_numpy(arrays)):
        why = found.explain(images, batch_size=2)
        said = [each.classifier.probability for each in why if each.classifier]
        np.testing.assert_allclose(said, expected, atol=1e-5)


def test_a_volume_is_resized_along_every_side() -> None:
    ramp = np.broadcast_to(np.linspace(-1000, 1000, 20)[:, None, None], (20, 30, 40))
    seen = CT.read(ramp.astype(np.float32))
    assert (seen.size, seen.region, seen.pixels.shape) == ((40, 30, 20), (0, 0, 0, 40, 30, 20), (*SIZE, 1))
    steps = np.diff(seen.pixels[..., 0], axis=0)
    assert steps.min() > 0, "deeper slices are brighter"
    assert np.ptp(seen.pixels, axis=(1, 2)).max() < 1e-3
    assert CT.in_words().startswith("preprocessing: whole volume squashed to 24 x 16 x 8 (bilinear)")
    with pytest.raises(DataError, match="expected mode squash for volumes, got 'crop': cut the arrays yourself"):
        Transform(SIZE, (0.5,), (0.5,), mode="crop")
    with pytest.raises(DataError, match="expected an array of a volume, got a photo; pass a NumPy array"):
        CT.read(b"P5\n1 1\n255\n0")
    with pytest.raises(DataError, match=r"of shape \(d, h, w\) or \(d, h, w, 1\) or \(1, d, h, w\), got \(9, 9\)"):
        CT.read(np.zeros((9, 9), np.uint8))


def test_pictures_show_the_slice_of_most_regions(wrapped: ExplainableClassifier) -> None:
    scan = volume(shape=(20, 32, 48))
    why = wrapped.explain(scan, size=30)[0]
    layer = int(why.selected.sum(axis=(1, 2)).argmax())
    held = int(why.selected[layer].sum())
    assert why.slice == layer
    assert why.view == f"{held} in this layer, {layer + 1} of 2: slice {(5, 15)[layer]} of 20"
    assert f"Outlined: 30 of 48 regions ({why.view})." in words(why).regions
    levels = (scan[(4, 14)[layer]] / 2000 + 0.5) * 255
    assert np.abs(np.asarray(why.upright()) - levels).max() <= 1
    mask = why.mask()
    assert mask.shape == (20, 32, 48)
    assert mask[:10].sum() == 640 * why.selected[0].sum()
    assert why.heatmap(smooth=False).max() == 1
    assert why.heatmap().shape == (20, 32, 48)
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in why.boxes()) >= 64 * held
    for drawn in (why.picture(), why.picture(panel="paper"), why.picture(heat="smooth")):
        assert drawn.mode == "RGB"
    assert f"slice {(5, 15)[layer]} of 20" not in str(why)
    assert "from 30 of 48 cells" in str(why)
    flat = why.sliced(1 - layer)
    assert (flat.grid, flat.region) == ((4, 6), (0, 0, 48, 32))


def test_masked_volumes_are_filled_along_every_side() -> None:
    volumes = np.random.default_rng(0).random((2, 1, *SIZE)).astype(np.float32)
    np.testing.assert_allclose(filled(volumes, "mean"), volumes.mean(axis=(2, 3, 4), keepdims=True) + 0 * volumes, 1e-4)
    ones = np.ones((2, *GRID))
    np.testing.assert_allclose(masked(volumes, ones), volumes, atol=1e-5)
    front = ones.copy()
    front[:, 1] = 0
    found = enlarged(front, volumes)
    assert found.shape == (2, *SIZE)
    np.testing.assert_allclose(
        found[0, :, 0, 0], enlarged(np.array([[[1.0], [0.0]]]), volumes[:1, :, :, :, 0])[0, :, 0]
    )
    torch.testing.assert_close(filled(torch.from_numpy(volumes)), torch.from_numpy(filled(volumes)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", [None, BoundedLogitAttention, ClassAwareAttention, L2XAttention])
def test_volumes_are_learnt_from(attention: Any, tmp_path: Path) -> None:
    found = explainable(Net(mean).eval(), transform=CT, attention=attention)
    scans = [volume(seed) for seed in range(6)]
    assert bla.fit(found, scans, epochs=1, masks=8, cache=tmp_path, report=silent)["size"]["cells"] == 48
    assert found.explain(scans[0])[0].grid == GRID


def test_an_exported_volume_says_the_same(wrapped: ExplainableClassifier, tmp_path: Path) -> None:
    export(wrapped, tmp_path / "ct.onnx")
    scan = volume(shape=(9, 20, 30))
    (found,), (own,) = Engine(tmp_path / "ct.onnx").explain_each([scan], check=True), wrapped.explain(scan)
    np.testing.assert_allclose(found.unbounded, own.unbounded, atol=1e-4)
    assert found.view == own.view
    with pytest.raises(bla.BlaError, match="expected photos of 3 channels, got 1"):
        export(wrapped, tmp_path / "photos.onnx", entry="photos")


def test_a_comparison_is_of_photos(wrapped: ExplainableClassifier) -> None:
    with pytest.raises(bla.BlaError, match="expected a classifier of photos, got one of volumes"):
        bla.compare(wrapped, [volume()])
    three = explainable(Net(mean, 3).eval(), transform=Transform(SIZE, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(DataError, match=r"of shape \(d, h, w, 3\) or \(3, d, h, w\), got \(9, 9, 3\)"):
        three.explain(np.zeros((9, 9, 3), np.uint8))


def test_another_transform_is_asked_for() -> None:
    with pytest.raises(ClassifierError, match="trained with, whose size has 3 numbers, depth first, and whose mean"):
        explainable(Net(mean))
