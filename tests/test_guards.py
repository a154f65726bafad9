"""The order of things that only a power cut would show: what destroys or publishes waits for the disk.

The program runs in a process of its own, with some calls of the operating system wrapped, and writes down what it
did in which order. A forced write takes long here, so that nothing can come after it by luck.
"""
from __future__ import annotations

import json
import subprocess

from tools import PITBOSS, PYTHON, git, read_events, read_records

WRAPPED = """import errno, json, os, subprocess, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
out, fails, lock = open(sys.argv[2], "a"), sys.argv[3] == "fails", threading.Lock()
def say(*words):
    with lock: print(json.dumps(words), file=out, flush=True)
def name_of(fd): return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}
real_popen = subprocess.Popen.__init__
def write(fd, data):
    count = real["write"](fd, data)
    if name_of(fd) == "journal.jsonl": say("event", json.loads(bytes(data))["kind"])
    return count
def fsync(fd):
    name = name_of(fd)
    if name == "journal.jsonl" and threading.current_thread() is not threading.main_thread():
        if fails:
            say("fsync fails")
            raise OSError(errno.EIO, "Input/output error")
        threading.Event().wait(0.4)
    real["fsync"](fd)
    say("fsync", name)
def replace(a, b):
    say("rename", os.path.basename(b))
    real["replace"](a, b)
def popen(self, args, *more, **named):
    words = [os.fsdecode(a) for a in args]
    if "remove" in words or "update-ref" in words: say("git", words[words.index("-C") + 2])
    real_popen(self, args, *more, **named)
os.write, os.fsync, os.replace, subprocess.Popen.__init__ = write, fsync, replace, popen
sys.exit(pitboss.main(sys.argv[4:]))
"""

MANIFEST = """[run]
worktree_cleanup = "always"
[[task]]
id = "a"
agent = "demo"
directory = "repo"
prompt = '''
$ write new.txt unsaved
'''
"""


def run_wrapped(home, how: str) -> tuple[int, list[list[str]], str]:
    """(exit status, what happened in which order, standard error) of a run with one task in a worktree."""
    home.repo()
    (home.root / "wrapped.py").write_text(WRAPPED)
    done = subprocess.run([PYTHON, home.root / "wrapped.py", PITBOSS, home.root / "order", how, "dispatch",
                           str(home.manifest(MANIFEST))], env=home.env, text=True, capture_output=True, timeout=60,
                          check=False)
    return done.returncode, [json.loads(line) for line in (home.root / "order").read_text().splitlines()], done.stderr


def test_what_destroys_or_publishes_waits_for_the_disk(home):
    code, order, said = run_wrapped(home, "works")
    assert code == 0, said
    first = {what: order.index(list(what)) for what in (
        ("event", "hand_ended"), ("git", "worktree"), ("event", "closed"), ("rename", "summary.json"))}
    forced = [n for n, what in enumerate(order) if what == ["fsync", "journal.jsonl"]]
    for decided, done in ((("event", "hand_ended"), ("git", "worktree")), (("event", "closed"), ("rename", "summary.json"))):
        assert any(first[decided] < n < first[done] for n in forced), (decided, done, order)
    assert order[-1] == ["fsync", "journal.jsonl"] or ["event", "run_finished"] in order


def test_where_the_journal_cannot_be_forced_to_disk_nothing_is_destroyed(home):
    """A failed fsync is never tried again: the process ends, the worktree stays, and the run can be resumed."""
    code, order, said = run_wrapped(home, "fails")
    assert code == 5 and "Input/output error" in said
    assert order.count(["fsync fails"]) == 1
    assert not [what for what in order if what[0] == "git"] and ["rename", "summary.json"] not in order
    run_dir = home.run_dir()
    assert (run_dir / "worktrees" / "a" / "new.txt").read_text() == "unsaved\n"
    home.pitboss("resume", run_dir.name, check=0)
    record, = read_records(run_dir)
    assert record["status"] == "Success" and record["hands"] == 1
    assert git(home.root / "repo", "show", f"{record['rescue_ref']}:new.txt") == "unsaved\n"
    assert [e["seq"] for e in read_events(run_dir)] == list(range(1, len(read_events(run_dir)) + 1))
