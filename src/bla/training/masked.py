r"""What a frozen classifier says to masked photos, made once and cached beside the features.

For each photo, whose class from all its pixels is c, and each of M masks m over the cells of the feature map,

.. math:: a_m = \log p_c\bigl(m x + (1 - m)\, \tilde x\bigr)

by the whole network, with a fill :math:`\tilde x` (:mod:`bla.data.masking`). Masks come in pairs, m and 1 - m.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla import BlaError
from bla.data.image_sets import ImageSet, Task
from bla.data.masking import blurring, enlarged, filled, filling
from bla.model.backbones import weights_digest
from bla.model.classifier import ExplainableClassifier
from bla.model.compiled import quickest
from bla.model.evidence import Answers, ask, evidence, linear_layer
from bla.model.finite import unfinite
from bla.model.splitting import CHANNELS_LAST
from bla.model.whole import Whole
from bla.progress import Progress, silent
from bla.training.cache import Computed, Rows, cached, check_code, grey, readable

SIZES = ((3, 9), (8, 17), (14, 24))
"""Kept cells of 49, from and to, of a third of the masks each; of other grids as many in proportion."""
BLOBS = (0.6, 1.0, 1.5)
NOISES = (0.0, 0.7, 1.2)
ORDERS = (0.0, 0.0, 0.4, 0.7, 1.0)
"""Standard deviations of Gaussians over masks at random, over noise, and over orders; in cells of a 7 x 7 grid."""
_WIDTHS = sorted({*BLOBS, *NOISES, *ORDERS})
_PASS = {"cpu": 16}
"""Masked photos in one pass of the network, where more are slower; elsewhere 256."""
LEAST_ANSWER = -6.0
"""Log-probabilities below this are alike to whoever learns from them."""


class MaskedError(BlaError):
    """Masked photos that cannot be made."""


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedAnswers:
    """Masks of each image of a set, and the classifier's answers; on disk, memory-mapped.

    Row i belongs to image i of the set; it is zero for an image in ``failures``.
    """

    folder: Path
    targets: npt.NDArray[np.int64]
    """(N,): the class that the classifier predicts from the whole photo; of several labels, the likeliest."""
    masks: npt.NDArray[np.uint8]
    """(N, M, bytes): the cells' bits."""
    answers: npt.NDArray[np.float32]
    """(N, M): the log-probability of that class; of a regression the value."""
    grid: tuple[int, ...]
    failures: tuple[tuple[str, str], ...]
    """(image, reason) for each that has no row."""
    task: Task = "class"

    @functools.cached_property
    def by_size(self) -> Tensor:
        """The mean of what is told by the number of kept cells, (H*W + 1,)."""
        cells = math.prod(self.grid)
        total, count = np.zeros(cells + 1), np.zeros(cells + 1)
        for start in range(0, len(self.masks), 1024):
            kept = np.bitwise_count(self.masks[start : start + 1024]).sum(axis=-1, dtype=np.int64)
            told = self.told(torch.tensor(self.answers[start : start + 1024])).numpy()
            total += np.bincount(kept.ravel(), told.ravel(), cells + 1)
            count += np.bincount(kept.ravel(), minlength=cells + 1)
        return torch.from_numpy(total / count.clip(1)).float()

    @functools.cached_property
    def unit(self) -> float:
        """What a value is counted in: its standard deviation over the masks of a photo, in the mean over photos."""
        squares = sum(float(self.answers[row].var()) for row in range(len(self.answers)))
        return math.sqrt(squares / len(self.answers)) or 1.0

    def told(self, answers: Tensor) -> Tensor:
        """Answers as they are learnt from: none below :data:`LEAST_ANSWER`; values in units of theirs."""
        return answers / self.unit if self.task == "value" else answers.clamp(min=LEAST_ANSWER)

    def batch(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Masks (B, M, H, W), true where a cell is kept, and answers (B, M) of these rows."""
        bits = np.unpackbits(self.masks[rows], axis=-1, count=math.prod(self.grid))
        masks = torch.from_numpy(bits.view(np.bool_)).reshape(*bits.shape[:2], *self.grid)
        return masks, torch.from_numpy(self.answers[rows])


def masked_answers(
    classifier: ExplainableClassifier,
    images: ImageSet,
    *,
    count: int = 64,
    fill: str = "coarse",
    seed: int = 0,
    root: Path | None = None,
    digest: str | None = None,
    report: Progress = silent,
) -> MaskedAnswers:
    """The classifier's answers to ``count`` masked photos of every image, computed where the cache lacks them.

    The report begins with an estimate of the time. An interrupted build resumes, several processes share the work,
    and ``root`` and ``digest`` are as for :func:`bla.training.cache.cached_features`, as are the errors of the cache. A
    MaskedError says that ``count`` is odd or the map has one cell; a DataError that there is no such ``fill``.
    """
    if count < 2 or count % 2:
        raise MaskedError(f"expected an even number of masks, since each comes with its complement, got {count}")
    filling(fill, 1, 1)
    digests = digest or weights_digest(classifier.trunk), weights_digest(classifier.head)
    key = ["answers", count, fill, seed, classifier.name, *digests, classifier.transform.identity()]
    network = Masking(classifier, count, fill, seed)

    def begin(photos: int) -> None:
        report(f"masked answers of {photos:,} photos, {count} each: about {network.begin(photos)}", 0, 0)

    rows = Rows("masked answers", "answers", classifier, images, key, network.compute, network.photos, begin)
    stored = cached(rows, root, report)
    arrays, (_, *grid) = stored.arrays, stored.shape
    found = MaskedAnswers(
        stored.folder,
        arrays["targets"],
        arrays["masks"],
        arrays["answers"],
        tuple(grid),
        stored.failures,
        classifier.task,
    )
    row, pixels = readable(rows, stored)
    masks, answers = found.batch(np.array([row]))
    fresh = network.answers(pixels, masks[:, :2], torch.from_numpy(found.targets[[row]]))
    check_code(rows, stored, row, fresh, answers[:, :2])
    return found


def draw_masks(orders: Tensor, count: int, *, seed: int, rows: Sequence[int]) -> Tensor:
    """Masks (B, count, H, W) of images with orders (B, R, H, W) of their cells; they depend on seed and row alone.

    Every second one is the complement of the one before. Of these pairs a quarter keep random cells, a quarter smooth
    random blobs, and half the first cells of one of the orders, smoothed or not, with noise.

    >>> masks = draw_masks(torch.rand(2, 3, 7, 5), 8, seed=0, rows=[10, 11])
    >>> masks.shape, bool((masks[:, 0] ^ masks[:, 1]).all())
    (torch.Size([2, 8, 7, 5]), True)
    """
    given = orders.double().cpu().numpy()
    (images, _, *grid), pairs = given.shape, count // 2
    cells, sides, ones = math.prod(grid), tuple(range(-len(grid), 0)), (1,) * len(grid)
    if cells < 2:
        raise MaskedError("expected a map of at least two cells to mask some, got one")
    drawn = [np.random.default_rng([seed, row]) for row in rows]
    noise = np.stack([random.standard_normal((pairs, *grid)) for random in drawn])
    third, size, blur, order, order_blur, level = np.stack([random.random((6, pairs)) for random in drawn], axis=1)

    def smooth(maps: npt.NDArray[np.float64], widths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Each map, or each slice of a volume's, under its Gaussian, standardised."""
        place = np.searchsorted(_WIDTHS, widths)
        down, across = (
            np.stack([blurring(side, each * side / 7) for each in _WIDTHS])[place].reshape(
                *place.shape, *ones[2:], side, side
            )
            for side in grid[-2:]
        )
        found = down @ maps @ across.swapaxes(-1, -2)
        found = found - found.mean(axis=sides, keepdims=True)
        standardised: npt.NDArray[np.float64] = found / (found.std(axis=sides, keepdims=True) + 1e-9)
        return standardised

    kind = np.arange(pairs) % 4  # 0: random cells, 1: blobs, 2 and 3: near an order
    noise_widths = np.select([kind == 0, kind == 1], [np.zeros_like(blur), _pick(BLOBS, blur)], _pick(NOISES, blur))
    near = given[np.arange(images)[:, None], _pick(range(given.shape[1]), order)]
    score = (0.3 + 1.2 * level).reshape(*level.shape, *ones) * smooth(noise, noise_widths)
    score += (kind >= 2).reshape(-1, *ones) * smooth(near, _pick(ORDERS, order_blur))
    least, most = np.clip(np.round(np.array(SIZES).T * cells / 49), 1, cells - 1)
    third = _pick(range(len(SIZES)), third)
    kept = least[third] + np.floor(size * (most - least + 1)[third])
    places = (-score).reshape(images, pairs, cells).argsort(axis=-1, kind="stable").argsort(axis=-1)
    masks = torch.from_numpy((places < kept[..., None]).reshape(images, pairs, *grid))
    return torch.stack([masks, ~masks], dim=2).flatten(1, 2)


def _pick(values: Sequence[float], uniform: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """One of the values for each number in [0, 1)."""
    found: npt.NDArray[Any] = np.array(values)[(uniform * len(values)).astype(int)]
    return found


class Masking:
    """The whole classifier, masks drawn for its photos, and its answers to them."""

    def __init__(self, classifier: ExplainableClassifier, count: int, fill: str, seed: int) -> None:
        self.classifier, self.count, self.fill, self.seed = classifier, count, fill, seed
        device = next(classifier.attention.parameters()).device
        self.layout = CHANNELS_LAST[1 + len(classifier.transform.shape)]
        self.at_once = _PASS.get(device.type, 256)
        self.photos = max(1, 8 * self.at_once // count)
        self.whole = Whole(classifier.trunk, classifier.head).eval()
        self.logits: Callable[[Tensor], Tensor] = self.whole
        made: dict[Task, Callable[[Tensor], Tensor]]
        made = {"class": nn.LogSoftmax(-1), "labels": functional.logsigmoid, "value": nn.Identity()}
        self.answer = made[classifier.task]

    def compute(self, rows: Sequence[int], photos: npt.NDArray[np.uint8]) -> Computed:
        """Targets, masks and answers of photos (B, h, w, 3), the images ``rows`` of the set."""
        pixels = self.classifier.pixels(photos)
        with torch.no_grad():
            features = self.classifier.trunk(pixels)
            said = ask(self.classifier.head, features, linear_layer(self.classifier.head, features.shape[1]))
            logits, targets = said.logits.float(), said.target
            masks = draw_masks(self._orders(features, said), self.count, seed=self.seed, rows=rows)
        answers = self.answers(pixels, masks, targets).numpy()
        finite = torch.isfinite(logits).all(dim=1).cpu().numpy() & np.isfinite(answers).all(axis=1)
        refused = {
            place: f"expected finite logits, got {unfinite(self.classifier, pixels[place])}"
            for place in np.flatnonzero(~finite).tolist()
        }
        bits = np.packbits(masks.flatten(2).numpy(), axis=-1)
        arrays = {"targets": targets.cpu().numpy(), "masks": bits, "answers": answers}
        return Computed(tuple(masks.shape[1:]), arrays, refused)

    def answers(self, pixels: Tensor, masks: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities, or values, (B, M) of classes (B,) on photos (B, 3, h, w) under masks (B, M, H, W)."""
        with torch.inference_mode():
            found = [
                self.answer(self.logits(photos).float()).gather(1, classes[:, None])[:, 0]
                for photos, classes in self._masked(pixels, masks, targets.to(pixels.device))
            ]
            return torch.cat(found).reshape(masks.shape[:2]).cpu()

    def begin(self, photos: int) -> str:
        """Take what runs the masked copies of so many photos soonest; how long that takes, in words."""
        passes = photos * (self.count + 1)
        pixels = self.classifier.pixels(grey(self.classifier.transform, self.at_once))
        self.logits, seconds = quickest(self.whole, pixels, passes)
        if self.logits is not self.whole:
            self.layout = torch.contiguous_format
        return _duration(passes * seconds)

    def _orders(self, features: Tensor, said: Answers) -> Tensor:
        """Plausible orders of the cells (B, 5, H, W): c - E (twice), logit, feature norm, nearness to the centre."""
        head = self.classifier.head
        contrast, logit, _ = evidence(head, features, said, linear_layer(head, features.shape[1])).unbind(1)
        places = [torch.arange(side, device=features.device) - (side - 1) / 2 for side in features.shape[2:]]
        squares = torch.stack([each**2 for each in torch.meshgrid(*places, indexing="ij")])
        disc = -squares.sum(dim=0).expand_as(contrast)
        norm = features[:, : features.shape[1] - self.classifier.attention.earlier].norm(dim=1)
        return torch.stack([contrast, contrast, logit, norm, disc.to(logit)], dim=1)

    def _masked(self, pixels: Tensor, masks: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Masked photos and their classes, a pass at a time; a pass is of one photo."""
        for pixel, fill, subsets, target in zip(pixels, filled(pixels, self.fill), masks, targets, strict=True):
            difference = pixel - fill
            for part in subsets.to(pixels.device).split(self.at_once):
                photos = torch.addcmul(fill, enlarged(part, pixels)[:, None], difference)
                yield photos.contiguous(memory_format=self.layout), target.expand(len(part))


def _duration(seconds: float) -> str:
    """In words, to two digits.

    >>> _duration(9.6), _duration(1260), _duration(12600)
    ('10 seconds', '21 minutes', '3.5 hours')
    """
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{int(seconds < 10 * length and unit == 'hours')}f} {unit}"
    return f"{max(1, round(seconds))} seconds"
