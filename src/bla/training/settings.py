"""How to train: small parts, each of which holds only options that make sense together."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from bla import BlaError
from bla.files import is_a

if TYPE_CHECKING:
    from bla.data.image_sets import Task
    from bla.model.attention import Attention

Setup = Literal["bla", "bla-t", "bla-ph", "l2x-f", "bla-px"]
SETUPS: dict[Setup, str] = {"bla": "BLA", "bla-t": "BLA-T", "bla-ph": "BLA-PH", "l2x-f": "L2X-F", "bla-px": "BLA-PX"}
"""The paper's setups, then ours for a classifier that exists, and the names that explanations carry."""
PAPER: tuple[Setup, ...] = ("bla", "bla-t", "bla-ph", "l2x-f")
"""The paper's setups."""

RECOMMENDED: dict[str, Any] = {
    "threshold": 0.0,
    "class_aware": True,
    "hidden": (64,),
    "straight_through": 0.5,
    "mean_size": 8.0,
    "head_epochs": 15,
    "epochs": 10,
}
"""The recommended choices for a new head; docs/background/paper.md has the ablation on validation images."""


class TrainingError(BlaError):
    """Settings that contradict one another, or a training that cannot continue."""


class Valid(NamedTuple):
    """Which values an option takes: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


AT_LEAST_1 = Valid("of at least 1", lambda value: 1 <= value < 2**31)
ABOVE_0 = Valid("above 0", lambda value: value > 0)
SHARE = Valid("in [0, 1]", lambda value: 0 <= value <= 1)
CHANNELS = Valid("channels from 1 to 16,384", lambda widths: all(1 <= width <= 16_384 for width in widths))
BELOW_1 = Valid("in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True, slots=True)
class Part:
    """Options that belong together; each value is checked against its field's type."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name in (field.name for field in dataclasses.fields(self)):
            value, hint = getattr(self, name), hints[name]
            if isinstance(value, list):  # as JSON and the command line give a tuple
                object.__setattr__(self, name, tuple(value))
            kinds = typing.get_args(hint)
            if typing.get_origin(hint) is Literal and value not in kinds:
                raise TrainingError(f"expected {name} {' or '.join(map(repr, kinds))}, got {value!r}")
            valid = next(iter(getattr(hint, "__metadata__", ())), None)
            value = getattr(self, name)
            if not is_a(value, hint) or (valid and value is not None and not valid.test(value)):
                words = valid.words if valid else f"of type {getattr(hint, '__name__', hint)}"
                raise TrainingError(f"expected {name} {words}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Part):
    """How cells are scored."""

    temperature: float = 0.1
    """Multiplies the scores."""
    hidden: Annotated[tuple[int, ...], CHANNELS] = ()
    """Channels of a further 1x1 convolution before the score; repeatable."""
    context: bool = False
    """Add a vector made from the pooled map to every cell before the score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded(Part):
    """A selection by bounded logits: the cells at the bound."""

    threshold: float | Literal["auto"] | None = None
    """Subtracted from the weights; auto is 0.98 / cells. By default the setup's."""
    gate: bool = False
    """A sigmoid gate in place of the softmax."""
    class_aware: bool = False
    """A class-conditional score: from what the head says of the class at each cell."""
    straight_through: Annotated[float, SHARE] = 0.0
    """Share of the loss that the hard selection gives, with the soft one's gradient."""
    final_temperature: Annotated[float | None, ABOVE_0] = None
    """Move to this temperature during training."""
    mean_size: Annotated[float | None, ABOVE_0] = None
    """Select this many cells on average; below 1, this share of the cells."""
    dial: Annotated[float, SHARE] = 0.0
    """Share of the batches with random sizes, which trains for explain --size."""

    def attention(self, channels: int, score: Score, threshold: float | Literal["auto"], _: int) -> Attention:
        """The attention with fresh weights from torch's global generator, at the final temperature."""
        from bla.model.attention import BoundedLogitAttention, ClassAwareAttention

        temperature = self.final_temperature or score.temperature
        options: dict[str, Any] = {"temperature": temperature, "threshold": threshold, "gate": self.gate}
        if self.class_aware:
            return ClassAwareAttention(channels, hidden=score.hidden, **options)
        return BoundedLogitAttention(channels, hidden=score.hidden, context=score.context, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSize(Part):
    """A selection of a fixed number of cells: L2X-F, the rival. It has no bound that could be moved or missed."""

    size: int = 8
    """Cells to select."""
    variant: Literal["official", "corrected"] = "official"
    """The temperature multiplies (official) or divides (corrected)."""

    class_aware: ClassVar[bool] = False
    straight_through: ClassVar[float] = 0.0
    final_temperature: ClassVar[float | None] = None
    mean_size: ClassVar[float | None] = None
    dial: ClassVar[float] = 0.0

    def attention(self, channels: int, score: Score, _: float | Literal["auto"], __: int) -> Attention:
        """The attention with fresh weights from torch's global generator."""
        from bla.model.attention import L2XAttention

        return L2XAttention(channels, size=self.size, variant=self.variant, **dataclasses.asdict(score))


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked(Part):
    """A selection that explains a classifier's own prediction, trained on its answers to masked photos."""

    masks: Annotated[
        int, Valid("an even number of at least 8", lambda value: 8 <= value <= 65_536 and value % 2 == 0)
    ] = 64
    """Masked copies of each photo that bla-px learns from."""
    fill: str = "coarse"
    """What takes the place of masked pixels for bla-px: coarse, blur, mean or grey."""
    mean_size: Annotated[float, ABOVE_0] = 0.25
    """Select this many cells on average; below 1, this share of the cells."""

    class_aware: ClassVar[bool] = True
    straight_through: ClassVar[float] = 0.0
    final_temperature: ClassVar[float | None] = None
    dial: ClassVar[float] = 0.0

    def attention(self, channels: int, score: Score, _: float | Literal["auto"], earlier: int) -> Attention:
        """The attention with fresh weights from torch's global generator."""
        from bla.model.own_prediction import HIDDEN, OwnPredictionAttention

        return OwnPredictionAttention(channels, earlier=earlier, hidden=score.hidden or HIDDEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(Part):
    """The head that reads the selection, and what it learns to predict."""

    head: Literal["new", "own"] = "new"
    """new: trained first, for the data's classes; own: the classifier's, unchanged."""
    targets: Literal["labels", "predictions"] = "labels"
    """What to learn: the data's labels, or with --head own the classifier's predictions."""
    dropout: Annotated[float, BELOW_1] = 0.2
    """Dropout before a new head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages(Part):
    """How long the stages are, and Adam's options."""

    epochs: Annotated[int, AT_LEAST_1] = 5
    """Epochs of the module's stage; 10 with recommended and bla-px."""
    head_epochs: Annotated[int | None, AT_LEAST_1] = None
    """Epochs of the head's stage. By default as many; 15 with recommended."""
    batch_size: Annotated[int, AT_LEAST_1] = 32
    """Images in a batch."""
    learning_rate: Annotated[float, ABOVE_0] = 1e-3
    """Adam's learning rate."""
    seed: Annotated[int, Valid("in [0, 2**32)", lambda value: 0 <= value < 2**32)] = 0
    """Seed of all randomness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trunk(Part):
    """Fine-tuning of the trunk, end to end: :mod:`bla.training.finetuning`."""

    trunk_rate: Annotated[float, ABOVE_0]
    """Fine-tune the trunk end to end at this learning rate, 1e-4 say. By default it is frozen."""
    augment: bool = False
    """Augment the training photos: random crop, flip, brightness, contrast, saturation."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision: float32, or mixed with bfloat16 or float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut(Part):
    """Validation images, and early stopping on them."""

    validation: Annotated[float, BELOW_1]
    """Share of the training images held out for validation."""
    patience: Annotated[int | None, AT_LEAST_1] = None
    """End a stage after this many epochs without a smaller validation loss; keep its best epoch."""


_SELECTIONS: dict[Setup, type[Bounded | FixedSize | Masked]] = {"l2x-f": FixedSize, "bla-px": Masked}
"""The selections of the setups that have one of their own."""

OF_MASKED: dict[str, Any] = {"head": "own", "targets": "predictions", "epochs": 10}
"""What bla-px has by default: it explains the classifier as it is."""

_WITHOUT: dict[type[Part], str] = {
    Bounded: "with setup l2x-f, which bounds nothing, or bla-px: leave it out",
    Masked: "without setup bla-px: leave it out",
    Trunk: "without trunk_rate: a frozen trunk gives features once, in float32; set trunk_rate=1e-4, say",
    HeldOut: "without a validation share to watch: set validation=0.1, say",
}
"""Why the options of an absent part are refused."""


@dataclass(frozen=True, slots=True, init=False)
class Settings:
    """How to train. The defaults are the paper's for fine-grained data.

    Every option of every part is a keyword, as on the command line.

    >>> settings = Settings("bla-t", mean_size=8, epochs=3)
    >>> settings.selection.mean_size, settings.stages.epochs, settings.trunk
    (8, 3, None)

    Parameters
    ----------
    setup: ``bla``; ``bla-t``, with the threshold 0.98 / N; ``bla-ph``, post hoc: the threshold, and a frozen head;
        ``l2x-f``, the fixed-size rival; ``bla-px``, which explains a classifier's own prediction by its pixels.
    several_labels: an image may have several classes or none; training sets it from the data.
    options: of :class:`Score`; of :class:`Bounded`, for ``l2x-f`` :class:`FixedSize`, for ``bla-px``
        :class:`Masked`; of :class:`Head`,
        :class:`Stages`, :class:`Trunk` with ``trunk_rate``, :class:`HeldOut` with ``validation``. A TrainingError says
        which option is out of its range, or which contradict one another.
    """

    setup: Setup
    score: Score
    selection: Bounded | FixedSize | Masked
    head: Head
    stages: Stages
    trunk: Trunk | None
    held_out: HeldOut | None
    several_labels: bool

    @property
    def task(self) -> Task:
        """What is predicted of the data."""
        return "labels" if self.several_labels else "class"

    def __init__(self, setup: Setup = "bla", *, several_labels: bool = False, **options: Any) -> None:
        if setup not in SETUPS:
            raise TrainingError(f"expected setup one of {', '.join(SETUPS)}, got {setup!r}")
        made: dict[str, Any] = {"setup": setup, "several_labels": several_labels, "trunk": None, "held_out": None}
        # a fixed size has no effect on a bounded selection, so it may be given to all setups alike
        own = _SELECTIONS.get(setup, Bounded)
        parts = {"score": Score, "fixed": FixedSize, "head": Head, "stages": Stages}
        if own is not FixedSize:
            parts["selection"] = own
        if own is Masked:
            options = OF_MASKED | {name: value for name, value in options.items() if value is not None}
        if options.get("trunk_rate") is not None:
            parts["trunk"] = Trunk
        if options.get("validation"):
            parts["held_out"] = HeldOut
        for name, part in parts.items():
            fields = [field.name for field in dataclasses.fields(part) if field.name in options]
            made[name] = part(**{field: options.pop(field) for field in fields})
        fixed = made.pop("fixed")
        made.setdefault("selection", fixed)
        for absent, why in _WITHOUT.items():  # whose options may be given as their defaults
            for field in dataclasses.fields(absent):
                value = options.pop(field.name, None)
                if value and value != field.default:
                    raise TrainingError(f"expected no {field.name} {why}")
        if options:
            raise TypeError(f"expected options of Settings, got {', '.join(options)}")
        for name, value in made.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        aware, own = self.selection.class_aware, self.own_head
        contradictions: dict[str, Any] = {
            "setup bla-ph for class_aware with trunk_rate: otherwise the trunk changes under the head that the score "
            "reads": aware and self.trunk and not self.frozen_head,
            "head='new' with trunk_rate, which trains the classifier; 'own' does not change it": own and self.trunk,
            "no context with class_aware, whose score reads no features: leave one out": aware and self.score.context,
            "no class_aware with several labels an image: its score is about one class, and an image has one selection "
            "for all labels; each label's votes tell its cells. Set class_aware=False": aware and self.several_labels,
            "head='own' and targets='predictions' for bla-px, which explains the classifier as it is: leave both out": (
                isinstance(self.selection, Masked) and not (own and self.head.targets == "predictions")
            ),
            "head='own' for targets='predictions': a new head has no predictions yet": not own
            and self.head.targets == "predictions",
            f"setup bla-ph or l2x-f with head='own', got {self.setup!r}, which trains the head; for no threshold pass "
            "threshold=0": own and self.setup in ("bla", "bla-t"),
        }
        for expected, contradicted in contradictions.items():
            if contradicted:
                raise TrainingError(f"expected {expected}")
        import torch

        try:
            with torch.device("meta"):  # the attention's own checks, before features are cached
                self.attention(1)
        except ValueError as error:
            raise TrainingError(str(error)) from error

    @classmethod
    def recommended(cls, **options: Any) -> Settings:
        """The recommended settings, with the given options in their place: with an own head ``bla-px``.

        Otherwise a class-conditional score with a mean size: its selection has seen what the head predicts from all
        cells.

        >>> Settings.recommended(mean_size=12).selection.class_aware, Settings.recommended(head="own").setup
        (True, 'bla-px')
        """
        if options.get("head") == "own" and "setup" not in options and not options.get("several_labels"):
            return cls("bla-px", **options)
        setup = "bla-ph" if options.get("head") == "own" else "bla"
        return cls(**{"setup": setup, **RECOMMENDED, **options})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Settings:
        """The settings that run.json holds; old records hold all options, also those of the other selection."""
        selections = {field.name for other in (Bounded, FixedSize, Masked) for field in dataclasses.fields(other)}
        try:
            own = {field.name for field in dataclasses.fields(_SELECTIONS.get(record["setup"], Bounded))}
            return cls(**{name: value for name, value in record.items() if name not in selections - own})
        except (KeyError, TypeError) as error:
            raise TrainingError(f"expected the settings of a run, got others: {error!r}") from error

    def record(self) -> dict[str, Any]:
        """All options as one flat dictionary, as run.json holds them."""
        parts = (self.score, self.selection, self.head, self.stages, self.trunk, self.held_out)
        options = {"setup": self.setup, "several_labels": self.several_labels, "trunk_rate": None, "validation": 0.0}
        return options | {name: value for part in parts if part for name, value in dataclasses.asdict(part).items()}

    def replace(self, **options: Any) -> Settings:
        """These settings with other values for some options."""
        return Settings(**(self.record() | options))

    @property
    def threshold(self) -> float | Literal["auto"]:
        """The threshold, by default the setup's."""
        given = getattr(self.selection, "threshold", None)
        return self._own_threshold if given is None else given

    @property
    def _own_threshold(self) -> float | Literal["auto"]:
        return 0.0 if self.setup in ("bla", "bla-px") else "auto"

    @property
    def name(self) -> str:
        """What explanations are labelled with: the setup, and the threshold if it is not the setup's."""
        from bla.model.attention import signed

        aware = self.selection.class_aware and self.setup != "bla-px"
        return signed(SETUPS[self.setup], self.threshold, self._own_threshold, class_aware=aware)

    @property
    def seed(self) -> int:
        """The seed of all randomness."""
        return self.stages.seed

    @property
    def own_head(self) -> bool:
        """Whether the head is the classifier's own."""
        return self.head.head == "own"

    @property
    def frozen_head(self) -> bool:
        """Whether the head is frozen while the module is trained."""
        return self.own_head or self.setup == "bla-ph"

    def temperature_at(self, progress: float) -> float:
        """The temperature after a share of the module's stage.

        >>> settings = Settings(temperature=0.1, final_temperature=10)
        >>> settings.temperature_at(0), settings.temperature_at(0.5), settings.temperature_at(1)
        (0.1, 1.0, 10.0)
        """
        start, final = self.score.temperature, self.selection.final_temperature
        return start if final is None or final == start else start * (final / start) ** progress

    def attention(self, channels: int, earlier: int = 0) -> Attention:
        """An attention with fresh weights from torch's global generator; a class-conditional one has no judge yet.

        ``earlier`` of the channels are those of an earlier map, which only ``bla-px`` reads.
        """
        return self.selection.attention(channels, self.score, self.threshold, earlier)
