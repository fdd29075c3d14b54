"""From the words of a command line to a kernel: a word sets the cell, its noise, and L."""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import jax.random as jr
from gymnax.environments import spaces
from jaxtyping import PRNGKeyArray

from spg.kernels.cells import GRU, Computed, Empty, Linear, Location, Noisy, Window
from spg.kernels.heads import CategoricalHead, NormalHead
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Normalizer
from spg.types import Scalar, policy_view

MemoryName = Literal["s2pg", "bptt", "window", "none", "oracle"]
CellName = Literal["gru", "linear"]


class MemoryConfig(Protocol):
    """The fields of a script's configuration that describe the policy."""

    @property
    def memory(self) -> MemoryName: ...
    @property
    def cell(self) -> CellName: ...
    @property
    def z_size(self) -> int: ...
    @property
    def state_std(self) -> Scalar: ...
    @property
    def window(self) -> int: ...
    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def action_std(self) -> Scalar: ...


def make_kernel(config: MemoryConfig, env: Any, env_params: Any, *, key: PRNGKeyArray) -> Kernel:
    """The kernel that `config` names, sized for a Gymnax environment.

    s2pg draws z' ~ N(cell(o, z), state_std²); bptt computes z' = cell(o, z); window keeps the
    last `window` observations; none and oracle have no memory (the oracle's environment shows
    the full state). Raises ValueError for an action space that is neither Discrete nor a Box of
    one axis.
    """
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
    return Kernel(cell, head, Normalizer(obs_size), jnp.zeros(size))
