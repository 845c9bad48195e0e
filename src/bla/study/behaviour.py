"""How simulated people answer; `simulation` states the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from bla.study.errors import AnalysisError


@dataclass(frozen=True)
class Behaviour:
    """The parameters of the model; the command line sets all but three."""

    strengths: Annotated[tuple[float, ...], Parameter(parse=False)] = (0.0, 0.0)
    """Logits, one per arm."""
    person_sd: float = 1.0
    """Standard deviation, in logits, of people's preferences."""
    photo_sd: float = 0.5
    """Standard deviation, in logits, of how much photos favour an arm."""
    noise: float = 0.0
    """Share of answers given at random."""
    side: float = 0.0
    """Bias to the left picture, in logits."""
    drop_out: float = 0.0
    """Share of people who leave before the end."""
    careless: float = 0.0
    """Share of people who answer all at random, attention checks included."""
    attention: Annotated[float, Parameter(parse=False)] = 1.0
    """Probability that a careful person passes an attention check."""
    seconds: Annotated[float, Parameter(parse=False)] = 5.0
    """Median response time."""

    def __post_init__(self) -> None:
        for name in ("noise", "drop_out", "careless", "attention"):
            if not 0 <= getattr(self, name) <= 1:
                raise AnalysisError(f"expected {name} from 0 to 1, got {getattr(self, name)}")
        for name in ("person_sd", "photo_sd"):
            if not 0 <= getattr(self, name) <= 10:
                raise AnalysisError(f"expected {name} from 0 to 10 logits, got {getattr(self, name)}")
        if not self.seconds > 0:
            raise AnalysisError(f"expected seconds above 0, got {self.seconds}")
        if not self.strengths or not all(map(math.isfinite, (*self.strengths, self.side))):
            raise AnalysisError(f"expected finite strengths, at least one, and side bias, got {self.strengths}")


@dataclass(frozen=True)
class RehearsalBehaviour(Behaviour):
    """The behaviour of a rehearsal's people unless stated otherwise: some leave, some are careless."""

    drop_out: float = 0.05
    """Share of people who leave before the end."""
    careless: float = 0.05
    """Share of people who answer all at random, attention checks included."""
