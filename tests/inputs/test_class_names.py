"""Names of classes: from a file or a list, checked against the network, in the report and after `verify`."""

import json

import nets
import pytest
import torch
from command_line import call

import mimicut as us
from mimicut.base.errors import InputError
from mimicut.inputs.class_names import check_class_names, read_class_names
from mimicut.results.store import read
from mimicut.workflow.verify import verify_folder

NAMES = ("cat", "dog", "blue whale")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cat\ndog\nblue whale\n\n", "a.txt"),
        ("\ufeffcat\r\ndog\r\nblue whale", "a.names"),
        (json.dumps(NAMES), "a.json"),
        (json.dumps({"2": "blue whale", "0": "cat", "1": "dog"}), "a.json"),
        (json.dumps({"model_type": "vit", "id2label": {str(i): n for i, n in enumerate(NAMES)}}), "config.json"),
        (json.dumps({"names": NAMES}), "a.json"),
    ],
)
def test_files_of_names_are_read(text, name, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / name) == NAMES


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("cat\n\ndog", "a.txt", "no name for class 1"),
        ("", "a.txt", "no name for class 0"),
        ("[1, 2]", "a.json", "found list, expected a name a line"),
        ('{"1": "cat", "2": "dog"}', "a.json", "not 0 to 1"),
        ("{", "a.json", "it is no JSON"),
        ("3", "a.json", "found int"),
        ("[" * 100_000, "a.json", "it is no JSON"),
    ],
)
def test_what_are_no_names_is_refused(text, name, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_class_names(tmp_path / name)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_class_names(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="codec"):
        read_class_names(tmp_path / "a.txt")


def test_the_number_must_be_that_of_the_classes():
    check_class_names(NAMES, [5, 3])
    with pytest.raises(InputError, match="found 3 names, but the network has 5 or 7 classes"):
        check_class_names(NAMES, [5, 7, 5])
    with pytest.raises(InputError, match="returns no classes"):
        check_class_names(NAMES, [])


def test_they_stand_in_the_report_and_stay_there(place, capsys):
    (place / "names.txt").write_text("ant\nbee\ncow\ndoe\n")
    options = ["--keep", "0.5", "--steps", "0", "--extra", "none"]
    own = ("compress", "net.py:build", "photos", *options)
    code, _, err = call(capsys, *own, "--out", "no", "--class-names", "names.json")
    assert code == 2
    assert "reading the class names" in err
    (place / "two.txt").write_text("ant\nbee\n")
    code, _, err = call(capsys, *own, "--out", "no", "--class-names", "two.txt")
    assert code == 2
    assert "found 2 names, but the network has 4 classes" in err
    assert not (place / "no").exists()

    code, _, err = call(capsys, *own, "--out", "small", "--class-names", "names.txt")
    assert code == 0, err
    names = {"0": "ant", "1": "bee", "2": "cow", "3": "doe"}
    assert read(place / "small")[1].class_names == names
    assert 'class_names = "names.txt"' in (place / "small" / "run.toml").read_text()
    (place / "names.txt").unlink()
    assert verify_folder(place / "small", place / "photos", teacher="net.py:build").class_names == names
    again = us.load_teacher(str(place / "small"), build_teacher="net.py:build")
    assert again.classes == tuple(names.values())


def test_a_module_without_names_has_none_in_its_report():
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    report = us.compress(nets.Chain(), images, keep=0.6, config=us.MimicConfig(steps=0), extra="none").report
    assert report.class_names == {}
