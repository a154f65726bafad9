"""POLICY: which rule decides, and why the others do not; what a manifest's rules are warned of."""
from __future__ import annotations

import math

import pytest

import pitboss
from pitboss import ApprovalRule, Ask


def rule(action: str = "auto_approve", **match) -> ApprovalRule:
    return ApprovalRule(**{f.name: match.get(f.name) for f in pitboss.MATCH_FIELDS}, action=action)


def ask(path: str = "boss", category: str = "tool_use", tool: str | None = None, cost: float | None = None) -> Ask:
    return Ask(tuple(path.split("→")), category, tool, cost)


MATCHES = [
    # what a rule wants, what is asked, whether it matches
    ({}, ask(), True),
    ({"actor": "boss"}, ask(), True),
    ({"actor": "boss"}, ask("boss→worker-1"), False),
    ({"actor": "worker-1"}, ask("boss→worker-1"), True),
    ({"actor": "worker-*"}, ask("boss→sub→worker-12"), True),
    ({"actor": "worker-?"}, ask("boss→worker-12"), False),
    ({"actor": "worker-[12]"}, ask("boss→worker-2"), True),
    ({"actor": "boss→worker-1"}, ask("boss→worker-1"), True),
    ({"actor": "boss→*"}, ask("boss→sub→worker-1"), True),
    ({"actor": "boss→*"}, ask("boss"), False),
    ({"actor": "*→sub→*"}, ask("boss→sub→worker-1"), True),
    ({"actor": "sub→*"}, ask("boss→sub→worker-1"), False),
    ({"actor": "BOSS"}, ask(), False),
    ({"category": "plan"}, ask(category="plan"), True),
    ({"category": "plan"}, ask(category="cost"), False),
    ({"tool_name": "Bash"}, ask(tool="Bash"), True),
    ({"tool_name": "Ba*"}, ask(tool="Bash"), True),
    ({"tool_name": "mcp__*__read"}, ask(tool="mcp__side__read"), True),
    ({"tool_name": "bash"}, ask(tool="Bash"), False),
    ({"tool_name": "*"}, ask(), False),                      # no tool is none that a glob could name
    ({"cost_over": 5}, ask(cost=5), False),
    ({"cost_over": 5}, ask(cost=5.001), True),
    ({"cost_over": 0}, ask(cost=0.0), False),
    ({"cost_over": 0}, ask(), False),
    ({"cost_over": 5}, ask(cost=math.inf), True),
    ({"actor": "boss", "category": "cost", "cost_over": 1}, ask(category="cost", cost=2), True),
    ({"actor": "boss", "category": "cost", "cost_over": 1}, ask(category="cost", cost=1), False),
    ({"actor": "boss", "tool_name": "Bash"}, ask(tool="Read"), False),
]


@pytest.mark.parametrize("match, asked, fits", MATCHES)
def test_a_rule_matches_what_it_says(match, asked, fits):
    why = pitboss.why_not(rule(**match), asked)
    assert (why == "") == fits
    assert fits or any(why.startswith(f"{name} {wanted}: ") for name, wanted in match.items())
    assert pitboss.decide_policy([rule("auto_reject", **match)], "block", asked) == (
        ("auto_reject", 0) if fits else ("block", None))


def test_the_first_rule_that_matches_decides():
    rules = [rule("auto_reject", tool_name="Bash"), rule("block", actor="boss"), rule("auto_approve")]
    assert pitboss.decide_policy(rules, "block", ask(tool="Bash")) == ("auto_reject", 0)
    assert pitboss.decide_policy(rules, "auto_reject", ask(tool="Read")) == ("block", 1)
    assert pitboss.decide_policy(rules, "block", ask("boss→worker-1")) == ("auto_approve", 2)
    assert pitboss.decide_policy(rules[::-1], "block", ask(tool="Bash")) == ("auto_approve", 0)
    assert pitboss.decide_policy([], "auto_reject", ask()) == ("auto_reject", None)


def test_every_field_of_a_match_has_a_test_and_the_record_its_name():
    assert [*pitboss.RULE_TESTS] == [f.name for f in pitboss.MATCH_FIELDS]
    assert ApprovalRule._fields == (*pitboss.RULE_TESTS, "action")
    assert set(pitboss.ACTIONS) == {"block", "auto_approve", "auto_reject"}


def test_what_is_shown_of_rules_makes_the_same_rules():
    rules = (rule("block", actor="a", cost_over=0.5), rule())
    shown = pitboss.public_rules(rules)
    assert shown == [{"match": {"actor": "a", "cost_over": 0.5}, "action": "block"}, {"match": {}, "action": "auto_approve"}]
    assert pitboss.resolve_policy(shown) == rules


# ------------------------------------------------------------------ manifests

def read(text: str, lead: str = "", run: str = "") -> pitboss.Manifest:
    whole = (f'[defaults]\ntimeout_secs = 60\n[run]\nmax_workers = 2\nbudget_usd = 1\nlead_timeout_secs = 600\n{run}\n[lead]\nid = "boss"\ndirectory = "."\nprompt = "x"\n'
             f'{lead}\n{text}')
    found = pitboss.read_manifest(whole.encode(), "m", stem="m", env={}, expand=str, agents=pitboss.AGENTS)
    assert found.problems == (), found.problems
    return found


WARNINGS = [
    ('match = { actor = "bos" }\naction = "block"', "approval_policy[0].match.actor", "which no actor of this run"),
    ('match = { actor = "boss→wroker-*" }\naction = "block"', "approval_policy[0].match.actor", "which no actor"),
    ('match = { category = "plan", tool_name = "Bash" }\naction = "block"', "approval_policy[0].match.tool_name",
     "names no tool"),
    ('action = "auto_reject"\n[[approval_policy]]\nmatch = { actor = "boss" }\naction = "block"', "approval_policy[1]",
     "never reached: approval_policy[0]"),
]


@pytest.mark.parametrize("rules, path, words", WARNINGS)
def test_a_rule_that_decides_nothing_is_warned_of(rules, path, words):
    [warning] = read(f"[[approval_policy]]\n{rules}").warnings
    assert warning.path == path and words in warning.message


@pytest.mark.parametrize("actor", ["boss", "b*", "*", "worker-*", "worker-77", "worker-1?", "sublead-1", "boss→worker-*",
                                   "*→worker-3", "boss→sublead-1→worker-*"])
def test_a_glob_that_may_name_somebody_is_not(actor):
    assert read(f'[[approval_policy]]\nmatch = {{ actor = "{actor}" }}\naction = "block"').warnings == ()


@pytest.mark.parametrize("match, named", [
    # a rule about tools, and what is said of the tool's name
    ('tool_name = "Bash(*rm*)"', '"Bash", never with arguments'), ('tool_name = "Bash"', ""), ('tool_name = "mcp__x__*"', "")])
def test_a_rule_about_the_arguments_of_a_tool_is_warned_of(match, named):
    found = read(f'[[approval_policy]]\nmatch = {{ {match} }}\naction = "block"', 'permission_routing = "path_b"').warnings
    assert [w.path for w in found] == ["approval_policy[0].match.tool_name"] * bool(named)
    assert all(named in w.message for w in found)
    assert not named or pitboss.why_not(rule(tool_name="Bash(*rm*)"), ask(tool="Bash")), "it matches nothing, indeed"


@pytest.mark.parametrize("matches, places", [
    (['tool_name = "Bash"'], ["approval_policy[0]"]), (['category = "tool_use"'], ["approval_policy[0]"]),
    (['category = "plan"', 'category = "tool_use"', 'tool_name = "B*"'], ["approval_policy[1]"]),
    (['category = "plan"'], []), (['cost_over = 1.0', 'actor = "boss"'], [])])
def test_rules_about_tools_that_ask_nobody_are_warned_of_once(matches, places):
    """With path_a a tool runs without a request; only what a lead asks for by itself is of that category."""
    rules = "\n".join(f'[[approval_policy]]\nmatch = {{ {match} }}\naction = "block"' for match in matches)
    found = read(rules).warnings
    assert [w.path for w in found] == places
    assert all("path_b" in w.message and "request_approval" in w.message for w in found)
    assert read(rules, 'permission_routing = "path_b"').warnings == ()


LEAD = '[lead]\nid = "boss"\ndirectory = "."\nprompt = "x"\nmax_workers = 1\nbudget_usd = 1\n'
DEEP = "allow_subleads = true\n"


@pytest.mark.parametrize("text, places", [
    # manifest: where a lead has no more time than one worker
    (LEAD, ["lead"]), (LEAD + "lead_timeout_secs = 3601", []), (LEAD + "lead_timeout_secs = 3600", ["lead.lead_timeout_secs"]),
    ("[run]\nlead_timeout_secs = 60\n" + LEAD, ["run.lead_timeout_secs"]), (LEAD + "timeout_secs = 7200", ["lead"]),
    ("[defaults]\ntimeout_secs = 50\n[run]\nlead_timeout_secs = 60\n" + LEAD, []),
    (LEAD + "lead_timeout_secs = 7200\n" + DEEP + "sublead_defaults = { max_workers = 1, budget_usd = 0.5, lead_timeout_secs = 9 }",
     ["lead.sublead_defaults.lead_timeout_secs"]),
    (LEAD + "lead_timeout_secs = 7200\n" + DEEP + "sublead_defaults = { max_workers = 1, budget_usd = 0.5 }\n[sublead_defaults]\n"
     "lead_timeout_secs = 9", ["sublead_defaults.lead_timeout_secs"]),
    (LEAD + "lead_timeout_secs = 7200\n" + DEEP + "sublead_defaults = { max_workers = 1, budget_usd = 0.5 }", []),
    ('[[task]]\nid = "a"\ndirectory = "."\nprompt = "x"', [])])
def test_a_lead_that_cannot_outlive_a_worker_is_warned_of(text, places):
    found = pitboss.read_manifest(text.encode(), "m", stem="m", env={}, expand=str, agents=pitboss.AGENTS)
    assert found.problems == () and [w.path for w in found.warnings] == places
    assert all(f"one worker {found.tasks[0].worker_timeout_s} s" in w.message for w in found.warnings)


@pytest.mark.parametrize("wrong", ['timeout_secs = "long"', "lead_timeout_secs = 0", "timeout_secs = -1\nlead_timeout_secs = []"])
def test_a_time_that_is_none_is_a_problem_and_no_traceback(wrong):
    found = pitboss.read_manifest(f"{LEAD}{wrong}".encode(), "m", stem="m", env={}, expand=str, agents=pitboss.AGENTS)
    assert len(found.problems) == wrong.count("=")


def test_a_cost_of_nothing_is_not_everything():
    assert read('[[approval_policy]]\nmatch = { cost_over = 0 }\naction = "block"\n'
                '[[approval_policy]]\naction = "block"').warnings == ()


UNWATCHED = [
    # [run], [lead], rules: where a run that nobody watches would wait
    ("", "", "", []),
    ('approval_policy = "block"', "", "", ["run.approval_policy"]),
    ('approval_policy = "auto_reject"\nrequire_plan_approval = true', "", "", []),
    ("require_plan_approval = true", "", "", ["run.require_plan_approval"]),
    ("", 'default_approval_policy = "block"\npermission_routing = "path_b"', "", ["lead.default_approval_policy"]),
    ("", 'permission_routing = "path_b"', "", ["lead.permission_routing"]),
    ("require_plan_approval = true", 'permission_routing = "path_b"', "", ["run.require_plan_approval"]),
    ("require_plan_approval = true", "", '[[approval_policy]]\naction = "auto_approve"', []),
    ('approval_policy = "auto_reject"', "", '[[approval_policy]]\naction = "block"', ["approval_policy[0]"]),
    ("", "", '[[approval_policy]]\nmatch = { actor = "boss" }\naction = "auto_approve"\n[[approval_policy]]\n'
             'match = { category = "plan" }\naction = "block"\n[[approval_policy]]\naction = "block"', ["approval_policy[1]"]),
]


@pytest.mark.parametrize("run, lead, rules, places", UNWATCHED)
def test_what_waits_where_nobody_watches_is_known(run, lead, rules, places):
    found = read(rules, lead, run)
    assert [w.path for w in found.unwatched] == places and found.warnings == ()


def test_it_is_warned_of_where_there_is_no_terminal(home):
    home.repo("repo")
    path = home.manifest('[run]\nmax_workers = 1\nbudget_usd = 1\nrequire_plan_approval = true\n[lead]\nid = "boss"\n'
                         'directory = "repo"\nprompt = "$ say x"\nagent = "demo"\n')
    for command in (("validate",), ("dispatch", "--dry-run")):
        assert "run.require_plan_approval (line 4): there is no terminal" in home.pitboss(*command, path, check=0).stderr


# ------------------------------------------------------------------ who leaves after a no

@pytest.mark.parametrize("refusal, stop, status, after_s, given", [
    ("ApprovalRejected", "", "Success", 29.9, "ApprovalRejected"),
    ("ApprovalTimedOut", "", "Failed", 30.0, "ApprovalTimedOut"),
    ("ApprovalRejected", "linger", "Success", 1, "ApprovalRejected"),
    ("ApprovalRejected", "", "Success", 30.1, "Success"),
    ("", "", "Failed", 1, "Failed"),
    ("ApprovalRejected", "cancel", "Success", 1, "Success"),
    ("ApprovalRejected", "timeout", "TimedOut", 1, "TimedOut"),
    ("ApprovalRejected", "", "SpawnFailed", 1, "SpawnFailed"),
    ("ApprovalRejected", "", None, 1, None)])
def test_who_leaves_within_half_a_minute_of_a_no(refusal, stop, status, after_s, given):
    actor = pitboss.Actor("a", "lead", "demo", "m", "/", False, 1.0, None, refusal=refusal, refused_at=100.0, stop=stop)
    facts = {"status": status, "reason": None} if status else {"again": "resume", "cause": "lost"}
    found = pitboss.decide_refused_end(actor, facts, 100.0 + after_s)
    assert found.get("status") == given
    assert found is facts or found["reason"]["kind"] == "unknown"
