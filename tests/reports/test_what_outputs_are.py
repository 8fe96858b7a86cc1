"""Outputs as public bug reports describe them: what is said of each is so."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mimicut
from mimicut.proof.output_figures import OutputMeter
from mimicut.surgery.seam import Output

QUICK = {"config": mimicut.preset("default", "quick"), "extra": "none", "keep": 0.6}
IMAGES = torch.zeros(2, 3, 8, 8)


def few(n=12):
    return np.random.default_rng(0).normal(size=(n, 3, 8, 8)).astype("float32")


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 3), nn.Conv2d(6, 5, 1)

    def pooled(self, x):
        return self.body(x).mean((2, 3))


# pytorch/pytorch#14013, CoinCheung/BiSeNet#216: the answer itself, as whole numbers
class Argmax(Body):
    def forward(self, x):
        return self.c(self.body(x)).argmax(1, keepdim=True)


class Label(Body):
    def forward(self, x):
        return self.a(self.pooled(x)).argmax(1)


class Mask(Body):
    def forward(self, x):
        return self.c(self.body(x)) > 0


@pytest.mark.parametrize(("net", "layer"), [(Argmax, "c"), (Label, "a"), (Mask, "c")])
def test_whole_numbers_are_imitated_by_what_they_are_made_of(net, layer):
    facts = mimicut.inspect(net(), IMAGES)
    assert facts["seam"] == ["body:output"]
    assert facts["head"] == [f"{layer}.weight", f"{layer}.bias"]
    report = mimicut.compress(net().eval(), few(), **QUICK).report
    assert report.feature_error_relative is not None
    assert any("not measured" in note and "the output" in note for note in report.notes)


def test_numbers_of_no_layer_are_refused_with_another_remedy_than_the_output():
    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (x * self.scale).mean((1, 2, 3)) > 0

    with pytest.raises(mimicut.MimicutError, match=r"whole numbers or truth values alone") as error:
        mimicut.inspect(Bright(), IMAGES)
    assert ":output" not in str(error.value)


# VainF/Torch-Pruning#179, #126: one output channel; here its last activation never fires
def test_numbers_that_are_all_zero_have_no_cosine():
    meter = OutputMeter(Output("", "values"))
    meter.add(torch.zeros(4, 5), torch.zeros(4, 5))
    assert meter.figures().cosine is None
    meter.add(torch.ones(4, 5), 2 * torch.ones(4, 5))
    assert meter.figures().cosine == pytest.approx(1)


# NVIDIA/DeepLearningExamples#765: a score alone; its cosine would be 1 or -1 whatever it is
def test_one_number_for_each_image_has_no_cosine():
    meter = OutputMeter(Output("", "values"))
    meter.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[9.0], [1.0]]))
    found = meter.figures()
    assert (found.cosine, found.cosine_low) == (None, None)
    assert found.error == pytest.approx((64 + 1) / 0.5)


def test_dead_features_have_no_cosine():
    class Dead(Body):
        def forward(self, x):
            return self.body(x)

    teacher = Dead().eval()
    with torch.no_grad():
        teacher.body[2].bias.fill_(-1e6)
    seam = mimicut.find_seam(teacher, IMAGES, points=[":output"])
    found = mimicut.figures(teacher, copy.deepcopy(teacher), seam, torch.from_numpy(few()))
    assert (found.feature_cosine, found.outputs[0].cosine) == (None, None)


class Two(Body):
    def forward(self, x):
        return {"age": self.a(self.pooled(x)), "kind": self.b(self.pooled(x))}


def test_two_rows_of_scores_are_said_to_be_two():
    report = mimicut.compress(Two().eval(), few(), **QUICK).report
    assert [each["kind"] for each in report.outputs] == ["scores", "scores"]
    said = [note for note in report.notes if "top-1" in note]
    assert said == [
        "there is no one top-1 agreement, as 2 outputs are class scores (<model>:output.age, <model>:output.kind): "
        "each has its own"
    ]


# facebookresearch/detr#188, huggingface/optimum#1907: features beside what is made of them
class Beside(Body):
    def forward(self, x):
        found = self.pooled(x)
        return self.a(found), found


class Cosines(Body):
    def forward(self, x):
        found = self.a(self.pooled(x))
        return found / found.pow(2).sum(-1, keepdim=True).pow(0.5)


class Inverse(Body):
    def forward(self, x):
        found = self.a(self.pooled(x))
        return found * found.pow(2).sum(-1, keepdim=True).pow(-0.5)


class Probabilities(Body):
    def forward(self, x):
        found = self.a(self.pooled(x))
        return found, found.softmax(1)


@pytest.mark.parametrize(
    ("net", "kinds"),
    [
        (Beside, ["scores", "embedding"]), (Cosines, ["embedding"]), (Inverse, ["embedding"]),
        (Probabilities, ["scores", "scores"]),
    ],
)  # fmt: skip
def test_kinds(net, kinds):
    assert [each["kind"] for each in mimicut.inspect(net(), IMAGES)["outputs"]] == kinds


def test_a_kind_that_only_the_shape_shows_is_called_a_guess():
    class Scores(Body):
        def forward(self, x):
            return self.a(self.pooled(x))

    class Soft(Body):
        def forward(self, x):
            return self.a(self.pooled(x)).softmax(1)

    said = "guessed from the shape: the output scores"
    assert said in mimicut.compress(Scores().eval(), few(), **QUICK).report.table()
    assert said not in mimicut.compress(Soft().eval(), few(), **QUICK).report.table()
    assert said not in mimicut.compress(Scores().eval(), few(), output="scores", **QUICK).report.table()
