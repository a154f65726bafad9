"""A manifest is checked whole before anything starts, and means what it says.

Black box, through `validate`, `dispatch` and what an agent was given. Every refusal must be exit code 2, one
readable line a problem (where it stands, what was found, what is allowed), no traceback, and nothing written.
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tools import Home, git, make_repo, read_records

DEMO = """\
[defaults]
agent = "demo"
use_worktree = false
"""

TASK = """
[[task]]
id = "a"
directory = "."
prompt = "hi"
"""

# An agent of the format text. Its working folder is the task's directory: the home's root.
SHELL = """\
[agent.shell]
command = ["sh", "-c", '''{script}''']
format = "text"
[defaults]
agent = "shell"
use_worktree = false
"""


def files_written(home: Home) -> list[Path]:
    """What a command left in the user's folders."""
    folders = [home.root / part for part in ("home", "data", "run", "tmp")]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def check_refusal(home: Home, done) -> list[str]:
    """A refusal for the reader: exit 2, words instead of a traceback, nothing on stdout or disk.

    Returns the lines that are no warnings.
    """
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.strip() and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    assert files_written(home) == []
    return [line for line in done.stderr.splitlines() if "warning:" not in line]


def refuse(home: Home, manifest, **options) -> list[str]:
    """The lines on stderr of a `validate` that must refuse `manifest` (text, or the path of a file)."""
    path = home.manifest(manifest) if isinstance(manifest, str) else manifest
    return check_refusal(home, home.pitboss("validate", path, **options))


def accept(home: Home, text: str, **options):
    """A `validate` that must say OK and write nothing."""
    done = home.pitboss("validate", home.manifest(text), check=0, **options)
    assert re.search(r"\bOK\b", done.stdout), done.stdout
    assert files_written(home) == []
    return done


def problem_at(lines: list[str], path: str) -> str:
    """The one problem among `lines` that names the place `path`."""
    found = [line for line in lines if re.search(rf"(?<![\w.\]]){re.escape(path)}(?![\w.\[])", line)]
    assert len(found) == 1, f"{path}: {found} in {lines}"
    return found[0]


def names_line(problem: str, number: int) -> bool:
    return re.search(rf"(line |:){number}\b", problem) is not None


def deal(home: Home, text: str, code: int = 0, **options) -> dict:
    """Dispatch `text`; the records by id."""
    home.pitboss("dispatch", "-q", home.manifest(text), check=code, **options)
    return {record["task_id"]: record for record in read_records(home.run_dir())}


# ---- reading the file


def test_a_syntax_error_names_line_and_column(home):
    lines = refuse(home, DEMO + '[[task]]\nid = "a"\nprompt = = 3\n')
    assert re.search(r"line 6\D+10|:6:10\b", "\n".join(lines)), lines


def test_a_folder_is_not_a_manifest(home):
    lines = refuse(home, home.root)
    assert str(home.root) in lines[0] and re.search("folder|directory", lines[0])


def test_a_missing_manifest_is_named(home):
    lines = refuse(home, home.root / "nowhere.toml")
    assert "nowhere.toml" in lines[0]


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--background"], ["-q"]], ids=str)
def test_dispatch_refuses_what_validate_refuses(home, flags):
    path = home.manifest(DEMO + TASK + "timeout_secs = 0\n")
    lines = check_refusal(home, home.pitboss("dispatch", *flags, path))
    problem_at(lines, "task[0].timeout_secs")


def test_bytes_that_are_not_utf8_are_named_by_their_offset(home):
    path = home.root / "m.toml"
    path.write_bytes((DEMO + TASK).encode() + b'model = "\xff"\n')
    offset = path.read_bytes().index(b"\xff")
    text = "\n".join(refuse(home, path))
    assert "UTF-8" in text and re.search(rf"\b{offset}\b", text)


def test_utf16_is_refused_in_words(home):
    path = home.root / "m.toml"
    path.write_bytes((DEMO + TASK).encode("utf-16"))
    assert "UTF-8" in "\n".join(refuse(home, path))


def test_a_byte_order_mark_and_windows_line_ends_are_fine(home):
    path = home.root / "m.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (DEMO + TASK).replace("\n", "\r\n").encode())
    assert "OK" in home.pitboss("validate", path, check=0).stdout


def test_the_line_of_a_problem_is_right_under_windows_line_ends(home):
    path = home.root / "m.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (DEMO + TASK + "timeout_secs = 0\n").replace("\n", "\r\n").encode())
    assert names_line(problem_at(refuse(home, path), "task[0].timeout_secs"), 9)


def test_an_empty_manifest_says_what_is_missing(home):
    assert "task" in "\n".join(refuse(home, ""))


def test_stdin_is_a_manifest(home):
    done = home.pitboss("validate", "-", input=DEMO + TASK, check=0)
    assert "OK" in done.stdout
    home.pitboss("dispatch", "-q", "-", input=DEMO + TASK, check=0)
    meta = json.loads((home.run_dir() / "meta.json").read_text())
    assert meta["manifest_name"] == "stdin"


def test_a_problem_on_stdin_has_its_place_too(home):
    lines = check_refusal(home, home.pitboss("validate", "-", input=DEMO + TASK + "timeout_secs = 0\n"))
    assert names_line(problem_at(lines, "task[0].timeout_secs"), 9)


def test_paths_of_a_manifest_on_stdin_are_relative_to_the_current_folder(home):
    (home.root / "sub" / "inner").mkdir(parents=True)
    text = DEMO + TASK.replace('"."', '"inner"')
    home.pitboss("validate", "-", input=text, check=0, cwd=home.root / "sub")
    check_refusal(home, home.pitboss("validate", "-", input=text))


def test_eight_thousand_tasks_in_eight_megabytes_are_checked(home):
    filler = "x" * 950
    tasks = "".join(f'[[task]]\nid = "t{n}"\ndirectory = "."\nprompt = "{filler}"\n' for n in range(8_000))
    assert re.search(r"\b8000\b", accept(home, DEMO + tasks).stdout)


def test_one_prompt_of_eight_megabytes_is_checked(home):
    accept(home, DEMO + TASK.replace("hi", "x" * 8_000_000))


def test_a_manifest_of_ten_megabytes_is_refused_with_both_sizes(home):
    text = DEMO + TASK.replace("hi", "x" * 10_000_000)
    line, = refuse(home, text)
    assert "8388608" in line and (str(len(text)) in line or "more than" in line)


# ---- keys, types, bounds


@pytest.mark.parametrize("text, path, meant", [
    ("[run]\nmax_paralel = 2\n" + DEMO + TASK, "run.max_paralel", "max_parallel"),
    ("[run]\nhalt_on_failures = true\n" + DEMO + TASK, "run.halt_on_failures", "halt_on_failure"),
    (DEMO + "timout_secs = 5\n" + TASK, "defaults.timout_secs", "timeout_secs"),
    (DEMO + TASK + "timout_secs = 5\n", "task[0].timout_secs", "timeout_secs"),
    (DEMO + TASK + TASK.replace('"a"', '"b"') + 'modle = "x"\n', "task[1].modle", "model"),
    (DEMO + TASK + '[[template]]\nid = "t"\npromt = "x"\n', "template[0].promt", "prompt"),
    (DEMO + TASK + '[agent.x]\ncomand = ["x"]\nformat = "text"\n', "agent.x.comand", "command"),
    (DEMO + TASK + "[default]\nmodel = 'x'\n", "default", "defaults"),
    (DEMO + TASK.replace("[[task]]", "[[tasks]]"), "tasks", "task"),
    ('[defaults]\nagent = "cluade"\nuse_worktree = false\n' + TASK, "defaults.agent", "claude"),
    (DEMO + TASK + 'effort = "hihg"\n', "task[0].effort", "high"),
])
def test_a_near_miss_is_suggested(home, text, path, meant):
    problem = problem_at(refuse(home, text), path)
    assert re.search(rf"\b{meant}\b", problem.partition(path)[2]), problem


def test_an_unknown_key_like_no_other_lists_or_names_no_nonsense(home):
    problem = problem_at(refuse(home, DEMO + TASK + "zzzzqqqq = 1\n"), "task[0].zzzzqqqq")
    assert "did you mean" not in problem


def tasks_with(rows) -> str:
    """A manifest with one task for each line of `rows`; line n stands on line 9 + 6n, in task[n]."""
    return DEMO + "".join(TASK.replace('"a"', f'"t{n}"') + f"{row}\n" for n, row in enumerate(rows))


WRONG_VALUES = [      # the line, the key, what was found, what is allowed
    ('timeout_secs = "5"', "timeout_secs", r"5|text|string", r"number|integer"),
    ("timeout_secs = 2.5", "timeout_secs", r"2\.5", r"number|integer"),
    ("timeout_secs = true", "timeout_secs", r"true|bool", r"number|integer"),
    ("timeout_secs = nan", "timeout_secs", r"nan", r"number|integer"),
    ("timeout_secs = inf", "timeout_secs", r"inf", r"number|integer"),
    ("timeout_secs = 2026-01-01", "timeout_secs", r"2026-01-01|date", r"number|integer"),
    ("timeout_secs = 0", "timeout_secs", r"\b0\b", r"(≥|>=|at least) ?1\b"),
    ("timeout_secs = -3", "timeout_secs", r"-3\b", r"(≥|>=|at least) ?1\b"),
    ("use_worktree = 1", "use_worktree", r"\b1\b|number|integer", r"true"),
    ('use_worktree = "yes"', "use_worktree", r"yes", r"true"),
    ("model = 4", "model", r"\b4\b", r"text|string"),
    ('effort = "huge"', "effort", r"huge", r"low.*medium.*high.*xhigh.*max"),
    ('tools = "Read"', "tools", r"Read", r"list|array"),
    ("tools = [1]", "tools", r"\b1\b", r"text|string"),
    ('env = "A=1"', "env", r"A=1", r"table"),
    ('agent = "nobody-knows"', "agent", r"nobody-knows", r"claude"),
]


def test_a_wrong_value_says_what_was_found_and_what_is_allowed(home):
    lines = refuse(home, tasks_with(line for line, *_ in WRONG_VALUES))
    for n, (_, key, found, allowed) in enumerate(WRONG_VALUES):
        problem = problem_at(lines, f"task[{n}].{key}")
        assert names_line(problem, 9 + 6 * n) and f'"t{n}"' in problem, problem
        assert re.search(found, problem, re.I), problem
        assert re.search(allowed, problem, re.I), problem


@pytest.mark.parametrize("key, value", [
    ("max_parallel", "0"), ("max_parallel", "-1"), ("max_parallel", "nan"), ("max_parallel", '"4"'),
    ("max_parallel_tasks", "0"), ("halt_on_failure", "1"), ("worktree_cleanup", '"sometimes"'), ("name", "3"),
    ("run_dir", "3"), ("secret_env", '"X"'), ("max_workers", "17"), ("max_workers", "0"), ("budget_usd", "0"),
    ("budget_usd", "nan"), ("budget_usd", "inf"), ("budget_usd", "-inf"),
])
def test_a_wrong_value_of_the_run_is_refused_where_it_stands(home, key, value):
    problem = problem_at(refuse(home, f"[run]\n{key} = {value}\n" + DEMO + TASK), f"run.{key}")
    assert names_line(problem, 2), problem


def test_an_id_that_is_no_id_is_refused(home):
    names = ["", "a b", "../x", "a/b", "ä", "a.b", "x" * 65, "a\\n"]
    lines = refuse(home, DEMO + "".join(TASK.replace('"a"', f'"{name}"') for name in names))
    for n in range(len(names)):
        assert names_line(problem_at(lines, f"task[{n}].id"), 6 + 5 * n)


def test_an_id_within_the_bounds_is_fine(home):
    names = ["x" * 64, "A-b_9", "-", "_", "0"]
    accept(home, DEMO + "".join(TASK.replace('"a"', f'"{name}"') for name in names))


@pytest.mark.parametrize("key", ["id", "directory", "prompt"])
def test_a_required_key_that_is_missing_is_named_with_its_table(home, key):
    problem = problem_at(refuse(home, DEMO + re.sub(rf"{key} = .*\n", "", TASK)), f"task[0].{key}")
    assert names_line(problem, 5), problem
    assert re.search("required|missing", problem), problem


def test_a_table_where_a_list_of_tables_belongs_is_refused(home):
    assert "[[task]]" in "\n".join(refuse(home, DEMO + TASK.replace("[[task]]", "[task]")))


def test_a_value_where_a_table_belongs_is_refused(home):
    problem_at(refuse(home, 'run = "fast"\n' + DEMO + TASK), "run")


def test_every_problem_is_told_in_one_go(home):
    text = """\
[run]
max_parallel = 0
[defaults]
agent = "demo"
use_worktree = false
effort = "huge"
[[task]]
id = "one"
directory = "."
prompt = "hi"
timeout_secs = 0
[[task]]
id = "two"
directory = "nowhere"
prompt = "hi"
timout_secs = 9
[[task]]
id = "one"
directory = "."
prompt = ""
"""
    lines = refuse(home, text)
    for path, number in [("run.max_parallel", 2), ("defaults.effort", 6), ("task[0].timeout_secs", 11),
                         ("task[1].directory", 14), ("task[1].timout_secs", 16), ("task[2].id", 18),
                         ("task[2].prompt", 20)]:
        assert names_line(problem_at(lines, path), number), (path, lines)
    assert "one" in problem_at(lines, "task[0].timeout_secs")
    assert "two" in problem_at(lines, "task[1].directory")


def test_a_run_has_tasks_or_a_lead_but_never_both(home):
    lead = '[run]\nmax_workers = 1\nbudget_usd = 1\n[[lead]]\nid = "l"\ndirectory = "."\nprompt = "x"\n'
    text = "\n".join(refuse(home, lead + DEMO + TASK))
    assert "lead" in text and "task" in text
    text = "\n".join(refuse(home, DEMO))
    assert "lead" in text and "task" in text


# ---- two spellings of one thing


@pytest.mark.parametrize("lines, shown", [
    ("max_parallel = 3", 3), ("max_parallel_tasks = 3", 3), ("max_parallel = 3\nmax_parallel_tasks = 3", 3)])
def test_either_spelling_means_the_same(home, lines, shown):
    assert f"max_parallel={shown}" in accept(home, f"[run]\n{lines}\n" + DEMO + TASK).stdout


def test_two_spellings_with_two_values_are_an_error_that_names_both(home):
    text = "\n".join(refuse(home, "[run]\nmax_parallel = 3\n\nmax_parallel_tasks = 2\n" + DEMO + TASK))
    assert re.search(r"\bmax_parallel\b", text) and "max_parallel_tasks" in text
    assert re.search(r"\b2\b", text) and re.search(r"\b3\b", text) and re.search(r"\b4\b", text), text


def test_without_anything_four_hands_are_dealt_at_once(home):
    assert "max_parallel=4" in accept(home, DEMO + TASK).stdout


def test_the_environment_sets_the_cap(home):
    assert "max_parallel=7" in accept(home, DEMO + TASK, env={"ANTHROPIC_MAX_CONCURRENT": "7"}).stdout


def test_the_manifest_beats_the_environment(home):
    done = accept(home, "[run]\nmax_parallel = 2\n" + DEMO + TASK, env={"ANTHROPIC_MAX_CONCURRENT": "7"})
    assert "max_parallel=2" in done.stdout


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_senseless_cap_in_the_environment_is_an_error_that_names_the_variable(home, value):
    lines = refuse(home, DEMO + TASK, env={"ANTHROPIC_MAX_CONCURRENT": value})
    assert value in problem_at(lines, "ANTHROPIC_MAX_CONCURRENT")


# ---- ids, branches, directories


def test_a_duplicate_id_names_both_places(home):
    text = "\n".join(refuse(home, DEMO + TASK + TASK))
    assert "task[1].id" in text and re.search(r"task\[0\]|line 6", text)


def worktree_tasks(*rows: str) -> str:
    tasks = "".join(f'[[task]]\nid = "t{n}"\nprompt = "hi"\n{row}\n' for n, row in enumerate(rows))
    return '[defaults]\nagent = "demo"\n' + tasks


@pytest.mark.parametrize("second", ["repo", "repo/sub", "link"])
def test_two_tasks_on_one_branch_of_one_repository_are_refused(home, second):
    repo = home.repo()
    (repo / "sub").mkdir()
    (home.root / "link").symlink_to(repo)
    text = worktree_tasks('directory = "repo"\nbranch = "work"', f'directory = "{second}"\nbranch = "work"')
    problem = problem_at(refuse(home, text), "task[1].branch")
    assert '"work"' in problem and "task[0]" in problem and names_line(problem, 12)


def test_the_same_branch_name_in_two_repositories_is_fine(home):
    home.repo("one"), home.repo("two")
    accept(home, worktree_tasks('directory = "one"\nbranch = "work"', 'directory = "two"\nbranch = "work"'))


def test_an_illegal_branch_name_is_refused(home):
    home.repo()
    names = ["a..b", "-x", "x.lock", "a b", "a~1", "a@{b", "/a", "a/", "", "HEAD", "a:b"]
    lines = refuse(home, worktree_tasks(*(f'directory = "repo"\nbranch = "{name}"' for name in names)))
    for n in range(len(names)):
        assert names_line(problem_at(lines, f"task[{n}].branch"), 7 + 5 * n)


def test_a_directory_that_is_missing_is_named(home):
    problem = problem_at(refuse(home, worktree_tasks('directory = "nowhere"')), "task[0].directory")
    assert str(home.root / "nowhere") in problem


def test_a_file_is_not_a_directory(home):
    (home.root / "file").write_text("x")
    problem_at(refuse(home, worktree_tasks('directory = "file"')), "task[0].directory")


def test_a_directory_outside_every_repository_needs_use_worktree_false(home):
    (home.root / "plain").mkdir()
    problem = problem_at(refuse(home, worktree_tasks('directory = "plain"')), "task[0].directory")
    assert "git" in problem and "use_worktree" in problem
    accept(home, worktree_tasks('directory = "plain"\nuse_worktree = false'))


def test_a_repository_without_a_commit_is_refused(home):
    (home.root / "young").mkdir()
    git(home.root / "young", "init", "-q")
    assert "commit" in problem_at(refuse(home, worktree_tasks('directory = "young"')), "task[0].directory")


def test_a_bare_repository_is_refused(home):
    git(home.root, "clone", "-q", "--bare", str(home.repo()), "bare.git")
    problem_at(refuse(home, worktree_tasks('directory = "bare.git"')), "task[0].directory")


def test_a_folder_inside_a_repository_is_fine(home):
    (home.repo() / "deep" / "er").mkdir(parents=True)
    accept(home, worktree_tasks('directory = "repo/deep/er"'))


def test_home_and_variables_in_paths_are_expanded(home):
    (home.root / "home" / "mine").mkdir()
    (home.root / "elsewhere").mkdir()
    accept(home, DEMO + TASK.replace('"."', '"~/mine"'))
    accept(home, DEMO + TASK.replace('"."', '"$PLACE/elsewhere"'), env={"PLACE": str(home.root)})
    problem_at(refuse(home, DEMO + TASK.replace('"."', '"$PLACE/nowhere"'), env={"PLACE": str(home.root)}),
               "task[0].directory")


def test_the_users_git_variables_do_not_mislead_the_check(home):
    home.repo()
    other = make_repo(home.root / "other")
    env = {"GIT_DIR": str(home.root / "no"), "GIT_WORK_TREE": str(other)}
    accept(home, worktree_tasks('directory = "repo"'), env=env)


# ---- templates


def templated(prompt: str, task: str) -> str:
    template = f'[[template]]\nid = "greet"\nprompt = "{prompt}"\n'
    return DEMO + template + f'[[task]]\nid = "a"\ndirectory = "."\n{task}\n'


@pytest.mark.parametrize("prompt, task, path, said", [
    ("Hi {name}", 'template = "greet"', "task[0]", "name"),
    ("Hi {name}", 'template = "greet"\nvars = { name = "x", nmae = "y" }', "task[0].vars", "nmae"),
    ("Hi", 'prompt = "x"\nvars = { name = "x" }', "task[0].vars", "template"),
    ("Hi", 'prompt = "x"\ntemplate = "greet"', "task[0]", "template"),
    ("Hi", 'template = "great"', "task[0].template", "greet"),
    ("", 'template = "greet"', "task[0].prompt", "empty"),
    ("Hi", 'prompt = ""', "task[0].prompt", "empty"),
    ("Hi", 'prompt = "  \\n"', "task[0].prompt", "empty"),
])
def test_a_template_that_does_not_fit_its_task_is_refused(home, prompt, task, path, said):
    lines = refuse(home, templated(prompt, task))
    assert any(path in line and said in line for line in lines), lines


def test_two_templates_of_one_name_are_refused(home):
    again = '[[template]]\nid = "greet"\nprompt = "again"\n'
    problem_at(refuse(home, templated("Hi", 'template = "greet"') + again), "template[1].id")


def test_a_template_that_nobody_uses_is_a_warning(home):
    done = accept(home, templated("Hi", 'prompt = "x"'))
    assert re.search("warning.*greet", done.stderr), done.stderr


def test_places_are_filled_and_other_braces_are_text(home):
    text = SHELL.format(script="cat >got") + """
[[template]]
id = "t"
prompt = '''{who}|{{who}}|{ who }|{}|{"json": 1}|{1x}|${who}'''
[[task]]
id = "a"
directory = "."
template = "t"
vars = { who = "{who} {other}" }
"""
    deal(home, text)
    assert (home.root / "got").read_text() == '{who} {other}|{who}|{ who }|{}|{"json": 1}|{1x}|${who} {other}'


# ---- what an agent gets


def test_defaults_are_overridden_by_tasks_and_env_is_merged(home):
    text = SHELL.format(script='env >"env.$PITBOSS_TASK_ID"') + """
env = { BOTH = "default", ONLY_DEFAULT = "d", PATH_LIKE = "$HOME" }
[[task]]
id = "a"
directory = "."
prompt = "x"
env = { BOTH = "task", ONLY_TASK = "t" }
[[task]]
id = "b"
directory = "."
prompt = "x"
"""
    deal(home, text, env={"INHERITED": "yes", "BOTH": "outside"})
    a, b = (dict(line.split("=", 1) for line in (home.root / f"env.{name}").read_text().splitlines())
            for name in "ab")
    assert (a["BOTH"], a["ONLY_DEFAULT"], a["ONLY_TASK"], a["INHERITED"]) == ("task", "d", "t", "yes")
    assert (b["BOTH"], b["ONLY_DEFAULT"], b.get("ONLY_TASK")) == ("default", "d", None)
    run = home.run_dir()
    assert (a["PITBOSS_RUN_ID"], a["PITBOSS_TASK_ID"], a["PITBOSS_RUN_DIR"]) == (run.name, "a", str(run))


def test_the_users_git_variables_do_not_reach_an_agent(home):
    repo = home.repo()
    text = SHELL.format(script="env >got; git rev-parse --show-toplevel >top") + TASK.replace('"."', '"repo"')
    deal(home, text, env={"GIT_DIR": "/nowhere", "GIT_WORK_TREE": "/nowhere", "GIT_INDEX_FILE": "/nowhere"})
    got = (repo / "got").read_text()
    assert not re.search("^GIT_(DIR|WORK_TREE|INDEX_FILE)=", got, re.M)
    assert (repo / "top").read_text().strip() == str(repo)


def test_an_environment_that_cannot_be_is_refused(home):
    tables = ['{ "A=B" = "x" }', '{ "" = "x" }', '{ A = 1 }', '{ A = "x\\u0000y" }']
    lines = refuse(home, tasks_with(f"env = {table}" for table in tables))
    for n in range(len(tables)):
        assert [line for line in lines if f"task[{n}].env" in line], (n, lines)


@pytest.mark.parametrize("table", ["env", "vars"])
def test_a_prompt_that_fell_into_a_table_is_recognised(home, table):
    text = DEMO + f'[[task]]\nid = "a"\ndirectory = "."\n[task.{table}]\nA = "b"\nprompt = "hi"\n'
    text = "\n".join(refuse(home, text))
    assert "prompt" in text and re.search(rf"task(\[0\])?\.{table}", text)


def test_a_container_table_is_a_warning(home):
    done = accept(home, DEMO + TASK + '[container]\nimage = "x"\n')
    assert re.search(r"warning.*container|container.*warning", done.stderr, re.I), done.stderr


@pytest.mark.parametrize("line", ["budget_usd = 2.5", "max_workers = 2", "lead_timeout_secs = 5"])
def test_a_house_rule_beside_tasks_is_a_warning(home, line):
    done = accept(home, f"[run]\n{line}\n" + DEMO + TASK)
    assert re.search(rf"warning.*{line.split()[0]}", done.stderr), done.stderr


def test_a_rule_on_a_tool_that_limits_nothing_is_a_warning(home):
    done = accept(home, DEMO + TASK + 'tools = ["Read", "Bash(git log *)"]\n')
    assert re.search(r"warning.*Bash\(git log \*\)", done.stderr), done.stderr


def toml_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)      # such a JSON string is a TOML string, too


PROMPTS = {
    "a dash": "-rf --help",
    "a slash": "/help me",
    "quotes and shell signs": "a \"b\" 'c' $HOME `id` \\n %s {x} ; & |",
    "line ends": "one\ntwo\r\n\n  three  \n",
    "other scripts": "naïve ✓ 日本語 \U0001f600",
    "200 KB": "0123456789abcdef" * 12_500 + "end",
    "2 MB": "0123456789abcdef" * 125_000 + "end",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_arrives_whole_on_stdin(home, prompt):
    deal(home, SHELL.format(script="cat >got") + TASK.replace('"hi"', toml_text(prompt)))
    assert (home.root / "got").read_bytes() == prompt.encode()


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_arrives_whole_in_a_file(home, prompt):
    text = """\
[agent.file]
command = ["sh", "-c", 'cat "$1" >got; cat >in', "sh", "{prompt_file}"]
format = "text"
[defaults]
agent = "file"
use_worktree = false
"""
    deal(home, text + TASK.replace('"hi"', toml_text(prompt)))
    assert (home.root / "got").read_bytes() == prompt.encode()
    assert (home.root / "in").read_bytes() == b""


@pytest.mark.parametrize("size", [0, 200_000, 3_000_000])
def test_a_prompt_of_any_size_arrives_whole_as_an_event(home, size):
    prompt = "/x" + "y" * size + "\n$ write got it came to the end"
    deal(home, DEMO + TASK.replace('"hi"', toml_text(prompt)))
    assert (home.root / "got").read_text() == "it came to the end\n"


def test_an_agent_that_never_reads_a_long_prompt_succeeds(home):
    record = deal(home, SHELL.format(script="echo done") + TASK.replace("hi", "x" * 3_000_000))["a"]
    assert (record["status"], record["final_message"].strip()) == ("Success", "done")


def test_a_prompt_with_a_nul_is_refused_or_arrives_whole(home):
    text = SHELL.format(script="cat >got") + TASK.replace("hi", "a\\u0000b")
    done = home.pitboss("validate", home.manifest(text))
    if done.returncode:
        problem_at(check_refusal(home, done), "task[0].prompt")
    else:
        deal(home, text)
        assert (home.root / "got").read_bytes() == b"a\0b"


def test_a_timeout_longer_than_any_clock_is_refused_or_works(home):
    text = DEMO + TASK + "timeout_secs = 9223372036854775807\n"
    done = home.pitboss("validate", home.manifest(text))
    if done.returncode:
        problem_at(check_refusal(home, done), "task[0].timeout_secs")
    else:
        assert deal(home, text)["a"]["status"] == "Success"


def test_model_session_and_prompt_file_fill_their_places(home):
    text = """\
[agent.args]
command = ["sh", "-c", 'printf "%s\\n" "$@" >got', "-",
    "{model}", "x{model}y", "{session_id}", "{other}", "{}"]
format = "text"
[defaults]
agent = "args"
use_worktree = false
model = "m o"
""" + TASK
    deal(home, text)
    model, inner, session, other, braces = (home.root / "got").read_text().splitlines()
    assert (model, inner, other, braces) == ("m o", "xm oy", "{other}", "{}")
    assert re.fullmatch(r"[0-9a-f-]{36}", session)


def test_a_command_adapter_that_cannot_work_is_refused(home):
    lines = refuse(home, DEMO + TASK + """
[agent.one]
command = []
format = "text"
[agent.two]
command = "sh"
format = "text"
[agent.three]
format = "text"
[agent.four]
command = ["sh"]
format = "xml"
""")
    places = {"one.command": 11, "two.command": 14, "three.command": 16, "four.format": 20}
    for path, number in places.items():
        assert names_line(problem_at(lines, f"agent.{path}"), number)


def test_a_program_that_is_missing_is_named_before_anything_starts(home):
    agent = '[agent.x]\ncommand = ["no-such-program-here"]\nformat = "text"\n'
    manifest = home.manifest(agent + DEMO.replace("demo", "x") + TASK)
    lines = check_refusal(home, home.pitboss("dispatch", manifest))
    assert "no-such-program-here" in "\n".join(lines)


def test_a_claude_that_is_missing_is_named_before_anything_starts(home):
    text = "[defaults]\nuse_worktree = false\n" + TASK
    lines = check_refusal(home, home.pitboss("dispatch", home.manifest(text),
                                             env={"PITBOSS_CLAUDE_BINARY": "/nowhere/claude"}))
    assert "/nowhere/claude" in "\n".join(lines)
