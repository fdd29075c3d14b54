"""Tables for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def table(rows: Sequence[Mapping[str, Any]], *, keep: int = 1, width: int = 80) -> str:
    """`rows` under the names of their entries: words to the left, numbers of 4 digits to the right.

    Columns beyond `width` go on in another block below, which opens with the first `keep` columns
    again.
    """
    columns = [[name.replace("_", " "), *(_show(row[name]) for row in rows)] for name in rows[0]]
    words = [isinstance(value, str) for value in rows[0].values()]
    padded = []
    for column, left in zip(columns, words, strict=True):
        size = max(map(len, column))
        padded.append([x.ljust(size) if left else x.rjust(size) for x in column])
    blocks = [padded[:keep]]
    for column in padded[keep:]:
        if len(blocks[-1]) > keep and sum(len(x[0]) + 2 for x in (*blocks[-1], column)) - 2 > width:
            blocks.append(padded[:keep])
        blocks[-1] = [*blocks[-1], column]
    lines = (["  ".join(line).rstrip() for line in zip(*block, strict=True)] for block in blocks)
    return "\n\n".join("\n".join(block) for block in lines)


def _show(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)
