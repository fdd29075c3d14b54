"""What the exact functions take: a world, and a controller that fits it."""

from spg.kernels.cells import Drawn
from spg.kernels.finite import TableHead, TableMemory
from spg.kernels.kernel import Kernel
from spg.worlds import models
from spg.worlds.models import POMDP


def check(kernel: Kernel, pomdp: POMDP) -> None:
    """Raise ValueError for a world that is none, and for tables of other sizes than the world's.

    Arrays that are traced are checked by their shapes alone.
    """
    models.check(pomdp)
    cell, head = kernel.cell, kernel.head
    memory = cell.distribution if isinstance(cell, Drawn) else None
    for what, table in (("memory", memory), ("head", head)):
        if isinstance(table, TableMemory | TableHead) and table.logits.shape[1] != pomdp.num_obs:
            raise ValueError(
                f"the {what} has tables for {table.logits.shape[1]} observations; the world has "
                f"{pomdp.num_obs}"
            )
    if isinstance(head, TableHead) and head.logits.shape[2] != pomdp.num_actions:
        raise ValueError(
            f"the head has {head.logits.shape[2]} actions; the world has {pomdp.num_actions}"
        )
