"""Hidden masses, payloads, wind and sizes: F = m a on a cart, and Brax's own robots."""

import contextlib
import io
import re
import warnings
from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from brax.envs.base import PipelineEnv, State
    from brax.io import mjcf

from spg import envs
from spg.envs import brax
from spg.envs.brax import Brax
from spg.envs.hidden_bodies import Hidden, HiddenBodies, masses

CART = """<mujoco><option timestep="0.01"/>
<custom><numeric data="{power}" name="spring_mass_scale"/></custom>
<worldbody><body name="cart">
<joint name="x" type="slide" axis="1 0 0"/>
<geom type="sphere" size=".1" mass="2" contype="0" conaffinity="0"/>
</body></worldbody>
<actuator><motor joint="x" gear="6" ctrlrange="-1 1"/></actuator></mujoco>"""
ALL = HiddenBodies(mass_range=0.5, payload=0.8, wind=3.0, smallest=0.4)


class Cart(PipelineEnv):
    """A cart of 2 kg, free along x, that an action of 1 pushes with 6 N."""

    def __init__(self, backend, power=0.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            system = mjcf.loads(CART.format(power=power))
        super().__init__(system, backend=backend)

    def _get_obs(self, state):
        return jnp.concatenate([state.q, state.qd])

    def reset(self, rng):
        state = self.pipeline_init(jnp.zeros(1), jnp.zeros(1))
        return State(state, self._get_obs(state), jnp.zeros(()), jnp.zeros(()))

    def step(self, state, action):
        after = self.pipeline_step(state.pipeline_state, action)
        return state.replace(pipeline_state=after, obs=self._get_obs(after))


def hidden(mass, payload=0.0, wind=0.0, size=1.0):
    return Hidden(jnp.array([mass]), jnp.array(payload), jnp.array(wind), jnp.array(size))


SLOW = [pytest.param(*x, marks=pytest.mark.slow) for x in [("positional", 1.0, 1.0), ("mjx", 0, 2)]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "power", "nominal"), [("generalized", 0.0, 2.0), ("spring", 1.0, 1.0), *SLOW]
)
def test_a_push_accelerates_a_drawn_cart_as_newton_says(backend, power, nominal):
    """The power by which the spring backend changes masses is that of Ant: all of them are 1."""
    cart = Cart(backend, power)

    @jax.jit
    def acceleration(drawn):
        env = ALL.embody(cart, drawn)
        state = env.reset(jr.key(0))
        for _ in range(2):
            state = env.step(state, jnp.ones(1))
        return state.obs[1] / 0.02

    for c, load, sign, size in (
        (0, 0, 0, 1), (0.5, 0, 0, 1), (-0.5, 0, 0, 1), (0, 0.4, 1, 1), (-0.5, 0.8, -1, 0.4)
    ):  # fmt: skip
        mass = nominal * (1 + c + load)
        expected = (6 / size + sign * 3) / mass
        assert acceleration(hidden(1.0 * c, 1.0 * load, 1.0 * sign, size)) == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.slow
def test_a_size_is_felt_as_masses_k_cubed_and_muscles_k_squared():
    """The halfcheetah whose masses, inertias, springs and dampers are k³ and gears k² as large."""
    k, env = 0.6, brax.load("halfcheetah", "spring").brax
    mass, inertia = masses(env)
    link, dof = env.sys.link, env.sys.dof
    cubed = {f"dof.{x}": getattr(dof, x) for x in ("stiffness", "damping", "armature")}
    cubed |= {f"link.{x}": v for x, v in vars(link).items() if x.startswith("constraint")}
    cubed |= {"link.inertia.mass": mass, "link.inertia.i": inertia}
    scales = {"spring_mass_scale": 0.0, "spring_inertia_scale": 0.0}
    literal = env.sys.tree_replace(
        {name: k**3 * x for name, x in cubed.items()}
        | {"actuator.gear": k**2 * env.sys.actuator.gear}
        | scales
    )
    drawn = Hidden(None, None, None, jnp.float32(k))
    own = HiddenBodies(smallest=0.6).system(env, drawn)

    @jax.jit
    def path(system):
        env = brax.load("halfcheetah", "spring").brax
        env.sys = system
        state = env.reset(jr.PRNGKey(0))
        seen = []
        for key in jr.split(jr.PRNGKey(1), 3):
            state = env.step(state, jr.uniform(key, (6,), minval=-1, maxval=1))
            seen.append(state.obs)
        return jnp.stack(seen)

    nominal, mine, scaled = path(env.sys), path(own), path(literal)
    np.testing.assert_allclose(mine, scaled, atol=2e-2)
    assert abs(mine - nominal).max() > 1


@pytest.mark.parametrize("backend", brax.BACKENDS)
def test_inertia_goes_with_mass_and_all_else_stays(backend):
    cart = Cart(backend, 0.3)
    drawn = hidden(-0.5)
    physics = Cart(backend, 0.3)
    physics.sys = ALL.system(cart, drawn)
    for before, after in zip(masses(cart), masses(physics), strict=True):
        np.testing.assert_allclose(after, 0.5 * before, rtol=1e-6)
    np.testing.assert_array_equal(physics.sys.geom_size, cart.sys.geom_size)
    np.testing.assert_array_equal(physics.sys.gravity, cart.sys.gravity)
    assert ALL.embody(cart, drawn).sys is cart.sys  # what observations and rewards are made of


@lru_cache
def episodes():
    """300 steps of the cart in episodes of 3: observations, hidden draws, ends, final views."""
    cart = Brax(Cart("generalized"), "brax/cart", ALL)
    words = {"max_steps_in_episode": 3}
    env = envs.make(cart, observe="positions", privileged=True, **words)
    oracle = envs.make(cart, observe="state", **words)

    @jax.jit
    def run(key):
        def step(carry, key):
            obs, state = carry
            seen = oracle.environment.observe(key, state, None, oracle.params)
            after = env.step(key, state, jnp.ones(1))
            facts = obs, seen, state.env, after[4], after[5]["final_observation"]
            return after[:2], facts

        return lax.scan(step, env.reset(key), jr.split(key, 300))[1]

    return env, oracle, run(jr.key(0))


@pytest.mark.slow
def test_values_are_drawn_anew_at_every_reset_and_stay_for_the_episode():
    *_, state, truncated, _ = episodes()[2]
    drawn = np.stack([np.ravel(x) for x in state.hidden], 1).reshape(100, 3, 4)
    assert truncated.reshape(100, 3)[:, -1].all()
    assert (drawn == drawn[:, :1]).all()
    for column, values in enumerate(
        ([-0.5, 0, 0.5], [0, 0.2, 0.4, 0.8], [-1, 1], [0.4, 0.6, 0.8, 1])
    ):
        drawings = drawn[:, 0, column]
        np.testing.assert_allclose(np.unique(drawings), values, rtol=1e-6)
        share = [np.isclose(drawings, v).mean() for v in values]
        p = 1 / len(values)
        np.testing.assert_allclose(share, p, atol=4 * (p * (1 - p) / 100) ** 0.5)
    assert abs(np.corrcoef(drawn[:, 0].T)[np.triu_indices(4, 1)]).max() < 0.4  # 4 errors


def test_critic_and_oracle_see_the_draws_and_the_policy_does_not():
    env, oracle, (obs, seen, state, truncated, final) = episodes()
    assert (env.spec.obs_size, env.spec.critic_size, oracle.spec.obs_size) == (1, 6, 6)
    drawn = np.stack([np.ravel(x) for x in state.hidden], 1)
    full = np.concatenate([state.brax.obs, drawn], 1)
    np.testing.assert_array_equal(obs.policy, full[:, :1])
    np.testing.assert_array_equal(obs.critic, full)
    np.testing.assert_array_equal(seen, full)
    ends = np.flatnonzero(truncated)
    np.testing.assert_array_equal(final.critic[ends, 2:], drawn[ends])  # of the episode that ended
    mass = 2 * (1 + drawn[:, 0] + drawn[:, 1])
    np.testing.assert_allclose(
        final.critic[:, 1] - full[:, 1],
        0.01 * (6 / drawn[:, 3] + 3 * drawn[:, 2]) / mass,
        rtol=1e-3,
    )


def test_typed_and_legacy_keys_agree():
    cart = Cart("generalized")
    typed, legacy = (ALL.draw(cart, key=make(3)) for make in (jr.key, jr.PRNGKey))
    jax.tree.map(np.testing.assert_array_equal, typed, legacy)
    env = envs.make(Brax(cart, "brax/cart", ALL), privileged=True)
    shapes = [jax.eval_shape(env.reset, key) for key in (jr.key(0), jr.PRNGKey(0))]
    assert shapes[0] == shapes[1]


def test_zeros_leave_the_process_as_it_is():
    plain = brax.load("inverted_pendulum", "generalized")
    zeros = brax.load("inverted_pendulum", "generalized", mass_range=0, payload=0.0, wind=0)
    assert zeros.bodies is None
    params, key = plain.default_params, jr.key(0)
    state = jax.eval_shape(lambda: plain.reset_env(key, params)[1])
    trace = lambda step: [str(e.primitive) for e in jax.make_jaxpr(step)(jnp.ones(1)).eqns]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    mine = trace(lambda a: zeros.step_env(key, zero, a, params))
    assert mine == trace(lambda a: plain.step_env(key, zero, a, params))
    bare = trace(lambda a: plain.brax.step(zero.brax, a))
    assert mine[: len(bare)] == bare  # then the clock, the discount and the flag
    assert len(mine) <= len(bare) + 6
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(state.brax)) + 1


@pytest.mark.parametrize(
    ("words", "size"), [({}, 2), ({"mass_range": 0.3}, 3), ({"smallest": 0.4}, 3)]
)
def test_what_is_off_is_not_shown(words, size):
    cart = Brax(Cart("generalized"), "brax/cart", HiddenBodies(**words) if words else None)
    state = jax.eval_shape(cart.reset_env, jr.key(0), cart.default_params)[1]
    assert jax.eval_shape(cart.see_state, jnp.zeros(2), state).shape == (size,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mass_range": 1}, "mass_range is 1; it has to be at least 0 and below 1; 0.3 is S2PG's"),
        ({"mass_range": -0.1}, "mass_range is -0.1; it has to be"),
        ({"payload": -1}, "payload is -1; it has to be at least 0; 0.5 adds"),
        ({"wind": -2.0}, "wind is -2.0; it has to be at least 0; its sign is drawn"),
        ({"smallest": 1.5}, "smallest is 1.5; it has to be from 0 to 1; 0.4 makes"),
        ({"mass_rang": 0.3}, "parameter of brax/fast 'mass_rang'; did you mean 'mass_range'"),
        ({"wind": 1}, "no bodies to change; leave out mass_range, payload, wind, smallest"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        envs.make("brax/fast", **words)


@pytest.mark.long
@pytest.mark.parametrize("backend", brax.BACKENDS)
@pytest.mark.parametrize("name", ["ant", "halfcheetah", "hopper", "walker2d", "humanoid"])
def test_robots_run_with_other_bodies_and_their_policy_sees_the_nominal_ones(name, backend):
    """What `positions` leaves of a humanoid are height, quaternion, 17 angles, 11 bodies' inertias
    of 10 entries and 23 torques. The inertias would show the masses, but are the nominal ones.
    """
    words = {"mass_range": 0.3, "payload": 0.5, "wind": 0.5, "smallest": 0.4}
    env = envs.make(f"brax/{name}", backend=backend, observe="positions", privileged=True, **words)
    inner = env.environment.inner
    links = inner.brax.sys.num_links()
    assert inner.brax.sys.nbody == links + 1
    plain = envs.make(f"brax/{name}", backend=backend)
    assert env.spec.critic_size == plain.spec.obs_size + links + 3
    assert name != "humanoid" or env.spec.obs_size == 22 + 110 + 23

    def start(drawn, key):
        """What the own observation of a reset shows with these bodies."""
        return inner.bodies.embody(inner.brax, drawn).reset(key).obs

    some = jax.vmap(lambda key: inner.bodies.draw(inner.brax, key=key))(jr.split(jr.key(1), 4))
    seen = jax.jit(jax.vmap(start, (0, None)))(some, jr.key(0))
    assert len(np.unique(some.mass, axis=0)) == 4
    np.testing.assert_allclose(seen, seen[:1].repeat(4, 0), atol=1e-6)

    def run(key):
        def step(state, key):
            action = jr.uniform(key, (env.spec.num_actions,), minval=-1, maxval=1)
            obs, state, reward, *_ = env.step(key, state, action)
            return state, (obs, reward)

        return lax.scan(step, env.reset(key)[1], jr.split(key, 60))[1]

    out = jax.jit(jax.vmap(run))(jr.split(jr.key(0), 4))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))
