"""What somebody who had not written the code found wrong with their own networks; each is right now."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mimicut
from mimicut.anatomy.find_seam import find_seam, trace
from mimicut.anatomy.outputs import check_declared
from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.inputs.input_source import InputSource, inputs_of
from mimicut.proof.output_figures import OutputMeter, with_kinds
from mimicut.surgery.seam import Output

QUICK = {"config": mimicut.preset("default", "quick"), "extra": "none", "keep": 0.6}
X = torch.zeros(2, 3, 16, 16)


def few(n=12):
    return np.random.default_rng(0).normal(size=(n, 3, 16, 16)).astype("float32")


def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = body(), nn.Linear(6, 4)


def kinds(model):
    return {output.part: output.kind for output in find_seam(model, X).outputs}


class Centres(Net):
    """A detector without a library: centres of each kind of object, their sizes and offsets."""

    def __init__(self):
        super().__init__()
        self.centres, self.sizes, self.offsets = (nn.Conv2d(6, width, 1) for width in (5, 2, 2))

    def forward(self, x):
        y = self.body(x)
        return {"centres": self.centres(y).sigmoid(), "sizes": self.sizes(y), "offsets": self.offsets(y)}


class Auxiliary(Centres):
    def forward(self, x):
        y = self.body(x)
        return {"sizes": self.sizes(y), "offsets": self.offsets(y)}


class WithFeatures(Centres):
    def forward(self, x):
        y = self.body(x)
        return {"features": y, "mask": self.centres(y)}


def test_maps_of_different_widths_are_no_classes_of_each_other():
    assert kinds(Centres()) == {"centres": "multilabel", "sizes": "values", "offsets": "values"}
    assert kinds(Auxiliary()) == {"sizes": "map", "offsets": "map"}  # as an auxiliary head has the same classes
    assert kinds(WithFeatures()) == {"features": "values", "mask": "map"}
    detector = mimicut.load_teacher("demo:detector_tiny")
    seam = find_seam(detector.model, detector.example())
    assert {o.part: o.kind for o in seam.outputs} == {"centres": "multilabel", "sizes": "values", "offsets": "values"}


class Frames(Net):
    def forward(self, x):
        return self.head(self.body(x).mean(2).transpose(1, 2)).log_softmax(-1)


def test_a_softmax_over_the_classes_of_each_frame_is_a_map():
    assert kinds(Frames()) == {"": "map"}


class TwiceAfterReLU(Net):
    def forward(self, x):
        y = self.body(x)
        y *= 2
        return self.head(y.mean((2, 3)))


class ZeroedInPlace(TwiceAfterReLU):
    def forward(self, x):
        y = self.body(x)
        y *= 2
        y[:, :4] = 0
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "said"), [(TwiceAfterReLU, "the result of Relu in place"), (ZeroedInPlace, "Name where the features are")]
)
def test_operators_in_place_after_the_body_are_named(net, said):
    with pytest.raises(UnsupportedModel, match=said):
        mimicut.compress(net().eval(), few(), **QUICK)


class Mask(Net):
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3))) > 0


def test_truth_values_are_no_scores_and_no_agreement_can_be_required_of_them():
    report = mimicut.compress(Mask().eval(), few(), **QUICK).report
    assert report.top1_agreement is None
    with pytest.raises(InputError, match="take the teacher's scores instead"):
        mimicut.compress(Mask().eval(), few(), min_agreement=0.1, **QUICK)


class Copies(nn.Conv2d):
    def __deepcopy__(self, memo):
        made = Copies(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        made.load_state_dict(self.state_dict())
        return made


def test_a_module_whose_own_copy_reads_its_data():
    torch.manual_seed(0)
    net = nn.Sequential(Copies(3, 8, 3), nn.ReLU(), Copies(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(6, 4)).eval()  # fmt: skip
    before = copy.deepcopy(net.state_dict())
    report = mimicut.compress(net, few(), **QUICK).report
    assert report.macs_student < report.macs_teacher
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


class Clips(Net):
    def forward(self, x):
        frames = self.body(x.flatten(0, 1)).mean((2, 3))
        return self.head(frames.unflatten(0, x.shape[:2]).mean(1))


def test_clips_of_a_network_of_images():
    clips = np.random.default_rng(0).normal(size=(12, 4, 3, 16, 16)).astype("float32")
    with pytest.raises(InputError, match=r"give example=, a batch of them"):
        mimicut.compress(Clips().eval(), clips, **QUICK)
    report = mimicut.compress(Clips().eval(), clips, example=torch.randn(2, 4, 3, 16, 16), **QUICK).report
    assert not [note for note in report.notes if "nothing says for which size" in note]


class Optional(Net):
    def forward(self, image, mask, numbers=None):
        y = self.head(self.body(image * mask).mean((2, 3)))
        return y if numbers is None else y + numbers


def test_what_a_sample_holds_is_taken_or_named():
    inputs = inputs_of(Optional(), None)
    one = {"image": torch.zeros(3, 8, 8), "mask": torch.ones(1, 8, 8), "numbers": torch.ones(4), "label": 3}
    source = InputSource([one] * 4, keys=inputs.keys, optional=inputs.optional)
    assert sorted(source.batch([0, 1])[1]) == ["image", "mask", "numbers"]
    assert source.notes == ["what the samples hold besides the network's inputs is not read: label"]
    source = InputSource([tuple(one.values())] * 4, keys=inputs.keys, optional=inputs.optional)
    assert len(source.batch([0, 1])[0]) == 2
    assert "hold 4 values: those after the first 2 are not read" in source.notes[0]
    assert InputSource([(one["image"], one["mask"])] * 4, keys=inputs.keys).notes == []


def test_few_images_prove_little_of_the_nearest_ones():
    meter, rows = OutputMeter(Output("", "embedding")), torch.randn(6, 8)
    meter.add(rows, rows)
    found = meter.figures()
    assert (found.neighbours, found.neighbours_high, found.nearest) == (1.0, 1.0, 1)
    assert 0.5 < found.neighbours_low < 0.6


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("scores", r"found scores, which is one row for each image, but with 2 images its shape is \(2, 6, 16, 16\)"),
        ("embedding", "found embedding, which is one row"),
        ("boxes", "found boxes, which is several rows"),
        (["mask=map", "mask=values"], "found map and values, expected one of them"),
        ({"foo": "map"}, "the network returns 'features', 'mask'"),
    ],
)
def test_kinds_that_an_output_cannot_have_are_refused(asked, said):
    anatomy = trace(WithFeatures(), X)
    with pytest.raises(InputError, match=said):
        check_declared(anatomy.traced, with_kinds(anatomy.seam, asked).outputs)


def test_the_only_output_has_no_name_to_declare():
    with pytest.raises(InputError, match="one output without a name: leave the name out"):
        with_kinds(find_seam(Frames(), X), {"foo": "map"})
