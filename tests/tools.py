"""What the tests share: running the file as a program, repositories, waiting for an event.

Nothing here imports pitboss: a test that calls its functions does that itself.
"""
from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PITBOSS = ROOT / "pitboss.py"
PYTHON = os.environ.get("PITBOSS_TEST_PYTHON", sys.executable)
# -S: what a machine's site-packages do at every start (40 ms on one with two .pth files) is not under test
ISOLATED = os.environ.get("PITBOSS_TEST_PYTHON_FLAGS", "-S").split()


@functools.lru_cache(maxsize=1)
def program() -> Path:
    """A launcher, named as the file itself, of a compiled copy of it: Python compiles a started script every time.

    PITBOSS_TEST_PLAIN=1 starts the file itself everywhere.
    """
    if os.environ.get("PITBOSS_TEST_PLAIN"):
        return PITBOSS
    folder = Path(tempfile.mkdtemp(prefix="pitboss-compiled-"))
    folder.chmod(0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compiled(PITBOSS.read_bytes(), folder)


def compiled(source: bytes, folder: Path) -> Path:
    """A launcher in `folder` of this source, compiled once."""
    (folder / "lib").mkdir(exist_ok=True)
    (folder / "lib" / "pitboss.py").write_bytes(source)
    subprocess.run([PYTHON, "-c", "import py_compile, sys; py_compile.compile(sys.argv[1], doraise=True, invalidation_mode="
                    "py_compile.PycInvalidationMode.UNCHECKED_HASH)", str(folder / "lib" / "pitboss.py")], check=True)
    launcher = folder / "pitboss.py"
    launcher.write_text(f"import sys\nsys.path.insert(0, {str(folder / 'lib')!r})\nfrom pitboss import main\nsys.exit(main())\n")
    return launcher


# Commands that only read, or tell a dispatcher something: a short one takes mostly what Python and the imports take.
SHORT = frozenset("validate status list init schema tree diff prune doctor completions complete reference version --version help "
                  "--help -h attach report policy approvals approve reject pause continue reprompt agents-md man".split())
FORKER = """
import argparse, asyncio, json, os, socket, sys, time, tomllib, traceback
import pitboss
link = socket.socket(fileno=int(sys.argv[1]))
while True:
    data, fds, _, _ = socket.recv_fds(link, 1 << 17, 3)
    if not data:
        break
    asked, pid = json.loads(data), os.fork()
    if pid == 0:
        link.close()
        for n, fd in enumerate(fds):
            os.dup2(fd, n)
            os.close(fd)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        time.tzset()
        sys.argv, code = asked["argv"], 1
        try:
            code = pitboss.main()
            sys.stdout.flush()
        except SystemExit as e:
            sys.stdout.flush()
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    for fd in fds:
        os.close(fd)
    link.send(b"%d" % pid)
    link.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class Forker:
    """A process that has the compiled program in it and forks one of its own for each short command."""

    def __init__(self) -> None:
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.busy = threading.Lock()
        lib = program().parent / "lib"
        subprocess.Popen([PYTHON, *ISOLATED, "-c", f"import sys; sys.path.insert(0, {str(lib)!r})\n{FORKER}", str(theirs.fileno())],
                         pass_fds=[theirs.fileno()], env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, stdin=subprocess.DEVNULL)
        theirs.close()

    def run(self, argv: list[str], env: dict, cwd: str, timeout: float) -> subprocess.CompletedProcess:
        """One command to its end, with nothing to read and its output in files."""
        with open(os.devnull) as none, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            socket.send_fds(self.link, [json.dumps({"argv": argv, "env": env, "cwd": cwd}).encode()],
                            [none.fileno(), out.fileno(), err.fileno()])
            pid = int(self.link.recv(100))
            self.link.settimeout(timeout)
            try:
                code = int(self.link.recv(100))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, timeout) from None
            finally:
                self.link.settimeout(None)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode().replace("\r\n", "\n"))
        return subprocess.CompletedProcess(argv, code, *texts)


@functools.lru_cache(maxsize=1)
def forker() -> Forker | None:
    """The one of this test run; None where every command is to be started as a user does."""
    plain = os.environ.get("PITBOSS_TEST_PLAIN") or "PITBOSS_TEST_PYTHON" in os.environ
    return None if plain or sys.platform != "linux" else Forker()


def wait_for(predicate, deadline_s: float = 30, what: str = ""):
    """Return the first true value of `predicate()`; fail when `deadline_s` pass without one."""
    end = time.monotonic() + deadline_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s:g} s in vain for {what or predicate}")
        time.sleep(0.01)


def git(folder, *args: str, check: bool = True, **options) -> str:
    """git's standard output in `folder`, without the caller's configuration."""
    env = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C",
           "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        env.pop(name, None)
    done = subprocess.run(["git", "-C", str(folder), *args], env=env, text=True, capture_output=True, **options)
    if check and done.returncode:
        raise AssertionError(f"git {' '.join(args)}: {done.stderr}")
    return done.stdout


def make_repo(folder: Path, files: int = 3) -> Path:
    """A git repository with one commit of `files` small files, on the branch main."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q", "-b", "main")
    for n in range(files):
        (folder / f"file{n}.txt").write_text(f"file {n}\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


def read_events(run_dir: Path) -> list[dict]:
    """Every whole line of a run's journal."""
    raw = (run_dir / "journal.jsonl").read_bytes()
    return [json.loads(line) for line in raw.split(b"\n")[:-1]]


def read_records(run_dir: Path) -> list[dict]:
    """Every line of summary.jsonl."""
    return [json.loads(line) for line in (run_dir / "summary.jsonl").read_text().splitlines()]


def processes_with(marker: str) -> dict[int, str]:
    """Living processes (zombies are dead) whose environment holds `marker`: pid to command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and marker.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
    return found


class Home:
    """A user's machine for one test: folders of its own, a clean environment, the program."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("home", "data", "run", "tmp"):
            (root / name).mkdir(mode=0o700, exist_ok=True)
        self.runs = root / "data" / "pitboss" / "runs"
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(root / "home"), "XDG_DATA_HOME": str(root / "data"),
            "XDG_RUNTIME_DIR": str(root / "run"), "TMPDIR": str(root / "tmp"), "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            **{k: v for k, v in os.environ.items() if k.startswith(("PYENV_", "PITBOSS_TEST_"))},
        }

    def argv(self, *args) -> list[str]:
        return [PYTHON, *ISOLATED, str(program()), *map(str, args)]

    def start(self, *args, env: dict | None = None, **options) -> subprocess.Popen:
        """The program, running, with its output in pipes unless `options` say otherwise."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
                   "cwd": self.root, **options}
        return subprocess.Popen(self.argv(*args), env={**self.env, **(env or {})}, **options)

    def pitboss(self, *args, input: str | None = None, timeout: float = 60, check: int | None = None,
                env: dict | None = None, **options) -> subprocess.CompletedProcess:
        """Run one command line to its end; with `check`, its exit code must be that."""
        done = self.fork(args, timeout, env or {}, options) if input is None else None
        done = done or self.start_and_wait(args, input, timeout, env or {}, options)
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def fork(self, args: tuple, timeout: float, env: dict, options: dict) -> subprocess.CompletedProcess | None:
        """The same of a short command whose environment leaves Python's own words alone; None for any other."""
        words, others = [*map(str, args)], [k for k in env if k.startswith(("LC_", "LANG", "PYTHON"))]
        is_plain = "argv" not in vars(self) and not set(options) - {"cwd"} and not others and sum(map(len, words)) < 1 << 16
        if not (is_plain and words and words[0] in SHORT and forker() and forker().busy.acquire(blocking=False)):
            return None
        try:
            return forker().run([str(program()), *words], {**self.env, **env}, str(options.get("cwd", self.root)), timeout)
        finally:
            forker().busy.release()

    def start_and_wait(self, args: tuple, input: str | None, timeout: float, env: dict,
                       options: dict) -> subprocess.CompletedProcess:
        """The same of any command, started as a user does."""
        feed = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
        options = {"cwd": self.root, "text": True, "capture_output": True, **options}
        return subprocess.run(self.argv(*args), env={**self.env, **env}, timeout=timeout, **feed, **options)

    def repo(self, name: str = "repo", files: int = 10) -> Path:
        return make_repo(self.root / name, files)

    def manifest(self, text: str, name: str = "m.toml") -> Path:
        path = self.root / name
        path.write_text(text, encoding="utf-8")
        return path

    def run_dir(self) -> Path:
        """The newest run folder."""
        return max((p for p in self.runs.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)

    def end_everything(self) -> None:
        """SIGKILL whatever this home's runs left alive: a failed test must not disturb the next."""
        marker, deadline = f"XDG_DATA_HOME={self.root}", time.monotonic() + 10
        while sys.platform == "linux" and time.monotonic() < deadline:       # one may be forked during a look
            left = [pid for pid in processes_with(marker) if pid != os.getpid()]
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
