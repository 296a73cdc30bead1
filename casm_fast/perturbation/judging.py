"""The caller's classifier on loan: asked for scores, and given back exactly as it was."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast import ops
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.showing import Pictures


@dataclass(frozen=True)
class Targets:
    """The classes of each image.

    Attributes:
        classes: ``[B, n]`` int64; rows of fewer classes are filled up with -1.
    """

    classes: Tensor

    def select(self, places: Tensor | slice) -> Targets:
        """Those of some images."""
        return Targets(self.classes[places])

    def of(self, values: Tensor) -> Tensor:
        """The sum of each image's classes in ``[B, K]``: ``[B]``."""
        picked = values.gather(1, self.classes.clamp(min=0))
        return picked.masked_fill(self.classes < 0, 0).sum(dim=1)


@dataclass
class Judge:
    """Scores of masked images; see `borrowed`.

    Attributes:
        classifier: In eval mode, without gradients of its parameters.
        config: Score, layer and precision.
        dtype: What the classifier takes; None: whatever comes.
        mask: What the layer's activation is multiplied by during a pass.
        activation: Shape of the layer's activation in the last pass.
        visits: How often the layer ran in the last pass.
    """

    classifier: nn.Module | Callable[[Tensor], Any]
    config: PerturbConfig
    dtype: torch.dtype | None = None
    mask: Tensor | None = None
    activation: tuple[int, ...] = ()
    visits: int = field(default=0)

    def scores(
        self, pictures: Pictures, mask: Tensor | None, shift: Tensor, targets: Targets
    ) -> Tensor:
        """The targets' summed score of each image, ``[B]``, under masks ``[B, 1, h, w]``."""
        values = self.logits(pictures, mask, shift)
        if self.config.score == "softmax":
            values = values.softmax(dim=1)
        elif self.config.score == "log_softmax":
            values = values.log_softmax(dim=1)
        return targets.of(values)

    def logits(self, pictures: Pictures, mask: Tensor | None, shift: Tensor) -> Tensor:
        """What the classifier answers, ``[B, K]`` in the dtype of the images.

        Raises:
            ValueError: It answers something else.
        """
        inner = self.config.layer is not None
        images = pictures.shown(None if inner else mask, shift)
        self.mask, self.visits = (mask if inner else None), 0
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            answer = self.classifier(images if self.dtype is None else images.to(self.dtype))
        self.mask = None
        if isinstance(answer, (tuple, list)) and answer:
            answer = answer[0]  # beside taps or auxiliary logits
        least = 1 if self.config.score == "logit" else 2
        if (
            not isinstance(answer, Tensor)
            or answer.dim() != 2
            or len(answer) != len(images)
            or answer.shape[1] < least
            or not answer.is_floating_point()
        ):
            got = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"classifier: expected logits of shape [{len(images)}, classes] for the "
                f"{self.config.score} score, with {least} classes at least, got {got}"
            )
        return answer.to(images.dtype)

    def hook(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Multiplies the activation of the layer by the mask."""
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer: expected a module that returns a tensor, got {self.config.layer!r}, "
                f"which returns {type(output).__name__}"
            )
        self.visits += 1
        self.activation = tuple(output.shape)
        if self.mask is None:
            return None
        if output.dim() == 4:
            return ops.blend(output, None, self._fitted(output, output.shape[2], output.shape[3]))
        first, h, w = token_grid(self.activation, str(self.config.layer))
        cells = self._fitted(output, h, w).flatten(2).movedim(1, 2)  # [B, h * w, 1]
        kept = torch.ones_like(cells[:, :1]).expand(-1, first, 1)
        return output * torch.cat([kept, cells], dim=1).to(output.dtype)

    def _fitted(self, output: Tensor, h: int, w: int) -> Tensor:
        mask = self.mask
        if mask is None:
            raise RuntimeError("expected a mask during the pass")
        if mask.shape[2:] != (h, w):
            mask = ops.upsample_mask(mask, (h, w), self.config.mask_sigma)
        # Beside 16-bit activations the mask stays float32, as `blend` takes it.
        return mask.to(torch.float64 if output.dtype == torch.float64 else torch.float32)


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


@contextmanager
def borrowed(
    classifier: nn.Module | Callable[[Tensor], Any], config: PerturbConfig
) -> Iterator[Judge]:
    """A judge that asks the classifier; afterwards, whatever happens, the classifier is as it was.

    Meanwhile it is in eval mode and its parameters need no gradients. Restored are modes,
    ``requires_grad``, hooks and buffers; gradients of parameters are never touched.

    Raises:
        TypeError: `classifier` cannot be called.
        ValueError: The layer does not exist, or normalisation couples the images of a batch.
    """
    if not isinstance(classifier, nn.Module):
        if not callable(classifier):
            raise TypeError(
                "classifier: expected a module or function from images to logits, "
                f"got {type(classifier).__name__}"
            )
        if config.layer is not None:
            raise ValueError(
                f"layer: expected a classifier of named modules beside {config.layer!r}, "
                f"got {type(classifier).__name__}"
            )
        yield Judge(classifier, config)
        return

    layer = None if config.layer is None else _find(classifier, config.layer)
    for name, module in classifier.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"classifier: expected batch normalisation with running statistics, got {name!r} "
                "without: its images would depend on one another"
            )
    modes = {module: module.training for module in classifier.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in classifier.parameters()}
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in classifier.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    judge = Judge(classifier, config, _dtype(classifier))
    handle = None
    try:
        classifier.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        if layer is not None:
            handle = layer.register_forward_hook(judge.hook)
        yield judge
    finally:
        if handle is not None:
            handle.remove()
        for module, training in modes.items():
            module.training = training
        for parameter, needs_gradient in wanted.items():
            parameter.requires_grad_(needs_gradient)
        with torch.no_grad():
            for module, name, buffer, version, before in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(before)


def _dtype(classifier: nn.Module) -> torch.dtype | None:
    for parameter in classifier.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def _find(classifier: nn.Module, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(classifier.named_modules(remove_duplicate=False))
    if layer and layer in modules:
        return modules[layer]
    names = [name for name in modules if name]
    near = difflib.get_close_matches(layer, names, n=5, cutoff=0.5) or names[:5]
    raise ValueError(
        f"layer: expected the name of a module, got {layer!r}; "
        f"near it: {', '.join(near) or 'nothing'}"
    )
