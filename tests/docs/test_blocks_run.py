"""The commands of the README and of the first how-to pages run as they stand, but for what only their reader has.

A network of the package stands in for one whose weights would be fetched, and one step for all of training. The
commands of all other pages are parsed, and their values checked, by `test_documentation`.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import call

import mimicut
from mimicut.demo import few_images, photographs

ROOT = Path(__file__).parents[2]
SMALL = "demo:vgg7"
# What stands on a page -> what is run for it, in this order.
STAND_INS = {r"(?:torchvision|timm):resnet(?:18|50)\b": SMALL, r"(^(?:compress|demo)(?!.*--effort).*)": r"\1 --steps 1"}
PAGES = (
    "README.md", "docs/index.md", "docs/how_to/own_network.md", "docs/how_to/labelled.md", "docs/how_to/onnx_file.md",
)  # fmt: skip


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def stood_in(text: str) -> str:
    for pattern, stand_in in STAND_INS.items():
        text = re.sub(pattern, stand_in, text)
    return text


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the pages presuppose: pictures, also in class folders, code, an ONNX file."""
    place = tmp_path_factory.mktemp("desk")
    for seed, name in enumerate(("photos", "other-photos")):
        photographs.write_few_images(place / name, 20, seed)
    for name, path in enumerate(photographs.write_few_images(place / "val", 12, 2)):
        (place / "val" / f"{name:02}").mkdir()
        path.rename(place / "val" / f"{name:02}" / path.name)
    teacher = mimicut.load_teacher(SMALL)
    mimicut.export(teacher.model, few_images(2, 0), place / "exported", formats=["onnx"])
    (place / "exported" / "model.onnx").rename(place / "model.onnx")
    code = re.search(r"```python\n(# mine\.py\n.*?)```", text_of("docs/how_to/own_network.md"), re.DOTALL)
    (place / "mine.py").write_text(code[1], encoding="utf-8")
    return place


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, desk, tmp_path, capsys, monkeypatch):
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(rf"^ *\$ {mimicut.__name__} (.+)$", text_of(page), re.MULTILINE)
    assert lines
    for line in lines:
        code, last, err = call(capsys, *shlex.split(stood_in(line), comments=True))
        assert last is not None, f"{line}\n{err}"
        assert code == 0, f"{line}\n{err}"
