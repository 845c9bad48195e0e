"""What participants see: pages made of the study's texts, templates and a trial. Nothing here names an arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bla.study.plan import Photo, Plan
from bla.study.responses import DECOY
from bla.study.schedule import Trial, trials_of
from bla.study.texts import Texts, filled


@dataclass(frozen=True)
class Shown:
    """A picture on a page: its address, what a screen reader says, and its name."""

    token: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Answerable:
    """An answer to choose: its number, the words on it, and the picture it stands for, if any."""

    value: int
    words: str
    picture: Shown | None = None


class Pages:
    """All pages of a study."""

    def __init__(self, plan: Plan, texts: Texts, *, simulated: bool = False) -> None:
        self.plan, self.texts = plan, texts
        self._photos = plan.every_photo
        environment = Environment(
            loader=PackageLoader("bla.study"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals |= {
            "say": texts.say,
            "paragraphs": texts.paragraphs,
            "title": plan.title,
            "simulated": simulated,
            "width": plan.width,
            "height": plan.height,
            "task": plan.task,
        }
        self._environment = environment
        first = trials_of(plan, 0)
        self.trials = len(first)
        self.minutes = max(1, round(len(first) * 9 / 60) + 1)
        self.keys = _keys(plan, first)

    def render(self, template: str, **values: Any) -> str:
        """A page."""
        return self._environment.get_template(f"{template}.html").render(values)

    def trial(self, trial: Trial, position: int, person_trials: int, feedback: str | None, **hidden: object) -> str:
        """The page of one trial; `feedback` says how the practice before went, `hidden` goes into the form."""
        photo = self._photos[trial.photo]
        practice = len(self.plan.practice)
        return self.render(
            "trial",
            question=self._question(trial, photo),
            photo=self._plain(photo),
            single=self._single(trial, photo),
            answers=self._answers(trial, photo),
            practice=trial.kind == "practice",
            first_that_counts=position == practice + 1 and practice > 0,
            feedback=feedback,
            done=position - 1,
            number=position,
            all=person_trials,
            hidden={"position": position, **hidden},
        )

    def feedback(self, trial: Trial, choice: str | None) -> str | None:
        """What to say of an answered practice trial."""
        if trial.kind != "practice" or trial.expected is None or choice is None:
            return None
        name = "trial.feedback_right" if choice == trial.expected else "trial.feedback_wrong"
        return self.texts.say(name, expected=self._words(trial.expected))

    def _question(self, trial: Trial, photo: Photo) -> str:
        if trial.kind == "catch" and self.plan.task != "preference":
            return self.texts.say("trial.check", option=self._words(str(trial.expected)))
        return filled(self.plan.question, prediction=photo.prediction)

    def _plain(self, photo: Photo) -> Shown | None:
        """The photo, where the explanation alone is not the question."""
        if self.plan.task == "prediction":
            return None
        return Shown(photo.plain.token, self.texts["trial.alt_photo"], self.texts["trial.photo"])

    def _single(self, trial: Trial, photo: Photo) -> Shown | None:
        if trial.arm is None:
            return None
        return Shown(photo.explained[trial.arm].token, self.texts["trial.alt_one"], self.texts["trial.picture"])

    def _answers(self, trial: Trial, photo: Photo) -> list[Answerable]:
        if self.plan.task == "preference":
            return [
                Answerable(
                    value,
                    self.texts[f"trial.choose_{side}"],
                    Shown(self._beside(trial, side), self.texts[f"trial.alt_{side}"], self.texts[f"trial.{side}"]),
                )
                for value, side in enumerate(trial.options)
            ]
        return [Answerable(value, self._words(option)) for value, option in enumerate(trial.options)]

    def _beside(self, trial: Trial, side: str) -> str:
        """The picture on a side."""
        arm = trial.left if side == "left" else trial.right
        if arm == DECOY:
            other = trial.right if side == "left" else trial.left
            return self._photos[str(trial.decoy)].explained[str(other)].token
        return self._photos[trial.photo].explained[str(arm)].token

    def _words(self, option: str) -> str:
        return self.texts[f"trial.{option}"] if self.plan.task == "agreement" else option


def _keys(plan: Plan, trials: list[Trial]) -> str:
    if plan.task == "preference":
        return "← →"
    most = max(len(trial.options) for trial in trials)
    return " ".join(str(number) for number in range(1, most + 1))
