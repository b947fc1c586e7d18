"""Choosing on the validation set: a search over recipe and training fields, then one run and one look at test.

The rooms behind it: ``ranges`` (what may be changed), ``searching`` (the tries, by optuna).
"""

from __future__ import annotations

from ptft_hf.tuning.ranges import Range, read_ranges

__all__ = ["Range", "read_ranges"]
