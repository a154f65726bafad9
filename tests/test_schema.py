"""Starters, the map of keys and the JSON schema say what the check enforces, and come from its tables alone."""
from __future__ import annotations

import functools
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import tomllib

import pytest

import pitboss
from json_schema import faults, schemas_in
from test_fields import PIECES, WHOLE
from tools import ISOLATED, PYTHON, ROOT, compiled, git, make_repo

MANIFESTS = sorted((ROOT / "tests" / "data" / "manifests").glob("*.toml"))
SCHEMA = json.loads(pitboss.render_manifest_schema())
STARTERS = [*pitboss.STARTERS.values(), pitboss.EXAMPLE]
VIEWS = (("schema",), ("schema", "--format", "example"), ("schema", "--format", "json-schema"), ("reference",))

# What `validate` knows and a JSON schema cannot say: a pattern of "path: message" each.
BEYOND = {
    "folders, repositories and commits": r"directory: found \".*\": (there is no|it is not|.*commit)",
    "an id that was there before": r"again, first in",
    "a branch that was there before": r"has in the same repository",
    "two spellings whose values differ": r"which means the same, is",
    "a template that is not defined": r"\.template: found \".*\"; allowed: (?!a text)",
    "an agent that is not defined": r"\.agent: found \".*\"; allowed: one of",
    "places of a template and vars": r" has a place | has no place | makes an empty prompt",
    "a float where JSON sees an integer": r"found [1-9]\d*\.0; allowed: an integer",
    "an infinity, which JSON does not have": r"found Infinity; allowed: a number",
    "a url that a kind of notification has or has not": r"(required|found) beside kind = ",
    "where a url may go": r"\.url: allowed: ",
    "a run that survives its parent unheard": r"survive_parent: found true without any",
    "an integer that TOML does not have": r"found -?\d{19,}…?; allowed: an? (integer|number)(?! from)",
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return make_repo(tmp_path_factory.mktemp("schema") / "repo")


def check(text: str, folder) -> tuple[pitboss.Manifest, list[pitboss.Problem]]:
    """A manifest of `folder` and everything that `validate` has against it."""
    manifest = pitboss.read_manifest(text.encode(), "m.toml", stem="m", env={}, agents=pitboss.AGENTS,
                                     expand=lambda path: pitboss.expand_path(str(folder), path))
    return manifest, [*manifest.problems, *pitboss.check_places(manifest)]


def reason_of(problem: pitboss.Problem) -> str:
    """Why the schema may miss a problem; empty when it may not."""
    line = f"{problem.path}: {problem.message}"
    return next((reason for reason, shape in BEYOND.items() if re.search(shape, line)), "")


def compare(problems: list[pitboss.Problem], against: list[str]) -> str:
    """How the schema and `validate` disagree; empty when they agree as far as a schema can say."""
    sayable = [p for p in problems if not reason_of(p)]
    if bool(sayable) == bool(against):
        return ""
    return f"validate: {[(p.path, p.message) for p in sayable] or 'fine'}; schema: {against or 'fine'}"


# ------------------------------------------------------------------ the reading of JSON Schema

@pytest.mark.parametrize("schema, good, bad", [
    ({"type": "integer"}, [1, 2.0], [1.5, True, "1", float("inf"), float("nan")]),
    ({"type": "number"}, [1, 1.5], [True, "1", None]),
    ({"type": "boolean"}, [True], [1, "true"]),
    ({"type": ["string", "null"]}, ["a", None], [1, False, []]),
    ({"type": "object"}, [{}], [[]]),
    ({"enum": ["a", 1]}, ["a", 1], ["b", True]),
    ({"const": 1}, [1], [True, 2]),
    ({"pattern": "^a$"}, ["a", 5], ["a\n", "ba"]),
    ({"minLength": 1}, ["a", []], [""]),
    ({"minimum": 1, "maximum": 3}, [1, 3, "x"], [0, 4, float("nan")]),
    ({"exclusiveMinimum": 0}, [0.1], [0, float("nan")]),
    ({"minItems": 1}, [[1], ""], [[]]),
    ({"maxItems": 1}, [[1], [], "ab"], [[1, 2]]),
    ({"items": {"type": "string"}, "prefixItems": [{"minLength": 1}]}, [["a", ""], []], [[""], ["a", 1]]),
    ({"required": ["a"]}, [{"a": 1}, "x"], [{}]),
    ({"properties": {"a": {"type": "string"}}, "additionalProperties": False}, [{"a": ""}, {}],
     [{"a": 1}, {"b": ""}]),
    ({"propertyNames": {"pattern": "^a"}}, [{"ab": 1}], [{"b": 1}]),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1}], [{}, {"a": 1, "b": 1}]),
    ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1, "b": 1}], [{}]),
    ({"allOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1, "b": 1}], [{"a": 1}]),
    ({"not": {"const": 1}}, [2], [1]),
    ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, [{}, {"a": 1, "b": 1}], [{"a": 1}]),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else None)
def test_the_tests_read_a_schema_as_the_standard_says(schema, good, bad):
    assert [v for v in good if faults(schema, v)] == [] and [v for v in bad if not faults(schema, v)] == []
    list(schemas_in(schema))


def test_a_keyword_that_the_tests_cannot_read_is_refused():
    for schema in ({"format": "uri"}, {"properties": {"a": {"minProperties": 1}}}, {"items": {"$ref": "#"}},
                   {"allOf": [{"then": {"contains": {}}}]}):
        with pytest.raises(ValueError):
            list(schemas_in(schema))


# ------------------------------------------------------------------ schema and check agree

@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_judged_alike(repo, path):
    text = path.read_text(encoding="utf-8")
    _, problems = check(text, repo)
    assert bool(problems) == path.stem.startswith("bad_"), [(p.path, p.message) for p in problems]
    assert compare(problems, faults(SCHEMA, tomllib.loads(text))) == ""


def test_there_are_manifests_of_both_kinds_and_for_each_thing_that_a_schema_cannot_say(repo):
    judged = [check(path.read_text(encoding="utf-8"), repo)[1] for path in MANIFESTS]
    assert len(judged) >= 60 and sum(map(bool, judged)) >= 30 and sum(not p for p in judged) >= 20
    assert {path.stem.split("_")[0] for path in MANIFESTS} == {"good", "bad"}
    assert {reason_of(p) for problems in judged for p in problems} == {"", *BEYOND}


def test_another_reading_of_json_schema_agrees():
    jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    wrong = []
    for path in MANIFESTS:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        if validator.is_valid(document) == bool(faults(SCHEMA, document)):
            wrong.append(path.stem)
    # that package leaves patterns to Python, whose $ also matches before a last line end, and compares NaN
    assert wrong == ["bad_run_budget_nan", "bad_task_id_with_a_line_end"]


WHOLE_LEAD = """
[run]
name = "x"
max_workers = 3
[defaults]
agent = "demo"
[[lead]]
id = "a"
directory = "."
prompt = "Do it."
branch = "b"
budget_usd = 5.0
max_workers = 3
lead_timeout_secs = 60
dump_shared_store = true
"""


@pytest.mark.parametrize("whole", [WHOLE, WHOLE_LEAD], ids=["flat", "lead"])
def test_whatever_stands_where_is_judged_alike(repo, whole):
    """Random values at random keys, keys under other names, and lines left out."""
    chance = random.Random(11)
    lines = whole.replace('"sub"', '"."').replace('"/abs"', '"."').strip().splitlines()
    keys = [n for n, line in enumerate(lines) if " = " in line]
    names = sorted({name for fields, _, _ in pitboss.TABLES.values() for f in fields for name in (f.name, *f.also)})
    told = fine = 0
    for _ in range(800):
        changed = list(lines)
        for n in chance.sample(keys, chance.randrange(1, 4)):
            name, value = changed[n].split(" = ", 1)
            how = chance.random()
            changed[n] = ("" if how < 0.2 else f"{chance.choice(names)} = {value}" if how < 0.4
                          else f"{name} = {chance.choice(PIECES)}")
        text = "\n".join(changed)
        try:
            document, found = tomllib.loads(text), pitboss.read_manifest(
                text.encode(), "m.toml", stem="m", env={}, expand=str, agents=pitboss.AGENTS)
        except (pitboss.InvalidInput, ValueError):      # a key twice
            continue
        assert compare(list(found.problems), faults(SCHEMA, document)) == "", text
        told, fine = told + bool(found.problems), fine + (not found.problems)
    assert told > 250 and fine > 25


def test_the_schema_holds_every_key_under_every_name_and_no_other():
    assert set(SCHEMA["properties"]) == {*pitboss.TABLES, *pitboss.NOT_HERE}
    for table, (fields, _, what) in pitboss.TABLES.items():
        inside = SCHEMA["properties"][table]
        assert inside["description"] == what
        while "properties" not in inside:
            inside = inside.get("items") or inside.get("anyOf", [None])[0] or inside["additionalProperties"]
        assert set(inside["properties"]) == {name for f in fields for name in (f.name, *f.also)}
        assert inside["additionalProperties"] is False
        assert all(f.help in inside["properties"][name]["description"] for f in fields for name in (f.name, *f.also))
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for path, one in schemas_in(SCHEMA):        # in a form that other languages' patterns have, too
        assert not re.search(r"\(\?[^:]|\\[^snxu.{\[\]\\*?|/]", one.get("pattern", "")), path


# ------------------------------------------------------------------ starters

@pytest.mark.parametrize("starter", STARTERS, ids=lambda s: s.name)
@pytest.mark.parametrize("with_schema", [False, True])
def test_a_starter_is_valid_as_it_is(repo, starter, with_schema):
    text = pitboss.render_template(starter, with_schema)
    manifest, problems = check(text, repo)
    assert problems == [] and manifest.warnings == () and manifest.tasks
    assert manifest.mode == pitboss.mode_of(starter)
    assert faults(SCHEMA, tomllib.loads(text)) == []
    assert max(map(len, text.splitlines())) <= 110 and starter.about in text.replace("\n# ", " ")


@pytest.mark.parametrize("starter", STARTERS, ids=lambda s: s.name)
def test_every_key_that_a_starter_offers_can_be_taken(repo, starter):
    """Each `#key = value` becomes a key when its `#` goes, and so do all of them together.

    The example offers keys of other runs, too, and says so; taken, they get a warning.
    """
    lines = pitboss.render_template(starter).splitlines()
    offered = {n: re.match(r"#(\w+) = ", line)[1] for n, line in enumerate(lines) if re.match(r"#\w+ = ", line)}
    tables = {n: [line.strip("[]") for line in lines[:n] if line.startswith("[")][-1] for n in offered}
    assert offered
    for some in ([n] for n in offered), [offered]:
        for taken in some:
            text = "\n".join(line[1:] if n in taken else line for n, line in enumerate(lines))
            assert len(tomllib.loads(text)) >= 3
            manifest, problems = check(text, repo)
            elsewhere = [f"{table}.{f.name}" for table in ("run", "sublead_defaults") for f in pitboss.TABLES[table][0]
                         if f.mode not in ("", manifest.mode) and starter.every
                         and any((tables[n], offered[n]) == (table, f.name) for n in taken)]
            alone = [f"lead.{key}" for key in ("max_subleads", "max_sublead_budget_usd", "sublead_defaults")
                     if any((tables[n], offered[n]) == ("lead", key) for n in taken)]     # and no allow_subleads
            assert problems == [] and [w.path for w in manifest.warnings] == elsewhere + alone, text


@pytest.mark.parametrize("starter", STARTERS, ids=lambda s: s.name)
def test_a_starter_explains_each_of_its_keys_once(starter):
    text = pitboss.render_template(starter)
    prose, mode = re.sub(r"\n(# )+", " ", text), pitboss.mode_of(starter)
    for head in dict.fromkeys(head.partition(".")[0] for head, _ in starter.sections):
        fields, _, what = pitboss.TABLES[head]
        assert what.replace("`", "") in prose
        keys = {key for h, values in starter.sections if h.partition(".")[0] == head for key in values}
        assert keys <= {f.name for f in fields}
    for table, f in ((t, f) for t, (fields, _, _) in pitboss.TABLES.items() for f in fields):
        shown = re.search(rf"^(# )?#?{f.name} = ", text, re.M)
        assert shown or starter is not pitboss.EXAMPLE, f"{table}.{f.name} is not in the example"
        if starter is pitboss.EXAMPLE:
            assert prose.count(f" {pitboss.meaning_of(f)} (".replace("`", "")) == 1, f"{table}.{f.name}"
        elif table in {head.partition(".")[0] for head, _ in starter.sections} and f.mode not in ("", mode):
            assert not shown, f"{table}.{f.name} is for other runs"


def test_the_example_shows_what_makes_another_mode_as_a_comment(repo):
    text = pitboss.render_template(pitboss.EXAMPLE)
    block = re.search(r"^# This would stand instead of \[\[task\]\]:\n((?:#.*\n)+)", text, re.M)[1]
    lead = tomllib.loads("\n".join(line[2:] for line in block.splitlines()))
    assert set(lead) == {"lead"}
    document = {**tomllib.loads(text), **lead}
    manifest, problems = check("\n".join(f"{k} = {pitboss.render_toml(v)}" for k, v in document.items()), repo)
    assert [p.path for p in problems] == ["lead"] and faults(SCHEMA, document)      # beside [[task]]
    del document["task"]
    manifest, problems = check("\n".join(f"{k} = {pitboss.render_toml(v)}" for k, v in document.items()), repo)
    assert problems == [] and manifest.mode == "hierarchical" and faults(SCHEMA, document) == []
    assert manifest.tasks[0].prompt == dict(pitboss.EXAMPLE.sections)["lead"]["prompt"]


def test_a_starter_with_a_lead_tells_its_tools():
    for starter in STARTERS:
        prose = re.sub(r"\n# +", " ", pitboss.render_template(starter))
        told = [t.name for t in pitboss.TOOLS.values() if f" {t.name}: {t.help}" in prose]
        wanted = [t.name for t in pitboss.TOOLS.values() if "lead" in t.roles]
        assert told == (wanted if any(head == "lead" for head, _ in starter.sections) else [])


def test_samples_are_values_that_their_fields_take():
    for table, (fields, _, _) in pitboss.TABLES.items():
        for f in fields:
            sample = pitboss.sample_of(f)
            sample = list(sample) if isinstance(sample, tuple) else sample
            assert pitboss.wrong_value(f, sample) == "", f"{table}.{f.name}"


def test_keys_that_exclude_or_need_each_other_are_fields_and_say_so_both_ways():
    said = 0
    for table, (fields, _, _) in pitboss.TABLES.items():
        rows = {f.name: f for f in fields}
        for f in fields:
            assert all(f.name in rows[other].instead for other in f.instead), f"{table}.{f.name}"
            assert not f.needs or f.needs in rows, f"{table}.{f.name}"
            said += bool(f.instead) + bool(f.needs)
    assert said >= 3


@pytest.mark.parametrize("value", [
    "", "a", 'q"uo\\te', "tab\t\x1b\x7f\x00", "two\nlines", '\n"""\n\\n\n', "ä→\u2028", True, False, 0, -5, 1.5, 1e30, [],
    ["a", 1], {}, {"a": {"b c": ["x\ny"]}, "": "e", "ä": 1}], ids=repr)
def test_a_value_is_written_so_that_toml_reads_it(value):
    assert tomllib.loads(f"x = {pitboss.render_toml(value)}") == {"x": value}


# ------------------------------------------------------------------ init

@pytest.mark.parametrize("template", list(pitboss.STARTERS))
def test_a_fresh_starter_is_accepted_and_its_agents_run(home, template):
    repo = make_repo(home.root / "repo")
    done = home.pitboss("init", "--template", template, cwd=repo, check=0)
    assert "note:" not in done.stderr and "pitboss.toml" in done.stdout
    typed = re.findall(r"^  python3 pitboss.py (.*?)(?:  #|$)", done.stdout, re.M)
    assert typed and all(line.split()[0] in pitboss.COMMANDS for line in typed)
    mode = pitboss.mode_of(pitboss.STARTERS[template])
    assert home.pitboss("validate", "pitboss.toml", cwd=repo, check=0).stdout.startswith(f"OK: {mode}")
    manifest = repo / "pitboss.toml"
    manifest.write_text(manifest.read_text().replace('agent = "claude"', 'agent = "demo"'))
    home.pitboss("dispatch", "-q", "pitboss.toml", cwd=repo, check=0)


def test_init_writes_for_everybody_that_the_umask_lets_in(home):
    home.pitboss("init", check=0, preexec_fn=lambda: os.umask(0o027))
    assert (home.root / "pitboss.toml").stat().st_mode & 0o777 == 0o640
    home.pitboss("init", "--force", check=0, preexec_fn=lambda: os.umask(0o007))
    assert (home.root / "pitboss.toml").stat().st_mode & 0o777 == 0o660
    assert sorted(path.name for path in home.root.iterdir() if path.is_file()) == ["pitboss.toml"]


def test_init_says_what_is_missing_where_it_would_not_be_valid(home):
    done = home.pitboss("init", check=0)
    assert "note:" in done.stderr and "git work tree" in done.stderr and "Traceback" not in done.stderr
    git(home.root, "init", "-q")
    assert "commit" in home.pitboss("init", "--force", check=0).stderr


def test_what_is_there_is_never_overwritten_without_force(home):
    path = home.manifest("mine\n", "pitboss.toml")
    done = home.pitboss("init", check=4)
    assert "pitboss.toml" in done.stderr and "--force" in done.stderr and done.stdout == ""
    assert path.read_text() == "mine\n"
    home.pitboss("init", "--force", check=0)
    assert path.read_text() == pitboss.render_template(pitboss.STARTERS["simple"])


def test_force_writes_through_a_link(home):
    real = home.manifest("mine\n", "real.toml")
    (home.root / "link.toml").symlink_to("real.toml")
    home.pitboss("init", "link.toml", check=4)
    assert real.read_text() == "mine\n"
    home.pitboss("init", "link.toml", "--force", check=0)
    assert (home.root / "link.toml").is_symlink() and "[[task]]" in real.read_text()


def test_a_starter_on_standard_output_is_nothing_else(home):
    done = home.pitboss("init", "-", "--template", "flat", check=0)
    assert done.stdout == pitboss.render_template(pitboss.STARTERS["flat"]) and done.stderr == ""
    assert not (home.root / "-").exists()


def test_a_starter_beside_the_schema_names_it_to_editors(home):
    home.pitboss("init", check=0)
    assert not (home.root / "pitboss.toml").read_text().startswith("#:schema")
    (home.root / pitboss.SCHEMA_FILE).write_text(home.pitboss("schema", "--format", "json-schema", check=0).stdout)
    home.pitboss("init", "--force", check=0)
    assert (home.root / "pitboss.toml").read_text().startswith(f"#:schema ./{pitboss.SCHEMA_FILE}\n")


@pytest.mark.parametrize("out, words", [
    ("", "names no file"), (".", "folder"), ("gone/x.toml", "no folder gone"), ("gone/", "names no file"),
    ("file/x.toml", "no folder file"), ("/dev/null", "no regular file"), ("dangling", "no regular file")])
@pytest.mark.parametrize("force", [[], ["--force"]], ids=str)
def test_a_place_that_cannot_be_written_to_is_told(home, out, words, force):
    (home.root / "file").write_text("mine\n")
    (home.root / "dangling").symlink_to("gone")
    before = sorted(home.root.iterdir())
    done = home.pitboss("init", out, *force, check=2)
    assert words in done.stderr and json.dumps(out) in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and sorted(home.root.iterdir()) == before


def test_a_folder_that_was_removed_is_told(home):
    script = f"mkdir gone && cd gone && rmdir ../gone && exec '{PYTHON}' '{ROOT / 'pitboss.py'}' init"
    done = subprocess.run(["sh", "-c", script], env=home.env, cwd=home.root, text=True, capture_output=True, check=False)
    assert done.returncode == 2 and "current folder was removed" in done.stderr, done.stderr


def test_what_to_do_next_can_be_copied(home):
    make_repo(home.root)
    for name in ("a b's.toml", "-x.toml"):
        shown = home.pitboss("init", "--", name, check=0).stdout
        line = re.search(r"^  python3 pitboss.py (validate .*?)  +#", shown, re.M)[1]
        home.pitboss(*shlex.split(line), check=0)


@pytest.mark.parametrize("args", [["new.toml"], ["old.toml", "--force"]], ids=str)
def test_a_disk_that_takes_no_more_leaves_nothing_half_written(home, args):
    home.manifest("mine\n", "old.toml")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    done = home.pitboss("init", *args, check=5, preexec_fn=limit)
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert [p.name for p in home.root.iterdir() if p.is_file()] == ["old.toml"]
    assert (home.root / "old.toml").read_text() == "mine\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_the_environments_fault(home):
    (home.root / "shut").mkdir(mode=0o500)
    assert "shut" in home.pitboss("init", "shut/x.toml", check=5).stderr


@pytest.mark.parametrize("args, near", [
    (["init", "--template", "smple"], "did you mean simple?"), (["schema", "--format", "jsonschema"], "json-schema?"),
    (["init", "--template", ""], "allowed: one of simple, flat"), (["init", "--tmplate", "flat"], "--template"),
    (["schema", "--chek", "x"], "--check")])
def test_a_near_miss_of_a_choice_or_flag_is_told(home, args, near):
    done = home.pitboss(*args, check=2)
    assert near in done.stderr and len(done.stderr.splitlines()) == 2 and done.stdout == ""


# ------------------------------------------------------------------ schema

@pytest.mark.parametrize("name", list(pitboss.SCHEMA_FORMATS))
def test_a_saved_copy_is_compared(home, name):
    text = home.pitboss("schema", "--format", name, check=0).stdout
    saved = home.manifest(text, "saved")
    assert home.pitboss("schema", "--format", name, "--check", saved, check=0).stdout.startswith("OK")
    lines = text.splitlines()
    home.manifest("\n".join([*lines[:3], "something old", *lines[4:]]), "saved")
    done = home.pitboss("schema", "--format", name, "--check", saved, check=1)
    assert "-something old" in done.stdout and f"+{lines[3]}" in done.stdout.splitlines()
    assert "\\ no newline at the end" in done.stdout and "Traceback" not in done.stderr
    home.manifest(text[:-1], "saved")
    home.pitboss("schema", "--format", name, "--check", saved, check=1)
    home.pitboss("schema", "--format", name, "--check", "-", input=text, check=0)


def test_the_ending_of_a_saved_copy_tells_its_format(home):
    for name, (render, suffix) in pitboss.SCHEMA_FORMATS.items():
        saved = home.manifest(render(), f"saved{suffix or '.txt'}")
        assert f"--format {name}" in home.pitboss("schema", "--check", saved, check=0).stdout


@pytest.mark.parametrize("name, words", [("nowhere.json", "No such file"), (".", "folder")])
def test_a_saved_copy_that_cannot_be_read_is_told(home, name, words):
    done = home.pitboss("schema", "--check", name, check=2)
    assert words in done.stderr and name in done.stderr and done.stdout == ""


def test_a_saved_copy_of_any_bytes_differs(home):
    (home.root / "saved").write_bytes(b"\xff\x00\n")
    home.pitboss("schema", "--check", "saved", check=1)


def test_the_map_has_a_line_a_key():
    lines = pitboss.render_map().splitlines()
    for _, (fields, _, what) in pitboss.TABLES.items():
        assert any(line.endswith(what.replace("`", "")) and line.startswith("[") for line in lines)
        for f in fields:
            _, kind, default, meaning = (cell.replace("`", "") for cell in pitboss.reference_row(f))
            assert any(line.split()[0] == f.name and kind in line and default in line and line.endswith(meaning)
                       and all(name in line for name in f.also) for line in lines if line.startswith("  ")), f.name


# ------------------------------------------------------------------ everything is derived

@pytest.fixture
def edited(home):
    """A function: the program with `row` put in right after `anchor`; its standard output for some arguments."""
    source, compile_once = pitboss_source(), functools.lru_cache(lambda text: compiled(text.encode(), home.root))

    def run(anchor: str, row: str, *commands: tuple) -> list[str]:
        line = "\n" + anchor
        assert source.count(line) == 1, f"{anchor!r} begins {source.count(line)} lines of the file"
        copy = compile_once(source.replace(line, line + row))
        return [subprocess.run([PYTHON, *ISOLATED, copy, *args], env=home.env, cwd=home.root, text=True, check=True,
                               capture_output=True, stdin=subprocess.DEVNULL, timeout=60).stdout for args in commands]
    return run


def pitboss_source() -> str:
    return (ROOT / "pitboss.py").read_text(encoding="utf-8")


INIT = ("init", "-", "--template", "flat")
INIT_LEAD = ("init", "-", "--template", "full")
NEW_KEYS = {
    #                   what stands there, and where a starter shows it
    "RUN_FIELDS":      (*VIEWS, INIT, INIT_LEAD),
    "HOUSE_FIELDS":    (*VIEWS, INIT_LEAD),
    "ACTOR_FIELDS":    (*VIEWS, INIT, INIT_LEAD),
    "WORK_FIELDS":     (*VIEWS, INIT, INIT_LEAD),
    "TASK_FIELDS":     (*VIEWS, INIT),
    "LEAD_FIELDS":     (*VIEWS, INIT_LEAD),
    "TEMPLATE_FIELDS": (*VIEWS, INIT),
    "SERVER_FIELDS":   VIEWS,
    "COMMAND_FIELDS":  VIEWS,
}


@pytest.mark.parametrize("table", list(NEW_KEYS))
def test_a_new_key_shows_everywhere(edited, repo, table):
    anchor = re.search(rf"^{table} = \(.*\n", pitboss_source(), re.M)[0]
    row = '    Field("shine", "count", 7, "how much it shines", also=("lustre",), low=2, high=9),\n'
    for args, text in zip(NEW_KEYS[table], edited(anchor, row, *NEW_KEYS[table])):
        assert "shine" in text and "lustre" in text and "how much it shines" in text, args
        if args[-1] in ("example", "flat", "full"):
            assert len(re.findall(r"^(?:# )?#?shine = 7$", text, re.M)) == 1
        if args[-1] == "json-schema":
            known = {path.split("/")[-1]: one for path, one in schemas_in(json.loads(text))}
            for name in ("shine", "lustre"):
                assert (known[name]["minimum"], known[name]["maximum"], known[name]["default"]) == (2, 9, 7)


@pytest.mark.parametrize("table", ["TASK_FIELDS", "LEAD_FIELDS", "TEMPLATE_FIELDS", "SERVER_FIELDS", "COMMAND_FIELDS"])
def test_a_new_key_that_is_required_stands_in_every_starter(edited, home, table):
    anchor = re.search(rf"^{table} = \(.*\n", pitboss_source(), re.M)[0]
    row = '    Field("shine", "count", REQUIRED, "how much it shines", low=2),\n'
    make_repo(home.root)
    texts = edited(anchor, row, VIEWS[1], INIT, INIT_LEAD)
    for text in texts:
        home.manifest(text)
        assert edited(anchor, row, ("validate", "m.toml"))[0].startswith("OK")
    assert any(re.search(r"^(# )?#?shine = 2$", text, re.M) for text in texts)


def test_a_new_table_shows_everywhere(edited, home):
    row = '    "gadget": ((Field("name", "word", REQUIRED, "what it is called"), *SERVER_FIELDS[2:]), "list", ' \
          '"a thing that shines"),\n'
    views = edited("    #  header           fields           many    what it is\n", row, *VIEWS)
    for args, text in zip(VIEWS, views):
        assert "gadget" in text and "a thing that shines" in text and "what it is called" in text, args
    make_repo(home.root)
    home.manifest(views[1], "example.toml")
    edited("    #  header           fields           many    what it is\n", row, ("validate", "example.toml"))
    assert tomllib.loads(views[1])["gadget"] == [{"name": "word"}]
    assert json.loads(views[2])["properties"]["gadget"]["items"]["required"] == ["name"]


def test_a_new_template_shows_everywhere(edited):
    about = "a task without a worktree"
    row = f'    Starter("bare", "{about}", (("task", {{"id": "a", "directory": ".", "prompt": "x"}}),)),\n'
    told, text = edited("STARTERS = {s.name: s for s in (\n", row, ("init", "--help"),
                        ("init", "-", "--template", "bare"))
    assert "bare" in told and about in " ".join(told.split()) and tomllib.loads(text)["task"][0]["id"] == "a"


def test_a_new_command_and_flag_show_everywhere(edited):
    row = '    Cli("shine", cmd_version, "", ((("--lustre",), {"help": "how much", "choices": ("dim", "bright")}),),' \
          '\n        "make it shine", "shine --lustre dim"),\n'
    listed, told, reference = edited("COMMANDS = {c.name: c for c in (\n", row, ("--help",), ("shine", "--help"),
                                     ("reference",))
    assert "make it shine" in listed and "`shine` | make it shine" in reference
    assert "--lustre" in told and "how much" in told and "bright" in told and "shine --lustre dim" in told


def test_a_new_status_and_exit_code_show_everywhere(edited):
    row = '    "shone": (99, "it shone too much"),\n'
    for text in edited("EXIT_CODES = {\n", row, ("--help",), ("list", "--help"), ("reference",)):
        assert re.search(r"\b99\b.*it shone too much", text)
    row = '    Status("Shone", "*", "red", False, "Shone", "done_shone", "it shone too much"),\n'
    reference, = edited("STATUSES = {s.name: s for s in (\n", row, ("reference",))
    assert "| `Shone` | it shone too much |" in reference


def test_a_new_tool_and_operation_show_everywhere(edited):
    row = '    Tool("shine", "Shine", LEADS, True, (TARGET, WAIT), {"ok": "flag"}, tool_list, "make it shine"),\n'
    for text in edited("TOOLS = {t.name: t for t in (\n", row, ("reference",), INIT_LEAD):
        assert "| `shine` | `task_id`, `timeout_secs?` | make it shine | leads |" in text or \
            "# shine: make it shine" in text
    row = '    "shine": Op(op_list_workers, (_REASON,), "make it shine"),\n'
    reference, = edited("OPS = {\n", row, ("reference",))
    assert "| `shine` | `reason?` | make it shine |" in reference


# ------------------------------------------------------------------ the editors' own checker

TAPLO = os.environ.get("PITBOSS_TEST_TAPLO") or shutil.which("taplo")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not TAPLO, reason="taplo is not on PATH and PITBOSS_TEST_TAPLO does not name it")
def test_editors_check_a_starter_by_its_first_line(home):
    (home.root / pitboss.SCHEMA_FILE).write_text(pitboss.render_manifest_schema())
    changes = {"good": ("", ""), "bound": ("\ntimeout_secs = ", "\ntimeout_secs = -"), "key": ("directory =", "folder ="),
               "needs": ("\nprompt = ", "\nvars = {}\nprompt = "), "table": ("\n[defaults]", "\n[DEFAULTS]\n[defaults]"),
               "house": ("\nbudget_usd = 5.0", "")}
    made = {}
    for starter in STARTERS:
        for name, (old, new) in changes.items():
            text = pitboss.render_template(starter, with_schema=True)
            if old in text:
                made[home.manifest(text.replace(old, new, 1), f"{starter.name}_{name}.toml").name] = name
    assert set(made.values()) == set(changes)
    done = subprocess.run([TAPLO, "check"], env=home.env, cwd=home.root, text=True, check=False, capture_output=True,
                          timeout=60, stdin=subprocess.DEVNULL)
    refused = {path.name for path in home.root.glob("*.toml") if re.search(f"invalid file.*{path.name}", done.stderr)}
    assert refused == {path for path, name in made.items() if name != "good"}, done.stderr
