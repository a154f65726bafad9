"""A dispatcher that dies at any moment loses nothing and does nothing twice.

Real dispatchers are killed with SIGKILL from outside: at random, at a stage of the journal that was aimed at,
and at every single call that matters (faults.py). The plain program resumes them, and checker.py, which knows
nothing of pitboss, looks at what is left. `PITBOSS_TEST_ROUNDS` sets the number of random rounds.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shlex
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
from checker import Promise, trail_begin, trail_end
from tools import ISOLATED, PYTHON, Home, processes_with, read_events, read_records, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

ROUNDS = int(os.environ.get("PITBOSS_TEST_ROUNDS", "200"))
FAULTS = Path(__file__).with_name("faults.py")
SHELL = '[agent.shell]\ncommand = ["sh"]\nformat = "text"\n'     # its prompt is a shell script


# ---- crews: what the tasks of a run do ----

class Crew(NamedTuple):
    """One run to be killed: a home of its own, its manifest, what its tasks promise to leave behind."""
    home: Home
    repo: Path
    manifest: Path
    promises: list[Promise]
    trail: Path

    def start(self, *args, argv=None) -> subprocess.Popen:
        """The program (or another `argv`) with its output in files, so that it never waits for a reader."""
        out = open(self.home.root / "out.txt", "ab")
        with out:
            return subprocess.Popen(argv or self.home.argv(*args), env=self.home.env, cwd=self.home.root,
                                    stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def run_dir(self) -> Path | None:
        """The one run folder, or None before there is a journal."""
        journals = list(self.home.runs.glob("[!.]*/journal.jsonl"))
        assert len(journals) <= 1, f"more than one run: {journals}"
        return journals[0].parent if journals else None

    def said(self) -> str:
        return (self.home.root / "out.txt").read_text(errors="replace")


def make_crew(root: Path, rng: random.Random, size: int, agents=("demo",), longest_s: float = 0.5,
              parallel: int = 6) -> Crew:
    """Tasks that commit, that leave lines uncommitted, that do both, and that only sleep, in turn."""
    root.mkdir(exist_ok=True)
    home, trail = Home(root), root / "trail"
    trail.mkdir()
    repo = home.repo(files=2)
    promises, tasks = [], []
    for n in range(size):
        name = f"t{n:02}"
        promise = Promise(name, committed=(f"{name} committed",) if n % 4 in (0, 1) else (),
                          loose=(f"{name} loose",) if n % 4 in (1, 2) else ())
        agent = agents[n % len(agents)]
        write = {"demo": demo_script, "shell": shell_script}[agent]
        prompt = write(promise, trail, rng.choice((0.05, 0.1, longest_s / 2, longest_s)))
        promises.append(promise)
        tasks.append(task_table(name, agent, repo, prompt))
    manifest = home.manifest(f"[run]\nmax_parallel = {parallel}\n{SHELL}" + "".join(tasks))
    return Crew(home, repo, manifest, promises, trail)


def task_table(name: str, agent: str, repo: Path, prompt: str, more: str = "") -> str:
    keys = f"id = '{name}'\nagent = '{agent}'\ndirectory = '{repo}'\n{more}"
    return f"[[task]]\n{keys}prompt = '''\n{prompt}\n'''\n"


def demo_script(promise: Promise, trail: Path, sleep_s: float) -> str:
    steps = [f"$ run {trail_begin(trail, promise.task)}"]
    steps += [f"$ append {checker.COMMITTED} {line}\n$ commit {line}" for line in promise.committed]
    steps += [f"$ sleep {sleep_s}"]
    steps += [f"$ append {checker.LOOSE} {line}" for line in promise.loose]
    return "\n".join([*steps, f"$ run {trail_end(trail, promise.task)}", ""])


def shell_script(promise: Promise, trail: Path, sleep_s: float) -> str:
    steps = [trail_begin(trail, promise.task)]
    commit = "git add -A; git -c user.name=t -c user.email=t@t commit -qm work"
    steps += [f"echo {line} >>{checker.COMMITTED}; {commit}" for line in promise.committed]
    steps += [f"sleep {sleep_s}"]
    steps += [f"echo {line} >>{checker.LOOSE}" for line in promise.loose]
    return "\n".join([*steps, trail_end(trail, promise.task), ""])


def make_waiting_crew(root: Path, size: int, agent: str = "shell") -> Crew:
    """Tasks that all run at once, until the file `go` is there, and then commit one line."""
    home, trail = Home(root), root / "trail"
    trail.mkdir()
    repo, tasks = home.repo(files=2), []
    promises = [Promise(f"t{n:02}", committed=(f"t{n:02} committed",)) for n in range(size)]
    wait = f"until [ -e {shlex.quote(str(root / 'go'))} ]; do sleep 0.05; done"
    for promise in promises:
        script = {"demo": demo_script, "shell": shell_script}[agent](promise, trail, 0)
        script = script.replace("$ sleep 0", f"$ run {wait}").replace("sleep 0\n", wait + "\n")
        tasks.append(task_table(promise.task, agent, repo, script))
    manifest = home.manifest(f"[run]\nmax_parallel = {size}\n{SHELL}" + "".join(tasks))
    return Crew(home, repo, manifest, promises, trail)


def start_waiting(crew: Crew) -> tuple[subprocess.Popen, Path]:
    """Dispatch a waiting crew; all its agents are in their scripts and in the journal when this returns."""
    dispatcher = crew.start("dispatch", crew.manifest)
    wait_for(lambda: len(list(crew.trail.glob("*.lock"))) == len(crew.promises), 60, "all scripts to begin")
    run_dir = crew.run_dir()
    wait_for(lambda: set(stages(run_dir).values()) == {"running"}, 30, "every hand_started")
    return dispatcher, run_dir


def let_go(crew: Crew) -> None:
    (crew.home.root / "go").touch()


# ---- stages: how far the journal says that each task is ----

STAGES = ("waiting", "intent", "running", "ended", "closed")
STAGE_AFTER = {"hand_dealt": "intent", "hand_started": "running", "hand_ended": "ended", "closed": "closed",
               "spawn_failed": "ended"}


class Watch:
    """Follows a journal from outside, as fast as it can be read."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.rest = run_dir, b""
        tasks = json.loads((run_dir / "resolved.json").read_bytes())["tasks"]
        self.stages = {task["id"]: "waiting" for task in tasks}
        self.hands = Counter()
        self.file = open(run_dir / "journal.jsonl", "rb", buffering=0)

    def look(self) -> dict[str, str]:
        """The stage of every task; an agent whose exit file is there has ended, whatever the journal says."""
        *lines, self.rest = (self.rest + (self.file.read() or b"")).split(b"\n")
        for event in map(json.loads, lines):
            if event["kind"] in STAGE_AFTER:
                self.stages[event["actor"]] = STAGE_AFTER[event["kind"]]
            if event["kind"] == "hand_dealt":
                self.hands[event["actor"]] = event["hand"]
        return {actor: "ended" if stage == "running" and self.has_exit(actor) else stage
                for actor, stage in self.stages.items()}

    def has_exit(self, actor: str) -> bool:
        return os.path.exists(f"{self.run_dir}/tasks/{actor}/exit.{self.hands[actor]}")


def stages(run_dir: Path) -> dict[str, str]:
    watch = Watch(run_dir)
    with watch.file:
        return watch.look()


def kinds(run_dir: Path) -> Counter:
    """How many events of each kind there are."""
    return Counter(event["kind"] for event in read_events(run_dir))


def is_finished(run_dir: Path) -> bool:
    return kinds(run_dir)["run_finished"] > 0 and (run_dir / "summary.json").exists()


# ---- strikes: SIGKILL from outside ----

def state_of(pid: int) -> str:
    """The kernel's letter for a process: T is stopped, Z a zombie; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):        # the second: it went between open and read
        return "X"


def kill(dispatcher: subprocess.Popen) -> None:
    dispatcher.send_signal(signal.SIGKILL)
    dispatcher.wait(30)


def strike_after(crew: Crew, dispatcher: subprocess.Popen, delay_s: float) -> bool:
    """Kill the dispatcher `delay_s` from now; False when it has ended before."""
    at = time.monotonic() + delay_s
    wait_for(lambda: time.monotonic() >= at or dispatcher.poll() is not None, delay_s + 30)
    kill(dispatcher)
    return dispatcher.returncode == -signal.SIGKILL


def strike_at(crew: Crew, dispatcher: subprocess.Popen, stage: str) -> bool:
    """Kill the dispatcher while some task is at `stage`: stop it, look again, go on if it was too late.

    False when it ended without being caught there.
    """
    run_dir = wait_for(lambda: crew.run_dir() or dispatcher.poll() is not None, 60)
    if run_dir is True or not wait_for(lambda: (run_dir / "resolved.json").exists(), 30):
        return False
    watch, end = Watch(run_dir), time.monotonic() + 120
    with watch.file:
        while dispatcher.poll() is None:
            assert time.monotonic() < end, f"no task came to the stage {stage}, and the run did not end"
            if stage not in watch.look().values():
                continue
            dispatcher.send_signal(signal.SIGSTOP)
            wait_for(lambda: state_of(dispatcher.pid) in "TZX", 30, "the dispatcher to stop")
            if stage in watch.look().values():
                kill(dispatcher)
                return True
            dispatcher.send_signal(signal.SIGCONT)
    return False


def strike(crew: Crew, dispatcher: subprocess.Popen, rng: random.Random, horizon_s: float) -> Counter:
    """Kill at a random moment or at an aimed stage; the stages that the tasks were at, each counted once."""
    aim = rng.choice(("moment", "moment", "moment", "intent", "intent", "running", "ended", "closed"))
    hit = strike_after(crew, dispatcher, rng.uniform(0, horizon_s)) if aim == "moment" \
        else strike_at(crew, dispatcher, aim)
    run_dir = crew.run_dir()
    if not hit or not run_dir or not (run_dir / "resolved.json").exists():
        assert hit or dispatcher.returncode == 0, f"exit {dispatcher.returncode}: {crew.said()}"
        return Counter(["finished" if not hit else "waiting"])
    return Counter(set(stages(run_dir).values()))


def resume_to_the_end(crew: Crew) -> None:
    """What an operator does after a crash; a run that never began leaves nothing that could be resumed."""
    run_dir = crew.run_dir()
    if run_dir is None:
        assert checker.check_untouched(crew.repo) == []
        return
    if not is_finished(run_dir):
        crew.home.pitboss("resume", run_dir.name, timeout=120, check=0)
    assert crew.run_dir() == run_dir
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []


# ---- the kill test ----

def play_round(root: Path, number: int, size: int, agents, longest_s: float, horizon_s: float) -> Counter:
    """One run, killed once or twice, resumed, and looked at."""
    rng = random.Random(number)
    crew = make_crew(root / f"round{number}", rng, size, agents, longest_s)
    try:
        hits = strike(crew, crew.start("dispatch", crew.manifest), rng, horizon_s)
        run_dir = crew.run_dir()
        if rng.random() < 0.4 and run_dir and not is_finished(run_dir):
            hits += strike(crew, crew.start("resume", run_dir.name), rng, horizon_s)
        resume_to_the_end(crew)
    except AssertionError as error:
        raise AssertionError(f"round {number} in {crew.home.root}: {error}\n{crew.said()}") from error
    finally:
        crew.home.end_everything()
    shutil.rmtree(crew.home.root)
    return hits


def test_a_few_killed_dispatchers_lose_nothing(tmp_path):
    hits = sum((play_round(tmp_path, n, 4, ("shell",), 0.1, 1.0) for n in range(4)), Counter())
    assert sum(hits[stage] for stage in STAGES) > 0


@pytest.mark.slow
def test_killed_dispatchers_lose_nothing_and_do_nothing_twice(tmp_path, record_property):
    """The histogram must show kills at every stage: otherwise the rounds prove less than they say."""
    agents = ("demo", "demo", "demo", "shell")
    hits = sum((play_round(tmp_path, n, 20, agents, 0.5, 5) for n in range(ROUNDS)), Counter())
    record_property("kills_by_stage", json.dumps(hits))
    print("kills by stage:", dict(hits))
    if ROUNDS >= 30:
        assert [stage for stage in STAGES if not hits[stage]] == []


# ---- the checker itself ----

def without_last_line(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:-1])


def with_last_line_twice(data: bytes) -> bytes:
    return data + data.splitlines(keepends=True)[-1]


def spoils(crew: Crew, run_dir: Path) -> dict:
    """Ways to spoil a good run: what is wrong then: (the file, its bytes to others; None is no file)."""
    records, heads = {r["task_id"]: r for r in read_records(run_dir)}, crew.repo / ".git/refs/heads"
    tree = Path(records["t02"]["worktree_path"])
    return {
        "a record is missing": (run_dir / "summary.jsonl", without_last_line),
        "a record is there twice": (run_dir / "summary.jsonl", with_last_line_twice),
        "the two summaries differ": (run_dir / "summary.json", lambda data: data.replace(b"demo", b"other")),
        "an event is there twice": (run_dir / "journal.jsonl", with_last_line_twice),
        "the last event is missing": (run_dir / "journal.jsonl", without_last_line),
        "a script ran twice": (crew.trail / "t00", with_last_line_twice),
        "a script did not end": (crew.trail / "t00", without_last_line),
        "a branch is gone": (heads / records["t00"]["branch"], lambda data: None),
        "a stray branch": (heads / "stray", lambda data: (heads / "main").read_bytes()),
        "a loose line is gone": (tree / checker.LOOSE, without_last_line),
        "a loose line is there twice": (tree / checker.LOOSE, with_last_line_twice),
        "a worktree is no worktree": (tree / ".git", lambda data: None),
        "a stray worktree": (run_dir / "worktrees/stray", lambda data: b""),
        "a lock is left": (crew.repo / ".git/packed-refs.lock", lambda data: b""),
    }


def put(path: Path, data: bytes | None) -> None:
    path.unlink() if data is None else path.write_bytes(data)


def test_the_checker_sees_what_is_wrong(tmp_path):
    crew = make_crew(tmp_path, random.Random(1), 4, ("demo",), longest_s=0.05)
    crew.home.pitboss("dispatch", crew.manifest, check=0)
    run_dir, unseen = crew.run_dir(), []
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []
    for name, (path, change) in spoils(crew, run_dir).items():
        before = path.read_bytes() if path.exists() else None
        put(path, change(before))
        if not checker.check_run(run_dir, crew.repo, crew.promises, crew.trail):
            unseen.append(name)
        put(path, before)
    assert unseen == []
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []


def test_the_checker_sees_a_living_process():
    run_id = f"test-{os.getpid()}"
    process = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "PITBOSS_RUN_ID": run_id})
    seen = checker.check_processes(run_id, grace_s=0.1)
    kill(process)
    assert len(seen) == 1 and "sleep 60" in seen[0]
    assert checker.check_processes(run_id) == []


# ---- the counter test ----

MOMENTS = ["journal.before", "journal.half", "journal.after", "record.before", "record.half", "record.after",
           "fsync.before", "fsync.after", "replace.before", "replace.after", "spawn.before", "spawn.after",
           "git.before", "git.after"]


def start_with_fault(crew: Crew, moment: str, n: int, *args) -> bool:
    """Run until the n-th `moment` and kill there; False when the program ended without having come to it."""
    argv = [PYTHON, *ISOLATED, str(FAULTS), moment, str(n), "--", *map(str, args)]
    dispatcher = crew.start(argv=argv)
    wait_for(lambda: dispatcher.poll() is not None or state_of(dispatcher.pid) == "T", 120, f"{moment} {n}")
    if dispatcher.poll() is not None:
        assert dispatcher.returncode == 0, f"{moment} {n}: exit {dispatcher.returncode}: {crew.said()}"
        return False
    kill(dispatcher)
    return True


def small_crew(root: Path) -> Crew:
    return make_crew(root, random.Random(5), 5, ("shell", "demo", "shell"), longest_s=0.1, parallel=3)


def die_and_resume(root: Path, moment: str, n: int, first: tuple[str, int] | None = None) -> bool:
    """Kill a run of five tasks at the n-th `moment` (of its resume, if it is killed at `first` already)."""
    crew = small_crew(root)
    try:
        if first:
            assert start_with_fault(crew, *first, "dispatch", crew.manifest)
        args = ("resume", crew.run_dir().name) if first else ("dispatch", crew.manifest)
        was_hit = start_with_fault(crew, moment, n, *args)
        resume_to_the_end(crew)
    except AssertionError as error:
        raise AssertionError(f"{moment} {n} in {root}: {error}\n{crew.said()}") from error
    finally:
        crew.home.end_everything()
    shutil.rmtree(root)
    return was_hit


def deaths_until_the_end(root: Path, moment: str, first: tuple[str, int] | None = None) -> int:
    """Die at the first, the second, ... call, each in a run of its own, until three of them end without it.

    Three, because runs of the same tasks differ by an event or two.
    """
    deaths = misses = 0
    for n in itertools.count(1):
        was_hit = die_and_resume(root / f"n{n}", moment, n, first)
        deaths, misses = deaths + was_hit, misses + (not was_hit)
        if misses == 3:
            return deaths


@pytest.mark.parametrize("moment, n", [
    ("journal.before", 2), ("journal.half", 9), ("journal.after", 12), ("record.half", 2), ("fsync.after", 3),
    ("spawn.before", 2), ("spawn.after", 2), ("git.before", 4), ("git.after", 1)])
def test_a_death_at_a_chosen_call_loses_nothing(tmp_path, moment, n):
    assert die_and_resume(tmp_path / "crew", moment, n), "the call never came"


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_death_at_every_call_loses_nothing(tmp_path, moment):
    assert deaths_until_the_end(tmp_path, moment) > 0, "the call never came"


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_death_at_every_call_of_a_resume_loses_nothing(tmp_path, moment):
    assert deaths_until_the_end(tmp_path, moment, ("spawn.after", 3)) > 0, "the call never came"


# ---- adoption ----

def test_resume_adopts_eight_living_agents_and_restarts_none(tmp_path):
    crew = make_waiting_crew(tmp_path, 8)
    dispatcher, run_dir = start_waiting(crew)
    kill(dispatcher)
    resumed = crew.start("resume", run_dir.name)
    wait_for(lambda: kinds(run_dir)["dispatcher_started"] == 2, 30, "the takeover")
    let_go(crew)
    assert resumed.wait(60) == 0, crew.said()
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []
    assert sorted(p.name for p in run_dir.glob("tasks/*/hand.*")) == ["hand.1"] * 8
    assert {e["hand"] for e in read_events(run_dir) if e["kind"] == "hand_dealt"} == {1}


def test_agents_that_end_while_nobody_watches_are_harvested(tmp_path):
    crew = make_waiting_crew(tmp_path, 2, agent="demo")
    dispatcher, run_dir = start_waiting(crew)
    kill(dispatcher)
    let_go(crew)
    wait_for(lambda: len(list(run_dir.glob("tasks/*/exit.1"))) == 2, 30, "both agents to end")
    crew.home.pitboss("resume", run_dir.name, check=0)
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []
    assert {r["exit_code"] for r in read_records(run_dir)} == {0}


def test_of_two_resumes_one_is_refused_and_one_finishes(tmp_path):
    crew = make_waiting_crew(tmp_path, 2)
    dispatcher, run_dir = start_waiting(crew)
    kill(dispatcher)
    both = [crew.start("resume", run_dir.name) for _ in range(2)]
    wait_for(lambda: any(p.poll() is not None for p in both), 30, "a refusal")
    refused, winner = sorted(both, key=lambda p: p.poll() is None)
    assert refused.returncode == 4, crew.said()
    let_go(crew)
    assert winner.wait(60) == 0, crew.said()
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []


def test_a_resume_beside_the_living_dispatcher_is_refused(tmp_path):
    crew = make_waiting_crew(tmp_path, 1)
    dispatcher, run_dir = start_waiting(crew)
    refused = crew.home.pitboss("resume", run_dir.name)
    let_go(crew)
    assert refused.returncode == 4, refused.stderr
    assert dispatcher.wait(60) == 0
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []


def signal_all(pids, number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def cut_power(dispatcher: subprocess.Popen, run_dir: Path) -> None:
    """End the dispatcher and every agent at once: all are stopped first, so that no exit is told."""
    kill(dispatcher)
    marker, stopped = f"PITBOSS_RUN_ID={run_dir.name}", set()
    while fresh := processes_with(marker).keys() - stopped:
        signal_all(fresh, signal.SIGSTOP)
        stopped |= fresh
    signal_all(stopped, signal.SIGKILL)
    wait_for(lambda: not processes_with(marker), 10, "the agents' end")


def shim_of(run_dir: Path, task: str) -> int:
    """The process that took the task's first hand: the shell around the agent."""
    return int((run_dir / f"tasks/{task}/hand.1").read_text())


def test_an_agent_whose_shim_was_killed_lives_on(tmp_path):
    crew = make_waiting_crew(tmp_path, 1, agent="demo")
    dispatcher, run_dir = start_waiting(crew)
    os.kill(shim_of(run_dir, "t00"), signal.SIGKILL)
    time_passes(0.5)
    assert stages(run_dir) == {"t00": "running"}
    let_go(crew)
    assert dispatcher.wait(30) == 0, crew.said()
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []


def test_an_agent_without_shim_and_dispatcher_is_adopted(tmp_path):
    crew = make_waiting_crew(tmp_path, 1, agent="demo")
    dispatcher, run_dir = start_waiting(crew)
    kill(dispatcher)
    os.kill(shim_of(run_dir, "t00"), signal.SIGKILL)
    resumed = crew.start("resume", run_dir.name)
    wait_for(lambda: kinds(run_dir)["dispatcher_started"] == 2, 30, "the takeover")
    time_passes(0.5)
    assert stages(run_dir) == {"t00": "running"}
    let_go(crew)
    assert resumed.wait(30) == 0, crew.said()
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []
    assert kinds(run_dir)["hand_dealt"] == 1


def test_a_good_result_in_the_log_counts_without_an_exit_status(tmp_path):
    """Dispatcher and shim are dead when the agent ends: only its log can tell how."""
    crew = make_waiting_crew(tmp_path, 1, agent="demo")
    dispatcher, run_dir = start_waiting(crew)
    kill(dispatcher)
    os.kill(shim_of(run_dir, "t00"), signal.SIGKILL)
    let_go(crew)
    wait_for(lambda: not processes_with(f"PITBOSS_RUN_ID={run_dir.name}"), 30, "the agent's end")
    crew.home.pitboss("resume", run_dir.name, check=0)
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []
    assert kinds(run_dir)["hand_dealt"] == 1


def test_a_dead_agent_is_dealt_again_in_its_session(tmp_path):
    """The second hand goes on after the steps that the first one finished: no line is written twice."""
    home = Home(tmp_path)
    repo, ready = home.repo(files=1), tmp_path / "ready"
    manifest = home.manifest(f"""
        [[task]]
        id = "one"
        agent = "demo"
        directory = "{repo}"
        prompt = '''
        $ append {checker.COMMITTED} first
        $ commit first
        $ append {checker.LOOSE} second
        $ run touch {ready}
        $ run until [ -e {tmp_path}/go ]; do sleep 0.05; done
        '''
        """.replace("\n        ", "\n"))
    crew = Crew(home, repo, manifest, [Promise("one", ("first",), ("second",))], tmp_path)
    dispatcher = crew.start("dispatch", manifest)
    wait_for(ready.exists, 30, "the script's third step")
    run_dir = crew.run_dir()
    wait_for(lambda: stages(run_dir)["one"] == "running", 30)
    cut_power(dispatcher, run_dir)
    let_go(crew)
    home.pitboss("resume", run_dir.name, check=0)
    assert checker.check_run(run_dir, repo, crew.promises) == []
    assert [e["hand"] for e in read_events(run_dir) if e["kind"] == "hand_dealt"] == [1, 2]


def test_a_hand_that_keeps_dying_is_given_up(tmp_path):
    """At most three hands are dealt for ones that vanished at their work; then the record says Failed."""
    home, notes = Home(tmp_path), tmp_path / "notes"
    repo = home.repo(files=1)
    script = f"$ say hello\n$ run echo here >>{notes}; sleep 1000\n"
    crew = Crew(home, repo, home.manifest(task_table("one", "demo", repo, script)), [], tmp_path)
    dispatcher, hands = crew.start("dispatch", crew.manifest), 0
    while has_another_hand(crew, dispatcher, notes, hands):
        hands += 1
        cut_power(dispatcher, crew.run_dir())
        dispatcher = crew.start("resume", crew.run_dir().name)
    assert dispatcher.returncode == 1, crew.said()
    assert [(r["task_id"], r["status"]) for r in read_records(crew.run_dir())] == [("one", "Failed")]
    assert hands == 4


def has_another_hand(crew: Crew, dispatcher: subprocess.Popen, notes: Path, before: int) -> bool:
    """Wait for one more hand at its work, and in the journal; False when the run has ended instead."""
    def is_new() -> bool:
        here = len(notes.read_text().split()) if notes.exists() else 0
        return here > before and stages(crew.run_dir())["one"] == "running"

    wait_for(lambda: dispatcher.poll() is not None or is_new(), 30, "another hand, or the end")
    return dispatcher.poll() is None


def play_power_cut(root: Path, number: int, size: int) -> None:
    """Dispatcher and agents end together, at a random moment; the demo agent goes on where it was."""
    rng = random.Random(number)
    crew = make_crew(root / f"cut{number}", rng, size)
    dispatcher = crew.start("dispatch", crew.manifest)
    run_dir = wait_for(crew.run_dir, 30)
    time_passes(rng.uniform(0, 0.2 * size))
    cut_power(dispatcher, run_dir)
    try:
        if not is_finished(run_dir):
            crew.home.pitboss("resume", run_dir.name, timeout=120, check=0)
        assert checker.check_run(run_dir, crew.repo, crew.promises, once=False) == []
    except AssertionError as error:
        raise AssertionError(f"power cut {number} in {crew.home.root}: {error}\n{crew.said()}") from error
    finally:
        crew.home.end_everything()
    shutil.rmtree(crew.home.root)


def test_a_power_cut_loses_nothing(tmp_path):
    play_power_cut(tmp_path, 1, 4)


@pytest.mark.slow
def test_many_power_cuts_lose_nothing(tmp_path):
    for number in range(max(1, ROUNDS // 10)):
        play_power_cut(tmp_path, number, 10)


# ---- time while nobody, or a stopped dispatcher, watches ----

def time_passes(seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() >= end, seconds + 5)


def timed_manifest(home: Home, script: str, timeout_s: int) -> Path:
    repo = home.repo(files=1)
    return home.manifest(SHELL + task_table("one", "shell", repo, script, f"timeout_secs = {timeout_s}\n"))


def test_a_stopped_dispatcher_makes_no_false_timeout(tmp_path):
    """It sleeps past the deadline of an agent that finished in time: what was done is looked at first."""
    home = Home(tmp_path)
    dispatcher = home.start("dispatch", timed_manifest(home, f"touch {tmp_path}/ready; sleep 1", 2))
    wait_for((tmp_path / "ready").exists, 30)
    run_dir = home.run_dir()
    wait_for(lambda: stages(run_dir)["one"] == "running", 30)
    dispatcher.send_signal(signal.SIGSTOP)
    time_passes(3)
    assert (run_dir / "tasks/one/exit.1").exists()
    dispatcher.send_signal(signal.SIGCONT)
    assert dispatcher.wait(30) == 0
    assert [r["status"] for r in read_records(run_dir)] == ["Success"]


def test_an_agent_that_finished_in_time_without_a_dispatcher_is_no_timeout(tmp_path):
    home = Home(tmp_path)
    dispatcher = home.start("dispatch", timed_manifest(home, f"touch {tmp_path}/ready; sleep 0.7", 2))
    wait_for((tmp_path / "ready").exists, 30)
    run_dir = home.run_dir()
    wait_for(lambda: stages(run_dir)["one"] == "running", 30)
    kill(dispatcher)
    time_passes(2.2)
    home.pitboss("resume", run_dir.name, check=0)
    assert [r["status"] for r in read_records(run_dir)] == ["Success"]


def test_an_adopted_agent_past_its_deadline_times_out(tmp_path):
    home = Home(tmp_path)
    dispatcher = home.start("dispatch", timed_manifest(home, f"touch {tmp_path}/ready; exec sleep 1000", 2))
    wait_for((tmp_path / "ready").exists, 30)
    run_dir = home.run_dir()
    wait_for(lambda: stages(run_dir)["one"] == "running", 30)
    kill(dispatcher)
    time_passes(2.2)
    home.pitboss("resume", run_dir.name, check=1)
    assert [r["status"] for r in read_records(run_dir)] == ["TimedOut"]
    assert checker.check_processes(run_dir.name) == []


# ---- a run folder that is not as the program left it ----

@pytest.fixture
def dead(tmp_path):
    """A run whose dispatcher is dead and whose one agent waits: the crew and the run folder."""
    crew = make_waiting_crew(tmp_path, 1)
    dispatcher, run_dir = start_waiting(crew)
    kill(dispatcher)
    yield crew, run_dir
    crew.home.end_everything()


def refusal(crew: Crew, run_dir: Path) -> str:
    """What `resume` says when it refuses: words, no traceback, and the journal untouched."""
    before = (run_dir / "journal.jsonl").read_bytes()
    done = crew.home.pitboss("resume", run_dir.name)
    assert done.returncode not in (0, 1, 70), done.stderr
    assert "Traceback" not in done.stderr
    assert (run_dir / "journal.jsonl").read_bytes() == before
    return done.stderr


@pytest.mark.parametrize("torn", [b'{"seq": 99, "at": 1.5, "ki', b"\0\0\0\xff", b'{"seq"', b"not json\n"])
def test_a_torn_last_line_is_put_aside(dead, torn):
    crew, run_dir = dead
    with open(run_dir / "journal.jsonl", "ab") as journal:
        journal.write(torn)
    let_go(crew)
    crew.home.pitboss("resume", run_dir.name, check=0)
    assert torn in (run_dir / "journal.torn").read_bytes()
    assert checker.check_run(run_dir, crew.repo, crew.promises, crew.trail) == []


def test_readers_take_whole_lines_only(dead):
    crew, run_dir = dead
    with open(run_dir / "journal.jsonl", "ab") as journal:
        journal.write(b'{"seq": 99, "at": 1.5, "ki')
    shown = json.loads(crew.home.pitboss("status", run_dir.name, "--json", check=0).stdout)
    assert [actor["task_id"] for actor in shown["actors"]] == ["t00"]
    assert not (run_dir / "journal.torn").exists(), "a reader must not repair"


def test_a_journal_of_a_newer_format_is_refused(dead):
    crew, run_dir = dead
    events = read_events(run_dir)
    assert events[0]["kind"] == "run_opened" and isinstance(events[0]["format"], int)
    events[0]["format"] = 999
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert re.search(r"newer|format", refusal(crew, run_dir))


def test_a_broken_line_in_the_middle_is_named(dead):
    crew, run_dir = dead
    lines = (run_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:len(lines[2]) // 2] + b"\n"
    (run_dir / "journal.jsonl").write_bytes(b"".join(lines))
    said = refusal(crew, run_dir)
    assert "journal.jsonl" in said and re.search(r"\b3\b", said), said


def test_a_lock_that_cannot_be_opened_is_the_environments_fault(dead):
    crew, run_dir = dead
    (run_dir / "lock").unlink()
    (run_dir / "lock").mkdir()
    assert refusal(crew, run_dir).startswith(f"pitboss: taking over the run: Is a directory: {run_dir}/lock\n")
    (run_dir / "lock").rmdir()
    let_go(crew)
    crew.home.pitboss("resume", run_dir.name, check=0)


def test_a_run_folder_that_vanishes_ends_the_run_in_words(tmp_path):
    crew = make_waiting_crew(tmp_path, 2)
    dispatcher, run_dir = start_waiting(crew)
    wait_for(lambda: shutil.rmtree(run_dir, ignore_errors=True) or not run_dir.exists(), 10)
    let_go(crew)
    assert dispatcher.wait(30) == 5, crew.said()
    assert "Traceback" not in crew.said()
    assert not run_dir.exists(), "a deleted run must not come back"
    crew.home.end_everything()
