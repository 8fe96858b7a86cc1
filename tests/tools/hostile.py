"""Files as an attacker, or a failing disk, would leave them; each from a seed, so that any can be made again.

The three `target_` functions are fuzz targets: each takes bytes, and raises what no reader may raise.
"""

import io
import json
import random
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mimicut as us
from mimicut.base.errors import MimicutError
from mimicut.results.files import sha256

JSON_FILES = ("plan.json", "report.json")
WEIGHTS = "weights.safetensors"
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**20, -(10**20), 1.5, -0.5, 1e308, "", "x", "0", "../../x", "\x1b[2J",
    "𝕏" * 40, "</script><script>", [], {}, [[]], [None], {"": None}, {"a": [1]}, [1, 2, 3], "a" * 5000, "through",
    "zero:99999999",
]  # fmt: skip


def without_plan_digest(folder: Path) -> None:
    """Make the result one of an earlier release, whose plan can be edited without that being noticed."""
    report = json.loads((folder / "report.json").read_text())
    del report["stored"]["plan_sha256"]
    (folder / "report.json").write_text(json.dumps(report))


def _places(data: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything in plain data."""
    for key in data if isinstance(data, dict) else range(len(data)):
        found.append((data, key))
        if isinstance(data[key], (dict, list)):
            _places(data[key], found)
    return found


def mutated_json(data: Any, chance: random.Random) -> str:
    """A JSON text that differs from `data` in one to three places."""
    data = json.loads(json.dumps(data))
    for _ in range(chance.randint(1, 3)):
        places = _places(data, [])
        if not places:
            break
        held, key = chance.choice(places)
        old, what = held[key], chance.randrange(6)
        if what == 0:
            del held[key]
        elif what == 1 and isinstance(old, (int, float)) and not isinstance(old, bool):
            held[key] = old + chance.choice([-1, 1, 1000, -1000])
        elif what == 2 and isinstance(held, dict):
            held[chance.choice(["", "x", "__class__", key + "x"])] = old
        elif what == 3:
            held[key] = chance.choice(places)[0]
            held[key] = json.loads(json.dumps(held[key])) if not _inside(held, held[key]) else None
        elif what == 4 and chance.random() < 0.1:
            deep: Any = old
            for _ in range(chance.choice([50, 300])):
                deep = [deep]
            held[key] = deep
        else:
            held[key] = chance.choice(VALUES)
    return json.dumps(data)


def _inside(held: Any, other: Any) -> bool:
    """Whether `held` is `other` or lies in it."""
    return held is other or any(_inside(held, each) for each in _children(other))


def _children(data: Any) -> list[Any]:
    return list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else []


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """`data` with some bytes changed, removed, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        what = chance.randrange(5)
        if what == 0:
            del changed[at : at + chance.randint(1, 40)]
        elif what == 1:
            changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        elif what == 2:
            changed = changed[:at]
        elif what == 3:
            changed[at:at] = changed[at : at + 64]
        else:
            changed[at : at + 1] = bytes([chance.randrange(256)])
    return bytes(changed)


def mutated_weights(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, or another length of it."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    what = chance.randrange(4)
    if what == 0:
        return struct.pack("<Q", chance.choice([0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1])) + data[8:]
    header = mutated_bytes(header, chance) if what == 1 else mutated_json(json.loads(header), chance).encode()
    if what == 3:  # the metadata are JSON inside JSON
        whole = json.loads(data[8 : 8 + length])
        own = whole.get("__metadata__", {})
        whole["__metadata__"] = {key: mutated_json(json.loads(value), chance) for key, value in own.items()}
        header = json.dumps(whole).encode()
    return struct.pack("<Q", len(header)) + header + rest


class Attacked:
    """A result folder, of which one file at a time is exchanged."""

    def __init__(self, folder: Path, images: torch.Tensor):
        self.folder, self.images = folder, images
        self.sound = {name: (folder / name).read_bytes() for name in (*JSON_FILES, WEIGHTS)}
        self.wanted = self._outputs()

    def _outputs(self) -> torch.Tensor:
        with torch.no_grad():
            return us.load(self.folder)(self.images)

    def tried(self, name: str, content: bytes, *, signed: bool = False) -> str:
        """What loading does with other content of one file: "refused", "same" or "other" outputs.

        Args:
            name: The file.
            content: What is in it.
            signed: Whether the report gets the digests of what is now there, as an attacker would write them.
        """
        for other, sound in self.sound.items():
            (self.folder / other).write_bytes(content if other == name else sound)
        if signed and name != "report.json":
            report = json.loads(self.sound["report.json"])
            key = "plan_sha256" if name == "plan.json" else "weights_sha256"
            report["stored"][key] = sha256(self.folder / name)
            (self.folder / "report.json").write_text(json.dumps(report))
        try:
            found = self._outputs()
        except MimicutError:
            return "refused"
        return "same" if found.shape == self.wanted.shape and torch.equal(found, self.wanted) else "other"

    def mutation(self, seed: int) -> tuple[str, bytes, bool]:
        """(file, content, whether the digests follow) number `seed`."""
        chance = random.Random(seed)
        name = chance.choice([*JSON_FILES, WEIGHTS])
        sound = self.sound[name]
        if name == WEIGHTS:
            content = mutated_weights(sound, chance)
        elif chance.random() < 0.2:
            content = mutated_bytes(sound, chance)
        else:
            content = mutated_json(json.loads(sound), chance).encode()
        return name, content, chance.random() < 0.5


def target_plan(data: bytes) -> None:
    """plan.json: any bytes are a plan, or refused."""
    with suppress(MimicutError):
        us.Plan.from_json(_read(data))


def target_report(data: bytes, plan: us.Plan) -> None:
    """report.json: any bytes are a report, of which pages and a table can be made, or refused."""
    from mimicut.results.html_page import page
    from mimicut.results.readme import readme

    try:
        report = us.Report.from_json(_read(data))
    except MimicutError:
        return
    text = page(report, plan) + readme(report, plan)
    assert "<script" not in text
    report.table()
    assert us.Report.from_json(report.to_json()) == report


def target_weights(data: bytes, path: Path) -> None:
    """weights.safetensors: any bytes are tensors, or refused; written to `path`."""
    from mimicut.results.weights_file import read_weights

    path.write_bytes(data)
    with suppress(MimicutError):
        read_weights(path, sha256(path))


def _read(data: bytes) -> Any:
    from mimicut.base.errors import StoreError
    from mimicut.base.schema import read_plain

    try:
        found = read_plain(data.decode())
    except ValueError as error:
        raise StoreError(str(error)) from error
    if not isinstance(found, dict):
        raise StoreError("no object")
    return found


# --- images -----------------------------------------------------------------------------------------------------------


def hostile_image(folder: Path, seed: int) -> Any:
    """Something that is given as images: a path, an array, a list. `folder` is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    chance = random.Random(seed)
    return chance.choice(_IMAGES)(folder, chance)


def _picture(chance: random.Random, kind: str) -> bytes:
    mode = chance.choice(["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16"])
    random_bytes = np.random.default_rng(chance.randrange(2**32))
    size = (chance.choice([1, 3, 30, 200]), chance.choice([1, 3, 30, 200]))
    made = Image.fromarray(random_bytes.integers(0, 255, (*size, 3), np.uint8))
    held = io.BytesIO()
    for each in (mode, "RGB", "L"):
        try:
            made.convert(each).save(held, kind)
            break
        except (OSError, ValueError, KeyError):
            held = io.BytesIO()
    return held.getvalue()


def _damaged(folder: Path, chance: random.Random) -> Any:
    for i in range(chance.randint(1, 4)):
        kind = chance.choice(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
        content = _picture(chance, kind)
        (folder / f"{i}.{chance.choice(['png', 'jpg', 'tif', 'txt'])}").write_bytes(mutated_bytes(content, chance))
    return chance.choice([folder, str(folder)])


def _huge(folder: Path, chance: random.Random) -> Any:
    """A few bytes that say that they are a large picture."""
    side = chance.choice([6000, 13000, 40000, 2**31 - 1])
    path = folder / "a.png"
    if chance.random() < 0.5:
        path = folder / "a.ppm"
        path.write_bytes(b"P6 %d %d 255\n" % (side, side) + bytes(1000))
    else:
        held = io.BytesIO()
        Image.new("1", (min(side, 13000),) * 2).save(held, chance.choice(["PNG", "TIFF", "GIF"]))
        path.write_bytes(held.getvalue())
    return folder


def _dtype(chance: random.Random) -> Any:
    return np.dtype(chance.choice(
        ["u1", ">u2", "<u2", "f2", "f4", ">f4", "f8", "f16", "i1", "i8", "?", "c8", "M8[s]", "m8[s]", "U3", "S3", "V5"]
    ))  # fmt: skip


def _array(folder: Path, chance: random.Random) -> Any:
    shape = [chance.choice([0, 1, 2, 3, 4, 8, 9]) for _ in range(chance.choice([0, 1, 2, 3, 4, 4, 4, 5]))]
    if chance.random() < 0.3:
        shape = [chance.choice([1, 4]), 3, 8, 8]
    values = np.zeros(shape, _dtype(chance))
    if values.dtype.kind == "f" and values.size and chance.random() < 0.5:
        values.flat[0] = chance.choice([np.nan, np.inf, 1e300])
    if chance.random() < 0.3:
        return values
    path = folder / "a.npy"
    np.save(path, values)
    if chance.random() < 0.5:
        path.write_bytes(mutated_bytes(path.read_bytes(), chance))
    return path


def _archive(folder: Path, chance: random.Random) -> Any:
    path = folder / "a.npz"
    names = chance.choice([["images"], ["a"], ["a", "b"], []])
    save = chance.choice([np.savez, np.savez_compressed])
    save(path, **{name: np.zeros((2, 3, 8, 8), _dtype(chance)) for name in names})
    if chance.random() < 0.6:
        path.write_bytes(mutated_bytes(path.read_bytes(), chance))
    return path


def _claims(folder: Path, chance: random.Random) -> Any:
    """An array of a thousand bytes that says it is huge."""
    shape = chance.choice([(10**9, 3, 8, 8), (2**62,), (10**6, 10**6), (-1, 3, 8, 8), (4, 3, 8, 10**7)])
    head = {"descr": chance.choice(["|u1", "<f4", "|O"]), "fortran_order": chance.random() < 0.5, "shape": shape}
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, head)
    path = folder / "a.npy"
    path.write_bytes(held.getvalue() + bytes(1000))
    return path


def _tensors(folder: Path, chance: random.Random) -> Any:
    from safetensors.torch import save

    path = folder / "a.safetensors"
    kind = chance.choice([torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
    path.write_bytes(mutated_weights(save({"images": torch.zeros(2, 3, 8, 8).to(kind)}), chance))
    return path


def _tensor(folder: Path, chance: random.Random) -> Any:
    plain = torch.zeros(2, 3, 8, 8)
    made = [
        plain.to_sparse(), plain.to("meta"), plain.to(torch.float8_e4m3fn), plain.to(torch.complex64), plain[:, :, :0],
        torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8), plain.to(torch.bfloat16), plain[0, 0, 0],
        plain * np.nan,
    ]  # fmt: skip
    return chance.choice(made)


def _paths(folder: Path, chance: random.Random) -> Any:
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "out").symlink_to("/proc/self")
    (folder / "text.png").write_text("no picture")
    return chance.choice([
        "", ".", folder, folder / "self", folder / ("a" * 300), "/" + "a/" * 3000, "a\0b", folder / "text.png",
        "/dev/null", "/dev/zero", "\ud800", [], [folder / "self"], [None], [{}], [("", 3)], {"a": 1}, 3, None, b"x",
    ])  # fmt: skip


_IMAGES = [_damaged, _damaged, _damaged, _huge, _array, _array, _archive, _claims, _tensors, _tensor, _paths]
