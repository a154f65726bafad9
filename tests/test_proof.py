"""The proof's table and its runner: every row has what it needs, and what misses is said and is the exit code."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "chaos"))

import deaths  # noqa: E402
import figures  # noqa: E402
import proof  # noqa: E402
from trial import CannotRun, Outcome, Trial  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdicts read /proc")


@pytest.mark.parametrize("row", proof.ROWS, ids=lambda row: row.name)
def test_a_row_has_a_promise_a_figure_and_a_function_of_its_own(row):
    assert re.fullmatch(r"R\d+", row.name) and row.promise and row.figure and callable(row.measure)
    for part in (row.name, row.promise, row.measure):
        assert sum(part in other for other in proof.ROWS) == 1, part


def test_the_readmes_table_knows_all_rows():
    assert figures.proof_rows() == [row.name for row in proof.ROWS]


def all_well(trial: Trial) -> Outcome:
    return Outcome(f"{len(trial.rounds(3, lambda root, n: n))} of 3", True)


def one_is_wrong(trial: Trial) -> Outcome:
    def play(root: Path, number: int) -> int:
        assert number != 1, "the second one is bad"
        return number

    good = trial.rounds(3, play)
    return Outcome(f"{len(good)} of 3", len(good) == 3)


def breaks(trial: Trial) -> Outcome:
    raise ValueError("nobody thought of that")


def is_elsewhere(trial: Trial) -> Outcome:
    raise CannotRun("there is no tmux")


@pytest.mark.parametrize("measure, code, words, reached", [
    (all_well, 0, r"3 of 3 .*  ok", True),
    (one_is_wrong, 1, r"2 of 3 .*  MISSED(.|\n)*round 1 in /.*the second one is bad(.|\n)*ROWS=R1 .*--first 1'",
     False),
    (breaks, 1, r"it broke .*  MISSED(.|\n)*nobody thought of that", False),
    (is_elsewhere, 0, r"not here: there is no tmux .*  -(.|\n)*0 of 1 rows reached.*could not run here: R1", False)])
def test_what_a_row_measured_is_said_written_down_and_the_exit_code(tmp_path, monkeypatch, capsys, measure, code,
                                                                    words, reached):
    monkeypatch.setattr(proof.tempfile, "tempdir", str(tmp_path))
    row, out = proof.Row("R1", "it holds", "3 of 3", measure), tmp_path / "figures.json"
    assert proof.prove([row], 0.5, 0, out) == code
    assert re.search(words, capsys.readouterr().out)
    written, = json.loads(out.read_text())
    assert written["reached"] is reached and written["command"] == "make proof ROWS=R1 SCALE=0.5"
    kept = [path.name for path in tmp_path.glob("pp-*/R1/*")]
    assert kept == (["0001"] if measure is one_is_wrong else []), "a failed round can be looked at"


def test_rows_are_chosen_by_name_in_the_tables_order():
    names = [row.name for row in proof.chosen_rows("R3, R1")]
    assert names == [row.name for row in proof.ROWS if row.name in ("R1", "R3")]
    assert proof.chosen_rows("") == proof.ROWS
    with pytest.raises(ValueError, match="no row R99; there are R1 R2"):
        proof.chosen_rows("R1 R99")


BAD_PREFIXES = [
    ('{"seq":1,"at":1,"kind":"run_opened"}\n{"seq":3,"at":1,"kind":"x"}\n', "line 2 has seq 3"),
    ('{"seq":1,"at":2,"kind":"run_opened"}\n{"seq":2,"at":1,"kind":"x"}\n', "earlier"),
    ('{"seq":1,"at":1,"kind":"run_opened"}\n{"seq"\n{"seq":3,"at":1,"kind":"x"}\n', "line 2 is no JSON"),
    ('{"seq":1,"at":1,"kind":"x"}\n', "begins with x"),
    ('{"seq":1,"at":1,"kind":"run_opened"}\n{"seq":2,"at":1,"kind":"hand_ended","actor":"a"}\n', "a went"),
]


@pytest.mark.parametrize("text, words", BAD_PREFIXES, ids=[words for _, words in BAD_PREFIXES])
def test_a_journal_that_is_no_legal_prefix_is_seen(tmp_path, text, words):
    (tmp_path / "journal.jsonl").write_text(text)
    assert any(words in fault for fault in deaths.faults_of_prefix(tmp_path))


def test_a_cut_last_line_is_legal(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"seq":1,"at":1,"kind":"run_opened"}\n{"seq":2,"a')
    assert deaths.faults_of_prefix(tmp_path) == []


def test_a_round_of_a_real_row(tmp_path):
    trial = Trial(0.001, tmp_path)
    assert proof.ROWS[2].measure(trial).measured.startswith("8 of 8, 0 restarted"), trial.faults
