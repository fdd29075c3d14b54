"""The parts of a stateful policy π(a, z' | o, z): kernel, cells, heads, critics.

Every part is importable from here; `make_kernel` puts them together from a `PolicyConfig`.
"""

from spg.kernels.cells import (
    GRU,
    Cell,
    Computed,
    Drawn,
    Empty,
    Location,
    NormalAround,
    Roll,
    Window,
)
from spg.kernels.critics import Critic, QCritic
from spg.kernels.exploring import Exploring
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.filtered import Feature, FilterLocation, filter_cell
from spg.kernels.finite import (
    ExpectedIState,
    FiniteMemory,
    MixtureHead,
    NetworkMemory,
    TableHead,
    TableMemory,
    Tables,
    expected_kernel,
    finite_kernel,
    noise_free,
    random_controller,
    random_successors,
    start_distribution,
    tables,
)
from spg.kernels.heads import (
    CategoricalHead,
    DeterministicHead,
    FeatureHead,
    Head,
    NormalHead,
    TanhNormalHead,
    TeamHead,
)
from spg.kernels.held import Held, HeldHead, HeldState, certain_logits, held_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.latent import Inferred, LatentModel, NormalMLP
from spg.kernels.linear import LRU, Gated, LeakyFilter, Linear, LinearUnit
from spg.kernels.matrix import (
    DeltaRule,
    Hybrid,
    LinearAttention,
    MatrixUnit,
    QueryHead,
    Retention,
)
from spg.kernels.networks import MLP, Flat, Identity, Normalizer, trainable
from spg.kernels.oscillator import Oscillators
from spg.kernels.seeds import Seed, SeedState, seed_start
from spg.kernels.stack import Stack

__all__ = [
    "GRU",
    "LRU",
    "MLP",
    "CategoricalHead",
    "Cell",
    "Computed",
    "Critic",
    "DeltaRule",
    "DeterministicHead",
    "Drawn",
    "Empty",
    "ExpectedIState",
    "Exploring",
    "Feature",
    "FeatureHead",
    "FilterLocation",
    "FiniteMemory",
    "Flat",
    "Gated",
    "Head",
    "Held",
    "HeldHead",
    "HeldState",
    "Hybrid",
    "Identity",
    "Inferred",
    "Kernel",
    "LatentModel",
    "LeakyFilter",
    "Linear",
    "LinearAttention",
    "LinearUnit",
    "Location",
    "MatrixUnit",
    "MixtureHead",
    "NetworkMemory",
    "NormalAround",
    "NormalHead",
    "NormalMLP",
    "Normalizer",
    "Oscillators",
    "PolicyConfig",
    "QCritic",
    "QueryHead",
    "Retention",
    "Roll",
    "Seed",
    "SeedState",
    "Stack",
    "TableHead",
    "TableMemory",
    "Tables",
    "TanhNormalHead",
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
    "seed_start",
    "start_distribution",
    "tables",
    "trainable",
]
