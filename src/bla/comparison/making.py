"""Methods by name, and their explanations of all photos, each cut to the size that the run chose."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bla.comparison.keeping import PeakMemory, Writer, wait
from bla.comparison.methods import (
    Batch,
    ComparisonError,
    Method,
    PooledClassifier,
    cam,
    centre_disc,
    feature_norm,
    grad_cam_family,
    integrated_gradients,
    l2x,
    learned_mask,
    occlusion,
    random_cells,
    score_cam,
    softmax_attention,
)
from bla.comparison.subjects import Subjects, labels_of, size_of
from bla.explanations.explanation import Explanation, Prediction
from bla.metrics import top_cells
from bla.progress import Progress
from bla.runs import run as runs

RUN = "bla"
"""The name of the run's own method in results, whatever its setup."""

CHEAP = (
    RUN, "cam", "grad-cam", "grad-cam++", "layer-cam", "softmax-attention", "l2x", "learned-mask",
    "random", "centre", "norm", "shuffled",
)  # fmt: skip
"""Methods that read the feature map alone: what is compared by default."""
COSTLY = ("score-cam", "integrated-gradients", "occlusion")
"""Methods that run the whole network many times a photo."""
ALL = (*CHEAP, *COSTLY)
"""As the command names them; ``all`` stands for all of them."""

TRAINED = ("softmax-attention", "l2x", "learned-mask")
"""Rivals that need the run's training images."""
_BATCH = 16


def method_names(methods: Sequence[str]) -> list[str]:
    wanted = list(ALL) if "all" in methods else list(methods)
    unknown = [name for name in wanted if name not in (*ALL, "hires-cam")]
    if unknown:
        raise ComparisonError(f"expected methods among {', '.join(ALL)}, hires-cam or all, got {', '.join(unknown)}")
    return [RUN, *(name for name in dict.fromkeys(wanted) if name != RUN)]


class Methods:
    """Builds methods by name; what they need to be trained or run is at hand here."""

    def __init__(
        self,
        opened: runs.Run,
        pooled: PooledClassifier,
        training: Subjects | None,
        *,
        seed: int,
        report: Progress,
    ) -> None:
        self.opened = opened
        self.pooled = pooled
        self.training = training
        self.seed = seed
        self.place = next(opened.classifier.attention.parameters()).device
        self.report = report

    def build(self, name: str) -> Method:
        """The method of that name."""
        simple: dict[str, Callable[[], Method]] = {
            RUN: self._run,
            "cam": lambda: cam(self.pooled),
            "score-cam": lambda: score_cam(self.pooled),
            "integrated-gradients": lambda: integrated_gradients(self.pooled),
            "occlusion": lambda: occlusion(self.pooled),
            "random": lambda: random_cells(self.seed),
            "centre": centre_disc,
            "norm": feature_norm,
            "softmax-attention": lambda: softmax_attention(*self._trained(name), seed=self.seed),
            "l2x": lambda: l2x(*self._trained(name), seed=self.seed),
            "learned-mask": lambda: learned_mask(
                *self._trained(name), classes=len(self.opened.classifier.classes), seed=self.seed
            ),
        }
        if name in simple:
            return simple[name]()
        return grad_cam_family(self.pooled, name)  # type: ignore[arg-type]  # one of the CAM family's names

    def _trained(self, name: str) -> tuple[PooledClassifier, Callable[[npt.NDArray[np.int64]], Tensor], Tensor]:
        assert self.training is not None
        self.report(f"training {name} for comparison", 0, 0)
        training, place = self.training, self.place
        labels = labels_of(training, self.pooled, place)
        return self.pooled, lambda rows: training.features(rows).to(place), labels

    def _run(self) -> Method:
        attention = self.opened.classifier.attention
        aware = "target" in inspect.signature(attention.forward).parameters

        @torch.no_grad()
        def maps(batch: Batch) -> Tensor:
            found: Tensor = attend(attention, batch.features, batch.targets if aware else None).unbounded
            return found

        @torch.no_grad()
        def sizes(batch: Batch) -> Tensor:
            hard: Tensor = attend(attention, batch.features, batch.targets if aware else None).hard
            return (hard > 0).sum(dim=(1, 2))

        note, head = "the run's own; it chooses the sizes", self.opened.networks.head
        return Method(RUN, str(self.opened.record["setup"]), "own", aware, maps, note, head=head, sizes=sizes)

    @torch.no_grad()
    def forward_ms(self) -> float:
        """Milliseconds of one photo's plain forward pass, of a batch of 8: what every method's cost comes on top of."""
        height, width = self.opened.classifier.transform.size
        pixels = torch.zeros(8, 3, height, width, device=self.place)
        self.pooled(pixels)
        started = time.perf_counter()
        self.pooled(pixels)
        wait(self.place)
        return round((time.perf_counter() - started) * 1000 / 8, 2)


def attend(attention: torch.nn.Module, features: Tensor, targets: Tensor | None) -> Any:
    return attention(features) if targets is None else attention(features, target=targets)


def explained(
    method: Method,
    opened: runs.Run,
    subjects: Subjects,
    predictions: Mapping[str, Tensor],
    *,
    sizes: Tensor | None,
    writer: Writer,
    report: Progress,
) -> list[Explanation]:
    """The method's explanations of all photos, those that are on disk read from there."""
    classifier = opened.classifier
    place = next(classifier.attention.parameters()).device
    found = writer.open()
    title = f"explaining by {method.title}"
    with writer, torch.inference_mode(not method.needs_pixels):
        for start in range(len(found), len(subjects), _BATCH):
            indices = np.arange(start, min(start + _BATCH, len(subjects)))
            pixels, regions = _pixels(opened, subjects, indices, needed=method.needs_pixels)
            features = subjects.features(indices).to(place)
            targets = predictions["index"][indices].to(place)
            peak, begun = PeakMemory(place), time.perf_counter()
            if method.needs_pixels and pixels is not None:
                features = classifier.trunk(pixels)
            maps = method.maps(Batch(features, targets, torch.from_numpy(indices), pixels)).float()
            wait(place)
            seconds, memory = time.perf_counter() - begun, peak.bytes()
            if method.name == RUN:
                selection = attend(classifier.attention, features, targets if method.class_specific else None)
                wanted = (selection.hard > 0).cpu()
                scores, soft = selection.scores.float().cpu(), selection.soft.float().cpu()
                probabilities = classifier.classify(features, selection.hard).float().softmax(-1).cpu()
            else:
                assert sizes is not None
                wanted = top_cells(maps.cpu(), sizes[indices])
                least = maps.cpu().masked_fill(~wanted, float("inf")).amin(dim=(1, 2), keepdim=True)
                scores, soft = (maps.cpu() - least).clamp(max=0), None
                probabilities = predictions["probabilities"][indices]
            fresh = []
            for place_in_batch, index in enumerate(indices):
                top = probabilities[place_in_batch].topk(min(5, probabilities.shape[1]))
                guesses = [
                    Prediction(int(number), classifier.classes[int(number)], min(float(share), 1.0))
                    for share, number in zip(top.values, top.indices, strict=True)
                ]
                fresh.append(
                    Explanation(
                        image=subjects.name(int(index)),
                        prediction=guesses[0],
                        top=tuple(guesses),
                        method=method.name if method.name != RUN else "BLA",
                        target=int(targets[place_in_batch]) if method.class_specific else None,
                        grid=(maps.shape[1], maps.shape[2]),
                        unbounded=maps[place_in_batch].cpu().numpy(),
                        scores=scores[place_in_batch].numpy(),
                        soft=None if soft is None else soft[place_in_batch].numpy(),
                        selected=wanted[place_in_batch].numpy(),
                        region=regions[place_in_batch],
                        model=classifier.name,
                        setup=classifier.setup if method.name == RUN else method.title,
                    )
                )
            writer.append(fresh, seconds, memory)
            found += fresh
            report(title, len(found), len(subjects))
    return found


def _pixels(
    opened: runs.Run, subjects: Subjects, indices: npt.NDArray[np.int64], *, needed: bool
) -> tuple[Tensor | None, list[tuple[float, float, float, float]]]:
    """Normalised pixels where they are needed, and the region of each photo that the grid covers."""
    transform, classifier = opened.classifier.transform, opened.classifier
    if not needed:
        return None, [transform.region(size_of(Path(subjects.name(int(index))))) for index in indices]
    photos = [transform.read(subjects.name(int(index))) for index in indices]
    pixels = classifier.pixels(np.stack([photo.pixels for photo in photos]))
    return pixels.contiguous(memory_format=torch.channels_last), [photo.region for photo in photos]
