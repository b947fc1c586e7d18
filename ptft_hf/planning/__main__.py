"""The process of one probe, started by :func:`ptft_hf.planning.probing.run`; not for use by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ptft_hf.errors import PtftError


def main() -> None:
    """Read an order from standard input, carry it out, write its answer."""
    wanted = json.load(sys.stdin)
    from ptft_hf.planning import probing

    try:
        found = probing.probe(wanted)
    except PtftError as error:
        sys.exit(str(error))
    Path(wanted["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
