"""Actions with noise that lasts, for data that an off-policy algorithm learns from."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import tree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from spg.distributions import Normal, TanhNormal
from spg.kernels.kernel import Kernel
from spg.types import Scalar, policy_view


class Exploring(eqx.Module):
    """A kernel whose actions have correlated noise: its state is (z, ε).

        ε' = ρ ε + √(1 - ρ²) η,   η ~ N(0, I),   ε = 0 where an episode opens
        a = loc + std ε', or its tanh

    The Ornstein-Uhlenbeck process of Lillicrap et al. (2016) in place of white noise: it carries a
    policy away from where it hovers (Eberhard et al., 2023, compare the colours of noise). Once
    1/(1 - ρ) steps have passed, an action is distributed as the kernel's; ρ = 0 is the kernel.
    """

    kernel: Kernel
    num_actions: int = eqx.field(static=True)
    correlation: Scalar  # ρ

    @property
    def z0(self) -> tuple[PyTree, Float[Array, " a"]]:
        return self.kernel.z0, jnp.zeros(self.num_actions)

    def reset(self, first: Bool[Array, ""], z: PyTree) -> PyTree:
        """z0 where an episode opens."""
        return tree.map(lambda start, z: jnp.where(first, start, z), self.z0, z)

    def sample(
        self, obs: PyTree, z: tuple[PyTree, Float[Array, " a"]], *, key: PRNGKeyArray
    ) -> tuple[Array, tuple[PyTree, Float[Array, " a"]]]:
        """Draw a, and (z', ε'). Raises TypeError for actions that are not normal."""
        z, noise = z
        z_key, noise_key = jr.split(key)
        obs = self.kernel.normalizer(policy_view(obs))
        z_next = self.kernel.cell(obs, z).sample(key=z_key)
        fresh = jr.normal(noise_key, noise.shape)
        noise = self.correlation * noise + jnp.sqrt(1 - jnp.square(self.correlation)) * fresh
        actions = self.kernel.head(obs, z_next)
        if not isinstance(actions, Normal | TanhNormal):
            raise TypeError(f"{type(actions).__name__} has no noise to correlate; Normal has")
        return actions.at(noise), (z_next, noise)
