"""How to train: the paper's setups and every choice beside them, checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from bla import BlaError
from bla.model.attention import Attention, BoundedLogitAttention, ClassAwareAttention, L2XAttention, signed
from bla.operators import GumbelVariant

Setup = Literal["bla", "bla-t", "bla-ph", "l2x-f"]
SETUPS: dict[Setup, str] = {"bla": "BLA", "bla-t": "BLA-T", "bla-ph": "BLA-PH", "l2x-f": "L2X-F"}
"""The paper's setups, and what explanations are signed with."""


RECOMMENDED: dict[str, Any] = {
    "class_aware": True,
    "hidden": (64,),
    "straight_through": 0.5,
    "mean_size": 8.0,
    "head_epochs": 15,
    "epochs": 10,
}
"""What we recommend in place of the paper's choices: docs/results.md holds the ablation on validation images."""


class TrainingError(BlaError):
    """Settings that contradict one another, or a training that cannot go on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How to train. The defaults are the paper's for fine-grained data.

    Attributes
    ----------
    setup: ``bla``; ``bla-t``, with the threshold 0.98 / N; ``bla-ph``, post hoc: the threshold, and a frozen head;
        ``l2x-f``, the fixed-size rival.
    head: ``new``, a linear head for the data's classes, trained on mean-pooled features first; or ``own``, the
        classifier's own, which stays as it is (post hoc by nature).
    targets: what to predict: the data's ``labels``, or the classifier's own ``predictions``.
    epochs, head_epochs: of the module's stage and the head's; None: as many.
    batch_size, learning_rate, dropout, seed: Adam's, and the dropout before a new head.
    threshold: replaces the setup's: a number, or "auto" for 0.98 / N.
    temperature, hidden, context, gate: of :class:`bla.BoundedLogitAttention`.
    class_aware: the score reads what the head says at each cell about the class to be explained:
        :class:`bla.model.attention.ClassAwareAttention`.
    straight_through: share of the loss that is taken from the hard selection, with the soft one's gradient.
    final_temperature: the temperature goes from ``temperature`` to this one, by the same factor every step.
    mean_size: how many cells to select on average, or, below 1, which share of a map's cells. The bound follows
        the scores through the training, so that this is met; at the end of every epoch it is set to meet it
        exactly on the images held out, where some are, else on the training images.
    dial: share of the batches that are trained at a size drawn anew, from 1 to half of the cells, by moving the
        bound there. One module then serves every size.
    size, variant: of :class:`bla.model.attention.L2XAttention`.
    trunk_rate: end to end: the trunk is trained too, with this learning rate, as :mod:`bla.training.finetuning`
    says. None:
        it stays as it is, and its features are cached.
    augment: photos that a trunk is trained on are changed at random: :func:`bla.training.photos.augmentation`.
    precision: of a trunk that is trained, by autocast: float32, bfloat16 or float16; all after it is float32.
    several_labels: an image may have several classes or none, each learnt by itself, by binary cross entropy. Training
        sets it where the data are so.
    validation: share of the training images held out to watch. With ``patience``, a stage ends after that many
        epochs without a smaller loss of what will be used (the hard predictions), and keeps its best epoch.
    """

    setup: Setup = "bla"
    head: Literal["new", "own"] = "new"
    targets: Literal["labels", "predictions"] = "labels"
    epochs: int = 5
    head_epochs: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    dropout: float = 0.2
    seed: int = 0
    temperature: float = 0.1
    threshold: float | Literal["auto"] | None = None
    hidden: tuple[int, ...] = ()
    context: bool = False
    gate: bool = False
    class_aware: bool = False
    straight_through: float = 0.0
    final_temperature: float | None = None
    mean_size: float | None = None
    dial: float = 0.0
    size: int = 8
    variant: GumbelVariant = "official"
    trunk_rate: float | None = None
    augment: bool = False
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    validation: float = 0.0
    patience: int | None = None
    several_labels: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        checks = [
            (self.setup in SETUPS, f"setup one of {', '.join(SETUPS)}", self.setup),
            (self.head in ("new", "own"), "head 'new' or 'own'", self.head),
            (self.targets in ("labels", "predictions"), "targets 'labels' or 'predictions'", self.targets),
            (self.epochs >= 1, "epochs of at least 1", self.epochs),
            (self.head_epochs is None or self.head_epochs >= 1, "head_epochs of at least 1", self.head_epochs),
            (self.batch_size >= 1, "batch_size of at least 1", self.batch_size),
            (self.learning_rate > 0, "learning_rate above 0", self.learning_rate),
            (self.trunk_rate is None or self.trunk_rate > 0, "trunk_rate above 0", self.trunk_rate),
            (
                self.precision in ("float32", "bfloat16", "float16"),
                "precision float32, bfloat16 or float16",
                self.precision,
            ),
            (0 <= self.dropout < 1, "dropout in [0, 1)", self.dropout),
            (0 <= self.seed < 2**32, "seed in [0, 2**32)", self.seed),
            (0 <= self.validation < 1, "validation share in [0, 1)", self.validation),
            (self.patience is None or self.patience >= 1, "patience of at least 1", self.patience),
            (
                self.final_temperature is None or self.final_temperature > 0,
                "final_temperature above 0",
                self.final_temperature,
            ),
            (self.mean_size is None or self.mean_size > 0, "mean_size above 0", self.mean_size),
            (
                0 <= self.straight_through <= 1,
                "straight_through, a share of the loss, in [0, 1]",
                self.straight_through,
            ),
            (0 <= self.dial <= 1, "dial, a share of the batches, in [0, 1]", self.dial),
            (all(width >= 1 for width in self.hidden), "hidden layers of at least 1 channel", self.hidden),
        ]
        for valid, expected, came in checks:
            if not valid:
                raise TrainingError(f"expected {expected}, got {came!r}")
        if self.trunk_rate is None and (self.augment or self.precision != "float32"):
            raise TrainingError(
                "expected trunk_rate with augment or precision: a trunk that stays as it is gives features once, in "
                "float32; set trunk_rate=1e-4, say"
            )
        if self.trunk_rate is not None and self.class_aware and not self.frozen_head:
            raise TrainingError(
                f"expected setup bla-ph for class_aware with trunk_rate, got {self.setup!r}, which moves the trunk "
                "under the head that the score asks"
            )
        if self.trunk_rate is not None and self.head == "own":
            raise TrainingError(
                "expected head='new' with trunk_rate, which trains the classifier, got 'own', which leaves it as it is"
            )
        if self.setup == "l2x-f":
            for name in ("class_aware", "straight_through", "final_temperature", "mean_size", "dial"):
                if getattr(self, name):
                    raise TrainingError(f"expected no {name} with setup l2x-f, which bounds nothing: leave it out")
        if self.class_aware and self.context:
            raise TrainingError("expected no context with class_aware, whose score reads no features: leave one out")
        if self.class_aware and self.several_labels:
            raise TrainingError(
                "expected no class_aware with several labels an image: its score asks about one class, and an image "
                "has one selection for all; what each label's cells are is told by their votes. Set class_aware=False"
            )
        if self.patience is not None and not self.validation:
            raise TrainingError("expected a validation share for patience to watch, got none: set validation=0.1, say")
        if self.head == "new" and self.targets == "predictions":
            raise TrainingError("expected head='own' for targets='predictions': a new head has no predictions yet")
        if self.head == "own" and self.setup in ("bla", "bla-t"):
            raise TrainingError(
                f"expected setup bla-ph or l2x-f with head='own', got {self.setup!r}, which trains the head; for no "
                "threshold pass threshold=0"
            )
        try:
            with torch.device("meta"):  # the module's own checks, now rather than after the features are cached
                self.attention(1)
        except ValueError as error:
            raise TrainingError(str(error)) from error

    @classmethod
    def recommended(cls, **given: Any) -> Settings:
        """The recommended settings, but for those that are given. With an own head, or ``setup="bla-ph"``, post hoc.

        A class-aware score with a mean size: its selection has seen what the head predicts from all cells.

        >>> Settings.recommended(mean_size=12).class_aware, Settings.recommended(head="own").setup
        (True, 'bla-ph')
        """
        setup = "bla-ph" if given.get("head") == "own" else "bla"
        return cls(**{"setup": setup, "threshold": 0.0, **RECOMMENDED, **given})

    @property
    def name(self) -> str:
        """What explanations are signed with: the setup, and a threshold that is not its own."""
        if self.setup == "l2x-f":
            return SETUPS[self.setup]
        own: float | Literal["auto"] = 0 if self.setup == "bla" else "auto"
        threshold = own if self.threshold is None else self.threshold
        return signed(SETUPS[self.setup], threshold, own, class_aware=self.class_aware)

    @property
    def frozen_head(self) -> bool:
        """Whether the head stays as it is while the module is trained."""
        return self.head == "own" or self.setup == "bla-ph"

    def temperature_at(self, progress: float) -> float:
        """The temperature where a share of the module's stage is done.

        >>> settings = Settings(temperature=0.1, final_temperature=10)
        >>> settings.temperature_at(0), settings.temperature_at(0.5), settings.temperature_at(1)
        (0.1, 1.0, 10.0)
        """
        final = self.final_temperature or self.temperature
        return (
            self.temperature if final == self.temperature else self.temperature * (final / self.temperature) ** progress
        )

    def attention(self, channels: int) -> Attention:
        """A module as these settings describe, with fresh weights from torch's global generator.

        Its temperature is the final one; a class-aware one has no judge yet.
        """
        if self.setup == "l2x-f":
            return L2XAttention(
                channels,
                size=self.size,
                temperature=self.temperature,
                variant=self.variant,
                hidden=self.hidden,
                context=self.context,
            )
        threshold = self.threshold
        if threshold is None:
            threshold = 0.0 if self.setup == "bla" else "auto"
        temperature = self.final_temperature or self.temperature
        if self.class_aware:
            return ClassAwareAttention(
                channels, temperature=temperature, threshold=threshold, hidden=self.hidden, gate=self.gate
            )
        return BoundedLogitAttention(
            channels,
            temperature=temperature,
            threshold=threshold,
            hidden=self.hidden,
            context=self.context,
            gate=self.gate,
        )
