"""Run benchmarks, and make the README's table, docs/benchmarks.md and the pictures of their results.

python -m benchmarks                run all, then write
python -m benchmarks step exchange  run some and print their tables; the results are kept
python -m benchmarks --write        write from the results that were kept last
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module

from benchmarks import pages, results
from benchmarks.tables import Table

NAMES = (
    "step",
    "memory",
    "exchange",
    "encryption",
    "driver",
    "scale",
    "start",
    "feed",
    "shuffle",
    "membership",
    "recovery",
    "silence",
    "goodput",
    "mixed",
    "checkpoints",
)  # as on the page


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--write", action="store_true", help="write README.md, docs/benchmarks.md and docs/images")
    flags = parser.parse_args(given)
    if unknown := set(flags.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    logging.getLogger("ray_dnn").addHandler(logging.NullHandler())  # so that runs do not tell their progress
    names = flags.names or (() if flags.write else NAMES)
    with tempfile.TemporaryDirectory(prefix="rb-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Short, for Ray puts Unix sockets below it. Ray reads its environment when it is imported, below.
        os.environ |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        for name in names:
            _measure(name)
    if flags.write or not flags.names:  # only a complete run replaces what is published, or who asks for it
        kept = results.read(NAMES)
        if missing := set(NAMES) - {result.table.name for result in kept}:
            parser.error(f"not measured yet: {', '.join(sorted(missing))}")
        pages.write(kept)


def _measure(name: str) -> None:
    """Run one benchmark, keep its result and print it."""
    run: Callable[[], Table] = import_module(f"benchmarks.{name}").run
    load = results.load()
    table = run()
    results.Result(table, results.machine(), load, results.today()).write()
    print(f"\n{table.title}\n\n{table.markdown()}\n", flush=True)


if __name__ == "__main__":
    main()
