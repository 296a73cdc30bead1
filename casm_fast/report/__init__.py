"""The report: one HTML page with scores, curves and pictures."""

from casm_fast.report.page import write_report

__all__ = ["write_report"]
