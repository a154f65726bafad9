"""A run that an agent of another run dispatches: it ends with that agent, unless it is to survive it."""
from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

import pitboss
from tools import Home, processes_with, read_events, read_records, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

SURVIVES = '[lifecycle]\nsurvive_parent = true\nnotify = { kind = "log" }\n'


def nest(home: Home, lifecycle: str, flags: str, then: str) -> tuple[Path, Path]:
    """(the manifest of an outer run whose agent dispatches an inner one, the gate that the inner one waits for)."""
    home.repo("repo", 1)
    gate, begun = home.root / "gate", home.root / "begun"
    script = f"$ run touch {begun}; while [ ! -e {gate} ]; do sleep 0.05; done\n$ say the inner one is done"
    inner = home.manifest(f"{lifecycle}[[task]]\nid = \"inner\"\ndirectory = \"repo\"\nagent = \"demo\"\n"
                          f"use_worktree = false\nprompt = '''\n{script}\n'''\n", "inner.toml")
    command = shlex.join(home.argv("dispatch", str(inner), *flags.split()))
    steps = "\n".join([f"$ run {command}", f"$ run until [ -e {begun} ]; do sleep 0.05; done", then])
    outer = home.manifest("[[task]]\nid = \"outer\"\ndirectory = \"repo\"\nagent = \"demo\"\nuse_worktree = false\n"
                          f"timeout_secs = 30\nprompt = '''\n{steps}\n'''\n", "outer.toml")
    return outer, gate


def runs_of(home: Home) -> dict[str, Path]:
    """The run folders by their manifest."""
    metas = {p.parent: json.loads(p.read_text()) for p in home.runs.glob("0*/meta.json")}
    return {Path(meta["manifest_path"]).stem: folder for folder, meta in metas.items()}


def record_of(run_dir: Path) -> dict:
    record, = read_records(run_dir)
    return record


def finished(run_dir: Path) -> bool:
    return (run_dir / "summary.json").exists()


def test_a_run_in_the_background_ends_with_the_agent_that_dispatched_it(home):
    outer, _ = nest(home, "", "--background", "$ say I leave")
    home.pitboss("dispatch", outer, check=0)
    runs = runs_of(home)
    wait_for(lambda: finished(runs["inner"]), 30, "the end of the inner run")
    # all of its processes are told to end at once: an inner agent may have gone before its dispatcher gave up
    assert record_of(runs["inner"])["status"] in ("Cancelled", "Failed")
    assert record_of(runs["outer"])["status"] == "Success"
    wait_for(lambda: not processes_with(f"PITBOSS_RUN_ID={runs['outer'].name}"), 30, "the end of its processes")


def test_one_that_survives_its_parent_goes_on_and_knows_it(home):
    outer, gate = nest(home, SURVIVES, "--background", "$ say I leave")
    home.pitboss("dispatch", outer, check=0)
    runs = runs_of(home)
    assert record_of(runs["outer"])["status"] == "Success" and not finished(runs["inner"])
    gate.touch()
    wait_for(lambda: finished(runs["inner"]), 30, "the end of the inner run")
    record = record_of(runs["inner"])
    assert (record["status"], record["hands"], record["final_message"]) == ("Success", 1, "the inner one is done")
    assert json.loads((runs["inner"] / "meta.json").read_text())["parent_run_id"] == runs["outer"].name
    notices = runs["inner"] / "notifications.jsonl"
    wait_for(lambda: notices.read_text().count("\n") == 2, 30, "the last notification")
    told = [json.loads(line)["event"] for line in notices.read_text().splitlines()]
    assert [e["kind"] for e in told] == ["run_dispatched", "run_finished"]
    assert (told[0]["survive_parent"], told[0]["parent_run_id"]) == (True, runs["outer"].name)


@pytest.mark.parametrize("lifecycle, status", [("", "Cancelled"), (SURVIVES, "Success")])
def test_an_agent_that_is_cancelled_while_it_waits_for_a_run(home, lifecycle, status):
    outer, gate = nest(home, lifecycle, "", "$ say it came back")
    dispatcher = home.start("dispatch", outer)
    wait_for(lambda: (home.root / "begun").exists(), 30, "the inner agent")
    runs = runs_of(home)
    home.pitboss("cancel", runs["outer"].name, check=0)
    assert dispatcher.wait(30) == 1 and record_of(runs["outer"])["status"] == "Cancelled"
    gate.touch()
    wait_for(lambda: finished(runs["inner"]), 30, "the end of the inner run")
    assert record_of(runs["inner"])["status"] == status


def test_a_run_that_may_survive_is_waited_for_as_any_other(home):
    outer, gate = nest(home, SURVIVES, "-q", "$ say it came back")
    gate.touch()
    home.pitboss("dispatch", outer, check=0)
    runs = runs_of(home)
    log = (runs["outer"] / "tasks/outer/stdout.log").read_text()
    assert str(runs["inner"]) in log and finished(runs["inner"])
    assert record_of(runs["inner"])["status"] == record_of(runs["outer"])["status"] == "Success"


def test_a_run_that_survived_is_cancelled_as_any_other(home):
    outer, _ = nest(home, SURVIVES, "--background", "$ say I leave")
    home.pitboss("dispatch", outer, check=0)
    inner = runs_of(home)["inner"]
    home.pitboss("cancel", inner.name, check=0)
    assert record_of(inner)["status"] == "Cancelled"
    wait_for(lambda: not processes_with(f"PITBOSS_RUN_ID={inner.name}"), 30, "the end of its agent")


def test_the_first_term_drains_a_run_that_has_left(home):
    outer, gate = nest(home, SURVIVES, "--background", "$ say I leave")
    home.pitboss("dispatch", outer, check=0)
    inner = runs_of(home)["inner"]
    os.kill(json.loads((inner / "lock").read_text())["pid"], signal.SIGTERM)
    wait_for(lambda: any(e["kind"] == "drained" for e in read_events(inner)), 30, "the drain")
    gate.touch()
    wait_for(lambda: finished(inner), 30, "its end")
    assert record_of(inner)["status"] == "Success"


@pytest.mark.parametrize("lineage, own, free", [
    ("", "r:a:1/", False), ("r:a:1", "r:a:1/", False), ("free", "r:a:1/", True), ("free/i:b:1", "r:a:1/", True),
    ("free/i:b:1", "i:b:1/", False), ("free/i:b:1/j:c:1", "i:b:1/", False), ("free/i:b:10", "i:b:1/", True),
    ("free/i:b:1", "i:", False), ("free/i:b:1", "j:", True), ("freedom:a:1", "r:a:1/", False)])
def test_who_has_left_a_hand(lineage, own, free):
    assert pitboss.is_free(lineage, own) is free
