"""A daemon of the ticket loop that is killed again and again: every ticket is worked once, nothing is lost.

PITBOSS_TEST_ROUNDS sets how many projects are tried (2), PITBOSS_TEST_SEED what is drawn.
"""
from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest

from pit_desk import Pit, needs_tmux, work
from tools import git, processes_with, wait_for

ROUNDS = int(os.environ.get("PITBOSS_TEST_ROUNDS", "2"))


@pytest.fixture
def pit(home):
    """A project with the scripted agent."""
    desk = Pit(home)
    yield desk
    desk.end()


def daemons(pit: Pit) -> list[int]:
    """The processes that are this project's daemon, as the process table tells."""
    return [pid for pid, words in processes_with(f"XDG_DATA_HOME={pit.home.root}").items() if "pit daemon run" in words]


def kill_daemons(pit: Pit) -> int:
    """SIGKILL to this project's daemon; how many there were."""
    killed = 0
    for pid in daemons(pit):
        with contextlib.suppress(ProcessLookupError):          # it has left just now
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_daemon_killed_at_any_moment(pit, round_, headless):
    draw = random.Random(os.environ.get("PITBOSS_TEST_SEED", "pit") + f"{round_}{headless}")
    log, gate = pit.home.root / "worked.log", pit.home.root / "gate"
    first = f"$ run until test -e {gate}; do sleep 0.1; done\n"       # nothing is over before the first death
    names = ("auth", "pay")
    for name in names:
        pit.epic(name.title(), *(f"{first}$ run echo {name}.{n} >>{log}\n{work(n)}" for n in (1, 2)))
    pit.pit("start", "--epics", ",".join(names), *(["--headless"] if headless else []))
    watch = pit.spawn("watch", "--until", "done", "--timeout", "200")
    kills, deadline = 0, time.monotonic() + 200
    while watch.poll() is None and time.monotonic() < deadline:
        try:
            watch.wait(draw.uniform(0.1, 2.5))
        except subprocess.TimeoutExpired:
            if kills < 12 and kill_daemons(pit):
                kills += 1
                gate.touch()
    out, err = watch.communicate(timeout=30)
    assert watch.returncode == 0, f"{kills} kills\n{out}\n{err}\n{pit.daemon_log()}\n{pit.status()}\n{pit.screens()}"
    assert kills, "no daemon was ever killed"
    assert set(pit.statuses().values()) == {"closed"}
    assert sorted(log.read_text().split()) == ["auth.1", "auth.2", "pay.1", "pay.2"], "each was worked exactly once"
    for name in names:
        assert pit.commits(f"pit/{name}") == ["work 1", "work 2"]
        assert sorted(e["ticket"] for e in pit.events("ticket_closed") if e["epic"] == name) == \
            [f"repo-{name}.1", f"repo-{name}.2"]


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_tmux_server_killed_at_any_moment(pit, round_):
    """Its epics are paused with that reason; who resumes them gets all the work, each ticket closed once."""
    draw = random.Random(os.environ.get("PITBOSS_TEST_SEED", "tmux") + str(round_))
    names = ("auth", "pay")
    for name in names:
        pit.epic(name.title(), *(f"$ run sleep 0.{n}\n{work(n)}" for n in (1, 2, 3)))
    pit.pit("start", "--epics", ",".join(names))
    kills = paused = 0
    deadline = time.monotonic() + 150
    while set(pit.statuses().values()) != {"closed"}:
        assert time.monotonic() < deadline, f"{kills} kills\n{pit.status()}\n{pit.daemon_log()}\n{pit.screens()}"
        if kills < 4:
            time.sleep(draw.uniform(0.0, 1.5))
            kills += not subprocess.run(["tmux", "-S", pit.tmux_socket, "kill-server"], env=pit.env,
                                        capture_output=True).returncode
        pit.watch("settled", 60)
        for name, epic in pit.status()["epics"].items():
            if epic["state"] == "paused":
                assert epic["reason"].split(":")[0] in ("WINDOW_GONE", "AGENT_START", "AGENT_EXITED"), epic
                paused += 1
                pit.pit("resume", name)
    assert kills, "no server was ever killed"
    pit.watch("done", 60)
    for name in names:
        assert list(dict.fromkeys(pit.commits(f"pit/{name}"))) == ["work 1", "work 2", "work 3"]
        assert sorted(e["ticket"] for e in pit.events("ticket_closed") if e["epic"] == name) == \
            [f"repo-{name}.{n}" for n in (1, 2, 3)]
    assert git(pit.repo, "status", "--porcelain") == ""


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize("after_s", [n / 10 for n in range(max(ROUNDS, 6))])
def test_a_message_is_told_once_though_the_daemon_dies_with_it(pit, after_s):
    log, gate, begun = pit.home.root / "worked.log", pit.home.root / "gate", pit.home.root / "begun"
    pit.epic("Auth", f"$ run touch {begun}; until test -e {gate}; do sleep 0.1; done\n$ leave And then?")
    pit.pit("start", "--epics", "auth")
    wait_for(begun.exists, 30, "the first step")
    teller = pit.spawn("resume", "auth", "--message", f"$ run echo told >>{log}\n{work(1)}")
    wait_for(lambda: [e for e in pit.events("send_begun") if e.get("size")], 20, "the message")
    time.sleep(after_s)
    kill_daemons(pit)
    teller.communicate(timeout=30)
    pit.pit("daemon", "start")
    wait_for(lambda: pit.events("epic_told"), 30, "the message, told")
    gate.touch()
    pit.watch("done", 60)
    assert log.read_text().split() == ["told"] and pit.commits("pit/auth") == ["work 1"]


def slow_to_tell(pit: Pit, hook: str, seconds: float) -> None:
    """The scripted agent, taken for claude, whose hook waits; `hook.began` has a line for each time that it ran."""
    began = pit.home.root / "hook.began"
    argv = pit.home.argv("demo-agent", "--sessions", str(pit.home.root / "sessions"), "--model", "demo", "--tui")
    program = pit.home.root / "claude.py"
    program.write_text(
        "import json, os, sys\n"
        "path = sys.argv[sys.argv.index('--settings') + 1]\n"
        "settings = json.load(open(path))\n"
        f"row = settings['hooks'][{hook!r}][0]['hooks'][0]\n"
        f"row['command'] = 'echo x >>{began}; sleep {seconds}; ' + row['command']\n"
        "json.dump(settings, open(path + '.slow', 'w'))\n"
        f"argv = {argv!r} + [path + '.slow']\n"
        "os.execv(argv[0], argv)\n")
    claude = pit.home.root / "claude"
    claude.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {program} \"$@\"\n")
    claude.chmod(0o755)
    pit.env["PITBOSS_CLAUDE_BINARY"] = str(claude)
    pit.configure(agent="claude-code", initDelay=20000)


def kill_daemon_once(pit: Pit, count: int) -> None:
    """Kill the daemon when the slow hook has run `count` times, then have the next one."""
    began = pit.home.root / "hook.began"
    wait_for(lambda: began.exists() and len(began.read_text().split()) >= count, 40, "the hook")
    kill_daemons(pit)
    pit.pit("daemon", "start")


@needs_tmux
@pytest.mark.slow
def test_a_prompt_that_is_told_late_is_not_sent_again(pit):
    slow_to_tell(pit, "UserPromptSubmit", 7)
    log = pit.home.root / "worked.log"
    pit.epic("Auth", f"$ run echo 1 >>{log}\n{work(1)}", f"$ run echo 2 >>{log}\n{work(2)}")
    pit.pit("start", "--epics", "auth")
    kill_daemon_once(pit, 1)
    pit.watch("done", 80)
    assert log.read_text().split() == ["1", "2"] and pit.commits("pit/auth") == ["work 1", "work 2"]
    assert len((pit.home.root / "hook.began").read_text().split()) == 2, "each prompt came once"


@needs_tmux
@pytest.mark.slow
def test_a_clearing_that_is_told_late_is_not_typed_before_the_next_prompt(pit):
    slow_to_tell(pit, "SessionStart", 4)
    pit.epic("Auth", work(1), work(2))
    pit.pit("start", "--epics", "auth")
    kill_daemon_once(pit, 2)
    pit.watch("done", 80)
    assert pit.commits("pit/auth") == ["work 1", "work 2"]
    assert len((pit.home.root / "hook.began").read_text().split()) == 2, "it was cleared once"


@needs_tmux
@pytest.mark.slow
def test_an_agent_that_ends_between_two_tickets_is_started_again(pit):
    pit.configure(clearDelay=1500)
    pit.epic("Auth", work(1), work(2))
    pit.pit("start", "--epics", "auth")
    wait_for(lambda: pit.events("ticket_closed"), 40, "the first ticket")
    os.kill(pit.events("epic_opened")[0]["pid"], signal.SIGTERM)
    pit.watch("done", 40)
    assert pit.commits("pit/auth") == ["work 1", "work 2"] and len(pit.events("epic_opened")) == 2
