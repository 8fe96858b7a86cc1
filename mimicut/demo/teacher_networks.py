"""The demo's teachers: small networks of different families for 32x32 grey patches.

Plain modules with the names that their big relatives have in torchvision. More families fit in as one more builder.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mimicut.base.errors import InputError
from mimicut.demo import imagenet
from mimicut.demo.photographs import CLASSES, PREPROCESSING

TEACHERS = Path(__file__).parent / "teachers"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip. Source: He et al. 2016, arXiv 1512.03385, section 3.3."""

    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + skip)


class ResNet(nn.Module):
    """A stem and three stages of basic blocks, then pool and fc.

    Source: He et al. 2016, section 4.2 (CIFAR-10). Here the first stage may halve the size too: much faster.
    stages: (width, blocks, stride of the first block) each.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, stem: int, stages: tuple[tuple[int, int, int], ...], channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        inputs = stem
        for number, (width, depth, stride) in enumerate(stages, start=1):
            blocks = [BasicBlock(inputs, width, stride=stride)]
            blocks += [BasicBlock(width, width) for _ in range(depth - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            inputs = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))


def conv_norm(inputs: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias that keeps the size (but for its stride) and its batch norm."""
    return [nn.Conv2d(inputs, width, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(width)]


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, project. Source: Sandler et al. 2018, arXiv 1801.04381, section 3.3."""

    def __init__(self, inputs: int, width: int, stride: int, expand: int):
        super().__init__()
        middle = inputs * expand
        self.residual = stride == 1 and inputs == width
        self.conv = nn.Sequential(
            *conv_norm(inputs, middle, 1),
            nn.ReLU6(),
            *conv_norm(middle, middle, 3, stride, groups=middle),
            nn.ReLU6(),
            *conv_norm(middle, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, a last 1x1 convolution, then pool and fc.

    stages: (expand, width, blocks, stride of the first block) each; the stem halves the size.
    Source: Sandler et al. 2018, table 2, made smaller.
    """

    def __init__(
        self,
        stem: int,
        stages: tuple[tuple[int, int, int, int], ...],
        last: int,
        channels: int,
        classes: int,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*conv_norm(channels, stem, 3, 2), nn.ReLU6())]
        inputs = stem
        for expand, width, depth, stride in stages:
            for number in range(depth):
                layers.append(InvertedResidual(inputs, width, stride if number == 0 else 1, expand))
                inputs = width
        layers.append(nn.Sequential(*conv_norm(inputs, last, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


class VGG(nn.Module):
    """Plain 3x3 convolutions with batch norm, maximum pooling between the stages, then pool and fc.

    stages: the widths of each. Source: Simonyan and Zisserman 2015, arXiv 1409.1556, made smaller, with the batch norm
    of torchvision's vgg16_bn and one linear layer, as is usual at 32 pixels.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for widths in stages:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [*conv_norm(inputs, width, 3), nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


class Attention(nn.Module):
    """Self-attention of several heads, one layer for their queries, keys and values. Source: Vaswani et al. 2017,
    arXiv 1706.03762, section 3.2."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.head_dim)
        self.proj = nn.Linear(heads * self.head_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(images, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(images, tokens, self.num_heads * self.head_dim))


class TransformerBlock(nn.Module):
    """Attention and an MLP, each after a layer norm and with a skip. Source: Dosovitskiy et al. 2021, arXiv
    2010.11929, section 3.1."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Overlapping patches, positions, transformer blocks, a last norm, then the mean over the tokens and fc.

    patch: pixels between two tokens; each sees twice as many, less one. size: of the image, its sides are equal.
    Source: Dosovitskiy et al. 2021, made smaller, with the mean in place of a class token.
    """

    def __init__(
        self, patch: int, width: int, depth: int, heads: int, hidden: int, channels: int, size: int, classes: int
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, width, 2 * patch - 1, patch, patch - 1)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.fc(self.norm(self.blocks(x)).mean(1))


def resnet20() -> nn.Module:
    return ResNet(20, ((20, 3, 2), (40, 3, 2), (80, 3, 2)), PREPROCESSING["input_size"][0], len(CLASSES))


def resnet14() -> nn.Module:
    return ResNet(16, ((16, 2, 2), (32, 2, 2), (64, 2, 2)), PREPROCESSING["input_size"][0], len(CLASSES))


def mobilenetv2_tiny() -> nn.Module:
    stages = ((1, 16, 1, 1), (4, 24, 3, 2), (4, 48, 3, 2))
    return MobileNetV2(16, stages, 128, PREPROCESSING["input_size"][0], len(CLASSES))


def vgg7() -> nn.Module:
    return VGG(((16,), (24, 24), (48, 48), (64, 64)), PREPROCESSING["input_size"][0], len(CLASSES))


def vit_tiny() -> nn.Module:
    channels, size, _ = PREPROCESSING["input_size"]
    return VisionTransformer(4, 64, 4, 4, 256, channels, size, len(CLASSES))


def resnet32() -> nn.Module:
    return ResNet(16, ((16, 5, 2), (32, 5, 2), (64, 5, 2)), PREPROCESSING["input_size"][0], len(CLASSES))


def vit_deep() -> nn.Module:
    channels, size, _ = PREPROCESSING["input_size"]
    return VisionTransformer(4, 48, 6, 4, 192, channels, size, len(CLASSES))


# The first four are cheap enough for hundreds of runs: benchmarks/ compares methods on them. The last two have twelve
# branches and more that can be dropped.
_BUILDERS = {
    "mobilenetv2_tiny": mobilenetv2_tiny,
    "resnet14": resnet14,
    "vgg7": vgg7,
    "vit_tiny": vit_tiny,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "vit_deep": vit_deep,
}
NAMES = tuple(_BUILDERS)
# For other tasks than naming a picture: their classes in `scene_networks`.
OTHER_TASKS = {
    "segmenter_tiny": "Segmenter",
    "detector_tiny": "Detector",
    "embedder_tiny": "Embedder",
    "denoiser_tiny": "Denoiser",
}


def build(name: str) -> nn.Module:
    """The network with random weights, in train mode.

    Raises:
        InputError: The name is in neither NAMES nor OTHER_TASKS.
    """
    if name in OTHER_TASKS:
        return getattr(importlib.import_module("mimicut.demo.scene_networks"), OTHER_TASKS[name])()
    if name not in _BUILDERS:
        known = ", ".join((*NAMES, *OTHER_TASKS, *imagenet.NAMES))
        raise InputError(f"building a demo teacher: found the name {name!r}, expected one of {known}")
    return _BUILDERS[name]()


def facts(name: str, folder: Path = TEACHERS) -> dict[str, Any]:
    """How this teacher was trained, and its measured figures.

    Raises:
        InputError: It has not been trained.
    """
    path = Path(folder, f"{name}.json")
    if not path.is_file():
        raise InputError(
            f"reading the facts of the demo teacher {name!r}: {path} is missing; "
            f"expected one of {', '.join((*NAMES, *OTHER_TASKS))}, trained by {_trained_by(name)}"
        )
    return json.loads(path.read_text())


def load(name: str, folder: Path = TEACHERS) -> tuple[nn.Module, dict[str, Any]]:
    """The trained teacher, in eval mode, and its preprocessing: input_size (C, H, W), mean, std, resize, interpolation.

    The figures are for pixels scaled to 0..1 of patches that are already standardised, as photographs.py writes them.

    Raises:
        InputError: The name is unknown, or the weights are missing.
    """
    model = build(name)
    path = Path(folder, f"{name}.safetensors")
    if not path.is_file():
        raise InputError(f"loading the demo teacher {name!r}: {path} is missing; make it with {_trained_by(name)}")
    model.load_state_dict(load_file(path))
    return model.eval(), preprocessing(name)


def preprocessing(name: str) -> dict[str, Any]:
    """How a teacher takes its images; see `load`."""
    if name in ("segmenter_tiny", "detector_tiny"):
        return dict(importlib.import_module("mimicut.demo.scenes").PREPROCESSING)
    return dict(PREPROCESSING)


def _trained_by(name: str) -> str:
    return f"python -m mimicut.demo.train{'_scenes' if name in OTHER_TASKS else ''} --teacher {name}"
