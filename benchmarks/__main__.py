"""``python -m benchmarks [exchange] [start] [membership] [recovery]``: run, print tables, put them in the README."""

import re
import sys
from pathlib import Path

from benchmarks import exchange, membership, recovery, start

ALL = {"exchange": exchange.run, "start": start.run, "membership": membership.run, "recovery": recovery.run}
README = Path(__file__).parent.parent / "README.md"


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all."""
    unknown = set(names) - set(ALL)
    if unknown:
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    tables = []
    for name in names or ALL:
        table = ALL[name]()
        print(f"\n{table.markdown()}\n", flush=True)
        tables.append(table.markdown())
    if not names:  # only a complete run replaces what the README says
        text = README.read_text()
        block = "<!-- bench -->\n" + "\n\n".join(tables) + "\n<!-- /bench -->"
        README.write_text(re.sub(r"<!-- bench -->.*?<!-- /bench -->", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main(sys.argv[1:])
