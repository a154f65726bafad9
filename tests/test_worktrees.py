"""Worktrees: no work is lost, they begin where they should, and a later run finds them again.

Agents are shell scripts (the prompt is the script). What they left is written down by content, by the last
line of the script; the verdict comes from git and the file system (`trees.py`).
"""
from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
from pathlib import Path

import pytest

import pitboss
from tools import Home, git, make_repo, read_records, wait_for
from trees import CONFIGS, Case, deal_cases, make_base, note_of, problems_of, read_found, read_tree

TREES = int(os.environ.get("PITBOSS_TEST_TREES", "300"))
SEED = int(os.environ.get("PITBOSS_TEST_TREES_SEED", "1"))
TREES_PER_RUN = 25
POLICIES = ("always", "on_success", "never")
AGENT = '[agent.sh]\ncommand = ["sh", "{prompt_file}"]\nformat = "text"\n'


# Manifests and runs

def _toml(values: dict) -> str:
    """Key lines; JSON's spelling of text, numbers, booleans and lists is TOML's too."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def manifest(home: Home, tasks: list[dict], name: str = "m.toml", **run) -> Path:
    """A flat manifest of shell tasks; `tasks` are the `[[task]]` tables, `run` the keys of `[run]`."""
    text = f'[run]\n{_toml(run)}\n[defaults]\nagent = "sh"\ntimeout_secs = 300\n\n{AGENT}'
    for task in tasks:
        text += "\n[[task]]\n" + _toml({k: str(v) if isinstance(v, Path) else v for k, v in task.items()})
    return home.manifest(text, name)


def task(repo: Path, prompt: str = "true", id: str = "a", **more) -> dict:
    return {"id": id, "directory": repo, "prompt": prompt, **more}


def run_folder(stdout: str) -> Path:
    """The last line of dispatch."""
    return Path(stdout.rstrip("\n").rpartition("\n")[2])


def records_of(stdout: str) -> dict[str, dict]:
    return {record["task_id"]: record for record in read_records(run_folder(stdout))}


def deal(home: Home, tasks: list[dict], check: int | None = 0, options: dict | None = None,
         **run) -> dict[str, dict]:
    """Dispatch shell tasks and return their records by id."""
    done = home.pitboss("dispatch", manifest(home, tasks, **run), timeout=300, check=check, **(options or {}))
    assert done.stdout, f"exit {done.returncode}\n{done.stderr}"
    return records_of(done.stdout)


def reason(record: dict) -> str:
    return (record["failure_reason"] or {}).get("message") or ""


def branches(repo: Path) -> set[str]:
    return set(git(repo, "for-each-ref", "--format=%(refname:short)", "refs/heads").split())


def trees_of(repo: Path) -> list[str]:
    """Folders of the linked worktrees that git knows of."""
    lines = git(repo, "worktree", "list", "--porcelain").splitlines()
    return [line.removeprefix("worktree ") for line in lines if line.startswith("worktree ")][1:]


def locked_trees(repo: Path) -> list[str]:
    """Folders of the linked worktrees that somebody locked."""
    entries = [entry.splitlines() for entry in git(repo, "worktree", "list", "--porcelain").split("\n\n")]
    return [lines[0].removeprefix("worktree ") for lines in entries
            if any(line.startswith("locked") for line in lines)]


def commit_on(repo: Path, branch: str, name: str) -> str:
    """Make `branch` at HEAD with one more commit; the checkout stays where it was."""
    before = git(repo, "rev-parse", "--abbrev-ref", "HEAD").strip()
    git(repo, "checkout", "-q", "-b", branch)
    (repo / name).write_text(f"{name}\n")
    git(repo, "add", name)
    git(repo, "commit", "-q", "-m", name)
    git(repo, "checkout", "-q", before)
    return git(repo, "rev-parse", branch).strip()


IDENTITY = "export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@a GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@a\n"


def committing(name: str) -> str:
    """A script that commits one new file."""
    return f"{IDENTITY}echo {name} >{name} && git add {name} && git commit -qm {name}"


# 1. Whatever the agent left: nothing is lost

def run_cases(home: Home, cases: list[Case], policy: str, seed: int) -> tuple[Path, dict, str]:
    """Deal all cases in one run; the repository, the records and the output."""
    choose = random.Random(seed)
    submodule = seed % 2 == 0
    repo = make_base(home.root / "repo", git, submodule, choose.sample(CONFIGS, 3))
    notes = home.root / "notes"
    notes.mkdir()
    tasks = [task(choose.choice([repo, repo / "folder"]), case.script(notes), case.id) for case in cases]
    done = home.pitboss("dispatch", manifest(home, tasks, worktree_cleanup=policy), timeout=600)
    assert done.returncode == (0 if all(case.success for case in cases) else 1), done.stderr
    return repo, records_of(done.stdout), done.stdout


def judge(home: Home, cases: list[Case], policy: str, repo: Path, records: dict, output: str) -> list[str]:
    """Every problem of every tree, and those of the repository as a whole."""
    found = read_found(repo, policy, output)
    problems, kept = [], []
    for case in cases:
        path = home.root / "notes" / f"{case.id}.json"
        if not path.exists():
            problems.append(f"[{policy}] {case}: its script failed: {reason(records[case.id])}")
            continue
        note = json.loads(path.read_text())
        problems += problems_of(case, note, records[case.id], found)
        kept += [note["top"]] if os.path.isdir(note["top"]) else []
    problems += [f"[{policy}] {path} is left locked" for path in locked_trees(repo)
                 if "locked" not in next(case for case in cases if path.endswith(case.id)).features]
    known = {path for path in trees_of(repo) if not path.endswith("/inner")}
    if known != set(kept):
        gone, unknown = known - set(kept), set(kept) - known
        problems.append(f"[{policy}] git knows of {gone} that are gone, and not of {unknown} that stay")
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("number", range(-(-TREES // TREES_PER_RUN)))
def test_no_state_of_a_tree_loses_work(home, number):
    count = min(TREES_PER_RUN, TREES - number * TREES_PER_RUN)
    seed = SEED * 1000 + number
    policy = POLICIES[number % 3 if number % 4 else 0]       # `always` is the dangerous one: more of it
    cases = deal_cases(seed, count, seed % 2 == 0)
    problems = judge(home, cases, policy, *run_cases(home, cases, policy, seed))
    assert not problems, f"seed {seed}:\n" + "\n".join(problems)


FEW = {
    "always": [("staged_then_modified", "odd_names"), ("detached_commits", "assume_unchanged"),
               ("dropped_commit",), ()],
    "on_success": [("switched", "ignored_files"), ("skip_worktree",), ("commits",), ("nested_ignored",)],
    "never": [(), ("modified", "stash"), ("locked",), ("ignored_but_added",)],
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_few_states_under_each_policy(home, policy):
    cases = [Case(f"t{n:02d}", features, True) for n, features in enumerate(FEW[policy])]
    problems = judge(home, cases, policy, *run_cases(home, cases, policy, 1))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("policy, stays", [("always", False), ("on_success", True), ("never", True)])
def test_a_clean_tree_of_a_failed_task(home, policy, stays):
    cases = [Case("t00", (), False)]
    repo, records, output = run_cases(home, cases, policy, 1)
    assert judge(home, cases, policy, repo, records, output) == []
    assert (records["t00"]["worktree_path"] is not None) == stays


@pytest.mark.parametrize("features", [
    ("staged_then_modified", "executable", "symlinks"), ("detached_commits", "staged_then_reverted"),
    ("switched", "odd_names_staged"),
])
def test_the_printed_command_brings_a_rescued_tree_back(home, features):
    cases = [Case("t00", features, True)]
    repo, records, output = run_cases(home, cases, "always", 1)
    assert judge(home, cases, "always", repo, records, output) == []
    ref = records["t00"]["rescue_ref"]
    note = json.loads((home.root / "notes" / "t00.json").read_text())
    [command] = [line[line.index("git "):] for line in output.splitlines() if ref in line and "git " in line]
    subprocess.run(["sh", "-c", command], cwd=home.root, env=home.env, check=True, capture_output=True)
    rescued = git(repo, "rev-parse", ref).strip()
    places = [Path(place) for place in [str(repo), *trees_of(repo)]
              if git(place, "rev-parse", "HEAD").strip() == rescued]
    assert places, f"{command!r} brought nothing back"
    assert note_of(str(places[0]))["files"] == note["files"]


WHY = {"nested": "nested", "nested_ignored": "ignored/nested", "merge_ours": "merge",
       "rebase_stopped": "rebase", "locked": "lock", "submodule": "sub"}


def test_the_record_says_why_a_tree_stays(home):
    cases = [Case(f"t{n:02d}", (name,), True) for n, name in enumerate(WHY)]
    repo, records, output = run_cases(home, cases, "always", 2)
    assert judge(home, cases, "always", repo, records, output) == []
    for case in cases:
        why = records[case.id]["worktree_kept"]
        assert WHY[case.features[0]] in why.lower() and why in output, f"{case}: {why}"


def test_an_unpopulated_submodule_does_not_hold_a_clean_tree_back(home):
    cases = [Case("t00", (), True)]
    repo, records, output = run_cases(home, cases, "on_success", 2)
    assert (repo / "sub" / "inner.txt").exists()
    assert judge(home, cases, "on_success", repo, records, output) == []
    assert trees_of(repo) == []


def test_runs_in_the_same_minute_do_not_overwrite_each_others_rescue(home):
    repo = home.repo()
    runs = [deal(home, [task(repo, f"echo {n} of run >untracked.txt")], worktree_cleanup="always")
            for n in range(3)]
    refs = [run["a"]["rescue_ref"] for run in runs]
    assert len(set(refs)) == 3
    assert [git(repo, "show", f"{ref}:untracked.txt") for ref in refs] == [f"{n} of run\n" for n in range(3)]


def test_the_next_run_does_not_go_on_upon_the_branch_of_the_last(home):
    repo = home.repo()
    first = deal(home, [task(repo, committing("one.txt"))], worktree_cleanup="always")["a"]
    deal(home, [task(repo, f"ls >'{home.root}/seen'; {committing('two.txt')}")], worktree_cleanup="always")
    assert first["worktree_path"] is None
    assert "one.txt" not in (home.root / "seen").read_text()
    own = sorted(name for name in branches(repo) if name != "main")
    assert len(own) == 2
    contents = {git(repo, "log", "-1", "--format=%s", name).strip() for name in own}
    assert contents == {"one.txt", "two.txt"}


@pytest.mark.parametrize("policy", ["always", "on_success"])
def test_a_task_that_ran_out_of_time_loses_nothing(home, policy):
    repo = home.repo()
    late = task(repo, "echo late >late.txt; exec sleep 300", timeout_secs=1)
    done = deal(home, [late], check=1, worktree_cleanup=policy)["a"]
    assert done["status"] == "TimedOut"
    if policy == "always":
        assert done["worktree_path"] is None
        assert git(repo, "show", f"{done['rescue_ref']}:late.txt") == "late\n"
    else:
        assert (Path(done["worktree_path"]) / "late.txt").read_text() == "late\n"
        assert done["rescue_ref"] is None


def test_a_tree_whose_git_file_the_agent_removed_stays(home):
    repo = home.repo()
    done = deal(home, [task(repo, "rm .git; echo new >new.txt")], worktree_cleanup="always")["a"]
    assert done["status"] == "Success"
    assert (Path(done["worktree_path"]) / "new.txt").read_text() == "new\n"


def test_a_removed_git_file_does_not_make_another_repository_the_trees(home):
    """Worktrees below a folder that is a repository itself: git would find that one by looking upwards."""
    around = make_repo(home.root / "around")
    (around / "precious.txt").write_text("not committed\n")
    before = note_of(str(around))
    repo = home.repo()
    done = deal(home, [task(repo, "rm .git; echo new >new.txt")], worktree_cleanup="always",
                worktree_dir=str(around / "trees"))["a"]
    assert (Path(done["worktree_path"]) / "new.txt").exists()
    after = note_of(str(around))
    assert [after[part] for part in ("head", "index", "reflog")] == \
        [before[part] for part in ("head", "index", "reflog")]
    assert (around / "precious.txt").read_text() == "not committed\n"
    assert git(around, "for-each-ref", "refs/pitboss") == ""


def test_an_agent_that_removes_its_own_tree_does_no_harm(home):
    repo = home.repo()
    tasks = [task(repo, 'cd /; rm -rf "$PITBOSS_WORKTREE"', "gone"), task(repo, "true", "other")]
    records = deal(home, tasks, worktree_cleanup="always")
    assert {record["status"] for record in records.values()} == {"Success"}
    assert records["gone"]["worktree_path"] is None
    assert locked_trees(repo) == []


def test_a_folder_of_the_users_in_the_place_of_the_tree_is_not_removed(home):
    """The agent moved its tree away and put something else there."""
    repo = home.repo()
    script = 'cd /; mv "$PITBOSS_WORKTREE" "$PITBOSS_WORKTREE.away"; mkdir "$PITBOSS_WORKTREE";' \
             ' echo mine >"$PITBOSS_WORKTREE/mine.txt"'
    place = str(home.root / "trees")
    done = deal(home, [task(repo, script)], worktree_cleanup="always", worktree_dir=place)["a"]
    assert (Path(done["worktree_path"]) / "mine.txt").read_text() == "mine\n"
    [away] = (home.root / "trees").glob("**/*.away")
    assert (away / "file0.txt").exists()
    assert locked_trees(repo) == []


BREAKS = {
    "index": 'echo junk >"$(git rev-parse --git-path index)"',
    "HEAD": 'echo junk >"$(git rev-parse --git-path HEAD)"',
    "gitdir": 'rm -rf "$(git rev-parse --absolute-git-dir)"',
    "branch": 'echo junk >"$(git rev-parse --git-common-dir)/$(git symbolic-ref HEAD)"',
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_tree_that_git_cannot_read_any_more_stays(home, broken):
    repo = home.repo()
    done = deal(home, [task(repo, f"echo new >new.txt; {BREAKS[broken]}")], worktree_cleanup="always")["a"]
    assert done["status"] == "Success" and done["worktree_kept"]
    assert (Path(done["worktree_path"]) / "new.txt").read_text() == "new\n"


def test_a_dropped_commit_is_kept_where_the_user_turned_reflogs_off(home):
    repo = home.repo()
    git(repo, "config", "core.logAllRefUpdates", "false")
    tell = f"git rev-parse HEAD >'{home.root}/commit'"
    script = f"{committing('dropped.txt')}; {tell}; git reset -q --hard HEAD~1"
    done = deal(home, [task(repo, script)], worktree_cleanup="always")["a"]
    commit = (home.root / "commit").read_text().strip()
    kept = git(repo, "rev-list", "--all").split()
    assert commit in kept or done["worktree_path"]


def test_a_filter_that_fails_keeps_the_tree(home):
    """The content cannot be saved: the repository's own clean filter refuses it."""
    repo = home.repo()
    (repo / ".gitattributes").write_text("*.up filter=up\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "attributes")
    git(repo, "config", "filter.up.clean", "false")
    git(repo, "config", "filter.up.required", "true")
    done = deal(home, [task(repo, "echo new >new.up")], worktree_cleanup="always")["a"]
    assert done["status"] == "Success" and done["worktree_kept"]
    assert (Path(done["worktree_path"]) / "new.up").read_text() == "new\n"


def test_a_tree_whose_removal_fails_stays_and_is_rescued_first(home):
    """An immutable ignored file; its attribute is taken back by the test."""
    repo = home.repo()
    (repo / ".gitignore").write_text("ignored/\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "ignore")
    probe = home.root / "probe"
    probe.touch()
    if subprocess.run(["chattr", "+i", probe], capture_output=True).returncode:
        pytest.skip("this file system or user cannot make a file immutable")
    subprocess.run(["chattr", "-i", probe], check=True)
    script = "mkdir ignored; echo x >ignored/x; chattr +i ignored/x; echo new >new.txt"
    done = deal(home, [task(repo, script)], worktree_cleanup="always")["a"]
    [held] = home.runs.glob("*/worktrees/*/ignored/x")
    subprocess.run(["chattr", "-i", held], check=True)
    assert done["worktree_path"] == str(held.parent.parent)
    assert done["status"] == "Success" and done["worktree_kept"]
    assert git(repo, "show", f"{done['rescue_ref']}:new.txt") == "new\n"


def _clone(home: Home, *options: str) -> Path:
    origin = make_repo(home.root / "origin")
    git(origin, "config", "uploadpack.allowFilter", "true")
    git(home.root, "clone", "-q", *options, origin.as_uri(), "clone")
    return home.root / "clone"


def _separate(home: Home) -> Path:
    git(home.root, "init", "-q", "-b", "main", "--separate-git-dir", "apart.git", "apart")
    return make_repo(home.root / "apart")


def _sha256(home: Home) -> Path:
    git(home.root, "init", "-q", "-b", "main", "--object-format=sha256", "modern")
    return make_repo(home.root / "modern")


def _beside_bare(home: Home) -> Path:
    """A worktree of a bare repository: there is no main checkout."""
    bare = _clone(home, "--bare")
    git(bare, "worktree", "add", "-q", "-b", "work", str(home.root / "work"), "main")
    return home.root / "work"


def _sparse(home: Home) -> Path:
    repo = make_repo(home.root / "sparse")
    for name in ("in", "out"):
        (repo / name).mkdir()
        (repo / name / "file.txt").write_text(f"{name}\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "folders")
    git(repo, "sparse-checkout", "set", "in")
    assert not (repo / "out").exists()
    return repo


KINDS = {
    "separate git dir": _separate, "sha256": _sha256, "beside a bare one": _beside_bare, "sparse": _sparse,
    "shallow": lambda home: _clone(home, "--depth=1"),
    "partial": lambda home: _clone(home, "--filter=blob:none"),
    "odd path": lambda home: make_repo(home.root / "it's a \"re po\" \u00fc \\ *"),
    "leading dash": lambda home: make_repo(home.root / "-repo"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_repository(home, kind):
    """Clean goes, commits stay on their branch, the rest is rescued, and the user's checkout is as it was."""
    repo = KINDS[kind](home)
    before = branches(repo), git(repo, "status", "--short"), trees_of(repo)
    tasks = [task(repo, "true", "clean"), task(repo, "echo new >new.txt", "dirty"),
             task(repo, committing("made.txt"), "commits")]
    records = deal(home, tasks, worktree_cleanup="always")
    kept = {name: record["worktree_kept"] for name, record in records.items() if record["worktree_path"]}
    assert kept == {}
    [own] = branches(repo) - before[0]
    assert own.endswith("/commits") and git(repo, "show", f"{own}:made.txt") == "made.txt\n"
    ref = records["dirty"]["rescue_ref"]
    assert git(repo, "show", f"{ref}:new.txt") == "new\n"
    assert git(repo, "diff", "--name-status", f"{ref}^", ref) == "A\tnew.txt\n"
    assert (branches(repo) - {own}, git(repo, "status", "--short"), trees_of(repo)) == before


def test_a_filter_that_is_missing_fails_the_creation_and_leaves_nothing(home):
    repo = home.repo()
    (repo / ".gitattributes").write_text("*.bin filter=lfs\n")
    (repo / "big.bin").write_text("pointer\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "attributes")
    for key, value in {"smudge": "no-such-program smudge", "required": "true"}.items():
        git(repo, "config", f"filter.lfs.{key}", value)
    done = deal(home, [task(repo)], check=1)["a"]
    assert done["status"] == "SpawnFailed" and "lfs" in reason(done)
    assert branches(repo) == {"main"} and trees_of(repo) == [] and done["worktree_path"] is None


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_worktree_dir_that_cannot_be_made_is_a_clear_error(home, place):
    repo = home.repo()
    (home.root / "taken").write_text("a file\n")
    path = manifest(home, [task(repo)], worktree_dir="taken" if place == "file" else "taken/trees")
    done = home.pitboss("dispatch", path)
    assert done.returncode in (1, 2, 5) and "Traceback" not in done.stderr
    said = done.stderr if done.returncode != 1 else reason(records_of(done.stdout)["a"])
    assert "taken" in said
    assert branches(repo) == {"main"} and trees_of(repo) == []


def test_kept_trees_are_named_before_the_run_folder(home):
    repo = home.repo()
    path = manifest(home, [task(repo, "echo x >x.txt", "dirty"), task(repo, "true", "clean")])
    lines = home.pitboss("dispatch", path, check=0).stdout.splitlines()
    kept = records_of("\n".join(lines))["dirty"]["worktree_path"]
    assert Path(lines[-1]).is_dir() and (Path(lines[-1]) / "journal.jsonl").exists()
    assert any(kept in line for line in lines[:-1])
    quiet = home.pitboss("dispatch", path, "-q", check=0).stdout.splitlines()
    assert len(quiet) == 1 and (Path(quiet[0]) / "summary.json").exists()


# 2. Creation

def test_a_new_branch_is_made_and_goes_with_its_clean_tree(home):
    repo = home.repo()
    seen = home.root / "seen"
    script = f"git rev-parse --abbrev-ref HEAD >'{seen}'; git rev-parse HEAD >>'{seen}'"
    deal(home, [task(repo, script, branch="topic")])
    assert seen.read_text().split() == ["topic", git(repo, "rev-parse", "main").strip()]
    assert branches(repo) == {"main"}


def test_without_a_branch_the_name_tells_run_and_task(home):
    repo = home.repo()
    done = deal(home, [task(repo, "true", "my-task")], worktree_cleanup="never")["my-task"]
    [own] = branches(repo) - {"main"}
    parts = own.split("/")
    assert done["branch"] == own
    assert (parts[0], parts[2], len(parts)) == ("pitboss", "my-task", 3)


def test_an_existing_free_branch_is_used_and_stays(home):
    repo = home.repo()
    commit = commit_on(repo, "topic", "topic.txt")
    git(repo, "branch", "empty", "main")
    seen = home.root / "seen"
    records = deal(home, [task(repo, f"git rev-parse HEAD >'{seen}'; test -e topic.txt", branch="topic"),
                          task(repo, "true", "b", branch="empty")], worktree_cleanup="always")
    assert seen.read_text().strip() == commit
    assert {record["status"] for record in records.values()} == {"Success"}
    assert branches(repo) == {"main", "topic", "empty"}
    assert git(repo, "rev-parse", "topic").strip() == commit


def test_a_tag_of_the_same_name_does_not_take_the_branchs_place(home):
    repo = home.repo()
    commit = commit_on(repo, "topic", "topic.txt")
    git(repo, "tag", "topic", "main")
    seen = home.root / "seen"
    deal(home, [task(repo, f"{{ git rev-parse HEAD; git symbolic-ref HEAD; }} >'{seen}'", branch="topic")])
    assert seen.read_text().split() == [commit, "refs/heads/topic"]


def test_a_branch_that_the_user_makes_meanwhile_is_not_reset(home):
    """The lock that pitboss waits for is the user's own `git branch topic COMMIT`, which then succeeds."""
    repo = home.repo()
    commit = commit_on(repo, "users", "users.txt")
    heads = repo / ".git" / "refs" / "heads"
    (heads / "topic.lock").write_text(commit + "\n")
    timer = threading.Timer(1, (heads / "topic.lock").rename, [heads / "topic"])
    timer.start()
    try:
        done = deal(home, [task(repo, branch="topic")], check=None)["a"]
    finally:
        timer.join()
    assert git(repo, "rev-parse", "-q", "--verify", "refs/heads/topic", check=False).strip() == commit
    assert done["status"] == "Success" or "topic" in reason(done)


def test_an_empty_branch_that_is_checked_out_elsewhere_stays(home):
    """Deleting it would leave that other worktree on a branch that does not exist."""
    repo = home.repo()
    script = "b=$(git branch --show-current); git checkout -q --detach; git worktree add -q '{}' \"$b\""
    deal(home, [task(repo, script.format(home.root / "users"))], worktree_cleanup="always")
    assert git(home.root / "users", "rev-parse", "HEAD") == git(repo, "rev-parse", "main")
    assert git(home.root / "users", "status", "--short") == ""


def test_a_branch_that_is_checked_out_elsewhere_is_a_spawn_failure(home):
    repo = home.repo()
    git(repo, "worktree", "add", "-q", "-b", "topic", str(home.root / "users"))
    records = deal(home, [task(repo, branch="topic"), task(repo, "true", "b", branch="main"),
                          task(repo, "true", "c")], check=1)
    for name in ("a", "b"):
        assert records[name]["status"] == "SpawnFailed"
        assert re.search("already (checked out|used by worktree)", reason(records[name]))
        assert records[name]["failure_reason"]["kind"] == "unknown"
        assert records[name]["started_at"] == records[name]["ended_at"]
        assert records[name]["worktree_path"] is None and records[name]["exit_code"] is None
    assert records["c"]["status"] == "Success"
    assert trees_of(repo) == [str(home.root / "users")]


@pytest.mark.parametrize("existing, branch",
                         [("pitboss", None), ("topic", "topic/more"), ("topic/more", "topic")])
def test_a_branch_that_git_cannot_make_fails_at_once_and_leaves_nothing(home, existing, branch):
    """A name below an existing branch is no lock contention, although git says `cannot lock ref`."""
    repo = home.repo()
    git(repo, "branch", existing)
    done = deal(home, [task(repo, **({"branch": branch} if branch else {}))], check=1)["a"]
    assert done["status"] == "SpawnFailed"
    assert existing in reason(done)
    folder = home.run_dir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["total_duration_ms"] < 20_000
    assert branches(repo) == {"main", existing} and trees_of(repo) == []


def test_a_directory_inside_the_work_tree_keeps_its_place(home):
    repo = home.repo()
    (repo / "some" / "where").mkdir(parents=True)
    (repo / "some" / "where" / "x.txt").write_text("x\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "folder")
    seen = home.root / "seen"
    script = f"{{ pwd -P; git rev-parse --show-toplevel; echo \"$PITBOSS_WORKTREE\"; ls; }} >'{seen}'"
    deal(home, [task(repo / "some" / "where", script)])
    place, top, told, *names = seen.read_text().splitlines()
    assert place == os.path.join(top, "some", "where")
    assert os.path.realpath(told) == top and top != str(repo)
    assert names == ["x.txt"]


def test_a_directory_that_is_not_committed_is_not_swapped_for_another_place(home):
    repo = home.repo()
    (repo / "fresh").mkdir()
    seen = home.root / "seen"
    done = deal(home, [task(repo / "fresh", f"pwd -P >'{seen}'")], check=None)["a"]
    if done["status"] == "Success":
        assert Path(seen.read_text().strip()).name == "fresh"
    else:
        assert done["status"] == "SpawnFailed" and "fresh" in reason(done)


@pytest.mark.parametrize("was", ["file", "link out of the tree", "dangling link"])
def test_a_directory_that_is_something_else_at_head_never_leads_out_of_the_tree(home, was):
    """The user replaced it by a folder and has not committed that."""
    repo = home.repo()
    outside = home.root / "outside"
    outside.mkdir()
    thing = repo / "thing"
    if was == "file":
        thing.write_text("a file\n")
    else:
        thing.symlink_to(outside if was == "link out of the tree" else "nowhere")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "thing")
    thing.unlink()
    thing.mkdir()
    done = deal(home, [task(thing, "echo x >x.txt")], check=None, worktree_cleanup="always")["a"]
    assert list(outside.iterdir()) == []
    assert done["status"] == "Success" or "thing" in reason(done)
    assert trees_of(repo) == [] and branches(repo) == {"main"}


def test_a_line_feed_in_the_repositorys_path_leads_to_no_other_place(home):
    repo = home.repo("two\nlines")
    path = manifest(home, [task(repo, "echo new >new.txt")])
    before = {entry.name for entry in home.root.iterdir()}
    done = home.pitboss("dispatch", path)
    assert "Traceback" not in done.stderr
    assert {entry.name for entry in home.root.iterdir()} == before
    assert done.returncode == 2 or (Path(records_of(done.stdout)["a"]["worktree_path"]) / "new.txt").exists()


def test_a_worktree_that_somebody_else_is_making_does_not_disturb(home):
    """git reads the entries of all worktrees, and fails at one that is half made."""
    repo = home.repo()
    half = repo / ".git" / "worktrees" / "half"
    half.mkdir(parents=True)
    (half / "gitdir").write_text(f"{home.root}/half/.git\n")
    (half / "HEAD").write_text("ref: refs/heads/main\n")
    (half / "commondir").touch()
    timer = threading.Timer(1.5, (half / "commondir").write_text, ["../..\n"])
    timer.start()
    try:
        tasks = [task(repo, "true", f"t{n}", **({"branch": "topic"} if n else {})) for n in range(2)]
        records = deal(home, tasks, check=None)
    finally:
        timer.join()
    assert [reason(record) for record in records.values()] == ["", ""]
    assert branches(repo) == {"main"}


def test_the_base_is_the_head_of_the_directory(home):
    repo = home.repo()
    other = commit_on(repo, "other", "other.txt")
    git(repo, "worktree", "add", "-q", "--detach", str(home.root / "users"), "other")
    git(repo, "checkout", "-q", "--detach", "main")
    seen = home.root / "seen"
    seen.mkdir()
    deal(home, [task(folder, f"git rev-parse HEAD >'{seen}/{name}'", name)
                for name, folder in (("here", repo), ("there", home.root / "users"))])
    assert (seen / "here").read_text().strip() == git(repo, "rev-parse", "main").strip()
    assert (seen / "there").read_text().strip() == other


@pytest.mark.parametrize("switch", ["true", "git checkout -q --detach", "git checkout -q -b side",
                                    "git pack-refs --all"])
def test_a_head_that_moves_meanwhile_is_the_base_of_those_that_start_later(home, switch):
    """Each way in which a HEAD can name its commit."""
    repo = home.repo()
    commit = "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m moved"
    move = f"cd {repo}; {switch}; {commit}; {switch if 'pack' in switch else 'true'}"
    tasks = [task(repo, move, id="a"), task(repo, f"git rev-parse HEAD >{home.root}/base", id="b")]
    first = git(repo, "rev-parse", "HEAD").strip()
    deal(home, tasks, max_parallel=1)
    assert (home.root / "base").read_text().strip() == git(repo, "rev-parse", "HEAD").strip() != first


@pytest.mark.parametrize("setup", ["always", "inherit", "simple"])
def test_a_new_branch_tracks_nothing(home, setup):
    origin = home.repo("origin")
    git(home.root, "clone", "-q", str(origin), str(home.root / "clone"))
    repo = home.root / "clone"
    git(repo, "config", "branch.autoSetupMerge", setup)
    assert git(repo, "config", "branch.main.remote").strip() == "origin"
    before = (repo / ".git" / "config").read_bytes()
    deal(home, [task(repo, id="a"), task(repo, id="b", branch="topic")], worktree_cleanup="never")
    assert len(branches(repo)) == 3
    assert (repo / ".git" / "config").read_bytes() == before


HOOKS = ("post-checkout pre-commit prepare-commit-msg commit-msg post-commit post-index-change"
         " reference-transaction pre-auto-gc post-rewrite fsmonitor").split()


@pytest.mark.parametrize("where", ["hooks", "hooksPath"])
def test_no_hook_and_no_signing_in_what_pitboss_does(home, where):
    repo = home.repo()
    folder = repo / ".git" / "hooks" if where == "hooks" else home.root / "elsewhere"
    folder.mkdir(exist_ok=True)
    ran = home.root / "ran"
    for name in HOOKS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >>'{ran}'\nexit 1\n")
        (folder / name).chmod(0o755)
    config = {"commit.gpgSign": "true", "gpg.program": "/bin/false", "user.useConfigOnly": "true",
              "core.fsmonitor": str(folder / "fsmonitor")}
    if where == "hooksPath":
        config["core.hooksPath"] = str(folder)
    for key, value in config.items():
        git(repo, "config", key, value)
    tasks = [task(repo, "echo new >new.txt"), task(repo, "true", "clean")]
    done = deal(home, tasks, worktree_cleanup="always")
    assert [done[name]["status"] for name in ("a", "clean")] == ["Success", "Success"]
    assert not ran.exists(), ran.read_text()
    assert trees_of(repo) == []
    assert done["a"]["rescue_ref"] in git(repo, "-c", "core.fsmonitor=false", "for-each-ref", "refs/pitboss")


def refused(home: Home, path: Path) -> str:
    """What validate and dispatch say of a manifest that both must refuse, having written nothing."""
    said = [home.pitboss(command, path, check=2).stderr for command in ("validate", "dispatch")]
    assert not home.runs.exists() or not list(home.runs.iterdir())
    assert "Traceback" not in "".join(said)
    return said[0]


def test_a_bare_repository_is_refused(home):
    repo = home.repo()
    git(home.root, "clone", "-q", "--bare", str(repo), str(home.root / "bare.git"))
    said = refused(home, manifest(home, [task(home.root / "bare.git")]))
    assert "task[0].directory" in said and ("bare" in said or "work tree" in said)
    assert git(home.root / "bare.git", "worktree", "list").count("\n") == 1


def test_the_inside_of_a_git_folder_is_refused(home):
    repo = home.repo()
    said = refused(home, manifest(home, [task(repo / ".git")]))
    assert "task[0].directory" in said and "work tree" in said


def test_a_repository_without_a_commit_is_refused(home):
    git(home.root, "init", "-q", "-b", "main", str(home.root / "young"))
    said = refused(home, manifest(home, [task(home.root / "young")]))
    assert "task[0].directory" in said and "commit" in said


def test_a_folder_outside_any_repository_is_refused_unless_no_worktree_is_wanted(home):
    (home.root / "plain").mkdir()
    said = refused(home, manifest(home, [task(home.root / "plain")]))
    assert "task[0].directory" in said and "git" in said
    home.pitboss("validate", manifest(home, [task(home.root / "plain", use_worktree=False)]), check=0)


def test_the_callers_git_variables_are_ignored(home):
    repo, other = home.repo(), home.repo("other")
    decoy = {"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other), "GIT_PREFIX": "x/",
             "GIT_COMMON_DIR": str(other / ".git"), "GIT_INDEX_FILE": str(home.root / "index"),
             "GIT_OBJECT_DIRECTORY": str(home.root / "objects")}
    seen = home.root / "seen"
    before = sorted((path.relative_to(other), path.stat().st_mtime_ns) for path in other.rglob("*"))
    records = deal(home, [task(repo, f"env >'{seen}'; git rev-parse HEAD; echo new >new.txt")],
                   options={"env": decoy}, worktree_cleanup="always")
    named = {line.partition("=")[0] for line in seen.read_text().splitlines()}
    assert not named & set(decoy)
    assert git(repo, "show", f"{records['a']['rescue_ref']}:new.txt") == "new\n"
    assert sorted((path.relative_to(other), path.stat().st_mtime_ns) for path in other.rglob("*")) == before
    assert not (home.root / "index").exists() and not (home.root / "objects").exists()


@pytest.mark.parametrize("spelling", ["absolute", "relative", "home", "variable", "inside"])
def test_worktree_dir_may_be_elsewhere(home, spelling):
    repo = home.repo()
    place = home.root / "home" / "trees" if spelling == "home" else home.root / "trees"
    place = repo / "trees" if spelling == "inside" else place
    given = {"absolute": str(place), "relative": "trees", "home": "~/trees", "variable": "$PLACE/trees",
             "inside": "repo/trees"}
    done = deal(home, [task(repo)], options={"env": {"PLACE": str(home.root)}}, worktree_dir=given[spelling],
                worktree_cleanup="never")["a"]
    assert Path(done["worktree_path"]).is_relative_to(place)
    assert trees_of(repo) == [done["worktree_path"]]


def test_runs_share_a_worktree_dir_without_clash(home):
    repo = home.repo()
    place = str(home.root / "trees")
    runs = [deal(home, [task(repo, f"echo {n} >n.txt")], worktree_dir=place) for n in range(3)]
    kept = [Path(run["a"]["worktree_path"]) for run in runs]
    assert [(path / "n.txt").read_text() for path in kept] == ["0\n", "1\n", "2\n"]


def test_a_big_crowd_gets_its_trees_while_locks_come_and_go(home):
    repo = home.repo(files=100)
    locks = [repo / ".git" / name for name in
             ("config.lock", "index.lock", "HEAD.lock", "packed-refs.lock", "refs/heads/topic3.lock")]
    for lock in locks:
        lock.touch()
    timer = threading.Timer(2, lambda: [lock.unlink() for lock in locks])
    timer.start()
    try:
        tasks = [task(repo, "git status --short", f"t{n}", branch=f"topic{n}") for n in range(16)]
        records = deal(home, tasks, check=None, max_parallel=16)
    finally:
        timer.join()
    assert [(name, reason(record)) for name, record in records.items() if record["status"] != "Success"] == []
    assert len(records) == 16 and trees_of(repo) == []


@pytest.mark.slow
def test_a_lock_that_stays_is_named_after_half_a_minute(home):
    repo = home.repo()
    lock = repo / ".git" / "refs" / "heads" / "held.lock"
    lock.touch()
    records = deal(home, [task(repo, branch="held"), task(repo, "true", "free")], check=1, max_parallel=2)
    assert records["a"]["status"] == "SpawnFailed" and records["free"]["status"] == "Success"
    assert str(lock) in reason(records["a"])
    waited = json.loads((home.run_dir() / "summary.json").read_text())["total_duration_ms"]
    assert 25_000 <= waited <= 60_000
    assert lock.exists() and branches(repo) == {"main"} and trees_of(repo) == []


def test_runs_at_once_in_one_repository_do_not_clash(home):
    repo = home.repo(files=50)
    tasks = [task(repo, committing("x.txt"), f"t{n}") for n in range(3)]
    path = manifest(home, tasks, worktree_cleanup="never")
    runs = [home.start("dispatch", path) for _ in range(3)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    records = [record for stdout, _ in outputs for record in records_of(stdout).values()]
    assert len({record["branch"] for record in records}) == 9
    assert len({record["worktree_path"] for record in records}) == 9
    assert len(branches(repo)) == 10


@pytest.mark.parametrize("second", ["same", "inside", "linked worktree", "symlink"])
def test_two_tasks_on_one_branch_are_refused(home, second):
    repo = home.repo()
    (repo / "inside").mkdir()
    git(repo, "worktree", "add", "-q", "--detach", str(home.root / "users"))
    (home.root / "link").symlink_to(repo)
    folder = {"same": repo, "inside": repo / "inside", "linked worktree": home.root / "users",
              "symlink": home.root / "link"}[second]
    tasks = [task(repo, branch="topic"), task(folder, "true", "b", branch="topic")]
    said = refused(home, manifest(home, tasks))
    assert "topic" in said and "task[1].branch" in said


def test_one_branch_name_in_two_repositories_is_fine(home):
    home.pitboss("validate", manifest(home, [task(home.repo("one"), branch="topic"),
                                             task(home.repo("two"), "true", "b", branch="topic")]), check=0)


ILLEGAL = ["a..b", "-x", "x.lock", "a b", "a~1", "@{-1}", "", "a/", "/a", "a//b", ".a", "a.", "a\\b", "a:b",
           "a?", "a*", "a[b", "a^", "bell\u0007", "a@{b", "a/.b", "a.lock/b", "HEAD", "@"]


def test_illegal_branch_names_are_refused(home):
    repo = home.repo()
    tasks = [task(repo, "true", f"t{n}", branch=name) for n, name in enumerate(ILLEGAL)]
    said = refused(home, manifest(home, tasks))
    assert [name for n, name in enumerate(ILLEGAL) if f"task[{n}].branch" not in said] == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_worktrees_have_the_modes_that_git_gives(home, mask):
    repo = home.repo()
    (repo / "folder").mkdir()
    (repo / "folder" / "tool.sh").write_text("true\n")
    (repo / "folder" / "tool.sh").chmod(0o755)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "tool")
    done = deal(home, [task(repo, "echo made >made.txt; mkdir made")], options={"umask": mask})["a"]
    tree = Path(done["worktree_path"])
    modes = {name: oct((tree / name).stat().st_mode & 0o777)
             for name in ("file0.txt", "folder/tool.sh", "made.txt", "folder", "made")}
    file, folder = oct(0o666 & ~mask), oct(0o777 & ~mask)
    assert modes == {"file0.txt": file, "made.txt": file, "folder/tool.sh": folder, "folder": folder,
                     "made": folder}
    run = home.run_dir()
    assert oct(run.stat().st_mode & 0o777) == oct(0o700)
    assert {oct(path.stat().st_mode & 0o777) for path in run.iterdir() if path.is_file()} == {oct(0o600)}


def test_without_worktree_the_directory_itself_is_used_and_never_cleaned(home):
    repo = home.repo()
    (repo / "mine.txt").write_text("untracked\n")
    (home.root / "plain").mkdir()
    records = deal(home, [task(repo, "pwd -P >place.txt; rm file1.txt", use_worktree=False),
                          task(home.root / "plain", "pwd -P >place.txt", "b", use_worktree=False)],
                   worktree_cleanup="always")
    assert (repo / "place.txt").read_text().strip() == str(repo.resolve())
    assert (home.root / "plain" / "place.txt").read_text().strip() == str((home.root / "plain").resolve())
    assert git(repo, "status", "--short").splitlines() == [" D file1.txt", "?? mine.txt", "?? place.txt"]
    for record in records.values():
        assert (record["worktree_path"], record["branch"], record["rescue_ref"]) == (None, None, None)
    assert git(repo, "for-each-ref", "--format=%(refname)").split() == ["refs/heads/main"]


def test_the_users_checkout_is_left_as_it_was(home):
    """Config, HEAD, index, files, refs; and the entry of a worktree on a disk that is not there now."""
    repo = home.repo()
    git(repo, "worktree", "add", "-q", "-b", "users", str(home.root / "users"))
    (home.root / "users").rename(home.root / "disk")
    (repo / "file0.txt").write_text("being edited\n")
    (repo / "file1.txt").touch()
    (repo / "new.txt").write_text("new\n")
    kept = ("config", "HEAD", "index", "logs/HEAD", "worktrees/users/HEAD")

    def all_of_it() -> tuple:
        return note_of(str(repo)), [(repo / ".git" / name).read_bytes() for name in kept], branches(repo)

    before = all_of_it()
    deal(home, [task(repo, "echo x >x.txt"), task(repo, "true", "b")], worktree_cleanup="always")
    assert all_of_it() == before
    (home.root / "disk").rename(home.root / "users")
    assert git(home.root / "users", "status", "--short") == ""


def test_a_submodule_as_directory_gets_a_tree_of_its_own(home):
    repo = make_base(home.root / "repo", git, True, [])
    before = note_of(str(repo / "sub"))
    seen = home.root / "seen"
    script = f"git rev-parse --show-toplevel >'{seen}'; echo new >new.txt"
    done = deal(home, [task(repo / "sub", script)], worktree_cleanup="never")["a"]
    assert seen.read_text().strip() == os.path.realpath(done["worktree_path"])
    assert note_of(str(repo / "sub")) == before


def test_dry_run_tells_branch_folder_and_what_goes_and_makes_nothing(home):
    repo = home.repo()
    path = manifest(home, [task(repo, branch="topic"), task(repo, "true", "b")], worktree_dir="trees")
    said = home.pitboss("dispatch", path, "--dry-run", check=0).stdout
    assert "topic" in said and "pitboss/" in said and str(home.root / "trees") in said
    assert "ignored" in said
    assert branches(repo) == {"main"} and trees_of(repo) == [] and not (home.root / "trees").exists()
    assert not home.runs.exists() or not list(home.runs.iterdir())


# 3. Resume of a finished run

FIRST_OR_AGAIN = """
if [ ! -e '{flag}' ]; then : >'{flag}'
{first}
else
{{ pwd -P; git rev-parse --show-toplevel; git rev-parse --abbrev-ref HEAD; git rev-parse HEAD; }} >'{seen}'
{again}
fi
"""


class Again:
    """One task that does one thing in its first run and tells where it is in the next."""

    def __init__(self, home: Home, first: str, again: str = "true", **run) -> None:
        self.home = home
        self.repo = home.repo()
        self.seen = home.root / "seen"
        script = FIRST_OR_AGAIN.format(flag=home.root / "flag", seen=self.seen, first=first, again=again)
        done = home.pitboss("dispatch", manifest(home, [task(self.repo, script)], **run), check=0)
        self.run = run_folder(done.stdout)
        self.first = records_of(done.stdout)["a"]

    def resume(self) -> dict:
        """Deal the finished run again: the new record; what was said in `said`."""
        done = self.home.pitboss("resume", self.run.name, check=0)
        self.said = done.stdout + done.stderr
        self.next_run = run_folder(done.stdout)
        return records_of(done.stdout)["a"]

    def place(self) -> list[str]:
        """cwd, top folder, branch and commit of the second run."""
        return self.seen.read_text().splitlines()


def test_resume_takes_a_kept_tree_over_as_it_is(home):
    first = f"{committing('one.txt')}; echo staged >s.txt; git add s.txt; echo later >s.txt; rm file1.txt"
    trial = Again(home, first, "cp s.txt kept.txt; git show :s.txt >index.txt")
    tree = Path(trial.first["worktree_path"])
    before = note_of(str(tree))
    record = trial.resume()
    cwd, top, branch, head = trial.place()
    assert (cwd, top) == (str(tree.resolve()),) * 2
    assert (branch, head) == (before["branch"].removeprefix("refs/heads/"), before["head"])
    assert ((tree / "kept.txt").read_text(), (tree / "index.txt").read_text()) == ("later\n", "staged\n")
    assert not (tree / "file1.txt").exists()
    assert record["worktree_path"] == trial.first["worktree_path"] and trial.next_run != trial.run
    assert trees_of(trial.repo) == [str(tree)]


def test_resume_where_only_the_branch_is_left_makes_a_tree_on_it(home):
    trial = Again(home, committing("one.txt"), "cp one.txt more.txt", worktree_cleanup="always")
    assert trial.first["worktree_path"] is None
    [own] = branches(trial.repo) - {"main"}
    trial.resume()
    _, _, branch, head = trial.place()
    assert (branch, head) == (own, git(trial.repo, "rev-parse", own).strip())


def test_resume_where_only_a_rescue_is_left_begins_there(home):
    first = "echo precious >untracked.txt"
    trial = Again(home, first, "cp untracked.txt copy.txt", worktree_cleanup="always")
    rescue = trial.first["rescue_ref"]
    assert branches(trial.repo) == {"main"}
    record = trial.resume()
    assert trial.place()[3] == git(trial.repo, "rev-parse", rescue).strip()
    assert git(trial.repo, "show", f"{rescue}:untracked.txt") == "precious\n"
    assert git(trial.repo, "show", f"{record['rescue_ref']}:copy.txt") == "precious\n"


def test_resume_where_nothing_is_left_begins_at_head_and_says_so(home):
    trial = Again(home, "true")
    assert branches(trial.repo) == {"main"}
    trial.resume()
    assert trial.place()[3] == git(trial.repo, "rev-parse", "main").strip()
    assert "HEAD" in trial.said and "warning" in trial.said.lower()


def test_resume_where_the_user_removed_the_kept_folder_uses_the_branch(home):
    """git still believes that the branch is checked out in a folder that is missing."""
    trial = Again(home, f"{committing('one.txt')}; echo loose >loose.txt", "test -e one.txt")
    tree = Path(trial.first["worktree_path"])
    subprocess.run(["rm", "-rf", str(tree)], check=True)
    own = trial.first["branch"]
    assert trial.resume()["status"] == "Success"
    _, _, branch, head = trial.place()
    assert (branch, head) == (own, git(trial.repo, "rev-parse", own).strip())


def test_resume_does_not_check_a_branch_out_that_the_user_is_on(home):
    """The kept folder is gone, and the user works on its branch now: a commit would move it under them."""
    trial = Again(home, f"{committing('one.txt')}; echo loose >loose.txt", committing("two.txt"))
    subprocess.run(["rm", "-rf", trial.first["worktree_path"]], check=True)
    own, repo = trial.first["branch"], trial.repo
    git(repo, "checkout", "-q", "--ignore-other-worktrees", own)
    before = note_of(str(repo))
    home.pitboss("resume", trial.run.name)
    assert note_of(str(repo)) == before
    assert git(repo, "status", "--short") == ""


def test_resume_of_a_resume_goes_on_in_the_same_tree_until_it_may_go(home):
    script = f"""{IDENTITY}
echo "$PITBOSS_WORKTREE" >>'{home.root}/places'; echo x >>work.txt
test "$(grep -c x work.txt)" -lt 3 || {{ git add work.txt; git commit -qm work; }}"""
    repo = home.repo()
    done = home.pitboss("dispatch", manifest(home, [task(repo, script)]), check=0)
    for _ in range(2):
        done = home.pitboss("resume", run_folder(done.stdout).name, check=0)
    places = (home.root / "places").read_text().splitlines()
    assert len(places) == 3 and len(set(places)) == 1
    assert records_of(done.stdout)["a"]["worktree_path"] is None
    assert not Path(places[0]).exists() and trees_of(repo) == []
    [own] = branches(repo) - {"main"}
    assert git(repo, "show", f"{own}:work.txt") == "x\nx\nx\n"


def test_resume_keeps_the_place_inside_the_tree(home):
    repo = home.repo()
    (repo / "deep").mkdir()
    (repo / "deep" / "d.txt").write_text("d\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "deep")
    path = manifest(home, [task(repo / "deep", f"pwd -P >>'{home.root}/places'; echo x >x")])
    done = home.pitboss("dispatch", path, check=0)
    home.pitboss("resume", run_folder(done.stdout).name, check=0)
    places = (home.root / "places").read_text().splitlines()
    assert len(places) == 2 and places[0] == places[1] and places[0].endswith("/deep")


def test_resume_of_a_tree_that_a_living_actor_works_in_is_refused(home):
    waiting = f": >'{home.root}/working'; while [ ! -e '{home.root}/go' ]; do sleep 0.05; done"
    trial = Again(home, "echo kept >kept.txt", waiting)
    busy = home.start("resume", trial.run.name)
    wait_for((home.root / "working").exists, 60, "the first resume's agent")
    before = note_of(trial.first["worktree_path"])
    second = home.pitboss("resume", trial.run.name)
    assert second.returncode in (1, 4), second.stderr
    if second.returncode == 1:
        assert records_of(second.stdout)["a"]["status"] == "SpawnFailed"
    assert note_of(trial.first["worktree_path"]) == before
    (home.root / "go").touch()
    stdout, stderr = busy.communicate(timeout=60)
    assert busy.returncode == 0, stderr
    assert (Path(records_of(stdout)["a"]["worktree_path"]) / "kept.txt").read_text() == "kept\n"


def test_resume_failed_deals_only_what_failed_in_its_old_tree(home):
    repo = home.repo()
    script = "echo \"$PITBOSS_WORKTREE\" >>'{0}/{1}'; test -e '{0}/pass'"
    path = manifest(home, [task(repo, script.format(home.root, "bad"), "bad"),
                           task(repo, f"echo x >>'{home.root}/good'", "good")])
    done = home.pitboss("dispatch", path, check=1)
    (home.root / "pass").touch()
    again = home.pitboss("resume", run_folder(done.stdout).name, "--failed", check=0)
    assert set(records_of(again.stdout)) == {"bad"}
    first, second = (home.root / "bad").read_text().splitlines()
    assert first == second
    assert (home.root / "good").read_text() == "x\n"


def test_where_git_knows_of_no_worktree_only_the_main_one_is_on_a_branch(tmp_path):
    """git removes the folder of its entries with the last one, whoever looks into it just then."""
    common = str(make_repo(tmp_path / "repo") / ".git")
    assert pitboss.worktree_entries(common) == []
    assert pitboss.is_checked_out(common, "refs/heads/main") and not pitboss.is_checked_out(common, "refs/heads/other")
