"""Several processes fill one store: disjoint work, nothing twice, and nothing half-written by those that are killed.

The processes are forks of this one with the real fill_store, Claims and Team; the source draws small random priors.
ENHANCER_KILL_ROUNDS=50 makes the test of killed processes long.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from enhancer.data.samples import Problem, Sample
from enhancer.filling import fill_store
from enhancer.processes import Process, Team, ahead
from enhancer.runfolder import read_json
from vdm_priors.errors import SampleError, UserError
from vdm_priors.grid import TokenGrid
from vdm_priors.prior import MotionPrior
from vdm_priors.store import Claims, PriorStore, content_key
from vdm_priors.words import split_words

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import recipe_values  # noqa: E402

ROUNDS = int(os.environ.get("ENHANCER_KILL_ROUNDS", "6"))
fork = multiprocessing.get_context("fork")


class LoggedSource:
    """Small random priors; every one that is made, or fails, is a line of a file that all processes append to."""

    name = "logged"

    def __init__(self, log: Path, seconds: float = 0.0, bad: tuple[str, ...] = (), breaks: bool = False) -> None:
        self.log, self.seconds, self.bad, self.breaks = log, seconds, bad, breaks

    def key(self, sample: Sample) -> str:
        if not sample.question:
            raise SampleError("it has no text")
        return content_key(text=sample.question)

    def extract(self, samples):
        for sample in ahead(iter(samples)):
            if self.breaks:
                raise RuntimeError("no memory left")
            time.sleep(self.seconds)
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(f"{sample.id}\n")
            yield sample, Problem(sample.id, "it is bad") if sample.id in self.bad else make_prior(sample.question)


def make_prior(text: str) -> MotionPrior:
    words = split_words(text)
    maps = torch.rand(len(words), 3, 8, 8, generator=torch.Generator().manual_seed(len(text)))
    grid = TokenGrid.regular([(i, i + 1.0) for i in range(3)], 8, 8)
    return MotionPrior(text, words, maps, grid, torch.ones(len(words)), {"source": "logged", "seconds": [0.0, 1.0]})


def make_samples(count: int) -> list[Sample]:
    return [Sample(f"s{n}", Path("none.mp4"), f"where does ball {n} go", "left") for n in range(count)]


def fill(folder: Path, samples: list[Sample], process: Process, wait: float = 0.0, **options):
    """One process's part; the report."""
    torch.set_num_threads(1)
    time.sleep(wait)
    store = PriorStore(folder / "store")
    with Team(store.folder, "run", process).working() as team:
        return fill_store(LoggedSource(folder / "log.txt", **options), samples, store, team=team, label="logged")


def start(folder: Path, samples: list[Sample], count: int, waits=(), **options) -> list:
    waits = waits or [0.0] * count
    started = [fork.Process(target=fill, args=(folder, samples, Process(rank, count), waits[rank]), kwargs=options)
               for rank in range(count)]
    for process in started:
        process.start()
    return started


def joined(processes: list) -> list[int]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def made(folder: Path) -> Counter:
    log = folder / "log.txt"
    return Counter(log.read_text().split()) if log.exists() else Counter()


def loadable(folder: Path) -> set[str]:
    """Keys of the store; every file must load."""
    store = PriorStore(folder / "store")
    for key in store.keys():
        store.get(key)
    return set(store.keys())


@pytest.mark.parametrize("count", [2, 4])
def test_every_prior_is_made_once_whoever_begins_first(tmp_path, count):
    samples = make_samples(24)
    twin = Sample("twin", Path("none.mp4"), samples[0].question, "right")  # shares the first one's prior
    waits = [0.05 * rank for rank in range(count)][::-1]
    assert joined(start(tmp_path, [*samples, twin], count, waits=waits, seconds=0.05)) == [0] * count
    assert made(tmp_path) == Counter(sample.id for sample in samples)
    assert len(loadable(tmp_path)) == 24 and PriorStore(tmp_path / "store").leftovers(0) == []
    records = [read_json(path, {}) for path in sorted((tmp_path / "store" / ".extraction" / "run").glob("*.json"))]
    assert [record["status"] for record in records] == ["finished"] * count
    shares = [record["settled"].get("logged", 0) for record in records]
    assert sum(shares) == 25 and sum(share > 0 for share in shares) >= 2  # nobody did it all


def test_another_number_of_processes_goes_on_where_the_first_stopped(tmp_path):
    samples = make_samples(30)
    joined(start(tmp_path, samples[:10], 3))
    joined(start(tmp_path, samples[:20], 1))
    joined(start(tmp_path, samples, 2))
    joined(start(tmp_path, samples, 4))
    assert made(tmp_path) == Counter(sample.id for sample in samples) and len(loadable(tmp_path)) == 30


def test_the_first_process_reports_what_all_did(tmp_path):
    samples = make_samples(12) + [Sample("mute", Path("none.mp4"), "", "left")]
    samples.append(Sample("twin", Path("none.mp4"), samples[3].question, "right"))
    helper = fork.Process(target=fill, args=(tmp_path, samples, Process(1, 2)),
                          kwargs={"seconds": 0.02, "bad": ("s3", "s7")})
    helper.start()
    seen = []
    store = PriorStore(tmp_path / "store")
    with Team(store.folder, "run", Process(0, 2)).working() as team:
        source = LoggedSource(tmp_path / "log.txt", seconds=0.02, bad=("s3", "s7"))
        report = fill_store(source, samples, store, lambda done, total: seen.append((done, total)), team, "logged")
    assert joined([helper]) == [0]
    assert {(p.id, p.reason) for p in report.problems} == {
        ("mute", "it has no text"), ("s3", "it is bad"), ("s7", "it is bad"), ("twin", "it is bad")}
    assert [sample.id for sample, _ in report.rows] == [f"s{n}" for n in range(12) if n not in (3, 7)]
    assert report.made == 10 and report.reused == 0 and team.lost() == []
    # also of those made by the other
    assert all(report.facts[key] == {"seconds": [0.0, 1.0]} for _, key in report.rows)
    assert seen[-1] == (13, 14) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    again = fill_store(source, samples, store)
    assert (again.reused, again.made, len(again.problems)) == (10, 0, 4)  # and failed ones are tried again


def test_a_process_that_ends_before_the_first_begins_keeps_its_record(tmp_path):
    """It found everything done, say, while process 0 loaded; a record of an earlier launch goes."""
    samples = make_samples(4)
    helpers = [fork.Process(target=fill, args=(tmp_path, samples, Process(rank, 3)), kwargs={"bad": ("s1",)})
               for rank in (1, 2)]
    for helper in helpers:
        helper.start()
        assert joined([helper]) == [0]
    team = Team(tmp_path / "store", "run", Process(0, 3))
    os.utime(team.folder / "2.json", (0, 0))
    with team.working():
        assert [record["rank"] for record in team.others(now=True)] == [1]
        assert list(team.problems().values()) == ["it is bad"] and team.lost() == []


def test_a_process_that_fails_is_named_and_its_work_is_done(tmp_path):
    samples = make_samples(8)
    helper = fork.Process(target=fill, args=(tmp_path, samples, Process(1, 2)), kwargs={"breaks": True})
    helper.start()
    helper.join(60)
    assert helper.exitcode == 1
    killed = fork.Process(target=fill, args=(tmp_path, samples, Process(2, 3)), kwargs={"seconds": 60.0})
    killed.start()
    _until(lambda: read_json(tmp_path / "store" / ".extraction" / "run" / "2.json", None))
    store = PriorStore(tmp_path / "store")
    team = Team(store.folder, "run", Process(1, 3))  # not the first: it keeps the others' records
    assert team.lost() == []  # its own record is not another's, and process 2 is alive
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    first = Team(store.folder, "run", Process(0, 3))
    assert [sentence.split(":")[0] for sentence in first.lost()] == [
        "process 1 of 3 failed", "process 2 of 3 ended without a word"]
    assert "no memory left" in first.lost()[0]
    for record in team.folder.glob("*.json"):
        os.utime(record, (0, 0))
    with first.working():  # the first process begins: earlier records are of another time
        assert first.lost() == []
        report = fill_store(LoggedSource(tmp_path / "log.txt"), samples, store, team=first, label="logged")
    assert len(report.rows) == 8 and len(loadable(tmp_path)) == 8


def test_what_another_process_claimed_is_left_to_it_until_it_dies(tmp_path):
    store = PriorStore(tmp_path / "store")
    store.prepare()
    samples = make_samples(3)
    key = LoggedSource(tmp_path / "log.txt").key(samples[1])
    taken, ready = fork.Event(), fork.Event()

    def hold() -> None:
        with Claims(store.folder) as claims:
            assert claims.take(key)
            taken.set()
            ready.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)

    holder = fork.Process(target=hold)
    holder.start()
    assert taken.wait(60)
    with Claims(store.folder) as claims:
        assert not claims.take(key) and claims.take("other") and claims.take("other")
    fill(tmp_path, samples, Process(1, 2))  # a helper leaves it and ends
    assert made(tmp_path) == Counter(["s0", "s2"])
    ready.set()
    fill(tmp_path, samples, Process(0, 2))  # the first waits for it, and makes it when its process is dead
    assert made(tmp_path) == Counter(["s0", "s1", "s2"])


@pytest.mark.parametrize("block", range(3))
def test_killed_processes_leave_whole_files_and_the_last_run_makes_what_is_missing(tmp_path, block):
    """ROUNDS rounds in three blocks, each on a store of its own: 2 to 4 processes, killed one by one at random."""
    rng = random.Random(block)
    rounds = [n for n in range(ROUNDS) if n % 3 == block]
    samples = make_samples(60 * (len(rounds) + 1))
    stored: set[str] = set()
    for _ in rounds:
        count = rng.randint(2, 4)
        before, had = made(tmp_path), set(stored)
        processes = start(tmp_path, samples, count, seconds=0.003)
        for process in rng.sample(processes, count):
            time.sleep(rng.uniform(0.0, 0.15 / count))
            os.kill(process.pid, signal.SIGKILL)
        joined(processes)
        stored = loadable(tmp_path)
        assert had <= stored
        again = [s.id for s in samples if content_key(text=s.question) in had and made(tmp_path)[s.id] > before[s.id]]
        assert again == []
    before = made(tmp_path)
    assert joined(start(tmp_path, samples, 2)) == [0, 0]
    missing = {s.id for s in samples if content_key(text=s.question) not in stored}
    assert made(tmp_path) - before == Counter(missing)
    assert len(loadable(tmp_path)) == len(samples) and missing  # the rounds had not made everything


# ---- the command line under a launcher -----------------------------------------------------------

@pytest.fixture
def oracle_recipe(tmp_path):
    """A recipe whose priors cost next to nothing, on a world of six clips."""
    world = {"train_clips": 6, "test_clips": 1, "frames": 5, "height": 32, "width": 32}
    arms = [{"name": "oracle", "source": "oracle"}, {"name": "flat", "source": "uniform", "base": "oracle"}]
    values = recipe_values(tmp_path, world=world, arms=arms, data={})
    values["teacher"]["sampling"]["frames"] = 5
    path = tmp_path / "r.yaml"
    path.write_text("# Purpose: a test\n" + yaml.safe_dump(values))
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[2]),
            **more}


def test_extract_under_torchrun(oracle_recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "-m", "enhancer", "extract", str(oracle_recipe)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "tiny"
    # by one process; it may have come late
    told = re.findall(r"(oracle|uniform\(oracle\)): (\d) made, (\d) reused", done.stdout)
    counted = [(label, int(there) + int(reused)) for label, there, reused in told]
    assert counted == [("oracle", 6), ("uniform(oracle)", 6)]
    rows = read_json(run / "priors.json", [])
    assert Counter(row["source"] for row in rows) == {"oracle": 6, "uniform(oracle)": 6}
    store = PriorStore(run / "priors")
    assert {row["key"] for row in rows} == set(store.keys())
    assert all(row["seconds"] for row in rows if row["source"] == "oracle")
    records = [read_json(path, {}) for path in (run / "priors" / ".extraction" / "tiny").glob("*.json")]
    # one that ended before process 0 began is an earlier time's to it, and its record goes
    assert {record["status"] for record in records} == {"finished"} and 0 in {record["rank"] for record in records}
    assert read_json(run / "run.json", {})["status"] == "finished"


@pytest.mark.parametrize("values, message", [({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
                                             ({"RANK": "first"}, "no number")])
def test_an_environment_that_makes_no_sense_is_told(monkeypatch, values, message):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        Process.this()


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
                                   ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")])
def test_launchers_are_understood(monkeypatch, names):
    assert Process.this() == Process(0, 1, 0)
    for name, value in zip(names, "531", strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK=5 of WORLD_SIZE=3"):
        Process.this()
    monkeypatch.setenv(names[1], "8")
    assert Process.this() == Process(5, 8, 1) and str(Process.this()) == "process 5 of 8"


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Process(n, 4, n % 4).device("cuda") for n in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Process().device("cuda") == "cuda" and Process(1, 2, 1).device("cpu") == "cpu"


# ---- working ahead -------------------------------------------------------------------------------

def test_ahead_keeps_the_order_makes_one_item_early_and_raises_in_its_place():
    begun = []

    def items():
        for n in range(5):
            begun.append(n)
            if n == 3:
                raise ValueError("the fourth")
            yield n

    got = []
    with pytest.raises(ValueError, match="the fourth"):
        for item in ahead(items()):
            got.append(item)
            time.sleep(0.02)
            assert begun[-1] <= item + 1
    assert got == [0, 1, 2]


def test_ahead_overlaps_and_stops_when_closed():
    def items():
        for n in range(10):
            time.sleep(0.05)
            yield n

    started = time.monotonic()
    for _ in ahead(items()):
        time.sleep(0.05)
    assert time.monotonic() - started < 0.9  # one after the other takes a second
    one = ahead(items())
    assert next(one) == 0
    one.close()


def _until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_records_are_json_that_people_can_read(tmp_path):
    fill(tmp_path, make_samples(2), Process(0, 2), bad=("s1",))
    record = json.loads((tmp_path / "store" / ".extraction" / "run" / "0.json").read_text())
    assert record["settled"] == {"logged": 2} and list(record["problems"].values()) == ["it is bad"]
