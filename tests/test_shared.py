"""What the actors of a run share: who may read and write what, limits, versions, leases in time.

Tables of cases with time as an argument, then 16 clients at random against the same thing written plainly
(tests/linear.py), whose verdicts are themselves tested with histories that are wrong.
"""
from __future__ import annotations

import base64
import json
import math
import random
import re

import pytest

import linear
import pitboss
from linear import Naive, Op
from pitboss import RUN_WIDE, Caller, InvalidInput, Refused
from test_shape import PITBOSS

ROOT = Caller("root", "lead", "root", ("root", "w1", "w2"), ("S1",))
W1, W2 = Caller("w1", "worker", "root"), Caller("w2", "worker", "root")
SUB = Caller("S1", "sublead", "S1", ("S1", "v1"))
V1 = Caller("v1", "worker", "S1")
WHO = {c.id: c for c in (ROOT, W1, W2, SUB, V1)}


class Desk:
    """The tables and their journal: events go through JSON, as they do in a run."""

    def __init__(self) -> None:
        self.shared = pitboss.SharedTables()
        self.events: list[dict] = []
        self.now = 1000.0

    def record(self, facts: dict) -> dict:
        facts = {"seq": len(self.events) + 1, "at": self.now, **facts}
        event = json.loads(json.dumps(facts, allow_nan=False))
        self.events.append(event)
        pitboss.apply_shared(self.shared, event)
        return event

    def drop_hand(self, actor: str) -> None:
        """A hand has ended; in a run that is an event of another kind."""
        self.events.append({"seq": len(self.events) + 1, "at": self.now, "kind": "hand", "actor": actor})
        pitboss.free_holder(self.shared, actor)

    def pass_time(self, now: float | None = None) -> None:
        self.now = self.now if now is None else now
        while event := pitboss.decide_due(self.shared, self.now):
            self.record(event)

    def ask(self, decide, *given, **more) -> dict | None:
        """The answer to a request; None when it waits."""
        self.pass_time()
        verdict = decide(self.shared, *given, **more)
        if verdict.event is None:
            return verdict.result
        answer = pitboss.SHARED_EVENTS[verdict.event["kind"]].answer
        event = self.record(verdict.event)
        return answer(event) if answer else None

    def set(self, who: Caller, path: str, value="x", **more) -> dict:
        return self.ask(pitboss.decide_set, who, path, value, **more)

    def cas(self, who: Caller, path: str, expected: int, value="x") -> dict:
        return self.ask(pitboss.decide_cas, who, path, expected, value)

    def delete(self, who: Caller, path: str, **more) -> dict:
        return self.ask(pitboss.decide_delete, who, path, **more)

    def get(self, who: Caller, path: str) -> dict:
        spot = pitboss.spot_to_read(who, path)
        return pitboss.answer_entry(spot, pitboss.find_entry(self.shared, spot))

    def list(self, who: Caller, glob: str) -> list[str]:
        return [row["path"] for row in pitboss.list_entries(self.shared, who, glob)["entries"]]

    def acquire(self, who: Caller, name: str, ttl=60, wait=0, call=None, scope=None) -> dict | None:
        call = call or f"call{len(self.events)}"
        return self.ask(pitboss.decide_acquire, who, who.layer if scope is None else scope, name, ttl, wait,
                        "lease of " + call, call)

    def release(self, who: Caller, lease_id=None, name=None, scope=None) -> dict:
        return self.ask(pitboss.decide_release, who, who.layer if scope is None else scope, lease_id, name)

    def told(self, who: Caller, name: str, call: str) -> dict | None:
        return pitboss.answer_wait(self.shared, who, who.layer, name, call)


def replayed(events: list[dict]) -> pitboss.SharedTables:
    """The tables that a journal makes."""
    shared = pitboss.SharedTables()
    for event in events:
        if event["kind"] == "hand":
            pitboss.free_holder(shared, event["actor"])
        pitboss.apply_shared(shared, event)
    return shared


def tables_of(shared: pitboss.SharedTables) -> dict:
    """Everything in the tables, the order of their rows included."""
    return {name: [(k, vars(v) if isinstance(v, pitboss.Store) else v) for k, v in table.items()]
            if isinstance(table, dict) else table for name, table in vars(shared).items()}


@pytest.fixture
def desk() -> Desk:
    return Desk()


# ------------------------------------------------------------------ who may read and write what

PATHS = (
    # path                   who may read it          who may write it    and with override_flag
    ("/shared/a",            "root w1 w2 S1 v1",      "root w1 w2 S1 v1", "root w1 w2 S1 v1"),
    ("/shared/a/b/c",        "root w1 w2 S1 v1",      "root w1 w2 S1 v1", "root w1 w2 S1 v1"),
    ("/ref/a",               "root w1 w2 S1 v1",      "root S1",          "root S1"),
    ("/peer/self/a",         "root w1 w2 S1 v1",      "root w1 w2 S1 v1", "root w1 w2 S1 v1"),
    ("/peer/w1/a",           "root w1",               "w1",               "root w1"),
    ("/peer/v1/a",           "S1 v1",                 "v1",               "S1 v1"),
    ("/peer/root/a",         "root",                  "root",             "root"),
    ("/peer/S1/a",           "S1",                    "S1",               "S1"),
    ("/peer/nobody/a",       "",                      "",                 ""),
    ("/sub/S1/shared/a",     "root",                  "",                 ""),
    ("/sub/S1/peer/v1/a",    "root",                  "",                 ""),
    ("/sub/S2/shared/a",     "",                      "",                 ""),
    ("/leases/a",            "",                      "",                 ""),
)


@pytest.mark.parametrize("path, readers, writers, overriders", PATHS, ids=[row[0] for row in PATHS])
def test_who_may_do_what(desk, path, readers, writers, overriders):
    def may(act, *given, **more) -> str:
        allowed = []
        for who in WHO.values():
            try:
                act(who, *given, **more)
                allowed.append(who.id)
            except Refused as e:
                assert str(e).startswith("forbidden: ") and not str(e).endswith(".")
        return " ".join(allowed)

    assert may(desk.get, path) == readers
    assert may(desk.set, path) == may(desk.delete, path) == writers
    assert may(desk.cas, path, 0) == writers
    assert may(desk.set, path, override_flag=True) == may(desk.delete, path, override_flag=True) == overriders


@pytest.mark.parametrize("who, act, path, says", [
    (W1, "set", "/ref/a", "write to /shared/ or to /peer/self/"),
    (W1, "get", "/peer/w2/a", "read by w2 and its lead only; what all may read stands in /shared/"),
    (W1, "set", "/peer/w2/a", "written by w2 and its lead only; write to /shared/ or to /peer/self/"),
    (ROOT, "set", "/peer/w2/a", "belongs to w2; write to /shared/, or set override_flag"),
    (ROOT, "get", "/peer/w3/a", "no actor w3 works in your layer; list_workers"),
    (ROOT, "get", "/peer/S1/a", "read /sub/S1/peer/S1/"),
    (ROOT, "get", "/sub/S2/shared/a", "whose store you may read: S1"),
    (ROOT, "set", "/sub/S1/shared/a", "only read"),
    (SUB, "get", "/sub/S1/shared/a", "root lead only"),
    (W1, "get", "/leases/a", "lease_acquire"),
])
def test_a_refusal_says_what_to_do_next(desk, who, act, path, says):
    with pytest.raises(Refused, match="^forbidden: .*" + re.escape(says)):
        getattr(desk, act)(who, path)


def test_a_layer_sees_no_other_layers_store_but_a_lead_that_reads_down(desk):
    desk.set(W1, "/shared/a", "of the root")
    desk.set(V1, "/shared/a", "of the sub-lead")
    desk.set(V1, "/peer/self/b")
    assert desk.get(ROOT, "/shared/a")["entry"]["value"] == "of the root"
    assert desk.get(SUB, "/shared/a")["entry"]["value"] == "of the sub-lead"
    below = desk.get(ROOT, "/sub/S1/shared/a")["entry"]
    assert (below["path"], below["value"]) == ("/sub/S1/shared/a", "of the sub-lead")
    assert desk.get(ROOT, "/sub/S1/peer/v1/b")["entry"]["written_by"] == "v1"
    assert desk.list(ROOT, "/**") == ["/shared/a", "/sub/S1/peer/v1/b", "/sub/S1/shared/a"]
    assert desk.list(ROOT._replace(subs=()), "/**") == ["/shared/a"]
    assert desk.list(V1, "/**") == ["/peer/v1/b", "/shared/a"]


@pytest.mark.parametrize("flag", ["true", 1, None])
def test_a_flag_is_true_or_false(desk, flag):
    for act in (desk.set, desk.delete):
        with pytest.raises(InvalidInput, match="^override_flag: found .*; allowed: true or false"):
            act(ROOT, "/peer/w1/a", override_flag=flag)


def test_peer_self_is_the_caller(desk):
    desk.set(W1, "/peer/self/a", "mine")
    assert desk.get(W1, "/peer/w1/a") == desk.get(W1, "/peer/self/a") == desk.get(ROOT, "/peer/w1/a")
    assert desk.get(W2, "/peer/self/a") == {"entry": None}
    assert desk.list(W1, "/peer/self/*") == ["/peer/w1/a"] and desk.list(W2, "/peer/self/*") == []


BAD_PATHS = ["", "shared/a", "/", "//", "/shared", "/shared/", "/shared//a", "/shared/./a",
             "/shared/../ref/a", "/shared/..", "/other/a", "/peer/w1", "/peer/self", "/ref", "/sub/S1",
             "/sub/S1/shared",
             "/sub/S1/sub/S1/shared/a", "/shared/a\nb", "/shared/a\0", "/shared/\x7f",
             "/shared/" + "a" * 1024, "/SHARED/a", "/*/a", 1, None, True, ["/shared/a"], {}, 1.5]


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_bad_paths_are_refused_by_name(desk, path):
    for act in (desk.get, desk.set, desk.delete):
        with pytest.raises((InvalidInput, Refused)) as e:
            act(ROOT, path)
        assert str(e.value).startswith(("path: found ", "forbidden: a sub-lead's store"))
        assert isinstance(e.value, InvalidInput) or act != desk.get
    assert desk.events == []


@pytest.mark.parametrize("path", ["/shared/ä 漢", "/shared/a*[b]?", "/shared/~", "/shared/...",
                                  "/shared/\ud800", "/shared/-- '\"$(x)", "/shared/" + "a" * 1016])
def test_odd_paths_are_paths(desk, path):
    assert desk.set(W1, path) == {"version": 1}
    assert desk.get(W2, path)["entry"]["path"] == path and desk.list(W2, "/shared/*") == [path]


# ------------------------------------------------------------------ list

@pytest.mark.parametrize("glob, found", [
    ("/shared/*", "/shared/a /shared/ab /shared/d/a"), ("/shared/**", "/shared/a /shared/ab /shared/d/a"),
    ("/shared/?", "/shared/a"), ("/shared/a", "/shared/a"), ("/shared/A", ""), ("/shared/[ab]", "/shared/a"),
    ("/*/a", "/peer/w1/a /ref/a /shared/a /shared/d/a"), ("/s*/d/*", "/shared/d/a"), ("/shared", ""),
    ("/*", "/peer/w1/a /ref/a /shared/a /shared/ab /shared/d/a"), ("/*b", "/shared/ab"),
    ("/peer/*", "/peer/w1/a"), ("/peer/w2/*", ""), ("/peer/*/a", "/peer/w1/a"),
    ("/peer/self/*", "/peer/w1/a"), ("/shared/[", ""), ("/shared/[z-a]", ""), ("/sub/*", "")])
def test_globs_match_what_the_caller_may_read(desk, glob, found):
    for path in ("/shared/a", "/shared/ab", "/shared/d/a", "/peer/self/a"):
        desk.set(W1, path)
    desk.set(W2, "/peer/self/a")
    desk.set(ROOT, "/ref/a")
    assert desk.list(W1, glob) == found.split()


@pytest.mark.parametrize("glob, says", [
    ("*", "paths that begin with /ref/ or"), ("", "glob: found"), ("/a/*", "begin with"), ("/shared/../*", "segments"),
    ("/shared//*", "segments"), ("/./*", "segments"), ("/shared/", "segments"), (7, "glob: found 7"),
    ("/leases/*", "lease_list"), ("/" + "*a" * 600, "at most 1024"), ("/shared/\x1b*", "control")])
def test_bad_globs(desk, glob, says):
    with pytest.raises((InvalidInput, Refused), match=says):
        desk.list(W1, glob)


def test_a_list_tells_sizes_and_what_it_leaves_out(desk):
    for n in range(1001):
        desk.set(W1, f"/shared/{n:04}", "ä" * (n % 3))
    answer = pitboss.list_entries(desk.shared, W2, "/shared/*")
    assert (len(answer["entries"]), answer["truncated"], answer["total_matched"]) == (1000, True, 1001)
    assert answer["entries"][2] == {"path": "/shared/0002", "version": 1, "written_by": "w1", "size_bytes": 4,
                                    "written_at": "1970-01-01T00:16:40.000Z"}
    desk.delete(W1, "/shared/0000")
    answer = pitboss.list_entries(desk.shared, W2, "/shared/*")
    assert (len(answer["entries"]), answer["truncated"], answer["total_matched"]) == (1000, False, 1000)


def test_a_glob_of_many_stars_is_fast_on_long_paths(desk):
    desk.set(W1, "/shared/" + "a" * 1000)
    assert desk.list(W1, "/shared/" + "*a" * 400 + "b") == []


# ------------------------------------------------------------------ values

VALUES = [("", 0), ("plain", 5), ("ä漢🎉", 9), ("a\0b\r\n", 5), ("\ud800", 3), ([], 0), ([0, 255, 10], 3),
          ({"base64": ""}, 0), ({"base64": "AP8="}, 2), ("***", 3), ('{"a": 1}', 8), ("AP8=", 4),
          ({"base64": "AB=="}, 1)]      # bits left over: still as it went in


@pytest.mark.parametrize("value, size", VALUES, ids=repr)
def test_a_value_comes_back_as_it_went_in(desk, value, size):
    for act in (lambda: desk.set(W1, "/shared/a", value), lambda: desk.cas(W1, "/shared/a", 1, value)):
        act()
        assert desk.get(W2, "/shared/a")["entry"]["value"] == value
        assert pitboss.list_entries(desk.shared, W2, "/shared/a")["entries"][0]["size_bytes"] == size
    assert desk.get(W1, "/shared/a")["entry"] == {
        "path": "/shared/a", "value": value, "version": 2, "written_by": "w1",
        "written_at": "1970-01-01T00:16:40.000Z"}
    dump = pitboss.dump_shared(desk.shared, lambda text: text)
    assert dump["layers"]["root"]["/shared/a"]["value"] == value


@pytest.mark.parametrize("value", [
    None, 1, 1.5, True, math.nan, [256], [-1], [1.0], [True], ["a"], [None], [[1]], {}, {"base64": 1},
    {"base64": "A"}, {"base64": "AP8"}, {"base64": "A P8="}, {"base64": "ä"}, {"base64": "AP8=", "x": 1},
    {"value": "a"}, [10**400]], ids=repr)
def test_other_values_are_refused_by_name(desk, value):
    with pytest.raises(InvalidInput, match="^value: found .*; allowed: a text, a list of bytes"):
        desk.set(W1, "/shared/a", value)
    with pytest.raises(InvalidInput, match="^new_value: found "):
        desk.cas(W1, "/shared/a", 0, value)
    assert desk.events == []


MIB = 1 << 20


OF_SIZE = {"text": lambda n: "a" * n, "wide": lambda n: "ä" * (n // 2) + "a" * (n % 2),
           "bytes": lambda n: [7] * n, "base64": lambda n: {"base64": base64.b64encode(bytes(n)).decode()}}


@pytest.mark.parametrize("make", OF_SIZE.values(), ids=OF_SIZE)
def test_a_value_has_a_mebibyte_at_most(desk, make):
    assert desk.set(W1, "/shared/a", make(MIB)) == {"version": 1}
    with pytest.raises(InvalidInput, match=f"^value: found {MIB + 1} bytes; allowed: at most {MIB}; "):
        desk.set(W1, "/shared/a", make(MIB + 1))


def test_a_store_has_64_mebibytes_at_most(desk):
    full = "a" * MIB
    for n in range(64):
        desk.set(W1, f"/shared/{n}", full)
    with pytest.raises(Refused, match="^store full: .* bytes.*kv_delete"):
        desk.set(W1, "/shared/more", "a")
    with pytest.raises(Refused, match="^store full"):
        desk.cas(W1, "/shared/more", 0, "a")
    assert desk.set(W1, "/shared/more", "") == {"version": 1}
    assert desk.set(W1, "/shared/0", full) == {"version": 2}, "what it replaces does not count"
    assert desk.set(W1, "/shared/0", full[1:]) == {"version": 3}
    assert desk.set(V1, "/shared/a", "a") == {"version": 1}, "another layer has another store"
    desk.set(W1, "/shared/more", "a")
    desk.delete(W1, "/shared/1")
    assert desk.set(W1, "/shared/2", "b") and desk.shared.stores["root"].size_bytes == 62 * MIB + 1


def test_a_store_has_10000_paths_at_most(desk):
    for n in range(10_000):
        desk.set(W1, f"/shared/{n}", "")
    with pytest.raises(Refused, match=r"^store full: it has 10000 paths \(max 10000\); kv_delete"):
        desk.set(W1, "/shared/more", "")
    with pytest.raises(Refused, match="^store full"):
        desk.cas(W1, "/shared/more", 0, "")
    assert desk.cas(W1, "/shared/more", 1) == {"version": 0, "swapped": False}
    assert desk.set(W1, "/shared/0", "b") == {"version": 2}
    assert desk.delete(W1, "/shared/1") == {"existed": True}
    assert desk.set(W1, "/shared/more", "") == {"version": 1}


# ------------------------------------------------------------------ versions

def test_versions_count_on_after_a_delete(desk):
    assert [desk.set(W1, "/shared/a") for _ in range(3)][-1] == {"version": 3}
    assert desk.delete(W1, "/shared/a") == {"existed": True}
    assert desk.delete(W1, "/shared/a") == {"existed": False}
    assert desk.cas(W1, "/shared/a", 3) == {"version": 0, "swapped": False}
    assert desk.cas(W1, "/shared/a", 0) == {"version": 4, "swapped": True}
    assert desk.delete(W1, "/shared/a") == {"existed": True}
    assert desk.set(W1, "/shared/a") == {"version": 5}
    assert desk.cas(W1, "/shared/a", 1) == {"version": 5, "swapped": False}, "an old 1 is not a new 1"
    assert desk.shared.stores["root"].deleted == {}


def test_cas_writes_over_the_version_that_it_names_alone(desk):
    assert desk.cas(W1, "/shared/a", 1) == {"version": 0, "swapped": False}
    assert desk.cas(W1, "/shared/a", 0, "one") == {"version": 1, "swapped": True}
    assert desk.cas(W2, "/shared/a", 0, "two") == {"version": 1, "swapped": False}
    assert desk.get(W2, "/shared/a")["entry"]["value"] == "one"
    assert desk.cas(W2, "/shared/a", 1, "two") == {"version": 2, "swapped": True}
    for bad in (-1, 1.0, True, "1", None):
        with pytest.raises(InvalidInput, match="^expected_version: found .*; allowed: an integer >= 0"):
            desk.cas(W1, "/shared/a", bad)


def test_a_wait_sees_the_version_that_it_waits_for(desk):
    spot = pitboss.spot_to_read(W1, "/shared/a")
    assert pitboss.find_entry(desk.shared, spot) is None
    desk.set(W2, "/shared/a", "one")
    assert pitboss.find_entry(desk.shared, spot).value == "one"
    assert pitboss.find_entry(desk.shared, spot, 2) is None
    desk.set(W2, "/shared/a", "two")
    assert pitboss.find_entry(desk.shared, spot, 2).value == "two"
    desk.delete(W2, "/shared/a")
    assert pitboss.find_entry(desk.shared, spot, 2) is None


def test_the_refs_of_a_new_layer(desk):
    for event in pitboss.decide_refs(desk.shared, "S1", {"goal": "text", "more/x": {"a": [1, "ä"]}}, "root"):
        desk.record(event)
    assert desk.get(V1, "/ref/goal")["entry"]["value"] == "text"
    entry = desk.get(V1, "/ref/more/x")["entry"]
    assert json.loads(entry["value"]) == {"a": [1, "ä"]} and entry["written_by"] == "root"
    for key in ("", "../a", "a//b", "/a"):
        with pytest.raises(InvalidInput, match=f"^initial_ref.{re.escape(key)}: "):
            pitboss.decide_refs(desk.shared, "S2", {"good": "x", key: "x"}, "root")
    with pytest.raises(InvalidInput, match="^initial_ref.a: found 1048577 bytes"):
        pitboss.decide_refs(desk.shared, "S2", {"a": "x" * (MIB + 1)}, "root")
    with pytest.raises(Refused, match="^initial_ref: found more than"):
        pitboss.decide_refs(desk.shared, "S2", {str(n): "x" * MIB for n in range(65)}, "root")
    with pytest.raises(Refused, match="^initial_ref: found 10001 keys"):
        pitboss.decide_refs(desk.shared, "S2", {str(n): "" for n in range(10_001)}, "root")


# ------------------------------------------------------------------ leases

def granted(answer: dict | None) -> tuple:
    """(holder, version, seconds from acquisition to expiry) of an acquisition."""
    assert set(answer) == {"acquired", "lease_id", "version", "holder", "acquired_at", "expires_at"}
    assert answer["acquired"] is True
    return answer["holder"], answer["version"], moment(answer["expires_at"]) - moment(answer["acquired_at"])


def moment(text: str) -> float:
    """Unix seconds of a moment of 1970-01-01."""
    hours, minutes, seconds = text.removeprefix("1970-01-01T").removesuffix("Z").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def test_a_lease_has_one_holder_until_it_is_released(desk):
    first = desk.acquire(W1, "build", 60)
    assert granted(first) == ("w1", 1, 60)
    refused = desk.acquire(W2, "build")
    assert refused == {"acquired": False, "holder": "w1", "expires_at": first["expires_at"]}
    with pytest.raises(Refused, match="^forbidden: lease build is held by w1 until .*only its holder"):
        desk.release(W2, first["lease_id"])
    assert desk.release(W1, first["lease_id"]) == {"ok": True}
    assert granted(desk.acquire(W2, "build", 5)) == ("w2", 2, 5)
    with pytest.raises(Refused, match="^unknown lease_id: .*; it was released, or its ttl_secs ran out"):
        desk.release(W1, first["lease_id"])


def test_a_lease_ends_at_its_time_and_not_before(desk):
    first = desk.acquire(W1, "a", 10)
    desk.pass_time(1009.999)
    assert desk.acquire(W2, "a")["holder"] == "w1" and pitboss.next_due_at(desk.shared) == 1010
    desk.pass_time(1010)
    assert granted(desk.acquire(W2, "a", 1)) == ("w2", 2, 1)
    with pytest.raises(Refused, match="^unknown lease_id"):
        desk.release(W1, first["lease_id"])


def test_a_holder_that_asks_again_renews(desk):
    first = desk.acquire(W1, "a", 10)
    desk.now = 1008.0
    again = desk.acquire(W1, "a", 10)
    assert again == {**first, "expires_at": "1970-01-01T00:16:58.000Z"}, "the same lease, a later end"
    desk.pass_time(1017.9)
    assert desk.acquire(W2, "a")["acquired"] is False
    desk.pass_time(1018.0)
    assert granted(desk.acquire(W2, "a"))[:2] == ("w2", 2)
    desk.acquire(W2, "a", 1)
    assert pitboss.next_due_at(desk.shared) == 1019, "it ends sooner when that was asked"


def test_waiters_are_served_first_come_first_served(desk):
    lease = desk.acquire(ROOT, "a", 60)
    assert desk.acquire(W1, "a", 10, wait=30, call="one") is None
    assert desk.acquire(W2, "a", 10, wait=30, call="two") is None
    assert desk.told(W1, "a", "one") is None
    assert pitboss.list_leases(desk.shared, "root") == {"leases": [
        {"name": "a", "holder": "root", "version": 1, "expires_at": lease["expires_at"], "waiting": 2}]}
    desk.release(ROOT, lease["lease_id"])
    assert desk.acquire(ROOT, "a") == {"acquired": False, "holder": "w1", "expires_at":
                                       "1970-01-01T00:16:50.000Z"}, "who released goes behind who waits"
    assert granted(desk.told(W1, "a", "one")) == ("w1", 2, 10) and desk.told(W2, "a", "two") is None
    desk.pass_time(1010)
    assert granted(desk.told(W2, "a", "two")) == ("w2", 3, 10)


def test_a_free_lease_goes_to_who_waits_before_anybody_else(desk):
    lease = desk.acquire(ROOT, "a", 60)
    desk.acquire(W1, "a", 10, wait=30, call="one")
    desk.record(pitboss.decide_release(desk.shared, ROOT, "root", lease["lease_id"]).event)
    verdict = pitboss.decide_acquire(desk.shared, W2, "root", "a", 10, 0, "x", "two")     # before decide_due
    assert verdict.event is None and verdict.result == {"acquired": False, "holder": None, "expires_at": None}
    assert pitboss.next_due_at(desk.shared) == 0.0
    desk.pass_time()
    assert granted(desk.told(W1, "a", "one"))[:2] == ("w1", 2)


def test_a_wait_ends_when_its_time_is_over(desk):
    lease = desk.acquire(ROOT, "a", 60)
    desk.acquire(W1, "a", 10, wait=5, call="one")
    desk.pass_time(1004.9)
    assert desk.told(W1, "a", "one") is None and pitboss.next_due_at(desk.shared) == 1005
    desk.pass_time(1005)
    assert desk.told(W1, "a", "one") == {"acquired": False, "holder": "root",
                                         "expires_at": lease["expires_at"]}
    assert pitboss.list_leases(desk.shared, "root")["leases"][0]["waiting"] == 0


@pytest.mark.parametrize("looked_at", [1010.0, 1011.0, 5000.0])
@pytest.mark.parametrize("wait, served", [(9.999, False), (10, True), (11, True)])
def test_what_fell_due_first_happens_first_however_late_it_is_looked_at(desk, looked_at, wait, served):
    desk.acquire(ROOT, "a", 10)
    desk.acquire(W1, "a", 60, wait=wait, call="one")
    desk.pass_time(looked_at)
    assert desk.told(W1, "a", "one")["acquired"] is served
    if served:
        assert granted(desk.told(W1, "a", "one")) == ("w1", 2, 60), "its time begins when it is told"


def test_the_end_of_a_hand_frees_its_leases_and_its_places(desk):
    for name in ("a", "b"):
        desk.acquire(W1, name, 60)
    desk.acquire(W1, "tree", 60, scope=RUN_WIDE)
    desk.acquire(W2, "c", 60)
    desk.acquire(W1, "c", 60, wait=60, call="w1 waits")
    desk.acquire(ROOT, "c", 60, wait=60, call="root waits")
    desk.acquire(W2, "a", 60, wait=60, call="w2 waits")
    desk.drop_hand("w1")
    desk.pass_time()
    assert granted(desk.told(W2, "a", "w2 waits")) == ("w2", 2, 60)
    assert [row["name"] for row in pitboss.list_leases(desk.shared, "root")["leases"]] == ["a", "c"]
    assert granted(desk.acquire(V1, "tree", scope=RUN_WIDE))[:2] == ("v1", 2)
    desk.drop_hand("w2")
    desk.pass_time()
    assert granted(desk.told(ROOT, "c", "root waits"))[:2] == ("root", 2)
    desk.drop_hand("nobody")
    for actor in WHO:
        desk.drop_hand(actor)
    left = tables_of(desk.shared)
    assert {name for name, table in left.items() if table} == {"fences"}, "nothing stays but the versions"


def test_a_cancelled_call_gets_no_lease(desk):
    desk.acquire(ROOT, "a", 60)
    desk.acquire(W1, "a", 60, wait=60, call="one")
    desk.acquire(W2, "a", 60, wait=60, call="two")
    desk.record(pitboss.decide_abandon(desk.shared, "root", "a", "one"))
    desk.drop_hand("root")
    desk.pass_time()
    assert granted(desk.told(W2, "a", "two"))[:2] == ("w2", 2) and not desk.told(W1, "a", "one")["acquired"]
    assert pitboss.decide_abandon(desk.shared, "root", "a", "one") is None
    desk.record(pitboss.decide_abandon(desk.shared, "root", "a", "two"))     # granted, and never answered
    assert granted(desk.acquire(W1, "a"))[:2] == ("w1", 3)


def test_a_call_that_is_sent_again_keeps_its_place(desk):
    lease = desk.acquire(ROOT, "a", 60, call="r")
    assert desk.acquire(ROOT, "a", 99, call="r") == lease, "answered as before, not renewed"
    desk.acquire(ROOT, "a", 60, call="renews")
    assert pitboss.decide_abandon(desk.shared, "root", "a", "renews") is None
    assert desk.acquire(ROOT, "a", 99, call="r") == lease
    desk.acquire(W1, "a", 60, wait=60, call="one")
    desk.acquire(W2, "a", 60, wait=60, call="two")
    desk.shared = replayed(desk.events)                # the dispatcher died and the run was taken over
    count = len(desk.events)
    assert desk.acquire(W2, "a", 60, wait=60, call="two") is None
    assert desk.acquire(W1, "a", 60, wait=60, call="one") is None and len(desk.events) == count
    desk.release(ROOT, lease["lease_id"])
    desk.pass_time()
    assert granted(desk.told(W1, "a", "one"))[:2] == ("w1", 2) and desk.told(W2, "a", "two") is None


def test_one_actors_calls_for_one_lease_are_answered_together(desk):
    lease = desk.acquire(ROOT, "a", 60)
    desk.acquire(W1, "a", 10, wait=60, call="one")
    desk.acquire(W2, "a", 10, wait=60, call="other")
    desk.acquire(W1, "a", 10, wait=60, call="two")
    desk.release(ROOT, lease["lease_id"])
    desk.pass_time()
    assert granted(desk.told(W1, "a", "one"))[1] == 2
    assert desk.told(W1, "a", "two") == desk.told(W1, "a", "one")
    desk.pass_time(1010)
    assert granted(desk.told(W2, "a", "other"))[1] == 3
    desk.pass_time(1020)
    assert desk.shared.leases == {} and desk.shared.waits == {}


def test_scopes_are_apart(desk):
    assert granted(desk.acquire(W1, "a"))[1] == granted(desk.acquire(V1, "a"))[1] == 1
    wide = desk.acquire(W1, "a", scope=RUN_WIDE)
    assert granted(wide)[1] == 1
    assert desk.acquire(V1, "a", scope=RUN_WIDE)["holder"] == "w1"
    with pytest.raises(Refused, match="release it with run_lease_release"):
        desk.release(W1, wide["lease_id"])
    below = desk.shared.leases["S1", "a"].id
    with pytest.raises(Refused, match="^unknown lease_id"):
        desk.release(W1, below)                        # another layer's leases are not shown
    with pytest.raises(Refused, match="release it with lease_release"):
        desk.release(V1, below, scope=RUN_WIDE)
    with pytest.raises(InvalidInput, match="^key: found \"b\"; allowed: a, which lease_id names"):
        desk.release(W1, wide["lease_id"], name="b", scope=RUN_WIDE)
    with pytest.raises(Refused, match="^forbidden: lease a is held by w1"):
        desk.release(V1, name="a", scope=RUN_WIDE)
    assert desk.release(W1, name="a", scope=RUN_WIDE) == {"ok": True}
    with pytest.raises(Refused, match="^no lease a is held; it was released"):
        desk.release(W1, name="a", scope=RUN_WIDE)
    with pytest.raises(InvalidInput, match="^lease_id: is required, or key"):
        desk.release(W1, scope=RUN_WIDE)
    assert pitboss.dump_shared(desk.shared, str)["leases"] == [
        {"layer": "root", "name": "a", "holder": "w1", "version": 1, "expires_at": "1970-01-01T00:17:40.000Z",
         "waiting": 0},
        {"layer": "S1", "name": "a", "holder": "v1", "version": 1, "expires_at": "1970-01-01T00:17:40.000Z",
         "waiting": 0}]


BAD_TIMES = [-1, -0.5, 604_801, 1e300, 10**400, math.nan, math.inf, -math.inf, True, "60", None, [60]]


@pytest.mark.parametrize("bad", BAD_TIMES + [0], ids=repr)
def test_a_senseless_ttl_is_refused_by_name(desk, bad):
    with pytest.raises(InvalidInput, match="^ttl_secs: found .*; allowed: a number from 0.1 to 604800$"):
        desk.acquire(W1, "a", bad)
    assert desk.events == []


@pytest.mark.parametrize("bad", BAD_TIMES, ids=repr)
def test_a_senseless_wait_is_refused_by_name(desk, bad):
    with pytest.raises(InvalidInput, match="^wait_secs: found .*; allowed: a number from 0 to 604800$"):
        desk.acquire(W1, "a", 60, wait=bad)


@pytest.mark.parametrize("scope, argument", [("root", "name"), (RUN_WIDE, "key")])
@pytest.mark.parametrize("bad", ["", "a\nb", "a\0", "\x7f", "a" * 201, None, 7, ["a"]], ids=repr)
def test_a_senseless_name_is_refused_by_name(desk, bad, scope, argument):
    with pytest.raises(InvalidInput, match=f"^{argument}: found .*; allowed: a text"):
        desk.acquire(W1, bad, scope=scope)


def test_one_actor_has_a_thousand_leases_at_most(desk):
    for n in range(999):
        desk.acquire(W1, str(n))
    desk.acquire(W2, "other")
    desk.acquire(W1, "other", wait=60, call="one")
    for name, wait in (("more", 0), ("other", 60)):
        with pytest.raises(Refused, match=r"^too many leases: you hold or wait for 1000 \(max 1000\); rel"):
            desk.acquire(W1, name, wait=wait)
    assert desk.acquire(W1, "0")["acquired"] and desk.acquire(W2, "more")["acquired"]


# ------------------------------------------------------------------ tables

def test_every_kind_of_event_is_decided_by_somebody_and_has_its_handler():
    source = PITBOSS.read_text(encoding="utf-8")
    decided = set(re.findall(r'"kind": "((?:kv|lease)_\w+)"', source))
    assert decided == set(pitboss.SHARED_EVENTS)
    for kind, row in pitboss.SHARED_EVENTS.items():
        assert row.handler is getattr(pitboss, f"on_{kind}") and row.durable is kind.startswith("kv_")


def test_an_unknown_kind_changes_nothing(desk):
    desk.set(W1, "/shared/a")
    before = json.dumps(tables_of(desk.shared))
    desk.record({"kind": "lease_painted", "layer": "root"})
    assert json.dumps(tables_of(desk.shared)) == before


def test_every_namespace_is_in_the_paths_that_are_tried():
    assert {path.split("/")[1] for path, *_ in PATHS} == set(pitboss.NAMESPACES)
    for name, row in pitboss.NAMESPACES.items():
        assert row.shape.startswith(f"/{name}/") and row.depth >= 2


def test_fields_say_what_they_are():
    for name, field in pitboss.SHARED_FIELDS.items():
        assert field.name == name and field.help and not field.help.endswith(".")


# ------------------------------------------------------------------ cost

class Counted(dict):
    """A dict that counts how many of its rows are looked at."""

    touched = 0

    def __getitem__(self, key):
        Counted.touched += 1
        return super().__getitem__(key)

    def get(self, key, default=None):
        Counted.touched += 1
        return super().get(key, default)

    def __setitem__(self, key, value):
        Counted.touched += 1
        super().__setitem__(key, value)

    def __iter__(self):
        for key in super().__iter__():
            Counted.touched += 1
            yield key

    def keys(self):
        Counted.touched += len(self)
        return super().keys()

    def values(self):
        Counted.touched += len(self)
        return super().values()

    def items(self):
        Counted.touched += len(self)
        return super().items()


def count_touches(desk: Desk, act) -> int:
    """How many rows of the tables one request looks at."""
    for name, table in vars(desk.shared).items():
        if isinstance(table, dict):
            setattr(desk.shared, name, Counted(table))
    for store in desk.shared.stores.values():
        store.entries, store.deleted = Counted(store.entries), Counted(store.deleted)
    Counted.touched = 0
    act()
    return Counted.touched


REQUESTS = {
    "create":  lambda desk: desk.set(W1, "/shared/new"),
    "set":     lambda desk: desk.set(W1, "/shared/5"),
    "cas":     lambda desk: desk.cas(W1, "/shared/5", 2),
    "get":     lambda desk: desk.get(W1, "/shared/5"),
    "delete":  lambda desk: desk.delete(W1, "/shared/5"),
    "acquire": lambda desk: desk.acquire(W1, "new"),
    "renew":   lambda desk: desk.acquire(W1, "new"),
    "queue":   lambda desk: desk.acquire(W1, "5", wait=5),
    "release": lambda desk: desk.release(Caller("a5", "worker", "root"), "lease of c5"),
    "hand":    lambda desk: desk.drop_hand("a6"),
    "due":     lambda desk: desk.pass_time(1001),
}


def costs(size: int) -> dict[str, int]:
    """What each request looks at where there are `size` paths, leases and actors."""
    desk = Desk()
    for n in range(size):
        desk.set(W1, f"/shared/{n}")
        desk.acquire(Caller(f"a{n}", "worker", "root"), str(n), 1 if n == 3 else 600, call=f"c{n}")
    return {name: count_touches(desk, lambda: act(desk)) for name, act in REQUESTS.items()}


def test_a_request_costs_what_it_touches_however_much_there_is():
    small = costs(10)
    assert costs(3_000) == small and 0 < min(small.values()) and max(small.values()) <= 24


def test_renewals_leave_no_pile_behind(desk):
    desk.acquire(W1, "short", 1)
    for n in range(5000):
        desk.acquire(W2, "a", 600 + n)
    assert len(desk.shared.due) <= 80
    desk.pass_time(desk.now + 600 + 4999)
    assert desk.shared.due == [] and desk.shared.leases == {}


# ------------------------------------------------------------------ 16 clients at random

CLIENTS = [ROOT._replace(peers=frozenset(["root", *(f"c{n}" for n in range(1, 8))]), subs=("S1",)),
           *(Caller(f"c{n}", "worker", "root") for n in range(1, 8)),
           Caller("S1", "sublead", "S1", frozenset(["S1", *(f"d{n}" for n in range(1, 8))])),
           *(Caller(f"d{n}", "worker", "S1") for n in range(1, 8))]
VALUE_POOL = ["", "text", [1, 2, 255], {"base64": "AP8="}]


class Both:
    """The tables and the plain ones side by side: every answer is compared and kept as history."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.desk, self.plain = Desk(), Naive()
        self.history: list[Op] = []
        self.waiting: dict[str, tuple] = {}       # call to (client, scope, name, given, when it began)
        self.count = 0

    def note(self, who: Caller, call: str, what: tuple, given: dict, answer, begun: float) -> None:
        self.count += 1
        self.history.append(Op(who.id, call, what, given, answer, begun, self.desk.now))

    def store(self, who: Caller) -> None:
        layer, chance = who.layer, self.chance
        path = chance.choice(["/shared/a", "/shared/b", "/shared/c/d", f"/peer/{who.id}/x"])
        asked = path.replace(f"/peer/{who.id}/", chance.choice(["/peer/self/", f"/peer/{who.id}/"]))
        value, now = chance.choice(VALUE_POOL), self.desk.now
        known = self.plain.find(layer, path)
        expected = chance.choice([0, known["version"] if known else 0, chance.randrange(4)])
        call = chance.choice(["get", "get", "set", "cas", "cas", "delete"])
        given = {"value": json.dumps(value), "expected_version": expected}
        answer, plain = {
            "get": lambda: (self.desk.get(who, asked), self.plain.get(layer, path)),
            "set": lambda: (self.desk.set(who, asked, value),
                            self.plain.set(layer, path, value, who.id, now)),
            "cas": lambda: (self.desk.cas(who, asked, expected, value),
                            self.plain.cas(layer, path, expected, value, who.id, now)),
            "delete": lambda: (self.desk.delete(who, asked), self.plain.delete(layer, path)),
        }[call]()
        if call == "get" and plain["entry"]:
            plain["entry"]["written_at"] = pitboss.render_time(plain["entry"]["written_at"])
        assert answer == plain
        if call == "get" and answer["entry"]:
            answer["entry"]["value"] = json.dumps(answer["entry"]["value"])
        self.note(who, call, (layer, path), given, answer, now)

    def lease(self, who: Caller) -> None:
        chance, call = self.chance, f"call{self.count}"
        scope, name = chance.choice([who.layer, RUN_WIDE]), chance.choice("pq")
        ttl, wait = chance.choice([0.5, 2, 5]), chance.choice([0, 0, 1, 3, 10])
        answer = self.desk.acquire(who, name, ttl, wait, call, scope)
        plain = self.plain.acquire(scope, name, who.id, ttl, wait, "lease of " + call, call, self.desk.now)
        self.compare(answer, plain)
        if answer is None:
            self.count += 1
            self.waiting[call] = (who, scope, name, {"ttl": ttl}, self.desk.now)
        else:
            self.note(who, "acquire", (scope, name), {"ttl": ttl}, plain, self.desk.now)

    def compare(self, answer: dict | None, plain: dict | None) -> None:
        shown = plain and {k: pitboss.render_time(v) if k in ("acquired_at", "expires_at") else v
                           for k, v in plain.items()}
        assert answer == shown

    def release(self, who: Caller) -> None:
        mine = [x for x in self.plain.leases if x["by"] == who.id]
        lease = self.chance.choice(mine or self.plain.leases or [None])
        if lease is None:
            return
        plain = self.plain.release(lease["id"], who.id, self.desk.now)
        try:
            answer = self.desk.release(who, lease["id"], scope=lease["scope"])
        except Refused:
            answer = None
        assert answer == plain
        if answer:
            self.note(who, "release", (lease["scope"], lease["name"]), {"lease_id": lease["id"]}, answer,
                      self.desk.now)

    def gone(self, who: Caller) -> None:
        self.desk.pass_time()
        self.plain.gone(who.id, self.desk.now)
        self.desk.drop_hand(who.id)
        self.waiting = {call: row for call, row in self.waiting.items() if row[0] != who}
        self.note(who, "gone", (), {}, {}, self.desk.now)

    def turn(self) -> None:
        """One client does one thing; then time passes, and who waited is told."""
        who, chance = self.chance.choice(CLIENTS), self.chance.random()
        act = (self.store if chance < 0.5 else self.lease if chance < 0.8 else
               self.release if chance < 0.98 else self.gone)
        act(who)
        self.tell()
        self.desk.now = round(self.desk.now + self.chance.choice([0.001, 0.01, 0.3, 0.5]), 3)
        self.tell()

    def tell(self) -> None:
        """Do what is due, and answer each call when its wait ends."""
        answers = {}
        while event := pitboss.decide_due(self.desk.shared, self.desk.now):
            self.desk.record(event)
            for call, (client, scope, name, *_) in self.waiting.items():
                answer = pitboss.answer_wait(self.desk.shared, client, scope, name, call)
                if answer is not None:
                    answers.setdefault(call, answer)
        self.plain.pass_time(self.desk.now)
        assert set(answers) == set(self.plain.told)
        for call, answer in answers.items():
            client, scope, name, given, begun = self.waiting.pop(call)
            plain = self.plain.told.pop(call)
            self.compare(answer, plain)
            self.note(client, "acquire", (scope, name), given, plain, begun)

    def held(self) -> list[tuple]:
        return sorted((x["scope"], x["name"], x["by"], x["version"], x["until"]) for x in self.plain.leases)


def run_both(seed: int, operations: int) -> Both:
    both = Both(seed)
    while both.count < operations:
        both.turn()
        shared = both.desk.shared
        assert both.held() == sorted((x.scope, x.name, x.holder, x.version, x.expires_at)
                                     for x in shared.leases.values())
        assert len(shared.waits) == len(both.plain.queue) == sum(map(len, shared.queues.values()))
    assert tables_of(replayed(both.desk.events)) == tables_of(both.desk.shared)
    assert linear.check_store(both.history) == [] and linear.check_leases(both.history) == []
    return both


@pytest.mark.parametrize("seed", range(4))
def test_random_clients_see_what_the_plain_tables_say(seed):
    both = run_both(seed, 500)
    calls = {op.call for op in both.history}
    assert calls == {"get", "set", "cas", "delete", "acquire", "release", "gone"}


def test_wherever_a_journal_ends_the_tables_go_on():
    events = run_both(99, 300).desk.events
    for end in range(0, len(events), 7):
        desk = Desk()
        desk.events, desk.shared = events[:end], replayed(events[:end])
        waited = set(desk.shared.waits)
        desk.pass_time(1e6)                    # found again much later: all is granted or ended in its turn
        while due := pitboss.next_due_at(desk.shared):
            desk.pass_time(due)
        ended = [e for e in desk.events[end:] if e["kind"] in ("lease_granted", "lease_wait_ended")]
        assert waited >= {e["call"] for e in ended} and not desk.shared.waits
        assert not desk.shared.leases and not desk.shared.due and not desk.shared.ready


@pytest.mark.slow
def test_16_clients_with_2000_operations_each():
    both = run_both(16, 16 * 2000)
    assert {event["kind"] for event in both.desk.events} == {*pitboss.SHARED_EVENTS, "hand"}


# ------------------------------------------------------------------ the verdicts themselves

def op(client, call, begun, ended, result=None, /, **given) -> Op:
    return Op(client, call, ("l", "/p"), given, result, begun, ended)


def cas(client: str, version: int, swapped: bool) -> Op:
    return op(client, "cas", 1, 2, {"version": version, "swapped": swapped}, expected_version=0, value=client)


def got(version: int, value) -> dict:
    return {"entry": {"version": version, "value": value}}


NONE = {"entry": None}
WROTE = [op("a", "set", 1, 2, {"version": 1}, value="x")]
LOST = op("a", "set", 1, math.inf, None, value="x")
STORIES = {
    # name: (calls, whether they can have happened)
    "read it":             ([*WROTE, op("b", "get", 3, 4, got(1, "x"))], True),
    "read late":           ([*WROTE, op("b", "get", 3, 4, NONE)], False),
    "read together":       ([*WROTE, op("b", "get", 1.5, 4, NONE)], True),
    "read another":        ([*WROTE, op("b", "get", 3, 4, got(1, "y"))], False),
    "read the future":     ([op("b", "get", 0, 0.5, got(1, "x")), *WROTE], False),
    "new then old":        ([*WROTE, op("a", "set", 3, 9, {"version": 2}, value="y"),
                             op("b", "get", 4, 5, got(2, "y")), op("b", "get", 6, 7, got(1, "x"))], False),
    "old then new":        ([*WROTE, op("a", "set", 3, 9, {"version": 2}, value="y"),
                             op("b", "get", 4, 5, got(1, "x")), op("b", "get", 6, 7, got(2, "y"))], True),
    "one version twice":   ([*WROTE, op("b", "set", 1, 2, {"version": 1}, value="y")], False),
    "a version left out":  ([*WROTE, op("b", "set", 3, 4, {"version": 3}, value="y")], False),
    "both swap":           ([cas("a", 1, True), cas("b", 1, True)], False),
    "one swaps":           ([cas("a", 1, True), cas("b", 1, False)], True),
    "none swaps":          ([cas("a", 0, False)], False),
    "deleted":             ([*WROTE, op("b", "delete", 3, 4, {"existed": True}),
                             op("b", "get", 5, 6, NONE)], True),
    "deleted twice":       ([*WROTE, *[op(c, "delete", 3, 4, {"existed": True}) for c in "ab"]], False),
    "counts on":           ([*WROTE, op("b", "delete", 3, 4, {"existed": True}),
                             op("b", "set", 5, 6, {"version": 2}, value="z")], True),
    "begins again":        ([*WROTE, op("b", "delete", 3, 4, {"existed": True}),
                             op("b", "set", 5, 6, {"version": 1}, value="z")], False),
    "unanswered, done":    ([LOST, op("b", "get", 3, 4, got(1, "x"))], True),
    "unanswered, not yet": ([LOST, op("b", "get", 3, 4, NONE), op("b", "get", 5, 6, got(1, "x"))], True),
    "unanswered, undone":  ([LOST, op("b", "get", 3, 4, got(1, "x")), op("b", "get", 5, 6, NONE)], False),
    "unanswered, in time": ([LOST._replace(ended=4), op("b", "get", 3, 5, got(1, "x"))], True),
    "unanswered, never":   ([LOST._replace(ended=4), op("b", "get", 5, 6, NONE)], True),
    "unanswered, too late": ([LOST._replace(ended=4), op("b", "get", 5, 6, NONE),
                              op("b", "get", 7, 8, got(1, "x"))], False),
}


@pytest.mark.parametrize("calls, possible", STORIES.values(), ids=STORIES)
def test_the_verdict_on_a_store(calls, possible):
    assert (linear.check_store(calls) == []) is possible
    assert (linear.check_store(calls[::-1]) == []) is possible, "the order of the list means nothing"


def lease(client, begun, ended, lease_id, version, until) -> Op:
    return op(client, "acquire", begun, ended, {"acquired": True, "lease_id": lease_id, "version": version,
                                                "expires_at": until})


FIRST = lease("a", 1, 2, "L1", 1, 10)
LEASE_STORIES = {
    "after its end":      ([FIRST, lease("b", 3, 10, "L2", 2, 20)], True),
    "before its end":     ([FIRST, lease("b", 3, 9, "L2", 2, 20)], False),
    "after a release":    ([FIRST, op("a", "release", 4, 5, {"ok": True}, lease_id="L1"),
                            lease("b", 3, 6, "L2", 2, 20)], True),
    "after a renewal":    ([FIRST, lease("a", 3, 4, "L1", 1, 15), lease("b", 5, 12, "L2", 2, 20)], False),
    "after its hand":     ([FIRST, Op("a", "gone", (), {}, {}, 5, 5), lease("b", 6, 7, "L2", 2, 20)], True),
    "before its hand":    ([Op("a", "gone", (), {}, {}, 1, 1), FIRST, lease("b", 6, 7, "L2", 2, 20)], False),
    "the same number":    ([FIRST, lease("b", 11, 12, "L2", 1, 20)], False),
    "a number left out":  ([FIRST, lease("b", 11, 12, "L2", 3, 20)], False),
    "numbers backwards":  ([lease("a", 1, 2, "L1", 2, 10), lease("b", 11, 12, "L2", 1, 20)], False),
    "refused":            ([FIRST, op("b", "acquire", 3, 4, {"acquired": False})], True),
    "one lost between":   ([FIRST, op("c", "acquire", 11, 12), lease("b", 13, 14, "L3", 3, 20)], True),
    "two numbers, one lost": ([FIRST, op("c", "acquire", 11, 12), lease("b", 13, 14, "L4", 4, 20)], False),
}


@pytest.mark.parametrize("calls, possible", LEASE_STORIES.values(), ids=LEASE_STORIES)
def test_the_verdict_on_leases(calls, possible):
    assert (linear.check_leases(calls) == []) is possible


def test_the_verdict_on_a_store_is_quick_where_much_happens_at_once():
    chance, calls, now = random.Random(1), [], linear.Register()
    for n in range(2000):                                  # many at a time, each at one moment in its span
        kind = chance.choice(["get", "set", "cas"])
        given = {"value": n, "expected_version": now.version}
        if kind == "get":
            result = got(now.version, now.value) if now.version else NONE
        else:
            now = linear.Register(now.last + 1, n, now.last + 1)
            result = {"version": now.version, "swapped": True}
        begun, ended = n - 8 * chance.random(), n + 8 * chance.random()
        calls.append(op(f"c{n % 16}", kind, begun, ended, result, **given))
    assert linear.check_store(calls) == []
    calls[1000] = calls[1000]._replace(begun=1500, ended=1501, call="get", result=got(3, "old"))
    assert linear.check_store(calls) != []


def test_the_verdict_on_a_store_is_quick_where_many_answers_are_lost(monkeypatch):
    """What a lost call may have done is tried where it may have happened alone, and not at all when it is nothing."""
    calls = []
    for n in range(1, 200):
        calls.append(op("a", "set", n, n + 0.5, {"version": n}, value=n))
        calls.append(op("b", "cas", n, n + 0.9, None, value="b", expected_version=1000))
        calls.append(op("c", "set", n + 0.4, n + 0.9, None, value="c"))
    tries, after = iter(range(20_000)), linear.after

    def counted(*args):
        assert next(tries, None) is not None, "too many tries"
        return after(*args)

    monkeypatch.setattr(linear, "after", counted)
    assert linear.check_store(calls) == []
    calls.append(op("d", "get", 150, 151, got(3, "old")))
    assert linear.check_store(calls) != []
