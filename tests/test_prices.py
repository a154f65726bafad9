"""What tokens cost, whose table says so, and what a manifest can cost at worst."""
from __future__ import annotations

import json
from types import MappingProxyType

import pytest
from tools import make_repo, read_events, read_records, wait_for

import pitboss
from pitboss import Usage

MINE = '[model.sonnet]\ninput = 30\noutput = 150\n[model."gpt-5"]\ninput = 1\noutput = 10\ncache_read = 0.5\n'
RATE = "[rate]\ninput = 1_000_000\noutput = 0\ncache_read = 0\ncache_creation = 0\n"      # a price a second


def prices_of(text: str) -> pitboss.Pricing:
    return pitboss.parse_prices(text.encode(), "prices.toml")


def write_prices(home, text: str):
    path = home.root / "home" / ".config" / "pitboss" / "prices.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ------------------------------------------------------------------ prices.toml

@pytest.mark.parametrize("model, row", [
    ("claude-sonnet-4-6", (30, 150, 30, 30)),             # instead of the built-in one; a cache that costs as input
    ("openai/GPT-5-mini", (1, 10, 0.5, 1)), ("claude-opus-4-1", pitboss.PRICES["opus"]), ("llama", None), ("", None)])
def test_the_users_prices_come_before_the_built_in_ones(model, row):
    assert pitboss.find_price(model, prices_of(MINE).models) == row


def test_the_longest_name_counts_whatever_the_order():
    rows = [f'[model."{name}"]\ninput = {n}\noutput = 1\n' for n, name in enumerate(("gpt", "gpt-5.1", "GPT-5"))]
    for text in ("".join(rows), "".join(reversed(rows))):
        models = prices_of(text).models
        assert [pitboss.find_price(m, models)[0] for m in ("gpt-4", "gpt-5.1-codex", "gpt-5-mini")] == [0, 1, 2]


def test_an_unknown_model_counts_as_the_middle_one_of_the_same_table():
    assert pitboss.price_usd("llama", Usage(1_000_000), prices_of(MINE).models) == 30
    assert pitboss.price_usd("llama", Usage(1_000_000)) == pitboss.PRICES["sonnet"][0]


def test_a_file_that_says_nothing_changes_nothing():
    assert prices_of("") == pitboss.Pricing() and prices_of(RATE).rate == (1_000_000, 0, 0, 0)


def test_what_an_agent_has_not_told_yet_is_priced_with_the_table_that_is_given():
    talk = pitboss.Talk("gpt-5", MappingProxyType(prices_of(MINE).models))
    talk.count_message("m", (1_000_000, 0, 0))
    assert talk.cost_usd() == 1


BAD = [
    ("[model.x]\ninput = 1\n", "model.x.output (line 1): is required"),
    ("[model.x]\ninput = -1\noutput = 1\n", "model.x.input (line 2): found -1; allowed: a number >= 0"),
    ("[model.x]\ninput = nan\noutput = 1\n", "model.x.input (line 2): found NaN"),
    ("[model.x]\ninput = true\noutput = 1\n", "model.x.input (line 2): found true"),
    ("[model.x]\ninput = 1\noutpt = 1\noutput = 1\n", "model.x.outpt (line 3): unknown key; did you mean output?"),
    ("[models.x]\ninput = 1\n", "models: unknown table; did you mean model?"),
    ("model = 1\n", "model (line 1): found 1; allowed: tables [model.NAME]"),
    ('[model.""]\ninput = 1\noutput = 1\n', "found a name that is empty"),
    ("[rate]\noutput = -1\n", "rate.output (line 2): found -1; allowed: an integer >= 0"),
    ("[rate\n", "line 1"),
]


@pytest.mark.parametrize("text, words", BAD)
def test_each_mistake_is_named_with_its_place(text, words):
    with pytest.raises(pitboss.InvalidInput) as caught:
        prices_of(text)
    assert words in str(caught.value) and str(caught.value).startswith("prices.toml: ")


def test_all_mistakes_are_named_at_once():
    with pytest.raises(pitboss.InvalidInput, match="3 problems"):
        prices_of("[model.x]\ninput = 1\n[rate]\ninput = -1\n[colour]\n")


@pytest.mark.parametrize("command", ["validate", "dispatch", "tree"])
def test_a_bad_table_is_one_error_and_nothing_starts(home, command):
    make_repo(home.root / "repo")
    path = write_prices(home, "[model.x]\ninput = 'much'\noutput = 1\n")
    manifest = home.manifest('[[task]]\nid = "a"\ndirectory = "repo"\nagent = "demo"\nprompt = "$ say x"\n')
    done = home.pitboss(command, manifest, check=2)
    assert done.stdout == "" and done.stderr.count("\n") == 2
    assert f'{path}: 1 problem; nothing was started\n  model.x.input (line 2): found "much"' in done.stderr
    assert not home.runs.exists()


def test_a_run_that_a_bad_table_keeps_from_going_on_is_as_it_was(home):
    make_repo(home.root / "repo")
    manifest = home.manifest('[[task]]\nid = "a"\ndirectory = "repo"\nagent = "demo"\nuse_worktree = false\n'
                             'prompt = "$ hang"\n')
    process = home.start("dispatch", manifest)
    wait_for(lambda: home.runs.exists() and any(home.runs.glob("*/tasks/a/hand.1")), 30, "the hand")
    process.kill()
    process.wait(30)
    run = home.run_dir()
    before = (run / "journal.jsonl").read_bytes()
    path = write_prices(home, "[model.x]\n")
    assert f"{path}: " in home.pitboss("resume", run.name, check=2).stderr
    assert (run / "journal.jsonl").read_bytes() == before
    path.unlink()
    home.pitboss("cancel", run.name, check=0)


def test_a_run_counts_with_the_users_prices(home):
    """What the agent tells is its own; what a stopped agent did not tell any more is estimated."""
    make_repo(home.root / "repo")
    home.env["XDG_CONFIG_HOME"] = str(home.root / "config")
    (home.root / "config/pitboss").mkdir(parents=True)
    (home.root / "config/pitboss/prices.toml").write_text("[model.sonnet]\ninput = 3e6\noutput = 3e6\n")
    task = '[[task]]\nid = "{}"\ndirectory = "repo"\nagent = "demo"\nuse_worktree = false\ntimeout_secs = {}\n' \
           "prompt = '''{}'''\n"
    home.pitboss("dispatch", home.manifest(task.format("told", 60, "$ say x") + task.format(
        "cut", 1, "$ say x\n$ hang")), check=1)
    ends = {e["actor"]: e for e in read_events(home.run_dir()) if e["kind"] == "hand_ended"}
    for record in read_records(home.run_dir()):
        used = sum(ends[record["task_id"]]["usage"])
        assert used > 0 and record["cost_usd"] == pytest.approx(3 * used), record


# ------------------------------------------------------------------ the worst case

TASK = '[[task]]\nid = "{}"\ndirectory = "repo"\nprompt = "x"\ntimeout_secs = {}\n'
LEAD = '[run]\nmax_workers = 2\nbudget_usd = 10\n[lead]\nid = "boss"\ndirectory = "repo"\nprompt = "x"\n' \
       'timeout_secs = 100\n'
PENNY = '[model.sonnet]\ninput = 1e-2\noutput = 0\n' + RATE       # a cent a second
DEAR = PENNY + '[model.dear]\ninput = 1\noutput = 0\n'
for _name in ("opus", "haiku"):
    PENNY, DEAR = (text + f"[model.{_name}]\ninput = 0\noutput = 0\n" for text in (PENNY, DEAR))
SUBLEADS = "allow_subleads = true\n"
COSTS = [
    # manifest, prices, what it costs, by what, what is missing, what its time costs
    (TASK.format("a", 100), PENNY, 1, "timeout_secs", [], 1),
    (TASK.format("a", 100) + TASK.format("b", 50), PENNY, 1.5, "timeout_secs", [], 1.5),
    (TASK.format("a", 100) + 'model = "llama-3"\n', PENNY, None, "timeout_secs", ['[model."llama-3"] in prices.toml'],
     None),
    (TASK.format("a", 100) + 'agent = "codex"\n', PENNY, None, "timeout_secs", ["task[0].model"], None),
    (TASK.format("a", 100) + 'agent = "codex"\nmodel = "sonnet"\n', PENNY, 1, "timeout_secs", [], 1),
    # a lead and two workers for 100 s
    (LEAD, PENNY, 3, "lead_timeout_secs", [], 3),
    (LEAD + "lead_timeout_secs = 50\n", PENNY, 1.5, "lead_timeout_secs", [], 1.5),
    (LEAD, DEAR, 10, "budget_usd", [], 201),
    (LEAD + 'model = "llama"\n', PENNY, 10, "budget_usd", [], None),
    (LEAD + 'agent = "codex"\nmodel = "llama"\n', PENNY, None, "lead_timeout_secs", ['[model."llama"] in prices.toml'],
     None),
    # what tells no cost is not bound by the budget
    (LEAD + 'agent = "codex"\nmodel = "sonnet"\n', DEAR, 201, "lead_timeout_secs", [], 201),
    (LEAD + SUBLEADS, PENNY, 10, "budget_usd", [], None),
    (LEAD + SUBLEADS + 'agent = "codex"\nmodel = "sonnet"\n', PENNY, None, "lead_timeout_secs", ["lead.max_subleads"],
     None),
    (LEAD + SUBLEADS + 'max_subleads = 1\nagent = "codex"\nmodel = "sonnet"\n', PENNY, 1 + 2 + 1 + 16,
     "lead_timeout_secs", [], 20),
    (LEAD + SUBLEADS + "max_subleads = 1\nmax_workers_across_tree = 3\n", PENNY, 1 + 2 + 1 + 1, "lead_timeout_secs", [],
     5),
    (LEAD + "max_workers_across_tree = 1\n", PENNY, 2, "lead_timeout_secs", [], 2),
]


@pytest.mark.parametrize("text, prices, worst, by, missing, by_time", COSTS)
def test_the_worst_case(text, prices, worst, by, missing, by_time):
    manifest = pitboss.read_manifest(text.encode(), "m.toml", stem="m", env={}, agents=pitboss.AGENTS,
                                     expand=lambda path: "/" + path)
    assert not manifest.problems
    seen = pitboss.foresee(manifest, prices_of(prices))
    assert (seen.worst_usd, seen.by, list(seen.missing)) == (pytest.approx(worst) if worst else None, by, missing)
    assert seen.time_usd == (pytest.approx(by_time) if by_time else None)
    lines = pitboss.render_outlook(seen, 0)
    assert len(lines) >= len(seen.seats) + 3 and ("no end" in lines[len(seen.seats) + 2]) == (worst is None)


def test_tree_is_a_gate(home):
    make_repo(home.root / "repo")
    write_prices(home, PENNY)
    flat = home.manifest(TASK.format("a", 100) + TASK.format("b", 50))
    done = home.pitboss("tree", flat, "--check", "1.5", check=0)
    assert done.stdout.splitlines()[-1] == "worst case: $1.50 (by timeout_secs)"
    dear = home.pitboss("tree", flat, "--check", "1.49", check=6)
    assert "worst case: $1.50 (by timeout_secs); allowed: $1.49" in dear.stderr and dear.stdout == done.stdout
    seen = json.loads(home.pitboss("tree", flat, "--check", "1", "--json", check=6).stdout)
    assert (seen["worst_usd"], seen["ok"], seen["check_usd"], [s["time_usd"] for s in seen["seats"]]) == (
        1.5, False, 1.0, [1.0, 0.5])
    for wrong in ("nan", "-1", "inf", "much"):
        assert "--check" in home.pitboss("tree", flat, "--check", wrong, check=2).stderr
    assert not home.runs.exists()


def test_a_gate_says_which_key_is_missing(home):
    make_repo(home.root / "repo")
    manifest = home.manifest(TASK.format("a", 100) + 'model = "llama"\n')
    home.pitboss("tree", manifest, check=0)
    done = home.pitboss("tree", manifest, "--check", "1e9", check=6)
    assert '[model."llama"] in prices.toml' in done.stderr and ".config/pitboss/prices.toml" in done.stderr


def test_help_says_what_the_worst_case_assumes(home):
    text = home.pitboss("tree", "--help", check=0).stdout
    for field in pitboss.RATE_FIELDS:
        assert f"{field.default} {field.name}" in text
