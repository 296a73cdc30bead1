"""A folder of results that grows by one row per image, and goes on after any interruption.

rows.jsonl holds a JSON object per line, settings.json what all rows have in common. A row is to be
added when everything that belongs to its image is there; a line that an interruption cut is taken
away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROWS, SETTINGS = "rows.jsonl", "settings.json"


class Journal:
    """The rows of a folder; a context manager, which keeps the file open for appending.

    Attributes:
        folder: It.
        rows: Those that were there, then those that were added.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Opens the folder, or makes it.

        Args:
            folder: Where.
            settings: JSON values that every row depends on.

        Raises:
            ValueError: The folder belongs to other settings.
        """
        self.folder = Path(folder)
        self._file: IO[str] | None = None
        self._claim(json.loads(json.dumps(settings)))
        self.rows: list[dict[str, Any]] = self._read()

    def known(self) -> set[str]:
        """The ``image_id`` of every row."""
        return {str(row["image_id"]) for row in self.rows}

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows, one line each, and hands them to the system."""
        if self._file is None:
            raise RuntimeError("expected an entered journal")
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
            self.rows.append(row)
        self._file.flush()

    def __enter__(self) -> Journal:
        self._file = (self.folder / ROWS).open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _claim(self, settings: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        if not path.exists():
            _replace(path, json.dumps(settings, indent=1) + "\n")
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in {**settings, **before}:
            if before.get(name) != settings.get(name):
                raise ValueError(
                    f"output: expected a folder of the same settings, got {self.folder} with "
                    f"{name} {before.get(name)!r} instead of {settings.get(name)!r}; "
                    "give another folder"
                )

    def _read(self) -> list[dict[str, Any]]:
        path = self.folder / ROWS
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            _replace(path, whole)
        return [json.loads(line) for line in whole.splitlines()]


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
