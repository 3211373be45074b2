"""Speed and memory against transformers' own classes, on the same weights: `vlm-zoo bench`.

    >>> from vlm_zoo.bench import run, table
    >>> print(table(run(quick=True)))

Every row first shows that both sides compute the same and is timed after that; a row whose sides differ is INVALID.
Both sides run in one process and in turn, so that what else the machine does falls on both.
"""

from .engine import Row, run, table
from .scale import FULL, QUICK, Scale


__all__ = ["FULL", "QUICK", "Row", "Scale", "run", "table"]
