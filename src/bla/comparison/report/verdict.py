"""The verdict in plain words: the questions that a comparison can answer, and what it answered."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from bla.comparison.report.saved import Comparison, Difference

Answer = Literal["for", "against", "open"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A question, whether the answer speaks for the explanations or against them, and the figures behind it."""

    question: str
    answer: Answer
    words: str

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def findings(comparison: Comparison) -> list[Finding]:
    """The questions that this comparison has figures for, in the order of weight.

    An answer is "for" or "against" only where the sign of the difference is established at 5% after the correction
    for many comparisons; "open" otherwise.
    """
    asked = [
        _enough(comparison),
        *(_against_control(comparison, control) for control in ("random", "centre", "norm")),
        _against_cam(comparison, "area", "Does it keep as much of the class as CAM, at every size from 1 to 12?", 1),
        _against_cam(comparison, "evaluator_left", "Does it leave less of the class behind than CAM?", -1),
        _against_cam(comparison, "on_object", "Does it lie on the object more than CAM?", 1),
        *(_on_object(comparison, control) for control in ("centre", "norm")),
        _shape(comparison),
    ]
    return [finding for finding in asked if finding is not None]


def summary(found: list[Finding]) -> str:
    """One sentence for the top of the page.

    >>> summary([Finding("q", "for", "w"), Finding("q", "open", "w")])
    '2 questions could refute these explanations: 1 answered for them, none against, 1 left open.'
    """
    if not found:
        return "This comparison holds no figure that could refute the explanations: compare with more methods."
    counts = {answer: sum(finding.answer == answer for finding in found) for answer in ("for", "against", "open")}
    words = {answer: str(count) if count else "none" for answer, count in counts.items()}
    many = "1 question" if len(found) == 1 else f"{len(found)} questions"
    return (
        f"{many} could refute these explanations: {words['for']} answered for them, {words['against']} against, "
        f"{words['open']} left open."
    )


def percent(value: float, digits: int = 1) -> str:
    """A share for people.

    >>> percent(0.8934), percent(-0.004)
    ('89.3%', '-0.4%')
    """
    return f"{100 * value:.{digits}f}%"


def points(difference: Difference) -> str:
    """A difference of two shares, with its interval.

    >>> points(Difference(0.021, 0.011, 0.031, 0.001))
    '+2.1 points (95% interval +1.1 to +3.1)'
    """
    mean, low, high = (f"{100 * value:+.1f}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} points (95% interval {low} to {high})"


def _enough(comparison: Comparison) -> Finding | None:
    """From the selected cells against from all cells, where the photos have labels."""
    whole = comparison.record.get("baseline", {}).get("accuracy")
    own = comparison.figure(comparison.own, "accuracy")
    if own is None or whole is None:
        return None
    size = comparison.record["size"]["mean"]
    answer: Answer = "against" if own.high < whole else "for" if own.low >= whole - 0.01 else "open"
    return Finding(
        "Are the selected cells enough?",
        answer,
        f"From {size:.1f} of {comparison.cells} cells the class is named in {percent(own.mean)} of the photos (95% "
        f"interval {percent(own.low)} to {percent(own.high)}); from all cells in {percent(whole)}. In favour: the "
        "interval stays within a point below; against: it lies below.",
    )


def _against_control(comparison: Comparison, control: str) -> Finding | None:
    metric = "evaluator" if comparison.figure(control, "evaluator") else "area"
    question = f"Do the cells hold more of the class than the same number chosen by {_control(control)}?"
    return _against(comparison, metric, control, question)


def _on_object(comparison: Comparison, control: str) -> Finding | None:
    """Against what lies on the object without being trained: objects are mostly in the middle, and long vectors."""
    question = f"Does it lie on the object more than the same number chosen by {_control(control)}?"
    return _against(comparison, "on_object", control, question)


def _against_cam(comparison: Comparison, metric: str, question: str, wanted: int) -> Finding | None:
    return _against(comparison, metric, "cam", question, wanted=wanted, aside=", which reads every cell to choose")


def _against(
    comparison: Comparison, metric: str, rival: str, question: str, *, wanted: int = 1, aside: str = ""
) -> Finding | None:
    """The difference from a rival in a metric, of which more (1) or less (-1) is wanted; None where it is unknown."""
    difference, own = comparison.difference(metric, rival), comparison.figure(comparison.own, metric)
    if difference is None or own is None:
        return None
    return Finding(
        question,
        _answered(difference.sign * wanted),
        f"{_named(comparison, metric)}: {percent(own.mean)}, against {percent(own.mean - difference.mean)} for "
        f"{comparison.title(rival)}{aside}: {points(difference)}.",
    )


def _shape(comparison: Comparison) -> Finding | None:
    """Whether the class can be read from the shape of the selection alone, more than from CAM's."""
    own, cam = comparison.figure(comparison.own, "mask_only"), comparison.figure("cam", "mask_only")
    difference = comparison.difference("mask_only", "cam")
    if own is None:
        return None
    chance = comparison.record["leakage"]["chance"]
    words = f"A probe that sees only which cells were selected names the class in {percent(own.mean)}"
    if cam is None or difference is None:
        return Finding(
            "Does the shape of the selection give the class away?",
            "for" if own.low <= chance else "against",
            f"{words}; chance is {percent(chance)}.",
        )
    return Finding(
        "Does the shape of the selection give the class away, more than CAM's does?",
        _answered(-difference.sign),
        f"{words}; from CAM's shapes in {percent(cam.mean)}, by chance in {percent(chance)}.",
    )


def _control(control: str) -> str:
    return {"random": "chance", "centre": "nearness to the middle", "norm": "the length of the feature vector"}[control]


def _named(comparison: Comparison, metric: str) -> str:
    title = str(comparison.metrics[metric]["title"])
    return title[:1].upper() + title[1:]


def _answered(sign: int) -> Answer:
    if sign == 0:
        return "open"
    return "for" if sign > 0 else "against"
