"""Ctrl-C and SIGTERM as a request that a long run answers between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class StopRequest:
    """Whether somebody asked the run to stop, and how: the signal that came, or `None`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


def obey(number: signal.Signals, message: str) -> NoReturn:
    """End the run as the signal would have, but with everything saved.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: After SIGTERM, with the usual status 143.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def stop_requests(patient: bool = False) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts at once, as usual.

    Signals can only be caught in the main thread; in another one the request never comes.

    Args:
        patient: Let later ones change nothing: torchrun and SLURM both pass a signal on, so that a
            process gets it twice. They kill what does not end.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        if not patient:
            restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
