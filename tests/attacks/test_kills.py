"""kill -9 before every change of a file: what is left is old, new or absent, and the same command goes on from it."""

import functools

import pytest
from attack_scenarios import SCENARIOS, Scenario, compressed_state, compressing, copied, nothing
from attacks import SHARE, changes_of, in_child, in_fresh_process, killer, places_of, record, thinned, tree

from mimicut.base import disk
from mimicut.base.errors import StoreError


def attack(scenario, tmp_path, share):
    """Kill at every place; return how many kills were survived."""
    start, done, place = tmp_path / "start", tmp_path / "done", tmp_path / "place"
    start.mkdir()
    scenario.prepare(start)
    before = scenario.state(start)
    copied(start, done)
    announced = tmp_path / "changes"

    def whole():
        announced.write_text(repr([kind for kind, _ in changes_of(lambda: scenario.act(done))]))

    assert in_child(whole) == 0
    after, end = scenario.state(done), tree(done)
    assert after != before
    places = thinned(places_of([(kind, None) for kind in eval(announced.read_text())]), share)
    for number, torn in places:
        copied(start, place)
        assert in_child(lambda: scenario.act(place), killer(number, torn)) == -9
        left = scenario.state(place)
        assert left in (before, after), (number, torn)
        again = functools.partial(refused_or_done, scenario, place, scenario.refuses and left == after)
        assert in_child(again) == 0, (number, torn)
        assert tree(place) == end, (number, torn)
    return len(places)


def refused_or_done(scenario, place, may_refuse):
    try:
        scenario.act(place)
    except StoreError as error:
        if not (may_refuse and "it exists" in str(error)):
            raise


@pytest.mark.attack
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_kill_is_survived(name, tmp_path):
    kills = attack(SCENARIOS[name], tmp_path, 10)
    record(f"kills: {name}", attacks=kills)


@pytest.mark.parametrize("name", ["save Chain", "replace Chain", "export", "checkpoint"])
def test_a_sample_of_kills_is_survived(name, tmp_path):
    attack(SCENARIOS[name], tmp_path, 0.15)


@pytest.mark.parametrize("name", ["replace Chain", "report Chain", "export", "replace exported", "checkpoint"])
def test_nothing_changes_but_what_is_announced(name, tmp_path):
    """The list of changes is complete: between two of them all files are as they were, whoever writes them."""
    scenario, seen = SCENARIOS[name], []
    scenario.prepare(tmp_path)

    def everything():
        return {str(p): (p.stat().st_mode, p.read_bytes() if p.is_file() else None) for p in tmp_path.rglob("*")}

    def observe(when, kind, path):
        now = everything()
        if when == "before" and seen:
            assert now == seen[-1], f"before {kind} {path}: something else changed files"
        seen.append(now)

    def work():
        disk.observer = observe
        scenario.act(tmp_path)
        assert everything() == seen[-1]

    assert in_child(work, observe) == 0


def kill_a_run(tmp_path):
    return attack(Scenario(nothing, compressing, compressed_state), tmp_path, SHARE / 3)  # two whole runs for each kill


@pytest.mark.attack
def test_every_kill_of_a_run_is_survived(tmp_path):
    kills = in_fresh_process(kill_a_run, tmp_path)
    record("kills: compress and resume", attacks=kills)
