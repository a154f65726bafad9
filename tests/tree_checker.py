"""An independent verdict on a run with a lead: reads its folder, its agents' logs and its journal as files.

It imports nothing of pitboss. What the agents were told is read from what they printed, what the run did from
the journal's lines, and the two must agree: every call was answered, and what it asked for happened once.
Each `check_…` returns what is wrong as a list of sentences; an empty list is a pass.
"""
from __future__ import annotations

import json
import math
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import linear
from checker import check_run
from linear import Op
from tools import read_events, read_records

PREFIX = "mcp__pitboss__"
STAMP_S = 0.001         # agents' time stamps are in milliseconds
PENNY = 1e-9            # USD; costs are sums of floats


class Call(NamedTuple):
    """One call of a tool, as its agent printed it; `result` is None until it is answered."""
    tool: str
    given: dict
    result: dict | None
    words: str             # of the answer, also where that is a refusal
    at: float              # when the answer was there; infinity without one


def unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def log_events(run_dir: Path, actor: str) -> list[dict]:
    """Every whole line of an actor's log."""
    path = run_dir / "tasks" / actor / "stdout.log"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def blocks(event: dict, kind: str, part: str) -> list[dict]:
    """The blocks of one kind in an event of a log."""
    content = event.get("message", {}).get("content", ()) if event["type"] == kind else ()
    return [b for b in content if isinstance(b, dict) and b["type"] == part]


def calls_of(run_dir: Path, actor: str) -> list[Call]:
    """What an actor asked for, in order: the scripted agent makes one call at a time."""
    calls: list[Call] = []
    open_at = None
    for event in log_events(run_dir, actor):
        for block in blocks(event, "assistant", "tool_use"):
            open_at = None
            if block["name"].startswith(PREFIX):
                open_at = len(calls)
                calls.append(Call(block["name"][len(PREFIX):], block["input"], None, "", math.inf))
        for block in blocks(event, "user", "tool_result"):
            if open_at is not None:
                words, at = block["content"], unix(event["timestamp"]) + STAMP_S
                result = None if block["is_error"] else json.loads(words)
                calls[open_at] = calls[open_at]._replace(result=result, words=words, at=at)
    return calls


def actors_of(run_dir: Path) -> list[str]:
    """Every actor that the journal knows, in the order in which they came."""
    return [e["actor"] for e in read_events(run_dir) if e["kind"] == "actor_added"]


def check_tree(run_dir: Path, repo: Path, promises: list, trail: Path | None, prompts: list[str],
               stored: dict, once: bool = True) -> list[str]:
    """Everything that must hold of a finished run with a lead whose actors all succeeded.

    `prompts` are those that the lead's script spawns workers with, `stored` is path to (value, version) at
    the end. `once` is for agents and bridges that nobody killed.
    """
    return check_run(run_dir, repo, promises, trail, once) + check_calls(run_dir, prompts, stored, once)


def check_calls(run_dir: Path, prompts: list[str], stored: dict, once: bool = True) -> list[str]:
    """What was asked for happened once, and everybody was told so."""
    actors = actors_of(run_dir)
    return [
        *(fault for actor in actors for fault in check_answers(run_dir, actor) if once),
        *check_spawns(run_dir, actors[0], prompts),
        *check_keys(run_dir),
        *check_money(run_dir),
        *check_stored(run_dir, actors[0], stored),
        *check_history(run_dir),
    ]


def check_answers(run_dir: Path, actor: str) -> list[str]:
    """Every call of an actor was answered, and none was refused."""
    return [f"{actor}: {call.tool} {call.given} was answered {call.words or 'never'!r}"
            for call in calls_of(run_dir, actor) if call.result is None]


def check_spawns(run_dir: Path, lead: str, prompts: list[str]) -> list[str]:
    """One worker for each spawn of the script: in the journal, on disk, and as the lead was told."""
    added = [e["actor"] for e in read_events(run_dir) if e["kind"] == "actor_added" and e["role"] == "worker"]
    told = [c.result["task_id"] for c in calls_of(run_dir, lead) if c.tool == "spawn_worker" and c.result]
    folders = [p.name for p in (run_dir / "tasks").iterdir() if p.name != lead]
    asked = Counter(first_prompt(run_dir, actor) for actor in added)
    faults = [f"{n} workers were asked: {prompt!r}" for prompt, n in asked.items() if n != 1]
    faults += [f"no worker was asked: {prompt!r}" for prompt in prompts if prompt not in asked]
    faults += [f"a worker was asked what no script says: {prompt!r}" for prompt in asked
               if prompt not in prompts]
    if sorted(told) != sorted(added) or sorted(folders) != sorted(added):
        faults.append(f"spawned: the journal has {added}, the lead was told {told}, there are {folders}")
    return faults


def first_prompt(run_dir: Path, actor: str) -> str:
    """What an actor heard first, from the echo in its log."""
    echo = next((e for e in log_events(run_dir, actor) if e["type"] == "user" and e.get("isReplay")), None)
    return echo["message"]["content"].strip() if echo else f"({actor} heard nothing)"


def check_keys(run_dir: Path) -> list[str]:
    """No call changed anything twice: its key stands once with each kind of event, and once with a change."""
    keys = Counter((e["kind"], e["call"]) for e in read_events(run_dir) if "call" in e)
    return [f"journal.jsonl: {n} {kind} of the call {call}" for (kind, call), n in keys.items() if n > 1]


def check_money(run_dir: Path) -> list[str]:
    """What the agents said they cost is what the records say, in sum what the run and its budget say."""
    faults, costs = [], {r["task_id"]: r["cost_usd"] or 0.0 for r in read_records(run_dir)}
    ends = [e for e in read_events(run_dir) if e["kind"] == "hand_ended"]
    for actor, cost in costs.items():
        booked = {e["hand"]: e["cost_usd"] for e in ends if e["actor"] == actor}
        faults += [f"{actor}: its hand {hand} said {told} USD, {booked.get(hand)} were booked"
                   for hand, told in told_costs(run_dir, actor).items()
                   if abs(told - booked.get(hand, math.inf)) > PENNY]
        if abs(sum(booked.values()) - cost) > PENNY:
            faults.append(f"{actor}: {booked} USD were booked, its record says {cost}")
    total = json.loads((run_dir / "summary.json").read_bytes())["total_cost_usd"] or 0.0
    if abs(total - sum(costs.values())) > PENNY:
        faults.append(f"summary.json: {total} USD in total, the records say {sum(costs.values())}")
    return faults + check_books(run_dir, costs)


def told_costs(run_dir: Path, actor: str) -> dict[int, float]:
    """What each hand with a result said that it cost; one that was killed said nothing."""
    ends = sorted((e["log_at"], e["hand"]) for e in read_events(run_dir)
                  if e["kind"] == "hand_ended" and e["actor"] == actor)
    results, at, path = {}, 0, run_dir / "tasks" / actor / "stdout.log"
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        at += len(line)
        event = json.loads(line)
        if event["type"] == "result":
            results[next((hand for end, hand in ends if at <= end), 0)] = event["total_cost_usd"]
    return results


def check_books(run_dir: Path, costs: dict[str, float]) -> list[str]:
    """A budget_status after the last worker: its cost is spent to the cent, and nothing is reserved."""
    events = read_events(run_dir)
    lead = actors_of(run_dir)[0]
    settled = max((e["at"] for e in events if e["kind"] == "hand_ended" and e["actor"] != lead), default=0.0)
    faults = []
    for call in calls_of(run_dir, lead):
        if call.tool != "budget_status" or not call.result or call.at < settled:
            continue
        own: dict[int, float] = {}       # by hand: what it has cost so far
        for event in events:
            if event["kind"] in ("usage", "hand_ended") and event["actor"] == lead and event["at"] <= call.at:
                own[event["hand"]] = event["cost_usd"]
        want = sum(cost for actor, cost in costs.items() if actor != lead) + sum(own.values())
        got = call.result
        if abs(got["spent_usd"] - want) > PENNY or got["reserved_usd"] or got["workers_live"]:
            faults.append(f"budget_status: {got}, but {want} USD were spent and no worker lives")
    return faults


def replay_store(run_dir: Path) -> tuple[dict, list[str]]:
    """The store that the journal's lines make, (layer, path) to (value, version), and what is wrong there."""
    store, last, faults = {}, Counter(), []
    for event in read_events(run_dir):
        if event["kind"] not in ("kv_written", "kv_deleted"):
            continue
        where = event["layer"], event["path"]
        if event["kind"] == "kv_deleted":
            if store.pop(where, None) is None:
                faults.append(f"journal.jsonl: seq {event['seq']} deletes {where}, which is not there")
            continue
        if event["version"] != last[where] + 1:
            faults.append(f"journal.jsonl: version {event['version']} of {where} follows {last[where]}")
        last[where] = event["version"]
        store[where] = event["value"], event["version"]
    return store, faults


def check_stored(run_dir: Path, lead: str, stored: dict) -> list[str]:
    """The store at the end is what the scripts make of it, in the journal and in shared-store.json."""
    store, faults = replay_store(run_dir)
    want = {(lead, path): row for path, row in stored.items()}
    faults += [f"{where}: the journal makes {store.get(where)}, the scripts {want.get(where)}"
               for where in store.keys() | want.keys() if not same(store.get(where), want.get(where))]
    layers = json.loads((run_dir / "shared-store.json").read_bytes())["layers"]
    dumped = {(layer, path): (row["value"], row["version"])
              for layer, entries in layers.items() for path, row in entries.items()}
    faults += [f"shared-store.json: {dumped}, the journal makes {store}"] if dumped != store else []
    return faults


def same(have: tuple | None, want: tuple | None) -> bool:
    """Whether a value and its version are those that were wanted; a wanted value of None is any."""
    return have == want or bool(have and want) and want[0] is None and have[1] == want[1]


def check_history(run_dir: Path) -> list[str]:
    """What all actors were told of the store and of leases fits one order of events."""
    history = [op for actor in actors_of(run_dir) for op in history_of(run_dir, actor)]
    ends = [Op(e["actor"], "gone", (), {}, {}, e["at"], e["at"])
            for e in read_events(run_dir) if e["kind"] == "hand_ended"]
    told = all(op.result is not None for op in history)
    return linear.check_store(history) + linear.check_leases(history + ends, told)


def history_of(run_dir: Path, actor: str) -> list[Op]:
    """An actor's calls as operations; each began after the answer of the one before, more is not known."""
    ops, begun, lead, names = [], 0.0, actors_of(run_dir)[0], {}
    for call in calls_of(run_dir, actor):
        given, result = call.given, call.result
        name = call.tool.removeprefix("kv_").removeprefix("lease_")
        if call.tool.startswith("kv_") and name in ("get", "set", "cas", "delete"):
            path = given["path"].replace("/peer/self/", f"/peer/{actor}/")
            value = {"value": given["new_value"]} if name == "cas" else {}
            ops.append(Op(actor, name, (lead, path), {**given, **value}, result, begun, call.at))
        elif call.tool == "lease_acquire":
            if result and result["acquired"]:
                result = {**result, "expires_at": unix(result["expires_at"])}
                names[result["lease_id"]] = given["name"]
            ops.append(Op(actor, name, (lead, given["name"]), given, result, begun, call.at))
        elif call.tool == "lease_release":
            ops.append(Op(actor, name, (lead, names.get(given["lease_id"])), given, result, begun, call.at))
        begun = call.at if call.at < math.inf else begun
    return ops


def carried_over(run_dir: Path) -> Counter:
    """Calls that one dispatcher carried out and another one answered, by what they did."""
    events, found = read_events(run_dir), Counter()
    takeovers = [e for e in events if e["kind"] == "dispatcher_started"][1:]
    answered: dict[tuple, float] = {}
    for actor in actors_of(run_dir):
        for number, call in enumerate(calls_of(run_dir, actor)):
            answered[actor, number + 2] = call.at        # request 1 of a connection is its initialize
    for event in events:
        if "call" in event:
            actor, _, number = event["call"].split("/")
            at = answered.get((actor, int(number)), math.inf)
            if any(event["seq"] < e["seq"] and e["at"] <= at < math.inf for e in takeovers):
                found[what_of(event)] += 1
    return found


def what_of(event: dict) -> str:
    """What a call did, by its event."""
    kinds = {"actor_added": "spawn", "kv_written": "cas" if event.get("cas") else "set"}
    return kinds.get(event["kind"], event["kind"])
