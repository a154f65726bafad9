"""The README's generated parts are what they are generated from, and every figure names the command that printed it."""
from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys

import pytest

import figures
from tools import ROOT


@pytest.mark.parametrize("part", figures.PARTS)
def test_the_readme_has_what_it_is_generated_from(part):
    text = figures.README.read_text(encoding="utf-8")
    begin, end = figures.places_of(text, part)
    assert text[begin:end].strip() == figures.PARTS[part]().strip(), "run `python3 tests/figures.py --write`"


def test_every_row_is_whole_and_its_command_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    told = figures.read_figures()
    assert set(told) == set(figures.COLUMNS)
    for part, rows in told.items():
        assert len({(r["row"], r.get("what")) for r in rows}) == len(rows), "no row twice"
        for row in rows:
            assert set(row) == {key for key, _ in figures.COLUMNS[part]} and all(row.values())
            assert datetime.date.fromisoformat(row["when"]) <= datetime.date.today() + datetime.timedelta(1)
            words = row["command"].split()
            assert words[0] == "make" and words[1] in targets or words[0] == "python3" and (ROOT / words[1]).exists()


ROW = {"row": "noop", "what": "a task | that does nothing", "measured": "1.1 ms", "beside": "0.9 ms: xargs", "scale": "quick",
       "command": "make bench", "when": "2026-01-02"}


def test_measured_rows_take_the_place_of_older_ones(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"proof": [], "bench": [{**ROW, "row": "idle"}, ROW]}))
    figures.put_rows("bench", [{**ROW, "measured": "1.0 ms"}, {**ROW, "what": "more", "measured": "2 ms"}], path)
    told = figures.read_figures(path)
    assert [(r["row"], r["measured"]) for r in told["bench"]] == [("idle", "1.1 ms"), ("noop", "1.0 ms"), ("noop", "2 ms")]
    table = figures.render_figures("bench", told).splitlines()
    assert len(table) == 5 and "a task \\| that does nothing" in table[2] and "`make bench`" in table[2]
    for bad in ({**ROW, "measured": ""}, {**ROW, "more": "x"}, {k: v for k, v in ROW.items() if k != "when"}):
        with pytest.raises(ValueError, match="a row of bench has the keys"):
            figures.put_rows("bench", [bad], path)


def test_a_proof_is_taken_as_it_was_measured(tmp_path):
    """Rows as tests/chaos/proof.py writes them: one that missed says so, one that could not run is left out."""
    chaos = {"promise": "p", "figure": "all", "measured": "3 of 4", "reached": False, "command": "make proof ROWS=R2 SCALE=0.2",
             "scale": 0.2, "when": "2026-01-02T03:04:05+00:00", "took_s": 1.5, "ran": True, "faults": ["x"]}
    path, source = tmp_path / "figures.json", tmp_path / "proof.json"
    path.write_text('{"proof": [], "bench": []}')
    source.write_text(json.dumps([{"row": "R10", **chaos}, {"row": "R2", **chaos}, {"row": "R3", **chaos, "ran": False}]))
    assert figures.take_proof(source, path) == 2
    rows = figures.read_figures(path)["proof"]
    assert [(r["row"], r["reached"], r["scale"], r["when"]) for r in rows] == [
        ("R2", "no", "0.2", "2026-01-02"), ("R10", "no", "0.2", "2026-01-02")]
    assert "| no |" in figures.render_figures("proof", {"proof": rows})


def test_the_readme_says_which_row_missed_by_how_much_and_which_was_not_tried():
    rows = [{"row": name, "promise": "p", "figure": "9 of 9", "measured": "9 of 9", "reached": "yes", "command": "make proof",
             "scale": "1", "when": "2026-01-02"} for name in figures.proof_rows()]
    assert len(rows) > 20 and figures.render_proof({"proof": rows}).startswith(f"{len(rows)} of {len(rows)} rows reached")
    assert "missed" not in figures.render_proof({"proof": rows}) and "Not measured" not in figures.render_proof({"proof": rows})
    rows[1] |= {"measured": "7 of 9", "reached": "no"}
    told = figures.render_proof({"proof": rows[:-1]})
    assert told.startswith(f"{len(rows) - 2} of {len(rows)} rows reached") and f"Not measured: {rows[-1]['row']}." in told
    assert f"**{rows[1]['row']} missed:** 7 of 9; to reach: 9 of 9." in told
    assert figures.render_proof({"proof": []}) == "No row has been measured yet."


@pytest.mark.skipif(sys.platform != "linux", reason="the verdicts come from /proc, which only Linux has")
def test_a_proof_that_ran_can_be_taken(tmp_path):
    """What the runner itself writes of a row, not a copy of its shape."""
    script = ("import sys; sys.path[:0] = ['tests', 'tests/chaos']; import figures, json, pathlib, proof;"
              "row = proof.ROWS[0]; done = proof.Result(row, proof.Outcome('7 of 7', True), '', [], 1.0);"
              f"place = pathlib.Path({str(tmp_path)!r}); (place / 'f.json').write_text('{{\"proof\": [], \"bench\": []}}');"
              "(place / 'p.json').write_text(json.dumps([proof.as_json(done, 0.2, '2026-01-02T03:04:05+00:00')]));"
              "figures.take_proof(place / 'p.json', place / 'f.json')")
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    (row,) = figures.read_figures(tmp_path / "f.json")["proof"]
    assert (row["row"], row["measured"], row["reached"]) == ("R1", "7 of 7", "yes")


def test_a_stale_readme_is_told_and_written(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# x\n" + "".join(f"<!-- {p}: how -->\n\nSTALE TEXT\n\n<!-- end of {p} -->\nkept {p}\n" for p in figures.PARTS))
    monkeypatch.setattr(figures, "README", readme)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    assert figures.main() == 1 and "differs: safety" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["figures.py", "--write"])
    assert figures.main() == 0
    text = readme.read_text()
    assert "STALE" not in text and all(f"kept {p}\n" in text for p in figures.PARTS) and figures.refreshed(text) == text


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc, which only Linux has")
def test_the_benchmark_hands_over_what_it_printed(tmp_path):
    """Its own rows, made up: the way from a figure to a row is what counts here."""
    script = ("import sys; sys.path[:0] = ['tests', 'tests/bench']; import bench, figures, pathlib;"
              "rows = bench.as_rows({'noop': [bench.Figure('a task', 0.00123, 's', 0.001, 'xargs'),"
              "bench.Figure('memory', 5.0, 'MB')]}, 'make bench', 'quick');"
              f"figures.put_rows('bench', rows, pathlib.Path({str(tmp_path / 'f.json')!r}))")
    (tmp_path / "f.json").write_text('{"proof": [], "bench": []}')
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    rows = figures.read_figures(tmp_path / "f.json")["bench"]
    assert [(r["what"], r["measured"], r["beside"]) for r in rows] == [
        ("a task", "0.00123 s", "0.001 s (xargs), ratio 1.23"), ("memory", "5 MB", "–")]
    assert all(r["scale"].startswith("quick") and r["command"] == "make bench" for r in rows)
