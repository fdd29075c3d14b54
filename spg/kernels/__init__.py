"""The parts of a stateful policy π(a, z' | o, z): kernel, cells, heads, critics.

Every part is importable from here; `make_kernel` puts them together from a `PolicyConfig`.
"""

from spg.kernels.cells import GRU, Cell, Computed, Empty, Location, Noisy, Window
from spg.kernels.critics import Critic
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.filtered import Feature, FeatureHead, FilterCell, filter_cell
from spg.kernels.finite import (
    ExpectedIState,
    FiniteCell,
    MixtureHead,
    NetworkCell,
    TableCell,
    TableHead,
    Tables,
    expected_kernel,
    finite_kernel,
    noise_free,
    random_controller,
    random_successors,
    start_distribution,
    tables,
)
from spg.kernels.heads import CategoricalHead, Head, NormalHead, TeamHead
from spg.kernels.held import Held, HeldHead, Seed, SeedHead, certain_logits, held_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.linear import LRU, Gated, LeakyFilter, Linear, LinearUnit
from spg.kernels.networks import MLP, Identity, Normalizer
from spg.kernels.stack import Stack

__all__ = [
    "GRU",
    "LRU",
    "MLP",
    "CategoricalHead",
    "Cell",
    "Computed",
    "Critic",
    "Empty",
    "ExpectedIState",
    "Feature",
    "FeatureHead",
    "FilterCell",
    "FiniteCell",
    "Gated",
    "Head",
    "Held",
    "HeldHead",
    "Identity",
    "Kernel",
    "LeakyFilter",
    "Linear",
    "LinearUnit",
    "Location",
    "MixtureHead",
    "NetworkCell",
    "Noisy",
    "NormalHead",
    "Normalizer",
    "PolicyConfig",
    "Seed",
    "SeedHead",
    "Stack",
    "TableCell",
    "TableHead",
    "Tables",
    "TeamHead",
    "Window",
    "certain_logits",
    "expected_kernel",
    "filter_cell",
    "finite_kernel",
    "held_kernel",
    "make_kernel",
    "noise_free",
    "random_controller",
    "random_successors",
    "start_distribution",
    "tables",
]
