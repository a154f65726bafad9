"""A dispatcher that dies between a request, its decision and its delivery: each is applied exactly once.

As in test_tree_crash.py real dispatchers are killed from outside, at a line of the journal, at an fsync or at any
moment, while a desk answers with the command or with files, too late on purpose, or not at all. The verdict is read
from the journal's lines, the agent's log and the records; nothing here imports pitboss. `PITBOSS_TEST_ROUNDS` sets
the number of random rounds.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import checker
import tree_checker
from test_crash import FAULTS, Crew, is_finished, kill, state_of
from test_tree_crash import LEAD, Script
from tools import ISOLATED, PYTHON, Home, read_events, read_records

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

ROUNDS = int(os.environ.get("PITBOSS_TEST_ROUNDS", "200"))
DOORS = ("command", "file", "ttl", "race")     # who answers; race: a command or a file about when the time is over
TTL_S = 0.4
LATE_S = 10.0           # a timer of a busy machine
NO_OPERATOR = {"from_ttl": True, "comment": "no operator available"}


# ---- what the lead asks, and who answers ----

class Ask(NamedTuple):
    """One request of the lead's script."""
    number: int
    door: str
    approved: bool      # what the desk says
    fallback: str
    by_file: bool       # of a race: with a file
    wait_s: float       # of a race: until the desk answers

    def arguments(self) -> dict:
        timed = {"ttl_secs": TTL_S, "fallback": self.fallback} if self.door in ("ttl", "race") else {}
        return {"summary": f"ask {self.number}", **timed}

    def fallen_back(self) -> dict:
        return {"approved": self.fallback == "auto_approve", **NO_OPERATOR}

    def answer(self, words: str) -> dict:
        return {"approved": self.approved, "comment" if self.approved else "reason": words}


def deal_asks(rng: random.Random, count: int) -> list[Ask]:
    doors = [*rng.sample(DOORS, min(count, len(DOORS))), *rng.choices(DOORS, k=max(0, count - len(DOORS)))]
    return [Ask(n, door, rng.random() < 0.6, rng.choice(("auto_reject", "auto_approve")), rng.random() < 0.5,
                rng.uniform(0, 2 * TTL_S)) for n, door in enumerate(doors)]


def make_crew(root: Path, asks: list[Ask], pause_s: float) -> Crew:
    home, script = Home(root), Script()
    for ask in asks:
        script.call("request_approval", **ask.arguments())
        script.step(f"sleep {pause_s}")
    repo = home.repo(files=1)
    manifest = home.manifest(f"[run]\nmax_workers = 1\nbudget_usd = 1.0\n[lead]\nid = '{LEAD}'\nagent = 'demo'\n"
                             f"directory = '{repo}'\nuse_worktree = false\nprompt = '''\n{script.text()}\n'''\n")
    return Crew(home, repo, manifest, [], root)


def requests_of(run_dir: Path | None) -> tuple[dict[int, dict], dict[str, dict]]:
    """(number of an ask to its request, request id to its decision), as the journal's whole lines say."""
    events = read_events(run_dir) if run_dir else []
    asked = {int(e["summary"].split()[1]): e for e in events if e["kind"] == "approval_asked"}
    return asked, {e["request_id"]: e for e in events if e["kind"] == "approval_decided"}


class Desk:
    """Answers what the lead asks, from outside: each look starts what is due, and waits for nothing."""

    def __init__(self, crew: Crew, asks: list[Ask]) -> None:
        self.crew, self.asks = crew, asks
        self.tries: dict[int, list[tuple[str, subprocess.Popen | None]]] = {ask.number: [] for ask in asks}
        self.seen: dict[int, float] = {}

    def look(self) -> None:
        run_dir = self.crew.run_dir()
        asked, decided = requests_of(run_dir)
        for ask in self.asks:
            event = asked.get(ask.number)
            if event is None or ask.door == "ttl" or event["request_id"] in decided:
                continue
            since = self.seen.setdefault(ask.number, time.monotonic())
            if ask.door != "race" or time.monotonic() >= since + ask.wait_s:
                self.answer(run_dir, ask, event["request_id"])

    def answer(self, run_dir: Path, ask: Ask, request_id: str) -> None:
        tries = self.tries[ask.number]
        words = f"answer {ask.number}.{len(tries)}"
        if ask.door == "file" or ask.door == "race" and ask.by_file:
            if not tries:               # a file stays until it was read: once is enough
                tries.append((words, None))
                path = run_dir / "approvals" / f"{request_id}.json"
                path.with_suffix(".new").write_text(json.dumps(ask.answer(words)))
                path.with_suffix(".new").rename(path)
        elif not tries or tries[-1][1].poll() is not None:
            verb = ("approve", "--comment") if ask.approved else ("reject", "--reason")
            tries.append((words, self.crew.start(verb[0], run_dir.name, request_id, verb[1], words)))

    def codes(self, number: int) -> list[tuple[str, int]]:
        """(the words of each command that answered, its exit code), when all have ended."""
        return [(words, command.wait(60)) for words, command in self.tries[number] if command]


# ---- strikes ----

WHEN = ("before", "half", "after")


def deal_strike(rng: random.Random) -> tuple:
    """A moment of faults.py and its number, or seconds until a kill."""
    aim = rng.choice(("asked", "decided", "decided", "line", "fsync", "moment", "moment"))
    if aim == "moment":
        return (rng.uniform(0, 3.0),)
    if aim == "fsync":
        return f"fsync.{rng.choice(('before', 'after'))}", rng.randint(1, 30)
    point, most = {"asked": ('journal:"approval_asked"', 3), "decided": ('journal:"approval_decided"', 3),
                   "line": ("journal", 25)}[aim]
    return f"{point}.{rng.choice(WHEN)}", rng.randint(1, most)


def start(crew: Crew, strike: tuple, *args) -> subprocess.Popen:
    if len(strike) == 2:
        return crew.start(argv=[PYTHON, *ISOLATED, str(FAULTS), strike[0], str(strike[1]), "--", *map(str, args)])
    return crew.start(*args)


def play(crew: Crew, desk: Desk, strikes: list[tuple]) -> list[tuple[str, str]]:
    """One run, killed by each strike in turn, resumed to its end; where each kill landed."""
    landed, strikes = [], [*strikes, ()]
    for n, strike in enumerate(strikes):
        run_dir = crew.run_dir()
        if run_dir and is_finished(run_dir):
            break
        dispatcher = start(crew, strike, *(("resume", run_dir.name) if run_dir else ("dispatch", crew.manifest)))
        begun, end = time.monotonic(), time.monotonic() + 90
        while dispatcher.poll() is None:
            assert time.monotonic() < end, f"strike {n} {strike}: the run does not end"
            if state_of(dispatcher.pid) == "T" or len(strike) == 1 and time.monotonic() > begun + strike[0]:
                kill(dispatcher)
                landed.append(stage_of(crew.run_dir(), desk.asks))
                break
            desk.look()
            time.sleep(0.005)
        else:
            assert dispatcher.returncode in (0, 1), f"exit {dispatcher.returncode}: {crew.said()}"
    return landed


def stage_of(run_dir: Path | None, asks: list[Ask]) -> tuple[str, str]:
    """(how far the latest request is, its door), by what stands in files."""
    if not run_dir:
        return "no run", "-"
    asked, decided = requests_of(run_dir)
    calls = [call for call in tree_checker.calls_of(run_dir, LEAD) if call.tool == "request_approval"]
    answered = sum(call.result is not None for call in calls)
    door = asks[max(0, len(calls) - 1)].door
    if any(e["request_id"] not in decided for e in asked.values()):
        return "asked", door
    if len(decided) > answered:
        return "decided", door
    if len(calls) > len(asked):
        return "called", door
    return "delivered" if answered else "before", door


# ---- the verdict ----

def check_round(run_dir: Path, asks: list[Ask], desk: Desk) -> list[str]:
    """Each request was asked and decided once, as somebody had said, and its asker was told just that."""
    events = read_events(run_dir)
    asked, decided = requests_of(run_dir)
    faults = [f"{n} {kind} of {key}" for kind, key_of in (("approval_asked", "summary"), ("approval_decided",
              "request_id")) for key, n in Counter(e[key_of] for e in events if e["kind"] == kind).items() if n != 1]
    faults += [f"{e['kind']} {e['request_id']}" for e in events if e["kind"] in ("approval_kept", "approval_withdrawn")]
    calls = [call for call in tree_checker.calls_of(run_dir, LEAD) if call.tool == "request_approval"]
    if len(calls) != len(asks) or sorted(asked) != [ask.number for ask in asks] or len(decided) != len(asks):
        return [*faults, f"{len(asks)} requests: {len(calls)} calls, asked {sorted(asked)}, {len(decided)} decided"]
    for ask, call in zip(asks, calls):
        event = asked[ask.number]
        faults += check_decision(ask, event, decided[event["request_id"]], call.result, desk)
    yes = sum(e["approved"] for e in decided.values())
    record, = read_records(run_dir)
    counts = [record[f"approvals_{word}"] for word in ("requested", "approved", "rejected")]
    if counts != [len(asks), yes, len(asks) - yes] or record["hands"] != 1:
        faults.append(f"the record counts {counts} in {record['hands']} hands, {yes} of {len(asks)} were approved")
    last = decided[asked[asks[-1].number]["request_id"]]
    want = "Success" if last["approved"] else "ApprovalTimedOut" if last["by"] == "time" else "ApprovalRejected"
    faults += [] if record["status"] == want else [f"it ended {record['status']}, the last answer makes it {want}"]
    left = [p.name for p in (run_dir / "approvals").iterdir() if not is_late_file(p, asks, asked, decided)]
    return [*faults, *(f"approvals/{name} is left" for name in left), *checker.check_journal(run_dir),
            *tree_checker.check_keys(run_dir), *checker.check_processes(run_dir.name)]


def check_decision(ask: Ask, event: dict, decision: dict, told: dict | None, desk: Desk) -> list[str]:
    name, by = f"ask {ask.number} ({ask.door})", decision["by"]
    sent = {words: ask.answer(words) for words, _ in desk.tries[ask.number]}
    if by == "time":
        late = decision["at"] - event["at"] - TTL_S
        want = [ask.fallen_back()] if ask.door in ("ttl", "race") and late > -0.001 else []
    else:
        want = list(sent.values()) if by in ("operator", "file") else []
    faults = [] if told in want else [f"{name}: told {told} by {by}, allowed: {want}"]
    if told != decision["answer"]:
        faults.append(f"{name}: told {told}, the journal has {decision['answer']}")
    for words, code in desk.codes(ask.number):
        if code == 0 and told != sent[words]:
            faults.append(f"{name}: {words!r} was acknowledged, but {told} was told")
        if code not in (0, 3, 4):
            faults.append(f"{name}: the command that said {words!r} ended with {code}")
    return faults


def is_late_file(path: Path, asks: list[Ask], asked: dict, decided: dict) -> bool:
    """Whether a file was put aside, or came, after its time was over: it is kept, and means nothing."""
    number = next((n for n, e in asked.items() if path.name.startswith(e["request_id"])), None)
    return number is not None and asks[number].door == "race" and decided[asked[number]["request_id"]]["by"] == "time"


# ---- rounds ----

def play_round(root: Path, number: int, count: int, most: int) -> Counter:
    rng, root = random.Random(number), root / f"round{number}"
    root.mkdir()
    asks = deal_asks(rng, count)
    crew = make_crew(root, asks, rng.choice((0, 0.05, 0.2)))
    desk, strikes = Desk(crew, asks), [deal_strike(rng) for _ in range(rng.randint(1, most))]
    try:
        landed = play(crew, desk, strikes)
        faults = check_round(crew.run_dir(), asks, desk)
        assert faults == []
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"round {number} in {root}, {strikes}: {error}\n{crew.said()}") from error
    finally:
        crew.home.end_everything()
    shutil.rmtree(root)
    return Counter(landed)


def test_an_approval_is_applied_once_whoever_dies_between(tmp_path):
    asks = [Ask(0, "file", True, "", False, 0), Ask(1, "ttl", False, "auto_approve", False, 0)]
    crew = make_crew(tmp_path, asks, 0)
    desk = Desk(crew, asks)
    try:
        landed = play(crew, desk, [('journal:"approval_decided".after', 1)])
        assert check_round(crew.run_dir(), asks, desk) == []
    finally:
        crew.home.end_everything()
    assert landed == [("decided", "file")]


WANTED = [(stage, door) for stage in ("asked", "decided") for door in DOORS]


@pytest.mark.slow
def test_approvals_are_applied_once_in_many_killed_runs(tmp_path, record_property):
    """The histogram must show kills between request, decision and delivery for every way to answer."""
    hits = sum((play_round(tmp_path, n, 4, 3) for n in range(ROUNDS)), Counter())
    shown = {f"{stage}, {door}": n for (stage, door), n in sorted(hits.items())}
    record_property("kills", json.dumps(shown))
    print("kills:", sum(hits.values()), json.dumps(shown))
    if ROUNDS >= 30:
        assert [row for row in WANTED if not hits[row]] == []
        assert all(any(hits[stage, door] for door in DOORS) for stage in ("before", "called", "delivered"))


# ---- the checker itself ----

def spoil(run_dir: Path, name: str, change) -> None:
    path = run_dir / name
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(lines)))


def altered(kind: str, **facts):
    """Changes facts of the first event of a kind."""
    def change(rows: list[dict]) -> list[dict]:
        first = next(n for n, row in enumerate(rows) if row.get("kind") == kind)
        return [{**row, **facts} if n == first else row for n, row in enumerate(rows)]

    return change


JOURNAL = "journal.jsonl"
SPOILS = {
    "decided twice": (JOURNAL, lambda rows: rows + [r for r in rows if r["kind"] == "approval_decided"][:1],
                      "2 approval_decided"),
    "asked twice": (JOURNAL, lambda rows: rows + [r for r in rows if r["kind"] == "approval_asked"][:1],
                    "2 approval_asked"),
    "never decided": (JOURNAL, lambda rows: [r for r in rows if r["kind"] != "approval_decided"], "0 decided"),
    "told something else": (JOURNAL, altered("approval_decided", answer={"approved": False}), "the journal has"),
    "answered by nobody": (JOURNAL, altered("approval_decided", by="policy"), "allowed: []"),
    "before its time": (JOURNAL, altered("approval_decided", by="time", at=0.0), "allowed: []"),
    "another count": ("summary.jsonl", lambda rows: [{**rows[0], "approvals_approved": 7}], "the record counts"),
    "another end": ("summary.jsonl", lambda rows: [{**rows[0], "status": "Failed"}], "it ended Failed"),
}


def test_the_checker_of_approvals_sees_what_is_wrong(tmp_path):
    asks = [Ask(0, "command", True, "", False, 0), Ask(1, "ttl", False, "auto_approve", False, 0)]
    crew, unseen = make_crew(tmp_path, asks, 0), {}
    desk = Desk(crew, asks)
    play(crew, desk, [])
    run_dir = crew.run_dir()
    assert check_round(run_dir, asks, desk) == []
    for what, (name, change, words) in SPOILS.items():
        before = (run_dir / name).read_bytes()
        spoil(run_dir, name, change)
        found = check_round(run_dir, asks, desk)
        (run_dir / name).write_bytes(before)
        if not any(words in fault for fault in found):
            unseen[what] = found
    (run_dir / "approvals" / "x.json").write_text("{}")
    assert unseen == {} and "approvals/x.json is left" in check_round(run_dir, asks, desk)
