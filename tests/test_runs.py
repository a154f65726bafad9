"""Runs that are compared, settled, removed, or were made by another tool: what the person sees, what stays on disk.

Black box, but for two races: the file runs as a program, and the verdict comes from its output, its run folders,
git and /proc.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import pitboss
from rust_runs import RUN, RustRun, record
from test_cli import python_for_others
from tools import PITBOSS, PYTHON, Home, git, processes_with, read_events, read_records, wait_for

OTHER = RUN[:-1] + "2"
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, which only Linux has")
WORK = "$ write new.txt {}\n$ commit\n$ say done"


def manifest(home: Home, scripts: dict[str, str], run: str = "", name: str = "m.toml", repo: str = "r") -> Path:
    """A manifest with one task of the scripted agent a script, in a repository."""
    tasks = "".join(f'[[task]]\nid = "{task}"\ndirectory = "{repo}"\nprompt = {json.dumps(script)}\n'
                    for task, script in scripts.items())
    return home.manifest(f'[run]\n{run}\n[defaults]\nagent = "demo"\n{tasks}', name)


def deal(home: Home, scripts: dict[str, str], code: int = 0, **more) -> Path:
    """Dispatch to the end; the run folder."""
    home.pitboss("dispatch", "-q", manifest(home, scripts, **more), check=code)
    return home.run_dir()


def orphan(home: Home, scripts: dict[str, str], kill: bool = True, until: str = "tasks/a/hand.1", **more) -> Path:
    """A run whose dispatcher was killed once `until` was in its folder; with `kill` its agents are killed, too."""
    process = home.start("dispatch", "-q", manifest(home, scripts, **more))

    def begun() -> bool:
        runs = list(home.runs.glob("0*")) if home.runs.exists() else []
        journals = [r for r in runs if (r / "journal.jsonl").exists()]
        return any(e["kind"] == "hand_started" for j in journals for e in read_events(j)) and (runs[0] / until).exists()

    wait_for(begun, what="agents")
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    run = home.run_dir()
    if kill:
        wait_for(lambda: not kill_agents(run), what="their end")
    return run


def kill_agents(run: Path) -> list[int]:
    """SIGKILL to every process of a run's agents; those that there were."""
    found = list(processes_with(f"PITBOSS_RUN_ID={run.name}"))
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return found


def age(run: Path, seconds: float = 5 * 3600) -> Path:
    """Nothing in a run folder has changed for so long."""
    for folder, _, files in os.walk(run):
        for name in files:
            path = os.path.join(folder, name)
            found = os.lstat(path)
            times = found.st_atime - seconds, found.st_mtime - seconds
            os.utime(path, times, follow_symlinks=False)
    return run


def as_json(home: Home, *args, check: int = 0):
    return json.loads(home.pitboss(*args, "--json", check=check).stdout)


def pruned(home: Home, *args, check: int = 0) -> dict:
    """The one entry that `prune` shows."""
    (entry,) = as_json(home, "prune", *args, check=check)["runs"]
    return entry


def rust(home: Home, tasks=("a", "b"), text: str = "", **more) -> RustRun:
    """A run folder of the Rust tool over the repository `r`."""
    if not (home.root / "r").exists():
        home.repo("r")
    tables = "".join(f'[[task]]\nid = "{t}"\ndirectory = "{home.root}/r"\nprompt = "x"\n' for t in tasks)
    path = home.manifest(text or f"[defaults]\nmodel = \"claude-haiku-4-5\"\n{tables}", "rusty.toml")
    return RustRun(home.runs, path, {t: {"directory": str(home.root / "r")} for t in tasks}, **more)


# ---- diff

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A home with two finished runs over one repository: `same` did the same twice, `other` did not."""
    home = Home(tmp_path_factory.mktemp("two"))
    home.repo("r")
    same = WORK.format("same")
    first = deal(home, {"same": same, "other": WORK.format("one"), "gone": "$ say x", "dirty": "$ write d.txt d"}, name="a.toml")
    second = deal(home, {"same": same, "other": "$ write new.txt two\\nlines\n$ commit\n$ write left.txt x\n$ fail no", "late": "$ say x",
                         "dirty": "$ write d.txt e"}, code=1, name="b.toml")
    yield home, first, second
    home.end_everything()


def test_diff_compares_status_tokens_cost_and_git(two):
    home, first, second = two
    shown = as_json(home, "diff", first.name, second.name)
    rows = {row["task_id"]: row for row in shown["actors"]}
    assert set(rows) == {"same", "other", "gone", "dirty", "late"}
    assert (shown["a"]["run_id"], shown["b"]["run_id"]) == (first.name, second.name)
    assert (rows["other"]["a"]["status"], rows["other"]["b"]["status"]) == ("Success", "Failed")
    assert (rows["gone"]["b"], rows["late"]["a"]) == (None, None)
    for side, run in (("a", first), ("b", second)):
        records = {r["task_id"]: r for r in read_records(run)}
        for name, row in rows.items():
            if row[side]:
                assert row[side]["tokens"] == sum(records[name]["token_usage"].values())
                assert row[side]["cost_usd"] == records[name]["cost_usd"]
                assert row[side]["duration_ms"] == records[name]["duration_ms"]
        total = shown["totals"][side]
        assert total["tokens"] == sum(sum(r["token_usage"].values()) for r in records.values())
        assert total["cost_usd"] == pytest.approx(sum(r["cost_usd"] for r in records.values()))
    assert shown["totals"]["b"]["succeeded"] == 3
    assert rows["same"]["changes"]["files"] == []
    assert rows["other"]["changes"]["files"] == [{"path": "new.txt", "added": 2, "removed": 1}]
    stat_of = git(home.root / "r", "diff", "--numstat", rows["other"]["changes"]["a"], rows["other"]["changes"]["b"])
    assert stat_of.split() == ["2", "1", "new.txt"]


def test_diff_for_people_names_runs_actors_and_files(two):
    home, first, second = two
    said = home.pitboss("diff", first.name, second.name, check=0).stdout
    for words in (first.name, second.name, "Success", "Failed", "total", "new.txt", "+2", "-1", "only in run A",
                  "only in run B", "no difference"):
        assert words in said
    for line in said.splitlines():               # in a kept worktree, and in no commit
        assert ("not counted in B: untracked files" in line) == line.startswith(("other", "dirty"))
        assert ("not counted in A: untracked files" in line) == line.startswith("dirty")


def test_a_run_beside_itself_does_not_differ(two):
    home, first, _ = two
    shown = as_json(home, "diff", first.name, first.name)
    assert all(row["a"] == row["b"] and not row["changes"]["files"] for row in shown["actors"])


def test_rescued_work_is_compared(home):
    home.repo("r")
    one = deal(home, {"t": "$ write new.txt one"}, run='worktree_cleanup = "always"')
    two = deal(home, {"t": "$ write new.txt two"}, run='worktree_cleanup = "always"')
    (row,) = as_json(home, "diff", one.name, two.name)["actors"]
    assert row["changes"]["files"] == [{"path": "new.txt", "added": 1, "removed": 1}]
    assert row["changes"]["a"].startswith("refs/pitboss/rescue/")


def test_diff_without_the_repository_still_compares_the_rest(home):
    repo = home.repo("r")
    run = deal(home, {"t": WORK.format("x")})
    git(repo, "branch", "-D", read_records(run)[0]["branch"])
    said = home.pitboss("diff", run.name, run.name, check=0).stdout
    assert "no difference" in said            # the commit that it began at is still there
    shutil.rmtree(repo)
    (row,) = as_json(home, "diff", run.name, run.name)["actors"]
    assert row["changes"]["files"] is None and row["changes"]["note"]
    assert row["a"]["status"] == "Success"


def test_runs_in_different_repositories_are_told_apart(home):
    home.repo("r")
    home.repo("q")
    one = deal(home, {"t": WORK.format("x")})
    two = deal(home, {"t": WORK.format("y")}, repo="q")
    (row,) = as_json(home, "diff", one.name, two.name)["actors"]
    assert row["changes"]["files"] is None and "different repositories" in row["changes"]["note"]


@pytest.mark.parametrize("args, code, words", [
    (("ffffffff", "RUN"), 3, "no run ffffffff"), (("RUN", "../runs"), 3, "is not a run id"), (("RUN",), 2, "OTHER"),
    (("0", "RUN"), 3, "is the beginning of 2 runs"), (("/", "RUN"), 3, "is not a run id"), (("", "RUN"), 3, "is not a run id"),
])
def test_diff_of_what_is_not_there(two, args, code, words):
    home, first, _ = two
    done = home.pitboss("diff", *[first.name if a == "RUN" else a for a in args], check=code)
    assert words in done.stderr and not done.stdout and "Traceback" not in done.stderr


# ---- prune: settle

@needs_proc
def test_prune_says_what_it_would_do_and_changes_nothing(home):
    home.repo("r")
    run = age(orphan(home, {"a": "$ write w.txt x\n$ hang", "b": "$ say x"}, run="max_parallel = 1", until="worktrees/a/w.txt"))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    entry = pruned(home)
    assert (entry["action"], entry["state"], entry["run_id"]) == ("settle", "stale", run.name)
    assert entry["idle_secs"] >= 4 * 3600 and entry["size_bytes"] > 10_000
    done = home.pitboss("prune", "--remove", check=0)
    assert "refuse" in done.stdout and "untracked files" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@needs_proc
def test_a_pruned_run_is_settled_and_can_be_dealt_again(home):
    home.repo("r")
    run = age(orphan(home, {"a": "$ write w.txt x\n$ hang", "b": "$ say x"}, run="max_parallel = 1", until="worktrees/a/w.txt"))
    entry = pruned(home, "--apply")
    tree = run / "worktrees" / "a"
    assert (entry["action"], entry["worktrees"][0]["path"]) == ("settle", str(tree))
    assert [(r["task_id"], r["status"]) for r in read_records(run)] == [("a", "Cancelled")]      # b never began
    assert json.loads((run / "summary.json").read_text())["tasks_not_started"] == 1
    assert (tree / "w.txt").read_text() == "x\n"
    assert as_json(home, "list")[0]["state"] == "complete"
    home.pitboss("prune", "--apply", "--older-than", "0s", check=0)           # nothing is left to settle
    text = (run / "manifest.snapshot.toml").read_text().replace("$ hang", "$ say fine").replace("\\n$ hang", "")
    (run / "manifest.snapshot.toml").write_text(text)
    done = home.pitboss("resume", "-q", run.name)
    assert done.returncode == 0, done.stderr
    assert home.run_dir() != run and {r["status"] for r in read_records(home.run_dir())} == {"Success"}


@needs_proc
def test_a_run_with_living_agents_or_a_recent_one_is_left(home):
    home.repo("r")
    run = orphan(home, {"a": "$ hang"}, kill=False)
    age(run)
    for args in ((), ("--remove",)):
        entry = pruned(home, "--apply", *args)
        assert entry["action"] == "leave" and "live" in entry["reason"]
    assert processes_with(f"PITBOSS_RUN_ID={run.name}")
    home.pitboss("cancel", run.name, check=0)


@needs_proc
def test_only_what_is_old_enough_is_pruned(home):
    home.repo("r")
    run = orphan(home, {"a": "$ hang"})
    assert pruned(home, "--apply")["action"] == "leave"
    age(run, 1800)
    assert pruned(home, "--older-than", "1h")["action"] == "leave"
    assert pruned(home, "--older-than", "20m")["action"] == "settle"
    assert not (run / "summary.json").exists()


def test_a_live_run_is_no_orphan(home):
    home.repo("r")
    process = home.start("dispatch", "-q", manifest(home, {"a": "$ hang"}))
    wait_for(lambda: home.runs.exists() and list(home.runs.glob("0*/lock")), what="the run")
    wait_for(lambda: as_json(home, "list")[0]["state"] == "running", what="its lock")
    age(home.run_dir(), 10 ** 6)
    assert as_json(home, "prune", "--apply", "--remove", "--include-aborted", "--older-than", "0s")["runs"] == []
    process.terminate()
    process.terminate()
    home.pitboss("cancel", home.run_dir().name, check=None)
    process.communicate()


# ---- prune: remove

@needs_proc
def test_a_run_with_unsaved_work_is_refused_and_its_place_is_told(home):
    home.repo("r")
    run = age(orphan(home, {"a": "$ write w.txt mine\n$ hang"}, until="worktrees/a/w.txt"))
    tree = run / "worktrees" / "a"
    done = home.pitboss("prune", "--remove", "--apply", check=4)
    assert "untracked files" in done.stdout and str(tree) in done.stdout
    assert (tree / "w.txt").read_text() == "mine\n" and not (run / "summary.json").exists()


@needs_proc
def test_under_always_unsaved_work_is_saved_before_the_run_goes(home):
    repo = home.repo("r")
    run = age(orphan(home, {"a": "$ hang"}, run='worktree_cleanup = "always"'))
    (run / "worktrees" / "a" / "w.txt").write_text("mine")
    entry = pruned(home, "--remove", "--apply", "--older-than", "0s")
    assert entry["action"] == "remove" and not run.exists()
    ref = f"refs/pitboss/rescue/{run.name[:8]}/a"
    assert git(repo, "show", f"{ref}:w.txt") == "mine"
    assert as_json(home, "list") == []
    assert not [n for n in os.listdir(home.runs) if n.startswith(".gone")]


def test_a_kept_tree_of_a_finished_run_that_always_saves_is_saved_and_the_command_is_told(home):
    repo = home.repo("r")
    run = deal(home, {"a": "$ say x"}, run='worktree_cleanup = "always"')
    # a tree that was locked by the user when the actor settled stays; now it is unlocked
    shutil.rmtree(home.runs)
    gate = home.root / "gate"
    script = f"$ write w.txt mine\n$ run git worktree unlock . ; git worktree lock --reason user .\n$ run touch {gate}"
    run = deal(home, {"a": script}, run='worktree_cleanup = "always"')
    tree = run / "worktrees" / "a"
    assert tree.exists()
    refused = pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "0s", check=4)
    assert "locked" in refused["reason"] and tree.exists()
    git(repo, "worktree", "unlock", str(tree))
    entry = pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "0s")
    (told,) = entry["worktrees"]
    assert not run.exists() and "git -C" in told["note"]
    command = told["note"].partition(": ")[2]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert (tree / "w.txt").read_text() == "mine\n"


@needs_proc
def test_committed_work_stays_on_its_branch_when_a_run_is_removed(home):
    repo = home.repo("r")
    script = "$ write w.txt x\n$ commit\n$ run touch $PITBOSS_RUN_DIR/tasks/a/ready\n$ hang"
    run = orphan(home, {"a": script}, until="tasks/a/ready")
    branch = git(run / "worktrees" / "a", "branch", "--show-current").strip()
    tip = git(repo, "rev-parse", branch)
    assert git(repo, "show", f"{branch}:w.txt") == "x\n"
    entry = pruned(home, "--remove", "--apply", "--older-than", "0s")
    assert entry["action"] == "remove" and not run.exists()
    assert git(repo, "rev-parse", branch) == tip
    assert len(git(repo, "worktree", "list").splitlines()) == 1


def test_finished_runs_go_only_when_they_are_named_and_old(home):
    home.repo("r")
    run = age(deal(home, {"a": WORK.format("x")}), 40 * 86400)
    assert as_json(home, "prune", "--remove", "--apply", "--older-than", "30d", "--include-aborted")["runs"] == []
    for args in (["--include-complete"], ["--include-complete", "--remove"], ["--include-complete", "--older-than", "1d"]):
        assert "--include-complete" in home.pitboss("prune", "--apply", *args, check=2).stderr
    assert pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "50d")["action"] == "leave"
    assert run.exists()
    assert pruned(home, "--remove", "--include-complete", "--older-than", "30d")["action"] == "remove"
    assert run.exists()
    pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "30d")
    assert not run.exists()


def test_a_run_folder_with_something_of_somebodys_in_it_stays(home):
    home.repo("r")
    run = age(deal(home, {"a": "$ say x"}))
    (run / "notes.txt").write_text("mine")
    entry = pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "0s", check=4)
    assert "notes.txt" in entry["reason"] and (run / "notes.txt").read_text() == "mine"
    (run / "notes.txt").unlink()
    (run / "worktrees" / "strange").mkdir()
    entry = pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "0s", check=4)
    assert "strange" in entry["reason"] and run.exists()


def test_everything_that_a_run_writes_is_known_to_prune(home):
    home.repo("r")
    deal(home, {"a": "$ say x", "b": "$ fail x"}, code=1, run="emit_event_stream = true")
    entry = pruned(home, "--remove", "--include-complete", "--older-than", "0s")
    assert entry["action"] == "remove", entry["reason"]


@needs_proc
def test_a_process_in_the_run_folder_keeps_it(home):
    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    sitter = subprocess.Popen(["sleep", "60"], cwd=run / "tasks")
    try:
        entry = pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "0s", check=4)
        assert str(sitter.pid) in entry["reason"] and run.exists()
    finally:
        sitter.kill()
        sitter.wait()


@needs_proc
def test_a_worktree_that_another_run_works_in_keeps_the_folder(home):
    home.repo("r")
    first = deal(home, {"a": "$ write w.txt x\n$ fail x"}, code=1)
    text = (first / "manifest.snapshot.toml").read_text()
    (first / "manifest.snapshot.toml").write_text(text.replace("$ fail x", "$ hang"))
    process = home.start("resume", "-q", first.name)
    wait_for(lambda: home.run_dir() != first and (home.run_dir() / "tasks" / "a" / "hand.1").exists(), what="the second run")
    process.kill()
    process.communicate()
    second = home.run_dir()
    wait_for(lambda: not kill_agents(second), what="their end")
    git(first / "worktrees" / "a", "add", "-A")
    git(first / "worktrees" / "a", "commit", "-qm", "so that nothing is unsaved")
    age(first)
    args = ("prune", "--remove", "--apply", "--include-complete", "--older-than", "1h")
    newer, older = as_json(home, *args, check=4)["runs"]
    assert (newer["run_id"], newer["action"]) == (second.name, "leave")
    assert (older["run_id"], older["action"]) == (first.name, "refuse")
    assert f"another run works in it: {second.name}" in older["reason"] and first.exists()


def test_a_worktree_that_another_run_takes_meanwhile_stays(home):
    repo = home.repo("r")
    tree = home.root / "tree"
    git(repo, "worktree", "add", "-q", "-b", "b", str(tree))
    git(repo, "worktree", "lock", "--reason", f"pitboss {OTHER} a", str(tree))
    orphan_of = pitboss.Orphan(str(home.runs / RUN), None, 0.0, 0, 0)
    told = asyncio.run(pitboss.clear_tree(pitboss.Git(os.environ, 0o022), orphan_of, "a", str(tree), {}, True))
    assert OTHER in told["kept"] and tree.exists()
    assert "locked" in git(repo, "worktree", "list", "--porcelain")


def test_a_run_that_somebody_holds_is_not_removed(home):
    import fcntl

    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    seen = pitboss.look_at_run(str(run))
    with open(run / "lock", "r+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(pitboss.Refused, match="holds the run"):
            pitboss.remove_orphan(pitboss.Orphan(str(run), seen, 0.0, 0, 0))
    assert run.exists()


@pytest.mark.parametrize("text", ["", "4", "h", "-1h", "1y", "1h ", "nan", "1e9h", "4 h", "∞h"])
def test_an_age_that_is_none_is_refused(home, text):
    said = home.pitboss("prune", f"--older-than={text}", check=2).stderr
    assert "--older-than" in said and "24h" in said


def test_prune_without_any_run(home):
    assert "nothing to prune" in home.pitboss("prune", check=0).stderr
    assert as_json(home, "prune") == {"applied": False, "runs": []}


@needs_proc
def test_an_aborted_run_goes_only_when_asked(home):
    folder = home.runs / RUN
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    age(home.runs)
    assert as_json(home, "prune", "--remove", "--apply")["runs"] == []
    assert pruned(home, "--include-aborted", "--apply")["action"] == "leave"
    pruned(home, "--include-aborted", "--remove", "--apply")
    assert not folder.exists()


# ---- run folders that are broken, foreign to this user, or from the future

def test_a_journal_of_a_newer_version_is_named_and_never_removed(home):
    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (run / "journal.jsonl").write_text("".join(lines).replace('"format":1', '"format":99'))
    assert as_json(home, "list")[0]["state"] == "complete"          # its summary is readable
    (run / "summary.json").unlink()
    age(run)
    assert "format 99" in as_json(home, "list")[0]["state"]
    for line in (["status", run.name], ["resume", run.name], ["attach", run.name, "a"], ["diff", run.name, run.name]):
        done = home.pitboss(*line, check=5)
        assert "format 99" in done.stderr and "newer" in done.stderr
    done = home.pitboss("prune", "--remove", "--apply", "--include-aborted", "--older-than", "0s", check=0)
    assert "left alone" in done.stderr and run.exists()


@pytest.mark.parametrize("name", ["meta.json", "manifest.snapshot.toml"])
def test_a_half_written_folder_is_no_run_to_go_on_with(home, name):
    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    for gone in (name, "summary.json"):
        (run / gone).unlink()
    before = sorted(p.name for p in run.iterdir())
    for line in (["resume", run.name], ["cancel", run.name]):
        done = home.pitboss(*line)
        assert done.returncode == 4 and "not a whole run folder" in done.stderr, done.stderr
    home.pitboss("status", run.name, check=0)
    home.pitboss("list", check=0)
    assert sorted(p.name for p in run.iterdir()) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"tasks": [1, {}, {"task_id": 5}, {"task_id": "a", "token_usage": 7}]}',
                                  '{"tasks": [{"task_id": "a", "status": "Approved", "duration_ms": "long"}]}', '"x"', "NaN"])
def test_a_summary_that_is_not_what_it_should_be_breaks_nothing(home, text):
    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    for target in ("summary.json", "meta.json"):
        kept = (run / target).read_bytes()
        (run / target).write_text(text)
        for line in (["list"], ["status", run.name], ["status", run.name, "--json"], ["diff", run.name, run.name], ["prune"]):
            done = home.pitboss(*line)
            assert done.returncode == 0 and "bug" not in done.stderr, (line, done.stderr)
        (run / target).write_bytes(kept)


@pytest.fixture
def stranger():
    """A home whose program runs as a user who may not do everything; `locked` is a folder that user cannot open."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        home = Home(Path(name))
        shutil.copy(PITBOSS, home.root / "pitboss.py")
        python = python_for_others() if os.geteuid() == 0 else PYTHON
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        home.argv = lambda *args: [*become, python, str(home.root / "pitboss.py"), *map(str, args)]
        home.own = lambda: become and subprocess.run(["chown", "-R", "65534:65534", name], check=True)
        yield home
        for folder, names, _ in os.walk(name):
            for each in names:
                os.chmod(os.path.join(folder, each), 0o755)


def test_without_permission_the_folder_is_named(stranger):
    secret = stranger.runs / RUN
    secret.mkdir(parents=True)
    (secret / "meta.json").write_text("{}")
    stranger.own()
    secret.chmod(0)
    done = stranger.pitboss("list", check=0)
    assert "unreadable" in done.stdout and "Permission denied" in done.stdout
    for line in (["status", RUN], ["resume", RUN], ["cancel", RUN]):
        done = stranger.pitboss(*line)
        assert done.returncode == 5 and "Permission denied" in done.stderr and RUN in done.stderr, (line, done)
    stranger.pitboss("prune", "--remove", "--apply", "--include-aborted", "--older-than", "0s", check=0)
    assert secret.exists()
    stranger.runs.chmod(0)
    done = stranger.pitboss("list", check=5)
    assert "Permission denied" in done.stderr
    stranger.runs.chmod(0o700)


def test_a_file_and_a_broken_link_with_the_name_of_a_run_are_no_runs(home):
    home.runs.mkdir(parents=True)
    (home.runs / RUN).write_text("x")
    (home.runs / OTHER).symlink_to("nowhere")
    assert as_json(home, "list") == []
    assert "no run" in home.pitboss("status", RUN, check=3).stderr
    home.pitboss("prune", "--remove", "--apply", "--include-aborted", "--older-than", "0s", check=0)
    assert (home.runs / RUN).read_text() == "x"


# ---- runs of the Rust tool

def test_a_finished_rust_run_is_shown_with_its_tokens_and_cost(home):
    run = rust(home)
    run.finish(record("a"), record("b", "ApprovalRejected", parent_task_id=None))
    before = run.contents()
    (row,) = as_json(home, "list")
    assert (row["state"], row["mode"], row["name"], row["tasks_total"], row["tasks_failed"]) == ("complete", "flat", "rusty", 2, 1)
    seen = as_json(home, "status", RUN[:8])
    by_name = {a["task_id"]: a for a in seen["actors"]}
    assert by_name["b"]["status"] == "ApprovalRejected" and by_name["a"]["role"] == "task"
    # haiku: 1 USD a million tokens in, 5 out, 0.10 from the cache
    assert by_name["a"]["cost_usd"] == pytest.approx((1000 * 1 + 2000 * 5 + 10000 * 0.10) / 1e6)
    assert row["total_cost_usd"] == pytest.approx(2 * by_name["a"]["cost_usd"])
    said = home.pitboss("status", RUN, check=0).stdout
    assert "Rust tool" in said and "0.5.0" in said and "a is done." in said
    assert "no difference" not in home.pitboss("diff", RUN, RUN, check=0).stdout        # no branch is known
    assert run.contents() == before


def test_records_joined_on_one_line_are_all_read(home):
    run = rust(home, tasks=(), lead={"id": "boss", "directory": "/", "model": "claude-haiku-4-5"},
               text='[run]\nmax_workers = 2\nbudget_usd = 1.0\n[[lead]]\nid = "boss"\ndirectory = "r"\nprompt = "x"\n')
    run.settle(record("w1", parent_task_id="boss"), record("w2", "Failed", parent_task_id="boss"), joined=True)
    with open(run.path / "summary.jsonl", "a") as f:
        f.write('{"task_id": "torn", "sta')
    (row,) = as_json(home, "list")
    assert (row["state"], row["mode"], row["tasks_failed"]) == ("stale", "hierarchical", 1)
    actors = {a["task_id"]: a for a in as_json(home, "status", RUN)["actors"]}
    assert set(actors) == {"boss", "w1", "w2"}
    assert (actors["boss"]["role"], actors["w1"]["role"], actors["w1"]["parent_task_id"]) == ("lead", "worker", "boss")
    assert (actors["boss"]["status"], actors["boss"]["state"]) == (None, "Pending")


@needs_proc
def test_a_rust_run_that_somebody_writes_to_is_running_and_left_alone(home):
    run = rust(home)
    log = run.begin("a")
    run.age(10 ** 6)
    assert as_json(home, "list")[0]["state"] == "stale"
    reader = open(log)                                       # somebody who only looks is not its dispatcher
    assert as_json(home, "list")[0]["state"] == "stale"
    reader.close()
    before = run.contents()
    with open(log, "a"):
        (row,) = as_json(home, "list", "--active")
        assert (row["state"], row["agents_alive"]) == ("running", 1)
        assert as_json(home, "prune", "--remove", "--apply", "--include-aborted")["runs"] == []
        assert "goes on" in home.pitboss("resume", RUN, check=4).stderr
        assert "another tool" in home.pitboss("cancel", RUN, check=4).stderr
    (actor, waiting) = as_json(home, "status", RUN)["actors"]
    assert (actor["state"], waiting["state"]) == ("Running", "Pending")
    assert sum(actor["token_usage"].values()) > 0           # from its log
    assert run.contents() == before


@needs_proc
def test_a_rust_run_with_a_listening_socket_is_running(home):
    import socket

    run = rust(home)
    run.begin("a")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:        # a socket's path is short
        home.env["XDG_RUNTIME_DIR"] = name
        os.mkdir(f"{name}/pitboss")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{name}/pitboss/{RUN}.control.sock")
            server.listen()
            server.settimeout(0)
            assert as_json(home, "list")[0]["state"] == "running"
            with pytest.raises(BlockingIOError):         # a connection would take the place of its operator
                server.accept()
    assert as_json(home, "list")[0]["state"] == "stale"


def test_a_rust_run_in_which_nothing_began_is_aborted(home):
    rust(home)
    (row,) = as_json(home, "list")
    assert (row["state"], row["tasks_total"]) == ("aborted", 2)
    assert {a["state"] for a in as_json(home, "status", RUN)["actors"]} == {"Pending"}


@pytest.mark.parametrize("command", [["cancel", RUN], ["status", RUN, "--rebuild"], ["deal", "FOLDER"]])
def test_nothing_is_written_to_a_rust_run(home, command):
    run = rust(home)
    run.begin("a")
    before = run.contents()
    done = home.pitboss(*[str(run.path) if word == "FOLDER" else word for word in command], check=4)
    assert "another tool" in done.stderr and "Traceback" not in done.stderr
    assert run.contents() == before and not (run.path / "lock").exists()


def test_attach_shows_the_log_of_a_rust_run_to_its_end(home):
    run = rust(home)
    run.begin("a", "bash.jsonl")
    done = home.pitboss("attach", RUN, "a", check=0)
    assert "* Bash" in done.stdout and "v " in done.stdout
    raw = home.pitboss("attach", RUN, "a", "--raw", "--lines", "999999", check=0)
    assert raw.stdout == (run.path / "tasks" / "a" / "stdout.log").read_text()
    assert "there are: a, b" in home.pitboss("attach", RUN, "nobody", check=3).stderr


@pytest.mark.parametrize("told", ["by the default place", "by the manifest", "by a record"])
def test_a_run_in_two_folders_is_one(home, told):
    """What --run-dir names has the manifest and the records, another place the logs."""
    elsewhere, logs = home.root / "elsewhere", home.runs if told != "by a record" else home.root / "third"
    run = rust(home, run_dir=elsewhere)
    log = run.begin("a", "bash.jsonl", folder=logs / RUN)
    run.begin("b", "bash.jsonl", folder=logs / RUN)
    run.settle(record("a", log_path=str(log) if told == "by a record" else None))
    where = ["--run-dir", str(elsewhere)]
    if told == "by the manifest":
        shutil.copyfile(run.path / "resolved.json", home.runs / RUN / "resolved.json")
        where = []
    (row,) = as_json(home, "list", *where)
    assert (row["state"], row["tasks_total"]) == ("stale", 2)
    actors = as_json(home, "status", RUN, *where)["actors"]
    assert [(a["task_id"], a["status"], a.get("state")) for a in actors] == [("a", "Success", None), ("b", None, "Running")]
    for name in "ab":
        assert "* Bash" in home.pitboss("attach", RUN, name, *where, check=0).stdout


def test_a_read_only_rust_run_can_be_looked_at(stranger):
    run = rust(stranger)
    run.begin("a")
    run.settle(record("a"))
    stranger.own()
    run.age(5 * 3600)
    for path in (run.path, *run.path.rglob("*"), stranger.runs):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for line in (["list"], ["status", RUN], ["attach", RUN, "a"], ["prune", "--remove"]):
        done = stranger.pitboss(*line)
        assert done.returncode == 0 and "bug" not in done.stderr, (line, done)
    done = stranger.pitboss("prune", "--remove", "--apply", check=5)
    assert "Permission denied" in done.stdout and run.path.exists()


@pytest.mark.parametrize("name, text", [
    ("resolved.json", "["), ("resolved.json", '{"tasks": 5, "lead": []}'), ("resolved.json", '{"tasks": [{"id": "../../x"}]}'),
    ("meta.json", "{"), ("meta.json", '{"manifest_path": 7}'), ("summary.jsonl", "\x00\n[1]\n{}\n"),
    ("summary.json", '{"tasks": {}}'), ("summary.json", '{"tasks": [{"task_id": "a", "token_usage": {"input": -1}}]}'),
    ("tasks", "a file"),
])
def test_junk_in_a_rust_run_breaks_nothing(home, name, text):
    run = rust(home)
    run.settle(record("a"))
    (run.path / name).write_text(text)
    (run.path / "junk").mkdir()
    for line in (["list"], ["status", RUN], ["status", RUN, "--json"], ["diff", RUN, RUN], ["prune", "--remove"]):
        done = home.pitboss(*line)
        assert done.returncode == 0 and "bug" not in done.stderr, (line, done.stderr)


CLAUDE = """#!/bin/sh
[ "$1" = --version ] && { echo "2.1.197 (stand-in)"; exit; }
{ pwd; for word; do echo "$word"; done; } >"$SEEN/$PITBOSS_TASK_ID"
read -r message
echo '{"type":"result","subtype":"success","is_error":false,"result":"fine","session_id":"x"}'
"""


def stand_in(home: Home) -> tuple[dict, Path]:
    """(environment with a program that writes down how it was called in place of claude, where it does)."""
    seen, path = home.root / "seen", home.root / "claude"
    seen.mkdir()
    path.write_text(CLAUDE)
    path.chmod(0o755)
    return {"PITBOSS_CLAUDE_BINARY": str(path), "SEEN": str(seen)}, seen


def test_a_rust_run_is_dealt_again_in_its_sessions_and_worktrees(home):
    env, seen = stand_in(home)
    run = rust(home, tasks=("a", "b", "c"))
    tree = home.root / "r-pitboss-a"
    git(home.root / "r", "worktree", "add", "-q", "-b", "rusty/a", str(tree))
    (tree / "half.txt").write_text("half done")
    clean = home.root / "r-pitboss-c"
    git(home.root / "r", "worktree", "add", "-q", "-b", "rusty/c", str(clean))
    run.begin("b")                                          # it has no record: its log tells its session
    run.settle(record("a", "Failed", worktree_path=str(tree)),
               record("c", "SpawnFailed", worktree_path=str(clean), claude_session_id=None))
    before = run.contents()
    home.pitboss("resume", "-q", RUN, env=env, check=0)
    new = home.run_dir()
    assert new != run.path and run.contents() == before
    assert {r["task_id"]: r["status"] for r in read_records(new)} == {"a": "Success", "b": "Success", "c": "Success"}
    calls = {name: (seen / name).read_text().splitlines() for name in "abc"}
    assert calls["a"][0] == str(tree) and (tree / "half.txt").exists()
    assert calls["a"][calls["a"].index("--resume") + 1] == "session-a"
    session = json.loads((run.path / "tasks" / "b" / "stdout.log").read_text().splitlines()[0])["session_id"]
    assert calls["b"][calls["b"].index("--resume") + 1] == session
    assert "--resume" not in calls["c"] and "--session-id" in calls["c"]
    meta = json.loads((new / "meta.json").read_text())
    assert (meta["resumed_from"], meta["manifest_name"]) == (RUN, "rusty")
    tasks = json.loads((new / "resolved.json").read_text())["tasks"]
    assert [t["resume_session_id"] for t in tasks] == ["session-a", session, None]
    assert not clean.exists()
    assert git(home.root / "r", "rev-parse", "rusty/a", "rusty/c")     # branches that it did not make are not removed


def test_only_what_failed_of_a_rust_run_can_be_dealt_again(home):
    env, seen = stand_in(home)
    run = rust(home)
    run.finish(record("a"), record("b", "TimedOut"))
    home.pitboss("resume", "-q", "--failed", RUN, env=env, check=0)
    assert os.listdir(seen) == ["b"]
    shutil.rmtree(run.path)
    run = rust(home)
    run.finish(record("a"), record("b"))
    assert "succeeded" in home.pitboss("resume", "--failed", RUN, env=env, check=4).stderr


def test_a_rust_run_without_its_manifest_cannot_be_dealt_again(home):
    run = rust(home)
    run.finish(record("a"), record("b"))
    (run.path / "manifest.snapshot.toml").unlink()
    assert "manifest.snapshot.toml" in home.pitboss("resume", RUN, check=4).stderr


def test_a_rust_run_is_never_settled_and_removed_only_when_its_work_is_safe(home):
    run = rust(home)
    tree = home.root / "r-pitboss-a"
    git(home.root / "r", "worktree", "add", "-q", "-b", "rusty/a", str(tree))
    (tree / "half.txt").write_text("half done")
    run.begin("a")
    (run.path / "tasks" / "a" / "worktree.path").write_text(f"{tree}\n")
    run.age(5 * 3600)
    before = run.contents()
    assert pruned(home, "--apply")["action"] == "leave"
    entry = pruned(home, "--remove", "--apply", check=4)
    assert "untracked files" in entry["reason"] and entry["worktrees"][0]["path"] == str(tree)
    assert run.contents() == before and (tree / "half.txt").read_text() == "half done"
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "half")
    entry = pruned(home, "--remove", "--apply")
    assert entry["action"] == "remove" and not run.path.exists() and not tree.exists()
    assert git(home.root / "r", "show", "rusty/a:half.txt") == "half done"


def test_two_prunes_at_once_remove_a_run_once(home):
    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    args = ("prune", "--remove", "--apply", "--include-complete", "--older-than", "0s")
    both = [home.start(*args) for _ in range(2)]
    codes = sorted(p.communicate() and p.returncode for p in both)
    assert codes[0] == 0 and codes[1] in (0, 4, 5) and not run.exists()
    assert not [name for name in os.listdir(home.runs) if run.name in name]


def test_a_read_only_runs_folder_does_not_keep_a_rust_run_from_being_dealt_again(stranger):
    env, seen = stand_in(stranger)
    elsewhere = stranger.root / "elsewhere"
    run = rust(stranger, tasks=("a",), run_dir=elsewhere)
    run.settle(record("a"))
    stranger.own()
    for path in (run.path, *run.path.rglob("*"), elsewhere):
        path.chmod(0o555 if path.is_dir() else 0o444)
    stranger.pitboss("resume", "-q", "--run-dir", elsewhere, RUN, env=env, check=0)
    assert "session-a" in (seen / "a").read_text() and stranger.run_dir().name != RUN
    assert os.listdir(elsewhere) == [RUN]


def test_what_a_rust_run_says_is_safe_on_a_terminal_and_free_of_secrets(home):
    run = rust(home)
    evil = "\x1b[2Jevil\x1b]0;x\x07"
    run.finish(record(evil, "\x1b[31mOdd", worktree_path=str(home.root), final_message_preview="key sk-ant-api03-" + "x" * 30),
               record("b", failure_reason={"kind": evil}, branch=evil))
    run.write("meta.json", {"manifest_name": evil, "pitboss_version": evil})
    for line in (["list"], ["status", RUN], ["diff", RUN, RUN], ["attach", RUN, "nobody"], ["prune", "--remove"]):
        done = home.pitboss(*line)
        assert "\x1b" not in done.stdout + done.stderr and "\x07" not in done.stdout + done.stderr, line
    assert "sk-ant" not in home.pitboss("status", RUN, "--json", check=0).stdout


def test_diff_without_git_compares_the_rest(two):
    home, first, second = two
    done = home.pitboss("diff", first.name, second.name, check=0, env={"PATH": "/nonexistent"})
    assert "Success" in done.stdout and "total" in done.stdout and "git" in done.stdout


def test_diff_of_a_rust_run_without_git(home):
    rust(home).finish(record("a", branch="x"), record("b"))
    assert "a is done" not in home.pitboss("diff", RUN, RUN, check=0, env={"PATH": "/nonexistent"}).stdout


def test_what_an_earlier_removal_left_is_cleared_only_when_removing(home):
    left = home.runs / f".gone-{RUN}"
    left.mkdir(parents=True)
    for args in ([], ["--apply"], ["--remove"]):
        home.pitboss("prune", *args, check=0)
        assert left.exists()
    home.pitboss("prune", "--remove", "--apply", check=0)
    assert not left.exists()


def test_a_link_to_a_run_folder_is_not_followed_for_removal(home):
    home.repo("r")
    run = deal(home, {"a": "$ say x"})
    real = home.root / "real"
    run.rename(real)
    run.symlink_to(real)
    entry = pruned(home, "--remove", "--apply", "--include-complete", "--older-than", "0s", check=4)
    assert "link" in entry["reason"] and (real / "journal.jsonl").exists()


@needs_proc
def test_a_drained_run_that_is_pruned_begins_nothing(home):
    home.repo("r")
    gate = home.root / "gate"
    scripts = {"a": f"$ run while [ ! -e {gate} ]; do sleep 0.05; done", "b": "$ hang", "c": "$ say never"}
    process = home.start("dispatch", "-q", manifest(home, scripts, run="max_parallel = 2"))
    wait_for(lambda: home.runs.exists() and len(list(home.runs.glob("0*/tasks/*/hand.1"))) == 2, what="a and b")
    run = home.run_dir()
    process.send_signal(2)
    wait_for(lambda: any(e["kind"] == "drained" for e in read_events(run)), what="the drain")
    gate.touch()
    wait_for(lambda: (run / "summary.jsonl").exists(), what="the end of a: its slot is free now")
    process.kill()
    process.communicate()
    wait_for(lambda: not kill_agents(run), what="their end")
    pruned(home, "--apply", "--older-than", "0s")
    assert [(r["task_id"], r["status"]) for r in read_records(run)] == [("a", "Success"), ("b", "Cancelled")]
    assert not (run / "tasks" / "c").exists() and not (run / "worktrees" / "c").exists()
