"""From the words of a command line to a kernel: a word sets the cell, its noise, and L."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from spg.kernels.cells import (
    GRU,
    Cell,
    Computed,
    Drawn,
    Empty,
    Location,
    NormalAround,
    Window,
)
from spg.kernels.filtered import filter_cell
from spg.kernels.heads import (
    CategoricalHead,
    DeterministicHead,
    FeatureHead,
    Head,
    NormalHead,
    TanhNormalHead,
    TeamHead,
)
from spg.kernels.kernel import Kernel
from spg.kernels.linear import LRU, Gated, LeakyFilter, Linear
from spg.kernels.matrix import DeltaRule, Hybrid, LinearAttention, QueryHead, matrix_shape
from spg.kernels.networks import Flat, Identity, Normalizer
from spg.kernels.oscillator import CycleFeature, EmissionFeature, Oscillators
from spg.kernels.seeds import Seed, SeedFeature, seed_start
from spg.kernels.stack import Stack
from spg.limits import Constant, Count, Needs, Range, Size, check
from spg.scans import num_segments
from spg.types import Spec

DRAWN = ("s2pg", "bptt")  # memories with a cell
Unit = Literal[
    "linear", "gru", "lru", "gated", "leaky", "attention", "delta", "hybrid", "oscillator"
]
MATRIX = ("attention", "delta", "hybrid")  # units with a matrix in their state


@dataclass(frozen=True)
class PolicyConfig:
    """The policy, e.g. --memory bptt --cell lru --num-layers 2 --z-size 64"""

    memory: Literal["s2pg", "bptt", "window", "filter", "kstep", "none", "oracle"] = "s2pg"
    """how z' follows from (o, z): drawn, computed, a window, a filter of the known model, a seed
    that is held for k steps; none and oracle have no memory, the oracle sees the state"""
    cell: Annotated[Unit, Needs(memory=DRAWN)] = "hybrid"
    """the unit that places z' (s2pg, bptt); attention and delta keep matrices, which the head reads
    by queries; hybrid is linear in one half of z, attention with constant decays in the other;
    leaky takes one-hot observations and the previous action; oscillator is a central pattern
    generator, which takes 3 entries of z for each oscillator"""
    dt: Annotated[
        float, Range(0, 0.2, open="low"), Constant, Needs(memory=DRAWN, cell="oscillator")
    ] = 0.05
    """seconds in a step (cell oscillator); 0.05 is that of Brax's Ant and HalfCheetah, 0.008 of
    Hopper and Walker2d, 0.015 of Humanoid"""
    num_layers: Annotated[Count, Needs(memory=DRAWN)] = 1
    """of linear units (all but gru), one above the other, or of lru above leaky (s2pg, bptt)"""
    num_heads: Annotated[Count, Needs(memory=DRAWN, cell=MATRIX)] = 4
    """matrices of a layer (cell attention, delta, hybrid)"""
    key_size: Annotated[Count, Needs(memory=DRAWN, cell=MATRIX)] = 4
    """rows of each matrix; the columns are z_size / (num_layers num_heads key_size), for hybrid a
    half of that (attention, delta, hybrid)"""
    z_size: Annotated[Size, Needs(memory=(*DRAWN, "kstep"))] = 64
    """size of the internal state, of all layers together (s2pg, bptt), where a complex number takes
    two; or the number of seeds (kstep)"""
    k: Annotated[Count, Needs(memory="kstep")] = 8
    """steps for which a seed is held (kstep)"""
    filter: Annotated[
        Literal["belief", "lof", "lof-softmax", "alf", "alf-softmax", "alf-belief"],
        Needs(memory="filter"),
    ] = "belief"
    """what the head sees (filter): the belief; or logits of the log-domain filter (lof) or of the
    leaky one (alf), or their softmax, at temperature 1 or (alf-belief) leak"""
    leak: Annotated[
        float,
        Range(0, 1, open="both"),
        Constant,
        Needs(memory="filter", filter="alf*"),
        Needs(memory=DRAWN, cell="leaky"),
    ] = 0.1
    """δ of the leaky filter (filter alf), or where δ starts (cell leaky)"""
    state_std: Annotated[
        float,
        Range(1e-6, 5, usual="0.1 to 0.3 is usual, and memory bptt is without noise"),
        Needs(memory="s2pg"),
    ] = 0.2
    """standard deviation of the noise on z' at the start, relative to the weight with which a unit
    takes up what is new (s2pg); it is learned"""
    segment_length: Annotated[int, Range(0, 2**31 - 1, whole=True)] = 0
    """L, steps through which gradients flow; 0: the whole rollout for bptt, otherwise 1"""
    window: Annotated[Size, Needs(memory="window")] = 5
    """observations in a window (window)"""
    hidden: tuple[Size, ...] = (64,)
    """widths of the hidden layers of policy head and critic"""
    action_std: Annotated[float, Range(1e-6, 5, usual="0.2 to 1 is usual")] = 0.5
    """standard deviation of continuous actions at the start; their range is [-1, 1]"""
    actions: Literal["normal", "tanh-normal", "deterministic"] = "normal"
    """distribution of continuous actions: normal with a learned deviation, tanh of a normal whose
    deviation depends on (o, z'), or normal around tanh with a constant deviation"""

    def length(self, num_steps: int) -> int:
        """L for a rollout of `num_steps`."""
        return self.segment_length or (num_steps if self.memory == "bptt" else 1)

    def num_segments(self, num_steps: int) -> int:
        """Of a rollout. Raises ValueError unless L divides it."""
        return num_segments(num_steps, self.length(num_steps))


def make_kernel(config: PolicyConfig, spec: Spec, *, key: PRNGKeyArray) -> Kernel:
    """The kernel that `config` names, for an environment of this `spec`.

    s2pg draws z' ~ N(cell(o, z), σ²), σ learned from state_std on; bptt computes z' = cell(o, z);
    window keeps the last `window` observations; filter computes what is known of the state of a
    finite world; kstep draws one of `z_size` seeds for k steps and starts with policies that differ
    between them; none and oracle have no memory (the oracle's environment shows the full state).
    Where the spec has `slots`, as number matching has, each agent acts on what it sees.

    Raises ValueError for an option out of its range, a cell that cannot be made, and a memory that
    agents would share.
    """
    check(config)
    cell_key, head_key = jr.split(key)
    normalizer: Normalizer | Identity = Normalizer(spec.obs_size)
    cell: Cell = Computed(Empty())
    z0: Any = jnp.zeros(0)
    seen, shown = Flat(), Flat()  # what the head sees of z', the critic of z
    if config.memory == "filter":
        cell, z0, seen = _filter(config, spec)
        shown, normalizer = seen, Identity()
    elif config.memory == "window":
        cell, z0 = Computed(Window()), jnp.zeros(config.window * spec.obs_size)
    elif config.memory == "kstep":
        cell, z0 = Drawn(Seed(jnp.zeros(config.z_size), config.k)), seed_start()
        seen, shown = SeedFeature(config.z_size), SeedFeature(config.z_size, config.k)
    elif config.memory in ("s2pg", "bptt"):
        location = _recurrent(config, spec, key=cell_key)
        is_complex = config.cell in ("lru", "leaky")
        z0 = jnp.zeros(config.z_size // 2, complex) if is_complex else jnp.zeros(config.z_size)
        cell = Computed(location)
        if config.memory == "s2pg":
            log_std = jnp.log(config.state_std * location.write)
            cell = Drawn(NormalAround(location, log_std))
        if config.cell == "leaky":
            normalizer = Identity()
        if config.cell == "oscillator":
            seen, shown = EmissionFeature(), CycleFeature()
    if config.memory in DRAWN and config.cell in MATRIX:
        share = 2 if config.cell == "hybrid" else 1
        num_heads = config.num_layers * config.num_heads
        shape = matrix_shape(z0.size, num_heads, config.key_size, share=share)
        query_key, head_key = jr.split(head_key)
        plain = z0.size - math.prod(shape)
        head = _head(config, spec, spec.obs_size + plain + shape[0] * shape[2], key=head_key)
        return Kernel(cell, QueryHead(head, spec.obs_size, shape, key=query_key), normalizer, z0)
    head = _head(config, spec, spec.obs_size + seen(z0).size, key=head_key)
    if not isinstance(seen, Flat):
        head = FeatureHead(head, seen)
    return Kernel(cell, head, normalizer, z0, shown)


def _filter(config: PolicyConfig, spec: Spec) -> Any:
    model = spec.model
    shown = 0 if model is None else model.num_obs + model.num_actions
    if model is None or not spec.previous_action or spec.obs_size != shown:
        raise ValueError(
            "memory 'filter' needs the model of a finite world, as of ringworld-pomdp, and its "
            "whole observation followed by the previous action: observe 'all', previous_action on"
        )
    with jax.ensure_compile_time_eval():  # the model is checked
        return filter_cell(model, config.filter, decay=config.leak)


def _recurrent(config: PolicyConfig, spec: Spec, *, key: PRNGKeyArray) -> Location:
    if config.cell == "oscillator":
        if config.z_size % 3 or config.num_layers > 1:
            raise ValueError(
                f"z_size is {config.z_size} and num_layers {config.num_layers}; oscillators take 3 "
                f"numbers each, in one layer: z_size {3 * spec.num_actions} is one for each action"
            )
        return Oscillators(config.z_size // 3, dt=config.dt, key=key)
    units = {"gru": GRU, "linear": Linear, "lru": LRU, "gated": Gated, "leaky": LRU}
    units |= {"attention": LinearAttention, "delta": DeltaRule, "hybrid": Hybrid}
    make = bottom = units[config.cell]
    if config.cell in MATRIX:
        make = bottom = partial(make, num_heads=config.num_heads, key_size=config.key_size)
    if config.cell == "leaky":
        if not spec.previous_action:
            raise ValueError("cell 'leaky' turns its state by the last action: previous_action on")
        if not spec.discrete:
            raise ValueError("cell 'leaky' turns its state by the last action; it is not discrete")
        bottom = partial(LeakyFilter, num_actions=spec.num_actions, leak=config.leak)
    if config.num_layers > 1 and config.cell in ("gru", "hybrid"):
        raise ValueError(
            f"num_layers is {config.num_layers}; layers are for linear cells, not {config.cell}"
        )
    if config.num_layers == 1:
        return bottom(spec.obs_size, config.z_size, key=key)
    return Stack(make, spec.obs_size, config.z_size, config.num_layers, bottom=bottom, key=key)


def _head(config: PolicyConfig, spec: Spec, input_size: int, *, key: PRNGKeyArray) -> Head:
    sizes = [input_size, *config.hidden]
    # seeds have to differ from the start: logits vary by about 1 between them, whatever the width
    gain = sizes[-1] ** 0.5 if config.memory == "kstep" else 0.01
    slots = None if config.memory == "oracle" else spec.slots
    if slots is not None:
        if config.memory not in ("kstep", "none"):
            raise ValueError(
                f"the {slots.shape[1]} agents would share what they see with memory "
                f"{config.memory!r}; kstep shares a seed alone, none nothing; the oracle is one "
                "agent"
            )
        if spec.obs_size != slots.max() + 1:
            raise ValueError(
                f"the agents see {slots.max() + 1} entries, and {spec.obs_size} are shown: observe "
                "'all', without the previous action"
            )
        num_actions = round(spec.num_actions ** (1 / slots.shape[1]))
        return TeamHead(slots, [*sizes, num_actions], gain=gain, key=key)
    if spec.discrete:
        return CategoricalHead([*sizes, spec.num_actions], gain=gain, key=key)
    sizes, start = [*sizes, spec.num_actions], {"std": config.action_std, "key": key}
    if config.actions == "tanh-normal":
        return TanhNormalHead(sizes, **start)
    if config.actions == "deterministic":
        return DeterministicHead(sizes, **start)
    return NormalHead(sizes, gain=gain, **start)
