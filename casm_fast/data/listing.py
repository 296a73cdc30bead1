"""Names of image files below a folder, in a stable order."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from pathlib import Path

EXTENSIONS = frozenset(
    {".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""What counts as an image file, in lower case."""


def is_image(name: str) -> bool:
    """Whether a file of this name is listed; hidden files are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def image_names(folder: Path, *, recursive: bool = False) -> list[str]:
    """Image files in a folder, as sorted POSIX paths relative to it.

    Args:
        folder: An existing folder.
        recursive: Whether to descend into subfolders (links to folders are followed).
    """
    if not recursive:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if is_image(e.name) and e.is_file())
    names = []
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        names += [prefix + name for name in files if is_image(name)]
    return sorted(names)


def holds_image(folder: Path) -> bool:
    """Whether an image file lies in a folder or below it."""
    return any(
        is_image(name) for _, _, files in os.walk(folder, followlinks=True) for name in files
    )


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def check_folder(folder: Path, what: str) -> None:
    """Raises FileNotFoundError or NotADirectoryError unless ``folder`` is a folder."""
    if not folder.exists():
        raise FileNotFoundError(
            f"{what}: there is no {folder}; give the path of an existing folder"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"{what}: expected a folder, got the file {folder}")


def missing_files(files: Sequence[str], present: Container[str], what: str = "{} files") -> str:
    """How a sentence about a set ends when files of it are missing: "; missing: …", or ""."""
    missing = [file for file in files if file not in present]
    return f"; missing: {what.format(f'{len(missing):,}')}, {missing[0]} first" if missing else ""


def class_listing(folder: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Files of class folders.

    Args:
        folder: Holds one folder per class.
        classes: Their names by label.

    Returns:
        Paths relative to ``folder`` and the label of each, class by class.

    Raises:
        ValueError: A class folder holds no image.
    """
    names: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = image_names(folder / name, recursive=True)
        if not found:
            empty.append(name)
        names += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        raise ValueError(
            f"expected images in every class folder of {folder}, got none in {len(empty)} of "
            f"{len(classes)}: {shown}; add images or remove the folders"
        )
    return names, labels
