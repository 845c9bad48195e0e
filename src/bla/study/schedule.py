"""A person's trials, their order and sides: a pure function of the plan and the person's number.

Within a person each arm, and each pair of arms, stands on the left as often as on the right, within 1, and pairs (or,
in tasks that show one arm, arms) come equally often, within 1. Over people, a block of consecutive numbers shares its
photos: each photo of the block meets every pair on both sides (or every arm) equally often. Everything else is
shuffled anew for each person.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from bla.study.plan import Photo, Plan
from bla.study.responses import DECOY, Kind, Response

LEFT_RIGHT = ("left", "right")
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Trial:
    """One trial as it will be shown."""

    kind: Kind
    photo: str
    left: str | None = None
    right: str | None = None
    arm: str | None = None
    decoy: str | None = None
    """The photo of the explanation on the decoy's side."""
    options: tuple[str, ...] = LEFT_RIGHT
    expected: str | None = None
    repeats: int | None = None
    """The position, from 1, of the main trial that it repeats."""

    def answered(self, choice: str, **of: Any) -> Response:
        """The record of an answer to this trial."""
        shown = {name: value for name, value in vars(self).items() if name != "decoy"}
        correct = None if self.expected is None else choice == self.expected
        return Response(choice=choice, correct=correct, **shown, **of)


def trials_of(plan: Plan, number: int) -> list[Trial]:
    """All trials of person `number` (from 0), practice first; catches and repeats are spread over the main trials."""
    block, place = divmod(number, block_size(plan))
    shared, own = Random(f"{plan.seed}:{block}"), Random(f"{plan.seed}:{number}")
    photos = shared.sample(plan.photos, plan.trials)
    if plan.task == "preference":
        turn, mirrored = divmod(place, 2)
        pairs = [plan.pairs[(index + turn) % len(plan.pairs)] for index in range(len(photos))]
        sides = balanced_sides(pairs, Random(f"{plan.seed}:{block}:{turn}"))
        if mirrored:
            sides = [(right, left) for left, right in sides]
        main = [Trial("main", photo.id, left, right) for photo, (left, right) in zip(photos, sides, strict=True)]
    else:
        names = plan.arm_names
        main = [_judged(plan, photo, names[(index + place) % len(names)]) for index, photo in enumerate(photos)]
    practice = [_practice(plan, photo, own) for photo in plan.practice]
    catches = _catches(plan, own)
    main = own.sample(main, len(main))
    if plan.task == "prediction":
        main = _with_options(plan, main, own)
    repeats = _repeated(main, plan.repeats, own)
    trials = practice + _mixed(main, repeats, catches, own)
    at = {trial: position for position, trial in enumerate(trials, 1)}
    return [replace(t, repeats=at[_exchanged(t, "main")]) if t.kind == "repeat" else t for t in trials]


def block_size(plan: Plan) -> int:
    """How many consecutive people share their photos."""
    return 2 * len(plan.pairs) if plan.task == "preference" else len(plan.arms)


def balanced_sides(pairs: Sequence[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """Each pair as (left, right), so that every arm and every pair stands either way equally often, within 1.

    Of a pair's showings every second one is turned. What is left over, one of each pair that comes an odd number of
    times, is a graph on the arms; going along its edges on closed walks (an extra vertex joins the arms of odd degree)
    leaves every arm as often as it enters it.
    """
    counts = Counter(pairs)
    left_over = {pair for pair, count in counts.items() if count % 2}
    turned = {frozenset(edge): edge for edge in _walked(left_over, rng)}
    sides: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (first, second), count in counts.items():
        ways = [(first, second), (second, first)] * (count // 2)
        ways += [turned[frozenset((first, second))]] if count % 2 else []
        rng.shuffle(ways)
        sides[first, second] = ways
    return [sides[pair].pop() for pair in pairs]


def _walked(edges: Iterable[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """Every edge in the direction in which closed walks go along it."""
    near: dict[str, set[str]] = defaultdict(set)
    extra = ""  # no arm has an empty name
    for first, second in edges:
        near[first].add(second)
        near[second].add(first)
    for arm in [arm for arm in sorted(near) if len(near[arm]) % 2]:
        near[arm].add(extra)
        near[extra].add(arm)
    walked = []
    for start in rng.sample(sorted(near), len(near)):
        here = start
        while near[here]:  # all degrees are even, so a walk can only end where it began
            there = rng.choice(sorted(near[here]))
            near[here].discard(there)
            near[there].discard(here)
            walked.append((here, there))
            here = there
    return [(first, second) for first, second in walked if extra not in (first, second)]


def _judged(plan: Plan, photo: Photo, arm: str) -> Trial:
    if plan.task == "prediction":
        return Trial("main", photo.id, arm=arm, options=photo.options, expected=photo.prediction)
    return Trial("main", photo.id, arm=arm, options=YES_NO, expected="yes" if photo.program_is_right else "no")


def _practice(plan: Plan, photo: Photo, rng: Random) -> Trial:
    if plan.task == "preference":
        left, right = rng.sample(rng.choice(plan.pairs), 2)
        return Trial("practice", photo.id, left, right)
    trial = replace(_judged(plan, photo, rng.choice(plan.arm_names)), kind="practice")
    return replace(trial, options=_shuffled(trial.options, rng)) if plan.task == "prediction" else trial


def _catches(plan: Plan, rng: Random) -> list[Trial]:
    """The attention checks, right answers on either side equally often, within 1."""
    known, made = plan.every_photo, []
    right_first = rng.random() < 0.5
    for index, catch in enumerate(plan.catches):
        photo, first = known[catch.photo], (index % 2 == 0) is right_first
        if plan.task == "preference":
            left, right = (catch.arm, DECOY) if first else (DECOY, catch.arm)
            expected = LEFT_RIGHT[not first]
            made.append(Trial("catch", photo.id, left=left, right=right, decoy=catch.decoy, expected=expected))
        else:
            options = _shuffled(photo.options, rng) if plan.task == "prediction" else YES_NO
            expected = rng.choice(options) if plan.task == "prediction" else YES_NO[not first]
            made.append(Trial("catch", photo.id, arm=catch.arm, options=options, expected=expected))
    return made


def _with_options(plan: Plan, main: Sequence[Trial], rng: Random) -> list[Trial]:
    """The options shuffled, the right one at each place equally often, within 1."""
    most = max(len(trial.options) for trial in main)
    places = [index % most for index in range(len(main))]
    rng.shuffle(places)
    changed = []
    for trial, place in zip(main, places, strict=True):
        others = [option for option in trial.options if option != trial.expected]
        rng.shuffle(others)
        at = place % len(trial.options)
        changed.append(replace(trial, options=(*others[:at], str(trial.expected), *others[at:])))
    return changed


def _repeated(main: Sequence[Trial], count: int, rng: Random) -> list[Trial]:
    """So many of the first three quarters again, sides exchanged, all trials' sides as balanced as they can be."""
    early = list(main[: max(count, 3 * len(main) // 4)])
    leaning = Counter(trial.left for trial in main)
    leaning.subtract(trial.right for trial in main)
    chosen = []
    for _ in range(count):
        rng.shuffle(early)
        trial = min(early, key=lambda t: abs(leaning[t.right] + 1) + abs(leaning[t.left] - 1))
        early.remove(trial)
        leaning.update([trial.right])
        leaning.subtract([trial.left])
        chosen.append(_exchanged(trial, "repeat"))
    return chosen


def _exchanged(trial: Trial, kind: Kind) -> Trial:
    return replace(trial, kind=kind, left=trial.right, right=trial.left)


def _mixed(main: Sequence[Trial], repeats: Sequence[Trial], catches: Sequence[Trial], rng: Random) -> list[Trial]:
    mixed = list(main)
    for repeat in repeats:
        first = mixed.index(_exchanged(repeat, "main"))
        apart = min(len(mixed), first + 1 + min(3, len(main) // 2))
        mixed.insert(rng.randint(max(apart, 3 * len(mixed) // 4), len(mixed)), repeat)
    for index, catch in enumerate(rng.sample(catches, len(catches))):
        low, high = (at * len(mixed) // len(catches) for at in (index, index + 1))
        mixed.insert(rng.randint(low, max(low, high - 1)), catch)
    return mixed


def _shuffled(options: Sequence[str], rng: Random) -> tuple[str, ...]:
    return tuple(rng.sample(options, len(options)))
