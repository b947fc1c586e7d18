"""Errors that a user can put right, each naming the bad value, where it came from and what to do.

::

    PtftError
    ├── RecipeError          a task or adapter recipe, or a --set, is wrong
    ├── DataError            a data set is missing, broken or does not fit its task
    ├── ModelError           a model cannot be found, loaded or used for the task
    ├── AdapterError         an adapter recipe does not fit the model it is applied to
    ├── CheckpointError      a checkpoint cannot be written, read or trusted
    │   └── RoundTripError   a checkpoint, read back, is not what was written
    └── OutputError          an output folder or file cannot be used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PtftError(Exception):
    """One or more problems of one input, reported together.

    Args:
        *problems: One sentence per problem; at least one.

    Raises:
        TypeError: If no problem is given.
    """

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise TypeError(f"{type(self).__name__} needs at least one problem")
        super().__init__(*problems)
        self.problems: tuple[str, ...] = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  - ".join([f"{len(self.problems)} problems:", *self.problems])


class RecipeError(PtftError):
    """A task or adapter recipe, or a ``--set``, is wrong."""


class DataError(PtftError):
    """A data set is missing, broken or does not fit its task."""


class ModelError(PtftError):
    """A model cannot be found, loaded or used for the task."""


class AdapterError(PtftError):
    """An adapter recipe does not fit the model it is applied to."""


class CheckpointError(PtftError):
    """A checkpoint cannot be written, read or trusted."""


class RoundTripError(CheckpointError):
    """A checkpoint, read back, is not what was written."""


class OutputError(PtftError):
    """An output folder or file cannot be used."""


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message about an unknown name, `` (did you mean 'x'?)``, or nothing.

    Case is ignored. The last part of a name (``sst2`` of ``sequence_classification/sst2``) and its first
    three or more letters count as near.

    Args:
        name: What was given.
        names: What is known.
        cutoff: How near is near, from 0 (anything) to 1 (the same); the default is ``difflib``'s.
    """
    known = {candidate.casefold(): candidate for candidate in sorted(names)}
    wanted = name.casefold()
    near = [key for key in known if key.rsplit("/", 1)[-1] == wanted]
    near = near or difflib.get_close_matches(wanted, known, n=1, cutoff=cutoff)
    near = near or [key for key in known if len(wanted) >= 3 and key.startswith(wanted)][:3]
    return f" (did you mean {' or '.join(repr(known[key]) for key in near)}?)" if near else ""
