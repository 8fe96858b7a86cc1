"""Every command, and then the Python, on every page runs as it stands, but for what only its reader has.

Small networks stand in for those whose weights would be fetched, and one step for all of training; ELSEWHERE says which
commands need what no test has. All of them are parsed, and their values checked, by `test_documentation`. Pages that
take minutes each are run by `make pages`.
"""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from command_line import call

import mimicut
from mimicut.demo import few_images, photographs
from mimicut.recovery.config import PRESETS

ROOT = Path(__file__).parents[2]
SMALL = "demo:vgg7"
# What stands on a page -> what is run for it, in this order.
STAND_INS = {
    r'"torchvision:resnet50", weights="my.safetensors"': f'"{SMALL}"',
    r"(?:torchvision|timm):resnet18 (.*)--num-classes 0": r"demo:embedder_tiny \1",
    r"torchvision:lraspp_mobilenet_v3_large (.*)--input-size \S+": r"demo:segmenter_tiny \1",
    r"(?:torchvision|timm):resnet18\b(?! pruned)": SMALL,
    r"(?:torchvision|timm):resnet50\b": "demo:resnet14",
    r"(torchvision:retinanet_\S+) (.*)--input-size \S+": r"\1 --no-pretrained \2--input-size 3x64x64",
    r"(torchvision:resnet18) (pruned.*)": r"\1 --no-pretrained --input-size 3x32x32 \2",
    r"latency-ms(\W+)\d+": r"latency\g<1>0.95",  # a share, as the machine may be any
    r"--threads 4": "--threads 1",
    r"--device cuda": "--device cpu",
    r"(^(?:compress|demo|recover)(?!.*(?:--effort|--config)).*)": r"\1 --steps 1",
    r"--effort quick": "--steps 1",
    r'effort = "quick"': "steps = 1",
    r"min-agreement = 0\.9": "min-agreement = 0.1",  # of four held-out images
    r"\bms=\d+": "share=0.95",
}
# Commands that need what is not here, each with what that is.
ELSEWHERE = {
    "yolo.py:build": "Ultralytics, whose licence is another, and its weights",
    "segformer.safetensors": "weights",
    "hf:my-vit/": "weights",
    "push small/": "an account of the hub",
    "executorch,coreml": "their converters",
    "--to litert": "its converter",
    "ray://": "a cluster",
    "strict/": "a result whose threshold is missed",
    "from ultralytics": "Ultralytics",
    "from_pretrained(": "an account of the hub",
}
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if re.search(rf"^ *\$ {mimicut.__name__} ", path.read_text(encoding="utf-8"), re.MULTILINE)
    and path.name not in ("LOG.md", "first_student.md")  # history, and a tutorial, which is run by itself
]

SLOW = {  # minutes each: `make pages`
    f"docs/how_to/{name}.md" for name in ("detector", "devices", "int8", "many_jobs", "milliseconds")
} | {"docs/reference/teachers.md"}  # fmt: skip


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(page: str) -> list[str]:
    return re.findall(rf"^ *\$ {mimicut.__name__} (.+)$", text_of(page), re.MULTILINE)


def python_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def stood_in(text: str) -> str:
    for pattern, stand_in in STAND_INS.items():
        text = re.sub(pattern, stand_in, text)
    return text


def code_of(page: str, first: str) -> str:
    """The block of code that begins so."""
    found = re.search(rf"```\w+\n({re.escape(first)}\n.*?)```", text_of(f"docs/how_to/{page}"), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the pages presuppose: pictures, also in class folders, code, an ONNX file, a list of jobs."""
    place = tmp_path_factory.mktemp("desk")
    for seed, name in enumerate(("photos", "other-photos", "gate")):
        photographs.write_few_images(place / name, 20, seed)
    for name, path in enumerate(photographs.write_few_images(place / "val", 12, 2)):
        (place / "val" / f"{name:02}").mkdir()
        path.rename(place / "val" / f"{name:02}" / path.name)
    teacher = mimicut.load_teacher(SMALL)
    mimicut.export(teacher.model, few_images(2, 0), place / "exported", formats=["onnx"])
    (place / "exported" / "model.onnx").rename(place / "model.onnx")
    (place / "mine.py").write_text(code_of("own_network.md", "# mine.py"), encoding="utf-8")
    (place / "pruned.py").write_text(code_of("pruned_elsewhere.md", "# pruned.py"), encoding="utf-8")
    (place / "jobs.toml").write_text(stood_in(code_of("many_jobs.md", "# jobs.toml")), encoding="utf-8")
    (place / "run.toml").write_text(
        f'teacher = "{SMALL}"\nimages = "photos"\nkeep = 0.5\nsteps = 1\nout = "small"\n', encoding="utf-8"
    )
    return place


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.pages if p in SLOW else pytest.mark.long) for p in PAGES]
)
def test_the_commands_of_a_page_run(page, desk, tmp_path, capsys, monkeypatch):
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # What a page shows does not depend on how many images the demo is judged by, how many views are seen, or for how
    # long something is timed.
    monkeypatch.setattr("mimicut.demo.test_set", lambda: photographs.patches("test", 500, photographs.TEST_SEED))
    monkeypatch.setattr("mimicut.recovery.view_budget.MACS", 3e8)
    monkeypatch.setattr("mimicut.planning.survey.MEASURED_SECONDS", 0.1)
    monkeypatch.setattr("mimicut.proof.int8_table._SECONDS", 0.0)
    for line in commands_of(page):
        if any(needed in line for needed in ELSEWHERE):
            continue
        arguments = shlex.split(stood_in(line), comments=True)
        if "small/run.toml" in arguments:  # of a result that another page makes
            (tmp_path / "small").mkdir()
            shutil.copy(tmp_path / "run.toml", tmp_path / "small")
        if "--out" in arguments and (tmp_path / arguments[arguments.index("--out") + 1]).exists():
            arguments.append("--force")  # one of two ways to the same folder
        code, last, err = call(capsys, *arguments)
        assert last is not None, f"{line}\n{err}"
        assert code == 0 or (code == 1 and re.search("--max-error|--min-agreement|sweep", line)), f"{line}\n{err}"
    monkeypatch.setitem(PRESETS, "default", replace(PRESETS["default"], steps=1))
    names = given(page)
    for block in python_of(page):
        if not any(needed in block for needed in ELSEWHERE):
            for folder in re.findall(r'folder="([^"]+)"', block):  # a command may have made the same one
                shutil.rmtree(folder, ignore_errors=True)
            exec(compile(stood_in(block), page, "exec"), names)


def given(page: str) -> dict[str, Any]:
    """What a page's Python calls by a name that it does not define."""
    if page.endswith("detector.md"):
        return {"image_chw": torch.rand(3, 64, 64)}
    if page.endswith("pruned_elsewhere.md"):
        names: dict[str, Any] = {"__name__": "pruned"}
        exec(code_of("pruned_elsewhere.md", "# pruned.py"), names)
        model = torchvision.models.resnet18()
        return {"model": model, "pruned": names["build"](), "images": torch.rand(12, 3, 32, 32)}
    images = few_images(12, 0)
    return {"model": mimicut.load_teacher(SMALL).model, "images": images, "example": images[:2]}


def test_what_is_not_run_stands_on_a_page():
    lines = [line for page in PAGES for line in (*commands_of(page), *python_of(page))]
    assert [needed for needed in ELSEWHERE if not any(needed in line for line in lines)] == []
