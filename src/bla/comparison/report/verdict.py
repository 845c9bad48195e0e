"""The verdict in plain words: one sentence, the tests that the explanations could fail, and what is not shown."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bla.comparison.report.saved import Comparison, Difference
from bla.metrics.statistics import images_to_decide

Answer = Literal["for", "against", "open"]

_KEEP = "Do the selected cells' pixels alone keep the classifier's prediction more often than"
_TELL_MORE = "Do the selected cells tell more about the class than as many"
_LIE_ON_IT = "Do the selected cells lie on the object more often than"
_QUESTIONS: tuple[tuple[str, str, str, Literal[1, -1]], ...] = (
    ("kept", "random", f"{_KEEP} those of as many random cells?", 1),
    ("kept", "centre", f"{_KEEP} those of as many cells nearest to the centre?", 1),
    ("kept", "norm", f"{_KEEP} those of as many cells with the longest feature vectors?", 1),
    ("kept", "cam", f"{_KEEP} CAM's?", 1),
    ("removed", "cam", "Is the prediction lost without the selected cells' pixels more often than without CAM's?", -1),
    ("evaluator", "random", f"{_TELL_MORE} random cells?", 1),
    ("evaluator", "centre", f"{_TELL_MORE} cells nearest to the centre?", 1),
    ("evaluator", "norm", f"{_TELL_MORE} cells with the longest feature vectors?", 1),
    ("area", "cam", "Do the best 1 to 12 cells tell more about the class than CAM's?", 1),
    ("evaluator_left", "cam", "Do the cells left out tell less about the class than those that CAM leaves out?", -1),
    ("on_object", "cam", f"{_LIE_ON_IT} CAM's?", 1),
    ("on_object", "centre", f"{_LIE_ON_IT} as many cells nearest to the centre?", 1),
    ("on_object", "norm", f"{_LIE_ON_IT} as many cells with the longest feature vectors?", 1),
)
"""Metric, rival, question, and whether more or less of the metric is wanted."""
_MOST = 20_000
"""A difference that needs more photos than this is taken for none."""
_COMPARED = {1: "more", -1: "less"}
_UNMEASURED = {
    "evaluator": "what a head that was trained on few cells reads in them (--leakage)",
    "kept": "what the whole classifier says of the selected pixels (compare with --pixels)",
    "mask_only": "whether the shape of the selection gives the class away (--leakage)",
    "on_object": "whether the cells lie on the object (compare on photos with boxes or masks)",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A question, whether its answer speaks for or against the explanations, and the figures behind it.

    ``metric`` and ``rival`` are what it compares; ``photos`` would make an open difference significant.
    """

    question: str
    answer: Answer
    words: str
    metric: str = ""
    rival: str = ""
    photos: int | None = None


def findings(comparison: Comparison) -> list[Finding]:
    """The questions that this comparison has figures for, the weightiest first.

    An answer is "for" or "against" only if the sign of the difference is significant at 5% after the correction for
    several comparisons, else "open".
    """
    found = [_enough(comparison), *(_against(comparison, *question) for question in _QUESTIONS), _shape(comparison)]
    return [finding for finding in found if finding is not None]


def headline(comparison: Comparison) -> str:
    """Whether the whole classifier says the same from the selected pixels, against CAM's, in one sentence."""
    own, difference = comparison.figure(comparison.own, "kept"), comparison.difference("kept", "cam")
    if own is None:
        return "What the whole classifier says of the selected cells' pixels alone was not measured."
    photos = "1 photo" if own.images == 1 else f"{own.images:,} photos"
    if difference is None:
        return f"On {photos} these cells keep the prediction in {percent(own.mean, 0)} of the cases."
    shares = f"{percent(own.mean, 0)} against {percent(own.mean - difference.mean, 0)}"
    if not difference.sign:
        return f"On {photos} it is undecided whether these cells keep the prediction more often than CAM's: {shares}."
    return f"On {photos} these cells keep the prediction {_COMPARED[difference.sign]} often than CAM's: {shares}."


def decision(comparison: Comparison, found: list[Finding]) -> str:
    """Whether to use these explanations, in one sentence.

    By what the whole classifier says of the pixels; where that was not measured, by what a head reads in the cells.
    """
    pixels = [finding for finding in found if finding.metric == "kept"]
    told = pixels or [finding for finding in found if finding.metric in ("evaluator", "area")]
    by = "by what the classifier says of the pixels alone" if pixels else "as far as a head on the cells can tell"
    answers = {finding.rival: finding.answer for finding in told}
    names = {rival: comparison.title(rival) for rival in answers}

    def having(answer: Answer) -> str:
        given = [names[rival] for rival, found in answers.items() if found == answer]
        return " and ".join(filter(None, (", ".join(given[:-1]), *given[-1:])))

    if not answers:
        return "Nothing can be decided: compare with other methods."
    if against := having("against"):
        return f"Do not prefer these explanations: {against} did better, {by}."
    if not (opened := having("open")):
        return f"Use these explanations: they did better than {having('for')}, {by}."
    if answers.get("cam") == "open" and opened == names["cam"] and having("for"):
        better = f"they did better than {having('for')}, and no difference from CAM is established"
        return f"Use these explanations or CAM's: {better}, {by}."
    return f"Do not decide yet: no difference from {opened} is established, {by}."


def to_settle(found: list[Finding]) -> str:
    """What would settle the open questions, in a sentence; "" if none is open.

    >>> to_settle([Finding("q", "open", "w", photos=900), Finding("r", "open", "w", photos=90_000)])
    'To settle what is open: about 900 photos decide 1 question; 1 shows no difference that 20,000 photos could find.'
    """
    opened = [finding for finding in found if finding.answer == "open"]
    needed = [finding.photos for finding in opened if finding.photos is not None and finding.photos <= _MOST]
    small = sum(finding.photos is not None for finding in opened) - len(needed)
    unknown, parts = len(opened) - len(needed) - small, []
    if needed:
        parts.append(f"about {max(needed):,} photos decide {len(needed)} question{'s' * (len(needed) > 1)}")
    if small:
        parts.append(f"{small} show{'s' * (small == 1)} no difference that {_MOST:,} photos could find")
    if unknown:
        parts.append(f"{unknown} need{'s' * (unknown == 1)} more photos than these")
    return f"To settle what is open: {'; '.join(parts)}." if parts else ""


def not_shown(comparison: Comparison) -> list[str]:
    """What this comparison did not measure, so that it shows nothing of it."""
    return [words for metric, words in _UNMEASURED.items() if comparison.figure(comparison.own, metric) is None]


def summary(found: list[Finding]) -> str:
    """The tests counted, in one sentence.

    >>> summary([Finding("q", "for", "w"), Finding("q", "open", "w")])
    'Of 2 tests that these explanations could fail, they passed 1, failed none, and 1 is undecided.'
    """
    if not found:
        return "This comparison has no test that the explanations could fail: compare with more methods."
    counts = {answer: sum(finding.answer == answer for finding in found) for answer in ("for", "against", "open")}
    passed, failed, undecided = (str(count) if count else "none" for count in counts.values())
    tests = "1 test" if len(found) == 1 else f"{len(found)} tests"
    verb = "is" if counts["open"] < 2 else "are"
    return (
        f"Of {tests} that these explanations could fail, they passed {passed}, failed {failed}, "
        f"and {undecided} {verb} undecided."
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
    """Accuracy from the selected cells against that from all cells, where the photos have labels."""
    whole = comparison.record["baseline"]["accuracy"]
    own = comparison.figure(comparison.own, "accuracy")
    if own is None or whole is None:
        return None
    size = comparison.record["size"]["mean"]
    answer: Answer = "against" if own.high < whole else "for" if own.low >= whole - 0.01 else "open"
    words = (
        f"From {size:.1f} of {comparison.cells} cells, {percent(own.mean)} of the photos are classified correctly (95% "
        f"interval {percent(own.low)} to {percent(own.high)}), from all cells {percent(whole)}. Passed if the interval "
        "lies above one point less than that, failed if it lies below it."
    )
    return Finding("Are the selected cells enough to predict the class?", answer, words)


def _against(comparison: Comparison, metric: str, rival: str, question: str, wanted: int) -> Finding | None:
    """The difference from a rival in a metric of which more (1) or less (-1) is wanted; None if it was not measured."""
    if metric == "evaluator" and comparison.figure(rival, metric) is None:
        metric = "area"
    if metric == "area" and comparison.record["judge"] == "baseline":  # no evaluator was trained
        question = f"By the classifier's own head, {question[:1].lower()}{question[1:]}"
    difference, own = comparison.difference(metric, rival), comparison.figure(comparison.own, metric)
    if difference is None or own is None:
        return None
    title = str(comparison.metrics[metric]["title"])
    words = (
        f"{title[:1].upper()}{title[1:]}: {percent(own.mean)}, against {percent(own.mean - difference.mean)} for "
        f"{comparison.title(rival)}{', which reads every cell to choose' if rival == 'cam' else ''}: "
    )
    words += f"{points(difference)}."
    each = comparison.paired(metric, rival)
    needed = images_to_decide(each) if each and not difference.sign else None
    if needed is not None and needed > len(each):
        words += f" A difference of this size would need about {needed:,} photos."
    return Finding(question, _answer(difference.sign * wanted), words, metric, rival, needed)


def _shape(comparison: Comparison) -> Finding | None:
    """How much of the class the shape of the selection alone reveals, against CAM's."""
    own, cam = comparison.figure(comparison.own, "mask_only"), comparison.figure("cam", "mask_only")
    difference = comparison.difference("mask_only", "cam")
    if own is None:
        return None
    chance = percent(comparison.record["leakage"]["chance"])
    words = f"A probe that sees only which cells were selected predicts the class of {percent(own.mean)} of the photos"
    if cam is None or difference is None:
        question = "Is the shape of the selection free of information about the class?"
        answer: Answer = "for" if own.low <= comparison.record["leakage"]["chance"] else "against"
        return Finding(question, answer, f"{words}; chance is {chance}.")
    question = "Does the shape of the selection reveal less about the class than CAM's?"
    words += f", from CAM's cells {percent(cam.mean)}; chance is {chance}."
    return Finding(question, _answer(-difference.sign), words)


def _answer(sign: int) -> Answer:
    return "open" if sign == 0 else "for" if sign > 0 else "against"
