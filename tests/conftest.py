"""Annotations are enforced in every test, and problems that several test files share."""

import ctypes
import gc
import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import install_import_hook

install_import_hook("spg", "beartype.beartype")  # before anything imports spg
matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[1]))  # so that tests can import scripts

# compiling is most of the time: programs serve both workers, their subprocesses, and the next run
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # an XLA that does not know a flag ends the process
    # the first two halve the time to compile; for the last see "It hangs" in docs/caveats.md
    flags = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    )
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
gc.disable()  # `forget` collects; a tenth of the time otherwise

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import pytest  # noqa: E402
from jax import lax  # noqa: E402

from spg.kernels.cells import GRU, Computed, Drawn, Empty, NormalAround, Window  # noqa: E402
from spg.kernels.finite import finite_kernel  # noqa: E402
from spg.kernels.heads import CategoricalHead  # noqa: E402
from spg.kernels.kernel import Kernel  # noqa: E402
from spg.kernels.linear import LRU, Linear  # noqa: E402
from spg.kernels.networks import Normalizer  # noqa: E402
from spg.types import Transition  # noqa: E402
from spg.worlds.models import DensePOMDP  # noqa: E402


@pytest.fixture(scope="module")
def float64():
    """Double precision for a whole test file, by `pytestmark = pytest.mark.usefixtures(...)`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised():
    """As users compile, for one test; left on, all that follows would compile twice as long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Compiled programs go when a worker has grown to 2 GB, else it grows to several."""
    yield
    jax.config.update("jax_enable_x64", False)  # a script's main may have set it
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * resource.getpagesize() > 2e9:
        jax.clear_caches()
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which keeps what is free
        if trim is not None:
            trim(0)


@eqx.filter_jit  # compiled once: eager operations compile one by one
def make_pomdp(key, *, num_states=2, num_obs=2, num_actions=2):
    """A random problem in which nothing is symmetric."""
    shapes = (num_states, num_actions, num_states), (num_states, num_obs), (num_states,)
    keys = jr.split(key, 4)
    draws = [jr.exponential(k, shape) for k, shape in zip(keys, shapes, strict=False)]
    transition, observation, start = (x / x.sum(-1, keepdims=True) for x in draws)
    reward = jr.normal(keys[3], (num_states, num_actions))
    return DensePOMDP(transition, observation, reward, start)


def best_return(pomdp, gamma, num_steps=1500):
    """J of the best policy where only finitely many beliefs follow the start, by enumerating them.

    Value iteration over the beliefs, as a loop over dictionaries; the slow reference of optima.
    """
    transition, observation, reward, start = (np.asarray(x, np.float64) for x in pomdp)
    number, beliefs, rows = {}, [], []

    def find(joint):
        joint = joint / joint.sum()
        key = tuple(np.round(joint, 9))
        if key not in number:
            number[key] = len(beliefs)
            beliefs.append(joint)
        return number[key]

    branches = lambda prior: [
        (joint.sum(), find(joint)) for joint in (observation * prior[:, None]).T if joint.sum() > 0
    ]
    opening = branches(start)
    while len(rows) < len(beliefs):
        assert len(beliefs) < 3000
        b = beliefs[len(rows)]
        rows.append(
            [(b @ reward[:, a], branches(b @ transition[:, a])) for a in range(len(reward.T))]
        )
    system = np.zeros((len(rows[0]), len(beliefs), len(beliefs)))
    for i, row in enumerate(rows):
        for a, (_, following) in enumerate(row):
            for p, j in following:
                system[a, i, j] += p
    earned = np.array([[r for r, _ in row] for row in rows]).T
    value = np.zeros(len(beliefs))
    for _ in range(num_steps):
        value = (earned + gamma * system @ value).max(0)
    return sum(p * value[j] for p, j in opening)


@eqx.filter_jit
def make_finite_kernel(key, *, num_z=2, num_obs=2, num_actions=2):
    cell_key, head_key = jr.split(key)
    return finite_kernel(
        jr.normal(cell_key, (num_z, num_obs, num_z)),
        jr.normal(head_key, (num_z, num_obs, num_actions)),
    )


def make_kernel(name, key, *, obs_size=2, num_actions=2, z_size=2, state_std=None):
    """A discrete-action kernel; z' is computed, or drawn if `state_std` is given.

    Its weights are jittered, since a head that starts near uniform would hide mistakes.
    """
    state_std = None if state_std is None else jnp.asarray(state_std)  # traced, not compiled in
    return _make_kernel(name, key, obs_size, num_actions, z_size, state_std)


@eqx.filter_jit
def _make_kernel(name, key, obs_size, num_actions, z_size, state_std):
    cell_key, head_key, jitter_key = jr.split(key, 3)
    if name == "finite":
        return make_finite_kernel(key, num_z=z_size, num_obs=obs_size, num_actions=num_actions)
    sizes = {"window": 2 * obs_size, "empty": 0}
    z_size = sizes.get(name, z_size)
    location = {
        "gru": lambda: GRU(obs_size, z_size, key=cell_key),
        "linear": lambda: Linear(obs_size, z_size, key=cell_key),
        "lru": lambda: LRU(obs_size, z_size, key=cell_key),
        "associative": lambda: Linear(obs_size, z_size, method="associative", key=cell_key),
        "window": Window,
        "empty": Empty,
    }[name]()
    cell = Computed(location)
    if state_std is not None:
        size = z_size // 2 if name == "lru" else z_size
        cell = Drawn(NormalAround(location, jnp.full(size, jnp.log(state_std))))
    head = CategoricalHead([obs_size + z_size, 4, num_actions], key=head_key)
    head = jitter(head, jitter_key)
    z0 = 0.3 * (jnp.ones(z_size // 2, complex) if name == "lru" else jnp.ones(z_size))
    return Kernel(cell, head, Normalizer(obs_size), z0)


def jitter(tree, key, scale=0.5):
    """Add Gaussian noise to every float of a pytree."""
    params, static = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(params)
    keys = jr.split(key, len(leaves))
    leaves = [x + scale * jr.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(structure, leaves), static)


def act(kernel, obs, reward, first, *, key):
    """The kernel's trajectory through given one-hot observations, by calling its laws."""

    def step(z, x):
        obs, first, key = x
        z = kernel.reset(first, z)
        action, z_next = kernel.sample(obs, z, key=key)
        return z_next, (z, action, z_next)

    keys = jr.split(key, len(first))
    _, (z, action, z_next) = lax.scan(step, kernel.z0, (obs, first, keys))
    ends = jnp.roll(first, -1).at[-1].set(True)
    final_obs = jnp.roll(obs, -1, 0)
    return Transition(
        obs, z, action, z_next, reward, first, ends, jnp.zeros_like(ends), final_obs
    )  # fmt: skip


@eqx.filter_jit
def make_trajectory(kernel, key, *, num_steps=12, starts=(0, 4, 5, 9), obs_size=2):
    """A random trajectory in which episodes open at the given steps."""
    obs_key, reward_key, key = jr.split(key, 3)
    obs = jax.nn.one_hot(jr.randint(obs_key, (num_steps,), 0, obs_size), obs_size)
    first = jnp.zeros(num_steps, bool).at[jnp.array(starts, int)].set(True)
    return act(kernel, obs, jr.normal(reward_key, (num_steps,)), first, key=key)


def assert_cell_scores_what_it_drew(location, obs, z, first, z0, state_std):
    """Step by step, with noise (None: without), and at once give the same z' and log κ(z')."""
    log_std = jnp.log(state_std or 1.0) + jnp.log(location.write)
    cell = Drawn(NormalAround(location, log_std)) if state_std else Computed(location)

    @jax.jit
    def draw(obs, z, key):
        law = cell(obs, z)
        z_next = law.sample(key=key)
        return z_next, law.log_prob(z_next)

    before, after, scores = [], [], []
    for t in range(len(obs)):
        before += [z0 if first[t] else z]
        z, score = draw(obs[t], before[-1], jr.key(t))
        after, scores = [*after, z], [*scores, score]
    log_prob, z_next = eqx.filter_jit(cell.log_prob)(
        obs, jnp.stack(before), jnp.stack(after), first, z0
    )
    assert jnp.allclose(log_prob, jnp.stack(scores), rtol=1e-10)
    assert jnp.allclose(z_next, jnp.stack(after), rtol=1e-10)


def assert_trees_close(x, y, **tolerance):
    x, y = (eqx.filter(tree, eqx.is_inexact_array) for tree in (x, y))
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert jnp.allclose(a, b, **tolerance), (a, b)


def largest_difference(x, y):
    """Largest absolute difference of two pytrees of floats."""
    x, y = (jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (x, y))
    return max(float(jnp.abs(a - b).max(initial=0.0)) for a, b in zip(x, y, strict=True))
