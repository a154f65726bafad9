"""A run with a lead that loses its dispatcher, its lead's process or a bridge does nothing twice.

As in test_crash.py: real processes are killed from outside, the plain program resumes, and tree_checker.py,
which knows nothing of pitboss, reads what is left. `PITBOSS_TEST_ROUNDS` sets the number of random rounds.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import checker
import tree_checker
from checker import Promise, trail_begin, trail_end
from test_crash import (Crew, is_finished, kill, kinds, signal_all, start_with_fault, state_of, strike_after,
                        time_passes)
from tools import Home, processes_with, read_events, read_records, wait_for
from tree_checker import calls_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

ROUNDS = int(os.environ.get("PITBOSS_TEST_ROUNDS", "100"))
LEAD = "boss"


# ---- what a lead and its workers do ----

class Script:
    """The prompt of a scripted agent, line by line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.calls = 0

    def step(self, text: str) -> None:
        self.lines.append("$ " + text)

    def call(self, tool: str, **given) -> int:
        """A call of a tool; returns the N of `<N.key>`, by which later calls name its result.

        `<` is escaped: a lead must not fill in what stands in the script of a worker.
        """
        self.step(f"call {tool} {json.dumps(given)}".replace("<", r"\u003c"))
        self.calls += 1
        return self.calls

    def wait_for_file(self, path: Path) -> None:
        self.step(f"run until [ -e {path} ]; do sleep 0.05; done")

    def text(self) -> str:
        return "\n".join(self.lines)


class Tree(NamedTuple):
    """One run with a lead, to be killed: the crew, the prompts of its workers, its store at the end."""
    crew: Crew
    prompts: list[str]
    stored: dict[str, tuple]

    def faults(self, once: bool = True) -> list[str]:
        """What is wrong with the finished run; `once`: no agent and no bridge was killed."""
        crew = self.crew
        return tree_checker.check_tree(crew.run_dir(), crew.repo, crew.promises, crew.trail if once else None,
                                       self.prompts, self.stored, once)

    def go(self, name: str = "go") -> Path:
        return self.crew.home.root / name


def count_once(script: Script, name: str) -> None:
    """Add one version to the counter, as nobody else may do at that time."""
    lease = script.call("lease_acquire", name="counter", ttl_secs=600, wait_secs=600)
    seen = script.call("kv_get", path="/shared/counter")
    script.call("kv_cas", path="/shared/counter", expected_version=f"<{seen}.entry.version>", new_value=name)
    script.call("lease_release", lease_id=f"<{lease}.lease_id>")


def worker_script(name: str, trail: Path, counts: int, sleep_s: float) -> Script:
    """A worker that commits, waits for the lead's word, counts, and notes how far it is."""
    script = Script()
    script.step(f"run {trail_begin(trail, name)}")
    script.call("kv_set", path="/peer/self/notes", value="begun")
    script.step(f"append {checker.COMMITTED} {name} committed")
    script.step("commit work")
    script.call("kv_wait", path="/shared/go", timeout_secs=600)
    script.call("kv_cas", path="/shared/first", expected_version=0, new_value=name)
    for _ in range(counts):
        count_once(script, name)
        script.step(f"sleep {sleep_s}")
    script.call("kv_set", path="/peer/self/draft", value="x")
    script.call("kv_delete", path="/peer/self/draft")
    script.call("kv_cas", path="/peer/self/notes", expected_version=1, new_value="done")
    script.step(f"append {checker.LOOSE} {name} loose")
    script.step(f"run {trail_end(trail, name)}")
    return script


def make_tree(root: Path, rng: random.Random, size: int = 4, counts: int = 2) -> Tree:
    """A lead that spawns `size` workers, counts with them, and waits for them all."""
    home, trail = Home(root), root / "trail"
    trail.mkdir()
    names, lead = [f"worker-{n + 1}" for n in range(size)], Script()
    workers = [worker_script(name, trail, counts, rng.choice((0.01, 0.05, 0.2))) for name in names]
    lead.step(f"run {trail_begin(trail, LEAD)}")
    lead.call("kv_set", path="/shared/counter", value="zero")
    spawned = [lead.call("spawn_worker", prompt=script.text()) for script in workers]
    lead.call("kv_set", path="/shared/go", value="go")
    count_once(lead, LEAD)
    lead.call("wait_for_any", task_ids=[f"<{n}.task_id>" for n in spawned])
    for n in spawned:
        lead.call("wait_for_worker", task_id=f"<{n}.task_id>")
    lead.call("list_workers")
    lead.call("budget_status")
    lead.step(f"append {checker.COMMITTED} {LEAD} committed")
    lead.step("commit work")
    lead.step(f"run {trail_end(trail, LEAD)}")
    promises = [Promise(LEAD, (f"{LEAD} committed",))]
    promises += [Promise(name, (f"{name} committed",), (f"{name} loose",)) for name in names]
    stored = {"/shared/counter": (None, 1 + counts * size + 1), "/shared/first": (None, 1),
              "/shared/go": ("go", 1), **{f"/peer/{name}/notes": ("done", 2) for name in names}}
    crew = make_crew(home, lead, promises, trail, size)
    return Tree(crew, [script.text() for script in workers], stored)


def make_crew(home: Home, lead: Script, promises: list[Promise], trail: Path, size: int) -> Crew:
    repo = home.repo(files=2)
    manifest = home.manifest(
        f"[run]\nmax_workers = {size}\nbudget_usd = 100.0\ndump_shared_store = true\n"
        f"[lead]\nid = '{LEAD}'\nagent = 'demo'\ndirectory = '{repo}'\nprompt = '''\n{lead.text()}\n'''\n")
    return Crew(home, repo, manifest, promises, trail)


# ---- rounds: SIGKILL at random moments, and at calls that were carried out and not answered ----

ANSWERED = ("spawn", "cas", "set", "kv_deleted", "lease_granted", "lease_ended")
AIMS = {"spawn": 'journal:"role":"worker".after', "cas": 'journal:"cas":true.after',
        "half a cas": 'journal:"cas":true.half', "call": 'journal:"call".after'}


def strike(crew: Crew, rng: random.Random, horizon_s: float, *args) -> bool:
    """Start the program and kill it at a random moment, or at a call that it has just written down.

    False when it ended before.
    """
    aim = rng.choice(("moment", "moment", *AIMS))
    if aim != "moment":
        return start_with_fault(crew, AIMS[aim], rng.randint(1, 4), *args)
    dispatcher = crew.start(*args)
    was_hit = strike_after(crew, dispatcher, rng.uniform(0, horizon_s))
    assert was_hit or dispatcher.returncode == 0, f"exit {dispatcher.returncode}: {crew.said()}"
    return was_hit


def finish(tree: Tree, once: bool = True) -> None:
    """Resume what has not ended; then nothing may be wrong with it."""
    crew, run_dir = tree.crew, tree.crew.run_dir()
    if run_dir is None:
        assert checker.check_untouched(crew.repo) == []
        return
    if not is_finished(run_dir):
        crew.home.pitboss("resume", run_dir.name, timeout=120, check=0)
    assert crew.run_dir() == run_dir
    assert tree.faults() == []


def play_round(root: Path, number: int, size: int, counts: int, horizon_s: float) -> Counter:
    """One run, killed up to three times, resumed, and looked at; what was carried over, and the kills."""
    rng, root = random.Random(number), root / f"round{number}"
    root.mkdir()
    tree = make_tree(root, rng, size, counts)
    crew, hits = tree.crew, Counter()
    try:
        hits["killed"] += strike(crew, rng, horizon_s, "dispatch", crew.manifest)
        while rng.random() < 0.5 and crew.run_dir() and not is_finished(crew.run_dir()):
            hits["killed again"] += strike(crew, rng, horizon_s, "resume", crew.run_dir().name)
        finish(tree)
        if crew.run_dir():
            hits += tree_checker.carried_over(crew.run_dir())
    except AssertionError as error:
        raise AssertionError(f"round {number} in {root}: {error}\n{crew.said()}") from error
    finally:
        crew.home.end_everything()
    shutil.rmtree(root)
    return hits


def test_killed_dispatchers_of_a_tree_do_nothing_twice(tmp_path):
    hits = sum((play_round(tmp_path, n, 2, 1, 2.0) for n in range(2)), Counter())
    assert hits["killed"]


@pytest.mark.slow
def test_many_killed_dispatchers_of_a_tree_do_nothing_twice(tmp_path, record_property):
    """The histogram must show calls that were carried out and answered by another dispatcher."""
    hits = sum((play_round(tmp_path, n, 4, 2, 4.0) for n in range(ROUNDS)), Counter())
    record_property("carried_over", json.dumps(hits))
    print("carried over:", dict(hits))
    if ROUNDS >= 30:
        assert [what for what in ("killed", "killed again", *ANSWERED) if not hits[what]] == []
