"""Does a classifier say of our pixels what it says of timm's own pipeline?

    python -m benchmarks.faithfulness.preprocessing FOLDER ... --model tf_efficientnet_lite0

Each folder's photos go through timm's evaluation transform, through ours, and through a squash. A classifier that
timm's loader lacks is named as package.module:callable, with its weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from benchmarks.results import parser_of
from bla.data.image_sets import list_images
from bla.data.photo import Transform, open_photo
from bla.model.backbones import LITE0, load_backbone
from bla.model.preprocessing import transform_of


def same_padded() -> nn.Module:
    """MobileNetV2 with TensorFlow's padding and input range, without weights."""
    half = (0.5, 0.5, 0.5)
    return timm.create_model("mobilenetv2_100", pad_type="same", pretrained_cfg_overlay={"mean": half, "std": half})


def normalised(path: Path, transform: Transform) -> Tensor:
    """A photo's pixels (3, H, W) as our pipeline gives them."""
    pixels = torch.from_numpy(transform.read(path).pixels).float() / 255
    return ((pixels - torch.tensor(transform.mean)) / torch.tensor(transform.std)).permute(2, 0, 1)


@torch.inference_mode()
def compared(model: nn.Module, photos: list[Path], batch: int = 20) -> dict[str, Any]:
    """Shares of photos with timm's prediction and with timm's pixels, for our pipeline and for a squash."""
    timms = create_transform(**resolve_model_data_config(model), is_training=False)
    pipelines: dict[str, Callable[[Path], Tensor]] = {"timm": lambda path: timms(open_photo(path))}
    for name, transform in (("ours", transform_of(model)), ("squash", transform_of(model, "squash"))):
        pipelines[name] = lambda path, transform=transform: normalised(path, transform)  # type: ignore[misc]
    same: dict[str, list[Any]] = {name: [] for name in ("ours", "squash", "pixels")}
    for start in range(0, len(photos), batch):
        chunk = photos[start : start + batch]
        inputs = {name: torch.stack([read(path) for path in chunk]) for name, read in pipelines.items()}
        said = {name: model(pixels).argmax(dim=1) for name, pixels in inputs.items()}
        for name in ("ours", "squash"):
            same[name] += (said[name] == said["timm"]).tolist()
        same["pixels"] += torch.isclose(inputs["ours"], inputs["timm"], atol=1e-5).flatten(1).all(dim=1).tolist()
    return {"photos": len(photos)} | {name: float(np.mean(values)) for name, values in same.items()}


def main() -> None:
    """Compare on every folder, print."""
    parser = parser_of(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="photos")
    parser.add_argument("--model", default=LITE0, help="a timm model, or package.module:callable")
    parser.add_argument("--weights", help="a file of its weights, or random")
    parser.add_argument("--photos", type=int, default=300, help="of each folder, drawn with seed 0")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model, results = load_backbone(arguments.model, arguments.weights), {}
    for folder in arguments.folders:
        photos = list_images([folder])
        drawn = np.random.RandomState(0).permutation(len(photos))[: arguments.photos]
        results[str(folder)] = compared(model, [photos[index] for index in sorted(drawn)])
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{arguments.model}, {transform_of(model).in_words()}; shares of photos:")
    print("| folder | photos | timm's prediction | by a squash | timm's pixels |\n|" + " --- |" * 5)
    for name, found in results.items():
        shares = " | ".join(f"{found[key]:.3f}" for key in ("ours", "squash", "pixels"))
        print(f"| {name} | {found['photos']} | {shares} |")


if __name__ == "__main__":
    main()
