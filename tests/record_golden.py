"""Record the golden folders in tests/data/golden from real runs: `python tests/record_golden.py FORMAT [NAME ...]`.

A golden folder is what a program of one journal format left under its data folder: FORMAT/NAME has `runs` or `pit`
as they lay there, and of a ticket loop its tickets as SQL.  They are recorded once, by a program that writes this
format, and never again: every later program has to open them as they are.  When JOURNAL_FORMAT or PIT_FORMAT rises,
record RUNS below anew with that program, into a folder of the new number beside those that are there, and say by
hand in GOLDEN (tests/golden.py) what each of the new folders holds.

What is only a copy of the program, a secret, or names the machine is left out or replaced, as in recorded journals.
"""
from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pit_desk import Pit, work  # noqa: E402
from record_journals import has_event, scrub, task  # noqa: E402
from tools import Home, processes_with, read_events, wait_for  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
LEFT_OUT = ("self", "__pycache__", "bin",              # copies of the program
            "env.json", "claude.json", "house.sqlite*",      # its user's environment, what only agents read
            "reserve", "token", "worktrees", "*.sock")       # empty room, secrets, checkouts


def flat(home: Home) -> None:
    """A task that commits, one that fails, one that takes too long, and one that leaves what it wrote."""
    home.repo("repo", 1)
    home.pitboss("dispatch", home.manifest(
        '[run]\nmax_parallel = 2\n[defaults]\nagent = "demo"\nmodel = "haiku"\n'
        + task("good", "$ write a.txt x\n$ commit\n$ say done") + task("bad", "$ say a\n$ fail it did not work")
        + task("late", "$ hang", timeout_secs=1) + task("draft", "$ write draft.txt x\n$ say kept")), check=1)


def tree(home: Home) -> None:
    """A lead with a worker that succeeds, a sub-lead with a worker that fails, and a worker that is cancelled."""
    def call(tool: str, **arguments) -> str:
        return f"$ call {tool} {json.dumps(arguments)}"

    home.repo("repo", 1)
    under = [call("spawn_worker", prompt="$ say a\n$ fail no"), call("wait_for_worker", task_id="<<1.task_id>>"),
             call("kv_set", path="/shared/seen", value="yes"), "$ say sub done"]
    script = [call("spawn_worker", prompt="$ say one\n$ say worked"), call("wait_for_worker", task_id="<1.task_id>"),
              call("spawn_sublead", model="haiku", prompt="\n".join(under), budget_usd=2, max_workers=2),
              call("wait_actor", actor_id="<3.sublead_id>"), call("spawn_worker", prompt="$ say up\n$ hang"), "$ sleep 0.5",
              call("cancel_worker", task_id="<5.task_id>", reason="not needed"),
              call("wait_for_worker", task_id="<5.task_id>"), "$ say done"]
    home.pitboss("dispatch", home.manifest(
        '[run]\nmax_workers = 4\nbudget_usd = 20\n[defaults]\nagent = "demo"\nmodel = "haiku"\nuse_worktree = false\n'
        '[lead]\nallow_subleads = true\nmax_subleads = 1\nid = "boss"\ndirectory = "repo"\n'
        f'prompt = {json.dumps(chr(10).join(script))}\n'), check=1)


def cut(home: Home) -> None:
    """The machine went down: one task had succeeded, one was at work, two waited."""
    home.repo("repo", 1)
    manifest = home.manifest(
        '[run]\nmax_parallel = 1\n[defaults]\nagent = "demo"\nmodel = "haiku"\nuse_worktree = false\n'
        + task("first", "$ say a\n$ say one") + task("second", "$ say b\n$ run test -e ../go || sleep 600\n$ say two")
        + task("third", "$ say three") + task("fourth", "$ say c\n$ fail no"))
    dispatch = home.start("dispatch", manifest)
    wait_for(lambda: has_event(home, "session_seen", "second") or "sleep 600" in str(processes_with("PITBOSS_TASK_ID=second")))
    wait_for(lambda: "sleep 600" in str(processes_with("PITBOSS_TASK_ID=second")))
    dispatch.kill()
    dispatch.wait()
    for pid in processes_with("PITBOSS_TASK_ID=second"):
        os.kill(pid, 9)
    wait_for(lambda: not processes_with("PITBOSS_TASK_ID=second"))


def tickets(home: Home) -> None:
    """A ticket loop without a daemon: one epic is done, one waits for an answer."""
    pit = Pit(home)
    try:
        names = pit.epic("Auth", work(1), work(2)), pit.epic("Pay", "$ leave Which file?", work(4))
        pit.pit("start", "--epics", ",".join(names))
        pit.watch("settled")
        pit.pit("daemon", "stop")
        with closing(sqlite3.connect(pit.repo / ".git/pitboss/tickets.db")) as db:
            version, = db.execute("PRAGMA user_version").fetchone()
            lines = [f"PRAGMA user_version={version};", *db.iterdump()]
        (home.root / "data/pitboss/tickets.sql").write_text("\n".join(lines) + "\n")
    finally:
        pit.end()


RUNS: tuple[Callable[[Home], None], ...] = (flat, tree, cut, tickets)


def keep(home: Home, place: Path) -> None:
    """Copy what lies under the data folder to its golden place, without what names this machine."""
    data = home.root / "data" / "pitboss"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(data, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in sorted(place.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.write_text(scrub(path.read_text(), home.root))


def main(words: list[str]) -> int:
    """Record the folders of these names, all without any."""
    if not words:
        print(__doc__)
        return 2
    for record in [r for r in RUNS if not words[1:] or r.__name__ in words[1:]]:
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            home = Home(Path(folder).resolve())
            try:
                record(home)
                keep(home, GOLDEN / words[0] / record.__name__)
            finally:
                home.end_everything()
        print(f"{record.__name__}: {sum(1 for p in (GOLDEN / words[0] / record.__name__).rglob('*') if p.is_file())} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
