import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from mimicut.base.errors import InputError, UnsupportedModel
from mimicut.inputs import built_model, timm_models
from mimicut.inputs.image_set import Preprocessing
from mimicut.inputs.input_source import Inputs, inputs_of
from mimicut.inputs.own_models import call_builder
from mimicut.inputs.teacher import OWN_PREPROCESSING, build_architecture, own_teacher
from mimicut.inputs.weights import load_weights
from mimicut.results.teachers import load_again, load_teacher

TIMM, VISION = "timm:test_resnet", "torchvision:shufflenet_v2_x0_5"

OWN = """
import torch
from torch import nn
import beside

class Net(nn.Module):
    def __init__(self, classes=10, channels=3):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes)
    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))

def plain():
    import late
    return Net()
def sized(num_classes=10, in_chans=3): return Net(num_classes, in_chans)
def half(): return Net().half().train()
def double(): return Net().double()
def meta():
    with torch.device("meta"):
        return Net()
def lazy(): return nn.Sequential(nn.LazyConv2d(3, 3))
def wrapped(): return nn.DataParallel(Net())
def compiled(): return torch.compile(Net())
def infinite():
    net = Net()
    net.norm.running_var[2] = float("inf")
    return net
def raises(): raise ValueError("of course")
def leaves(): raise SystemExit(3)
def nothing(): return None
def three(): return Net(), 1, 2
def empty(): return nn.ReLU()
def with_dict(): return Net(channels=1), {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.2], "views": "patches"}
def bad_dict(): return Net(), {"size": 3}
def bad_views(): return Net(), {"views": "cifar"}
CONSTANT = 3
"""


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "late.py").write_text("")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(2)\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    return str(tmp_path / "own.py")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the network, wherever it runs; the servers' silence is immediate."""

    def refuse(*args, **kwargs):
        raise built_model.urllib.error.URLError("no network in tests")

    monkeypatch.setattr(built_model.urllib.request, "urlopen", refuse)


def refused(match: str, *args, kind: type[Exception] = InputError, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        load_teacher(*args, **kwargs)
    assert match in str(caught.value), str(caught.value)
    return str(caught.value)


# Libraries


def test_timm_with_its_own_configuration():
    teacher = load_teacher(TIMM, pretrained=False)
    assert teacher.preprocessing == Preprocessing((3, 160, 160), (0.5,) * 3, (0.5,) * 3, 168, "bilinear")  # 160 / 0.95
    assert teacher.views == "imagenet"
    assert not teacher.model.training
    assert any("random weights" in n for n in teacher.notes)


def test_torchvision_with_its_own_configuration():
    teacher = load_teacher(VISION, pretrained=False)
    expected = Preprocessing((3, 224, 224), built_model.IMAGENET_MEAN, built_model.IMAGENET_STD, 256, "bilinear")
    assert teacher.preprocessing == expected
    v2 = load_teacher("torchvision:mobilenet_v2.IMAGENET1K_V2", pretrained=False)
    assert v2.preprocessing.resize == 232


@pytest.mark.parametrize(
    ("spec", "kwargs", "side"),
    [
        ("torchvision:vit_b_32", {}, 224),
        ("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", {}, 384),  # made for larger images than its class's default
        ("torchvision:vit_b_32", {"image_size": 96}, 96),
    ],
)
def test_the_position_table_has_the_size_of_the_images(spec, kwargs, side):
    teacher = load_teacher(spec, pretrained=False, model_kwargs=kwargs)
    assert teacher.model.image_size == side
    assert teacher.preprocessing.input_size == (3, side, side)


def test_random_weights_are_the_same_every_time_and_the_callers_state_stays():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = load_teacher(TIMM, pretrained=False).model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    second = load_teacher(TIMM, pretrained=False).model.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:test_resnat", "close to it: test_resnet"),
        ("torchvision:shufflenet", "shufflenet_v2_x0_5"),
        ("torchvision:xyz", "it has "),
        ("timm:test_resnet.nonsense", "expected one of r160_in1k"),
        ("torchvision:resnet50.V3", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision:raft_small", "no such model"),
        ("resnet18", "did you mean timm:resnet18 or torchvision:resnet18"),
        ("net.py", "name the function in it, net.py:build"),
        ("timm:", "expected timm:NAME"),
        ("", "expected timm:NAME"),
    ],
)
def test_unknown_names(spec, words):
    refused(words, spec)


@pytest.mark.parametrize("spec", [TIMM, VISION])
def test_pretrained_without_network(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(built_model.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    said = refused("cannot be reached", spec)
    assert "--weights FILE" in said
    assert "--no-pretrained" in said
    assert "no network in tests" in said


def test_timm_takes_a_file_that_an_earlier_download_left(monkeypatch, tmp_path):
    weights = load_teacher(TIMM, pretrained=False).model.state_dict()
    weights["fc.bias"] = torch.full_like(weights["fc.bias"], 7)
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, name, **k: str(tmp_path / name) if "safe" in name else None,
    )
    assert (load_teacher(TIMM).model.fc.bias == 7).all()


def test_torchvision_takes_a_file_that_an_earlier_download_left(monkeypatch, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(built_model.torch.hub, "get_dir", lambda: str(tmp_path))
    weights = load_teacher(VISION, pretrained=False).model.state_dict()
    weights["fc.bias"] = torch.full_like(weights["fc.bias"], 7)
    (tmp_path / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth").touch()
    enum = type(torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT)
    monkeypatch.setattr(enum, "get_state_dict", lambda *a, **k: weights)
    assert (load_teacher(VISION).model.fc.bias == 7).all()


def test_a_new_head_on_pretrained_weights_is_refused():
    for spec in (TIMM, VISION):
        refused("have 1000 classes, found num_classes 10", spec, num_classes=10)


def test_classes_channels_and_size_asked_for():
    teacher = load_teacher(TIMM, pretrained=False, num_classes=7, input_size=(1, 64, 64))
    assert teacher.model(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    assert teacher.preprocessing == Preprocessing(
        (1, 64, 64), (0.5,), (0.5,), 67, "bilinear"
    )  # the same share as 168 / 160
    assert teacher.views == "pad_crop"
    assert teacher.options == {"num_classes": 7, "in_chans": 1}
    assert load_teacher(TIMM, pretrained=False, in_chans=5).preprocessing.input_size == (5, 160, 160)
    headless = load_teacher(TIMM, pretrained=False, num_classes=0, input_size=(3, 64, 64))
    assert headless.model(torch.zeros(2, 3, 64, 64)).shape == (2, headless.model.num_features)
    assert headless.options["num_classes"] == 0
    refused("in_chans 3 and input_size (4, 32, 32)", TIMM, pretrained=False, in_chans=3, input_size=(4, 32, 32))


def test_overrides():
    said = {"mean": (0.1,) * 3, "std": (0.3,) * 3, "resize": "exact", "interpolation": "nearest", "views": "none"}
    teacher = load_teacher(VISION, pretrained=False, input_size=(3, 32, 48), **said)
    assert teacher.preprocessing == Preprocessing((3, 32, 48), (0.1,) * 3, (0.3,) * 3, None, "nearest")
    assert teacher.views == "none"
    assert load_teacher(VISION, pretrained=False, resize=300).preprocessing.resize == 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": "cifar"}, "found views 'cifar'"),
        ({"num_classes": 0}, "found num_classes 0"),
        ({"num_classes": 2.5}, "found num_classes 2.5"),
        ({"in_chans": 1}, "no other input than 3 channels"),
        ({"input_size": (1, 32, 32)}, "no other input than 3 channels"),
        ({"input_size": (3, 32)}, "three whole numbers"),
        ({"input_size": (3, 0, 32)}, "three whole numbers"),
        ({"mean": (0.5,)}, "mean: found 1 values, expected 3"),
        ({"resize": 10}, "resize: found 10"),
        ({"model_kwargs": {"nonsense": 1}}, "unexpected keyword argument"),
        ({"model_kwargs": {"weights": "DEFAULT"}}, "which load files"),
        ({"model_kwargs": {"x": torch.nn}}, "not plain JSON"),
    ],
)
def test_options_that_are_refused(options, words):
    refused(words, VISION, pretrained=False, **options)


# Weights


@pytest.fixture(scope="module")
def shuffle() -> nn.Module:
    return load_teacher(VISION, pretrained=False).model


def filled(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: torch.full_like(v, 2) for k, v in model.state_dict().items()}


def holds_twos(model: nn.Module) -> bool:
    return all((v == 2).all() for v in model.state_dict().values())


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, None),
        (lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}, "'state_dict'"),
        (lambda s: {"model": s, "optimizer": [1]}, "'model'"),
        (lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()}, "wrappers (_orig_mod, module)"),
        (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, "torch.float16 to float32"),
        (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, None),
    ],
)
def test_weights_as_people_save_them(tmp_path, shuffle, wrap, note):
    torch.save(wrap(filled(shuffle)), tmp_path / "w.pth")
    teacher = load_teacher(VISION, weights=tmp_path / "w.pth")
    values = {k: v for k, v in teacher.model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert all((v == 2).all() and v.dtype == torch.float32 for v in values.values())
    assert (not teacher.notes) if note is None else any(note in n for n in teacher.notes)


def test_safetensors_whatever_the_name(tmp_path, shuffle):
    save_file(filled(shuffle), tmp_path / "w.pth")
    assert holds_twos(load_teacher(VISION, weights=tmp_path / "w.pth").model)


def test_weights_of_auxiliary_heads_are_left_out(tmp_path, shuffle):
    extra = {"aux1.conv.weight": torch.zeros(1), "AuxLogits.fc.weight": torch.zeros(1)}
    torch.save({**filled(shuffle), **extra}, tmp_path / "w.pth")
    teacher = load_teacher(VISION, weights=tmp_path / "w.pth")
    assert holds_twos(teacher.model)
    assert teacher.notes == ["2 tensor(s) in “w.pth” are not used: aux1 (1), AuxLogits (1)"]


def test_published_densenets_have_older_names(tmp_path):
    block = nn.Module()
    block.denselayer1 = nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})
    older = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in filled(block).items()}
    assert not older.keys() & block.state_dict().keys()
    torch.save(older, tmp_path / "w.pth")
    load_weights(block, tmp_path / "w.pth", "any", [])
    assert holds_twos(block)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv1.0.weight": None}, "the first: conv1.0.weight is missing"),
        ({"conv1.1.bias": torch.zeros(5)}, "conv1.1.bias has shape (5,), expected (24,)"),
        ({"new": torch.zeros(1)}, "1 difference(s) (338 tensors expected, 339 found); the first: new is not expected"),
        ({"fc.bias": torch.zeros(1000, dtype=torch.int8)}, "fc.bias is torch.int8, expected torch.float32"),
        ({"fc.bias": torch.zeros(7), "fc.weight": torch.zeros(7, 1024)}, "build it with --num-classes 7"),
        ({"conv1.0.weight": None, "fc.bias": None}, "2 difference(s) (338 tensors expected, 336 found)"),
        ({"conv5.1.running_var": torch.full((1024,), float("nan"))}, "conv5.1.running_var holds 1024 NaN"),
    ],
)
def test_weights_of_another_network(tmp_path, shuffle, change, words):
    torch.save({k: v for k, v in {**filled(shuffle), **change}.items() if v is not None}, tmp_path / "w.pth")
    refused(words, VISION, weights=tmp_path / "w.pth", kind=(InputError, UnsupportedModel))


def test_a_torchscript_program_is_refused_with_the_reason(tmp_path):
    torch.jit.script(nn.Conv2d(3, 4, 3)).save(tmp_path / "program.pt")
    refused("a TorchScript program or other objects, which run code", VISION, weights=tmp_path / "program.pt")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_file_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.0.weight": Bomb()}, "w.pth")
    refused("loading the weights w.pth", VISION, weights="w.pth")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged, or neither"),
        (b"hello, world", "damaged, or neither"),
        (b"12345678{nothing", "damaged, or neither"),
        ([1, 2], "expected a state dict"),
        ({}, "expected a state dict"),
        ({"a": 3}, "found a mapping with ['a']"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, words):
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert str(path) in refused(words, VISION, weights=path)


def test_weights_that_are_not_there(tmp_path):
    refused("there is no file", VISION, weights=tmp_path / "none.pth")
    refused("there is no file", VISION, weights=tmp_path)


def test_video_networks_take_clips_whose_frames_are_prepared_as_their_weights_ask():
    teacher = load_teacher("torchvision:r3d_18", pretrained=False)
    assert teacher.preprocessing.input_size == (3, 112, 112)
    assert teacher.preprocessing.resize == 128
    assert teacher.preprocessing.mean == pytest.approx((0.43216, 0.394666, 0.37645))
    assert inputs_of(teacher.model, None) == Inputs(1)


# Own teachers


def test_own_teacher_by_the_stated_contract(own):
    before = list(sys.path)
    teacher = load_teacher(f"{own}:plain")
    assert (
        teacher.preprocessing
        == OWN_PREPROCESSING
        == Preprocessing((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert (teacher.views, teacher.notes, teacher.model.training) == ("imagenet", [], False)
    assert sys.path == before
    assert type(teacher.model).__module__ == "mimicut_teacher_own"


_NET = "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))\n"
_LATE = "def build():\n    from {name} import make\n    return make()\n"
_PATHS = {  # what a file does so that its function finds a package in lib/
    "appends": "import os, sys\nsys.path.append(os.path.join(os.path.dirname(__file__), 'lib'))\n",
    "inserts": "import pathlib, sys\nsys.path.insert(0, str(pathlib.Path(__file__).parent / 'lib'))\n",
    "imports one that appends": "import {name}_paths\n",
    "in the function": "",
}


@pytest.mark.parametrize("how", _PATHS)
def test_a_file_that_adds_to_the_search_path_and_imports_in_its_function(tmp_path, how):
    name = f"late_{'_'.join(how.split())}"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / f"{name}.py").write_text(_NET)
    (tmp_path / f"{name}_paths.py").write_text(_PATHS["appends"])
    late = _LATE if how != "in the function" else _LATE.replace("from", "import {name}_paths\n    from", 1)
    (tmp_path / "net.py").write_text((_PATHS[how] + late).format(name=name))
    before = list(sys.path)
    for _ in range(2):  # the second time, what it imports is there and does not run again
        assert isinstance(load_teacher(f"{tmp_path}/net.py:build").model[0], torch.nn.Conv2d)
        assert sys.path == before
        sys.modules.pop(name)


class _Wrapper:
    """Such as a pipeline. held: its attributes."""

    def __init__(self, **held):
        self.name, self.count = "wrapper", 3
        vars(self).update(held)


class _Trainer(torch.nn.Module):
    """Such as a module of Lightning without a forward, or a YOLO: methods of torch's mean something else."""

    def __init__(self, net):
        super().__init__()
        self.net, self.loss = net, torch.nn.CrossEntropyLoss()

    def training_step(self, batch):
        return self.loss(self.net(batch[0]), batch[1])

    def train(self, *args, **kwargs):
        raise AssertionError("it would train")

    def __deepcopy__(self, memo):
        raise AssertionError("it holds what cannot be copied")


def _net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda net: _Wrapper(model=net, framework="pt"), ["_Wrapper", "'model'"]),
        (lambda net: _Wrapper(network=net, same=net, loss=torch.nn.MSELoss()), ["_Wrapper", "'network'"]),
        (_Trainer, ["_Trainer", "'net'"]),
        (lambda net: _Wrapper(trainer=_Trainer(net)), ["_Wrapper", "'trainer'", "_Trainer", "'net'"]),
    ],
    ids=["a pipeline", "twice", "a trainer", "nested"],
)
def test_the_network_inside_an_object_is_taken_with_a_note(wrap, taken, tmp_path):
    net = _net()
    teacher = own_teacher(wrap(net))
    assert torch.equal(teacher.model[0].weight, net[0].weight)
    assert teacher.model is not net
    assert all(word in " ".join(teacher.notes) for word in taken)
    built = call_builder(lambda: wrap(net), "a builder", {})
    assert built.model is net
    assert built.notes == teacher.notes


def test_an_object_that_holds_several_networks_names_them():
    with pytest.raises(InputError, match=r"a _Wrapper, which holds 2 networks: unet \(Sequential\), vae \(Conv2d\)"):
        own_teacher(_Wrapper(unet=_net(), vae=torch.nn.Conv2d(1, 1, 1)))
    with pytest.raises(InputError, match=r"found a _Wrapper, expected an nn.Module, or an object that holds one"):
        own_teacher(_Wrapper())


def test_a_module_with_a_forward_of_its_own_is_the_network_itself():
    outer = torch.nn.Module()
    outer.net = _net()
    outer.forward = outer.net.forward
    for model in (torch.nn.Sequential(_net()), outer):
        assert own_teacher(model).notes == []


def test_own_teacher_with_its_own_preprocessing(own):
    teacher = load_teacher(f"{own}:with_dict")
    assert teacher.preprocessing == Preprocessing((1, 32, 32), (0.5,), (0.2,))
    assert teacher.views == "patches"
    assert load_teacher(f"{own}:with_dict", views="none", mean=(0.3,)).preprocessing.mean == (0.3,)
    assert load_teacher(f"{own}:plain", input_size=(3, 32, 32)).views == "pad_crop"


def test_own_teacher_takes_classes_and_channels(own):
    teacher = load_teacher(f"{own}:sized", num_classes=4, in_chans=2)
    assert teacher.model.fc.out_features == 4
    assert teacher.preprocessing.input_size == (2, 224, 224)
    refused("called with {'num_classes': 4}: TypeError", f"{own}:plain", num_classes=4)


def test_importable_module(own, monkeypatch):
    monkeypatch.chdir(Path(own).parent)
    assert load_teacher("own:plain").spec == "own:plain"
    refused("No module named 'nowhere'", "nowhere.net:build")


@pytest.mark.parametrize(("name", "note"), [("half", "torch.float16"), ("double", "torch.float64")])
def test_other_precision_becomes_float32(own, name, note):
    teacher = load_teacher(f"{own}:{name}")
    assert {t.dtype for t in teacher.model.parameters()} == {torch.float32}
    assert not teacher.model.training
    assert teacher.notes == [f"converted from {note} to float32"]


@pytest.mark.parametrize(("name", "note"), [("wrapped", "DataParallel"), ("compiled", "torch.compile")])
def test_wrappers_are_taken_off(own, name, note):
    teacher = load_teacher(f"{own}:{name}")
    assert type(teacher.model).__name__ == "Net"
    assert note in teacher.notes[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("meta", "conv.weight is on the meta device"),
        ("lazy", "0.weight has no shape yet"),
        ("infinite", "norm.running_var holds 1 NaN or infinite"),
        ("empty", "ReLU has no parameters"),
    ],
)
def test_models_that_are_refused(own, name, words):
    refused(words, f"{own}:{name}", kind=UnsupportedModel)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own.py:raises", "ValueError: of course ("),
        ("own.py:leaves", "SystemExit: 3"),
        ("own.py:nothing", "returned a NoneType, expected an nn.Module"),
        ("own.py:three", "returned a tuple of ['Net', 'int', 'int']"),
        ("own.py:bad_dict", "found size"),
        ("own.py:bad_views", "found views 'cifar'"),
        ("own.py:CONSTANT", "found no function 'CONSTANT'"),
        ("own.py:nothere", "expected one of its own: Net, plain"),
        ("quits.py:f", "SystemExit: 2"),
        ("wrong.py:f", "SyntaxError"),
        ("absent.py:f", "there is no file"),
    ],
)
def test_builders_that_are_refused(own, name, words):
    modules = set(sys.modules)
    said = refused(words, str(Path(own).parent / name))
    assert name.split(":")[0] in said
    assert name.startswith("own") or not {m for m in set(sys.modules) - modules if "quits" in m or "wrong" in m}


def test_a_module_in_hand_stays_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half().train()
    teacher = own_teacher(net, Preprocessing((3, 16, 16), (0,) * 3, (1,) * 3))
    assert net.training
    assert net[0].weight.dtype == torch.float16
    assert not teacher.model.training
    assert teacher.model[0].weight.dtype == torch.float32
    assert teacher.views == "pad_crop"
    assert teacher.spec == "module"
    with pytest.raises(InputError, match="found a int"):
        own_teacher(3)


# Building again


@pytest.mark.parametrize(
    ("spec", "options"),
    [(TIMM, {"num_classes": 7, "in_chans": 1}), (VISION, {"num_classes": 3}), ("torchvision:googlenet", {})],
)
def test_the_record_builds_the_same_architecture(spec, options):
    teacher = load_teacher(spec, pretrained=False, **options)
    built = build_architecture(json.loads(json.dumps(teacher.to_json())))
    shapes = [{k: (v.shape, v.dtype) for k, v in m.state_dict().items()} for m in (teacher.model, built)]
    assert shapes[0] == shapes[1]
    assert type(built) is type(teacher.model)
    assert not built.training
    if "googlenet" in spec:
        assert built.aux1 is None
        assert built.transform_input
        assert teacher.model.transform_input


def test_building_again_needs_no_network_nor_weights(monkeypatch):
    record = {"spec": TIMM, "options": {}}
    monkeypatch.setattr(timm_models, "_weights_source", lambda *a: pytest.fail("weights were asked for"))
    assert not build_architecture(record).training


def test_a_result_whose_onnx_file_was_moved_says_what_to_name(tmp_path):
    record = {"spec": f"onnx:{tmp_path}/net.onnx", "options": {}}
    with pytest.raises(InputError, match=r"there is no file .*net\.onnx, .*say where it is: --teacher onnx:FILE"):
        load_again(record)
    with pytest.raises(InputError, match=r"there is no file .*other\.onnx; check the path"):
        load_again(record, f"onnx:{tmp_path}/other.onnx")


def test_code_named_in_a_folder_is_never_run(own, tmp_path):
    (tmp_path / "spy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef build(): pass\n")
    for spec in (f"{tmp_path}/spy.py:build", "module", "os:getcwd"):
        with pytest.raises(InputError, match="never run from a folder"):
            build_architecture({"spec": spec})
    assert not (tmp_path / "ran").exists()
    record = load_teacher(f"{own}:sized", num_classes=4).to_json()
    assert build_architecture(record, f"{own}:sized").fc.out_features == 4
    assert build_architecture({"spec": "module"}, lambda: nn.Linear(2, 3)).out_features == 3


@pytest.mark.parametrize("kwargs", [{"checkpoint_path": "x"}, {"pretrained": True}, {"pretrained_cfg": {"file": "x"}}])
def test_a_folder_cannot_make_the_builder_read_files(kwargs):
    with pytest.raises(InputError, match="which load files"):
        build_architecture({"spec": TIMM, "options": {"model_kwargs": kwargs}})


def test_demo_teachers(monkeypatch):
    demo = type(sys)("mimicut.demo.teacher_networks")
    demo.PREPROCESSING = Preprocessing((1, 32, 32), (0,), (1,)).to_json()
    demo.load = lambda name: (nn.Linear(2, 3), demo.PREPROCESSING)
    demo.build = lambda name: nn.Linear(2, 5)
    demo.preprocessing, demo.CLASSES, demo.OTHER_TASKS = lambda name: demo.PREPROCESSING, ("a", "b", "c"), {}
    monkeypatch.setitem(sys.modules, "mimicut.demo.teacher_networks", demo)
    teacher = load_teacher("demo:any")
    assert teacher.model.out_features == 3
    assert teacher.views == "patches"
    assert teacher.classes == ("a", "b", "c")
    assert teacher.preprocessing.input_size == (1, 32, 32)
    assert build_architecture(teacher.to_json()).out_features == 5


def test_infinities_in_a_mask_are_no_damage():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    assert own_teacher(Masked()).model.mask.isinf().sum() == 3
    broken = Masked()
    broken.mask[0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match="mask holds 1 NaN"):
        own_teacher(broken)
