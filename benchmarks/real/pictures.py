"""Pictures that no network of ImageNet was trained on: crops of wallpapers, with cut-out photographs put over them.

Both come from Debian packages. Every wallpaper, in whatever size or shade it ships, and every cut-out (a "stamp" of
Tux Paint) belongs to exactly one part: "few" (to learn from), "other" (other people's pictures) or "test".
The part "labelled" is made of wallpapers of "test" and of stamps whose names are classes of ImageNet (stamps.json),
which stand in no other part than "test". A picture is a square crop of SIDE pixels, a JPEG file; all choices are drawn
from fixed seeds, and `Pictures.hash` tells one prepared set from another.

    python -m benchmarks.real fetch                     # apt-get download and dpkg-deb: Debian or Ubuntu, no root
    python -m benchmarks.real fetch --from EXTRACTED    # packages that were downloaded and unpacked by hand

Not covered: SVG wallpapers and stamps. Drawings among the wallpapers stay in: a teacher must be imitated there, too.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimicut.base.errors import InputError

PACKAGES = ("gnome-backgrounds", "mate-backgrounds", "plasma-workspace-wallpapers", "tuxpaint-stamps-default")
LABELS = Path(__file__).with_name("stamps.json")
DEFAULT = Path("runs") / "real"
WALLPAPERS, STAMPS = ("usr/share/backgrounds", "usr/share/wallpapers"), "usr/share/tuxpaint/stamps"
SIDE = 256  # pixels: what a teacher of 224 pixels resizes to; the larger ones enlarge a little.
QUALITY = 85
# Of the wallpapers and of the stamps, and how many pictures of each part. Source: assumption.
SHARES = {"few": 0.25, "other": 0.30, "test": 0.45}
COUNTS = {"few": 450, "other": 1200, "test": 1200}
BACKGROUNDS = 8  # that each labelled stamp is put over
# Of a picture without any stamp, with one, with two. Source: assumption: photographs show things, and some do not.
STAMPS_SHARES = (0.2, 0.6, 0.2)
CROP = (0.25, 0.9)  # side of a crop, as a share of the wallpaper's shorter side
STAMP_SIZE, LABELLED_SIZE = (0.45, 0.95), (0.6, 0.9)  # longer side of a stamp, as a share of the picture's
ENLARGED = 2.0  # no stamp is enlarged by more
SMALLEST = 48  # pixels of a stamp's longer side: below it there is nothing to recognise
FLAT = 4.0  # grey levels: a crop with less deviation shows nothing, and another one is drawn
# No photographs: letters, signs and notes. Source: looked at.
_NO_STAMPS = ("symbols/", "town/flags/", "town/roadsigns/")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pictures:
    """A prepared set. files: part -> its pictures, in order. labels: class numbers of the part "labelled".
    hash: of the bytes of all parts but "other", 16 hexadecimal digits. about: counts and origins, as `prepare` wrote
    them."""

    folder: Path
    files: dict[str, list[Path]]
    labels: list[int]
    hash: str
    about: dict[str, Any]


def fetch(folder: Path, given: Path | None = None) -> Pictures:
    """Download the packages, or take the extracted ones in `given`, and prepare the pictures in `folder`.

    Raises: InputError where a command or a package is missing; what was there before stays then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = given
    if root is None:
        root = folder / "packages" / "extracted"
        _download(folder / "packages", root)
    return prepare(root, folder / "pictures")


def _download(folder: Path, root: Path) -> None:
    absent = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    by_hand = (
        f"download {', '.join(PACKAGES)} by hand, unpack them into one folder (dpkg-deb -x FILE.deb FOLDER, or ar x "
        "and tar x) and give it with --from FOLDER"
    )
    if absent:
        raise InputError(
            f"fetching the pictures: {' and '.join(absent)} not found, expected Debian or Ubuntu; {by_hand}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not list(folder.glob(f"{name}_*.deb"))]
    if missing:
        print(f"downloading {', '.join(missing)} (330 MB in all)", file=sys.stderr, flush=True)
        done = subprocess.run(
            ["apt-get", "download", *missing], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(
                f"fetching the pictures: apt-get download failed ({said}); run apt-get update, or {by_hand}"
            )
    for name in PACKAGES:
        file = max(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(file), str(root)], check=True)


def prepare(root: Path, folder: Path, counts: dict[str, int] | None = None) -> Pictures:
    """Write the pictures of all parts, made of the extracted packages in `root`, into `folder`, whole or not at all.

    counts: pictures of each part, COUNTS where None. Raises: InputError where packages are missing.
    """
    counts = COUNTS if counts is None else counts
    wallpapers, stamps = wallpapers_in(root), stamps_in(root)
    if not wallpapers or not stamps:
        raise InputError(
            f"preparing pictures: found {len(wallpapers)} wallpapers and {len(stamps)} stamps below {root}, expected "
            f"the extracted packages {', '.join(PACKAGES)} (with usr/share in it)"
        )
    named = {name: number for name, (number, _) in json.loads(LABELS.read_text(encoding="utf-8")).items()}
    backs = divided(wallpapers, {})
    fronts = divided(stamps, {key: "test" for key, files in stamps.items() if any(n in named for n, _ in files)})
    part_of_work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part_of_work, ignore_errors=True)
    about: dict[str, Any] = {
        "counts": {}, "wallpapers": {p: sorted(keys) for p, keys in backs.items()},
        "stamps": {p: sorted(keys) for p, keys in fronts.items()}, "side": SIDE, "quality": QUALITY, "origins": {},
    }  # fmt: skip
    for part, count in counts.items():
        scenes = _scenes(part, count, [wallpapers[k] for k in backs[part]], [stamps[k] for k in fronts[part]])
        about["origins"][part] = _written(part_of_work / part, scenes, about["counts"], part)
    scenes, labels = _labelled([wallpapers[k] for k in backs["test"]], stamps, named)
    about["origins"]["labelled"] = _written(part_of_work / "labelled", scenes, about["counts"], "labelled")
    about["labels"] = labels
    text = json.dumps(about, indent=1, sort_keys=True)
    (part_of_work / "about.json").write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part_of_work.rename(folder)
    return opened(folder)


def opened(folder: Path) -> Pictures:
    """A set that `prepare` wrote. Raises: InputError where there is none."""
    path = folder / "about.json"
    if not path.is_file():
        raise InputError(
            f"opening the pictures: there are none in {folder}; python -m benchmarks.real fetch makes them"
        )
    about = json.loads(path.read_text(encoding="utf-8"))
    files = {part: sorted((folder / part).glob("*.jpg")) for part in about["counts"]}
    needed = [part for part in sorted(files) if part != "other" or files[part]]  # a copy may go without
    short = next((part for part in needed if len(files[part]) != about["counts"][part]), None)
    if short:
        raise InputError(
            f"opening the pictures: {folder / short} holds {len(files[short])} pictures, expected "
            f"{about['counts'][short]}; python -m benchmarks.real fetch makes them again"
        )
    digest = hashlib.sha256()
    for part in needed:
        for file in files[part] if part != "other" else ():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    digest.update(json.dumps(about["labels"]).encode())
    return Pictures(folder, files, about["labels"], digest.hexdigest()[:16], about)


Files = dict[str, list[tuple[str, Path]]]  # what is one picture -> its files: names below the root, and paths


def wallpapers_in(root: Path) -> Files:
    """Key: the wallpaper's own name, so that sizes, shades and screenshots of one stand together. A wallpaper of KDE is
    a folder; of the sizes of one picture there the largest counts, and its screenshot does not."""
    found: Files = {}
    for place in WALLPAPERS:
        for path in sorted(Path(root, place).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() not in _SUFFIXES or path.stem == "screenshot":
                continue
            kde = re.match(r"usr/share/wallpapers/([^/]+)/", name)
            found.setdefault(wallpaper_key(kde[1] if kde else path.stem), []).append((name, path))
    return {key: _largest(files) for key, files in found.items()}


def _largest(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Of files that are named by their size the largest of each folder; others as they are."""
    largest: dict[Path, tuple[int, tuple[str, Path]]] = {}
    for name, path in files:
        size = re.fullmatch(r"(\d+)x(\d+)", path.stem)
        place, pixels = (path.parent, int(size[1]) * int(size[2])) if size else (path, 0)
        largest[place] = max(largest.get(place, (-1, (name, path))), (pixels, (name, path)))
    return [found for _, found in largest.values()]


def wallpaper_key(stem: str) -> str:
    """Without size (_3840x2160) and shade (-l, -d, Light, Dark, Warm, ...), in small letters."""
    words = re.sub(r"[_-]?\d+x\d+", "", stem).lower()
    words = re.sub(r"[-_](l|d|light|dark|no-logo|cold|warm|radioactive)\b", "", words)
    words = re.sub(r"[-_](light|dark|cold|warm|radioactive)\b", "", words)
    return re.sub(r"^mate[-_]", "", words)


def stamps_in(root: Path) -> Files:
    """Key: the first word of the file's name, so that views, sides and mirror images of one thing stand together."""
    found: Files = {}
    base = Path(root, STAMPS)
    for path in sorted(base.rglob("*.png")):
        name = path.relative_to(base).as_posix()
        if name.startswith(_NO_STAMPS) or path.stem.endswith("_mirror"):
            continue
        with Image.open(path) as image:
            if max(image.size) < SMALLEST:
                continue
        found.setdefault(stamp_key(path.stem), []).append((name, path))
    return found


def stamp_key(stem: str) -> str:
    return next(iter(re.findall(r"[a-z]+", stem.lower())), stem)


def divided(found: Files, fixed: dict[str, str]) -> dict[str, list[str]]:
    """Part -> keys. fixed: the part of some keys. The others are divided as SHARES says, in an order that depends on
    their names alone."""
    free = sorted(set(found) - set(fixed), key=lambda key: hashlib.sha256(key.encode()).digest())
    parts: dict[str, list[str]] = {part: sorted(k for k, p in fixed.items() if p == part) for part in SHARES}
    done, share = 0, 0.0
    for part, size in SHARES.items():
        share += size
        upto = round(share * len(free))
        parts[part] += free[done:upto]
        done = upto
    return parts


@dataclass(frozen=True)
class Scene:
    """One picture to be made: wallpaper, stamps over it, seed of all else about it, and a stamp that is used where the
    crop turns out flat and there is no other."""

    wallpaper: tuple[str, Path]
    stamps: tuple[tuple[str, Path], ...]
    seed: int
    size: tuple[float, float] = STAMP_SIZE
    spare: tuple[str, Path] | None = None


def _random(*words: str) -> np.random.RandomState:
    # RandomState: NumPy promises that its streams never change.
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest[:16], dtype="<u4"))


def _scenes(part: str, count: int, backs: Sequence[Any], fronts: Sequence[Any]) -> Iterator[Scene]:
    """Wallpapers in turn, each as often as any other; stamps in turn, too, of which a few stand in several pictures."""
    random = _random("scenes", part)
    back_turns, front_turns = _turns(random, len(backs)), _turns(random, len(fronts))
    for number in range(count):
        files = backs[next(back_turns)]
        wallpaper = files[random.randint(len(files))]
        chosen = []
        for _ in range(max(1, stamped := int(random.choice(len(STAMPS_SHARES), p=STAMPS_SHARES)))):
            stamps = fronts[next(front_turns)]
            chosen.append(stamps[random.randint(len(stamps))])
        yield Scene(wallpaper, tuple(chosen[:stamped]), number, spare=chosen[0])


def _labelled(backs: Sequence[Any], stamps: Files, named: dict[str, int]) -> tuple[list[Scene], list[int]]:
    random = _random("scenes", "labelled")
    turns = _turns(random, len(backs))
    there = {name: path for files in stamps.values() for name, path in files}
    scenes, labels = [], []
    for name in sorted(set(named) & set(there)):
        for _ in range(BACKGROUNDS):
            files = backs[next(turns)]
            wallpaper = files[random.randint(len(files))]
            scenes.append(Scene(wallpaper, ((name, there[name]),), len(scenes), LABELLED_SIZE))
            labels.append(named[name])
    return scenes, labels


def _turns(random: np.random.RandomState, count: int) -> Iterator[int]:
    while True:
        yield from random.permutation(count).tolist()


def _written(folder: Path, scenes: Iterator[Scene] | list[Scene], counts: dict[str, int], part: str) -> list[list[str]]:
    """The origins of each picture: the wallpaper's file, then those of its stamps. Scenes are drawn wallpaper by
    wallpaper, as a large one takes a second to decode."""
    folder.mkdir(parents=True)
    scenes, origins = list(scenes), {}
    held: tuple[Path | None, Image.Image | None] = (None, None)
    for number in sorted(range(len(scenes)), key=lambda i: (scenes[i].wallpaper[0], i)):
        scene = scenes[number]
        if held[0] != scene.wallpaper[1]:
            with Image.open(scene.wallpaper[1]) as image:
                held = scene.wallpaper[1], _flattened(image)
        drawn, stamps = _drawn(scene, held[1], _random(part, str(scene.seed)))
        drawn.save(folder / f"{number:05d}.jpg", quality=QUALITY)
        origins[number] = [scene.wallpaper[0], *(name for name, _ in stamps)]
    counts[part] = len(scenes)
    print(f"{part}: {len(scenes)} pictures", file=sys.stderr, flush=True)
    return [origins[number] for number in range(len(scenes))]


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "P") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _drawn(
    scene: Scene, wallpaper: Image.Image, random: np.random.RandomState
) -> tuple[Image.Image, tuple[tuple[str, Path], ...]]:
    """The picture, and the stamps that are in it."""
    picture, flat = _crop(wallpaper, random)
    stamps = scene.stamps or ((scene.spare,) if flat and scene.spare else ())
    for _, path in stamps:
        with Image.open(path) as image:
            stamp = image.convert("RGBA")
        stamp = stamp.crop(stamp.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
        longer = min(random.uniform(*scene.size) * SIDE, ENLARGED * max(stamp.size))
        size = tuple(max(1, round(n * longer / max(stamp.size))) for n in stamp.size)
        stamp = stamp.resize(size, Image.Resampling.BICUBIC)
        if random.randint(2):
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        at = tuple(random.randint(0, SIDE - n + 1) if n < SIDE else 0 for n in stamp.size)
        picture.paste(stamp, at, stamp)
    return picture, stamps


def _crop(wallpaper: Image.Image, random: np.random.RandomState) -> tuple[Image.Image, bool]:
    """A square of SIDE pixels; of four tries the first that shows something, and whether none did."""
    picture, flat = wallpaper, True
    for _ in range(4):
        shorter = min(wallpaper.size)
        side = min(shorter, max(SIDE, round(random.uniform(*CROP) * shorter)))
        left, top = (random.randint(0, n - side + 1) for n in wallpaper.size)
        box = (left, top, left + side, top + side)
        picture = wallpaper.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        flat = bool(np.asarray(picture.convert("L")).std() < FLAT)
        if not flat:
            break
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.randint(2) else picture, flat
