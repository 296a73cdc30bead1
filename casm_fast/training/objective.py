"""The two objectives of Algorithm 1: what the classifier minimises, and what the mask maximises.

Source: Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", CVIU 196 (2020): eq. 7
(score), eq. 8 (classification loss) and "Regularization coefficient lambda_R" (section 4); for
`masked_in_loss` and `smoothness` Phang, Park and Geras, "Investigating and simplifying
masking-based saliency methods for model interpretability" (2020) and its code. All functions are
pure, differentiable, free of host synchronisation, and compute in float32 at least,
whatever the networks' precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast.ops import tv_norm
from casm_fast.training.config import Score

# Share of the squared saliency on the border that `smoothness` adds, as the successor's code does.
BORDER_PENALTY = 0.3


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is in half precision; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def classification_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Eq. 8: the classifier's loss on clean and on masked images.

    ``L = 1/2N sum_n [ l(f((1 - m(x_n)) x_n), y_n) + l(f(x_n), y_n) ]``, l the cross-entropy; the
    mean over the three kinds of image where masked-in ones are seen too.

    Args:
        logits: f on the images, on the masked-out and perhaps on the masked-in images,
            ``[B, K]`` each.
        labels: ``[B]`` int64.

    Returns:
        The loss in nats, ``[]``.
    """
    losses = [F.cross_entropy(full_precision(of_kind), labels) for of_kind in logits]
    return torch.stack(losses).mean()


def prediction_entropy(logits: Tensor) -> Tensor:
    """``H = -sum_k p_k ln p_k`` of each row's softmax, from 0 to ln K nats: ``[B, K] -> [B]``."""
    log_probabilities = F.log_softmax(full_precision(logits), dim=1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1)


def mask_loss(
    judge_logits: Tensor,
    labels: Tensor,
    correct: Tensor,
    saliency: Tensor,
    lambda_r: Tensor | float,
    score: Score,
) -> Tensor:
    """The negative of the score S(m, f') of eq. 7, which the mask's optimiser minimises.

    ::

        entropy:         -1/B sum_b c_b H(f'((1 - m_b) x_b))      + lambda_R / B sum_b n_b mean(m_b)
        classification:  -1/B sum_b l(f'((1 - m_b) x_b), y_b)     + lambda_R / B sum_b n_b mean(m_b)

    with c_b = 1 where f is right on the clean image (section 4: the entropy uses only images "that
    the classifier is not trivially confused on"), and n_b = 1 where besides f' is wrong on the
    masked-out image (section 4: the regulariser acts "only when there is a disagreement"). Both
    sums are divided by the whole batch size B. lambda_R weighs the *mean* saliency: eq. 7's L1
    norm, divided by the number of pixels.

    Args:
        judge_logits: f' on the masked-out images, ``[B, K]``.
        labels: ``[B]`` int64.
        correct: c, ``[B]`` bool.
        saliency: m at the decoder's resolution, ``[B, 1, h, w]``, in [0, 1].
        lambda_r: lambda_R in nats, ``[]`` or a number.
        score: ``"entropy"`` or ``"classification"``.

    Returns:
        The loss in nats, ``[]``; differentiable in `judge_logits` and `saliency`.
    """
    nontrivially_confused = correct & (judge_logits.argmax(dim=1) != labels)
    area = full_precision(saliency).mean(dim=(1, 2, 3))
    regulariser = lambda_r * (nontrivially_confused * area).mean()
    if score == "entropy":
        return regulariser - (correct * prediction_entropy(judge_logits)).mean()
    return regulariser - F.cross_entropy(full_precision(judge_logits), labels)


def masked_in_loss(
    judge_logits: Tensor, labels: Tensor, saliency: Tensor, lambda_in: Tensor | float
) -> Tensor:
    """What Phang et al. add: the masked-in image alone must still be classified.

    ``1/B sum_b l(f'(m_b x_b), y_b) + lambda_in / B sum_b c_b mean(m_b)``, with c_b = 1 where f' is
    right on the masked-in image: only a mask that keeps enough is made smaller.

    Args:
        judge_logits: f' on the masked-in images, ``[B, K]``.
        labels: ``[B]`` int64.
        saliency: m at the decoder's resolution, ``[B, 1, h, w]``, in [0, 1].
        lambda_in: Weight of the mean saliency, in nats, ``[]`` or a number.

    Returns:
        The loss in nats, ``[]``; differentiable in `judge_logits` and `saliency`.
    """
    recognised = judge_logits.argmax(dim=1) == labels
    area = full_precision(saliency).mean(dim=(1, 2, 3))
    loss = F.cross_entropy(full_precision(judge_logits), labels)
    return loss + lambda_in * (recognised * area).mean()


def smoothness(saliency: Tensor, height: int, width: int) -> Tensor:
    """Total variation of the masks at the images' resolution, with a penalty on their borders.

    ``1/B sum_b [ sum dx^2 + sum dy^2 + 0.3 sum border^2 ]`` over the mask that nearest up-scaling
    makes of `saliency` (Phang et al.; a corner lies on two borders). Up-scaling by a whole factor s
    repeats every difference and every border cell s times, so that the small mask says it all.
    Where the two axes have other factors, s is their geometric mean.

    Args:
        saliency: m at the decoder's resolution, ``[B, 1, h, w]``, in [0, 1].
        height: H, of the images.
        width: W, of the images.

    Returns:
        The penalty, ``[]``; differentiable.
    """
    saliency = full_precision(saliency)
    factor = math.sqrt(height * width / (saliency.shape[-2] * saliency.shape[-1]))
    borders = (saliency[..., 0, :], saliency[..., -1, :], saliency[..., 0], saliency[..., -1])
    penalty = torch.stack([border.square().sum() for border in borders]).sum()
    total = tv_norm(saliency, beta=2).sum() + BORDER_PENALTY * penalty
    return factor * total / saliency.shape[0]
