"""Jobs in processes of their own: shares of the machine, kills, interrupts."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mimicut.base.errors import InputError
from mimicut.workflow import jobs, jobs_on_ray
from mimicut.workflow.jobs import Job, Share, ThisMachine, row_of

ROOT = Path(__file__).parents[2]
STOPS = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('{\"stopped\": 1}'), sys.exit(130)))\n"


def job(name, code, *arguments):
    return Job(name, Path(name), ("-c", code, *map(str, arguments)), Share(1, 0, None))


def ended(machine, *given):
    return {each.name: end for each, end in machine.execute(given)}


def test_every_job_ends_as_its_process_does_and_has_its_threads():
    code = "import os; print('words'); print('{\"threads\": \"' + os.environ['OMP_NUM_THREADS'] + '\"}')"
    fails = "import sys; print('mimicut: no', file=sys.stderr); sys.exit(3)"
    found = ended(ThisMachine(1), job("good", code), job("bad", fails))
    assert (found["good"].code, found["good"].line, found["good"].starts) == (0, {"threads": "1"}, 1)
    assert (found["bad"].code, found["bad"].line, found["bad"].said) == (3, None, "mimicut: no")
    assert row_of(job("bad", ""), found["bad"])["said"] == "mimicut: no"


def test_a_job_that_is_killed_is_started_again_and_not_for_ever(tmp_path):
    code = (
        "import os, sys; mark, times = sys.argv[1], int(sys.argv[2])\n"
        "open(mark, 'a').write('x')\n"
        "if os.path.getsize(mark) <= times: os.kill(os.getpid(), 9)\nprint('{}')"
    )
    found = ended(ThisMachine(1), job("twice", code, tmp_path / "a", 2), job("always", code, tmp_path / "b", 99))
    assert (found["twice"].code, found["twice"].starts) == (0, 3)
    assert (found["always"].code, found["always"].starts) == (-9, 4)
    assert (tmp_path / "b").stat().st_size == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_stops_the_jobs_that_run_and_starts_no_other(tmp_path, number):
    waits = STOPS + f"open({str(tmp_path / 'runs')!r}, 'w').close()\nimport time; time.sleep(60)"

    def interrupt():
        while not (tmp_path / "runs").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(number)
    found = ended(ThisMachine(1), job("runs", waits), job("waits", waits))
    assert signal.getsignal(number) is before
    assert (found["runs"].code, found["runs"].line) == (130, {"stopped": 1})
    assert (found["waits"].code, found["waits"].starts) == (130, 0)


def test_a_second_interrupt_kills(tmp_path):
    deaf = f"import signal, time; signal.signal(15, 1); open({str(tmp_path / 'runs')!r}, 'w').close(); time.sleep(60)"
    count = []

    def interrupts():
        if (tmp_path / "runs").exists():
            count.append(1)
        return min(2, len(count))

    found = jobs.run_job(job("deaf", deaf), tmp_path, interrupts)
    assert (found.code, found.starts) == (130, 1)
    assert found.seconds < 30


def test_a_job_ends_with_the_process_that_waits_for_it(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("import time\nopen('runs', 'w').close()\ntime.sleep(60)\n")
    command = ["-m", "mimicut.cli.job_process", "inspect", "net.py:build", "--threads", "1"]
    code = (
        f"import subprocess, sys, os, time\nits, ours = os.pipe()\n"
        f"print(subprocess.Popen([sys.executable, *{command}], stdin=its, stdout=2).pid, flush=True)\ntime.sleep(60)"
    )
    waiting = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    number = int(waiting.stdout.readline())
    while not (tmp_path / "runs").exists():
        assert alive(number)
        time.sleep(0.02)
    waiting.kill()
    waiting.wait()  # its job would hold the pipe of its words
    waiting.stdout.close()
    end = time.monotonic() + 20
    while alive(number):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def sleeper(tmp_path):
    """Code of a job that starts a process which holds its pipes, and where that one writes its number."""
    mark = tmp_path / "sleeper"
    child = f"import os, time; open({str(mark)!r} + '.part', 'w').write(str(os.getpid())); time.sleep(50)"
    wait = f"import os, time\nwhile not os.path.exists({str(mark)!r} + '.part'): time.sleep(0.01)\n"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])\n{wait}"
    return f"{code}time.sleep(0.1); os.rename({str(mark)!r} + '.part', {str(mark)!r})\n", mark


def gone(mark):
    end = time.monotonic() + 10
    while alive(int(mark.read_text())) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(int(mark.read_text()))


def test_a_job_does_not_outlive_a_failure_of_what_asks_for_interrupts(tmp_path, sleeper):
    code, mark = sleeper

    def interrupts():
        if mark.exists():
            raise RuntimeError("the actor died")
        return 0

    with pytest.raises(RuntimeError, match="the actor died"):
        jobs.run_job(job("lost", code + "time.sleep(60)"), tmp_path, interrupts)
    assert gone(mark)


def test_what_a_job_started_is_killed_with_it(tmp_path, sleeper):
    code, mark = sleeper
    found = jobs.run_job(job("parent", code + "time.sleep(60)"), tmp_path, lambda: 2 * mark.exists())
    assert (found.code, found.starts) == (130, 1)
    assert found.seconds < 30
    assert gone(mark)


def test_what_a_crashed_job_started_does_not_keep_it_from_its_next_start(tmp_path, sleeper):
    code, mark = sleeper
    once = f"import os, sys\nif os.path.exists({str(mark)!r}): sys.exit(0)\n{code}os.kill(os.getpid(), 9)"
    found = jobs.run_job(job("parent", once), tmp_path, lambda: 0)
    assert (found.code, found.starts) == (0, 2)
    assert found.seconds < 30
    assert gone(mark)


def test_processes_of_a_job_divide_its_threads():
    code = "import os; print('{\"threads\": \"' + os.environ['OMP_NUM_THREADS'] + '\"}')"
    two = Job("two", Path("two"), ("-c", code), Share(5, 0, None), processes=2)
    assert ended(ThisMachine(1), two)["two"].line == {"threads": "2"}
    assert Job("many", Path(), (), Share(1, 0, None), processes=2).own_threads == 1


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_more_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(jobs, "usable_cores", lambda: 8)
    monkeypatch.setattr(jobs, "_visible_gpus", lambda: ["4", "5"])
    monkeypatch.setattr(jobs.memory, "available", lambda: 6_000_000_000)
    assert ThisMachine(3).share(None) == Share(2, 0, 1_000_000_000)
    assert ThisMachine(1).share(5) == Share(5, 0, 3_000_000_000)
    with pytest.raises(InputError, match=r"3 jobs at once with 3 threads each are more than its 8 cores"):
        ThisMachine(3).share(3)
    assert ThisMachine(4, 0.5).share(None) == Share(2, 0.5, 750_000_000)
    with pytest.raises(InputError, match=r"5 jobs at once with 0.5 GPUs each need 3, found 2"):
        ThisMachine(5, 0.5)
    with pytest.raises(InputError, match=r"2 jobs at once with 2 GPUs each need 4, found 2"):
        ThisMachine(2, 2)


def test_jobs_at_once_see_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(jobs, "_visible_gpus", lambda: ["4", "5", "6", "7"])
    seen = [
        [jobs._gpu_environment(slot, gpus).get("CUDA_VISIBLE_DEVICES") for slot in range(2)] for gpus in (0.5, 1, 2)
    ]
    assert seen == [["4", "4"], ["4", "5"], ["4,5", "6,7"]]
    assert jobs._gpu_environment(0, 0) == {}


class RayError(Exception):
    """The base of what Ray raises."""


class TaskCancelledError(RayError):
    """Of a task that is cancelled."""


class FakeRay:
    """Machines as `ray.nodes` has them."""

    def __init__(self, *machines):
        self._machines = machines

    def nodes(self):
        return [{"Alive": alive, "Resources": found} for alive, found in self._machines]


def test_the_share_of_a_cluster_is_what_its_smallest_machine_has_for_a_job():
    large, small = {"CPU": 16.0, "GPU": 1.0, "memory": 64e9}, {"CPU": 4.0, "memory": 4e9}
    lost = {"CPU": 99.0, "GPU": 8.0, "memory": 1e9}
    ray = FakeRay((True, large), (True, small), (False, lost))
    cluster = jobs_on_ray.Cluster(ray, "auto", None, 0)
    assert cluster.share(None) == Share(1, 0, 1_000_000_000)
    assert cluster.share(2) == Share(2, 0, 2_000_000_000)
    assert cluster.share(8) == Share(8, 0, 4_000_000_000)
    assert cluster.at_once([Job(str(n), Path(), (), Share(2, 0, None)) for n in range(30)]) == 10
    with pytest.raises(
        InputError, match=r"asks for one machine with 17 cores and 0 GPUs, found 2 with 16 and 1; 4 and"
    ):
        cluster.share(17)
    with pytest.raises(InputError, match=r"asks for one machine with 1 cores and 2 GPUs"):
        jobs_on_ray.Cluster(ray, "auto", None, 2).share(1)
    assert jobs_on_ray.Cluster(ray, "auto", 3, 0.5).at_once([job(str(n), "") for n in range(30)]) == 2


def test_a_cluster_that_is_not_there_is_said_at_once():
    with pytest.raises(InputError, match=r"connecting to Ray at ray://127.0.0.1:1: nothing answers there.*refused"):
        jobs_on_ray._check_answer("ray://127.0.0.1:1", "connecting to Ray at ray://127.0.0.1:1")
    with pytest.raises(InputError, match=r"nothing answers there"):
        jobs_on_ray._check_answer("localhost:a", "connecting")


def test_what_is_no_ray_is_said_soon(monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(jobs_on_ray, "_ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            with pytest.raises(InputError, match=r"connecting: nothing answers there .*what listens there is not Ray"):
                jobs_on_ray._check_answer(given, "connecting")


class BusyRay(FakeRay):
    """A cluster with room for one job, which never ends.

    Args:
        heard: Whether the actor lives.
    """

    exceptions = SimpleNamespace(RayError=RayError, TaskCancelledError=TaskCancelledError)

    def __init__(self, heard):
        super().__init__((True, {"CPU": 1.0}))
        self.heard, self.started, self.cancelled, self.sent, self.waited = heard, [], set(), [], 0

    def remote(self, **options):
        task = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._start))
        counter = SimpleNamespace(tell=SimpleNamespace(remote=lambda count: count))
        return lambda what: task if "max_retries" in options else SimpleNamespace(remote=lambda: counter)

    def _start(self, given, place, counter):
        self.started.append(given.name)
        return given.name

    def wait(self, tasks, num_returns, timeout):
        if self.heard or not self.waited:
            os.kill(os.getpid(), signal.SIGINT)  # the user at the terminal
        self.waited += 1
        assert self.waited < 20, "the sweep does not end"
        return [name for name in tasks if name in self.cancelled], []

    def get(self, what, timeout=None):
        if what in self.cancelled:
            raise TaskCancelledError
        if not self.heard:
            raise RayError
        self.sent.append(what)
        return {self.started[0]}

    def cancel(self, task):
        self.cancelled.add(task)


@pytest.mark.parametrize("heard", [True, False], ids=["the actor lives", "the actor is lost"])
def test_an_interrupt_ends_a_sweep_on_ray_whatever_its_tasks_do(monkeypatch, heard):
    monkeypatch.setattr(jobs_on_ray, "_KILL_SECONDS", 0.0)
    ray = BusyRay(heard)
    found = ended(jobs_on_ray.Cluster(ray, "auto", 2, 0), *[job(name, "") for name in ("runs", "queued", "left")])
    assert ray.started == ["runs", "queued"]
    assert {name: (end.code, end.starts) for name, end in found.items()} == {
        "runs": (130, 1), "queued": (130, 0 if heard else 1), "left": (130, 0)
    }  # fmt: skip
    assert ray.cancelled == ({"queued"} if heard else set())
    assert ray.sent == ([1, 2] if heard else [])
