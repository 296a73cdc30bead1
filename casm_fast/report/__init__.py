"""Pages and pictures of an extraction: the report, all images to look through, the gallery."""

from casm_fast.report.browsing import browse
from casm_fast.report.figure import gallery
from casm_fast.report.page import report

__all__ = ["browse", "gallery", "report"]
