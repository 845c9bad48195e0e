"""Are the explainer's cells better than those of other explainers that learn on the same frozen classifier?

    python -m benchmarks.faithfulness.learned EXPLAINER PHOTOS --training FOLDER --out OUT [--cache CACHE]

Three papers' losses on the photos that `bla train FOLDER` learns from; PHOTOS must be others. L-CAM and T-TAME: a mask
that keeps the class. NN-Explainer and COMET: a mask that keeps the class, and leaves nothing that tells it. FastSHAP:
values regressed on the answers to masked copies, those that the explainer learnt from, in the cache. Pixels are filled
as the judgement fills them, which favours the rivals. Starts and then settings are tried, and the best for longer;
`own_prediction` judges on PHOTOS what is best by photos that `bla train` holds out, of the papers' kind, with a channel
for every class, and with the explainer's own network. What is trained or judged is kept in OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.faithfulness.own_prediction import (
    batches,
    compare,
    opened,
    parser_of_explainers,
    read_photos,
    rivals,
    row,
)
from benchmarks.faithfulness.passes import Network, fastest
from benchmarks.results import digest, kept
from bla.comparison.methods import Batch, Method, PooledClassifier
from bla.data.image_sets import Splits
from bla.data.masking import FILLS, enlarged, filled
from bla.data.published import read_images
from bla.metrics import top_cells
from bla.metrics.fitting import Rows, fit_minibatches
from bla.metrics.pixels import SHARES
from bla.model.classifier import ExplainableClassifier
from bla.model.evidence import linear_layer
from bla.model.own_prediction import OwnPredictionAttention
from bla.progress import show
from bla.training.cache import FeatureCache, cached_features
from bla.training.masked import LEAST_ANSWER, MaskedAnswers, masked_answers

BATCH = 8
"""Photos of a step; more take longer each, with gradients on a CPU."""
CONTROLS = ("random", "centre", "norm", "cam", "c-e-3x3")
STARTS = ("new", "head", "c - E")
"""A channel for every class, as in the papers, from random weights or from the head's own; the explainer's network."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lessons:
    """Photos to learn from.

    Attributes
    ----------
    network, asked: the classifier with gradients, and a faster one without.
    photos, held: uint8 (N, h, w, 3), to learn from and to choose by.
    answers: of the classifier to masked copies of them.
    ends: (N, 2), the log-probability of the predicted class where every pixel is filled, and of the photo.
    out: where the trained weights are kept.
    """

    classifier: ExplainableClassifier
    network: PooledClassifier
    asked: Network
    photos: np.ndarray
    held: np.ndarray
    features: FeatureCache
    answers: MaskedAnswers
    ends: Tensor
    out: Path
    seed: int

    def targets(self, rows: Rows) -> Tensor:
        """The predicted classes (B,)."""
        return torch.from_numpy(self.answers.targets[rows])

    def logits(self, rows: Rows, *masks: Tensor) -> list[Tensor]:
        """What the whole classifier says, (B, K), of photos under each of some masks (B, H, W), values from 0 to 1."""
        pixels = self.classifier.pixels(self.photos[rows])
        fills = filled(pixels)
        return [
            self.network((fills + enlarged(each, pixels)[:, None] * (pixels - fills)).contiguous()) for each in masks
        ]


Loss = Callable[[Lessons, Rows, Tensor], Tensor]
"""The mean loss of photos, by their rows and the scores (B, H, W) of their cells for the predicted class."""


def variation(masks: Tensor) -> Tensor:
    """Half the squared differences of neighbours in masks (B, H, W), summed; the mean over the photos."""
    squares = masks.diff(dim=1).square().sum(dim=(1, 2)) + masks.diff(dim=2).square().sum(dim=(1, 2))
    return squares.mean() / 2


def l_cam(lessons: Lessons, rows: Rows, scores: Tensor, *, area: float) -> Tensor:
    r"""L-CAM-Img (Gkartzonika et al. 2022), whose loss T-TAME (Ntrougkas et al. 2024) keeps; there the area counts 2.

    .. math:: 1.5 \, \mathrm{CE}(m x) + \lambda \, \overline{m^{0.3}} + 0.01 \, \mathrm{TV}(m), \quad m = \sigma(s)
    """
    shown = scores.sigmoid()
    error = functional.cross_entropy(*lessons.logits(rows, shown), lessons.targets(rows))
    total: Tensor = 1.5 * error + area * (shown + 0.0005).pow(0.3).mean() + 0.01 * variation(shown)
    return total


def bounded_area(masks: Tensor, least: float = 0.05, most: float = 0.3) -> Tensor:
    """NN-Explainer's bounds: what the largest cells of masks lack to 1, and what all beyond ``most`` of them have."""
    ranked = masks.flatten(1).sort(dim=1, descending=True).values
    cells = ranked.shape[1]
    lacking, beyond = (1 - ranked[:, : int(least * cells)]).sum(dim=1), ranked[:, int(most * cells) :].sum(dim=1)
    return (lacking + beyond).mean() / cells


def remainder(lessons: Lessons, rows: Rows, scores: Tensor, *, left: str, weight: float) -> Tensor:
    r"""NN-Explainer (Stalder et al. 2022): what is kept gives the class, what is left is as uncertain as can be.

    .. math:: \mathrm{CE}(m x) - w \, H((1 - m) x) / \log K + \text{bounds} + 0.01 \, (\overline{m} + \mathrm{TV}(m))

    With left "class" the second term is :math:`-w \log(1 - p_c)` of the remainder, after COMET (2024), in which the
    frozen classifier takes the place of a detector that is trained on remainders.
    """
    shown, targets = scores.sigmoid(), lessons.targets(rows)
    kept_alone, left_alone = lessons.logits(rows, shown, 1 - shown)
    error, said = functional.cross_entropy(kept_alone, targets), left_alone.log_softmax(dim=1)
    if left == "entropy":
        telling = (said.exp() * said).sum(dim=1) / math.log(said.shape[1])
    else:
        own = said.gather(1, targets[:, None])[:, 0].exp()
        telling = -torch.log1p(-own.clamp(max=1 - 1e-6))
    total: Tensor = error + weight * telling.mean() + bounded_area(shown) + 0.01 * (shown.mean() + variation(shown))
    return total


def fast_shap(lessons: Lessons, rows: Rows, scores: Tensor, *, probability: bool) -> Tensor:
    r"""FastSHAP (Jethani et al. 2022) on the explainer's masked copies, weighted to the sizes of the Shapley kernel.

    .. math:: \mathbb{E}_M \bigl(v(M) - v(0) - \textstyle\sum_{n \in M} \phi_n\bigr)^2, \qquad
              \phi_n = s_n + \bigl(v(1) - v(0) - \textstyle\sum_j s_j\bigr) / N

    v is the probability of the class, as in the paper, or its logarithm, none below -6.
    """
    masks, answers = lessons.answers.batch(rows)
    value = torch.exp if probability else functools.partial(torch.clamp, min=LEAST_ANSWER)
    worth, nothing, everything = value(answers), *value(lessons.ends[rows]).unbind(1)
    flat, chosen = scores.flatten(1), masks.flatten(2).float()
    values = flat + ((everything - nothing - flat.sum(dim=1)) / flat.shape[1])[:, None]
    told = nothing[:, None] + (chosen @ values[..., None])[..., 0]
    weights = size_weights(lessons.answers)[chosen.sum(dim=2).long()]
    total: Tensor = (weights * (worth - told).square()).mean()
    return total


def size_weights(answers: MaskedAnswers) -> Tensor:
    """By the number of kept cells, (N + 1,): the Shapley kernel's share, 1 / (s (N - s)), over the share drawn."""
    cells = math.prod(answers.grid)
    drawn = np.bincount(np.bitwise_count(answers.masks).sum(axis=-1).ravel(), minlength=cells + 1)
    sizes = torch.arange(cells + 1)
    kernel = torch.where(torch.from_numpy(drawn) > 0, 1 / (sizes * (cells - sizes)).clamp(min=1), 0.0)
    found: Tensor = kernel / kernel.sum() / torch.from_numpy(drawn / drawn.sum()).clamp(min=1e-9)
    return found.float()


@dataclasses.dataclass(frozen=True, eq=False)
class Rival:
    """A paper's loss, what is tried, and how long it is trained.

    Attributes
    ----------
    losses: by the name of a setting; the paper's comes first.
    scale: of the scores that it starts from, whose standard deviation is about 1 otherwise.
    trial, epochs: photos that a setting is tried on for one epoch, and epochs of all photos for the best; without a
        trial for every setting.
    """

    name: str
    title: str
    losses: Mapping[str, Loss]
    scale: float
    trial: int | None
    epochs: int


L_CAM = {f"area {area:g}": functools.partial(l_cam, area=area) for area in (2.0, 0.5, 8.0)}
REMAINDER = {left: functools.partial(remainder, left=left, weight=1.0) for left in ("entropy", "class")}
FAST_SHAP = {name: functools.partial(fast_shap, probability=name != "log") for name in ("probability", "log")}
RIVALS = (
    Rival("l-cam", "L-CAM", L_CAM, scale=1.0, trial=240, epochs=2),
    Rival("nn-explainer", "NN-Explainer", REMAINDER, scale=1.0, trial=240, epochs=1),
    Rival("fast-shap", "FastSHAP", FAST_SHAP, scale=0.1, trial=None, epochs=10),
)


class ClassMaps(nn.Module):
    """A 1x1 convolution to a channel for every class, of which the wanted one is computed alone."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, classes)

    def ranking(self, features: Tensor, target: Tensor) -> Tensor:
        """Scores (B, H, W) of features (B, C, H, W) for classes (B,); channels of an earlier map are left out."""
        weight = self.score.weight[target]
        return (
            torch.einsum("bc,bchw->bhw", weight, features[:, : weight.shape[1]]) + self.score.bias[target, None, None]
        )


Ranks = ClassMaps | OwnPredictionAttention
"""What is trained: ``score`` has the weights, ``ranking`` is larger for a more relevant cell."""


def started(lessons: Lessons, start: str) -> Ranks:
    """What is trained, from one of the :data:`STARTS`, the latter two with scores of unit variance over the cells."""
    some = np.random.RandomState(lessons.seed).permutation(len(lessons.photos))[:256]
    features, attention, head = lessons.features.batch(some), lessons.classifier.attention, lessons.classifier.head
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(lessons.seed)
        if start == "c - E":
            found = OwnPredictionAttention(features.shape[1], head, earlier=attention.earlier)
            found.calibrate(features)
            return found
        classes = lessons.network.on_features(features[:1]).shape[1]
        maps = ClassMaps(features.shape[1] - attention.earlier, classes)
        if start == "head":
            layer = linear_layer(head, features.shape[1])
            assert layer is not None, "expected a linear head to start from, got another"
            maps.score.weight.copy_(layer.weight)
            scores = maps.ranking(features, lessons.targets(some))
            maps.score.bias.sub_(scores.mean()).div_(scores.std())
            maps.score.weight.div_(scores.std())
        return maps


class Attempt(NamedTuple):
    """A rival from a start and in a setting, after so many epochs on so many photos."""

    rival: Rival
    start: str
    setting: str
    photos: int
    epochs: int

    @property
    def title(self) -> str:
        return f"{self.rival.title}, {self.start}, {self.setting}, {self.photos} photos, {self.epochs} times"

    def path(self, lessons: Lessons) -> Path:
        """Of its weights."""
        data = [lessons.answers.folder.name, self.photos, self.epochs, lessons.seed, self.start, self.setting]
        return lessons.out / f"{self.rival.name}-{digest(*data)}.safetensors"


def trained(lessons: Lessons, attempt: Attempt) -> Ranks:
    """An attempt's ranks; its weights are kept."""
    rival, start, setting, photos, epochs = attempt
    rows = np.random.RandomState(lessons.seed).permutation(len(lessons.photos))[:photos]
    found, path, random = started(lessons, start), attempt.path(lessons), np.random.RandomState(lessons.seed)
    if path.exists():
        found.score.load_state_dict(load_file(path))
        found.score.eval().requires_grad_(False)
        return found
    steps, total = itertools.count(1), epochs * -(-len(rows) // BATCH)

    def step(some: Rows) -> Tensor:
        show(attempt.title, next(steps), total)
        scores = found.ranking(lessons.features.batch(some), lessons.targets(some))
        return rival.losses[setting](lessons, some, rival.scale * scores)

    with torch.random.fork_rng([]):
        torch.manual_seed(lessons.seed)
        rate = 1e-4 if start == "head" else 1e-3
        orders = (random.permutation(rows) for _ in range(epochs))
        fit_minibatches(found.score, loss=step, orders=orders, batch_size=BATCH, learning_rate=rate)
    lessons.out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in found.score.state_dict().items()}, path)
    return found


@torch.no_grad()
def confidence(lessons: Lessons, attempt: Attempt) -> float:
    """The mean of kept less removed, as probabilities of the predicted class, at the two smaller sizes.

    Probabilities, since they tell two settings apart on fewer photos than decisions do.
    """
    with torch.enable_grad():
        found = trained(lessons, attempt)
    apart = []
    for _, pixels in batches(lessons.classifier, lessons.held):
        features, fills = lessons.classifier.trunk(pixels), filled(pixels)
        said = lessons.asked(pixels).softmax(dim=1)
        targets = said.argmax(dim=1)
        ranking = found.ranking(features, targets)
        for share in SHARES[:2]:
            best = top_cells(ranking, max(1, round(share * ranking[0].numel())))
            only = fills + enlarged(best, pixels)[:, None] * (pixels - fills)
            shown, hidden = (lessons.asked(each).softmax(dim=1) for each in (only, pixels + fills - only))
            apart.append((shown - hidden).gather(1, targets[:, None]))
    return float(torch.cat(apart).mean())


def attempts(lessons: Lessons, rival: Rival) -> dict[Attempt, float]:
    """What each attempt reached: the starts with the paper's setting, other settings, the best for longer."""
    everything = len(lessons.photos)
    reached: dict[Attempt, float] = {}

    def best() -> Attempt:
        return max(reached, key=lambda each: reached[each])

    def attempt(tried: Attempt) -> None:
        path = tried.path(lessons).with_suffix(f".{len(lessons.held)}.json")
        reached[tried] = kept(path, functools.partial(confidence, lessons, tried))

    linear = linear_layer(lessons.classifier.head, lessons.features.features.shape[-1]) is not None
    first, *others = rival.losses
    for start in STARTS:
        if linear or start != "head":
            attempt(Attempt(rival, start, first, *((rival.trial, 1) if rival.trial else (everything, rival.epochs))))
    for setting in others:
        attempt(best()._replace(setting=setting))
    attempt(best()._replace(photos=everything, epochs=rival.epochs))
    return reached


def method_of(lessons: Lessons, attempt: Attempt) -> Method:
    """An attempt as a method of `own_prediction`."""
    found, kind = trained(lessons, attempt), "" if attempt.start == STARTS[-1] else "-classes"

    def maps(batch: Batch) -> Tensor:
        with torch.no_grad():
            return found.ranking(batch.features, batch.targets)

    return Method(f"{attempt.rival.name}{kind}", attempt.title, "baseline", True, maps, f"seed {lessons.seed}")


@torch.no_grad()
def lessons_of(classifier: ExplainableClassifier, splits: Splits, arguments: argparse.Namespace) -> Lessons:
    """The photos, their features and masked answers, from the cache where it has them."""
    seed, out, root = arguments.seed, arguments.out, arguments.cache
    features = cached_features(classifier, splits.train, root=root, report=show)
    answers = masked_answers(classifier, splits.train, count=arguments.masks, seed=seed, root=root, report=show)
    chosen = np.random.RandomState(seed).permutation(len(splits.test))[: arguments.validation]
    photos, held = read_photos(classifier, splits.train), read_photos(classifier, splits.test.subset(np.sort(chosen)))
    pooled = PooledClassifier(classifier.trunk, classifier.head).eval().to(memory_format=torch.contiguous_format)
    network = fastest(pooled, classifier.pixels(photos[:2]))

    def ends() -> list[list[float]]:
        found: list[list[float]] = []
        for rows, pixels in batches(classifier, photos):
            own = torch.tensor(answers.targets[rows])[:, None]
            said = [network(each).log_softmax(dim=1).gather(1, own) for each in (filled(pixels), pixels)]
            found += torch.cat(said, dim=1).tolist()
            show("photos without and with their pixels", rows.stop, len(photos))
        return found

    both = torch.tensor(kept(out / f"ends-{answers.folder.name[:8]}.json", ends))
    return Lessons(classifier, pooled, network, photos, held, features, answers, both, out, seed)


def main() -> None:
    """Train, choose, judge; print what every setting reached, and the table."""
    parser = parser_of_explainers(__doc__)
    parser.add_argument("--training", type=Path, required=True, help="the folder that the explainer was trained on")
    parser.add_argument("--validation", type=int, default=100, help="photos that settings are chosen on")
    parser.add_argument("--masks", type=int, default=16, help="masked copies of each photo, as the explainer's")
    parser.add_argument("--cache", type=Path, help="the folder of all caches")
    parser.add_argument("--rivals", nargs="+", choices=(names := [rival.name for rival in RIVALS]), default=names)
    parser.set_defaults(costly=0, which=None, protocols=0, road=0, fill=FILLS[0])
    arguments = parser.parse_args()
    classifier = opened(arguments)
    lessons = lessons_of(classifier, read_images(arguments.training, seed=arguments.seed)[0], arguments)
    methods = [each for each in rivals(classifier, arguments.seed) if each.name in CONTROLS]
    lines = row("tried", f"kept less removed, {len(lessons.held)} photos", ruled=True)
    for rival in RIVALS:
        if rival.name in arguments.rivals:
            reached = attempts(lessons, rival)
            lines += [line for each, value in reached.items() for line in row(each.title, f"{value:.3f}")]
            kinds = ([each for each in reached if (each.start == STARTS[-1]) == shared] for shared in (False, True))
            methods += [method_of(lessons, max(kind, key=lambda each: reached[each])) for kind in kinds]
    if not arguments.json:
        print("\n".join([*lines, ""]))
    compare(arguments, classifier, methods)


if __name__ == "__main__":
    main()
