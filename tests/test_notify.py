"""Notifications: who is told what, where a URL may go, what a sink that fails or hangs does to a run.

The servers are real ones on this machine. A sink of a manifest may only go to public addresses, so its tests
give `connect` a public address and look which one it was asked for; the operator's own URL may be local.
"""
from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import pitboss
from stage import Operator
from tools import ROOT, read_events, wait_for

PUBLIC = "93.184.215.14"
TASK = '[defaults]\nagent = "demo"\nuse_worktree = false\n[[task]]\nid = "a"\ndirectory = "."\nprompt = "$ say hi"\n'
FAILING = '[[task]]\nid = "b"\ndirectory = "."\nprompt = "$ exit 3"\n'
LOG = '[[notification]]\nkind = "log"\n'


class Desk:
    """A server that keeps what it was sent; the first segment of a path says how it answers."""

    def __init__(self, context: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self.got: list[dict] = []
        self.closed = threading.Event()
        desk = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                desk.got.append({"path": self.path, "host": self.headers["Host"], "body": json.loads(body),
                                 "type": self.headers["Content-Type"]})
                way, _, rest = self.path[1:].partition("/")
                if way == "hang":
                    desk.closed.wait()
                elif way == "drip":
                    self.drip()
                elif way == "rubbish":
                    self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
                else:
                    status = int(rest.partition("?")[0]) if way == "status" else 200
                    if way == "flaky" and len(desk.got) < int(rest):
                        status = 503
                    self.send_response(status)
                    self.send_header("Location", f"http://127.0.0.1:{desk.port}/ok")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def drip(self) -> None:
                """An answer that never ends, though its next byte always comes in time."""
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not desk.closed.wait(0.05):
                    self.wfile.write(b"X: y\r\n"[:1])

            def log_message(self, *args) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass                   # the client has gone

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address) -> None:
                pass

        self.server = Server((address, 0), Handler)
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True,
                                                     do_handshake_on_connect=False)
        self.port = self.server.server_port
        self.scheme = "https" if context else "http"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, way: str = "ok", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}/{way}"

    def kinds(self) -> list[str]:
        return [g["body"]["event"]["kind"] for g in self.got]

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def desk():
    place = Desk()
    yield place
    place.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(authority, certificate, key): files; the certificate is hooks.example.com's, made by an own authority."""
    openssl = os.environ.get("PITBOSS_TEST_OPENSSL") or shutil.which("openssl")
    if not openssl:
        pytest.skip("the program openssl was not found; PITBOSS_TEST_OPENSSL can name it")
    folder = tmp_path_factory.mktemp("tls")

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=tests", "-addext",
        "keyUsage=critical,keyCertSign")
    run("req", *key, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=hooks.example.com")
    (folder / "names").write_text("subjectAltName=DNS:hooks.example.com,IP:127.0.0.1,IP:8.8.4.4\n")
    run("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", "names", "-out", "cert.pem")
    return folder / "ca.pem", folder / "cert.pem", folder / "key.pem"


def secure(certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[2])
    return context


@pytest.fixture
def tls_desk(certificate, monkeypatch):
    """A desk that speaks TLS, and an environment in which its authority is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    place = Desk(secure(certificate))
    yield place
    place.close()


def resolver(*answers: str):
    """What socket.getaddrinfo would say: the next of `answers` at each call, then the last one."""
    left = list(answers)

    def resolve(host, port, **how):
        addresses = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
                for a in addresses.split()]
    return resolve


def connector(desk: Desk, seen: list):
    """A connection to the desk, whatever address it was asked for; that is put into `seen`."""
    def connect(place, timeout):
        seen.append(place)
        return socket.create_connection(("127.0.0.1", desk.port), timeout)
    return connect


def envelope(kind: str = "worker_failed", key: str = "b", **facts) -> dict:
    facts = {"task_id": key, **facts}
    return pitboss.render_envelope("RUN", f"{kind}:{key}", 1.5, {"kind": kind, **facts}, pitboss.make_mask([{}]))


def give(sinks, env, *envelopes, tmp="/nonexistent", **how) -> list[str]:
    """What a notifier with these sinks says of each (sink, envelope)."""
    notifier = pitboss.Notifier(str(tmp), {s.name: s for s in sinks}, env, pauses=(0.01, 0.01), **how)

    async def all_of_them() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(notifier.deliver(name, e)) for name, e in envelopes]
        return [t.result() for t in tasks]

    return asyncio.run(all_of_them())


def own(timeout_s: float = 20, name: str = "own") -> pitboss.Notification:
    """The operator's own sink, which may be local."""
    return pitboss.Notification(name, "webhook", None, None, "info", timeout_s, local=True)


def hook(kind: str = "webhook", url: str = "https://hooks.example.com/x", name: str = "hook") -> pitboss.Notification:
    return pitboss.Notification(name, kind, url, None, "info", 20)


# ------------------------------------------------------------------ tables

def test_sinks_and_notices_are_whole():
    assert set(pitboss.SINKS) == set(pitboss.SINK_KINDS)
    assert {severity for severity, _ in pitboss.NOTICES.values()} == set(pitboss.SEVERITIES)
    assert {kind: severity for kind, (severity, _) in pitboss.NOTICES.items()} == {
        "run_dispatched": "info", "run_finished": "info", "approval_request": "warning",
        "approval_pending": "warning", "worker_failed": "error", "budget_exceeded": "critical"}
    for render in filter(None, pitboss.SINKS.values()):
        assert json.dumps(render(envelope()))
    fields = {f.name for f in pitboss.NOTIFICATION_FIELDS}
    assert {"name", "local"} | fields == set(pitboss.Notification._fields)


# ------------------------------------------------------------------ which URLs may be used

@pytest.mark.parametrize("url", [
    "https://hooks.example.com/a?b=c", "https://8.8.8.8/", "https://example.com:8443", "https://[2606:4700::1111]/x",
    "https://localhost.example.com/", "HTTPS://example.com/", "https://xn--bcher-kva.example/"])
def test_a_public_https_url_may_be_used(url):
    assert pitboss.wrong_url(url) == ""


@pytest.mark.parametrize("url", [
    "http://example.com/", "ftp://example.com/", "example.com", "//example.com/", "https://", "https:///x", "file:///etc",
    "https://localhost/", "https://LOCALHOST:8443/", "https://a.localhost/", "https://localhost./", "https://example.com./",
    "https://ip6-localhost/", "https://db.internal/", "https://printer.local/", "https://x.localdomain/",
    "https://metadata.google.internal/", "https://metadata/", "https://metadata.goog/", "https://instance-data/",
    "https://169.254.169.254/latest", "https://[fe80::1]/", "https://[fe80::1%25eth0]/", "https://[fd00:ec2::254]/",
    "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f.1/", "https://0177.0.0.1/", "https://0/",
    "https://10.1.2.3/", "https://172.16.0.1/", "https://192.168.1.1/", "https://100.100.100.200/", "https://0.0.0.0/",
    "https://168.63.129.16/", "https://224.0.0.1/", "https://255.255.255.255/", "https://[::1]/", "https://[::]/",
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:10.0.0.1]/", "https://[::7f00:1]/", "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/", "https://[2001:db8::1]/", "https://[ff02::1]/", "https://me:pw@example.com/",
    "https://example.com@127.0.0.1/", "https://exa mple.com/", "https://example.com\\@127.0.0.1/", "https://b\u00fccher.de/",
    "https://example.com/\r\nX: y", "https://example.com:99999/", "https://example.com:x/", "https://[::1/", "https://.x/"])
def test_any_other_url_is_refused(url):
    assert pitboss.wrong_url(url) != ""


@pytest.mark.parametrize("url, good", [
    ("http://127.0.0.1:80/x", True), ("https://localhost/", True), ("ftp://127.0.0.1/", False), ("", False),
    ("http://a:b@localhost/", False), ("/tmp/x", False)])
def test_the_operators_own_url_may_be_local(url, good):
    assert (pitboss.wrong_url(url, local=True) == "") == good


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True), ("::ffff:8.8.8.8", True),
    ("127.0.0.1", False), ("10.0.0.1", False), ("169.254.169.254", False), ("192.168.0.1%eth0", False),
    ("fe80::1%eth0", False), ("::1", False), ("64:ff9b::a00:1", False), ("240.0.0.1", False), ("2002:a00:1::1", False)])
def test_addresses(address, public):
    assert pitboss.is_public(address) == public


@pytest.mark.parametrize("text, env, url, wrong, older", [
    ("https://x/${PITBOSS_NOTIFY_A}/${PITBOSS_NOTIFY_B}", {"PITBOSS_NOTIFY_A": "1", "PITBOSS_NOTIFY_B": "2"},
     "https://x/1/2", "", []),
    ("https://x/${PITBOSS_HOOK}", {"PITBOSS_HOOK": "1"}, "https://x/1", "", ["PITBOSS_HOOK"]),
    ("https://x/$HOME/$5", {"HOME": "/h"}, "https://x/$HOME/$5", "", []),
    ("https://x/${PITBOSS_NOTIFY_A}", {"PITBOSS_NOTIFY_A": "${PITBOSS_NOTIFY_A}"}, "https://x/${PITBOSS_NOTIFY_A}", "", []),
    ("https://x/${PITBOSS_NOTIFY_A}", {}, None, "PITBOSS_NOTIFY_A is not", []),
    ("https://x/${HOME}", {"HOME": "/h"}, None, "only kind of variable", []),
    ("https://x/${ANTHROPIC_API_KEY}", {"ANTHROPIC_API_KEY": "sk"}, None, "only kind of variable", []),
    ("https://x/${PITBOSS_NOTIFY_A", {"PITBOSS_NOTIFY_A": "1"}, None, "only kind of variable", []),
    ("https://x/${}", {}, None, "only kind of variable", [])])
def test_variables_of_urls(text, env, url, wrong, older):
    filled, found, old = pitboss.fill_url(text, env)
    assert (wrong in found and found) if wrong else (found == "" and filled == url)
    assert old == older
    assert "HOME" not in found and "KEY" not in found


# ------------------------------------------------------------------ validate

def problems_of(text: str, env: dict | None = None) -> tuple[list[str], list[str]]:
    """(problems, warnings) of a manifest, as `validate` words them."""
    manifest = pitboss.read_manifest((TASK + text).encode(), "m.toml", stem="m", env=env or {}, agents=pitboss.AGENTS,
                                     expand=lambda path: path)
    return [f"{p.path}: {p.message}" for p in manifest.problems], [f"{p.path}: {p.message}" for p in manifest.warnings]


@pytest.mark.parametrize("text, path, words", [
    ('[[notification]]\nkind = "slack"', "notification[0].url", "is required beside kind = \"slack\""),
    (LOG + 'url = "https://example.com"', "notification[0].url", "found beside kind"),
    (LOG + '[[notification]]\nkind = "mail"', "notification[1].kind", "allowed: one of log, webhook, slack, discord"),
    (LOG + 'events = ["worker_fialed"]', "notification[0].events", "did you mean worker_failed"),
    ('[[notification]]\nkind = "webhook"\nurl = "https://localhost/s3cret"', "notification[0].url", "public host"),
    ('[[notification]]\nkind = "webhook"\nurl = "https://u:s3cret@example.com/"', "notification[0].url", "user name"),
    ('[[notification]]\nkind = "webhook"\nurl = ["https://example.com/s3cret"]', "notification[0].url", "not shown"),
    ('[[notification]]\nkind = "webhook"\nurl = "https://e.com/${S3CRET_s3cret"', "notification[0].url", "PITBOSS_NOTIFY_"),
    ('[[notification]]\nkind = "webhook"\nurl = "https://e.com/s3cret\\u0000"', "notification[0].url", "allowed"),
    ("[lifecycle]\nsurvive_parent = true", "lifecycle.survive_parent", "[[notification]] or lifecycle.notify"),
    ('[lifecycle]\nnotify = { kind = "discord", url = "http://e.com/s3cret" }', "lifecycle.notify.url", "https://"),
    ('[lifecycle]\nnotify = { kind = "log", link = 1 }', "lifecycle.notify.link", "unknown key")])
def test_each_problem_is_named_without_the_url(text, path, words):
    problems, _ = problems_of(text)
    assert len(problems) == 1 and problems[0].startswith(f"{path}: ") and words in problems[0]
    assert "s3cret" not in problems[0]


def test_what_is_fine_is_fine_and_an_older_variable_is_a_warning():
    text = ('[lifecycle]\nsurvive_parent = true\nnotify = { kind = "log" }\n[[notification]]\nkind = "slack"\n'
            'url = "https://hooks.example.com/${PITBOSS_HOOK}"')
    problems, warnings = problems_of(text, {"PITBOSS_HOOK": "s3cret"})
    assert problems == [] and len(warnings) == 1
    assert "PITBOSS_HOOK" in warnings[0] and "PITBOSS_NOTIFY_" in warnings[0] and "s3cret" not in warnings[0]


def test_a_variable_is_checked_with_the_value_that_it_has():
    text = '[[notification]]\nkind = "webhook"\nurl = "https://${PITBOSS_NOTIFY_HOST}/s3cret"'
    assert problems_of(text, {"PITBOSS_NOTIFY_HOST": "example.com"}) == ([], [])
    for host in ("127.0.0.1", "localhost", "x@y", "a b", ""):
        problems, _ = problems_of(text, {"PITBOSS_NOTIFY_HOST": host})
        assert len(problems) == 1 and "s3cret" not in problems[0]


def test_validate_names_place_and_line_and_starts_nothing(home):
    path = home.manifest(TASK + '[[notification]]\nkind = "webhook"\nurl = "https://10.0.0.1/s3cret"\n')
    said = home.pitboss("dispatch", path, check=2).stderr
    assert "notification[0].url (line 10): allowed: a public address" in said and "s3cret" not in said
    assert not home.runs.exists()
    bad = home.pitboss("validate", home.manifest(TASK), check=2, env={pitboss.PARENT_URL: "gopher://s3cret"}).stderr
    assert pitboss.PARENT_URL in bad and "s3cret" not in bad


# ------------------------------------------------------------------ one try

def test_a_post_goes_to_the_address_that_was_looked_at(tls_desk):
    seen = []
    said = give([hook(url=tls_desk.url(host="hooks.example.com"))], {}, ("hook", envelope()), resolve=resolver(PUBLIC),
                connect=connector(tls_desk, seen))
    assert said == [""] and seen == [(PUBLIC, tls_desk.port)]
    assert tls_desk.got[0]["body"] == envelope() and tls_desk.got[0]["host"] == f"hooks.example.com:{tls_desk.port}"
    assert tls_desk.got[0]["type"] == "application/json"


@pytest.mark.parametrize("addresses", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", f"{PUBLIC} 127.0.0.1"])
def test_a_name_with_an_address_that_is_not_public_is_not_connected_to(tls_desk, addresses):
    seen = []
    said = give([hook(url=tls_desk.url(host="hooks.example.com"))], {}, ("hook", envelope()),
                resolve=resolver(addresses), connect=connector(tls_desk, seen))
    assert "not public" in said[0] and seen == [] and tls_desk.got == []


def test_a_name_that_changes_its_address_is_looked_at_for_each_try(tls_desk):
    """The first try goes to the address that was looked at; the second finds another one and ends there."""
    seen = []
    said = give([hook(url=tls_desk.url("status/503", host="hooks.example.com"))], {}, ("hook", envelope()),
                resolve=resolver(PUBLIC, "127.0.0.1"), connect=connector(tls_desk, seen))
    assert "not public" in said[0] and seen == [(PUBLIC, tls_desk.port)] and len(tls_desk.got) == 1


def test_the_next_address_is_tried_where_one_refuses(tls_desk):
    seen, connect = [], connector(tls_desk, [])

    def refuse_first(place, timeout):
        seen.append(place[0])
        if len(seen) == 1:
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(place, timeout)

    said = give([hook(url=tls_desk.url(host="hooks.example.com"))], {}, ("hook", envelope()),
                resolve=resolver("2606:4700::1111 8.8.8.8"), connect=refuse_first)
    assert said == [""] and seen == ["2606:4700::1111", "8.8.8.8"] and len(tls_desk.got) == 1


def test_a_certificate_of_another_name_or_authority_is_refused(tls_desk, monkeypatch):
    where = {"resolve": resolver(PUBLIC), "connect": connector(tls_desk, [])}
    assert "not trusted" in give([hook(url=tls_desk.url(host="other.example.com"))], {}, ("hook", envelope()), **where)[0]
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    assert "not trusted" in give([hook(url=tls_desk.url(host="hooks.example.com"))], {}, ("hook", envelope()), **where)[0]
    assert tls_desk.got == []


@pytest.mark.parametrize("way, tries, words", [
    ("ok", 1, ""), ("flaky/3", 3, ""), ("status/204", 1, ""), ("status/500", 3, "answered 500"),
    ("status/429", 3, "answered 429"), ("status/404", 1, "answered 404"), ("status/301", 1, "redirects are not followed"),
    ("status/307", 1, "redirects are not followed"), ("rubbish", 3, "not HTTP")])
def test_three_tries_but_for_what_no_other_try_can_mend(desk, way, tries, words):
    url = desk.url(way)
    said = give([own()], {pitboss.PARENT_URL: url}, ("own", envelope()))
    assert len(desk.got) == tries and {g["path"] for g in desk.got} == {f"/{way}"}
    assert (words in said[0] and said[0]) if words else said == [""]
    assert url not in said[0] and way not in said[0]


@pytest.mark.parametrize("way", ["hang", "drip"])
def test_a_try_has_an_end_whatever_the_server_does(desk, way):
    begin = time.monotonic()
    said = give([own(timeout_s=0.3)], {pitboss.PARENT_URL: desk.url(way)}, ("own", envelope()))
    assert said == ["no answer in 0.3 s"] and len(desk.got) == 3 and time.monotonic() - begin < 4
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "notify"], 10, "the end of its threads")


HANGING = """
import asyncio, sys, threading
sys.path.insert(0, sys.argv[1])
import pitboss
sink = pitboss.Notification("hook", "webhook", "https://hooks.example.com/", None, "info", 0.1)
notifier = pitboss.Notifier("/nonexistent", {"hook": sink}, {}, resolve=lambda *a, **how: threading.Event().wait(),
                            pauses=())
print(asyncio.run(notifier.deliver("hook", {"event": {}})))
"""


def test_a_name_that_nobody_resolves_keeps_no_process_alive():
    done = subprocess.run([sys.executable, "-c", HANGING, str(ROOT)], capture_output=True, text=True, timeout=30)
    assert done.stdout == "no answer in 0.1 s\n" and done.returncode == 0


def test_a_host_that_does_not_exist_is_said_without_its_url():
    def unknown(*args, **how):
        raise socket.gaierror(-2, "Name or service not known")

    said = give([hook(url="https://nowhere.example.com/s3cret")], {}, ("hook", envelope()), resolve=unknown)
    assert said == ["its host was not found"]


def test_a_url_is_checked_again_when_it_is_used():
    """A run that is resumed may find other variables than the ones that were checked."""
    sink = hook(url="https://${PITBOSS_NOTIFY_HOST}/s3cret")
    for env in ({}, {"PITBOSS_NOTIFY_HOST": "127.0.0.1"}):
        said = give([sink], env, ("hook", envelope()), resolve=resolver("127.0.0.1"))
        assert said[0].startswith("its URL is not ") and "s3cret" not in said[0]


# ------------------------------------------------------------------ sinks side by side

def test_a_sink_that_hangs_delays_no_other_and_what_waits_for_it_is_bounded(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(pitboss, "MAX_NOTICES", 5)
    log = pitboss.Notification("log", "log", None, None, "info", 30)
    notifier = pitboss.Notifier(str(tmp_path), {"log": log, "own": own(60)}, {pitboss.PARENT_URL: desk.url("hang")})
    envelopes = [envelope(key=f"b{n}") for n in range(8)]

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            stuck = [group.create_task(notifier.deliver("own", e)) for e in envelopes]
            logged = [group.create_task(notifier.deliver("log", e)) for e in envelopes]
            async with asyncio.timeout(20):
                assert [await t for t in logged] == [""] * 8
                full = [await t for t in stuck[5:]]
            assert full == ["5 others wait for this sink"] * 3
            assert not any(t.done() for t in stuck[:5])
            for t in stuck:
                t.cancel()

    asyncio.run(both())
    lines = [json.loads(line) for line in (tmp_path / "notifications.jsonl").read_text().splitlines()]
    assert lines == envelopes and len(desk.got) <= 1


def test_a_sink_gets_its_notifications_one_after_the_other(desk):
    envelopes = [envelope(key=f"b{n}") for n in range(20)]
    assert give([own()], {pitboss.PARENT_URL: desk.url()}, *(("own", e) for e in envelopes)) == [""] * 20
    assert [g["body"] for g in desk.got] == envelopes


def test_the_file_has_each_notification_once_and_survives_a_torn_line(tmp_path):
    log = pitboss.Notification("log", "log", None, None, "info", 30)
    first, second = envelope(key="a"), envelope(key="b")
    path = tmp_path / "notifications.jsonl"
    assert give([log], {}, ("log", first), ("log", first), tmp=tmp_path) == ["", ""]
    with path.open("a") as f:
        f.write(json.dumps(second)[:-9])
    assert give([log], {}, ("log", first), ("log", second), tmp=tmp_path) == ["", ""]
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and [json.loads(lines[0]), json.loads(lines[2])] == [first, second]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_is_a_fault_of_the_sink_alone(tmp_path):
    log = pitboss.Notification("log", "log", None, None, "info", 30)
    assert give([log], {}, ("log", envelope()), tmp=tmp_path / "gone") == ["notifications.jsonl: No such file or directory"]


# ------------------------------------------------------------------ words

NASTY = {"message": "<!channel> <@U1> @everyone & \x1b[31mred\x07\n`code` *b* [x](https://evil) \u202eabc", "kind": "unknown"}


def test_slack_gets_no_links_mentions_or_controls():
    text = pitboss.render_slack(envelope(reason=NASTY))["text"]
    assert "&lt;!channel&gt; &lt;@" in text and "&amp;" in text
    assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)|@\w|[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert "worker_failed" in text and "task_id: b" in text


def test_discord_gets_no_mentions_markup_or_controls():
    message = pitboss.render_discord(envelope(reason=NASTY))
    assert message["allowed_mentions"] == {"parse": []}
    assert "@\u200beveryone" in message["content"] and not re.search(r"@\w", message["content"])
    assert not re.search(r"(?<!\\)[*`<>\[\]_]", message["content"]) and "\x1b" not in message["content"]


@pytest.mark.parametrize("render, key, limit", [
    (pitboss.render_slack, "text", pitboss.SLACK_CHARS), (pitboss.render_discord, "content", pitboss.DISCORD_CHARS)])
@pytest.mark.parametrize("shift", range(6))
def test_a_long_text_is_cut_between_escapes(render, key, limit, shift):
    text = render(envelope(reason={"kind": "unknown", "message": "x" * shift + "<*&" * 4000}))[key]
    assert limit - 8 < len(text) <= limit and text.endswith("…")
    assert not re.search({"text": r"&\w*…$", "content": r"(?<!\\)(\\\\)*\\…$"}[key], text)


def test_secrets_are_masked_in_what_is_sent():
    mask = pitboss.make_mask([{"PITBOSS_NOTIFY_X": "hidden-and-long"}], ("PITBOSS_NOTIFY_*",))
    event = {"kind": "worker_failed", "task_id": "b", "summary": "x hidden-and-long", "reason": {"message": "hidden-and-long"}}
    assert "hidden" not in json.dumps(pitboss.render_envelope("RUN", "worker_failed:b", 1.5, event, mask))


# ------------------------------------------------------------------ what is owed

def notices(sinks: dict, *calls) -> list[str]:
    run = pitboss.RunState()
    run.sinks = sinks
    told = []
    for kind, key in calls:
        pitboss.notify(run, 1.0, kind, key)
        told += [key for _, key in run.owed]
        run.owed.clear()                   # it was delivered
    return told


def test_a_sink_gets_what_it_asked_for_once():
    calls = [("run_dispatched", ""), ("worker_failed", "a"), ("worker_failed", "b"), ("worker_failed", "a"),
             ("budget_exceeded", ""), ("run_finished", "")]
    assert notices({"x": (None, "info")}, *calls) == [
        "x run_dispatched", "x worker_failed:a", "x worker_failed:b", "x budget_exceeded", "x run_finished"]
    assert notices({"x": (None, "critical"), "y": (("worker_failed", "run_finished"), "warning")}, *calls) == [
        "y worker_failed:a", "y worker_failed:b", "x budget_exceeded"]
    assert notices({}, *calls) == []


# ------------------------------------------------------------------ whole runs

def logged(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "notifications.jsonl").read_text().splitlines()]


def test_a_run_tells_of_its_begin_its_failures_and_its_end(home, desk):
    path = home.manifest(TASK + FAILING + LOG + '[lifecycle]\nsurvive_parent = true\n'
                         'notify = { kind = "log", severity_min = "critical" }\n')
    home.pitboss("dispatch", path, check=1, env={pitboss.PARENT_URL: desk.url("ok/s3cret"), "PITBOSS_RUN_ID": "outer"})
    run_dir, lines = home.run_dir(), logged(home.run_dir())
    run_id = run_dir.name
    assert [g["body"] for g in desk.got] == lines and desk.got[0]["path"] == "/ok/s3cret"
    assert [(line["dedup_key"], line["severity"]) for line in lines] == [
        (f"{run_id}:run_dispatched", "info"), (f"{run_id}:worker_failed:b", "error"), (f"{run_id}:run_finished", "info")]
    begun, failed, finished = (line["event"] for line in lines)
    assert begun == {"kind": "run_dispatched", "run_id": run_id, "parent_run_id": "outer", "manifest_path": str(path),
                     "mode": "flat", "survive_parent": True}
    assert failed["task_id"] == "b" and "exit status 3" in failed["reason"]["message"] and "parent_task_id" not in failed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert finished == {"kind": "run_finished", "run_id": run_id, "tasks_total": 2, "tasks_failed": 1,
                        "duration_ms": summary["total_duration_ms"], "spent_usd": summary["total_cost_usd"]}
    for line in lines:
        assert set(line) == {"dedup_key", "severity", "ts", "source", "event"} and re.fullmatch(r"\S+T\S+Z", line["ts"])
    for file in ("journal.jsonl", "notifications.jsonl", "meta.json", "resolved.json", "summary.json"):
        assert "s3cret" not in (run_dir / file).read_text()


def test_the_operators_own_url_may_be_https(home, tls_desk, certificate):
    home.pitboss("dispatch", home.manifest(TASK), check=0,
                 env={pitboss.PARENT_URL: tls_desk.url(), "SSL_CERT_FILE": str(certificate[0])})
    assert tls_desk.kinds() == ["run_dispatched", "run_finished"]


def test_a_nested_run_names_the_run_around_it(home, desk):
    inner = home.manifest(TASK + LOG, "inner.toml")
    command = " ".join(map(str, home.argv("dispatch", "-q", inner)))
    outer = home.manifest('[defaults]\nagent = "demo"\nuse_worktree = false\n[[task]]\nid = "o"\ndirectory = "."\n'
                          f"prompt = '$ run {command}'\n", "outer.toml")
    home.pitboss("dispatch", outer, check=0, env={pitboss.PARENT_URL: desk.url()})
    begun = [g["body"]["event"] for g in desk.got if g["body"]["event"]["kind"] == "run_dispatched"]
    assert len(begun) == 2 and begun[0]["parent_run_id"] is None and begun[1]["parent_run_id"] == begun[0]["run_id"]


def test_a_sink_that_fails_is_in_the_journal_and_fails_no_run(home, desk):
    done = home.pitboss("dispatch", home.manifest(TASK), check=0, env={pitboss.PARENT_URL: desk.url("status/410?s3cret")})
    told = [e for e in read_events(home.run_dir()) if e["kind"] == "notified"]
    assert [e["notice"].partition(" ")[2] for e in told] == ["run_dispatched", "run_finished"]
    assert all(e["message"] == "it answered 410" for e in told)
    assert "s3cret" not in (home.run_dir() / "journal.jsonl").read_text() + done.stderr + done.stdout


@pytest.mark.parametrize("by", ["a signal", "an operator"])
def test_an_interrupt_ends_the_wait_for_a_sink_that_hangs_and_changes_no_outcome(home, desk, by):
    run = home.start("dispatch", home.manifest(TASK), env={pitboss.PARENT_URL: desk.url("hang")})
    wait_for(lambda: home.runs.exists() and any((p / "summary.json").exists() for p in home.runs.iterdir()))
    wait_for(lambda: any(e["kind"] == "run_finished" for e in read_events(home.run_dir())))
    begin = time.monotonic()
    if by == "a signal":
        run.send_signal(signal.SIGINT)
    else:
        Operator(json.loads((home.run_dir() / "sockets.json").read_text())["control"]).say({"op": "cancel_run"})
    assert run.wait(20) == 0 and time.monotonic() - begin < 5
    assert not {"drained", "cancelled"} & {e["kind"] for e in read_events(home.run_dir())}
    run.communicate()


@pytest.mark.slow
def test_a_sink_that_hangs_costs_the_end_of_a_run_ten_seconds_at_most(home, desk):
    """Its actors go on meanwhile, and the process does not wait for its threads."""
    run = home.start("dispatch", home.manifest(TASK + FAILING), env={pitboss.PARENT_URL: desk.url("hang")})
    wait_for(lambda: home.runs.exists() and any((p / "summary.json").exists() for p in home.runs.iterdir()))
    begin = time.monotonic()
    assert run.wait(30) == 1
    assert 8 < time.monotonic() - begin < 13 and len(desk.got) == 1
    run.communicate()


def test_what_was_delivered_is_not_sent_again_and_what_was_not_is(home, desk):
    """The dispatcher is killed while one delivery is open: the next one sends that again, and no other."""
    text = (TASK.replace("$ say hi", f"$ run while ! test -e {home.root}/go; do sleep 0.1; done") + FAILING + LOG)
    run = home.start("dispatch", home.manifest(text), env={pitboss.PARENT_URL: desk.url("hang")})
    wait_for(lambda: desk.got and len([e for e in read_events(home.run_dir()) if e["kind"] == "notified"]) == 2)
    run.kill()
    run.communicate()
    assert [line["event"]["kind"] for line in logged(home.run_dir())] == ["run_dispatched", "worker_failed"]
    desk.got.clear()
    (home.root / "go").touch()
    home.pitboss("resume", home.run_dir().name, check=1, env={pitboss.PARENT_URL: desk.url()})
    keys = [line["dedup_key"].partition(":")[2] for line in logged(home.run_dir())]
    assert keys == ["run_dispatched", "worker_failed:b", "run_finished"]
    assert [g["body"]["dedup_key"].partition(":")[2] for g in desk.got] == keys
    desk.got.clear()
    told = [e["notice"] for e in read_events(home.run_dir()) if e["kind"] == "notified"]
    assert len(told) == len(set(told)) == 6


def test_a_dispatcher_that_was_killed_between_sending_and_noting_sends_the_file_nothing_twice(home):
    text = TASK.replace("$ say hi", f"$ run while ! test -e {home.root}/go; do sleep 0.1; done") + LOG
    run = home.start("dispatch", home.manifest(text))
    wait_for(lambda: home.runs.exists() and any((p / "notifications.jsonl").exists() for p in home.runs.iterdir()))
    wait_for(lambda: any(e["kind"] == "hand_started" for e in read_events(home.run_dir())))
    run.kill()
    run.communicate()
    journal = home.run_dir() / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"notified"' in line)
    kept = [json.loads(line) for line in lines[:at] + lines[at + 1:]]
    journal.write_text("".join(json.dumps({**e, "seq": n}) + "\n" for n, e in enumerate(kept, kept[0]["seq"])))
    (home.root / "go").touch()
    home.pitboss("resume", home.run_dir().name, check=0)
    assert [line["event"]["kind"] for line in logged(home.run_dir())] == ["run_dispatched", "run_finished"]


@pytest.mark.parametrize("budget, script", [
    (0.05, '$ call spawn_worker {"prompt": "$ say x"}\n$ call spawn_worker {"prompt": "$ say y"}\n$ say done'),
    (0.0001, "$ say done")])
def test_a_budget_that_is_exceeded_is_told_once(home, budget, script):
    """A spawn is refused for it, or more than it was spent."""
    home.pitboss("dispatch", home.manifest(f'[defaults]\nagent = "demo"\nmodel = "haiku"\nuse_worktree = false\n'
                                           f'[lead]\nid = "lead"\ndirectory = "."\nprompt = {json.dumps(script)}\n'
                                           f"max_workers = 2\nbudget_usd = {budget}\n{LOG}"), check=0)
    told = [line for line in logged(home.run_dir()) if line["event"]["kind"] == "budget_exceeded"]
    assert len(told) == 1 and told[0]["severity"] == "critical"
    event = told[0]["event"]
    assert event["run_id"] == home.run_dir().name and event["budget_usd"] == budget and event["spent_usd"] >= 0


def test_workers_that_a_good_lead_did_not_need_have_not_failed(home):
    script = '$ call spawn_worker {\\"prompt\\": \\"$ run sleep 600\\"}\\n$ say done'
    home.pitboss("dispatch", home.manifest(f'[defaults]\nagent = "demo"\nuse_worktree = false\n[lead]\nid = "lead"\n'
                                           f'directory = "."\nprompt = "{script}"\nmax_workers = 2\nbudget_usd = 5.0\n{LOG}'),
                 check=0)
    assert [line["event"]["kind"] for line in logged(home.run_dir())] == ["run_dispatched", "run_finished"]


# ------------------------------------------------------------------ the way of a manifest, whole

IN_NET = "PITBOSS_TEST_OWN_NET"        # set in a network namespace where 8.8.4.4 is this machine


@pytest.mark.slow
@pytest.mark.skipif(IN_NET in os.environ, reason="this is the inside of it")
def test_the_sinks_of_a_manifest_in_a_network_of_their_own():
    """`unshare` gives a network in which this machine has a public address; the next test runs there."""
    own_net = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c",
               'ip link set lo up && ip addr add 8.8.4.4/32 dev lo && exec "$@"', "sh"]
    if not shutil.which("unshare") or not shutil.which("ip") or subprocess.run([*own_net, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here (unshare --user --net, ip)")
    done = subprocess.run([*own_net, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "inside"],
                          env={**os.environ, IN_NET: "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.skipif(IN_NET not in os.environ, reason="it needs a network of its own, in which the test above runs it")
def test_inside_a_run_tells_slack_discord_and_a_webhook(home, certificate):
    desk = Desk(secure(certificate), "8.8.4.4")
    sinks = "".join(f'[[notification]]\nkind = "{kind}"\nurl = "{desk.url("ok", "8.8.4.4")}/{kind}/${{PITBOSS_NOTIFY_KEY}}"\n'
                    'events = ["worker_failed"]\n' for kind in ("webhook", "slack", "discord"))
    done = home.pitboss("dispatch", home.manifest(TASK + FAILING + sinks), check=1,
                        env={"SSL_CERT_FILE": str(certificate[0]), "PITBOSS_NOTIFY_KEY": "s3cret-and-long"})
    bodies = {g["path"].split("/")[2]: g["body"] for g in desk.got}
    assert {g["path"].split("/")[3] for g in desk.got} == {"s3cret-and-long"} and len(desk.got) == 3
    assert bodies["webhook"]["event"]["task_id"] == "b"
    assert "task_id: b" in bodies["slack"]["text"] and "exit status 3" in bodies["discord"]["content"]
    shown = done.stdout + done.stderr + (home.run_dir() / "journal.jsonl").read_text()
    assert "s3cret" not in shown and "8.8.4.4" not in shown
    desk.close()
