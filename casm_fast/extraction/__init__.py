"""Batched extraction: images to boxes and saliency statistics, and on to other formats."""

from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.exporting import export
from casm_fast.extraction.extractor import Extractor, Measurements
from casm_fast.extraction.pipeline import Extraction, extract
from casm_fast.extraction.prediction import Prediction, predict

__all__ = [
    "ExtractConfig",
    "Extraction",
    "Extractor",
    "Measurements",
    "Prediction",
    "export",
    "extract",
    "predict",
]
