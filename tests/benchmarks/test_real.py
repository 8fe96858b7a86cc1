"""Real pictures: made of stand-ins for the Debian packages here, divided by picture; cells, lines and the page."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.protocol import Cell
from benchmarks.real import image_sets, page, pictures, run, task, teacher_of
from benchmarks.real.__main__ import main
from benchmarks.sweep import read_lines
from mimicut.base.errors import InputError

pytestmark = pytest.mark.long  # minutes: make test-all

COUNTS = {"few": 12, "other": 4, "test": 10}
TEACHER = """
import torch
from mimicut.demo.teacher_networks import ResNet

def build():
    torch.manual_seed(0)
    return ResNet(8, ((8, 2, 2), (12, 2, 2), (16, 2, 2)), 3, 1000)
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(path: Path, size: tuple[int, int], seed: int, alpha: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    pixels = random.randint(0, 256, (4, 5, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    if alpha:
        disc = np.hypot(*np.mgrid[-1 : 1 : 1j * size[1], -1 : 1 : 1j * size[0]]) < 0.9
        image.putalpha(Image.fromarray((disc * 255).astype(np.uint8)))
    image.save(path)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """As the packages lie when they are extracted: a dozen wallpapers, some in several sizes, and thirty stamps."""
    root = tmp_path_factory.mktemp("packages")
    for n in range(6):
        noise(root / f"usr/share/backgrounds/mate/nature/Picture{'ABCDEF'[n]}.png", (400, 300), n)
        kde = root / f"usr/share/wallpapers/Wall{'ABCDEF'[n]}/contents"
        noise(kde / "images/300x280.png", (300, 280), 10 + n)
        noise(kde / "images/600x400.png", (600, 400), 20 + n)
        noise(kde / "screenshot.png", (200, 150), 30 + n)
    Image.new("RGB", (400, 300), "navy").save(root / "usr/share/backgrounds/mate/nature/Flat.png")
    stamps = root / "usr/share/tuxpaint/stamps"
    named = list(json.loads(pictures.LABELS.read_text()))[:4]
    for n, name in enumerate([*named, *(f"things/{'abcdefghijklmnopqrst'[i] * 3}.png" for i in range(20))]):
        noise(stamps / name, (90 + n, 70), 50 + n, alpha=True)
    noise(stamps / "things/aaa_mirror.png", (90, 70), 99, alpha=True)
    noise(stamps / "symbols/alphabets/a.png", (90, 70), 99, alpha=True)
    noise(stamps / "things/tiny.png", (20, 20), 99, alpha=True)
    return root


@pytest.fixture(scope="module")
def prepared(packages, tmp_path_factory) -> pictures.Pictures:
    return pictures.prepare(packages, tmp_path_factory.mktemp("real") / "pictures", COUNTS)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "tiny.py"
    path.write_text(TEACHER)
    return f"{path}:build"


def test_parts_share_no_wallpaper_and_no_stamp(prepared):
    used = {}
    for part, origins in prepared.about["origins"].items():
        for wallpaper, *stamps in origins:
            kde = wallpaper.split("/")[3] if "wallpapers" in wallpaper else Path(wallpaper).stem
            used.setdefault(("wallpaper", pictures.wallpaper_key(kde)), set()).add(part)
            for stamp in stamps:
                used.setdefault(("stamp", pictures.stamp_key(Path(stamp).stem)), set()).add(part)
    parts = set(map(frozenset, used.values()))
    assert parts <= {frozenset(p) for p in (["few"], ["other"], ["test"], ["labelled"], ["test", "labelled"])}
    assert {frozenset(["few"]), frozenset(["other"])} <= parts
    assert len(used) > 25


def test_pictures_are_the_same_every_time(packages, prepared, tmp_path):
    again = pictures.prepare(packages, tmp_path / "pictures", COUNTS)
    assert again.hash == prepared.hash
    assert again.about == prepared.about
    other = pictures.prepare(packages, tmp_path / "more", {**COUNTS, "few": 11})
    assert other.hash != prepared.hash


def test_what_is_in_the_set(prepared):
    counts = {part: len(files) for part, files in prepared.files.items()}
    assert counts == {**COUNTS, "labelled": 4 * pictures.BACKGROUNDS}
    named = json.loads(pictures.LABELS.read_text())
    for (_, stamp), label in zip(prepared.about["origins"]["labelled"], prepared.labels, strict=True):
        assert named[stamp][0] == label
    with Image.open(prepared.files["test"][0]) as image:
        assert image.size == (pictures.SIDE, pictures.SIDE)
    everything = json.dumps(prepared.about["origins"])
    for absent in ("mirror", "symbols", "tiny", "screenshot", "300x280"):
        assert absent not in everything
    # Where a wallpaper shows nothing, a stamp does.
    flat = [o for origins in prepared.about["origins"].values() for o in origins if "Flat" in o[0]]
    assert flat
    assert all(len(origins) > 1 for origins in flat)
    for part in ("few", "test"):
        assert len({file.read_bytes() for file in prepared.files[part]}) == COUNTS[part]


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        ("Elephants_3840x2160", "elephants"),
        ("vnc-d", "vnc"),
        ("MATE-Stripes-Dark", "stripes"),
        ("Stripes", "stripes"),
        ("Ubuntu-Mate-Cold-no-logo", "ubuntu-mate"),
        ("Wood", "wood"),
    ],
)
def test_variants_of_one_wallpaper_have_one_key(stem, key):
    assert pictures.wallpaper_key(stem) == key


def test_stamps_of_one_thing_have_one_key(packages):
    keys = {stem: pictures.stamp_key(stem) for stem in ("cep-1", "cep", "guitar_electric", "Strawberry2", "747")}
    assert keys == {
        "cep-1": "cep", "cep": "cep", "guitar_electric": "guitar", "Strawberry2": "strawberry", "747": "747",
    }  # fmt: skip
    names = [name for files in pictures.stamps_in(packages).values() for name, _ in files]
    assert len(names) == 24  # neither the mirror image, nor the letter, nor the tiny one


def test_the_labels_are_classes_of_imagenet():
    from timm.data import ImageNetInfo

    info, named = ImageNetInfo(), json.loads(pictures.LABELS.read_text())
    assert len({number for number, _ in named.values()}) >= 60
    assert all(info.index_to_description(number) == words for number, words in named.values())


def test_what_is_missing_is_said_with_what_to_do(tmp_path, monkeypatch, prepared):
    with pytest.raises(InputError, match="found 0 wallpapers and 0 stamps"):
        pictures.prepare(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match=r"python -m benchmarks\.real fetch"):
        pictures.opened(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"apt-get and dpkg-deb not found.*--from FOLDER"):
        pictures.fetch(tmp_path / "to")
    short = tmp_path / "short"
    shutil.copytree(prepared.folder, short)
    (short / "test" / "00003.jpg").unlink()
    with pytest.raises(InputError, match="test holds 9 pictures, expected 10"):
        pictures.opened(short)
    changed = tmp_path / "changed"
    shutil.copytree(prepared.folder, changed)
    shutil.copy(changed / "few" / "00001.jpg", changed / "few" / "00002.jpg")
    assert pictures.opened(changed).hash != prepared.hash
    without = tmp_path / "without"
    shutil.copytree(prepared.folder, without, ignore=shutil.ignore_patterns("other"))
    assert pictures.opened(without).hash == prepared.hash


def test_image_sets(prepared, teacher_file):
    teacher = teacher_of(teacher_file, 32)
    few, test = image_sets(teacher, 5, 1, 7, prepared.folder)
    assert (len(few), len(test)) == (5, 7)
    assert few.batch().shape == (5, 3, 32, 32)
    again, _ = image_sets(teacher, 5, 1, 7, prepared.folder)
    other, _ = image_sets(teacher, 5, 2, 7, prepared.folder)
    assert few.hashes == again.hashes != other.hashes
    assert not few.shared_with(test)
    with pytest.raises(InputError, match="there are 12"):
        image_sets(teacher, 13, 1, 7, prepared.folder)


def test_cells_of_a_stopped_sweep_are_balanced():
    cells = run.cells(steps=(100, 400), seeds=(2021, 2022), images=(50, 200), methods=run.ALL)
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert [cell.method for cell in cells[: len(run.ALL)]] == list(run.ALL)
    first = {(c.teacher, c.cut["keep"]) for c in cells if c.steps == 100 and c.seed == 2021 and c.images == 50}
    assert len(first) == 6
    assert sum(c.method == "none" for c in cells) * 2 == sum(c.method == "mir" for c in cells)
    tried = run.cells(grid=True)
    assert {cell.key for cell in run.cells()} < {cell.key for cell in tried}
    assert all(cell.options == {} for cell in tried if cell.method == run.OWN)


@pytest.fixture(scope="module")
def lines(prepared, teacher_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lines") / "real.jsonl"
    with pytest.MonkeyPatch.context() as patch:  # fewer views show the same
        patch.setattr("mimicut.recovery.view_budget.MACS", 1e8)
        assert main(arguments(prepared, teacher_file, out)) == 0
    return out


def arguments(prepared, teacher, out):
    given = ["run", "--pictures", str(prepared.folder.parent), "--teacher", teacher, "--out", str(out), "--size", "32"]
    return [*given, *"--keep 0.7 0.6 --images 6 --steps 2 --seeds 2021 --threads 1 --methods".split(), *run.ALL]


def test_every_method_runs_and_is_not_run_again(lines, prepared, teacher_file, capsys, monkeypatch):
    found = read_lines(lines)
    assert [line.get("error") for line in found] == [None] * len(found)
    assert len(found) == 2 * len(run.ALL)
    for line in found:
        figures = line["figures"]
        assert line["pictures"] == prepared.hash
        agree = task.unpacked(figures["bits"]["agree"], 10)
        assert figures["agreement"] == pytest.approx(sum(agree) / 10)
        right = task.unpacked(figures["bits"]["right"], figures["labelled_images"])
        assert figures["top1_labelled"] == pytest.approx(sum(right) / len(right), abs=1e-6)
        assert figures["macs"] <= line["cell"]["cut"]["keep"]
        assert line["seconds"] > 0
        assert line["platform"]["threads"] == 1
    by_method = {line["cell"]["method"]: line["figures"] for line in found if line["cell"]["cut"]["keep"] == 0.7}
    assert by_method["mimicut"]["feature_error"] < by_method["none"]["feature_error"]
    monkeypatch.setattr(run, "run_cell", lambda *a, **k: pytest.fail("a cell that has its line was run again"))
    assert main(arguments(prepared, teacher_file, lines)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"cells": len(found), "done": 0, "failed": 0}


def test_cells_of_the_same_images_share_what_the_images_say(prepared, teacher_file, monkeypatch):
    calls, real = [], run.channel_evidence
    monkeypatch.setattr(run, "channel_evidence", lambda *a, **k: calls.append(1) or real(*a, **k))
    where = run.Where(prepared.folder)
    cell = Cell("real 32", teacher_file, {"keep": 0.7, "scheme": "mid"}, 7, 0, 5, run.OWN)
    run._evidence.cache_clear()
    lines = [run.run_cell(each, where) for each in (cell, replace(cell, cut={"keep": 0.6, "scheme": "mid"}))]
    assert len(calls) == 1
    assert [line.get("error") for line in lines] == [None, None]
    assert all(line["seconds"] > 0 for line in lines)


def test_lines_of_other_pictures_are_not_mixed(lines, packages, prepared, teacher_file, tmp_path, capsys):
    other = pictures.prepare(packages, tmp_path / "pictures", {**COUNTS, "few": 11})
    assert main(arguments(other, teacher_file, lines)) == 2
    assert "has cells of other pictures" in capsys.readouterr().err
    nowhere = replace(prepared, folder=tmp_path / "nothing" / "pictures")
    assert main(arguments(nowhere, teacher_file, lines)) == 2
    assert "python -m benchmarks.real fetch" in capsys.readouterr().err


def test_the_page(lines, tmp_path, capsys):
    assert main(["page", "--lines", str(lines), "--to", str(tmp_path / "docs" / "real.md")]) == 0
    text = (tmp_path / "docs" / "real.md").read_text()
    for part in ("Agreement with the teacher", "PRACTISE", "ours, MiR's cut", "Missing", "torch", "Seconds and memory"):
        assert part in text
    assert Image.open(tmp_path / "docs" / "figures" / "real.png").size[0] > 400
    assert f"0 of the {len(run.cells())} cells at 160 pixels have been run and {2 * len(run.ALL)} others" in text
    assert main(["page", "--lines", str(tmp_path / "none.jsonl"), "--to", str(tmp_path / "x.md")]) == 2
    assert not (tmp_path / "x.md").exists()


def made(method, seed, agree, sure=None, options=None, steps=100):
    """A line with these bits, one an image."""
    bits = {"agree": task.packed(torch.tensor(agree)), "sure": task.packed(torch.tensor(sure or [1] * len(agree)))}
    cell = Cell("real 160", "demo:efficientnet_lite0", {"keep": 0.7, "scheme": "mid"}, 50, steps, seed, method)
    figures = {"agreement": sum(agree) / len(agree), "test_images": len(agree), "bits": bits}
    return {"cell": asdict(replace(cell, options=options or {})), "figures": figures}


def test_differences_are_paired_by_picture():
    alike = [1, 0] * 20
    ours = {s: made("mimicut", s, [1] * 30 + alike[30:]) for s in (1, 2)}
    theirs = {s: made("mir", s, alike, sure=[1] * 30 + [0] * 10) for s in (1, 2, 3)}
    points, low, high, seeds = page.difference(ours, theirs)
    assert points == pytest.approx(100 * 15 / 40)
    assert 20 < low < points < high < 55
    assert seeds == 2
    same = page.difference(theirs, theirs)
    assert same[:3] == (0, 0, 0)
    mostly = made("mimicut", 1, [1] * 30 + alike[30:], sure=[1] * 30 + [0] * 10)
    assert page.difference({1: mostly}, theirs, sure=True)[0] == pytest.approx(100 * 15 / 30)
    assert page.difference(ours, {9: theirs[1]}) is None


def test_the_best_options_stand_and_what_does_not_train_stands_at_all_steps():
    tried = [made("distill", 1, [1, 0, 0, 0], options={"lr": 0.1}), made("distill", 1, [1, 1, 0, 0])]
    still = made("none", 1, [0, 0, 0, 1], steps=0)
    table = page.by_condition([*tried, still, made("mir", 1, [1, 1, 1, 1], steps=400)])
    assert [where[4] for where in table] == [100, 400]
    assert table["efficientnet_lite0", 160, 0.7, 50, 100]["distill"][1] == tried[1]
    assert all(methods["none"][1] == still for methods in table.values())


def test_calibration_error_by_hand():
    confidence, agree = torch.tensor([0.95, 0.97, 0.96, 0.51]), torch.tensor([True, False, False, True])
    expected = 3 / 4 * abs(0.96 - 1 / 3) + 1 / 4 * abs(0.51 - 1.0)
    assert task.calibration_error(confidence, agree) == pytest.approx(expected, abs=1e-6)
    assert task.calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([True, True])) == 0


@pytest.mark.parametrize("count", [1, 4, 7, 12])
def test_bits_come_back(count):
    bits = torch.arange(count) % 3 == 0
    assert task.unpacked(task.packed(bits), count) == bits.tolist()
