"""Finite worlds as arrays: models, hidden Markov models, problems, and the .POMDP reader."""

from collections.abc import Callable

from spg.worlds.hmm import HMM, deterministic_part
from spg.worlds.markov import random_hmm, ringworld, swap_hmm
from spg.worlds.mazes import rooms
from spg.worlds.models import (
    POMDP,
    DensePOMDP,
    Problem,
    SparsePOMDP,
    aggregate,
    dense,
    interrupted,
    sparse,
    sparse_pomdp,
)
from spg.worlds.pomdp_file import POMDPFileError, parse_pomdp, read_pomdp
from spg.worlds.problems import (
    PROBLEMS,
    factory,
    heaven_hell,
    load_unload,
    pentagon,
    random_pomdp,
    tiger,
)
from spg.worlds.traps import TRAPS, cartpole, chain, matching, random_aggregated, two_states

__all__ = [
    "HMM",
    "POMDP",
    "WORLDS",
    "DensePOMDP",
    "POMDPFileError",
    "Problem",
    "SparsePOMDP",
    "aggregate",
    "cartpole",
    "chain",
    "dense",
    "deterministic_part",
    "factory",
    "heaven_hell",
    "interrupted",
    "load_unload",
    "matching",
    "parse_pomdp",
    "pentagon",
    "random_aggregated",
    "random_hmm",
    "random_pomdp",
    "read_pomdp",
    "ringworld",
    "rooms",
    "sparse",
    "sparse_pomdp",
    "swap_hmm",
    "tiger",
    "two_states",
]

WORLDS: dict[str, Callable[..., Problem]] = {
    **PROBLEMS,
    **TRAPS,
    "ringworld": ringworld,
    "rooms": rooms,
}
"""Every built-in problem, by the name that the scripts' `--problem` takes."""
