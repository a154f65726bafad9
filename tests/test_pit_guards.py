"""What keeps the ticket loop harmless: in awkward projects, beside a user's own things, against others and itself."""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import beads_standin
from pit_desk import Pit, needs_tmux, work
from tools import PITBOSS, PYTHON, git, wait_for


@pytest.fixture
def pit(home):
    """A project with the scripted agent and the embedded tickets."""
    desk = Pit(home)
    yield desk
    desk.end()


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@needs_tmux
@pytest.mark.slow
def test_an_awkward_project_and_what_is_the_users_own(home):
    pit = Pit(home, "/".join(["a" * 60, "b c" * 20, "repo"]))
    try:
        work_in_an_awkward_project(pit)
    finally:
        pit.end()


def work_in_an_awkward_project(pit: Pit) -> None:
    assert len(str(pit.repo)) > 125
    evil, template = pit.home.root / "evil", pit.home.root / "prompt.txt"
    template.write_text("{{TICKET_BODY}}\n$ run {{TICKET_CLOSE}}\n;")
    pit.configure(promptTemplate=str(template), maxConcurrent=1)
    git(pit.repo, "branch", "pit")
    (pit.repo / ".claude").mkdir()
    (pit.repo / ".claude/settings.json").write_text('{"hooks": {}}')
    git(pit.repo, "add", "-A")
    git(pit.repo, "commit", "-qm", "settings")
    for name in (".claude", ".config/opencode"):
        folder = pit.home.root / "home" / name
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text('{"theme": "dark"}')
    Path(pit.tmux_socket).parent.mkdir(mode=0o700)
    pit.tmux("new-session", "-d", "-s", "mine", "-x", "90", "-y", "20", "sh")
    pit.tmux("set-option", "-g", "status-right", "my own #{pane_id}")

    def users_own():
        shown = [pit.tmux(*words.split()) for words in ("show-options -g", "show-options -gw", "show-options -s", "list-keys",
                                                        "list-windows -a -F #{session_name}:#{window_name}:#{window_width}")]
        main = [git(pit.repo, *words.split()) for words in ("status --porcelain", "rev-parse HEAD main pit")]
        return shown, main, tree_of(pit.home.root / "home"), tree_of(pit.repo / ".claude")

    before = users_own()
    pit.epic("V1.2", "/clear it\n" + work(1), f"!touch {evil}\n" + work(2), "x" * 200_000 + "\n" + work(3))
    pit.epic("Pay", work(4))
    around = {"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere/index", "PIT_WAKE": '["false"]'}     # as a git hook has it
    began = pit.pit("start", "--epics", "v1.2,pay", env=around)
    assert began["epics"]["pay"]["state"] == "queued" and began["epics"]["v1.2"]["branch"] == "pit-v1.2"
    wait_for(lambda: len(pit.events("prompted")) == 1, 30, "the first prompt")
    lines = pit.watch("done", 100)
    states = [(n["epic"], n["state"]) for n in lines if n["event"] == "state"]
    assert states.index(("v1.2", "done")) < states.index(("pay", "starting")), "one at a time"
    assert pit.commits("pit-v1.2") == ["work 1", "work 2", "work 3"] and pit.commits("pit-pay") == ["work 4"]
    assert not evil.exists() and len(pit.events("prompted")) == 4, "no line of a ticket is a command, none is sent twice"
    worktree = pit.status("v1.2")["worktree"]
    assert git(worktree, "status", "--porcelain") == "", "nothing of pit is in a worktree"
    made_by_agents = ("__pycache__", "demo")
    open_to_others = [str(p) for p in [pit.folder, *pit.folder.rglob("*")] if p.lstat().st_mode & 0o077
                      and not set(made_by_agents) & set(p.parts) and not p.is_symlink()]
    assert open_to_others == [], "a session folder is its owner's alone"
    pit.pit("teardown")
    assert users_own() == before and not (pit.repo / ".worktrees").exists()


@needs_tmux
@pytest.mark.slow
def test_an_agent_that_is_not_in_its_worktree_is_given_nothing(pit):
    words = shlex.join(pit.home.argv("demo-agent", "--sessions", pit.home.root / "s", "--model", "demo", "--tui"))
    claude = pit.home.root / "claude"
    claude.write_text(f'#!/bin/sh\ntest -e {pit.home.root}/good || cd {pit.home.root}\nexec {words} "$2"\n')
    claude.chmod(0o755)
    pit.env["PITBOSS_CLAUDE_BINARY"] = str(claude)
    pit.configure(agent="claude-code", initDelay=20000)
    pit.epic("Auth", work(1))
    pit.pit("start", "--epics", "auth")
    pit.watch("paused")
    reason = pit.status("auth")["reason"]
    assert reason.startswith("WORKTREE: the agent is in ") and pit.events("send_begun") == []
    (pit.home.root / "good").touch()
    pit.tmux("kill-window", "-t", pit.status("auth")["pane"])
    assert pit.pit("resume", "auth")["changed"]
    pit.watch("done")
    assert pit.commits("pit/auth") == ["work 1"]


@needs_tmux
@pytest.mark.slow
def test_what_is_recorded_already_is_not_taken_from_the_spool_again(pit):
    begun = pit.home.root / "begun"
    pit.epic("Auth", f"$ run touch {begun}; sleep 300")
    pit.pit("start", "--epics", "auth")
    wait_for(begun.exists, 30, "the turn")
    epic = pit.status("auth")
    told = {"hook_event_name": "Stop", "session_id": pit.events("session_began")[-1]["session"], "cwd": epic["worktree"]}
    stale = pit.folder / "epics/auth/spool" / pit.events("session_began")[-1]["spool"]
    stale.with_name(".beside").write_text(json.dumps({"agent": "demo", "epic": "auth", "at": 1.0, "raw": told}))
    stale.with_name(".beside").rename(stale)
    wait_for(lambda: not stale.exists(), 20, "the daemon to read it")
    assert pit.events("turn_ended") == [] and pit.status("auth")["state"] == "running"
    fresh = stale.with_name("9" * 20 + "-1.json")
    fresh.with_name(".beside").write_text(json.dumps({"agent": "demo", "epic": "auth", "at": 1.0, "raw": told}))
    fresh.with_name(".beside").rename(fresh)
    wait_for(lambda: pit.events("turn_ended"), 20, "the same under a new name")


def test_a_daemon_leaves_when_there_is_nothing_to_do(pit):
    pit.pit("daemon", "start")
    pit.pit("daemon", "stop")
    code = (f"import sys; sys.path.insert(0, {str(PITBOSS.parent)!r}); import pitboss; pitboss.IDLE_S = 0.5; "
            "sys.argv = ['pitboss.py', 'pit', 'daemon', 'run']; sys.exit(pitboss.main())")
    done = subprocess.run([PYTHON, "-B", "-c", code], cwd=pit.repo, env=pit.env, timeout=30, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pit.events("daemon_left")[-1]["why"] == "idle"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_other_users_are_turned_away(pit):
    path = pit.pit("daemon", "start")["socket"]
    assert os.stat(path).st_mode & 0o777 == 0o600 and os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    os.chmod(os.path.dirname(path), 0o711)
    os.chmod(path, 0o666)
    code = (f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r}); s.settimeout(20)\n"
            "try:\n    s.sendall(b'{\"id\": 1, \"method\": \"ping\"}\\n'); print(s.recv(100))\n"
            "except OSError as e: print(b'')")
    ask = [PYTHON, "-I", "-S", "-c", code]
    assert "running" in subprocess.run(ask, capture_output=True, text=True, timeout=30).stdout
    other = subprocess.run([sys.executable, "-c", f"import os; os.setuid(65534); os.execv('/usr/bin/env', "
                            f"['env', 'python3'] + {ask[1:]!r})"], capture_output=True, text=True, timeout=30,
                           env={"PATH": "/usr/bin:/bin"})
    assert other.returncode == 0, other.stderr
    assert "running" not in other.stdout and ("refused" in other.stdout or other.stdout.strip() == "b''"), other.stdout


@pytest.mark.slow
def test_a_ticket_that_somebody_claimed_just_now_is_left_alone(pit):
    pit.epic("Auth", work(1), work(2), chain=False)
    pit.run("ticket", "claim", "repo-auth.1", "--actor", "bob")
    pit.pit("start", "--epics", "auth", "--headless")
    pit.watch("paused")
    assert pit.status("auth")["reason"] == "BLOCKED: repo-auth.1 is in_progress by bob"
    assert pit.commits("pit/auth") == ["work 2"] and pit.statuses()["repo-auth.1"] == "in_progress"
    for words in (("start", "--epics", "auth"), ("pause", "auth"), ("resume", "auth"), ("stop",), ("teardown",),
                  ("add", "x"), ("watch",), ("daemon", "stop"), ("cleanup",), ("init",)):
        error = pit.error(*words, check=4, env={"PIT_EPIC": "auth"})
        assert error["code"] == "refused", words
    assert pit.pit("status", env={"PIT_EPIC": "auth"})["epics"] and pit.daemon_pid()


@pytest.mark.slow
def test_a_claim_that_somebody_else_won_is_not_worked(pit):
    """Between the look at what is ready and the claim somebody else takes the ticket."""
    programs, thief, taken = (pit.home.root / name for name in ("programs", "thief", "taken"))
    beads_standin.install(programs, "bd-1.0.5")
    beads_standin.init(pit.repo, "repo")
    (pit.repo / ".git/info/exclude").write_text("/.pit.json\n/.beads/\n")
    thief.mkdir()
    (thief / "bd").write_text(
        f'#!/bin/sh\ncase "$*" in *--claim*) test -e {taken} || {{ touch {taken}; '
        f'BD_ACTOR=bob BEADS_ACTOR=bob {programs}/bd "$@" >/dev/null; }};; esac\nexec {programs}/bd "$@"\n')
    (thief / "bd").chmod(0o755)
    bd = [str(programs / "bd"), "create", "--json"]
    for words in (("Auth", "-t", "epic"), *((f"T{n}", "--parent", "EPIC", "-d", work(n)) for n in (1, 2))):
        told = subprocess.run([*bd, *(epic if w == "EPIC" else w for w in words)], cwd=pit.repo, env=pit.env,
                              capture_output=True, text=True, check=True)
        found = json.loads(told.stdout)
        epic = found["id"] if words[-1] == "epic" else epic
    pit.env["PATH"] = f"{thief}:{programs}:{pit.env['PATH']}"
    pit.pit("start", "--epics", epic, "--headless")
    pit.watch("paused")
    assert pit.status(epic)["reason"] == f"BLOCKED: {epic}.1 is in_progress by bob"
    assert pit.commits(f"pit/{epic}") == ["work 2"]


def test_a_manual_that_agents_will_not_see_is_told_of(pit):
    assert pit.status()["tracker"] == "embedded", "where a start would look"
    pit.epic("Auth", work(1))
    pit.run("ticket", "close", "repo-auth.1")
    pit.pit("init")
    note = pit.pit("start", "--epics", "auth", "--headless")["note"]
    assert "AGENTS.md has the manual, but not on main" in note
    git(pit.repo, "add", "AGENTS.md")
    git(pit.repo, "commit", "-qm", "manual")
    assert "note" not in pit.pit("start", "--epics", "auth", "--headless")
