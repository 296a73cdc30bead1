"""Images: ImageNet in every layout, COCO, VOC, folders, the embedded set; decoding, batches."""

from casm_fast.data.coco import CocoSource
from casm_fast.data.decoders import DecoderName, choose_decoder
from casm_fast.data.decoding import DecodeError, decode, decode_bytes
from casm_fast.data.folder import FolderSource
from casm_fast.data.geometry import Geometry, Policy, geometry
from casm_fast.data.imagenet import ImageNetSource
from casm_fast.data.layouts import write_voc, write_wsol
from casm_fast.data.loading import (
    ImageBatch,
    TrainingBatch,
    batches_per_epoch,
    evaluation_batches,
    training_batches,
)
from casm_fast.data.localization import box_iou, centred_box, iou, localisation_error
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.subset import Subset, subset
from casm_fast.data.synthetic import SyntheticSource, generate, write_coco, write_tree
from casm_fast.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    denormalize,
    normalize,
    resize,
)
from casm_fast.data.voc import VocSource
from casm_fast.data.wsol import WsolSource

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CocoSource",
    "DecodeError",
    "DecoderName",
    "FolderSource",
    "Geometry",
    "ImageBatch",
    "ImageNetSource",
    "ImageSource",
    "Policy",
    "Subset",
    "SyntheticSource",
    "TrainingBatch",
    "VocSource",
    "WsolSource",
    "batches_per_epoch",
    "box_iou",
    "centred_box",
    "choose_decoder",
    "decode",
    "decode_bytes",
    "denormalize",
    "evaluation_batches",
    "generate",
    "geometry",
    "iou",
    "localisation_error",
    "normalize",
    "open_source",
    "resize",
    "subset",
    "training_batches",
    "write_coco",
    "write_tree",
    "write_voc",
    "write_wsol",
]
