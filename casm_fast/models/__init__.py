"""Encoders with taps, the mask decoder, the saliency model and its checkpoints."""

from casm_fast.models.casme import export_casme, import_casme
from casm_fast.models.checkpoint import fingerprint, load, save
from casm_fast.models.classifier import Classifier, open_classifier
from casm_fast.models.decoder import Decoder
from casm_fast.models.encoder import Encoder, ResNetEncoder, TracedEncoder, build_encoder
from casm_fast.models.exporting import compile_program, export_onnx, export_program
from casm_fast.models.saliency import SaliencyModel, build_model, full_size
from casm_fast.models.taps import Tap, discover_taps

__all__ = [
    "Classifier",
    "Decoder",
    "Encoder",
    "ResNetEncoder",
    "SaliencyModel",
    "Tap",
    "TracedEncoder",
    "build_encoder",
    "build_model",
    "compile_program",
    "discover_taps",
    "export_casme",
    "export_onnx",
    "export_program",
    "fingerprint",
    "full_size",
    "import_casme",
    "load",
    "open_classifier",
    "save",
]
