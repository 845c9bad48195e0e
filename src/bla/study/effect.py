"""What a study is to find: the size of an effect, the layout of its trials, and the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bla.study.behaviour import Behaviour
from bla.study.errors import AnalysisError
from bla.study.plan import Analysis, Plan, Population


@dataclass(frozen=True)
class Trials:
    """The layout of a simulated study of two arms: photos, and on how many of them each person answers."""

    photos: int
    each: int
    catches: int = 0
    passes: int = 0
    """Attention checks that a person must pass to be analysed."""
    complete: float = 0.0
    """Share of the main trials that a person must have answered to be analysed."""

    def __post_init__(self) -> None:
        if not 1 <= self.each <= self.photos:
            raise AnalysisError(f"expected 1 to {self.photos} trials a person, a photo each, got {self.each}")
        if not 0 <= self.passes <= self.catches or not 0 <= self.complete <= 1:
            raise AnalysisError(
                f"expected 0 to {self.catches} catch trials to pass and a share from 0 to 1 of trials to complete, "
                f"got {self.passes} and {self.complete}"
            )


@dataclass(frozen=True)
class Effect:
    """What is to be found, for which population, and by which test.

    `share` is the mean share of main trials that the first arm wins, before noise; with `against` it is the share of
    right answers with the first arm, and `against` that with the second. Each of the pairs of arms is tested at
    alpha / comparisons; Holm's correction is never stricter.
    """

    share: float
    behaviour: Behaviour
    trials: Trials
    against: float | None = None
    population: Population = "people"
    alpha: float = 0.05
    comparisons: int = 1

    def assumptions(self) -> str:
        """What is assumed, in words."""
        shares = (
            f"{self.share:.0%} of a person's choices fall on the better arm"
            if self.against is None
            else f"{self.share:.0%} right answers with one arm, {self.against:.0%} with the other"
        )
        corrected = f", corrected for {self.comparisons} pairs" if self.comparisons > 1 else ""
        return (
            f"{shares}; people differ by {self.behaviour.person_sd:g} logits, photos by {self.behaviour.photo_sd:g}; "
            f"{self.trials.each} trials on each pair of arms out of {self.trials.photos} photos; two-sided test of "
            f"{self.population} at alpha = {self.alpha:g}{corrected}"
        )

    @property
    def null(self) -> float:
        """The first share if there is nothing to find."""
        return 0.5 if self.against is None else self.against

    def __post_init__(self) -> None:
        for share in (self.share, self.null):
            if not 0 < share < 1:
                raise AnalysisError(f"expected a share between 0 and 1, got {share}")
        if self.against is not None and self.trials.each < 2:
            raise AnalysisError("expected at least 2 trials a person, one with each arm, got 1")
        if not 0 < self.alpha < 1 or self.comparisons < 1:
            got = f"{self.alpha}, {self.comparisons}"
            raise AnalysisError(f"expected alpha between 0 and 1 and at least 1 comparison, got {got}")
        if self.population == "people and photos" and self.trials.photos < 2:
            raise AnalysisError("expected at least 2 photos to say anything about others, got 1")


@dataclass(frozen=True)
class EffectSize:
    """An effect as a researcher states it; what is None comes from the plan, else from 30 photos and 2 arms."""

    share: float = 0.6
    """Mean share of choices of the better arm; with --against, of right answers with it."""
    against: float | None = None
    """In tasks with right answers, their share with the other arm."""
    photos: int | None = None
    """Photos of the study."""
    trials: int | None = None
    """Main trials per person, each of another photo. By default all photos."""
    arms: int | None = None
    """Explanations to compare; every pair is tested, corrected for their number."""
    alpha: float | None = None
    """Level of the registered test."""
    population: Population | None = None
    """Whom the test speaks for: people on these photos, or also photos like these."""

    def between_two_arms(self, behaviour: Behaviour, plan: Plan | None = None) -> Effect:
        """The effect between two arms; of several arms each pair is shown in its part of the trials."""
        if plan is not None and (plan.task == "preference") != (self.against is None):
            no = "no " if plan.task == "preference" else ""
            raise AnalysisError(f"expected {no}share of right answers with the other arm, for the task is {plan.task}")
        stated: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        photos = stated.get("photos", 30 if plan is None else len(plan.photos))
        trials = stated.get("trials", photos if plan is None else min(plan.trials, photos))
        arms = stated.get("arms", 2 if plan is None else len(plan.arms))
        if arms < 2:
            raise AnalysisError(f"expected at least 2 arms, got {arms}")
        pairs = arms * (arms - 1) // 2
        # Side by side a trial is about one pair; else about one arm, and two arms of them are compared.
        each = trials // pairs if self.against is None else 2 * trials // arms
        if each < 1:
            raise AnalysisError(f"expected a trial or more of each of {pairs} pairs of arms, got {trials} trials")
        layout, analysis = Trials(photos, each), Analysis()
        if plan is not None:
            rules, analysis = plan.exclusions, plan.analysis
            layout = Trials(photos, each, len(plan.catches), rules.catches_to_pass, rules.share_to_complete)
        population, alpha = self.population or analysis.population, stated.get("alpha", analysis.alpha)
        return Effect(self.share, behaviour, layout, self.against, population, alpha, comparisons=pairs)
