"""The analysis of a study, as registered: all results in one record, from the plan and what was collected."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bla.study import description, registered
from bla.study.errors import AnalysisError
from bla.study.plan import Plan
from bla.study.responses import Collected, Response
from bla.study.texts import filled


def analyse(plan: Plan, collected: Collected) -> dict[str, Any]:
    """All results, as JSON has them: registered, description only, quality, exploratory."""
    if collected.plan != plan.digest():
        raise AnalysisError(
            f"expected answers collected under this plan, {plan.digest()[:12]}, got some under {collected.plan[:12]}: "
            "analyse them with their own"
        )
    by_person: dict[str, list[Response]] = {one.participant: [] for one in collected.participants}
    for answer in sorted(collected.responses, key=lambda answer: (answer.participant, answer.position)):
        by_person[answer.participant].append(answer)
    excluded = registered.exclusions(plan, collected.participants, by_person)
    kept = {who: given for who, given in by_person.items() if who not in excluded}
    main = [answer for who in sorted(kept) for answer in kept[who] if answer.kind == "main"]
    comparisons = registered.comparisons(plan, main)
    choice = plan.task == "preference"
    return {
        "schema_version": 1,
        "simulated": collected.simulated,
        "registered": plan.model_dump(
            mode="json", include={"title", "task", "people", "trials", "exclusions", "left_out"}
        )
        | {"question": filled(plan.question, prediction="…"), "plan": plan.digest(), "arms": list(plan.arm_names)}
        | {"photos": len(plan.photos), "identical_photos": plan.identical_photos}
        | plan.analysis.model_dump(mode="json"),
        "people": {
            "took_part": len(collected.participants),
            "finished": sum(one.finished for one in collected.participants),
            "analysed": len(kept),
            "planned": plan.people,
            "excluded": [{"participant": who, "reasons": reasons} for who, reasons in excluded.items()],
            "reasons": dict(Counter(reason.partition(":")[0] for reasons in excluded.values() for reason in reasons)),
        },
        "trials": len(main),
        "comparisons": comparisons,
        "decision": registered.decisions(plan, comparisons),
        "strengths": registered.strengths(plan, kept) if choice and len(plan.arms) > 2 else None,
        "accuracy": None if choice else registered.accuracies(plan, kept),
        "pooled": description.pooled(plan, main),
        "quality": {
            "catches": description.catches(by_person),
            "repeats": description.repeats(plan, kept),
            "seconds": description.seconds(kept),
            "side": description.side(plan, kept),
        },
        "exploratory": {
            "agreement": description.agreements(plan, main),
            "photos": description.photos(plan, main),
            "spread": description.spread(plan, kept),
            "without_exclusions": description.without_exclusions(plan, by_person) if excluded else None,
        },
    }
