"""Boxes that people marked: YOLO's and COCO's files."""

import json
import re

import pytest
import torch

from mimicut.base.errors import InputError
from mimicut.inputs.marked_boxes import boxes_from_folder


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64).reshape(-1, 5))


def coco(**changes):
    return {
        "images": [
            {"id": 7, "file_name": "train/a.png", "width": 200, "height": 100},
            {"id": 8, "file_name": "b.png", "width": 50, "height": 50},
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [20, 10, 40, 50]},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        ],
    } | changes


@pytest.mark.parametrize(("classes", "label"), [(2, 1), (91, 3), (None, 3)])
def test_coco_boxes_are_shares_and_its_categories_classes(tmp_path, classes, label):
    (tmp_path / "class_index.json").write_text('{"cat": 0}')  # of another purpose
    (tmp_path / "instances.json").write_text(json.dumps(coco()))
    first, second = boxes_from_folder(["a.png", str(tmp_path / "b.png")], tmp_path, classes)
    close(first, [[label, 0.1, 0.1, 0.3, 0.6]])
    close(second, [])


@pytest.mark.parametrize("place", ["images/a.txt", "labels/a.txt"])
def test_yolo_boxes_lie_beside_the_image_or_in_a_folder_of_labels(tmp_path, place):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / place).write_text("2 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.3 0.2 0.2 0.6\n")
    first, second = boxes_from_folder(["images/a.png", "images/b.png"], tmp_path, None)
    close(first, [[2, 0.4, 0.3, 0.6, 0.7], [0, 0.1, 0.1, 0.3, 0.6]])
    close(second, [])


def test_a_folder_without_boxes_has_none(tmp_path):
    (tmp_path / "notes.json").write_text("[1, 2]")
    assert boxes_from_folder(["cat/a.png"], tmp_path, 2) is None


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.2", "cat 0.5 0.5 0.2 0.2", "0.5 0.5 0.5 0.2 0.2", "0 1 1 1 1 1 1 1"])
def test_a_line_that_is_no_box_is_named(tmp_path, line):
    (tmp_path / "a.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(InputError, match=f"a.txt, line 2: found {re.escape(repr(line))}, expected a class number with"):
        boxes_from_folder(["a.png"], tmp_path, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(coco(annotations=[{"image_id": 9, "category_id": 1, "bbox": [1] * 4}])), "expected COCO's form"),
        (json.dumps(coco(images=[], annotations=[])), "names 0 of the 1 images in its folder, and not a.png"),
        ("{", "it is no JSON"),
    ],
)
def test_a_coco_file_that_cannot_be_used_is_refused(tmp_path, content, said):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=said):
        boxes_from_folder(["a.png"], tmp_path, 2)
