"""Teachers, few images and test images: the embedded photographs, ImageNet folders, CIFAR.

Labels of the few images are read here and handed on beside them, never inside them.
"""

import fcntl
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimicut import demo
from mimicut.base.errors import InputError
from mimicut.inputs.image_set import ImageSet, read_images
from mimicut.inputs.labels import labels_from_folders
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import Teacher
from mimicut.results.teachers import load_teacher

TEST_BATCH = 500


@dataclass(frozen=True, eq=False)
class Task:
    """few(count, seed): unlabelled images and, apart, their labels. test(): batches (images, labels), the same ones in
    the same order every time. small: the test images and the teacher's features of them may be held in memory."""

    teacher: Teacher
    few: Callable[[int, int], tuple[ImageSet, Tensor]]
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    small: bool = False


@dataclass(frozen=True)
class Place:
    """What differs from machine to machine and is no part of a cell. data: the data set's folder; weights: a file of
    the teacher's, instead of its library's; pretrained: False for random ones (to try things out). cache: folder that
    keeps the decoded test images of folders, so that not every cell decodes them."""

    data: str | None = None
    weights: str | None = None
    pretrained: bool = True
    device: str = "cpu"
    threads: int = 1
    cache: str | None = None

    def weights_said(self) -> str | None:
        """What tells these weights from others in the lines; None for the library's own."""
        if self.weights is None:
            return None if self.pretrained else "random"
        return _hash(self.weights)


@cache
def _hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@lru_cache(maxsize=4)
def open_task(name: str, spec: str, place: Place) -> Task:
    """Raises: InputError for a task or data that is not there."""
    if name not in TASKS:
        raise InputError(f"opening the task {name!r}: expected one of {', '.join(TASKS)}")
    if spec.startswith("demo:") and place.weights_said() is not None:
        raise InputError(
            f"opening {spec}: it has its own weights; expected no --weights and no --no-pretrained with it"
        )
    teacher = load_teacher(spec, weights=place.weights, pretrained=place.pretrained)
    teacher.model.to(place.device)
    return TASKS[name](teacher, place)


def _photographs(teacher: Teacher, place: Place) -> Task:
    @lru_cache(maxsize=1)
    def test_set() -> tuple[Tensor, Tensor]:
        return demo.test_set()

    def few(count: int, seed: int) -> tuple[ImageSet, Tensor]:
        x, y = demo.patches("few", count, seed)
        return read_images(x, teacher.preprocessing), y

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*(part.split(TEST_BATCH) for part in test_set()), strict=True)

    return Task(teacher, few, test, small=True)


def _imagenet(teacher: Teacher, place: Place) -> Task:
    """DATA/train/CLASS/*.JPEG to draw the few from, DATA/val/CLASS/*.JPEG to test on."""
    train, val = (_folder(place, part) for part in ("train", "val"))
    pools = {part: sorted(p for p in part.rglob("*") if p.suffix.lower() in _SUFFIXES) for part in (train, val)}
    empty = next((part for part, found in pools.items() if not found), None)
    if empty:
        raise InputError(f"opening ImageNet: there is no image in {empty}; expected {empty}/CLASS/*.JPEG")
    classes = teacher.model(torch.zeros(1, *teacher.preprocessing.input_size, device=place.device)).shape[1]

    def chosen(root: Path, paths: list[Path], prepared: Preprocessing) -> tuple[ImageSet, Tensor]:
        names = [str(p.relative_to(root)) for p in paths]
        images = read_images([str(p) for p in paths], prepared)
        if len(images) != len(paths):
            raise InputError(f"reading {root}: {images.skipped[0][0]} cannot be read ({images.skipped[0][1]})")
        return images, torch.tensor(labels_from_folders(names, root, classes))

    def few(count: int, seed: int) -> tuple[ImageSet, Tensor]:
        return chosen(train, draw(pools[train], count, seed, classes), teacher.preprocessing)

    def read(prepared: Preprocessing) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(pools[val]), TEST_BATCH):
            paths = pools[val][start : start + TEST_BATCH]
            try:
                images, labels = chosen(val, paths, prepared)
            except InputError:
                images, labels = chosen(val, [path for path in paths if _opens(path)], prepared)
            yield images.batch(), labels

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        if place.cache is None:
            yield from read(teacher.preprocessing)
            return
        files = [str(val.resolve()), *((str(p.relative_to(val)), p.stat().st_size) for p in pools[val])]
        pixels, labels = _stored(Path(place.cache), files, teacher.preprocessing, read)
        for start in range(0, len(labels), TEST_BATCH):
            part = slice(start, start + TEST_BATCH)
            yield teacher.preprocessing.normalise(torch.from_numpy(pixels[part].copy())), labels[part]

    return Task(teacher, few, test)


def _stored(
    folder: Path, files: list, prepared: Preprocessing, read: Callable[[Preprocessing], Iterator]
) -> tuple[np.ndarray, Tensor]:
    """The test images as their teacher takes them but for the normalisation, uint8 (n, C, H, W), from a file in
    `folder`, and their labels; written once, whole or not at all. files: what they are made of, names and sizes."""
    key = hashlib.sha256(json.dumps([files, prepared.to_json()]).encode()).hexdigest()[:16]
    paths = [folder / f"{key}.{part}.npy" for part in ("images", "labels")]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several cells that start together one decodes
        if not all(path.exists() for path in paths):
            plain = replace(prepared, mean=(0.0,) * len(prepared.mean), std=(1.0,) * len(prepared.std))
            partial = [path.with_suffix(".partial") for path in paths]
            pixels = np.lib.format.open_memmap(partial[0], "w+", np.uint8, (len(files) - 1, *prepared.input_size))
            noted: list[int] = []
            for images, theirs in read(plain):
                pixels[len(noted) : len(noted) + len(theirs)] = images.mul(255).round().to(torch.uint8).numpy()
                noted += theirs.tolist()
            pixels.flush()
            with partial[1].open("wb") as file:
                np.save(file, np.array(noted))
            for path, done in zip(paths, partial, strict=True):
                os.replace(done, path)
    labels = torch.from_numpy(np.load(paths[1]))
    return np.load(paths[0], mmap_mode="r")[: len(labels)], labels  # behind them is room for what could not be read


@cache
def _opens(path: Path) -> bool:
    """Whether a test image is there at all; one that is not is reported once and left out."""
    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        print(f"left out of the test images: {path}: {error}", file=sys.stderr)
        return False
    return True


def draw(paths: list[Path], count: int, seed: int, classes: int) -> list[Path]:
    """`count` of the paths: as many of each class where that many can be had, else random ones of random classes.

    Source: MiR, arXiv 2201.02620: under 1,000 images of ImageNet at random, from 1,000 on N / 1,000 of each class.
    Raises: InputError when there are too few.
    """
    if count > len(paths):
        raise InputError(f"drawing {count} images: there are {len(paths)}")
    generator = random.Random(seed)
    if count < classes:
        return generator.sample(paths, count)
    by_class: dict[str, list[Path]] = {}
    for path in paths:
        by_class.setdefault(path.parent.name, []).append(path)
    if count % classes:
        raise InputError(f"drawing {count} images: expected fewer than the {classes} classes, or a multiple of them")
    each = count // classes
    short = next((name for name, found in by_class.items() if len(found) < each), None)
    if short is not None or len(by_class) != classes:
        what = f"{len(by_class)} class folders" if short is None else f"{len(by_class[short])} images of {short}"
        raise InputError(f"drawing {each} images of each of {classes} classes: found {what}")
    return [path for found in by_class.values() for path in generator.sample(found, each)]


def _cifar(name: str) -> Callable[[Teacher, Place], Task]:
    def opened(teacher: Teacher, place: Place) -> Task:
        """DATA as torchvision.datasets reads it (cifar-10-batches-py or cifar-100-python in it); no download."""
        import torchvision

        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        try:
            parts = {train: kind(_data(place), train=train, download=False) for train in (True, False)}
        except RuntimeError as error:
            raise InputError(f"opening {name}: {error} Give its folder with --data") from error

        def chosen(train: bool, indices: list[int]) -> tuple[ImageSet, Tensor]:
            images = torch.from_numpy(parts[train].data[indices]).permute(0, 3, 1, 2).contiguous()
            return read_images(images, teacher.preprocessing), torch.tensor(parts[train].targets)[indices]

        def few(count: int, seed: int) -> tuple[ImageSet, Tensor]:
            return chosen(True, random.Random(seed).sample(range(len(parts[True].data)), count))

        def test() -> Iterator[tuple[Tensor, Tensor]]:
            for where in torch.arange(len(parts[False].data)).split(TEST_BATCH):
                images, labels = chosen(False, where.tolist())
                yield images.batch(), labels

        return Task(teacher, few, test)

    return opened


def _data(place: Place) -> str:
    if place.data is None:
        raise InputError("opening the data set: there is no folder; give one with --data DIR")
    return place.data


def _folder(place: Place, part: str) -> Path:
    folder = Path(_data(place), part)
    if not folder.is_dir():
        raise InputError(f"opening ImageNet: there is no folder {folder}; expected DATA/train/CLASS and DATA/val/CLASS")
    return folder


_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
TASKS: dict[str, Callable[[Teacher, Place], Task]] = {
    "photographs": _photographs,
    "imagenet": _imagenet,
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
}
