"""What a study found, in words: the verdict, a methods paragraph for a paper, one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path

from markupsafe import Markup

from bla.files import write_atomically
from bla.study.bradley_terry import PRIOR
from bla.study.figures import Results, figures
from bla.study.pages import environment


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


def level_of(results: Results) -> str:
    """The level of the intervals of the comparisons, all together 1 - alpha."""
    level = 100 * (1 - results["registered"]["alpha"] / len(results["comparisons"]))
    return f"{level:.0f}%" if round(level, 6).is_integer() else f"{level:.1f}%"


def verdicts(results: Results) -> list[str]:
    """What the registered test says of each pair of arms, a sentence each; "Simulated: " before it where it is."""
    prefix = "Simulated: " if results["simulated"] else ""
    key = results["registered"]["population"].replace(" ", "_")
    choice = results["registered"]["task"] == "preference"
    said = []
    for entry, decision in zip(results["comparisons"], results["decision"], strict=True):
        first, second = entry["first"], entry["second"]
        found = entry[key]
        if found is None:
            reason = "nobody analysed compared them" if not entry["values"] else "it takes 2 people and 2 photos"
            said.append(f"{prefix}{first} and {second} cannot be tested: {reason}.")
            continue
        mean, low, high = (percent(found[k], 1) if choice else points(found[k]) for k in ("mean", "low", "high"))
        measure = "of a person's choices fell on" if choice else "points of right answers with"
        numbers = (
            f"{mean} {measure} {first} ({level_of(results)} interval {low} to {high}); {p_value(decision['p'])}, "
            f"{_people(len(entry['values']))}"
        )
        if decision["better"] is None:
            what = "preference" if choice else "difference"
            said.append(f"{prefix}no {what} between {first} and {second} was shown: {numbers}.")
        else:
            other = second if decision["better"] == first else first
            verb = "preferred to" if choice else "more helpful than"
            said.append(f"{prefix}{decision['better']} was {verb} {other}: {numbers}.")
    return [text[:1].upper() + text[1:] for text in said]


def _people(number: int) -> str:
    return "1 person" if number == 1 else f"{number} people"


def cautions(results: Results) -> list[str]:
    """What a reader must know before believing the verdict."""
    analysed, planned = results["people"]["analysed"], results["people"]["planned"]
    said = []
    if analysed < planned:
        said.append(
            f"{analysed} of {planned} planned people can be analysed so far. This is an interim look: to stop or to "
            "continue because of it breaks the registered test."
        )
    elif analysed > planned:
        said.append(
            f"{analysed} people are analysed where {planned} were planned. If people were added because of results, "
            "the registered test does not hold."
        )
    if identical := results["registered"]["identical_photos"]:
        said.append(
            f"In {identical} of {results['registered']['photos']} photos two arms show the same picture: answers there "
            "do not depend on the arms, which makes differences look smaller."
        )
    pairs = len(results["comparisons"])
    tested = [entry["people"] for entry in results["comparisons"] if entry["people"] is not None]
    powerless = [found for found in tested if 2 / found["subsets"] * pairs > results["registered"]["alpha"]]
    if powerless:
        said.append(
            f"With {_people(powerless[0]['people'])} the exact test cannot find anything: its smallest p-value is "
            f"{2 / powerless[0]['subsets'] * pairs:.2f}."
        )
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
    template = environment().get_template("methods.txt")
    tested = (entry["people"] for entry in results["comparisons"] if entry["people"] is not None)
    said = template.render(
        results=results,
        registered=results["registered"],
        people=results["people"],
        choice=results["registered"]["task"] == "preference",
        test=next(tested, None),
        prior=f"{PRIOR:g}",
        verdicts=verdicts(results),
    )
    return " ".join(said.split())


def page(results: Results) -> str:
    """One HTML page that needs no other file."""
    templates = environment()
    templates.filters |= {"percent": percent, "points": points, "p_value": p_value}
    word = "Simulated: " if results["simulated"] else ""
    drawn = figures(results, verdicts(results))
    return templates.get_template("results.html").render(
        results=results,
        choice=results["registered"]["task"] == "preference",
        key=results["registered"]["population"].replace(" ", "_"),
        level=level_of(results),
        verdicts=verdicts(results),
        cautions=cautions(results),
        methods=methods(results),
        figures={name: (Markup(figure.svg(word)), figure.caption) for name, figure in drawn.items()},
        word=word,
    )


def as_json(results: Results) -> str:
    """All numbers, verdicts, cautions and the methods paragraph, as one JSON object."""
    words = {"verdicts": verdicts(results), "cautions": cautions(results), "methods": methods(results)}
    return json.dumps(dict(results) | words, allow_nan=False)


def save(results: Results, path: Path) -> tuple[Path, Path]:
    """Write the page, and the numbers beside it as JSON; returns both paths."""
    numbers = write_atomically(path.with_suffix(".json"), as_json(results).encode())
    return write_atomically(path, page(results).encode()), numbers
