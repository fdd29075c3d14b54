"""SAC and TD3 run with every memory; a seed is alone what it is among others; what is refused."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, largest_difference, make_kernel
from jax import lax
from test_scripts import run, two_updates, whole_and_half
from test_training_loop import assert_same_run

from scripts import sac, td3
from spg.training import options
from spg.training.descent import adam, improve
from spg.training.off_policy import collect
from spg.training.records import RunError

ROOT = Path(__file__).parents[1]
long = partial(pytest.param, marks=pytest.mark.long)
SMALL = {
    "num_envs": 4, "num_steps": 2, "total_steps": 16, "learning_starts": 16, "buffer_size": 24,
    "batch_size": 8, "updates_per_step": 2.0, "hidden": (8,), "z_size": 4, "num_seeds": 2,
    "eval_episodes": 2, "checkpoints": 1, "env_params": {"max_steps_in_episode": 5},
}  # fmt: skip
SAC, TD3 = sac.Config(**SMALL), td3.Config(**SMALL)
SCRIPTS = [(sac, SAC), (td3, TD3)]
PENDULUM = {"env": "Pendulum-v1", "observe": "positions", "previous_action": True}
DDPG = {"critics": 1, "target_noise": 0.0, "policy_delay": 1}
BPTT = {"memory": "bptt", "segment_length": 2}
LEARNED = {"critic_state": True, "learn_state_temperature": True}
MATRIX = {"num_heads": 2, "key_size": 2}
OSCILLATORS = {"cell": "oscillator", "z_size": 3, "critic_state": True}
LAST = {"loss_steps": "last", "batch_size": 4}


def checked_updates(script, config, tmp_path):
    data = two_updates(script, config, tmp_path)
    assert data["env_steps"][0].tolist() == [40, 48]  # 16 for statistics, 16 for the buffer
    for name in ("actor_loss", "critic_loss", "q_value", "staleness"):
        assert np.isfinite(data[name]).all()
    return data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "config", "words"),
    [
        (sac, SAC, {}),
        long(td3, TD3, {}),
        long(sac, SAC, BPTT | LAST | {"refresh": False, "critic_state": True}),
        long(sac, SAC, {"segment_length": 2, "cell": "lru"} | LEARNED),
        long(sac, SAC, {"memory": "window", "critic_state": True, "layer_norm": False}),
        long(td3, TD3, {"memory": "oracle"} | PENDULUM | DDPG),
        long(td3, TD3, {"cell": "delta"} | MATRIX),
        long(sac, SAC, {"cell": "attention"} | MATRIX | BPTT),
        long(sac, SAC, OSCILLATORS),
        long(td3, TD3, OSCILLATORS),
    ],
)
def test_two_updates(script, config, words, tmp_path):
    data = checked_updates(script, replace(config, **words), tmp_path)
    memory = words.get("memory", "s2pg")
    assert (data["staleness"] > 1e-4).all() == (memory in ("s2pg", "bptt", "window"))
    if script is sac:
        assert (data["entropy_z"] != 0).all() == (memory == "s2pg")
        assert np.isclose(data["temperature"][:, 0], 0.01, rtol=2e-2).all()
        learned = "learn_state_temperature" in words
        kept = np.isclose(data["state_temperature"], 1e-6, rtol=1e-5, atol=0)
        assert kept[:, -1].all() != learned


@pytest.mark.slow
def test_every_second_environment_explores_and_the_others_are_reported():
    config = replace(SAC, num_steps=12)  # episodes have 5 steps
    env = options.make_env(config, oracle=False)
    start = jax.jit(partial(sac.init, SAC, env))(jr.key(0))
    kernel, carry = start.learned.kernel, start.world.carry

    def run(correlation):
        words = replace(config, noise_correlation=correlation)
        _, steps, episodes = collect(words, env, kernel, carry, jr.key(1))
        return steps, episodes

    steps, episodes = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.9]))
    apart = jnp.abs(steps.action[1] - steps.action[0]).max((0, 2))
    assert (apart[::2] == 0).all()
    assert (apart[1::2] > 1e-3).all()
    ends = (steps.terminated | steps.truncated).sum(1)
    np.testing.assert_array_equal(episodes.count, [ends[0].sum(), ends[1, ::2].sum()])
    assert episodes.count[1] >= 4


def test_what_places_z_moves_at_a_rate_of_its_own():
    kernel = make_kernel("gru", jr.key(0), state_std=0.3)
    loss = lambda kernel: (sum((x**2).sum() for x in jax.tree.leaves(kernel)), None)

    def moves(state_rate):
        moved, *_ = jax.jit(partial(improve, 1e-3, state_rate, loss))(kernel, adam(kernel))
        largest = lambda part: largest_difference(part(moved), part(kernel))
        return [largest(lambda kernel: kernel.cell), largest(lambda kernel: kernel.head)]

    for rate in (0.0, 1e-4, 1e-3):  # the first step of Adam is the rate, whatever the gradient
        np.testing.assert_allclose(moves(rate), [rate, 1e-3], atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("script", "config"), SCRIPTS)
def test_a_seed_is_alone_what_it_is_among_others(script, config):
    config = replace(config, segment_length=2)
    env = options.make_env(config)

    def train(key):
        step = lambda state, _: script.step(config, env, state)
        return lax.scan(step, script.init(config, env, key), length=2)

    keys = jr.split(jr.key(0), 2)
    both, alone = jax.jit(jax.vmap(train))(keys), jax.jit(train)(keys[1])
    one = jax.tree.map(lambda x: x[1], both)
    assert_trees_close(one[0].learned, alone[0].learned, rtol=1e-3, atol=1e-5)
    assert_trees_close(one[0].world.ring, alone[0].world.ring, rtol=1e-3, atol=1e-4)
    assert int(alone[0].world.ring.head) == 2 * config.num_steps * 2 % config.num_rows
    assert largest_difference(one[0].learned, jax.tree.map(lambda x: x[0], both[0].learned)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("script", "config"), SCRIPTS)
def test_a_loss_at_the_last_step_refreshes_that_step_alone(script, config):
    """The segments share no step, so as many rows change as there are segments."""
    config = replace(config, **(BPTT | LAST))
    state = jax.jit(partial(script.init, config, options.make_env(config)))(jr.key(0))
    steps = state.world.ring.steps
    stale = steps._replace(z_next=jnp.full_like(steps.z_next, 9.0))
    step = script.gradient_step if script is sac else script.critic_step
    pair = state.learned, state.world.ring._replace(steps=stale)
    (_, ring), _ = jax.jit(partial(step, config))(pair, jr.key(1))
    assert (ring.steps.z_next != 9).all(-1).sum() == config.batch_size


@pytest.mark.long
@pytest.mark.parametrize(("script", "config"), SCRIPTS)
def test_the_buffer_holds_the_last_steps_in_a_chain(script, config):
    """After updates and refreshes: z is z' of the row before, or z0 where an episode opens.

    The policy had gone on from z' of a rollout's last step when that was refreshed.
    """
    config = replace(config, buffer_size=40, total_steps=64, segment_length=2)
    env = options.make_env(config)
    step = lambda state, _: script.step(config, env, state)
    state = jax.jit(lambda key: lax.scan(step, script.init(config, env, key), length=8)[0])(
        jr.key(0)
    )
    ring = state.world.ring
    assert (int(ring.size), ring.capacity) == (10, 10)
    steps = jax.tree.map(lambda x: np.roll(np.asarray(x), -int(ring.head), 0), ring.steps)
    follows = ~steps.first[1:]
    assert follows.any()
    assert (~follows).any()
    inside = follows & (np.arange(9) % config.num_steps < config.num_steps - 1)[:, None]
    assert np.array_equal(steps.z[1:][inside], steps.z_next[:-1][inside])
    assert not steps.z[steps.first].any()
    assert np.array_equal(steps.obs.policy[1:][follows], steps.final_obs.policy[:-1][follows])
    assert np.abs(steps.action).max() <= 1
    assert not (steps.terminated | steps.truncated)[:-1][follows].any()


@pytest.mark.slow
def test_an_update_takes_as_long_with_10_000_as_with_a_million_steps_of_capacity():
    """Processor time within a fifth, medians of interleaved repeats, in one of three attempts."""
    sizes = 10_240, 1_048_576
    config = replace(SAC, num_envs=64, buffer_size=sizes[0], learning_starts=4_096, batch_size=256)
    env = options.make_env(config)
    train = jax.jit(
        lambda state: lax.fori_loop(0, 5, lambda _, s: sac.step(config, env, s)[0], state),
        donate_argnums=0,
    )
    state = jax.jit(partial(sac.init, config, env))(jr.key(0))
    ring = state.world.ring
    more = lambda x: jnp.tile(x, (-(-sizes[1] // sizes[0]), *[1] * (x.ndim - 1)))
    large = ring._replace(steps=jax.tree.map(more, ring.steps))
    states = [jax.tree.map(jnp.copy, state), state._replace(world=state.world._replace(ring=large))]
    states = list(map(train, states))  # compiled for each

    def ratio() -> float:
        times: list[list[float]] = [[], []]
        for _ in range(7):
            for i, own in enumerate(times):
                began = time.process_time()
                states[i] = jax.block_until_ready(train(states[i]))
                own.append(time.process_time() - began)
        small, large = map(np.median, times)
        return float(large / small)

    assert states[1].world.ring.capacity > 100 * states[0].world.ring.capacity
    assert any(ratio() < 1.2 for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "config"), SCRIPTS)
def test_resumed_run_equals_the_uninterrupted_one(script, config, tmp_path):
    """Buffer, both optimisers, target networks and temperatures are in the checkpoint."""
    resumed = whole_and_half(script, replace(config, total_steps=48), tmp_path)
    with pytest.raises(RunError, match=r"configuration: buffer_size \(was 24, now 48\)"):
        run(script, replace(resumed, buffer_size=48))
    run(script, resumed)
    assert_same_run(tmp_path / "whole", tmp_path / "half")


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "config", "sweep"),
    [
        (sac, SAC, "temperature"), (td3, TD3, "gamma"),
    ],
)  # fmt: skip
def test_training_vmaps_over_hyper_parameters(script, config, sweep):
    env = options.make_env(config)

    def train(value, key):
        swept = replace(config, **{sweep: value})
        state = script.init(swept, env, key)
        step = lambda state, _: script.step(swept, env, state)
        metrics = lax.scan(step, state, length=2)[1].metrics
        return metrics["critic_loss"], metrics["actor_loss"]

    default = getattr(config, sweep)
    values = jnp.array([default, default / 2])
    losses = jax.jit(jax.vmap(train, (0, None)))(values, jr.key(0))
    single = jax.jit(partial(train, default / 2))(jr.key(0))
    for found, true in zip(losses, single, strict=True):
        np.testing.assert_allclose(found[1], true, rtol=1e-3)
    assert not np.isclose(losses[0][0, 1], losses[0][1, 1], rtol=1e-4)


REFUSALS = [
    ({"buffer_size": 8}, "buffer_size 8 has no room for the 16 steps of learning_starts"),
    ({"buffer_size": 3}, "buffer_size 3 has no room for the 16 steps of learning_starts"),
    ({"batch_size": 17}, "the first 16 steps do not hold 17 segments of 1 steps"),
    ({"segment_length": 8}, "the first 16 steps do not hold 1 segments of 8 steps; more learning"),
    ({"segment_length": 3}, "segments of 3 steps do not divide batch_size 8; segment_length 1, 2"),
    ({"memory": "bptt"}, "segments of 32 steps do not divide batch_size 8; segment_length 1, 2, 4"),
    ({"memory": "bptt", "loss_steps": "last", "segment_length": 4}, "do not hold 8 segments of 4"),
    ({"env": "CartPole-v1"}, "continuous actions, and those of CartPole-v1 are discrete: script"),
    ({"updates_per_step": 0.1}, "updates_per_step 0.1 x num_steps 2 is less than one gradient"),
    ({"total_steps": 7}, "total_steps 7 is less than one update of 4 x 2 steps"),
    ({"buffer_size": 2**31 - 1, "num_seeds": 8}, "GiB of memory"),
    ({"target_rate": 0.0}, "target_rate is 0.0"),
    ({"critics": 0}, "critics is 0"),
    ({"cell": "leaky", "previous_action": True}, "turns its state by the last action; it is not"),
    ({"memory": "kstep"}, "unknown memory 'kstep'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSALS)
def test_what_cannot_run_is_refused_in_one_line(words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sac.make(replace(SAC, **words))
    assert len(str(error.value).splitlines()) == 1


def test_policy_delay_has_to_divide_the_gradient_steps_of_an_update():
    with pytest.raises(ValueError, match="policy_delay 3 does not divide the 4 gradient steps"):
        td3.make(replace(TD3, policy_delay=3))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sac", "td3"])
def test_the_command_line_ends_with_status_2_and_one_line(script, tmp_path):
    words = ["--buffer-size", "100", "--out", str(tmp_path / "run")]
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "buffer_size 100 has no room for the 8192 steps of learning_starts" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (PENDULUM, False),
        (PENDULUM | {"privileged": False}, True),
        (PENDULUM | {"privileged": False, "memory": "bptt", "segment_length": 2}, True),
        (PENDULUM | {"privileged": False, "observe": "all"}, False),
        (PENDULUM | {"privileged": False, "memory": "window"}, False),
        (PENDULUM | {"privileged": False, "critic_state": True}, True),
        ({}, False),
        ({"privileged": False}, True),
    ],
)
def test_a_memory_that_the_critics_learn_without_the_state_is_warned_of(words, warned, capsys):
    sac.make(replace(SAC, **words))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned
    assert all(line.startswith("warning: the critics may not see the state") for line in lines)
