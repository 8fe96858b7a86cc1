"""What is wrong with images is found, named, and said before anything is learned from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import Chain
from torch import nn

import mimicut as us
from mimicut import demo
from mimicut.inputs.image_set import read_images
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.image_check import check_images
from mimicut.results.teachers import load_teacher
from mimicut.surgery.seam import Seam, SeamPoint

SAID = Preprocessing((3, 16, 16), (0.5,) * 3, (0.25,) * 3)
SEAM = Seam((SeamPoint("1"),), ((8,),), ())


class Net(nn.Sequential):
    """Names class 0 or 1 by the first channel, of four."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        self[2].weight = nn.Parameter(torch.tensor([[9.0, 0, 0], [-9.0, 0, 0], [0, 0, 0], [0, 0, 0]]))
        self[2].bias = nn.Parameter(torch.tensor([0.0, 0, -9, -9]))


def photos(n=20, seed=0):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (n, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    return np.clip(coarse + random.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)


def looked(images, net=None, said=SAID):
    return check_images((net or Net()).eval(), SEAM, read_images(images, said))


def test_good_images_say_nothing_but_the_classes():
    found = looked(photos())
    assert (found.blank, found.near_duplicates, found.outliers, found.shift) == ((), (), (), None)
    assert (found.classes, found.classes_untouched) == (4, (2, 3))
    assert [note for note in found.notes if "classes" not in note and "is undecided" not in note] == []
    assert "the teacher names 2 of its 4 classes for none of the images" in found.notes[-1]
    fewer = looked(photos()[:3])
    assert fewer.classes_untouched
    assert not any("for none of the images" in note for note in fewer.notes)


def test_blank_and_near_duplicate_images_are_named():
    images = photos()
    images[3], images[11] = 77, 200
    images[[3, 11], :8] += 1  # what differs in a blank image is noise, here the same in both
    images[7] = np.clip(images[2].astype(int) + 9, 0, 255)
    found = looked(images)
    assert found.blank == ("image 3", "image 11")
    assert found.near_duplicates == (("image 7", "image 2"),)
    assert any("2 of 20 images are blank (one flat colour): “image 3”, “image 11”" in note for note in found.notes)
    assert any("“image 7” like “image 2”" in note for note in found.notes)


def test_a_held_out_image_that_is_nearly_one_to_learn_from_is_named():
    few, proof = photos(), photos(8, seed=5)
    proof[3] = np.clip(few[2].astype(int) + 9, 0, 255)  # as another encoder may give it: no pixel is equal
    found = check_images(Net().eval(), SEAM, read_images(few, SAID), held_out=read_images(proof, SAID))
    assert found.held_out_alike == (("image 3", "image 2"),)
    assert any("1 of 8 held-out images are near-duplicates of images to learn from" in note for note in found.notes)
    own = own_teacher(Chain(), replace(SAID, input_size=(3, 8, 8)))
    report = us.compress(own, few, keep=0.7, held_out=proof, config=us.preset("default", steps=1)).report
    assert report.images_check["held_out_alike"] == (("image 3", "image 2"),)


def test_held_out_images_that_are_nearly_one_another_are_named():
    few, proof = photos(), photos(8, seed=5)
    proof[6] = np.clip(proof[1].astype(int) + 9, 0, 255)
    own = own_teacher(Chain(), replace(SAID, input_size=(3, 8, 8)))
    report = us.compress(own, few, keep=0.7, held_out=proof, config=us.preset("default", steps=1)).report
    assert report.images_check["held_out_near_duplicates"] == (("image 6", "image 1"),)
    assert any("1 of 8 held-out images are near-duplicates of another held-out image" in note for note in report.notes)
    near = check_images(
        Net().eval(), SEAM, read_images(few, SAID), held_out=read_images(proof[6:], SAID),
        beside=read_images(proof[1:2], SAID),
    )  # fmt: skip
    assert near.held_out_alike == (("image 0", "image 0"),)


def test_a_batch_norm_that_is_called_by_keyword_is_heard():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.net = nn.BatchNorm2d(3), Net()

        def forward(self, x):
            return self.net(self.norm(input=x))

    seam = replace(SEAM, points=(SeamPoint("net.1"),))
    found = check_images(Keyword().eval(), seam, read_images(photos(), SAID))
    assert found.shift is not None


def test_blank_images_of_any_colour_under_any_normalisation():
    images = photos(8)
    images[0], images[1], images[2] = 0, 255, (200, 10, 30)
    uneven = Preprocessing((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert looked(images, said=uneven).blank == ("image 0", "image 1", "image 2")


def test_one_number_an_image_and_too_few_values_are_no_reason_to_stop():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 1)

        def forward(self, x):
            return self.fc(self.norm(x.mean((2, 3))))[:, 0]

    found = check_images(One().eval(), Seam((SeamPoint(""),), ((),), ()), read_images(photos(20), SAID))
    assert (found.shift, found.factor, found.classes) == (None, None, None)


def test_images_that_the_teacher_finds_unlike_anything():
    net, images = Net(), photos()
    net[2].bias.data.zero_()
    images[4], images[9] = images[4] // 99 + 127, images[9] // 99 + 127  # grey: all scores are alike
    found = looked(images, net)
    assert {"image 4", "image 9"} <= set(found.unlike_anything)
    assert any("the teacher is undecided on" in note for note in found.notes)
    net[2].weight.data.zero_()
    assert looked(images, net).unlike_anything == ()  # of a network that tells nothing apart


def test_outliers_of_the_features():
    images = photos()
    images[:, :, :, :] = images // 8 + 112
    images[5] = 255
    images[5, 0, 0] = 250
    assert looked(images).outliers == ("image 5",)


@pytest.mark.parametrize(("scale", "words"), [(255.0, "values up to 25"), (1.0, "values from 0 to 1, and are taken")])
def test_floating_point_images_that_nobody_normalised(scale, words):
    arrays = torch.from_numpy(photos()).movedim(3, 1).float() / 255 * scale
    assert any(words in note for note in looked(arrays).notes)
    prepared = (arrays / scale - 0.5) / 0.25
    assert not any("floating-point" in note for note in looked(prepared).notes)


def test_a_wrong_normalisation_shows_at_the_first_batch_norm():
    teacher = load_teacher("demo:resnet14")
    anatomy = us.trace(teacher.model, teacher.example())
    prepared, said = torch.as_tensor(demo.few_images(50, 1)), teacher.preprocessing
    good = check_images(teacher.model, anatomy.seam, read_images(prepared, said))
    assert not any("batch norm" in note for note in good.notes)
    pixels = prepared * said.std[0] + said.mean[0]
    for wrong in (pixels, 255 * pixels, (pixels - 0.5) / 0.5):
        bad = check_images(teacher.model, anatomy.seam, read_images(wrong, said))
        assert any("check --mean and --std" in note for note in bad.notes)


def test_compress_tells_before_it_trains_and_in_the_report(tmp_path):
    images, said = photos(), []
    images[3] = 77
    result = us.compress(
        own_teacher(Chain(), replace(SAID, input_size=(3, 8, 8))), images, keep=0.7, held_out=photos(8, 5),
        config=us.preset("default", steps=1), on_stage=said.append,
    )  # fmt: skip
    blank = next(i for i, text in enumerate(said) if "blank (one flat colour): “image 3”" in text)
    assert next(i for i, text in enumerate(said) if "of one flat colour" in text) < said.index("cutting")
    assert blank < said.index("cutting")
    assert result.report.images_check["blank"] == ("image 3",)
    assert any("blank (one flat colour): “image 3”" in note for note in result.report.notes)
    assert us.Report.from_json(result.report.to_json()).images_check["blank"] == ["image 3"]
