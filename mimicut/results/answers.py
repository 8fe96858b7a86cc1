"""What teacher and student answer on held-out images, in words: lines of text, and one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from mimicut.base.guard import evaluating
from mimicut.inputs.image_set import ImageSet

_COLUMNS, _SHOWN, _GAP = 4, 188, 18  # pixels of a shown image, and between them
_PAPER, _INK, _SOFT, _LINE, _ALIKE, _OTHER = "#ffffff", "#1c2430", "#5a6675", "#d9dee5", "#1a7f4b", "#b3362b"


@dataclass(frozen=True)
class Answer:
    """image: its name. teacher, student: what each names first, and with which probability."""

    image: str
    index: int
    teacher: tuple[str, float]
    student: tuple[str, float]

    @property
    def alike(self) -> bool:
        return self.teacher[0] == self.student[0]


@torch.no_grad()
def answers(
    teacher: nn.Module, student: nn.Module, images: ImageSet, classes: Sequence[str], count: int
) -> list[Answer]:
    """On `count` of the images, evenly spaced, whatever is answered there."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().unique().tolist()
    batch, found = images.batch(chosen), []
    for model in (teacher, student):
        with evaluating(model):
            like = next(model.parameters())
            found.append(model(batch.to(like.device)).double().softmax(1).cpu().max(1))
    told = []
    for row, index in enumerate(chosen):
        both = [(classes[int(top.indices[row])], float(top.values[row])) for top in found]
        told.append(Answer(images.names[index], index, *both))
    return told


def lines(told: Sequence[Answer]) -> str:
    """A row of text for each."""
    name = max(len(a.image.rpartition(".")[0] or a.image) for a in told)
    word = max(len(f"{a.teacher[0]} {a.teacher[1]:.0%}") for a in told)
    rows = [f"{'held-out image':<{max(name, 14)}}  {'teacher':<{max(word, 7)}}  student"]
    for a in told:
        image = a.image.rpartition(".")[0] or a.image
        first, second = (f"{who[0]} {who[1]:.0%}" for who in (a.teacher, a.student))
        rows.append(f"{image:<{max(name, 14)}}  {first:<{max(word, 7)}}  {second}{'' if a.alike else '  (another)'}")
    return "\n".join(rows)


def draw(path: Path, told: Sequence[Answer], images: ImageSet, title: str, below: str) -> None:
    """A card for each answer: the image as the teacher sees it, and what both say of it. Written to `path`, PNG."""
    large, middle, small = (ImageFont.load_default(size) for size in (22, 15, 13))
    rows = -(-len(told) // _COLUMNS)
    card = _SHOWN + 58
    wide = _GAP + _COLUMNS * (_SHOWN + _GAP)
    canvas = Image.new("RGB", (wide, 84 + rows * (card + _GAP)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 16), title, _INK, large)
    pen.text((_GAP, 48), below, _SOFT, middle)
    for number, answer in enumerate(told):
        left = _GAP + number % _COLUMNS * (_SHOWN + _GAP)
        top = 84 + number // _COLUMNS * (card + _GAP)
        canvas.paste(_shown(images, answer.index), (left, top))
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
    canvas.save(path)


def _fitting(text: str, room: int, font: ImageFont.FreeTypeFont) -> str:
    """`text`, its words shortened before the percentage where it is wider than `room`."""
    if font.getlength(text) <= room:
        return text
    words, _, share = text.rpartition(" ")
    while words and font.getlength(f"{words}… {share}") > room:
        words = words[:-1].rstrip()
    return f"{words}… {share}"


def _shown(images: ImageSet, index: int) -> Image.Image:
    (image,) = images.batch([index])
    pre = images.preprocessing
    mean, std = (torch.tensor(v)[:, None, None] for v in (pre.mean, pre.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.expand(3, -1, -1).movedim(0, 2).contiguous().numpy()
    smooth = Image.Resampling.BICUBIC if min(pre.input_size[1:]) >= 64 else Image.Resampling.NEAREST
    return Image.fromarray(pixels).resize((_SHOWN, _SHOWN), smooth)
