"""Explaining, caching, masked answers and training on one GPU, against the bare loops and other libraries. Markdown.

    python -m benchmarks.gpu.measure [--device cuda] [--models ...] [--batches ...] [--photos N] [--rounds N]

Weights and photos are random: they change no cost. Times are medians of rounds in turn, each of which ends with a
synchronisation. pytorch-grad-cam and captum explain the same tensors on the same card.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.results import parser_of
from benchmarks.speed.masked_answers import answered, bare, write_photos
from bla.data.image_sets import ImageSet
from bla.model.classifier import ExplainableClassifier, explainable
from bla.training.cache import FeatureCache, cached_features
from bla.training.loop import train_networks
from bla.training.networks import Examples, Networks, new_head
from bla.training.settings import Settings

MODELS = ("resnet50", "convnext_tiny", "vit_base_patch16_224")
COUNT = 16
"""Masked copies of a photo."""


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call, after two rounds that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def last_convolution(model: nn.Module) -> nn.Module | None:
    """What Grad-CAM hooks; None for a transformer of tokens."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return found[-1] if len(found) > 1 else None


def explaining(model: nn.Module, wrapped: ExplainableClassifier, batch: int, rounds: int, device: torch.device) -> str:
    """A row: milliseconds a photo of the plain and the explained prediction, and of two libraries over it."""
    pixels = torch.randn(batch, 3, *wrapped.transform.size, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)

    def without_gradients(call: Callable[[Tensor], object]) -> Callable[[], object]:
        return torch.inference_mode()(lambda: call(pixels))

    calls = {"plain": without_gradients(model), "explained": without_gradients(wrapped)}
    if (layer := last_convolution(model)) is not None:
        from captum.attr import LayerGradCam
        from pytorch_grad_cam import GradCAM

        grad_cam, layer_cam = GradCAM(model=model, target_layers=[layer]), LayerGradCam(model, layer)
        calls["grad-cam"] = lambda: grad_cam(input_tensor=pixels, targets=None)
        calls["captum"] = lambda: layer_cam.attribute(pixels, target=0)
    found = in_turn(calls, rounds, device)
    ours = found["explained"]
    each = [f"{1e3 * found[name] / batch:.3f}" for name in ("plain", "explained")]
    others = [f"{found[name] / ours:.1f}" if name in found else "-" for name in ("grad-cam", "captum")]
    return " | ".join([str(batch), *each, f"{ours / found['plain']:.3f}", *others])


def caching(wrapped: ExplainableClassifier, images: ImageSet, device: torch.device) -> str:
    """A row: photos a second of the passes alone over ready tensors, and of caching."""
    ready = wrapped.pixels(np.zeros((16, *wrapped.transform.size, 3), np.uint8))

    @torch.inference_mode()
    def passes() -> None:
        for start in range(0, len(images), len(ready)):
            wrapped.trunk(ready[: len(images) - start])

    bare_seconds = in_turn({"bare": passes}, 1, device)["bare"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cached_features(wrapped, images, root=Path(folder))
        seconds = time.perf_counter() - began
        return f"caching | {len(images) / bare_seconds:.0f} | {len(images) / seconds:.0f} |"


def training(wrapped: ExplainableClassifier, device: torch.device) -> str:
    """A row: photos a second of two stages on features in memory."""
    channels, rows = wrapped.attention.in_channels - wrapped.attention.earlier, 2048
    maps = np.random.default_rng(0).random((256, 7, 7, channels), np.float32).astype(np.float16)
    features = np.resize(maps, (rows, *maps.shape[1:]))
    cache = FeatureCache(Path(), features, features.mean(axis=(1, 2), dtype=np.float32), ())
    settings = Settings(epochs=1)
    networks = Networks(settings.attention(channels), new_head(channels, 100, 0.2), own_head=False).to(device)
    began = time.perf_counter()
    train_networks(networks, settings, Examples(cache, np.arange(rows), np.arange(rows) % 100))
    wait(device)
    return f"training, three stages of an epoch | | {3 * rows / (time.perf_counter() - began):.0f} |"


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64, 256])
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, float32, channels last\n")
    print("| model | batch | plain, ms a photo | explained | over plain | grad-cam over ours | captum over ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for title in arguments.models:
        model = timm.create_model(title).eval().to(device, memory_format=torch.channels_last)
        wrapped = explainable(model, name=title).to(device)
        for batch in arguments.batches:
            print(f"| {title} | {explaining(model, wrapped, batch, arguments.rounds, device)} |", flush=True)
    wrapped = explainable(timm.create_model(arguments.models[0]), name=arguments.models[0]).to(device)
    print("\n| photos a second | bare passes | ours |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        images = write_photos(Path(folder), arguments.photos)
        print(f"| {caching(wrapped, images, device)}", flush=True)
        few = images.subset(np.arange(max(2, len(images) // 8)))
        loop, passes = bare(wrapped, len(few), COUNT), len(few) * (COUNT + 1)
        loop()
        alone, ours = loop()[0], answered(wrapped, few, COUNT)[0]
        print(f"| masked answers, passes | {passes / alone:.0f} | {passes / ours:.0f} |", flush=True)
    print(f"| {training(wrapped, device)}")


if __name__ == "__main__":
    main()
