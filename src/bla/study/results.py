"""What a study found, in words: the verdict, a methods paragraph for a paper, one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bla.study import figures
from bla.study.bradley_terry import PRIOR
from bla.study.registered import PREFERENCE

Results = Mapping[str, Any]

ACTIVITIES = {
    PREFERENCE: "which of two explanations of a photo answers the question better",
    "prediction": "what the classifier says, from the explanation alone",
    "agreement": "whether the classifier is right, with its explanation in view",
}


def percent(value: float | None, digits: int = 0) -> str:
    """A share as people read it.

    >>> percent(0.625), percent(0.0312, 1), percent(None)
    ('62%', '3.1%', 'unknown')
    """
    return "unknown" if value is None else f"{100 * value:.{digits}f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    """A p-value as papers write it.

    >>> p_value(0.0123), p_value(0.00001), p_value(1.0)
    ('p = .012', 'p < .001', 'p = 1')
    """
    if p < 0.001:
        return "p < .001"
    text = f"{p:.3f}" if p < 0.1 else f"{p:.2f}"
    return "p = 1" if float(text) == 1 else f"p = {text[1:]}"


def of_population(results: Results) -> str:
    """The key of the registered test in a comparison."""
    return "people" if results["registered"]["population"] == "people" else "people_and_photos"


def level_of(results: Results) -> str:
    """The level of the intervals of the comparisons, all together 1 - alpha."""
    level = 100 * (1 - results["registered"]["alpha"] / len(results["comparisons"]))
    return f"{level:.0f}%" if round(level, 6).is_integer() else f"{level:.1f}%"


def verdicts(results: Results) -> list[str]:
    """What the registered test says of each pair of arms, a sentence each; "Simulated: " before it where it is."""
    prefix = "Simulated: " if results["simulated"] else ""
    key = of_population(results)
    choice = results["registered"]["task"] == PREFERENCE
    said = []
    for entry, decision in zip(results["comparisons"], results["decision"], strict=True):
        first, second = entry["first"], entry["second"]
        found = entry[key]
        if found is None:
            reason = "nobody analysed compared them" if not entry["values"] else "it takes 2 people and 2 photos"
            said.append(f"{prefix}{first} and {second} cannot be tested: {reason}.")
            continue
        numbers = f"{_of(results, entry, found, choice)}; {p_value(decision['p'])}, {_people(len(entry['values']))}"
        if decision["better"] is None:
            what = "preference" if choice else "difference"
            said.append(f"{prefix}no {what} between {first} and {second} was shown: {numbers}.")
        else:
            other = second if decision["better"] == first else first
            verb = "preferred to" if choice else "more helpful than"
            said.append(f"{prefix}{decision['better']} was {verb} {other}: {numbers}.")
    return [text[:1].upper() + text[1:] for text in said]


def _of(results: Results, entry: Mapping[str, Any], found: Mapping[str, Any], choice: bool) -> str:
    level = level_of(results)
    if choice:
        return (
            f"{percent(found['mean'], 1)} of a person's choices fell on {entry['first']} "
            f"({level} interval {percent(found['low'], 1)} to {percent(found['high'], 1)})"
        )
    return (
        f"{points(found['mean'])} points of right answers with {entry['first']} "
        f"({level} interval {points(found['low'])} to {points(found['high'])})"
    )


def _people(number: int) -> str:
    return "1 person" if number == 1 else f"{number} people"


def cautions(results: Results) -> list[str]:
    """What a reader must know before believing the verdict."""
    people = results["people"]
    said = []
    if people["analysed"] < people["planned"]:
        said.append(
            f"{people['analysed']} of {people['planned']} planned people can be analysed so far. This is a look on the "
            "way: stopping because of it, or going on because of it, breaks the registered test."
        )
    elif people["analysed"] > people["planned"]:
        said.append(
            f"{people['analysed']} people are analysed where {people['planned']} were planned. If people were added "
            "because of results, the registered test does not hold."
        )
    for entry in results["comparisons"]:
        found = entry["people"]
        if found is not None and 2 / found["subsets"] * len(results["comparisons"]) > results["registered"]["alpha"]:
            said.append(
                f"With {_people(found['people'])} the exact test cannot find anything: its smallest p-value is "
                f"{2 / found['subsets'] * len(results['comparisons']):.2f}."
            )
            break
    groups = (results["strengths"] or {}).get("groups", [])
    if len(groups) > 1:
        said.append(
            "No chain of comparisons connects "
            + " with ".join(" and ".join(group) for group in groups)
            + ": the strengths of one group say nothing about the other."
        )
    return said


def methods(results: Results) -> str:
    """A paragraph for the methods section of a paper, with this study's numbers."""
    r, people = results["registered"], results["people"]
    choice = r["task"] == PREFERENCE
    pairs = len(results["comparisons"])
    who = "simulated participants (no people)" if results["simulated"] else "people"
    arms = ", ".join(r["arms"][:-1]) + " and " + r["arms"][-1] if len(r["arms"]) > 1 else r["arms"][0]
    reasons = ", ".join(f"{number} for {reason}" for reason, number in people["reasons"].items())
    text = [
        f"{people['took_part']} {who} took part, {people['finished']} to the end; each was to answer {r['trials']} "
        f"trials about explanations by {arms}: {ACTIVITIES[r['task']]}, the arms unnamed, their sides and order "
        "balanced and shuffled for each participant.",
        f"By rules fixed before data collection {len(people['excluded'])} participants were excluded"
        + (f" ({reasons}; one may have several reasons)" if reasons else "")
        + f", which left {people['analysed']} with {results['trials']} main trials (planned: {people['planned']}).",
        "The participant was the unit of analysis: we averaged "
        + (
            "each participant's share of choices in favour of the first arm of a pair"
            if choice
            else "each participant's difference in the share of right answers between two arms"
        )
        + " over participants and tested the mean against "
        + ("1/2" if choice else "0")
        + " by flipping the signs of the participants' deviations (two-sided; "
        + _subsets(results)
        + "); the interval is the set of means that this test does not reject (Hartigan, 1969).",
        "We also tested and bounded the same mean with participants and photos both random, by two-way clustered "
        "variance (Cameron, Gelbach & Miller, 2011) with Satterthwaite's degrees of freedom, and by a two-way "
        "bootstrap (Owen, 2007)."
        + (
            " The test over participants, on the photos of the study, was the registered one."
            if r["population"] == "people"
            else " This test was the registered one."
        ),
    ]
    if pairs > 1:
        text.append(
            f"P-values of the {pairs} pairs of arms were corrected by Holm's method at alpha = {r['alpha']:g}, and "
            "intervals by Bonferroni's."
        )
    else:
        text.append(f"Alpha was {r['alpha']:g}.")
    if results["strengths"] is not None:
        text.append(
            "Strengths of all arms are those of the Bradley-Terry model with a normal prior of standard deviation "
            f"{PRIOR:g} logits, with percentile intervals from a bootstrap of participants."
        )
    text.append("Trials were never pooled across participants for inference.")
    text.append(" ".join(verdicts(results)))
    return " ".join(text)


def _subsets(results: Results) -> str:
    for entry in results["comparisons"]:
        if entry["people"] is not None:
            found = entry["people"]
            if found["exact"]:
                return f"all {found['subsets']:,} assignments"
            return f"{found['subsets']:,} random assignments, the observed one included (Phipson & Smyth, 2010)"
    return "no participant could be analysed"


def page(results: Results) -> str:
    """One HTML page that needs no other file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("bla.study"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "p_value": p_value}
    return environment.get_template("results.html").render(
        results=results,
        choice=results["registered"]["task"] == PREFERENCE,
        activity=ACTIVITIES[results["registered"]["task"]],
        key=of_population(results),
        level=level_of(results),
        verdicts=verdicts(results),
        cautions=cautions(results),
        methods=methods(results),
        figures={name: (Markup(svg), caption) for name, (svg, caption) in drawn(results).items()},
        word="Simulated: " if results["simulated"] else "",
    )


def drawn(results: Results) -> dict[str, tuple[str, str]]:
    """The page's figures: name -> (SVG, what it shows in words)."""
    choice = results["registered"]["task"] == PREFERENCE
    word = "Simulated: " if results["simulated"] else ""
    found = {"people": _figure_of_people(results, choice, word)}
    if results["strengths"] is not None and results["strengths"]["arms"]:
        found["strengths"] = _figure_of_strengths(results, word)
    if results["accuracy"]:
        found["accuracy"] = _figure_of_accuracy(results, word)
    if results["exploratory"]["photos"]:
        found["photos"] = _figure_of_photos(results, choice, word)
    quality = results["quality"]
    if quality["seconds"] is not None:
        found["seconds"] = _figure_of_values(
            quality["seconds"]["medians"],
            figures.seconds_axis(quality["seconds"]["medians"]),
            "seconds",
            f"{word}Response times",
            f"Each dot is one person's median time for a trial. Half of the people's medians lie between "
            f"{quality['seconds']['lower_quartile']:.1f} and {quality['seconds']['upper_quartile']:.1f} s.",
        )
    if quality["side"] is not None:
        found["side"] = _figure_of_values(
            quality["side"]["values"],
            figures.share_axis("answers on the left"),
            "side",
            f"{word}Sides",
            "Each dot is one person's share of answers on the left. Sides are balanced, so without a habit of hand or "
            "eye it is about 50%.",
        )
    return found


def _figure_of_people(results: Results, choice: bool, word: str) -> tuple[str, str]:
    rows = []
    values: list[float] = []
    for entry in results["comparisons"]:
        intervals = []
        for key, label in (("people", "these photos"), ("people_and_photos", "photos like these")):
            if (one := entry[key]) is not None:
                intervals.append(figures.Interval(one["mean"], one["low"], one["high"], label))
                values += [one["low"], one["high"]]
        values += entry["values"]
        name = (
            f"{entry['first']} rather than {entry['second']}" if choice else f"{entry['first']} less {entry['second']}"
        )
        rows.append(figures.Row(name, tuple(entry["values"]), tuple(intervals)))
    axis = (
        figures.share_axis("share of a person's choices")
        if choice
        else figures.difference_axis(values, "difference in right answers, points")
    )
    caption = (
        "Each dot is one person: the share of their choices that fell on the first-named arm."
        if choice
        else "Each dot is one person: their right answers with the first-named arm less those with the other."
    )
    caption += (
        " Below them the mean over people with its interval: filled for these photos, hollow for photos like these."
        f" Dashed: no {'preference' if choice else 'difference'}."
    )
    title = f"{word}What people chose" if choice else f"{word}What helped people"
    description = f"{caption} " + " ".join(verdicts(results))
    return figures.figure(rows, axis, name="people", title=title, description=description), caption


def _figure_of_strengths(results: Results, word: str) -> tuple[str, str]:
    arms = sorted(results["strengths"]["arms"], key=lambda entry: -entry["strength"])
    rows = [
        figures.Row(
            a["arm"], intervals=(figures.Interval(a["strength"], a["low"], a["high"], f"{a['strength']:+.2f}"),)
        )
        for a in arms
    ]
    axis = figures.logit_axis([value for a in arms for value in (a["low"], a["high"])])
    caption = (
        "Each arm's strength by the Bradley-Terry model, in logits about their mean, with its interval from a "
        "bootstrap of people. An arm that is 1 logit stronger wins 73% of the choices between the two."
    )
    order = ", ".join(f"{a['arm']} {a['strength']:+.2f}" for a in arms)
    title = f"{word}Strengths of the arms"
    return (
        figures.figure(rows, axis, name="strengths", title=title, description=f"{caption} {order}."),
        caption,
    )


def _figure_of_accuracy(results: Results, word: str) -> tuple[str, str]:
    rows = [
        figures.Row(
            a["arm"], tuple(a["values"]), (figures.Interval(a["mean"], a["low"], a["high"], percent(a["mean"], 1)),)
        )
        for a in results["accuracy"]
        if a["people"]
    ]
    caption = (
        "Each dot is one person: the share of their answers with this arm that were right. Below, the mean over people."
    )
    told = ", ".join(f"{a['arm']} {percent(a['mean'], 1)}" for a in results["accuracy"])
    svg = figures.figure(
        rows,
        figures.share_axis("right answers"),
        name="accuracy",
        title=f"{word}Right answers with each arm",
        description=f"{caption} {told}.",
    )
    return svg, caption


def _figure_of_photos(results: Results, choice: bool, word: str) -> tuple[str, str]:
    groups: dict[str, list[float]] = {}
    for photo in results["exploratory"]["photos"]:
        name = f"{photo['first']} rather than {photo['second']}" if choice else str(photo["first"])
        groups.setdefault(name, []).append(photo["share"])
    caption = (
        "Exploratory. Each dot is one photo: the share of people who chose the first-named arm."
        if choice
        else "Exploratory. Each dot is one photo: the share of people who answered rightly with this arm."
    )
    svg = figures.figure(
        [figures.Row(name, tuple(values)) for name, values in groups.items()],
        figures.share_axis("people choosing it" if choice else "right answers"),
        name="photos",
        title=f"{word}Photo by photo",
        description=caption,
    )
    return svg, caption


def _figure_of_values(
    values: Sequence[float], axis: figures.Axis, name: str, title: str, caption: str
) -> tuple[str, str]:
    return figures.figure([figures.Row("", tuple(values))], axis, name=name, title=title, description=caption), caption


def as_json(results: Results) -> str:
    """All figures, verdict, cautions and methods paragraph, as one JSON object."""
    told = {"verdicts": verdicts(results), "cautions": cautions(results), "methods": methods(results)}
    return json.dumps(dict(results) | told, allow_nan=False)
