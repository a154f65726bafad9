"""A wrong value is found where it stands, told in its author's words, and never stops the search for more."""
from __future__ import annotations

import json
import random
import subprocess

import pytest

import pitboss
from pitboss import REQUIRED, Field

SAMPLE = (
    Field("name", "text", REQUIRED, "what it is called", pattern=r"[a-z]+"),
    Field("size", "count", 3, "how big it is", also=("extent",), low=1, high=9),
    Field("price", "number", None, "what it costs", above=0, shown="nothing"),
    Field("colour", "text", "red", "how it looks", choices=("red", "green")),
    Field("parts", "texts", (), "what it is made of"),
)


def check(given: dict) -> tuple[dict, list[str]]:
    values, problems = pitboss.check_fields(SAMPLE, given, "thing.", ("thing",))
    return values, [f"{p.path}: {p.message}" for p in problems]


def test_what_is_missing_gets_its_default():
    assert check({"name": "a"}) == ({"name": "a", "size": 3, "price": None, "colour": "red", "parts": ()}, [])


def test_every_problem_is_told_at_once_and_the_rest_goes_on_with_defaults():
    values, problems = check({"nmae": "a", "size": 0, "colour": "gren", "parts": ["x", 1], "price": 2})
    assert values == {"name": None, "size": 3, "price": 2, "colour": "red", "parts": ()}
    assert problems == [
        "thing.nmae: unknown key; did you mean name?",
        "thing.name: is required: what it is called",
        "thing.size: found 0; allowed: an integer from 1 to 9",
        "thing.colour: found \"gren\"; allowed: one of red, green; did you mean green?",
        "thing.parts: found [\"x\", 1]; allowed: a list of texts",
    ]


def test_two_spellings_mean_the_same():
    assert check({"name": "a", "extent": 5})[0]["size"] == 5
    assert check({"name": "a", "extent": 5, "size": 5})[1] == []
    assert check({"name": "a", "extent": 3.0, "size": 3})[1] == [
        "thing.extent: found 3.0; allowed: an integer from 1 to 9"]
    assert check({"name": "a", "extent": 5, "size": 0})[0]["size"] == 5
    assert check({"name": "a", "extent": 5, "size": 4})[1] == [
        "thing.extent: found 5, but thing.size, which means the same, is 4; allowed: one of them"]


@pytest.mark.parametrize("field, value, allowed", [
    (SAMPLE[0], "A", "a text matching [a-z]+ without NUL"),
    (SAMPLE[0], "", "a text matching [a-z]+ without NUL"),
    (SAMPLE[1], True, "an integer from 1 to 9"),
    (SAMPLE[1], 10, "an integer from 1 to 9"),
    (SAMPLE[1], 2.0, "an integer from 1 to 9"),
    (SAMPLE[2], 0, "a number > 0"),
    (SAMPLE[2], float("nan"), "a number > 0"),
    (SAMPLE[2], float("inf"), "a number > 0"),
    (SAMPLE[2], "1", "a number > 0"),
    (SAMPLE[3], "blue", "one of red, green"),
    (SAMPLE[4], "x", "a list of texts"),
])
def test_what_is_allowed(field, value, allowed):
    assert pitboss.wrong_value(field, value) == allowed


@pytest.mark.parametrize("value, shown", [
    ("a", '"a"'), (1, "1"), (True, "true"), (None, "null"), ([1, "ä"], '[1, "ä"]'), ("a\nb\x1b[31m", '"a b"'),
])
def test_found_values_are_shown_as_their_author_knows_them(value, shown):
    assert pitboss.show_value(value) == shown


def test_a_long_value_is_shown_with_both_ends():
    shown = pitboss.show_value("/begin/" + "x" * 500 + "/end")
    assert shown.startswith('"/begin/') and shown.endswith('/end"') and len(shown) < 120
    assert len(pitboss.show_value(["x" * 50] * 50)) <= 100


def test_a_reference_has_a_row_a_field():
    assert pitboss.reference_of(SAMPLE).splitlines()[2:] == [
        "| `name` | a text matching [a-z]+ | required | what it is called |",
        "| `size` (`extent`) | an integer from 1 to 9 | `3` | how big it is |",
        "| `price` | a number > 0 | nothing | what it costs |",
        "| `colour` | one of red, green | `\"red\"` | how it looks |",
        "| `parts` | a list of texts | `[]` | what it is made of |",
    ]


def test_a_schema_says_what_the_check_enforces():
    schema = pitboss.schema_of(SAMPLE)
    assert schema["required"] == ["name"] and schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"name", "size", "extent", "price", "colour", "parts"}
    assert schema["properties"]["size"] == {"type": "integer", "description": "how big it is", "minimum": 1, "default": 3,
                                            "maximum": 9}
    assert json.loads(json.dumps(schema)) == schema


# ------------------------------------------------------------------ where a key stands

DOCUMENT = '''# a comment with [brackets] and key = 1
[run]
name = "x"      # [[task]]

[[task]]
id = "a"
prompt = """
[[task]]
id = "not one"
"""
tools = [
  "id = 1",   # ]
  ["nested"],
]
directory = "/tmp"
[task.env]
A = "[b]"
"B C" = 'x'

[[ task ]]
"id" = "b"
prompt = \'\'\'one
two\'\'\'
env.X = "1"
vars = { a = "{", b = "]" }
branch = "late"

[agent."my agent"]
command = ["x"]
'''


def test_every_key_is_found_on_its_line():
    lines = DOCUMENT.splitlines()
    found = pitboss.locate_keys(DOCUMENT)
    wanted = {
        ("run",): "[run]", ("run", "name"): "name =", ("task", 0): "[[task]]", ("task", 0, "id"): 'id = "a"',
        ("task", 0, "prompt"): 'prompt = """', ("task", 0, "tools"): "tools",
        ("task", 0, "directory"): "directory",
        ("task", 0, "env"): "[task.env]", ("task", 0, "env", "A"): "A =", ("task", 0, "env", "B C"): '"B C"',
        ("task", 1): "[[ task ]]", ("task", 1, "id"): '"id" = "b"', ("task", 1, "prompt"): "prompt = '''one",
        ("task", 1, "env", "X"): "env.X", ("task", 1, "vars"): "vars", ("task", 1, "branch"): "branch",
        ("agent", "my agent"): "[agent.", ("agent", "my agent", "command"): "command",
    }
    assert set(found) == set(wanted)
    assert {k: v for k, v in wanted.items() if not lines[found[k] - 1].startswith(v)} == {}


def test_a_key_that_is_missing_is_told_by_the_table_around_it():
    found = pitboss.locate_keys(DOCUMENT)
    assert pitboss.find_line(("task", 1, "timeout_secs"), found) == found["task", 1]
    assert pitboss.find_line(("lead",), found) is None


# ------------------------------------------------------------------ branches, templates

BRANCHES = ("main", "a/b", "feature/x-1", "ümlaut", "a.b", "a@b", "x{y}", "HEAD", "", "-x", ".x", "a/.b",
            "a..b", "a b", "a~1",
            "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a.lock", "a.lock/b", "a/", "/a", "a//b", "a.", "a@{b",
            "a\x7f", "a\tb", "x.lockd",
            "refs/heads/x", "@x", "a/-b")


def test_a_branch_name_is_what_git_takes():
    for name in BRANCHES:
        git = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True, check=False)
        told = pitboss.wrong_branch(name)
        assert bool(told) == bool(git.returncode), (name, told)
        json.dumps(told)


@pytest.mark.parametrize("template, values, prompt, problems", [
    ("do {what}", {"what": "it"}, "do it", []),
    ("{{what}} is {what}", {"what": "{x}"}, "{what} is {x}", []),
    ("{ not } {1} {} {a-b} {x.y} JSON {\"k\": 1}", {}, "{ not } {1} {} {a-b} {x.y} JSON {\"k\": 1}", []),
    ("{a}{a}", {"a": "1"}, "11", []),
    ("{a} {b}", {"a": "1"}, None, ["task[0].vars.b"]),
    ("{a}", {"a": "1", "c": "2"}, None, ["task[0].vars.c"]),
    ("{{a}}", {"a": "1"}, None, ["task[0].vars.a"]),
    ("{a}", {"a": "  "}, None, ["task[0].prompt"]),
    ("{ä}", {}, "{ä}", []),
])
def test_places_of_a_template(template, values, prompt, problems):
    row = {"template": "t", "vars": values}
    text, found = pitboss.fill_template(row, {"t": template}, "task[0].", ("task", 0))
    assert [p.path for p in found] == problems
    assert prompt is None or text == prompt


# ------------------------------------------------------------------ a whole manifest

WHOLE = '''
[run]
name = "x"
max_parallel = 3
[defaults]
agent = "demo"
env = { A = "1", B = "2" }
[[template]]
id = "t"
prompt = "Say {what}."
[[mcp_server]]
id = "s"
command = "server"
[agent.own]
command = ["sh", "-c", "true"]
[[task]]
id = "a"
directory = "sub"
template = "t"
vars = { what = "hello" }
env = { B = "3" }
[[task]]
id = "b"
directory = "/abs"
prompt = "Do it."
agent = "own"
timeout_secs = 5
use_worktree = false
tools = []
'''


def read(text: str, **env: str) -> pitboss.Manifest:
    return pitboss.read_manifest(text.encode(), "m.toml", stem="m", env=env, expand=lambda path: f"<{path}>",
                                 agents=pitboss.AGENTS)


def test_a_manifest_is_resolved_so_that_nothing_is_left_to_defaults():
    found = read(WHOLE)
    assert found.problems == () and found.warnings == ()
    assert found.rules == pitboss.Rules("x", 3, False, None, None, False, (), "on_success", False, 0, None,
                                         "block", False, False)
    defaults = {f.name: f.default for f in pitboss.ACTOR_FIELDS}
    a, b = found.tasks
    assert a == pitboss.Task("a", "<sub>", "Say hello.", None, "demo", defaults["model"], "high",
                             defaults["tools"], 3600,
                             True, {"A": "1", "B": "3"}, 0)
    assert (b.agent, b.timeout_s, b.use_worktree, b.tools, b.env) == ("own", 5, False, (),
                                                                      {"A": "1", "B": "2"})
    assert found.servers == (pitboss.Server("s", "server", (), {}),)
    assert found.agents == {"own": pitboss.Command(("sh", "-c", "true"), "text")}


def test_the_environment_counts_only_where_the_manifest_is_silent():
    silent = WHOLE.replace("max_parallel = 3", "")
    assert read(silent, ANTHROPIC_MAX_CONCURRENT="7").rules.max_parallel == 7
    assert read(WHOLE, ANTHROPIC_MAX_CONCURRENT="7").rules.max_parallel == 3
    assert read(silent).rules.max_parallel == 4
    for senseless in ("0", "-1", "x", "1.5", "9999999", " 7"):
        assert [p.path for p in read(silent, ANTHROPIC_MAX_CONCURRENT=senseless).problems] == [
            "environment variable ANTHROPIC_MAX_CONCURRENT"]
        assert read(WHOLE, ANTHROPIC_MAX_CONCURRENT=senseless).problems == ()


@pytest.mark.parametrize("text", [b"\xff", b"a = ", b"x" * 100, b"[" * 5000, b"a = " + b"[" * 100_000,
                                  b"\xef\xbb\xbf[[[", b"a = 1" + b"0" * 5000], ids=range(7))
def test_what_is_no_toml_is_refused_in_words(text):
    with pytest.raises(pitboss.InvalidInput) as error:
        pitboss.read_manifest(text, "m.toml", stem="m", env={}, expand=str, agents=pitboss.AGENTS)
    assert str(error.value).startswith("m.toml: ")


PIECES = ['""', '"\\u0000"', '"x"', "0", "-1", "1" + "0" * 400, "1.5", "nan", "inf", "true", "[]", '["a"]',
          "[1]", "{}",
          '{ a = "b" }', "{ a = 1 }",
          "1979-05-27", "[[]]", '"a(b)"', '"{x}"', '"own"', '"t"']


def test_whatever_stands_where_is_told_and_never_breaks_the_check():
    """Random values at random keys: only problems come out of it, each with its place and what is allowed."""
    chance = random.Random(5)
    lines = WHOLE.strip().splitlines()
    keys = [n for n, line in enumerate(lines) if " = " in line]
    told = 0
    for _ in range(800):
        changed = list(lines)
        for n in chance.sample(keys, chance.randrange(1, 4)):
            changed[n] = f"{changed[n].split(' = ')[0]} = {chance.choice(PIECES)}"
        if chance.random() < 0.3:
            n = chance.choice(keys)
            changed[n] = chance.choice(("nonsense", "prompt", "template", "id",
                                        "vars")) + f" = {chance.choice(PIECES)}"
        text = "\n".join(changed)
        try:
            found = read(text)
        except pitboss.InvalidInput as error:      # a key twice
            assert str(error).startswith("m.toml: it is not TOML")
            continue
        where = pitboss.locate_keys(text)
        for problem in found.problems:
            told += 1
            line = pitboss.render_problem(problem, where, {})
            assert problem.path and problem.message and "\n" not in line
            assert problem.path == "task" or "line " in line or problem.path.startswith("environment"), line
    assert told > 500


def test_tables_of_a_wrong_shape_are_told():
    for name in pitboss.TABLES:
        for value in ('"x"', "1", "[]", "[1]", "{}", '{ x = 1 }', "[[]]", "true"):
            found = read(f"{name} = {value}")
            assert found.problems, (name, value)
