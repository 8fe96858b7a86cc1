"""Publishing and fetching through `huggingface_hub`, with a stand-in of the hub on this machine."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from command_line import call
from PIL import Image

import mimicut
from mimicut.base.errors import InputError, StoreError
from mimicut.inputs import extra_images, weights
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.proof import image_check
from mimicut.proof.image_check import ImageCheck
from mimicut.results.files import read_json
from mimicut.results.store import read

hub_module = import_module("mimicut.results.hub")
TREE = "f" * 40  # what stands for every commit


class StandIn(BaseHTTPRequestHandler):
    """What the client asks of a hub: make a repository, say how files are sent, take a commit, list, send files."""

    files: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    requests: list[str]

    def log_message(self, *args):
        pass

    def answer(self, data: bytes, code: int = 200, **headers: str):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": TREE, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, data, code: int = 200, **headers: str):
        self.answer(json.dumps(data).encode(), code, Content_Type="application/json", **headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name.startswith("nobody/"):
                return self.json({"error": "You don't have the rights"}, 403)
            if name not in self.files:
                self.files[name], self.private[name] = {}, asked.get("private") or asked.get("visibility") == "private"
            return self.json({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            sent = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.json({"files": sent})
        found = re.fullmatch(r"/api/models/(.+/.+)/commit/main", self.path.partition("?")[0])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del self.files[found[1]][line["value"]["path"]]
        self.json({"commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{TREE}", "commitOid": TREE})

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.requests.append(path)
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        if asked is not None and asked[1] in self.files:
            return self.json({"id": asked[1], "private": self.private[asked[1]], "siblings": [], "tags": []})
        listed = re.fullmatch(r"/api/models/(.+/.+)/(revision|tree)/.+", path)
        if listed is not None and listed[1] in self.files:
            held = self.files[listed[1]]
            if listed[2] == "tree":
                return self.json(
                    [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in held.items()]
                )
            return self.json({"id": listed[1], "sha": TREE, "siblings": [{"rfilename": n} for n in held], "tags": []})
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if file is not None and file[2] in self.files.get(file[1], {}):
            data = self.files[file[1]][file[2]]
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
        self.json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    kind = type("Hub", (StandIn,), {"files": {}, "private": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants

    for module, name, value in (
        (constants, "ENDPOINT", address),
        (constants, "HF_HUB_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    images = folder / "photos"
    images.mkdir()
    for i in range(7):  # the last two are equal, and one is broken
        pixels = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(min(i, 5)), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"patient-{i}.png")
    (images / "patient-7.png").write_text("no picture")
    config = mimicut.preset("paper", steps=1)
    mimicut.compress("demo:vgg7", images, keep=0.6, config=config, extra=None, folder=folder / "small")
    return folder / "small"


def scores_of_fetched(address, images, tmp_path):
    """What the student gives where another person fetched it: a process that knows the hub by its environment alone."""
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch, mimicut; model = mimicut.from_pretrained('me/small'); torch.set_grad_enabled(False); "
        "found = model(torch.load(sys.argv[1])); torch.save(getattr(found, 'logits', found), sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "images.pt", tmp_path / "scores.pt"], check=True,
        env=os.environ | {"HF_ENDPOINT": address.removesuffix("/me/small"), "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    return torch.load(tmp_path / "scores.pt")


def test_what_is_published_loads_bit_equal_and_says_what_it_is(hub, result, tmp_path):
    address = mimicut.push_to_hub(result, "me/small")
    assert address.endswith("/me/small")
    own = mimicut.load(result)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores_of_fetched(address, images, tmp_path), own(images))
    fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"plan.json", "weights.safetensors", "report.json"}
    published = hub.files["me/small"]
    _, head, text = published["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["library_name"] == "mimicut"
    assert card["pipeline_tag"] == "image-classification"
    assert 'mimicut.from_pretrained("me/small")' in text
    assert "What held-out images prove" in text
    config = json.loads(published["config.json"])
    assert config["teacher"] == "demo:vgg7"
    assert config["figures"]["macs_student"] == read_json(result / "report.json")["macs_student"]
    # The pages of a folder that was fetched whole are those of a result.
    whole = tmp_path / "whole"
    whole.mkdir()
    for name, data in published.items():
        (whole / name).write_bytes(data)
    assert torch.equal(next(mimicut.load(whole).parameters()), next(own.parameters()))


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.long
@pytest.mark.parametrize(
    ("spec", "options"),
    [("timm:resnet10t", {}), ("hf:ViTForImageClassification", VIT | {"image_size": 32, "patch_size": 8})],
)
def test_a_student_of_a_library_loads_in_one_line(spec, options, hub, tmp_path):
    teacher = mimicut.load_teacher(spec, pretrained=False, model_kwargs=options, input_size=(3, 32, 32))
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = mimicut.preset("paper", steps=1)
    made = mimicut.compress(teacher, images, keep=0.6, config=config, extra=None, folder=tmp_path / "small")
    address = mimicut.push_to_hub(tmp_path / "small", "me/small")
    shutil.rmtree(tmp_path / "small")
    own = made.model(images)
    assert torch.equal(scores_of_fetched(address, images, tmp_path), getattr(own, "logits", own))


def test_pictures_and_names_of_files_stay_at_home(hub, result):
    named = read_json(result / "report.json")["disagreements"]
    assert named
    assert named[0]["image"].startswith("patient-")
    notes = read_json(result / "report.json")["notes"]
    assert sum("patient-" in note for note in notes) >= 2
    before = {path.name: path.read_bytes() for path in result.iterdir()}
    mimicut.push_to_hub(result, "me/small")
    for name, data in hub.files["me/small"].items():
        assert not [word for word in (b"patient-", b"data:image", b"photos") if word in data], name
    assert "run.toml" not in hub.files["me/small"]
    published = json.loads(hub.files["me/small"]["report.json"])["notes"]
    assert "1 image(s) skipped, because they could not be read: name left out" in published
    assert len(published) == len(notes)
    assert {path.name: path.read_bytes() for path in result.iterdir()} == before


@pytest.mark.parametrize(
    "note",
    [
        "only 5 held-out image(s): even if the student agrees on all of them, they prove an agreement of no more than "
        "48%",
        "compared with the file on 2 random images: 8.6e-08 of the largest output",
        "only 7 image(s): enough to run, too few to prove much about the result",
        "3 image(s) smaller than the teacher's 32x32: enlarged; the smallest is 16x16",
        "2 held-out image(s) trained the teacher, so they are weaker evidence; hold out other images (--held-out)",
        "the teacher names 2 of its 5 classes for none of the images, so nothing shows how the student answers there: "
        "1, 4",
        "the teacher's first batch norm is given a mean 1.2 standard deviations off: check --mean and --std, and that "
        "the images are of its kind",
        "stopped after 3 of 9 steps: no time",
        "the teacher is itself a result, made from timm:resnet18: figures are against it",
        "weights converted from float16 to float32",
    ],
)
def test_notes_without_names_are_published_as_they_are(note):
    assert hub_module._unnamed(note) == note
    assert hub_module._unnamed(f"held out: {note}") == f"held out: {note}"


SECRET = "Anna: (“7”) x"  # of a file; without a suffix, and with all that a sentence has


def notes_with_names(folder):
    """The notes of all that write names of files into them, where every file is called SECRET."""
    pictures, pixels = folder / "pictures", np.arange(24 * 24 * 3).reshape(24, 24, 3).astype(np.uint8)
    pictures.mkdir()
    for number in range(3):
        Image.fromarray(pixels).save(pictures / f"{SECRET}{number}", "PNG")
        (pictures / f"{SECRET}{number}.jpg").write_text("no picture")
        (pictures / f"{SECRET}{number}.txt").write_text("no picture")
    prepared = Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3)
    images = mimicut.read_images(pictures, prepared)
    yield from images.notes
    pairs = tuple((name, SECRET) for name in images.names)
    found = ImageCheck(tuple(images.names), pairs, pairs, (), tuple(images.names), tuple(images.names))
    yield from image_check._notes(found, images, images, 0.0, 1.0)
    yield from image_check.held_out_notes(images, pairs)
    tensors = {"ema.a": torch.zeros(1), "other": torch.zeros(1)}
    yield from weights._remarks(Path(folder, SECRET), "model", ["ema"], (), tensors, ("a",))
    with mock.patch.object(extra_images, "MOST", 1):
        (folder / SECRET).mkdir()
        for number in range(3):
            Image.fromarray(pixels).save(folder / SECRET / f"{number}.png")
        source = [str(folder / SECRET), str(folder / SECRET)]
        yield from (f"extra images: {note}" for note in extra_images._read(source, prepared, False, 0, 10**6)[0].notes)


def test_every_note_with_names_of_files_is_published_without_them(tmp_path):
    notes = list(notes_with_names(tmp_path))
    named = [note for note in notes if "Anna" in note or str(tmp_path) in note]
    assert len(named) == 13
    for note in named:
        text = hub_module._unnamed(note)
        assert text
        assert not [word for word in ("Anna", "7", "pictures/", str(tmp_path), "“") if word in text], text
    published = [hub_module._unnamed(note) for note in notes]
    for text in (
        "3 image(s) skipped, because they could not be read: names left out",
        "3 other file(s) in the folder ignored: names left out",
        "2 image(s) equal in pixels to another (names left out)",
        "3 of 3 images are blank (one flat colour): names left out",
        "the teacher is undecided on 3 of 3 images (entropy above 90% of the maximum): names left out",
        "3 of 3 held-out images are near-duplicates of another held-out image; the interval counts each of them, so it "
        "is narrower than it should be: names left out",
        "1 tensor(s) of the file of weights are not used: other (1)",
        "the file of weights also holds an average of them over the training, which often answers better, 'ema'",
        "extra images: 1 of the 6 pictures are used",
    ):
        assert text in published, published


@pytest.mark.parametrize(
    ("note", "published"),
    [  # of earlier releases, which had no quotes
        ("2 other file(s) in the folder ignored: Anna.txt, b.pdf", "2 other file(s) in the folder ignored"),
        ("held out: 1 image(s) skipped, because they could not be read: Anna: HEIC is not read; convert it to JPEG",
         "held out: 1 image(s) skipped, because they could not be read"),
        ("3 image(s) equal in pixels to another (IM0001 = IM0002, ...)", "3 image(s) equal in pixels to another"),
        ("2 of 9 held-out images are near-duplicates of another held-out image; the interval counts each of them, so "
         "it is narrower than it should be: IM01 like “IM02”, ...",
         "2 of 9 held-out images are near-duplicates of another held-out image; the interval counts each of them, so "
         "it is narrower than it should be"),
        ("1 of 9 images are blank (one flat colour): IM01", "1 of 9 images are blank"),
        ("the features of 1 of 9 images are outliers: IM01", "the features of 1 of 9 images are outliers"),
        ("pictures/anna.jpg is gone", ""),
        ("weights in acme clinic.pth converted from float16 to float32", "weights converted from float16 to float32"),
        ("weights taken from 'model' in acme clinic", "weights taken from 'model'"),
        ("2 tensor(s) in w.pth are not used: aux1 (1), AuxLogits (1)",
         "2 tensor(s) of the file of weights are not used: aux1 (1), AuxLogits (1)"),
        ("acme.bin also holds other weights, 'b': --weights /home/acme.bin:b takes those",
         "the file of weights also holds other weights, 'b'"),
        ("the table of positions in acme.bin is interpolated to another size of images",
         "the table of positions is interpolated to another size of images"),
        ("the teacher is itself a result, made from hf:clients/acme: figures are against it",
         "the teacher is itself a result, made from another network: figures are against it"),
        ("acme was saved by an earlier release, without a digest of its plan: an edit would go unnoticed",
         "the result was saved by an earlier release, without a digest of its plan: an edit would go unnoticed"),
        ("extra images: 2,000 of the 5,000 pictures in acme are used",
         "extra images: 2,000 of the 5,000 pictures are used"),
        ("fetched with the weights of acme: see acme.safetensors", "fetched with the weights of acme"),
    ],
)  # fmt: skip
def test_notes_of_earlier_releases_are_published_without_names_of_files(note, published):
    assert hub_module._unnamed(note) == published


def test_reasons_are_published_without_names_of_files(result, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(result, copy)
    data = read_json(copy / "report.json")
    row = {"name": "student", "ms": 1.0, "share": 1.0, "bytes": 1, **dict.fromkeys(
        ("top1_agreement", "top1_agreement_low", "top1_agreement_high", "feature_error_relative"))}  # fmt: skip
    data["int8"] = {
        "runtime": "onnxruntime", "threads": 1, "batch": 1, "images": 1, "images_quantised_by": 1, "rows": [row],
        "without_teacher": "loading onnx:/tmp/secret_client/net.onnx: there is no file",
        "mimic": {"failed": "the file has a fixed batch size: /tmp/secret_client/net.py does not trace"},
    }  # fmt: skip
    data["alternatives"] = [{**row, "seconds": 1.0, "failed": "reading secret_client again: it changed"}]
    (copy / "report.json").write_text(json.dumps(data))
    files = hub_module.published(copy, "me/small")
    texts = {name: value.decode() for name, value in files.items() if isinstance(value, bytes)}
    assert not [name for name, text in texts.items() if "secret_client" in text]
    table = json.loads(texts["report.json"])["int8"]
    assert table["without_teacher"] == "it could not be loaded"
    assert table["mimic"]["failed"] == "the file has a fixed batch size"
    assert "Without the teacher: it could not be loaded" in texts["report.html"]


def test_a_base_model_is_one_whose_weights_are_from_the_hub(result):
    plan, report, _ = read(result)
    for options, base in (({"hub": True}, "me/vit"), ({"hub": False}, None), ({}, None)):
        named = replace(plan, teacher={**plan.teacher, "source": {"spec": "hf:me/vit", "options": options}})
        head = yaml.safe_load(hub_module.card(report, named, "me/small").split("---\n")[1])
        assert head.get("base_model") == base


def test_a_hub_that_refuses_is_one_sentence(hub, result, tmp_path):
    with pytest.raises(
        StoreError, match=r"publishing .*small: the hub, or its client on this machine, says: .*403.*logged in"
    ):
        mimicut.push_to_hub(result, "nobody/small")
    with pytest.raises(StoreError, match=r"fetching me/absent: the hub, or its client on this machine, says: .*404"):
        mimicut.from_pretrained("me/absent")
    for name in ("small", "me/", "me/small/more", "me/sm all"):
        with pytest.raises(InputError, match="publishing"):
            mimicut.push_to_hub(result, name)
    with pytest.raises(StoreError, match=r"plan\.json"):
        mimicut.push_to_hub(tmp_path, "me/small")


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("timm:resnet18", "timm:resnet18"), ("hf:clients/vit", "hf:vit"), ("hf:/home/ann/vit", "hf:vit"),
        ("timm:local-dir:/home/ann/acme", "timm:local-dir:acme"), ("hf:ViTModel", "hf:ViTModel"),
        ("onnx:/home/ann/acme/model.onnx", "onnx:model.onnx"), ("/home/ann/net.py:build", "net.py:build"),
        ("module", "module"),
    ],
)  # fmt: skip
def test_the_card_names_no_folder_of_the_teacher(spec, shown):
    plan = SimpleNamespace(teacher={"source": {"spec": spec, "input": "image"}})
    with mock.patch.object(hub_module, "replace", lambda plan, teacher: SimpleNamespace(teacher=teacher)):
        assert hub_module._with_short_spec(plan).teacher["source"] == {"spec": shown, "input": "image"}
        plan.teacher["source"] |= {"spec": "hf:me/vit", "options": {"hub": False}}
        assert hub_module._with_short_spec(plan).teacher["source"]["spec"] == "hf:me/vit"


def test_exports_of_an_earlier_result_are_removed(hub, result):
    hub.files["me/small"], hub.private["me/small"] = {"model.int8.onnx": b"old", "LICENSE": b"mine"}, False
    mimicut.push_to_hub(result, "me/small")
    assert "model.int8.onnx" not in hub.files["me/small"]
    assert hub.files["me/small"]["LICENSE"] == b"mine"


def test_what_is_to_be_private_is_not_published(hub, result):
    mimicut.push_to_hub(result, "me/open")
    with pytest.raises(InputError, match="me/open is there already, and public; expected a private one"):
        mimicut.push_to_hub(result, "me/open", private=True)
    mimicut.push_to_hub(result, "me/own", private=True)
    mimicut.push_to_hub(result, "me/own", private=True)


def test_the_command_prints_the_address(hub, result, capsys):
    code, line, err = call(capsys, "push", str(result), "me/other", "--private")
    assert code == 0
    assert line["address"].endswith("/me/other")
    assert "published: " in err
