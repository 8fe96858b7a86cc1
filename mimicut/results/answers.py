"""The answers of teacher and student to some held-out images, as lines of text and as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from mimicut.base.disk import write_by
from mimicut.base.guard import evaluating
from mimicut.base.scratch import replace_file
from mimicut.inputs.image_set import ImageSet

_COLUMNS, _SHOWN, _GAP = 4, 188, 18  # pixels of a shown image, and between them
_PAPER, _INK, _SOFT, _LINE, _ALIKE, _OTHER = "#ffffff", "#1c2430", "#5a6675", "#d9dee5", "#1a7f4b", "#b3362b"


@dataclass(frozen=True)
class Answer:
    """Both answers to one image.

    Attributes:
        image: The name of the image.
        index: Its place in the image set.
        teacher, student: The class that each ranks first, and its probability (0 to 1).
    """

    image: str
    index: int
    teacher: tuple[str, float]
    student: tuple[str, float]

    @property
    def alike(self) -> bool:
        """Whether both name the same class."""
        return self.teacher[0] == self.student[0]


@torch.no_grad()
def answers(
    teacher: nn.Module, student: nn.Module, images: ImageSet, classes: Sequence[str], count: int
) -> list[Answer]:
    """Both answers to `count` of the images, evenly spaced. classes: the name of each output."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().unique().tolist()
    batch, found = images.batch(chosen), []
    for model in (teacher, student):
        with evaluating(model):
            like = next(model.parameters())
            found.append(model(batch.to(like.device)).double().softmax(1).cpu().max(1))
    collected = []
    for row, index in enumerate(chosen):
        both = [(classes[int(top.indices[row])], float(top.values[row])) for top in found]
        collected.append(Answer(images.names[index], index, *both))
    return collected


def lines(shown: Sequence[Answer]) -> str:
    """A heading, and a row of text for each answer."""
    name = max(len(a.image.rpartition(".")[0] or a.image) for a in shown)
    word = max(len(f"{a.teacher[0]} {a.teacher[1]:.0%}") for a in shown)
    rows = [f"{'held-out image':<{max(name, 14)}}  {'teacher':<{max(word, 7)}}  student"]
    for a in shown:
        image = a.image.rpartition(".")[0] or a.image
        first, second = (f"{who[0]} {who[1]:.0%}" for who in (a.teacher, a.student))
        rows.append(f"{image:<{max(name, 14)}}  {first:<{max(word, 7)}}  {second}{'' if a.alike else '  (different)'}")
    return "\n".join(rows)


def draw(path: Path, shown: Sequence[Answer], images: ImageSet, title: str, below: str) -> None:
    """Write a PNG with a card for each answer: the image as the teacher sees it, and both answers.

    Args:
        path: The file.
        shown: The answers.
        images: The set that they are about.
        title, below: Two lines of text above the cards.
    """
    large, middle, small = (ImageFont.load_default(size) for size in (22, 15, 13))
    rows = -(-len(shown) // _COLUMNS)
    card = _SHOWN + 58
    wide = _GAP + _COLUMNS * (_SHOWN + _GAP)
    canvas = Image.new("RGB", (wide, 84 + rows * (card + _GAP)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 16), title, _INK, large)
    pen.text((_GAP, 48), below, _SOFT, middle)
    for number, answer in enumerate(shown):
        left = _GAP + number % _COLUMNS * (_SHOWN + _GAP)
        top = 84 + number // _COLUMNS * (card + _GAP)
        canvas.paste(_thumbnail(images, answer.index), (left, top))
        pen.rectangle((left - 1, top - 1, left + _SHOWN, top + _SHOWN), outline=_LINE)
        for who, (word, sure), down, colour in (
            ("teacher", answer.teacher, 6, _INK),
            ("student", answer.student, 31, _ALIKE if answer.alike else _OTHER),
        ):
            at = top + _SHOWN + down
            pen.text((left, at + 1), who, _SOFT, small)
            room = _SHOWN - 54
            pen.text((left + 54, at), _fitting(f"{word} {sure:.0%}", room, middle), colour, middle)
            pen.rectangle((left + 54, at + 19, left + 54 + room, at + 21), fill=_LINE)
            pen.rectangle((left + 54, at + 19, left + 54 + round(room * sure), at + 21), fill=colour)
    replace_file(path, lambda fresh: write_by(fresh, canvas.save))


def _fitting(text: str, room: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text`, its words shortened before the percentage where it is wider than `room`."""
    if font.getlength(text) <= room:
        return text
    words, _, share = text.rpartition(" ")
    while words and font.getlength(f"{words}… {share}") > room:
        words = words[:-1].rstrip()
    return f"{words}… {share}"


def _thumbnail(images: ImageSet, index: int) -> Image.Image:
    (image,) = images.batch([index])
    pre = images.preprocessing
    mean, std = (torch.tensor(v)[:, None, None] for v in (pre.mean, pre.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.expand(3, -1, -1).movedim(0, 2).contiguous().numpy()
    smooth = Image.Resampling.BICUBIC if min(pre.input_size[1:]) >= 64 else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((_SHOWN, _SHOWN), smooth)
