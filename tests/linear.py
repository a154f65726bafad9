"""Verdicts on what clients of a store and of leases were told; imports nothing of pitboss.

A history is a list of `Op`: what one call was given, what it was answered, and when it began and ended. Each
`check_…` returns what is wrong as a list of sentences; an empty list is a pass. `Naive` is the same store and
the same leases once more, written for plainness: lists that are searched from end to end.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple


class Op(NamedTuple):
    """One call: `what` is (layer, path) or (scope, name); an answer that never came is None.

    A call without an answer has an end where it is known that it had its effect by then, or never.
    """
    client: str
    call: str                  # get set cas delete; acquire release gone
    what: tuple
    given: dict
    result: dict | None
    begun: float
    ended: float = math.inf


# ------------------------------------------------------------------ store

class Register(NamedTuple):
    """One path: the version that stands (0: none), its value, the last version ever given."""
    version: int = 0
    value: Any = None
    last: int = 0


def after(op: Op, now: Register) -> Register | None:
    """The register after an operation at one moment; None when its answer cannot have been given then."""
    answer = op.result
    if op.call == "get":
        entry = answer and answer["entry"]
        seen = (entry["version"], entry["value"]) if entry else (0, None)
        return now if answer is None or seen == (now.version, now.value) else None
    if op.call == "delete":
        told = answer is None or answer["existed"] == bool(now.version)
        return Register(0, None, now.last) if told else None
    swaps = op.call == "set" or op.given["expected_version"] == now.version
    if op.call == "cas" and answer is not None and answer["swapped"] != swaps:
        return None
    new = Register(now.last + 1, op.given["value"], now.last + 1) if swaps else now
    return new if answer is None or answer["version"] == new.version else None


def linearizes(ops: list[Op]) -> bool:
    """Whether one order of the calls on one path explains every answer.

    Each call takes effect at one moment between its begin and its end; one without an answer may have had
    none. (Wing and Gong's search, with what was seen already left out.)
    """
    ops = sorted(ops, key=lambda op: op.begun)
    must = sum(op.result is not None for op in ops)
    todo, seen = [(0, frozenset(), 0, -math.inf, Register())], set()
    while todo:
        first, ahead, done, since, now = todo.pop()       # `since`: when the last one of those done began
        while first < len(ops) and (first in ahead or ops[first].ended < since):
            ahead, first = ahead - {first}, first + 1     # `ahead`: done ones from `first` on
        if done == must:
            return True
        if (first, ahead, now) in seen:
            continue
        seen.add((first, ahead, now))
        for n in may_be_next(ops, first, ahead, since):
            new, told = after(ops[n], now), ops[n].result is not None
            if new is not None and (told or new != now):  # without answer and effect: as if never asked
                todo.append((first, ahead | {n}, done + told, max(since, ops[n].begun), new))
    return False


def may_be_next(ops: list[Op], first: int, ahead: frozenset, since: float) -> list[int]:
    """The calls that are not done and that began before any such call with an answer ended.

    One without an answer that ended before `since` is over.
    """
    horizon, found = math.inf, []
    for n in range(first, len(ops)):
        if ops[n].begun > horizon:
            break
        if n not in ahead and ops[n].ended >= since:
            found.append(n)
            if ops[n].result is not None:
                horizon = min(horizon, ops[n].ended)
    return found


def by_what(history: list[Op], *calls: str) -> dict[tuple, list[Op]]:
    groups: dict[tuple, list[Op]] = {}
    for op in history:
        if op.call in calls:
            groups.setdefault(op.what, []).append(op)
    return groups


def check_store(history: list[Op]) -> list[str]:
    """Every path behaves as one register that is read and written at single moments."""
    return [f"{what}: no order of its {len(ops)} calls explains their answers"
            for what, ops in by_what(history, "get", "set", "cas", "delete").items() if not linearizes(ops)]


# ------------------------------------------------------------------ leases

class Hold(NamedTuple):
    """What one acquisition told its client: it held the lease for sure from `start` to `end`."""
    client: str
    lease_id: str
    version: int
    begun: float
    start: float
    end: float


def holds_of(ops: list[Op], gone: dict[str, list[float]]) -> list[Hold]:
    """The acquisitions of one name, renewals joined to what they renew, by version.

    `gone` are the moments at which a client's hand ended.
    """
    holds: dict[str, Hold] = {}
    for op in sorted(ops, key=lambda op: op.ended):
        if op.call == "acquire" and op.result and op.result["acquired"]:
            got = op.result
            old = holds.get(got["lease_id"])
            if old is None:
                old = Hold(op.client, got["lease_id"], got["version"], op.begun, op.ended, 0.0)
            holds[old.lease_id] = old._replace(end=float(got["expires_at"]))
    for lease_id, hold in holds.items():
        ends = [op.begun for op in ops if op.call == "release" and op.given["lease_id"] == lease_id]
        ends += [at for at in gone.get(hold.client, ()) if at >= hold.start]
        holds[lease_id] = hold._replace(end=min([hold.end, *ends]))
    return sorted(holds.values(), key=lambda hold: (hold.version, hold.start))


def check_leases(history: list[Op], all_told: bool = True) -> list[str]:
    """No two clients hold one name at once, and versions fence: each acquisition has the next one.

    With `all_told` no version is missing but those of acquisitions whose answer was lost. Such a call must not
    have made a hold end sooner: of that nothing is known here.
    """
    gone: dict[str, list[float]] = {}
    for op in history:
        if op.call == "gone":
            gone.setdefault(op.client, []).append(op.begun)
    wrong = []
    for what, ops in by_what(history, "acquire", "release").items():
        holds = holds_of(ops, gone)
        versions = [hold.version for hold in holds]
        lost = sum(op.call == "acquire" and op.result is None for op in ops)
        if all_told and not len(holds) <= max(versions, default=0) <= len(holds) + lost:
            wrong.append(f"{what}: its acquisitions have the versions {versions}")
        if len(set(versions)) != len(versions):
            wrong.append(f"{what}: a version was given twice: {versions}")
        wrong += [f"{what}: {b} came later than {a}, which ended before it began"
                  for a, b in zip(holds[1:], holds) if a.start < b.begun]
        by_time = sorted((hold for hold in holds if hold.end > hold.start), key=lambda hold: hold.start)
        wrong += [f"{what}: held twice at once: {a} and {b}" for a, b in zip(by_time, by_time[1:])
                  if b.start < a.end]
    return wrong


# ------------------------------------------------------------------ the same once more, plainly

class Naive:
    """One store a layer and leases by scope, as lists; moments are numbers, also in answers."""

    def __init__(self) -> None:
        self.values: list[dict] = []        # of all layers
        self.versions: list[tuple] = []     # (layer, path) once for each version ever given
        self.leases: list[dict] = []        # held ones
        self.acquired: list[tuple] = []     # (scope, name) once for each acquisition
        self.queue: list[dict] = []         # all that wait, first come first
        self.told: dict[str, dict] = {}     # answers to calls that waited

    def find(self, layer: str, path: str) -> dict | None:
        return next((v for v in self.values if (v["layer"], v["path"]) == (layer, path)), None)

    def get(self, layer: str, path: str) -> dict:
        value = self.find(layer, path)
        return {"entry": value and {k: v for k, v in value.items() if k != "layer"}}

    def set(self, layer: str, path: str, value: Any, by: str, now: float) -> dict:
        old = self.find(layer, path)
        if old:
            self.values.remove(old)
        self.versions.append((layer, path))
        version = self.versions.count((layer, path))
        self.values.append({"layer": layer, "path": path, "value": value, "version": version,
                            "written_by": by, "written_at": now})
        return {"version": version}

    def cas(self, layer: str, path: str, expected: int, value: Any, by: str, now: float) -> dict:
        old = self.find(layer, path)
        if (old["version"] if old else 0) != expected:
            return {"version": old["version"] if old else 0, "swapped": False}
        return {**self.set(layer, path, value, by, now), "swapped": True}

    def delete(self, layer: str, path: str) -> dict:
        old = self.find(layer, path)
        if old:
            self.values.remove(old)
        return {"existed": old is not None}

    def holder(self, scope: str, name: str) -> dict | None:
        return next((x for x in self.leases if (x["scope"], x["name"]) == (scope, name)), None)

    def acquire(self, scope: str, name: str, by: str, ttl: float, wait: float, lease_id: str, call: str,
                now: float) -> dict | None:
        """The answer; None when the call waits, and `told` has it later."""
        self.pass_time(now)
        lease = self.holder(scope, name)
        if lease and lease["by"] == by:
            lease["until"] = now + ttl
            return self.answer(lease)
        if lease is None:
            return self.answer(self.grant(scope, name, by, ttl, lease_id, now))
        if not wait:
            return self.refusal(lease)
        self.queue.append({"scope": scope, "name": name, "by": by, "ttl": ttl, "until": now + wait,
                           "lease_id": lease_id, "call": call})
        return None

    def grant(self, scope: str, name: str, by: str, ttl: float, lease_id: str, now: float) -> dict:
        self.acquired.append((scope, name))
        lease = {"scope": scope, "name": name, "by": by, "id": lease_id, "since": now, "until": now + ttl,
                 "version": self.acquired.count((scope, name))}
        self.leases.append(lease)
        return lease

    def answer(self, lease: dict) -> dict:
        return {"acquired": True, "lease_id": lease["id"], "version": lease["version"], "holder": lease["by"],
                "acquired_at": lease["since"], "expires_at": lease["until"]}

    def refusal(self, lease: dict | None) -> dict:
        return {"acquired": False, "holder": lease and lease["by"], "expires_at": lease and lease["until"]}

    def end(self, lease: dict, now: float) -> None:
        """A lease is free: the first that waits for it has it, and all its calls for it are answered."""
        self.leases.remove(lease)
        mine = [w for w in self.queue if (w["scope"], w["name"]) == (lease["scope"], lease["name"])]
        if mine:
            first = mine[0]
            new = self.grant(first["scope"], first["name"], first["by"], first["ttl"], first["lease_id"], now)
            for wait in [w for w in mine if w["by"] == first["by"]]:
                self.queue.remove(wait)
                self.told[wait["call"]] = self.answer(new)

    def release(self, lease_id: str, by: str, now: float) -> dict | None:
        """The answer; None when that is a refusal."""
        self.pass_time(now)
        lease = next((x for x in self.leases if (x["id"], x["by"]) == (lease_id, by)), None)
        if lease is None:
            return None
        self.end(lease, now)
        return {"ok": True}

    def gone(self, by: str, now: float) -> None:
        """A client's hand has ended."""
        self.pass_time(now)
        self.queue = [w for w in self.queue if w["by"] != by]
        for lease in [x for x in self.leases if x["by"] == by]:
            self.end(lease, now)

    def pass_time(self, now: float) -> None:
        """End what was due, in the order in which it fell due; at one moment leases before waits."""
        while True:
            due = [(x["until"], 0, x["id"], x) for x in self.leases] + \
                  [(w["until"], 1, w["call"], w) for w in self.queue]
            due = sorted((row for row in due if row[0] <= now), key=lambda row: row[:3])
            if not due:
                return
            _, rank, _, what = due[0]
            if rank == 0:
                self.end(what, now)
            else:
                self.queue.remove(what)
                self.told[what["call"]] = self.refusal(self.holder(what["scope"], what["name"]))
