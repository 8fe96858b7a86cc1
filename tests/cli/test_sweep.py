"""mimicut sweep: its file, its table, and ten jobs on Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import call

from mimicut.base import environment, ranks
from mimicut.base.errors import StoreError
from mimicut.cli import cmd_sweep
from mimicut.results import sweep_table
from mimicut.results.store import weights_digest
from mimicut.workflow import jobs

ROOT = Path(__file__).parents[2]
HEAD = '[defaults]\nteacher = "net.py:build"\nimages = "photos"\n'


@pytest.fixture(autouse=True)
def _cores(monkeypatch):
    for module in (jobs, environment, ranks):
        monkeypatch.setattr(module, "usable_cores", lambda: 4)
    monkeypatch.setattr(jobs.memory, "available", lambda: 4_000_000_000)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def planned(capsys, place, text, *options):
    """What a file is read as: (exit code, jobs by their name, stderr)."""
    (place / "jobs.toml").write_text(text)
    code, found, said = call(capsys, "sweep", "jobs.toml", "--out", "fleet", "--dry-run", *options)
    assert not (place / "fleet").exists()
    return code, {each["job"]: each for each in (found or {"jobs": []})["jobs"]}, said


def test_a_list_is_a_job_for_each_value_where_a_run_takes_one(capsys, place, monkeypatch):
    commands = {}
    made = cmd_sweep._job
    monkeypatch.setattr(cmd_sweep, "_job", lambda *given: commands.setdefault(given[0], made(*given)))
    text = HEAD + (
        'exclude = ["a", "b"]\n[[job]]\nkeep = [0.5, 0.7]\nseed = [1, 2]\n'
        '[[job]]\nname = "own"\nout = "elsewhere"\nkeep-width = 0.5\nthreads = 2\nmax_memory = "1G"\n'
        'tensorboard = "logs"\nspare-ends = true\n'
    )
    code, found, said = planned(capsys, place, text, "--jobs", 2)
    assert code == 0
    four = [f"net.py-build-keep-{keep}-seed-{seed}" for keep in (0.5, 0.7) for seed in (1, 2)]
    assert list(found) == [*four, "own"]
    assert {name: each["folder"] for name, each in found.items()} == {
        **{name: f"fleet/{name}" for name in four}, "own": "elsewhere"
    }  # fmt: skip
    assert {(each["threads"], each["max_memory"]) for each in found.values()} == {(2, 1_000_000_000)}
    assert said == "5 jobs, 2 at once\neach: 2 threads, 1.0 GB of memory\n"
    assert sorted(commands["own"].arguments[4:]) == sorted([
        "--exclude=a", "--exclude=b", "--out=elsewhere", "--keep-width=0.5", "--threads=2", "--max-memory=1000000000",
        "--tensorboard=logs/own", "--spare-ends", "--", "net.py:build", "photos",
    ])  # fmt: skip
    assert {"--keep=0.5", "--seed=2", f"--out=fleet/{four[1]}"} <= set(commands[four[1]].arguments)


def test_all_faults_are_said_at_once_and_nothing_is_run(capsys, place):
    text = HEAD + (
        'effrt = "quick"\n\n[[job]]\nkeap = 0.5\n\n[[job]]\nname = "a"\nkeep = [0.5, "half"]\n\n'
        '[[job]]\nname = "b"\nkeep = 2\nimages = "nowhere"\n\n[[job]]\nname = "c"\nkeep = 0.5\nresume = false\n\n'
        '[[job]]\nname = "../d"\nkeep = 0.5\npreset = "best"\n\n[other]\n'
    )
    code, found, said = planned(capsys, place, text)
    assert (code, found) == (2, {})
    lines = said.splitlines()
    assert lines[0] == "mimicut: reading the jobs jobs.toml: 9 faults; nothing was run"
    for words in (
        "line 4, [defaults]: there is no option 'effrt'; did you mean 'effort'?",
        "line 7, job 1: there is no option 'keap'; did you mean 'keep'?",
        "line 11, job 2: keep is 'half', expected a number",
        "line 13, job 3: images is nowhere, and there is no such file or folder",
        "line 13, job 3: making a plan: keep is 2.0, expected a share",
        "line 21, job 4: there is no option 'resume'",
        "line 23, job 5: configuring mimic: found the preset 'best', expected one of",
        "line 23, job 5: its name is '../d', expected one that a folder can have",
        "line 28: there is no option 'other'",
    ):
        assert any(words in line for line in lines[1:]), (words, said)


def test_the_file_on_the_page_about_many_jobs_has_five(capsys, place):
    text = (ROOT / "docs/how_to/many_jobs.md").read_text().partition("```toml\n")[2].partition("```")[0]
    (place / "gate").mkdir()
    code, found, said = planned(capsys, place, text)
    assert code == 0, said
    assert "gate-camera" in found
    assert "torchvision-resnet18-keep-0.5" in found
    assert len(found) == 5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('[[job]]\nkeep = 0.5\n[[job]]\nkeep = 0.7\n',
         "line 6, job 2: net.py-build goes to fleet/net.py-build, as net.py-build (line 4, job 1) does; give one of"),
        ('[[job]]\nkeep = 0.5\nname = "a"\nout = "x"\n[[job]]\nkeep = 0.7\nname = "b"\nout = "x/inner/"\n',
         "line 8, job 2: b goes to x/inner/, as a (line 4, job 1) does"),
        ('[[job]]\nkeep = 0.5\nname = "b"\nout = "x/inner"\n[[job]]\nkeep = 0.7\nname = "a"\nout = "x"\n',
         "line 8, job 2: a goes to x, as b (line 4, job 1) does"),
        ('[[job]]\nkeep = 0.5\nout = "fleet"\n',
         "net.py-build goes to fleet, as the sweep's own table does"),
        ('[[job]]\nkeep = 0.5\nname = "sweep.html"\n',
         "sweep.html goes to fleet/sweep.html, as the sweep's own sweep.html does"),
        ('[[job]]\nkeep = 0.5\nname = "a\\u0000b"\n', r"line 4, job 1: its name is 'a\x00b', expected one that"),
        ('[[job]]\nkeep = 0.5\nheld-out = "a\\u0000b"\n',
         r"line 4, job 1: held_out is 'a\x00b', and no process can be given that"),
        ('[[job]]\nkeep = 0.5\nthreads = 0\n', "line 4, job 1: threads is 0, expected a number from 1 to 4"),
        ('[[job]]\nkeep = 0.5\nthreads = 5\n',
         "line 4, job 1: threads is 5, expected a number from 1 to 4, which are the cores of this machine"),
        ('[[job]]\nkeep = 0.5\ndevices = 0\n', "line 4, job 1: devices is 0, expected a number from 1"),
        ('[[job]]\nkeep = 0.5\ndevices = 64\ndevice = "cpu"\n',
         "line 4, job 1: working on 64 devices: found 4 processor core(s)"),
        ('[[job]]\nkeep = 0.5\ndevices = 2\ndevice = "cpu"\npreset = "paper"\n',
         "line 4, job 1: mimicking on 2 devices: norm_mode is 'train'"),
        ('[[job]]\nkeep = 0.5\ndevices = 2\ndevice = "cpu"\ncrossfit = 3\n',
         "line 4, job 1: working on 2 devices: found crossfit, whose runs follow one another on one device"),
        ('[[job]]\nkeep = 0.5\ndevice = "meta"\n', "line 4, job 1: working on 'meta': it holds no data"),
        ('[[job]]\nkeep = 0.5\nout = "x"\n[[job]]\nkeep = 0.7\nout = "y"\n',
         "net.py-build goes to y, as another job of that name does"),
        ('[[job]]\nname = "a"\n', "line 4, job 1: making a plan"),
    ],
)  # fmt: skip
def test_jobs_that_would_meet_in_a_folder_or_have_no_budget(capsys, place, more, words):
    code, _, said = planned(capsys, place, HEAD + more)
    assert code == 2
    assert "jobs.toml: one fault; nothing was run" in said
    assert words in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keep = 0.5", "found no [[job]]; expected a TOML file with a table [[job]] for each job"),
        ("[[job]]\n[[job", "expected a TOML file with a table [[job]]"),
        ('[[job]]\nkeep = 0.5\nteacher = "net.py:build"', "line 1, job 1: images is missing"),
        ("defaults = 3\n[[job]]\n", "defaults is no table"),
    ],
)
def test_a_file_without_jobs(capsys, place, text, words):
    code, _, said = planned(capsys, place, text)
    assert code == 2
    assert words in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--jobs", 3, "--threads", 2), "3 jobs at once with 2 threads each are more than its 4 cores"),
        (("--gpus", 1000), "1 jobs at once with 1000 GPUs each need 1000, found"),
        (("--gpus", 1.5), "found 1.5 for each job, expected a whole number, or a share below 1"),
        (("--gpus", "inf"), "found inf for each job, expected a whole number, or a share below 1"),
        (("--gpus", 1e-5), "for each job, expected a whole number, or a share below 1 (from 0.0001 on)"),
        (("--address", "127.0.0.1:1"), "connecting to Ray at 127.0.0.1:1: nothing answers there"),
        (("--address", "ray://127.0.0.1"), "connecting to Ray at ray://127.0.0.1: found no port; expected ray://HOST:"),
        (("--address", "head"), "connecting to Ray at head: found no port; expected ray://HOST:PORT"),
    ],
)
def test_more_than_there_is_or_a_cluster_that_is_not_there(capsys, place, options, words):
    code, _, said = planned(capsys, place, HEAD + "[[job]]\nkeep = 0.5\n", *options)
    assert code == 2
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_device_that_no_job_of_this_machine_has(capsys, place, monkeypatch):
    text = HEAD + '[[job]]\nkeep = 0.5\ndevice = "cuda:1"\n'
    code, _, said = planned(capsys, place, text)
    assert code == 2
    assert "line 4, job 1: working on 'cuda:1': " in said
    command = (place / "jobs.toml", place / "fleet")
    assert cmd_sweep._checked(*command, on_ray=True, elsewhere=True, gpus=1)  # of a machine that is not known here
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert planned(capsys, place, text)[0] == 0


def test_a_job_whose_devices_are_too_many_is_named(capsys, place):
    text = HEAD + '[[job]]\nkeep = 0.5\ndevice = "cpu"\ndevices = 3\nname = "wide"\n'
    code, _, said = planned(capsys, place, text, "--jobs", 2)
    assert (code, said) == (2, (
        "mimicut: sharing the machines: the job wide has devices = 3, each with a core of its own, and there are not "
        "as many for it; expected fewer devices or --jobs\n"
    ))  # fmt: skip


@pytest.mark.parametrize(("threads", "share", "own"), [(1, 2, 1), (4, 4, 2)])
def test_the_devices_of_a_job_divide_its_threads(capsys, place, monkeypatch, threads, share, own):
    commands = []
    made = cmd_sweep._job
    monkeypatch.setattr(cmd_sweep, "_job", lambda *given: commands.append(made(*given)) or commands[0])
    _, found, _ = planned(capsys, place, HEAD + f"[[job]]\nkeep = 0.5\ndevices = 2\nthreads = {threads}\n")
    assert found["net.py-build"]["threads"] == share
    assert f"--threads={share}" in commands[0].arguments  # which the processes of the job divide
    assert commands[0].own_threads == own


@pytest.mark.parametrize(
    ("name", "text", "words", "forced"),
    [
        ("sweep.html", "<title>Of my own</title>", "its sweep.html is not one that mimicut sweep wrote", False),
        ("sweep.json", "[1]", "its sweep.json is not one that mimicut sweep wrote", False),
        ("sweep.json", '{"jobs": [{"job": "x", "folder": "fleet/x"}]}',
         "it holds the table of another sweep (with x); name another folder, or replace it with --force", True),
    ],
)  # fmt: skip
def test_files_of_others_are_not_replaced(capsys, place, monkeypatch, name, text, words, forced):
    monkeypatch.setattr(jobs.ThisMachine, "execute", lambda machine, given: pytest.fail("a job was run"))
    (place / "jobs.toml").write_text(HEAD + "[[job]]\nkeep = 0.5\n")
    (place / "fleet").mkdir()
    (place / "fleet" / name).write_text(text)
    code, _, said = call(capsys, "sweep", "jobs.toml", "--out", "fleet")
    assert code == 2
    assert words in said
    assert call(capsys, "sweep", "jobs.toml", "--out", "fleet", "--force", "--dry-run")[0] == (0 if forced else 2)
    assert (place / "fleet" / name).read_text() == text


def test_the_table_of_fewer_of_the_same_jobs_is_replaced(tmp_path):
    sweep_table.write_table(tmp_path, ROWS[:2], [], 1.0)
    sweep_table.check_replaceable(tmp_path, ROWS, force=False)
    with pytest.raises(StoreError, match=r"another sweep \(with poor\)"):
        sweep_table.check_replaceable(tmp_path, ROWS[:1], force=False)


def test_cuda_on_ray_needs_gpus(capsys, place):
    text = HEAD + '[[job]]\nkeep = 0.5\ndevice = "cuda"\n'
    _, _, said = planned(capsys, place, text, "--address", "127.0.0.1:1")
    assert "line 4, job 1: device is cuda, and no job gets a GPU; expected --gpus" in said


RESULT = {
    "macs_teacher": 200, "macs_student": 100, "top1_agreement": 0.9, "top1_agreement_low": 0.8,
    "top1_agreement_high": 0.95, "feature_error_relative": 0.1, "seconds": 12.3, "go": True, "folder": "/there",
    "latency_ms_teacher": 2.0, "latency_ms_student": 1.5,
}  # fmt: skip


def row(name, code, starts=1, result=None, said=None):
    return {"job": name, "folder": f"fleet/{name}", "exit_code": code, "starts": starts, "seconds": 20.0,
            "result": result, "said": said}  # fmt: skip


ROWS = [
    row("<b>good</b>", 0, result=RESULT),
    row("poor", 1, result=RESULT | {"go": False}),
    row(
        "free",
        0,
        result={name: value for name, value in RESULT.items() if name != "go"}
        | {"top1_agreement": None, "latency_ms_teacher": None},
    ),
    row("bad", 2, said="reading images\nmimicut: found <none>"),
    row("crashed", -11, starts=4, said=""),
    row("stopped", 130, result=RESULT),
    row("waits", 130, starts=0),
]


def test_the_table_has_a_row_for_each_job():
    lines = [" ".join(line.split()) for line in sweep_table.table(ROWS).splitlines()]
    assert lines[1:] == [
        "<b>good</b> 90.0% (80.0% to 95.0%) 50% 75% 12 GO fleet/<b>good</b>",
        "poor 90.0% (80.0% to 95.0%) 50% 75% 12 NO GO fleet/poor",
        "free feature error 0.1 50% 12 done fleet/free",
        "bad 20 failed found <none>",
        "crashed 20 failed exit code -11",
        "stopped 90.0% (80.0% to 95.0%) 50% 75% 12 stopped fleet/stopped",
        "waits 20 not started fleet/waits",
        "7 jobs: 1 GO, 1 NO GO, 1 done, 2 failed, 1 stopped, 1 not started",
    ]


def test_the_page_links_to_the_reports_and_escapes_what_it_is_given(tmp_path):
    text = sweep_table.page(ROWS, ["7 jobs, 2 at once"], Path("fleet"))
    assert '<a href="%3Cb%3Egood%3C/b%3E/report.html">&lt;b&gt;good&lt;/b&gt;</a>' in text
    assert "found &lt;none&gt;" in text
    assert "<b>" not in text
    assert "<none>" not in text
    assert text.count("<a ") == 4  # those with a result
    assert '<td class="nogo">NO GO</td>' in text
    assert "prefers-color-scheme: dark" in text


def test_the_worst_of_all_is_the_exit_code_and_a_crash_counts_as_one(capsys, place, monkeypatch):
    (place / "jobs.toml").write_text(HEAD + '[[job]]\nkeep = 0.5\nname = ["a"]\n'.replace('["a"]', '"a"'))

    class Machines(jobs.ThisMachine):
        ends: dict = {}

        def execute(self, given):
            yield given[0], self.ends["one"]

    monkeypatch.setattr(jobs, "ThisMachine", Machines)
    for code, line, worst in (
        (0, RESULT, 0), (1, RESULT | {"go": False}, 1), (2, None, 2), (3, None, 3), (-9, None, 1), (137, None, 1),
        (130, None, 130),
    ):  # fmt: skip
        Machines.ends = {"one": jobs.Ended(code, line, "words", 1.0, 1)}
        found, answer, said = call(capsys, "sweep", "jobs.toml", "--out", "fleet")
        assert found == worst
        assert answer["jobs"][0]["exit_code"] == code
        assert answer == {"folder": "fleet", "jobs": json.loads((place / "fleet/sweep.json").read_text())["jobs"]}
        assert ("the same command goes on" in said) == (worst == 130)
    assert "Sweep of 1 jobs" in (place / "fleet/sweep.html").read_text()


def sweep_process(place, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "mimicut", "sweep", "jobs.toml", "--out", "fleet", *options], cwd=place, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def workers_of(name):
    """The processes that wait for a job's own."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            words = (status.parent / "cmdline").read_bytes().split(b"\0")
            parent = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid:"))
        except (OSError, StopIteration):
            continue
        if b"mimicut.cli.job_process" in words and f"--out=fleet/{name}".encode() in words:
            found.append((int(status.parent.name), int(parent)))
    return found


def kill_worker(process, name, seen, seconds=300):
    """Kill the worker that waits for a job, once its process is another than those seen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        for own, worker in workers_of(name):
            if own not in seen:
                os.kill(worker, signal.SIGKILL)
                seen.add(own)
                return
        time.sleep(0.1)
    raise AssertionError(f"{name} was not started again: {process.communicate()}")


@pytest.mark.attack
def test_ten_jobs_on_ray_with_two_workers_of_which_one_is_killed_twice_equal_those_one_after_the_other(
    capsys, tmp_path, monkeypatch
):
    pytest.importorskip("ray")
    from mimicut.demo.photographs import write_few_images

    monkeypatch.chdir(tmp_path)
    write_few_images("photos", 50, seed=1)
    options = {"effort": "quick", "extra": "none", "max-memory": "2G"}
    kept = {"vgg7": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "resnet14": (0.4, 0.5, 0.6, 0.7)}
    text = "[defaults]\nimages = 'photos'\n" + "".join(f"{name} = '{value}'\n" for name, value in options.items())
    text += "".join(f"[[job]]\nteacher = 'demo:{name}'\nkeep = {list(keeps)}\n" for name, keeps in kept.items())
    (tmp_path / "jobs.toml").write_text(text)
    process, seen = sweep_process(tmp_path, "--address", "local", "--jobs", "2", "--threads", "1"), set()
    for _ in range(2):
        kill_worker(process, "demo-vgg7-keep-0.4", seen)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    rows = json.loads(out.splitlines()[-1])["jobs"]  # Ray says on stdout, too, that a worker died
    assert {each["exit_code"] for each in rows} == {0}
    jobs = sum(map(len, kept.values()))
    assert len(rows) == jobs
    flags = [f"--{name}={value}" for name, value in options.items()]
    for name, keeps in kept.items():
        for keep in keeps:
            code, _, said = call(
                capsys, "compress", f"demo:{name}", "photos", "--keep", keep, "--out", "alone", "--force", *flags
            )
            assert code == 0, said
            assert weights_digest("alone") == weights_digest(f"fleet/demo-{name}-keep-{keep}")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fleet").glob("*/weights.safetensors")}
    assert len(before) == jobs


@pytest.mark.long
def test_a_sweep_that_is_stopped_goes_on_where_it_was(place):
    (place / "jobs.toml").write_text(
        HEAD + "extra = 'none'\nkeep = 0.5\n[[job]]\nname = 'first'\nsteps = 4\n[[job]]\nname = 'next'\nsteps = 200\n"
    )
    process = sweep_process(place, "--threads", "1", "--jobs", "1")  # the second is not begun before the first is done
    while not process.stderr.readline().startswith("1/2 first: done"):
        assert process.poll() is None
    while not workers_of("next"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert [each["exit_code"] for each in json.loads(out)["jobs"]] == [0, 130]
    assert not workers_of("next")
    weights = place / "fleet/first/weights.safetensors"
    before = weights.stat().st_mtime_ns
    again = sweep_process(place, "--threads", "1", "--jobs", "1")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert [each["exit_code"] for each in json.loads(out)["jobs"]] == [0, 0]
    assert weights.stat().st_mtime_ns == before  # it was complete
