"""Two floors, one `watch` and four streams of verbs at once on a busy run: nothing is lost, nothing breaks, nothing leaks.

`PITBOSS_TEST_SECONDS` sets for how long (60).
"""
from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from stage import DEADLINE_S
from test_hands_on import AT_WORK
from test_subleads import Tree
from tools import Home, processes_with, read_events, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

SECONDS = float(os.environ.get("PITBOSS_TEST_SECONDS", "60"))


def open_files(pid: int) -> Counter:
    """What a process has open, without the numbers that tell one of a kind from another."""
    found: Counter = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[re.sub(r"\[\d+\]", "", os.readlink(f"/proc/{pid}/fd/{name}"))] += 1
    return found


def memory_kb(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])


class Onlooker(threading.Thread):
    """A floor in a terminal of its own, whose output is read all the while."""

    def __init__(self, home: Home, run_id: str) -> None:
        super().__init__(daemon=True)
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(home.argv("floor", run_id), stdin=theirs, stdout=theirs, stderr=theirs,
                                        env={**home.env, "TERM": "xterm", "LC_ALL": "C.UTF-8"}, start_new_session=True)
        os.close(theirs)
        self.shown = b""
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):                        # its end
            while data := os.read(self.ours, 1 << 16):
                self.shown = self.shown[-1_000_000:] + data

    def leave(self) -> int:
        os.write(self.ours, b"q")
        return self.process.wait(DEADLINE_S)


class Hand(threading.Thread):
    """One operator: verbs on a worker of its own, again and again; what it was promised is counted."""

    def __init__(self, home: Home, run: Tree, actor: str, until: float) -> None:
        super().__init__()
        self.home, self.run_id, self.actor, self.until = home, run.run.name, actor, until
        self.done: Counter = Counter()
        self.wrong: list[str] = []

    def ask(self, kind: str, *args: str) -> None:
        said = self.home.pitboss(args[0], self.run_id, self.actor, *args[1:], "--json", timeout=120)
        if said.returncode or "Traceback" in said.stderr:
            self.wrong.append(f"{args} -> {said.returncode}: {said.stderr}")
        else:
            self.done[kind] += 1

    def run(self) -> None:
        while time.monotonic() < self.until and not self.wrong:
            self.ask("freeze", "pause", "--freeze")
            self.ask("thaw", "continue")
            self.ask("told", "reprompt", AT_WORK)
            self.ask("pause", "pause")
            self.ask("go on", "continue", "--prompt", AT_WORK)


@pytest.mark.slow
def test_many_operators_at_once_on_a_busy_run(home):
    run = Tree(home, lead="allow_subleads = true\n", workers=12, script=AT_WORK)
    floors: list[Onlooker] = []
    try:
        lead = run.lead()
        workers = [run.spawn(lead, AT_WORK) for _ in range(4)]
        noisy = [run.spawn(lead, "$ loop 100000\n$ print 2000\n$ run sleep 0.05\n$ end") for _ in range(3)]
        log = open(home.root / "watch.out", "w+")
        watch = home.start("watch", run.run.name, "--json", stdout=log)
        pid = run.process.pid
        wait_for(lambda: (home.root / "watch.out").read_text(), DEADLINE_S, "the watch")
        floors = [Onlooker(home, run.run.name) for _ in range(2)]
        for floor in floors:
            wait_for(lambda: b"worker-1" in floor.shown, DEADLINE_S, "a frame")
        before_floors = [(open_files(f.process.pid), memory_kb(f.process.pid)) for f in floors]
        before = open_files(pid), open_files(watch.pid), memory_kb(pid), len(processes_with(f"PITBOSS_RUN_ID={run.run.name}"))
        hands = [Hand(home, run, name, time.monotonic() + SECONDS) for name in workers]
        for hand in hands:
            hand.start()
        while any(hand.is_alive() for hand in hands):             # the store is used all the while
            lead.call("kv_set", path="/shared/x", value=str(time.monotonic()))
            hands[0].join(0.1)
        assert [w for hand in hands for w in hand.wrong] == []
        after = open_files(pid), open_files(watch.pid), memory_kb(pid), len(processes_with(f"PITBOSS_RUN_ID={run.run.name}"))
        more = after[0] - before[0]
        assert not [path for path, count in after[0].items() if path.endswith("stdout.log") and count > 1], more
        assert sum(more.values()) <= 2 * len(workers) and after[1] == before[1], more
        assert after[2] <= before[2] + 65536 and abs(after[3] - before[3]) <= 2 * len(workers), (before[2:], after[2:])
        for floor, (files, memory) in zip(floors, before_floors):
            assert floor.process.poll() is None, floor.shown[-2000:]
            more = open_files(floor.process.pid) - files
            assert sum(more.values()) <= 2 and memory_kb(floor.process.pid) <= memory + 65536, more
            assert b"Frozen" in floor.shown and b"this is a bug" not in floor.shown
        home.pitboss("cancel", run.run.name, check=0)
        records = run.settle(1)
        assert processes_with(f"PITBOSS_RUN_ID={run.run.name}") == {}
        assert watch.wait(DEADLINE_S) == 0 and watch.stderr.read() == ""
        for floor in floors:
            wait_for(lambda: b"complete" in floor.shown, DEADLINE_S, "the end on the floor")
        assert [floor.leave() for floor in floors] == [0, 0]
        events = read_events(run.run)
        counted = Counter((e["kind"], e.get("mode", ""), e.get("actor")) for e in events)
        for hand in hands:                        # every yes is in the journal, once
            assert counted["pause_decided", "freeze", hand.actor] == hand.done["freeze"]
            assert counted["pause_decided", "cancel", hand.actor] == hand.done["pause"]
            assert counted["continue_decided", "", hand.actor] == hand.done["thaw"] + hand.done["go on"]
            assert counted["reprompted", "", hand.actor] == hand.done["told"] == records[hand.actor]["reprompt_count"]
            assert hand.done["go on"] >= 1 and records[hand.actor]["hands"] >= 1 + hand.done["go on"]
        lines = [json.loads(line) for line in (home.root / "watch.out").read_text().splitlines()]
        told = Counter((line["event"], line.get("actor")) for line in lines)
        for hand in hands:                        # and every one was told by the watch
            assert told["frozen", hand.actor] == hand.done["freeze"]
            assert told["reprompted", hand.actor] == hand.done["told"]
        assert lines[-1]["event"] == "run_finished" and set(records) == {"boss", *workers, *noisy}
        assert not (run.run / "sockets.log").exists()
    finally:
        for floor in floors:
            floor.process.kill()
            floor.process.wait()
            os.close(floor.ours)
        run.end()
