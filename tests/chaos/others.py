"""R8, R18, R21, R22 and R26: limits, approvals, secrets, old runs, and other Pythons."""
from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from trial import TESTS, CannotRun, Outcome, Trial, all_of, home_in, let_pass

import golden
import pitboss
import test_approvals
import test_holds
from checker import check_holds
from stage import Operator, Stage
from tools import PYTHON, Home, processes_with, read_records, wait_for
from tree_checker import calls_of


# ---- R8: limits

def meet_limit(root: Path, number: int) -> int:
    """Five of twenty tasks meet a limit that all share; how many of the twenty succeeded, uncounted."""
    home, chance = home_in(root), random.Random(number)
    try:
        tasks = test_holds.crowd(home, chance.uniform(1, 4))
        home.pitboss("dispatch", test_holds.write(home, tasks), timeout=120, check=0)
        run_dir = home.run_dir()
        assert not (wrong := check_holds(run_dir, hands=5)), wrong
        records = read_records(run_dir)
        assert {r["status"] for r in records} == {"Success"}, Counter(r["status"] for r in records)
        counted = {a.id: (a.lost, a.afresh, a.blind) for a in pitboss.fold_run(str(run_dir)).actors.values()
                   if (a.lost, a.afresh, a.blind) != (0, False, 0)}
        assert not counted, f"attempts were counted: {counted}"
        return len(records)
    finally:
        home.end_everything()


def limit_holds_work(trial: Trial) -> Outcome:
    count = trial.count(20)
    good = trial.rounds(count, meet_limit, wide=2)
    return Outcome(f"{sum(good)} of {20 * count}, 0 attempts counted" if len(good) == count else
                   f"{len(good)} of {count} rounds of 20", len(good) == count)


# ---- R18: approvals

REQUESTS = 10        # of one lead


def answer(run: Stage, request_id: str, chance: random.Random) -> None:
    """Answer a request by one door or by two that say different things; nobody may be there to hear it."""
    doors = chance.choice((("file",), ("socket",), ("file", "socket"), ("socket", "file"), ("socket", "socket")))
    for door in doors:
        given = {"approved": chance.random() < 0.6, "comment": f"{door} {chance.randrange(10**6)}"}
        if door == "file":
            test_approvals.drop(run, f"{request_id}.json", json.dumps(given))
            continue
        with contextlib.suppress(OSError, AssertionError, ValueError, KeyError, TypeError):
            operator = Operator(run.socket("control"))
            operator.say({"op": "approve", "request_id": request_id, **given})
            if chance.random() < 0.5:
                operator.hear(1)
            operator.close()


def ask_under_kills(root: Path, number: int) -> int:
    """A lead asks ten times while its dispatchers die; each is decided once, and it was told just that."""
    home, chance, kills = home_in(root), random.Random(number), 0
    script = "\n".join(f'$ call request_approval {{"summary": "s{n}"}}' for n in range(REQUESTS))
    run = Stage(home, script=script)
    answered, next_kill, end = set(), time.monotonic() + chance.uniform(0, 0.2), time.monotonic() + 120
    try:
        while not any(e["kind"] == "run_finished" for e in run.events()):
            assert time.monotonic() < end, "the run did not come to its end"
            decided = {e["request_id"] for e in run.events("approval_decided")}
            for event in run.events("approval_asked"):
                if event["request_id"] not in decided | answered:
                    let_pass(chance.uniform(0, 0.2))
                    answered |= {event["request_id"]} if chance.random() < 0.8 else set()
                    answer(run, event["request_id"], chance)
            if time.monotonic() > next_kill and kills < 5 and run.process.poll() is None:
                test_approvals.kill(run)
                test_approvals.resume(run)
                kills, next_kill = kills + 1, time.monotonic() + chance.uniform(0, 0.3)
                answered = set()        # what was said to the dead one may not have been heard
            let_pass(0.02)
        run.process.wait(60)
        asked, decided = run.events("approval_asked"), run.events("approval_decided")
        assert len(asked) == len(decided) == len({e["request_id"] for e in decided}) == REQUESTS, \
            f"{len(asked)} were asked, {len(decided)} decided"
        by_id = {e["request_id"]: e for e in decided}
        told = [call.result for call in calls_of(run.run, "boss")]
        want = [by_id[e["request_id"]]["answer"] for e in asked]
        assert told == want, f"told {told}, decided {want}"
        return kills
    finally:
        run.end()
        home.end_everything()


def approvals_are_decided_once(trial: Trial) -> Outcome:
    count = trial.count(200 // REQUESTS)
    kills = trial.rounds(count, ask_under_kills)
    return Outcome(f"{REQUESTS * len(kills)} of {REQUESTS * count}, {sum(kills)} kills", len(kills) == count)


# ---- R19: prompts of agents in terminals

PROMPTS = 25         # to one agent
STRANGER = "cat; sleep 600"      # a window of somebody else: it would show, and keep, whatever came to it


def prompt_one(root: Path, number: int) -> int:
    """Prompts of many kinds to an agent in a terminal, beside a person's own window, while somebody scrolls and it
    hangs now and then."""
    import test_tmux
    from tmux_desk import Desk

    desk = Desk(root)
    try:
        _, pane = desk.start()
        stranger = test_tmux.shell(desk, "mine", f"echo before; exec sh -c '{STRANGER}'")
        wait_for(lambda: "before" in test_tmux.shown_in(desk, stranger), 20, "the stranger's window")
        before = test_tmux.shown_in(desk, stranger)
        test_tmux.many_prompts(desk, pane, PROMPTS, seed=number)
        assert test_tmux.shown_in(desk, stranger) == before, "something came to a window that is not the agent's"
        return PROMPTS
    finally:
        desk.close()


def prompts_are_delivered_once(trial: Trial) -> Outcome:
    if not shutil.which("tmux"):
        raise CannotRun("there is no tmux on PATH")
    if not (TESTS / "test_tmux.py").exists():
        raise CannotRun("this pitboss has no agents in terminals")
    import test_tmux
    import tmux_desk

    tmux_desk.pin(str(trial.root))     # once, before several ask for it at a time
    count = trial.count(500 // PROMPTS)
    with test_tmux.busy_cores():
        good = trial.rounds(count, prompt_one, wide=2)
    return Outcome(f"{sum(good)} of {PROMPTS * count}", len(good) == count)


# ---- R21: secrets

SHAPES = ("ghp_{}", "sk-ant-api03-{}", "glpat-{}", "xoxb-{}", "github_pat_{}")
NEEDED = ("manifest.snapshot.toml", "prompt.txt", "mcp-config.json", "mcp-s.env",     # what agents work with
          "stdout.log", "stderr.log")                                                 # what they print themselves


def seed_secrets() -> dict[str, list[str]]:
    """Twenty secrets, by the way that they come in."""
    def words() -> str:
        return secrets.token_hex(18)

    return {"env": [words() for _ in range(5)], "manifest": [words() for _ in range(5)],
            "shapes": [shape.format(words()) for shape in SHAPES], "argv": [words() for _ in range(5)]}


def talkative(home: Home, given: dict) -> Path:
    """Agents that print every secret, as words, as a tool's result and as their last words, and a failure."""
    every = [word for words in given.values() for word in words]
    env = "".join(f'TASK_SECRET_{n} = "{word}"\n' for n, word in enumerate(given["manifest"]))
    args = json.dumps([f"--token={word}" for word in given["argv"]])
    mine = "".join(f'SERVER_TOKEN_{n} = "{word}"\n' for n, word in enumerate(given["argv"]))
    says = "\n".join([f"$ say {' '.join(every)}", "$ run printenv", "$ sleep 0.7", f"$ stderr {every[0]}",
                      f"$ say {' '.join(every)}"])
    tasks = "".join(f"[[task]]\nid = '{name}'\ndirectory = '{home.root}'\nprompt = '''\n{script}\n'''\n"
                    for name, script in (("says", says), ("fails", f"{says}\n$ fail {' '.join(every)}"),
                                         ("exits", f"$ stderr {' '.join(every)}\n$ exit 3")))
    return home.manifest(f'[run]\nmax_parallel = 3\n[defaults]\nagent = "demo"\nuse_worktree = false\n'
                         f'[defaults.env]\n{env}[[mcp_server]]\nid = "s"\ncommand = "true"\nargs = {args}\n'
                         f'[mcp_server.env]\n{mine}[[notification]]\nkind = "log"\n{tasks}')


def look_at_ps(home: Home, words: list[str], found: set, ended: threading.Event) -> None:
    """Note which secrets stand in the argv of a process of this home, until the end."""
    while not ended.is_set():
        for pid, line in processes_with(f"XDG_DATA_HOME={home.root}").items():
            found |= {f"ps {pid}: {line[:60]}" for word in words if word in line}
        ended.wait(0.05)


def leak(root: Path, number: int) -> list[str]:
    """Where a secret was found; nowhere, if all is well."""
    home, given, found, ended = home_in(root), seed_secrets(), set(), threading.Event()
    every = [word for words in given.values() for word in words]
    env = {f"OPERATOR_TOKEN_{n}": word for n, word in enumerate(given["env"])}
    watcher = threading.Thread(target=look_at_ps, args=(home, every, found, ended))
    watcher.start()
    try:
        said = [home.pitboss("dispatch", "-v", talkative(home, given), check=1, env=env)]
        run = home.run_dir().name
        for args in (["status", run], ["status", run, "--json"], ["list", "--json"], ["tree", run],
                     ["status", run, "--rebuild"], ["diff", run, run], ["attach", run, "says"],
                     ["resume", run, "--failed"]):
            said.append(home.pitboss(*args, env=env))
        ended.set()                    # from here on a secret is in an argv that somebody typed
        watcher.join()
        for args in (["cancel", run, "--reason", every[0]], ["status", every[1]]):
            said.append(home.pitboss(*args, env=env))
        for done in said:
            found |= {f"output of {done.args[3:5]}" for word in every if word in done.stdout + done.stderr}
        for path in home.runs.rglob("*"):
            if path.is_file() and path.name not in NEEDED and ".sessions" not in path.parts:
                data = path.read_bytes()
                found |= {str(path.relative_to(home.runs)) for word in every if word.encode() in data}
        text = (home.runs / run / "summary.jsonl").read_text()
        assert text.count("***") >= len(every), "nothing was masked: the agents did not say it"
    finally:
        ended.set()
        watcher.join()
        home.end_everything()
    assert not found, sorted(found)
    return every


def secrets_stay_out(trial: Trial) -> Outcome:
    count = trial.count(10)
    good = trial.rounds(count, leak)
    return Outcome(f"{0 if len(good) == count else 'some'} of {20 * count} secrets found in files, messages or ps",
                   len(good) == count)


# ---- R22: old runs

WENT = {     # how each actor of the recorded journals came out; one that is not named never began
    "approved": {"boss": "ApprovalTimedOut", "worker-1": "ApprovalRejected", "worker-2": "Cancelled"},
    "cancelled": {"one": "Cancelled"},
    "crashed": dict.fromkeys(("dead", "alive", "dealt", "waits"), "Success"),
    "halted": {"one": "Failed"},
    "heard": {"boss": "Success", "worker-1": "Failed"},
    "led": {"boss": "Success", "worker-1": "Success", "worker-2": "Success", "worker-3": "Cancelled",
            "worker-4": "Cancelled"},
    "limited": dict.fromkeys(("t0", "t1", "t2"), "Success"),
    "plain": {"good": "Success", "long": "Success", "bad": "Failed", "taken": "SpawnFailed", "late": "TimedOut",
              "breaks": "Success", "gone": "SpawnFailed", "draft": "Success"},
    "refused": {"t0": "Failed"},
    "stopped": {"one": "Cancelled", "two": "Cancelled"},
    "told": {"one": "Success"},
    "tree": {"boss": "Success", "sublead-1": "Success", "sublead-2": "Cancelled", "worker-1": "Success",
             "worker-2": "Cancelled"},
}


def open_journal(home: Home, name: str) -> None:
    """A run folder of which there is the journal alone opens in every reading command, and tells what became of all."""
    journal = TESTS / "data" / "journals" / f"{name}.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    run_dir = home.runs / events[0]["run_id"]
    run_dir.mkdir(parents=True)
    (run_dir / "journal.jsonl").write_bytes(journal.read_bytes())
    (run_dir / "lock").touch()
    one_of_each = {row.words.split()[0]: row.words for row in reversed(golden.LOOKS)}
    for command in one_of_each.keys() - {"tree", "policy"}:     # these are about more than a journal
        golden.look(home, *[run_dir.name if word == "RUN" else word for word in one_of_each[command].split()])
    shown = {a["task_id"]: a["status"] for a in json.loads(golden.look(home, "status", run_dir.name, "--json"))["actors"]}
    assert {actor: status for actor, status in shown.items() if status} == WENT[name], shown
    assert set(shown) == {e["actor"] for e in events if e["kind"] == "actor_added"}, "not every actor is shown"


def open_old(root: Path, play: golden.Play) -> str:
    """Do one thing with what an earlier program left; its name."""
    home = home_in(root)
    try:
        play.run(home, play.name)
        return play.name
    finally:
        home.end_everything()


def old_runs_open(trial: Trial) -> Outcome:
    journals = sorted(path.stem for path in (TESTS / "data" / "journals").glob("*.jsonl"))
    plays = [golden.Play(name, open_journal) for name in journals]
    plays += [play for play in golden.PLAYS if not play.needs_tmux or shutil.which("tmux")]
    good = trial.rounds(len(plays), lambda root, n: open_old(root, plays[n % len(plays)]))
    kept = {play.name for play in golden.PLAYS} - set(golden.RUST)
    which = f"{len(journals)} journals, {len(kept)} golden, {len(golden.RUST)} of the Rust tool"
    return all_of(trial, good, len(plays), f" uses of {len(journals) + len(kept) + len(golden.RUST)} folders ({which})")


# ---- R26: other Pythons

MARKS = "not slow and not real"
FEW = ("test_cli.py", "test_text.py", "test_manifest.py")      # the whole suite is for the full table


def pythons() -> dict[str, str]:
    """Version to program of every Python of at least 3.11 that is installed here."""
    found, ask = {}, "import sys; print('%d.%d' % sys.version_info[:2])"
    places = [f"python3.{n}" for n in range(11, 15)]
    places += sorted(map(str, (Path.home() / ".pyenv/versions").glob("3.1[1-9]*/bin/python3")))
    for place in places:
        with contextlib.suppress(OSError):
            done = subprocess.run([place, "-c", ask], capture_output=True, text=True)
            if done.returncode == 0 and re.fullmatch(r"3\.1[1-9]", done.stdout.strip()):
                found.setdefault(done.stdout.strip(), place)
    return found


def suite(root: Path, scale: float, env: dict, flags: str = "") -> str:
    """The quick tests with a Python, or below scale 1 a part of some files; their last line."""
    part = max(1, round(0.2 / scale))
    chosen = [str(TESTS)] if scale == 1 else [str(TESTS / name) for name in FEW]
    done = subprocess.run([PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKS, "-x",
                           "--ignore", str(TESTS / "test_proof.py"), *chosen],
                          env={**os.environ, "PITBOSS_TEST_SHARD": f"0/{part}", "TMPDIR": str(root), **env,
                               "PITBOSS_TEST_PYTHON_FLAGS": flags}, cwd=TESTS.parent, capture_output=True, text=True,
                          timeout=3000)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-1500:]      # 5: none was chosen
    return done.stdout.splitlines()[-1]


def plain_pythons(trial: Trial) -> Outcome:
    known = pythons()
    if not known:
        raise CannotRun("there is no Python of at least 3.11 on PATH")
    plays = {f"Python {version}": ({"PITBOSS_TEST_PYTHON": path}, "") for version, path in known.items()}
    plays["-I -S"] = ({"PITBOSS_TEST_PYTHON": sys.executable}, "-I -S")
    plays["LC_ALL=C, HOME that cannot be written"] = ({"LC_ALL": "C", "LANG": "", "HOME": "/proc"}, "")
    rows = list(plays.items())
    good = trial.rounds(len(rows), lambda root, n: suite(root, trial.scale, *rows[n % len(rows)][1]))
    which = "" if trial.scale == 1 else ", of a part of the quick tests"
    return Outcome(f"{len(good)} of {len(rows)} green ({', '.join(plays)}){which}",
                   len(good) == len(rows) and {"3.11", "3.12", "3.13"} <= known.keys())
