"""Publishing and fetching through `huggingface_hub`, with a stand-in of the hub on this machine."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from command_line import call
from PIL import Image

import mimicut
from mimicut.base.errors import InputError, StoreError
from mimicut.results.files import read_json

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


def test_what_is_published_loads_bit_equal_and_says_what_it_is(hub, result, tmp_path):
    address = mimicut.push_to_hub(result, "me/small")
    assert address.endswith("/me/small")
    own = mimicut.load(result)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    # Fetched as another person does it, in a process that knows the hub by its environment alone.
    code = (
        "import json, torch, mimicut; model = mimicut.from_pretrained('me/small'); "
        "images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)); "
        "print(json.dumps(model(images).tolist()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"HF_ENDPOINT": address.removesuffix("/me/small"), "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert torch.equal(torch.tensor(json.loads(ran.stdout.splitlines()[-1])), own(images))
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
    assert "1 image(s) skipped, because they could not be read" in published
    assert len(published) == len(notes)
    assert {path.name: path.read_bytes() for path in result.iterdir()} == before


@pytest.mark.parametrize(
    ("note", "published"),
    [
        ("2 other file(s) in the folder ignored: Anna.txt, b.pdf", "2 other file(s) in the folder ignored"),
        ("1 image(s) skipped, because they could not be read: Anna.HEIF: HEIC is not read; convert it to JPEG",
         "1 image(s) skipped, because they could not be read"),
        ("3 image(s) equal in pixels to another (IM0001 = IM0002, ...)", "3 image(s) equal in pixels to another"),
        ("2 of 9 held-out images are near-duplicates of another held-out image; it is narrower: IM01 like IM02, ...",
         "2 of 9 held-out images are near-duplicates of another held-out image; it is narrower"),
        ("1 of 9 images are blank (one flat colour): IM01", "1 of 9 images are blank"),
        ("the features of 1 of 9 images are outliers: IM01", "the features of 1 of 9 images are outliers"),
        ("stopped after 3 of 9 steps: no time", "stopped after 3 of 9 steps: no time"),
        ("pictures/anna.jpg is gone", ""),
    ],
)  # fmt: skip
def test_notes_are_published_without_names_of_files(note, published):
    assert hub_module._unnamed(note) == published


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
        ("timm:resnet18", "timm:resnet18"), ("hf:me/vit", "hf:me/vit"), ("hf:/home/ann/vit", "hf:vit"),
        ("onnx:/home/ann/acme/model.onnx", "onnx:model.onnx"), ("/home/ann/net.py:build", "net.py:build"),
        ("module", "module"),
    ],
)  # fmt: skip
def test_the_card_names_no_folder_of_the_teacher(spec, shown):
    plan = SimpleNamespace(teacher={"source": {"spec": spec, "input": "image"}})
    with mock.patch.object(hub_module, "replace", lambda plan, teacher: SimpleNamespace(teacher=teacher)):
        assert hub_module._with_short_spec(plan).teacher["source"] == {"spec": shown, "input": "image"}


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
