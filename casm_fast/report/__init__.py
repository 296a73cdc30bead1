"""The report: one HTML page with scores, curves and pictures; and the pictures on their own."""

from casm_fast.report.figure import gallery
from casm_fast.report.page import report

__all__ = ["gallery", "report"]
