"""The demo's task and the teachers that ship with it."""

import json
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimicut.base.errors import InputError
from mimicut.demo import photographs, teacher_networks, train

PAIRS = [("train", "few"), ("train", "test"), ("few", "test")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small nets on a busy machine: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def first_2000() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = photographs.test_set()
    return x[:2000], y[:2000]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_parts_share_no_tile(one, other):
    assert not set(photographs.tiles(one)) & set(photographs.tiles(other))


def test_tiles_share_no_pixel_and_lie_inside_their_photograph():
    claimed = [np.zeros(picture.shape, int) for picture in photographs.photographs()]
    for part in photographs.PARTS:
        for tile in photographs.tiles(part):
            top, left = tile.row * photographs.TILE, tile.column * photographs.TILE
            window = claimed[tile.photograph][top : top + photographs.TILE, left : left + photographs.TILE]
            assert window.shape == (photographs.TILE, photographs.TILE)
            window += 1
    assert max(c.max() for c in claimed) == 1
    assert all(c.any() for c in claimed)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_parts_share_no_picture_content(one, other):
    """Compares pixels, in every turn: a tile copied from one place of a photograph to another would be found."""
    pixels = {part: photographs.all_tiles()[part][1] for part in (one, other)}
    turned = {t.tobytes() for tile in pixels[one] for k in range(4) for t in (np.rot90(tile, k), np.rot90(tile, k).T)}
    assert pixels[one][0].tobytes() in turned
    assert not turned & {tile.tobytes() for tile in pixels[other]}


def test_patches_come_from_the_tiles_of_their_part_and_photograph(monkeypatch):
    """Tiles replaced by their own number: each patch then says which tile it was cut from."""
    numbered = {}
    for part in photographs.PARTS:
        owners = photographs.tiles(part)
        stack = np.arange(len(owners)).reshape(-1, 1, 1) * np.ones((1, 64, 64), int)
        numbered[part] = (owners, stack)
    monkeypatch.setattr(photographs, "all_tiles", lambda: numbered)
    monkeypatch.setattr(photographs, "_standardise", lambda windows: windows)
    for part in photographs.PARTS:
        found, labels = photographs.pixels(part, 3000, seed=5)
        owners = photographs.tiles(part)
        assert [owners[n].photograph for n in found[:, 0, 0]] == labels.tolist()
        assert Counter(labels.tolist()).keys() == set(range(len(photographs.CLASSES)))
        if part == "few":
            assert set(found[:, 0, 0].tolist()) == set(range(len(owners)))


def test_windows_stay_inside_and_are_turned_eight_ways(monkeypatch):
    ramp = np.arange(64 * 64).reshape(1, 64, 64)
    one = {"few": ([photographs.Tile(c, 0, 0) for c in range(20)], np.repeat(ramp, 20, axis=0))}
    monkeypatch.setattr(photographs, "all_tiles", lambda: one)
    monkeypatch.setattr(photographs, "_standardise", lambda windows: windows)
    found, _ = photographs.pixels("few", 4000, seed=1)
    steps = set()
    for patch in found:
        corner, down, right = patch.min(), patch[1, 0] - patch[0, 0], patch[0, 1] - patch[0, 0]
        assert corner // 64 <= 32
        assert corner % 64 <= 32
        assert sorted(patch.ravel()) == sorted(ramp[0, corner // 64 :, corner % 64 :][:32, :32].ravel())
        assert np.array_equal(patch, patch[0, 0] + down * np.arange(32)[:, None] + right * np.arange(32))
        steps.add((int(down), int(right)))
    assert steps == {(a, b) for a, b in [(64, 1), (64, -1), (-64, 1), (-64, -1)]} | {
        (a, b) for a, b in [(1, 64), (1, -64), (-1, 64), (-1, -64)]
    }
    corners = {int(p.min()) for p in found}
    assert min(corners) // 64 == 0
    assert max(c // 64 for c in corners) == 32
    assert max(c % 64 for c in corners) == 32


def test_the_same_seed_gives_the_same_patches_and_another_does_not():
    x, y = photographs.patches("few", 50, seed=3)
    again, labels = photographs.patches("few", 50, seed=3)
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    assert not torch.equal(x, photographs.patches("few", 50, seed=4)[0])
    assert not torch.equal(x, photographs.patches("train", 50, seed=3)[0])
    assert torch.equal(x, photographs.few_images(50, seed=3))


def test_patches_are_standardised():
    for part in photographs.PARTS:
        x, y = photographs.patches(part, 1000, seed=0)
        assert x.dtype == torch.float32
        assert x.shape == (1000, 1, 32, 32)
        assert y.dtype == torch.int64
        whole = x[(x.flatten(1).amax(1) < 127 / 32) & (x.flatten(1).amin(1) > -4)]  # the others were clipped
        deviation = whole.std((1, 2, 3), correction=0)
        assert len(whole) > 500
        assert whole.mean((1, 2, 3)).abs().max() < 0.5 / photographs.SPREAD
        # A window without any contrast stays without: about one in a thousand.
        assert (deviation == 0).sum() <= 3
        assert (deviation[deviation > 0] - 1).abs().max() < 0.5 / photographs.SPREAD


def test_brightness_and_contrast_tell_nothing():
    dark = np.random.RandomState(0).randint(0, 60, (5, 32, 32)).astype(np.uint8)
    assert np.array_equal(photographs._standardise(dark), photographs._standardise(dark * 3 + 40))
    assert (photographs._standardise(np.full((1, 32, 32), 7, np.uint8)) == photographs.CENTRE).all()


def test_written_files_hold_the_few_images(tmp_path):
    paths = photographs.write_few_images(tmp_path / "new", 5, seed=2)
    assert sorted((tmp_path / "new").iterdir()) == paths
    mean, std = photographs.PREPROCESSING["mean"][0], photographs.PREPROCESSING["std"][0]
    read = np.stack([(np.asarray(Image.open(p)) / 255 - mean) / std for p in paths])
    assert np.abs(read - photographs.few_images(5, seed=2).squeeze(1).numpy()).max() < 1e-5


@pytest.mark.parametrize(("part", "count", "seed"), [("dev", 5, 0), ("few", 0, 0), ("few", 5, -1), ("few", 5, 2**32)])
def test_bad_requests_are_named(part, count, seed):
    with pytest.raises(InputError, match="dev" if part == "dev" else f"count {count} and seed {seed}"):
        photographs.patches(part, count, seed)


def test_a_missing_package_or_picture_is_named(monkeypatch):
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", {"no_such_package": ("data", "a.png")})
    with pytest.raises(InputError, match="no_such_package"):
        photographs.photographs()
    monkeypatch.setattr(photographs, "PHOTOGRAPHS", {"skimage": ("data", "no_such_picture.png")})
    with pytest.raises(InputError, match=r"no_such_picture\.png"):
        photographs.photographs()


@pytest.mark.parametrize("name", teacher_networks.NAMES)
def test_the_test_set_is_the_one_the_teacher_was_measured_on(name):
    assert teacher_networks.facts(name)["test_sha256"] == photographs.test_hash()
    assert teacher_networks.facts(name)["classes"] == list(photographs.CLASSES)
    assert teacher_networks.facts(name)["test_patches"] == photographs.TEST_COUNT == 10_000


@pytest.mark.parametrize("name", teacher_networks.NAMES)
def test_shipped_teacher_is_as_good_as_its_facts_say(name, first_2000):
    model, preprocessing = teacher_networks.load(name)
    assert not any(m.training for m in model.modules())
    assert preprocessing == photographs.PREPROCESSING
    with torch.no_grad():
        right = int(train.correct(model, *first_2000).sum())
    facts = teacher_networks.facts(name)
    assert facts["top1_test"] >= 83
    assert abs(right - facts["right_of_first_2000"]) <= 4  # other processors round differently
    # Four standard errors of a share of 2,000.
    share = facts["top1_test"] / 100
    assert abs(right / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5


@pytest.mark.parametrize("name", teacher_networks.NAMES)
def test_shipped_weights_are_small_and_fit(name):
    path = teacher_networks.TEACHERS / f"{name}.safetensors"
    assert path.stat().st_size <= 2_000_000
    model = teacher_networks.build(name)
    assert load_file(path).keys() == model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == teacher_networks.facts(name)["parameters"]


def test_build_is_random_and_in_train_mode():
    torch.manual_seed(0)
    one, other = teacher_networks.build("resnet20"), teacher_networks.build("resnet20")
    assert one.training
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    with pytest.raises(InputError, match=r"resnet21.*resnet20"):
        teacher_networks.build("resnet21")
    with pytest.raises(InputError, match="resnet21"):
        teacher_networks.facts("resnet21")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(InputError, match=r"resnet20\.safetensors is missing.*mimicut\.demo\.train"):
        teacher_networks.load("resnet20", tmp_path)


def test_training_is_seeded_and_writes_whole_files(tmp_path):
    config = train.TrainConfig(steps=2, batch_size=4)
    seen: list[int] = []
    one = train.train("resnet20", config, lambda step, loss: seen.append(step))
    other = train.train("resnet20", config)
    assert seen == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    moved = train.train("resnet20", train.TrainConfig(steps=2, batch_size=4, seed=1))
    assert not torch.equal(one.conv1.weight, moved.conv1.weight)
    train.write(tmp_path / "new", "resnet20", one, {"a": 1})
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["resnet20.json", "resnet20.safetensors"]
    assert json.loads((tmp_path / "new" / "resnet20.json").read_text()) == {"a": 1}
    loaded, _ = teacher_networks.load("resnet20", tmp_path / "new")
    x = photographs.few_images(4, seed=0)
    with torch.no_grad():
        assert torch.equal(loaded(x), one(x))


def test_a_transformer_is_trained_with_adamw():
    """Its first step: one lr for every weight that has a gradient, whatever the gradient's size."""
    torch.manual_seed(0)
    before = teacher_networks.build("vit_tiny")
    config = train.TrainConfig(steps=2, batch_size=4, optimizer="adamw", lr=1e-3, warmup=0.5, weight_decay=0.0)
    after = train.train("vit_tiny", config)  # the second step is at the end of the fall: its lr is 0
    moved = (after.fc.weight - before.fc.weight).abs() / (1 - 1 / 11 * 1 / 6)  # what is kept is a running average
    assert train.CONFIGS["vit_tiny"].optimizer == "adamw"
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("options", "optimizer", "steps"),
    [({}, "muon", 400), ({"effort": "quick"}, "muon", 0), ({"recipe": "paper", "steps": 7}, "sgd", 7)],
)
def test_the_demo_takes_the_recipe_that_is_asked_for(monkeypatch, options, optimizer, steps):
    demo_run, seen = import_module("mimicut.workflow.demonstration"), []

    def compress(*_, config, **__):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_run, "compress", compress)
    with pytest.raises(KeyboardInterrupt):
        demo_run.run("vgg7", config=demo_run.recipe_for("vgg7", **options))
    assert [(c.optimizer, c.steps, c.views) for c in seen] == [(optimizer, steps, "patches")]


def test_training_reads_the_train_tiles_only(monkeypatch):
    parts = []
    patches = photographs.patches
    monkeypatch.setattr(photographs, "patches", lambda part, *rest: parts.append(part) or patches(part, *rest))
    train.train("resnet20", train.TrainConfig(steps=2, batch_size=4))
    assert parts == ["train", "train"]


def test_mixing_keeps_the_share_of_pixels():
    x = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 1, 32, 32)
    random = torch.Generator().manual_seed(0)
    mixed, other, share = train._mixed(x, 1.0, random)
    own = (mixed == x).flatten(1).float().mean(1)
    theirs = (mixed == x[other]).flatten(1).float().mean(1)
    apart = other != torch.arange(16)
    assert apart.any()
    assert 0 < share < 1
    assert torch.allclose(own[apart], torch.tensor(share))
    assert torch.allclose(theirs[apart], torch.tensor(1 - share))
    assert train._mixed(x, 0.0, random)[2] == 1.0
