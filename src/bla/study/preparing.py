"""From saved explanations of the same photos to a study's folder: plan, pictures, texts, secrets. All or nothing.

STUDY/plan.json       the registered plan (`plan`)
STUDY/texts.toml      everything participants read (`texts`), free to be changed before the first person begins
STUDY/pictures/       one JPEG a picture, under random names (`pictures`)
STUDY/secrets.json    the server's key and the hash of the researcher's secret; for the owner's eyes
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from bla.data.photo import open_photo
from bla.explanations.explanation import Explanation, ExplanationError
from bla.files import real, whole_folder
from bla.study import pictures
from bla.study.errors import StudyError
from bla.study.keys import Keys
from bla.study.plan import Analysis, Arm, Catch, Exclusions, Photo, Picture, Plan, Population, Task
from bla.study.texts import Texts

Rule = Literal["all", "correct", "wrong", "half"]


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the researcher decides; the rest follows from the explanations and the seed."""

    task: Task = "preference"
    """preference between two explanations; prediction of the program's answer; agreement that it is right."""
    title: str = "What did the program look at?"
    """What participants see as the title; it names no arm."""
    question: str = ""
    """Asked in each trial; {prediction} is the program's answer. By default the texts' question."""
    trials: int = 20
    """Main trials per person, each of another photo."""
    photos: int | None = None
    """Photos to draw each person's trials from. By default as many as trials."""
    repeats: int = 2
    """Main trials shown again, sides exchanged."""
    catches: int = 2
    """Attention checks."""
    practice: int = 2
    """Practice trials, which do not count."""
    people: int = 30
    """People planned to be analysed."""
    places: int | None = None
    """Maximum number of people who may begin. By default unlimited."""
    rule: Rule | None = None
    """Photos: all; those that the program gets correct or wrong; half of each (the default for agreement)."""
    area: Literal["equal", "own"] = "equal"
    """equal: cut a photo's explanations to one size, by rank; own: show each at its arm's size."""
    identical: Literal["left out", "asked"] = "left out"
    """What happens, in a preference, to photos of which two arms show the same picture."""
    cells: int | None = None
    """The equal size, in cells of the first arm's grid. By default the first arm's size for each photo."""
    options: int = 4
    """Answers to choose from in a prediction."""
    population: Population = "people"
    """Whom the test speaks for: people on these photos, or also photos like these."""
    alpha: float = 0.05
    """Level of the registered test."""
    catches_to_pass: int | None = None
    """Attention checks that one must pass to be analysed. By default all."""
    seconds_at_least: float = 1.0
    """Minimum median time per trial, in seconds, to be analysed."""
    share_to_complete: float = 1.0
    """Minimum share of main trials answered to be analysed."""
    seed: int = 0
    """Seed of all randomness."""

    @property
    def photo_rule(self) -> Rule:
        """Which photos, by default half of each for agreement."""
        return self.rule or ("half" if self.task == "agreement" else "all")

    @property
    def photo_count(self) -> int:
        return self.photos or self.trials

    def of(self, record: type[BaseModel]) -> dict[str, Any]:
        """Those that a record of the plan holds under the same name, as far as they are stated."""
        return {name: value for name, value in vars(self).items() if name in record.model_fields and value is not None}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A photo that every arm explains, in the arms' order."""

    path: Path
    sha256: str
    explanations: tuple[Explanation, ...]
    truth: str | None

    @property
    def prediction(self) -> str:
        return self.explanations[0].prediction.label

    @property
    def right(self) -> bool | None:
        return None if self.truth is None else self.truth == self.prediction


def prepare(
    study: Path,
    arms: Sequence[str],
    wishes: Wishes | None = None,
    *,
    truth: Path | None = None,
    texts: Path | None = None,
) -> tuple[Plan, str]:
    """Make the study's folder; returns its plan and the researcher's secret, which is not stored.

    ``arms`` are folders (or .jsonl files, as `bla compare` writes them), or NAME=FOLDER. The truth of a photo is the
    name of its folder, unless ``truth``, a CSV file with the columns image and label, says otherwise.
    """
    wishes = wishes or Wishes()
    if study.exists():
        raise StudyError(f"expected a name for a new folder, got {study}, which exists: a plan is not changed")
    folders = _named(arms)
    names = list(folders)
    words = Texts.load(texts) if texts else Texts.english()
    found, left_out = _candidates(folders.values(), _truths(truth))
    words_shown = {"title": wishes.title, "question": wishes.question or words["question." + wishes.task]}
    for what, text in words_shown.items():
        if named := [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.I)]:
            raise StudyError(
                f"expected a {what} that names no arm, since participants see it, got {named[0]} in {text!r}"
            )
    drawn = _drawn(_by_rule(found, wishes, left_out), wishes)
    with whole_folder(study) as folder:
        photos, shared = _written(drawn, names, wishes, sorted({item.prediction for item in found}), folder)
        first, second = wishes.photo_count, wishes.photo_count + wishes.practice
        practice, spare = photos[first:second], photos[second:]
        catches = _catches(spare, practice, names, wishes.task)
        record = wishes.of(Plan) | shared
        record |= {
            **words_shown,
            "identical": wishes.identical if wishes.task == "preference" else None,
            "arms": [_arm(name, [item.explanations[k] for item in drawn]) for k, name in enumerate(names)],
            "photos": photos[:first],
            "practice": practice,
            "spare": spare,
            "catches": catches,
            "exclusions": {"catches_to_pass": len(catches)} | wishes.of(Exclusions),
            "analysis": wishes.of(Analysis),
            "rule": wishes.photo_rule,
            "cells": wishes.cells if wishes.area == "equal" else None,
            "considered": len(found),
            "left_out": left_out,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            plan = Plan.model_validate(record)
        except ValidationError as error:
            raise StudyError(f"expected wishes that fit together: {error.errors()[0]['msg']}") from error
        plan.save(folder / "plan.json")
        (folder / "texts.toml").write_text(words.source, encoding="utf-8")
        secret = Keys.made(folder)
    return plan, secret


def _named(arms: Sequence[str]) -> dict[str, Path]:
    """Each arm's name and folder or file: the name given, or the last part by which the paths differ."""
    given = [(name, Path(saved)) for name, _, saved in (arm.rpartition("=") for arm in arms)]
    if len(given) < 2:
        raise StudyError(f"expected two folders of explanations or more, an arm each, got {len(given)}")
    parts = {saved: real(saved).with_suffix("").parts for _, saved in given}
    unnamed = [parts[saved] for name, saved in given if not name]
    depth = next((d for d in (-1, -2, -3) if len({p[d:][0] for p in unnamed}) == len(unnamed)), -1)
    named = {name or parts[saved][depth]: saved for name, saved in given}
    if len(named) < len(given):
        raise StudyError("expected a different name for each arm, got one twice: give arms as NAME=FOLDER")
    return named


def _candidates(saved: Iterable[Path], truths: dict[str, str] | None) -> tuple[list[Candidate], Counter[str]]:
    """Photos that all arms explain alike, in an order that does not depend on the folders' names."""
    arms = [_read(folder) for folder in saved]
    left_out: Counter[str] = Counter()
    found = []
    for sha256 in sorted(set().union(*arms)):
        if any(sha256 not in arm for arm in arms):
            left_out["not explained by every arm"] += 1
            continue
        path = arms[0][sha256][0]
        explanations = tuple(arm[sha256][1] for arm in arms)
        if len({explanation.prediction.label for explanation in explanations}) > 1:
            left_out["the arms' predictions differ"] += 1
        elif len({tuple(round(side) for side in explanation.region) for explanation in explanations}) > 1:
            left_out["the arms' regions differ"] += 1
        else:
            truth = path.parent.name or None if truths is None else truths.get(path.name, truths.get(str(path)))
            found.append(Candidate(path, sha256, explanations, truth))
    return found, left_out


def _read(saved: Path) -> dict[str, tuple[Path, Explanation]]:
    """A folder's explanations, or those of a file with one a line, by their photos' digests."""
    found = {}
    for where, record in _records(saved):
        try:
            explanation = Explanation.from_dict(json.loads(record))
        except (ExplanationError, ValueError, TypeError) as error:
            raise StudyError(f"expected an explanation in {where}, got: {error}") from error
        photo = Path(explanation.image)
        if not photo.is_file():
            remedy = "work in the folder where bla explain worked"
            raise StudyError(f"expected the photo {photo} of {where}, got no such file: {remedy}")
        found[hashlib.sha256(photo.read_bytes()).hexdigest()] = photo, explanation
    if not found:
        raise StudyError(f"expected explanations as bla explain --out or bla compare write them, got none in {saved}")
    return found


def _records(saved: Path) -> list[tuple[str, str]]:
    if saved.is_dir():
        return [(str(path), path.read_text(encoding="utf-8")) for path in sorted(saved.glob("*.json"))]
    if saved.suffix == ".jsonl" and saved.is_file():
        lines = saved.read_text(encoding="utf-8").splitlines()
        return [(f"{saved}, line {number}", line) for number, line in enumerate(lines, 1)]
    raise StudyError(f"expected a folder of explanations, or a .jsonl file of them, got {saved}")


def _truths(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "label"} <= set(rows[0]):
        raise StudyError(f"expected a CSV file with the columns image and label, got {path}")
    return {row["image"]: row["label"] for row in rows}


def _by_rule(found: Sequence[Candidate], wishes: Wishes, left_out: Counter[str]) -> list[Candidate]:
    """The photos that the rule allows; `half` is drawn later, but needs the truth."""
    allowed, rule = [], wishes.photo_rule
    for item in found:
        if item.truth is None and (rule != "all" or wishes.task == "agreement"):
            left_out["truth unknown"] += 1
        elif rule in ("correct", "wrong") and item.right is not (rule == "correct"):
            left_out["the program is wrong" if rule == "correct" else "the program is right"] += 1
        elif wishes.task == "preference" and wishes.identical == "left out" and _identical(item, wishes):
            left_out["two arms show the same picture"] += 1
        else:
            allowed.append(item)
    return allowed


def _drawn(allowed: Sequence[Candidate], wishes: Wishes) -> list[Candidate]:
    """Photos of main, then practice, then catch trials: from each class in turn, shuffled by the seed."""
    rng = Random(f"{wishes.seed}:photos")
    needed = wishes.photo_count + wishes.practice + wishes.catches
    if wishes.photo_rule != "half":
        queue = _by_turns(allowed, rng)
    else:
        right = _by_turns([item for item in allowed if item.right], rng)
        wrong = _by_turns([item for item in allowed if not item.right], rng)
        queue = [item for both in zip(right, wrong, strict=False) for item in both]
    if wishes.task == "preference":  # in practice, and in attention checks, no two pictures are the same
        others = [item for item in queue[wishes.photo_count :] if not _identical(item, wishes)]
        queue = [*queue[: wishes.photo_count], *others]
    if len(queue) < needed:
        raise StudyError(
            f"expected {needed} photos ({wishes.photo_count} for trials, {wishes.practice} for practice, "
            f"{wishes.catches} for attention checks), got {len(queue)} by the rule {wishes.photo_rule}: explain more "
            "photos, or ask for fewer --trials, --practice or --catches"
        )
    return queue[:needed]


def _identical(item: Candidate, wishes: Wishes) -> bool:
    """Whether two arms select the same cells: their pictures are then the same to the byte."""
    shown = _shown(item, wishes)
    return len({(why.grid, why.selected.tobytes()) for why in shown}) < len(shown)


def _shown(item: Candidate, wishes: Wishes) -> list[Explanation]:
    """The explanations as participants see them: cut to one size, or as they are."""
    share = (wishes.cells or item.explanations[0].size) / item.explanations[0].selected.size
    return [why if wishes.area == "own" else pictures.cut_to(why, share) for why in item.explanations]


def _by_turns(items: Sequence[Candidate], rng: Random) -> list[Candidate]:
    classes: dict[str, list[Candidate]] = defaultdict(list)
    for item in items:
        classes[item.truth or item.prediction].append(item)
    stacks = [rng.sample(classes[name], len(classes[name])) for name in sorted(classes)]
    rng.shuffle(stacks)
    queue = []
    while any(stacks):
        queue += [stack.pop() for stack in stacks if stack]
    return queue


def _written(
    drawn: Sequence[Candidate], names: Sequence[str], wishes: Wishes, labels: Sequence[str], folder: Path
) -> tuple[list[Photo], dict[str, int]]:
    """Render all pictures and write them; the photos' records, and what all files share: width, height, length."""
    size = pictures.canvas([open_photo(item.path).size for item in drawn])
    (folder / "pictures").mkdir()
    made = []
    for item in drawn:
        photo = open_photo(item.path)
        shown = _shown(item, wishes)
        drawings = [pictures.drawn(photo, why, size, alone=wishes.task == "prediction") for why in (None, *shown)]
        cells = [None, *(why.size for why in shown)]
        made.append(list(zip(map(pictures.encoded, drawings), cells, strict=True)))
    length = pictures.common_length([content for files in made for content, _ in files])
    rng = Random(f"{wishes.seed}:options")
    photos = []
    for n, (item, files) in enumerate(zip(drawn, made, strict=True), 1):
        kept = [_kept(pictures.filled_up(content, length), cells, folder / "pictures") for content, cells in files]
        options = _options(item, labels, wishes.options, rng) if wishes.task == "prediction" else ()
        explained = dict(zip(names, kept[1:], strict=True))
        about = {"id": f"photo-{n:03}", "name": item.path.name, "sha256": item.sha256, "prediction": item.prediction}
        photos.append(Photo(**about, truth=item.truth, options=options, plain=kept[0], explained=explained))
    return photos, {"width": size[0], "height": size[1], "file_size": length}


def _kept(content: bytes, cells: int | None, folder: Path) -> Picture:
    token = secrets.token_hex(12)
    (folder / f"{token}.jpg").write_bytes(content)
    return Picture(token=token, sha256=hashlib.sha256(content).hexdigest(), cells=cells)


def _options(item: Candidate, labels: Sequence[str], count: int, rng: Random) -> tuple[str, ...]:
    """The prediction among labels that the program gives to other photos, or thinks of here."""
    others = [label for label in labels if label != item.prediction]
    rng.shuffle(others)
    others += [guess.label for guess in item.explanations[0].top if guess.label not in (*others, item.prediction)]
    if not others:
        raise StudyError("expected photos of two classes or more: with one there is nothing to predict")
    return tuple(rng.sample([item.prediction, *others[: count - 1]], min(count, 1 + len(others))))


def _catches(spare: Sequence[Photo], practice: Sequence[Photo], names: Sequence[str], task: Task) -> list[Catch]:
    catches = []
    for index, photo in enumerate(spare):
        arm, decoy = names[index % len(names)], None
        if task == "preference":
            others = [other for other in (*spare, *practice) if other.prediction != photo.prediction]
            if not others:
                raise StudyError(
                    "expected photos of two classes or more for the attention checks, whose wrong picture is of "
                    "another class: explain more photos, or take --catches 0"
                )
            decoy = others[index % len(others)].id
        catches.append(Catch(photo=photo.id, arm=arm, decoy=decoy))
    return catches


def _arm(name: str, explanations: Sequence[Explanation]) -> Arm:
    """What the explanations say of how they were made."""
    said = {part: sorted({getattr(why, part) for why in explanations} - {""}) for part in ("method", "setup", "model")}
    return Arm(name=name, **{part: ", ".join(values) for part, values in said.items()})
