"""The harness: cells done are skipped, nothing is lost when it is stopped, Ray gives what one process gives."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import sweep
from benchmarks.__main__ import main
from benchmarks.cell import run_cell
from benchmarks.methods import METHODS
from benchmarks.pages import page, tables
from benchmarks.protocol import PROTOCOLS, SEEDS, TABLED, TUNING_SEEDS, Cell, chosen
from benchmarks.tasks import Place, draw, open_task
from mimicut.base.errors import InputError

pytestmark = pytest.mark.long  # minutes: make test-all

ROOT = Path(__file__).parents[2]
CELL = Cell("photographs", "demo:vgg7", {"keep_width": 0.5}, 20, 3, 2021, "mir")
TIMES = {"seconds", "seconds_cell", "peak_memory_mib"}


def without_times(line):
    return {k: v for k, v in line.items() if k not in TIMES}


def line(cell, top1=80.0, **more):
    figures = {"top1_teacher": 90.0, "top1": top1, "agreement": 0.8, "feature_error": 0.1, "macs": 0.5, "params": 0.5}
    rest = {"seconds": 1.0, "seconds_cell": 2.0, "peak_memory_mib": 3.0}
    kinds = {"versions": {"torch": "2", "python": "3"}, "platform": {"processor": "x", "threads": 1}}
    return {"cell": vars(cell), "figures": figures, **rest, **kinds, **more}


def steps(count, **changes):
    return [replace(CELL, seed=seed, **changes) for seed in SEEDS[:count]]


def test_two_sequential_runs_and_ray_give_the_same_figures(tmp_path):
    cells = [CELL, replace(CELL, method="fine_tune", options={"lr": 0.01, "head": "trained"})]
    run = partial(run_cell, place=Place())
    files = [tmp_path / f"{name}.jsonl" for name in ("first", "second", "ray")]
    for path, execute in zip(files, (sweep.in_turn(run), sweep.in_turn(run), sweep.on_ray(run, jobs=2)), strict=True):
        assert sweep.sweep(cells, path, execute) == {"done": 2, "failed": 0}
    first, second, ray = ({Cell(**x["cell"]).key: without_times(x) for x in sweep.read_lines(f)} for f in files)
    assert first == second
    assert first == ray
    one = first[CELL.key]
    assert 0 < one["figures"]["top1"] < one["figures"]["top1_teacher"]
    assert one["figures"]["test_images"] == 10_000
    assert set(one) == {"cell", "figures", "versions", "platform"}
    json.dumps(one)


def test_a_worker_that_is_killed_costs_only_its_cell_which_is_run_again(tmp_path):
    victim = SEEDS[1]

    def run(cell):
        mark = Path(tmp_path, f"{cell.seed}.started")
        again = mark.exists()
        mark.touch()
        if cell.seed == victim and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"cell": vars(cell), "figures": {"top1": float(cell.seed)}, "seconds": 0.0, "again": again}

    path = tmp_path / "lines.jsonl"
    assert sweep.sweep(steps(4), path, sweep.on_ray(run, jobs=2)) == {"done": 4, "failed": 0}
    again = {x["cell"]["seed"]: x["again"] for x in sweep.read_lines(path)}
    assert again == {seed: seed == victim for seed in SEEDS[:4]}


def test_a_failed_cell_is_recorded_and_the_sweep_goes_on(tmp_path):
    bad = replace(CELL, method="fine_tune", options={"lr": 1e30, "head": "trained"})
    path = tmp_path / "lines.jsonl"
    done = sweep.sweep([bad, replace(CELL, method="none")], path, sweep.in_turn(partial(run_cell, place=Place())))
    assert done == {"done": 1, "failed": 1}
    failed, good = sweep.read_lines(path)
    assert "FloatingPointError" in failed["error"]
    assert "lr 1e+30" in failed["error"]
    assert "figures" not in failed
    assert good["figures"]["top1"] > 0
    cells = [bad, replace(CELL, method="none")]
    assert sweep.missing(cells, path) == []
    assert sweep.missing(cells, path, retry_failed=True) == [bad]


def test_cells_that_are_done_are_skipped_and_a_torn_line_is_run_again(tmp_path, capsys):
    path, seen = tmp_path / "lines.jsonl", []
    cells = steps(4)
    whole = [json.dumps(line(c)) for c in cells]
    path.write_text(whole[0] + "\n" + whole[1] + "\n" + whole[2][:40])
    assert sweep.missing(cells, path) == cells[2:]
    sweep.sweep(cells[2:], path, sweep.in_turn(lambda c: (seen.append(c), line(c))[1]))
    assert seen == cells[2:]
    assert path.read_text().splitlines() == whole
    assert "2/2" in capsys.readouterr().err


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "lines.jsonl"
    first, second = steps(2)
    path.write_text(json.dumps(line(first)))
    sweep.sweep([second], path, sweep.in_turn(line))
    assert sweep.missing([first, second], path) == []
    assert len(path.read_text().splitlines()) == 2


def test_ray_refuses_a_cell_that_no_machine_holds(tmp_path):
    with pytest.raises(ValueError, match="asks for 1 cores and 3 of a GPU"):
        sweep.sweep(steps(1), tmp_path / "lines.jsonl", sweep.on_ray(line, gpus=3, jobs=1))


def test_a_cell_says_what_weights_it_had(tmp_path):
    known = run_cell(replace(CELL, method="none"), Place())
    assert "weights" not in known
    bad = run_cell(replace(CELL, task="imagenet", teacher="torchvision:resnet18"), Place(pretrained=False))
    assert bad["weights"] == "random"


def test_practise_says_that_a_plain_network_has_no_blocks():
    assert "no residual block" in run_cell(replace(CELL, method="practise"), Place())["error"]


def test_one_sweep_at_a_time(tmp_path):
    path = tmp_path / "lines.jsonl"
    with sweep.results_file(path), pytest.raises(BlockingIOError), sweep.results_file(path):
        pass


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path):
    path = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "benchmarks", "sweep", "embedded", "--out", str(path), "--steps", "2",
               "--only", "teacher=demo:vgg7", "--only", "method=none,batch_norm", "--only", "images=50",
               "--only", "keep_width=0.5"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not sweep.read_lines(path) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    before = sweep.read_lines(path)
    assert before
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["done"] == said["cells"] - len(before)
    assert sweep.read_lines(path)[: len(before)] == before


def test_the_table_is_paired_and_complete():
    cells = PROTOCOLS["embedded"].cells({})
    methods_of = {}
    for cell in cells:
        methods_of.setdefault((cell.teacher, cell.cut["keep_width"], cell.images, cell.seed), set()).add(cell.method)
    assert {k[3] for k in methods_of} == set(SEEDS)
    for (teacher, _, images, _), methods in methods_of.items():
        assert methods == set(TABLED) - ({"practise"} if teacher == "demo:vgg7" else set())
        assert images in (50, 200)
    assert {k[1] for k in methods_of} >= {0.5, 0.3}
    assert len({cell.key for cell in cells}) == len(cells)
    assert not set(TUNING_SEEDS) & set(SEEDS)
    assert {c.seed for p in PROTOCOLS.values() if p.options == "grid" for c in p.cells({})} == set(TUNING_SEEDS)


def test_tuned_options_stand_beside_the_published_ones():
    best = {"lr": 0.005, "head": "frozen"}
    tuned = {"fine_tune": {"demo:vgg7": {"keep_width=0.5": [{"images": 50, "steps": 200, "best": best}]}}}
    both = PROTOCOLS["embedded"].cells(tuned)
    cells = [c for c in both if c.method == "fine_tune" and c.teacher == "demo:vgg7" and c.cut == {"keep_width": 0.5}]
    published = METHODS["fine_tune"].published
    assert {json.dumps(c.options) for c in cells if c.images == 50} == {json.dumps(published), json.dumps(best)}
    assert {json.dumps(c.options) for c in cells if c.images == 200} == {json.dumps(published), json.dumps(best)}
    assert next(c.options for c in cells if c.seed == 2021) == best  # of what is run the best comes first
    other = [c for c in both if c.method == "fine_tune" and c.teacher == "demo:resnet14"]
    assert {json.dumps(c.options) for c in other} == {json.dumps(published)}


def test_what_was_not_tuned_takes_the_options_of_the_nearest_steps_and_images():
    known = [
        {"images": n, "steps": s, "best": {"lr": lr}} for n, s, lr in ((50, 200, 1.0), (200, 200, 2.0), (50, 1000, 3.0))
    ]
    tuned = {"distill": {"demo:vgg7": {"keep_width=0.82": known}}}

    def options(images, steps):
        protocol = replace(PROTOCOLS["embedded_steps"], images=(images,), steps=(steps,), methods=("distill",))
        (chosen,) = {c.options["lr"] for c in protocol.cells(tuned) if c.teacher == "demo:vgg7"}
        return chosen

    assert [options(*k) for k in ((50, 200), (100, 100), (150, 400), (500, 200), (500, 500), (50, 2000))] == [
        1.0, 1.0, 2.0, 2.0, 3.0, 3.0,
    ]  # fmt: skip


def test_labels_reach_only_the_methods_that_need_them(monkeypatch):
    seen = {}
    for name, method in METHODS.items():

        def run(problem, name=name):
            seen[name] = problem.labels
            return problem.student()

        monkeypatch.setitem(METHODS, name, replace(method, run=run))
        run_cell(replace(CELL, method=name), Place())
    assert {n for n, labels in seen.items() if labels is not None} == {n for n, m in METHODS.items() if m.labels}
    assert all(labels.shape == (20,) for labels in seen.values() if labels is not None)


def test_only_names_fields_of_cell_cut_and_options():
    cells = PROTOCOLS["embedded"].cells({})
    few = chosen(cells, ["method=mir,none", "keep_width=0.3", "seed=2021", "images=50"])
    assert {c.method for c in few} == {"mir", "none"}
    assert len(few) == 6
    with pytest.raises(ValueError, match=r"no cell has a 'metod'.*method"):
        chosen(cells, ["metod=mir"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageNet in small: 10 classes of 4 training images and 2 to test."""
    root, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in range(10):
            Path(root, part, f"n{name:04}").mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / f"n{name:04}" / f"{number}.JPEG")
    (root / "net.py").write_text(
        "import torchvision\n"
        "def build():\n"
        "    return torchvision.models.mobilenet_v2(weights=None, num_classes=10, width_mult=0.25), "
        "{'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.2,) * 3, 'resize': 36}\n"
    )
    return root


def test_the_papers_protocol_on_a_small_folder(folder, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    arguments = ["sweep", "imagenet_mobilenetv2", "--data", str(folder), "--teacher", f"{folder}/net.py:build",
                 "--out", str(path), "--steps", "2", "--images", "5", "--images", "20", "--only", "seed=2021",
                 "--only", "keep_width=0.5", "--only", "method=none,fine_tune,mir"]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    lines = sweep.read_lines(path)
    assert len(lines) == 6
    assert {x["figures"]["test_images"] for x in lines} == {20}
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"] == 0


def test_every_method_runs_on_the_papers_resnet_cut(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mimicut.recovery.view_budget.MACS", 1e9)  # fewer views show the same
    (tmp_path / "net.py").write_text(
        "from torchvision.models.resnet import BasicBlock, ResNet\n"
        "def build():\n"
        "    return ResNet(BasicBlock, [3, 3, 1, 1], num_classes=10), "
        "{'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.2,) * 3, 'resize': 36}\n"
    )
    path = tmp_path / "lines.jsonl"
    arguments = ["sweep", "imagenet_resnet34", "--data", str(folder), "--teacher", f"{tmp_path}/net.py:build",
                 "--out", str(path), "--steps", "2", "--images", "5", "--only", "seed=2021", "--only",
                 "keep_width=0.5"]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    lines = {x["cell"]["method"]: x["figures"] for x in sweep.read_lines(path)}
    assert set(lines) == set(TABLED)
    # One block of each of the two stages of three is cut to a half; PRACTISE drops blocks.
    assert len({f["macs"] for name, f in lines.items() if name != "practise"}) == 1
    assert 0.5 < lines["mir"]["macs"] < 1
    assert main(["show", str(path)]) == 0
    assert "net.py:build: teacher" in capsys.readouterr().out


def test_the_papers_protocols_are_the_papers():
    for name in ("imagenet_resnet34", "imagenet_resnet50", "imagenet_mobilenetv2"):
        cells = PROTOCOLS[name].cells({})
        assert {c.images for c in cells} == {50, 100, 500, 1000}
        assert {c.seed for c in cells} == {2021, 2022, 2023, 2024, 2025}
        assert {c.steps for c in cells} == {2000}
        assert {c.method for c in cells} == set(TABLED)
        assert all(c.cut["scheme"] == "mid" for c in cells)


def test_images_are_drawn_as_in_the_paper(tmp_path):
    paths = [Path(f"c{c}/{i}.jpg") for c in range(4) for i in range(5)]
    few = draw(paths, 3, 0, 4)
    assert len(set(few)) == 3
    assert few == draw(paths, 3, 0, 4) != draw(paths, 3, 1, 4)
    each = draw(paths, 8, 0, 4)
    assert sorted(p.parent.name for p in each) == [f"c{c}" for c in range(4) for _ in range(2)]
    with pytest.raises(InputError, match="there are 20"):
        draw(paths, 21, 0, 4)
    with pytest.raises(InputError, match="5 classes: found 4 class folders"):
        draw(paths, 10, 0, 5)
    with pytest.raises(InputError, match="a multiple"):
        draw(paths, 9, 0, 4)


def test_cifar_from_its_files(tmp_path):
    random = np.random.default_rng(0)
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = {"data": random.integers(0, 256, (12, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(12)]}
        (home / name).write_bytes(pickle.dumps(data))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    import torchvision

    known = torchvision.datasets.CIFAR10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "_check_integrity", lambda self: True)
        patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
        (tmp_path / "net.py").write_text(
            "import torchvision\n"
            "def build():\n"
            "    return torchvision.models.resnet18(weights=None, num_classes=10), "
            "{'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.2,) * 3}\n"
        )
        task = open_task("cifar10", f"{tmp_path}/net.py:build", Place(data=str(tmp_path)))
        few, labels = task.few(7, 2021)
        assert few.batch().shape == (7, 3, 32, 32)
        assert labels.shape == (7,)
        x, y = next(task.test())
        assert x.shape == (12, 3, 32, 32)
        assert y.tolist() == [i % 10 for i in range(12)]
    with pytest.raises(InputError, match="--data"):
        open_task("cifar10", f"{tmp_path}/net.py:build", Place())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "nothing"], "expected one of embedded"),
        (["sweep", "cifar10"], "--teacher"),
        (["sweep", "embedded", "--only", "color=red"], "no cell has a 'color'"),
        (["sweep", "embedded", "--only", "method=mirr"], "no cell has method=mirr"),
        (["sweep", "embedded", "--steps", "2"], "--out"),
        (["sweep", "imagenet_resnet34", "--no-pretrained"], "--out"),
        (["sweep", "embedded", "--jobs", "2"], "add --ray"),
        (["show", "nothing.jsonl"], "No such file"),
        (["show", "benchmarks"], "Is a directory"),
        (["tune", "benchmarks"], "Is a directory"),
        (["sweep", "embedded", "--out", "benchmarks"], "reading benchmarks"),
        (["sweep", "embedded", "--out", "/proc/lines.jsonl", "--limit", "1"], "writing /proc/lines.jsonl"),
        (["sweep", "imagenet_resnet34"], "--data"),
        (["sweep", "imagenet_resnet34", "--data", "/nothing"], "there is no folder /nothing"),
        (["sweep", "embedded", "--device", "nonsense"], "--device nonsense"),
        (["sweep", "embedded", "--no-pretrained", "--out", "none.jsonl"], "its own weights"),
    ],
)
def test_wrong_flags_are_refused_in_words(arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_numbers_out_of_range_and_strange_lines_are_refused_in_words(tmp_path, capsys):
    for arguments in (["--limit", "abc"], ["--ray", "--gpus", "-1"]):
        with pytest.raises(SystemExit):
            main(["sweep", "embedded", *arguments])
        assert f"found {arguments[-1]}" in capsys.readouterr().err
    path = tmp_path / "strange.jsonl"
    path.write_text(json.dumps(line(replace(CELL, method="nobody"))) + "\n")
    assert main(["show", str(path)]) == 2
    assert "'nobody' is not known" in capsys.readouterr().err


def test_an_unreadable_test_image_is_left_out_and_reported(folder, tmp_path, capsys):
    root = tmp_path / "imagenet"
    shutil.copytree(folder, root)
    (root / "val" / "n0003" / "1.JPEG").write_bytes(b"broken")
    task = open_task("imagenet", f"{folder}/net.py:build", Place(data=str(root)))
    x, y = next(task.test())
    assert len(x) == len(y) == 19
    assert y.tolist().count(3) == 1
    assert "1.JPEG" in capsys.readouterr().err


def test_the_cache_of_test_images_changes_nothing(folder, tmp_path):
    root, cache = tmp_path / "imagenet", tmp_path / "cache"
    shutil.copytree(folder, root)
    (root / "val" / "n0003" / "1.JPEG").write_bytes(b"broken")
    teacher = f"{folder}/net.py:build"
    plain = list(open_task("imagenet", teacher, Place(data=str(root))).test())
    place = Place(data=str(root), cache=str(cache))
    first = list(open_task("imagenet", teacher, place).test())
    for path in (root / "val" / "n0004").iterdir():  # what is kept is not read again
        path.write_bytes(bytes(path.stat().st_size))
    task = open_task("imagenet", teacher, place)
    again = list(task.test())
    for found in (first, again):
        assert all(torch.equal(a, b) for x, y in zip(plain, found, strict=True) for a, b in zip(x, y, strict=True))
    assert len(list(cache.glob("*.npy"))) == 2
    assert not list(cache.glob("*.partial"))
    other = tmp_path / "other"  # the same names, other pictures
    shutil.copytree(folder, other)
    for path in (other / "val").rglob("*.JPEG"):
        Image.new("RGB", (40, 40), "white").save(path)
    x, _ = next(open_task("imagenet", teacher, Place(data=str(other), cache=str(cache))).test())
    assert float(x.min()) == pytest.approx(2.5)


def test_missing_data_is_an_error_of_every_cell_and_not_a_crash(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    arguments = ["sweep", "imagenet_mobilenetv2", "--no-pretrained", "--data", str(tmp_path), "--out", str(path)]
    assert main([*arguments, "--limit", "1"]) == 3
    assert "expected DATA/train/CLASS" in sweep.read_lines(path)[0]["error"]


def test_paired_interval_by_hand():
    a, b = (
        tables.Entry("mir", {}, (1, 2, 3), top1, 90.0, 1.0, None, 0.5, 0.5)
        for top1 in ((84.0, 85.0, 89.0), (80.0, 83.0, 83.0))
    )
    mean, low, high = tables.paired(a, b)
    assert mean == pytest.approx(4.0)
    assert (low, high) == pytest.approx((4 - 4.302653 * 2 / 3**0.5, 4 + 4.302653 * 2 / 3**0.5), rel=1e-5)
    assert tables.paired(a, replace(b, seeds=(7, 8, 3))) is None


def test_margins_are_against_the_better_of_published_and_tuned(tmp_path):
    good, bad = {"lr": 0.005, "head": "trained"}, METHODS["fine_tune"].published
    lines = [line(c, top1) for top1, c in zip((84.0, 84.4, 84.2), steps(3), strict=True)]
    for options, top1 in ((good, 80.0), (bad, 60.0)):
        lines += [line(c, top1) for c in steps(3, method="fine_tune", options=options, images=20)]
    lucky = replace(CELL, method="fine_tune", options={"lr": 1.0, "head": "trained"})
    lines.append(line(lucky, 99.0))  # one seed outweighs nothing
    (methods,) = tables.table(lines).values()
    assert methods["fine_tune"][0].options == good
    assert methods["fine_tune"][0].mean == 80.0
    assert tables.floors(tables.table(lines)) == []  # 20 images, not 50
    fifty = [{**x, "cell": {**x["cell"], "images": 50}} for x in lines]
    (row,) = tables.floors(tables.table(fifty))
    assert row["margins"]["fine_tune"][0] == pytest.approx(4.2)


def test_a_method_without_steps_stands_beside_every_number_of_steps():
    lines = [line(replace(CELL, steps=s)) for s in (3, 9)] + [line(replace(CELL, method="none"))]
    found = tables.table(lines)
    assert [c.steps for c in found] == [3, 9]
    assert all("none" in methods for methods in found.values())
    twice = tables.table([*lines, line(replace(CELL, method="none", steps=9))])
    assert all(methods["none"][0].seeds == (2021,) for methods in twice.values())


def test_the_page_is_made_from_the_lines(tmp_path, monkeypatch):
    results, docs = tmp_path / "results", tmp_path / "docs"
    assert page.write(docs, results) == 2
    results.mkdir()
    lines = []
    monkeypatch.setattr("benchmarks.protocol.read_tuned", dict)
    published = METHODS["fine_tune"].published
    for seed, top1 in zip(SEEDS[:3], (84.0, 85.0, 84.5), strict=True):
        cell = replace(CELL, seed=seed, images=50, steps=200)
        lines += [line(cell, top1), line(replace(cell, method="fine_tune", options=published), top1 - 7)]
        lines += [line(replace(cell, method="fine_tune", options={"lr": 7.0, "head": "trained"}), 99.0)]  # no cell
        lines += [line(replace(cell, method="practise", teacher="demo:resnet14"), 88.0)]
    curve = [line(c, 60.0) for c in PROTOCOLS["embedded_steps"].cells({}) if c.method == "fine_tune"][:1]
    tops = {"mir": 83.0, "fine_tune": 68.0, "distill_labels": 80.0}
    cells = [c for c in PROTOCOLS["embedded_long"].cells({}) if c.teacher == "demo:resnet14"]
    longer = [line(c, tops[c.method] + c.seed % 5) for c in cells]
    tops = {"none": 20.0, "mir": 80.0, "mir_adamw": 85.0}
    attending = [line(c, tops[c.method] + c.steps / 250) for c in PROTOCOLS["embedded_transformer"].cells({})]
    files = {
        "embedded": lines, "embedded_steps": curve, "embedded_long": longer, "embedded_transformer": attending,
    }  # fmt: skip
    for name, own in files.items():
        (results / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in own))
    assert page.write(docs, results) == 0
    text = (docs / "results.md").read_text()
    seven = "+7.0 [+7.0, +7.0]"
    assert f"demo:vgg7, widths x 0.5 | 200 | 5.5 | {seven} |  | {seven} |  | seeds are missing |" in text
    margins = "+15.0 [+15.0, +15.0] | +3.0 [+3.0, +3.0]"
    assert f"demo:resnet14, widths x 0.5 | 1000 | 5.0 | {margins} | {margins} | yes |" in text
    assert "Families that meet it: 0 after 200 steps, 1 after 1000 steps." in text
    row = "demo:vit_tiny, widths x 0.5 | {} | {} | {} | {}, {}, {}, {}, {} | 1 | {} |"
    for method, steps, lost, met in (("MiR", 1000, 6.0, "no"), ("MiR, AdamW", 200, 4.2, "no")):
        assert row.format(method, steps, lost, *[lost] * 5, met) in text
    assert row.format("MiR, AdamW", 1000, 1.0, *[1.0] * 5, "yes") in text
    assert "| MiR, AdamW | **85.8 ± 0.0**<br>-5.0 [-5.0, -5.0] |" in text
    assert "**84.5 ± 0.5**" in text
    assert "**88.0 ± 0.0**<br>at 50% of MACs" in text
    assert re.search(r"`embedded`: \d+ cells not run yet", text)
    for name in ("methods", "steps", "seconds"):
        assert Image.open(docs / "figures" / f"{name}.png").size[0] > 300
    first = (docs / "figures" / "methods.png").read_bytes()
    assert page.write(docs, results) == 0
    assert (docs / "figures" / "methods.png").read_bytes() == first


def test_a_results_file_of_one_method_can_be_shown(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(line(replace(CELL, method="practise"))) + "\n")
    assert main(["show", str(path)]) == 0
    assert "x 0.5, 20 images" in capsys.readouterr().out


def test_the_page_of_a_table_without_mir_has_no_figure(tmp_path):
    (tmp_path / "results").mkdir()
    cell = next(c for c in PROTOCOLS["embedded"].cells() if c.method == "none")
    (tmp_path / "results" / "embedded.jsonl").write_text(json.dumps(line(cell)) + "\n")
    assert page.write(tmp_path, tmp_path / "results") == 0
    assert "methods.png" not in (tmp_path / "results.md").read_text()


def test_another_teachers_weights_need_another_file(folder, tmp_path, capsys):
    from safetensors.torch import save_file

    weights = tmp_path / "w.safetensors"
    task = open_task("imagenet", f"{folder}/net.py:build", Place(data=str(folder)))
    save_file({k: v.contiguous() for k, v in task.teacher.model.state_dict().items()}, weights)
    arguments = ["sweep", "imagenet_mobilenetv2", "--data", str(folder), "--teacher", f"{folder}/net.py:build",
                 "--out", str(tmp_path / "lines.jsonl"), "--images", "5", "--only", "seed=2021", "--only",
                 "keep_width=0.5", "--only", "method=none", "--weights", str(weights)]  # fmt: skip
    assert main(arguments) == 0
    (found,) = sweep.read_lines(tmp_path / "lines.jsonl")
    assert len(found["weights"]) == 16
    for other, said in ((arguments[:-2], "other weights"), ([*arguments[:-1], "nothing"], "reading the weights")):
        capsys.readouterr()
        assert main(other) == 2
        assert said in capsys.readouterr().err


def test_tuning_takes_the_best_of_the_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "TUNED", tmp_path / "tuned.json")
    assert tables.write_tuned() == 2
    assert "no grid was swept" in capsys.readouterr().err
    cells = PROTOCOLS["embedded_tuning"].cells({})
    lines = [line(c, 70.0 + (c.options == METHODS[c.method].grid[-1])) for c in cells]
    path = tmp_path / "embedded_tuning.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines[1:]))
    assert tables.write_tuned() == 0
    first = cells[0]
    assert f"left out: {first.method} {first.teacher}" in capsys.readouterr().err  # one option of its grid is missing
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert tables.write_tuned([path]) == 0
    assert "distill demo:vgg7 keep_width=0.5 images=50 steps=200: the best lr, 0.1, is the last that was tried" in (
        capsys.readouterr().err
    )
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    best = METHODS["distill"].grid[-1]
    found = [{"images": 50, "steps": 200, "best": best}]
    assert tuned["distill"]["demo:resnet14"] == {f"keep_width={k}": found for k in (0.3, 0.5, 0.55)}
    assert "mir" not in tuned


def test_the_package_never_imports_the_benchmarks():
    for path in (ROOT / "mimicut").rglob("*.py"):
        assert "benchmarks" not in [w for t in path.read_text().split("\n") if "import" in t for w in t.split()], path


def test_peak_memory_is_of_the_method_alone(monkeypatch):
    def run(problem):
        torch.ones(64, 1 << 20).sum()  # 256 MiB
        return problem.student()

    monkeypatch.setitem(METHODS, "none", replace(METHODS["none"], run=run))
    found = run_cell(replace(CELL, method="none"), Place())["peak_memory_mib"]
    if found is None:
        pytest.skip("this system does not tell")
    assert 230 < found < 300
