"""Run pitboss to its end and count the calls that faults.py could stop at: `count_calls.py FILE ARGUMENTS`."""
from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faults  # noqa: E402

MANY = 1 << 40


def main(arguments: list[str]) -> int:
    moments = {point: faults.Moment(MANY, "before") for point in faults.FAULTS if point != "git"}
    for point, moment in moments.items():
        faults.FAULTS[point](moment, b"")
    code = faults.load_pitboss().main(arguments[1:])
    Path(arguments[0]).write_text(json.dumps({point: MANY - moment.left for point, moment in moments.items()}))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
