"""Actions with noise that lasts, for data that an off-policy algorithm learns from."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from spg.distributions import Reparameterised
from spg.kernels.kernel import Kernel
from spg.types import Scalar


class Exploring(eqx.Module):
    """A kernel whose actions have correlated noise: its state is (z, ε).

        ε' = ρ ε + √(1 - ρ²) η,   η ~ N(0, I),   ε = 0 where an episode opens
        a = loc + std ε', or its tanh

    The Ornstein-Uhlenbeck process of Lillicrap et al. (2016) in place of white noise: it carries a
    policy away from where it hovers (Eberhard et al., 2023, compare the colours of noise). After t
    steps the variance of ε is 1 - ρ^{2t}; in the limit it is that of the kernel. ρ = 0 is the
    kernel.
    """

    kernel: Kernel
    num_actions: int = eqx.field(static=True)
    correlation: Scalar  # ρ

    @property
    def z0(self) -> tuple[PyTree, Float[Array, " a"]]:
        return self.kernel.z0, jnp.zeros(self.num_actions)

    def reset(
        self, first: Bool[Array, ""], z: tuple[PyTree, Float[Array, " a"]]
    ) -> tuple[PyTree, Float[Array, " a"]]:
        """z0 where an episode opens."""
        return self.kernel.reset(first, z[0]), jnp.where(first, 0.0, z[1])

    def sample(
        self, obs: PyTree, z: tuple[PyTree, Float[Array, " a"]], *, key: PRNGKeyArray
    ) -> tuple[Array, tuple[PyTree, Float[Array, " a"]]]:
        """Draw a, and (z', ε'). Raises ValueError if the distribution of a has no `at(noise)`."""
        z, noise = z
        z_key, noise_key = jr.split(key)
        actions, z_next = self.kernel.actions(obs, z, key=z_key)
        if not isinstance(actions, Reparameterised):
            kind = type(actions).__name__
            raise ValueError(f"actions that explore are made from noise, which {kind} cannot do")
        fresh = jr.normal(noise_key, noise.shape, noise.dtype)
        noise = self.correlation * noise + jnp.sqrt(1 - jnp.square(self.correlation)) * fresh
        return actions.at(noise), (z_next, noise.astype(fresh.dtype))
