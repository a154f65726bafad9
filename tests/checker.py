"""An independent verdict on one run: reads its folder, git and /proc, and imports nothing of pitboss.

Each `check_…` returns what is wrong as a list of sentences; an empty list is a pass. Tasks take part by
keeping a trail: `trail_begin` and `trail_end` are the shell commands that begin and end a task's script.
"""
from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tools import git, processes_with, wait_for

COMMITTED = "work.txt"      # the file a task commits its lines in
LOOSE = "loose.txt"         # the file a task leaves its uncommitted lines in


class Promise(NamedTuple):
    """What a task writes: `committed` lines must be on its branch, `loose` ones also in its kept tree."""
    task: str
    committed: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()


def trail_begin(trail: Path, task: str) -> str:
    """Shell: take the task's lock and note it; a second taker at the same time notes a clash."""
    lock, notes = shlex.quote(str(trail / f"{task}.lock")), shlex.quote(str(trail / task))
    return f"mkdir {lock} 2>/dev/null && echo begin >>{notes} || echo clash >>{notes}"


def trail_end(trail: Path, task: str) -> str:
    lock, notes = shlex.quote(str(trail / f"{task}.lock")), shlex.quote(str(trail / task))
    return f"echo end >>{notes}; rmdir {lock}"


def check_run(run_dir: Path, repo: Path, promises: list[Promise], trail: Path | None = None,
              once: bool = True) -> list[str]:
    """Everything that must hold of a finished run whose tasks all succeeded.

    `once` is for agents that nobody killed: none of their steps was done again.
    """
    ids = [p.task for p in promises]
    records = {r["task_id"]: r for r in _lines(run_dir / "summary.jsonl")}
    return [
        *check_records(run_dir, ids),
        *(f"{i}: {r['status']}, {r['failure_reason']}" for i, r in records.items()
          if r["status"] != "Success"),
        *check_journal(run_dir),
        *check_trees(run_dir, repo),
        *check_branches(run_dir, repo),
        *(fault for p in promises if p.task in records
          for fault in check_work(records[p.task], repo, p, once)),
        *(fault for i in ids if trail for fault in check_trail(trail, i)),
        *check_processes(run_dir.name),
    ]


def check_records(run_dir: Path, ids: list[str]) -> list[str]:
    """One final record a task, in summary.jsonl and in summary.json, with the same facts in both."""
    lines = _lines(run_dir / "summary.jsonl")
    summary = json.loads((run_dir / "summary.json").read_bytes())
    faults = []
    for name, records in (("summary.jsonl", lines), ("summary.json", summary["tasks"])):
        seen = Counter(r["task_id"] for r in records)
        faults += [f"{name}: {n} records of {i}" for i, n in seen.items() if n != 1]
        faults += [f"{name}: no record of {i}" for i in ids if i not in seen]
        faults += [f"{name}: a record of {i}, which is no task" for i in seen if i not in ids]
    one, other = ({r["task_id"]: r for r in records} for records in (lines, summary["tasks"]))
    faults += [f"{i}: summary.jsonl and summary.json differ: {one[i]} {other[i]}"
               for i in one.keys() & other.keys() if one[i] != other[i]]
    failed = sum(r["status"] != "Success" for r in lines)
    if summary["tasks_failed"] != failed:
        faults.append(f"summary.json: tasks_failed is {summary['tasks_failed']}, {failed} did not succeed")
    return faults


def check_journal(run_dir: Path) -> list[str]:
    """Whole lines, seq without gaps, time never backwards; one intent and start a hand, one end an actor."""
    raw = (run_dir / "journal.jsonl").read_bytes()
    faults = [] if raw.endswith(b"\n") else ["journal.jsonl: the last line is torn"]
    events = [json.loads(line) for line in raw.split(b"\n")[:-1]]
    for before, event in zip(events, events[1:]):
        if event["seq"] != before["seq"] + 1:
            faults.append(f"journal.jsonl: seq {event['seq']} follows {before['seq']}")
        if event["at"] < before["at"]:
            faults.append(f"journal.jsonl: seq {event['seq']} is earlier than the one before")
    for kind in ("hand_dealt", "hand_started", "hand_ended"):
        seen = Counter((e["actor"], e["hand"]) for e in events if e["kind"] == kind)
        faults += [f"journal.jsonl: {n} {kind} of hand {hand} of {actor}"
                   for (actor, hand), n in seen.items() if n > 1]
    closed = Counter(e["actor"] for e in events if e["kind"] == "closed")
    faults += [f"journal.jsonl: {n} closed of {actor}" for actor, n in closed.items() if n > 1]
    finished = sum(e["kind"] == "run_finished" for e in events)
    return faults + ([] if finished == 1 else [f"journal.jsonl: {finished} run_finished"])


def check_trees(run_dir: Path, repo: Path) -> list[str]:
    """git and the disk hold exactly the worktrees that the records name, and nothing is left locked."""
    kept = [r["worktree_path"] for r in _lines(run_dir / "summary.jsonl") if r["worktree_path"]]
    named = {Path(path).resolve() for path in kept}
    listed = git(repo, "worktree", "list", "--porcelain")
    known = {Path(line[9:]).resolve() for line in listed.splitlines() if line.startswith("worktree ")}
    faults = [f"git still knows {tree}, no record does" for tree in known - named - {repo.resolve()}]
    faults += [f"git does not know the kept {tree}" for tree in named - known]
    faults += [f"the kept {tree} is not there" for tree in named if not tree.is_dir()]
    faults += [f"{tree} is there, no record names it" for tree in (run_dir / "worktrees").glob("*")
               if tree.resolve() not in named]
    faults += [f"a lock is left: {lock}" for lock in (repo / ".git").rglob("*.lock")
               if lock.parent.name != "pitboss"]
    faults += [f"git: {line}" for line in listed.splitlines() if line.startswith(("prunable", "locked"))]
    return faults


def check_branches(run_dir: Path, repo: Path) -> list[str]:
    """Beside main there are only branches that a record names: nothing half made was forgotten."""
    named = {r["branch"] for r in _lines(run_dir / "summary.jsonl")} | {"main"}
    return [f"no record names the branch {name}" for name in _branches(repo) if name not in named]


def check_work(record: dict, repo: Path, promise: Promise, once: bool = True) -> list[str]:
    """Every line that the task wrote is there, and `once`: nothing was lost and nothing was done again."""
    branch = _branch_of(record, repo)
    committed = git(repo, "show", f"{branch}:{COMMITTED}", check=False).splitlines() if branch else []
    loose = git(repo, "show", f"{branch}:{LOOSE}", check=False).splitlines() if branch else []
    if record["worktree_path"]:
        path = Path(record["worktree_path"], LOOSE)
        loose = path.read_text().splitlines() if path.exists() else loose
    faults = []
    for kind, want, have in (("committed", promise.committed, committed), ("loose", promise.loose, loose)):
        faults += [f"{promise.task}: {kind} line {line!r}: {have.count(line)} times on {branch} or in "
                   f"{record['worktree_path']}" for line in want
                   if line not in have or (once and have.count(line) > 1)]
    return faults


def check_trail(trail: Path, task: str) -> list[str]:
    """The script ran from its begin to its end, once."""
    path = trail / task
    notes = path.read_text().split() if path.exists() else []
    return [] if notes == ["begin", "end"] else [f"{task}: its trail is {notes}"]


def check_processes(run_id: str, grace_s: float = 10) -> list[str]:
    """Nothing that carries the run's mark lives, `grace_s` from now at the latest (zombies are dead)."""
    marker = f"PITBOSS_RUN_ID={run_id}"
    try:
        wait_for(lambda: not processes_with(marker), grace_s, f"the end of {marker}")
    except AssertionError:
        return [f"process {pid} lives: {command}" for pid, command in processes_with(marker).items()]
    return []


def check_untouched(repo: Path) -> list[str]:
    """The repository is as `make_repo` made it: a run that never began left nothing in it."""
    faults = [f"a branch: {name}" for name in _branches(repo) if name != "main"]
    trees = git(repo, "worktree", "list", "--porcelain").count("worktree ")
    return faults + ([] if trees == 1 else [f"{trees} worktrees"])


def _lines(path: Path) -> list[dict]:
    raw = path.read_bytes()
    assert not raw or raw.endswith(b"\n"), f"{path}: the last line is not whole"
    return [json.loads(line) for line in raw.splitlines()]


def _branches(repo: Path) -> list[str]:
    return git(repo, "branch", "--format=%(refname:short)").split()


def _branch_of(record: dict, repo: Path) -> str | None:
    """The record's branch, else the one whose last part is the task's id."""
    if record["branch"]:
        return record["branch"]
    return next((name for name in _branches(repo) if name.endswith("/" + record["task_id"])), None)


def check_holds(run_dir: Path, hands: int = 1) -> list[str]:
    """No hand started while its account was held, by the journal and by the times of the hands' own files.

    `hands`: how many a hold must have sent back at the least, so that a run without one is no pass.
    """
    events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_bytes().split(b"\n")[:-1]]
    accounts = {e["actor"]: e["account"] for e in events if e["kind"] == "actor_added"}
    met = [e for e in events if e["kind"] == "hand_ended" and e.get("cause") == "limit"]
    faults = [] if len(met) >= hands else [f"{len(met)} hands met a limit"]
    for began in (e for e in events if e["kind"] == "hold_began" and e["hold"] == "limit"):
        later = [e for e in events if e["seq"] > began["seq"] and e.get("account") == began["account"]
                 and e["kind"] in ("hold_began", "hold_ended")]
        end = later[0]["at"] if later else float("inf")
        if later and later[0]["kind"] == "hold_ended" and end < began["until"] - 0.1:
            faults.append(f"a hold until {began['until']} ended at {end}")
        faults += [f"{e['actor']}: hand {e['hand']} started in a hold" for e in events
                   if e["kind"] == "hand_started" and began["at"] < e["at"] < end
                   and accounts[e["actor"]] == began["account"]]
        faults += [f"{path} was made in a hold" for actor, account in accounts.items()
                   if account == began["account"] for path in (run_dir / "tasks" / actor).glob("hand.*")
                   if began["at"] + 0.05 < path.stat().st_mtime < end - 0.05]
    return faults
