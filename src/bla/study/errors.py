"""What the user can mend in a study."""

from __future__ import annotations


class AnalysisError(ValueError):
    """Answers, or a wish about their analysis, that cannot be analysed as they are."""


class StudyError(ValueError):
    """A study that cannot be prepared, served or read as it is."""
