"""Record the journals in tests/data/journals from real runs: `python tests/record_journals.py`.

What names this machine or its folders is replaced, so that a recording shows nothing of where it was made.
"""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tools import PYTHON, Home, git, processes_with, read_events, wait_for  # noqa: E402

JOURNALS = Path(__file__).resolve().parent / "data" / "journals"
FAULTS = Path(__file__).resolve().parent / "faults.py"


def task(ident: str, script: str, **more) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key,
             value in {"id": ident, "directory": "repo", "prompt": script, **more}.items()]
    return "[[task]]\n" + "\n".join(lines) + "\n"


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def deal_until(home: Home, manifest: Path, point: str, number: int) -> None:
    """Dispatch, and SIGKILL the dispatcher at the `number`-th call of a kind (see faults.py)."""
    argv = [PYTHON, str(FAULTS), point, str(number), "--", "dispatch", str(manifest)]
    process = subprocess.Popen(argv, env=home.env, cwd=home.root, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: state_of(process.pid) in ("T", "Z", ""), 60)
    process.kill()
    process.wait()


def has_event(home: Home, kind: str, actor: str) -> bool:
    newest = max(home.runs.glob("0*"), default=None)
    return newest is not None and (newest / "journal.jsonl").exists() and any(
        e["kind"] == kind and e.get("actor") == actor for e in read_events(newest))


def plain(home: Home) -> None:
    """Every way in which a run that nobody disturbs can go."""
    home.repo("repo")
    git(home.root / "repo", "branch", "taken")
    git(home.root / "repo", "worktree", "add", "-q", str(home.root / "elsewhere"), "taken")
    (home.root / "prog").write_text("#!/bin/sh\necho done\n")
    (home.root / "prog").chmod(0o755)
    manifest = home.manifest(
        '[run]\nmax_parallel = 2\n[defaults]\nagent = "demo"\n[agent.own]\ncommand = ["./prog"]\n'
        + task("good", "$ write a.txt x\n$ commit\n$ say done")
        + task("long", "$ print 30000\n$ sleep 6\n$ print 5000")
        + task("bad", "$ fail it did not work")
        + task("taken", "$ say x", branch="taken")
        + task("late", "$ hang", timeout_secs=1)
        + task("breaks", "$ run rm ../prog", use_worktree=False)
        + task("gone", "x", agent="own", use_worktree=False)
        + task("draft", "$ write draft.txt x"))
    home.pitboss("dispatch", manifest, check=1)


def crashed(home: Home) -> None:
    """The dispatcher dies twice: a hand was dealt and not started; then one died with it and one goes on."""
    home.repo("repo")
    manifest = home.manifest('[run]\nmax_parallel = 3\n[defaults]\nagent = "demo"\nuse_worktree = false\n'
                             + task("dead",
                                    "$ say a\n$ run test -e seen || { touch seen; sleep 60; }\n$ say b")
                                    + task("alive", "$ say a\n$ sleep 4")
                             + task("dealt", "$ say x") + task("waits", "$ say x"))
    deal_until(home, manifest, "spawn.before", 3)
    resumed = home.start("resume", home.run_dir().name)
    wait_for(lambda: has_event(home, "hand_started", "dealt"))
    resumed.kill()
    resumed.wait()
    for pid in processes_with("PITBOSS_TASK_ID=dead"):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not processes_with("PITBOSS_TASK_ID=dead"))
    home.pitboss("resume", home.run_dir().name, check=0)


def stopped(home: Home) -> None:
    """One signal drains, another cancels; two actors never start."""
    home.repo("repo")
    manifest = home.manifest('[run]\nmax_parallel = 2\n[defaults]\nagent = "demo"\n'
                             + task("one", "$ say a\n$ hang")
                             + task("two", "$ ignore\n$ hang") + task("three", "$ say x")
                             + task("four", "$ say x"))
    dispatch = home.start("dispatch", manifest)
    wait_for(lambda: has_event(home, "hand_started", "two"))
    dispatch.send_signal(signal.SIGINT)
    wait_for(lambda: any(e["kind"] == "drained" for e in read_events(home.run_dir())))
    dispatch.send_signal(signal.SIGINT)
    assert dispatch.wait(60) == 130


def cancelled(home: Home) -> None:
    """A dead run is cancelled: a hand that was dealt is fenced off and skipped."""
    home.repo("repo")
    manifest = home.manifest('[run]\nmax_parallel = 1\n[defaults]\nagent = "demo"\n' + task("one", "$ say a")
                             + task("two", "$ say b"))
    deal_until(home, manifest, "spawn.before", 1)
    home.pitboss("cancel", home.run_dir().name, "--reason", "not needed", check=0)


def halted(home: Home) -> None:
    """The first failure ends it; then what failed is dealt again as a new run, whose journal is kept."""
    home.repo("repo")
    manifest = home.manifest('[run]\nmax_parallel = 1\nhalt_on_failure = true\n[defaults]\nagent = "demo"\n'
                             + task("one", "$ say a\n$ fail no") + task("two", "$ say x"))
    home.pitboss("dispatch", manifest, check=1)
    home.pitboss("resume", home.run_dir().name, "--failed", check=1)


def led(home: Home) -> None:
    """A lead and its workers: every tool that changes something."""
    home.repo("repo")

    def call(tool: str, /, **arguments) -> str:
        return f"$ call {tool} {json.dumps(arguments)}"

    first, up = {"task_id": "<1.task_id>"}, {"path": "/shared/up", "timeout_secs": 30}
    hangs = call("kv_set", path="/shared/up", value="x") + "\n$ hang"
    waits = call("lease_acquire", name="x", ttl_secs=5, wait_secs=0.2)
    script = [
        call("spawn_worker", prompt=hangs), call("kv_wait", **up),
        call("pause_worker", **first, mode="freeze"), call("continue_worker", **first),
        call("pause_worker", **first), call("continue_worker", **first, prompt=hangs),
        call("kv_wait", **up, min_version=2), call("reprompt_worker", **first, prompt="$ say redirected"),
        call("kv_cas", path="/shared/up", expected_version=2, new_value="y"), call("kv_delete", path="/shared/up"),
        call("lease_acquire", name="x", ttl_secs=60), call("lease_acquire", name="x", ttl_secs=61),
        call("spawn_worker", prompt=waits), call("wait_for_worker", task_id="<13.task_id>"),
        call("lease_release", lease_id="<11.lease_id>"), call("wait_for_worker", **first),
        call("spawn_worker", prompt=hangs), call("spawn_worker", prompt=hangs),
        call("kv_wait", **up, min_version=5),
        call("cancel_worker", task_id="<17.task_id>", reason="not needed"), "$ say done"]
    manifest = home.manifest('[run]\nmax_workers = 4\nbudget_usd = 20\n[defaults]\nagent = "demo"\n[lead]\n'
                             + f'id = "boss"\ndirectory = "repo"\nprompt = {json.dumps(chr(10).join(script))}\n')
    home.pitboss("dispatch", manifest, check=1)


def tree(home: Home) -> None:
    """Two sub-leads, one with an envelope and one that shares the root's purse; one of them is cancelled."""
    home.repo("repo")

    def call(tool: str, /, **arguments) -> str:
        return f"$ call {tool} {json.dumps(arguments)}"

    given = {"model": "claude-sonnet-4-6"}
    works = [call("spawn_worker", prompt="$ print 3000\n$ say done"), call("wait_for_worker", task_id="<<1.task_id>>"),
             call("lease_acquire", name="x", ttl_secs=60), "$ say done"]
    hangs = [call("spawn_worker", prompt="$ hang"), call("kv_set", path="/shared/up", value="x"), "$ hang"]
    script = [
        call("spawn_sublead", **given, prompt="\n".join(works), budget_usd=2, max_workers=2,
             initial_ref={"plan": {"steps": 2}}),
        call("spawn_sublead", **given, prompt="\n".join(hangs), read_down=True),
        call("kv_wait", path="/sub/<2.sublead_id>/shared/up", timeout_secs=60), call("budget_status"),
        call("wait_actor", actor_id="<1.sublead_id>"),
        call("cancel_worker", task_id="<2.sublead_id>", reason="not needed"),
        call("wait_actor", actor_id="<2.sublead_id>"), call("budget_status"), "$ say done"]
    manifest = home.manifest('[run]\nmax_workers = 4\nbudget_usd = 20\n[defaults]\nagent = "demo"\n[lead]\n'
                             'allow_subleads = true\nmax_subleads = 2\n'
                             + f'id = "boss"\ndirectory = "repo"\nprompt = {json.dumps(chr(10).join(script))}\n')
    home.pitboss("dispatch", manifest, check=1)


def limited(home: Home) -> None:
    """A limit holds its account; the dispatcher dies in the hold; the next one has other credentials and meets another."""
    home.repo("repo")
    (home.runs.parent).mkdir(parents=True)
    (home.runs.parent / "house.sqlite").write_text("this is no database" * 100)
    manifest = home.manifest('[run]\nmax_parallel = 2\n[defaults]\nagent = "demo"\nuse_worktree = false\n'
                             + "".join(task(f"t{n}", "$ say a\n$ limit 1 2\n$ say b") for n in range(3)))
    dispatch = home.start("dispatch", manifest)
    wait_for(lambda: has_event(home, "hold_began", "t0") or has_event(home, "hold_began", "t1"))
    dispatch.kill()
    dispatch.wait()
    home.pitboss("resume", home.run_dir().name, env={"PITBOSS_DEMO_ACCOUNT": "another"}, check=0)


def told(home: Home) -> None:
    """Another run's limit holds a hand that was about to be dealt when the dispatcher died."""
    home.repo("repo")
    head = '[defaults]\nagent = "demo"\n'
    deal_until(home, home.manifest(head + task("one", "$ say a"), "one.toml"), "journal.after", 4)
    run = home.run_dir()
    other = home.start("dispatch", home.manifest(head + task("two", "$ limit 2 1"), "two.toml"))
    wait_for(lambda: home.run_dir() != run and has_event(home, "hold_began", "two"))
    home.pitboss("resume", run.name, check=0)
    assert other.wait(60) == 0
    home.root.joinpath("told").symlink_to(run)


def refused(home: Home) -> None:
    """Credentials are refused: one failure, and nothing more starts."""
    home.repo("repo")
    manifest = home.manifest('[run]\nmax_parallel = 1\n[defaults]\nagent = "demo"\nuse_worktree = false\n'
                             + "".join(task(f"t{n}", "$ auth") for n in range(3)))
    home.pitboss("dispatch", manifest, check=1)


def heard(home: Home) -> None:
    """A lead asks for more than its budget, a worker fails, and two sinks are told what they asked for; the dispatcher dies once."""
    home.repo("repo")
    script = ('$ call spawn_worker {"prompt": "$ fail no"}\n$ call spawn_worker {"prompt": "$ say x"}\n'
              '$ call wait_for_worker {"task_id": "<1.task_id>"}\n$ say done')
    manifest = home.manifest('[run]\nmax_workers = 2\nbudget_usd = 0.105\n[defaults]\nagent = "demo"\nmodel = "haiku"\n'
                             'use_worktree = false\n[[notification]]\nkind = "log"\n[lifecycle]\nnotify = { kind = "log", '
                             'events = ["worker_failed"] }\n'
                             f'[lead]\nid = "boss"\ndirectory = "repo"\nprompt = {json.dumps(script)}\n')
    deal_until(home, manifest, "journal.after", 3)
    home.pitboss("resume", home.run_dir().name, check=1)


def approved(home: Home) -> None:
    """Requests for approval: answered by an operator, by rules, by time, and by nobody."""
    def call(tool: str, **arguments) -> str:
        return f"$ call {tool} {json.dumps(arguments)}"

    def prompt(tool: str) -> str:
        return call("permission_prompt", tool_name=tool, input={"command": "ls"})

    home.repo("repo")
    script = [call("propose_plan", plan={"summary": "Do it", "risks": ["none"]}),
              call("request_approval", summary="Wait", ttl_secs=0.1, fallback="block"),
              call("spawn_worker", prompt=prompt("Bash")), call("wait_for_worker", task_id="<3.task_id>"),
              call("spawn_worker", prompt=prompt("Write")), "$ sleep 2", call("cancel_worker", task_id="<5.task_id>"),
              call("wait_for_worker", task_id="<5.task_id>"), call("request_approval", summary="Late", ttl_secs=0.1)]
    manifest = home.manifest('[run]\nmax_workers = 2\nbudget_usd = 20\nrequire_plan_approval = true\n[defaults]\n'
                             'agent = "demo"\nuse_worktree = false\n[lead]\nid = "boss"\ndirectory = "repo"\n'
                             'permission_routing = "path_b"\nprompt = \'\'\'\n' + "\n".join(script) + "\n\'\'\'\n"
                             '[[approval_policy]]\nmatch = { tool_name = "Bash" }\naction = "auto_approve"\n')
    dispatch = home.start("dispatch", manifest)
    wait_for(lambda: has_event(home, "approval_asked", "boss"))
    run = home.run_dir()
    rules = home.manifest('[[approval_policy]]\nmatch = { tool_name = "Ba*" }\naction = "auto_reject"\n', "rules.toml")
    home.pitboss("policy", run.name, "--set", rules, check=0)

    def answer() -> None:
        [asked] = json.loads(home.pitboss("approvals", run.name, "--json", check=0).stdout)
        home.pitboss("approve", run.name, asked["request_id"], check=0)

    answer()
    wait_for(lambda: has_event(home, "approval_kept", "boss"))
    answer()
    dispatch.wait(60)


RUNS = (led, tree, approved, plain, crashed, stopped, cancelled, halted, limited, told, refused, heard)


def scrub(text: str, root: Path) -> str:
    """The journal without the folders, the host and the boot of the machine that it was recorded on."""
    text = text.replace(str(root), "/home/me").replace(str(Path(__file__).resolve().parent.parent),
                                                       "/opt/pitboss")
    text = text.replace(json.dumps(os.uname().nodename), '"host"').replace(PYTHON, "/usr/bin/python3")
    text = re.sub(r'"boot":"[^"]*"', '"boot":"00000000-0000-4000-8000-000000000000"', text)
    return re.sub(r"pid:\[\d+\]", "pid:[4026531836]", text)


def main(names: list[str]) -> int:
    """Record the journals of these names; without any, all."""
    JOURNALS.mkdir(parents=True, exist_ok=True)
    for record in [r for r in RUNS if not names or r.__name__ in names]:
        with tempfile.TemporaryDirectory(prefix="record-") as folder:
            home = Home(Path(folder).resolve())
            try:
                record(home)
                named = home.root / record.__name__        # else the newest run
                text = scrub(((named if named.exists() else home.run_dir()) / "journal.jsonl").read_text(encoding="ascii"), home.root)
            finally:
                home.end_everything()
            (JOURNALS / f"{record.__name__}.jsonl").write_text(text, encoding="ascii")
            print(f"{record.__name__}: {len(text.splitlines())} events")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
