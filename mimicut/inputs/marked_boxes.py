"""Boxes that people marked in images: YOLO's text files beside the images, or a COCO file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimicut.base.errors import InputError


def boxes_from_folder(names: Sequence[str], folder: str | Path, classes: int | None) -> list[Tensor] | None:
    """The boxes marked in images.

    Args:
        names: The images, by their paths, absolute or relative to `folder`.
        folder: Holds either one JSON file in COCO's form (images, annotations, categories) at its top, or a text file
            of YOLO's form (lines of class, centre, width and height as shares of the image, or of class and the corners
            of a polygon) for each image with objects: beside the image, or in a folder "labels" instead of "images".
        classes: Number of the network's classes, where it is known: with as many categories, COCO's are numbered in
            the order of their ids, otherwise an id is the class number.

    Returns:
        For each image a tensor (N, 5) of class number, x1, y1, x2 and y2, the latter as shares of width and height;
        None if the folder holds no such files.

    Raises:
        InputError: A file cannot be read, or names no image of `names`.
    """
    folder = Path(folder)
    paths = [Path(name) if Path(name).is_absolute() else folder / name for name in names]
    for path in sorted(folder.glob("*.json")):
        data = _json(path)
        if isinstance(data, Mapping) and {"images", "annotations", "categories"} <= set(data):
            return _coco(data, path, paths, classes)
    files = [_beside(path) for path in paths]
    return [_yolo(file) for file in files] if any(files) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"reading the boxes in {path}: it is no JSON ({error})") from error


def _beside(image: Path) -> Path | None:
    parts = list(image.with_suffix(".txt").parts)
    places = [Path(*parts)]
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        places.append(Path(*parts))
    return next((place for place in places if place.exists()), None)


def _yolo(file: Path | None) -> Tensor:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file else (), start=1):
        try:
            label, *places = map(float, line.split())
        except ValueError:
            label, places = -1.0, []
        if not line.strip():
            continue
        polygon = len(places) >= 6 and len(places) % 2 == 0
        if label < 0 or label != int(label) or not (len(places) == 4 or polygon):
            raise InputError(
                f"reading the boxes in {file}, line {number}: found {line[:60]!r}, expected a class number with "
                "centre, width and height as shares of the image, or with the corners of a polygon"
            )
        if polygon:
            across, down = places[::2], places[1::2]
            rows.append([label, min(across), min(down), max(across), max(down)])
        else:
            x, y, width, height = places
            rows.append([label, x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)


def _coco(data: Mapping[str, Any], path: Path, paths: Sequence[Path], classes: int | None) -> list[Tensor]:
    try:
        ids = sorted(int(category["id"]) for category in data["categories"])
        number = {one: i for i, one in enumerate(ids)} if len(ids) == classes else {one: one for one in ids}
        images = {image["id"]: (image["file_name"], image["width"], image["height"]) for image in data["images"]}
        rows: dict[Any, list[list[float]]] = {one: [] for one in images}
        for each in data["annotations"]:
            if each.get("iscrowd"):
                continue
            (x, y, w, h), (_, width, height) = each["bbox"], images[each["image_id"]]
            label = number[each["category_id"]]
            rows[each["image_id"]].append([label, x / width, y / height, (x + w) / width, (y + h) / height])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"reading the boxes in {path}: {type(error).__name__}: {error}; expected COCO's form: images with id, "
            "file_name, width and height; annotations with image_id, category_id and bbox; categories with id"
        ) from error
    by_name = {Path(name).name: one for one, (name, *_) in images.items()}
    unknown = [image.name for image in paths if image.name not in by_name]
    if unknown:
        raise InputError(
            f"reading the boxes in {path}: it names {len(paths) - len(unknown)} of the {len(paths)} images in its "
            f"folder, and not {unknown[0]}; expected all of them, those without objects too"
        )
    return [torch.tensor(rows[by_name[p.name]], dtype=torch.float64).reshape(-1, 5) for p in paths]
