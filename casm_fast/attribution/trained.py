"""Networks that were trained to give saliency, asked without being changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from casm_fast.models.borrowing import borrowed, dtype_of

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Opened(Generic[M]):
    """A model that was read from a file for one call: unlike a caller's it may be moved.

    Attributes:
        model: The model.
    """

    model: M


class _Whole(nn.Module):
    """A module inside another, so that all of it is lent, and not its classifier alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def asked(given: M | Opened[M], images: Tensor, ask: Callable[[M, Tensor], Tensor]) -> Tensor:
    """What a model answers in eval mode; afterwards, whatever happens, it is as it was.

    Args:
        given: The model; works in its own dtype.
        images: ``[B, C, H, W]``.
        ask: Asks it about images.

    Returns:
        The answer in the dtype of the images.

    Raises:
        ValueError: Model and images are on different devices.
    """
    model = given.model.to(images.device) if isinstance(given, Opened) else given
    for parameter in model.parameters():
        if parameter.device != images.device:
            raise ValueError(
                f"model: expected on the device of the images ({images.device}), "
                f"got {parameter.device}; move it there"
            )
    with borrowed(_Whole(model)):
        return ask(model, images.to(dtype_of(model) or images.dtype)).to(images.dtype)
