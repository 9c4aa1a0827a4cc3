"""`make golden`: train every case anew, say what differs from the kept losses, and replace them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.golden.runs import CASES, FILE, environment, load_golden, train_case
from tests.helpers import training


def main() -> None:
    """Renew `losses.json`."""
    before = load_golden() if FILE.exists() else {"environment": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        place = training.make_place(Path(folder))
        cases = {case: train_case(place, case) for case in CASES}
    for case, made in cases.items():
        kept = before["cases"].get(case)
        print(f"{case}: {'new' if kept is None else 'as before' if kept == made else 'CHANGED'}")
    for name, value in environment().items():
        if before["environment"].get(name, value) != value:
            print(f"{name}: {before['environment'][name]} -> {value}")
    FILE.write_text(json.dumps({"environment": environment(), "cases": cases}, indent=1) + "\n")
    print(f"renewed {FILE.name}; a change of it needs a reason, in the commit that makes it")


if __name__ == "__main__":
    main()
