"""What the user can mend in a study."""

from __future__ import annotations

from bla import BlaError


class AnalysisError(BlaError):
    """Answers, or a wish about their analysis, that cannot be analysed as they are."""


class StudyError(BlaError):
    """A study that cannot be prepared, served or read as it is."""
