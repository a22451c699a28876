"""
Record what the kernels take under the installed Triton in `resources.json`, which the tests read.

    python -m tests.kernels.record_resources
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from tests.kernels.compiled import CASES, PRODUCTS, TARGETS, case_of, resources

TABLE = Path(__file__).with_name("resources.json")


def main() -> None:
    """Compile every case for every target."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    found = {}
    for name in (*CASES, *PRODUCTS):
        taken = {target: resources(case_of(name, target), target) for target in TARGETS}
        found[name] = {target: [x.registers, x.stack] for target, x in taken.items()}
        print(name, found[name], flush=True)
    table[importlib.metadata.version("triton")] = found
    lines = (
        f'"{version}": {{\n'
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
        + "\n}"
        for version, rows in sorted(table.items())
    )
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
