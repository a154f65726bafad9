"""What is shown is short, aligned, safe on a terminal, and free of secrets, whatever the text was."""
from __future__ import annotations

import datetime
import json
import random
import re

import pytest

import pitboss

WIDE = "漢字かな混じり"
RUBBISH = "".join(map(chr,
                      range(0x20))) + "\x7f\x85\x9b" + "aZ09 ä漢e\u0301\u200b🎉\ud800\"\\'{}[]*$" + "\x1b[31m"


def random_text(chance: random.Random, length: int = 40) -> str:
    return "".join(chance.choice(RUBBISH) for _ in range(chance.randrange(length)))


@pytest.mark.parametrize("seconds, shown", [
    (-5, "0.0s"), (0, "0.0s"), (0.44, "0.4s"), (9.94, "9.9s"), (10, "10s"), (59.9, "59s"), (60, "1m00s"),
    (65, "1m05s"), (3599, "59m59s"), (3600, "1h00m"), (7380, "2h03m"), (86399, "23h59m"), (86400, "1d00h"),
    (273600, "3d04h"), (1e9, "11574d01h"),
])
def test_durations(seconds, shown):
    assert pitboss.render_duration(seconds) == shown


@pytest.mark.parametrize("text, seconds", [
    ("0s", 0), ("30s", 30), ("90m", 5400), ("24h", 86400), ("7d", 604800), ("2w", 1209600), ("1d12h", 129600), ("0.5h", 1800)])
def test_durations_are_read(text, seconds):
    assert pitboss.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "-1h", "1 h", "1h ", "1e3s", "nan", "inf", "1H", "٣h", "1.h", "1..5h", "9" * 400 + "d"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="24h"):
        pitboss.parse_duration(text)


@pytest.mark.parametrize("count, shown", [
    (0, "0"), (950, "950"), (999, "999"), (1000, "1.0k"), (12_300, "12.3k"), (4_500_000, "4.5M")])
def test_tokens(count, shown):
    assert pitboss.render_tokens(count) == shown


@pytest.mark.parametrize("amount, shown", [
    (None, "-"), (0, "$0.0000"), (0.0042, "$0.0042"), (0.1, "$0.10"), (1.25, "$1.25"), (1234.5, "$1234.50")])
def test_money(amount, shown):
    assert pitboss.render_usd(amount) == shown


@pytest.mark.parametrize("count, shown",
                         [(512, "512 B"), (3.4e3, "3.4 kB"), (3.4e6, "3.4 MB"), (20e9, "20.0 GB")])
def test_bytes(count, shown):
    assert pitboss.render_bytes(count) == shown


def test_moments_are_utc_with_milliseconds():
    assert pitboss.render_time(None) is None
    assert pitboss.render_time(0.0) == "1970-01-01T00:00:00.000Z"
    assert pitboss.render_time(1795275595.9996) == "2026-11-21T15:39:56.000Z"
    chance = random.Random(1)
    for _ in range(300):
        millis = chance.randrange(4_000_000_000_000)
        there = datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=millis)
        shown = there.strftime("%Y-%m-%dT%H:%M:%S.") + f"{millis % 1000:03d}Z"
        assert pitboss.render_time(millis / 1000) == shown


@pytest.mark.parametrize("text, shown", [
    ("plain ä 漢", "plain ä 漢"),
    ("a\nb\tc\rd", "a b c d"),
    ("\x1b[31;1mred\x1b[0m", "red"),
    ("\x1b]0;title\x07x", "x"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bcreset", "reset"),
    ("\x9b31mred", "31mred"),
    ("nul\0bell\x07", "nulbell"),
    ("half \ud83d pair", "half  pair"),
])
def test_what_an_agent_printed_is_made_safe(text, shown):
    assert pitboss.clean_text(text) == shown


def test_nothing_that_moves_a_cursor_survives():
    chance = random.Random(2)
    for _ in range(2000):
        shown = pitboss.clean_text(random_text(chance))
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", shown)
        shown.encode("utf-8")


@pytest.mark.parametrize("text, width", [
    ("", 0), ("abc", 3), ("ä", 1), ("漢", 2), (WIDE, 14), ("e\u0301", 1), ("a\u200bb", 2), ("🎉", 2), ("ｗ", 2)])
def test_width_is_counted_in_columns(text, width):
    assert pitboss.cell_width(text) == width


def test_clipping_and_padding_keep_to_the_columns():
    chance = random.Random(3)
    for _ in range(2000):
        text, width = pitboss.clean_text(random_text(chance)), chance.randrange(1, 30)
        clipped = pitboss.clip_cells(text, width)
        assert pitboss.cell_width(clipped) <= width
        assert clipped == text or clipped.endswith("…") and text.startswith(clipped[:-1])
        for right in (False, True):
            assert pitboss.cell_width(pitboss.pad_cells(text, width, right)) == width
    assert pitboss.clip_cells("abc", 0) == ""
    assert pitboss.pad_cells("7", 3, right=True) == "  7" and pitboss.pad_cells("7", 3) == "7  "


def test_tables_are_aligned_and_no_wider_than_the_terminal():
    rows = [["ID", "N", "WORDS"], ["漢字", "7", "short"], ["b", "1234", "long " * 20]]
    lines = pitboss.render_table(rows, right=(1,))
    assert lines[0] == "ID       N  WORDS" and lines[1] == "漢字     7  short"
    assert {pitboss.cell_width(line[:line.index(word)]) for line,
            word in zip(lines, ("WORDS", "short", "long"))} == {12}
    assert all(pitboss.cell_width(line) <= 30 for line in pitboss.render_table(rows, width=30))
    assert pitboss.render_table([]) == []


@pytest.mark.parametrize("word, hint", [
    ("timeout_sec", "; did you mean timeout_secs?"), ("PROMPT", "; did you mean prompt?"), ("xyzzy", "")])
def test_a_near_miss_is_suggested(word, hint):
    assert pitboss.did_you_mean(word, ["timeout_secs", "prompt", "branch"]) == hint


# ------------------------------------------------------------------ secrets

def through_json(mask: pitboss.Mask, value):
    """A value as a reader of a masked JSON document finds it."""
    return json.loads(json.dumps(mask.value({"final": value})))["final"]


TOKENS = (       # one of each shape that is known without a variable
    "sk-ant-api03-AbCdEf0123456789_-", "sk-proj-0123456789abcdef", "ghp_" + "a1" * 18, "gho_" + "a1" * 18,
    "ghu_" + "a1" * 18, "ghs_" + "a1" * 18, "ghr_" + "a1" * 18, "github_pat_" + "a1_" * 10,
    "glpat-" + "a1-" * 7,
    "xoxb-1234567890-abc", "xoxp-1234567890-abc", "AKIA" + "A1B2" * 4, "AIza" + "a1-_" * 9,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-_123")
AROUND = ("{}", "the key is {}", "KEY={}", "({})", "{}, and more", "\"{}\"", "a\n{}", "a\n{}\nb", "\t{}",
          "\\{}",
          "\x1b[01;31m\x1b[K{}\x1b[m",
          "ä {}", "密钥是{}。", "{}漢")
NAMED = (        # values of variables, with all that JSON must escape
    "hunter2hunter2", 'quote"inside', "back\\slash", "line\nbreak", "tab\tinside", "ümlaut-ß", "漢字漢字漢字",
    "a b c d e f",
    "per%cent$dollar", "(paren[thesis)*+?", "emoji🎉🎉🎉🎉")


@pytest.mark.parametrize("token", TOKENS, ids=lambda t: t[:6])
def test_well_known_tokens_are_masked_wherever_they_stand(token):
    wrong = []
    for around in AROUND:
        text = around.format(token)
        if {pitboss.make_mask(()).text(text), through_json(pitboss.make_mask(()), text)} != {around.format("***")}:
            wrong.append(around)
    assert wrong == []


def test_words_that_only_begin_like_a_token_stay():
    for text in ("sk-short", "task-abcdefghijklmnopqrstuvwxyz", "ghp_x", "AKIA", "eyJ.eyJ", "xoxo-hugs",
                 "risk-adjusted-return-rate"):
        assert pitboss.make_mask(()).text(text) == text
        assert through_json(pitboss.make_mask(()), text) == text


def test_values_of_variables_that_look_like_secrets_are_masked():
    for value in NAMED:
        mask = pitboss.make_mask([{"MY_API_KEY": value}])
        for around in AROUND:
            text = around.format(value)
            assert value not in mask.text(text)
            assert through_json(mask, [text]) == [around.format("***")], (value, around)


@pytest.mark.parametrize("name, masked", [
    ("API_KEY", True), ("api_key", True), ("GITHUB_TOKEN", True), ("ClientSecret", True),
    ("PGPASSWORD", True),
    ("CREDENTIALS", True), ("MY_PASSWD", True), ("DATABASE_URL", True), ("HOST_NAME", False),
    ("PATH", False)])
def test_names_decide_what_is_secret(name, masked):
    mask = pitboss.make_mask([{name: "the-value"}], ["DATABASE_*"])
    assert (mask.text("it is the-value.") == "it is ***.") == masked


def test_short_and_empty_values_are_no_secrets():
    mask = pitboss.make_mask([{"A_KEY": "", "B_KEY": "a", "C_KEY": "12345", "D_KEY": "123456"}])
    assert mask.text("a 12345 b") == "a 12345 b"
    assert mask.text("123456") == "***"


def test_the_longest_secret_is_masked_first():
    mask = pitboss.make_mask([{"A_KEY": "secret", "B_KEY": "secret-longer"}])
    assert mask.text("x secret-longer x") == "x *** x"


def test_secrets_of_several_environments_are_masked():
    mask = pitboss.make_mask([{"A_KEY": "first-value"}, {"B_TOKEN": "second-value"}])
    assert mask.text("first-value second-value") == "*** ***"


@pytest.mark.parametrize("secret, text", [
    ("newpassword", "a\newpassword"), ("table-top", "x\table-top"), ("u00e9cole", "école"),
    ("123456", "no digits")])
def test_a_mask_never_breaks_json(secret, text):
    """A secret may look like the inside of an escape, or like a number."""
    mask = pitboss.make_mask([{"A_KEY": secret}])
    for value in (text, 123456789, 0.123456, True, None):
        assert through_json(mask, value) == value


@pytest.mark.parametrize("word", ["placed", "postgres", "timeout", "cancel", "rate_limit", "no_space",
                                  "prompt", "1795275"])
def test_a_mask_leaves_what_a_run_works_with(word):
    """A weak password may be a word of the journal, or a part of a path: the run must go on as it is."""
    mask = pitboss.make_mask([{"DB_PASSWORD": word}])
    facts = {"kind": word, "actor": word, "directory": f"/home/{word}/x", "model": word, "branch": word,
             "session_id": word,
             "place": {"path": f"/{word}", "branch": word},
             "handle": {"marker": f"{word}:a:1", "start": word}, "why": word,
             "how": word, "again": word, "cause": word, "status": word, "worktree_path": f"/{word}",
             "rescue_ref": f"refs/{word}",
             "reason": {"kind": word, "resets_at": 1795275595.5}, "usage": [1795275, 0, 0, 0]}
    assert mask.value(facts) == facts
    words = {"final": word, "reason": {"kind": "unknown", "message": word}, "prompt_preview": word,
             "leftovers": [f"7 {word}"],
             "final_message": word, "final_message_preview": word}
    assert word not in json.dumps(list(mask.value(words).values()))


def test_random_texts_with_random_secrets_stay_json_without_the_secret():
    chance = random.Random(4)
    alphabet = "abnrtuf019\\\"/ äé漢\n\t"
    for _ in range(1000):
        secret = "".join(chance.choice(alphabet) for _ in range(chance.randrange(6, 9)))
        text = "".join(chance.choice((secret, secret[1:], secret[:-1], *alphabet)) for _ in range(12))
        mask = pitboss.make_mask([{"A_KEY": secret}])
        assert through_json(mask, text) == mask.text(text)
        assert secret not in mask.text(text)
