"""Nonsense is refused in one line that names the option, before anything is compiled."""

import dataclasses
import itertools
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from tyro.conf import Suppress

from scripts import (
    clone,
    evaluate,
    filters,
    gail,
    gamp,
    gpomdp,
    kstep,
    ppo,
    reinforce,
    reppo,
    sac,
    slac,
    td3,
    trpo,
)
from scripts.benchmarks import (
    best_controller,
    controllers,
    curves,
    gamp_scale,
    gamp_variants,
    gpomdp_signal,
    gpomdp_variance,
    memory,
    offpolicy_times,
    outdegree,
    questions,
    scaling,
    scans,
)
from scripts.benchmarks import kstep as kstep_benchmark
from spg import envs, limits
from spg.envs.memory import RepeatFirst, RepeatFirstParams, TMaze, TMazeParams
from spg.estimators.returns import gae, returns_to_go
from spg.estimators.score import score_estimate
from spg.exact import enumeration
from spg.exact import kstep as exact_kstep
from spg.exact.gamp import gamp_gradient, long_run
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.finite import finite_kernel, random_controller
from spg.kernels.held import held_kernel
from spg.limits import Count, Fraction, Needs, Range
from spg.scans import num_segments, split_segments
from spg.training import cli, options, tables
from spg.types import Spec
from spg.worlds import dense, ringworld
from spg.worlds.markov import random_hmm, swap_hmm
from spg.worlds.models import DensePOMDP
from spg.worlds.problems import load_unload, random_pomdp
from spg.worlds.traps import cartpole, chain, matching, random_aggregated

ROOT = Path(__file__).parents[1]
EVERY = [
    evaluate,
    ppo, trpo, reppo, reinforce, sac, slac, td3, gamp, gpomdp, kstep, filters, controllers, curves,
    best_controller, gamp_scale, gamp_variants, gpomdp_signal, gpomdp_variance, kstep_benchmark,
    memory, offpolicy_times, outdegree, questions, scaling, scans,
]  # fmt: skip
HUGE = "99999999999999999999"


def command(script, words, monkeypatch):
    """What `python script.py words` does, up to the training."""
    monkeypatch.setattr(cli, "use_cores", lambda num_seeds: None)
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    if hasattr(script, "make"):
        cli.main(script.Config, script.make)
    try:
        script.main(options.parse(script.Config))
    except ValueError as error:
        cli.fail(error)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (ppo, "--gamma 1.5", "gamma is 1.5; it has to be from 0 to 1"),
        (ppo, "--gamma -0.1", "gamma is -0.1"),
        (ppo, "--gamma nan", "gamma is nan"),
        (ppo, "--gae-lambda 2", "gae_lambda is 2.0; it has to be from 0 to 1"),
        (ppo, "--clip 0", "clip is 0.0; it has to be above 0 and at most 10; 0.1 to 0.3 is usual"),
        (ppo, "--clip -0.2", "clip is -0.2"),
        (ppo, "--clip nan", "clip is nan"),
        (ppo, "--learning-rate 0", "learning_rate is 0.0; it has to be above 0; 1e-4 to 1e-2 is"),
        (ppo, "--learning-rate nan", "learning_rate is nan; it has to be finite, above 0"),
        (ppo, "--learning-rate inf", "learning_rate is inf; it has to be finite, above 0"),
        (ppo, "--learning-rate -1e-3", "learning_rate is -0.001"),
        (ppo, "--max-grad-norm 0", "max_grad_norm is 0.0"),
        (ppo, "--max-grad-norm nan", "max_grad_norm is nan"),
        (ppo, "--entropy-coef -1", "entropy_coef is -1.0"),
        (ppo, "--entropy-coef inf", "entropy_coef is inf"),
        (ppo, "--hidden 0", "hidden is 0; it has to be at least 1"),
        (ppo, "--hidden 64 -1", "hidden is -1"),
        (ppo, "--state-std 0", "state_std is 0.0; it has to be from 1e-06 to 5; 0.1 to 0.3 is us"),
        (ppo, "--state-std 1e30", "state_std is 1e+30"),
        (ppo, "--action-std 0", "action_std is 0.0"),
        (ppo, "--action-std 8", "action_std is 8.0"),
        (ppo, "--leak 1", "leak is 1.0; it has to be inside (0, 1)"),
        (ppo, "--z-size 0", "z_size is 0"),
        (ppo, "--window -3", "window is -3"),
        (ppo, "--k 0", "k is 0"),
        (ppo, "--num-layers 0", "num_layers is 0"),
        (ppo, "--segment-length -1", "segment_length is -1"),
        (ppo, "--segment-length 5", "segment_length 5 does not divide num_steps 128; 1, 2, 4, 8,"),
        (ppo, "--num-envs 0", "num_envs is 0"),
        (ppo, "--num-steps 1.5", "num_steps is 1.5; it has to be a whole number, at least 1"),
        (ppo, "--num-epochs -1", "num_epochs is -1"),
        (ppo, "--num-minibatches 0", "num_minibatches is 0"),
        (ppo, "--total-steps 0", "total_steps is 0"),
        (ppo, "--total-steps 10", "total_steps 10 is less than one update of 64 x 128 steps"),
        (ppo, "--total-steps 1e15", "GiB of memory"),
        (ppo, f"--seed {HUGE}", "has to be at most 2,147,483,647"),
        (ppo, "--seed -1", "seed is -1; it has to be at least 0"),
        (ppo, "--num-seeds 0", "num_seeds is 0"),
        (ppo, "--checkpoints 0", "checkpoints is 0"),
        (ppo, "--eval-episodes 0", "eval_episodes is 0"),
        (ppo, "--num-seeds nan", "num_seeds is nan; it has to be a whole number"),
        (ppo, "--env-params max_steps_in_episode 0", "max_steps_in_episode is 0; it has to be at"),
        (ppo, "--env-params max_steps_in_episode -5", "max_steps_in_episode is -5"),
        (ppo, "--env-params gravity nan", "gravity is nan; it has to be finite"),
        (ppo, "--env TMaze-memory --observe all --env-params length 0", "length is 0; it has to b"),
        (ppo, "--env TMaze-memory --observe all --env-params noise -1", "noise is -1; it has to b"),
        (ppo, "--env ringworld-pomdp --observe all --env-params epsilon 2", "epsilon is 2; it has"),
        (ppo, "--env chain-pomdp --observe all --env-params n 1e9", "a chain of 1,000,000,000 ste"),
        (ppo, "--num-envs 1e7 --num-minibatches 1 --total-steps 1e12", "GiB of memory at least; "),
        (trpo, "--max-kl 0", "max_kl is 0.0; it has to be above 0; 0.01 to 0.1 is usual"),
        (trpo, "--max-kl -0.01", "max_kl is -0.01"),
        (trpo, "--max-kl nan", "max_kl is nan"),
        (trpo, "--cg-steps 0", "cg_steps is 0; it has to be at least 1"),
        (trpo, "--damping -0.1", "damping is -0.1; it has to be at least 0"),
        (trpo, "--fisher-every 0", "fisher_every is 0; it has to be at least 1"),
        (reinforce, "--gamma 2", "gamma is 2.0"),
        (reinforce, "--num-envs 1", "num_envs is 1; it has to be at least 2; baselines need two"),
        (reinforce, "--num-steps -1", "num_steps is -1"),
        (reinforce, "--env-params delay -1", "delay is -1; it has to be at least 0"),
        (reinforce, "--env-params distractors 2", "distractors is 2; it has to be from 0 to 1"),
        (reinforce, "--env-params delay 1e8 --total-steps 1e14", "GiB of memory at least; "),
        (gail, "--num-episodes 0", "num_episodes is 0; it has to be at least 1"),
        (clone, "--num-episodes 2.5", "num_episodes is 2.5; it has to be a whole number"),
        (gamp, "--bound 0", "bound is 0.0"),
        (gamp, "--bound inf", "bound is inf"),
        (gamp, "--num-updates 0", "num_updates is 0"),
        (gamp, "--learning-rate nan", "learning_rate is nan"),
        (gamp, "--start-std -1", "start_std is -1.0; it has to be at least 0"),
        (gamp, "--num-z 0", "num_z is 0"),
        (gamp, "--out-degree 5", "out_degree 5 is more than num_z 4"),
        (gamp, "--num-z 1e8", "controllers of 100,000,000 I-states in loadunload would take"),
        (gpomdp, "--beta 1", "beta is 1.0; it has to be at least 0 and below 1"),
        (gpomdp, "--tolerance -1", "tolerance is -1.0"),
        (gpomdp, "--adam-eps nan", "adam_eps is nan"),
        (gpomdp, "--eval-steps 0", "eval_steps is 0"),
        (gpomdp, "--num-envs 1e7 --total-steps 1e13", "GiB of memory at least; "),
        (kstep, "--k 0 2", "k is 0; it has to be at least 1"),
        (kstep, "--k 2 2", "k is (2, 2); it lists different numbers"),
        (kstep, "--gamma 1", "gamma is 1.0; it has to be at least 0 and below 1"),
        (kstep, "--num-runs 0", "num_runs is 0"),
        (kstep, "--num-runs 1e9", "GiB of memory"),
        (kstep, "--num-episodes 1", "num_episodes is 1; it has to be at least 2"),
        (kstep, "--problem chain --problem-params n 1e9", "a chain of 1,000,000,000 steps would"),
        (kstep, "--problem chain --problem-params n 2.5", "n is 2.5; it has to be a whole number"),
        (kstep, "--problem chain --problem-params reward nan", "reward is nan; it has to be finit"),
        (kstep, "--problem aggregated --problem-params num_states 1e6", "GiB of memory at least; "),
        (kstep, "--problem cartpole --problem-params bins 1000", "a cart-pole of 1,000^4 nodes wo"),
        (filters, "--steps 0", "steps is 0"),
        (filters, "--scale 4", "scale is 4.0; it has to be inside (0, 3.4)"),
        (filters, "--trajectories 1e9", "1,000,000,000 trajectories side by side would take"),
        (memory, "--repeats 0", "repeats is 0"),
        (scans, "--widths 0", "widths is 0"),
        (questions, "--num-seeds 0", "num_seeds is 0"),
        (gpomdp_variance, "--betas 0.9 1", "betas is 1.0"),
        (gamp_scale, "--cases foo", "unknown case 'foo'; choose from"),
        (curves, "--num-seeds 0", "num_seeds is 0"),
        (controllers, "--num-seeds -1", "num_seeds is -1"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unhooked")
def test_a_command_line_is_refused_in_one_line(
    script, words, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command(script, words, monkeypatch)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("warning: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "words", "lines"),
    [
        (ppo, "", []),
        (ppo, "--memory none", []),
        (
            ppo,
            "--memory none --cell lru --num-layers 4",
            [
                "cell lru has no effect: memory is none, not s2pg or bptt",
                "num_layers 4 has no effect: memory is none, not s2pg or bptt",
            ],
        ),
        (ppo, "--window 9", ["window 9 has no effect: memory is s2pg, not window"]),
        (ppo, "--window 9 --memory window", []),
        (ppo, "--k 2", ["k 2 has no effect: memory is s2pg, not kstep"]),
        (ppo, "--leak 0.2 --cell leaky", []),
        (ppo, "--leak 0.2 --memory filter --filter alf-belief", []),
        (
            ppo,
            "--leak 0.2",
            ["leak 0.2 has no effect: memory is s2pg, not filter; cell is hybrid, not leaky"],
        ),
        (ppo, "--backend mjx", ["backend mjx has no effect: env is CartPole-v1, not brax/*"]),
        (ppo, "--backend mjx --env brax/ant", []),
        (reinforce, "--privileged", ["privileged True has no effect: nothing here reads it"]),
        (clone, "--segment-length 7", ["segment_length 7 has no effect: nothing here reads it"]),
        (
            sac,
            "--target-entropy -3 --no-learn-temperature",
            ["target_entropy -3.0 has no effect: learn_temperature is False, not True"],
        ),
        (sac, "--state-target-entropy 3 --learn-state-temperature", []),
        (
            gail,
            "--discriminator-entropy 5 --loss least-squares",
            ["discriminator_entropy 5.0 has no effect: loss is least-squares, not logistic"],
        ),
        (
            gamp,
            "--learning-rate 0.1",
            ["learning_rate 0.1 has no effect: optimiser is conjugate, not adam"],
        ),
        (gamp, "--learning-rate 0.1 --optimiser adam", []),
        (gpomdp, "--tolerance 0.1", ["tolerance 0.1 has no effect: optimiser is adam, not conju"]),
        (
            kstep,
            "--num-episodes 64",
            ["num_episodes 64 has no effect: gradient is exact, not sampled"],
        ),
        (
            kstep,
            "--learning-rate 0.1 --method mirror",
            ["learning_rate 0.1 has no effect: method is mirror, not product or mixture"],
        ),
    ],
)
def test_options_in_vain_are_told_and_the_run_goes_on(script, words, lines, capsys):
    config = options.parse(script.Config, words.split())
    limits.check(config)
    options.warn(config)
    found = capsys.readouterr().err.splitlines()
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(f"warning: {expected}")


@pytest.mark.parametrize("script", EVERY)
def test_defaults_are_in_range_and_every_option_says_what_it_is(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    run = ["runs/mine"] if script is evaluate else []
    config = script.Config(*run)
    assert options.parse(script.Config, run) == config
    limits.check(config)
    with pytest.raises(SystemExit):
        options.parse(script.Config, ["--help"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    words = " ".join(page.replace("│", " ").split())
    hints = get_type_hints(script.Config, include_extras=True)
    hidden = {name for name, hint in hints.items() if Suppress in getattr(hint, "__metadata__", ())}
    fields = {field.name for field in dataclasses.fields(config)}
    for name in {name.replace("_", "-") for name in fields - hidden - {"run"}}:
        assert re.search(rf"--{name}[ ,]", words)
        kinds = r"([A-Z.\[\] ]+|\{[^}]*\}(\|[A-Z]+)?)"
        assert not re.search(rf"--{name} {kinds} \(default", words), f"{name} has no docs"


def test_help_is_in_groups_with_an_example_each(capsys):
    with pytest.raises(SystemExit):
        options.parse(ppo.Config, ["--help"])
    page = capsys.readouterr().out
    groups = ("environment", "policy", "training", "run")
    starts = [page.index(f" {group} options ") for group in groups]
    assert starts == sorted(starts)
    boxes = [page[a:b] for a, b in itertools.pairwise([*starts, None])]
    assert all("e.g. --" in box for box in boxes)
    for box, option in zip(boxes, ("env", "memory", "total-steps", "resume"), strict=True):
        assert f"--{option}" in box
    assert "python scripts/ppo.py" in page


def test_help_loads_nothing_that_it_does_not_need():
    command = "import sys; sys.argv = ['ppo.py', '--help']; from scripts import ppo"
    command += "; from spg.training import cli\ntry: cli.main(ppo.Config, ppo.make)\nfinally: "
    command += "print(*sys.modules, file=sys.stderr)"
    out = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"matplotlib", "scipy.stats", "orbax.checkpoint", "tensorboardX", "gymnax", "brax"}
    assert not heavy & set(out.stderr.split())


def test_whole_numbers_may_be_written_with_an_exponent():
    words = "--total-steps 1e6 --hidden 1e2 3e1 --num-envs 32 --env-params length 5e1"
    config = options.parse(ppo.Config, words.split())
    assert (config.total_steps, config.hidden, config.num_envs) == (1_000_000, (100, 30), 32)
    assert {type(x) for x in (config.total_steps, *config.hidden)} == {int}
    assert options.arguments(config.env_params) == {"length": 50}


def test_a_command_line_changes_what_it_names_of_another_configuration():
    then = ppo.Config(env="TMaze-memory", env_params={"length": 7.0}, hidden=(8, 8), gamma=0.5)
    assert options.parse(ppo.Config, [], default=then) == then
    now = options.parse(ppo.Config, ["--gamma", "0.9"], default=then)
    assert now == replace(then, gamma=0.9)
    now = options.parse(ppo.Config, ["--env-params", "length", "9"], default=then)
    assert now == replace(then, env_params={"length": 9.0})


@dataclass(frozen=True)
class Sample:
    word: Literal["alpha", "beta"] = "alpha"
    count: Count = 2
    rate: Fraction = 0.5
    rates: tuple[Annotated[float, Range(0, 1, open="low")], ...] = (0.5,)
    table: dict[str, Annotated[float, Range(-1, 1, open="both")]] = dataclasses.field(
        default_factory=dict
    )
    extra: Annotated[Count, Needs(word="b*"), Needs(count=("3", "4"))] = 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"word": "alpa"}, "unknown word 'alpa'; did you mean 'alpha'?"),
        ({"word": "x"}, "unknown word 'x'; choose from alpha, beta"),
        ({"count": 1.5}, "count is 1.5; it has to be a whole number, at least 1"),
        ({"count": True}, "count is True; it has to be a number"),
        ({"count": "3"}, "count is '3'; it has to be a number"),
        ({"count": None}, "count is None; it has to be a number"),
        ({"count": 2**40}, "it has to be at most 2,147,483,647"),
        ({"rate": np.array([0.5, 2.0])}, "it has to be from 0 to 1"),
        ({"rate": jnp.float32(-1)}, "it has to be from 0 to 1"),
        ({"rates": (0.5, 0.0)}, "rates is 0.0; it has to be above 0 and at most 1"),
        ({"table": {"x": 1.0}}, "x is 1.0; it has to be inside (-1, 1)"),
    ],
)
def test_a_value_out_of_range_is_named(words, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        limits.check(Sample(**words))
    assert message in str(error.value)


def test_traced_values_pass_and_ends_belong_to_a_closed_range():
    def f(rate):
        limits.check(Sample(rate=rate))
        return rate

    assert jax.vmap(f)(jnp.array([0.5, 2.0])).tolist() == [0.5, 2.0]
    limits.check(Sample(rate=0.0, rates=(1.0,), count=np.int32(1), table={"x": 0.5}))


def test_an_option_needs_one_of_its_conditions():
    line = "extra 2 has no effect: word is alpha, not b*; count is 2, not 3 or 4"
    assert limits.without_effect(Sample(extra=2)) == [line]
    assert not limits.without_effect(Sample(extra=2, word="beta"))
    assert not limits.without_effect(Sample(extra=2, count=3))
    assert not limits.without_effect(Sample(extra=1))


def test_what_fits_is_what_is_available(monkeypatch):
    monkeypatch.setattr(limits, "_available", lambda on_device: 2.0**30)
    limits.fits(2**30, "a table")
    message = "a table would take 1,230 GiB of memory at least; 1 are available"
    with pytest.raises(ValueError, match=message):
        limits.fits(1234 * 2**30, "a table")


def test_available_memory_is_read_from_the_system():
    assert 2**26 < limits._available(False) < 2**50


def test_tables_fit_80_columns():
    rows = [
        {"method": f"m{i}"} | {f"column_{j}": 1000.0 * i + j for j in range(12)} for i in (1, 2)
    ]
    text = tables.table(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.split("\n\n")) == 2
    assert all(block.startswith("method") for block in text.split("\n\n"))
    assert tables.table([{"name": "a", "n": 1234, "x": 0.123456}]) == (
        "name      n       x\na     1,234  0.1235"
    )


@pytest.fixture
def unhooked():
    """Without run-time types, which a user does not have; they would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def world(**changes):
    half = jnp.full((2, 2, 2), 0.5)
    arrays = {"transition": half, "observation": half[0], "reward": half[0], "start": half[0, 0]}
    return DensePOMDP(**arrays | changes)


def controller(num_z=2, num_obs=2, num_actions=2):
    zeros = jnp.zeros
    return finite_kernel(zeros((num_z, num_obs, num_z)), zeros((num_z, num_obs, num_actions)))


def lists(**changes):
    return eqx.tree_at(
        lambda w: [getattr(w, k) for k in changes], load_unload().pomdp, [*changes.values()]
    )


SPEC = Spec(obs_size=2, critic_size=2, num_actions=2, discrete=True)
KEY = jr.key(0)
EVEN = jnp.full(4, 0.25)
ONES = jnp.ones((2, 2, 2))
NO, NAN = jnp.zeros(3, bool), jnp.full((2, 2), jnp.nan)
POLICIES = exact_kstep.all_policies(2, 2)


def exact(num_z=2, num_obs=2, num_actions=2, **changes):
    return long_run(controller(num_z, num_obs, num_actions), world(**changes))


def listed(**changes):
    return long_run(controller(2, 3), lists(**changes))


def values(**changes):
    arguments = {"pomdp": world(), "policies": POLICIES, "weights": EVEN, "k": 1, "gamma": 0.9}
    return exact_kstep.kstep_values(**arguments | changes)


def kernel(**words):
    return make_kernel(PolicyConfig(**words), SPEC, key=KEY)


def tables_of(cell, head, successors=None):
    return finite_kernel(jnp.zeros(cell), jnp.zeros(head), successors)


def estimate(*shape):
    trajs, _ = enumeration.trajectories(controller(), world(), num_steps=2)
    traj = jax.tree.map(lambda x: x[0], trajs)
    return score_estimate(controller(), traj, jnp.ones(shape), segment_length=1)


def advantage(*shape):
    x = jnp.zeros(3)
    return gae(x, jnp.zeros(shape), x, NO, NO, gamma=1.0, gae_lambda=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact(transition=ONES), "transitions of state 0 under action 0 sum to 2, not to"),
        (lambda: exact(reward=NAN), "the reward of state 0 under action 0 is not finite"),
        (lambda: exact(start=jnp.array([1.5, -0.5])), "start probabilities have probability -0.5"),
        (lambda: exact(observation=jnp.eye(2) * 0.9), "observations of state 0 sum to 0.9"),
        (lambda: exact(observation=jnp.ones((3, 1))), "the arrays of a world do not fit each oth"),
        (lambda: exact(num_obs=3), "the memory has tables for 3 observations; the world has 2"),
        (lambda: exact(num_actions=3), "the head has 3 actions; the world has 2"),
        (lambda: gamp_gradient(controller(num_actions=3), world()), "the head has 3 actions"),
        (lambda: listed(successor=jnp.full((10, 2, 1), 10)), "successor 10 is out of range: there"),
        (lambda: listed(probability=jnp.full((10, 2, 1), 0.5)), "state 0 under action 0 sum to 0."),
        (lambda: listed(emission=jnp.full((10, 1), 2.0)), "the observations of state 0 sum to 2"),
        (
            lambda: listed(observation=jnp.full((10, 1), -1)),
            "observation -1 is out of range: there",
        ),
        (
            lambda: enumeration.expected_return(
                controller(num_obs=1), world(), gamma=0.9, num_steps=2
            ),
            "the memory has tables for 1 observations",
        ),
        (
            lambda: enumeration.discounted_values(controller(), world(reward=NAN), gamma=0.9),
            "is not finite",
        ),
        (
            lambda: enumeration.stationary_distribution(controller(num_actions=1), world()),
            "the head has 1 actions",
        ),
        (
            lambda: enumeration.trajectories(controller(), world(transition=ONES), num_steps=1),
            "sum to 2",
        ),
        (lambda: values(pomdp=world(transition=ONES)), "sum to 2"),
        (lambda: values(k=-1), "k is -1; a window has at least 1 step"),
        (lambda: values(gamma=1.0), "gamma is 1.0"),
        (lambda: values(weights=jnp.ones(3) / 3), "3 weights for 4 policies"),
        (lambda: values(weights=jnp.ones((2, 2)) / 4), "weights for 4 policies"),
        (lambda: values(weights=jnp.ones(4)), "weights are off the simplex"),
        (lambda: values(policies=POLICIES[:, :1]), "actions for 1 observations; there are 2"),
        (lambda: tables_of((2, 3, 2), (2, 2, 2)), "do not fit"),
        (lambda: tables_of((2, 3, 4), (2, 3, 2)), "do not fit"),
        (lambda: tables_of((2, 3, 1), (2, 3, 2), jnp.full((2, 3, 1), 2)), "of I-states 0 to 1"),
        (
            lambda: random_controller(2, 3, 2, out_degree=3, key=KEY),
            "out_degree 3 is more than the 2 I-states",
        ),
        (lambda: held_kernel(jnp.zeros((1, 2, 2)), k=-2), "k is -2; a window has at least 1 step"),
        (lambda: kernel(memory="foo"), "unknown memory 'foo'; choose from s2pg"),
        (lambda: kernel(cell="grru"), "unknown cell 'grru'; did you mean 'gru'?"),
        (lambda: kernel(z_size=0), "z_size is 0"),
        (lambda: kernel(z_size=2.5), "z_size is 2.5; it has to be a whole number"),
        (lambda: kernel(hidden=(0,)), "hidden is 0"),
        (lambda: kernel(state_std=0.0), "state_std is 0.0; it has to be from 1e-06 to 5"),
        (lambda: kernel(state_std=8.0), "state_std is 8.0"),
        (lambda: kernel(action_std=0.0), "action_std is 0.0"),
        (lambda: kernel(memory="kstep", k=-1), "k is -1; it has to be at least 1"),
        (
            lambda: kernel(cell="gru", num_layers=2),
            "num_layers is 2; layers are for linear cells, not gru",
        ),
        (lambda: kernel(memory="filter"), "memory 'filter' needs the model of a finite world"),
        (lambda: num_segments(12, 5), "does not divide num_steps 12; 1, 2, 3, 4, 6, 12 would"),
        (lambda: split_segments(jnp.zeros(12), -3), "segment_length -3 does not divide"),
        (lambda: advantage(3, 1), "shapes have to be the same: reward (3,), value (3, 1)"),
        (lambda: advantage(1), "value (1,)"),
        (lambda: returns_to_go(EVEN, EVEN[:1], EVEN > 1, EVEN > 1, gamma=1.0), "next_value (1,)"),
        (lambda: estimate(3), "weight (3,) for the steps (2,)"),
        (lambda: estimate(2, 1), "weight (2, 1) for the steps (2,)"),
        (lambda: chain(0), "n is 0; it has to be at least 1"),
        (lambda: chain(1.5), "n is 1.5; it has to be a whole number"),
        (lambda: chain(10**9), "GiB of memory"),
        (lambda: chain(reward=np.nan), "reward is nan; it has to be finite"),
        (lambda: matching(30_000), "GiB of memory"),
        (lambda: random_aggregated(10**6), "GiB of memory"),
        (lambda: random_aggregated(6, 9), "num_obs is 9; it has to be from 1 to 6"),
        (lambda: cartpole(1), "bins is 1; it has to be at least 2"),
        (lambda: cartpole(1000), "GiB of memory"),
        (lambda: ringworld(epsilon=2.0), "epsilon is 2.0; it has to be from 0 to 1"),
        (lambda: ringworld(epsilon=np.nan), "epsilon is nan"),
        (lambda: swap_hmm(-0.1), "epsilon is -0.1"),
        (lambda: random_hmm(0), "num_states is 0"),
        (lambda: random_hmm(10**6), "GiB of memory"),
        (lambda: random_pomdp(1), "num_states is 1"),
        (lambda: random_pomdp(10**9), "GiB of memory"),
        (lambda: dense(random_pomdp(10**5).pomdp), "100,000 states, without lists, would take"),
        (lambda: envs.make("TMaze-memory", length=-1), "length is -1"),
        (lambda: envs.make("TMaze-memory", noise=np.nan), "noise is nan"),
        (lambda: envs.make("RepeatFirst-memory", distractors=-0.5), "distractors is -0.5"),
        (lambda: envs.make("RepeatFirst-memory", num_symbols=1), "num_symbols is 1; it has to be"),
        (lambda: envs.make("RecallCards-memory", num_cards=0), "num_cards is 0"),
        (lambda: envs.make("RecallCards-memory", pause=-1), "pause is -1"),
        (lambda: envs.make("RecallCards-memory", num_suits=2.5), "num_suits is 2.5; it has to be"),
        (lambda: envs.make("Doors-memory", max_steps_in_episode=0), "max_steps_in_episode is 0"),
        (
            lambda: envs.make("brax/ant", mass_range=1),
            "mass_range is 1; it has to be at least 0 and",
        ),
        (lambda: envs.make("CartPole-v1", max_steps_in_episode=0), "max_steps_in_episode is 0"),
        (lambda: envs.make("CartPole-v1", gravity=np.inf), "gravity is inf"),
        (lambda: envs.make("tiger-pomdp", max_steps_in_episode=-1), "max_steps_in_episode is -1"),
        (lambda: envs.Tabular(world(transition=ONES)), "sum to 2"),
        (lambda: envs.Tabular(world(), max_steps_in_episode=0), "max_steps_in_episode is 0"),
        (lambda: TMaze().reset_env(KEY, TMazeParams(length=0)), "length is 0"),
        (lambda: RepeatFirst().reset_env(KEY, RepeatFirstParams(delay=-1)), "delay is -1"),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_a_call_is_refused_in_our_words(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_worlds_pass_that_are_worlds_traced_ones_too():
    from spg.worlds.models import check

    check(world())
    check(load_unload().pomdp)
    jax.jit(lambda w: check(w))(world(transition=jnp.ones((2, 2, 2))))  # values are unknown there
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), world())
    jax.vmap(lambda w: check(w) or w.start)(stacked)
