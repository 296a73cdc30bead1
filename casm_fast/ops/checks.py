"""What the doors of the ops ask of their arguments, each with one clear sentence.

Every check reads shapes, dtypes and Python numbers only, never values of tensors: nothing here
makes the host wait for a device.

Checks of tensors take longer than a kernel takes for a small mask, and the kernels guard their
memory in any case. So a door may call first, and ask these only when the kernels refuse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.float64)
CUDA_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def shape_of(tensor: Tensor) -> str:
    """The shape as it stands in messages, such as ``[2, 1, 28, 28]``."""
    return str(list(tensor.shape))


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: str,
    channels: int | None = None,
    also: tuple[torch.dtype, ...] = (),
    also_on_cpu: tuple[torch.dtype, ...] = (),
) -> Tensor:
    """Checks a floating tensor of four dimensions on a device and in a dtype that have kernels.

    Args:
        op: Name of the op, the first word of the message.
        name: Name of the argument.
        value: What the user passed.
        shape: The shape that is expected, as written in messages, such as ``[B, 1, H, W]``.
        channels: The size of dimension 1, where it is fixed.
        also: Dtypes that the op has kernels for beyond floating ones, on every device.
        also_on_cpu: Dtypes that it has CPU kernels for, beside float32 and float64.

    Raises:
        TypeError: Not a tensor, or a dtype without kernels.
        ValueError: A wrong number of dimensions or channels, no pixels, or an unsupported device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected `{name}` to be a tensor, got {type(value).__name__}")
    if value.dim() != 4 or (channels is not None and value.shape[1] != channels):
        raise ValueError(f"{op}: expected `{name}` of shape {shape}, got {shape_of(value)}")
    if value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"{op}: expected `{name}` to have pixels, got {shape_of(value)}")
    dtypes = (*CPU_DTYPES, *also_on_cpu) if value.device.type == "cpu" else CUDA_DTYPES
    dtypes = dtypes + also
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(
            f"{op}: expected `{name}` in one of {names} on {value.device.type}, got {got}"
        )
    return value


def check_like(
    op: str, name: str, value: Tensor, other_name: str, other: Tensor, any_dtype: bool = False
) -> None:
    """Checks that two tensors agree in device and, unless `any_dtype`, in dtype."""
    if value.device != other.device:
        raise ValueError(
            f"{op}: expected `{name}` on the device of `{other_name}` ({other.device}), "
            f"got {value.device}"
        )
    if not any_dtype and value.dtype != other.dtype:
        want, got = (str(t.dtype).removeprefix("torch.") for t in (other, value))
        raise TypeError(
            f"{op}: expected `{name}` in the dtype of `{other_name}` ({want}), got {got}"
        )


def check_number(
    op: str, name: str, value: object, at_least: float = -math.inf, at_most: float = math.inf
) -> float:
    """Checks a finite number in a closed range and returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: expected `{name}` to be a number, got {type(value).__name__}")
    if not (at_least <= value <= at_most and -math.inf < value < math.inf):
        bounds = "finite"
        if at_least > -math.inf:
            bounds += f" and at least {at_least:g}"
        if at_most < math.inf:
            bounds += f" and at most {at_most:g}"
        raise ValueError(f"{op}: expected `{name}` to be {bounds}, got {value!r}")
    return float(value)
