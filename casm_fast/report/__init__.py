"""The report: one HTML page with scores, curves and pictures."""

from casm_fast.report.page import report

__all__ = ["report"]
