"""The demo's teachers for tasks other than naming a picture: one that finds objects, one that labels pixels, one that
embeds patches, one that removes noise. About 0.5 MB each; trained by `python -m mimicut.demo.train_scenes`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from mimicut.demo.scenes import TEXTURES
from mimicut.demo.teacher_networks import BasicBlock, conv_norm

STRIDE = 4  # pixels of a scene for one position of the detector's maps
EMBEDDING = 48


class Pyramid(nn.Module):
    """Three stages of residual blocks, and a way back up that adds them: maps of 1/2 and 1/4 of the size.

    Source of the way up: Lin et al. 2017, arXiv 1612.03144.
    """

    def __init__(self, stem: int, widths: tuple[int, int, int], wide: int):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(1, stem, 3), nn.ReLU())
        inputs = (stem, *widths[:2])
        self.stages = nn.ModuleList(BasicBlock(i, w, stride=2) for i, w in zip(inputs, widths, strict=True))
        self.lateral = nn.ModuleList(nn.Conv2d(w, wide, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Sequential(*conv_norm(wide, wide, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.stages[0](self.stem(x))
        quarter = self.stages[1](half)
        eighth = self.stages[2](quarter)
        up = self.lateral[1](quarter) + F.interpolate(self.lateral[2](eighth), scale_factor=2.0)
        coarse = self.smooth[1](up)
        return self.smooth[0](self.lateral[0](half) + F.interpolate(coarse, scale_factor=2.0)), coarse


class Segmenter(nn.Module):
    """Class scores (N, 9, 64, 64): the background and eight textures."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid(12, (24, 40, 64), 32)
        self.classifier = nn.Conv2d(32, 1 + len(TEXTURES), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.classifier(self.body(x)[0])
        return F.interpolate(scores, scale_factor=2.0, mode="bilinear")


class Detector(nn.Module):
    """Three maps at a quarter of the size: for each texture how likely an object's centre is there (N, 8, 16, 16),
    the side lengths of its box in pixels over 16 (N, 2, 16, 16), and where in the cell the centre lies (N, 2, 16, 16).

    Source: Zhou et al. 2019, arXiv 1904.07850.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid(12, (24, 40, 64), 32)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, width, 1))
                for name, width in (("centres", len(TEXTURES)), ("sizes", 2), ("offsets", 2))
            }
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x)[1]
        found = {name: head(features) for name, head in self.heads.items()}
        return {**found, "centres": found["centres"].sigmoid()}


class Embedder(nn.Module):
    """A unit vector (N, 48) for a patch of 32x32 pixels: patches of one photograph lie near each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(1, 16, 3), nn.ReLU())
        stages = ((16, 28), (28, 28), (28, 56), (56, 56))
        self.blocks = nn.Sequential(
            *(BasicBlock(i, w, stride=2 if n % 2 == 0 else 1) for n, (i, w) in enumerate(stages))
        )
        self.pool, self.project = nn.AdaptiveAvgPool2d(1), nn.Linear(56, EMBEDDING)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.project(self.pool(self.blocks(self.stem(x))).flatten(1)))


class Denoiser(nn.Module):
    """A patch without its noise: the network finds the noise, which is subtracted.

    Source: Zhang et al. 2017, arXiv 1608.03981.
    """

    def __init__(self, width: int = 36, depth: int = 6) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth):
            layers += [*conv_norm(width, width, 3), nn.ReLU()]
        self.body, self.noise = nn.Sequential(*layers), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.noise(self.body(x))


def boxes_of(found: dict[str, torch.Tensor], least: float = 0.3, most: int = 10) -> list[torch.Tensor]:
    """Read boxes from the detector's maps: the peaks of the centres (3x3), best first.

    Args:
        found: As `Detector` returns it.
        least: Smallest likelihood of a centre.
        most: Boxes of one scene.

    Returns:
        For each scene float32 (boxes, 6): left, top, right, bottom in pixels, texture, likelihood.
    """
    centres = found["centres"]
    peaks = torch.where(F.max_pool2d(centres, 3, 1, 1) == centres, centres, 0.0)
    scores, places = peaks.flatten(1).topk(most)
    side = centres.shape[-1]
    boxes = []
    for number, (score, place) in enumerate(zip(scores, places, strict=True)):
        texture, row, column = place // side**2, place % side**2 // side, place % side
        sizes = found["sizes"][number][:, row, column] * 16
        middle = (torch.stack([column, row]) + found["offsets"][number][:, row, column]) * STRIDE
        box = torch.cat([middle - sizes / 2, middle + sizes / 2, texture[None], score[None]]).T
        boxes.append(box[score >= least])
    return boxes
