"""What programs of earlier journal formats left opens as it did: golden folders, and what is known of each by hand."""
from __future__ import annotations

import shutil
import sys

import pytest

import golden
import pitboss


@pytest.mark.parametrize("play", golden.PLAYS, ids=lambda play: f"{play.name} {play.run.__name__}")
@pytest.mark.slow
def test_a_golden_folder(home, play):
    if play.needs_tmux and not shutil.which("tmux"):
        pytest.skip("no tmux on PATH")
    play.run(home, play.name)


def test_every_golden_folder_is_opened_and_every_format_has_some():
    folders = {f"{p.parent.name}/{p.name}" for p in golden.FOLDERS.glob("*/*")}
    assert folders == {play.name for play in golden.PLAYS} - set(golden.RUST) >= set(golden.GOLDEN)
    formats = {f"{n}" for n in range(1, pitboss.JOURNAL_FORMAT + 1)}
    assert {name.partition("/")[0] for name in folders} == formats, "record those of a new format before it is changed"
    begins = {str(p.parent.parent.parent.name): p.open().readline() for p in golden.FOLDERS.glob("*/*/runs/[!.]*/journal.jsonl")}
    assert begins and all('"format":' in line for line in begins.values())


def test_every_reading_command_is_tried():
    tried = {row.words.split()[0] for row in golden.LOOKS}
    assert tried | golden.OTHERS == set(pitboss.COMMANDS) and not tried & golden.OTHERS
    formats = {word.removeprefix("--") for row in golden.LOOKS for word in row.words.split() if row.words.startswith("report")}
    assert formats >= set(pitboss.REPORTS) - {"html"}


@pytest.mark.parametrize("name, actor, change, words", [
    ("1/flat", "good", {"micro_usd": 686}, "good"), ("1/flat", "late", {"status": "Failed"}, "late"),
    ("1/tree", "worker-2", {"parent": "boss"}, "worker-2"), ("1/cut", "second", {"status": "Pending"}, "second")])
def test_a_wrong_answer_is_seen(home, monkeypatch, name, actor, change, words):
    kept = golden.GOLDEN[name]
    actors = {**kept.actors, actor: kept.actors[actor]._replace(**change)}
    monkeypatch.setitem(golden.GOLDEN, name, kept._replace(actors=actors))
    with pytest.raises(AssertionError, match=words):
        golden.open_run(home, name)
