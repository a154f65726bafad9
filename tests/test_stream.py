"""What real claude printed is read right, and the scripted agent prints the same shapes.

tests/data/claude holds output of claude 2.1.197. The table below says what each of these samples means; it
was written by reading them, and it is checked twice: through the whole program, by an agent that prints a
sample and ends as claude ended, and against the program's own reader.
"""
from __future__ import annotations

import contextlib
import json
import math
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

import pitboss
from tools import Home, read_events, read_records, wait_for

SAMPLES = Path(__file__).resolve().parent / "data" / "claude"
ESTIMATE = -1                           # output tokens of a turn that told none: some number above zero
KILLED, TERMINATED = -9, 143            # exit statuses as the agent's parent saw them


class Sample(NamedTuple):
    """One sample, and the record that it must give.

    `tokens` are input, output, cache read, cache creation. `final` that ends in … is how the text begins.
    `says` is a part of the reason's message.
    """
    name: str
    exit: int
    status: str
    kind: str | None
    session: str | None
    tokens: tuple[int, int, int, int]
    cost: float | None
    final: str | None
    says: str = ""


NOTHING = (0, 0, 0, 0)
LIMIT = "API Error: Request rejected (429) · scripted error 429"
TABLE = [
    # Good ends, exit 0.
    Sample("plain", 0, "Success", None, "bfa02565-4b9d-41dc-b04a-f1716c06f7dc", (582, 10, 0, 0), 0.000632,
           "hello world"),
    Sample("bash", 0, "Success", None, "f9a0e77a-941e-4639-b8b3-f3768a65a712", (1438, 162, 0, 0), 0.002248,
           "got: out\nerr\n/CWD\nAI_AGENT…"),
    # A sub-agent's tokens are in modelUsage only; its words are not the last words of the task.
    Sample("subagent", 0, "Success", None, "b4689944-2740-499b-a373-7d91506862d4", (2767, 1088, 0, 0),
           0.008207, "lead got: sub says in-sub\n\n<system-reminder>…"),
    Sample("err_429_once_then_ok", 0, "Success", None, "6b70a9aa-7c0c-41e1-b2c2-af45e6955620", (600, 9, 0, 0),
           0.000645, "recovered"),
    # A result whose own `usage` is all zeros.
    Sample("err_cut_in_stream", 0, "Success", None, "83ec902e-72ae-4aa7-b87f-c32ae6aba017", (637, 60, 0, 0),
           0.000937, "a half a half a half…"),
    # Two results of one process: cost and modelUsage of the last one hold both turns.
    Sample("in_two_turns", 0, "Success", None, "9c404be9-158d-4695-b788-5fc6813f3bd6", (1207, 17, 0, 0),
           0.001292, "second"),
    # The first result is the one of an interrupt, the last one is good.
    Sample("in_interrupt", 0, "Success", None, "d2c55c42-c2d1-4fd5-b9dd-b80d904f42ac", (1380, 45, 0, 0),
           0.001605, "after the interrupt"),
    Sample("in_midflight_tool", 0, "Success", None, "704049c1-2211-471e-b4da-096590535d59", (1381, 102, 0, 0),
           0.001891, "after the tool, newest user text: <<$user>>…"),
    # The result comes before the last events.
    Sample("bash_background", 0, "Success", None, "c156b2cf-a098-49f5-aa39-c71af0c37445", (1403, 51, 0, 0),
           0.001658, "ending"),
    Sample("partial", 0, "Success", None, "289f3711-85e2-453c-b0fe-a2a9e32df0fa", (600, 27, 0, 0), 0.000735,
           "abc abc abc …"),
    Sample("stop_max_tokens", 0, "Success", None, "db578bb3-d72f-4afd-b49b-8fc1b4ad5c18", (1273, 17, 0, 0),
           0.001358, "more"),
    Sample("empty_text", 0, "Success", None, "d8c23d25-2555-4689-b467-25eeae8a1c62", (1217, 32, 0, 0),
           0.001377, ""),
    Sample("slash_prompt", 0, "Success", None, "19ed597d-4db4-405f-b25d-de5112f35e8e", NOTHING, 0,
           "/help isn't available in this environment."),
    # The API refused: subtype says success, `is_error` and the exit status say the truth.
    Sample("err_429_r2", 1, "Failed", "rate_limit", "6d0eb3f2-70f7-4a24-8b0e-bbf2d10a7c2d", NOTHING, 0, LIMIT,
           "429"),
    Sample("err_429_after_tool", 1, "Failed", "rate_limit", "602caadc-ee20-44ae-8fb1-48652f43bd0a",
           (606, 32, 0, 0), 0.000766, LIMIT, "429"),
    Sample("err_401_r1", 1, "Failed", "auth_failure", "3489b7d1-75d9-421e-a48b-51457ce3a6c4", NOTHING, 0,
           "Invalid API key · Fix external API key", "Invalid API key"),
    Sample("err_403", 1, "Failed", "auth_failure", "c94342ec-65b9-4840-81d4-968c1879b6d6", NOTHING, 0,
           "Failed to authenticate. API Error: 403 forbidden", "403 forbidden"),
    Sample("err_no_key", 1, "Failed", "auth_failure", "36f27260-2897-488a-9d5f-ca10381899da", NOTHING, 0,
           "Not logged in · Please run /login", "Not logged in"),
    Sample("err_400_credit", 1, "Failed", "auth_failure", "ea3d0680-3f49-4a3a-ab9e-c77b05524df8", NOTHING, 0,
           "Credit balance is too low", "Credit balance"),
    Sample("err_400", 1, "Failed", "invalid_argument", "9b469c60-079b-4e1e-8388-30fd3615f3a7", NOTHING, 0,
           "API Error: 400 messages.0: something is wrong", "something is wrong"),
    Sample("err_404_model", 1, "Failed", "invalid_argument", "55de2bc7-3bf2-4b63-abf3-440e27d14c9b", NOTHING,
           0, "There's an issue with the selected model (claude-haiku-4-5).…", "selected model"),
    Sample("err_413", 1, "Failed", "invalid_argument", "b6960026-7a9a-42b6-bab9-603c8697cdea", NOTHING, 0,
           "Request too large (max 32MB). Try with a smaller file.", "too large"),
    Sample("err_400_prompt_too_long", 1, "Failed", "context_exceeded", "f979fd05-cac0-47c9-9c4c-2a49d397bfe7",
           NOTHING, 0, "Prompt is too long · the request is ~250000 tokens…", "too long"),
    Sample("err_500_r2", 1, "Failed", "network_error", "e8c895e3-01ca-446d-80fd-5081f89b950b", NOTHING, 0,
           "API Error: 500 scripted error 500.…", "500"),
    Sample("err_529_r2", 1, "Failed", "network_error", "8ca69ee3-6c37-451d-a39a-1790f6384f8c", NOTHING, 0,
           "API Error: 529 scripted error 529.…", "529"),
    Sample("err_refused", 1, "Failed", "network_error", "e6ed5da3-12c5-48a2-acd4-4b74bd92f967", NOTHING, 0,
           "API Error: Unable to connect to API (ConnectionRefused)", "Unable to connect"),
    Sample("stop_refusal", 1, "Failed", "invalid_argument", "bf207f09-85c8-4e6e-b93c-c06ddbae1d11",
           (594, 8, 0, 0), 0.000634, "API Error: Claude Code is unable to respond…", "Usage Policy"),
    # Limits of claude's own: no `result` text.
    Sample("max_turns_2", 1, "Failed", "unknown", "6513cd71-ed0d-4742-918c-6fcb2bfcc413", (1364, 64, 0, 0),
           0.001684, None, "Reached maximum number of turns (2)"),
    Sample("max_budget", 1, "Failed", "unknown", "b8871ded-8b72-48f3-9d32-78196f18748e", (2314, 96, 0, 0),
           0.002794, None, "Reached maximum budget ($0.002)"),
    Sample("resume_unknown", 1, "Failed", "unknown", "99999999-2222-4333-8444-555555555555", NOTHING, 0, None,
           "No conversation found"),
    # Nothing but a sentence on stderr.
    Sample("session_id_again", 1, "Failed", "unknown", None, NOTHING, None, None, "already in use"),
    # Ended by a signal that the dispatcher did not send.
    Sample("sig_SIGTERM_pid_in_bash", TERMINATED, "Failed", "unknown", "449d4649-84db-4bae-b447-006477d5095e",
           (613, ESTIMATE, 0, 0), None, "starting", "SIGTERM"),
    Sample("sig_SIGKILL_pid_in_bash", KILLED, "Failed", "unknown", "76e20ba3-0901-4493-9e62-168c969451c9",
           (613, ESTIMATE, 0, 0), None, "starting", "SIGKILL"),
    Sample("sig_SIGTERM_in_mcp", TERMINATED, "Failed", "unknown", "76725ef5-ed84-466f-b9b6-2936e20f805c",
           (1404, 36, 0, 0), 0.001584, "x", "SIGTERM"),
    # After SIGINT claude exits 0, with a result that is an error or with none: neither is a success.
    Sample("sig_SIGINT_in_stream", 0, "Failed", "unknown", "42289d68-1dc5-4c50-8f6d-a029ed23eb5b", NOTHING,
           None, None),
    Sample("sig_SIGINT_pid_in_bash", 0, "Failed", "unknown", "3f6a2a71-8fa1-4afd-8c69-83f8f18dff9b",
           (613, 46, 0, 0), 0.000843, "starting"),
]
by_name = pytest.mark.parametrize("sample", TABLE, ids=[sample.name for sample in TABLE])


def events_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_sample_is_in_the_table():
    assert sorted(path.stem for path in SAMPLES.glob("*.jsonl")) == sorted(sample.name for sample in TABLE)


# ------------------------------------------------------------------ through the whole program

REPLAY = ('cat "$SAMPLE.jsonl"; if [ -e "$SAMPLE.stderr" ]; then cat "$SAMPLE.stderr" >&2; fi; '
          'if [ "$STATUS" -lt 0 ]; then kill -KILL $$; fi; exit "$STATUS"')


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records of one run whose tasks print the samples.

    Each has an account of its own.  Those that met a limit are held, which only a drain brings to an end.
    """
    home = Home(tmp_path_factory.mktemp("replay"))
    limited = [sample for sample in TABLE if sample.kind == "rate_limit"]
    tasks = "".join(
        f'[[task]]\nid = "{sample.name}"\ndirectory = "."\nprompt = "x"\n'
        f'env = {{ SAMPLE = "{SAMPLES / sample.name}", STATUS = "{sample.exit}", A_KEY = "{sample.name}" }}\n'
        for sample in sorted(TABLE, key=limited.__contains__))
    manifest = home.manifest(
        f'[agent.replay]\ncommand = ["sh", "-c", {json.dumps(REPLAY)}]\nformat = "claude"\n'
        f'[defaults]\nagent = "replay"\nuse_worktree = false\n{tasks}')
    dispatch = home.start("dispatch", manifest)

    def is_held() -> bool:
        events = read_events(home.run_dir()) if any(home.runs.glob("0*/journal.jsonl")) else []
        return sum(e["kind"] == "closed" for e in events) + len(limited) == len(TABLE) and sum(
            e.get("cause") == "limit" for e in events) >= len(limited)

    wait_for(is_held)
    dispatch.send_signal(signal.SIGINT)
    assert dispatch.wait(30) == 130
    yield {record["task_id"]: record for record in read_records(home.run_dir())}
    home.end_everything()


def same_text(found: str | None, expected: str | None) -> bool:
    if expected is not None and expected.endswith("…"):
        return (found or "").startswith(expected[:-1])
    return (found or None) == (expected or None)


def same_tokens(found: tuple, expected: tuple) -> bool:
    return all(there > 0 if wanted == ESTIMATE else there == wanted for there, wanted in zip(found, expected))


@by_name
def test_record(records, sample):
    record = records[sample.name]
    reason = record["failure_reason"]
    usage = record["token_usage"]
    signalled = sample.exit in (KILLED, TERMINATED)
    assert (record["status"], reason and reason["kind"]) == (sample.status, sample.kind), reason
    assert record["exit_code"] == (None if signalled else sample.exit)
    assert sample.says in ((reason or {}).get("message") or ""), reason
    if sample.session:
        assert record["claude_session_id"] == sample.session
    found = (usage["input"], usage["output"], usage["cache_read"], usage["cache_creation"])
    assert same_tokens(found, sample.tokens), f"{found} is not {sample.tokens}"
    if sample.cost is not None:
        assert record["cost_usd"] == pytest.approx(sample.cost, abs=1e-9)
    assert same_text(record["final_message"], sample.final), record["final_message"]


# ------------------------------------------------------------------ the program's own reader

def fold(lines, model: str = "claude-haiku-4-5") -> pitboss.Talk:
    talk = pitboss.Talk(model)
    for line in lines:
        pitboss.fold_line(talk, line, "claude")
    return talk


def lines_of(name: str) -> list[bytes]:
    return (SAMPLES / f"{name}.jsonl").read_bytes().splitlines()


def ending_of(sample: Sample) -> pitboss.Ending:
    """As a shell tells it: a signal is 128 and its number."""
    errors = SAMPLES / f"{sample.name}.stderr"
    code, signal = pitboss.split_status(sample.exit if sample.exit >= 0 else 128 - sample.exit)
    return pitboss.Ending(code, signal, stderr=errors.read_text() if errors.exists() else "")


@by_name
def test_reader(sample):
    talk, end = fold(lines_of(sample.name)), ending_of(sample)
    good = pitboss.succeeded(talk, end, "claude")
    assert good is (sample.status == "Success")
    if not good:
        reason = pitboss.find_reason(talk, end)
        assert reason["kind"] == sample.kind and sample.says in reason["message"], reason
    assert talk.session_id == (sample.session or "")
    assert same_tokens(tuple(talk.usage()), sample.tokens), talk.usage()
    if sample.cost is not None:
        assert talk.cost_usd() == pytest.approx(sample.cost, abs=1e-9)
    assert talk.skipped == 0


def test_nothing_counts_twice_and_estimates_grow_before_the_result():
    """Read up to any line: tokens never fall, and the input of one message counts once."""
    for name in ("bash", "sig_SIGKILL_pid_in_bash", "in_two_turns", "subagent"):
        lines = lines_of(name)
        inputs = [fold(lines[:count]).usage().input for count in range(len(lines) + 1)]
        assert inputs == sorted(inputs), name
    assert fold(lines_of("sig_SIGKILL_pid_in_bash")).usage().input == 613


def test_input_is_open_while_work_goes_on():
    """Done is: a result, and since then no turn and no command in the background."""
    done = [fold(lines_of("bash_background")[:count]).done() for count in range(9)]
    kinds = [kind_of(event) for event in events_of("bash_background")]
    assert kinds[5:] == ["result", "task_updated", "task_notification"]
    assert done == [False] * 7 + [True, True]
    two = [fold(lines_of("in_two_turns")[:count]).done() for count in range(7)]
    assert two == [False, False, False, True, False, False, True]


@pytest.mark.parametrize("word", ["result", "assistant", "system", "user", "init", "isReplay"])
def test_a_prompt_of_one_word_is_no_event(word):
    """An echo that holds a word of the protocol is an echo."""
    echo = next(event for event in events_of("in_midflight_tool") if event.get("isReplay"))
    echo["message"]["content"] = word
    talk = fold([*lines_of("plain")[:1], json.dumps(echo, separators=(",", ":")).encode()])
    assert talk.result is None and talk.skipped == 0
    assert talk.echoed == {echo["uuid"]} and talk.began


def test_words_of_the_work_are_no_protocol():
    """A tool's output that looks like events, on lines of its own, is text inside an event."""
    event = next(e for e in events_of("bash") if e["type"] == "user")
    event["message"]["content"][0]["content"] = "\n".join(map(bytes.decode, lines_of("err_401_r1")))
    lines = lines_of("bash")
    talk = fold([*lines[:2], json.dumps(event).encode(), *lines[3:]])
    assert talk.error == "" and talk.results == 1 and talk.session_id == events_of("bash")[0]["session_id"]


JUNK = [b"", b"not json", b"{", b"[]", b"null", b"{}", b"\xff\xfe\x00", b" " * 1_000_000, b'{"type":"result"',
        b'{"type":"result"}x', b'{"type":"result","result":' + b"[" * 100_000, b'{"type":"assistant"}',
        b'{"type":"assistant","message":"result"}', b'{"type":"system","subtype":[]}',
        b'{"type":"user","isReplay":true}']


@pytest.mark.parametrize("at", range(4))
def test_junk_between_the_lines_changes_nothing(at):
    """Stray output of other programs, half lines, lines that are not text."""
    lines = lines_of("plain")
    talk, clean = fold([*lines[:at], *JUNK, *lines[at:]]), fold(lines)
    assert (talk.usage(), talk.cost_usd()) == (clean.usage(), clean.cost_usd())
    assert (talk.session_id, talk.last_text()) == (clean.session_id, clean.last_text())
    if at < 3:
        assert talk.result == clean.result


# What a message's line may look like, beside one plain text.
TEXTS = ["plain", "two words", 'a "quoted" word', 'ends in a quote"', "ends in \\", "tab\tand\nnewline", " ", "", " x",
         "naïve 読む", '"}],"stop_reason":', '"},{"type":"text","text":"x', "},{", '"usage":{"input_tokens":9}',
         '},"parent_tool_use_id":null,"session_id":"s1"', "x" * 3000]


def message_line(number: int, *blocks: dict, usage: dict | None = None, **more) -> bytes:
    """A message as claude lays it out (2.1.197)."""
    usage = usage or {"input_tokens": number, "cache_creation": {"ephemeral_5m_input_tokens": 2},
                      "cache_creation_input_tokens": 2, "cache_read_input_tokens": 3, "output_tokens": 1}
    event = {"type": "assistant", "message": {
        "id": f"msg_{number // 2}", "type": "message", "role": "assistant", "model": more.pop("model", "claude-x"),
        "content": list(blocks), "stop_reason": None, "stop_sequence": None, "usage": usage,
        "context_management": None}, "parent_tool_use_id": None, "session_id": "s1", "uuid": "u1", **more}
    return json.dumps(event, separators=(",", ":"), ensure_ascii=number % 3 == 0).encode()


def random_lines(random) -> list[bytes]:
    """A conversation of messages of every shape, some of them cut or broken."""
    lines = [b'{"type":"system","subtype":"init","session_id":"s1"}']
    for number in range(random.randrange(1, 12)):
        blocks = [{"type": "text", "text": random.choice(TEXTS)} for _ in range(random.choice([1, 1, 1, 1, 2]))]
        if random.random() < 0.2:
            blocks.append({"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": "ls"}})
        more = random.choice([{}, {}, {}, {"parent_tool_use_id": "toolu_1"}, {"model": "<synthetic>", "error": "x"},
                              {"session_id": "s2"}, {"request_id": "r"}])
        line = message_line(number, *blocks, **more)
        if random.random() < 0.1:
            line = random.choice([line[:-1], line[:len(line) // 2], line.replace(b"}],", b"]},", 1)])
        lines.append(line)
        if random.random() < 0.1:
            lines.append(b'{"type":"result","session_id":"s1","modelUsage":{"m":{"inputTokens":7}},"result":"done"}')
    return lines


@pytest.mark.parametrize("seed", range(300))
def test_skimming_tells_what_reading_every_line_tells(seed):
    """A message counted without parsing gives the same account, but for an estimate of its characters."""
    from random import Random

    lines, skimmed, read = random_lines(Random(seed)), pitboss.Talk("claude-x"), pitboss.Talk("claude-x")
    pitboss.fold_lines(skimmed, lines, "claude")
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
            pitboss.fold_claude(read, line)
    for name in ("session_id", "began", "open", "error", "text", "words"):
        assert getattr(skimmed, name) == getattr(read, name), name
    assert list(skimmed.running) == list(read.running)
    assert skimmed.usage()[:1] + skimmed.usage()[2:] == read.usage()[:1] + read.usage()[2:]
    assert abs(skimmed.usage().output - read.usage().output) <= read.usage().output // 4 + 4 * len(lines)


def test_a_plain_message_is_skimmed():
    talk = pitboss.Talk("claude-x")
    talk.session_id = "s1"
    for text, taken in {"plain": True, "two words": True, 'a "quoted" word': True, "naïve": True, " x": False}.items():
        assert pitboss.skim_claude(talk, message_line(0, {"type": "text", "text": text})) is taken, text
        assert talk.unread or not taken
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert not pitboss.skim_claude(talk, message_line(0, *two))


STRANGE = ["null", "true", "-1", "1e400", "NaN", "1" + "0" * 400, '""', '"x"', r'"\ud800"', "[]", "{}",
           "[[]]"]


def variants(value):
    """`value` again and again, each time with one field, at any depth, replaced by a mark."""
    yield "MARK"
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            for inner in variants(value[key]):
                copy = dict(value) if isinstance(value, dict) else list(value)
                copy[key] = inner
                yield copy


@pytest.mark.parametrize("name", ["plain", "err_429_r2", "bash_background", "rate_limit"])
def test_strange_values_do_no_harm(name):
    """Whatever stands in a field, no error comes out, and what is told can be journalled."""
    events = events_of(name) if name != "rate_limit" else [
        {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1}}]
    harm = []
    for at, event in enumerate(events):
        for variant in variants(event):
            for strange in STRANGE:
                lines = [json.dumps(e, separators=(",", ":")) for e in events]
                lines[at] = json.dumps(variant, separators=(",", ":")).replace('"MARK"', strange)
                try:
                    check_told(fold(line.encode() for line in lines))
                except Exception as error:          # every kind of harm is listed
                    harm.append(f"{lines[at][:300]}: {error!r}")
    assert harm == []


def check_told(talk: pitboss.Talk) -> None:
    """What a talk tells has the right types, and JSON can hold it."""
    reason = pitboss.find_reason(talk, pitboss.Ending(1))
    json.dumps([reason, talk.usage(), talk.cost_usd(), talk.session_id, talk.last_text(), talk.words,
                sorted(talk.echoed), sorted(talk.tasks)], allow_nan=False)
    assert all(type(count) is int and 0 <= count < 1 << 63 for count in talk.usage()), talk.usage()
    assert math.isfinite(talk.cost_usd()) and talk.cost_usd() >= 0
    assert isinstance(talk.session_id, str) and isinstance(talk.last_text(), str)
    assert isinstance(reason["kind"], str) and isinstance(reason["message"], str)


# ------------------------------------------------------------------ the scripted agent prints the same shapes

FREE = ("message.content[].input", "tool_use_result")     # whatever a tool takes or gives


def kind_of(event: dict) -> str:
    """The name of the shape that an event has."""
    kind = event["type"]
    if kind == "assistant":
        if event["message"]["model"] == "<synthetic>":
            return "failure" if event.get("error") else "no answer of a model"
        return f"assistant {event['message']['content'][0]['type']}"
    if kind == "user":
        return "echo" if event.get("isReplay") else "tool result" if "tool_use_result" in event else "user"
    if kind == "result":
        return "result of an error" if event["is_error"] else "result"
    return event.get("subtype", kind)


def paths(value, at: str = ""):
    """(path, type) of each field in an event."""
    kinds = {dict: "object", list: "list", str: "text", bool: "bool", int: "number", float: "number"}
    yield at, "null" if value is None else kinds[type(value)]
    if at in FREE:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            if at == "modelUsage":
                key = "MODEL"
            yield from paths(inner, f"{at}.{key}" if at else key)
    if isinstance(value, list):
        for inner in value:
            yield from paths(inner, at + "[]")


class Shape:
    """What the events of one kind look like: the types at each path, and the paths that all of them have."""

    def __init__(self) -> None:
        self.types: dict[str, set[str]] = {}
        self.always: set[str] | None = None

    def add(self, event: dict) -> None:
        seen = set()
        for path, kind in paths(event):
            self.types.setdefault(path, set()).add(kind)
            seen.add(path)
        self.always = seen if self.always is None else self.always & seen


def shapes(events) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for event in events:
        if not event.get("parent_tool_use_id"):
            found.setdefault(kind_of(event), Shape()).add(event)
    return found


SCRIPT = """
$ say hello
$ write made.txt a line
$ run echo out; echo err >&2; false
$ commit work
"""
DEMO_TASKS = {"works": SCRIPT, "is_limited": "$ say first\n$ limit 1 1", "is_refused": "$ auth",
              "fails": "$ fail a reason"}
# Fields of real events that the scripted agent leaves out, and why.
LEFT_OUT = {
    "agents[]": "it has no sub-agents",
    "analytics_disabled": "a switch of claude's own",
    "product_feedback_disabled": "a switch of claude's own",
    "fast_mode_state": "a switch of claude's own",
    "memory_paths": "it reads no memory files",
    "request_id": "it makes no requests",
    "message.container": "always null, and nothing reads it",
    "message.context_management": "always null, and nothing reads it",
    "message.stop_details": "always null, and nothing reads it",
    "usage.": "details of the provider's bill; modelUsage has what counts",
    "message.usage.": "details of the provider's bill, in a message that cost nothing",
}
# Kinds that the scripted agent prints and no sample has.
NO_SAMPLE = {"rate_limit_event": "a subscription's limit; tests/test_claude.py sees the real one"}


def is_left_out(path: str) -> bool:
    return path in LEFT_OUT or any(path.startswith(prefix.rstrip(".") + ".") for prefix in LEFT_OUT)


@pytest.fixture(scope="module")
def demo_events(tmp_path_factory):
    """All that the scripted agent printed in one run of each kind of ending."""
    home = Home(tmp_path_factory.mktemp("demo"))
    home.repo()
    tasks = "".join(f'[[task]]\nid = "{name}"\ndirectory = "repo"\nprompt = {json.dumps(script)}\n'
                    f'env = {{ PITBOSS_DEMO_ACCOUNT = "{name}" }}\n'
                    for name, script in DEMO_TASKS.items())
    home.pitboss("dispatch", home.manifest(f'[defaults]\nagent = "demo"\n{tasks}'), check=1)
    logs = home.run_dir().glob("tasks/*/stdout.log")
    yield [json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    home.end_everything()


@pytest.fixture(scope="module")
def real_shapes():
    return shapes(event for sample in TABLE for event in events_of(sample.name))


DEMO_KINDS = ["init", "assistant text", "assistant tool_use", "tool result", "echo", "api_retry", "failure",
              "result", "result of an error"]


@pytest.mark.parametrize("kind", DEMO_KINDS)
def test_the_scripted_agent_prints_what_claude_prints(demo_events, real_shapes, kind):
    """No field that claude does not have, no type that its field never has, nothing silently left out."""
    ours, real = shapes(demo_events).get(kind), real_shapes[kind]
    assert ours, f"the scripted agent printed no {kind}"
    assert sorted(set(ours.types) - set(real.types)) == [], "fields that claude does not have"
    wrong = {path: types - real.types[path] for path, types in ours.types.items() if types - real.types[path]}
    assert wrong == {}
    missing = real.always - ours.always
    assert sorted(path for path in missing if not is_left_out(path)) == []


def test_no_kind_of_its_own(demo_events, real_shapes):
    assert set(shapes(demo_events)) - set(real_shapes) <= set(NO_SAMPLE)
