"""Completions in real shells, installation, help, and what a shell can do to a command line."""
from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tools import ISOLATED, PYTHON, Home, wait_for

import pitboss

ODD = "odd 'dir\" $x"                  # a folder that every shell must quote
MANIFEST = "my $manifest's file.toml"
RUN = """[run]
name = "first run"
[defaults]
agent = "demo"
use_worktree = false
""" + "".join(f'[[task]]\nid = "{name}"\ndirectory = "."\nprompt = "$ say x"\n' for name in ("alpha", "beta"))


# ---- a user who has installed it


class User(Home):
    """A home with pitboss installed in ~/bin, and a stand-in on PATH that records how it is called.

    The stand-in hands `complete` on to the installed program, which is what the shells ask.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.bin = root / "home" / "bin"
        self.pitboss("install", self.bin, check=0)
        self.called = root / "called"
        stand_in = root / "stand-in"
        stand_in.mkdir()
        real = shlex.quote(str(self.bin / "pitboss"))
        (stand_in / "pitboss").write_text(
            f'#!/bin/sh\n[ "$1" != complete ] || exec {real} "$@"\n'
            f'printf "%s\\0" "$@" >{root}/called.new; mv {root}/called.new {root}/called\n')
        (stand_in / "pitboss").chmod(0o755)
        self.env["PATH"] = f"{stand_in}:{self.env['PATH']}"
        self.env |= {"LC_ALL": "C.UTF-8", "TERM": "xterm", "INPUTRC": os.devnull}
        self.work = root / "work"
        self.work.mkdir()
        (self.work / MANIFEST).write_text(RUN)
        (self.work / ODD / "inner").mkdir(parents=True)
        (self.work / "zz.toml").write_text("")


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """An installed pitboss with one run in the usual place and one in a folder with an odd name."""
    user = User(tmp_path_factory.mktemp("shells"))
    user.pitboss("dispatch", "-q", user.work / MANIFEST, check=0)
    user.pitboss("dispatch", "-q", user.work / MANIFEST, "--run-dir", user.work / ODD / "runs", check=0)
    user.id = user.run_dir().name
    user.other = next((user.work / ODD / "runs").glob("0*")).name
    yield user
    user.end_everything()


def type_in(user: User, argv: list[str], setup: str, keys: str) -> list[str]:
    """What the stand-in was called with after `keys` were typed at a shell's prompt."""
    user.called.unlink(missing_ok=True)
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(user.work)
        os.execve(argv[0], argv, user.env)
    seen = b""

    def shows(what: bytes) -> bool:
        nonlocal seen
        if select.select([fd], [], [], 0)[0]:
            seen += os.read(fd, 65536)
        return what in seen

    try:
        os.write(fd, setup.encode() + b"\r")
        wait_for(lambda: shows(b"READY> "), 20, "the prompt")
        os.write(fd, keys.encode() + b"\r")
        wait_for(lambda: shows(b"\0") or user.called.exists(), 20, f"the command; the shell shows {seen[-200:]!r}")
        return user.called.read_bytes().decode().split("\0")[:-1]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(fd)
        os.waitpid(pid, 0)


def shell_of(name: str) -> str:
    """The path of a shell; skips the test where there is none."""
    path = os.environ.get(f"PITBOSS_TEST_{name.upper()}") or shutil.which(name)
    return path or pytest.skip(f"{name} is not on PATH, and PITBOSS_TEST_{name.upper()} does not name it")


TYPED = [
    # keys after the program's name; what the program is called with
    ("sta\tx", ["status", "x"]),
    ("dispatch --dr\tm\t", ["dispatch", "--dry-run", MANIFEST]),
    ("dispatch --bac\t--run-dir od\t", ["dispatch", "--background", "--run-dir", ODD + "/"]),
    ("dispatch --run-dir=od\t", ["dispatch", f"--run-dir={ODD}/"]),
    ("status ID\t--js\t", ["status", "FULL", "--json"]),
    ("attach ID\ta\t", ["attach", "FULL", "alpha"]),
    ("attach --lines 3 ID\tb\t", ["attach", "--lines", "3", "FULL", "beta"]),
    ("status --run-dir od\truns 0\t", ["status", "--run-dir", ODD + "/runs", "OTHER"]),
    ("completions po\t", ["completions", "powershell"]),
]


PROMPT = "PS1='REA''DY> '"         # as it is typed, it does not look like the prompt


def check_typed(user: User, argv: list[str], setup: str, keys: str, expected: list[str]) -> None:
    places = {"FULL": user.id, "OTHER": user.other}
    expected = [places.get(word, word) for word in expected]
    typed = type_in(user, argv, setup, "pitboss " + keys.replace("ID", user.id[:10]))
    assert [w.rstrip("/") for w in typed] == [w.rstrip("/") for w in expected]


@pytest.mark.real
@pytest.mark.parametrize("keys, expected", TYPED)
def test_bash_completes_what_is_typed(user, keys, expected):
    script = user.root / "data" / "bash-completion" / "completions" / "pitboss"
    check_typed(user, [shell_of("bash"), "--norc", "--noprofile", "-i"], f"source {script}; {PROMPT}", keys, expected)


@pytest.mark.real
@pytest.mark.parametrize("keys, expected", TYPED)
def test_zsh_completes_what_is_typed(user, keys, expected):
    folder = user.root / "data" / "zsh" / "site-functions"
    setup = f"fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -d {user.root}/zcompdump; {PROMPT}"
    check_typed(user, [shell_of("zsh"), "-f", "-i"], setup, keys, expected)


@pytest.mark.real
@pytest.mark.parametrize("keys, expected", [row for row in TYPED if "=" not in row[0] and "od\truns" not in row[0]])
def test_elvish_completes_what_is_typed(user, keys, expected):
    script = user.root / "pitboss.elv"
    script.write_text(user.pitboss("completions", "elvish").stdout)
    setup = f"eval (slurp < {script}); set edit:prompt = {{ put REA''DY'> ' }}"
    check_typed(user, [shell_of("elvish"), "-norc"], setup, keys + "\r", expected)      # the first Enter accepts


@pytest.mark.real
@pytest.mark.parametrize("typed, expected", [
    ("sta", {"status"}), ("dispatch --dr", {"--dry-run"}), ("dispatch my", {MANIFEST}),
    ("status --run-dir od", {ODD + "/"}), ("attach ID ", {"alpha", "beta"}), ("status ID", {"FULL"}),
    ("completions e", {"elvish"}), ("status --run-dir=od", {f"--run-dir={ODD}/"}),
    ("-", {"--help", "-h", "--version", "-V"}),
    (f"status --run-dir {shlex.quote(ODD)}/runs ", {"OTHER"}), ("dispatch --help ", {MANIFEST, ODD + "/", "zz.toml"}),
])
def test_fish_offers_what_fits(user, typed, expected):
    script = user.root / "data" / "fish" / "vendor_completions.d" / "pitboss.fish"
    line = "pitboss " + typed.replace("ID", user.id[:10])
    argv = [shell_of("fish"), "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", str(script), line]
    done = subprocess.run(argv, env=user.env, cwd=user.work, text=True, capture_output=True, timeout=30)
    places = {"FULL": user.id, "OTHER": user.other}
    assert done.stderr == ""
    offered = sorted(row.partition("\t")[0] for row in done.stdout.splitlines())
    assert offered == sorted(places.get(word, word) for word in expected)
