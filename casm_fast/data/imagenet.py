"""ImageNet on disk, in each of the layouts it is found in.

| what | where, below DIR |
|---|---|
| train | train/<wnid>/*.JPEG |
| val | val/<wnid>/*.JPEG, or flat val/*.JPEG |
| the same, as Kaggle packs it | ILSVRC/Data/CLS-LOC/{train,val}, or Data/CLS-LOC/{train,val} |
| boxes | PARENT/{train,val}, or a given folder; flat or in class folders |
| PARENT | Annotations/CLS-LOC, Annotations, bbox, annotations (the last also without val) |
| PARENT, also without val or train | ILSVRC2012_bbox_val_v3, ILSVRC2012_bbox_train_v2 |
| boxes where there are no XML files | LOC_{train,val}_solution.csv |
| classes of a flat val | LOC_val_solution.csv, a ground-truth list, or the XML files |
| order of the classes | LOC_synset_mapping.txt, else the sorted folders of train, else of val |
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.annotations import (
    Annotation,
    read_annotation,
    read_ground_truth,
    read_mapping,
    read_solution,
)
from casm_fast.data.decoding import Decoder, decode
from casm_fast.data.lines import Lines, stored
from casm_fast.data.listing import (
    check_folder,
    class_listing,
    image_names,
    missing_files,
    subfolders,
)

logger = logging.getLogger(__name__)

GROUND_TRUTH_NAMES = (
    "imagenet_2012_validation_synset_labels.txt",
    "val_annotations.txt",
    "val.txt",
)
"""Lists of the validation images' classes that are looked for beside the split."""

_NO_BOXES = np.zeros((0, 4), np.int32)


def images_root(root: Path) -> Path | None:
    """The folder below ``root`` that holds train or val, None when there is none."""
    for inner in ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        folder = root / inner
        if (folder / "train").is_dir() or (folder / "val").is_dir():
            return folder
    return None


class ImageNetSource:
    """An `ImageSource` over one split of ImageNet.

    Nothing is cached on disk; an XML file is read when its boxes are asked for.

    Attributes:
        name: "imagenet-val:<path>" or "imagenet-train:<path>".
        classes: WordNet ids by label.
        descriptions: What each class is called, the wnid itself where unknown.
        has_boxes: Whether annotations were found.
        root: DIR.
        folder: The folder of the split's images.
        files: Paths relative to ``folder``, see `casm_fast.data.lines`.
        annotations: The folder of XML files, None when there is none.
        solution: Kaggle's list of boxes and classes, None when there is none.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        annotations: str | Path | None = None,
        ground_truth: str | Path | None = None,
        decoder: Decoder = decode,
    ) -> None:
        """Lists a split.

        Args:
            root: DIR, see the module.
            split: "train" or "val".
            annotations: Folder of the XML files, when it is none of the usual ones.
            ground_truth: List of the classes of a flat val, when it is none of the usual ones.
            decoder: Reads one file.

        Raises:
            FileNotFoundError: A folder or every image is missing.
            ValueError: A class folder is empty or unknown, or a flat val has no class list.
        """
        if split not in ("train", "val"):
            raise ValueError(f'imagenet: expected `split` "train" or "val", got {split!r}')
        self.root = Path(root)
        check_folder(self.root, "imagenet")
        images = images_root(self.root)
        if images is None or not (images / split).is_dir():
            raise FileNotFoundError(
                f"imagenet: expected {split}/ or ILSVRC/Data/CLS-LOC/{split}/ in {self.root}, got "
                "neither; give the folder that holds it"
            )
        self.name = f"imagenet-{split}:{self.root}"
        self.split = split
        self.folder = images / split
        self._decoder = decoder
        # Lists and annotations lie beside the images or, as Kaggle packs them, up to three levels
        # above.
        inner = len(images.relative_to(self.root).parts)
        self._places = [images, *images.parents[:inner]]
        if not inner and self.root.resolve().name == "ILSVRC":
            self._places.append(self.root.parent)
        elif (self.root / "Data").is_dir():
            self._places.append(self.root.parent)  # root is Kaggle's ILSVRC, its lists lie above
        self.annotations = self._find_annotations(annotations)
        self.solution = self._find(f"LOC_{split}_solution.csv")

        mapping = self._find("LOC_synset_mapping.txt")
        known = read_mapping(mapping) if mapping else {}
        train = images / "train"
        listed = tuple(known) or tuple(subfolders(train) if train.is_dir() else ())
        folders = subfolders(self.folder)
        flat = image_names(self.folder)
        if flat and folders:
            raise ValueError(
                f"imagenet: expected {self.folder} to hold either class folders or images, got both"
            )
        if not flat and not folders:
            raise FileNotFoundError(f"imagenet: expected images in {self.folder}, got none")
        if flat:
            if split == "train":
                raise ValueError(f"imagenet: expected class folders in {self.folder}, got images")
            self.files: list[str] | Lines = flat
            wnids = self._flat_classes(ground_truth, listed)
            self.classes = listed or tuple(sorted(set(wnids)))
            self._check_known(set(wnids))
            place = {wnid: label for label, wnid in enumerate(self.classes)}
            labels = [place[wnid] for wnid in wnids]
        else:
            self.classes = listed or tuple(folders)
            self._check_known(set(folders))
            files, within = class_listing(self.folder, folders)
            place = {wnid: label for label, wnid in enumerate(self.classes)}
            labels = [place[folders[k]] for k in within]
            if split == "val":  # the order of the official numbering, whatever the layout
                order = sorted(range(len(labels)), key=lambda k: files[k].rpartition("/")[2])
                files = [files[k] for k in order]
                labels = [labels[k] for k in order]
            self.files = stored(files)
        self._labels = np.array(labels, np.int64)
        self.descriptions = tuple(known.get(wnid) or wnid for wnid in self.classes)
        self.has_boxes = self.annotations is not None or self.solution is not None
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", self.found)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def image_id(self, index: int) -> str:
        """The file's stem in val ("ILSVRC2012_val_00000001"), its path below train/ in train."""
        return self._stem(index) if self.split == "val" else self.files[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        return self._decoder(Path(self.address(index)))

    def address(self, index: int) -> str:
        """The path of the image file."""
        return str(self.folder / self.files[index])

    def label(self, index: int) -> int:
        """The class of the image."""
        return int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """Boxes of the objects of the image's class, ``[n, 4]`` (x0, y0, x1, y1) half-open.

        The coordinates stand in the annotation as they are, see `read_annotation`. Objects of other
        classes are left out; an image without an XML file has no boxes. The boxes of Kaggle's list,
        the same numbers, are taken where there are no XML files.

        Raises:
            ValueError: The annotation cannot be read.
        """
        annotation = self._annotation(index)
        if annotation is None:
            return _NO_BOXES
        wnid = self.classes[self._labels[index]]
        same = [name == wnid for name in annotation.names]
        return annotation.boxes if all(same) else annotation.boxes[same]

    @cached_property
    def found(self) -> str:
        """A sentence about what was found, and what is missing."""
        kind = "class folders" if "/" in self.files[0] else "flat"
        text = (
            f"imagenet: {self.split} with {len(self):,} images of {len(self.classes):,} classes in "
            f"{self.folder} ({kind})"
        )
        if self.annotations is not None:
            text += f", boxes from the XML files in {self.annotations}"
            present = set(self._xml_files)
        elif self.solution is not None:
            text += f", boxes from {self.solution}"
            present = set(self._solution)
        else:
            return text + "; missing: boxes"
        return text + missing_files(
            [self._stem(k) for k in range(len(self))], present, "boxes of {} images"
        )

    # --- finding things ---------------------------------------------------------------------------

    def _stem(self, index: int) -> str:
        return os.path.splitext(self.files[index].rpartition("/")[2])[0]

    def _find(self, name: str) -> Path | None:
        return next((p / name for p in self._places if (p / name).exists()), None)

    def _find_annotations(self, given: str | Path | None) -> Path | None:
        if given is not None:
            check_folder(Path(given), "imagenet annotations")
            return Path(given)
        official = f"ILSVRC2012_bbox_{'val_v3' if self.split == 'val' else 'train_v2'}"
        parents = ("Annotations/CLS-LOC", "Annotations", "bbox", "annotations", official)
        names = [f"{parent}/{self.split}" for parent in parents] + [official]
        names += ["annotations", "Annotations"] if self.split == "val" else []
        for name in names:
            folder = self._find(name)
            if folder is not None and _holds_xml(folder):
                return folder
        return None

    def _annotation(self, index: int) -> Annotation | None:
        stem = self._stem(index)
        if self.annotations is None:
            return self._solution.get(stem)
        # Without a folder, in that of the image, or wherever the set of val's files has it.
        parent = self.files[index].rpartition("/")[0]
        for place in (f"{stem}.xml", f"{parent}/{stem}.xml"):
            with suppress(FileNotFoundError):
                return read_annotation(f"{self._xml_folder}/{place}")
        elsewhere = self._xml_files.get(stem) if self.split == "val" else None
        return None if elsewhere is None else read_annotation(f"{self._xml_folder}/{elsewhere}")

    @cached_property
    def _xml_folder(self) -> str:
        return str(self.annotations)

    @cached_property
    def _xml_files(self) -> dict[str, str]:
        """The XML files in the annotations' folder and in its class folders, by name."""
        assert self.annotations is not None
        places = ["", *(f"{name}/" for name in subfolders(self.annotations))]
        files = [place + name for place in places for name in os.listdir(self.annotations / place)]
        return {Path(file).stem: file for file in files if file.endswith(".xml")}

    @cached_property
    def _solution(self) -> dict[str, Annotation]:
        return read_solution(self.solution) if self.solution else {}

    def _flat_classes(self, ground_truth: str | Path | None, listed: tuple[str, ...]) -> list[str]:
        """The wnid of every file of a flat val."""
        stems = [self._stem(index) for index in range(len(self.files))]
        if ground_truth is not None:
            if not Path(ground_truth).is_file():
                raise FileNotFoundError(f"imagenet: there is no ground-truth file {ground_truth}")
            return read_ground_truth(Path(ground_truth), stems, listed)
        if self._solution:
            wnids = [self._solution[s].names[0] if s in self._solution else "" for s in stems]
        else:
            for name in GROUND_TRUTH_NAMES:
                path = self._find(name)
                if path is not None:
                    return read_ground_truth(path, stems, listed)
            if self.annotations is None:
                raise ValueError(
                    f"imagenet: expected class folders in {self.folder}, or beside a flat one "
                    "LOC_val_solution.csv, a ground-truth list or XML annotations, got none; give "
                    "`ground_truth=` or `annotations=`"
                )
            logger.info("reading the classes of %d images from XML", len(stems))
            notes = [self._annotation(index) for index in range(len(stems))]
            wnids = [note.names[0] if note and note.names else "" for note in notes]
        if "" in wnids:
            raise ValueError(
                f"imagenet: expected the class of every image of {self.folder}, got none for "
                f"{stems[wnids.index('')]} ({wnids.count('')} of {len(wnids)} have none)"
            )
        return wnids

    def _check_known(self, wnids: set[str]) -> None:
        unknown = sorted(wnids - set(self.classes))
        if unknown:
            raise ValueError(
                f"imagenet: expected the classes of {self.folder} among the {len(self.classes)} of "
                f"LOC_synset_mapping.txt or train/, got {unknown[0]}"
                + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else "")
            )


def _holds_xml(folder: Path) -> bool:
    """Whether XML files lie in a folder or in the first of its subfolders."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        nested = []
        for entry in entries:
            if entry.name.endswith(".xml"):
                return True
            if entry.is_dir():
                nested.append(entry.path)
    return any(name.endswith(".xml") for inner in sorted(nested)[:1] for name in os.listdir(inner))
