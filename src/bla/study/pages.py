"""What participants see: pages made of the study's texts, templates and a trial. Nothing here names an arm."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from bla.study.plan import Photo, Plan
from bla.study.responses import DECOY
from bla.study.schedule import Trial, trials_of
from bla.study.texts import Texts, filled


def environment() -> Environment:
    """The templates of this package: a missing value is an error, and HTML is escaped."""
    loader = PackageLoader("bla.study")
    return Environment(
        loader=loader, autoescape=select_autoescape(), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


class Pages:
    """All pages of a study."""

    def __init__(self, plan: Plan, texts: Texts, *, simulated: bool = False) -> None:
        self.plan, self.texts = plan, texts
        self._photos = plan.every_photo
        trials = trials_of(plan, 0)
        most = max(len(trial.options) for trial in trials)
        self._environment = environment()
        self._environment.globals |= {
            "say": texts.say,
            "paragraphs": texts.paragraphs,
            "plan": plan,
            "digest": plan.digest(),
            "simulated": simulated,
            "trials": len(trials),
            "minutes": max(1, round(len(trials) * 9 / 60) + 1),
            "keys": "← →" if plan.task == "preference" else " ".join(str(number) for number in range(1, most + 1)),
        }

    def render(self, template: str, **values: Any) -> str:
        return self._environment.get_template(f"{template}.html").render(values)

    def trial(self, trial: Trial, position: int, person_trials: int, feedback: str | None, **hidden: object) -> str:
        """The page of one trial; `feedback` says how the practice before went, `hidden` goes into the form."""
        photo = self._photos[trial.photo]
        question = filled(self.plan.question, prediction=photo.prediction)
        if trial.kind == "catch" and self.plan.task != "preference":
            question = self.texts.say("trial.check", option=self._words(str(trial.expected)))
        return self.render(
            "trial",
            question=question,
            photo=None if self.plan.task == "prediction" else photo.plain.token,
            single=None if trial.arm is None else photo.explained[trial.arm].token,
            beside=self._beside(trial, photo),
            answers=[self._words(option) for option in trial.options],
            practice=trial.kind == "practice",
            first_that_counts=position == len(self.plan.practice) + 1 > 1,
            feedback=feedback,
            number=position,
            all=person_trials,
            hidden={"position": position, **hidden},
        )

    def feedback(self, trial: Trial | None, choice: str | None) -> str | None:
        """What to say of an answered practice trial."""
        if trial is None or trial.kind != "practice" or trial.expected is None or choice is None:
            return None
        name = "trial.feedback_right" if choice == trial.expected else "trial.feedback_wrong"
        return self.texts.say(name, expected=self._words(trial.expected))

    def _beside(self, trial: Trial, photo: Photo) -> list[str]:
        """The two pictures of a preference, from the left; in other tasks none."""
        if self.plan.task != "preference":
            return []
        arms = (str(trial.left), str(trial.right))
        own = next(arm for arm in arms if arm != DECOY)
        decoy = self._photos.get(str(trial.decoy), photo).explained[own]
        return [(decoy if arm == DECOY else photo.explained[arm]).token for arm in arms]

    def _words(self, option: str) -> str:
        """What stands on the button of an answer."""
        names = {"preference": f"trial.choose_{option}", "agreement": f"trial.{option}"}
        return self.texts[names[self.plan.task]] if self.plan.task in names else option
