"""One self-contained HTML page from a saved comparison: a person would rather look at it than read it."""

from bla.comparison.report.page import Report, write_report
from bla.comparison.report.saved import ReportError

__all__ = ["Report", "ReportError", "write_report"]
