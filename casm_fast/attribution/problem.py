"""What every method works on, and what a method is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from casm_fast.models.borrowing import Classifies, as_logits, dtype_of
from casm_fast.models.memory import slices
from casm_fast.models.targets import Targets

Score = Literal["logit", "softmax", "log_softmax"]


@dataclass(frozen=True)
class Problem:
    """A batch of images whose scores are to be explained.

    Attributes:
        classifier: On loan: in eval mode, without gradients of its parameters; hooks that a method
            leaves behind are removed.
        images: ``[B, C, H, W]``, normalised, float32 or float64, finite.
        targets: Their classes, on the same device.
        score: What of the classes' logits is explained; of several classes the sum.
        batch_size: Images that one pass of the classifier may hold, for methods that show many
            variants of an image.
        asked: Whether the caller named the targets; else they are each image's best class.
        seed: Of random numbers; every image gets those that it would get alone.
        lender: What the caller gave as the classifier, such as a `SaliencyModel`.
    """

    classifier: Classifies
    images: Tensor
    targets: Targets
    score: Score = "logit"
    batch_size: int = 64
    asked: bool = True
    seed: int = 0
    lender: Any = field(default=None, repr=False)

    def logits(self, images: Tensor) -> Tensor:
        """What the classifier answers, ``[n, K]`` in the dtype of the images.

        Raises:
            ValueError: It answers something else than logits.
        """
        dtype = dtype_of(self.classifier)
        answer = self.classifier(images if dtype is None else images.to(dtype))
        return as_logits(answer, len(images), self.score).to(images.dtype)

    def scores(self, images: Tensor, targets: Targets | None = None) -> Tensor:
        """The targets' summed score of each image, ``[n]``.

        Args:
            images: ``[n, C, H, W]``.
            targets: Their classes; those of the problem when not given.

        Raises:
            ValueError: The classifier answers something else than logits.
        """
        values = self.logits(images)
        if self.score == "softmax":
            values = values.softmax(dim=1)
        elif self.score == "log_softmax":
            values = values.log_softmax(dim=1)
        return (self.targets if targets is None else targets).of(values)

    def scores_of_variants(self, count: int, variant: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Scores of `count` variants of every image, in passes as full as memory allows.

        Variants of several images share a pass, so that no pass is emptier than it need be.

        Args:
            count: N, variants of each image.
            variant: Makes images ``[n, C, H, W]`` from the numbers of images ``[n]`` and of
                variants ``[n]``, both int64 on the device of the images.

        Returns:
            ``[B, N]``.
        """
        device = self.images.device
        scores = []
        for part in slices(len(self.images) * count, self.batch_size):
            pair = torch.arange(part.start, part.stop, device=device)
            who, which = pair // count, pair % count
            scores.append(self.scores(variant(who, which), self.targets.select(who)))
        return torch.cat(scores).view(len(self.images), count)

    def select(self, places: Tensor | slice) -> Problem:
        """The problem of some of the images."""
        return replace(self, images=self.images[places], targets=self.targets.select(places))


@dataclass(frozen=True)
class Method:
    """A way to make saliency maps.

    Attributes:
        name: As `attribute` takes it.
        title: As people write it.
        paper: Where it comes from.
        maps: Makes ``[B, 1, H, W]`` from a problem and options; higher is more salient.
        options: Frozen dataclass of its options, with the paper's settings as defaults.
        score: What is explained when the caller does not say.
        uses: What it asks of the classifier: "gradients", "scores" alone, or "nothing".
    """

    name: str
    title: str
    paper: str
    maps: Callable[[Problem, Any], Tensor]
    options: type
    score: Score = "logit"
    uses: Literal["gradients", "scores", "nothing"] = "gradients"
