"""Files that come from elsewhere: whatever is in them, they are refused in our own words, or give the same outputs.

`make attack` tries 10,000 changes of a result's files and 1,000 hostile images, or the share that ATTACKS says, and
writes the counts to benchmarks/results/attacks.json; `make test` tries a few.
"""

import json
import random
import resource
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from attacks import SHARE, record
from hostile import Attacked, hostile_image, mutated_bytes, target_plan, target_report, target_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes, unicode_string_dtypes

import mimicut as us
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.results.store import read

RELEASE = Path(__file__).parents[1] / "data" / "result_of_release_0_1"
SAMPLE, IMAGES, EXAMPLES = 40, 40, 25
FULL = round(10_000 * SHARE)
MOST_SECONDS, MOST_BYTES = 2.0, 500e6
PREPROCESSING = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3)

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow and numpy, about what they are given


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked") / "result"
    plan, report, _ = read(RELEASE)
    us.save(folder, model=us.load(RELEASE), plan=plan, report=report)
    return Attacked(folder, torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))


def try_mutations(attacked: Attacked, seeds: range) -> dict[str, int]:
    """Count what loading does; a raw exception names its seed."""
    found: Counter[str] = Counter()
    for seed in seeds:
        name, content, signed = attacked.mutation(seed)
        try:
            outcome = attacked.tried(name, content, signed=signed)
        except Exception as error:
            raise AssertionError(f"mutation {seed} of {name}: raw {type(error).__name__}: {error}") from error
        # Whoever can write the report can write its digests: the file may then be another one, but is read safely.
        assert outcome != "other" or signed, f"mutation {seed} of {name} loads with other outputs"
        found[outcome + (", digests rewritten" if signed else "")] += 1
        found[name] += 1
    return dict(sorted(found.items()))


def try_images(folder: Path, seeds: range) -> dict[str, float]:
    """Count what reading does, and the most processor seconds of one and bytes of all."""
    found: Counter[str] = Counter()
    us.read_images(torch.zeros(3, 3, 8, 8), PREPROCESSING)  # the libraries are there
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for seed in seeds:
        source = hostile_image(folder, seed)
        started = time.process_time()
        try:
            us.read_images(source, PREPROCESSING).batch([0])
            found["read"] += 1
        except us.MimicutError:
            found["refused"] += 1
        except Exception as error:
            raise AssertionError(f"image {seed}: raw {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.process_time() - started)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {**dict(sorted(found.items())), "most_seconds": round(slowest, 2), "grown_mb": round(grown / 1e6)}


def test_a_few_changes_of_a_result_are_refused_or_change_nothing(attacked):
    counts = try_mutations(attacked, range(SAMPLE))
    assert counts["refused"] > 0


def test_a_few_hostile_images_are_refused_or_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_images(tmp_path / "images", range(IMAGES))


@pytest.mark.attack
def test_changes_of_a_result_are_refused_or_change_nothing(attacked):
    counts = try_mutations(attacked, range(FULL))
    record(
        "changes of a result", attacks=sum(n for how, n in counts.items() if how.startswith(("refused", "same"))),
        **counts,
    )  # fmt: skip


@pytest.mark.attack
def test_hostile_images_are_refused_or_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them is "."
    tries = max(1, FULL // 10)
    counts = try_images(tmp_path / "images", range(tries))
    assert counts["most_seconds"] <= MOST_SECONDS
    assert counts["grown_mb"] * 1e6 <= MOST_BYTES
    record("hostile images", attacks=tries, **counts)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def fields_of(name: str) -> st.SearchStrategy:
    """The file of a sound result with some of its fields replaced by anything."""
    sound = json.loads((RELEASE / name).read_text())
    sound.pop("stored", None)
    return st.dictionaries(st.sampled_from(sorted(sound)), PLAIN, min_size=1, max_size=3).map(lambda new: sound | new)


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(FULL // 10, marks=pytest.mark.attack)])
def test_any_plan_is_read_or_refused(examples):
    @settings(max_examples=examples, **QUIET)
    @given(fields_of("plan.json"))
    def check(data):
        target_plan(json.dumps(data).encode())

    check()


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(FULL // 10, marks=pytest.mark.attack)])
def test_any_report_is_shown_or_refused(examples):
    plan = read(RELEASE)[0]

    @settings(max_examples=examples, **QUIET)
    @given(fields_of("report.json"))
    def check(data):
        target_report(json.dumps(data).encode(), plan)

    check()


ARRAYS = arrays(
    scalar_dtypes() | unicode_string_dtypes() | st.just(np.dtype(object)), array_shapes(min_dims=0, max_dims=5)
)


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(FULL // 10, marks=pytest.mark.attack)])
def test_any_array_is_read_or_refused(examples):
    @settings(max_examples=examples, **QUIET)
    @given(ARRAYS | st.lists(ARRAYS, max_size=3))
    def check(images):
        with suppress(us.MimicutError):
            us.read_images(images, PREPROCESSING).batch([0])

    check()


@pytest.mark.parametrize("tries", [EXAMPLES, pytest.param(FULL // 10, marks=pytest.mark.attack)])
def test_any_bytes_are_read_or_refused(tmp_path, tries):
    plan = read(RELEASE)[0]
    targets = {
        "plan.json": target_plan,
        "report.json": lambda data: target_report(data, plan),
        "weights.safetensors": lambda data: target_weights(data, tmp_path / "w"),
    }
    for name, target in targets.items():
        sound = (RELEASE / name).read_bytes()
        for seed in range(tries):
            target(mutated_bytes(sound, random.Random(seed)))
