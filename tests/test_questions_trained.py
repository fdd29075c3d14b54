"""The policies that the questions train differ in what they say, and a training is run once."""

import csv
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import act
from scipy import stats

from scripts.benchmarks import questions
from scripts.benchmarks import questions_kernels as kernels
from scripts.benchmarks import questions_trained as trained
from scripts.benchmarks import questions_why as why
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.networks import trainable
from spg.types import Spec

SPEC = Spec(obs_size=2, critic_size=2, num_actions=3, discrete=True)
CONFIG = PolicyConfig(cell="linear", z_size=3, hidden=(4,))
TINY = {
    "num_seeds": 2, "num_envs": 2, "num_steps": 24, "num_epochs": 1, "num_minibatches": 2,
    "total_steps": 96, "cell": "linear", "z_size": 4, "hidden": (4,), "checkpoints": 1,
    "eval_episodes": 2,
}  # fmt: skip
LOC, STD = jnp.array([0.3, -0.1, 0.2]), jnp.array([0.2, 0.5, 0.3])


@eqx.filter_jit
def make(maker, *arguments):
    """Compiled as one."""
    return maker(*arguments, CONFIG, SPEC, key=jr.key(0))


@eqx.filter_jit
def joint(kernel, steps):
    return kernel.log_prob(steps).joint


def segment(kernel):
    """Eight steps of two episodes."""
    obs = jax.nn.one_hot(jr.randint(jr.key(1), (8,), 0, 2), 2)
    first = jnp.zeros(8, bool).at[jnp.array([0, 5])].set(True)
    return eqx.filter_jit(act)(kernel, obs, jnp.zeros(8), first, key=jr.key(2))


def test_laplace_is_that_of_scipy():
    law, x = kernels.Laplace(LOC, STD), jnp.array([0.1, 0.4, 0.2])
    truth = stats.laplace(LOC, STD / 2**0.5)
    assert np.isclose(law.log_prob(x), truth.logpdf(x).sum(), rtol=1e-5)
    assert np.isclose(law.entropy(), truth.entropy().sum(), rtol=1e-5)
    assert np.allclose(truth.std(), STD)


def test_signs_are_those_of_logistic_noise():
    law = kernels.Signs(LOC, STD)
    truth = stats.logistic(scale=STD * 3**0.5 / np.pi)
    assert np.allclose(truth.std(), STD)
    every = 2.0 * np.indices((2, 2, 2)).reshape(3, -1).T - 1
    p = np.exp([law.log_prob(x) for x in jnp.asarray(every)])
    assert np.allclose(p, truth.cdf(every * np.asarray(LOC)).prod(1), rtol=1e-4)
    assert np.isclose(law.entropy(), stats.entropy(p), rtol=1e-4)


def test_one_hot_is_the_largest_under_gumbel_noise():
    """By the integral over the noise of each entry."""
    law = kernels.OneHot(LOC, STD)
    noise = stats.gumbel_r(scale=np.sqrt(np.mean(STD**2)) * 6**0.5 / np.pi)
    x = np.linspace(-5, 9, 20001)
    p = []
    for i in range(3):
        others = [noise.cdf(x - LOC[j]) for j in range(3) if j != i]
        p.append(np.trapezoid(noise.pdf(x - LOC[i]) * np.prod(others, 0), x))
    assert np.allclose(np.exp([law.log_prob(e) for e in jnp.eye(3)]), p, rtol=1e-3)
    assert np.isclose(law.entropy(), stats.entropy(p), rtol=1e-3)


@pytest.mark.parametrize("name", kernels.LAWS)
def test_samples_of_a_law_follow_its_density(name):
    """E ∇ log p = 0, within four standard errors: the score is that of what is drawn."""
    law = kernels.LAWS[name](LOC, STD)

    @jax.jit
    def scores(keys):
        def one(key):
            x, log_prob = law.sample_and_log_prob(key=key)
            score = jax.grad(lambda law: law.log_prob(x))(law)
            return jnp.concatenate([score.loc, score.std]), log_prob - law.log_prob(x)

        return jax.vmap(one)(keys)

    score, difference = scores(jr.split(jr.key(0), 4000))
    assert (jnp.abs(score.mean(0)) < 4 * score.std(0) / len(score) ** 0.5).all()
    assert jnp.allclose(difference, 0.0, atol=1e-3)
    assert law.mode().shape == (3,)


def test_normal_law_is_the_default():
    """`with_law` changes the distribution and nothing else."""
    plain = make(make_kernel)
    other = make(kernels.with_law, "Normal")
    steps = segment(plain)
    assert jnp.allclose(joint(other, steps), joint(plain, steps), rtol=1e-5)


def test_learned_start_at_zero_is_the_start_at_zero():
    """The same densities; z0's gradient is that of z where an episode opens."""
    plain = make(make_kernel)
    learned = make(kernels.learned_start)
    assert learned.cell.distribution.z0.shape == (3,)
    steps = segment(learned)
    bare = steps._replace(z=steps.z[:, 1:], z_next=steps.z_next[:, 1:])
    assert (steps.z[:, 0] == ~steps.first).all()
    assert not steps.z[steps.first].any()
    assert jnp.allclose(joint(learned, steps), joint(plain, bare), rtol=1e-5)
    total = lambda kernel, steps: joint(kernel, steps).sum()
    by_z0 = eqx.filter_grad(total)(learned, steps).cell.distribution.z0
    by_z = jax.grad(lambda z: total(plain, bare._replace(z=z)))(bare.z)
    assert jnp.abs(by_z0).min() > 0
    assert jnp.allclose(by_z0, by_z[steps.first].sum(0), rtol=1e-4)
    assert trainable(learned).cell.distribution.z0


@pytest.mark.parametrize("part", ["nothing", "cell", "head"])
def test_a_frozen_part_is_not_trained_and_acts_the_same(part):
    kernel, free = (make(kernels.frozen, p) for p in (part, "nothing"))
    steps = segment(free)
    assert jnp.allclose(joint(kernel, steps), joint(free, steps))
    moved = trainable(kernel)
    assert any(jax.tree.leaves(moved.cell)) == (part != "cell")
    assert any(jax.tree.leaves(moved.head)) == (part != "head")


def test_decoding_is_one_where_z_tells_the_cue_and_chance_where_it_does_not():
    cue = jax.nn.one_hot(jr.randint(jr.key(0), (512,), 0, 4), 4)
    noise = jr.normal(jr.key(1), (512, 6))
    mixed = cue @ jr.normal(jr.key(2), (4, 6))
    assert why.decoding(mixed + 0.1 * noise, cue) > 0.99
    assert abs(why.decoding(noise, cue) - 0.25) < 4 * (0.25 * 0.75 / 256) ** 0.5
    assert why.decoding(jnp.zeros((512, 6)), cue) < 0.4


def test_credit_is_the_share_that_the_cue_decides():
    """x = √p m_c + √(1-p) noise with ‖m_c‖² = E‖noise‖² has credit p."""
    cue = jax.nn.one_hot(jr.randint(jr.key(0), (4000,), 0, 4), 4)
    noise = jr.normal(jr.key(1), (4000, 4))
    for p in (0.0, 0.3, 1.0):
        x = 2 * p**0.5 * cue + (1 - p) ** 0.5 * noise
        assert abs(why.credit(x, cue) - p) < 0.03
    assert why.credit(jnp.zeros((4000, 4)), cue) == 0


def test_credit_is_not_biased_by_few_episodes():
    def once(key):
        cue_key, key = jr.split(key)
        cue = jax.nn.one_hot(jr.randint(cue_key, (40,), 0, 4), 4)
        return why.credit(jr.normal(key, (40, 3)), cue)

    found = jax.jit(jax.vmap(once))(jr.split(jr.key(0), 500))
    assert abs(found.mean()) < 4 * found.std() / 500**0.5


@pytest.mark.slow
def test_every_training_can_be_made_and_has_its_own_directory():
    for trainings in trained.TRAININGS.values():
        found = trainings()
        assert len({training.directory for training in found}) == len(found)
        for training in found:
            trained.ppo.make(training.config, policy=training.policy)


def test_success_is_the_share_of_right_answers():
    assert np.isclose(trained.success(1.0), 1)
    assert np.isclose(trained.success(0.0), 0.25)
    assert np.isclose(trained.success(-1 / 3), 0)


def test_length_is_drawn_from_its_rows(tmp_path):
    rows = [
        trained.Row(f"delay {d}", arm, seed, 10, 0.5 / d + 0.1 * seed, 0.0)
        for d in (2, 10) for arm in ("a", "b") for seed in (0, 1)
    ]  # fmt: skip
    trained.draw_length(rows, tmp_path / "length.png")
    assert (tmp_path / "length.png").stat().st_size > 0
    assert [row["seeds"] for row in trained.table(rows)] == [2] * 4


def test_seeds_are_those_of_the_main_table(monkeypatch):
    called = []
    monkeypatch.setattr(questions.curves, "main", called.append)
    questions.main(questions.Config(question="seeds", task="tmaze10", out="there"))
    (config,) = called
    assert (config.task, config.num_seeds, config.out) == ("tmaze10", 20, "there")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "arms"),
    [
        ("only-memory", ["memory alone", "actions alone"]),
        ("start", ["z0 learned"]),
        ("laws", ["Laplace", "Categorical"]),
    ],
)
def test_a_question_trains_each_policy_once(name, arms, tmp_path, monkeypatch, capsys):
    """The policies that no other script trains."""
    every = trained.TRAININGS[name]()
    trainings = [x for x in every if x.task == "MemoryChain" and x.arm in arms]
    assert len(trainings) == len(arms)
    monkeypatch.setitem(trained.TRAININGS, name, lambda: trainings)
    run = partial(trained.run, changes=TINY)
    monkeypatch.setattr(trained, "run", lambda trainings, out, changes: run(trainings, out))
    config = questions.Config(question=name, num_seeds=2, out=str(tmp_path))
    questions.main(config)
    with (tmp_path / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(trainings)
    assert {row["env_steps"] for row in rows} == {str(96 + 48)}
    assert (tmp_path / f"{name}.png").stat().st_size > 0
    capsys.readouterr()
    questions.main(config)
    assert "return" not in capsys.readouterr().err


@pytest.mark.long
def test_why_reports_every_step_of_an_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(why, "NUM_EPISODES", 64)
    rows = why.measure(tmp_path, TINY | {"cell": "linear"})
    assert len(rows) == 2 * 12
    assert all(0 <= row.decoding <= 1 and np.isfinite(row.credit) for row in rows)
    assert rows[0].decoding > 0.9  # the cue has just been shown
    why.draw(rows, tmp_path / "why.png")
    assert len(why.table(rows)) == 12
