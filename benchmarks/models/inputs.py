"""What classifiers are shown, and how it is prepared: arrays, volumes, and preprocessing that is code.

Of each the probability that is explained is held against the classifier's own, by its own preprocessing.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn
from torchvision import transforms as v1
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from bla.data.photo import Transform
from bla.model.classifier import explainable

Miss = Callable[[], float]
RANDOM = np.random.default_rng(0)
TO_FLOAT = v2.ToDtype(torch.float32, scale=True)


def net(channels: int, rank: int = 2) -> nn.Module:
    """A classifier of pictures or volumes."""
    torch.manual_seed(0)
    convolution, pooling = ((nn.Conv2d, nn.AdaptiveAvgPool2d), (nn.Conv3d, nn.AdaptiveAvgPool3d))[rank - 2]
    return nn.Sequential(
        convolution(channels, 8, 8, 8), nn.ReLU(), pooling(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()  # fmt: skip


def miss(model: nn.Module, transform: Any, image: Any, given: Any) -> float:
    """How far the probability that is explained is from the classifier's own for the input ``given``."""
    why = explainable(model, transform=transform).explain(image)[0]
    why.picture()
    with torch.no_grad():
        own = model(torch.as_tensor(given, dtype=torch.float32)[None]).softmax(-1)
    assert why.classifier is not None
    return abs(why.classifier.probability - float(own.max()))


def encoded(array: Any, kind: str = "PNG") -> bytes:
    Image.fromarray(array).save(stream := io.BytesIO(), kind)
    return stream.getvalue()


def arrays() -> Iterator[tuple[str, str, Miss]]:
    """Channels, types, layouts and volumes: kind, name and what measures the miss."""
    kinds: dict[str, tuple[tuple[int, ...], int, Any, tuple[float, float] | None]] = {
        "grey, 8 bits": ((32, 48), 1, np.uint8, None), "grey, 16 bits": ((32, 48), 1, np.uint16, None),
        "grey, 12 bits in 16": ((32, 48), 1, np.uint16, (0, 4095)), "grey, floats": ((32, 48), 1, np.float32, (0, 1)),
        "2 channels": ((32, 48), 2, np.uint8, None), "4 channels": ((32, 48), 4, np.float32, (0, 1)),
        "11 channels": ((32, 48), 11, np.int16, (-100, 10000)), "RGB, 16 bits": ((32, 48), 3, np.uint16, None),
        "RGB, float64": ((32, 48), 3, np.float64, (-1, 1)), "half precision": ((32, 48), 5, np.float16, (0, 1)),
        "a CT": ((16, 32, 48), 1, np.int16, (-1024, 3071)), "a video": ((8, 32, 48), 3, np.uint8, None),
        "a volume of 4 channels": ((8, 32, 24), 4, np.float32, (0, 9)),
    }  # fmt: skip
    for name, (size, channels, dtype, value_range) in kinds.items():
        low, high = value_range or (0, np.iinfo(dtype).max)
        array = (low + (high - low) * RANDOM.random((*size, channels))).astype(dtype)
        given = np.moveaxis(((array.astype(np.float64) - low) / (high - low) - 0.5) / 0.25, -1, 0)
        view = Transform(size, (0.5,) * channels, (0.25,) * channels, value_range=value_range)
        model = net(channels, len(size))
        kind = "volume" if len(size) == 3 else "channels"
        yield kind, name, lambda a=array, g=given, v=view, m=model: miss(m, v, a, g)
        first = np.moveaxis(array, -1, 0)
        yield kind, f"{name}, channels first", lambda a=first, g=given, v=view, m=model: miss(m, v, a, g)
        if name == "grey, 12 bits in 16":
            stored = encoded(array[..., 0])
            yield kind, f"{name}, in a PNG", lambda a=stored, g=given, v=view, m=model: miss(m, v, a, g)
    floats = RANDOM.random((32, 48, 3))
    view = Transform((32, 48), (0.5,) * 3, (0.25,) * 3)
    yield "channels", "floats without a range", lambda: miss(net(3), view, floats, floats.transpose(2, 0, 1))


def preprocessing() -> Iterator[tuple[str, str, Miss]]:
    """Code from a photo to an input."""
    photo = Image.fromarray(RANDOM.integers(0, 256, (90, 120, 3), np.uint8))
    resize = v1.Resize((32, 48))
    compose = v1.Compose
    codes: dict[str, Any] = {
        "torchvision": compose([v1.Resize(48), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize((0.4,) * 3, (0.2,) * 3)]),
        "torchvision's weights": ResNet18_Weights.DEFAULT.transforms(),
        "v2": v2.Compose([v2.Resize((32, 48)), v2.ToImage(), TO_FLOAT]),
        "v2, of tensors": v2.Compose([v2.ToImage(), v2.Resize((32, 48)), TO_FLOAT]),
        "timm": create_transform((3, 32, 32), is_training=False, crop_pct=0.8),
        "timm, padded": create_transform((3, 32, 32), is_training=False, crop_mode="border"),
        "grey": compose([v1.Grayscale(), resize, v1.ToTensor()]),
        "padded": compose([v1.Pad(9), resize, v1.ToTensor()]),
        "mirrored": compose([resize, v1.functional.hflip, v1.ToTensor()]),
        "standardised": compose([resize, v1.ToTensor(), lambda x: (x - x.mean()) / x.std()]),
        "equalised": compose([resize, v1.functional.equalize, v1.ToTensor()]),
        "by hand": lambda image: np.asarray(image, np.float32)[:32, :48].transpose(2, 0, 1) / 127.5 - 1,
        "random": compose([v1.RandomCrop(32), v1.ToTensor()]),
        "of any size": compose([v1.Resize(32), v1.ToTensor()]),
        "no tensor": resize,
    }
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        size = {"size": {"height": 32, "width": 48}}
        odd = {"rescale_factor": 1 / 100, "image_mean": [0.1, 0.2, 0.3], "resample": 3}
        codes |= {
            "ViT's processor": transformers.ViTImageProcessor(**size),
            "ViT's processor, odd settings": transformers.ViTImageProcessor(**size, **odd),
            "EfficientNet's processor": transformers.EfficientNetImageProcessor(**size, rescale_offset=True),
            "MobileViT's processor": transformers.MobileViTImageProcessor(),
            "DETR's processor": transformers.DetrImageProcessor(),
        }
    for name, code in codes.items():

        def measured(code: Any = code, channels: int = 1 if name == "grey" else 3) -> float:
            def own() -> torch.Tensor:
                if hasattr(code, "model_input_names"):
                    return torch.as_tensor(code(images=photo, return_tensors="pt")["pixel_values"][0])
                return torch.as_tensor(code(photo))

            explainable(net(channels), transform=code)  # whose refusal says more than the code does
            return miss(net(channels), code, photo, own())

        yield "preprocessing", name, measured
