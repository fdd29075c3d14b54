"""Finite worlds as arrays: models, hidden Markov models, problems, and the .POMDP reader."""

from collections.abc import Callable

from spg.worlds.models import DensePOMDP, Problem, SparsePOMDP, aggregate, dense, sparse
from spg.worlds.pomdp_file import read_pomdp
from spg.worlds.problems import PROBLEMS
from spg.worlds.ringworld import ringworld
from spg.worlds.traps import TRAPS

__all__ = [
    "WORLDS",
    "DensePOMDP",
    "Problem",
    "SparsePOMDP",
    "aggregate",
    "dense",
    "read_pomdp",
    "ringworld",
    "sparse",
]

WORLDS: dict[str, Callable[..., Problem]] = {**PROBLEMS, **TRAPS, "ringworld": ringworld}
"""Every built-in problem, by the name that the scripts' `--problem` takes."""
