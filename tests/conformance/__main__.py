"""Run the matrix, or the part of it that is not recorded yet, and write it down.

    python -m tests.conformance [--jobs 2] [--only TEXT ...] [--again] [--minutes M]

``results.jsonl`` beside this file has one line a cell; ``adapters/CONFORMANCE.md`` is made from it. A stopped run
goes on, and what failed is run again; ``--only`` takes the cells whose names hold all these texts, ``--again`` runs
what is recorded, too, ``--minutes`` stops in time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from collections import Counter

from tests.conformance import record
from tests.conformance.matrix import cells
from tests.conformance.running import ROOT, run_alone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    known, start = record.read(), time.monotonic()
    chosen = [cell for cell in cells() if all(text in cell.name for text in args.only)]
    done = {name for name, found in known.items() if found["status"] != "failed"}
    left = [cell for cell in chosen if args.again or cell.name not in done]
    print(f"{len(chosen)} cells, {len(left)} to run", flush=True)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for i, found in enumerate(pool.imap_unordered(run_alone, left)):
            record.add(found)
            if found["status"] == "failed":
                print(f"{found['cell']}: failed: {found['problems']}", flush=True)
            if i % 50 == 49:
                print(f"{i + 1} of {len(left)} in {time.monotonic() - start:.0f} s", flush=True)
            if time.monotonic() - start > args.minutes * 60:
                pool.terminate()
                break
    known = record.read()
    record.render(known)
    print(dict(Counter(str(found["status"]) for found in known.values())), f"of {len(cells())} cells")
    shutil.rmtree(ROOT, ignore_errors=True)


if __name__ == "__main__":
    main()
