#!/usr/bin/env python3
"""The parts of the README that are generated, and the figures two of them come from.

    python3 tests/figures.py            # say which parts differ from what they should be; exit 1 when one does
    python3 tests/figures.py --write    # write them
    make proof ARGS="--json FILE"; python3 tests/figures.py --take FILE --write     # with the figures of a proof
    make bench ARGS=--figures; python3 tests/figures.py --write                     # with those of the benchmark

tests/data/figures.json has the rows that these two measured, nothing else: {"proof": [{row, promise, figure,
measured, reached, command, scale, when}], "bench": [{row, what, measured, beside, command, scale, when}]}; all values
are texts, `when` is a day, `reached` is yes or no. A row that could not be tried is none.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pitboss  # noqa: E402

README, FIGURES = ROOT / "README.md", ROOT / "tests" / "data" / "figures.json"
COLUMNS = {
    # part: (key of a row, head of its column) pairs
    "proof": (("row", "row"), ("promise", "promise"), ("figure", "to reach"), ("measured", "measured"),
              ("reached", "reached"), ("scale", "scale"), ("command", "command"), ("when", "when")),
    "bench": (("row", "row"), ("what", "what"), ("measured", "measured"), ("beside", "beside"), ("scale", "scale"),
              ("command", "command"), ("when", "when")),
}


def read_figures(path: Path = FIGURES) -> dict[str, list[dict]]:
    return json.loads(path.read_text(encoding="utf-8"))


def put_rows(part: str, rows: list[dict], path: Path = FIGURES) -> None:
    """Put measured rows in the place of those of the same names; rows of other names stay."""
    keys = {key for key, _ in COLUMNS[part]}
    for row in rows:
        if set(row) != keys or not all(isinstance(v, str) and v for v in row.values()):
            raise ValueError(f"a row of {part} has the keys {sorted(keys)}, all of them texts; found {row}")
    figures, names = read_figures(path), {row["row"] for row in rows}
    kept = [r for r in figures[part] if r["row"] not in names] + rows
    figures[part] = sorted(kept, key=lambda r: [int(n) for n in re.findall(r"\d+", r["row"])]) if part == "proof" else kept
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def take_proof(source: Path, path: Path = FIGURES) -> int:
    """Put what a proof wrote with --json among the figures; how many rows were tried."""
    tried = [r for r in json.loads(source.read_text(encoding="utf-8")) if r["ran"]]
    put_rows("proof", [{**{key: str(r[key]) for key, _ in COLUMNS["proof"]}, "reached": "yes" if r["reached"] else "no",
                        "scale": f"{r['scale']:g}", "when": r["when"][:10]} for r in tried], path)
    return len(tried)


def today() -> str:
    return datetime.date.today().isoformat()


def render_figures(part: str, figures: dict[str, list[dict]] | None = None) -> str:
    """A table of the README; its `command` column is code."""
    rows = (read_figures() if figures is None else figures)[part]
    if not rows:
        return "No row has been measured yet."
    heads = [head for _, head in COLUMNS[part]]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"`{row[key]}`" if key == "command" else row[key] for key, _ in COLUMNS[part]]
        lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines)


def proof_rows() -> list[str]:
    """The names of all rows that a proof has."""
    return re.findall(r'^    \("(R\d+)", "', (ROOT / "tests" / "chaos" / "proof.py").read_text(encoding="utf-8"), re.M)


def render_proof(figures: dict[str, list[dict]] | None = None) -> str:
    """What became of the proof in a sentence for each row that missed or was not tried, and the table."""
    rows = (read_figures() if figures is None else figures)["proof"]
    missed = [row for row in rows if row["reached"] != "yes"]
    absent = [name for name in proof_rows() if name not in {row["row"] for row in rows}]
    lines = [f"{len(rows) - len(missed)} of {len(proof_rows())} rows reached their figure, each at the scale that its row "
             f"names."]
    lines += [f"**{row['row']} missed:** {row['measured']}; to reach: {row['figure']}." for row in missed]
    lines += [f"Not measured: {', '.join(absent)}."] if absent else []
    table = render_figures("proof", {"proof": rows})
    return "\n\n".join([*lines, table]) if rows else table


PARTS: dict[str, Callable[[], str]] = {
    # name in the README's comments: what stands between them
    "proof": lambda: render_proof(),
    "bench": lambda: render_figures("bench"),
    "safety": lambda: pitboss.render_threats(pitboss.threat_with_tests),
    "reference": pitboss.render_reference,
}


def places_of(text: str, part: str) -> tuple[int, int]:
    """Where the generated text of a part begins and ends."""
    begin = text.index(f"<!-- {part}: ")
    begin = text.index("-->\n", begin) + 4
    return begin, text.index(f"<!-- end of {part} -->", begin)


def refreshed(text: str) -> str:
    """The README with all its generated parts as they should be."""
    for part, render in PARTS.items():
        begin, end = places_of(text, part)
        text = f"{text[:begin]}\n{render().strip()}\n\n{text[end:]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them")
    parser.add_argument("--take", type=Path, metavar="FILE", help="take the rows that a proof wrote there with --json")
    options = parser.parse_args()
    if options.take:
        print(f"taken: {take_proof(options.take)} rows")
    text = README.read_text(encoding="utf-8")
    stale = []
    for part, render in PARTS.items():
        begin, end = places_of(text, part)
        stale += [part] if text[begin:end].strip() != render().strip() else []
    if options.write:
        README.write_text(refreshed(text), encoding="utf-8")
    print("\n".join(f"{'written' if options.write else 'differs'}: {part}" for part in stale) or "all as it should be")
    return int(bool(stale) and not options.write)


if __name__ == "__main__":
    sys.exit(main())
