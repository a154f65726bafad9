"""The ticket loop as a program: daemon, windows, tickets, git; the scripted agent works."""
from __future__ import annotations

import json
import os
import signal
import socket

import pytest

from pit_desk import Pit, needs_tmux, work
from tools import git, wait_for


@pytest.fixture
def pit(home):
    """A project with the scripted agent and the embedded tickets."""
    desk = Pit(home)
    yield desk
    desk.end()


@needs_tmux
@pytest.mark.slow
def test_two_epics_of_three_tickets_each(pit):
    a, b = pit.epic("Auth", *map(work, (1, 2, 3))), pit.epic("Pay", *map(work, (4, 5, 6)))
    answer = pit.pit("start", "--epics", f"{a},repo-{b}")
    assert set(answer["epics"]) == {a, f"repo-{b}"} and answer["session"] == "pit"
    assert answer["attach"].endswith("attach -t pit")
    lines = pit.watch("done")
    assert set(pit.statuses().values()) == {"closed"}
    assert pit.commits(f"pit/{a}") == ["work 1", "work 2", "work 3"]
    assert pit.commits(f"pit/repo-{b}") == ["work 4", "work 5", "work 6"]
    assert lines[0]["event"] == "snapshot" and lines[-1]["state"] == "done"
    status = pit.status()
    assert {e["state"] for e in status["epics"].values()} == {"done"}
    assert {e["progress"] for e in status["epics"].values()} == {"3/3"}
    tickets = pit.status(a)["tickets"]
    assert [t["state"] for t in tickets] == ["closed"] * 3
    assert len({t["sessionId"] for t in tickets}) == 3, "each ticket had a conversation of its own"
    assert tickets[0]["usage"]["input"] > 0
    assert git(pit.repo, "status", "--porcelain") == "", "nothing of it is seen in the main checkout"
    worktree = status["epics"][a]["worktree"]
    assert git(worktree, "status", "--porcelain") == ""
    assert "work 3" in pit.pit("log", a)["output"] or pit.pit("log", a)["source"] == "pane"
    told = pit.pit("teardown")
    assert told["daemon"] == "stopped"
    assert told["epics"][a] == {"worktree": "removed", "branch": "kept", "why": "3 commits not on main",
                                "name": f"pit/{a}"}
    assert not os.path.exists(worktree) and pit.status()["epics"] == {}
    assert pit.pit("log", a, check=3)["error"]["code"] == "not_found"


@pytest.mark.slow
def test_an_epic_without_windows_is_one_run(pit):
    a = pit.epic("Auth", *map(work, (1, 2, 3)))
    answer = pit.pit("start", "--epics", a, "--headless", env={"PATH": os.environ["PATH"], "TMUX_TMPDIR": "/nonexistent"})
    assert answer["attach"] is None
    pit.watch("done")
    epic = pit.status(a)
    assert epic["headless"] and epic["progress"] == "3/3" and epic["window"] is None
    assert pit.commits(f"pit/{a}") == ["work 1", "work 2", "work 3"]
    shown = json.loads(pit.home.pitboss("status", epic["runId"], "--json", check=0).stdout)
    assert [x["status"] for x in shown["actors"]] == ["Success"] * 3
    assert len({x["claude_session_id"] for x in shown["actors"]}) == 3
    assert [t["sessionId"] for t in epic["tickets"]] == [x["claude_session_id"] for x in shown["actors"]]
    assert epic["usage"]["input"] == sum(x["token_usage"]["input"] for x in shown["actors"]) > 0
    wait_for(lambda: json.loads(pit.home.pitboss("status", epic["runId"], "--json").stdout)["state"] == "complete",
             20, "the end of the run")
    assert pit.pit("log", a)["source"] == "file" and "work 3" in pit.pit("log", a)["output"]
