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


def prompts(pit: Pit, name: str) -> int:
    """How many tickets an epic's agent was given."""
    return sum(e["epic"] == name for e in pit.events("epic_picked"))


@needs_tmux
@pytest.mark.slow
def test_every_kind_of_pause_that_an_agent_causes_and_how_each_ends(pit):
    pit.configure(ticketTimeout=0.1)
    pit.epic("Leave", "$ leave Which file?\n$ write l.txt 1\n$ commit left")
    pit.epic("Permit", "$ permit Bash\n$ write p.txt 1\n$ commit permitted")
    pit.epic("Exit", "$ run test -e {0}/again || touch {0}/again\n$ exit 7".format(pit.home.root))
    pit.epic("Api", "$ auth")
    pit.epic("Slow", "$ sleep 600")
    pit.pit("start", "--epics", "leave,permit,exit,api,slow")
    pit.watch("settled")
    epics = pit.status()["epics"]
    assert {n: e["state"] for n, e in epics.items()} == dict.fromkeys(epics, "paused")
    reasons = {n: e["reason"] for n, e in epics.items()}
    assert reasons["leave"] == "NEEDS_HUMAN_INPUT: Which file?"
    assert reasons["permit"].startswith("PERMISSION: Bash ")
    assert reasons["exit"].startswith("AGENT_EXITED: status 7; ")
    assert reasons["api"].startswith("API_ERROR: ")
    assert reasons["slow"] == "TIMEOUT: repo-slow.1 took more than 0.1 minutes"
    assert pit.statuses() == dict.fromkeys(pit.statuses(), "in_progress"), "a pause keeps the claim"

    assert pit.pit("resume", "leave", "--message", "file l.txt")["changed"]
    pit.tmux("send-keys", "-t", epics["permit"]["pane"], "Enter")
    pit.watch("done", 50, "--epics", "leave,permit")
    assert pit.commits("pit/leave") == ["left"] and pit.commits("pit/permit") == ["permitted"]
    assert prompts(pit, "leave") == prompts(pit, "permit") == 1, "an answer goes on in the conversation"
    told = [e for e in pit.events("epic_resumed") if e["epic"] == "leave"]
    assert told[0]["message"] == "file l.txt"

    answer = pit.pit("stop")
    assert answer["epics"]["slow"] == {"state": "done", "reason": "STOPPED", "progress": "0/1", "changed": True}
    assert answer["epics"]["leave"]["changed"] is False
    left = {k: v for k, v in pit.statuses().items() if v != "closed"}
    assert left == {"repo-exit.1": "open", "repo-api.1": "open", "repo-slow.1": "open"}
    assert pit.error("pause", "slow", check=4)["code"] == "refused"
    assert pit.pit("stop")["epics"]["slow"]["changed"] is False


@needs_tmux
@pytest.mark.slow
def test_a_pause_interrupts_and_a_resume_sends_the_same_ticket_again(pit):
    flag = pit.home.root / "flag"
    pit.epic("Auth", f"$ run touch {flag}.$$\n$ run test -e {flag} || sleep 300\n$ write a.txt 1\n$ commit once")
    pit.pit("start", "--epics", "auth")
    wait_for(lambda: list(pit.home.root.glob("flag.*")), 30, "the first step")
    assert pit.pit("pause", "auth") == {"epic": "auth", "state": "paused", "reason": "MANUAL", "changed": True}
    assert pit.pit("pause", "auth")["changed"] is False
    assert pit.status("auth")["ticket"] == "repo-auth.1"
    flag.touch()
    assert pit.pit("resume", "auth")["changed"]
    pit.watch("done")
    assert pit.commits("pit/auth") == ["once"] and prompts(pit, "auth") == 2
    assert pit.error("resume", "auth", check=4)["code"] == "refused"
    pit.run("ticket", "reopen", "repo-auth.1")
    (pit.repo / ".worktrees/auth/a.txt").write_text("2")
    assert pit.pit("resume", "auth")["changed"], "a done epic goes on when it has open tickets"
    pit.watch("done")
    assert prompts(pit, "auth") == 3


@needs_tmux
@pytest.mark.slow
def test_a_killed_daemon_and_a_killed_tmux_server_lose_nothing(pit):
    flag = pit.home.root / "flag"
    first = f"$ run touch {flag}.$$\n$ run until test -e {flag}; do sleep 0.1; done\n" + work(1)
    pit.epic("Auth", first, work(2))
    pit.pit("start", "--epics", "auth")
    wait_for(lambda: list(pit.home.root.glob("flag.*")), 30, "the first ticket")
    old = pit.daemon_pid()
    os.kill(old, signal.SIGKILL)
    flag.touch()
    wait_for(lambda: pit.statuses()["repo-auth.1"] == "closed", 30, "the agent works without a daemon")
    pit.watch("done")
    assert pit.commits("pit/auth") == ["work 1", "work 2"] and prompts(pit, "auth") == 2
    assert len(pit.events("daemon_began")) >= 2

    pit.epic("Pay", "$ sleep 300")
    pit.pit("add", "pay")
    wait_for(lambda: [e for e in pit.events("prompted") if e["epic"] == "pay"], 30, "the prompt")
    pit.tmux("kill-server")
    assert pit.watch("paused")[-1].get("reason", "").startswith("WINDOW_GONE") or \
        pit.status("pay")["reason"].startswith("WINDOW_GONE")
    assert pit.pit("log", "pay")["source"] == "file"
    pit.run("ticket", "update", "repo-pay.1", "-d", "$ write p.txt 1\n$ commit paid")
    pit.pit("resume", "pay", "--message", "again, please")
    pit.watch("done")
    assert pit.commits("pit/pay") == ["paid"]


@needs_tmux
@pytest.mark.slow
def test_what_a_teardown_would_lose_is_refused_then_saved(pit):
    pit.epic("Auth", work(1) + "\n$ write left.txt here")
    pit.epic("Pay", "$ run true")
    pit.pit("start", "--epics", "auth,pay")
    pit.watch("done")
    error = pit.error("teardown", check=4)
    assert error["code"] == "refused" and error["lost"] == {"auth": {"files": ["?? left.txt"]}}
    assert os.path.exists(pit.status("pay")["worktree"]), "all or none"
    told = pit.pit("teardown", "--force")
    ref = told["epics"]["auth"]["rescue"]
    assert ref.startswith("refs/pitboss/rescue/pit/auth/")
    assert git(pit.repo, "show", f"{ref}:left.txt") == "here\n"
    assert told["epics"]["pay"]["branch"] == "removed" and told["epics"]["auth"]["branch"] == "kept"
    assert "pit/pay" not in git(pit.repo, "branch", "--list", "pit/*")
    assert pit.tmux("list-sessions", check=False) == ""
    assert pit.pit("teardown") == {"epics": {}, "daemon": "stopped"}
    assert pit.pit("daemon", "status")["running"] is False
