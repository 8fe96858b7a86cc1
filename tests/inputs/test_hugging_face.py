"""Teachers of transformers: small stand-ins with random weights, saved and built here; nothing is downloaded."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import mimicut as us
from mimicut.base.errors import InputError
from mimicut.inputs import built_model
from mimicut.inputs.image_set import read_images
from mimicut.inputs.teacher import build_architecture
from mimicut.proof.randomised import randomised
from mimicut.results.teachers import load_teacher
from mimicut.workflow.verify import verify_folder

pytestmark = pytest.mark.long  # minutes: make test-all

SIZE = {"height": 32, "width": 32}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SEGFORMER = {
    "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 64,
}  # fmt: skip
DETR = {
    "backbone_config": {**RESNET, "model_type": "resnet", "out_features": ["stage3", "stage4"]}, "d_model": 16,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
# class -> its configuration, and what else to tell
FAMILIES = {
    "ViTForImageClassification": (VIT, {}),
    "DeiTForImageClassification": (VIT, {}),
    "SwinForImageClassification": (
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32}, {},
    ),
    "ConvNextV2ForImageClassification": ({"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}, {}),
    "ResNetForImageClassification": (RESNET, {}),
    "SegformerForSemanticSegmentation": (SEGFORMER, {}),
    "DetrForObjectDetection": (DETR, {"part": "model.backbone.model"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise built_model.urllib.error.URLError("no network in tests")

    monkeypatch.setattr(built_model.urllib.request, "urlopen", refuse)


@pytest.fixture
def saved(tmp_path):
    """A folder as save_pretrained leaves it, and the model in it."""
    model = randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=5)))
    model.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size=SIZE, resample=3, image_mean=[0.5] * 3).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", model


def images(count=10, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def refused(match, spec, **kwargs):
    with pytest.raises(InputError) as caught:
        load_teacher(spec, **kwargs)
    assert match in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_are_cut_mimicked_and_loaded_again(name, tmp_path):
    options, more = FAMILIES[name]
    teacher = load_teacher(f"hf:{name}", pretrained=False, model_kwargs=options, input_size=(3, 32, 32), **more)
    randomised(teacher.model)
    config = us.MimicConfig(steps=1, views="none", lr=1e-4)
    result = us.compress(teacher, images(), keep=0.7, folder=tmp_path / "small", config=config)
    assert type(result.model).__name__ == name
    assert result.report.macs_student <= 0.7 * result.report.macs_teacher
    assert result.report.config["cut_equals_zero"]["error"] <= 1e-10
    assert (result.report.top1_agreement is not None) == name.endswith("ImageClassification")
    assert result.report.feature_error_relative > 0
    again = us.load(tmp_path / "small")
    with torch.no_grad():
        wanted, found = ([v for v in m(images()).values() if v is not None] for m in (result.model, again))
    assert len(wanted) == len(found) > 0
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True) if isinstance(a, torch.Tensor))


def test_a_folder_gives_its_own_model_and_preprocessing(saved):
    folder, model = saved
    teacher = load_teacher(f"hf:{folder}")
    assert type(teacher.model) is transformers.ViTForImageClassification
    with torch.no_grad():
        assert torch.equal(teacher.model(images()).logits, model(images()).logits)
    assert teacher.preprocessing == us.Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, None, "bicubic")
    assert teacher.options["config"]["num_hidden_layers"] == 2
    assert json.loads(json.dumps(teacher.to_json())) == teacher.to_json()
    assert not teacher.notes
    assert "hub" not in teacher.options
    bare = load_teacher(f"hf:{folder}", pretrained=False)
    assert not torch.equal(bare.model.classifier.weight, model.classifier.weight)


def test_an_id_is_taken_from_the_cache(saved, tmp_path, monkeypatch):
    folder, model = saved
    place = tmp_path / "hub" / "models--some--vit"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123")
    shutil.copytree(folder, place / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_teacher("hf:some/vit", pretrained=False).options["hub"] is False
    teacher = load_teacher("hf:some/vit")
    assert teacher.options["hub"] is True
    assert torch.equal(teacher.model.classifier.weight, model.classifier.weight)
    assert teacher.preprocessing.interpolation == "bicubic"
    assert not teacher.notes


def test_a_result_needs_neither_the_folder_nor_the_network(saved, tmp_path):
    folder, _ = saved
    config = us.MimicConfig(steps=1, views="none")
    result = us.compress(load_teacher(f"hf:{folder}"), images(), keep=0.7, folder=tmp_path / "small", config=config)
    pictures = tmp_path / "labelled"
    for name in "abcde":
        (pictures / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), name.encode()[0] * 3).save(pictures / name / "one.png")
    report = verify_folder(tmp_path / "small", images(), labelled=pictures)
    assert report.images_labelled == 5
    assert report.images_held_out == 10
    assert 0 <= report.top1_agreement <= 1
    shutil.rmtree(folder)
    with torch.no_grad():
        torch.save({"given": images(), "wanted": result.model(images()).logits}, tmp_path / "pair.pt")
    code = (
        "import sys, socket, torch, mimicut\n"
        "torch.set_num_threads(1)\n"
        "def refuse(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "pair = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): found = mimicut.load(sys.argv[1])(pair['given']).logits\n"
        "assert torch.equal(found, pair['wanted'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "pair.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr


def test_a_result_is_exported_as_files_that_need_no_transformers(saved):
    folder, _ = saved
    small = folder.parent / "small"
    config = us.preset("default", steps=1, views="none")
    report = us.compress(
        load_teacher(f"hf:{folder}"), images(), keep=0.7, folder=small, config=config, export_to=["pt2", "onnx"]
    ).report
    assert max(report.exports["pt2"]["error_real"], report.exports["onnx"]["error_real"]) < 1e-4
    code = (
        "import sys, torch\nmodel = torch.export.load('model.pt2').module()\n"
        "print(list(model(torch.zeros(3, 3, 32, 32))), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=small, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['logits'] False"


def test_classes_and_channels_asked_for(saved):
    teacher = load_teacher(
        "hf:ViTForImageClassification", pretrained=False, model_kwargs=VIT, num_classes=7, in_chans=1
    )
    assert teacher.model(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 7)
    assert teacher.preprocessing.input_size == (1, 32, 32)
    again = build_architecture(teacher.to_json())
    assert again(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 7)
    refused("have 5 classes, found num_classes 6", f"hf:{saved[0]}", num_classes=6)


def test_without_a_preprocessor_the_assumption_is_reported(saved):
    (saved[0] / "preprocessor_config.json").unlink()
    teacher = load_teacher(f"hf:{saved[0]}")
    assert teacher.preprocessing == us.Preprocessing((3, 32, 32), built_model.IMAGENET_MEAN, built_model.IMAGENET_STD)
    assert any("are assumed" in note for note in teacher.notes)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.ViTImageProcessor(size=SIZE),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8),
        transformers.SegformerImageProcessor(size=SIZE),
        transformers.ViTImageProcessor(size=SIZE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3),
        transformers.ViTImageProcessor(size=SIZE, do_normalize=False),
        transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=SIZE, resample=2),
    ],
    ids=["vit", "convnext", "segformer", "rescaled", "plain", "cropped"],
)
def test_images_are_prepared_as_their_own_processor_does(saved, tmp_path, processor):
    folder, _ = saved
    processor.save_pretrained(folder)
    y, x, channel = torch.meshgrid(torch.arange(60), torch.arange(80), torch.arange(3), indexing="ij")
    picture = Image.fromarray((y * 2 + x + channel * 20).to(torch.uint8).numpy())
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "ramp.png")
    wanted = processor(picture, return_tensors="pt")["pixel_values"]
    found = read_images(tmp_path / "pictures", load_teacher(f"hf:{folder}").preprocessing).batch([0])
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 0.03  # one or two of 255 steps, in units of std


def test_what_is_refused(saved, tmp_path, monkeypatch):
    folder, _ = saved
    refused("ViTForImageClassification", "hf:ViTForImageClasification", pretrained=False)
    refused("there is no such folder", "hf:./nowhere/at/all")
    refused("has no weights; use --weights FILE or --no-pretrained", "hf:ViTForImageClassification")
    refused("give hf:FOLDER", "hf:nobody/has-this")
    refused("no network in tests", "hf:nobody/has-this", pretrained=False)
    refused("no_such_option", "hf:ViTForImageClassification", pretrained=False,
            model_kwargs={"hidden_size": 30, "no_such_option": 1})  # fmt: skip
    (tmp_path / "empty").mkdir()
    refused("no config.json", f"hf:{tmp_path / 'empty'}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["Evil"], "auto_map": {"AutoModel": "x.Evil"}})
    )
    refused("'Evil', expected a class of transformers (code from elsewhere is never run", f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "classifier.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    refused("lack 1 tensor(s) of ViTForImageClassification (first: classifier.weight)", f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    refused("model.safetensors", f"hf:{folder}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("pip install 'mimicut[hf]'", f"hf:{folder}")


def test_no_code_comes_with_a_configuration(saved, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run code"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    strange = {**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(strange))
    refused("hf:", f"hf:{folder}")
    assert not (folder / "ran").exists()
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    assert load_teacher(f"hf:{folder}").model.config._attn_implementation == "sdpa"
    record = load_teacher(f"hf:{folder}").to_json()
    record["options"]["config"]["text_config"] = {"_attn_implementation": "somebody/kernel"}
    with pytest.raises(InputError, match="may be code from elsewhere"):
        build_architecture(record)


def test_own_weights_go_into_a_class(saved):
    folder, model = saved
    torch.save(model.state_dict(), folder / "own.pt")
    options = {"model_kwargs": VIT, "num_classes": 5, "weights": folder / "own.pt"}
    teacher = load_teacher("hf:ViTForImageClassification", **options)
    assert torch.equal(teacher.model.classifier.weight, model.classifier.weight)
