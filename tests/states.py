"""Products and gradients of a world whose states devices share, in float64; prints how far they are
from those of one device, as JSON."""

import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from conftest import largest_difference, make_pomdp

from spg.exact import chain
from spg.exact.gamp import gamp_gradient
from spg.kernels.finite import random_controller, tables
from spg.worlds.models import sparse


def main() -> None:
    chain.BLOCK = 2
    world = sparse(make_pomdp(jr.key(0), num_states=9, num_obs=3, num_actions=3))
    kernel = random_controller(4, 3, 3, out_degree=2, std=1.0, key=jr.key(1))
    devices = jax.devices()
    shared = chain.share_states(world, devices)
    table, size = tables(kernel, jnp.arange(3)), len(shared.start)
    d = jnp.zeros((size, 4)).at[:9].set(jr.normal(jr.key(2), (9, 4)))
    pushed = jax.jit(partial(chain.push, devices=devices))(table, shared, d)
    valued = jax.jit(partial(chain.evaluate, devices=devices))(table, shared, d)
    found, solution = eqx.filter_jit(partial(gamp_gradient, devices=devices))(kernel, shared)
    gradient, truth = eqx.filter_jit(gamp_gradient)(kernel, world)
    rows = lambda x: x.sharding.shard_shape(x.shape)[0]
    told = {
        "states": size,
        "rows": rows(shared.successor),
        "rows of x": rows(solution.bias),
        "push": float(jnp.abs(pushed[:9] - chain.push(table, world, d[:9])).max()),
        "added": float(jnp.abs(pushed[9:]).max()),
        "evaluate": float(jnp.abs(valued[:9] - chain.evaluate(table, world, d[:9])).max()),
        "gradient": largest_difference(found, gradient),
        "eta": float(jnp.abs(solution.average_reward - truth.average_reward)),
        "converged": bool(solution.converged),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
