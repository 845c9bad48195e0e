"""A rehearsal without pages: the answers that simulated people must leave on the pages, one by one, from memory."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from bla.study.behaviour import Behaviour
from bla.study.plan import Plan
from bla.study.rehearsal import Actor, Seen
from bla.study.responses import DECOY, Collected, Participant
from bla.study.schedule import Trial, trials_of


def without_pages(plan: Plan, behaviour: Behaviour, people: int, *, seed: int = 0) -> Collected:
    """The same rehearsal in memory."""
    moment = datetime.fromtimestamp(0, UTC)
    takers, responses = [], []
    for number in range(people):
        actor, planned, name = Actor(plan, behaviour, seed, number), trials_of(plan, number), f"{number:016x}"
        answered = planned[: actor.answers]
        finished = moment if len(answered) == len(planned) else None
        taker: dict[str, Any] = {"participant": name, "number": number, "trials": len(planned), "simulated": True}
        takers.append(Participant(**taker, started_at=moment, finished_at=finished))
        for position, trial in enumerate(answered, 1):
            place, seconds = actor.answer(position, _seen(plan, trial))
            response = trial.answered(
                trial.options[place],
                participant=name,
                position=position,
                task=plan.task,
                milliseconds=round(1000 * seconds),
                clock="browser",
                shown_at=moment,
                answered_at=moment + timedelta(seconds=seconds),
                simulated=True,
            )
            responses.append(response)
    return Collected(plan=plan.digest(), simulated=True, participants=tuple(takers), responses=tuple(responses))


def _seen(plan: Plan, trial: Trial) -> Seen:
    """What the page of a trial will show."""
    if plan.task != "preference":
        asked = trial.expected if trial.kind == "catch" else None
        return Seen(trial.photo, ((trial.photo, str(trial.arm)),), trial.options, asked)
    arms = (str(trial.left), str(trial.right))
    own = next(arm for arm in arms if arm != DECOY)
    shown = tuple((str(trial.decoy), own) if arm == DECOY else (trial.photo, arm) for arm in arms)
    return Seen(trial.photo, shown, trial.options)
