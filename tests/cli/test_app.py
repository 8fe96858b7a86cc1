"""The command line as a user meets it: words on stderr, one JSON line last on stdout, documented exit codes."""

import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from command_line import call

from mimicut.cli import terminal_progress
from mimicut.cli.app import main
from mimicut.results.teachers import load_teacher
from mimicut.surgery.cut import cut
from mimicut.surgery.plan import read_plan


def test_compress_then_verify(place, capsys):
    code, line, err = call(capsys, "compress", "net.py:build", "photos", "--keep", 0.5, "--out", "small", "--steps", 3)
    assert code == 0
    assert set(line) == {
        "macs_teacher", "macs_student", "params_teacher", "params_student", "top1_agreement", "top1_agreement_low",
        "top1_agreement_high", "feature_error_relative", "images_few", "images_held_out", "steps", "seconds", "folder",
        "top1_teacher", "top1_student", "latency_ms_teacher", "latency_ms_student", "outputs", "detections", "go",
    }  # fmt: skip
    assert [(each["kind"], each["imitated"]) for each in line["outputs"]] == [("scores", True)]
    assert line["latency_ms_teacher"] is None  # none was asked for
    assert line["macs_student"] <= 0.5 * line["macs_teacher"]
    assert (line["images_few"], line["images_held_out"], line["steps"]) == (8, 2, 3)
    assert line["top1_student"] is None
    assert "broken.jpg" in err
    assert "step 3 of 3" in err
    code, line, _ = call(capsys, "verify", "small", "photos", "--teacher", "net.py:build", "--labelled", "photos")
    assert code == 0
    assert line["top1_student"] is not None
    code, _, err = call(capsys, "verify", "small", "photos")
    assert code == 2
    assert "never run from a folder" in err


def test_a_threshold_is_held_against_the_interval(place, capsys):
    own = ("compress", "net.py:build", "photos", "--keep", 1, "--steps", 0, "--held-out-share", 0.5)
    code, line, err = call(capsys, *own, "--out", "a", "--min-agreement", 0.4)
    assert (code, line["go"], line["top1_agreement"]) == (0, True, 1)  # all 5 agree: the interval begins at 0.478
    assert "GO: the lower end of the interval is 47.8%, at least 40.0% was required" in err
    code, line, err = call(capsys, *own, "--out", "b", "--min-agreement", 0.95)
    assert (code, line) == (2, None)
    assert "the 95 % interval would begin at 0.478; hold out 72 or more" in err
    assert not (place / "b").exists()
    sweep = ("compress", "net.py:build", "photos", "--keep", 1, "--keep", 0.9, "--steps", 0, "--out", "c")
    assert call(capsys, *sweep)[0] == 0
    code, line, _ = call(capsys, *sweep, "--resume", "--min-agreement", 0.15)
    assert [code, *(each["go"] for each in line["results"])] == [0, True, True]  # both of two agree: from 0.158 on
    assert call(capsys, *sweep, "--resume", "--min-agreement", 0.2)[0] == 1
    for value in (0, 1, "nan"):
        assert call(capsys, *own, "--out", "b", "--min-agreement", value)[0] == 2
    code, line, err = call(capsys, "verify", "a", "photos", "--teacher", "net.py:build", "--min-agreement", 0.4)
    assert (code, line["go"], line["images_held_out"]) == (0, True, 5)  # those that were fitted to prove nothing
    assert "5 of these images trained the student and were left out" in " ".join(err.split())
    np.save(place / "one.npy", np.full((40, 16, 16, 3), 90, np.uint8))
    code, line, err = call(capsys, "verify", "a", "one.npy", "--teacher", "net.py:build", "--min-agreement", 0.5)
    assert (code, line) == (2, None)
    assert "with 1 held-out images" in err  # copies of one picture are one


def test_plan_is_written_edited_and_used(place, capsys):
    code, line, err = call(capsys, "plan", "net.py:build", "--keep-width", 0.5, "--out", "plan.json")
    assert (code, line["widths"]) == (0, {"body.0": [4, 8]})
    assert "body.0: 4 of 8" in err
    data = json.loads((place / "plan.json").read_text())
    data["widths"]["body.0"] = 3
    (place / "plan.json").write_text(json.dumps(data))
    code, line, _ = call(
        capsys, "compress", "net.py:build", "photos", "--plan", "plan.json", "--out", "small", "--steps", 1
    )
    assert code == 0
    assert json.loads((place / "small" / "plan.json").read_text())["edits"][0]["to"] == 3
    (place / "plan.json").write_text(json.dumps({**data, "widths": {"body.0": -1}}))
    code, line, err = call(capsys, "compress", "net.py:build", "photos", "--plan", "plan.json", "--out", "b")
    assert (code, line) == (2, None)
    assert "widths['body.0'] is -1" in err
    assert not (place / "b").exists()


def test_a_budget_beside_a_plan_is_refused(place, capsys):
    call(capsys, "plan", "net.py:build", "--keep-width", 0.5, "--out", "plan.json")
    own = ("compress", "net.py:build", "photos", "--plan", "plan.json", "--out", "small")
    for flags in (("--keep", 0.5), ("--divisor", 4), ("--drop", "body.0"), ("--scheme", "mid"), ("--depth", "auto")):
        code, line, err = call(capsys, *own, *flags)
        assert (code, line) == (2, None)
        assert f"{flags[0][2:]} given beside it" in err
    assert not (place / "small").exists()


def test_of_several_budgets_those_that_can_be_met_are(place, capsys):
    own = ("compress", "net.py:build", "photos", "--keep", 0.01, "--keep", 0.5, "--out", "small", "--steps", 1)
    code, line, err = call(capsys, *own)
    assert code == 1
    assert "keep 0.01 of" in line["results"][0]["error"]
    assert "keep 0.01 of" in err
    assert line["results"][1]["macs_student"] <= 0.5 * line["results"][1]["macs_teacher"]
    assert [f.name for f in (place / "small").iterdir()] == ["keep-0.5"]


def test_inspect_tells_seam_groups_and_reach(place, capsys):
    code, line, err = call(capsys, "inspect", "net.py:build")
    assert code == 0
    assert line["seam"] == ["body:output"]
    assert {g["name"]: g["pinned"] for g in line["groups"]}["body.3"] == "the seam's own channels"
    assert line["smallest_keep"]["all"] == pytest.approx(
        (256 * 27 + 196 * 9 * 12 + 48) / (256 * 27 * 8 + 196 * 72 * 12 + 48), abs=1e-4
    )
    assert "body.0" in err
    assert "head: fc.weight, fc.bias" in err
    assert set(line["keep"]) == {"0.75", "0.5", "0.25"}
    for keep, student in line["keep"].items():
        assert call(capsys, "plan", "net.py:build", "--keep", keep, "--out", f"{keep}.json")[0] == 0
        plan = read_plan(place / f"{keep}.json")
        model = cut(load_teacher(f"{place / 'net.py'}:build").model, plan)
        assert (student["scheme"], student["macs"]) == (plan.scheme, plan.macs["student"])
        assert student["params"] == sum(p.numel() for p in model.parameters())
        assert f"keep {keep} (scheme {student['scheme']})" in err


def test_inspect_draws_the_layers_for_light_and_dark_pages(place, capsys):
    code, line, err = call(capsys, "inspect", "net.py:build", "--picture", "net.svg")
    assert code == 0
    assert line["pictures"] == ["net.svg", "net-dark.svg"]
    assert all("<svg" in (place / name).read_text() for name in line["pictures"])
    assert [(each["name"], each["part"]) for each in line["layers"]] == [
        ("body.0", "cut"), ("body.3", "cut"), ("fc", "head"),
    ]  # fmt: skip
    # 256 places x 27 x 8, 196 places x 72 x 12, 12 x 4
    assert [each["macs_share"] * line["macs"] for each in line["layers"]] == pytest.approx([55296, 169344, 48])
    code, _, err = call(capsys, "inspect", "net.py:build", "--picture", "net.txt")
    assert code == 2
    assert "net.txt: expected a name that ends in .png" in err


def test_inspect_says_which_budgets_are_out_of_reach(place, capsys):
    text = (place / "net.py").read_text()
    for old, new in (
        ("Conv2d(3, 8", "Conv2d(3, 2"),
        ("BatchNorm2d(8", "BatchNorm2d(2"),
        ("Conv2d(8, 12", "Conv2d(2, 12"),
    ):
        text = text.replace(old, new)
    (place / "net.py").write_text(text)
    code, line, err = call(capsys, "inspect", "net.py:build")
    assert code == 0
    assert "out of reach" in line["keep"]["0.25"]["unreachable"]
    assert "keep 0.25: making a plan: keep 0.25 of" in err


def test_inspect_tells_several_points_and_a_network_without_a_head(place, capsys):
    code, line, err = call(capsys, "inspect", "net.py:features")
    assert (code, line["headless"], line["head"]) == (0, True, [])
    assert "seam: <model>:output.small [12, 14, 14]\nseam: <model>:output.large [8, 16, 16]\n" in err
    assert "head: none; the network returns features, and the seam is the output itself" in err
    code, line, err = call(capsys, "inspect", "net.py:build", "--seam", "body.2", "--seam", "<model>:output")
    assert (code, line["seam"]) == (0, ["body.2:output", "<model>:output"])
    assert "head: none; the network returns features\n" in err  # all that it returns is a point


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compress", "net.py:build", "photos", "--out", "x"], 2, "no budget"),
        (["compress", "net.py:build", "photos", "--keep", "0", "--out", "x"], 2, "keep is 0.0"),
        (["compress", "net.py:build", "photos", "--keep", "1.5", "--out", "x"], 2, "keep is 1.5"),
        (["compress", "net.py:build", "photos", "--keep", "nan", "--out", "x"], 2, "keep is nan"),
        (["compress", "net.py:build", "photos", "--keep", "1e-9", "--out", "x"], 1, "the nearest is keep"),
        (["compress", "net.py:build", "photos", "--keep", "0.5"], 2, "--out"),
        (["compress", "net.py:build", "nowhere", "--keep", "0.5", "--out", "x"], 2, "nowhere"),
        (["compress", "net.py:build", "photos", "--keep", "0.5", "--out", "photos"], 2, "it exists"),
        (["compress", "net.py:build", "photos", "--keep", "0.5", "--out", "photos", "--force"], 2, "not a result"),
        (["compress", "net.py:build", "photos", "--keep", "0.5", "--out", "x", "--preset", "mine"], 2, "the preset"),
        (["compress", "net.py:build", "photos", "--keep", "0.5", "--out", "x", "--mean", "red"], 2, "--mean"),
        (["compress", "net.py:build", "photos", "--keep", "0.5", "--out", "x", "--steps", "-1"], 2, "steps"),
        (["compress", "net.py:build", "photos", "--keep", "0.5", "--out", "x", "--device", "toaster"], 2, "device"),
        (["compress", "net.py:meta", "photos", "--keep", "0.5", "--out", "x"], 3, "meta"),
        (["compress", "net.py:none", "photos", "--keep", "0.5", "--out", "x"], 2, "none"),
        (["compress", "resnet18", "photos", "--keep", "0.5", "--out", "x"], 2, "timm:resnet18"),
        (["verify", "photos", "photos"], 2, "plan.json"),
        (["demo", "--teacher", "nobody"], 2, "resnet20"),
        (["compress", "--keep", "many"], 2, "'--keep'"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_input_is_one_clear_sentence(place, capsys, arguments, code, words):
    found, line, err = call(capsys, *arguments)
    assert (found, line) == (code, None), err
    assert words in err
    assert "Traceback" not in err
    assert not (place / "x").exists()


def test_help_of_every_command_ends_with_a_line_that_runs(capsys, monkeypatch):
    for command in ("inspect", "plan", "compress", "verify", "demo"):
        monkeypatch.setattr(sys, "argv", ["mimicut", command, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        assert f"Example: mimicut {command}" in " ".join(capsys.readouterr().out.split())


def test_an_interrupt_says_so(place, capsys, monkeypatch):
    monkeypatch.setattr(
        import_module("mimicut.workflow.compress"),
        "recover",
        lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    code, line, err = call(capsys, "compress", "net.py:build", "photos", "--keep", 0.5, "--out", "x")
    assert (code, line) == (130, None)
    assert "interrupted; nothing was written" in err
    assert not (place / "x").exists()


def test_a_stopped_run_is_saved_says_how_to_go_on_and_does(place, capsys, monkeypatch):

    asked = ("compress", "net.py:build", "photos", "--keep", 0.5, "--out", "x", "--steps", 4)
    with monkeypatch.context() as patch:
        patch.setattr(terminal_progress.StepProgress, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        code, line, err = call(capsys, *asked)
    assert code == 130
    assert (line["steps"], line["folder"] is None) == (1, False)
    assert "stopped after 1 of 4 steps" in err
    assert "--resume continues" in err
    code, line, err = call(capsys, *asked, "--resume")
    assert (code, line["steps"]) == (0, 4)
    assert "continuing after 1 of 4 steps" in err
    code, again, err = call(capsys, *asked, "--resume")
    assert (code, again) == (0, line)  # so that a loop of retries ends
    assert "already complete" in err
    code, _, err = call(capsys, *asked, "--seed", 3, "--resume")
    assert code == 2
    assert "it exists, and was made with other config, budget" in err


@pytest.mark.long
def test_an_interrupted_export_leaves_the_result_and_resume_makes_the_files(place, capsys, monkeypatch):
    module = import_module("mimicut.workflow.compress")
    asked = ("compress", "net.py:build", "photos", "--keep", 0.5, "--out", "x", "--steps", 2, "--to", "onnx")
    with monkeypatch.context() as patch:
        patch.setattr(module, "export_folder", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        code, line, err = call(capsys, *asked)
    assert (code, line) == (130, None)
    assert "the student in x is complete, but what should follow" in err
    assert not (place / "x" / "model.onnx").exists()
    code, line, err = call(capsys, *asked, "--resume")
    assert (code, line["steps"]) == (0, 2)
    assert "already complete, but not yet exported as onnx" in err
    assert (place / "x" / "model.onnx").exists()


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "mimicut", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "compress" in done.stdout


def test_denormals_are_zero_in_all_threads_of_a_command():
    code = (
        "import torch; from mimicut.cli.option_values import set_threads; set_threads(2); "
        "found = torch.full((4_000_000,), 1e-40) * 1.0; torch.set_flush_denormal(False); "
        "print(int(found.view(torch.int32).count_nonzero()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush them")
    assert done.stdout == "0\n", done.stderr
