"""One self-contained HTML page from a saved comparison."""

from bla.comparison.report.page import Report, write_report
from bla.comparison.report.saved import ReportError

__all__ = ["Report", "ReportError", "write_report"]
