"""Photos, features and networks small enough to train on in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bla.training.cache import FeatureCache
from bla.training.networks import Examples, Networks, new_head
from bla.training.settings import Settings

CHANNELS, GRID = 8, (3, 5)
CLASSES = ("class 0", "class 1", "class 2")


class Tiny(nn.Module):
    """A classifier that speaks as timm's do, with an input and a grid that are not square."""

    num_features = CHANNELS
    pretrained_cfg = {  # noqa: RUF012
        "architecture": "tiny", "input_size": (3, 24, 40), "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.4, 0.5),
        "interpolation": "bilinear", "crop_pct": 0.8,
    }  # fmt: skip

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, CHANNELS, 8, stride=8)
            self.fc = nn.Linear(CHANNELS, len(CLASSES))

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.stem(pixels).relu()

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(features.mean(dim=(2, 3)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))


def photo(index: int, label: int) -> Image.Image:
    """Noise with a patch in the class's colour somewhere, 50 x 30."""
    rng = np.random.default_rng([index, label])
    pixels = rng.integers(0, 120, (30, 50, 3), dtype=np.uint8)
    top, left = rng.integers(0, 18), rng.integers(0, 36)
    pixels[top : top + 12, left : left + 14, label] = 250
    return Image.fromarray(pixels)


def write_classes(folder: Path, count: int = 12, classes: tuple[str, ...] = CLASSES) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            photo(index, label).save(folder / name / f"{index:02}.{'jpg' if index % 2 else 'png'}")
    return folder


def some_photos(count: int = 15) -> list[Image.Image]:
    return [photo(index, index % 3) for index in range(count)]


def as_files(folder: Path) -> list[Path]:
    folder.mkdir()
    for index, image in enumerate(some_photos()):
        image.save(folder / f"photo {index}.png")
    return [folder / f"photo {index}.png" for index in range(15)]


# --- features without photos

MAP_CLASSES, MAP_CHANNELS, MAP_GRID = 3, 6, (3, 4)


def make_examples(count: int = 40, *, seed: int = 0) -> Examples:
    """Cells of noise; a few cells of each map show its class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, MAP_CLASSES, count)
    features = rng.random((count, *MAP_GRID, MAP_CHANNELS), np.float32)
    for image, label in enumerate(labels):
        for _ in range(3):
            features[image, rng.integers(MAP_GRID[0]), rng.integers(MAP_GRID[1]), label] += 2
    cache = FeatureCache(Path(), features, features.mean(axis=(1, 2)), ())
    rows = rng.permutation(count)  # rows need not be in order, and labels go with them
    return Examples(cache, rows, labels[rows])


def make_networks(settings: Settings, *, seed: int = 0) -> Networks:
    own = settings.own_head
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        attention = settings.attention(MAP_CHANNELS)
        baseline = new_head(MAP_CHANNELS, MAP_CLASSES, settings.head.dropout)
        if own:  # something else than what we build, and it tells the classes well enough
            baseline = nn.Sequential(nn.Linear(MAP_CHANNELS, 8), nn.Tanh(), nn.Linear(8, MAP_CLASSES), nn.Dropout(0.5))
    return Networks(attention, baseline, own_head=own)


def tensors(networks: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in networks.state_dict().items()}


def assert_same(came: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert came.keys() == expected.keys()
    assert [name for name in came if not torch.equal(came[name], expected[name])] == []


def part(networks: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in networks.items() if key.startswith(f"{name}.")}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
