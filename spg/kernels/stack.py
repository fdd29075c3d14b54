"""Several linear units, one above the other: a segment is computed by one scan a layer."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Inexact, PRNGKeyArray

from spg.kernels.cells import Location
from spg.kernels.networks import Flat
from spg.scans import over_steps


class Stack(Location):
    """Layers of linear units with nonlinear read-outs between them; z holds the layers' states.

        z_l' = unit_l(x_l, z_l),   x_0 = o,   x_{l+1} = P_l x_l + V ⊙ σ(G),   (V, G) = W_l LN(z_l')

    a gated linear unit (Dauphin et al., 2017) on the normalised state, as between the layers of
    S5. Upper layers see what lower ones compute, without the noise of `NormalAround`.
    z concatenates the states of the layers, which are all real or all complex.
    """

    units: list[Location]
    norms: list[eqx.nn.LayerNorm]
    gates: list[eqx.nn.Linear]
    skips: list[eqx.nn.Linear]

    def __init__(
        self,
        make: Callable[..., Location],
        obs_size: int,
        z_size: int,
        num_layers: int,
        *,
        bottom: Callable[..., Location] | None = None,
        key: PRNGKeyArray,
    ):
        """`make(input_size, size, key=...)` makes a unit; `z_size` is that of all layers.

        `bottom` makes the lowest one, which reads the observation, where that is another.
        """
        if z_size % num_layers:
            raise ValueError(f"num_layers {num_layers} does not divide z_size {z_size}")
        size = z_size // num_layers
        sizes = [obs_size] + [size] * (num_layers - 1)
        keys = jr.split(key, (num_layers, 3))
        makers = [bottom or make] + [make] * (num_layers - 1)
        parts = zip(makers, sizes, keys, strict=True)
        self.units = [make_one(n, size, key=k[0]) for make_one, n, k in parts]
        between = list(zip(sizes[:-1], keys, strict=False))
        self.norms = [eqx.nn.LayerNorm(size) for _ in between]
        self.gates = [eqx.nn.Linear(size, 2 * size, key=k[1]) for _, k in between]
        self.skips = [eqx.nn.Linear(n, size, use_bias=False, key=k[2]) for n, k in between]

    @property
    def write(self) -> Float[Array, " n"]:
        return jnp.concatenate([unit.write for unit in self.units])

    def __call__(self, obs: Float[Array, " o"], z: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        x, states = obs, []
        for i, state in enumerate(jnp.split(z, len(self.units))):
            states += [self.units[i](x, state)]
            x = self._read(i, x, states[-1])
        return jnp.concatenate(states)

    def unroll(
        self,
        obs: Float[Array, "L o"],
        z: Inexact[Array, " n"],
        first: Bool[Array, " L"],
        z0: Inexact[Array, " n"],
    ) -> Inexact[Array, "L n"]:
        x, states = obs, []
        split = lambda z: jnp.split(z, len(self.units))
        for i, (state, start) in enumerate(zip(split(z), split(z0), strict=True)):
            states += [self.units[i].unroll(x, state, first, start)]
            x = over_steps(lambda x, z, i=i: self._read(i, x, z))(x, states[-1])
        return jnp.concatenate(states, 1)

    def _read(self, layer: int, x: Float[Array, " m"], z: Inexact[Array, " n"]) -> Array:
        """What the next layer sees; the last layer is read by the head."""
        if layer == len(self.gates):
            return x
        value, gate = jnp.split(self.gates[layer](self.norms[layer](Flat()(z))), 2)
        return self.skips[layer](x) + value * jax.nn.sigmoid(gate)
