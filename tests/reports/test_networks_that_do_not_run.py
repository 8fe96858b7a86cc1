"""Networks as public bug reports describe them, that cannot be read as they are: each is refused with what to do."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mimicut
from mimicut.base.errors import InputError, UnsupportedModel

IMAGES = torch.zeros(2, 3, 8, 8)
QUICK = {"config": mimicut.preset("default", "quick"), "extra": "none", "keep": 0.6}


def few(n=12):
    return np.random.default_rng(0).normal(size=(n, 3, 8, 8)).astype("float32")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


# NVIDIA/DeepLearningExamples#765 and espressif/esp-dl#223: code that takes one number of images for granted
class ViewTwo(Net):
    def forward(self, x):
        return self.fc(self.body(x).view(2, 6, -1).mean(2))


class ViewOne(Net):
    def forward(self, x):
        return self.fc(self.body(x).view(1, 6, -1).mean(2))


class AssertOne(Net):
    def forward(self, x):
        assert x.shape[0] == 1, "one image at a time"
        return self.fc(self.features(x))


class Squeezed(Net):
    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.body(x), 1).squeeze())


@pytest.mark.parametrize("net", [ViewTwo, ViewOne, AssertOne])
def test_a_network_of_one_number_of_images_is_refused(net):
    with pytest.raises(UnsupportedModel, match=r"Its code takes one number of images for granted.*x\.shape\[0\]"):
        mimicut.compress(net().eval(), few(), **QUICK)


def test_squeeze_of_one_image_is_a_note():
    report = mimicut.compress(Squeezed().eval(), few(), **QUICK).report
    assert any("of one image Squeezed returns (4,), without an axis of images" in note for note in report.notes)


# VainF/Torch-Pruning#466 (batch norm without running statistics)
def test_a_norm_of_the_batch_is_a_note():
    net = Net()
    net.body[1] = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    report = mimicut.compress(net.eval(), few(), **QUICK).report
    assert any("depends on the others in its batch" in note for note in report.notes)
    again = mimicut.compress(Net().eval(), few(), **QUICK).report
    assert not any("depends on the others" in note for note in again.notes)


# Coderx7/SimpleNet#2 (dropout that is always on), pytorch/pytorch#11999, and noise that is no dropout
class Dropped(Net):
    def forward(self, x):
        return self.fc(F.dropout(self.features(x), 0.3))


class Noisy(Net):
    def forward(self, x):
        return self.fc(self.features(x + 0.1 * torch.randn_like(x)))


def test_dropout_in_eval_mode_is_refused_where_it_is():
    with pytest.raises(UnsupportedModel, match="dropout in <model> drops numbers at random in eval mode too"):
        mimicut.inspect(Dropped(), IMAGES)


def test_noise_in_eval_mode_is_refused():
    with pytest.raises(UnsupportedModel, match="two passes on the same images in eval mode differ"):
        mimicut.compress(Noisy().eval(), few(), **QUICK)


# RCAN as several libraries have it (x *= rgb_range): the next pass is given other images
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(255),
        lambda x: x[:, :2].sub_(0.5),
        lambda x: x.flatten(1).clamp_(0, 1),
        lambda x: x.unbind(1)[0].zero_(),
    ],
)
def test_a_network_that_changes_its_images_is_refused(change):
    class Changes(Net):
        def forward(self, x):
            change(x)
            return super().forward(x)

    images = IMAGES.clone()
    with pytest.raises(UnsupportedModel, match=r"in <model> changes the images .* in place.*x\.clone\(\)"):
        mimicut.inspect(Changes(), images)
    assert torch.equal(images, IMAGES)


def test_a_network_that_changes_a_copy_of_its_images_is_not():
    class Copies(Net):
        def forward(self, x):
            return super().forward((x * 1).mul_(2))

    mimicut.inspect(Copies(), IMAGES)


# SPAN and other networks that merge their branches in every forward pass
def test_weights_that_forward_sets_are_named_with_the_module():
    class Merges(nn.Conv2d):
        def forward(self, x):
            self.weight.data = (self.weight.data.clone() + 0.1).contiguous()
            return super().forward(x)

    net = Net()
    net.body[0] = Merges(3, 8, 3)
    with pytest.raises(UnsupportedModel, match=r"code that sets weights while it runs, in body\.0; expected"):
        mimicut.inspect(net, IMAGES)


# VainF/Torch-Pruning#172 (two images), microsoft/nni#4664 (img_metas), open lists of images
class Siamese(Net):
    def forward(self, a, b):
        return self.fc((self.features(a) - self.features(b)).abs())


class Metas(Net):
    def forward(self, img, img_metas, return_loss=True):
        return self.fc(self.features(img)) * img_metas[0]["scale"]


class Listed(Net):
    def forward(self, images):
        return self.fc(self.features(torch.stack(images)))


class ChannelsLast(Net):
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize(("net", "takes"), [(Siamese, "a, b"), (Metas, "img, img_metas")])
def test_further_inputs_are_named(net, takes):
    with pytest.raises(UnsupportedModel, match=f"its forward method takes {takes}, and .* InputSource"):
        mimicut.inspect(net(), IMAGES)


@pytest.mark.parametrize("net", [Listed, ChannelsLast])
def test_a_network_that_takes_something_else_is_to_be_wrapped(net):
    with pytest.raises(UnsupportedModel, match=r"running .* on \(2, 3, 8, 8\): .*wrap it in a module"):
        mimicut.inspect(net(), IMAGES)


# huggingface/optimum#1907, neuml/txtai#166: image and text, the text first
class ImageAndText(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.Embedding(5, 6), Net()

    def forward(self, input_ids=None, pixel_values=None):
        return self.vision(pixel_values), self.text(input_ids)


def test_the_part_that_takes_the_images_is_named():
    with pytest.raises(UnsupportedModel, match=r"Its part 'vision' takes the images: .*--part vision"):
        mimicut.inspect(ImageAndText(), IMAGES)


# pytorch/pytorch#90169 (decoders in a plain list), and other containers
class Hidden(Net):
    def __init__(self, held):
        super().__init__()
        self.decoders = held

    def forward(self, x):
        layers = self.decoders.values() if isinstance(self.decoders, dict) else self.decoders
        for layer in layers:
            x = layer(x)
        return super().forward(x)


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_layers_in_a_plain_container_are_refused(kind):
    layer = nn.Conv2d(3, 3, 1)
    with pytest.raises(UnsupportedModel, match=rf"its attribute decoders holds in a {kind.__name__}"):
        mimicut.inspect(Hidden({"a": layer} if kind is dict else kind([layer])), IMAGES)


def test_layers_in_a_plain_list_that_do_not_run_do_no_harm():
    net = Net()
    net.losses = [nn.Conv2d(3, 3, 1)]
    assert mimicut.inspect(net, IMAGES)["macs"] == mimicut.inspect(Net(), IMAGES)["macs"]


# kornia/kornia#2999 and others keep fixed filters as plain tensors
class Filtered(Net):
    def __init__(self):
        super().__init__()
        self.kernel = torch.ones(6, 6, 3, 3) / 54

    def features(self, x):
        return F.conv2d(self.body(x), self.kernel, padding=1).mean((2, 3))


def test_a_fixed_filter_is_counted_and_pins_what_it_takes():
    facts = mimicut.inspect(Filtered(), IMAGES)
    assert facts["macs"] == 64 * (3 * 8 * 9 + 8 * 6 * 9 + 6 * 6 * 9) + 24
    assert "could not be followed" in {g["name"]: g["pinned"] for g in facts["groups"]}["body.2"]


# pytorch/vision#2712 (TorchScript in a part), VainF/Torch-Pruning#11 (quantised already)
def scripted():
    net = Net().eval()
    net.body = torch.jit.script(net.body)
    return net


def dynamic():
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})


def static():
    layers = torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)
    net = nn.Sequential(*layers).eval()
    net.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(net)
    prepared(IMAGES)
    return torch.ao.quantization.convert(prepared)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "what"), [(scripted, "body .* is TorchScript"), (dynamic, "fc .* is quantised"), (static, "is quantised")]
)
def test_parts_without_float_weights_are_named(build, what):
    with pytest.raises(UnsupportedModel, match=f"its part .*{what}"):
        mimicut.compress(build(), few(), **QUICK)


# haotian-liu/LLaVA#305, TinyLLaVA/TinyLLaVA_Factory#17: forward without gradients
class NoGradients(Net):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_without_gradients_steps_are_refused_by_that_name_and_the_closed_form_works():
    config = mimicut.preset("default", steps=2)
    with pytest.raises(InputError, match=r"switches gradients off \(torch.no_grad.*--effort quick"):
        mimicut.compress(NoGradients().eval(), few(), keep=0.6, config=config, extra="none")
    assert mimicut.compress(NoGradients().eval(), few(), **QUICK).report.macs_student > 0


# pytorch/vision#5193, facebookresearch/detr#188: features that hooks keep, hooks defined inside a method
class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc, self.kept = nn.Linear(6, 4), {}

        def keep(module, args, output):
            self.kept["map"] = output

        self.second.register_forward_hook(keep)

    def forward(self, x):
        self.second(self.first(x).relu())
        return self.fc(self.kept["map"].relu().mean((2, 3)))


class Stored(Net):
    def __init__(self):
        super().__init__()
        self.head = lambda x: self.fc(x)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("net", [Hooked, Stored])
def test_functions_that_name_the_network_name_the_copy_in_a_copy(net):
    from mimicut.base.guard import full_copy

    teacher = net().eval()
    copied = full_copy(teacher)
    with torch.no_grad():
        copied.fc.weight.zero_()
        copied.fc.bias.zero_()
        assert not copied(torch.ones(1, 3, 8, 8)).any()
        assert teacher(torch.ones(1, 3, 8, 8)).any()


def test_a_network_of_hooks_is_compressed():
    teacher = Hooked().eval()
    result = mimicut.compress(teacher, few(), **QUICK)
    x = torch.from_numpy(few(3))
    with torch.no_grad():
        wanted = result.model(x)
        teacher(x + 1)  # what the teacher keeps is its own
        assert torch.equal(result.model(x), wanted)
    assert result.report.macs_student < result.report.macs_teacher


# pytorch/pytorch#136545, lucidrains/rotary-embedding-torch#35: autocast in forward
class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self.features(x)
        return self.fc(found.float())


def test_autocast_is_counted_and_cut():
    assert mimicut.inspect(Autocast(), IMAGES)["macs"] == mimicut.inspect(Net(), IMAGES)["macs"]
    assert mimicut.compress(Autocast().eval(), few(), **QUICK).report.macs_student < 0.6 * 41_496
