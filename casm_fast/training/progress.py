"""What a run says while it runs.

log.jsonl and log.csv always, a progress bar on a terminal, TensorBoard when installed. There is one
record per log interval (split "train", means over the interval), one per validation (split "val")
and, with lambda_r="auto", one per epoch for the images held out for it (split "held_out"). Losses
and entropies are in nats, `mean_saliency` and accuracies are shares from 0 to 1. `skipped` counts
the images of an interval that could not be read; log.jsonl names them in `skipped_images`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

COLUMNS = (
    "phase",
    "split",
    "epoch",
    "step",
    "loss",
    "entropy",
    "mean_saliency",
    "accuracy",
    "masked_accuracy",
    "masked_in_accuracy",
    "images_per_second",
    "seconds",
    "lambda_r",
    "localisation_error",
    "skipped",
)


class RunLog:
    """The log files, progress bar and TensorBoard writer of one run; closes them on exit."""

    def __init__(
        self,
        folder: Path,
        progress: bool,
        tensorboard: bool,
        sizes: Mapping[str, int] | None,
        silent: bool = False,
    ) -> None:
        """Open the logs in `folder`.

        Args:
            folder: The run's folder.
            progress: Show a bar if the error stream is a terminal.
            tensorboard: Write TensorBoard events when the package is there.
            sizes: Bytes to keep of each file (a resumed run drops what was logged after its saved
                state); `None` starts anew.
            silent: Show and write nothing: another process does.
        """
        self._silent = silent
        self._progress = progress and not silent
        self._bar: tqdm[Any] | None = None
        self._board = _board(folder) if tensorboard and not silent else None
        if silent:
            return
        self._paths = {name: folder / name for name in ("log.jsonl", "log.csv")}
        for name, path in self._paths.items():
            path.touch()
            os.truncate(path, min((sizes or {}).get(name, 0), path.stat().st_size))
        self._jsonl = self._paths["log.jsonl"].open("a", encoding="utf-8")
        self._csv = self._paths["log.csv"].open("a", encoding="utf-8")
        if self._csv.tell() == 0:
            self._csv.write(",".join(COLUMNS) + "\n")

    def __enter__(self) -> RunLog:
        """Return the log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close everything."""
        self.close_bar()
        if not self._silent:
            self._jsonl.close()
            self._csv.close()
        if self._board is not None:
            self._board.close()

    def open_bar(self, title: str, total: int, done: int) -> None:
        """Show a bar for a phase of `total` steps, `done` of which are behind it."""
        self.close_bar()
        # disable=None: tqdm shows nothing when the error stream is no terminal.
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit="step",
            disable=None if self._progress else True,
            dynamic_ncols=True,
        )

    def close_bar(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record, and show its numbers beside the bar."""
        if self._silent:
            return
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        self._csv.write(",".join(str(record.get(column, "")) for column in COLUMNS) + "\n")
        self._csv.flush()
        if self._bar is not None and record["split"] == "train":
            self._bar.set_postfix_str(_postfix(record), refresh=False)
        if self._board is not None:
            for name in COLUMNS[4:]:
                if name in record:
                    self._board.add_scalar(
                        f"{record['phase']}/{record['split']}/{name}", record[name], record["step"]
                    )

    def sizes(self) -> dict[str, int]:
        """Bytes in each log file, all of them on the disk; empty when silent."""
        if self._silent:
            return {}
        for handle in (self._jsonl, self._csv):
            handle.flush()
            os.fsync(handle.fileno())
        return {name: path.stat().st_size for name, path in self._paths.items()}


def _postfix(record: Mapping[str, Any]) -> str:
    """The numbers beside the bar."""
    shown = (
        ("loss", "loss", ".3f"),
        ("entropy", "entropy", ".2f"),
        ("saliency", "mean_saliency", ".2f"),
        ("accuracy", "accuracy", ".1%"),
        ("img/s", "images_per_second", ".0f"),
    )
    return " ".join(
        f"{label} {record[name]:{form}}" for label, name, form in shown if name in record
    )


def _board(folder: Path) -> Any:
    """A TensorBoard writer, or `None` when the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.debug("tensorboard is not installed: no TensorBoard events are written")
        return None
    return SummaryWriter(str(folder / "tensorboard"))
