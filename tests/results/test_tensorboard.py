"""A run's losses and figures are in TensorBoard's files, read back by TensorBoard's own reader."""

import json

import pytest
from command_line import call
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimicut.results import tensorboard


def read(folder):
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_losses_and_figures(place, capsys):
    code, line, _ = call(
        capsys, "compress", "net.py:build", "photos", "--keep-width", "0.5", "--steps", "6", "--out", "small",
        "--tensorboard", "runs/first",
    )  # fmt: skip
    assert code == 0
    report = json.loads((place / "small" / "report.json").read_text())
    found = read(place / "runs" / "first")
    losses = [(event.step, event.value) for event in found.Scalars("mimic/loss")]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in report["losses"]]
    assert len(losses) == 6
    [agreement] = found.Scalars("report/top1_agreement")
    assert agreement.step == 6
    assert agreement.value == pytest.approx(line["top1_agreement"])
    [share] = found.Scalars("report/share of macs")
    assert share.value == pytest.approx(line["macs_student"] / line["macs_teacher"])
    assert b"agreement with the teacher" in found.Tensors("report/text_summary")[0].tensor_proto.string_val[0]


def test_a_run_for_each_budget(place, capsys):
    code, _, _ = call(
        capsys, "compress", "net.py:build", "photos", "--keep", "0.6", "--keep", "0.4", "--steps", "2",
        "--out", "small", "--tensorboard", "runs",
    )  # fmt: skip
    assert code == 0
    places = sorted(path.name for path in (place / "runs").iterdir())
    assert places == sorted(path.name for path in (place / "small").iterdir())
    shares = [read(place / "runs" / name).Scalars("report/share of macs")[0].value for name in places]
    assert shares[0] < shares[1]


def test_what_cannot_be_is_said_before_any_work(place, capsys, monkeypatch):
    options = ("compress", "net.py:build", "photos", "--keep-width", "0.5", "--out", "small", "--tensorboard")
    code, _, err = call(capsys, *options, "net.py/run")
    assert (code, "expected a folder" in err, (place / "small").exists()) == (2, True, False)
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    code, _, err = call(capsys, *options, "runs")
    assert (code, "mimicut[tensorboard]" in err, (place / "small").exists()) == (2, True, False)
    assert not (place / "runs").exists()
