#!/usr/bin/env python3
"""Tries to break every promise, and prints the figure that came of it: `make proof`.

    python3 tests/chaos/proof.py [--scale 0.2] [--rows "R1 R3"] [--first N] [--json FILE]

Scale 1 is the full table and takes about two hours on two cores; 0.01 is a look at every row in a few minutes.
Nothing of the product's code is changed for it: real programs are killed, starved and lied to from outside.
A row that misses leaves the folders of its failed rounds, and says how the first one of them comes again.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, NamedTuple

from trial import CannotRun, Outcome, Trial, explain

import deaths
import disks
import leads
import others
import stops
import streams
import works

SHOWN_FAULTS = 5


class Row(NamedTuple):
    """One promise, the figure to reach at scale 1, and the function that measures it."""
    name: str
    promise: str
    figure: str
    measure: Callable[[Trial], Outcome]


ROWS = [Row(*row) for row in (
    ("R1", "the journal is always a legal prefix", "every append, fsync and rename of a 10-task run: all legal",
     deaths.journal_is_legal),
    ("R2", "random death is harmless", "1000 of 1000 finish, one final record per task, 0 lost lines",
     deaths.random_death_is_harmless),
    ("R3", "the living are adopted", "8 of 8, 0 restarted, < 2 s", deaths.living_are_adopted),
    ("R4", "never two dispatchers", "200 rounds, 0 doubles, loser exits 4", deaths.never_two_dispatchers),
    ("R5", "nothing survives a cancel, timeout, second Ctrl-C", "500 rounds, 0 processes after 10 s",
     stops.nothing_survives),
    ("R6", "no work is lost", "300 states, 100 % reachable", works.no_work_is_lost),
    ("R7", "a full disk is survived", "ENOSPC, EDQUOT, EIO, EMFILE at every call: 0 corrupt files, 0 tracebacks, "
     "resumable", disks.full_disk_is_survived),
    ("R8", "a provider's limit holds work", "20 of 20, 0 attempts counted", others.limit_holds_work),
    ("R9", "hangs end", "100 of 100 within the limit + grace + 1 s", stops.hangs_end),
    ("R10", "caps hold", "200 racing spawns, cap 8, depth 2, 1 USD: never 9; never over by more than one "
     "estimate's error", leads.caps_hold),
    ("R11", "costs add up", "500 random usage streams, resumes and sub-agents included: error 0",
     streams.costs_add_up),
    ("R12", "store and leases are correct", "16 clients x 2000 operations with deaths: 0 violations",
     leads.store_is_correct),
    ("R13", "bad bytes", "50000 fuzzed output and protocol lines: 0 crashes; log bytes = bytes sent",
     streams.bad_bytes_harm_nobody),
    ("R14", "memory stays flat", "16 agents x 250 MB, lines up to 20 MB: < 80 MB, no growth after the first tenth",
     streams.memory_stays_flat),
    ("R15", "one box", "500 agents, cap 32: <= 3 ms CPU a task; idle < 0.5 % of a core", streams.one_box_is_enough),
    ("R16", "worktrees", "32 parallel starts while another process holds the lock: 32 of 32, 0 stray branches",
     works.many_worktrees_start),
    ("R17", "MCP never wedges a lead", "10000 calls, 0 protocol errors", leads.mcp_never_wedges),
    ("R18", "approvals are decided once under kills", "200 of 200", others.approvals_are_decided_once),
    ("R19", "tmux prompts are delivered once", "500 of 500", others.prompts_are_delivered_once),
    ("R20", "a reboot is survived", "100 of 100: all unfinished tasks go on with their sessions",
     deaths.reboot_is_survived),
    ("R21", "secrets stay out", "20 seeded secrets: 0 found in any file, message or ps", others.secrets_stay_out),
    ("R22", "old runs open", "golden folders of each journal format and of the Rust tool: 100 %", others.old_runs_open),
    ("R23", "clocks fool nobody", "wall clock a day off, dispatcher stopped 60 s: 0 false timeouts",
     stops.clocks_fool_nobody),
    ("R24", "signals in every phase", "as documented, terminal 100 % restored", stops.signals_do_as_documented),
    ("R26", "plain Pythons", "3.11 to 3.13, -I -S, no locale, read-only HOME: suite green", others.plain_pythons),
)]


class Result(NamedTuple):
    """A row that was tried: `outcome` is None where it cannot run here, and `why` says why."""
    row: Row
    outcome: Outcome | None
    why: str
    faults: list[str]
    took_s: float

    def reached(self) -> bool:
        return self.outcome is not None and self.outcome.reached


def try_row(row: Row, scale: float, folder: Path, first: int) -> Result:
    """Measure one row; whatever breaks in it makes it one that misses."""
    trial, began, outcome, why = Trial(scale, folder / row.name, first), time.monotonic(), None, ""
    trial.root.mkdir()
    try:
        outcome = row.measure(trial)
    except CannotRun as error:
        why = str(error)
    except Exception as error:     # boundary: one row's failure must not keep the others from being tried
        trial.faults.append(explain(error))
        outcome = Outcome("it broke", False)
    return Result(row, outcome, why, trial.faults, time.monotonic() - began)


def render(result: Result) -> str:
    """The line of a row, and below it what went wrong."""
    row, outcome = result.row, result.outcome
    measured = f"not here: {result.why}" if outcome is None else outcome.measured
    verdict = "-" if outcome is None else "ok" if outcome.reached else "MISSED"
    lines = [f"{row.name:<4} {row.promise:<44} {measured}   (to reach: {row.figure})  {verdict}"
             f"  [{result.took_s:.0f} s]"]
    lines += [f"       {fault}" for fault in result.faults[:SHOWN_FAULTS]]
    if found := re.match(r"round (\d+) ", "".join(result.faults[:1])):
        lines.append(f"       again: make proof ROWS={row.name} SCALE=0.001 ARGS='--first {found[1]}'")
    hidden = len(result.faults) - SHOWN_FAULTS
    return "\n".join([*lines, f"       and {hidden} more"] if hidden > 0 else lines)


def as_json(result: Result, scale: float, when: str) -> dict:
    """A row of the table of figures."""
    row, outcome = result.row, result.outcome
    measured = f"not here: {result.why}" if outcome is None else outcome.measured
    return {"row": row.name, "promise": row.promise, "figure": row.figure, "measured": measured,
            "reached": result.reached(), "command": f"make proof ROWS={row.name} SCALE={scale:g}", "scale": scale,
            "when": when, "took_s": round(result.took_s, 1), "ran": outcome is not None, "faults": result.faults}


def chosen_rows(words: str) -> list[Row]:
    """The rows of these names, in the table's order; all without any.  Raises ValueError."""
    names = words.replace(",", " ").split()
    unknown = [name for name in names if name not in {row.name for row in ROWS}]
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)}; there are {' '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if not names or row.name in names]


def prove(rows: list[Row], scale: float, first: int, out: Path | None) -> int:
    """Try the rows, print each one's line when it is done, and write it to `out`; 1 when one misses."""
    folder = Path(tempfile.mkdtemp(prefix="pp-"))      # short: sockets lie in it
    when, results = datetime.now(timezone.utc).isoformat(timespec="seconds"), []
    try:
        for row in rows:
            results.append(try_row(row, scale, folder, first))
            print(render(results[-1]), flush=True)
            if out:
                out.write_text(json.dumps([as_json(r, scale, when) for r in results], indent=1) + "\n")
            if results[-1].reached() or results[-1].outcome is None:
                shutil.rmtree(folder / row.name, ignore_errors=True)
    finally:
        if not os.listdir(folder) or all(not any(p.iterdir()) for p in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
    missed = [r.row.name for r in results if r.outcome is not None and not r.outcome.reached]
    absent = [r.row.name for r in results if r.outcome is None]
    print(f"{sum(r.reached() for r in results)} of {len(results)} rows reached their figure at scale {scale:g}"
          + (f"; missed: {' '.join(missed)} (kept in {folder})" if missed else "")
          + (f"; could not run here: {' '.join(absent)}" if absent else ""))
    return 1 if missed else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.2, help="how much of the full table (0.2)")
    parser.add_argument("--rows", default="", metavar="NAMES", help="only these, e.g. \"R1 R3\"")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number of each row's first round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("the verdicts come from /proc, which only Linux has")
    if not 0 < options.scale <= 1:
        parser.error("--scale is more than 0 and at most 1")
    try:
        rows = chosen_rows(options.rows)
    except ValueError as error:
        parser.error(str(error))
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:      # a shell's `&` does that, and children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return prove(rows, options.scale, options.first, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
