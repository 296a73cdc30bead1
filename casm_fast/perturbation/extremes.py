"""Extremal perturbations: of all smooth regions of a given area, the one that matters most.

Fong, Patrick & Vedaldi, "Understanding deep networks via extremal perturbations and smooth masks"
(ICCV 2019). For an area a the mask maximises the reward, the target's logit of the image seen
through it, under a growing penalty that pulls the sorted mask to a step of height 1 and width a::

    max_p  reward(m) - lambda_t mean_i (sorted(m)_i - [i > (1 - a) N])^2,   m = smooth_max(p)

by SGD with momentum on the parameters p, all 1 at first, clamped to [0, 1] after each step. The
smooth max is that of `casm_fast.perturbation.smooth_max`; hidden pixels are blurred by
``max_blur * (1 - m)``, linear between the levels of a pyramid. Every image and area is a problem of
its own, and all of them are solved at once. All defaults are those of the paper's TorchRay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from casm_fast import ops
from casm_fast.models.borrowing import Classifies, as_images
from casm_fast.models.memory import budget, footprint, in_parts
from casm_fast.models.targets import Targets, as_targets
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.extremal_config import ExtremalConfig
from casm_fast.perturbation.extremal_result import Extremal, ExtremalCurves
from casm_fast.perturbation.judging import Judge, judging
from casm_fast.perturbation.ranking import ranked_area
from casm_fast.perturbation.smooth_max import SmoothMax

ROSE = 0.01
"""By how much an area loss may end above where it began."""


def extremal(
    classifier: Classifies,
    images: Tensor | Sequence[Tensor],
    targets: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    config: ExtremalConfig | None = None,
    **overrides: Any,
) -> Extremal:
    """Learn for each image, and each of several areas, which region of that area matters most.

    Extremal perturbations (Fong, Patrick & Vedaldi 2019), for a batch of images and several areas
    at once: B x A independent problems.

    Args:
        classifier: As for `perturb`; it is given back as it was.
        images: ``[B, C, H, W]``, normalised for the classifier, floating point, on its device; or a
            list of ``[C, H, W]`` of one size.
        targets: As for `perturb`: one class for all, one or several per image, whose logits are
            summed; None: each image's best class.
        config: Options; the paper's when not given.
        **overrides: Fields of :class:`ExtremalConfig` by name.

    Returns:
        Masks by area, their sum, scores and curves.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An image is not finite, sizes differ, a target is no class, the classifier gives
            no logits (with the contrastive reward: or no class beside the targets), or an option is
            out of range.
        torch.OutOfMemoryError: Not even one mask fits into memory.
    """
    config = dataclasses.replace(config or ExtremalConfig(), **overrides)
    asked = PerturbConfig(score="logit", amp=config.amp)
    with torch.inference_mode(False), torch.no_grad():
        batch = as_images(classifier, images)
        with judging(classifier, asked) as judge:
            return _solve(judge, batch, targets, config)


@dataclass(frozen=True)
class _Veil:
    """B images that show through masks.

    Attributes:
        levels: ``[B, L, C, H, W]``, from most blurred to sharp; of a fade, the images alone.
    """

    levels: Tensor

    @staticmethod
    def over(images: Tensor, config: ExtremalConfig) -> _Veil:
        if config.perturbation == "fade":
            return _Veil(images[:, None])
        last = config.levels - 1
        blurs = [config.max_blur * (1 - level / last) for level in range(last)]
        levels = [ops.gaussian_blur(images, sigma) for sigma in blurs]
        return _Veil(torch.stack([*levels, images], dim=1))

    def shown(self, masks: Tensor) -> Tensor:
        """Through ``[B, A, H, W]``: ``[B * A, C, H, W]``, differentiable in the masks."""
        last = self.levels.shape[1] - 1
        B, A, H, W = masks.shape
        if last == 0:
            return (masks[:, :, None] * self.levels).flatten(0, 1)
        place = masks[:, :, None, None] * last  # [B, A, 1, 1, H, W]
        lower = place.detach().floor().clamp(0, last - 1)
        every = self.levels[:, None].expand(B, A, *self.levels.shape[1:])
        which = lower.long().expand(B, A, 1, self.levels.shape[2], H, W)
        low, high = every.gather(2, which), every.gather(2, which + 1)
        return (low + (place - lower) * (high - low)).view(B * A, -1, H, W)


def _solve(judge: Judge, images: Tensor, targets: Any, config: ExtremalConfig) -> Extremal:
    size, device = (images.shape[2], images.shape[3]), images.device
    smooth_max = SmoothMax(size, config.cell, config.sigma, config.coldness, images)
    classes = judge.ask(images[:1].clone()).shape[1]
    given = as_targets(targets, len(images), classes)
    wide = 1 if given is None else given.shape[1]
    if config.reward == "contrastive" and wide >= classes:
        raise ValueError(
            f"reward: expected a class beside the targets for 'contrastive', got {wide} targets "
            f"of {classes} classes"
        )
    count = config.batch_size
    if count is None:
        one = _footprint(judge, images[:1], smooth_max, config)
        count = max(1, int(budget(device, config.memory_budget) / one))
    parts: list[dict[str, Any]] = []
    side = max(1, count // len(config.areas))
    for made, used in in_parts(
        len(images),
        side,
        lambda part: _images(
            judge,
            images[part],
            None if given is None else given[part].to(device),
            smooth_max,
            config,
            count,
        ),
        device,
    ):
        parts.append(made)
        side = used
    joined = {
        name: torch.cat([part[name] for part in parts])
        for name in parts[0]
        if name not in ("curves", "at_once")
    }
    curves = torch.cat([part["curves"] for part in parts])
    masks = joined["masks"]
    total = masks.sum(dim=1, keepdim=True)
    return Extremal(
        **joined,
        areas=masks.new_tensor(config.areas),
        reached=masks.mean(dim=(2, 3)),
        saliency=ops.gaussian_blur(total, config.smooth * min(size)),
        curves=ExtremalCurves(*curves.unbind(dim=2)),
        config=config,
        batch_size=min(side, len(images)) * min(part["at_once"] for part in parts),
    )


def _images(
    judge: Judge,
    images: Tensor,
    classes: Tensor | None,
    smooth_max: SmoothMax,
    config: ExtremalConfig,
    count: int,
) -> dict[str, Any]:
    """Some images: all areas at once, or as many as fit."""
    logits = judge.ask(images.clone())
    if classes is None:
        classes = logits.argmax(dim=1, keepdim=True)
    targets, veil = Targets(classes), _Veil.over(images, config)
    hidden = veil.shown(images.new_zeros(len(images), 1, *images.shape[2:]))
    made = []
    at_once = max(1, count // len(images))
    for some, used in in_parts(
        len(config.areas),
        at_once,
        lambda part: _descend(judge, veil, targets, smooth_max, config, config.areas[part]),
        images.device,
    ):
        made.append(some)
        at_once = used
    whole = {name: torch.cat([some[name] for some in made], dim=1) for name in made[0]}
    return {
        **whole,
        "targets": classes,
        "score_before": targets.of(logits),
        "score_hidden": targets.of(judge.ask(hidden)),
        "at_once": min(at_once, len(config.areas)),
    }


def _descend(
    judge: Judge,
    veil: _Veil,
    targets: Targets,
    smooth_max: SmoothMax,
    config: ExtremalConfig,
    areas: Sequence[float],
) -> dict[str, Tensor]:
    """SGD on the masks of B images at A areas, nothing of which waits for the device."""
    B, A = len(targets.classes), len(areas)
    every = Targets(targets.classes.repeat_interleave(A, dim=0))
    parameters = veil.levels.new_ones(B * A, 1, *smooth_max.grid)
    momentum = torch.zeros_like(parameters)
    broken = torch.zeros(B * A, dtype=torch.bool, device=parameters.device)
    history = parameters.new_full((config.steps, 3, B * A), torch.nan)
    first = ranked_area(smooth_max.masks(parameters)[0].view(B, A, *smooth_max.size), areas)[0]
    for step in range(config.steps):
        weight = config.area_weight * config.area_growth**step
        masks, sums = smooth_max.masks(parameters)
        mirrored = config.flip and step % 2 == 0
        regions = masks.view(B, A, *smooth_max.size)
        reward, gradient = _rewarded(judge, veil, every, regions, config, mirrored)
        loss, grad_loss = ranked_area(regions, areas)
        loss = loss.flatten()
        objective = reward - weight * loss
        history[step] = torch.stack([objective, reward, loss]).masked_fill_(broken, torch.nan)
        gradient = torch.sub(weight * grad_loss.view_as(masks), gradient.view_as(masks))
        gradient = smooth_max.pull(parameters, masks, sums, gradient)
        broken = broken | ~(objective + gradient.sum(dim=(1, 2, 3))).isfinite()
        kept = 0.0 if step == 0 else config.dampening
        momentum.mul_(config.momentum).add_(gradient, alpha=1 - kept)
        moved = (parameters - config.learning_rate * momentum).clamp_(0, 1)
        parameters = torch.where(broken[:, None, None, None], parameters, moved)
    masks, _ = smooth_max.masks(parameters)
    regions = masks.view(B, A, *masks.shape[2:])
    last, _ = ranked_area(regions, areas)
    after = every.of(judge.ask(veil.shown(1 - regions if config.variant == "delete" else regions)))
    return {
        "masks": regions,
        "parameters": parameters.view(B, A, *smooth_max.grid),
        "score_after": after.view(B, A),
        "diverged": broken.view(B, A) | (last > first + ROSE),
        "curves": history.permute(2, 1, 0).reshape(B, A, 3, config.steps),
    }


def _rewarded(
    judge: Judge,
    veil: _Veil,
    targets: Targets,
    masks: Tensor,
    config: ExtremalConfig,
    mirrored: bool,
) -> tuple[Tensor, Tensor]:
    """The reward of each mask, ``[B * A]``, and its gradient, ``[B, A, H, W]``."""

    def of(shown: Tensor) -> Tensor:
        logits = judge.ask(shown.flip(3) if mirrored else shown)
        reward = targets.of(logits)
        if config.reward == "contrastive":
            own = torch.zeros_like(logits, dtype=torch.int8)
            own.scatter_add_(1, targets.classes.clamp(min=0), (targets.classes >= 0).to(own.dtype))
            reward = reward - logits.masked_fill(own > 0, -torch.inf).amax(dim=1)
        return reward

    reward = masks.new_zeros(masks.shape[0] * masks.shape[1])
    gradient = torch.zeros_like(masks)
    for variant, sign in (("preserve", 1), ("delete", -1)):
        if config.variant not in (variant, "dual"):
            continue
        with torch.enable_grad():
            leaf = masks.detach().requires_grad_()
            score = of(veil.shown(leaf if variant == "preserve" else 1 - leaf))
            (pulled,) = torch.autograd.grad(score.sum(), leaf)
        reward.add_(score.detach(), alpha=sign)
        gradient.add_(pulled, alpha=sign)
    return reward, gradient


def _footprint(judge: Judge, image: Tensor, smooth_max: SmoothMax, config: ExtremalConfig) -> int:
    """Bytes that one mask takes in a step."""
    module = judge.classifier
    veil = _Veil.over(image, config)
    mask = image.new_full((1, 1, *image.shape[2:]), 0.5)
    targets = Targets(torch.zeros(1, 1, dtype=torch.int64, device=image.device))
    own = module.parameters() if isinstance(module, nn.Module) else ()
    kept = footprint(lambda: _rewarded(judge, veil, targets, mask, config, True), own)
    cells = 8 * smooth_max.kernels.shape[1] * math.prod(smooth_max.grid) * image.element_size()
    return kept + cells + veil.levels.nbytes + 8 * image.nbytes
