"""The picture for people: a large overlay, and below it, in words, what the classifier and the marked regions say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from PIL import Image, ImageDraw

from bla.explanations.lettering import font, legible, length, percent, wrapped
from bla.explanations.panel import ALARM, INK, QUIET
from bla.explanations.render import WHITE, Heat, embedded, overlay
from bla.explanations.result import Prediction, Result

SMALLEST, LARGEST = 360, 1200
"""The long side of the photo in a picture, unless a width is asked for: its own, between these."""


class Words(NamedTuple):
    """What a picture says: the answer and its probability, a sentence on the regions, one on the check, small print.

    ``alarming``: the classifier's own answer is another than that of the regions.
    """

    answer: str
    share: str
    regions: str
    check: str
    small: str
    alarming: bool


def words(explanation: Result, *, plain: bool = False) -> Words:
    """An explanation in plain words; ``plain`` in letters that a picture can be written in."""

    def name(guess: Prediction) -> str:
        return legible(guess.label, f"class {guess.index}") if plain else guess.label

    def of(guess: Prediction) -> str:
        return f"{name(guess)} ({percent(guess.probability)})"

    own, said = explanation.classifier or explanation.prediction, explanation.prediction
    answer, share = name(own), percent(own.probability)
    layer = "" if explanation.slice is None else f" ({explanation.view})"
    outlined = f"Outlined: {explanation.size} of {explanation.cells} regions{layer}."
    they, alone = ("they", "alone they say") if explanation.size > 1 else ("it", "alone it says")
    if explanation.present is not None:
        there = {votes.target for votes in explanation.present}
        found = [of(guess) for guess in explanation.top if guess.index in there]
        answer, share = ", ".join(found) or "no label above 50%", ""
        alone = f"The classifier says the same of all {explanation.cells}."
        regions = f"{outlined} {alone if explanation.agrees else 'The classifier has other labels from all regions!'}"
    elif (asked := explanation.asked) is not None:
        chosen = legible(asked, f"class {explanation.target}") if plain else asked
        regions = f"{outlined[:-1]}, chosen for {chosen}. {alone.capitalize()} {of(said)}."
    elif explanation.classifier is None:
        regions = f"{outlined} The answer is made from {they.replace('they', 'them')} alone."
    elif explanation.agrees:
        regions = f"{outlined} {alone.capitalize()} the same ({percent(said.probability)})."
    else:
        regions = f"{outlined} {alone.capitalize()} something else: {of(said)}!"
    if (votes := explanation.votes) is not None:
        labels = [legible(label, "?") if plain else label for label in votes.labels]
        against = f"for {labels[1]}" if len(labels) > 1 else "against it"
        regions += f" Blue speaks for {labels[0]}, orange {against}."
    check = ""
    if (found_by := explanation.check) is not None:
        still = ["still " * (guess.index == found_by.about.index) for guess in (found_by.kept, found_by.removed)]
        kept, removed = of(found_by.kept), of(found_by.removed)
        check = (
            f"Shown only these pixels, the classifier {still[0]}says {kept}; shown all but these, {still[1]}{removed}."
        )
    shown = explanation.shown and f"shown: {explanation.shown}"
    small = " · ".join(dict.fromkeys(filter(None, (shown, explanation.model, explanation.method))))
    return Words(answer, share, regions, check, legible(small, "") if plain else small, explanation.disagrees)


def picture(
    photo: Image.Image, explanation: Result, *, width: int | None = None, heat: Heat | None = None
) -> Image.Image:
    """The overlay, large, and below it the classifier's answer, and what the selected regions alone say.

    If that is another class, the sentence stands white on red, with a warning sign. ``width`` is the picture's in
    pixels, at least 120; by default it follows from the photo's own size. Text is as large as can be read when the
    picture is shown 200 pixels wide. ``heat`` as in :func:`bla.explanations.render.overlay`.

    >>> from bla.explanations.result import Prediction, Result
    >>> cat = Prediction(281, "tabby", 0.9)
    >>> maps = dict(grid=(1, 2), unbounded=[[0.5, -1]], scores=[[0, -1]], soft=None, selected=[[1, 0]])
    >>> why = Result("cat.jpg", cat, (cat,), "BLA", region=(0, 0, 64, 48), **maps)
    >>> picture(Image.new("RGB", (64, 48), "tan"), why, width=300).width
    300
    """
    if width is not None and width < 120:
        raise ValueError(f"expected a width of at least 120 pixels for a picture, got {width}")
    across, down = photo.size
    scale = min(max(1.0, SMALLEST / max(photo.size)), LARGEST / max(photo.size))
    narrow = 0.6  # a picture is at least this wide, relative to the photo's height
    if width is not None:
        scale = min(width / across, width / (narrow * down))
    shown = max(1, round(across * scale)), max(1, round(down * scale))
    width = width or max(shown[0], round(narrow * shown[1]))
    drawn = overlay(photo, explanation, size=shown, heat=heat)
    unit = min(max(width / 20, min(11, width / 17)), max(shown[1] / 3, width / 26))
    caption = _caption(words(explanation, plain=True), width, unit)
    whole = Image.new("RGB", (width, shown[1] + caption.height), WHITE)
    whole.paste(drawn, ((width - shown[0]) // 2, 0))
    whole.paste(caption, (0, shown[1]))
    return whole


def _caption(said: Words, width: int, unit: float) -> Image.Image:
    """The words below the overlay, in letters of about ``unit`` pixels."""
    large, medium, small = (max(8, round(factor * unit)) for factor in (1.45, 1, 0.7))
    margin, room = round(0.6 * unit), width - 2 * round(0.6 * unit)
    title = wrapped(said.answer, large, room, 3)
    gap = round(0.35 * large)
    beside = bool(title) and length(title[-1], large) + gap + length(said.share, large) <= room
    sign = round(1.3 * medium) if said.alarming else 0
    told = wrapped(said.regions, medium, room - sign - bool(sign) * gap, 5)
    checked = wrapped(said.check, medium, room, 4)
    printed = wrapped(said.small, small, room, 1) if small >= 9 else []

    pitch = {size: round(1.28 * size) for size in (large, medium, small)}
    heights = [(len(title) + (not beside and bool(said.share))) * pitch[large]]
    heights += [len(told) * pitch[medium] + bool(sign) * margin]
    heights += [len(checked) * pitch[medium], len(printed) * pitch[small]]
    space = round(0.3 * unit)
    canvas = Image.new(
        "RGB", (width, 2 * margin + sum(heights) + space * sum(height > 0 for height in heights[1:])), WHITE
    )
    draw = ImageDraw.Draw(canvas)

    def write(lines: Sequence[str], x: int, y: int, size: int, ink: tuple[int, ...]) -> int:
        for line in lines:
            draw.text((x, y + round(0.98 * size)), line, ink, font(size, line), anchor="ls")
            y += pitch[size]
        return y

    y = write(title, margin, margin, large, INK)
    if beside:
        write([said.share], margin + length(title[-1], large) + gap, y - pitch[large], large, QUIET)
    else:
        y = write([said.share] if said.share else [], margin, y, large, QUIET)
    y += space
    if sign:
        draw.rectangle((0, y, width, y + heights[1] - 1), fill=ALARM)
        _warn(draw, margin, y + (heights[1] - sign) // 2, sign)
        y = write(told, margin + sign + gap, y + margin // 2, medium, WHITE) + margin - margin // 2
    else:
        y = write(told, margin, y, medium, INK)
    if checked:
        y = write(checked, margin, y + space, medium, INK)
    write(printed, margin, y + space, small, QUIET)
    return canvas


def _warn(draw: ImageDraw.ImageDraw, x: int, y: int, side: int) -> None:
    """A warning sign, so that the alarm is more than a colour."""
    draw.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=WHITE)
    middle, stroke = x + side / 2, max(1, round(side / 12))
    draw.rectangle((middle - stroke, y + 0.38 * side, middle + stroke, y + 0.7 * side), fill=ALARM)
    draw.rectangle((middle - stroke, y + 0.78 * side, middle + stroke, y + 0.78 * side + 2 * stroke), fill=ALARM)


def heading(text: str, width: int) -> Image.Image:
    """A line of text as wide as a picture."""
    return _caption(Words(legible(text, "?"), "", "", "", "", False), width, width / 20)


def tiled(pictures: Sequence[Image.Image], columns: int, gap: int = 16) -> Image.Image:
    """Pictures in rows, each row as high as its highest."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(sum(each.width + gap for each in row) for row in rows) + gap
    sheet = Image.new("RGB", (width, sum(max(each.height for each in row) + gap for row in rows) + gap), WHITE)
    y = gap
    for row in rows:
        x = gap
        for each in row:
            sheet.paste(each, (x, y))
            x += each.width + gap
        y += max(each.height for each in row) + gap
    return sheet


def columns_of(count: int) -> int:
    """For so many pictures: a sheet somewhat wider than high, of at most five columns."""
    return min(5, count, math.ceil(math.sqrt(1.5 * count)))


def figure(photo: Image.Image, explanation: Result, width: int) -> str:
    """HTML of a small overlay with its words as text, in whatever script."""
    said = words(explanation)
    height = max(1, round(photo.height * width / photo.width))
    source = embedded(overlay(photo, explanation, size=(width, height)), "jpeg", quality=85)
    alarm = ' style="background:#be001e;color:#fff;padding:.3em .5em"' if said.alarming else ""
    return (
        f'<figure style="margin:0;max-width:{width}px"><img src="{source}" width="{width}" height="{height}" '
        f'alt="{escape(said.answer)}: the overlay"><figcaption><strong>{escape(said.answer)}</strong> '
        f"{escape(said.share)}<div{alarm}>{'⚠ ' if said.alarming else ''}{escape(said.regions)}</div>"
        f"<div>{escape(said.check)}</div></figcaption></figure>"
    )
