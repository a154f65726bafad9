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


@pytest.mark.real
def test_bash_finds_the_script_where_it_was_installed(user):
    package = Path("/usr/share/bash-completion/bash_completion")
    if not package.exists():
        pytest.skip("the package bash-completion is not installed")
    check_typed(user, [shell_of("bash"), "--norc", "--noprofile", "-i"], f"source {package}; {PROMPT}",
                "completions po\t", ["completions", "powershell"])


@pytest.mark.real
def test_fish_finds_the_script_where_it_was_installed(user):
    argv = [shell_of("fish"), "-c", "complete -C 'pitboss completions po'"]
    done = subprocess.run(argv, env=user.env, cwd=user.work, text=True, capture_output=True, timeout=30)
    assert done.stdout.split() == ["powershell"]


# ---- what is derived from the tables of commands and names


NEW = '''import sys
sys.argv[0] = "pitboss"
import pitboss

def cmd_shuffle(options):
    """Shuffle the cards."""
    return "ok"

row = pitboss.Cli("shuffle", cmd_shuffle, "RUN", (
    pitboss.COMMANDS["status"].args[0], (("--twice",), {"action": "store_true", "help": "do it again"}),
    (("--suit",), {"choices": ("clubs", "hearts"), "help": "only " + "these " * 40})), "mix it's cards", "shuffle 0192f3")
pitboss.COMMANDS = {**pitboss.COMMANDS, "shuffle": row}
pitboss.NAMES = {**pitboss.NAMES, "card-table": pitboss.Name("card-table", ("shuffle",))}
'''


def run_new(home: Home, *args: str, name: str = "pitboss") -> str:
    """What a pitboss with one command and one name more prints."""
    script = NEW.replace('"pitboss"', repr(name), 1) + f"sys.exit(pitboss.main({list(args)!r}))"
    env = {**home.env, "PYTHONPATH": str(Path(pitboss.__file__).parent), "COLUMNS": "200"}
    done = subprocess.run([PYTHON, "-B", "-c", script], env=env, text=True, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", pitboss.SHELLS)
def test_a_new_command_and_flag_are_completed_by_every_shell(home, shell):
    script = run_new(home, "completions", shell)
    quoted = {"bash": "shuffle", "fish": "'mix it\\'s cards'", "zsh": "'shuffle:mix it'\\''s cards'"}
    assert quoted.get(shell, "mix it''s cards") in script and not re.search(r"@[A-Z]+@", script)
    for flag in ("--twice", "--suit"):
        assert flag in script or f"'{flag.lstrip('-')}'" in script
    assert all(flag in run_new(home, "complete", "--", "shuffle", "--") for flag in ("--twice", "--suit"))
    assert run_new(home, "complete", "--", "shuffle", "--suit", "h") == "words\nhearts\n"


def test_a_new_command_and_flag_are_in_the_help_and_in_the_reference(home):
    assert re.search(r"^  shuffle RUN +mix it's cards$", run_new(home, "--help"), re.M)
    text = run_new(home, "shuffle", "--help")
    assert text.startswith("Example: pitboss shuffle 0192f3\n\nShuffle the cards.\n\nusage: ")
    assert max(map(len, text.splitlines())) <= 100
    assert "--twice" in text and "do it again" in text and "{clubs,hearts}" in text
    assert "| `shuffle RUN` | mix it's cards |" in run_new(home, "reference")


def test_a_new_name_stands_for_the_beginning_of_a_command_line(home):
    assert run_new(home, "--help", name="card-table").startswith("Example: card-table shuffle 0192f3\n")
    assert run_new(home, "--version", name="card-table") == f"card-table {pitboss.VERSION}\n"
    assert run_new(home, "complete", "--", "--tw", name="card-table") == "words\n--twice\tdo it again\n"
    script = run_new(home, "completions", "bash", name="card-table")
    assert "complete -o default -F _card_table card-table" in script and "validate" not in script


def test_every_argument_that_takes_a_value_says_what_can_be_typed():
    rows = [(c.name, names, settings) for c in pitboss.COMMANDS.values() if c.help for names, settings in c.args]
    silent = [(name, names) for name, names, settings in rows if pitboss.takes_value(settings)
              and not settings.get("choices") and settings.get("metavar") not in pitboss.TYPED]
    assert silent == [], "give it choices, or its metavar a row in TYPED"
    used = {settings.get("metavar") for _, _, settings in rows}
    assert [metavar for metavar in pitboss.TYPED if metavar not in used] == []


@pytest.mark.parametrize("shell, check", [
    ("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "-n"])])
def test_the_script_of_a_shell_is_whole(home, shell, check):
    script = home.root / "script"
    script.write_text(home.pitboss("completions", shell, check=0).stdout)
    subprocess.run([shell_of(shell), *check[1:], script], check=True, timeout=30)


# ---- what can come next


@pytest.mark.parametrize("line, expected", [
    ("pitboss sta", ("words", ["status"])),
    ("pitboss ", ("words", [c.name for c in pitboss.COMMANDS.values() if c.help])),
    ("pitboss dispatch ", ("files", [])),
    ("pitboss dispatch 'un closed", ("files", [])),
    ("pitboss dispatch m.toml ", ("words", [])),
    ("pitboss dispatch m.toml --run-dir ", ("folders", [])),
    ("pitboss dispatch m.toml --run-dir=x", ("folders", [])),
    ("pitboss attach --lines ", ("words", [])),
    ("pitboss attach --li", ("words", ["--lines"])),
    ("pitboss nonsense ", ("words", [])),
    ("pitboss completions f", ("words", ["fish"])),
    ("", ("words", [c.name for c in pitboss.COMMANDS.values() if c.help])),
])
def test_what_can_come_next(line, expected):
    kind, found = pitboss.offer_words(pitboss.split_typed(line)[1:])
    assert (kind, [word for word, _ in found]) == expected


def test_runs_are_offered_newest_first_with_their_names(home):
    ids = [f"0192f3a0-0000-7000-8000-00000000000{n}" for n in range(3)]
    for n, run_id in enumerate(ids):
        (home.runs / run_id).mkdir(parents=True)
        (home.runs / run_id / "meta.json").write_text(["[]", "{", '{"manifest_name": "a\\tb\\u001b[2J"}'][n])
    (home.runs / "stray").mkdir()
    lines = home.pitboss("complete", "--", "status", "0192", check=0).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["words", *reversed(ids)]
    assert [line.split("\t")[1].split(",")[0] for line in lines[1:]] == ["a b", "-", "-"]
    (home.runs / ids[0] / "tasks" / "late").mkdir(parents=True)
    (home.runs / ids[0] / "resolved.json").write_text('{"tasks": [{"id": "early"}, 3], "lead": null}')
    assert home.pitboss("complete", "--", "attach", ids[0], "", check=0).stdout == "words\nearly\nlate\n"
    assert home.pitboss("complete", "--", "attach", "../..", "", check=0).stdout == "words\n"
    assert home.pitboss("complete", "--", "attach", "0192", "", check=0).stdout == "words\n", "ambiguous"


def test_a_folder_of_runs_is_meant_as_the_shell_would_read_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    (tmp_path / "$HOME").mkdir()
    meant = {"~/runs": "/h/runs", "$HOME/runs": "/h/runs", "$HOME": str(tmp_path / "$HOME"), "r": str(tmp_path / "r")}
    assert {said: pitboss.typed_folder({"runs_dir": said}) for said in meant} == meant


def test_words_to_be_completed_are_no_flags_of_ours(home):
    assert home.pitboss("complete", "--", "status", "--ver", check=0).stdout == "words\n--version\tprint the version\n"
    assert home.pitboss("complete", "--", "status", "--version", check=0).stdout.startswith("words\n--version\t")
    assert home.pitboss("complete", "--", "status", "--help", check=0).stdout.startswith("words\n--help\t")


# ---- installation


@pytest.fixture
def bare(home):
    """A user without anything of ours in the environment but a home and the usual programs."""
    home.env = {"HOME": str(home.root / "home"), "PATH": home.env["PATH"], "TMPDIR": home.env["TMPDIR"]}
    return home


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content; None for folders and what leads nowhere."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def run_installed(home: Home, *args, folder: Path | None = None, **options) -> subprocess.CompletedProcess:
    program = (folder or home.root / "home" / ".local" / "bin") / "pitboss"
    return subprocess.run([program, *map(str, args)], text=True, capture_output=True, timeout=60,
                          **{"env": home.env, "cwd": home.root, **options})


def test_what_is_installed_works_alone_and_goes_again_without_a_trace(bare, tmp_path):
    copy = tmp_path / "passing" / "pitboss.py"
    copy.parent.mkdir()
    shutil.copy(pitboss.__file__, copy)
    before = tree(bare.root / "home")
    done = subprocess.run([PYTHON, *ISOLATED, copy, "install"], env=bare.env, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.rmtree(copy.parent)
    assert "is not on PATH" in done.stdout and "export PATH=" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("installed"):
            assert Path(line.split(maxsplit=1)[1]).is_file()
    assert run_installed(bare, "version", env={}).stdout == f"pitboss {pitboss.VERSION}\n"
    (bare.root / "m.toml").write_text(RUN)
    assert run_installed(bare, "dispatch", "-q", bare.root / "m.toml").returncode == 0
    done = run_installed(bare, "install", "--remove")
    assert done.returncode == 0
    after = {k: v for k, v in tree(bare.root / "home").items() if not k.startswith(".local/share/pitboss")}
    assert {k for k in after if k not in before} == {".local", ".local/share"}, "they hold the run"


def test_the_launcher_starts_bytecode_and_does_without_it(bare):
    bare.pitboss("install", check=0)
    caches = bare.root / "home/.local/bin/.pitboss/__pycache__"
    (compiled,) = caches.iterdir()
    compiled.write_bytes(b"\xff\xff\r\n" + compiled.read_bytes()[4:])        # of a Python with another magic number
    assert run_installed(bare, "version").stdout == f"pitboss {pitboss.VERSION}\n"
    shutil.rmtree(caches)
    assert run_installed(bare, "version").stdout == f"pitboss {pitboss.VERSION}\n"
    assert list(caches.iterdir()), "Python has compiled it again, for the next start"
    bare.pitboss("install", "--remove", check=0)
    assert not (bare.root / "home/.local").exists()


def test_the_launcher_finds_another_python_when_its_own_is_gone(bare, tmp_path):
    python = tmp_path / "gone" / "python3"
    python.parent.mkdir()
    python.symlink_to(PYTHON)
    subprocess.run([python, *ISOLATED, pitboss.__file__, "install"], env=bare.env, check=True, capture_output=True)
    launcher = bare.root / "home/.local/bin/pitboss"
    text = launcher.read_text()
    launcher.write_text(re.sub(r"for python in \S+", "for python in /nowhere/python3", text))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(os.path.realpath(PYTHON))
    done = run_installed(bare, "version", env={**bare.env, "PATH": str(tmp_path / "bin")})
    assert done.stdout == f"pitboss {pitboss.VERSION}\n"
    done = run_installed(bare, "version", env={**bare.env, "PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "") and "/nowhere" not in text and "no Python" in done.stderr


def test_installing_again_replaces_what_was_installed(bare):
    bare.pitboss("install", check=0)
    newer = bare.root / "pitboss.py"
    newer.write_text(Path(pitboss.__file__).read_text().replace(f'"{pitboss.VERSION}"', '"9.9.9"'))
    stale = bare.root / "home/.local/bin/.pitboss/__pycache__/pitboss.cpython-399.pyc"
    stale.write_bytes(b"of another Python")
    launcher = bare.root / "home/.local/bin/pitboss"
    inode = launcher.stat().st_ino
    subprocess.run([PYTHON, *ISOLATED, newer, "install"], env=bare.env, check=True, capture_output=True)
    assert run_installed(bare, "version").stdout == "pitboss 9.9.9\n"
    assert not stale.exists() and launcher.stat().st_ino != inode, "a new file was renamed to its place"
    assert not [p for p in (bare.root / "home").rglob("*.new")]
    bare.pitboss("install", "--remove", check=0)
    assert not (bare.root / "home/.local").exists()


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: p.mkdir(),
                                  lambda p: p.symlink_to("/nowhere"), lambda p: p.symlink_to(pitboss.__file__)])
def test_somebody_elses_program_is_not_touched(bare, make):
    folder = bare.root / "home" / "bin"
    folder.mkdir()
    make(folder / "pitboss")
    before = tree(bare.root / "home")
    done = bare.pitboss("install", folder, check=4)
    assert str(folder / "pitboss") in done.stderr and "it stays" in done.stderr
    assert tree(bare.root / "home") == before


def test_what_a_user_has_changed_is_left_and_said(bare):
    bare.pitboss("install", check=0)
    completions = bare.root / "home/.local/share/fish/vendor_completions.d/pitboss.fish"
    completions.write_text("# mine\n")
    done = bare.pitboss("install", check=0)
    assert f"left       {completions}" in done.stdout
    (bare.root / "home/.local/bin/pitboss").write_text("#!/bin/sh\n")
    bare.pitboss("install", check=4)
    done = bare.pitboss("install", "--remove", check=0)
    for path in (completions, bare.root / "home/.local/bin/pitboss"):
        assert path.exists() and f"left       {path}: it was changed since" in done.stdout
    bare.pitboss("install", "--remove", check=3)


def test_a_link_in_place_of_what_was_installed_is_somebody_elses(bare):
    bare.pitboss("install", check=0)
    launcher = bare.root / "home/.local/bin/pitboss"
    launcher.rename(bare.root / "home" / "moved")
    launcher.symlink_to(bare.root / "home" / "moved")
    bare.pitboss("install", check=4)
    bare.pitboss("install", "--remove", check=0)
    assert launcher.is_symlink() and launcher.exists()


def test_an_installation_that_broke_off_can_be_taken_away(monkeypatch, tmp_path):
    def write_until_the_launcher(path, *args, **options):
        if path.endswith("bin/pitboss"):
            raise OSError(28, "No space left on device", path)
        return write(path, *args, **options)

    write = pitboss.write_file
    monkeypatch.setattr(pitboss, "write_file", write_until_the_launcher)
    with pytest.raises(OSError):
        pitboss.install_to(str(tmp_path / "bin"), {"HOME": str(tmp_path)})
    assert list(tmp_path.rglob("pitboss.fish")) and list(tmp_path.rglob("pitboss.py"))
    pitboss.remove_installed(str(tmp_path / "bin"))
    assert list(tmp_path.iterdir()) == []


def test_modules_of_other_folders_are_not_taken_for_ours(bare):
    bare.pitboss("install", check=0)
    (bare.root / "json.py").write_text("raise SystemExit('a stranger')")
    (bare.root / "home/.local/bin/json.py").write_text("raise SystemExit('a stranger')")
    done = run_installed(bare, "list", "--json", env={**bare.env, "PYTHONPATH": str(bare.root)})
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/self"), reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_the_environments_fault(bare):
    folder = Path("/proc") if os.path.exists("/proc/self") else bare.root / "locked"
    if not folder.exists():
        folder.mkdir(mode=0o555)
    done = bare.pitboss("install", folder, check=5)
    assert str(folder) in done.stderr and "pitboss install DIR" in done.stderr and "Traceback" not in done.stderr
    assert tree(bare.root / "home") == {}


def test_completions_that_cannot_be_written_are_left_out(bare):
    (bare.root / "home/.local").mkdir()
    (bare.root / "home/.local/share").write_text("a file")
    done = bare.pitboss("install", bare.root / "home/bin", check=0)
    assert done.stdout.count("left out ") == 3 * len(pitboss.NAMES)
    assert run_installed(bare, "version", folder=bare.root / "home/bin").returncode == 0


def test_the_installed_program_is_called_by_any_path_and_link(bare):
    bare.pitboss("install", bare.root / "home/my bin", check=0)
    link = bare.root / "home" / "pb"
    link.symlink_to(bare.root / "home/my bin/pitboss")
    done = subprocess.run([link, "--help"], env=bare.env, text=True, capture_output=True)
    assert done.stdout.startswith("Example: pb demo\n"), done.stderr
    done = subprocess.run(["sh", "-c", "PATH=\"$HOME/my bin:$PATH\"; pitboss completions zsh"], env=bare.env, text=True,
                          capture_output=True)
    assert done.stdout.startswith("#compdef pitboss\n"), done.stderr
    advice = bare.pitboss("install", bare.root / "home/my bin",
                          env={"PATH": f"{bare.root}/home/my bin:{bare.env['PATH']}"}).stdout
    assert "PATH" not in advice.replace("FPATH", "")


# ---- help, read by a person


@pytest.mark.parametrize("name", ["", *(c.name for c in pitboss.COMMANDS.values() if c.help)])
def test_help_is_an_example_a_sentence_options_and_exit_codes(monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    text = pitboss.make_parser("pitboss", name).format_help()
    example, sentence, usage = text.split("\n\n")[:3]
    assert re.fullmatch(r"Example: pitboss " + (name + r"\b.*" if name else r"\w+"), example)
    assert re.fullmatch(r"[A-Z][^\n]*[.]", sentence) and usage.startswith(f"usage: pitboss {name}".rstrip())
    assert text.index("usage:") < text.index("options:") < text.index("exit codes:")
    for code, meaning in pitboss.EXIT_CODES.values():
        assert re.search(rf"^ +{code}  {re.escape(meaning)}$", text, re.M)
    for names, _ in pitboss.COMMANDS[name].args if name else ():
        assert all(re.search(rf"^ .*{n}\b" if n.startswith("-") else ".", text, re.M) for n in names)
    assert [line for line in text.splitlines() if pitboss.cell_width(line) > 100] == []


def test_help_of_a_command_is_had_in_every_usual_way(home):
    told = [home.pitboss(*line.split(), check=0).stdout for line in ("status --help", "status -h", "help status")]
    assert told[0] == told[1] == told[2] and "pitboss.py status 0192f3" in told[0]


@pytest.mark.parametrize("line, meant", [
    ("stauts", "status"), ("dispach m.toml", "dispatch"), ("help lst", "list"), ("status x --jsn", "--json"),
    ("list --actve", "--active"), ("completions bsh", "bash"), ("completions powershel", "powershell")])
def test_a_near_miss_names_what_was_meant(home, line, meant):
    done = home.pitboss(*line.split(), check=2)
    assert f"did you mean {meant}?" in done.stderr and "--help" in done.stderr and done.stdout == ""


def test_what_is_no_near_miss_suggests_nothing(home):
    assert "did you mean" not in home.pitboss("xyzzy", check=2).stderr


# ---- what a shell can do to standard output and to the environment


READING = ["version", "--help", "status --help", "list", "list --json", "status RUN", "status RUN --json", "reference",
           "attach RUN alpha", "completions bash", "complete -- sta", "doctor", "validate m.toml"]


@pytest.fixture(scope="module")
def dealt(tmp_path_factory):
    """A home with one finished run."""
    home = Home(tmp_path_factory.mktemp("dealt"))
    home.pitboss("dispatch", "-q", home.manifest(RUN), check=0)
    yield home
    home.end_everything()


def words_of(home: Home, line: str) -> list[str]:
    return line.replace("RUN", home.run_dir().name).split()


@pytest.mark.parametrize("line", READING)
def test_a_pipe_that_nobody_reads_ends_it_quietly(dealt, line):
    reader, writer = os.pipe()
    os.close(reader)
    done = dealt.start(*words_of(dealt, line), stdout=writer)
    os.close(writer)
    assert (done.communicate(timeout=60)[1], done.returncode) == ("", 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("line", READING)
def test_a_full_disk_is_said_in_one_line(dealt, line):
    unbuffered = {"PYTHONUNBUFFERED": "1"} if "help" in line else {}      # argparse hides what a write raises
    with open("/dev/full", "wb") as full:
        done = dealt.start(*words_of(dealt, line), stdout=full, env=unbuffered)
        assert done.communicate(timeout=60)[1] == "pitboss: standard output: No space left on device\n"
    assert done.returncode == 5


@pytest.mark.parametrize("line", [*READING, "dispatch -q m.toml"])
def test_an_empty_environment_is_enough(dealt, line):
    env = {"PATH": dealt.env["PATH"]}
    runs = ["--run-dir", str(dealt.runs)] if re.match(r"(list|status R|attach|dispatch|doctor)", line) else []
    done = subprocess.run(dealt.argv(*words_of(dealt, line), *runs), env=env, cwd=dealt.root, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr and done.stdout


@pytest.mark.parametrize("env, place", [
    ({"HOME": "/h", "XDG_DATA_HOME": "/d"}, "/d/pitboss"),
    ({"HOME": "/h", "XDG_DATA_HOME": "d"}, "/h/.local/share/pitboss"),
    ({"HOME": "/h", "XDG_DATA_HOME": ""}, "/h/.local/share/pitboss"), ({"HOME": "/h"}, "/h/.local/share/pitboss")])
def test_data_lies_where_the_environment_says(env, place):
    assert pitboss.data_folder(env) == place


@pytest.mark.parametrize("env", [{}, {"HOME": ""}, {"HOME": "here"}])
def test_without_a_home_of_the_environment_the_system_is_asked(monkeypatch, env):
    import pwd

    assert pitboss.home_folder(env) == pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(pitboss.EnvironmentFault, match="HOME is not set"):
        pitboss.home_folder(env)


def on_terminal(home: Home, args: list, columns: int, **env: str) -> str:
    """What a command shows on a terminal of that width and 24 lines."""
    import fcntl
    import struct
    import termios

    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(home.root)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        argv = home.argv(*args)
        os.execve(argv[0], argv, {**home.env, "TERM": "xterm", "LC_ALL": "C.UTF-8", **env})
    shown, end = b"", time.monotonic() + 30
    try:
        while time.monotonic() < end and select.select([fd], [], [], 30)[0]:
            shown += os.read(fd, 65536)
    except OSError:                  # EIO: the program has ended
        pass
    os.close(fd)
    assert os.waitpid(pid, 0)[1] == 0, shown
    return shown.decode()


def widths(text: str) -> list[int]:
    return [pitboss.cell_width(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)) for line in text.splitlines()]


@pytest.mark.parametrize("columns", [1, 20, 80])
@pytest.mark.parametrize("line", ["list", "status RUN"])
def test_tables_fit_a_narrow_terminal(dealt, line, columns):
    shown = on_terminal(dealt, words_of(dealt, line), columns)
    assert shown.strip() and max(widths(shown)) <= columns


@pytest.mark.parametrize("columns", [1, 20])
def test_the_live_table_fits_a_narrow_terminal(home, columns):
    prompt = f"$ say {'words ' * 20}\\n$ sleep 0.7"
    agents = "".join(f'[[task]]\nid = "a-long-name-{n}"\ndirectory = "."\nprompt = "{prompt}"\n' for n in range(30))
    home.manifest('[run]\nmax_parallel = 30\n[defaults]\nagent = "demo"\nuse_worktree = false\n' + agents)
    shown = on_terminal(home, ["dispatch", "m.toml"], columns)
    frames = re.findall(r"(?:^|\x1b\[J)((?:[^\x1b]*\r\n)+)(?=\x1b\[(\d+)A)", shown)
    assert frames, "it was drawn more than once"
    for frame, up in frames:
        tail = frame.split("\r\n")[-1 - int(up):-1]
        assert len(tail) == int(up) < 24 and max(widths("\n".join(tail))) < max(columns, 2)


@pytest.mark.parametrize("env, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True),
                                           ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_that_want_it(dealt, env, coloured):
    assert ("\x1b[" in on_terminal(dealt, words_of(dealt, "status RUN"), 80, **env)) == coloured
    assert "\x1b[" not in dealt.pitboss(*words_of(dealt, "status RUN"), env=env, check=0).stdout


@pytest.mark.parametrize("run", ["../../etc", "/etc/passwd", "0192/../..", "~", "-x", "a\nb", "\x1b[2J", "é", ""])
def test_an_id_that_looks_like_anything_else_is_refused(dealt, run):
    done = dealt.pitboss("status", *(["--"] if run.startswith("-") else []), run)
    assert done.returncode == 3 and done.stdout == "" and "Traceback" not in done.stderr and "\x1b" not in done.stderr
    assert "is not a run id" in done.stderr
