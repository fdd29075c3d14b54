"""From the words of a command line to a kernel: a word sets the cell, its noise, and L."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from spg.kernels.cells import GRU, Computed, Empty, Linear, Location, Noisy, Window
from spg.kernels.heads import CategoricalHead, NormalHead, TeamHead
from spg.kernels.held import Seed, SeedHead
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Normalizer
from spg.scans import num_segments
from spg.types import policy_view


@dataclass(frozen=True)
class PolicyConfig:
    """The policy, as the scripts offer it."""

    memory: Literal["s2pg", "bptt", "window", "kstep", "none", "oracle"] = "s2pg"
    """law of z': drawn, computed, a window, a seed that is held for k steps; none and oracle have
    no memory, the oracle sees all"""
    cell: Literal["gru", "linear"] = "gru"
    """where z' lies (s2pg, bptt)"""
    z_size: int = 16
    """size of the internal state (s2pg, bptt), number of seeds (kstep)"""
    k: int = 8
    """steps for which a seed is held (kstep)"""
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
        if self.memory == "kstep" and self.k < 1:
            raise ValueError(f"k is {self.k}; a window has at least 1 step")
        if self.action_std <= 0:
            raise ValueError(f"action_std is {self.action_std}; it has to be positive")
        return num_segments(num_steps, self.length(num_steps))


def make_kernel(config: PolicyConfig, env: Any, env_params: Any, *, key: PRNGKeyArray) -> Kernel:
    """The kernel that `config` names, sized for a Gymnax environment.

    s2pg draws z' ~ N(cell(o, z), σ²), σ learned from state_std on; bptt computes z' = cell(o, z);
    window keeps the last `window` observations; kstep draws one of `z_size` seeds for k steps
    and starts with policies that differ between them; none and oracle have no memory (the oracle's
    environment shows the full state). Where the environment has `slots`, as number matching has,
    each agent acts on its own observation. Raises ValueError for an action space that is neither
    Discrete nor a Box of one axis, and for a memory that agents would share.
    """
    from gymnax.environments import spaces  # here: importing gymnax starts JAX's backend

    cell_key, head_key = jr.split(key)
    obs, _ = jax.eval_shape(env.reset, key, env_params)
    obs_size = policy_view(obs).shape[0]
    z_size = {"s2pg": config.z_size, "bptt": config.z_size, "window": config.window * obs_size}
    size = z_size.get(config.memory, 0)

    location: Location
    if config.memory in ("s2pg", "bptt"):
        recurrent = {"gru": GRU, "linear": Linear}[config.cell]
        location = recurrent(obs_size, size, key=cell_key)
    else:
        location = Window() if config.memory == "window" else Empty()
    cell = Computed(location)
    if config.memory == "s2pg":
        cell = Noisy(location, jnp.full(size, jnp.log(config.state_std)))
    if config.memory == "kstep":
        size, cell = config.z_size, Seed(jnp.zeros(config.z_size), config.k)

    space = env.action_space(env_params)
    slots = None if config.memory == "oracle" else getattr(env, "slots", None)
    if slots is not None and size and config.memory != "kstep":
        raise ValueError(
            f"the {slots.shape[1]} agents would share what they see by --memory {config.memory}; "
            "kstep shares a seed alone, none nothing, and the oracle is one agent"
        )
    sizes = [obs_size + size, *config.hidden]
    gain = 2.0 if config.memory == "kstep" else 0.01
    if isinstance(space, spaces.Discrete) and slots is not None:
        num_actions = round(space.n ** (1 / slots.shape[1]))
        head = TeamHead(slots, [*sizes, num_actions], gain=gain, key=head_key)
    elif isinstance(space, spaces.Discrete):
        head = CategoricalHead([*sizes, space.n], gain=gain, key=head_key)
    elif isinstance(space, spaces.Box) and len(space.shape) == 1:
        sizes = [*sizes, space.shape[0]]
        head = NormalHead(sizes, std=config.action_std, gain=gain, key=head_key)
    else:
        raise ValueError(f"action space {space} is neither Discrete nor a Box of one axis")
    if config.memory == "kstep":
        size, head = size + 1, SeedHead(head)
    return Kernel(cell, head, Normalizer(obs_size), jnp.zeros(size))
