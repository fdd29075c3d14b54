"""From the words of a command line to a kernel: a word sets the cell, its noise, and L."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from spg.kernels.cells import GRU, Computed, Empty, Location, Noisy, Window
from spg.kernels.heads import CategoricalHead, NormalHead
from spg.kernels.kernel import Kernel
from spg.kernels.linear import LRU, Gated, LeakyFilter, Linear
from spg.kernels.networks import Identity, Normalizer
from spg.kernels.stack import Stack
from spg.scans import num_segments
from spg.types import policy_view


@dataclass(frozen=True)
class PolicyConfig:
    """The policy, as the scripts offer it."""

    memory: Literal["s2pg", "bptt", "window", "none", "oracle"] = "s2pg"
    """law of z': drawn, computed, a window; none and oracle have no memory, the oracle sees all"""
    cell: Literal["gru", "linear", "lru", "gated", "leaky"] = "gru"
    """where z' lies (s2pg, bptt); leaky takes one-hot observations with --previous-action"""
    num_layers: int = 1
    """of linear, lru or gated cells, one above the other (s2pg, bptt)"""
    z_size: int = 16
    """size of the internal state, of all layers (s2pg, bptt); a complex number takes two"""
    state_std: float = 0.2
    """initial standard deviation of the noise on z' (s2pg); it is learned"""
    segment_length: int = 0
    """L, steps through which gradients flow; 0: the whole rollout for bptt, otherwise 1"""
    window: int = 5
    """observations that --memory window keeps"""
    hidden: tuple[int, ...] = (64,)
    """widths of the hidden layers of policy head and critic"""
    action_std: float = 0.5
    """initial standard deviation of continuous actions, whose range is [-1, 1]"""

    def length(self, num_steps: int) -> int:
        """L for a rollout of `num_steps`."""
        return self.segment_length or (num_steps if self.memory == "bptt" else 1)

    def check(self, num_steps: int) -> int:
        """The number of segments of a rollout. Raises ValueError for what cannot run."""
        if self.memory == "s2pg" and self.state_std <= 0:
            raise ValueError(
                f"state_std is {self.state_std}; s2pg needs noise on z', 0.1 to 0.3 is usual; "
                "--memory bptt is the policy without"
            )
        if self.num_layers < 1 or (self.num_layers > 1 and self.cell in ("gru", "leaky")):
            raise ValueError(
                f"num_layers is {self.num_layers}; it has to be 1 for {self.cell}, "
                "and at least 1 for linear, lru and gated"
            )
        if self.action_std <= 0:
            raise ValueError(f"action_std is {self.action_std}; it has to be positive")
        return num_segments(num_steps, self.length(num_steps))


def make_kernel(config: PolicyConfig, env: Any, env_params: Any, *, key: PRNGKeyArray) -> Kernel:
    """The kernel that `config` names, sized for a Gymnax environment.

    s2pg draws z' ~ N(cell(o, z), σ²), σ learned from state_std on; bptt computes z' = cell(o, z);
    window keeps the last `window` observations; none and oracle have no memory (the oracle's
    environment shows the full state). Raises ValueError for an action space that is neither
    Discrete nor a Box of one axis, and for a cell that cannot be made.
    """
    from gymnax.environments import spaces  # here: importing gymnax starts JAX's backend

    cell_key, head_key = jr.split(key)
    obs, _ = jax.eval_shape(env.reset, key, env_params)
    obs_size = policy_view(obs).shape[0]
    z_size = {"s2pg": config.z_size, "bptt": config.z_size, "window": config.window * obs_size}
    size = z_size.get(config.memory, 0)

    location: Location
    if config.memory in ("s2pg", "bptt"):
        location = _recurrent(config, env, obs_size, key=cell_key)
    else:
        location = Window() if config.memory == "window" else Empty()
    noise = jnp.full(size, jnp.log(config.state_std)) if config.memory == "s2pg" else None
    cell = Computed(location) if noise is None else Noisy(location, noise)

    space = env.action_space(env_params)
    sizes = [obs_size + size, *config.hidden]
    if isinstance(space, spaces.Discrete):
        head = CategoricalHead([*sizes, space.n], key=head_key)
    elif isinstance(space, spaces.Box) and len(space.shape) == 1:
        head = NormalHead([*sizes, space.shape[0]], std=config.action_std, key=head_key)
    else:
        raise ValueError(f"action space {space} is neither Discrete nor a Box of one axis")
    one_hot = isinstance(location, LeakyFilter)
    return Kernel(cell, head, Identity() if one_hot else Normalizer(obs_size), jnp.zeros(size))


def _recurrent(config: PolicyConfig, env: Any, obs_size: int, *, key: PRNGKeyArray) -> Location:
    if config.cell == "leaky":
        if not env.previous_action:
            raise ValueError("--cell leaky turns its state by the last action: --previous-action")
        return LeakyFilter(obs_size, config.z_size, env.num_actions, key=key)
    make = {"gru": GRU, "linear": Linear, "lru": LRU, "gated": Gated}[config.cell]
    if config.num_layers == 1:
        return make(obs_size, config.z_size, key=key)
    return Stack(make, obs_size, config.z_size, config.num_layers, key=key)
