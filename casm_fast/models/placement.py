"""Which device a network runs on."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """``"auto"`` is the GPU when there is one.

    Raises:
        ValueError: When the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected 'auto', 'cpu' or a GPU of this machine, got {name!r}"
        ) from error
    return device
