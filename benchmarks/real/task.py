"""Teachers at a size, the pictures as they take them, and what is measured of a student."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real.pictures import DEFAULT, Pictures, opened
from mimicut.base.errors import InputError
from mimicut.base.guard import evaluating, full_copy
from mimicut.inputs.image_set import ImageSet, read_images
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import Teacher
from mimicut.proof.figures import FeatureError
from mimicut.results.teachers import load_teacher
from mimicut.surgery.seam import Seam, capturing

SURE = 0.5  # confidence of the teacher from which on it counts as sure
BINS = 15  # of the calibration error. Source: Guo et al., ICML 2017, arXiv 1706.04599.
# Images at a time. Source: measured, EfficientNet-Lite0 at 160 pixels, one thread: 11 ms an image by 8, 19 by 50, half
# of which the system spends on fresh memory.
BATCH, GPU_BATCH = 8, 64


def teacher_of(name: str, size: int | None = None) -> Teacher:
    """name: of the demo ("efficientnet_lite0"), or any that `load_teacher` reads. size: of the square that it is given,
    in pixels; its own where None."""
    spec = name if ":" in name or "/" in name else f"demo:{name}"
    return load_teacher(spec, input_size=None if size is None else (3, size, size))


def image_sets(
    teacher: Teacher, images: int = 50, seed: int = 2021, test: int | None = None, folder: Path = DEFAULT / "pictures"
) -> tuple[ImageSet, ImageSet]:
    """`images` of the part "few", drawn by the seed, and the first `test` of the part "test", or all of them."""
    pictures = found(folder)
    return few_images(pictures, teacher, images, seed), read(pictures.files["test"][:test], teacher.preprocessing)


@lru_cache(maxsize=2)
def found(folder: Path) -> Pictures:
    return opened(folder)


def few_images(pictures: Pictures, teacher: Teacher, count: int, seed: int) -> ImageSet:
    """Raises: InputError where there are not so many."""
    pool = pictures.files["few"]
    if count > len(pool):
        raise InputError(f"drawing {count} pictures to learn from: there are {len(pool)}")
    return read(random.Random(seed).sample(pool, count), teacher.preprocessing)


def read(files: list[Path], preprocessing: Preprocessing) -> ImageSet:
    return read_images([str(path) for path in files], preprocessing)


_READ = 100  # files at a time: their decoded pixels are held meanwhile


@lru_cache(maxsize=2)
def _pixels(pictures_hash: str, files: tuple[Path, ...], preprocessing: Preprocessing) -> Tensor:
    """uint8 (n, 3, H, W), as the teacher takes them but for the normalisation: a quarter of the memory."""
    plain = replace(preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)
    parts = [read(list(files[i : i + _READ]), plain) for i in range(0, len(files), _READ)]
    return torch.cat([part.batch().mul_(255).round_().to(torch.uint8) for part in parts])


class Exam:
    """The test of one teacher at one size: its own answers are computed once."""

    def __init__(self, pictures: Pictures, teacher: Teacher, seam: Seam, device: str):
        self.pictures, self.teacher, self.seam, self.device = pictures, teacher, seam, device
        self._test = self._reference("test", features=True)
        self._labelled = self._reference("labelled", features=False)

    def _batches(self, part: str) -> Iterator[Tensor]:
        pre = self.teacher.preprocessing
        pixels = _pixels(self.pictures.hash, tuple(self.pictures.files[part]), pre)
        for batch in pixels.split(BATCH if self.device == "cpu" else GPU_BATCH):
            yield pre.normalise(batch).to(self.device, memory_format=torch.channels_last)

    def _answers(self, model: nn.Module, part: str) -> Iterator[tuple[list[Tensor], Tensor]]:
        # The test's seconds are nobody's: in the layout that is quickest, whatever the method ran in.
        model = full_copy(model).to(memory_format=torch.channels_last)
        with evaluating(model), capturing(model, self.seam) as learner:
            for x in self._batches(part):
                features, logits_nk = learner.features_and_output(x)
                yield [f.float().cpu() for f in features], logits_nk.float().cpu()

    def _reference(self, part: str, features: bool) -> tuple[list[list[Tensor] | None], Tensor]:
        """The teacher's features, batch by batch, where they are asked for, and its scores (n, K)."""
        given = list(self._answers(self.teacher.model, part))
        return [f if features else None for f, _ in given], torch.cat([logits for _, logits in given])

    def figures(self, model: nn.Module) -> dict[str, Any]:
        """Of the student `model`, everything that a line says of it; bits of the images as hexadecimal digits."""
        features, theirs = self._test
        errors, cosines, scores = [FeatureError() for _ in self.seam.points], [], []
        for wanted, (have, logits) in zip(features, self._answers(model, "test"), strict=True):
            for error, want, got in zip(errors, wanted, have, strict=True):
                error.add(want.double(), got.double())
                cosines.append(torch.cosine_similarity(*(f.reshape(len(f), -1) for f in (want, got))))
            scores.append(logits)
        ours = torch.cat(scores)
        labels = torch.tensor(self.pictures.labels)
        named = torch.cat([logits for _, logits in self._answers(model, "labelled")]).argmax(1)
        agree, sure = theirs.argmax(1) == ours.argmax(1), theirs.softmax(1).amax(1) >= SURE
        right_teacher, right = self._labelled[1].argmax(1) == labels, named == labels
        return {
            "agreement": share(agree), "agreement_sure": share(agree[sure]),
            "feature_error": round(sum(e.squared / e.spread for e in errors) / len(errors), 6),
            "cosine": round(float(torch.cat(cosines).mean()), 6),
            "calibration_error": round(calibration_error(ours.softmax(1).amax(1), agree), 6),
            "confidence_teacher": round(float(theirs.softmax(1).amax(1).mean()), 6),
            "confidence": round(float(ours.softmax(1).amax(1).mean()), 6),
            "top1_labelled_teacher": share(right_teacher), "top1_labelled": share(right),
            "test_images": len(agree), "sure_images": int(sure.sum()), "labelled_images": len(labels),
            "bits": {
                name: packed(bits)
                for name, bits in (
                    ("agree", agree), ("sure", sure), ("right", right), ("right_teacher", right_teacher)
                )
            },
        }  # fmt: skip


def share(bits: Tensor) -> float | None:
    return round(float(bits.double().mean()), 6) if len(bits) else None


def calibration_error(confidence_n: Tensor, agree_n: Tensor) -> float:
    """Expected calibration error: confidence in the own answer against how often it is the teacher's, in BINS equal
    steps of confidence, weighted by their images."""
    bins = (confidence_n * BINS).ceil().long().clamp(1, BINS)
    total = 0.0
    for number in range(1, BINS + 1):
        inside = bins == number
        if inside.any():
            gap = confidence_n[inside].double().mean() - agree_n[inside].double().mean()
            total += float(gap.abs()) * int(inside.sum()) / len(bins)
    return total


def packed(bits: Tensor) -> str:
    """Hexadecimal digits, four images each, the first image in the highest bit; the end is filled with zeros."""
    text = "".join("1" if bit else "0" for bit in bits.tolist())
    text += "0" * (-len(text) % 4)
    return "".join(f"{int(text[i : i + 4], 2):x}" for i in range(0, len(text), 4))


def unpacked(digits: str, count: int) -> list[bool]:
    return [bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][:count]
