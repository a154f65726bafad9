"""The ticket loop as a program: daemon, windows, tickets, git; the scripted agent works."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

import beads_standin
import fake_api
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

    answer = pit.pit("resume", "leave", "--message", "file l.txt")
    assert answer["changed"] and answer["message"] == "queued"
    pit.tmux("send-keys", "-t", epics["permit"]["pane"], "Enter")
    pit.watch("done", 50, "--epics", "leave,permit")
    assert pit.commits("pit/leave") == ["left"] and pit.commits("pit/permit") == ["permitted"]
    assert prompts(pit, "leave") == prompts(pit, "permit") == 1, "an answer goes on in the conversation"
    told = [e for e in pit.events("epic_resumed") if e["epic"] == "leave"]
    assert told[0]["message"] == "file l.txt"

    assert pit.pit("resume", "exit")["changed"]
    pit.watch("paused", 50, "--epics", "exit")
    assert pit.status("exit")["reason"].startswith("AGENT_EXITED: status 7; ") and prompts(pit, "exit") == 2

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
def test_a_ticket_that_took_too_long_has_its_whole_time_again_after_a_resume(pit):
    pit.configure(ticketTimeout=0.05)
    flag = pit.home.root / "flag"
    pit.epic("Auth", f"$ run until test -e {flag}; do sleep 0.1; done\n" + work(1))
    pit.pit("start", "--epics", "auth")
    pit.watch("paused")
    assert pit.status("auth")["reason"].startswith("TIMEOUT: ")
    flag.touch()
    assert pit.pit("resume", "auth")["changed"]
    assert pit.watch("settled")[-1]["state"] == "done", pit.status("auth")["reason"]
    assert pit.commits("pit/auth") == ["work 1"]


@needs_tmux
@pytest.mark.slow
def test_a_pause_holds_against_a_message_that_waits_in_the_agents_queue(pit):
    flag, begun = pit.home.root / "flag", pit.home.root / "begun"
    wait = f"$ run touch {begun}; until test -e {flag}; do sleep 0.1; done\n"
    pit.epic("Auth", wait)
    pit.pit("start", "--epics", "auth")
    wait_for(begun.exists, 30, "the first step")
    pit.pit("resume", "auth", "--message", wait + work(1))
    wait_for(lambda: pit.events("epic_told"), 20, "the message")
    pit.pit("pause", "auth")
    wait_for(lambda: pit.events("turn_held"), 20, "the turn of the message")
    wait_for(lambda: pit.events("epic_rested")[-1:] and pit.events()[-1]["kind"] == "epic_rested", 30, "the interrupt")
    assert pit.status("auth")["reason"] == "MANUAL"
    flag.touch()
    assert pit.commits("pit/auth") == [] and pit.pit("resume", "auth")["changed"]
    wait_for(lambda: pit.commits("pit/auth") == ["work 1"], 30, "the message, once it is resumed")


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
    wait_for(lambda: len(pit.events("daemon_began")) == 2, 30, "the daemon that a hook started")
    pit.watch("done")
    assert pit.commits("pit/auth") == ["work 1", "work 2"] and prompts(pit, "auth") == 2

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
def test_a_message_to_an_agent_that_is_gone_comes_after_its_ticket(pit):
    """The turn of the ticket may be over before the message is typed: then it is the next prompt."""
    pit.epic("Auth", "$ leave Which file?")
    pit.pit("start", "--epics", "auth")
    pit.watch("paused")
    pit.tmux("kill-server")
    pit.pit("resume", "auth", "--message", "$ write l.txt 1\n$ commit left")
    pit.watch("done")
    assert pit.commits("pit/auth") == ["left"] and prompts(pit, "auth") == 2
    assert len([e for e in pit.events("prompted") if e.get("message")]) == 1


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


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["bd-0.49.6", "bd-1.0.5", "br-0.7.6"])
def test_epics_of_a_tracker_that_is_a_program(pit, flavour):
    programs = pit.home.root / "programs"
    name = beads_standin.FLAVOURS[flavour]
    beads_standin.install(programs, flavour)
    beads_standin.init(pit.repo, "repo")
    (pit.repo / ".git/info/exclude").write_text("/.pit.json\n/.beads/\n")
    pit.env["PATH"] = f"{programs}:{pit.env['PATH']}"

    epic = make_beads_epic(pit, name, "Auth", 1, 2)
    assert pit.pit("start", "--epics", epic)["epics"][epic]["progress"] == "0/2"
    pit.watch("done")
    assert pit.commits(f"pit/{epic}") == ["work 1", "work 2"] and pit.status()["tracker"] == name
    assert ask_beads(pit, name, "show", f"{epic}.2")["status"] == "closed"
    assert pit.error("ticket", "list", check=4)["hint"].startswith(f"{name} list")


def ask_beads(pit: Pit, name: str, *args) -> dict:
    """The issue that a command of bd or br answers."""
    done = subprocess.run([name, *args, "--json"], cwd=pit.repo, env=pit.env, text=True, capture_output=True)
    found = json.loads(done.stdout)
    return found[0] if isinstance(found, list) else found


def make_beads_epic(pit: Pit, name: str, title: str, *numbers: int) -> str:
    """The id of a new epic, with a ticket for each number that waits for the one before."""
    epic, before = ask_beads(pit, name, "create", title, "-t", "epic")["id"], ()
    for n in numbers:
        before = ("--deps", ask_beads(pit, name, "create", f"T{n}", "--parent", epic, "-d", work(n), *before)["id"])
    return epic


@needs_tmux
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["bd", "br"])
def test_epics_of_the_real_beads(pit, name):
    binary = os.environ.get(f"PITBOSS_TEST_{name.upper()}") or ""
    if not os.access(binary, os.X_OK):
        pytest.skip(f"PITBOSS_TEST_{name.upper()} names no {name}")
    programs = pit.home.root / "programs"
    programs.mkdir()
    (programs / name).symlink_to(binary)
    pit.env["PATH"] = f"{programs}:{pit.env['PATH']}"
    subprocess.run([name, "init", "--prefix", "repo", "-q"], cwd=pit.repo, env=pit.env, check=True, timeout=60,
                   stdin=subprocess.DEVNULL, capture_output=True)
    git(pit.repo, "add", "-A")
    git(pit.repo, "commit", "-qm", "beads")
    before = git(pit.repo, "status", "--porcelain")
    epics = [make_beads_epic(pit, name, title, *numbers) for title, numbers in (("Auth", (1, 2, 3)), ("Pay", (4, 5, 6)))]
    short = epics[0].rpartition("-")[2]
    pit.pit("start", "--epics", f"{short},{epics[1]}")
    pit.watch("done", 200)
    assert pit.commits(f"pit/{short}") == ["work 1", "work 2", "work 3"]
    assert pit.commits(f"pit/{epics[1]}") == ["work 4", "work 5", "work 6"] and pit.status()["tracker"] == name
    for epic in epics:
        tickets = [ask_beads(pit, name, "show", f"{epic}.{n}") for n in (1, 2, 3)]
        assert {t["status"] for t in tickets} == {"closed"}
        assert {t["assignee"] for t in tickets} == {f"pit/{short if epic == epics[0] else epic}"}
        assert ask_beads(pit, name, "show", epic)["status"] == "open", "an epic is its human's to close"
    assert git(pit.repo, "status", "--porcelain", "--", ":!.beads") == before
    assert git(pit.status(short)["worktree"], "status", "--porcelain") == ""


@needs_tmux
@pytest.mark.slow
def test_what_is_blocked_broken_or_gone_goes_on_when_it_can(pit):
    db = pit.repo / ".git/pitboss/tickets.db"
    pit.epic("Auth", work(1))
    pit.epic("Pay", "$ leave Stuck", work(4))
    pit.run("ticket", "claim", "repo-auth.1", "--actor", "bob")
    pit.pit("start", "--epics", "auth,pay")
    pit.watch("settled")
    assert pit.status("auth")["reason"] == "BLOCKED: repo-auth.1 is in_progress by bob"
    worktree = pit.status("pay")["worktree"]
    git(pit.repo, "worktree", "remove", "--force", worktree)
    pit.run("ticket", "close", "repo-pay.1")
    assert pit.pit("resume", "pay")["changed"]
    pit.watch("done", 40, "--epics", "pay")
    assert pit.commits("pit/pay") == ["work 4"], "its worktree was made anew"
    kept = db.read_bytes()
    pit.epic("Late", work(7))
    whole = db.read_bytes()
    pit.pit("add", "late")
    wait_for(lambda: [e for e in pit.events("epic_picked") if e["epic"] == "late"], 30, "its ticket")
    broken = db.with_name("broken")
    broken.write_bytes(b"not a database" * 1000)
    broken.rename(db)
    found = wait_for(lambda: [e for e in pit.events("epic_paused") if e["reason"] == "TRACKER"], 40, "the pause")
    assert found and kept
    broken.write_bytes(whole)
    broken.rename(db)
    pit.run("ticket", "update", "repo-auth.1", "--status", "open", "--assignee", "")
    pit.watch("done", 60, "--epics", "auth")
    assert pit.commits("pit/auth") == ["work 1"], "a ticket that became ready is begun"


def fake_claude(pit: Pit, script: str) -> None:
    """A program that is taken for claude."""
    path = pit.home.root / "claude"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    pit.env["PITBOSS_CLAUDE_BINARY"] = str(path)
    pit.configure(agent="claude-code", initDelay=0)


@needs_tmux
@pytest.mark.slow
def test_an_agent_that_does_not_begin(pit):
    fake_claude(pit, "test -e stay && { echo 'Select login method:'; exec sleep 300; }; echo no such model; exit 3")
    pit.epic("Auth", work(1))
    pit.pit("start", "--epics", "auth")
    pit.watch("paused", 30)
    reason = pit.status("auth")["reason"]
    assert reason.startswith("AGENT_START: it ended at once: status 3; ") and "no such model" in reason
    (pit.repo / ".worktrees/auth/stay").touch()
    pit.pit("resume", "auth")
    pit.watch("paused", 30)
    reason = pit.status("auth")["reason"]
    assert "it has not been set up: log in first" in reason and "Select login method" in reason
    assert pit.pit("stop")["epics"]["auth"]["state"] == "done"


def test_what_is_refused_before_anything_starts(pit):
    pit.epic("Auth", work(1))
    (pit.repo / ".pit.json").write_text('{\n "agent": "emacs", // no\n "maxConcurrent": 0,\n}')
    error = pit.error("start", "--epics", "auth", check=2)
    assert error["code"] == "config" and [(p["key"], p["line"]) for p in error["problems"]] == [("agent", 2),
                                                                                           ("maxConcurrent", 3)]
    assert pit.status()["epics"] == {}, "a broken file keeps nobody from status"
    pit.configure()
    for args, code, exit_code in ((("start", "--epics", "../x"), "usage", 2), (("start", "--epics", "-x"), "usage", 2),
                                  (("start", "--epics", "auth", "--max", "0"), "usage", 2),
                                  (("start", "--epics", "auth", "--epic-model", "pay=x"), "usage", 2),
                                  (("start", "--epics", "auth", "--prompt-template", "none"), "config", 2),
                                  (("start",), "usage", 2), (("bogus",), "usage", 2),
                                  (("add", "auth"), "refused", 4), (("pause", "auth"), "not_found", 3)):
        assert pit.error(*args, check=exit_code)["code"] == code, args
    assert pit.error("start", "--epics", "auth", check=4, env={"PIT_EPIC": "x"})["code"] == "refused"
    assert pit.error("start", "--epics", "auth", check=2, env={"PATH": "/nonexistent"})["code"] == "missing_program"
    programs = pit.home.root / "programs"
    programs.mkdir()
    (programs / "git").symlink_to(shutil.which("git"))
    error = pit.error("start", "--epics", "auth", check=2, env={"PATH": str(programs)})
    assert (error["code"], error["program"]) == ("missing_program", "tmux") and "--headless" in error["hint"]
    assert pit.error("status", check=2, cwd=pit.home.root)["code"] == "not_a_repository"
    assert not list((pit.home.root / "data/pitboss").glob("pit/*/journal.jsonl")), "no session was begun"
    assert pit.run("status", "--pretty").stdout.startswith("epics")


@needs_tmux
@pytest.mark.slow
def test_epics_are_checked_before_any_is_started(pit):
    pit.epic("Auth", work(1))
    pit.run("ticket", "add", "Empty", "-t", "epic")
    empty = [t["id"] for t in pit.pit("ticket", "list", "--type", "epic") if t["title"] == "Empty"][0]
    assert pit.error("start", "--epics", f"auth,{empty}", check=4)["why"] == "no tickets"
    error = pit.error("start", "--epics", "auth,auht", check=3)
    assert error["code"] == "not_found" and error["candidates"]
    assert pit.error("start", "--epics", "auth", "--base-branch", "nope", check=2)["code"] == "config"
    (pit.repo / ".worktrees/auth").mkdir(parents=True)
    (pit.repo / ".worktrees/auth/mine").touch()
    assert pit.error("start", "--epics", "auth", check=4)["why"] == "another folder is in its place"
    assert pit.status()["epics"] == {} and git(pit.repo, "branch", "--list", "pit/*") == ""
    (pit.repo / ".worktrees/auth/mine").unlink()
    sub = pit.home.root / "sub.jsonl"
    sub.write_text(json.dumps({"id": "repo-auth.9", "title": "Inner", "issue_type": "epic", "dependencies": [
        {"issue_id": "repo-auth.9", "depends_on_id": "repo-auth", "type": "parent-child"}]}) + "\n" + json.dumps(
        {"id": "repo-auth.9.1", "title": "deep", "dependencies": [
            {"issue_id": "repo-auth.9.1", "depends_on_id": "repo-auth.9", "type": "parent-child"}]}) + "\n")
    pit.run("ticket", "import", str(sub))
    assert "one epic is inside" in pit.error("start", "--epics", "auth,auth.9", check=4)["why"]


def test_one_daemon_a_project_and_its_protocol(pit):
    first = pit.pit("daemon", "start")
    assert first["running"] and first["changed"] and pit.pit("daemon", "start")["changed"] is False
    done = pit.run("daemon", "run", timeout=20)
    assert done.stdout == "" and pit.daemon_pid() == first["pid"], "a second one leaves"
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(first["socket"])
        link.settimeout(20)
        lines = link.makefile("rb")

        def ask(raw: bytes) -> dict:
            link.sendall(raw + b"\n")
            return json.loads(lines.readline())

        assert ask(b"nonsense")["error"]["code"] == "usage"
        assert ask(b"[1]")["error"]["code"] == "usage"
        assert ask(b'{"id": 7, "method": "bogus"}')["error"]["code"] == "usage"
        assert ask(b'{"id": 8, "method": "pause", "params": {}}')["error"]["code"] == "usage"
        assert ask(b'{"id": 9, "method": "pause", "params": {"epic": "x"}}')["error"]["code"] == "not_found"
        link.sendall(b'{"method": "agent-idle", "params": {"epicId": "nobody"}}\n{"method": "agent-event"}\n')
        answer = ask(b'{"id": 10, "method": "ping"}')
        assert answer["id"] == 10 and answer["result"]["pid"] == first["pid"]
        assert ask(b'{"id": 11, "method": "watch"}')["result"]["event"] == "snapshot"
    assert os.stat(first["socket"]).st_mode & 0o777 == 0o600
    restarted = pit.pit("daemon", "restart")
    assert restarted["pid"] != first["pid"]
    assert pit.pit("daemon", "stop")["changed"] and pit.pit("daemon", "stop")["changed"] is False
    assert not os.path.exists(first["socket"])


@needs_tmux
@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--headless",)])
def test_the_demonstration(pit, flags):
    answer = pit.pit("demo", *flags, timeout=150)
    assert {n: e["progress"] for n, e in answer["epics"].items()} == {"auth": "3/3", "pay": "3/3"}
    assert not os.path.exists(answer["project"]) and answer["attach"] is None


CLAUDE = os.environ.get("PITBOSS_TEST_CLAUDE") or shutil.which("claude") or ""
KEY = "sk-ant-api03-not-a-key-0123456789"


@needs_tmux
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not os.access(CLAUDE, os.X_OK), reason="no claude on PATH, and PITBOSS_TEST_CLAUDE names none")
def test_the_real_claude_works_through_an_epic(pit):
    api = fake_api.start()
    try:
        home = pit.home.root / "home"
        (home / ".claude.json").write_text(json.dumps({
            "hasCompletedOnboarding": True, "theme": "dark",
            "customApiKeyResponses": {"approved": [KEY[-20:]], "rejected": []}}))
        pit.env.update({"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": api.url, "PITBOSS_CLAUDE_BINARY": CLAUDE,
                        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"})
        step = {"tool": "Bash", "input": {
            "command": "echo x >{{TICKET_ID}}; git add -A; git commit -qm {{TICKET_ID}}; {{TICKET_CLOSE}}",
            "description": "a step"}}
        (pit.home.root / "prompt.txt").write_text("Do {{TICKET_ID}}.\nSCRIPT: " + json.dumps([step, {"text": "done"}]))
        pit.configure(agent="claude-code", model="claude-haiku-4-5", promptTemplate=str(pit.home.root / "prompt.txt"),
                      initDelay=10000)
        pit.epic("Auth", "one", "two")
        pit.pit("start", "--epics", "auth")
        pit.watch("settled", 150)
        epic = pit.status("auth")
        assert epic["state"] == "done", f"{epic['reason']}\n{pit.screens()}"
        assert pit.commits("pit/auth") == ["repo-auth.1", "repo-auth.2"]
        assert len({t["sessionId"] for t in epic["tickets"]}) == 2 and epic["usage"]["output"] > 0
        assert git(epic["worktree"], "status", "--porcelain") == ""
    finally:
        api.stop()


@needs_tmux
@pytest.mark.slow
def test_a_session_is_joined_and_goes_on_after_its_epics_were_done(pit):
    pit.epic("Auth", work(1))
    pit.epic("Pay", "$ leave Which?")
    first = pit.pit("start", "--epics", "auth", "--headless")
    assert first["epics"]["auth"]["changed"] and pit.pit("start", "--epics", "auth")["epics"]["auth"]["changed"] is False
    pit.watch("done")
    joined = pit.pit("start", "--epics", "pay,auth")
    assert joined["epics"]["pay"]["changed"] and joined["epics"]["auth"]["state"] == "done"
    pit.watch("paused", 40, "--epics", "pay")
    pane = pit.status("pay")["pane"]
    assert pit.status("pay")["headless"] is False and pit.pit("log", "pay")["source"] == "pane"
    pit.tmux("send-keys", "-t", pane, "-l", "/clear")
    pit.tmux("send-keys", "-t", pane, "Enter")
    wait_for(lambda: [e for e in pit.events("session_began") if e["epic"] == "pay"][1:], 20, "a person's /clear")
    assert pit.pit("resume", "pay")["changed"]
    pit.watch("paused", 40, "--epics", "pay")
    assert prompts(pit, "pay") == 2, "without a message the ticket is sent again, in a cleared conversation"
    ended = pit.watch("paused", 5, "--since", "0")
    assert [n["event"] for n in ended[:1]] == ["snapshot"] and any(n["event"] == "ticket_closed" for n in ended)
    assert pit.watch("done", 0.3, check=1)[-1] == {"event": "timeout"}


@needs_tmux
@pytest.mark.slow
def test_a_pause_between_two_tickets(pit):
    pit.epic("Auth", work(1), work(2))
    pit.configure(clearDelay=600000)
    pit.pit("start", "--epics", "auth")
    wait_for(lambda: pit.events("ticket_closed"), 40, "the first ticket")
    assert pit.status("auth")["state"] == "running" and pit.status("auth")["ticket"] is None
    assert pit.pit("pause", "auth")["changed"], "while its context waits to be cleared"
    assert pit.status("auth")["reason"] == "MANUAL"
    told = pit.pit("teardown", "--force")["epics"]["auth"]
    assert told["worktree"] == "removed" and "rescue" not in told, "nothing was unsaved"


@needs_tmux
@pytest.mark.slow
def test_a_prompt_that_is_never_taken_up(pit):
    deaf = pit.home.root / "deaf.py"
    deaf.write_text(
        "import json, os, subprocess, sys, tty\n"
        "hooks = json.load(open(sys.argv[sys.argv.index('--settings') + 1]))['hooks']\n"
        "told = {'hook_event_name': 'SessionStart', 'source': 'startup', 'session_id': 's1', 'cwd': os.getcwd()}\n"
        "subprocess.run(['sh', '-c', hooks['SessionStart'][0]['hooks'][0]['command']], input=json.dumps(told).encode())\n"
        "tty.setraw(0)\n"
        "while data := os.read(0, 9999):\n"
        f"    open({str(pit.home.root / 'keys')!r}, 'ab').write(data)\n")
    fake_claude(pit, f"exec {sys.executable} -I -S {deaf} \"$@\"")
    pit.epic("Auth", work(1))
    pit.pit("start", "--epics", "auth")
    pit.watch("paused", 60)
    assert pit.status("auth")["reason"].startswith("DELIVERY: ")
    keys = (pit.home.root / "keys").read_bytes()
    assert keys.count(b"\r") == 3 and keys.count(b"Work on ticket") == 1, "pasted once, entered three times"
    assert pit.pit("stop", "auth")["epics"]["auth"]["state"] == "done"
    assert pit.statuses() == {"repo-auth.1": "open"}


def test_session_folders_that_nobody_needs_are_removed(pit):
    pit.pit("daemon", "start")
    folder = str(pit.folder)
    assert pit.pit("cleanup") == {"removed": [], "kept": [{"path": folder, "why": "has a living daemon"}]}
    pit.pit("daemon", "stop")
    assert pit.pit("cleanup", "--dry-run") == {"removed": [folder], "kept": [], "dry_run": True} and os.path.isdir(folder)
    assert pit.pit("cleanup", cwd=pit.home.root)["removed"] == [folder] and not os.path.exists(folder)
    assert pit.pit("cleanup") == {"removed": [], "kept": []}


@pytest.mark.slow
def test_a_message_goes_into_the_session_of_the_hand_before(pit):
    pit.epic("Auth", "$ say Which file?\n$ exit 3")
    pit.epic("Pay", "$ sleep 300")
    pit.pit("start", "--epics", "auth,pay", "--headless")
    pit.watch("paused", 50)
    assert pit.status("auth")["reason"].startswith("AGENT_EXITED: Failed")
    message = "$ write a.txt 1\n$ commit answered\n$ run pit ticket close repo-auth.1"
    assert pit.pit("resume", "auth", "--message", message)["changed"]
    pit.watch("done", 50, "--epics", "auth")
    assert pit.commits("pit/auth") == ["answered"]
    shown = json.loads(pit.home.pitboss("status", pit.status("auth")["runId"], "--json", check=0).stdout)
    assert len(shown["actors"]) == 2 and len({x["claude_session_id"] for x in shown["actors"]}) == 1
    wait_for(lambda: [e for e in pit.events("prompted") if e["epic"] == "pay"], 30, "the hand")
    assert pit.pit("pause", "pay")["changed"]
    run = pit.status("pay")["runId"]
    wait_for(lambda: json.loads(pit.home.pitboss("status", run, "--json").stdout)["actors"][0]["status"] == "Cancelled",
             30, "the end of its hand")
    assert pit.statuses()["repo-pay.1"] == "in_progress" and pit.status("pay")["reason"] == "MANUAL"
    assert pit.pit("stop")["epics"]["pay"]["changed"] and pit.statuses()["repo-pay.1"] == "open"
    assert json.loads(pit.home.pitboss("status", run, "--json").stdout)["state"] == "complete"


OPENCODE = os.environ.get("PITBOSS_TEST_OPENCODE") or shutil.which("opencode") or ""


@needs_tmux
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not os.access(OPENCODE, os.X_OK), reason="no opencode on PATH, and PITBOSS_TEST_OPENCODE names none")
def test_the_real_opencode_works_through_an_epic(pit):
    api = fake_api.start()
    try:
        folder = pit.home.root / "home/.config/opencode"
        folder.mkdir(parents=True)
        (folder / "opencode.json").write_text(json.dumps({"provider": {"standin": {
            "npm": "@ai-sdk/anthropic", "options": {"baseURL": f"{api.url}/v1", "apiKey": KEY},
            "models": {"m1": {"name": "m1", "cost": {"input": 1, "output": 5}}}}}}))
        pit.env["PITBOSS_OPENCODE_BINARY"] = OPENCODE
        step = {"tool": "bash", "input": {
            "command": "echo x >{{TICKET_ID}}; git add -A; git commit -qm {{TICKET_ID}}; {{TICKET_CLOSE}}",
            "description": "a step"}}
        (pit.home.root / "prompt.txt").write_text("Do {{TICKET_ID}}.\nSCRIPT: " + json.dumps([step, {"text": "done"}]))
        pit.configure(agent="auto", model="standin/m1", promptTemplate=str(pit.home.root / "prompt.txt"),
                      initDelay=25000)
        pit.epic("Auth", "one", "two")
        assert pit.pit("start", "--epics", "auth")["epics"]["auth"]["agent"] == "opencode"
        pit.watch("settled", 240)
        epic = pit.status("auth")
        assert epic["state"] == "done", f"{epic['reason']}\n{pit.screens()}"
        assert pit.commits("pit/auth") == ["repo-auth.1", "repo-auth.2"]
        assert len({t["sessionId"] for t in epic["tickets"]}) == 2 and epic["usage"]["output"] > 0
        assert git(epic["worktree"], "status", "--porcelain") == ""
    finally:
        api.stop()
