"""The caller's classifier on loan: it is asked, and given back exactly as it was.

What the methods that explain a classifier have in common: `borrowed` for the network, `as_images`
for what it is shown, `as_logits` for what it answers, `find_module` for a layer by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast.models.saliency import SaliencyModel

Classifies = nn.Module | Callable[[Tensor], Any]
"""A module or function from images ``[B, C, H, W]`` to logits ``[B, K]``; of a tuple, the first
counts."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def borrowed(classifier: Classifies) -> Iterator[Classifies]:
    """The classifier in eval mode; afterwards, whatever happens, it is as it was.

    Meanwhile its parameters need no gradients. Modes, ``requires_grad`` and buffers are restored,
    and hooks that were added are removed; gradients of parameters are never touched. Of a
    `SaliencyModel` the classifier is lent.

    Args:
        classifier: Any module or function.

    Raises:
        TypeError: It cannot be called.
        ValueError: Its normalisation couples the images of a batch.
    """
    if isinstance(classifier, SaliencyModel):
        classifier = classifier.classifier
    if not isinstance(classifier, nn.Module):
        if not callable(classifier):
            raise TypeError(
                "classifier: expected a module or function from images to logits, "
                f"got {type(classifier).__name__}"
            )
        yield classifier
        return

    for name, module in classifier.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"classifier: expected batch normalisation with running statistics, got {name!r} "
                "without: its images would depend on one another"
            )
    modes = {module: module.training for module in classifier.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in classifier.parameters()}
    hooks = [
        (registered, set(registered))
        for module in modes
        for registered in (getattr(module, kind) for kind in _HOOKS)
    ]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        classifier.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield classifier
    finally:
        for module, training in modes.items():
            module.training = training
        for registered, before in hooks:
            for key in [key for key in registered if key not in before]:
                del registered[key]
        for parameter, needs_gradient in wanted.items():
            parameter.requires_grad_(needs_gradient)
        with torch.no_grad():
            for module, name, buffer, version, copied in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(copied)


def dtype_of(classifier: Classifies) -> torch.dtype | None:
    """What the classifier takes; None: whatever comes."""
    if isinstance(classifier, nn.Module):
        for parameter in classifier.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None


def find_module(classifier: Classifies, layer: str) -> nn.Module:
    """A module of the classifier by name.

    Raises:
        ValueError: The classifier has no modules, or none of this name; the message lists close
            ones.
    """
    if not isinstance(classifier, nn.Module):
        raise ValueError(
            f"layer: expected a classifier of named modules beside {layer!r}, "
            f"got {type(classifier).__name__}"
        )
    modules: dict[str, nn.Module] = dict(classifier.named_modules(remove_duplicate=False))
    if layer and layer in modules:
        return modules[layer]
    names = [name for name in modules if name]
    near = difflib.get_close_matches(layer, names, n=5, cutoff=0.5) or names[:5]
    raise ValueError(
        f"layer: expected the name of a module, got {layer!r}; "
        f"near it: {', '.join(near) or 'nothing'}"
    )


def token_grid(shape: tuple[int, ...], layer: str) -> tuple[int, int, int]:
    """How the tokens ``[B, N, D]`` of a transformer lie in the image.

    Returns:
        How many tokens come before the grid (class and register tokens, at most 5), and the height
        and width of the grid, which is square.

    Raises:
        ValueError: The activation has no places in the image.
    """
    if len(shape) == 3:
        for first in range(6):
            side = int(max(shape[1] - first, 0) ** 0.5)
            if side > 1 and side * side == shape[1] - first:
                return first, side, side
    raise ValueError(
        f"layer: expected an activation [B, C, h, w], or [B, N, D] of a square grid of tokens, "
        f"got {list(shape)} from {layer!r}; name a module before it"
    )


def as_logits(answer: Any, count: int, score: str = "logit") -> Tensor:
    """What the classifier answered, ``[B, K]``.

    Args:
        answer: A tensor, or a tuple that begins with it (beside taps or auxiliary logits).
        count: B.
        score: What will be made of them; probabilities ask for two classes at least.

    Raises:
        ValueError: The answer is something else.
    """
    if isinstance(answer, (tuple, list)) and answer:
        answer = answer[0]
    least = 1 if score == "logit" else 2
    if (
        not isinstance(answer, Tensor)
        or answer.dim() != 2
        or len(answer) != count
        or answer.shape[1] < least
        or not answer.is_floating_point()
    ):
        got = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(
            f"classifier: expected logits of shape [{count}, classes] for the "
            f"{score} score, with {least} classes at least, got {got}"
        )
    return answer


def as_images(classifier: Classifies, images: Any) -> Tensor:
    """The images as ``[B, C, H, W]``, float32 or float64, apart from the caller's graph.

    Raises:
        TypeError: Something else than floating-point tensors.
        ValueError: No image, several sizes, another device than the classifier's, or NaN.
    """
    if isinstance(images, (list, tuple)) and images and all(_is_tensor(one) for one in images):
        sizes = sorted({tuple(one.shape) for one in images})
        if len(sizes) > 1:
            raise ValueError(
                f"images: expected images of one size in a call, got {len(sizes)} sizes such as "
                f"{list(sizes[0])} and {list(sizes[1])}; call once for each size, or resize them"
            )
        images = torch.stack(list(images))
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor [B, C, H, W], got {type(images).__name__}")
    if not images.is_floating_point():
        got = str(images.dtype).removeprefix("torch.")
        raise TypeError(
            f"images: expected floating point, normalised for the classifier, got {got}"
        )
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(
            f"images: expected at least one image [B, C, H, W], got {list(images.shape)}"
        )
    _check_device(classifier, images)
    batch: Tensor = images.detach().clone()  # a network may work on its input in place
    batch = batch.to(torch.float64 if batch.dtype == torch.float64 else torch.float32)
    bad = torch.nonzero(~batch.isfinite().flatten(1).all(dim=1))[:, 0].tolist()
    if bad:
        raise ValueError(f"images: expected finite values, got NaN or infinity in image {bad[0]}")
    return batch


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _check_device(classifier: Classifies, images: Tensor) -> None:
    if isinstance(classifier, nn.Module):
        for parameter in classifier.parameters():
            if parameter.device != images.device:
                raise ValueError(
                    f"images: expected on the device of the classifier ({parameter.device}), "
                    f"got {images.device}"
                )
