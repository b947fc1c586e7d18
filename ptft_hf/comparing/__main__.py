"""The process of one cell, started by :func:`ptft_hf.comparing.running.run_process`; not for use by hand."""

from __future__ import annotations

import json
import os
import threading
import traceback
from pathlib import Path
from typing import Any

from ptft_hf.errors import PtftError


def end_with_parent() -> None:
    """Standard input ends when the parent does; what it was waiting for is not worth finishing then."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Read a cell from standard input, run it, write its file; an error is a result."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # nothing may be read ahead of the thread
        order: dict[str, Any] = json.loads(stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    from ptft_hf.comparing.cells import run_cell, write_cell
    from ptft_hf.comparing.grids import Cell

    try:
        cell = Cell.from_dict(order["cell"])
        result = run_cell(cell, Path(order["runs"]), keep_weights=order["keep"])
    except PtftError as error:
        result = {"status": "failed", "cell": order["cell"], "error": str(error)}
    except Exception as error:
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        result = {"status": "failed", "cell": order["cell"], "error": text}
    write_cell(Path(order["file"]), result)


if __name__ == "__main__":
    main()
