"""R1 to R4 and R20: dispatchers that die, at every call, at random, side by side, and with their machine."""
from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from trial import STRIDE, TESTS, Outcome, Trial, all_of, let_pass

import checker
from test_crash import (Crew, cut_power, is_finished, kill, let_go, make_crew, make_waiting_crew, start_waiting,
                        start_with_fault, strike_after)
from test_tree_crash import chaos_faults, make_tree
from tools import ISOLATED, PITBOSS, PYTHON, read_events, wait_for

COUNTER = TESTS / "chaos" / "count_calls.py"
LETTERS = {"hand_dealt": "d", "hand_started": "s", "hand_ended": "e", "closed": "c", "spawn_failed": "f",
           "place_failed": "f", "hand_skipped": "f", "hand_voided": "v", "hand_held": "v"}
LEGAL = re.compile(r"(d(v|f|se))*(d?f|ds?)?c?")      # hand after hand, then the actor is closed


def finish(crew: Crew, once: bool = True) -> None:
    """What an operator does after a crash: resume, until the run is done; then nothing may be wrong."""
    run_dir = crew.run_dir()
    if run_dir is None:
        assert not (wrong := checker.check_untouched(crew.repo)), wrong
        return
    if not is_finished(run_dir):
        crew.home.pitboss("resume", run_dir.name, timeout=180, check=0)
    assert crew.run_dir() == run_dir, "resume made another run"
    wrong = checker.check_run(run_dir, crew.repo, crew.promises, crew.trail if once else None, once)
    assert not wrong, "; ".join(wrong)


# ---- R1: a death at every append, fsync and rename

MOMENTS = ("journal.before", "journal.half", "journal.after", "record.before", "record.half", "record.after",
           "fsync.before", "fsync.after", "replace.before", "replace.after")


def ten_tasks(root: Path) -> Crew:
    return make_crew(root / "h", random.Random(5), 10, ("shell", "demo", "shell"), longest_s=0.1, parallel=4)


def count_calls(root: Path) -> dict[str, int]:
    """How many calls of each kind a run of ten tasks makes that nobody kills."""
    root.mkdir(parents=True)
    crew = ten_tasks(root)
    argv = [PYTHON, *ISOLATED, str(COUNTER), str(root / "counts"), "dispatch", str(crew.manifest)]
    subprocess.run(argv, env=crew.home.env, cwd=root, check=True, timeout=120, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((root / "counts").read_text())


def faults_of_prefix(run_dir: Path) -> list[str]:
    """What is wrong with a journal whose writer died: nothing may be, but that its last line is cut off."""
    *whole, _ = (run_dir / "journal.jsonl").read_bytes().split(b"\n")
    wrong, events = [], []
    for number, line in enumerate(whole, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            return [f"line {number} is no JSON: {line[:80]!r}"]
    wrong += [f"line {n} has seq {e['seq']}" for n, e in enumerate(events, 1) if e["seq"] != n]
    wrong += [f"seq {b['seq']} is earlier than the one before" for a, b in zip(events, events[1:])
              if b["at"] < a["at"]]
    if events and events[0]["kind"] != "run_opened":
        wrong.append(f"it begins with {events[0]['kind']}")
    stages: dict[str, str] = {}
    for event in events:
        if event["kind"] in LETTERS:
            stages[event["actor"]] = stages.get(event["actor"], "") + LETTERS[event["kind"]]
    return wrong + [f"{actor} went {stage}" for actor, stage in stages.items() if not LEGAL.fullmatch(stage)]


def die_at(root: Path, moment: str, n: int) -> bool:
    """Kill a run of ten tasks at its n-th `moment`; its journal is legal, readers take it, resume ends it.

    False when the run ended without coming to it.
    """
    crew = ten_tasks(root)
    try:
        if not start_with_fault(crew, moment, n, "dispatch", crew.manifest):
            return False
        run_dir = crew.run_dir()
        if run_dir:
            assert not (wrong := faults_of_prefix(run_dir)), wrong
            crew.home.pitboss("status", run_dir.name, "--json", check=0)
        finish(crew)
        return True
    except AssertionError as error:
        raise AssertionError(f"{moment} {n}: {error}\n{crew.said()[-2000:]}") from error
    finally:
        crew.home.end_everything()


def journal_is_legal(trial: Trial) -> Outcome:
    counts = count_calls(trial.root / "count")
    points = [(moment, n) for moment in MOMENTS for n in range(1, counts[moment.partition(".")[0]] + 1)]
    count = trial.count(len(points))
    met = trial.rounds(count, lambda root, n: die_at(root, *points[n * STRIDE % len(points)]))
    legal = sum(met)
    return Outcome(f"{legal} of {legal + count - len(met)} points of {len(points)} legal",
                   bool(legal) and not trial.faults)


# ---- R2: deaths at random

def die_at_random(root: Path, number: int) -> int:
    """Twenty tasks; whoever deals them is killed up to five times; how often it was."""
    chance, kills = random.Random(number), 0
    crew = make_crew(root / "h", chance, 20, ("demo", "demo", "demo", "shell"), longest_s=0.5)
    try:
        for _ in range(chance.randint(1, 5)):
            run_dir = crew.run_dir()
            args = ("resume", run_dir.name) if run_dir else ("dispatch", crew.manifest)
            if run_dir and is_finished(run_dir) or not strike_after(crew, crew.start(*args),
                                                                    chance.uniform(0, 4)):
                break
            kills += 1
        if crew.run_dir() is None:
            crew.home.pitboss("dispatch", crew.manifest, timeout=180, check=0)
        finish(crew)
        return kills
    except AssertionError as error:
        raise AssertionError(f"{error}\n{crew.said()[-2000:]}") from error
    finally:
        crew.home.end_everything()


def random_death_is_harmless(trial: Trial) -> Outcome:
    count = trial.count(1000, 4)
    kills = trial.rounds(count, die_at_random, wide=2)
    return all_of(trial, kills, count, f" finish, one record per task, 0 lost lines; {sum(kills)} kills")


# ---- R3: adoption

def watched_by(pid: int) -> int:
    """How many processes `pid` holds a pidfd of: that is how a dispatcher waits for an agent."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += "pidfd" in os.readlink(link)
        except OSError:
            continue
    return count


def adopt_eight(root: Path, number: int) -> tuple[int, float]:
    """Kill the dispatcher of eight living agents; (how many were dealt again, seconds until all are watched)."""
    crew = make_waiting_crew_in(root, 8)
    try:
        dispatcher, run_dir = start_waiting(crew)
        kill(dispatcher)
        began = time.monotonic()
        resumed = crew.start(argv=[PYTHON, str(PITBOSS), "resume", run_dir.name])     # as users start it
        wait_for(lambda: resumed.poll() is not None or watched_by(resumed.pid) >= 8, 60, "adoption")
        passed_s = time.monotonic() - began
        let_go(crew)
        assert resumed.wait(60) == 0, crew.said()
        finish(crew)
        dealt = Counter(e["actor"] for e in read_events(run_dir) if e["kind"] == "hand_dealt")
        return dealt.total() - 8, passed_s
    finally:
        crew.home.end_everything()


def make_waiting_crew_in(root: Path, size: int, agent: str = "shell") -> Crew:
    (root / "h").mkdir()
    return make_waiting_crew(root / "h", size, agent)


def living_are_adopted(trial: Trial) -> Outcome:
    count, lanes = trial.count(20), trial.lanes
    trial.lanes = 1                                   # the figure is a time
    found = trial.rounds(count, adopt_eight)
    trial.lanes = lanes
    restarted, slowest = sum(row[0] for row in found), max((row[1] for row in found), default=0)
    return Outcome(f"{8 * len(found) - restarted} of {8 * count}, {restarted} restarted, {slowest:.1f} s at most",
                   len(found) == count and not restarted and slowest < 2)


# ---- R4: two at once

def resume_at_once(crew: Crew, dispatcher: subprocess.Popen, run_dir: Path, chance: random.Random) -> list:
    """Two resumes of a run whose dispatcher is dead."""
    kill(dispatcher)
    return [crew.start("resume", run_dir.name) for _ in range(2)]


def resume_beside_the_living(crew, dispatcher, run_dir, chance) -> list:
    """A resume of a run that is dealt."""
    return [dispatcher, crew.start("resume", run_dir.name)]


def resume_while_it_dies(crew, dispatcher, run_dir, chance) -> list:
    """Two resumes are on their way when the dispatcher is killed."""
    both = [crew.start("resume", run_dir.name) for _ in range(2)]
    let_pass(chance.uniform(0, 0.6))
    kill(dispatcher)
    return both


RACES = (resume_at_once, resume_beside_the_living, resume_while_it_dies)


def race(root: Path, number: int) -> int:
    """Two commands want one run: one has it or gets it, the others leave with 4; how many were refused."""
    crew, chance = make_waiting_crew_in(root, 2), random.Random(number)
    try:
        dispatcher, run_dir = start_waiting(crew)
        both = RACES[number % len(RACES)](crew, dispatcher, run_dir, chance)
        wait_for(lambda: any(p.poll() is not None for p in both), 60, "a refusal")
        codes = [p.poll() for p in both if p.poll() is not None]
        if len(codes) == 2:           # both were refused while the dispatcher lived: nobody has it now
            assert codes == [4, 4] and RACES[number % 3] is resume_while_it_dies, f"{codes} {crew.said()}"
            both.append(crew.start("resume", run_dir.name))
        assert codes[0] == 4, f"exit {codes}: {crew.said()}"
        let_go(crew)
        winner = next(p for p in both if p.poll() is None or p.returncode == 0)
        assert winner.wait(60) == 0, crew.said()
        finish(crew)
        hands = [p.name for p in run_dir.glob("tasks/*/hand.*")]
        assert hands == ["hand.1"] * 2, f"dealt again: {hands}"
        takeovers = sum(e["kind"] == "dispatcher_started" for e in read_events(run_dir))
        assert takeovers == 1 + (winner is not dispatcher), f"{takeovers} dispatchers"
        return len(codes)
    finally:
        crew.home.end_everything()


def never_two_dispatchers(trial: Trial) -> Outcome:
    count = trial.count(200, 3)
    refused = trial.rounds(count, race)
    return all_of(trial, refused, count, f" rounds without a double, {sum(refused)} losers left with 4")


# ---- R20: the machine goes down

REBOOTED = """import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
pitboss.boot_id = lambda: "00000000-0000-4000-8000-000000000000"
sys.exit(pitboss.main(sys.argv[2:]))
"""


def reboot(crew: Crew, dispatcher: subprocess.Popen, run_dir: Path, chance: random.Random) -> None:
    """Everything dies at once at a random moment; nothing of the runtime folder is left, and the boot is another."""
    let_pass(chance.uniform(0.2, 3))
    cut_power(dispatcher, run_dir)
    shutil.rmtree(crew.home.root / "run")
    (crew.home.root / "run").mkdir(mode=0o700)
    if not is_finished(run_dir):
        script = crew.home.root / "rebooted.py"
        script.write_text(REBOOTED)
        resumed = crew.start(argv=[PYTHON, str(script), str(PITBOSS), "resume", run_dir.name])
        assert resumed.wait(180) == 0, f"exit {resumed.returncode}: {crew.said()[-2000:]}"


def sessions_faults(run_dir: Path) -> tuple[int, list[str]]:
    """(hands that went on where another one had been at work, actors that lost their session)."""
    went_on, wrong = 0, []
    dealt = Counter(e["actor"] for e in read_events(run_dir) if e["kind"] == "hand_dealt")
    for actor, hands in dealt.items():
        lines = (run_dir / "tasks" / actor / "stdout.log").read_bytes().splitlines()
        sessions = [e["session_id"] for line in lines if (e := whole(line)) and e.get("type") == "assistant"]
        went_on += hands > 1 and bool(sessions)
        wrong += [f"{actor} worked in {set(sessions)}"] if len(set(sessions)) > 1 else []
    return went_on, wrong


def whole(line: bytes) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def reboot_flat(root: Path, number: int) -> int:
    """Eight tasks; how many went on in the session that they had been at work in."""
    chance = random.Random(number)
    crew = make_crew(root / "h", chance, 8, longest_s=1.0)
    try:
        dispatcher = crew.start("dispatch", crew.manifest)
        run_dir = wait_for(crew.run_dir, 60)
        reboot(crew, dispatcher, run_dir, chance)
        finish(crew, once=False)
        went_on, wrong = sessions_faults(run_dir)
        assert not wrong, wrong
        return went_on
    finally:
        crew.home.end_everything()


def reboot_tree(root: Path, number: int) -> int:
    """The same of a lead with three workers."""
    chance = random.Random(number)
    (root / "h").mkdir()
    crew = make_tree(root / "h", chance, 3, 1).crew
    try:
        dispatcher = crew.start("dispatch", crew.manifest)
        run_dir = wait_for(crew.run_dir, 60)
        reboot(crew, dispatcher, run_dir, chance)
        wrong = chaos_faults(run_dir)
        assert not wrong, wrong
        went_on, wrong = sessions_faults(run_dir)
        assert not wrong, wrong
        return went_on
    finally:
        crew.home.end_everything()


def reboot_is_survived(trial: Trial) -> Outcome:
    count = trial.count(100, 2)
    plays = (reboot_flat, reboot_tree)
    went_on = trial.rounds(count, lambda root, n: plays[n % 2](root, n))
    return all_of(trial, went_on, count, f" reboots, {sum(went_on)} agents went on in their sessions")
