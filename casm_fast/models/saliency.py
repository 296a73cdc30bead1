"""The complete model: a classifier and the saliency mapping that reads an encoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from casm_fast.models.decoder import PAPER_WIDTH, Decoder
from casm_fast.models.encoder import COMPACT, Encoder, build_encoder
from casm_fast.models.taps import PAPER_FINEST_STRIDE

ResizePolicy = Literal["crop", "squash"]

# Channel statistics of ImageNet in RGB, which torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SaliencyModel(nn.Module):
    """A classifier f and the saliency mapping m of CASM (Figure 1): images -> (saliency, logits).

    With a shared encoder (the default, and the better one in the paper's Table 2) the decoder
    reads the classifier's own activations. They are detached on the way, so that the mask loss
    never trains the classifier. A separate encoder is a part of the mapping: the mask loss trains
    it, and its logits mean nothing (the paper's note to Table 2: "it is not trained to" classify).

    Args:
        classifier: gives the logits, and when shared the taps.
        decoder: maps the taps to the saliency.
        separate_encoder: feeds the decoder instead of the classifier; None to share.
        classes: names of the classes by label; ``()`` when unknown.
        input_size: side of the images that the model is trained on, in pixels.
        resize_policy: how images become squares of that size: ``"crop"`` (shorter side, then
            centre) or ``"squash"``.
        mean: subtracted from RGB in [0, 1].
        std: then divided by.
        extra: JSON values that travel with the checkpoint, e.g. a summary of the training.

    Attributes:
        shared: whether the decoder reads the classifier.
        encoder: the network that feeds the decoder: `classifier` when shared.
    """

    def __init__(
        self,
        classifier: Encoder,
        decoder: Decoder,
        separate_encoder: Encoder | None = None,
        *,
        classes: Sequence[str] = (),
        input_size: int = 224,
        resize_policy: ResizePolicy = "crop",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.decoder = decoder
        self.separate_encoder = separate_encoder
        self.classes = tuple(classes)
        self.input_size = input_size
        self.resize_policy: ResizePolicy = resize_policy
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.extra = dict(extra or {})
        if self.classes and len(self.classes) != classifier.classes:
            raise ValueError(
                f"SaliencyModel: expected {classifier.classes} class names, one per logit, "
                f"got {len(self.classes)}"
            )
        if decoder.tap_channels != self.encoder.tap_channels:
            raise ValueError(
                f"SaliencyModel: expected a decoder for taps of {list(self.encoder.tap_channels)} "
                f"channels, got one for {list(decoder.tap_channels)}"
            )
        if input_size < 1:
            raise ValueError(
                f"SaliencyModel: expected `input_size` of at least 1, got {input_size}"
            )
        if resize_policy not in get_args(ResizePolicy):
            raise ValueError(
                f"SaliencyModel: expected `resize_policy` 'crop' or 'squash', got '{resize_policy}'"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"SaliencyModel: expected `mean` and `std` of three channels with `std` above 0, "
                f"got {list(self.mean)} and {list(self.std)}"
            )

    @property
    def shared(self) -> bool:
        """Whether the decoder reads the classifier's own activations."""
        return self.separate_encoder is None

    @property
    def encoder(self) -> Encoder:
        """The network that feeds the decoder: the classifier itself when shared."""
        return self.classifier if self.separate_encoder is None else self.separate_encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Computes saliency and logits.

        Args:
            images: ``[B, 3, H, W]``, normalised with `mean` and `std`.

        Returns:
            Saliency ``[B, 1, h, w]`` in (0, 1) at the finest tap's resolution (56x56 for 224x224),
            1 = salient, and logits ``[B, K]``. The saliency's gradient reaches the decoder, and a
            separate encoder, but never the classifier.
        """
        logits, taps = self.classifier(images)
        return self.decode(images, taps), logits

    def decode(self, images: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """Computes the saliency where the classifier has run already.

        Args:
            images: ``[B, 3, H, W]``; read by a separate encoder only.
            taps: the classifier's taps for these images; read when shared, detached here.

        Returns:
            Saliency ``[B, 1, h, w]``.
        """
        if self.separate_encoder is not None:
            _, taps = self.separate_encoder(images)
        else:
            taps = [tap.detach() for tap in taps]
        saliency: Tensor = self.decoder(taps)
        return saliency

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the mask loss trains: the decoder's, and a separate encoder's."""
        yield from self.decoder.parameters()
        if self.separate_encoder is not None:
            yield from self.separate_encoder.parameters()


def build_model(
    backbone: str = "resnet50",
    *,
    classes: int | Sequence[str] = 1000,
    weights: str | Path | None = None,
    shared: bool = True,
    width: int = PAPER_WIDTH,
    tap0_projection: bool | None = None,
    tap_indices: Sequence[int] | None = None,
    finest_stride: int = PAPER_FINEST_STRIDE,
    input_size: int | None = None,
    resize_policy: ResizePolicy = "crop",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> SaliencyModel:
    """Builds an untrained saliency model.

    Args:
        backbone: see `build_encoder`.
        classes: the names of the classes, or their number.
        weights: of the classifier; see `build_encoder`.
        shared: whether the decoder reads the classifier's activations. A separate encoder starts as
            a copy of the classifier.
        width: filters of the decoder's 1x1 convolutions.
        tap0_projection: whether tap 0 gets a 1x1 convolution. None chooses: raw for the ResNets,
            whose tap 0 is the stem, as the authors do; projected for other backbones, whose tap 0
            is the output of a stage.
        tap_indices: see `Decoder`.
        finest_stride: see `build_encoder`.
        input_size: side of the training images; None for 64 ("compact" ones) or 224.
        resize_policy: see `SaliencyModel`.
        mean: see `SaliencyModel`.
        std: see `SaliencyModel`.
    """
    names = () if isinstance(classes, int) else tuple(classes)
    count = classes if isinstance(classes, int) else len(names)
    classifier = build_encoder(
        backbone, classes=count, weights=weights, finest_stride=finest_stride
    )
    decoder = Decoder(
        classifier.tap_channels,
        width=width,
        tap0_projection=not classifier.has_stem_tap if tap0_projection is None else tap0_projection,
        tap_indices=tap_indices,
    )
    if input_size is None:
        input_size = 64 if backbone in COMPACT else 224
    return SaliencyModel(
        classifier,
        decoder,
        None if shared else copy.deepcopy(classifier),
        classes=names,
        input_size=input_size,
        resize_policy=resize_policy,
        mean=mean,
        std=std,
    )


def full_size(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarges a saliency map to the image by nearest neighbours: the paper's last step.

    Pixel (y, x) reads cell (y * h // H, x * w // W), the rule of `casm_fast.ops.blend`.

    Args:
        saliency: ``[B, C, h, w]``.
        size: (H, W) of the result, with H >= h and W >= w.

    Returns:
        ``[B, C, H, W]``. Differentiable.
    """
    height, width = saliency.shape[-2:]
    if size[0] < height or size[1] < width:
        raise ValueError(
            f"full_size: expected `size` of at least {height}x{width}, got {size[0]}x{size[1]}"
        )
    rows = torch.arange(size[0], device=saliency.device) * height // size[0]
    columns = torch.arange(size[1], device=saliency.device) * width // size[1]
    return saliency[..., rows[:, None], columns]
