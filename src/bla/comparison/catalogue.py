"""Methods by name, and the setting that they are built in."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bla import meant
from bla.comparison.methods import controls, libraries, logits, sampled, trained
from bla.comparison.methods.method import RUN, Batch, Cells, ComparisonError, Method, PooledClassifier
from bla.comparison.photos import Photos
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier
from bla.progress import Progress, silent
from bla.runs.run import Run


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A wrapped classifier to compare methods on."""

    classifier: ExplainableClassifier
    seed: int = 0

    @functools.cached_property
    def pooled(self) -> PooledClassifier:
        """The classifier without attention."""
        return PooledClassifier(self.classifier.trunk, self.classifier.head).eval()


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What methods are built for: a run, photos, the training images if any method needs them, a seed.

    ``ranking`` holds the run's own maps of the photos (N, H, W), once they are made.
    """

    photos: Photos
    training: Photos | None = None
    ranking: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    seed: int = 0
    report: Progress = silent

    @property
    def run(self) -> Run:
        """The run, from which all photos have their features."""
        return self.photos.run

    @property
    def classifier(self) -> ExplainableClassifier:
        return self.run.classifier

    @property
    def device(self) -> torch.device:
        return self.run.networks.device

    @functools.cached_property
    def pooled(self) -> PooledClassifier:
        """The run's classifier without attention."""
        return PooledClassifier(self.run.classifier.trunk, self.run.networks.baseline).eval()

    @functools.cached_property
    def digest(self) -> str:
        """Of all that a method's explanations depend on besides the method."""
        images, seed = self.photos.images, self.seed
        weights = [weights_digest(self.run.classifier), weights_digest(self.run.networks)]
        parts = [weights, images.digest(), str(images.root), self.photos.rows.tolist(), seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def lessons(self) -> tuple[PooledClassifier, trained.Features, Tensor]:
        """What a rival is trained on: the classifier, and the features and labels of the training images."""
        assert self.training is not None
        return self.pooled, self.training.features, self.training.judged.clone().to(self.device)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """How a method is built, and what that takes.

    Attributes
    ----------
    build: from a :class:`Setting`; of a method that is not trained on images, also from a :class:`Subject`.
    costly: runs the whole network many times per photo.
    trained: needs the run's training images.
    rebuilds: can be built on a randomised network without training anything.
    optional: compared only if named.
    library: needs the packages of the extra ``compare``.
    """

    build: Callable[[Any], Method]
    costly: bool = False
    trained: bool = False
    rebuilds: bool = False
    optional: bool = False
    library: bool = False


def _cam_kind(name: libraries.CamName, **flags: Any) -> Kind:
    return Kind(lambda s: libraries.grad_cam_family(s.pooled, name), rebuilds=True, library=True, **flags)


def _own(setting: Setting) -> Method:
    """The run's attention with the head that reads its selection; it chooses the sizes for all other methods."""
    run, aware = setting.run, setting.run.settings.selection.class_aware

    @torch.no_grad()
    def select(batch: Batch) -> Cells:
        found = run.classifier.attention(batch.features, target=batch.targets if aware else None)
        return Cells(found.unbounded, found.scores, found.soft, found.hard > 0, found.hard)

    title, note = run.record["setup"], "the run's own; it chooses the sizes"
    head = run.networks.head
    return Method(RUN, title, "own", aware, lambda batch: select(batch).unbounded, note, head=head, select=select)


METHODS = {
    "random": Kind(lambda s: controls.random_cells(s.seed)),
    "centre": Kind(lambda s: controls.centre_disc()),
    "norm": Kind(lambda s: controls.feature_norm(s.classifier.attention.earlier), rebuilds=True),
    "cam": Kind(lambda s: logits.cam(s.pooled), rebuilds=True),
    RUN: Kind(_own, rebuilds=True),
    "cam-3x3": Kind(lambda s: logits.smoothed(logits.cam(s.pooled)), rebuilds=True),
    "c-e": Kind(lambda s: logits.c_minus_e(s.pooled), rebuilds=True),
    "c-e-3x3": Kind(lambda s: logits.smoothed(logits.c_minus_e(s.pooled)), rebuilds=True),
    "finer-cam": _cam_kind("finer-cam"),
    "grad-cam": _cam_kind("grad-cam"),
    "grad-cam++": _cam_kind("grad-cam++"),
    "layer-cam": _cam_kind("layer-cam"),
    "softmax-attention": Kind(lambda s: trained.softmax_attention(*s.lessons, seed=s.seed), trained=True),
    "l2x": Kind(lambda s: trained.l2x(*s.lessons, seed=s.seed), trained=True),
    "learned-mask": Kind(lambda s: trained.learned_mask(*s.lessons, seed=s.seed), trained=True),
    "shuffled": Kind(lambda s: controls.another_images(s.run.record["setup"], s.ranking)),
    "score-cam": Kind(lambda s: libraries.score_cam(s.pooled), costly=True, library=True),
    "integrated-gradients": Kind(lambda s: libraries.integrated_gradients(s.pooled), costly=True, library=True),
    "occlusion": Kind(lambda s: libraries.occlusion(s.pooled), costly=True, library=True),
    "refine-cam": Kind(lambda s: libraries.refine_cam(s.pooled), costly=True, optional=True, library=True),
    "rise": Kind(lambda s: sampled.rise(s.pooled, seed=s.seed), costly=True, optional=True),
    "kernel-shap": Kind(lambda s: sampled.kernel_shap(s.pooled, seed=s.seed), costly=True, optional=True),
    "hires-cam": _cam_kind("hires-cam", optional=True),  # at the last map with a linear head it is CAM
}
"""In the order of every table: what a trivial ranking scores first, then the run's own, then the rivals."""
ALL = tuple(name for name, kind in METHODS.items() if not kind.optional)
"""As the command names them; ``all`` stands for all of them."""
UNTRAINED = tuple(name for name, kind in METHODS.items() if not kind.trained and name not in (RUN, "shuffled"))
"""Methods that need a classifier and photos alone."""
CHEAP = tuple(name for name in ALL if not METHODS[name].costly)
"""Methods that read the feature map alone: those compared by default."""


def method_names(methods: Sequence[str]) -> list[str]:
    """The names of the methods to compare, the run's own first."""
    wanted = list(ALL) if "all" in methods else list(methods)
    if unknown := [name for name in wanted if name not in METHODS]:
        near = meant(unknown[0], METHODS)
        raise ComparisonError(f"expected methods among {', '.join(METHODS)} or all, got {', '.join(unknown)}{near}")
    return [*dict.fromkeys((RUN, *wanted))]
