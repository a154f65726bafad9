"""Guards that no ordinary run shows: what destroys or publishes waits for the disk; secrets are masked.

For the first the program runs with some calls of the operating system wrapped, and writes down what it did in
which order. A forced write takes long here, so that nothing can come after it by luck.
"""
from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import pty
import shutil
import subprocess

import pytest

import pitboss
from faults import __file__ as FAULTS
from tools import PITBOSS, PYTHON, git, read_events, read_records, wait_for

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


LEAD = """[run]
max_workers = 1
budget_usd = 10.0
[defaults]
agent = "demo"
[lead]
id = "boss"
directory = "repo"
prompt = '''
$ call spawn_worker {"prompt": "$ say done"}
$ call wait_for_worker {"task_id": "<1.task_id>"}
'''
"""


def run_wrapped(home, how: str, manifest: str = MANIFEST) -> tuple[int, list[list[str]], str]:
    """(exit status, what happened in which order, standard error) of a run, of one task in a worktree."""
    home.repo()
    (home.root / "wrapped.py").write_text(WRAPPED)
    done = subprocess.run([PYTHON, home.root / "wrapped.py", PITBOSS, home.root / "order", how, "dispatch",
                           str(home.manifest(manifest))], env=home.env, text=True, capture_output=True,
                          timeout=60, check=False)
    return done.returncode, [json.loads(line)
                             for line in (home.root / "order").read_text().splitlines()], done.stderr


def test_what_destroys_or_publishes_waits_for_the_disk(home):
    code, order, said = run_wrapped(home, "works")
    assert code == 0, said
    first = {what: order.index(list(what)) for what in (
        ("event", "hand_ended"), ("git", "worktree"), ("event", "closed"), ("rename", "summary.json"))}
    forced = [n for n, what in enumerate(order) if what == ["fsync", "journal.jsonl"]]
    for decided, done in ((("event", "hand_ended"), ("git", "worktree")),
                          (("event", "closed"), ("rename", "summary.json"))):
        assert any(first[decided] < n < first[done] for n in forced), (decided, done, order)
    assert order[-1] == ["fsync", "journal.jsonl"] or ["event", "run_finished"] in order


def test_what_a_worker_was_asked_is_on_disk_before_the_journal_that_tells_of_it(home):
    code, order, said = run_wrapped(home, "works", LEAD)
    assert code == 0, said
    written, forced = order.index(["rename", "task.json"]), order.index(["fsync", "task.json"])
    spawned = [n for n, what in enumerate(order) if what == ["event", "actor_added"]][-1]
    known = next(n for n, what in enumerate(order) if n > spawned and what == ["fsync", "journal.jsonl"])
    assert written < spawned and written < forced < known, order
    assert order[forced + 1] == ["fsync", "worker-1"], "its name, too"


def test_where_the_journal_cannot_be_forced_to_disk_nothing_is_destroyed(home):
    """A failed fsync is never tried again: the process ends, the worktree stays, the run can be resumed."""
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


# ------------------------------------------------------------------ git

def test_a_rescue_that_fails_leaves_the_tree_and_its_index_as_they_were(home):
    """Everything unsaved is gathered in an index of pitboss's own."""
    repo = home.repo()
    git(repo, "update-ref", "refs/pitboss/rescue",
        "HEAD")      # where it is, no ref below that name can be made
    home.pitboss("dispatch", home.manifest(MANIFEST), check=0)
    record, = read_records(home.run_dir())
    assert record["rescue_ref"] is None and record["worktree_kept"]
    tree = home.run_dir() / "worktrees" / "a"
    assert (tree / "new.txt").read_text() == "unsaved\n"
    assert git(tree, "status", "--porcelain") == "?? new.txt\n"


def with_git(home, script: str) -> dict[str, str]:
    """An environment whose `git` is a shell script; the script calls the real one as "$GIT"."""
    (home.root / "bin").mkdir()
    (home.root / "bin" / "git").write_text(f"#!/bin/sh\ncd {home.root}\n{script}\n")
    (home.root / "bin" / "git").chmod(0o755)
    return {"PATH": f"{home.root / 'bin'}:{home.env['PATH']}",
            "GIT": shutil.which("git", path=home.env["PATH"])}


def test_a_new_branch_follows_no_other(home):
    """Whatever the user's configuration: a push or pull of an agent must not go to somebody else's branch."""
    repo = home.repo()
    git(repo, "config", "branch.autoSetupMerge", "always")
    env = with_git(home, 'echo "$*" >>calls; exec "$GIT" "$@"')
    home.pitboss("dispatch", home.manifest(MANIFEST.replace("always", "never")), check=0, env=env)
    adds = [line for line in (home.root / "calls").read_text().splitlines() if " worktree add " in line]
    assert adds and all(" --no-track " in line for line in adds if " -b " in line)
    branch = read_records(home.run_dir())[0]["branch"]
    assert git(repo, "for-each-ref", "--format=%(upstream)", f"refs/heads/{branch}").strip() == ""


def test_what_is_written_after_the_last_look_is_not_removed(home):
    """Something writes into a tree that was found clean, just before git removes it: git looks once more."""
    home.repo()
    env = with_git(home, 'case "$*" in *" worktree remove "*)\n'
                         '    for last; do :; done; echo late >"$last/late.txt";; esac\nexec "$GIT" "$@"')
    manifest = home.manifest(MANIFEST.replace('"always"', '"on_success"').replace("$ write", "$ say"))
    home.pitboss("dispatch", manifest, check=0, env=env)
    record, = read_records(home.run_dir())
    assert record["worktree_kept"] and record["status"] == "Success"
    assert (home.run_dir() / "worktrees" / "a" / "late.txt").read_text() == "late\n"


def test_git_holds_the_repository_when_its_dispatcher_was_killed(home):
    """git goes on with a worktree that it has begun; until it is done nobody else may begin one."""
    repo = home.repo()
    env = with_git(home, 'case "$*" in *" worktree add "*)\n'
                         '    echo >begun; while [ ! -e go ]; do sleep 0.02; done;; esac\nexec "$GIT" "$@"')
    dispatch = home.start("dispatch", home.manifest(MANIFEST), env=env)
    wait_for((home.root / "begun").exists)
    dispatch.kill()
    dispatch.communicate()
    with open(repo / ".git" / "pitboss" / "worktree.lock") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (home.root / "go").touch()
        wait_for(lambda: is_free(lock))
    home.pitboss("resume", home.run_dir().name, check=0)
    assert read_records(home.run_dir())[0]["status"] == "Success"


@pytest.mark.parametrize("step", ["$ write new.txt unsaved", "$ say hello"], ids=["rescued", "clean"])
def test_a_tree_that_a_dispatcher_removed_before_it_died_is_told_of_and_leaves_no_branch(home, step):
    """The next dispatcher finds no folder: the record names the rescue ref, and the empty branch goes."""
    repo = home.repo()
    env = with_git(home, 'case "$*" in *" worktree remove "*) "$GIT" "$@"; kill -9 $PPID; exit;; esac\n'
                         'exec "$GIT" "$@"')
    died = home.pitboss("dispatch", home.manifest(MANIFEST.replace("$ write new.txt unsaved", step)), env=env)
    assert died.returncode == -9
    done = home.pitboss("resume", home.run_dir().name, check=0)
    record, = read_records(home.run_dir())
    assert record["status"] == "Success" and record["worktree_path"] is None
    assert git(repo, "branch", "--format=%(refname:short)").split() == ["main"]
    if "write" in step:
        assert git(repo, "show", f"{record['rescue_ref']}:new.txt") == "unsaved\n"
        assert f"worktree add {home.run_dir()}/worktrees/a {record['rescue_ref']}" in done.stdout
    else:
        assert record["rescue_ref"] is None


def test_a_dispatcher_that_gives_up_does_not_wait_for_a_git_that_has_just_been_started(home):
    """All its tasks are cancelled, at whatever point they are; those of asyncio itself must go on to their ends."""
    folder = str(home.repo())

    async def give_up(turns: int) -> bool:
        task = asyncio.create_task(pitboss.Git(home.env, 0o22).run(folder, "status"))
        for _ in range(turns):
            await asyncio.sleep(0)
        pitboss.cancel_other_tasks()
        return bool((await asyncio.wait({task}, timeout=0.5))[0])

    async def give_up_everywhere() -> list[int]:
        hung = [turns for turns in range(1, 12) if not await give_up(turns)]
        gc.collect()                 # what was left half way closes itself, while there is a loop to do it in
        await asyncio.sleep(0)
        return hung

    assert asyncio.run(give_up_everywhere()) == []


NO_FILES_LEFT = """import errno, os, subprocess, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
real = subprocess.Popen.__init__
def popen(self, args, *more, **named):
    if "ls-files" in args: raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    real(self, args, *more, **named)
subprocess.Popen.__init__ = popen
sys.exit(pitboss.main(sys.argv[2:]))
"""


NO_EVENT_LOOP = """import errno, os, socket, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
def socketpair(*args): raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
socket.socketpair = socketpair
sys.exit(pitboss.main(sys.argv[2:]))
"""


def test_a_run_for_which_no_event_loop_can_be_made_can_be_resumed(home):
    home.repo()
    (home.root / "wrapped.py").write_text(NO_EVENT_LOOP)
    done = subprocess.run([PYTHON, home.root / "wrapped.py", PITBOSS, "dispatch", home.manifest(MANIFEST)],
                          env=home.env, text=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (5, "pitboss: running the hands: Too many open files\n")
    home.pitboss("resume", home.run_dir().name, check=0)


def test_a_tree_stays_when_git_cannot_be_started_to_look_at_it(home):
    """One of two that look at it at once; the other one's answer alone is no reason to remove it."""
    home.repo()
    (home.root / "wrapped.py").write_text(NO_FILES_LEFT)
    done = subprocess.run([PYTHON, home.root / "wrapped.py", PITBOSS, "dispatch", home.manifest(MANIFEST)],
                          env=home.env, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and "bug" not in done.stderr, done.stderr
    record, = read_records(home.run_dir())
    assert record["worktree_kept"] == "[Errno 24] Too many open files"
    assert (home.run_dir() / "worktrees" / "a" / "new.txt").read_text() == "unsaved\n"


def is_free(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ------------------------------------------------------------------ secrets

SECRET, OTHER, TOKEN = "hunter2-hunter2", "s3cr3t-of-the-manifest", "ghp_" + "a1" * 18
TALKATIVE = f"""[run]
secret_env = ["PLAIN_NAME"]
[defaults]
use_worktree = false
agent = "demo"
env = {{ TASK_TOKEN = "{OTHER}" }}
[[mcp_server]]
id = "s"
command = "true"
args = ["--token", "{TOKEN}"]
[[task]]
id = "says"
directory = "."
prompt = '''
Use {TOKEN}, and nothing else.
$ say {SECRET} {OTHER} {TOKEN}
$ sleep 0.8
$ say {SECRET} {OTHER} {TOKEN}
'''
[[task]]
id = "fails"
directory = "."
prompt = '''
$ fail {SECRET} {OTHER} {TOKEN}
'''
"""
NEEDED = ("manifest.snapshot.toml", "stdout.log", "prompt.txt",
          "mcp-config.json")    # what the agents work with


def files_with(folder, words: tuple) -> list[str]:
    """The files of runs in which one of the words stands; those that agents read and write apart."""
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()
            and p.name not in NEEDED
            and ".sessions" not in p.parts and any(word.encode() in p.read_bytes() for word in words)]


def test_a_secret_is_in_no_file_and_no_output_of_pitboss(home):
    env = {"PLAIN_NAME": SECRET}
    said = [home.pitboss("dispatch", "-v", home.manifest(TALKATIVE), check=1, env=env)]
    run_dir = home.run_dir()
    said += [home.pitboss(*args, env=env) for args in (
        ["status", run_dir.name], ["status", run_dir.name, "--json"], ["status", run_dir.name, "--rebuild"],
        ["list"],
        ["list", "--json"], ["attach", run_dir.name, "says"], ["resume", run_dir.name, "--failed"])]
    words = (SECRET, OTHER, TOKEN)
    assert files_with(home.runs, words) == []
    assert [w for w in words for done in said if w in done.stdout + done.stderr] == []
    finals = {r["task_id"]: r["final_message"] for r in read_records(run_dir)}
    assert finals == {"says": "*** *** ***", "fails": "*** *** ***"}
    resolved = json.loads((run_dir / "resolved.json").read_text())
    assert resolved["tasks"][0]["prompt"].startswith("Use ***, and")


@pytest.mark.parametrize("args", [["status", SECRET], ["dispatch", f"{SECRET}.toml"], [SECRET]],
                         ids=lambda args: args[0].replace(SECRET, "x"))
def test_a_secret_is_in_no_error(home, args):
    done = home.pitboss(*args, env={"MY_PASSWORD": SECRET})
    assert done.returncode in (2, 3) and "***" in done.stderr and SECRET not in done.stdout + done.stderr


def test_a_secret_is_in_the_reason_of_no_cancel(home):
    home.repo()
    dispatch = home.start("dispatch", home.manifest(
        '[[task]]\nid = "a"\nagent = "demo"\ndirectory = "repo"\nprompt = "$ hang"'))
    wait_for(lambda: any(b"hand_started" in p.read_bytes() for p in home.runs.glob("0*/journal.jsonl")))
    home.pitboss("cancel", home.run_dir().name, "--reason", f"it knew {TOKEN}", check=0)
    dispatch.communicate(timeout=30)
    assert files_with(home.runs, (TOKEN,)) == []
    assert read_records(home.run_dir())[0]["failure_reason"]["message"].startswith("it knew ***")


def test_a_secret_that_is_told_later_is_masked_from_then_on(home):
    """What a dead dispatcher wrote may hold it; what is written anew does not."""
    manifest = home.manifest(f'[[task]]\nid = "a"\nagent = "demo"\ndirectory = "."\nuse_worktree = false\n'
                             f'prompt = "$ say {SECRET} {OTHER}"')
    process = subprocess.Popen([PYTHON, FAULTS, "journal.before", "7", "--", "dispatch", str(manifest)],
                               env=home.env,
                               cwd=home.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: state_of(process.pid) == "T")
    process.kill()
    process.wait()
    run_dir = home.run_dir()
    assert [e["kind"] for e in read_events(run_dir)][-1] == "hand_ended"
    home.pitboss("resume", run_dir.name, check=0, env={"MY_TOKEN": SECRET})
    assert [read_records(run_dir)[0]["final_message"], *files_with(run_dir, (SECRET,))] == [
        f"*** {OTHER}", "journal.jsonl", "resolved.json"]
    home.pitboss("status", run_dir.name, "--rebuild", check=0, env={"MY_TOKEN": SECRET, "MY_KEY": OTHER})
    assert files_with(run_dir, (SECRET, OTHER)) == ["journal.jsonl", "resolved.json"]
    assert read_records(run_dir)[0]["final_message"] == "*** ***"


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


def test_a_secret_is_not_on_the_terminal_while_the_run_goes_on(home):
    """The live table shows an agent's last words before they are in any record."""
    ours, theirs = pty.openpty()
    process = home.start("dispatch", home.manifest(TALKATIVE), stderr=theirs,
                         env={"PLAIN_NAME": SECRET, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(30) == 1
    process.stdout.close()
    assert b"\x1b[" in shown and b"*** *** ***" in shown, "there was a live table"
    assert [w for w in (SECRET, OTHER, TOKEN) if w.encode() in shown] == []
