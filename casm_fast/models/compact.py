"""Quarter-width ResNets for small images: the classifiers of the embedded synthetic set."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

# A quarter of ResNet-18's 64, 128, 256, 512.
STAGE_WIDTHS = (16, 32, 64, 128)
BLOCKS = {"compact": (2, 2, 2, 2), "compact10": (1, 1, 1, 1), "compact34": (3, 4, 6, 3)}
"""Basic blocks of the four stages, by name: those of ResNet-18, ResNet-10 and ResNet-34."""


class CompactResNet(nn.Module):
    """A ResNet of basic blocks at a quarter of its width, with a stem for 64x64 images.

    The stem is one 3x3 convolution of stride 2 and no max-pool, so that 64x64 images give
    activations, and therefore a saliency, of 32x32. (A stride-1 stem followed by a max-pool has
    the same resolutions and costs 1.2 to 2.3 times as much on a CPU: its batch norm runs at 64x64.)

    The names of the parts are those of torchvision's ResNet; ``maxpool`` is the identity.

    Args:
        num_classes: number of logits.
        blocks: of each stage, see `BLOCKS`; ResNet-18's by default.
    """

    def __init__(self, num_classes: int, blocks: Sequence[int] = BLOCKS["compact"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STAGE_WIDTHS[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        self.layer1 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], blocks[0], stride=1)
        self.layer2 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], blocks[1], stride=2)
        self.layer3 = _stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], blocks[2], stride=2)
        self.layer4 = _stage(STAGE_WIDTHS[2], STAGE_WIDTHS[3], blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(STAGE_WIDTHS[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, 3, H, W]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # [B, 16, H/2, W/2]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, 128, H/16, W/16]
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def init_convolution(convolution: nn.Conv2d) -> None:
    """Draws the weights from N(0, sqrt(2 / (k * k * out_channels))); a bias stays as it is.

    This is the initialisation of the CASM authors for encoder and decoder, and torchvision's for
    its ResNets (He et al. 2015, fan-out).
    """
    height, width = convolution.kernel_size
    std = math.sqrt(2.0 / (height * width * convolution.out_channels))
    nn.init.normal_(convolution.weight, 0.0, std)


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, stride, shortcut)
    return nn.Sequential(
        first, *(BasicBlock(channels_out, channels_out) for _ in range(blocks - 1))
    )
