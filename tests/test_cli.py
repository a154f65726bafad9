"""The command line keeps its promises: words, codes, shapes, files, and what odd agents do to it.

Black box: the file runs as a program, and the verdict comes from its output, its run folder and /proc.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pytest

from tools import ISOLATED, PITBOSS, PYTHON, Home, git, processes_with, read_events, read_records, wait_for

RECORD_KEYS = {
    "task_id", "status", "exit_code", "started_at", "ended_at", "duration_ms", "worktree_path", "branch",
    "log_path", "token_usage", "claude_session_id", "final_message", "final_message_preview",
    "parent_task_id", "role", "agent", "model", "cost_usd", "pause_count", "reprompt_count",
    "approvals_requested", "approvals_approved", "approvals_rejected", "failure_reason", "rescue_ref",
    "hands", "worktree_kept"}
SUMMARY_KEYS = {
    "run_id", "manifest_path", "manifest_name", "pitboss_version", "claude_version", "started_at", "ended_at",
    "total_duration_ms", "tasks_total", "tasks_failed", "was_interrupted", "total_cost_usd",
    "tasks_not_started", "tasks"}
META_KEYS = {
    "run_id", "manifest_path", "manifest_name", "mode", "started_at", "pitboss_version", "claude_version",
    "pid", "host", "parent_run_id", "resumed_from"}
STATUS_KEYS = {
    "run_id", "name", "mode", "state", "tasks_total", "tasks_failed", "total_cost_usd", "approvals", "actors",
    "tasks_not_started", "agents_alive", "holds", "attention"}
RESULT = '{"type":"result","subtype":"success","is_error":false,"result":"fine","session_id":"x"}'
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, which only Linux has")


def demo(*scripts: str, run: str = "", defaults: str = "use_worktree = false") -> str:
    """A manifest with one task of the scripted agent a script, named t0, t1…"""
    tasks = "".join(f'[[task]]\nid = "t{n}"\ndirectory = "."\nprompt = {json.dumps(script)}\n'
                    for n, script in enumerate(scripts))
    return f'[run]\n{run}\n[defaults]\nagent = "demo"\n{defaults}\n{tasks}'


def shell(*scripts: str, run: str = "", format: str = "text", task: str = "") -> str:
    """A manifest with one agent a script, which sh runs in the home's root; `task` goes into every task."""
    agents = "".join(f'[agent.s{n}]\ncommand = ["sh", "-c", {json.dumps(script)}]\nformat = "{format}"\n'
                     for n, script in enumerate(scripts))
    tasks = "".join(f'[[task]]\nid = "t{n}"\nagent = "s{n}"\ndirectory = "."\nprompt = "x"\n{task}\n'
                    for n in range(len(scripts)))
    return f"[run]\n{run}\n[defaults]\nuse_worktree = false\n{agents}{tasks}"


def deal(home: Home, text: str, code: int = 0, **options) -> list[dict]:
    """Dispatch `text` to its end; its records, ordered by id."""
    home.pitboss("dispatch", "-q", home.manifest(text), check=code, **options)
    return sorted(read_records(home.run_dir()), key=lambda record: record["task_id"])


def start(home: Home, text: str, hands: int = 1) -> tuple[subprocess.Popen, Path]:
    """Dispatch `text`; the process and the run folder, as soon as that many agents were started."""
    process = home.start("dispatch", "-q", home.manifest(text))
    wait_for(lambda: process.poll() is not None or count_events(home, "hand_started") >= hands, what="agents")
    return process, home.run_dir()


def count_events(home: Home, kind: str) -> int:
    try:
        return sum(event["kind"] == kind for event in read_events(home.run_dir()))
    except (OSError, ValueError):        # no run folder yet, or an empty one
        return 0


def agents_of(home: Home) -> dict[int, str]:
    """The living processes of the agents of the newest run, shims included: pid to command line."""
    return processes_with(f"PITBOSS_RUN_ID={home.run_dir().name}")


def as_json(home: Home, *args):
    return json.loads(home.pitboss(*args, "--json", check=0).stdout)


def untouched(home: Home) -> bool:
    """True when no command left a file in the user's folders."""
    folders = [home.root / part for part in ("home", "data", "run", "tmp")]
    return not any(path.is_file() for folder in folders for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A home with one finished run that every reading command can look at: one success, one failure."""
    home = Home(tmp_path_factory.mktemp("finished"))
    home.repo("r")
    script = "$ say first words\n$ run echo tool-output\n$ write new.txt hello\n$ commit\n$ say last words"
    text = demo(script, "$ fail broken", run='name = "table"', defaults="").replace('"."', '"r"')
    home.pitboss("dispatch", home.manifest(text), check=1)
    yield home
    home.end_everything()


# ---- the program itself


@pytest.mark.parametrize("argument", ["version", "--version", "-V"])
def test_the_version_is_name_and_number(home, argument):
    assert re.fullmatch(r"pitboss(\.py)? \d+\.\d+\.\d+\n", home.pitboss(argument, check=0).stdout)


@pytest.mark.parametrize("command", ["validate", "dispatch", "status", "list"])
def test_every_command_knows_the_version(home, command):
    assert home.pitboss(command, "--version", check=0).stdout == home.pitboss("--version", check=0).stdout


def test_a_link_calls_the_program_by_its_name(home):
    link = home.root / "pitboss"
    link.symlink_to(PITBOSS)
    argv = [PYTHON, *ISOLATED, link, "--version"]
    done = subprocess.run(argv, env=home.env, text=True, capture_output=True)
    assert re.fullmatch(r"pitboss \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("line", ["", "dance", "validate", "dispatch", "status --loud", "--json", "list x y"])
def test_a_command_line_that_means_nothing_is_refused_with_2(home, line):
    done = home.pitboss(*line.split(), check=2)
    assert done.stderr.strip() and "Traceback" not in done.stderr
    assert done.stdout == "" and untouched(home)


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["dispatch", "--help"], ["status", "-h"]])
def test_help_is_data(home, args):
    done = home.pitboss(*args, check=0)
    assert "dispatch" in done.stdout or "RUN" in done.stdout
    assert done.stderr == ""


def test_help_names_every_command(home):
    text = home.pitboss("--help", check=0).stdout
    for name in "validate dispatch resume cancel status list attach demo doctor version".split():
        assert re.search(rf"^\s+{name}\b", text, re.M), name


def old_pythons() -> list[str]:
    """Pythons older than 3.11 of this machine, at least 3.8."""
    root = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser())
    usual = [Path(folder, f"python3.{minor}") for minor in (8, 9, 10)
             for folder in ("/usr/bin", "/usr/local/bin")]
    of_pyenv = [p for minor in (8, 9, 10) for p in root.glob(f"versions/3.{minor}.*/bin/python3")]
    return [str(p) for p in usual + of_pyenv if p.exists()]


def test_an_old_python_gets_one_sentence():
    pythons = old_pythons()
    if not pythons:
        pytest.skip("no Python 3.8, 3.9 or 3.10 here")
    for python in pythons:
        done = subprocess.run([python, PITBOSS, "version"], text=True, capture_output=True)
        assert done.returncode == 2 and done.stdout == "", python
        assert len(done.stderr.splitlines()) == 1 and "3.11" in done.stderr and "Traceback" not in done.stderr


# ---- validate


def test_validate_says_mode_counts_and_cap(home):
    manifest = home.manifest(demo("$ say x", "$ say y", run="max_parallel = 3"))
    done = home.pitboss("validate", manifest, check=0)
    assert re.search(r"\bOK\b.*flat.*\b2\b.*max_parallel=3\b", done.stdout.replace("\n", " "))
    assert done.stderr == "" and untouched(home)


# ---- dispatch


def test_dispatch_ends_with_the_run_folder(home):
    done = home.pitboss("dispatch", home.manifest(demo("$ say x")), check=0)
    assert done.stdout.splitlines()[-1] == str(home.run_dir())


def test_quiet_dispatch_prints_nothing_else(home):
    done = home.pitboss("dispatch", "-q", home.manifest(demo("$ say x", "$ fail no")), check=1)
    assert (done.stdout, done.stderr) == (f"{home.run_dir()}\n", "")


@pytest.mark.parametrize("scripts, code", [(["$ say a"], 0), (["$ say a", "$ fail b"], 1), (["$ exit 0"], 1)])
def test_the_exit_code_says_how_it_went(home, scripts, code):
    home.pitboss("dispatch", home.manifest(demo(*scripts)), check=code)


def test_a_dry_run_shows_every_agent_and_writes_nothing(home):
    repo = home.repo("r")
    text = demo("$ say a", "$ say b", defaults="").replace('"."', '"r"') + 'branch = "mine"\n'
    done = home.pitboss("dispatch", "--dry-run", home.manifest(text), check=0)
    for word in ("t0", "t1", "mine", "pitboss/", "worktrees/t0", "worktrees/t1"):
        assert word in done.stdout, word
    assert untouched(home)
    assert git(repo, "branch", "--format=%(refname:short)").split() == ["main"]


def test_a_dry_run_shows_what_claude_would_be_called_with(home):
    claude = home.root / "claude"
    claude.write_text("#!/bin/sh\nexit 1\n")
    claude.chmod(0o755)
    manifest = home.manifest(demo("many words").replace('"demo"', '"claude"\nmodel = "m-1"'))
    env = {"PITBOSS_CLAUDE_BINARY": str(claude)}
    done = home.pitboss("dispatch", "--dry-run", manifest, check=0, env=env)
    for word in (str(claude), "--output-format", "stream-json", "--verbose", "--session-id", "m-1",
                 "--strict-mcp-config", str(home.root)):
        assert word in done.stdout, word
    assert "many words" not in done.stdout
    assert untouched(home)


def test_in_the_background_the_run_goes_on_alone(home):
    done = home.pitboss("dispatch", "--background", home.manifest(demo("$ sleep 0.5\n$ say x")), check=0)
    told = json.loads(done.stdout)
    assert set(told) == {"run_id", "manifest_path", "started_at", "child_pid"}
    run = home.runs / told["run_id"]
    assert UUID7.fullmatch(told["run_id"]) and TIME.fullmatch(told["started_at"]) and told["child_pid"] > 1
    assert told["manifest_path"] == str(home.root / "m.toml")
    wait_for(lambda: (run / "summary.json").exists(), 30)
    assert json.loads((run / "summary.json").read_text())["tasks_failed"] == 0


def test_the_background_does_not_hold_the_callers_pipes(home):
    began = time.monotonic()
    home.pitboss("dispatch", "--background", home.manifest(demo("$ sleep 20")), check=0)
    assert time.monotonic() - began < 15


def test_a_dry_run_in_the_background_means_nothing(home):
    home.pitboss("dispatch", "--background", "--dry-run", home.manifest(demo("$ say x")), check=2)
    assert untouched(home)


@pytest.mark.parametrize("flag", ["--run-dir", "--runs-dir"])
def test_another_runs_folder_holds_everything(home, flag):
    other = home.root / "other"
    done = home.pitboss("dispatch", "-q", home.manifest(demo("$ say x")), flag, other, check=0)
    run = Path(done.stdout.strip())
    assert run.parent == other and (run / "summary.json").exists() and not home.runs.exists()
    assert home.pitboss("status", run.name[:8], check=3).stdout == ""
    assert run.name in home.pitboss("status", run.name[:13], flag, other, check=0).stdout
    assert run.name[:8] in home.pitboss("list", flag, other, check=0).stdout


def test_the_manifest_can_name_the_runs_folder(home):
    (home.root / "sub").mkdir()
    manifest = home.manifest(demo("$ say x", run='run_dir = "../other"'), "sub/m.toml")
    done = home.pitboss("dispatch", "-q", manifest, check=0)
    assert Path(done.stdout.strip()).parent == home.root / "other"


def test_after_a_failure_nothing_more_is_started(home):
    scripts = ["$ say x", "$ fail no", "$ say y", "$ say z"]
    deal(home, demo(*scripts, run="max_parallel = 1\nhalt_on_failure = true"), code=1)
    summary = json.loads((home.run_dir() / "summary.json").read_text())
    assert [task["task_id"] for task in summary["tasks"]] == ["t0", "t1"]
    assert (summary["tasks_not_started"], summary["tasks_failed"]) == (2, 1)
    assert not (home.run_dir() / "tasks" / "t2" / "stdout.log").exists()


def test_without_the_halt_everything_is_dealt(home):
    assert len(deal(home, demo("$ fail no", "$ say y", run="max_parallel = 1"), code=1)) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_drains_and_gives_its_code(home, number, code):
    waits = "until [ -e go ]; do sleep 0.05; done; echo done"
    done, run = start(home, shell(waits, "echo never", run="max_parallel = 1"))
    done.send_signal(number)
    wait_for(lambda: any(event["kind"] == "drained" for event in read_events(run)), 30)
    (home.root / "go").touch()
    assert done.wait(30) == code
    summary = json.loads((run / "summary.json").read_text())
    assert [(task["task_id"], task["status"]) for task in summary["tasks"]] == [("t0", "Success")]
    assert (summary["was_interrupted"], summary["tasks_not_started"]) == (True, 1)


# ---- run ids


@pytest.mark.parametrize("run", ["ffffffff", "..", ".", "/", "../runs", "*", "PATH"])
def test_a_run_that_does_not_exist_is_3_and_an_id_is_never_a_path(finished, run):
    done = finished.pitboss("status", str(finished.run_dir()) if run == "PATH" else run, check=3)
    assert done.stdout == "" and "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize("line", ["attach RUN t0", "cancel RUN", "resume RUN"])
@pytest.mark.parametrize("run", ["ffffffff", "../runs"])
def test_every_command_tells_of_a_run_that_does_not_exist(finished, line, run):
    assert finished.pitboss(*line.replace("RUN", run).split(), check=3).stdout == ""


def test_an_ambiguous_prefix_lists_the_candidates(home):
    deal(home, demo("$ say x"))
    deal(home, demo("$ say y"))
    names = [run.name for run in home.runs.iterdir() if UUID7.fullmatch(run.name)]
    done = home.pitboss("status", os.path.commonprefix(names), check=3)
    assert all(name in done.stderr for name in names)


def test_run_ids_are_ordered_by_time(home):
    before = time.time() * 1000
    deal(home, demo("$ say x"))
    first = home.run_dir().name
    deal(home, demo("$ say y"))
    second = home.run_dir().name
    assert UUID7.fullmatch(first) and UUID7.fullmatch(second) and first < second
    assert before - 2 <= int(first.replace("-", "")[:12], 16) <= time.time() * 1000


# ---- the run folder


def test_records_and_summaries_have_exactly_the_promised_keys(finished):
    run = finished.run_dir()
    records = sorted(read_records(run), key=lambda record: record["task_id"])
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert sorted(summary["tasks"], key=lambda record: record["task_id"]) == records
    assert META_KEYS <= set(json.loads((run / "meta.json").read_text()))
    good, bad = records
    for record in records:
        assert set(record) == RECORD_KEYS
        assert set(record["token_usage"]) == {"input", "output", "cache_read", "cache_creation"}
        assert TIME.fullmatch(record["started_at"]) and TIME.fullmatch(record["ended_at"])
        assert (record["role"], record["parent_task_id"], record["agent"]) == ("task", None, "demo")
        assert record["log_path"] == str(run / "tasks" / record["task_id"] / "stdout.log")
        assert record["hands"] == 1 and record["duration_ms"] >= 0
    assert (good["status"], good["exit_code"], good["failure_reason"]) == ("Success", 0, None)
    assert (good["final_message"], good["final_message_preview"]) == ("last words", "last words")
    assert good["branch"] == f"pitboss/{run.name[:8]}/t0" and good["worktree_path"] is None
    assert (bad["status"], bad["exit_code"]) == ("Failed", 1) and "broken" in bad["failure_reason"]["message"]
    assert set(bad["failure_reason"]) == {"kind", "message"}


def test_the_summary_adds_up(finished):
    run = finished.run_dir()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["run_id"], summary["manifest_name"]) == (run.name, "table")
    assert (summary["tasks_total"], summary["tasks_failed"], summary["tasks_not_started"]) == (2, 1, 0)
    assert summary["was_interrupted"] is False and summary["manifest_path"] == str(finished.root / "m.toml")
    assert summary["total_cost_usd"] == pytest.approx(sum(task["cost_usd"] or 0 for task in summary["tasks"]))
    began, ended = (datetime.fromisoformat(summary[key]) for key in ("started_at", "ended_at"))
    assert summary["total_duration_ms"] == pytest.approx((ended - began).total_seconds() * 1000, abs=5)


def test_the_manifest_is_kept_byte_for_byte(home):
    path = home.root / "m.toml"
    path.write_bytes(b"\xef\xbb\xbf" + demo("$ say x").replace("\n", "\r\n").encode())
    home.pitboss("dispatch", path, check=0)
    assert (home.run_dir() / "manifest.snapshot.toml").read_bytes() == path.read_bytes()
    assert json.loads((home.run_dir() / "resolved.json").read_text())["tasks"][0]["id"] == "t0"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_run_folder_is_private_whatever_the_umask(home, umask):
    home.repo("r")
    text = demo("$ write made.txt x", defaults="").replace('"."', '"r"')      # unsaved: its worktree is kept
    deal(home, text, umask=umask)
    run = home.run_dir()
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    for path in run.rglob("*"):
        if "worktrees" not in path.relative_to(run).parts and not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    made = run / "worktrees" / "t0" / "made.txt"
    assert stat.S_IMODE(made.stat().st_mode) == 0o666 & ~umask


def test_an_agent_keeps_the_users_umask(home):
    assert deal(home, shell("umask"), umask=0o027)[0]["final_message"].strip() == "0027"


# ---- reading commands


def test_status_has_the_promised_shape(finished):
    shown = as_json(finished, "status", finished.run_dir().name)
    assert set(shown) == STATUS_KEYS
    assert (shown["name"], shown["mode"], shown["state"]) == ("table", "flat", "complete")
    assert (shown["tasks_total"], shown["tasks_failed"], shown["approvals"]) == (2, 1, [])
    assert {actor["task_id"]: actor["status"] for actor in shown["actors"]} == \
        {"t0": "Success", "t1": "Failed"}
    assert all(RECORD_KEYS <= set(actor) for actor in shown["actors"])


def test_status_for_people_names_every_actor(finished):
    done = finished.pitboss("status", finished.run_dir().name[:8], check=0)
    for word in ("t0", "t1", "Success", "Failed", "table", finished.run_dir().name[:8]):
        assert word in done.stdout, word
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_status_of_a_live_run_shows_who_works_and_who_waits(home):
    process, run = start(home, shell("sleep 60", "echo x", run="max_parallel = 1"))
    shown = as_json(home, "status", run.name)
    actors = {actor["task_id"]: actor for actor in shown["actors"]}
    assert shown["state"] == "running" and set(actors) == {"t0", "t1"}
    assert all(actor["status"] is None for actor in actors.values())
    assert (actors["t0"]["state"], actors["t1"]["state"]) == ("Running", "Pending")
    assert as_json(home, "list", "--active")[0]["run_id"] == run.name
    home.pitboss("cancel", run.name, check=0)
    assert process.wait(30) == 1


def test_status_can_rebuild_the_summaries(home):
    deal(home, demo("$ say x", "$ fail y"), code=1)
    run = home.run_dir()
    before = {name: (run / name).read_text() for name in ("summary.json", "summary.jsonl")}
    for name in before:
        (run / name).unlink()
    home.pitboss("status", run.name, "--rebuild", check=0)
    assert {name: (run / name).read_text() for name in before} == before


def test_list_has_the_promised_shape(finished):
    (row,) = as_json(finished, "list")
    assert {"run_id", "name", "mode", "state", "agents_alive", "tasks_total", "tasks_failed"} <= set(row)
    assert (row["run_id"], row["name"], row["mode"]) == (finished.run_dir().name, "table", "flat")
    assert (row["state"], row["agents_alive"]) == ("complete", 0)
    assert (row["tasks_total"], row["tasks_failed"]) == (2, 1)
    assert as_json(finished, "list", "--active") == []


def test_list_is_newest_first_and_survives_rubbish(home):
    deal(home, demo("$ say x"))
    first = home.run_dir().name
    deal(home, demo("$ say y"))
    second = home.run_dir().name
    (home.runs / "not-a-run").mkdir()
    (home.runs / "file").write_text("x")
    (home.runs / "01890000-0000-7000-8000-000000000000").mkdir()
    (home.runs / "01890000-0000-7000-8000-000000000001").mkdir()
    (home.runs / "01890000-0000-7000-8000-000000000001" / "journal.jsonl").write_text('{"half')
    shown = [row["run_id"] for row in as_json(home, "list")]
    assert shown[:2] == [second, first]
    assert home.pitboss("list", check=0).stdout.index(second[:8]) >= 0


def test_list_without_any_run_is_empty(home):
    assert as_json(home, "list") == []
    home.pitboss("list", check=0)
    assert untouched(home)


@needs_proc
def test_a_run_whose_dispatcher_died_is_stale_and_its_agents_are_counted(home):
    process, run = start(home, shell("sleep 60", "sleep 60"), hands=2)
    process.kill()
    process.wait()
    (row,) = as_json(home, "list")
    assert (row["state"], row["agents_alive"]) == ("stale", 2)
    assert "resume" in home.pitboss("status", run.name, check=0).stdout
    home.pitboss("cancel", run.name, check=0)
    assert {record["status"] for record in read_records(run)} == {"Cancelled"}
    assert agents_of(home) == {}


def test_attach_shows_text_tools_and_result(finished):
    done = finished.pitboss("attach", finished.run_dir().name, "t0", check=0)
    lines = done.stdout.splitlines()
    assert "> first words" in lines
    assert any(line.startswith("* ") for line in lines)
    assert any(line.startswith("< ") and "tool-output" in line for line in lines)
    assert lines[-1].startswith("v ") and done.stderr == ""
    failed = finished.pitboss("attach", finished.run_dir().name, "t1", check=0).stdout.splitlines()
    assert any(line.startswith("! ") and "broken" in line for line in failed)


def test_attach_raw_is_the_end_of_the_log(finished):
    run = finished.run_dir()
    log = (run / "tasks" / "t0" / "stdout.log").read_text()
    whole, last = (finished.pitboss("attach", run.name, "t0", "--raw", "--lines", lines, check=0).stdout
                   for lines in (999, 2))
    assert whole == log
    assert last == "".join(log.splitlines(keepends=True)[-2:])


def test_attach_shows_twenty_lines_unless_told(home):
    deal(home, shell("seq 100"))
    shown = home.pitboss("attach", home.run_dir().name, "t0", "--raw", check=0).stdout
    assert shown.split() == [str(n) for n in range(81, 101)]
    assert home.pitboss("attach", home.run_dir().name, "t0", "--raw", "--lines", 0, check=0).stdout == ""


def test_attach_follows_until_the_actor_settles(home):
    process, run = start(home, shell("echo one; until [ -e go ]; do sleep 0.05; done; echo two"))
    attached = home.start("attach", run.name, "t0", "--raw")
    assert attached.stdout.readline() == "one\n"
    (home.root / "go").touch()
    assert attached.communicate(timeout=30)[0] == "two\n"
    assert (attached.returncode, process.wait(30)) == (0, 0)


def test_leaving_attach_is_no_failure(home):
    process, run = start(home, shell("echo one; until [ -e go ]; do sleep 0.05; done"))
    attached = home.start("attach", run.name, "t0", "--raw")
    assert attached.stdout.readline() == "one\n"
    attached.send_signal(signal.SIGINT)
    assert "Traceback" not in attached.communicate(timeout=30)[1] and attached.returncode == 0
    (home.root / "go").touch()
    assert process.wait(30) == 0


def test_an_unknown_actor_lists_those_there_are(finished):
    done = finished.pitboss("attach", finished.run_dir().name, "t9", check=3)
    assert "t0" in done.stderr and "t1" in done.stderr and done.stdout == ""


def test_doctor_says_what_this_machine_has(home):
    done = home.pitboss("doctor", check=0)
    for word in ("python", "git", "tmux", "claude"):
        assert word in done.stdout.lower(), word
    assert as_json(home, "doctor")


def test_doctor_works_without_any_other_program(home):
    empty = home.root / "empty"
    empty.mkdir()
    done = home.pitboss("doctor", env={"PATH": str(empty)})
    assert done.returncode == 1 and "git" in done.stdout.lower() and "Traceback" not in done.stderr


@pytest.mark.parametrize("line", ["version", "--help", "doctor", "list", "list --json", "status RUN",
                                  "status RUN --json", "attach RUN t0", "attach RUN t0 --raw"])
def test_a_reader_that_went_away_is_no_failure(finished, line):
    reader, writer = os.pipe()
    os.close(reader)
    done = finished.start(*line.replace("RUN", finished.run_dir().name).split(), stdout=writer)
    os.close(writer)
    assert (done.communicate(timeout=30)[1], done.returncode) == ("", 0)


def in_sh(home: Home, line: str, redirection: str) -> None:
    """Run a command line with closed streams; it must succeed, and nothing may be called a bug."""
    command = " ".join(home.argv(*line.split())) + " " + redirection
    done = subprocess.run(["sh", "-c", command], env=home.env, text=True, capture_output=True, timeout=60)
    assert (done.returncode, "bug" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_a_reading_command_works_with_closed_streams(finished, closed):
    in_sh(finished, "list", closed)
    in_sh(finished, f"status {finished.run_dir().name}", closed)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("quiet", ["", "-q"])
def test_a_run_works_with_closed_streams(home, quiet, closed):
    in_sh(home, f"dispatch {home.manifest(demo('$ say x'))} {quiet}", closed)
    assert [record["final_message"] for record in read_records(home.run_dir())] == ["x"]


def test_terminal_controls_of_an_agent_are_not_passed_on(home):
    said = "first\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066last"
    done = home.pitboss("dispatch", home.manifest(demo(f"$ say {said}\n$ fail {said}")), check=1)
    run = home.run_dir().name
    status, attach = home.pitboss("status", run, check=0), home.pitboss("attach", run, "t0", check=0)
    for text in (done.stderr, status.stdout, attach.stdout):
        assert "first" in text and "last" in text
        assert set(text) & set("\x1b\x07\x9b\u202e\u2066") == set()


def test_only_the_first_line_can_be_read(finished):
    command = " ".join(finished.argv("status", finished.run_dir().name, "--json")) + " | head -1"
    done = subprocess.run(["sh", "-c", command], env=finished.env, text=True, capture_output=True)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


@needs_proc
def test_a_terminal_gets_colour_unless_it_is_not_wanted(finished):
    command = " ".join(finished.argv("status", finished.run_dir().name))
    script = shutil.which("script")
    if not script:
        pytest.skip("script(1), which makes a terminal, is missing")
    options = {"stdin": subprocess.DEVNULL, "text": True, "capture_output": True}
    argv, env = [script, "-qec", command, "/dev/null"], {**finished.env, "TERM": "xterm"}
    coloured = subprocess.run(argv, env=env, **options).stdout
    plain = subprocess.run(argv, env={**env, "NO_COLOR": "1"}, **options).stdout
    assert "\x1b[" in coloured and "\x1b[" not in plain and "Success" in plain


# ---- resume of a finished run (a dead dispatcher's is the crash tests' matter)


def test_a_finished_run_is_dealt_again_as_a_new_one(home):
    deal(home, demo("$ say x", "$ fail y"), code=1)
    first = home.run_dir()
    home.pitboss("resume", first.name, check=1)
    again = home.run_dir()
    assert again != first and json.loads((again / "meta.json").read_text())["resumed_from"] == first.name
    assert [r["task_id"] for r in sorted(read_records(again), key=lambda r: r["task_id"])] == ["t0", "t1"]


def test_only_what_failed_can_be_dealt_again(home):
    deal(home, shell("echo x", "test -e go"), code=1)
    first = home.run_dir()
    (home.root / "go").touch()
    home.pitboss("resume", first.name, "--failed", check=0)
    assert [(r["task_id"], r["status"]) for r in read_records(home.run_dir())] == [("t1", "Success")]


def test_cancel_of_what_is_settled_is_refused(finished):
    finished.pitboss("cancel", finished.run_dir().name, check=4)
    finished.pitboss("cancel", finished.run_dir().name, "t0", check=4)
    finished.pitboss("cancel", finished.run_dir().name, "t9", check=3)


# ---- odd agents


def test_ten_megabytes_in_one_line(home):
    record, = deal(home, shell("head -c 10000000 /dev/zero | tr '\\0' a; echo"))
    run = home.run_dir()
    assert record["status"] == "Success" and len(record["final_message_preview"]) <= 201
    assert (run / "tasks/t0/stdout.log").stat().st_size == 10_000_001
    assert (run / "journal.jsonl").stat().st_size < 1_000_000
    home.pitboss("attach", run.name, "t0", check=0)


def test_ten_megabytes_in_one_event(home):
    script = """
        printf '{"type":"assistant","message":{"content":[{"type":"text","text":"'
        head -c 10000000 /dev/zero | tr '\\0' a
        printf '"}]}}\\n%s\\n' '""" + RESULT + "'"
    record, = deal(home, shell(script, format="claude"))
    assert (record["status"], record["final_message"]) == ("Success", "fine")


def test_bytes_that_are_not_utf8_stay_in_the_log(home):
    record, = deal(home, shell("printf 'good \\377\\376\\n'"))
    assert record["status"] == "Success" and record["final_message"].startswith("good ")
    assert (home.run_dir() / "tasks/t0/stdout.log").read_bytes() == b"good \xff\xfe\n"
    home.pitboss("attach", home.run_dir().name, "t0", check=0)


def test_a_last_line_without_its_end_counts(home):
    record, = deal(home, shell("printf 'one\\ntw'"))
    assert record["status"] == "Success" and record["final_message"].endswith("tw")


OUTPUTS = [      # what an agent of the format claude does, and how its record calls that
    ("exit 0", "Failed"),
    ("echo hello", "Failed"),
    (f"echo '{RESULT}'", "Success"),
    (f"echo '{RESULT}'; exit 3", "Failed"),
    (f"printf '%s' '{RESULT}'", "Success"),
    (f"echo '{RESULT[:40]}'; printf 'words\\n\\377\\n[1]\\nnull\\n3\\n'; echo '{RESULT}'", "Success"),
    (f"echo '{RESULT}'; echo trailing words", "Success"),
    ("echo '" + RESULT[:40] + "'", "Failed"),
    ("echo '" + RESULT.replace("false", "true") + "'", "Failed"),
    ('echo \'{"type":"result","is_error":false,"result":7,"usage":[],"total_cost_usd":"x"}\'', "Success"),
    (f"head -c 200000 /dev/zero | tr '\\0' '['; echo; echo '{RESULT}'", "Success"),
]


def test_only_a_good_result_is_a_success(home):
    deal(home, shell(*(script for script, _ in OUTPUTS), format="claude"), code=1)
    records = {record["task_id"]: record for record in read_records(home.run_dir())}
    for n, (script, status) in enumerate(OUTPUTS):
        record = records[f"t{n}"]
        assert record["status"] == status, (script, record)
        assert (record["failure_reason"] is None) == (status == "Success")
        assert set(record) == RECORD_KEYS


def test_what_stderr_said_last_is_the_reason(home):
    record, = deal(home, shell("seq 100000 >&2; echo the real reason >&2; exit 7"), code=1)
    reason = record["failure_reason"]
    assert (record["status"], record["exit_code"], reason["kind"]) == ("Failed", 7, "unknown")
    assert "the real reason" in reason["message"] and len(reason["message"]) < 10_000


def test_numbers_that_are_no_numbers_do_not_spoil_the_sums(home):
    good = RESULT.replace('"x"}', '"x","total_cost_usd":0.5}')
    bad = [RESULT.replace('"x"}', f'"x","total_cost_usd":{cost},"usage":{{"input_tokens":{tokens}}}}}')
           for cost, tokens in (("NaN", "NaN"), ("1e999", "1e999"), ("-5", "-5"), ("true", "true"))]
    deal(home, shell(*(f"echo '{line}'" for line in (good, *bad)), format="claude"))
    summary = json.loads((home.run_dir() / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["total_cost_usd"] == pytest.approx(0.5)


@needs_proc
@pytest.mark.slow
def test_an_agent_that_stays_after_its_result_is_stopped_and_succeeds(home):
    began = time.monotonic()
    record, = deal(home, demo("$ say the work is done\n$ linger"))
    assert (record["status"], record["final_message"]) == ("Success", "the work is done")
    assert 9 <= time.monotonic() - began <= 40 and agents_of(home) == {}


def peak_kb(process: subprocess.Popen) -> int:
    """The most memory that a process had, kB; its rusage would begin with that of the process that forked it."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *map(int, re.findall(r"VmHWM:\s+(\d+)", status))])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    return peak


@pytest.mark.slow
@needs_proc
def test_a_hundred_megabytes_are_read_in_bounded_memory(home):
    manifest = home.manifest(shell("yes 'a line of some length' | head -c 100000000"))
    done = home.start("dispatch", "-q", manifest)
    assert 10_000 < peak_kb(done) < 150_000 and done.returncode == 0
    assert (home.run_dir() / "tasks/t0/stdout.log").stat().st_size == 100_000_000
    assert read_records(home.run_dir())[0]["status"] == "Success"


@needs_proc
def test_an_agent_killed_from_outside_names_the_signal(home):
    process, run = start(home, shell("exec sleep 60"))
    pid, = wait_for(lambda: [pid for pid, line in agents_of(home).items() if line.startswith("sleep 60")])
    os.kill(pid, signal.SIGKILL)
    assert process.wait(30) == 1
    record, = read_records(run)
    assert (record["status"], record["exit_code"]) == ("Failed", None)
    assert "SIGKILL" in record["failure_reason"]["message"]


def test_an_agent_that_kills_itself_names_the_signal(home):
    record, = deal(home, demo("$ kill SEGV"), code=1)
    assert (record["status"], record["exit_code"]) == ("Failed", None)
    assert "SIGSEGV" in record["failure_reason"]["message"]


@needs_proc
def test_an_agent_that_stopped_itself_can_be_killed(home):
    process, run = start(home, shell("kill -STOP $$; echo never"))
    pid, = wait_for(lambda: [pid for pid in agents_of(home) if is_stopped(pid)])
    os.kill(pid, signal.SIGKILL)
    assert process.wait(30) == 1
    assert "SIGKILL" in read_records(run)[0]["failure_reason"]["message"]


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@needs_proc
@pytest.mark.slow
def test_an_agent_that_stopped_itself_times_out(home):
    record, = deal(home, shell("kill -STOP $$; echo never", task="timeout_secs = 1"), code=1)
    assert record["status"] == "TimedOut" and agents_of(home) == {}


def test_an_agent_without_its_folder_is_no_crash(home):
    (home.root / "gone").mkdir()
    text = shell("rmdir ../gone; echo x", "echo y", run="max_parallel = 1")
    records = deal(home, text.replace('directory = "."', 'directory = "gone"'), code=1)
    assert [record["status"] for record in records] == ["Success", "SpawnFailed"]
    assert "gone" in records[1]["failure_reason"]["message"]


# ---- secrets


def leaks(run: Path, value: str) -> list[str]:
    """The files of a run folder that hold `value`, logs of agents and the operator's manifest apart."""
    return [str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()
            and p.name not in ("stdout.log", "stderr.log", "manifest.snapshot.toml", "prompt.txt")
            and value.encode() in p.read_bytes()]


SECRET = "hunter2-0123456789"


@pytest.mark.parametrize("run, names", [
    ("", ["GITHUB_TOKEN", "SOME_API_KEY", "DB_PASSWORD"]),
    ('secret_env = ["MY_PLAIN", "OTHER_*"]', ["MY_PLAIN", "OTHER_ONE"])])
def test_a_secret_that_an_agent_says_stays_in_its_log(home, run, names):
    told = [f'echo "it is ${name} indeed"' for name in names]
    failed = [f'echo "reason ${name}" >&2; exit 1' for name in names]
    secrets = {name: f"{SECRET}-{name.lower()}" for name in names}
    done = home.pitboss("dispatch", home.manifest(shell(*told, *failed, run=run)), check=1, env=secrets)
    folder = home.run_dir()
    shown = [done.stdout, done.stderr]
    shown += [home.pitboss(*line.replace("RUN", folder.name).split(), check=0, env=secrets).stdout
              for line in ("status RUN", "status RUN --json", "list --json")]
    records = {record["task_id"]: record for record in read_records(folder)}
    for n, secret in enumerate(secrets.values()):
        assert secret in (folder / f"tasks/t{n}/stdout.log").read_text()
        assert leaks(folder, secret) == [] and not any(secret in text for text in shown)
        assert re.fullmatch(r"it is \S+ indeed\s*", records[f"t{n}"]["final_message"])


def test_a_secret_of_the_manifest_stays_in_the_manifest(home):
    deal(home, shell("echo $MY_API_KEY", task=f'env = {{ MY_API_KEY = "{SECRET}" }}'))
    assert leaks(home.run_dir(), SECRET) == []
    done = home.pitboss("dispatch", "--dry-run", home.root / "m.toml", check=0)
    assert SECRET not in done.stdout + done.stderr


def test_a_short_or_empty_value_is_not_masked_into_nonsense(home):
    record, = deal(home, shell("echo a plain sentence", run='secret_env = ["EMPTY"]'), env={"EMPTY": ""})
    assert record["final_message"].strip() == "a plain sentence"


# ---- the demonstration


def test_the_demonstration_needs_nothing_and_says_where_everything_is(home):
    began = time.monotonic()
    done = home.pitboss("demo", check=0, env={"PATH": "/usr/bin:/bin"})
    assert time.monotonic() - began < 10
    named = re.findall(r"/[^\s,:;()'\"]+", done.stdout + done.stderr)
    assert any(Path(name, "summary.json").exists() for name in named), named


# ---- where it must run


@needs_proc
def test_without_a_usable_home_the_place_is_named(home):
    env = {"HOME": "/proc/nowhere", "XDG_DATA_HOME": "", "XDG_RUNTIME_DIR": ""}
    manifest = home.manifest(demo("$ say x"))
    assert "OK" in home.pitboss("validate", manifest, check=0, env=env).stdout
    done = home.pitboss("dispatch", manifest, check=5, env=env)
    assert "/proc/nowhere" in done.stderr and "--run-dir" in done.stderr and "Traceback" not in done.stderr
    home.pitboss("dispatch", manifest, "--run-dir", home.root / "other", check=0, env=env)
    home.pitboss("list", check=0, env=env)


def test_nothing_is_written_beside_the_program(home):
    place = home.root / "program"
    place.mkdir()
    shutil.copy(PITBOSS, place / "pitboss.py")
    (place / "pitboss.py").chmod(0o444)
    place.chmod(0o555)
    manifest = home.manifest(demo("$ say x"))
    argv = [PYTHON, place / "pitboss.py", "dispatch", manifest]
    done = subprocess.run(argv, env=home.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in place.iterdir()] == ["pitboss.py"]


@pytest.mark.parametrize("flags, locale", [
    (["-I", "-S"], "C"), (["-I", "-S"], "C.UTF-8"), (["-OO"], "POSIX"), (["-X", "utf8=0"], "C"),
    (["-X", "utf8=0"], "xx_YY.nonsense"), (["-W", "error"], "C")])
def test_any_interpreter_and_locale_will_do(home, flags, locale):
    words = "naïve ✓ 日本"
    manifest = home.manifest(demo(f"$ say {words}"))
    env = {**home.env, "LC_ALL": locale, "LANG": locale}
    done = subprocess.run([PYTHON, *flags, PITBOSS, "dispatch", manifest], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert read_records(home.run_dir())[0]["final_message"] == words
    argv = [PYTHON, *flags, PITBOSS, "attach", home.run_dir().name, "t0"]
    shown = subprocess.run(argv, env=env, capture_output=True)
    assert shown.returncode == 0 and b"Traceback" not in shown.stderr


def python_for_others() -> str:
    """A Python of at least 3.11 that the user nobody may run; skips the test when there is none."""
    check = """exec "$0" -c 'import sys; sys.exit(sys.version_info < (3, 11))'"""
    for python in (PYTHON, "/usr/local/bin/python3", "/usr/bin/python3"):
        argv = [*AS_NOBODY, "sh", "-c", check, python]
        if shutil.which("setpriv") and subprocess.run(argv, capture_output=True).returncode == 0:
            return python
    pytest.skip("no setpriv, or no Python of at least 3.11 that nobody may run")


AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_can_use_it():
    python = python_for_others()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        home = Home(Path(name))
        home.repo("r")
        shutil.copy(PITBOSS, home.root / "pitboss.py")
        home.manifest(demo("$ write x y\n$ commit\n$ run id -u", defaults="").replace('"."', '"r"'))
        subprocess.run(["chown", "-R", "65534:65534", name], check=True)
        argv = [*AS_NOBODY, python, home.root / "pitboss.py", "dispatch", home.root / "m.toml"]
        done = subprocess.run(argv, env=home.env, cwd=home.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert home.run_dir().stat().st_uid == 65534
        assert read_records(home.run_dir())[0]["status"] == "Success"
