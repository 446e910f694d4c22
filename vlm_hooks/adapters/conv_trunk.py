"""ResNet-18's trunk (He et al., CVPR 2016) at any width and depth: what the codec adapters read pictures and maps with.

Legend: N pictures, C channels, H × W pixels, h × w places of the result, D features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class ConvTrunk(nn.Module):
    """All of ResNet-18 up to its global pooling: [N, C, H, W] -> [N, D, ⌈H/stride⌉, ⌈W/stride⌉].

    width 64 and blocks 2 are ResNet-18's own (its weights load, but for the first layer where channels is not 3), of
    D = 512 features. stride: 32 is ResNet-18's; 16 leaves its last halving out, 8 the last two, with the same weights.
    Raises ValueError for another stride.
    """

    def __init__(self, channels: int = 3, width: int = 64, blocks: int = 2, stride: int = 32) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"ConvTrunk: stride must be 8, 16 or 32, not {stride}.")
        self.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2 if stride >= 16 else 1)
        self.layer4 = _stage(4 * width, 8 * width, blocks, 2 if stride >= 32 else 1)
        self.features = 8 * width

    def forward(self, pictures: Tensor) -> Tensor:
        places = self.maxpool(self.relu(self.bn1(self.conv1(pictures))))
        return self.layer4(self.layer3(self.layer2(self.layer1(places))))


def _stage(inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` basic blocks, of which the first changes size and width, with ResNet's names."""
    shortcut = None
    if stride > 1 or inside != outside:
        shortcut = nn.Sequential(
            nn.Conv2d(inside, outside, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outside)
        )
    first = BasicBlock(inside, outside, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outside, outside) for _ in range(blocks - 1)))
