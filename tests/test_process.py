"""Hands as real processes: the shim, the fence, who belongs to a hand, how it is ended, how its log is read.

Everything here starts processes of its own, named by a marker in their environment, and ends them.
"""
from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import signal
import struct
import subprocess
import sys
import termios
import tracemalloc
import uuid
from pathlib import Path

import pytest

import pitboss
from tools import PITBOSS, PYTHON, read_records, wait_for

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SLEEPER = ["sleep", "60"]
QUICK = (0.2, 0.2, 5.0)            # the steps of a stop ladder that is in a hurry


class Bench:
    """A folder for hands, and whatever was started in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.run_id, self.hand = root, str(uuid.uuid4()), 0
        self.table = pitboss.ProcessTable()

    def start(self, argv: list, hand: int | None = None, cwd: str | None = None, stdin: int | None = None,
              umask: int = 0o022) -> dict:
        """A hand of the actor `a` that runs `argv`; returns its handle."""
        self.hand = hand or self.hand + 1
        with contextlib.ExitStack() as stack:
            def opened(name: str) -> int:
                fd = os.open(self.root / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
                stack.callback(os.close, fd)
                return fd
            marker = f"{self.run_id}:a:{self.hand}"
            null = os.open(os.devnull, os.O_RDONLY)
            stack.callback(os.close, null)
            return pitboss.start_local(pitboss.Launch(
                [str(word) for word in argv], cwd or str(self.root), {**os.environ, pitboss.LINEAGE: marker},
                str(self.root),
                self.hand, marker, umask,
                (null if stdin is None else stdin, opened("stdout.log"), opened("stderr.log"))))

    def sh(self, script: str, **options) -> dict:
        return self.start(["sh", "-c", script], **options)

    def python(self, code: str, **options) -> dict:
        return self.start([sys.executable, "-I", "-S", "-c", code], **options)

    def end_of(self, handle: dict) -> tuple[int, str | None]:
        """(status of the shim as a shell would say it, what it wrote down), once it is gone."""
        hand = int(handle["marker"].rpartition(":")[2])
        status = wait_for(lambda: [s for s in [pitboss.collect_child(handle["pid"])] if s is not None], 20,
                          "the shim")
        return status[0], pitboss.read_exit(str(self.root), hand)

    def output(self) -> str:
        return (self.root / "stdout.log").read_text()

    def said(self, word: str) -> bool:
        return word in self.output()

    def members(self, handle: dict, known: dict | None = None) -> dict[int, str]:
        self.table.read_at = -1.0
        return self.table.members(handle, known or {})

    def agent_of(self, handle: dict) -> int:
        """The pid of a SLEEPER, once it is that: before, the shim is at work."""
        return wait_for(lambda: [p for p in self.members(handle) if read_argv(p)[:1] == [b"sleep"]])[0]

    def end_everything(self) -> None:
        for pid, process in pitboss.read_processes().items():
            if self.run_id in pitboss.read_lineage(pid):
                pitboss.send_signal(pid, process.start, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def read_argv(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.end_everything()


# ------------------------------------------------------------------ the shim

@pytest.mark.parametrize("script, status, written", [
    ("exit 0", 0, "0"), ("exit 3", 3, "3"), ("exit 255", 255, "255"), ("kill -KILL $$", 137, "137"),
    ("kill -TERM $$", 143, "143"), ("kill -INT $$; sleep 1", 130, "130"), ("kill -SEGV $$", 139, "139")])
def test_the_shim_writes_down_how_the_agent_ended(bench, script, status, written):
    handle = bench.sh(script)
    assert bench.end_of(handle) == (status, written)
    assert (bench.root / "exit.1").read_bytes() == written.encode() + b"\n", "a line is whole when it ends"
    assert pitboss.split_status(status) == ((None, status - 128) if 128 < status < 160 else (status, None))


def test_arguments_reach_the_agent_as_they_are(bench):
    words = ["a b", "", "$HOME", "'", '"', "\\", "`x`", "ä漢", "-n", "--", "*", "new\nline", "x" * 100_000]
    handle = bench.python("import sys, json; print(json.dumps(sys.argv[1:]))\n#")
    bench.end_of(handle)
    handle = bench.start([sys.executable, "-I", "-S", "-c",
                          "import sys, json; print(json.dumps(sys.argv[1:]))", *words])
    assert bench.end_of(handle) == (0, "0")
    assert json.loads(bench.output().splitlines()[-1]) == words


def test_a_program_that_cannot_be_started_is_told_by_the_shell(bench):
    assert bench.end_of(bench.start(["/nowhere/prog"])) == (127, "127")
    (bench.root / "data").write_text("x")
    assert bench.end_of(bench.start([str(bench.root / "data")])) == (126, "126")
    assert "prog" in (bench.root / "stderr.log").read_text()


def test_a_folder_that_is_gone_is_told_apart_from_the_agent(bench):
    handle = bench.sh("echo ran", cwd=str(bench.root / "gone"))
    assert bench.end_of(handle) == (126, "cd") and not bench.said("ran")


@pytest.mark.parametrize("name", ["-", "-P", " ", "a b", "$x", "ä"])
def test_a_folder_may_have_any_name(bench, name):
    (bench.root / name).mkdir()
    assert bench.end_of(bench.start(["pwd"], cwd=str(bench.root / name))) == (0, "0")
    assert bench.output() == str(bench.root / name) + "\n"


def test_whoever_creates_the_fence_owns_the_hand(bench):
    first = bench.sh("echo ran; sleep 60", hand=1)
    wait_for(lambda: bench.said("ran"))
    second = bench.sh("echo ran twice", hand=1)
    assert bench.end_of(second) == (125, None) and not bench.said("twice")
    assert pitboss.read_fence(str(bench.root), 1) == first["pid"]
    assert pitboss.fence_off(str(bench.root), 1) is False and pitboss.is_alive_local(first)


def test_a_shim_that_comes_late_does_nothing(bench):
    assert pitboss.fence_off(str(bench.root), 1) is True
    assert pitboss.read_fence(str(bench.root), 1) == "fenced"
    assert bench.end_of(bench.sh("echo ran", hand=1)) == (125, None)
    assert bench.output() == "" and not (bench.root / "exit.1").exists()
    assert pitboss.fence_off(str(bench.root), 1) is False


def test_a_race_for_the_fence_has_one_winner(bench):
    for hand in range(1, 16):
        handle = bench.sh(f"echo ran {hand}", hand=hand)
        fenced = pitboss.fence_off(str(bench.root), hand)
        status, written = bench.end_of(handle)
        assert (status, written) == ((125, None) if fenced else (0, "0"))
        assert bench.said(f"ran {hand}\n") is not fenced


def find_again(bench: Bench, hand: int) -> dict | None:
    """What somebody finds who knows only that the hand was dealt."""
    return asyncio.run(pitboss.find_local(str(bench.root), hand, f"{bench.run_id}:a:{hand}"))


def test_a_hand_that_was_dealt_is_found_or_never_starts(bench):
    handle = bench.start(SLEEPER, hand=1)
    wait_for(lambda: pitboss.read_fence(str(bench.root), 1))
    assert find_again(bench, 1) == handle
    assert find_again(bench, 2) is None
    assert bench.end_of(bench.sh("echo ran", hand=2)) == (125, None) and not bench.said("ran")


@linux
@pytest.mark.parametrize("pid", [str(os.getpid()), "4194304", "0"])
def test_a_number_in_the_fence_that_is_something_elses_by_now_is_not_alive(bench, pid):
    (bench.root / "hand.1").write_text(pid + "\n")
    handle = find_again(bench, 1)
    assert handle is not None and handle["start"] is None and not pitboss.is_alive_local(handle)


def test_a_shim_that_died_with_the_fence_in_its_hand_never_starts(bench):
    (bench.root / "hand.1").write_text("")
    assert find_again(bench, 1) is None


@linux
def test_a_slow_shim_that_holds_the_fence_is_waited_for(bench):
    """It has created the file and not yet written its number: a busy machine may take its time."""
    slow = subprocess.Popen(["sh", "-c", 'exec 3>hand.1; echo up; sleep 1.6; echo $$ >&3; exec sleep 60'],
                            cwd=bench.root,
                            env={**os.environ, pitboss.LINEAGE: f"{bench.run_id}:a:1"},
                            stdout=subprocess.PIPE)
    assert slow.stdout.readline() == b"up\n"
    found = find_again(bench, 1)
    slow.stdout.close()
    assert found is not None and found["pid"] == slow.pid
    slow.kill()
    slow.wait()


def test_half_a_line_is_no_news_yet(tmp_path):
    for name, read, nothing in (("exit.1", pitboss.read_exit, None), ("hand.1", pitboss.read_fence, "")):
        assert read(str(tmp_path), 1) is None
        for text, value in (("", nothing), ("1", nothing), ("\n", nothing)):
            (tmp_path / name).write_text(text)
            assert read(str(tmp_path), 1) == value
    (tmp_path / "exit.1").write_text("14\n")
    (tmp_path / "hand.1").write_text("14\n")
    assert (pitboss.read_exit(str(tmp_path), 1), pitboss.read_fence(str(tmp_path), 1)) == ("14", 14)


@linux
def test_the_agent_gets_ordinary_signals_whatever_the_caller_did(bench):
    numbers = [signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ]
    before = {n: signal.signal(n, signal.SIG_IGN) for n in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD})
    try:
        handle = bench.start(["cat", "/proc/self/status"])
        assert bench.end_of(handle) == (0, "0")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    masks = dict(line.split(":\t") for line in bench.output().splitlines() if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    ignored = int(masks["SigIgn"], 16)
    assert [n.name for n in numbers if ignored >> (n - 1) & 1] == []


@linux
def test_a_hand_has_a_session_of_its_own_and_the_callers_umask(bench):
    before = os.umask(0o077)
    try:
        handle = bench.sh("cut -d' ' -f1,5,6 /proc/self/stat; touch made; umask", umask=0o027)
    finally:
        os.umask(before)
    assert bench.end_of(handle) == (0, "0")
    _, group, session = map(int, bench.output().splitlines()[0].split())
    assert group == session == handle["pid"] != os.getsid(0)
    assert (bench.root / "made").stat().st_mode & 0o777 == 0o640 and bench.output().splitlines()[1] == "0027"


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_the_shims_own_files_are_private(bench, umask):
    before = os.umask(0o077)
    try:
        bench.end_of(bench.sh("exit 0", umask=umask))
    finally:
        os.umask(before)
    assert {name: (bench.root / name).stat().st_mode & 0o777
            for name in ("hand.1", "exit.1")} == {"hand.1": 0o600, "exit.1": 0o600}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_shim_outlives_a_signal_to_its_group_and_still_writes(bench, number):
    name = number.name.removeprefix("SIG")
    handle = bench.sh(f"trap 'exit 7' {name}; echo up; while :; do sleep 0.05; done")
    wait_for(lambda: bench.said("up"))
    os.killpg(handle["pid"], number)
    assert bench.end_of(handle) == (7, "7")
    handle = bench.start(SLEEPER)
    bench.agent_of(handle)
    os.killpg(handle["pid"], number)
    assert bench.end_of(handle) == (128 + number, str(128 + number))


@linux
def test_a_hand_is_known_by_its_environment_and_its_name(bench):
    handle = bench.start(SLEEPER)
    assert pitboss.read_lineage(bench.agent_of(handle)) == handle["marker"]
    assert f"{bench.run_id} a hand 1".encode() in Path(f"/proc/{handle['pid']}/cmdline").read_bytes()
    assert handle["executor"] in pitboss.EXECUTORS and json.loads(json.dumps(handle)) == handle
    assert pitboss.age_of(handle) < 20 and not pitboss.may_live_elsewhere(handle)


def test_without_a_way_to_spawn_with_a_session_there_is_another(bench, monkeypatch):
    monkeypatch.setattr(os, "posix_spawn", lambda *a, **k: (_ for _ in ()).throw(NotImplementedError))
    handle = bench.sh("echo ran; exit 5")
    assert bench.end_of(handle) == (5, "5") and bench.said("ran")


# ------------------------------------------------------------------ who a handle names

@pytest.mark.parametrize("changed, elsewhere", [
    ({}, False), ({"host": "other"}, True), ({"ns": "pid:[1]"}, True), ({"boot": "other"}, False),
    ({"boot": "other", "ns": "pid:[1]"}, False)])
def test_where_a_hand_may_live_unseen(bench, changed, elsewhere):
    """After another boot nothing of this host can live; another namespace of the same boot may hold it."""
    assert pitboss.may_live_elsewhere({**pitboss.make_handle(os.getpid(), "r:a:1"), **changed}) is elsewhere


def test_a_number_that_was_given_again_is_not_believed(bench):
    handle = bench.start(SLEEPER)
    assert pitboss.is_alive_local(handle)
    for changed in ({"start": "1"}, {"start": None}, {"boot": "other"}):
        other = {**handle, "marker": "r:other:1", **changed}
        assert not pitboss.is_alive_local(other)
        assert bench.members(other) == {}, "a session of that number is not the hand's"
    start = pitboss.process_start(handle["pid"])
    assert pitboss.send_signal(handle["pid"], "1", signal.SIGKILL) is False
    assert pitboss.is_alive_local(handle) and pitboss.send_signal(handle["pid"], start, 0)


def test_a_process_that_is_gone_takes_no_signal(bench):
    handle = bench.sh("exit 0")
    bench.end_of(handle)
    assert pitboss.send_signal(handle["pid"], handle["start"], signal.SIGTERM) is False
    assert not pitboss.is_alive_local(handle) and bench.members(handle) == {}


def test_signals_find_their_process_without_pidfd(bench, monkeypatch):
    monkeypatch.delattr(signal, "pidfd_send_signal", raising=False)
    handle = bench.sh("trap '' TERM; exec sleep 60")
    assert pitboss.send_signal(handle["pid"], "1", signal.SIGKILL) is False
    assert pitboss.send_signal(handle["pid"], handle["start"], signal.SIGKILL) is True
    assert bench.end_of(handle)[0] == 137


# ------------------------------------------------------------------ who belongs to a hand

DAEMON = ("import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
          "print(os.getpid(), flush=True); time.sleep(60)")


@linux
@pytest.mark.parametrize("code", [
    "import os, time\npid = os.fork()\nif not pid: os.setsid(); time.sleep(60)\n"
    "print(pid, flush=True); os.wait()",
    DAEMON,
    f"import subprocess, sys\nsubprocess.run([sys.executable, '-I', '-S', '-c', {DAEMON!r}])",
], ids=["a session of its own", "forked twice", "forked twice by a tool"])
def test_members_are_found_wherever_they_went(bench, code):
    handle = bench.python(code)
    stray = wait_for(lambda: bench.output().split())[0]
    assert int(stray) in bench.members(handle)


@linux
def test_a_child_that_forgot_its_environment_stays_known(bench):
    """It was seen with the marker; then it became a program without environment, session and parent."""
    handle = bench.python(
        "import os, time\nif os.fork(): os.wait(); time.sleep(60)\nif os.fork(): os._exit(0)\nos.setsid()\n"
        "print(os.getpid(), flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
        "os.execve('/bin/sleep', ['sleep', '60'], {})")
    stray = int(wait_for(lambda: bench.output().split())[0])
    known = bench.members(handle)
    assert stray in known
    (bench.root / "go").touch()
    wait_for(lambda: b"sleep" in Path(f"/proc/{stray}/cmdline").read_bytes()
             and not pitboss.read_lineage(stray))
    assert stray in bench.members(handle), "the table remembers what it saw"
    assert stray in Bench(bench.root).members(handle, known), "and so does whoever kept the members"
    assert stray not in Bench(bench.root).members(handle,
                                                  {stray: "1"}), "but not another process of that number"
    pitboss.send_signal(stray, known[stray], signal.SIGKILL)


@linux
def test_a_hand_lives_as_long_as_its_agent_though_the_shim_was_killed(bench):
    handle = bench.sh("echo up; while [ ! -e go ]; do sleep 0.02; done")
    wait_for(lambda: bench.said("up"))
    pitboss.send_signal(handle["pid"], handle["start"], signal.SIGKILL)
    assert bench.end_of(handle) == (137, None)
    assert not pitboss.is_alive_local(handle) and bench.members(handle)
    (bench.root / "go").touch()
    wait_for(lambda: not bench.members(handle))


@linux
def test_the_members_of_one_hand_are_not_anothers(bench):
    one, two = bench.start(SLEEPER), bench.start(SLEEPER)
    agents = {bench.agent_of(one), bench.agent_of(two)}
    assert agents <= bench.members(one).keys() | bench.members(two).keys()
    assert not bench.members(one).keys() & bench.members(two).keys()
    assert os.getpid() not in {**bench.members(one), **bench.members(two)}


@linux
def test_a_nested_hand_belongs_to_the_outer_one(bench):
    outer = f"{bench.run_id}:a:1"
    script = f"env {pitboss.LINEAGE}={outer}/{bench.run_id}:inner:1 setsid sleep 60"
    handle = bench.sh(script)
    bench.agent_of(handle)
    inner = {**handle, "pid": 1, "start": "1", "marker": f"{bench.run_id}:inner:1"}
    assert set(bench.members(inner)) < set(bench.members(handle))


# ------------------------------------------------------------------ stopping

def stop(bench: Bench, handle: dict, interrupt=None, steps=QUICK) -> None:
    known: dict[int, str] = {}

    def find() -> dict[int, str]:
        nonlocal known
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        known = bench.members(handle, known)
        return known
    asyncio.run(asyncio.wait_for(pitboss.stop_ladder(find, interrupt, steps), 30))


IGNORE = "import os, signal, time\nfor s in (2, 15, 1): signal.signal(s, signal.SIG_IGN)\n"
STUBBORN = {
    "an ordinary one": "import time; print('up', flush=True); time.sleep(60)",
    "ignores everything": IGNORE + "print('up', flush=True); time.sleep(60)",
    "stopped itself": "import os\nprint('up', flush=True); os.kill(os.getpid(), 19)",
    "stopped itself and ignores": IGNORE + "print('up', flush=True); os.kill(os.getpid(), 19)",
    "a crowd that ignores": IGNORE
    + "for _ in range(12):\n    if not os.fork(): os.setsid(); break\n"
      "print('up', flush=True)\ntime.sleep(60)",
    "a daemon that ignores": IGNORE + DAEMON.replace("import os, time\n", "").replace("os.getpid()", "'up'"),
    "leaves a child behind when it is asked to go": (
        "import os, signal, time\ndef left(*_):\n    if os.fork(): os._exit(0)\n"
        "    signal.signal(15, signal.SIG_IGN); os.setsid()\n"
        "    time.sleep(60)\nsignal.signal(15, left)\nprint('up', flush=True)\nwhile True: time.sleep(60)"),
}


@linux
@pytest.mark.parametrize("code", STUBBORN.values(), ids=STUBBORN)
def test_the_ladder_ends_everything(bench, code):
    handle = bench.python(code)
    wait_for(lambda: bench.said("up"))
    stop(bench, handle)
    assert bench.members(handle) == {}
    assert [p for p in pitboss.read_processes() if bench.run_id in pitboss.read_lineage(p)
            and pitboss.process_start(p)] == []


def test_an_interrupt_that_is_enough_is_all_that_is_sent(bench):
    handle = bench.python("import signal, time\n"
                          "def end(n, f): print('signal', n, flush=True); raise SystemExit(4)\n"
                          "for n in (2, 15): signal.signal(n, end)\nprint('up', flush=True); time.sleep(60)")
    wait_for(lambda: bench.said("up"))
    stop(bench, handle, lambda: pitboss.interrupt_local(bench.table, handle), (10.0, 10.0, 10.0))
    assert bench.output().splitlines() == ["up", "signal 2"]
    assert pitboss.read_exit(str(bench.root), 1) == "4"


def test_an_interrupt_reaches_the_agent_and_not_its_group(bench):
    handle = bench.sh("trap 'echo interrupted; exit 3' INT; sleep 60 & echo $!; wait")
    child = int(wait_for(lambda: bench.output().split())[0])
    start = pitboss.process_start(child)
    bench.table.read_at = -1.0
    pitboss.interrupt_local(bench.table, handle)
    assert bench.end_of(handle) == (3, "3") and bench.said("interrupted")
    assert pitboss.process_start(child) == start, "what the agent started is not signalled"


# ------------------------------------------------------------------ exits

async def gone(handle: dict) -> bool:
    loop = asyncio.get_running_loop()
    future = pitboss.wait_local(loop, handle)
    told = future.descriptor is not None
    while not future.done() and (told or pitboss.is_alive_local(handle)):
        await asyncio.wait_for(asyncio.shield(future), 10) if told else await asyncio.sleep(0.01)
    pitboss.close_wait(loop, future)
    return told


def test_an_exit_is_told_by_the_kernel(bench):
    handle = bench.sh("sleep 0.1; exit 3")
    assert asyncio.run(gone(handle)) is True
    assert bench.end_of(handle) == (3, "3")


def test_waiting_gives_up_its_descriptor(bench):
    async def many() -> None:
        for _ in range(20):
            pitboss.close_wait(asyncio.get_running_loop(),
                               pitboss.wait_local(asyncio.get_running_loop(), handle))
    handle = bench.start(SLEEPER)
    before = len(os.listdir("/dev/fd"))
    asyncio.run(many())
    assert len(os.listdir("/dev/fd")) == before


@linux
def test_where_nothing_tells_of_exits_they_are_looked_for(bench, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    handle = bench.sh("sleep 0.1; exit 3")
    assert asyncio.run(gone(handle)) is False
    assert bench.end_of(handle) == (3, "3")


PATCHED = """import os, sys, signal
for name in ("pidfd_open",): delattr(os, name)
del signal.pidfd_send_signal
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
sys.exit(pitboss.main(sys.argv[2:]))"""


@linux
def test_a_whole_run_goes_well_without_pidfd(home):
    (home.root / "patched.py").write_text(PATCHED)
    home.repo()
    manifest = home.manifest('[defaults]\nagent = "demo"\n'
                             '[[task]]\nid = "a"\ndirectory = "repo"\nprompt = "$ say x"\n'
                             '[[task]]\nid = "b"\ndirectory = "repo"\nprompt = "$ hang"\ntimeout_secs = 1\n'
                             'use_worktree = false\n')
    done = subprocess.run([PYTHON, home.root / "patched.py", PITBOSS, "dispatch", str(manifest)],
                          env=home.env, text=True,
                          capture_output=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert {r["task_id"]: r["status"]
            for r in read_records(home.run_dir())} == {"a": "Success", "b": "TimedOut"}


@linux
def test_own_children_are_told_by_the_kernel(bench):
    children = pitboss.OwnChildren()
    handle = bench.start(SLEEPER)
    assert handle["pid"] in children.read()
    pitboss.send_signal(handle["pid"], handle["start"], signal.SIGKILL)
    bench.end_of(handle)
    assert handle["pid"] not in children.read()
    os.close(children.fd)


# ------------------------------------------------------------------ reading a log

def read_all(tail: pitboss.Tail, limit: int = 1 << 20) -> list[bytes]:
    lines = []
    while tail.behind():
        lines += tail.read(limit)
    return lines


def test_a_log_may_be_cut_anywhere_between_two_looks(tmp_path):
    chance, path = random.Random(9), tmp_path / "log"
    lines = [bytes(chance.choice(b"ab\xc3\xa4\xff\x00\r{}\"\\") for _ in range(chance.randrange(60)))
             for _ in range(300)]
    raw, seen, at = b"".join(line + b"\n" for line in lines), [], 0
    tail = pitboss.Tail(str(path), 0)
    assert tail.read(100) == [] and tail.behind(), "there is no log yet"
    with path.open("wb", buffering=0) as log:
        while at < len(raw):
            step = chance.randrange(1, 80)
            log.write(raw[at:at + step])
            at += step
            seen += tail.read(chance.randrange(1, 100))
    seen += read_all(tail)
    assert seen == lines and tail.rest() == [] and tail.at == len(raw)
    tail.close()


def test_a_last_line_without_its_end_comes_when_nothing_more_will(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo")
    tail = pitboss.Tail(str(path), 0)
    assert read_all(tail) == [b"one"] and tail.rest() == [b"two"] and tail.rest() == []
    tail.close()


def test_reading_begins_where_it_is_told(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree\n")
    tail = pitboss.Tail(str(path), 4)
    assert read_all(tail) == [b"two", b"three"]
    tail.close()


def event_line(size: int, **more) -> bytes:
    return json.dumps({"type": "result", "is_error": False, "result": "a" * size, **more},
                      separators=(",", ":")).encode()


@pytest.mark.parametrize("size", [pitboss.MAX_LINE - 100, pitboss.MAX_LINE + 100, 3 * pitboss.MAX_LINE])
@pytest.mark.parametrize("limit", [1 << 10, 64 << 10, 8 << 20])
def test_lines_over_a_megabyte_keep_their_meaning(tmp_path, size, limit):
    if limit == 1 << 10:
        size = min(size, pitboss.MAX_LINE + 100)      # small bites of a long line cost much
        limit = 16 << 10
    path = tmp_path / "log"
    path.write_bytes(b'{"a":1}\n' + event_line(size, total_cost_usd=0.5) + b"\nlast\n")
    tail = pitboss.Tail(str(path), 0)
    first, long, last = read_all(tail, limit)
    assert (first, last) == (b'{"a":1}', b"last")
    assert len(long) <= pitboss.MAX_LINE + limit
    event = json.loads(long)
    assert event["total_cost_usd"] == 0.5
    assert event["result"].startswith("aaa") and event["result"].endswith("aaa")
    tail.close()


def test_twenty_megabytes_in_one_line_take_little_memory_and_the_result_is_read(tmp_path):
    path = tmp_path / "log"
    with path.open("wb") as log:
        log.write(b'{"type":"result","is_error":false,"result":"')
        for _ in range(20):
            log.write(b"b" * (1 << 20))
        log.write(b'","total_cost_usd":0.25,"session_id":"s","modelUsage":{"m":{"inputTokens":7}}}\n')
    tail, talk = pitboss.Tail(str(path), 0), pitboss.Talk()
    tracemalloc.start()
    while tail.behind():
        for line in tail.read(pitboss.READ_AT_ONCE):
            pitboss.fold_line(talk, line, "claude")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tail.close()
    assert talk.skipped == 0 and talk.result is not None
    assert talk.cost_usd() == 0.25 and talk.usage().input == 7
    assert peak < 8 << 20


CUTS = [b'x' * 5, b'\\"' * 4, b"\\\\" * 4, "ä漢".encode() * 3, b"\\u00e4" * 3, b"\\ud83d\\ude00" * 3,
        b"\\n" * 4, b"a \\t"]


@pytest.mark.parametrize("filler", CUTS, ids=range(len(CUTS)))
def test_a_long_text_may_be_cut_inside_anything(filler, tmp_path):
    """Wherever the middle is left out, what remains is an event: no half escape, no half letter."""
    for shift in range(14):
        body = b"c" * shift + filler * ((pitboss.MAX_LINE + (256 << 10)) // len(filler))
        path = tmp_path / f"log{shift}"
        path.write_bytes(b'{"type":"result","is_error":false,"result":"' + body
                         + b'","total_cost_usd":0.5}\n')
        tail = pitboss.Tail(str(path), 0)
        line, = read_all(tail, 256 << 10)
        tail.close()
        assert json.loads(line)["total_cost_usd"] == 0.5, (shift, line[-200:])


# ------------------------------------------------------------------ input

def waiting_in(fd: int) -> int:
    """Bytes that can be read from a pipe now."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 65537, 300_000, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_a_prompt_is_in_the_pipe_before_anybody_reads(size, bench):
    data = os.urandom(size)
    their_end, our_end, rest = pitboss.open_input(data)
    try:
        there = waiting_in(their_end)
        assert there + len(rest) == size and data.endswith(rest)
        assert there == size if size <= 65536 else there >= 65536
        assert not os.get_blocking(our_end) and not os.get_inheritable(our_end)
        if os.geteuid() == 0 and sys.platform == "linux":
            assert there >= min(size, pitboss.PIPE_MAX - 4096), "root may have a pipe of a megabyte"
        handle = bench.start(["cat"], stdin=their_end)
        os.close(their_end)
        their_end = -1
        os.set_blocking(our_end, True)
        while rest:
            rest = rest[os.write(our_end, rest):]
    finally:
        os.close(our_end)
        if their_end >= 0:
            os.close(their_end)
    assert bench.end_of(handle) == (0, "0")
    assert (bench.root / "stdout.log").read_bytes() == data


WATCHED = """import os, sys, fcntl, struct, termios
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
real = os.posix_spawn
def spawn(path, argv, env, **options):
    fd = next(a[1] for a in options["file_actions"] if a[2] == 0)
    there = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\\0" * 4))[0]
    with open(sys.argv[2], "a") as f: print(env["PITBOSS_TASK_ID"], there, file=f)
    return real(path, argv, env, **options)
os.posix_spawn = spawn
sys.exit(pitboss.main(sys.argv[3:]))"""


@linux
def test_an_agent_that_takes_messages_finds_its_prompt_when_it_starts(home):
    (home.root / "watched.py").write_text(WATCHED)
    prompts = {"small": "$ say hello", "big": "$ say hello\n" + "x" * 40_000}
    manifest = home.manifest('[defaults]\nagent = "demo"\nuse_worktree = false\n' + "".join(
        f'[[task]]\nid = "{name}"\ndirectory = "."\nprompt = {json.dumps(prompt)}\n' for name,
        prompt in prompts.items()))
    done = subprocess.run([PYTHON, home.root / "watched.py", PITBOSS, home.root / "seen", "dispatch",
                           str(manifest)],
                          env=home.env, cwd=home.root, text=True, capture_output=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
    seen = dict(line.split() for line in (home.root / "seen").read_text().splitlines())
    assert {name: int(seen[name]) > len(prompt) for name,
            prompt in prompts.items()} == {"small": True, "big": True}


def test_a_log_that_was_closed_is_not_opened_again(tmp_path):
    """Who still holds a hand that has ended reads nothing, and leaves no descriptor behind."""
    (tmp_path / "log").write_text("one\ntwo\n")
    tail = pitboss.Tail(str(tmp_path / "log"), 0)
    assert tail.read(4) == [b"one"]
    tail.close()
    assert tail.read(4) == [] and tail.fd is None
