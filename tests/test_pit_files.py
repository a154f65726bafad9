"""What pit writes into files and servers of its user: init, install-keybinding, install-status, and uninstall.

Whatever was there before is there afterwards, byte for byte.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import pitboss
from pitboss import MARKS, put_block, take_block
from tools import Home, make_repo, wait_for

AGENTS = MARKS["AGENTS.md block"]
REASONS = ("MANUAL NEEDS_HUMAN_INPUT PERMISSION TIMEOUT BLOCKED AGENT_START AGENT_EXITED API_ERROR DELIVERY WINDOW_GONE "
           "TRACKER WORKTREE").split()
USER_FILES = [b"", b"one line", b"one line\n", b"# Rules\n\nBe kind.\n\n\n", b"a\r\nb\r\n", b"a\r\nb", b"\xff\xfe not UTF-8 \n",
              b"\xef\xbb\xbfwith a BOM\n", b"in a line: <!-- pit:orchestrator:start --> of prose\n"]


@pytest.fixture
def project(tmp_path):
    return pitboss.find_project(str(make_repo(tmp_path / "repo")))


def pit(project, *argv, env=None):
    """The answer of one command line, in this process."""
    name, options, _ = pitboss.parse_pit([*map(str, argv)], "pit")
    return pitboss.run_pit(pitboss.PIT_COMMANDS[name], options, project.path, env or {"HOME": project.path})


def refusal(project, *argv, env=None) -> dict:
    with pytest.raises(pitboss.PitbossError) as caught:
        pit(project, *argv, env=env)
    return {"exit": pitboss.EXIT_CODES[caught.value.code][0], **pitboss.pit_error(caught.value)["error"]}


@pytest.fixture(autouse=True)
def no_tmux(monkeypatch, tmp_path):
    """No test of this file reaches the user's own server."""
    monkeypatch.setenv("TMUX_TMPDIR", str(tmp_path))
    monkeypatch.delenv("TMUX", raising=False)


# ------------------------------------------------------------------ blocks in files

@pytest.mark.parametrize("marks", MARKS.values(), ids=list(MARKS))
@pytest.mark.parametrize("before", [None, *USER_FILES])
def test_a_block_comes_and_goes_without_a_trace(marks, before):
    once = put_block(before, marks, "some\nlines", "F")
    assert once.startswith(before or b"") and b"some" in once
    again = put_block(once, marks, "some\nlines", "F")
    assert again == once, "twice is once"
    other = put_block(again, marks, "other lines\nand more\nof them", "F")
    assert b"some" not in other and b"of them" in other
    assert take_block(once, marks, "F") == before and take_block(other, marks, "F") == before
    if b"\r\n" in once:
        assert once.replace(b"\r\n", b"").count(b"\n") == 0, "the file's own line ends"


@pytest.mark.parametrize("after", [b"", b"more\n", b"\nmore", b"\r\nmore"])
@pytest.mark.parametrize("before", USER_FILES)
def test_what_is_written_around_a_block_stays(before, after):
    """A block of another program's hand, or one that was moved: only it is changed."""
    whole = before + (b"" if not before or before.endswith(b"\n") else b"\n") + AGENTS.start.encode() + (
        b"\nold\n" + AGENTS.end.encode() + (b"\n" + after if after else b""))
    new = put_block(whole, AGENTS, "new", "F")
    assert new.split(AGENTS.start.encode())[0] == whole.split(AGENTS.start.encode())[0]
    assert new.split(AGENTS.end.encode())[-1] == whole.split(AGENTS.end.encode())[-1] and b"old" not in new
    begin = whole.rindex(AGENTS.start.encode() + b"\nold")
    assert take_block(new, AGENTS, "F") == whole[:begin] + after


S, E = AGENTS.start.encode(), AGENTS.end.encode()


@pytest.mark.parametrize("broken", [S, E, S + b"\nx\n", b"x\n" + E + b"\n", E + b"\n" + S, S + b"\n" + E + b"\n" + S + b"\n" + E,
                                    S + b"\n" + S + b"\n" + E, S + b"\r\n", b"  " + S + b"  \n"])
def test_half_a_block_is_refused_and_left(project, broken):
    path = Path(project.path, "AGENTS.md")
    path.write_bytes(b"text\n" + broken)
    for command in ("init", "uninstall"):
        error = refusal(project, command)
        assert (error["exit"], error["code"], error["why"]) == (4, "refused", "half a block") and "line" in error["message"]
    assert path.read_bytes() == b"text\n" + broken


def test_every_origin_of_a_block_is_told_apart():
    words = list(pitboss.BLOCK_ORIGINS.values())
    assert len(words) == 2 and not any(a != b and a in b for a in words for b in words)
    for marks in MARKS.values():
        assert marks.start != marks.end and marks.what in MARKS
        assert all(re.fullmatch(r"<!-- .* -->|# .*", line) for line in (marks.start, marks.end, marks.comment))


# ------------------------------------------------------------------ init

def test_init_and_uninstall_leave_no_trace(project):
    path = Path(project.path, "AGENTS.md")
    assert pit(project, "init") == {"file": "AGENTS.md", "action": "created", "changed": True}
    assert path.read_text().startswith(AGENTS.start + "\n")
    assert pit(project, "init") == {"file": "AGENTS.md", "action": "unchanged", "changed": False}
    assert pit(project, "uninstall") == {"removed": ["AGENTS.md block"], "changed": True}
    assert not path.exists() and pit(project, "uninstall") == {"removed": [], "changed": False}
    path.write_bytes(b"mine")
    os.chmod(path, 0o666)
    assert pit(project, "init")["action"] == "updated" and path.read_bytes().startswith(b"mine\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    pit(project, "uninstall")
    assert path.read_bytes() == b"mine" and stat.S_IMODE(path.stat().st_mode) == 0o666
    assert [n for n in os.listdir(project.path) if not n.startswith(("file", ".git"))] == ["AGENTS.md"]


def test_an_old_block_is_brought_up_to_date(project):
    path = Path(project.path, "AGENTS.md")
    path.write_text(f"# Mine\n\n{AGENTS.start}\nan older manual\n{AGENTS.end}\n\nMore of mine\n")
    assert pit(project, "init")["action"] == "updated"
    text = path.read_text()
    assert text.startswith("# Mine\n\n") and text.endswith(f"{AGENTS.end}\n\nMore of mine\n") and "an older" not in text
    assert pit(project, "init")["changed"] is False
    pit(project, "uninstall")
    assert path.read_text() == "# Mine\n\n\nMore of mine\n"


def test_what_a_user_adds_to_a_file_of_pit_stays(project):
    path = Path(project.path, "AGENTS.md")
    pit(project, "init")
    path.write_text("# Mine\n" + path.read_text() + "and this\n")
    pit(project, "uninstall")
    assert path.read_text() == "# Mine\nand this\n"


def test_links_are_followed(project, tmp_path):
    real = tmp_path / "shared.md"
    real.write_text("shared\n")
    link = Path(project.path, "AGENTS.md")
    link.symlink_to(real)
    assert pit(project, "init") == {"file": "AGENTS.md", "action": "updated", "changed": True}
    assert link.is_symlink() and AGENTS.start in real.read_text()
    pit(project, "uninstall")
    assert link.is_symlink() and real.read_text() == "shared\n"
    real.unlink()
    assert pit(project, "init")["action"] == "created" and link.is_symlink() and real.exists()
    pit(project, "uninstall")
    assert link.is_symlink() and not real.exists()


def test_another_file(project):
    assert pit(project, "init", "--file", "docs.md")["file"] == "docs.md"
    assert pit(project, "uninstall", "--file", "docs.md")["removed"] == ["docs.md block"]
    assert refusal(project, "init", "--file", ".git")["exit"] == 2
    assert refusal(project, "init", "--file", "")["exit"] == 2
    assert refusal(project, "init", "--file", "no/such/folder.md")["exit"] == 5
    assert refusal(project, "init", env={"PIT_EPIC": "auth"})["why"] == "agent"


def test_the_manual_has_what_an_orchestrator_needs():
    text = pitboss.render_manual(pitboss.PIT_COMMANDS.values())
    rows = re.findall(r"^\| `([A-Z_]+)` \| .+ \|$", text, re.M)
    assert rows == REASONS == list(pitboss.PAUSE_ADVICE) == list(pitboss.PAUSES)
    for name, row in pitboss.PIT_COMMANDS.items():
        line = next(n for n in text.splitlines() if n.startswith(f"- `pit {name} {row.usage}".rstrip() + f"`: {row.help}"))
        assert all(flags[-1] in line for flags, _ in row.args if flags[-1].startswith("--")), "every flag is named"
    assert "{" not in re.sub(r'\{"error": \{"code", "message", "hint"\}\}', "", text), "no place is left unfilled"
    assert all(len(line) <= 110 for line in text.splitlines() if "|" not in line and not line.startswith("- "))
    assert len(text) < 14_000, "it is read in every session"


CONTRACT_COMMANDS = ("init start add status watch log pause resume stop teardown cleanup install-keybinding install-status "
                     "uninstall ticket daemon demo").split()


def test_what_the_manual_names_exists():
    """Its examples are commands of the contract, and those that are there parse."""
    text = pitboss.render_manual(pitboss.PIT_COMMANDS.values())
    shown = [line.strip() for line in text.splitlines() if line.startswith("    pit ")]
    shown += re.findall(r"`(pit [a-z][^`…]*)`", text)
    assert len(shown) > 20
    for line in shown:
        words = pitboss.split_typed(line)[1:]
        assert words[0] in CONTRACT_COMMANDS, line
        assert words[0] == "COMMAND" or any(n.split()[0] == words[0] for n in pitboss.PIT_COMMANDS), line
    for line in (s for s in shown if s.startswith("pit ticket add \"")):
        assert pitboss.parse_pit(pitboss.split_typed(line)[1:], "pit")[0] in pitboss.PIT_COMMANDS, line


# ------------------------------------------------------------------ tmux, the real one

class Server:
    """A tmux server of a test's own, that a plain `tmux` reaches."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.repo = home.repo()
        self.env = {**home.env, "TMUX_TMPDIR": str(home.root / "tmp"), "SHELL": "/bin/sh"}

    def tmux(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(["tmux", *args], env=self.env, capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def start(self) -> None:
        self.tmux("-f", "/dev/null", "new-session", "-d", "-s", "work", "-x", "120", "-y", "30", "cat")

    def pit(self, *argv, code: int = 0) -> dict:
        done = self.home.pitboss("pit", "-C", self.repo, *argv, check=code, env=self.env)
        return json.loads(done.stdout)

    def state(self) -> tuple:
        """Whatever pit might change."""
        return self.tmux("list-keys"), self.tmux("show-options", "-g")


@pytest.fixture
def server(home):
    if not shutil.which("tmux"):
        pytest.skip("tmux is not on PATH")
    place = Server(home)
    yield place
    place.tmux("kill-server", check=False)


def test_without_a_server_there_is_nothing_to_bind(server):
    for command in ("install-keybinding", "install-status"):
        error = server.pit(command, code=4)["error"]
        assert error["why"] == "no server" and "--persist" in error["hint"]
    assert server.pit("uninstall") == {"removed": [], "changed": False}


def test_without_tmux_its_absence_is_said(home, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    os.symlink(shutil.which("git"), bare / "git")
    home.repo()
    done = home.pitboss("pit", "-C", "repo", "install-status", env={"PATH": str(bare)}, check=2)
    assert json.loads(done.stdout)["error"] | {"hint": ""} == {
        "code": "missing_program", "message": "tmux is not on PATH", "hint": "", "program": "tmux"}


def test_keys_and_status_come_and_go(server):
    server.start()
    before = server.state()
    bound = {"bound": {"R": "resume", "H": "pause"}, "persisted": None}
    assert server.pit("install-keybinding") == {**bound, "changed": True}
    assert server.pit("install-status") == {"status": "#{@pit-status}", "persisted": None, "changed": True}
    middle = server.state()
    assert middle[0] != before[0] and middle[1].count("#{@pit-status}") == 1
    assert server.pit("install-keybinding") == {**bound, "changed": False}
    assert server.pit("install-status")["changed"] is False
    assert server.state() == middle
    assert server.pit("uninstall") == {"removed": ["key R", "key H", "status"], "changed": True}
    assert server.state() == before


USERS_KEY = """display-message "it's \\"theirs\\"; \\$x #{pane_id}" \\; run-shell -b 'true; echo "a;"'"""


def test_a_key_that_the_user_bound_is_theirs(server, tmp_path):
    server.start()
    (tmp_path / "theirs.conf").write_text(f"bind-key -r -T prefix R {USERS_KEY}\nset -g status-right 'ends;'\n")
    server.tmux("source-file", str(tmp_path / "theirs.conf"))
    before = server.state()
    error = server.pit("install-keybinding", code=4)["error"]
    assert error["why"] == "bound" and set(error["bound"]) == {"R"} and "--force" in error["hint"]
    assert server.state() == before, "not even the free key"
    server.pit("install-keybinding", "--force")
    server.pit("install-keybinding", "--force")
    server.pit("install-status")
    assert server.state()[0].count("#{q:@pit-epic}") == 2
    assert server.pit("uninstall")["removed"] == ["key R", "key H", "status"]
    assert server.state() == before


def test_what_is_persisted_is_what_tmux_reads(server):
    conf = server.home.root / "home" / ".tmux.conf"
    conf.write_text("set -g status-right 'mine'")
    assert server.pit("install-keybinding", "--persist") == {
        "bound": {"R": "resume", "H": "pause"}, "persisted": str(conf), "changed": True}
    assert server.pit("install-status", "--persist")["persisted"] == str(conf)
    assert server.pit("install-status", "--persist")["changed"] is False
    server.tmux("-f", str(conf), "new-session", "-d", "-s", "work", "cat")
    server.tmux("source-file", str(conf))
    assert server.tmux("show-options", "-gqv", "status-right") == "mine #{@pit-status}\n", "once, however often it is read"
    persisted = server.tmux("list-keys", "-T", "prefix", "R")
    assert server.pit("install-keybinding")["changed"] is False
    assert server.tmux("list-keys", "-T", "prefix", "R") == persisted, "the same words in the file and to the server"
    assert server.pit("uninstall")["removed"] == ["key R", "key H", "status"]
    assert conf.read_text() == "set -g status-right 'mine'"
    assert server.tmux("show-options", "-gqv", "status-right") == "mine\n" and "pit" not in server.state()[0]


def test_a_configuration_that_binds_the_key_is_the_users(server):
    config = server.home.root / "home" / ".config" / "tmux"
    config.mkdir(parents=True)
    conf = config / "tmux.conf"
    conf.write_text("bind-key R source-file ~/.x  # theirs\n")
    error = server.pit("install-keybinding", "--persist", code=4)["error"]
    assert error["bound"] == {"R": "bind-key R source-file ~/.x  # theirs"}
    assert server.pit("install-keybinding", "--persist", "--force")["persisted"] == str(conf)
    assert server.pit("uninstall")["removed"] == ["key R", "key H"]
    assert conf.read_text() == "bind-key R source-file ~/.x  # theirs\n"
    conf.unlink()
    server.pit("install-status", "--persist")
    made = server.home.root / "home" / ".tmux.conf"
    assert made.exists() and server.pit("uninstall")["removed"] == ["status"] and not made.exists()


@pytest.mark.parametrize("line, key", [
    ("bind R x", "R"), ("bind-key -r R x", "R"), ("  bind -T prefix 'H' x", "H"), ("bind -N 'a note' R x", "R"), ("bind -n R x", ""),
    ("bind -T copy-mode R x", ""), ("# bind R x", ""), ("unbind R", ""), ("bind", ""), ("set -g x 'bind R", ""), ("bind r R", "r"),
    ("bind R run 'it", "R")])
def test_which_key_a_line_binds(line, key):
    assert pitboss.bound_key(line) == key


def test_a_key_acts_on_the_epic_of_its_window(server, tmp_path):
    """tmux puts in epic and project, however they are spelled, and sh takes them as they are."""
    server.start()
    seen = tmp_path / "seen"
    stand = server.home.root / "it's a bin" / "pit"
    stand.parent.mkdir()
    stand.write_text(f"#!/bin/sh\nprintf '%s|' \"${{PIT_EPIC-none}}\" \"$@\" > {seen}.new; mv {seen}.new {seen}\n")
    stand.chmod(0o755)
    script = "import sys, pitboss\nsys.argv[0] = sys.argv.pop(1)\nprint(pitboss.key_script(pitboss.PIT_KEYS['R']))"
    made = subprocess.run([sys.executable, "-c", script, str(stand)], capture_output=True, text=True, check=True,
                          env={**server.env, "PYTHONPATH": str(Path(pitboss.__file__).parent)}).stdout.strip()
    server.tmux("set-option", "-g", "@script", made)
    server.tmux("set-environment", "-g", "PIT_EPIC", "who-started-the-server")
    server.tmux("set-option", "-w", "-t", "work", "@pit-epic", "repo-a.1")
    server.tmux("set-option", "-w", "-t", "work", "@pit-project", "/tmp/my $(repo) 'x")
    server.tmux("run-shell", "-b", "-t", "work:", server.tmux("show-options", "-gqv", "@script").rstrip("\n"))
    wait_for(seen.exists, 20, "the key's command")
    assert seen.read_text() == "none|-C|/tmp/my $(repo) 'x|resume|--|repo-a.1|"


def test_every_exit_code_of_the_ticket_loop_is_told_in_its_own_words():
    assert {"ok", *pitboss.PIT_WORDS.values()} == set(pitboss.PIT_EXITS)
    told = pitboss.exit_codes_text(pitboss.PIT_EXITS)
    assert "   4  something would be lost" in told and "tree --check" not in told and "  143" not in told
