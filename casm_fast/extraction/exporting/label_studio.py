"""Label Studio's tasks, with the boxes as predictions to start a labelling from.

A task is ``{"data": {"image": where}, "predictions": [{"model_version", "score", "result"}]}``; a
result is a rectangle whose corner, width and height are **percent** of the picture. The labelling
interface that the names in it belong to is written beside, as NAME.config.xml, for Settings /
Labeling Interface / Code.

A file of this machine is named as Label Studio serves it, ``/data/local-files/?d=path``: start it
with LOCAL_FILES_SERVING_ENABLED=true and LOCAL_FILES_DOCUMENT_ROOT=/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from casm_fast.extraction.exporting.job import Box, Job, Picture
from casm_fast.extraction.exporting.writing import new_file

FROM, TO = "label", "image"
"""Names of the two tags of the interface that a result refers to."""


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write tasks and the labelling interface.

    Args:
        job: What.
        output: The JSON file.

    Returns:
        The tasks and the interface.

    Raises:
        FileNotFoundError: The images are no longer there.
        ValueError: The images are no files and `images` was not given; or one has no label.
    """
    pictures = list(job.readable())
    addresses = job.addresses(pictures)
    version = f"casm_fast {job.description.model[:12]}".rstrip()
    beside = output.with_suffix(".config.xml")
    with new_file(beside) as stream:
        stream.write(_interface(job.classes))
    with new_file(output) as stream:
        tasks = (
            json.dumps(_task(picture, _served(address, job.prefix), version, job.classes))
            for picture, address in zip(pictures, addresses, strict=True)
        )
        stream.write("[\n" + ",\n".join(tasks) + "\n]\n")
    return output, beside


def _served(address: str, prefix: str | None) -> str:
    """How the browser asks for a picture."""
    if prefix is not None or "://" in address:
        return address
    return f"/data/local-files/?d={quote(Path(address).resolve().as_posix().lstrip('/'))}"


def _task(picture: Picture, address: str, version: str, classes: tuple[str, ...]) -> dict[str, Any]:
    results = [_result(k, box, picture, classes) for k, box in enumerate(picture.found)]
    prediction = {
        "model_version": version,
        "score": max((box.score for box in picture.found), default=0.0),
        "result": results,
    }
    return {"data": {"image": address, "id": picture.id}, "predictions": [prediction]}


def _result(number: int, box: Box, picture: Picture, classes: tuple[str, ...]) -> dict[str, Any]:
    x0, y0, x1, y1 = box.corners
    return {
        "id": f"box{number}",
        "type": "rectanglelabels",
        "from_name": FROM,
        "to_name": TO,
        "original_width": picture.width,
        "original_height": picture.height,
        "image_rotation": 0,
        "score": box.score,
        "value": {
            "rotation": 0,
            "x": 100 * x0 / picture.width,
            "y": 100 * y0 / picture.height,
            "width": 100 * (x1 - x0) / picture.width,
            "height": 100 * (y1 - y0) / picture.height,
            "rectanglelabels": [classes[box.label]],
        },
    }


def _interface(classes: tuple[str, ...]) -> str:
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=TO, value="$image")
    labels = ElementTree.SubElement(view, "RectangleLabels", name=FROM, toName=TO)
    for name in classes:
        ElementTree.SubElement(labels, "Label", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"
