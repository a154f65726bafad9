"""Every table of pitboss.py is whole: each row can be reached, means what it says, has no second spelling.

One test a table, each of them iterating it. What the code owes, records and answers is read from its syntax
tree, so that a verb, kind, status or exit code that no table knows is found before anything runs into it.
"""
from __future__ import annotations

import ast
import functools
import inspect
import json
import math
import re
import shlex
import signal
import sys

import pytest

import pitboss
from json_schema import faults, schemas_in
from test_shape import FUNCTIONS, PITBOSS, Program

PROGRAM = Program(PITBOSS.read_text(encoding="utf-8"))
SPEC_STATUSES = {"Success", "Failed", "TimedOut", "Cancelled", "SpawnFailed", "ApprovalRejected",
                 "ApprovalTimedOut"}
SPEC_FAILURE_KINDS = {"rate_limit", "auth_failure", "context_exceeded", "network_error", "invalid_argument",
                      "unknown"}


@functools.cache
def functions() -> dict[str, ast.AST]:
    """Every function and method by its name; nested ones belong to the one around them."""
    found = {}
    for node in PROGRAM.tree.body:
        for f in [node] if isinstance(node,
                                      FUNCTIONS) else node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(f, FUNCTIONS):
                found[f.name if isinstance(node, FUNCTIONS) else f"{node.name}.{f.name}"] = f
    return found


def texts_of(node: ast.AST) -> set[str]:
    """The string constants below a node."""
    return {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)}


def calls_of(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls, below a node, of a function or method of that name."""
    return [x for x in ast.walk(node) if isinstance(x, ast.Call)
            and name in (getattr(x.func, "id", None), getattr(x.func, "attr", None))]


def table_node(name: str) -> ast.AST:
    """The statement that makes a table."""
    return next(n for n in PROGRAM.tree.body if isinstance(n, ast.Assign) and n.targets[0].id == name)


def texts_outside(table: str) -> set[str]:
    """The string constants of the whole file but one table."""
    return set().union(*(texts_of(n) for n in PROGRAM.tree.body if n is not table_node(table)))


def answers_of(value: ast.expr) -> set[str]:
    """The texts that an expression may be, both branches of a condition."""
    if isinstance(value, ast.IfExp):
        return answers_of(value.body) | answers_of(value.orelse)
    return {value.value} if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(c) for c in cls.__subclasses__()))


def is_sentence_part(text: str) -> bool:
    """Words for people, without a final period or loose space."""
    return bool(text) and text == text.strip() and not text.endswith(".")


# ------------------------------------------------------------------ TERMS

def test_exit_codes_are_distinct_said_and_used():
    codes = [code for code, _ in pitboss.EXIT_CODES.values()]
    assert len(set(codes)) == len(codes) and all(0 <= code < 256 for code in codes)
    answered = {error.code for error in subclasses(pitboss.PitbossError)}
    names = {c.run.__name__ for c in pitboss.COMMANDS.values()} | {
        "exit_code_of", "deal_and_report", "show_plan", "start_background"}
    for name, function in functions().items():
        for x in ast.walk(function) if name in names else ():
            if isinstance(x, ast.Return) and x.value is not None:
                answered |= answers_of(x.value)
    answered |= {x.value.value for x in ast.walk(functions()["main"]) if isinstance(x, ast.Assign)
                 and isinstance(x.value, ast.Constant) and x.targets[0].id == "code"}
    assert answered == set(pitboss.EXIT_CODES)
    for code, meaning in pitboss.EXIT_CODES.values():
        assert is_sentence_part(meaning)


def test_statuses_are_the_known_words_and_each_is_given():
    assert set(pitboss.STATUSES) <= SPEC_STATUSES
    used = texts_outside("STATUSES") & SPEC_STATUSES
    assert used == set(pitboss.STATUSES), "a status that is used is a row, and a row is used"
    for name, status in pitboss.STATUSES.items():
        assert status.name == name and status.colour in pitboss.COLOURS and is_sentence_part(status.meaning)
        assert pitboss.cell_width(status.glyph) == 1
        assert status.tool == ("Completed" if name == "Success" else name)
        assert status.wire == "done" + re.sub("([A-Z])", r"_\1", name).lower()
    assert len({s.glyph for s in pitboss.STATUSES.values()}) == len(pitboss.STATUSES)
    assert [s.name for s in pitboss.STATUSES.values() if s.good] == ["Success"]


def test_states_are_each_entered_by_an_event():
    entered = set()
    for call in (x for x in ast.walk(PROGRAM.tree) if isinstance(x, ast.Call)):
        for word in call.keywords:
            entered |= texts_of(word.value) if word.arg == "state" and call.func.id == "change" else set()
    entered.discard("place")           # the verb that fill_slots compares with
    assert entered | {pitboss.Actor._field_defaults["state"]} == set(pitboss.STATES)
    for name, state in pitboss.STATES.items():
        assert state.name == name and is_sentence_part(state.meaning)
        assert state.tool in ("Pending", "Running", "Paused", "Frozen")


def test_failure_kinds_are_the_known_ones():
    assert set(pitboss.FAILURE_KINDS) == SPEC_FAILURE_KINDS


# ------------------------------------------------------------------ FIELDS, MANIFEST

KIND_SAMPLES = {
    #         what it takes                     what it does not
    "text":   (["", "ä", "a\nb"],               [1, True, None, [], "a\0b"]),
    "word":   (["a", " "],                      ["", 1, None, "a\0b"]),
    "path":   (["a", "/", "~/x y"],             ["", 1, None, "a\0b"]),
    "count":  ([0, -1, 1 << 40],                [True, 1.0, "1", None, 10**400]),
    "number": ([0, 1.5, -2],                    [True, math.nan, math.inf, -math.inf, "1", 10**400]),
    "flag":   ([True, False],                   [0, 1, "true", None]),
    "texts":  ([[], ["a", ""]],                 ["a", [1], [None], {}, ("a",)]),
    "env":    ([{}, {"A": ""}],                 [[], {"A": 1}, {"A": None}, "A=1"]),
    "table":  ([{}, {"a": [None]}],             [[], "a", None, True]),
    "tables": ([[], [{}]],                      [[1], {}, None]),
    "any":    (["", "a\0b", [], [1], {}, {"a": [None]}], [1, True, None, 1.5]),
}
JSON_TYPES = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
              "array": (list,),
              "object": (dict,)}


def manifest_fields() -> list[tuple[str, pitboss.Field]]:
    return [(table, f) for table, (fields, _, _) in pitboss.TABLES.items() for f in fields]


def all_fields() -> list[tuple[str, pitboss.Field]]:
    """The fields of manifests, of tools and of operations."""
    return manifest_fields() + [(name, f) for table in (pitboss.TOOLS, pitboss.OPS) for name, row in table.items()
                                for f in row.fields]


def test_kinds_take_what_their_schema_says_and_are_used():
    assert set(KIND_SAMPLES) == set(pitboss.KINDS) == {f.kind for _, f in all_fields()}
    for name, kind in pitboss.KINDS.items():
        field = pitboss.Field("x", name, None, "a sample")
        names = kind.schema["type"]
        assert set(kind.types) == {t for n in ([names] if isinstance(names, str) else names) for t in JSON_TYPES[n]}
        good, bad = KIND_SAMPLES[name]
        assert [v for v in good if pitboss.wrong_value(field, v)] == []
        assert [v for v in bad if not pitboss.wrong_value(field, v)] == []


def test_fields_are_whole():
    for table, (fields, many, what) in pitboss.TABLES.items():
        spelled = [name for f in fields for name in (f.name, *f.also)]
        assert len(set(spelled)) == len(spelled), table
        assert many in pitboss.MANY and is_sentence_part(what)
    assert {many for _, many, _ in pitboss.TABLES.values()} == set(pitboss.MANY)
    assert set(pitboss.MODES.values()) <= set(pitboss.TABLES)
    for table, f in all_fields():
        where = f"{table}.{f.name}"
        assert re.fullmatch(r"[a-z_]+",
                            f.name) and f.kind in pitboss.KINDS and is_sentence_part(f.help), where
        if f.default not in (None, pitboss.REQUIRED):
            default = list(f.default) if f.kind == "texts" else f.default
            assert pitboss.wrong_value(f, default) == "", where
        assert not (f.choices and (f.pattern or f.low is not None)), where
        assert f.low is None or f.above is None, where
        assert f.mode in ("", *pitboss.MODES), where


def test_a_bound_of_a_field_is_in_its_words_and_in_its_schema():
    for table, f in all_fields():
        schema = pitboss.schema_of((f,))["properties"][f.name]
        bounds = [(f.low, -1, "minimum"), (f.above, 0, "exclusiveMinimum"), (f.high, 1, "maximum")]
        for bound, beyond, word in bounds:
            assert schema.get(word) == bound, f"{table}.{f.name}"
            if bound is not None:
                assert pitboss.wrong_value(f, bound + beyond), f"{table}.{f.name} takes {bound + beyond}"
                assert f"{bound:g}" in pitboss.wrong_value(f, bound + beyond)
        for choice in f.choices:
            assert pitboss.wrong_value(f, choice) == ""
        if f.choices:
            assert schema["enum"] == list(f.choices) and pitboss.wrong_value(f, "nonsense")


def test_house_rules_are_keys_of_run_and_of_the_lead():
    for table in ("run", "lead"):
        fields = {f.name: f for f in pitboss.TABLES[table][0]}
        assert all(fields[f.name] is key for f, key in zip(pitboss.HOUSE_FIELDS, pitboss.HOUSE_KEYS))
    for f, key in zip(pitboss.HOUSE_FIELDS, pitboss.HOUSE_KEYS):
        assert key.default is not pitboss.REQUIRED and (key is f) == (f.default is not pitboss.REQUIRED)
        assert f.mode == "hierarchical"


def test_what_a_field_declares_arrives_in_its_record():
    rules = [f.name for f in pitboss.RUN_FIELDS + pitboss.HOUSE_FIELDS]
    rules.remove("lead_timeout_secs")             # becomes timeout_s of the lead
    assert list(pitboss.Rules._fields) == [*rules, "subleads"]
    assert set(pitboss.SUBLEAD_KEYS) < {f.name for f in pitboss.LEAD_FIELDS}
    for record, fields in ((pitboss.Server, pitboss.SERVER_FIELDS), (pitboss.Command, pitboss.COMMAND_FIELDS)):
        assert list(record._fields) == [f.name for f in fields]
    renamed = {"timeout_secs": "timeout_s"}
    assert {renamed.get(f.name, f.name) for f in pitboss.ACTOR_FIELDS} <= set(pitboss.Task._fields)


# ------------------------------------------------------------------ STREAM, FAILURES

def test_formats_are_those_that_can_be_chosen():
    choices = next(f.choices for f in pitboss.COMMAND_FIELDS if f.name == "format")
    assert set(choices) == set(pitboss.FORMATS)
    assert {a.format for a in pitboss.AGENTS.values()} <= set(pitboss.FORMATS)
    for name, row in pitboss.FORMATS.items():
        assert row.fold is getattr(pitboss, f"fold_{name}")
        talk = pitboss.Talk()
        pitboss.fold_line(talk, b"", name)
        pitboss.fold_line(talk, b"\xff\xfe{", name)
        assert talk.result is None, "rubbish is no result"


def test_prices_are_what_each_kind_of_token_costs():
    for name, prices in pitboss.PRICES.items():
        into, out, read, creation = prices
        assert 0 < read < into < creation < out
        assert pitboss.price_usd(f"claude-{name}-9", pitboss.Usage(1_000_000, 0, 0, 0)) == into
        assert pitboss.price_usd(name.upper(), pitboss.Usage(0, 2_000_000, 0, 0)) == 2 * out


def test_error_kinds_are_failure_kinds():
    for code, kind in pitboss.ERROR_KINDS.items():
        assert kind in pitboss.FAILURE_KINDS and re.fullmatch(r"[a-z_]+", code)
        talk = pitboss.Talk()
        talk.error, talk.result = code, {"is_error": True}
        assert pitboss.find_reason(talk, pitboss.Ending(1))["kind"] == kind


@pytest.mark.skipif(sys.platform != "linux",
                    reason="the numbers of signals are Linux's and macOS's common ones")
def test_signals_have_their_names():
    for number, name in pitboss.SIGNALS.items():
        assert signal.Signals(number).name == name
        assert pitboss.split_status(128 + number) == (None, number)
        assert name in pitboss.how_ended(pitboss.Ending(None, number))


# ------------------------------------------------------------------ RUN, DISPATCH

@functools.cache
def handlers() -> dict[str, ast.AST]:
    return {kind: functions()[row.handler.__name__] for kind, row in pitboss.EVENTS.items()}


def reached_from(function: ast.AST) -> list[ast.AST]:
    """A function and the functions of RUN that it calls, all the way."""
    every, found, todo = functions(), {}, [function]
    while todo:
        f = todo.pop()
        if f.name not in found:
            found[f.name] = f
            todo += [every[x.id] for x in ast.walk(f) if isinstance(x, ast.Name) and x.id in every]
    return list(found.values())


def verbs_owed(function: ast.AST) -> set[str]:
    """The first argument of each call of owe(run, VERB, ...); a name stands for the texts it is given."""
    verbs = set()
    for call in calls_of(function, "owe"):
        verb = call.args[1]
        given = [x.value for x in ast.walk(function) if isinstance(x, ast.Assign)
                 and getattr(x.targets[0], "id", "") == getattr(verb, "id", None)]
        for value in given or [verb]:
            branches = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            verbs |= {b.value for b in branches}
    return verbs


def verbs_paid(function: ast.AST) -> set[str]:
    """The verbs of each run.owed.pop((VERB, actor), None)."""
    paid = set()
    for call in calls_of(function, "pop"):
        if isinstance(call.func.value, ast.Attribute) and call.func.value.attr == "owed":
            verb = call.args[0].elts[0]
            loops = [x.iter for x in ast.walk(function) if isinstance(x, ast.For)
                     and getattr(x.target, "id", "") == getattr(verb, "id", None)]
            paid |= texts_of(loops[0]) if loops else {verb.value}
    return paid


JOURNAL_WRITERS = ("Dispatcher.", "open_journal")       # what they append is an event


def section_name(node: ast.AST) -> str:
    """The name of the section that a node stands in."""
    return PROGRAM.sections[PROGRAM.section_of(node)].name


@functools.cache
def recorded(pit: bool = False) -> dict[str, set[str]]:
    """The kinds of events that each function records: in a run's journal, or with `pit` in a session's."""
    kinds = {}
    for name, function in functions().items():
        if (section_name(function) == "PIT") is not pit:
            continue
        calls = calls_of(function, "record") + (calls_of(function, "append") if name.startswith(JOURNAL_WRITERS)
                                                else [])
        found = {c.args[0].value for c in calls if c.args and isinstance(c.args[0], ast.Constant)
                 and isinstance(c.args[0].value, str)}
        if found:
            kinds[name] = found
    return kinds


def kinds_made(name: str) -> set[str]:
    """The kinds of the events that the functions of a section make, as dicts with a `kind`."""
    section = [s.name for s in PROGRAM.sections].index(name)
    nodes = [n for n in PROGRAM.tree.body if isinstance(n, FUNCTIONS) and PROGRAM.section_of(n) == section]
    return {value.value for n in nodes for x in ast.walk(n) if isinstance(x, ast.Dict)
            for key, value in zip(x.keys, x.values) if getattr(key, "value", None) == "kind"}


def test_events_are_exactly_what_is_recorded():
    written = set().union(*recorded().values())
    shared = kinds_made("SHARED")
    assert shared == set(pitboss.SHARED_EVENTS) and not shared & written
    passing = {name for name, f in functions().items() for call in calls_of(f, "record")
               if any(word.arg is None for word in call.keywords) and not call.args}
    assert passing == {"record_verdict", "Dispatcher.settle_leases", "drop_wait", "tool_spawn_sublead"}, "they record what SHARED decided"
    assert written | shared == set(pitboss.EVENTS)
    for kind, row in pitboss.EVENTS.items():
        assert row.handler is (pitboss.on_shared if kind in shared else getattr(pitboss, f"on_{kind}"))
        assert list(inspect.signature(row.handler).parameters) == ["run", "event"]
    for kind, row in pitboss.SHARED_EVENTS.items():
        assert row.handler is getattr(pitboss, f"on_{kind}")
        assert list(inspect.signature(row.handler).parameters) == ["shared", "event"]
        assert pitboss.EVENTS[kind].durable == row.durable
    handlers = {n for n, f in functions().items() if n.startswith("on_") and section_name(f) != "LOOP"}
    assert handlers == {"on_shared", *(f"on_{kind}" for kind in pitboss.EVENTS)}, \
        "a handler without a row"


def test_every_verb_that_is_owed_has_an_effect_and_is_paid():
    owed = set().union(*(verbs_owed(f) for h in handlers().values() for f in reached_from(h)))
    paid = set().union(*(verbs_paid(f) for h in handlers().values() for f in reached_from(h)))
    assert owed == paid == set(pitboss.EFFECTS)
    for verb, row in pitboss.EFFECTS.items():
        assert row.run is getattr(pitboss.Dispatcher, f"effect_{verb}")
    assert {f"effect_{v}" for v in pitboss.EFFECTS} == {n for n in vars(pitboss.Dispatcher)
                                                        if n.startswith("effect_")}


RECORDED_ELSEWHERE = {
    # effect: what it calls or waits for, and that records it
    "stop":    ["effect_watch"],           # a hand that is stopped is watched to its end
    "spawn":   ["find_spawned"],
    "deliver": ["note_delivered"],         # when the agent's log echoes the message
}


def test_every_effect_records_that_it_has_happened():
    """What pays for a verb is recorded by its effect, or by what the effect calls or waits for."""
    for verb in pitboss.EFFECTS:
        paying = {kind for kind,
                  h in handlers().items() if verb in set().union(*map(verbs_paid, reached_from(h)))}
        names = {f"Dispatcher.effect_{verb}", *(f"Dispatcher.{n}" for n in RECORDED_ELSEWHERE.get(verb, ()))}
        assert names <= functions().keys()
        assert paying & set().union(*(recorded().get(n, set()) for n in names)), verb


def test_what_destroys_or_publishes_waits_for_the_disk():
    assert {verb for verb, row in pitboss.EFFECTS.items() if row.waits} == {"close", "finish", "notify"}


def test_act_is_the_only_caller_of_effects():
    users = {}
    for name, function in functions().items():
        for x in ast.walk(function):
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Subscript) \
                    and getattr(x.value.value, "id", "") == "EFFECTS":
                users.setdefault(x.attr, set()).add(name)
        assert not any(isinstance(x, ast.Attribute) and x.attr.startswith("effect_")
                       for x in ast.walk(function)), \
            f"{name} calls an effect itself"
        plain = [x for x in ast.walk(function) if isinstance(x, ast.Name) and x.id == "EFFECTS"]
        known = [x for x in ast.walk(function) if isinstance(x, ast.Subscript)
                 and getattr(x.value, "id", "") == "EFFECTS"]
        assert len(plain) == len(known), f"{name} reads EFFECTS in another way"
    assert users == {"run": {"Dispatcher.act"}, "waits": {"Dispatcher.record"}}


CHANGING = {"append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault",
            "update", "add"}


def writes_to_run(function: ast.AST) -> set[str]:
    """The tables of a RunState that a function assigns to, deletes from, or changes by a method."""
    tables, found = set(vars(pitboss.RunState())), set()

    def is_table(x: ast.AST) -> bool:
        return isinstance(x, ast.Attribute) and x.attr in tables and (
            getattr(x.value, "id", None) == "run" or getattr(x.value, "attr", None) == "run")

    for x in ast.walk(function):
        targets = x.targets if isinstance(x, (ast.Assign, ast.Delete)) else [x.target] if isinstance(
            x, (ast.AugAssign, ast.AnnAssign)) else []
        targets = [y for t in targets for y in (t.elts if isinstance(t, ast.Tuple) else [t])]
        targets = [t.value if isinstance(t, ast.Subscript) else t for t in targets]
        if isinstance(x, ast.Call) and isinstance(x.func, ast.Attribute) and x.func.attr in CHANGING:
            targets.append(x.func.value)
        found |= {t.attr for t in targets if is_table(t)}
    return found


def test_only_the_handlers_of_events_write_to_a_run():
    allowed = {f.name for h in handlers().values() for f in reached_from(h)} | {"step", "fold"}
    writers = {name: tables for name, function in functions().items() if (tables := writes_to_run(function))}
    assert writers.keys() >= {"on_closed", "fill_slots", "owe", "change", "step"}, "the search is not blind"
    others = {name: tables for name, tables in writers.items() if name not in allowed}
    # `fresh` is a list of notes for the dispatcher, which takes it
    assert {name: tables - {"fresh"} for name, tables in others.items() if tables - {"fresh"}} == {}


# ------------------------------------------------------------------ PROCESS, AGENTS

def make_deal(how: str = "prompt", agent: str = "claude", **facts) -> pitboss.Deal:
    task = pitboss.Task("t", "/w/sub", "/the secret prompt", None, agent, "claude-haiku-4-5", "low",
                        ("Read", "Bash(git log *)", "mcp__x__y"), 60, True, {}, 0)
    return pitboss.Deal(**{"task": task, "program": ("/bin/prog",), "how": how, "session_id": "11111111-2222",
                           "message_id": "m", "root": "/w", "cwd": "/w/sub", "prompt_file": "/r/prompt.txt",
                           "mcp_config": "/r/mcp.json", "sessions": "/s", "superuser": True, **facts})


def test_executors_have_the_same_columns():
    shapes = {"start": ["launch"], "find": ["task_dir", "hand", "marker"], "is_alive": ["handle"],
              "wait": ["loop", "handle"], "interrupt": ["table", "handle"]}
    assert tuple(shapes) == pitboss.Executor._fields
    for name, row in pitboss.EXECUTORS.items():
        for column, parameters in shapes.items():
            assert list(inspect.signature(getattr(row, column)).parameters) == parameters, f"{name}.{column}"


def test_an_executor_is_named_in_its_table_only():
    """Outside its own section a hand is handled through EXECUTORS, whatever runs it."""
    own = {getattr(row, column).__name__ for row in pitboss.EXECUTORS.values() for column in row._fields}
    names = [s.name for s in PROGRAM.sections]
    for node in PROGRAM.tree.body:
        if PROGRAM.section_of(node) != names.index("PROCESS"):
            used = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & own
            assert not used, f"line {node.lineno} names {used}"


def test_agents_are_started_without_their_prompt_in_sight():
    for name, row in pitboss.AGENTS.items():
        assert row.name == name and row.format in pitboss.FORMATS and row.input in ("stream", "prompt",
                                                                                    "none")
        deal = make_deal(agent=name)
        argv, env = [str(word) for word in row.argv(deal)], row.env(deal)
        assert argv[0] == "/bin/prog" and "secret prompt" not in " ".join(argv)
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in env.items())
        assert not row.interrupt or json.loads(row.interrupt)
        if row.resumes:
            for how in ("prompt", "afresh", "resume", "again"):
                argv, goes_on = row.argv(make_deal(how, name)), how in ("resume", "again")
                assert ("11111111-2222" in argv) == (goes_on or row.names_session)
                assert argv != row.argv(make_deal("prompt" if goes_on else "resume", name))
        assert set(row.ignores) <= {f.name for f in pitboss.LEAD_FIELDS} | set(pitboss.TABLES)
        assert (row.model_form[0] == "") == (row.model_form[1] == "") and bool(row.measured) == bool(row.version)
        said = pitboss.limits_of(row)
        assert all(f"{key}: no effect" in said or key in said for key in row.ignores)
    known = next(f.help for f in pitboss.ACTOR_FIELDS if f.name == "agent")
    assert all(f"`{name}`" in known for name in pitboss.AGENTS)


# ------------------------------------------------------------------ RUN: records

def test_record_keys_are_those_of_every_record():
    events = [{"seq": 1, "at": 1.0, "kind": "run_opened", "run_id": "r", "name": "n", "mode": "flat", "max_parallel": 1},
              {"seq": 2, "at": 2.0, "kind": "actor_added", "actor": "a", "role": "task", "agent": "demo", "model": "m",
               "directory": "/", "use_worktree": False, "timeout_s": 1.0, "branch": None}]
    run = pitboss.fold(events)
    record = pitboss.record_of(run, run.actors["a"], "log")
    assert set(record) == set(pitboss.RECORD_KEYS)
    assert pitboss.read_record(record) == record
    empty = pitboss.read_record({"task_id": "a"})
    assert set(empty) == set(record) and set(empty["token_usage"]) == set(record["token_usage"])
    for key in pitboss.RECORD_KEYS:
        odd = pitboss.read_record({"task_id": "a", key: object()})
        assert odd is None if key == "task_id" else odd[key] == empty[key]
    assert pitboss.read_record({"task_id": "a", "cost_usd": float("nan")})["cost_usd"] is None
    for value in (None, 5, "x", [], {}, {"task_id": ""}):
        assert pitboss.read_record(value) is None


# ------------------------------------------------------------------ VIEWS, DEMO, COMMANDS

LOG_SAMPLES = {
    ">": {"type": "assistant", "message": {"content": [{"type": "text", "text": "hello"}]}},
    "*": {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {}}]}},
    "<": {"type": "user", "message": {"content": [{"type": "tool_result", "content": "done"}]}},
    "v": {"type": "result", "result": "it is done", "total_cost_usd": 0.5},
    "!": {"type": "result", "is_error": True, "errors": ["no"]},
}


@pytest.mark.parametrize("tool", pitboss.TOOLS)
def test_a_tool_is_shown_to_models(tool):
    """claude drops a tool whose arguments' schema has one of these at its top: the model never sees it."""
    row = pitboss.TOOLS[tool]
    shown = next(t for t in pitboss.tools_of(row.roles[0], EVERY_FACT) if t["name"] == tool)["inputSchema"]
    assert shown["type"] == "object"
    assert not {"allOf", "anyOf", "oneOf", "not", "if"} & set(shown)
    assert set(shown["properties"]) == {f.name for f in row.fields}
    assert shown["required"] == [f.name for f in row.fields if f.default is pitboss.REQUIRED]


EVERY_FACT = frozenset(t.needs for t in pitboss.TOOLS.values())        # of a run that has every tool
SPEC_TOOLS = {
    # arguments, `?` for those that may be left out: keys of the result
    "spawn_worker": ("prompt directory? branch? tools? timeout_secs? model? agent? env?", "task_id worktree_path"),
    "spawn_sublead": ("prompt model budget_usd? max_workers? lead_timeout_secs? read_down? initial_ref? env? tools? "
                      "resume_session_id?", "sublead_id"),
    "worker_status": ("task_id", "state started_at partial_usage cost_usd last_text_preview prompt_preview"),
    "wait_for_worker": ("task_id timeout_secs?", "settled state ..."),
    "wait_actor": ("actor_id timeout_secs?", "Worker Sublead settled state"),
    "wait_for_any": ("task_ids timeout_secs?", "task_id record settled states"),
    "list_workers": ("", "workers subleads"),
    "cancel_worker": ("task_id reason?", "ok"),
    "pause_worker": ("task_id mode?", "ok"),
    "continue_worker": ("task_id prompt?", "ok"),
    "reprompt_worker": ("task_id prompt", "ok delivery"),
    "budget_status": ("", "budget_usd spent_usd reserved_usd workers_live max_workers"),
    "request_approval": ("summary timeout_secs? ttl_secs? fallback? plan? tool_name? cost_estimate?",
                         "approved comment edited_summary reason from_ttl"),
    "propose_plan": ("plan timeout_secs? cost_estimate?", "approved comment edited_summary reason from_ttl"),
    "permission_prompt": ("tool_name input tool_use_id?", ""),
    "kv_get": ("path", "entry"),
    "kv_set": ("path value override_flag?", "version"),
    "kv_cas": ("path expected_version new_value override_flag?", "version swapped"),
    "kv_delete": ("path override_flag?", "existed"),
    "kv_list": ("glob", "entries truncated total_matched"),
    "kv_wait": ("path timeout_secs min_version?", "entry settled"),
    "lease_acquire": ("name ttl_secs wait_secs?", "acquired lease_id version holder acquired_at expires_at"),
    "lease_release": ("lease_id", "ok"),
    "lease_list": ("", "leases"),
    "run_lease_acquire": ("key ttl_secs wait_secs?", "acquired lease_id version holder acquired_at expires_at"),
    "run_lease_release": ("lease_id? key?", "ok"),
}
SPEC_OPS = {
    "list_workers": "", "cancel_worker": "task_id reason?", "cancel_run": "reason?", "pause_worker": "task_id mode?",
    "continue_worker": "task_id prompt?", "reprompt_worker": "task_id prompt",
    "approve": "request_id approved comment? edited_summary? reason? interrupt?", "update_policy": "rules",
}


def arguments_of(fields: tuple) -> str:
    return " ".join(f.name + ("" if f.default is pitboss.REQUIRED else "?") for f in fields)


def test_tools_are_whole_and_shown_to_those_who_may_call_them():
    assert set(SPEC_TOOLS) == set(pitboss.TOOLS)
    shown = {role: {t["name"]: t for t in pitboss.tools_of(role, EVERY_FACT)}
             for role in ("lead", "sublead", "worker", "task")}
    plain = {role: {t["name"] for t in pitboss.tools_of(role)} for role in shown}
    assert all(plain[role] == {n for n in shown[role] if not pitboss.TOOLS[n].needs} for role in shown)
    assert {t.name for t in pitboss.TOOLS.values() if t.needs} == {"permission_prompt", "spawn_sublead"}
    assert shown["task"] == {} and list(shown["lead"]) == list(pitboss.TOOLS)
    assert set(shown["worker"]) == {name for name in SPEC_TOOLS if re.match("kv_|(run_)?lease_|permission_", name)}
    for name, row in pitboss.TOOLS.items():
        arguments, result = SPEC_TOOLS[name]
        assert row.name == name and re.fullmatch(r"[a-z]+(_[a-z]+)*", name) and row.roles and row.title
        assert is_sentence_part(row.help) and not row.title.endswith(".") and row.run.__doc__
        assert row.run.__name__.startswith("tool_") and list(inspect.signature(row.run).parameters) == [
            "dispatcher", "actor", "args", "call"]
        assert (arguments_of(row.fields), " ".join(row.result)) == (arguments, result), name
        assert row.read_only == bool(re.search("spawn|wait|status|list|get", name)), name
        for role, tools in shown.items():
            assert (name in tools) == (role in row.roles)
        told = shown["lead"][name]
        assert told["description"].lower() == row.help.lower() + "." and told["title"] == row.title
        assert told["annotations"] == {"title": row.title, "readOnlyHint": row.read_only}
        assert told.get("outputSchema") == (pitboss.result_schema(row.result) if row.result else None)
        assert bool(row.result) != bool(row.render), "what is no object has no schema"
        given, whole = told["inputSchema"], pitboss.schema_of(row.fields)
        assert given["additionalProperties"] is False
        assert given["properties"] == {f.name: whole["properties"][f.name] for f in row.fields}
        for schema in filter(None, (given, told.get("outputSchema"))):
            assert list(schemas_in(schema)) and set(schema["required"]) <= set(schema["properties"]), name
    handlers_there = {n for n in functions() if n.startswith("tool_")}
    assert handlers_there == {row.run.__name__ for row in pitboss.TOOLS.values()}, "a handler without a row"


@pytest.mark.parametrize("word, good, bad", [
    ("text", ["a"], [None, 1]), ("text?", ["a", None], [1]), ("flag", [True], [0, None]), ("count", [1], [1.5, True]),
    ("number?", [1.5, None], ["1"]), ("object", [{}], [[], None]), ("object[]", [[], [{}]], [{}, [1], None]),
    ("any", [1, None, "a", {}], [])])
def test_a_result_is_what_its_schema_says(word, good, bad):
    schema = pitboss.result_schema({"x": word})
    assert [v for v in good if faults(schema, {"x": v})] == [] and [v for v in bad if not faults(schema, {"x": v})] == []
    assert bool(faults(schema, {})) == (not word.endswith("?"))
    assert faults(schema, {"x": good[0], "y": 1}) and not faults(pitboss.result_schema({"x": word, "...": ""}),
                                                                 {"x": good[0], "y": 1})


def test_operations_are_whole():
    assert {name: arguments_of(row.fields) for name, row in pitboss.OPS.items()} == SPEC_OPS
    for name, row in pitboss.OPS.items():
        assert row.run is getattr(pitboss, f"op_{name}") and row.run.__doc__ and is_sentence_part(row.help)
        assert list(inspect.signature(row.run).parameters) == ["dispatcher", "message"]
        for f in row.fields:        # the same words as the tool that does the same
            tool = pitboss.TOOLS.get(name)
            assert not tool or {(g.kind, g.choices, g.default) for g in tool.fields if g.name == f.name} == {
                (f.kind, f.choices, f.default)}, f"{name}.{f.name}"
    assert {n for n in functions() if n.startswith("op_")} == {f"op_{name}" for name in pitboss.OPS}


def test_events_of_pit_are_exactly_what_is_recorded():
    decided = {c.value for name, f in functions().items() if section_name(f) == "LOOP" and name.startswith("decide_")
               for t in ast.walk(f) if isinstance(t, ast.Tuple) for c in t.elts[:1] if isinstance(c, ast.Constant)}
    written = set().union(*recorded(pit=True).values()) | decided & set(pitboss.PIT_EVENTS)
    assert written | {"daemon_left"} == set(pitboss.PIT_EVENTS), "daemon_left is appended when all is over"
    handlers = {n for n, f in functions().items() if n.startswith("on_") and section_name(f) == "LOOP"}
    assert handlers == {f"on_{kind}" for kind in pitboss.PIT_EVENTS}, "a handler without a row"
    for kind, row in pitboss.PIT_EVENTS.items():
        assert row is getattr(pitboss, f"on_{kind}")
        assert list(inspect.signature(row).parameters) == ["state", "event"]
    phases = {name.removeprefix("effect_") for name in vars(pitboss.PitDaemon) if name.startswith("effect_")}
    assert phases == set(pitboss.PIT_EFFECTS)
    assert all(row.__doc__ for row in (*pitboss.PIT_METHODS.values(), *pitboss.PIT_NOTES.values()))


def test_log_marks_are_each_shown_for_something():
    assert set(LOG_SAMPLES) == set(pitboss.LOG_MARKS)
    for mark, (colour, what) in pitboss.LOG_MARKS.items():
        assert colour in pitboss.COLOURS and is_sentence_part(what)
        shown = pitboss.render_log_line(json.dumps(LOG_SAMPLES[mark]).encode(), "claude")
        assert [m for m, _ in shown] == [mark]
        assert {m for m,
                _ in pitboss.render_log_line(b'{"type": "assistant"}', "claude")} <= set(pitboss.LOG_MARKS)


def test_steps_are_named_by_their_first_word():
    for name, step in pitboss.STEPS.items():
        assert step.usage.split()[0] == name and is_sentence_part(step.meaning)
        assert step.run is getattr(pitboss.DemoAgent, f"step_{name}")
    methods = {n.removeprefix("step_") for n in vars(pitboss.DemoAgent) if n.startswith("step_")}
    assert methods == set(pitboss.STEPS)
    used = {line.split()[1] for line in pitboss.render_demo().splitlines() if line.startswith("$ ")}
    assert used <= set(pitboss.STEPS) | {"loop", "end"}
    assert set(pitboss.DEMO_EXPECTED.values()) <= set(pitboss.STATUSES)


def test_commands_parse_their_own_examples():
    assert {n.removeprefix("cmd_").replace("_", "-") for n in functions()
            if n.startswith("cmd_")} == set(pitboss.COMMANDS)
    for name, row in pitboss.COMMANDS.items():
        assert row.name == name and row.run.__name__ == "cmd_" + name.replace("-", "_") and row.run.__doc__
        assert bool(row.help) == bool(row.example), f"{name}: what is shown has an example"
        named = [options for flags,
                 options in row.args if not flags[0].startswith("-") and "metavar" in options]
        wanted = [f"[{o['metavar']}]" if o.get("nargs") == "?" else o["metavar"] for o in named]
        assert row.usage.split() == wanted
        for flags, options in row.args:
            assert not row.help or is_sentence_part(options["help"]), f"{name} {flags}"
        if row.help:
            assert is_sentence_part(row.help)
            assert pitboss.parse_command(shlex.split(row.example), "pitboss")[0] == name
            assert row.help in pitboss.make_parser("pitboss", "").format_help()


def test_the_reference_has_a_row_for_everything():
    text = pitboss.render_reference()
    words = [f.name for _, f in all_fields()] + [f"| `{name}` |" for name in (*pitboss.TOOLS, *pitboss.OPS)]
    words += [*pitboss.STATUSES, *pitboss.AGENTS, *(str(code) for code, _ in pitboss.EXIT_CODES.values())]
    words += [c.name for c in pitboss.COMMANDS.values() if c.help] + [f"$ {s.usage}"
                                                                      for s in pitboss.STEPS.values()]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [w for w in words if not any(w in row for row in rows)] == []
    widths = {line.replace("\\|", "").count("|") for line in rows}
    assert widths <= {3, 4, 5}, "a bar in a cell is escaped"


def test_the_map_says_where_to_add_to_tables_that_exist():
    told = pitboss.__doc__.partition("Where do I add")[2]
    tables = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", told)) - {"FIELDS"}
    assert tables and [t for t in tables if not hasattr(pitboss, t)] == []

