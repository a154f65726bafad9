"""A stand-in for the APIs of models on 127.0.0.1: the tests drive real agents offline with it.

It speaks Anthropic's Messages (claude, opencode), OpenAI's Responses (codex) and Gemini's generateContent.

What the "model" does is written in the prompt, so one server serves any number of agents at a time, and a
test reads as what it is about. The server remembers nothing of a conversation: where it stands in its script
follows from the messages that the client sends along, which also makes it right after a crash and a resume.

    server = fake_api.start(bodies=folder)            in a test; server.url is its address
    python3 tests/fake_api.py --port-file P --log L   by hand, with ANTHROPIC_BASE_URL=http://127.0.0.1:PORT

The script is a JSON list after a line that starts with `SCRIPT:`, in the newest user message that has one; it
may span lines, and what stands around it is ignored, as is everything inside tool results.

Steps that answer, one assistant turn each:
  {"text": "hello"}                          say it and end the turn
  {"tool": "Bash", "input": {...}}           call a tool; a "text" beside it is said first
  {"tools": [{"tool":.., "input":..}, ..]}   call several in one turn
and what they may have:
  "thinking": "..."      a thinking block first
  "sleep": 1.5           seconds before the first byte
  "stall": 1.5           seconds inside the stream, after the first block was opened
  "drip": 0.05           seconds between pieces of text ("chunk": 20 characters each)
  "repeat": 1000         the text that many times
  "cut": true            drop the connection inside the stream
  "stop_reason", "model" instead of the usual ones
  "usage": {...}         laid over the made-up token counts
  "until": {"path": v}   (tools) the same step again until its first result has the value, or one of a list

Steps that do not answer, acted on before the next one that does:
  {"sleep": 1.5}
  {"error": 429, "times": 2, "type": "...", "message": "...", "headers": {...}}
                         fail with this HTTP status, `times` times for each session (without: always)

A script that is over, and a prompt without one, are answered with a plain sentence that says so.

Any string of a step may quote the conversation:
  "$1", "$1.a.0.b"       the whole string: the result of step 1, or what is at that path in its JSON
  "$2#1.a"               the second call of step 2
  "x ${1.a} y"           inside a longer string
  "$user", "${user}"     the newest user message
A quotation that leads nowhere stays as it stands, to be seen in the client's log.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCRIPT_LINE = re.compile(r"^SCRIPT:\s*", re.M)
WHOLE_QUOTE = re.compile(r"\$(\d+|user)(?:#(\d+))?((?:\.[\w-]+)*)\Z")
INNER_QUOTE = re.compile(r"\$\{(\d+|user)(?:#(\d+))?((?:\.[\w-]+)*)\}")
ANSWER_KEYS = ("text", "tool", "tools", "thinking")
FILLER = "No response requested."        # claude puts this into our mouth where a killed turn has no answer
ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    500: "api_error", 529: "overloaded_error",
}


# ------------------------------------------------------------------ the script

def new_id(prefix):
    return prefix + uuid.uuid4().hex[:24]


class Turn:
    """One message of a conversation."""

    def __init__(self, role, text="", calls=(), results=None, said=""):
        self.role = role                # "user" or "assistant"
        self.text = text
        self.said = said                # the text without what the client added to it
        self.calls = list(calls)        # assistant: the ids of its tool calls, in order
        self.results = results or {}    # user: call id to result text


def find_script(text):
    """The script in a message, or None; a malformed one raises ValueError."""
    match = SCRIPT_LINE.search(text)
    if not match:
        return None
    script, _ = json.JSONDecoder().raw_decode(text, match.end())
    if not isinstance(script, list) or not all(isinstance(step, dict) for step in script):
        raise ValueError("a script is a JSON list of objects")
    return script


def answers(step):
    return any(key in step for key in ANSWER_KEYS)


def lookup(value, path):
    for key in path:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def as_json(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


class Plan:
    """Where a conversation stands in its script, and what comes next."""

    def __init__(self, turns):
        self.turns = turns
        self.script, start = None, 0
        for at, turn in enumerate(turns):
            script = find_script(turn.text) if turn.role == "user" else None
            if script is not None:
                self.script, start = script, at
        asked = [turn.said or turn.text for turn in turns if turn.role == "user" and turn.text]
        self.user = asked[-1] if asked else ""
        self.name = hashlib.sha256(json.dumps(self.script).encode()).hexdigest()[:16]
        self.results = {}               # step number to its results
        self.before = []                # (number, step) to act on before the answer
        self.step, self.number = {"text": "(no script in this conversation)"}, 0
        if self.script is not None:
            self._find_place(turns[start + 1:])

    def _find_place(self, later):
        texts = {call: text for turn in later for call, text in turn.results.items()}
        at = self._skip(0)
        for turn in later:
            if turn.role != "assistant" or at >= len(self.script) or turn.text == FILLER:
                continue
            self.results[at + 1] = [as_json(texts.get(call, "")) for call in turn.calls]
            if not self._again(self.script[at], self.results[at + 1]):
                at = self._skip(at + 1)
        first = at
        while first > 0 and not answers(self.script[first - 1]):
            first -= 1
        self.before = [(n + 1, self.script[n]) for n in range(first, at)]
        self.number = at + 1
        self.step = self._fill(self.script[at]) if at < len(self.script) else {"text": "(the script is over)"}

    def _skip(self, at):
        while at < len(self.script) and not answers(self.script[at]):
            at += 1
        return at

    @staticmethod
    def _again(step, results):
        for path, wanted in (step.get("until") or {}).items():
            try:
                value = lookup(results[0], path.split("."))
            except (LookupError, TypeError, ValueError):
                return True
            if value not in (wanted if isinstance(wanted, list) else [wanted]):
                return True
        return False

    def _quoted(self, match):
        name, call, path = match.groups()
        value = self.user if name == "user" else self.results[int(name)][int(call or 0)]
        return lookup(value, [part for part in path.split(".") if part])

    def _inside(self, match):
        try:
            value = self._quoted(match)
        except (LookupError, TypeError, ValueError):
            return match.group(0)
        return value if isinstance(value, str) else json.dumps(value)

    def _fill(self, value):
        """`value` with its quotations in place."""
        if isinstance(value, dict):
            return {key: self._fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._fill(inner) for inner in value]
        if not isinstance(value, str):
            return value
        whole = WHOLE_QUOTE.match(value)
        if whole:
            try:
                return self._quoted(whole)
            except (LookupError, TypeError, ValueError):
                return value
        return INNER_QUOTE.sub(self._inside, value)

    def calls(self):
        return self.step.get("tools") or ([self.step] if "tool" in self.step else [])

    def text(self):
        text = self.step.get("text", "")
        return (text if isinstance(text, str) else json.dumps(text)) * self.step.get("repeat", 1)


# ------------------------------------------------------------------ its shape in the Messages API

def block_text(content):
    """The text of a content field, which is a string or a list of blocks."""
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text", "") for block in content or [] if block.get("type") == "text")


def to_turn(message):
    content = message.get("content")
    blocks = [] if isinstance(content, str) else content or []
    own = [block for block in blocks if not block.get("text", "").startswith("<system-reminder>")]
    return Turn(
        message.get("role"), block_text(content),
        [block["id"] for block in blocks if block.get("type") == "tool_use"],
        {block["tool_use_id"]: block_text(block.get("content"))
         for block in blocks if block.get("type") == "tool_result"},
        block_text(own))


def to_blocks(plan):
    blocks = []
    if plan.step.get("thinking"):
        blocks.append({"type": "thinking", "thinking": plan.step["thinking"], "signature": "ZmFrZQ=="})
    if plan.text():
        blocks.append({"type": "text", "text": plan.text()})
    for call in plan.calls():
        blocks.append({"type": "tool_use", "id": "toolu_" + uuid.uuid4().hex[:24],
                       "name": call["tool"], "input": call.get("input", {})})
    return blocks


def made_up_usage(body, blocks):
    return {"input_tokens": max(1, len(json.dumps(body.get("messages", []))) // 4),
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
            "output_tokens": max(1, len(json.dumps(blocks)) // 4)}


def session_id(body):
    """The client's session. Nothing else of the metadata stays: two claudes that start at once in a new
    home each make up a device id, and a later one says the id of whichever was written last."""
    user = str((body.get("metadata") or {}).get("user_id"))
    try:
        return json.loads(user)["session_id"]
    except (ValueError, TypeError, KeyError):
        return user


def pieces(text, size):
    return [text[at:at + size] for at in range(0, len(text), size)] or [""]


# ------------------------------------------------------------------ its shape in the other APIs

def responses_turns(body):
    """The `input` of OpenAI's Responses is a flat list; what the model made in one go is one turn."""
    turns = []

    def turn_of(role):
        if not turns or turns[-1].role != role:
            turns.append(Turn(role))
        return turns[-1]

    for item in body.get("input") or []:
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") in ("user", "assistant"):
            text = "\n".join(part.get("text", "") for part in item.get("content") or [])
            turn = turn_of(item["role"])
            turn.text = "\n".join(filter(None, (turn.text, text)))
        elif kind == "function_call":
            turn_of("assistant").calls.append(item["call_id"])
        elif kind == "function_call_output":
            output = item.get("output") or ""
            if isinstance(output, list):
                output = "\n".join(part.get("text", "") for part in output)
            # codex puts a head that ends in `Output:` before what a tool gave
            turn_of("user").results[item["call_id"]] = output.split("\nOutput:\n", 1)[-1]
    return turns


def gemini_turns(body):
    """Calls have no ids that can be relied on here: results belong to calls by their order."""
    turns, calls = [], []
    for n, content in enumerate(body.get("contents", [])):
        parts = content.get("parts", [])
        text = "\n".join(part["text"] for part in parts if part.get("text") and not part.get("thought"))
        if content.get("role") == "model":
            calls = [f"{n}-{i}" for i, part in enumerate(p for p in parts if "functionCall" in p)]
            turns.append(Turn("assistant", text, calls))
        else:
            answers = [part["functionResponse"].get("response") for part in parts if "functionResponse" in part]
            turns.append(Turn("user", text, results={
                call: a["output"] if isinstance(a, dict) and list(a) == ["output"] else json.dumps(a)
                for call, a in zip(calls, answers)}))
    return turns


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "fake"

    # plumbing

    def log_message(self, *args):
        pass

    def note(self, **more):
        secret = ("x-api-key", "authorization")
        headers = {k: "(redacted)" if k.lower() in secret else v for k, v in self.headers.items()}
        self.server.note({"t": round(time.time(), 3), "method": self.command, "path": self.path,
                          "headers": headers, **more})

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while True:
                size = int(self.rfile.readline().split(b";")[0], 16)
                part = self.rfile.read(size + 2)[:-2]
                if not size:
                    return b"".join(parts)
                parts.append(part)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send_json(self, status, value, headers=None):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("request-id", "req_" + uuid.uuid4().hex[:20])
        for name, text in (headers or {}).items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def begin_sse(self):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("cache-control", "no-cache")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("request-id", "req_" + uuid.uuid4().hex[:20])
        self.end_headers()

    def event(self, kind, **fields):
        data = f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def end_sse(self):
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    # methods

    def do_HEAD(self):
        self.note(status=200)
        self.send_json(200, {})

    def do_GET(self):
        self.note(status=200)
        models = self.path.split("?")[0] == "/v1/models"
        self.send_json(200, {"data": [], "has_more": False} if models else {})

    def do_POST(self):
        raw = self.body()
        try:
            body = json.loads(raw or b"{}")
        except ValueError:
            body = {}
        self.server.keep(raw)
        try:
            self.route(self.path.split("?")[0], body)
        except (BrokenPipeError, ConnectionResetError) as error:
            self.note(gone=type(error).__name__)
            self.close_connection = True

    def route(self, path, body):
        if path == "/v1/messages":
            return self.messages(body)
        if path == "/v1/messages/count_tokens":
            self.note(status=200)
            return self.send_json(200, {"input_tokens": max(1, len(json.dumps(body)) // 4)})
        if path.endswith("/responses"):
            return self.openai_responses(body)
        if path.endswith(":streamGenerateContent") or path.endswith(":generateContent"):
            return self.gemini(path, body)
        if path.endswith(":countTokens"):
            self.note(status=200)
            return self.send_json(200, {"totalTokens": max(1, len(json.dumps(body)) // 4)})
        self.note(status=404, body=body)
        self.send_json(404, {"type": "error", "error": {"type": "not_found_error", "message": path}})

    def fail(self, status, step):
        error = {"type": step.get("type") or ERROR_TYPES.get(status, "api_error"),
                 "message": step.get("message", f"scripted error {status}")}
        if not self.path.startswith("/v1/messages"):
            error = {**error, "code": status, "status": step.get("status", "")}
        self.send_json(status, {"type": "error", "error": error}, step.get("headers"))

    def plan(self, body, turns=None, **more):
        """What to answer with, after the waits before it; None where an error was sent instead."""
        try:
            if turns is None:
                turns = [to_turn(message) for message in body.get("messages", [])]
            plan = Plan(turns)
        except ValueError as error:
            self.note(status=400, bad_script=str(error), **more)
            self.fail(400, {"message": f"bad SCRIPT: {error}"})
            return None
        session = session_id(body)      # tells apart conversations that began alike
        for number, step in plan.before:
            if "error" in step:
                done = self.server.count((session, plan.name, number))
                if done <= step.get("times", done):
                    self.note(status=step["error"], step=number, time_no=done, **more)
                    self.fail(step["error"], step)
                    return None
            elif "sleep" in step:
                time.sleep(step["sleep"])
        self.note(status=200, step=plan.number, **more)
        time.sleep(plan.step.get("sleep", 0))
        return plan

    def messages(self, body):
        plan = self.plan(body, model=body.get("model"), stream=bool(body.get("stream")),
                         n_messages=len(body.get("messages", [])), n_tools=len(body.get("tools", [])),
                         max_tokens=body.get("max_tokens"))
        if plan is None:
            return
        if plan.calls() and not body.get("tools"):
            plan.step = {"text": "(no tools were offered)"}
        step = plan.step
        blocks = to_blocks(plan)
        message = {"id": "msg_" + uuid.uuid4().hex[:24], "type": "message", "role": "assistant",
                   "model": step.get("model") or body.get("model"), "content": blocks,
                   "stop_reason": step.get("stop_reason") or ("tool_use" if plan.calls() else "end_turn"),
                   "stop_sequence": None, "usage": {**made_up_usage(body, blocks), **step.get("usage", {})}}
        if body.get("stream"):
            self.stream(message, step)
        else:
            self.send_json(200, message)

    def openai_responses(self, body):
        """OpenAI's Responses API, streamed, as codex asks it."""
        plan = self.plan(body, responses_turns(body), model=body.get("model"),
                         n_tools=len(body.get("tools", [])))
        if plan is None:
            return
        output = []
        if plan.text():
            output.append({"type": "message", "id": new_id("msg_"), "role": "assistant", "status": "completed",
                           "content": [{"type": "output_text", "text": plan.text(), "annotations": []}]})
        for call in plan.calls():
            item = {"type": "function_call", "id": new_id("fc_"), "call_id": new_id("call_"),
                    "name": call["tool"], "status": "completed", "arguments": json.dumps(call.get("input", {}))}
            spaces = [t["name"] for t in body.get("tools", []) if t.get("type") == "namespace"]
            for space in spaces:         # codex offers mcp__server__tool as a tool of a namespace
                if call["tool"].startswith(space + "__"):
                    item.update(name=call["tool"][len(space) + 2:], namespace=space)
            output.append(item)
        used = made_up_usage({"messages": body.get("input")}, output)
        done = {"id": new_id("resp_"), "object": "response", "created_at": int(time.time()),
                "status": "completed", "model": body.get("model"), "output": output,
                "usage": {"input_tokens": used["input_tokens"], "input_tokens_details": {"cached_tokens": 0},
                          "output_tokens": used["output_tokens"],
                          "output_tokens_details": {"reasoning_tokens": 0},
                          "total_tokens": used["input_tokens"] + used["output_tokens"],
                          **plan.step.get("usage", {})}}
        self.begin_sse()
        self.event("response.created", response={**done, "status": "in_progress", "output": []})
        for index, item in enumerate(output):
            body_key = {"content": []} if item["type"] == "message" else {"arguments": ""}
            self.event("response.output_item.added", output_index=index, item={**item, **body_key})
            if index == 0:
                time.sleep(plan.step.get("stall", 0))
            if item["type"] == "message":
                self.event("response.output_text.delta", item_id=item["id"], output_index=index,
                           content_index=0, delta=plan.text())
            self.event("response.output_item.done", output_index=index, item=item)
        self.event("response.completed", response=done)
        self.end_sse()

    def gemini(self, path, body):
        """Gemini's generateContent, streamed in two pieces where there is a text to cut."""
        tools = [d["name"] for t in body.get("tools", []) for d in t.get("functionDeclarations", [])]
        plan = self.plan(body, gemini_turns(body), n_tools=len(tools))
        if plan is None:
            return
        calls = [{"functionCall": {"name": call["tool"], "args": call.get("input", {})}}
                 for call in plan.calls()] if tools else []
        used = made_up_usage({"messages": body.get("contents")}, calls or plan.text())
        told = {"promptTokenCount": used["input_tokens"], "candidatesTokenCount": used["output_tokens"],
                "totalTokenCount": used["input_tokens"] + used["output_tokens"], **plan.step.get("usage", {})}

        def answer(parts, ends):
            return {"candidates": [{"index": 0, "content": {"role": "model", "parts": parts},
                                    **({"finishReason": "STOP"} if ends else {})}],
                    "usageMetadata": told, "modelVersion": path.split("/")[-1].split(":")[0]}

        text = plan.text()
        if ":stream" not in path:
            return self.send_json(200, answer([{"text": text or "-"}, *calls], True))
        self.begin_sse()
        half = len(text) // 2
        for part in filter(None, (text[:half], text[half:])):
            self.data(answer([{"text": part}], False))
            time.sleep(plan.step.get("stall", 0))
        self.data(answer(calls or [{"text": ""}], True))
        self.end_sse()

    def data(self, value):
        data = f"data: {json.dumps(value)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def deltas(self, block, step):
        """A block as it opens, and the pieces that fill it."""
        if block["type"] == "tool_use":
            parts = pieces(json.dumps(block["input"]), 400)
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": p} for p in parts]
        if block["type"] == "thinking":
            return {**block, "thinking": "", "signature": ""}, [
                {"type": "thinking_delta", "thinking": block["thinking"]},
                {"type": "signature_delta", "signature": block["signature"]}]
        parts = pieces(block["text"], step.get("chunk") or (20 if step.get("drip") else 4000))
        return {**block, "text": ""}, [{"type": "text_delta", "text": p} for p in parts]

    def stream(self, message, step):
        blocks, usage = message["content"], message["usage"]
        self.begin_sse()
        self.event("message_start", message={**message, "content": [], "stop_reason": None,
                                             "usage": {**usage, "output_tokens": 1}})
        for index, block in enumerate(blocks):
            opened, deltas = self.deltas(block, step)
            self.event("content_block_start", index=index, content_block=opened)
            if index == 0:
                time.sleep(step.get("stall", 0))
            for n, delta in enumerate(deltas):
                if n and step.get("drip"):
                    time.sleep(step["drip"])
                self.event("content_block_delta", index=index, delta=delta)
            if step.get("cut"):
                self.close_connection = True
                self.connection.close()
                return
            self.event("content_block_stop", index=index)
        self.event("message_delta", delta={"stop_reason": message["stop_reason"], "stop_sequence": None},
                   usage=usage)
        self.event("message_stop")
        self.end_sse()


# ------------------------------------------------------------------ the server

class Server(ThreadingHTTPServer):
    """`requests` notes what came; with `bodies`, each POST body is a file there, in order of arrival."""
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address=("127.0.0.1", 0), log=None, bodies=None):
        super().__init__(address, Handler)
        self.lock = threading.Lock()
        self.requests, self.counts = [], {}
        self.log, self.bodies, self.n_bodies = log, bodies and Path(bodies), 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        if self.bodies:
            self.bodies.mkdir(parents=True, exist_ok=True)

    def handle_error(self, request, client_address):
        kind = sys.exc_info()[0]
        if kind and issubclass(kind, ConnectionError):
            return                      # a client that was killed
        super().handle_error(request, client_address)

    def note(self, record):
        with self.lock:
            self.requests.append(record)
            if self.log:
                with open(self.log, "a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")

    def keep(self, raw):
        if self.bodies:
            with self.lock:
                self.n_bodies += 1
                name = f"{self.n_bodies:05d}.json"
            part = self.bodies / f"{name}.part"
            part.write_bytes(raw)
            os.replace(part, self.bodies / name)

    def count(self, key):
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + 1
            return self.counts[key]

    def stop(self):
        self.shutdown()
        self.server_close()


def start(**options) -> Server:
    """A server that runs in a thread of this process."""
    server = Server(**options)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--port-file", help="the port is written here once it listens")
    parser.add_argument("--log", help="one JSON line for each request is appended here")
    parser.add_argument("--bodies", help="a folder that keeps the body of each POST")
    args = parser.parse_args()
    server = Server(("127.0.0.1", args.port), log=args.log, bodies=args.bodies)
    if args.port_file:
        part = Path(args.port_file + ".part")
        part.write_text(str(server.server_address[1]))
        os.replace(part, args.port_file)
    print(server.url, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
