"""The two objectives of Algorithm 1: what the classifier minimises, and what the mask maximises.

Source: Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", CVIU 196 (2020): eq. 7
(score), eq. 8 (classification loss) and "Regularization coefficient lambda_R" (section 4). All
functions are pure, differentiable, free of host synchronisation, and compute in float32 at least,
whatever the networks' precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast.training.config import Score


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is in half precision; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def classification_loss(clean_logits: Tensor, masked_logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 8: the classifier's loss on clean and on masked-out images.

    ``L = 1/2N sum_n [ l(f((1 - m(x_n)) x_n), y_n) + l(f(x_n), y_n) ]``, l the cross-entropy.

    Args:
        clean_logits: f on the images, ``[B, K]``.
        masked_logits: f on the masked-out images, ``[B, K]``.
        labels: ``[B]`` int64.

    Returns:
        The loss in nats, ``[]``.
    """
    return 0.5 * (
        F.cross_entropy(full_precision(clean_logits), labels)
        + F.cross_entropy(full_precision(masked_logits), labels)
    )


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
