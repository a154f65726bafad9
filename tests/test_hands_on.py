"""A tree of twenty agents in an operator's hands, through the verbs: rest, go on, be told something, be ended.

The verdict comes from /proc, the agents' logs and the records.
"""
from __future__ import annotations

import json
import signal
import sys
import time

import pytest

from stage import DEADLINE_S, gate
from test_claude import LONG_S, check_nothing_lives, prompt, real, said_by_user, say, wait_for_file
from test_claude_lead import Tree as ClaudeTree
from test_claude_lead import asked, spawn, spawned, states_of, tree, wait  # noqa: F401 (a fixture)
from test_lead import states_of as states_in
from test_subleads import Tree
from tools import Home, processes_with, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

AT_WORK = "$ say begun\n$ run sleep 600"


@pytest.fixture
def grove(home):
    """A run whose lead may spawn sub-leads; what it leaves is ended."""
    run = Tree(home, lead="allow_subleads = true\n", workers=16, script=AT_WORK)
    yield run
    run.end()


def at_once(home: Home, lines: list[list], code: int = 0) -> list[dict]:
    """Run command lines side by side, each with that exit code; what each printed."""
    running = [home.start(*line, "--json") for line in lines]
    said = []
    for line, one in zip(lines, running):
        out, err = one.communicate(timeout=120)
        assert one.returncode == code, (line, out, err)
        said.append(json.loads(out))
    return said


def letters(run: Tree, name: str) -> set[str]:
    """How the processes of an actor stand, as /proc says."""
    return set(states_in(f"{run.run.name}:{name}:").values())


def grow(run: Tree) -> dict[str, list[str]]:
    """Three sub-leads with four workers each, and four of the root's own; all are at work."""
    lead, below = run.lead(), {}
    run.running(lead, "boss")
    for _ in range(3):
        name, sub = run.sublead(lead, AT_WORK, budget_usd=10, max_workers=4)
        below[name] = [sub.call("spawn_worker", prompt=AT_WORK)["task_id"] for _ in range(4)]
    below["boss"] = [lead.call("spawn_worker", prompt=AT_WORK)["task_id"] for _ in range(4)]
    for name in sum(below.values(), []):
        run.running(lead, name)
    return below


@pytest.mark.slow
def test_twenty_agents_rest_go_on_are_told_and_ended(grove, home):
    run, name = grove, grove.run.name
    below = grow(run)
    everybody = list(dict.fromkeys([*below, *sum(below.values(), [])]))
    assert len(everybody) == 20
    shims = {actor: min(processes_with(f"{name}:{actor}:")) for actor in everybody}

    assert all(answer["ok"] for answer in at_once(home, [["pause", name, a, "--freeze"] for a in everybody]))
    assert all(letters(run, actor) == {"T"} for actor in everybody)
    at_once(home, [["continue", name, a] for a in everybody])
    assert all("T" not in letters(run, actor) for actor in everybody)
    assert {a: min(processes_with(f"{name}:{a}:")) for a in everybody} == shims, "nobody was dealt again"

    at_once(home, [["pause", name, a] for a in everybody])
    assert processes_with(f"{name}:") == {}, "a paused one has no process"
    at_once(home, [["continue", name, a] for a in everybody])
    wait_for(lambda: len(run.events("hand_started")) == 40, DEADLINE_S, "twenty second hands")
    assert all(letters(run, actor) - {"T"} for actor in everybody)

    told, rest = below["boss"][:2] + below["sublead-1"][:2], below["sublead-2"][:2]
    at_once(home, [["pause", name, a] for a in rest])
    by_input = at_once(home, [["reprompt", name, a, f"$ say told {a}\n$ run sleep 600"] for a in told])
    by_hand = at_once(home, [["reprompt", name, a, f"$ say told {a}\n$ run sleep 600"] for a in rest])
    assert [a["delivery"] for a in by_input] == ["input"] * 4 and [a["delivery"] for a in by_hand] == ["resume"] * 2
    for actor in told + rest:
        wait_for(lambda a=actor: f"told {a}".encode() in (run.run / f"tasks/{a}/stdout.log").read_bytes(), DEADLINE_S, actor)

    wrong = below["sublead-1"][3]
    at_once(home, [["cancel", name, wrong, "--reason", "not that file"]])
    assert processes_with(f"{name}:{wrong}:") == {}
    at_once(home, [["cancel", name, "sublead-3", "--reason", "no use"]])
    assert processes_with(f"{name}:sublead-3:") == {}
    wait_for(lambda: not [a for a in below["sublead-3"] if processes_with(f"{name}:{a}:")], DEADLINE_S, "its workers' end")
    leads = {"sublead-1": f"[SYSTEM] {wrong} was cancelled: not that file", "boss": "[SYSTEM] sublead-3 was cancelled: no use"}
    at_once(home, [["pause", name, a] for a in leads])         # they hang in a command: their next hand is told
    at_once(home, [["continue", name, a] for a in leads])
    for actor, words in leads.items():
        wait_for(lambda a=actor, w=words: any(w in text for text in run.heard(a)), DEADLINE_S, f"what {actor} is told")

    at_once(home, [["cancel", name, "--reason", "enough"]])
    assert processes_with(f"PITBOSS_RUN_ID={name}") == {}
    records = run.settle(1)
    assert set(records) == set(everybody) and {r["status"] for r in records.values()} == {"Cancelled"}
    reasons = {a: r["failure_reason"]["message"].partition(";")[0] for a, r in records.items()}
    assert reasons == {**dict.fromkeys(everybody, "enough"), wrong: "not that file", "sublead-3": "no use",
                       **dict.fromkeys(below["sublead-3"], "the lead ended")}
    assert {a: r["pause_count"] for a, r in records.items()} == {**dict.fromkeys(everybody, 2), **dict.fromkeys((*rest, *leads), 3)}
    assert {a for a, r in records.items() if r["reprompt_count"]} == {*told, *rest}
    assert {a: r["hands"] for a, r in records.items()} == {**dict.fromkeys(everybody, 2), **dict.fromkeys((*rest, *leads), 3)}
    assert run.summary()["was_interrupted"] is True


@pytest.mark.slow
def test_who_rests_goes_on_after_the_dispatchers_death_and_that_time_does_not_count(grove, home):
    """Their time is up long before they go on; what they lived is far less."""
    run, name = grove, grove.run.name
    lead = run.lead()
    run.running(lead, "boss")
    frozen, paused = (run.spawn(lead, gate(home.root / "g") + "\n$ say end", timeout_secs=5) for _ in range(2))
    at_once(home, [["pause", name, frozen, "--freeze"], ["pause", name, paused]])
    rested = time.monotonic()
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    assert letters(run, frozen) == {"T"}
    (run.run / "sockets.json").unlink()
    run.process = home.start("resume", name, stdout=run.log, stderr=run.log)
    run._find_run()
    wait_for(lambda: time.monotonic() - rested > 7, 20, "their time to be over")
    assert letters(run, frozen) == {"T"} and processes_with(f"{name}:{paused}:") == {}
    shown = {a["task_id"]: a["state"] for a in json.loads(home.pitboss("status", name, "--json", check=0).stdout)["actors"]}
    assert (shown[frozen], shown[paused]) == ("Frozen", "Paused")
    (home.root / "g").touch()
    at_once(home, [["continue", name, frozen], ["continue", name, paused]])
    wait_for(lambda: len(run.events("closed")) == 2, DEADLINE_S, "both")
    at_once(home, [["cancel", name]])
    records = run.settle(1)
    assert {records[a]["status"] for a in (frozen, paused)} == {"Success"}
    assert {records[a]["final_message"] for a in (frozen, paused)} == {"end"}
    assert records[frozen]["hands"] == 1 and records[paused]["hands"] == 2
    assert all(records[a]["duration_ms"] > 7000 for a in (frozen, paused))


@real
@pytest.mark.slow
def test_the_real_claude_in_an_operators_hands(tree: ClaudeTree):  # noqa: F811
    """Through the verbs: freeze, continue, redirect, and cancel with a reason that its lead is told."""
    home = tree.home
    text = prompt(spawn(tree.hang("one"), say("never"), words="Remember the word PLUM."),
                  spawn(tree.hang("two"), say("never")), wait("$1.task_id"), wait("$2.task_id"), say("done"))
    process, run = tree.start(text)
    for name in ("one", "two"):
        wait_for_file(process, tree.begun(name))
    wait_for(lambda: asked(run, "wait_for_worker"), 60, "the lead's wait")
    one, two = spawned(run)
    home.pitboss("pause", run.name, one, "--freeze", check=0)
    wait_for(lambda: states_of(run, one) == {"T"}, DEADLINE_S, "all to stand still")
    assert "T" not in states_of(run, two)
    assert "Frozen" in home.pitboss("reprompt", run.name, one, "x", check=4).stderr
    home.pitboss("continue", run.name, one, check=0)
    assert "T" not in states_of(run, one)
    said = home.pitboss("reprompt", run.name, one, prompt(say("redirected")), "--json", check=0)
    assert json.loads(said.stdout)["delivery"] == "input"
    home.pitboss("cancel", run.name, two, "--reason", "the WRONG branch", check=0)
    assert process.wait(LONG_S) == 1, "a worker was cancelled"
    assert run.record(one)["final_message"] == "redirected" and run.record(one)["hands"] == 1
    assert (run.record(one)["pause_count"], run.record(one)["reprompt_count"]) == (1, 1)
    assert "PLUM" in said_by_user(tree.requests(run, one)[-1])
    assert run.record(two)["status"] == "Cancelled"
    assert run.record(two)["failure_reason"]["message"].startswith("the WRONG branch")
    assert f"[SYSTEM] {two} was cancelled: the WRONG branch" in json.dumps(tree.requests(run, "boss")[-1])
    check_nothing_lives(run)
