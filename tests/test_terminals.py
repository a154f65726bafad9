"""The real claude and opencode as terminal programs in tmux, against a stand-in for their APIs.

One agent serves all tests of it here, each of which begins in a conversation of its own. Without the programs the
tests are skipped; PITBOSS_TEST_CLAUDE and PITBOSS_TEST_OPENCODE name them.
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import fake_api
import pitboss
from tmux_desk import Desk, needs_tmux
from tools import git, processes_with, wait_for

KEY = "sk-ant-api03-not-a-key-0123456789"
PROGRAMS = {name: os.environ.get(f"PITBOSS_TEST_{name.upper()}") or shutil.which(name) or ""
            for name in ("claude", "opencode")}


def real(name: str):
    """Marks a test that drives a real agent."""
    missing = not os.access(PROGRAMS[name], os.X_OK)
    why = f"no {name} on PATH, and PITBOSS_TEST_{name.upper()} names none that can be run"

    def mark(test):
        return pytest.mark.slow(pytest.mark.real(needs_tmux(pytest.mark.skipif(
            missing or sys.platform != "linux", reason=why if missing else "the checks read /proc")(test))))

    return mark


def prompt(*steps: dict, words: str = "Do it.") -> str:
    """A prompt that tells the stand-in what its model does."""
    return f"{words}\nSCRIPT: {json.dumps(list(steps))}"


def bash(command: str, **more) -> dict:
    return {"input": {"command": command, "description": "a step", **more}}


class Terminal:
    """One agent in a window, and its API."""

    def __init__(self, root: Path, name: str, env: dict, started_s: float, program: str, model: str) -> None:
        self.api = fake_api.start(bodies=root / "bodies")
        self.desk = Desk(root, {**env, "ANTHROPIC_BASE_URL": self.api.url})
        self.set_up(root / "home")
        self.row, self.pane = self.desk.start(agent=name, program=(program,), model=model, started_s=started_s)

    def set_up(self, home: Path) -> None:
        """What a user's folder holds before the agent starts."""

    def begin(self) -> str:
        """A conversation of its own, with an empty box; the name of the newest event."""
        desk, last = self.desk, self.desk.last()
        assert desk.do(pitboss.clear_context(desk.tmux, self.row, self.pane.pane_id, desk.told("cleared", after=last)))
        return desk.last()

    def deliver(self, text: str) -> dict:
        """The event of a prompt that was delivered."""
        after = self.desk.last()
        assert self.desk.deliver(self.pane, text, home=self.row.home), self.desk.screen()
        return self.desk.wait("prompt", after=after)

    def bodies(self) -> list[dict]:
        """What the API was asked, without the side requests that have no tools."""
        found = [json.loads(p.read_text()) for p in sorted((self.desk.root / "bodies").glob("*.json"))]
        return [b for b in found if b.get("tools")]

    def close(self) -> None:
        self.desk.close()
        self.api.stop()


class Claude(Terminal):
    def set_up(self, home: Path) -> None:
        (home / ".claude.json").write_text(json.dumps({
            "hasCompletedOnboarding": True, "theme": "dark",
            "customApiKeyResponses": {"approved": [KEY[-20:]], "rejected": []}}))
        (home / ".claude").mkdir()
        hook = {"hooks": [{"type": "command", "command": f"sleep 1.5; echo ran >>{home}/own-hook"}]}
        (home / ".claude" / "settings.json").write_text(json.dumps({
            "permissions": {"ask": ["Bash(touch:*)"]}, "hooks": {"Stop": [hook]}}))
        self.settings = (home / ".claude" / "settings.json").read_bytes()


class Opencode(Terminal):
    def set_up(self, home: Path) -> None:
        folder = home / ".config" / "opencode"
        folder.mkdir(parents=True)
        (folder / "opencode.json").write_text(json.dumps({"provider": {"standin": {
            "npm": "@ai-sdk/anthropic", "options": {"baseURL": f"{self.api.url}/v1", "apiKey": KEY},
            "models": {"m1": {"name": "m1", "cost": {"input": 1, "output": 5}}}}},
            "agent": {"build": {"permission": {"bash": {"*": "allow", "touch *": "ask"}}}}}))


@pytest.fixture(scope="module")
def claude(tmp_path_factory):
    env = {"ANTHROPIC_API_KEY": KEY, "DISABLE_TELEMETRY": "1", "DISABLE_AUTOUPDATER": "1", "DISABLE_ERROR_REPORTING": "1",
           "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    place = Claude(tmp_path_factory.mktemp("claude"), "claude-code", env, 60, PROGRAMS["claude"], "claude-haiku-4-5")
    yield place
    place.close()


@pytest.fixture(scope="module")
def opencode(tmp_path_factory):
    root = tmp_path_factory.mktemp("opencode")
    env = {"XDG_DATA_HOME": str(root / "data"), "OPENCODE_DISABLE_MODELS_FETCH": "1",
           "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"}
    place = Opencode(root, "opencode", env, 300, PROGRAMS["opencode"], "standin/m1")
    assert place.desk.do(pitboss.wait_home(place.desk.tmux, place.row, place.pane.pane_id, 120)), place.desk.screen()
    yield place
    place.close()


def check_untouched(place: Terminal) -> None:
    assert git(place.desk.repo, "status", "--porcelain", "--ignored") == ""


# ------------------------------------------------------------------ claude

@real("claude")
def test_claude_starts_in_its_folder_and_is_told_its_instructions(claude):
    started = claude.desk.wait("started")
    assert started["cwd"] == str(claude.desk.repo) and started["kind"] == "startup" and started["session"]
    claude.begin()
    claude.deliver(prompt({"text": "hi"}))
    ended = claude.desk.wait("turn_ended", after=claude.desk.events(kind="prompt")[-1]["file"])
    assert ended["last"] == "hi" and ended["background"] == 0
    used = wait_for(lambda: (u := pitboss.transcript_usage(ended["transcript"])) and u["input"] and u, 10, "usage")
    assert used["output"] > 0 and used["cost_usd"] is None
    body = claude.bodies()[-1]
    assert "You work on the epic." in json.dumps(body["system"])
    assert not {"AskUserQuestion", "ExitPlanMode"} & {tool["name"] for tool in body["tools"]}
    check_untouched(claude)
    home = claude.desk.root / "home"
    assert (home / ".claude" / "settings.json").read_bytes() == claude.settings


@real("claude")
def test_the_hooks_of_claudes_user_run_to_their_end(claude):
    """Ours are added to them; a conversation that is cleared right after a turn waits for them."""
    own = claude.desk.root / "home" / "own-hook"
    claude.begin()
    before = own.read_text().count("ran") if own.exists() else 0
    for count in (1, 2):
        told = claude.deliver(prompt({"text": "ok"}))
        claude.desk.wait("turn_ended", after=told["file"])
        claude.begin()
        assert own.read_text().count("ran") == before + count


@real("claude")
def test_claude_is_given_prompts_of_every_kind_once(claude):
    claude.begin()
    shell = claude.desk.root / "ran"
    for words in ("word;", f"!touch {shell}", "/clear all", "tabs\tand\n\n  blanks", "x" * 3000 + "\n" + "line\n" * 500,
                  "a line of 200 KB; " * 11000):
        told = claude.deliver(prompt({"text": "ok"}, words=words))
        wanted = pitboss.guard_prompt(prompt({"text": "ok"}, words=words)).replace("\t", "    ")
        assert told["prompt"] == wanted
        claude.desk.wait("turn_ended", after=told["file"])
        assert len(claude.desk.events(kind="prompt", after=told["file"])) == 0
    told = claude.deliver(prompt({"text": "ok"}) + "\na path C:\\")
    claude.desk.wait("turn_ended", after=told["file"])
    assert not shell.exists()
    check_untouched(claude)


@real("claude")
def test_claude_begins_anew_whatever_stands_in_its_box(claude):
    desk = claude.desk
    claude.begin()
    first = claude.deliver(prompt({"text": "one"}, words="The word is lemon."))
    desk.wait("turn_ended", after=first["file"])
    desk.do(desk.tmux.paste(claude.pane.pane_id, "typed by a person\nand not sent"))
    claude.begin()
    second = claude.deliver(prompt({"text": "two"}))
    assert second["session"] != first["session"] and second["prompt"].startswith("Do it.")
    assert pitboss.follows(second["session"], second) and not pitboss.follows(second["session"], first)
    desk.wait("turn_ended", after=second["file"])
    assert "lemon" not in json.dumps(claude.bodies()[-1]["messages"])


@real("claude")
def test_claude_is_interrupted_and_begins_anew(claude):
    desk = claude.desk
    claude.begin()
    told = claude.deliver(prompt({"text": "never", "stall": 60}))
    assert desk.do(pitboss.interrupt_turn(desk.tmux, claude.row, claude.pane.pane_id, 15))
    assert not desk.events(kind="turn_ended", after=told["file"])
    claude.begin()
    again = claude.deliver(prompt({"text": "again"}))
    assert desk.wait("turn_ended", after=again["file"])["last"] == "again"


@real("claude")
def test_claude_tells_of_background_tasks_errors_and_permissions(claude):
    desk = claude.desk
    claude.begin()
    told = claude.deliver(prompt({"tool": "Bash", **bash("sleep 3", run_in_background=True)}, {"text": "begun"}))
    first = desk.wait("turn_ended", after=told["file"])
    assert first["background"] == 1
    assert desk.wait("turn_ended", after=first["file"])["background"] == 0
    assert "task-notification" in desk.events(kind="prompt", after=first["file"])[0]["prompt"]
    claude.begin()
    told = claude.deliver(prompt({"error": 400}, {"text": "never"}))
    assert "400" in desk.wait("turn_failed", after=told["file"])["error"]
    claude.begin()
    told = claude.deliver(prompt({"tool": "Bash", **bash("touch made && rm made")}, {"text": "done"}))
    asked = desk.wait("permission", after=told["file"])
    assert asked["tool"] == "Bash" and "touch made" in asked["input"]
    wait_for(lambda: "Do you want to proceed" in desk.screen(), 10, "the dialog")
    desk.do(desk.tmux.press(claude.pane.pane_id, "Enter"))
    assert desk.wait("turn_ended", after=asked["file"])["last"] == "done"
    check_untouched(claude)


@real("claude")
def test_a_message_reaches_a_claude_that_is_at_work(claude):
    """No hook tells of it; the transcript does."""
    desk = claude.desk
    claude.begin()
    told = claude.deliver(prompt({"tool": "Bash", **bash("sleep 3")}, {"text": "done"}))
    at = os.path.getsize(told["transcript"]) if os.path.exists(told["transcript"]) else 0
    text = "Message from the orchestrator:\nuse the other file"

    async def submitted(seconds: float) -> bool:
        return wait_for(lambda: pitboss.is_queued(told["transcript"], at, text), seconds)

    assert desk.do(pitboss.deliver(desk.tmux, claude.pane.pane_id, text, submitted))
    ended = desk.wait("turn_ended", after=told["file"])
    assert "use the other file" in json.dumps(claude.bodies()[-1]["messages"])
    assert len(desk.events(kind="turn_ended", after=told["file"])) == 1 and ended["last"] == "done"
    assert not pitboss.is_queued(told["transcript"], os.path.getsize(told["transcript"]), text)


@real("claude")
def test_a_claude_that_shows_a_dialog_is_silent_and_its_screen_says_why(claude):
    """A home in which claude was never set up."""
    desk = claude.desk
    home = desk.root / "new-home"
    home.mkdir()
    _, prepared = desk.prepare("e.2", "claude-code", (PROGRAMS["claude"],), HOME=str(home))
    pane = desk.do(desk.tmux.open_window("pit", "e.2", str(desk.repo), prepared.argv, prepared.env))
    words = wait_for(lambda: (said := pitboss.explain_silence(claude.row, desk.do(
        desk.tmux.capture(pane.pane_id, 60)))) and ("cannot reach" in said or "set up" in said) and said, 30)
    assert not desk.events("e.2") and "░" not in words
    desk.do(desk.tmux.kill_window(desk.do(desk.tmux.pane(pane.pane_id))))


@real("claude")
def test_ending_claude_ends_its_background_tasks(claude):
    desk = claude.desk
    row, pane = desk.start("e.3", "claude-code", 60, program=(PROGRAMS["claude"],), model="claude-haiku-4-5")
    assert desk.deliver(pane, prompt({"tool": "Bash", **bash("sleep 987", run_in_background=True)}, {"text": "x"}), "e.3")
    desk.wait("turn_ended", "e.3")
    marker = f"PITBOSS_LINEAGE={desk.tmux.marker('e.3')}"
    wait_for(lambda: any("sleep 987" in c for c in processes_with(marker).values()), 10)
    desk.do(desk.tmux.end_agent(desk.do(desk.tmux.pane(pane.pane_id))))
    assert not processes_with(marker)
    assert desk.wait("ended", "e.3")["kind"] == "other"
    assert wait_for(lambda: desk.do(desk.tmux.pane(pane.pane_id)).is_dead, 10)


# ------------------------------------------------------------------ opencode

@real("opencode")
def test_opencode_tells_of_its_turns(opencode):
    desk = opencode.desk
    assert desk.wait("started")["cwd"] == str(desk.repo)
    opencode.begin()
    shell = desk.root / "ran"
    sessions = set()
    for words in ("word;", f"!touch {shell}", "/new all", "tabs\tand\n\n  blanks", "a line of 200 KB; " * 11000):
        told = opencode.deliver(prompt({"text": "ok"}, words=words))
        ended = desk.wait("turn_ended", after=told["file"], deadline_s=60)
        assert ended["last"] == "ok" and ended["usage"]["input"] > 0 and ended["usage"]["cost_usd"] > 0
        assert pitboss.squeeze(told["prompt"]) == pitboss.squeeze(pitboss.guard_prompt(prompt({"text": "ok"}, words=words)))
        sessions.add(told["session"])
    assert len(sessions) == 1 and not shell.exists()
    body = opencode.bodies()[-1]
    assert "You work on the epic." in json.dumps(body["system"])
    assert "question" not in {tool["name"] for tool in body["tools"]}
    check_untouched(opencode)


@real("opencode")
def test_opencode_begins_anew_and_is_interrupted(opencode):
    desk = opencode.desk
    opencode.begin()
    first = opencode.deliver(prompt({"text": "one"}, words="The word is lemon."))
    desk.wait("turn_ended", after=first["file"], deadline_s=60)
    opencode.begin()
    second = opencode.deliver(prompt({"text": "never", "stall": 30}, words="Second."))
    assert second["session"] != first["session"] and second["prompt"].startswith("Second.")
    assert desk.do(pitboss.interrupt_turn(desk.tmux, opencode.row, opencode.pane.pane_id))
    assert wait_for(lambda: [e for e in desk.events(after=second["file"]) if e.get("kind") == "interrupted"], 20)
    assert not desk.events(kind="turn_ended", after=second["file"])
    opencode.begin()
    third = opencode.deliver(prompt({"error": 400}, {"text": "never"}, words="Third."))
    assert "400" in desk.wait("turn_failed", after=third["file"], deadline_s=60)["error"]
    assert not desk.events(kind="turn_ended", after=third["file"])


@real("opencode")
def test_what_an_opencode_starts_itself_does_not_report_for_it(opencode):
    """The command line of a second opencode inherits everything but must not end our turn."""
    desk = opencode.desk
    opencode.begin()
    told = opencode.deliver(prompt({"tool": "bash", **bash("echo nested=$PIT_NESTED")}, {"text": "$1"}, words="Nested."))
    assert "nested=1" in desk.wait("turn_ended", after=told["file"], deadline_s=60)["last"]


@real("opencode")
def test_ending_opencode_leaves_nothing(opencode):
    desk = opencode.desk
    row, prepared = desk.prepare("e.2", "opencode", (PROGRAMS["opencode"],), "standin/m1")
    pane = desk.do(desk.tmux.open_window("pit", "e.2", str(desk.repo), prepared.argv, prepared.env))
    desk.wait("started", "e.2", deadline_s=200)
    marker = f"PITBOSS_LINEAGE={desk.tmux.marker('e.2')}"
    assert processes_with(marker)
    desk.do(desk.tmux.kill_window(desk.do(desk.tmux.pane(pane.pane_id))))
    assert not processes_with(marker) and "e.2" not in desk.do(desk.tmux.panes())
