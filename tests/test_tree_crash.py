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
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import checker
import tree_checker
from checker import Promise, trail_begin, trail_end
from test_crash import (FAULTS, Crew, is_finished, kill, kinds, signal_all, start_with_fault, state_of,
                        strike_after, time_passes)
from tools import ISOLATED, PYTHON, Home, processes_with, read_events, wait_for
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

AIMS = {"spawn": ('journal:"role":"worker".after', 4), "cas": ('journal:"cas":true.after', 14),
        "half a cas": ('journal:"cas":true.half', 14), "call": ('journal:"call".after', 50)}


def strike(crew: Crew, rng: random.Random, horizon_s: float, *args) -> bool:
    """Start the program and kill it at a random moment, or at a call that it has just written down.

    False when it ended before.
    """
    aim = rng.choice(("moment", "moment", *AIMS))
    if aim != "moment":
        moment, last = AIMS[aim]
        return start_with_fault(crew, moment, rng.randint(1, last), *args)
    dispatcher = crew.start(*args)
    was_hit = strike_after(crew, dispatcher, rng.uniform(0, horizon_s))
    assert was_hit or dispatcher.returncode == 0, f"exit {dispatcher.returncode}: {crew.said()}"
    return was_hit


def finish(tree: Tree) -> None:
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
    """One run, killed once or oftener, resumed, and looked at; what was carried over, and the kills."""
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
    hits = sum((play_round(tmp_path, n, 2, 1, 0.8) for n in (3, 4)), Counter())
    assert hits["killed"]


@pytest.mark.slow
def test_many_killed_dispatchers_of_a_tree_do_nothing_twice(tmp_path, record_property):
    """The histogram must show calls that were carried out and answered by another dispatcher."""
    hits = sum((play_round(tmp_path, n, 4, 2, 4.0) for n in range(ROUNDS)), Counter())
    record_property("carried_over", json.dumps(hits))
    print("carried over:", dict(hits))
    if ROUNDS >= 30:
        assert [what for what in ("killed", "killed again", "spawn", "cas") if not hits[what]] == []


# ---- the checker itself ----

def without_line(*words: str):
    """Drops the last line that holds all the words."""
    def drop(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        at = max(n for n, line in enumerate(lines) if all(word.encode() in line for word in words))
        return b"".join(lines[:at] + lines[at + 1:])

    return drop


def line_again(word: str, old: str = "", new: str = ""):
    """Repeats the first line that holds the word, with something in it exchanged."""
    def repeat(data: bytes) -> bytes:
        line = next(line for line in data.splitlines(keepends=True) if word.encode() in line)
        return data + line.replace(old.encode(), new.encode())

    return repeat


def changed(old: str, new: str):
    """Exchanges something everywhere; it must be there."""
    def change(data: bytes) -> bytes:
        assert old.encode() in data, old
        return data.replace(old.encode(), new.encode())

    return change


JOURNAL, LEAD_LOG, WORKER_LOG = "journal.jsonl", f"tasks/{LEAD}/stdout.log", "tasks/worker-1/stdout.log"
SPOILS = {
    "a call was never answered": (LEAD_LOG, without_line("tool_result", "spent_usd"), "was answered 'never'"),
    "a call was refused": (WORKER_LOG, changed('"is_error":false', '"is_error":true'), "was answered"),
    "a worker was spawned twice": (JOURNAL, line_again('"worker-1"', '"worker-1"', '"worker-9"'), "spawned:"),
    "a spawn is missing": (JOURNAL, without_line('"actor_added"', '"worker-1"'), "no worker was asked"),
    "a call changed something twice": (JOURNAL, line_again('"cas":true'), "2 kv_written of the call"),
    "an agent cost something else": (WORKER_LOG, changed('"total_cost_usd":0', '"total_cost_usd":1'),
                                     "booked"),
    "something stays reserved": (LEAD_LOG, changed(r'\"reserved_usd\":0', r'\"reserved_usd\":1'),
                                 "no worker lives"),
    "something was not booked": (LEAD_LOG, changed(r'\"spent_usd\":0', r'\"spent_usd\":1'), "were spent"),
    "a write is missing": (JOURNAL, without_line('"kv_written"', "/shared/counter"), "the journal makes"),
    "a value is another one": (JOURNAL, changed('"value":"done"', '"value":"odd"'), "the journal makes"),
    "a swap was told that never was": (WORKER_LOG, changed(r'\"swapped\":true', r'\"swapped\":false'),
                                       "no order"),
    "a lease was given twice": (WORKER_LOG, changed(r'\"holder\":', r'\"version\":9,\"holder\":'),
                                "acquisitions"),
}


def test_the_checker_of_trees_sees_what_is_wrong(tmp_path):
    tree, unseen = make_tree(tmp_path, random.Random(1), 2, 1), {}
    tree.crew.home.pitboss("dispatch", tree.crew.manifest, check=0)
    assert tree.faults() == []
    for what, (name, change, words) in SPOILS.items():
        path = tree.crew.run_dir() / name
        before = path.read_bytes()
        path.write_bytes(change(before))
        found = own_faults(tree)
        if not any(words in fault for fault in found):
            unseen[what] = found
        path.write_bytes(before)
    assert unseen == {}
    assert tree.faults() == []


def own_faults(tree: Tree) -> list[str]:
    """What tree_checker.py itself finds, without what checker.py does."""
    return tree_checker.check_calls(tree.crew.run_dir(), tree.prompts, tree.stored)


# ---- calls that were written down and not answered ----

def die_and_resume(root: Path, moment: str, n: int) -> Counter | None:
    """Kill a small run at the n-th `moment` and resume it; what was carried over, None without a hit."""
    root.mkdir(exist_ok=True)
    tree = make_tree(root, random.Random(7), 2, 1)
    try:
        was_hit = start_with_fault(tree.crew, moment, n, "dispatch", tree.crew.manifest)
        finish(tree)
    except AssertionError as error:
        raise AssertionError(f"{moment} {n} in {root}: {error}\n{tree.crew.said()}") from error
    finally:
        tree.crew.home.end_everything()
    carried = tree_checker.carried_over(tree.crew.run_dir()) if tree.crew.run_dir() else Counter()
    shutil.rmtree(root)
    return carried if was_hit else None


@pytest.mark.parametrize("what, moment, n", [
    ("spawn", 'journal:"role":"worker".after', 1), ("spawn", 'journal:"role":"worker".after', 2),
    ("cas", 'journal:"cas":true.after', 1), ("cas", 'journal:"cas":true.after', 3)])
def test_a_call_that_was_carried_out_is_answered_and_not_done_again(tmp_path, what, moment, n):
    assert die_and_resume(tmp_path / "tree", moment, n)[what] == 1


@pytest.mark.parametrize("moment", ['journal:"role":"worker".half', 'journal:"cas":true.before'])
def test_a_call_that_was_not_written_down_is_done_by_the_next_dispatcher(tmp_path, moment):
    assert die_and_resume(tmp_path / "tree", moment, 1) is not None


CARRIED = ("spawn", "cas", "set", "kv_deleted", "lease_granted", "lease_ended")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_death_at_every_line_of_a_tree_loses_nothing(tmp_path, when):
    """Until three runs have ended without it; `after` has then carried every kind of call over."""
    carried, misses, n = Counter(), 0, 0
    while misses < 3:
        n += 1
        found = die_and_resume(tmp_path / f"n{n}", f"journal.{when}", n)
        carried, misses = carried + (found or Counter()), misses + (found is None)
    assert n > 40
    if when == "after":
        assert [what for what in CARRIED if not carried[what]] == []


# ---- a dispatcher dies while its agents are at work ----

def waiting_script(root: Path, name: str, go: str = "go") -> Script:
    """A worker that waits for a file and then has something to do."""
    script = Script()
    script.step(f"run {trail_begin(root / 'trail', name)}")
    script.call("kv_set", path="/peer/self/notes", value="begun")
    script.step(f"run touch {root}/{name}.ready")
    script.wait_for_file(root / go)
    script.call("kv_cas", path="/peer/self/notes", expected_version=1, new_value="done")
    script.step(f"append {checker.LOOSE} {name} loose")
    script.step(f"run {trail_end(root / 'trail', name)}")
    return script


def make_waiting_tree(root: Path, names: list[str], middle=None, first_go: str = "go") -> Tree:
    """Workers that wait for the file `go` (the first one: `first_go`), and a lead that waits for them, twice.

    Before that, `middle(lead, spawned)` adds to the lead's script; it gives the scripts of further workers.
    """
    home = Home(root)
    (root / "trail").mkdir()
    lead = Script()
    scripts = [waiting_script(root, name, "go" if n else first_go).text() for n, name in enumerate(names)]
    lead.step(f"run {trail_begin(root / 'trail', LEAD)}")
    spawned = [lead.call("spawn_worker", prompt=prompt) for prompt in scripts]
    for name in names:
        lead.wait_for_file(root / f"{name}.ready")
    scripts += middle(lead, spawned) or () if middle else ()
    for n in [*spawned, *spawned]:
        lead.call("wait_for_worker", task_id=f"<{n}.task_id>")
    lead.call("budget_status")
    lead.step(f"run {trail_end(root / 'trail', LEAD)}")
    names = [f"worker-{n + 1}" for n in range(len(scripts))]
    promises = [Promise(LEAD), *(Promise(name, (), (f"{name} loose",)) for name in names)]
    crew = make_crew(home, lead, promises, root / "trail", len(names))
    return Tree(crew, scripts, {f"/peer/{name}/notes": ("done", 2) for name in names})


def one_more(root: Path):
    """A middle: the lead spawns a third worker when there is the file `lead-go`."""
    def add(lead: Script, spawned: list[int]) -> list[str]:
        prompt = waiting_script(root, "worker-3").text()
        lead.step(f"run touch {root}/{LEAD}.ready")
        lead.wait_for_file(root / "lead-go")
        spawned.append(lead.call("spawn_worker", prompt=prompt))
        return [prompt]

    return add


def rest_one(root: Path, mode: str):
    """A middle: the lead lets the first worker rest until there is the file `lead-go`."""
    def add(lead: Script, spawned: list[int]) -> None:
        first = f"<{spawned[0]}.task_id>"
        lead.call("pause_worker", task_id=first, mode=mode)
        lead.step(f"run touch {root}/{LEAD}.ready")
        lead.wait_for_file(root / "lead-go")
        lead.call("continue_worker", task_id=first)
        lead.step(f"run touch {root}/go")

    return add


def redirect_one(root: Path):
    """A middle: the lead redirects the first worker, whose script would never end."""
    def add(lead: Script, spawned: list[int]) -> None:
        other = Script()
        other.call("kv_cas", path="/peer/self/notes", expected_version=1, new_value="done")
        other.step(f"append {checker.LOOSE} worker-1 loose")
        other.step(f"run {trail_end(root / 'trail', 'worker-1')}")
        lead.call("reprompt_worker", task_id=f"<{spawned[0]}.task_id>", prompt=other.text())
        lead.step(f"run touch {root}/go")

    return add


def wait_for_ready(tree: Tree, dispatcher: subprocess.Popen, *names: str) -> None:
    wait_for(lambda: all(tree.go(f"{name}.ready").exists() for name in names)
             or dispatcher.poll() is not None, 60, "the scripts to wait")


@pytest.fixture
def grow(tmp_path):
    """Makes a waiting tree and dispatches it: the tree, the dispatcher, the run folder."""
    trees = []

    def make(names: list[str], middle=None) -> tuple[Tree, subprocess.Popen, Path]:
        tree = make_waiting_tree(tmp_path, names, middle)
        trees.append(tree)
        dispatcher = tree.crew.start("dispatch", tree.crew.manifest)
        wait_for_ready(tree, dispatcher, *names, *([LEAD] if middle else []))
        run_dir = tree.crew.run_dir()
        wait_for(lambda: kinds(run_dir)["hand_started"] == len(names) + 1, 30, "every hand_started")
        if not middle:
            wait_for(lambda: is_asking(run_dir, LEAD, "wait_for_worker"), 30, "the lead to wait")
        return tree, dispatcher, run_dir

    yield make
    for tree in trees:
        tree.crew.home.end_everything()


def is_asking(run_dir: Path, actor: str, tool: str) -> bool:
    """Whether the last call of an actor is one of that tool and has no answer."""
    calls = calls_of(run_dir, actor)
    return bool(calls) and calls[-1].tool == tool and calls[-1].result is None


def hand_processes(run_dir: Path, actor: str, hand: int = 1) -> dict[int, str]:
    """The living processes of one hand: the shell around it, the agent, its bridge, what it started."""
    return processes_with(f"{run_dir.name}:{actor}:{hand}")


def bridges(run_dir: Path) -> set[int]:
    return {pid for pid, line in processes_with(f"PITBOSS_RUN_ID={run_dir.name}").items()
            if "/self/bridge" in line}


def take_over(crew: Crew, run_dir: Path) -> subprocess.Popen:
    """A resume that holds the run."""
    before = kinds(run_dir)["dispatcher_started"]
    resumed = crew.start("resume", run_dir.name)
    wait_for(lambda: kinds(run_dir)["dispatcher_started"] > before or resumed.poll() is not None, 30,
             "the takeover")
    return resumed


def check_end(tree: Tree, dispatcher: subprocess.Popen, once: bool = True) -> None:
    assert dispatcher.wait(60) == 0, tree.crew.said()
    assert tree.faults(once) == []


def test_resume_adopts_a_lead_and_its_workers_and_answers_its_wait(grow):
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2", "worker-3"])
    there = bridges(run_dir)
    kill(dispatcher)
    assert len(there) == 4
    resumed = take_over(tree.crew, run_dir)
    assert bridges(run_dir) == there
    assert is_asking(run_dir, LEAD, "wait_for_worker")
    tree.go().touch()
    check_end(tree, resumed)
    assert sorted(p.name for p in run_dir.glob("tasks/*/hand.*")) == ["hand.1"] * 4
    assert {e["hand"] for e in read_events(run_dir) if e["kind"] == "hand_dealt"} == {1}


def test_what_is_asked_for_while_nobody_is_there_happens_once(grow, tmp_path):
    """A spawn of the lead and a write of each worker, between two dispatchers."""
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"], one_more(tmp_path))
    kill(dispatcher)
    tree.go().touch()
    tree.go("lead-go").touch()
    wait_for(lambda: is_asking(run_dir, LEAD, "spawn_worker"), 30, "the lead to ask for a worker")
    for name in ("worker-1", "worker-2"):
        wait_for(lambda name=name: is_asking(run_dir, name, "kv_cas"), 30, "the workers to write")
    before = kinds(run_dir)
    check_end(tree, take_over(tree.crew, run_dir))
    assert (before["actor_added"], kinds(run_dir)["actor_added"]) == (3, 4)


def test_a_run_whose_agents_wait_outlives_several_dispatchers(grow, tmp_path):
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"], one_more(tmp_path))
    for n in range(3):
        kill(dispatcher)
        dispatcher = take_over(tree.crew, run_dir)
        if n == 1:
            tree.go("lead-go").touch()
    tree.go().touch()
    check_end(tree, dispatcher)


def test_of_two_resumes_of_a_tree_one_is_refused_and_one_finishes(grow):
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"])
    kill(dispatcher)
    both = [tree.crew.start("resume", run_dir.name) for _ in range(2)]
    wait_for(lambda: any(p.poll() is not None for p in both), 30, "a refusal")
    refused, winner = sorted(both, key=lambda p: p.poll() is None)
    assert refused.returncode == 4, tree.crew.said()
    tree.go().touch()
    check_end(tree, winner)
    assert kinds(run_dir)["dispatcher_started"] == 2


# ---- the lead's process dies ----

def end_hand(run_dir: Path, actor: str) -> None:
    """SIGKILL to all of an actor's first hand at once: all is stopped first, so that no exit is told."""
    stopped: set[int] = set()
    while fresh := hand_processes(run_dir, actor).keys() - stopped:
        signal_all(fresh, signal.SIGSTOP)
        stopped |= fresh
    signal_all(stopped, signal.SIGKILL)
    wait_for(lambda: not hand_processes(run_dir, actor), 10, f"the end of {actor}'s hand")


def echoes(run_dir: Path, actor: str) -> list[str]:
    """What an actor was told, by its own echoes."""
    return [e["message"]["content"] for e in tree_checker.log_events(run_dir, actor)
            if e["type"] == "user" and e.get("isReplay")]


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])
def test_a_lead_that_vanishes_is_dealt_again_with_a_digest(grow, watched):
    """Its workers go on; the next hand is told of them and waits for them anew."""
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"])
    if not watched:
        kill(dispatcher)
    end_hand(run_dir, LEAD)
    if not watched:
        dispatcher = take_over(tree.crew, run_dir)
    wait_for(lambda: hand_processes(run_dir, LEAD, 2), 30, "the lead's second hand")
    wait_for(lambda: is_asking(run_dir, LEAD, "wait_for_worker"), 30, "the lead to wait again")
    tree.go().touch()
    check_end(tree, dispatcher, once=False)
    told = echoes(run_dir, LEAD)
    assert len(told) == 2 and told[1].startswith("continue")
    assert all(f"- {name}: Running" in told[1] for name in ("worker-1", "worker-2")), told[1]
    assert [(e["actor"], e["hand"]) for e in read_events(run_dir) if e["kind"] == "hand_dealt"] == [
        (LEAD, 1), ("worker-1", 1), ("worker-2", 1), (LEAD, 2)]


def test_a_digest_tells_of_a_worker_whose_spawn_was_never_answered(tmp_path):
    crew = make_waiting_tree(tmp_path, ["worker-1", "worker-2"]).crew
    try:
        assert start_with_fault(crew, 'journal:"role":"worker".after', 2, "dispatch", crew.manifest)
        run_dir = crew.run_dir()
        assert is_asking(run_dir, LEAD, "spawn_worker")
        end_hand(run_dir, LEAD)
        take_over(crew, run_dir)
        wait_for(lambda: len(echoes(run_dir, LEAD)) == 2, 30, "the lead's second hand")
        told = echoes(run_dir, LEAD)[1]
    finally:
        crew.home.end_everything()
    assert all(f"- {name}: " in told for name in ("worker-1", "worker-2")), told


# ---- a bridge dies ----

def end_bridge(run_dir: Path, actor: str) -> None:
    """SIGKILL to the one bridge of an actor's first hand."""
    pid, = hand_processes(run_dir, actor).keys() & bridges(run_dir)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: state_of(pid) in "ZX", 10, "the bridge's end")


def test_an_agent_goes_on_with_another_bridge(grow):
    """The lead's dies in a wait, which it asks for again; a worker's dies between two calls."""
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"])
    end_bridge(run_dir, LEAD)
    end_bridge(run_dir, "worker-1")
    wait_for(lambda: len(bridges(run_dir)) == 2, 30, "the lead's next bridge")
    tree.go().touch()
    check_end(tree, dispatcher, once=False)
    lost = [call for call in calls_of(run_dir, LEAD) if call.result is None]
    assert [(call.tool, call.words) for call in lost] == [("wait_for_worker", "Connection closed")]
    assert tree_checker.check_answers(run_dir, "worker-1") == []


def test_a_bridge_dies_while_no_dispatcher_is_there(grow):
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"])
    kill(dispatcher)
    end_bridge(run_dir, LEAD)
    end_bridge(run_dir, "worker-1")
    tree.go().touch()
    wait_for(lambda: is_asking(run_dir, "worker-1", "kv_cas"), 30, "the worker to write")
    check_end(tree, take_over(tree.crew, run_dir), once=False)


def test_a_spawn_whose_bridge_died_before_its_answer_happened_once(tmp_path):
    """The dispatcher stands still when it has written the spawn down, and goes on when the bridge is dead."""
    home, lead, prompt = Home(tmp_path), Script(), waiting_script(tmp_path, "worker-1").text()
    (tmp_path / "trail").mkdir()
    lead.call("spawn_worker", prompt=prompt)
    listed = lead.call("list_workers")
    lead.call("wait_for_worker", task_id=f"<{listed}.workers.0.task_id>")
    crew = make_crew(home, lead, [Promise(LEAD), Promise("worker-1", (), ("worker-1 loose",))],
                     tmp_path / "trail", 1)
    (tmp_path / "go").touch()
    dispatcher = start_until(crew, 'journal:"role":"worker".after', 1, "dispatch", crew.manifest)
    try:
        end_bridge(crew.run_dir(), LEAD)
        dispatcher.send_signal(signal.SIGCONT)
        assert dispatcher.wait(60) == 0, crew.said()
    finally:
        home.end_everything()
    run_dir = crew.run_dir()
    assert [call.words for call in calls_of(run_dir, LEAD) if call.result is None] == ["Connection closed"]
    assert kinds(run_dir)["actor_added"] == 2
    assert checker.check_run(run_dir, crew.repo, crew.promises) == []


def test_a_place_in_a_queue_outlives_its_bridge(tmp_path):
    """What the dead bridge waited for comes to the actor: it asks again, and does not lock itself out."""
    home, lead, worker = Home(tmp_path), Script(), Script()
    for _ in range(2):
        got = worker.call("lease_acquire", name="door", ttl_secs=600, wait_secs=600)
    worker.call("lease_release", lease_id=f"<{got}.lease_id>")
    held = lead.call("lease_acquire", name="door", ttl_secs=600)
    spawned = lead.call("spawn_worker", prompt=worker.text())
    lead.wait_for_file(tmp_path / "go")
    lead.call("lease_release", lease_id=f"<{held}.lease_id>")
    lead.call("wait_for_worker", task_id=f"<{spawned}.task_id>")
    lead.call("lease_acquire", name="door", ttl_secs=600)
    crew = make_crew(home, lead, [Promise(LEAD), Promise("worker-1")], tmp_path / "trail", 1)
    dispatcher = crew.start("dispatch", crew.manifest)
    try:
        run_dir = wait_for(crew.run_dir, 30)
        wait_for(lambda: kinds(run_dir)["lease_queued"] == 1, 30, "the worker to wait")
        end_bridge(run_dir, "worker-1")
        wait_for(lambda: kinds(run_dir)["lease_queued"] == 2, 30, "the worker to wait again")
        (tmp_path / "go").touch()
        assert dispatcher.wait(60) == 0, crew.said()
    finally:
        home.end_everything()
    assert checker.check_run(run_dir, crew.repo, crew.promises) == []
    last = calls_of(run_dir, LEAD)[-1].result
    assert last["acquired"] and last["version"] == 3, last


@pytest.mark.parametrize("is_killed", [False, True], ids=["alive", "killed"])
def test_a_lease_of_an_actor_that_ends_goes_to_who_waits(tmp_path, is_killed):
    """Also when it ends while no dispatcher is there; nothing else happens that would tell of it."""
    home, lead, worker = Home(tmp_path), Script(), Script()
    worker.call("lease_acquire", name="door", ttl_secs=600)
    worker.step(f"run touch {tmp_path}/ready")
    worker.wait_for_file(tmp_path / "go")
    lead.call("spawn_worker", prompt=worker.text())
    lead.wait_for_file(tmp_path / "ready")
    lead.call("lease_acquire", name="door", ttl_secs=600, wait_secs=600)
    crew = make_crew(home, lead, [Promise(LEAD), Promise("worker-1")], tmp_path / "trail", 1)
    dispatcher = crew.start("dispatch", crew.manifest)
    try:
        run_dir = wait_for(crew.run_dir, 30)
        wait_for(lambda: kinds(run_dir)["lease_queued"] == 1, 30, "the lead to wait")
        if is_killed:
            kill(dispatcher)
        (tmp_path / "go").touch()
        if is_killed:
            wait_for((run_dir / "tasks/worker-1/exit.1").exists, 30, "the worker's end")
            dispatcher = take_over(crew, run_dir)
        assert dispatcher.wait(30) == 0, crew.said()
    finally:
        home.end_everything()
    assert calls_of(run_dir, LEAD)[-1].result["version"] == 2


def test_a_wait_for_a_lease_is_over_when_its_time_is_over(tmp_path):
    """It ran out, and the dispatcher died before it said so: the call is answered and waits no longer."""
    home, lead, worker = Home(tmp_path), Script(), Script()
    worker.call("lease_acquire", name="door", ttl_secs=600, wait_secs=0.5)
    lead.call("lease_acquire", name="door", ttl_secs=600)
    spawned = lead.call("spawn_worker", prompt=worker.text())
    lead.call("wait_for_worker", task_id=f"<{spawned}.task_id>")
    crew = make_crew(home, lead, [Promise(LEAD), Promise("worker-1")], tmp_path / "trail", 1)
    try:
        assert start_with_fault(crew, 'journal:"lease_wait_ended".after', 1, "dispatch", crew.manifest)
        assert take_over(crew, crew.run_dir()).wait(60) == 0, crew.said()
    finally:
        home.end_everything()
    run_dir = crew.run_dir()
    assert tree_checker.check_keys(run_dir) == []
    answer = calls_of(run_dir, "worker-1")[0].result
    assert (answer["acquired"], answer["holder"]) == (False, LEAD) and answer["expires_at"]


def start_until(crew: Crew, moment: str, n: int, *args) -> subprocess.Popen:
    """The program, stopped at the n-th `moment`; SIGCONT lets it go on."""
    dispatcher = crew.start(argv=[PYTHON, *ISOLATED, str(FAULTS), moment, str(n), "--", *map(str, args)])
    wait_for(lambda: dispatcher.poll() is not None or state_of(dispatcher.pid) == "T", 60, f"{moment} {n}")
    assert dispatcher.poll() is None, crew.said()
    return dispatcher


# ---- anything dies ----

def end_something(crew: Crew, rng: random.Random, dispatcher: subprocess.Popen) -> str:
    """SIGKILL to the dispatcher, to a whole hand, or to a bridge; what it was."""
    run_dir = crew.run_dir()
    hands = [path.parent.name for path in run_dir.glob("tasks/*/hand.1")] if run_dir else []
    victim = rng.choice(("dispatcher", "hand", "bridge")) if hands else "dispatcher"
    if victim == "dispatcher":
        kill(dispatcher)
    elif victim == "hand":
        end_hand(run_dir, rng.choice(hands))
    else:
        signal_all(rng.sample(sorted(bridges(run_dir)), 1) if bridges(run_dir) else [], signal.SIGKILL)
    return victim


def chaos_faults(run_dir: Path) -> list[str]:
    """What must hold whatever was killed: agents that were may have failed, or asked for a thing twice."""
    faults = [*checker.check_records(run_dir, tree_checker.actors_of(run_dir)),
              *checker.check_journal(run_dir), *checker.check_processes(run_dir.name),
              *tree_checker.check_keys(run_dir), *tree_checker.check_money(run_dir),
              *tree_checker.check_history(run_dir), *tree_checker.replay_store(run_dir)[1]]
    return [fault for fault in faults if "tasks_failed" not in fault]      # what a lead left is no failure


def play_chaos(root: Path, number: int, longest_s: float = 1.5) -> Counter:
    """One run, in which one thing after the other dies, `longest_s` apart at most; what died."""
    rng, root = random.Random(number), root / f"chaos{number}"
    root.mkdir()
    crew, died = make_tree(root, rng, 3, 1).crew, Counter()
    dispatcher = crew.start("dispatch", crew.manifest)
    try:
        for _ in range(rng.randint(1, 4)):
            at = time.monotonic() + rng.uniform(0, longest_s)
            wait_for(lambda at=at: time.monotonic() >= at or dispatcher.poll() is not None, 30)
            if dispatcher.poll() is None:
                died[end_something(crew, rng, dispatcher)] += 1
            run_dir = crew.run_dir()
            if dispatcher.poll() == -signal.SIGKILL and run_dir and not is_finished(run_dir):
                dispatcher = crew.start("resume", run_dir.name)
        if run_dir:
            assert dispatcher.wait(120) in (0, 1) or is_finished(run_dir), f"exit {dispatcher.returncode}"
            assert chaos_faults(run_dir) == []
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"chaos {number} in {root}: {error}\n{crew.said()}") from error
    finally:
        crew.home.end_everything()
    shutil.rmtree(root)
    return died


def test_a_run_in_which_anything_dies_comes_to_its_end(tmp_path):
    assert sum((play_chaos(tmp_path, n, 0.3) for n in range(2)), Counter())


@pytest.mark.slow
def test_many_runs_in_which_anything_dies_come_to_their_ends(tmp_path):
    died = sum((play_chaos(tmp_path, number) for number in range(ROUNDS)), Counter())
    print("died:", dict(died))
    assert ROUNDS < 10 or len(died) == 3


# ---- a worker rests while its dispatcher dies ----

def states(run_dir: Path, actor: str) -> set[str]:
    """The kernel's letters for the processes of an actor's first hand; T is stopped."""
    return {state_of(pid) for pid in hand_processes(run_dir, actor)}


def test_a_frozen_worker_stays_frozen(grow, tmp_path):
    """Also when somebody wakes its processes while no dispatcher is there: adoption stops them again."""
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"], rest_one(tmp_path, "freeze"))
    assert states(run_dir, "worker-1") == {"T"}
    kill(dispatcher)
    assert states(run_dir, "worker-1") == {"T"}
    signal_all(hand_processes(run_dir, "worker-1"), signal.SIGCONT)
    resumed = take_over(tree.crew, run_dir)
    wait_for(lambda: states(run_dir, "worker-1") == {"T"}, 30, "the freeze")
    assert "T" not in states(run_dir, "worker-2")
    tree.go("lead-go").touch()
    check_end(tree, resumed)


def test_a_paused_worker_stays_paused(grow, tmp_path):
    tree, dispatcher, run_dir = grow(["worker-1", "worker-2"], rest_one(tmp_path, "cancel"))
    assert not hand_processes(run_dir, "worker-1")
    kill(dispatcher)
    resumed = take_over(tree.crew, run_dir)
    tree.go("lead-go").touch()
    check_end(tree, resumed)
    dealt = [(e["kind"], e.get("hand")) for e in read_events(run_dir) if e.get("actor") == "worker-1"
             and e["kind"] in ("hand_dealt", "pause_decided", "continue_decided")]
    assert dealt == [("hand_dealt", 1), ("pause_decided", None), ("continue_decided", None),
                     ("hand_dealt", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("mode, moment", [
    ("freeze", 'journal:"pause_decided".after'), ("freeze", 'journal:"kind":"frozen".before'),
    ("freeze", 'journal:"continue_decided".after'), ("freeze", 'journal:"kind":"thawed".before'),
    ("cancel", 'journal:"pause_decided".after'), ("cancel", 'journal:"continue_decided".after')])
def test_a_rest_that_was_decided_is_carried_out_by_the_next_dispatcher(tmp_path, mode, moment):
    tree = make_waiting_tree(tmp_path, ["worker-1", "worker-2"], rest_one(tmp_path, mode))
    crew = tree.crew
    if "continue" in moment or "thawed" in moment:
        tree.go("lead-go").touch()
    try:
        assert start_with_fault(crew, moment, 1, "dispatch", crew.manifest)
        run_dir = crew.run_dir()
        resumed = take_over(crew, run_dir)
        if not tree.go("lead-go").exists():
            wait_for(lambda: states(run_dir, "worker-1") == ({"T"} if mode == "freeze" else set()), 30,
                     "the rest")
            tree.go("lead-go").touch()
        check_end(tree, resumed)
    finally:
        crew.home.end_everything()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ['journal:"reprompted".before', 'journal:"reprompted".after',
                                    'journal:"delivered".before', 'journal:"delivered".after'])
def test_a_message_is_told_once(tmp_path, moment):
    """However far it was on its way when the dispatcher died; the call that sent it is answered."""
    tree = make_waiting_tree(tmp_path, ["worker-1", "worker-2"], redirect_one(tmp_path), "never")
    try:
        assert start_with_fault(tree.crew, moment, 1, "dispatch", tree.crew.manifest)
        run_dir = tree.crew.run_dir()
        check_end(tree, take_over(tree.crew, run_dir))
    finally:
        tree.crew.home.end_everything()
    told = [text for text in echoes(run_dir, "worker-1") if "loose" in text and "never" not in text]
    assert len(told) == 1, told
    delivery = [c.result["delivery"] for c in calls_of(run_dir, LEAD) if c.tool == "reprompt_worker"]
    assert delivery == ["input" if "delivered" in moment else "resume"]


@pytest.mark.slow
def test_time_in_the_ice_does_not_count_whoever_watches(tmp_path):
    """A worker with 3 seconds to live is frozen for longer, most of that without a dispatcher."""
    home, lead = Home(tmp_path), Script()
    (tmp_path / "trail").mkdir()
    lead.call("spawn_worker", prompt=waiting_script(tmp_path, "worker-1").text(), timeout_secs=3)
    lead.wait_for_file(tmp_path / "worker-1.ready")
    rest_one(tmp_path, "freeze")(lead, [1])
    lead.call("wait_for_worker", task_id="<1.task_id>")
    crew = make_crew(home, lead, [Promise(LEAD), Promise("worker-1", (), ("worker-1 loose",))],
                     tmp_path / "trail", 1)
    dispatcher = crew.start("dispatch", crew.manifest)
    try:
        wait_for((tmp_path / f"{LEAD}.ready").exists, 30, "the freeze")
        kill(dispatcher)
        time_passes(3.5)
        run_dir = crew.run_dir()
        resumed = take_over(crew, run_dir)
        time_passes(1)
        (tmp_path / "lead-go").touch()
        assert resumed.wait(30) == 0, crew.said()
    finally:
        home.end_everything()
    assert checker.check_run(run_dir, crew.repo, crew.promises) == []
