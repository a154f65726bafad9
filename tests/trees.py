"""States that an agent can leave a worktree in, and the verdict on what became of them.

A `Case` is a handful of features; each is a piece of shell that is run in the worktree as the agent's work.
The last act of the script is `python3 trees.py note FILE OWN_BRANCH`: it writes down what is in the tree, by
content. Afterwards `problems_of` compares that note with the repository, the folder and the record.
Everything here asks git and the file system alone. Every content names its task: no other holds it by chance.
"""
from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import NamedTuple

EMPTY_BLOB = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
GITLINK = "160000"


# The features

class Feature(NamedTuple):
    """One thing that an agent may have done; `kind` says what it means for the worktree.

    clean: nothing would be lost · commits: its branch holds them · unsaved: must be kept somewhere
    stays: the folder must not be removed · either: removed or kept, as long as nothing is lost
    """
    name: str
    phase: str                     # one of PHASES: they run in that order
    kind: str
    script: str
    needs: str = ""                # "submodule": only where the repository has one


PHASES = ("commit", "head", "progress", "files", "last")
EXCLUSIVE = ("head", "progress")   # at most one feature of such a phase in a tree

FEATURES = [Feature(*row) for row in (
    # what happened on the branch
    ("commits", "commit", "commits", "w c1.txt one; save c1.txt; w c2.txt two; save c2.txt"),
    ("dropped_commit", "commit", "unsaved",
     "w dropped.txt one; save dropped.txt; noted HEAD; git reset -q --hard HEAD~1"),
    ("dropped_with_odd_message", "commit", "unsaved",     # a reflog line ends at a line feed and nowhere else
     "w odd.txt one; git add odd.txt; message=$(printf 'a\\342\\200\\250b --not c d\\014e f --all g');"
     ' git commit -q -m "$message"; noted HEAD; git reset -q --hard HEAD~1'),
    ("amended", "commit", "either",
     "w am.txt one; save am.txt; w am.txt two; git commit -qa --amend -m again"),
    ("tagged_commit", "commit", "either",
     'w tag.txt one; save tag.txt; noted HEAD; git tag "tag-$ID"; git reset -q --hard HEAD~1'),
    ("stash", "commit", "clean",
     'w stash.txt changed; w stash_new.txt new; again git stash -q -u -m "stash of $ID";'
     ' noted "$(git stash list --format="%H %gs" | grep " $ID\\$" | cut -d" " -f1)"'),
    ("worktree_ref", "commit", "either",
     'c=$(git commit-tree "HEAD^{tree}" -p HEAD -m "by ref of $ID"); git update-ref refs/worktree/keep "$c";'
     ' noted "$c"'),
    # where HEAD is
    ("detached", "head", "clean", "git checkout -q --detach"),
    ("detached_commits", "head", "unsaved", "git checkout -q --detach; w d.txt one; save d.txt; noted HEAD"),
    ("switched", "head", "clean", 'git checkout -q -b "agent/$ID"'),
    ("switched_commits", "head", "commits", 'git checkout -q -b "agent/$ID"; w s.txt one; save s.txt'),
    ("renamed_branch", "head", "clean", "again rename"),
    ("behind", "head", "either", "git reset -q --hard HEAD~1"),
    ("orphan", "head", "either", 'git checkout -q --orphan "agent/$ID"'),
    # something half done
    ("merge_conflict", "progress", "stays",
     "w conflict.txt ours; git commit -qam ours; git merge -q side >/dev/null || true; pending MERGE_HEAD"),
    ("merge_no_commit", "progress", "stays", "git merge -q --no-ff --no-commit calm; pending MERGE_HEAD"),
    ("merge_ours", "progress", "stays", "git merge -q -s ours --no-commit side; pending MERGE_HEAD"),
    ("rebase_conflict", "progress", "stays",
     "w conflict.txt ours; git commit -qam ours; git rebase -q side >/dev/null || true;"
     " pending rebase-merge"),
    ("rebase_stopped", "progress", "stays",
     "w r.txt one; save r.txt; git rebase -q -x false HEAD~1 || true; pending rebase-merge"),
    ("cherry_pick", "progress", "either",
     "w conflict.txt ours; git commit -qam ours; git cherry-pick side >/dev/null || true;"
     " pending CHERRY_PICK_HEAD"),
    ("bisect", "progress", "either", "git bisect start -q HEAD HEAD~1 >/dev/null"),
    # files
    ("modified", "files", "unsaved", "w modified.txt changed"),
    # git looks at size and time before it reads: within one second these say nothing
    ("same_size", "files", "unsaved", 'printf "same %s\\n" "$ID" >same.txt'),
    ("same_second", "files", "unsaved",
     'printf "fast abc\\n" >fast.txt; git add fast.txt; printf "fast %s\\n" "$ID" >fast.txt; sleep 1.1'),
    ("same_time", "files", "unsaved",
     'touch -r timed.txt "$NOTES/$ID.stamp"; sleep 1.1; printf "time %s\\n" "$ID" >timed.txt;'
     ' touch -r "$NOTES/$ID.stamp" timed.txt'),
    ("staged_new", "files", "unsaved", "w staged.txt new; git add staged.txt"),
    ("staged_then_modified", "files", "unsaved",
     "w restaged.txt staged; git add restaged.txt; w restaged.txt later"),
    ("staged_then_deleted", "files", "unsaved", "w passing.txt staged; git add passing.txt; rm passing.txt"),
    ("staged_then_reverted", "files", "unsaved",
     'cp reverted.txt "$NOTES/$ID.orig"; w reverted.txt staged; git add reverted.txt;'
     ' cp "$NOTES/$ID.orig" reverted.txt'),
    ("intent_to_add", "files", "unsaved", "w intent.txt new; git add -N intent.txt"),
    ("untracked", "files", "unsaved", "w untracked.txt new"),
    ("untracked_folders", "files", "unsaved", "mkdir -p new/er/est; w new/one.txt a; w new/er/est/two.txt b"),
    ("deleted", "files", "unsaved", "rm deleted.txt"),
    ("deleted_staged", "files", "unsaved", "git rm -q -f deleted_staged.txt"),
    ("uncached", "files", "unsaved", "git rm -q --cached uncached.txt; w uncached.txt changed"),
    ("renamed", "files", "unsaved", "git mv renamed.txt renamed_to.txt"),
    ("moved", "files", "unsaved", "mv moved.txt moved_to.txt"),
    ("ignored_files", "files", "clean", "mkdir -p ignored/deep; w ignored/deep/x.txt a; w build.log b"),
    ("ignored_but_added", "files", "unsaved",
     "mkdir -p ignored; w ignored/forced.txt staged; git add -f ignored/forced.txt;"
     " w ignored/forced.txt later"),
    ("ignored_but_tracked", "files", "unsaved", "w tracked.log changed"),
    ("odd_names", "files", "unsaved", "for n in 1 2 3 4 5 6 7 8 9 10 11; do odd $n; w \"$ODD\" new; done"),
    ("odd_names_staged", "files", "unsaved",
     'mkdir odd; cd odd; for n in 1 2 3 4 5 6 7 8 9 10 11; do odd $n; w "$ODD" staged;'
     ' GIT_LITERAL_PATHSPECS=1 git add -- "$ODD"; w "$ODD" later; done; cd ..'),
    ("symlinks", "files", "unsaved",
     'ln -sfn "to-$ID" link; ln -s "nowhere-$ID" dangling; ln -s folder to_folder; ln -s "$NOTES" outside'),
    ("file_to_symlink", "files", "unsaved", 'rm typed.txt; ln -s "typed-$ID" typed.txt'),
    ("file_to_folder", "files", "unsaved", "rm swapped.txt; mkdir swapped.txt; w swapped.txt/inside.txt new"),
    ("executable", "files", "unsaved", "chmod +x plain.txt; chmod -x tool.sh; w run.sh new; chmod +x run.sh"),
    ("empty_folder", "files", "clean", "mkdir -p empty/deeper"),
    ("fifo", "files", "either", "mkfifo pipe"),
    ("assume_unchanged", "files", "either",
     "git update-index --assume-unchanged assumed.txt; w assumed.txt changed"),
    ("skip_worktree", "files", "either",
     "git update-index --skip-worktree skipped.txt; w skipped.txt changed"),
    ("sparse", "files", "either", "git update-index --skip-worktree sparse.txt; rm sparse.txt"),
    ("big_binary", "files", "unsaved", "head -c 3000000 /dev/urandom >big.bin"),
    ("empty_file", "files", "unsaved", ": >hollow.txt"),
    # repositories inside
    ("nested", "files", "stays", "nest nested"),
    ("nested_deep", "files", "stays", "mkdir -p fresh/deep; w fresh/note.txt new; nest fresh/deep/nested"),
    ("nested_gitlink", "files", "stays", "nest embedded; git add embedded 2>/dev/null"),
    ("nested_ignored", "files", "stays", "mkdir -p ignored; nest ignored/nested"),
    ("nested_unborn", "files", "stays", "git init -q unborn; w unborn/file.txt new"),
    ("nested_gitfile", "files", "stays",
     'git init -q --separate-git-dir "$NOTES/$ID.sep" apart; w apart/file.txt new'),
    ("nested_bare", "files", "stays",
     "mkdir -p ignored; nest bare; git clone -q --bare bare ignored/bare.git; rm -rf bare"),
    ("nested_worktree", "files", "stays",
     "again git worktree add -q --force --detach inner main; w inner/x.txt new"),
    ("submodule", "files", "stays",
     "again git -c protocol.file.allow=always submodule update -q --init sub; w sub/more.txt new;"
     " git -C sub add more.txt; git -C sub commit -qm more", "submodule"),
    # what is left beside the tree
    ("index_lock", "last", "either", ': >"$(git rev-parse --git-path index.lock)"'),
    ("locked", "last", "stays",
     'again sh -c "git worktree unlock \\"$TOP\\" 2>/dev/null; git worktree lock --reason mine \\"$TOP\\""'),
)]
BY_NAME = {feature.name: feature for feature in FEATURES}
CLASHES = [                        # pairs that cannot be made in one tree
    {"orphan", "progress"}, {"behind", "progress"}, {"index_lock", "locked"},
    {"nested_ignored", "ignored_but_added"},
]

PREAMBLE = r"""
set -eu
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@a GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@a GIT_EDITOR=true
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=commit.gpgsign GIT_CONFIG_VALUE_0=false
TOP=$(git rev-parse --show-toplevel); cd "$TOP"
OWN=$(git symbolic-ref HEAD)
w() { printf '%s of %s in %s\n' "$2" "$1" "$ID" >"./$1"; }
save() { git add "$1"; git commit -q -m "$1 of $ID"; }
noted() { git rev-parse "$1" >>"$NOTES/$ID.commits"; }
pending() { test -e "$(git rev-parse --git-path "$1")"; }
again() { tries=0; until "$@"; do tries=$((tries + 1)); test $tries -lt 100; sleep 0.1; done; }
rename() { git branch -m "agent/$ID" || git rev-parse -q --verify "refs/heads/agent/$ID" >/dev/null; }
nest() {
    git init -q "$1"; w "$1/inner.txt" nested
    git -C "$1" add inner.txt; git -C "$1" commit -q -m inner; w "$1/later.txt" loose
}
odd() {
    case $1 in
    1) ODD='with space.txt' ;; 2) ODD="quote'\"s.txt" ;; 3) ODD=$(printf 'new\nline.txt') ;;
    4) ODD=$(printf 'bytes\377\376.bin') ;; 5) ODD=$(printf 'caf\303\251.txt') ;; 6) ODD='-dash.txt' ;;
    7) ODD=':(top)magic.txt' ;; 8) ODD='back\slash.txt' ;; 9) ODD='*.glob' ;; 10) ODD=' lead' ;;
    11) ODD=$(printf 'tab\there') ;;
    esac
}
"""

TRACKED = (
    "modified restaged reverted deleted deleted_staged uncached renamed moved typed swapped plain assumed"
    " skipped sparse stash conflict"
).split()
CONFIGS = [                        # settings of a user's repository that must not make pitboss blind
    ("status.showUntrackedFiles", "no"), ("diff.ignoreSubmodules", "all"), ("commit.gpgsign", "true"),
    ("gpg.program", "/bin/false"), ("user.useConfigOnly", "true"), ("core.splitIndex", "true"),
    ("feature.manyFiles", "true"), ("core.untrackedCache", "true"), ("core.quotePath", "false"),
    ("i18n.commitEncoding", "latin1"), ("core.safecrlf", "true"), ("branch.autoSetupMerge", "always"),
    ("status.relativePaths", "false"), ("checkout.workers", "2"), ("status.renames", "copies"),
    ("color.ui", "always"), ("core.fileMode", "true"), ("commit.template", "/nonexistent"),
]


class Case(NamedTuple):
    """One tree: what its agent does there, and how it ends."""
    id: str
    features: tuple[str, ...]
    success: bool

    def kinds(self) -> set[str]:
        return {BY_NAME[name].kind for name in self.features}

    def script(self, notes: Path) -> str:
        """The agent's whole work, ended by its note."""
        ordered = sorted(self.features, key=lambda name: PHASES.index(BY_NAME[name].phase))
        steps = [f": {name}\n{BY_NAME[name].script}" for name in ordered]
        ends = f'cd "$TOP"\n"{sys.executable}" -I -S "{__file__}" note "$NOTES/$ID.json" "$OWN"'
        status = f"exit {0 if self.success else 3}"
        return "\n".join([f"ID={self.id}; NOTES='{notes}'", PREAMBLE, *steps, ends, status])

    def __str__(self) -> str:
        end = "success" if self.success else "failure"
        return f"{self.id} ({' + '.join(self.features) or 'clean'}, {end})"


def deal_cases(seed: int, count: int, submodule: bool) -> list[Case]:
    """`count` cases; the features take turns in leading one, so that none is left out of a long series."""
    random = Random(seed)
    usable = [f.name for f in FEATURES if submodule or f.needs != "submodule"]
    lead = [""] + usable
    random.shuffle(lead)
    cases = []
    for n in range(count):
        chosen = [name for name in [lead[n % len(lead)]] if name]
        for extra in random.sample(usable, random.choice((0, 0, 1, 2, 4)) if chosen else 0):
            if _fits(chosen, extra):
                chosen.append(extra)
        cases.append(Case(f"t{n:02d}", tuple(chosen), random.random() < 0.75))
    return cases


def _fits(chosen: list[str], extra: str) -> bool:
    """Whether a tree can have one more feature."""
    phases = [BY_NAME[name].phase for name in chosen]
    phase = BY_NAME[extra].phase
    if extra in chosen or phase in EXCLUSIVE and phase in phases:
        return False
    everything = {*chosen, *phases, extra, phase}
    return not any(clash <= everything for clash in CLASHES)


# The repository

def make_base(folder: Path, git, submodule: bool, configs: list[tuple[str, str]]) -> Path:
    """A repository with all that the features touch; three commits on main, side branches to merge."""
    git(folder.parent, "init", "-q", "-b", "main", str(folder))
    for name in TRACKED:
        (folder / f"{name}.txt").write_text(f"{name}\n")
    (folder / "same.txt").write_text("same ???\n")
    (folder / "timed.txt").write_text("time ???\n")
    (folder / "tracked.log").write_text("tracked\n")
    (folder / "tool.sh").write_text("true\n")
    (folder / "tool.sh").chmod(0o755)
    (folder / "link").symlink_to("modified.txt")
    (folder / "folder").mkdir()
    (folder / "folder" / "file.txt").write_text("in a folder\n")
    (folder / ".gitignore").write_text("ignored/\n*.log\n")
    git(folder, "add", "-A")
    git(folder, "add", "-f", "tracked.log")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "commit", "-q", "--allow-empty", "-m", "second")
    for branch, name in (("side", "conflict.txt"), ("calm", "calm.txt")):
        git(folder, "checkout", "-q", "-b", branch, "main")
        (folder / name).write_text(f"{branch}\n")
        git(folder, "add", name)
        git(folder, "commit", "-q", "-m", branch)
    git(folder, "checkout", "-q", "main")
    if submodule:
        _add_submodule(folder, git)
    git(folder, "commit", "-q", "--allow-empty", "-m", "third")
    for key, value in configs:
        git(folder, "config", key, value)
    return folder


def _add_submodule(folder: Path, git) -> None:
    """A registered submodule; linked worktrees have it empty until somebody populates it."""
    inner = folder.parent / "inner-repo"
    git(folder.parent, "init", "-q", "-b", "main", str(inner))
    (inner / "inner.txt").write_text("inner\n")
    git(inner, "add", "-A")
    git(inner, "commit", "-q", "-m", "inner")
    git(folder, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "sub")
    git(folder, "commit", "-q", "-m", "submodule")


# The note: what is in a tree, by content

def ask_git(folder, *args: str) -> bytes:
    """git's output in `folder`, empty when it fails; looks only, takes no lock, believes no cached stat."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env.update(GIT_OPTIONAL_LOCKS="0", GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", LC_ALL="C")
    done = subprocess.run(["git", "-C", os.fspath(folder), *args], env=env, capture_output=True)
    return done.stdout if done.returncode == 0 else b""


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _line(folder, *args: str) -> str:
    return _text(ask_git(folder, *args)).strip()


def blob_id(content: bytes) -> str:
    """git's name for a content, computed without git (and so without storing it)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_file(path: bytes) -> tuple[str, str] | None:
    """(git mode, blob id) of a file or link; None for what git does not store."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    if stat.S_ISLNK(mode):
        return "120000", blob_id(os.readlink(path))
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            return ("100755" if mode & 0o100 else "100644"), blob_id(file.read())
    return None


def _read_files(top: str) -> dict[str, tuple[str, str]]:
    """Every file of a tree that is not ignored, those inside nested repositories included."""
    found = {}
    for raw in set(ask_git(top, "ls-files", "-z", "-c", "-o", "--exclude-standard").split(b"\0")) - {b""}:
        path = os.path.join(os.fsencode(top), raw)
        if os.path.isdir(path) and not os.path.islink(path):
            inside = [os.path.join(where, name) for where, folders, names in os.walk(path)
                      if b".git" not in where.split(b"/") for name in names if name != b".git"]
        else:
            inside = [path]
        for file in inside:
            entry = read_file(file)
            if entry:
                found[_text(os.path.relpath(file, os.fsencode(top)))] = entry
    return found


def note_of(top: str) -> dict:
    """All that may not get lost of a worktree; JSON-able (bytes of names as lone surrogates)."""
    index = []
    for raw in ask_git(top, "ls-files", "-s", "-z").split(b"\0")[:-1]:
        head, _, path = raw.partition(b"\t")
        mode, sha, stage = head.decode().split()
        index.append([mode, sha, stage, _text(path)])
    return {
        "top": top,
        "files": {path: list(entry) for path, entry in sorted(_read_files(top).items())},
        "index": index,
        "head": _line(top, "rev-parse", "-q", "--verify", "HEAD"),
        "branch": _line(top, "symbolic-ref", "-q", "HEAD"),
        "reflog": _line(top, "log", "-g", "--format=%H %gs", "HEAD").splitlines(),
    }


def write_note(out: str, own: str) -> None:
    """The script's last act: the note, with the branches and commits that the script made."""
    top = _line(".", "rev-parse", "--show-toplevel")
    note = note_of(top)
    task = Path(out).stem
    made = Path(out).with_suffix(".commits")
    note["commits"] = made.read_text().split() if made.exists() else []
    note["own"] = [own, _line(top, "rev-parse", "-q", "--verify", own)]
    name = f"refs/heads/agent/{task}"
    note["branches"] = {name: sha for sha in [_line(top, "rev-parse", "-q", "--verify", name)] if sha}
    Path(out).write_text(json.dumps(note))


# The verdict

class Found(NamedTuple):
    """What the repository and the run have afterwards; read once per run."""
    repo: Path
    policy: str
    refs: dict[str, str]           # full name to object
    objects: set[str]              # everything that a ref or a stash reaches
    base: str                      # the commit that the trees began at
    output: str                    # stdout of dispatch


def read_found(repo: Path, policy: str, output: str) -> Found:
    listed = _line(repo, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    refs = dict(line.split(" ") for line in listed)
    stashes = _line(repo, "log", "-g", "--format=%H", "refs/stash").split() if "refs/stash" in refs else []
    reached = _line(repo, "rev-list", "--objects", "--no-object-names", "--single-worktree", "--all",
                    *stashes)
    return Found(repo, policy, refs, set(reached.split()), refs["refs/heads/main"], output)


def expected_fate(case: Case, policy: str) -> str:
    """`stays`, `goes` or `either`: what must become of the folder."""
    kinds = case.kinds()
    if policy == "never" or policy == "on_success" and not case.success or "stays" in kinds:
        return "stays"
    if policy == "on_success" and "unsaved" in kinds:
        return "stays"
    return "either" if "either" in kinds else "goes"


def problems_of(case: Case, note: dict, record: dict, found: Found) -> list[str]:
    """Everything that is wrong with what became of one tree; empty when all is well."""
    there = os.path.isdir(note["top"])
    fate = expected_fate(case, found.policy)
    problems = []
    if fate != "either" and there != (fate == "stays"):
        kept = record["worktree_kept"]
        problems.append(f"the worktree {'stays' if there else 'is gone'} ({kept}), expected: {fate}")
    problems += _wrong_in_record(case, note, record, there)
    problems += _wrong_branches(note, there, found)
    problems += _wrong_in_kept(note, found) if there else _lost(note, found)
    problems += _wrong_rescue(case, note, record, there, found)
    return [f"[{found.policy}] {case}: {problem}" for problem in problems]


def _wrong_in_record(case: Case, note: dict, record: dict, there: bool) -> list[str]:
    wrong = []
    ends = ("Success", 0) if case.success else ("Failed", 3)
    if (record["status"], record["exit_code"]) != ends:
        wrong.append(f"status {record['status']} {record['exit_code']} {record['failure_reason']}")
    path = record["worktree_path"]
    if there and (not path or os.path.realpath(path) != os.path.realpath(note["top"])):
        wrong.append(f"worktree_path is {path}, but {note['top']} is there")
    if not there and path is not None:
        wrong.append(f"worktree_path is {path}, but it is gone")
    return wrong


def _is_ahead(commit: str, found: Found) -> bool:
    """Whether `commit` is not on the base."""
    return ask_git(found.repo, "merge-base", commit, found.base).decode().strip() != commit


def _wrong_branches(note: dict, there: bool, found: Found) -> list[str]:
    wrong = [f"branch {name} of the agent was {sha}, is {found.refs.get(name)}"
             for name, sha in note["branches"].items() if found.refs.get(name) != sha]
    own, commit = note["own"]
    if not commit:
        return wrong
    if (there or _is_ahead(commit, found)) and found.refs.get(own) != commit:
        wrong.append(f"its branch {own} was {commit}, is {found.refs.get(own)}")
    if not there and not _is_ahead(commit, found) and own in found.refs:
        wrong.append(f"its empty branch {own} is left behind")
    return wrong


def _wrong_in_kept(note: dict, found: Found) -> list[str]:
    """A tree that stays must be exactly as the agent left it, and named in the output."""
    now = note_of(note["top"])
    wrong = [f"{part} of the kept tree changed: {_difference(note[part], now[part])}"
             for part in ("files", "index", "head", "branch", "reflog") if note[part] != now[part]]
    if note["top"] not in found.output:
        wrong.append("the kept tree is not named on stdout")
    missing = [sha for sha in note["commits"] if not ask_git(found.repo, "cat-file", "-t", sha)]
    return wrong + [f"commit {sha} is no longer in the repository" for sha in missing]


def _difference(before, after) -> str:
    if isinstance(before, dict):
        before, after = list(before.items()), list(after.items())
    if isinstance(before, list):
        gone, new = [x for x in before if x not in after], [x for x in after if x not in before]
        return f"gone {gone[:5]}, new {new[:5]}"
    return f"{before!r} is {after!r}"


def _lost(note: dict, found: Found) -> list[str]:
    """What of a removed tree no ref holds."""
    lost = [f"LOST file {path!r}" for path, (_, sha) in note["files"].items() if sha not in found.objects]
    lost += [f"LOST index entry {path!r} (stage {stage})" for mode, sha, stage, path in note["index"]
             if mode != GITLINK and sha != EMPTY_BLOB and sha not in found.objects]
    heads = [note["head"]] if note["head"] else []
    return lost + [f"LOST commit {sha}" for sha in heads + note["commits"] if sha not in found.objects]


def read_tree(repo: Path, commit: str) -> dict[str, tuple[str, str]]:
    """Path to (mode, blob id) of a commit's tree, without submodules."""
    tree = {}
    for raw in ask_git(repo, "ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0")[:-1]:
        head, _, path = raw.partition(b"\t")
        mode, _, sha = head.decode().split()
        if mode != GITLINK:
            tree[_text(path)] = (mode, sha)
    return tree


def _wrong_rescue(case: Case, note: dict, record: dict, there: bool, found: Found) -> list[str]:
    """The rescue ref stands in the record exactly when there is one, and holds what the tree held."""
    ref = record["rescue_ref"]
    refs = [name for name in found.refs if name.startswith("refs/pitboss/") and name.endswith(f"/{case.id}")]
    if [ref] != (refs or [None]):
        return [f"rescue_ref is {ref}, the repository has {refs}"]
    if ref is None:
        needed = not there and "unsaved" in case.kinds()
        return ["unsaved work, the tree is gone, and no rescue_ref"] if needed else []
    wrong = [] if ref in found.output else [f"{ref} is not named on stdout"]
    saved = read_tree(found.repo, ref)
    held = {path: tuple(entry) for path, entry in note["files"].items()}
    if "sparse" in case.features:
        saved.pop("sparse.txt", None)
    if saved != held:
        wrong.append(f"the rescue commit is not what the tree was: {_difference(held, saved)}")
    return wrong + _wrong_index_rescue(note, ref, saved, found) + _wrong_message(case, ref, found)


def _wrong_index_rescue(note: dict, ref: str, saved: dict, found: Found) -> list[str]:
    """What only the index had must be in the second parent (the first one's where HEAD was unborn)."""
    known = {sha for _, sha in saved.values()} | {EMPTY_BLOB}
    if note["head"]:
        known |= {sha for _, sha in read_tree(found.repo, note["head"]).values()}
    only = {path: (mode, sha) for mode, sha, stage, path in note["index"]
            if stage == "0" and mode != GITLINK and sha not in known}
    if not only:
        return []
    second = read_tree(found.repo, f"{ref}^{2 if note['head'] else 1}")
    return [f"{path!r} of the index is not in the second parent of {ref}"
            for path, entry in only.items() if second.get(path) != entry]


def _wrong_message(case: Case, ref: str, found: Found) -> list[str]:
    author, _, message = _text(ask_git(found.repo, "log", "-1", "--format=%an%n%B", ref)).partition("\n")
    run8 = ref.split("/")[-2]
    if author != "pitboss" or case.id not in message or run8 not in message:
        return [f"author {author!r}, message {message!r} do not name pitboss, {run8} and {case.id}"]
    return []


if __name__ == "__main__" and sys.argv[1:2] == ["note"]:
    write_note(sys.argv[2], sys.argv[3])
