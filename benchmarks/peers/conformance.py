"""Put other systems to `medray conformance`'s checks; print a Markdown table.

Run in the peers' environment, see benchmarks/peers/README.md:

    PEERS/bin/python -m benchmarks.peers.conformance
"""

import contextlib
import io
import logging
import sys

from benchmarks import harness
from benchmarks.peers.engines import ENGINES
from medray.inference.conformance import check_engine


def main() -> None:
    """Put other systems to the checks of `medray conformance`."""
    logging.disable(logging.CRITICAL)
    columns = {}
    for name, engine in ENGINES.items():
        with contextlib.redirect_stderr(io.StringIO()):
            columns[name] = check_engine(engine)
        print(name, [(c.name, c.found) for c in columns[name]], file=sys.stderr)
    print("| check |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for checks in zip(*columns.values(), strict=True):
        found = (c.found if not c.passed else "yes" for c in checks)
        print(f"| {checks[0].asked} |", " | ".join(found), "|")


if __name__ == "__main__":
    harness.run(main)
