"""Seams of several points, inside dicts and tuples, and of networks without a head: found, mimicked, saved, loaded."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from nets import Branches, Chain, ConvClassifier, Dense, Headless, Maps, Output, Residual, Segmenter, Structured
from torch import nn
from torch.nn import functional as F

import mimicut as us
from mimicut.anatomy.find_seam import find_seam, trace
from mimicut.base.errors import InputError, PlanError, UnsupportedModel
from mimicut.base.guard import full_copy
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.figures import FeatureError
from mimicut.proof.randomised import randomised
from mimicut.surgery.plan import read_plan
from mimicut.surgery.seam import Seam, SeamPoint, capturing, tensors
from mimicut.workflow.compress import compress
from mimicut.workflow.verify import verify_folder

PREPROCESSING = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
CONFIG = us.MimicConfig(steps=20, views="none", batch_size=8)
X = torch.zeros(2, 3, 8, 8)


def images(count=20, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def seam_of(model, example=X, **options):
    seam = find_seam(model, example, **options)
    return [str(p) for p in seam.points], seam


def named(values):
    return OrderedDict((name, t) for name, t in tensors(values))


# --- where it is found


class _Returns(Maps):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(super().forward(x))


_Pair = namedtuple("_Pair", "low high")


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        (lambda m: m, ["low", "high"]),
        (OrderedDict, ["low", "high"]),
        (lambda m: list(m.values()), ["0", "1"]),
        (lambda m: (m["high"], {"all": [m["low"], None], "size": 8}), ["0", "1.all.0"]),
        (lambda m: _Pair(**m), ["0", "1"]),
        (lambda m: Output(m["low"], m["high"]), ["scores", "features"]),
    ],
)
def test_a_backbone_is_its_own_seam(what, parts):
    model = randomised(_Returns(what))
    points, seam = seam_of(model)
    assert points == [f"<model>:output.{part}" for part in parts]
    assert (seam.head, seam.headless) == ((), True)
    groups = trace(model, X).groups
    assert groups["stem"].pinned is groups["inner"].pinned is None
    assert groups["high"].pinned == "the seam's own channels"
    with torch.no_grad(), capturing(model, seam) as capture:
        features, output = capture.features_and_output(images(3))
    assert all(torch.equal(f, named(output)[p]) for f, p in zip(features, parts, strict=True))


def test_pooled_features_without_a_head_are_taken_before_the_pooling():
    model = Headless()
    points, seam = seam_of(model)
    assert (points, seam.head, seam.headless) == (["stage2:output"], (), True)
    assert {n for n, g in trace(model, X).groups.items() if g.pinned is None} == set(Residual.free)


class _Pooled(nn.Module):
    """Tokens that a function chooses or weighs, inside the network's own forward: no module takes or returns them."""

    def __init__(self, how):
        super().__init__()
        self.patches, self.how = nn.Conv2d(3, 8, 2, 2), how
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)
        self.query = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.outer(self.inner(tokens).relu())
        if self.how == "one":  # a query gathers them all; it is the only one there is to choose
            tokens = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), tokens, tokens)
            tokens = tokens + self.outer(self.inner(tokens).relu())
        found = tokens.mean(1) if self.how == "mean" else tokens[:, 0]
        return F.normalize(found, dim=-1)


@pytest.mark.parametrize("how", ["one", "mean", "first"])
def test_features_that_no_hook_catches_before_the_pooling_are_taken_after_it(how):
    points, seam = seam_of(randomised(_Pooled(how)))
    assert (points, seam.head, seam.headless) == (["<model>:output"], (), True)


def test_tokens_behind_a_norm_are_features():
    class Tokens(Branches):
        def forward(self, x):
            return self.norms[0](self.patches[0](x).flatten(2).transpose(1, 2))

    points, seam = seam_of(Tokens())
    assert (points, seam.shapes, seam.headless) == (["<model>:output"], ((4, 12),), True)


def test_a_dense_head_is_the_module_that_holds_the_last_layers():
    model = Segmenter()
    points, seam = seam_of(model, ((), {"pixel_values": X}))
    assert points == ["backbone:output.low", "backbone:output.high"]
    assert seam.head == tuple(f"classifier.{n}" for n in model.classifier.state_dict())


def test_a_dense_head_that_is_most_of_the_network_is_its_last_layers():
    model = Segmenter()
    model.classifier.high = nn.Sequential(nn.Conv2d(12, 200, 3, padding=1), nn.ReLU(), nn.Conv2d(200, 5, 1))
    points, seam = seam_of(model, ((), {"pixel_values": X}))
    assert points == ["backbone:output.low", "classifier.high.1:output"]
    assert seam.head == tuple(f"classifier.{n}" for n in ("low.weight", "low.bias", "high.2.weight", "high.2.bias"))


@pytest.mark.parametrize(
    "predict",
    [
        lambda x, weight: x.mean((2, 3)) @ weight,
        lambda x, weight: x.flatten(2).transpose(1, 2) @ weight,
        lambda x, weight: torch.matmul(weight.t(), x.flatten(2)),
    ],
)
def test_a_product_with_a_parameter_is_a_layer(predict):
    class Net(Chain):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 5))

        def forward(self, x):
            return predict(self.body(x), self.weight)

    points, seam = seam_of(Net())
    assert (points, seam.head, seam.headless) == (["body:output"], ("weight",), False)


def test_last_layers_of_which_one_comes_before_another_are_no_head():
    """A residual sum is a feature, whatever convolution was added last."""

    class Sum(Chain):
        def forward(self, x):
            x = self.body(x)
            return x + self.again(x)

        def __init__(self):
            super().__init__()
            self.again = nn.Conv2d(16, 16, 1)

    points, seam = seam_of(Sum())
    assert (points, seam.headless) == (["<model>:output"], True)


def test_a_norm_behind_the_last_layer_makes_features():
    class Normed(Chain):
        def forward(self, x):
            return self.norm(self.body(x))

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(16)

    assert seam_of(Normed())[0] == ["<model>:output"]
    assert seam_of(Chain().body)[0] == ["5:output"]  # a convolution and an activation: a prediction


def test_what_scores_were_made_from_is_no_second_seam():
    points, seam = seam_of(Structured())
    assert (points, seam.head) == (["body:output"], ("fc.weight", "fc.bias"))


def test_maps_that_a_prediction_was_made_from_are_no_second_seam():
    class Both(ConvClassifier):
        def forward(self, x):
            x = self.body(x)
            return {"features": x, "map": self.classifier[0](x)}

    points, seam = seam_of(Both())
    assert (points, seam.head) == (["body:output"], ("classifier.0.weight", "classifier.0.bias"))


def test_two_heads_on_one_map_have_one_point():
    class Two(Chain):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(16, 3)

        def forward(self, x):
            x = self.pool(self.body(x)).flatten(1)
            return self.fc(x), {"other": self.other(x)}

    points, seam = seam_of(Two())
    assert (points, seam.head) == (["body:output"], ("fc.weight", "fc.bias", "other.weight", "other.bias"))


def test_nothing_to_imitate_is_refused_with_the_option_that_helps():
    class Mean(Chain):
        def forward(self, x):
            return super().forward(x).mean()

    class Fixed(Chain):
        def forward(self, x):
            return torch.zeros(len(x), 4)

    with pytest.raises(UnsupportedModel, match=r"returns \(\), in which no axis .* write x.shape\[0\]"):
        find_seam(Mean(), X)
    with pytest.raises(UnsupportedModel, match=r"does not depend on the images.*--part MODULE"):
        find_seam(Fixed(), X)


# --- named by hand


def test_a_name_with_several_tensors_stands_for_all_of_them():
    model, example = Segmenter(), ((), {"pixel_values": X})
    both = [f"backbone:output.{n}" for n in ("low", "high")]
    assert seam_of(model, example, points=["backbone"])[0] == both
    assert seam_of(model, example, points=["classifier:input"])[0] == [
        f"classifier:input.0.{n}" for n in ("low", "high")
    ]
    assert seam_of(model, example, points=["backbone:output.high"])[0] == both[1:]
    assert seam_of(model, example, points=[both[1], both[0]])[0] == both[::-1]
    points, seam = seam_of(model, example, points=[""])
    assert (points, seam.head) == (["<model>:output.out"], ())
    for name in ("backbone", "classifier:input"):
        seam = find_seam(model, example, points=[name])
        assert seam.head == tuple(f"classifier.{n}" for n in model.classifier.state_dict())


def test_a_tensor_under_two_names_is_one_point():
    model = _Returns(lambda m: {**m, "last": m["high"]})
    assert seam_of(model, points=[""])[0] == ["<model>:output.low", "<model>:output.high"]
    assert seam_of(model)[0] == ["<model>:output.low", "<model>:output.high"]


def test_inputs_by_name_and_position_are_caught_and_marked():
    model, example = Segmenter(), ((), {"pixel_values": X})
    seam = find_seam(model, example, points=["classifier:input", ":input"])
    with torch.no_grad(), capturing(model, seam) as capture:
        low, high, given = capture.features(pixel_values=images(3))
        maps = model.backbone(images(3))
    assert torch.equal(low, maps["low"])
    assert torch.equal(high, maps["high"])
    assert torch.equal(given, images(3))


def test_a_part_that_is_not_there_is_refused_with_those_that_are():
    example = (), {"pixel_values": X}
    with pytest.raises(UnsupportedModel, match=r"backbone:output.middle gives a dict with the parts low, high"):
        find_seam(Segmenter(), example, points=["backbone:output.middle"])
    model = Segmenter()
    seam = Seam((SeamPoint("backbone"),), ((8, 8, 8),), ())
    with capturing(model, seam) as capture, pytest.raises(UnsupportedModel, match=r"a dict with the parts low, high"):
        capture.features(pixel_values=X)


def test_points_with_parts_are_read_as_they_are_printed():
    for text in ("a.b:output@2.features.0", "<model>:output.out", "<model>:input", "a:input.0.low"):
        assert str(SeamPoint.parse(text)) == text
    assert SeamPoint.parse("<model>:output.out") == SeamPoint("", part="out")
    seam = Seam((SeamPoint("", part="out"),), ((3,),), (), True)
    assert Seam.from_json(seam.to_json()) == seam


# --- through the whole path

_CASES = [
    (Branches, None, 2, ("heads.0.weight", "heads.1.bias")),
    (Segmenter, ((), {"pixel_values": X, "sharp": True}), 2, ("classifier.low.weight", "classifier.high.bias")),
    (Structured, None, 1, ("fc.weight", "fc.bias")),
    (Maps, None, 2, ()),
    (Headless, None, 1, ()),
    (ConvClassifier, None, 1, ("classifier.0.weight",)),
]


@pytest.mark.parametrize(("net", "example", "points", "head"), _CASES, ids=lambda v: getattr(v, "__name__", None))
def test_the_whole_path(net, example, points, head, tmp_path):
    teacher = own_teacher(randomised(net()), PREPROCESSING)
    result = compress(teacher, images(), keep=0.7, folder=tmp_path / "small", config=CONFIG, example=example)
    assert len(result.plan.seam.points) == points
    assert set(head) <= set(result.plan.seam.head)
    assert result.report.config["cut_equals_zero"]["error"] <= 1e-10
    assert result.recovery.mimic.losses[-1] < result.recovery.mimic.losses[0]
    assert result.report.feature_error_relative > 0
    state = teacher.model.state_dict()
    assert all(torch.equal(result.model.state_dict()[n], state[n]) for n in result.plan.seam.head)
    again = us.load(tmp_path / "small", lambda: net())
    given = example[1] | {"pixel_values": images(3)} if example else {"x": images(3)}
    with torch.no_grad():
        found, wanted = named(again(**given)), named(result.model(**given))
    assert list(found) == list(wanted)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    scored = net in (Branches, Structured, ConvClassifier)
    assert (result.report.top1_agreement is not None) == scored
    assert result.plan.seam.headless == (net in (Maps, Headless))
    if net is Headless:
        assert any("returns features" in note for note in result.report.notes)
        assert compress(teacher, images(), plan=result.plan, config=CONFIG).report.top1_agreement is None


def test_a_plan_is_replayed_with_its_seam_and_its_call(tmp_path):
    teacher = own_teacher(randomised(Segmenter()), PREPROCESSING)
    example = (), {"pixel_values": X, "sharp": True}
    first = compress(teacher, images(), keep=0.7, folder=tmp_path / "small", config=CONFIG, example=example)
    assert first.plan.call == {"keyword": "pixel_values", "options": {"sharp": True}}
    plan = read_plan(tmp_path / "small" / "plan.json")
    second = compress(teacher, images(), plan=plan, config=CONFIG, example=example)
    assert second.plan == first.plan
    assert second.recovery.mimic.losses == first.recovery.mimic.losses
    (tmp_path / "net.py").write_text("import nets\ndef build():\n    return nets.Segmenter()\n")
    torch.save(teacher.model.state_dict(), tmp_path / "w.pt")
    np.save(tmp_path / "few.npy", images(4, seed=3).numpy())
    report = verify_folder(
        tmp_path / "small", tmp_path / "few.npy", teacher=f"{tmp_path / 'net.py'}:build", weights=tmp_path / "w.pt"
    )
    given, errors = example[1] | {"pixel_values": images(4, seed=3)}, [FeatureError(), FeatureError()]
    with torch.no_grad(), capturing(teacher.model, plan.seam) as a, capturing(first.model, plan.seam) as b:
        for error, want, have in zip(errors, a.features(**given), b.features(**given), strict=True):
            error.add(want.double(), have.double())
    assert report.feature_error_relative == pytest.approx(sum(e.squared / e.spread for e in errors) / 2, rel=1e-6)
    broken = plan.to_json()
    for call, words in (("pixel_values", "call is .*expected an object or null"), ({}, "with keyword and options")):
        broken["call"] = call
        with pytest.raises(PlanError, match=words):
            us.Plan.from_json(broken)


_ONLY = r"reading the example: found .* expected images as the only tensor"


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (
            (X, X),
            "reading sample 0: found one Tensor, and the network takes 2 inputs; expected a dictionary or a tuple",
        ),
        (((X,), {"mask": X}), _ONLY),
        (((), {"pixel_values": X, "odd": [1]}), _ONLY),
        (((), {}), _ONLY),
    ],
)
def test_a_call_that_takes_more_than_images_is_refused_before_any_work(example, words):
    teacher = own_teacher(randomised(Segmenter()), PREPROCESSING)
    with pytest.raises(InputError, match=words):
        compress(teacher, images(), keep=0.7, example=example)


# --- the loss


def test_the_loss_is_the_sum_of_errors_in_units_of_the_teachers_variance():
    model = randomised(Segmenter())
    seam = find_seam(model, ((), {"pixel_values": X}))
    few = images(7)

    class Few:
        def __len__(self):
            return len(few)

        def view(self, indices, views, generator):
            return (), {"pixel_values": few[indices]}

    student = full_copy(model)
    with torch.no_grad():
        student.backbone.stem.weight.mul_(0.5)
        with capturing(model, seam) as a, capturing(student, seam) as b:
            wanted, found = (c.features(pixel_values=few) for c in (a, b))
    for size in (7, 3):  # of a smaller batch the error, but still the variance of all images
        config = us.MimicConfig(steps=1, views="none", batch_size=size)
        first = torch.randperm(7, generator=torch.Generator().manual_seed(config.seed))[:size]
        log = us.mimic(model, full_copy(student), seam, Few(), config)
        errors = [
            F.mse_loss(f[first], w[first]) / w.double().var(0, correction=0).mean().clamp_min(0.1 * w.square().mean())
            for f, w in zip(found, wanted, strict=True)
        ]
        assert all(error > 0.001 for error in errors)
        assert log.losses[0] == pytest.approx(float(sum(errors)), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_images_that_are_all_alike_have_a_tenth_of_the_mean_square_for_unit(count):
    model = randomised(Branches())
    student, seam = full_copy(model), find_seam(model, X)
    few = images(1).expand(count, -1, -1, -1).clone()
    with torch.no_grad():
        student.hidden[0].weight.mul_(0.5)
        student.hidden[1].weight.mul_(0.5)
        with capturing(model, seam) as a, capturing(student, seam) as b:
            errors = [
                F.mse_loss(f, w) / (0.1 * w.square().mean())
                for f, w in zip(b.features(few), a.features(few), strict=True)
            ]
    log = us.mimic(model, student, seam, few, us.MimicConfig(steps=20, views="none"))
    assert log.losses[0] == pytest.approx(float(sum(errors)), rel=1e-4)
    assert 0 < log.losses[-1] < log.losses[0]


def test_dense_alone_has_no_body():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = Dense()

        def forward(self, x):
            return self.dense({"low": x[:, :8], "high": F.avg_pool2d(x[:, :12], 2)})

    assert seam_of(Only(), torch.zeros(2, 12, 8, 8))[0] == ["<model>:output"]
