"""`spg.load` opens what a training saved, and says in one line what it cannot open."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spg
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.finite import expected_kernel
from spg.training import controllers, options, policies
from spg.types import Env
from spg.worlds import WORLDS


@dataclasses.dataclass(frozen=True)
class Config(options.EnvConfig, PolicyConfig, options.RunConfig):
    env: str = "ringworld-pomdp"
    observe: str = "all"
    previous_action: bool = True
    cell: Any = "linear"
    z_size: int = 4
    hidden: tuple[int, ...] = (3, 5)
    num_seeds: int = 2
    seed: int = 7


@dataclasses.dataclass(frozen=True)
class Controllers(options.ProblemConfig, options.RunConfig):
    num_seeds: int = 2
    start_std: float = 1.0
    estimator: str = "istate"


def leave(out: Path, config, kernels: spg.Kernel) -> None:
    """What `spg.load` needs of a run."""
    (out / "config.json").write_text(json.dumps({"name": "x"} | dataclasses.asdict(config)))
    policies.save(out, kernels)


def several(make, num: int = 2) -> spg.Kernel:
    """Kernels of this make, one a seed, arrays filled at random and nothing compiled."""
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.integers(9, size=(num, *x.shape)), x.dtype)
    return jax.tree.map(fill, jax.eval_shape(make, jr.key(0)))


def assert_equal(x, y) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.fixture(scope="module")
def ring() -> Env:
    return options.make_env(Config())


@pytest.mark.parametrize(
    "words",
    [
        {"memory": "s2pg"},
        {"memory": "bptt", "cell": "lru", "num_layers": 2, "z_size": 8},
        {"memory": "filter", "filter": "belief"},
        {"memory": "window"},
        {"memory": "oracle", "previous_action": False},
    ],
    ids=str,
)
def test_kernels_come_back_with_their_structure(words, ring, tmp_path):
    config = dataclasses.replace(Config(), **words)
    env = options.make_env(config, oracle=True) if config.memory == "oracle" else ring
    kernels = several(lambda key: make_kernel(config, env.spec, key=key))
    leave(tmp_path, config, kernels)
    run = spg.load(tmp_path)
    assert_equal(run.kernels, kernels)
    assert_equal(run.kernel(1), jax.tree.map(lambda x: x[1], kernels))
    assert (run.seeds, run.config["hidden"]) == ([7, 8], [3, 5])
    assert run.env.spec._replace(model=None) == env.spec._replace(model=None)
    assert run.env.params.max_steps_in_episode == 100


@pytest.mark.parametrize("estimator", ["istate", "exp-observations"])
def test_controllers_come_back_as_the_policy_that_acts(estimator, tmp_path):
    config = Controllers(estimator=estimator)
    problem = WORLDS["loadunload"]()

    def make(key):
        kernel = controllers.make(config, problem, key=key)
        return expected_kernel(kernel) if estimator == "exp-observations" else kernel

    kernels = several(make)
    leave(tmp_path, config, kernels)
    run = spg.load(tmp_path)
    assert_equal(run.kernels, kernels)
    assert run.env.params.max_steps_in_episode is None


def test_arrays_are_found_by_their_paths_and_not_by_their_order(ring, tmp_path):
    kernels = several(lambda key: make_kernel(Config(), ring.spec, key=key))
    leave(tmp_path, Config(), kernels)
    with np.load(tmp_path / "kernels.npz") as file:
        saved = dict(file)
    np.testing.assert_array_equal(saved["normalizer.mean"], kernels.normalizer.mean)
    np.savez(tmp_path / "kernels.npz", **dict(reversed(saved.items())))
    assert_equal(spg.load(tmp_path).kernels, kernels)


@pytest.fixture(scope="module")
def saved(ring, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    leave(out, Config(), several(lambda key: make_kernel(Config(), ring.spec, key=key)))
    return out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", None, "holds no run: there is no config.json"),
        ("kernels.npz", None, "holds no policies: there is no kernels.npz"),
        ("config.json", lambda data: data[:40], r"config.json is damaged: .*line"),
        ("kernels.npz", lambda data: data[:900], r"kernels.npz is damaged: "),
        ("kernels.npz", lambda data: b"", r"kernels.npz is damaged: "),
        ("config.json", lambda data: data.replace(b'"z_size": 4', b'"z_size": 3'),
         r"kernels.npz is of another version .*bias has shape \(2, 4\) there, \(2, 3\) here"),
        ("config.json", lambda data: data.replace(b"z_size", b"zsize"),
         r"the run is of another version of the code, .* lacks z_size"),
        ("config.json", lambda data: data.replace(b"ringworld-pomdp", b"ringwrld-pomdp"),
         r"unknown environment 'ringwrld-pomdp'; did you mean 'ringworld-pomdp'"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_named_in_one_line(name, change, message, saved, tmp_path):
    for file in saved.iterdir():
        data = file.read_bytes()
        if file.name == name:
            if change is None:
                continue
            data = change(data)
        (tmp_path / file.name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        spg.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_kernel_of_another_make_is_loaded_by_that_make(ring, tmp_path):
    def make(config, spec, *, key):
        return make_kernel(dataclasses.replace(config, z_size=2), spec, key=key)

    kernels = several(lambda key: make(Config(), ring.spec, key=key))
    leave(tmp_path, Config(), kernels)
    with pytest.raises(ValueError, match="of another kernel"):
        spg.load(tmp_path)
    assert_equal(spg.load(tmp_path, make=make).kernels, kernels)


def test_double_precision_is_read_in_the_precision_of_the_process(ring, tmp_path):
    kernels = several(lambda key: make_kernel(Config(), ring.spec, key=key))
    leave(tmp_path, Config(), kernels)
    with np.load(tmp_path / "kernels.npz") as file:
        double = {k: x.astype(np.float64) for k, x in file.items()}
    np.savez(tmp_path / "kernels.npz", **double)
    assert {x.dtype for x in jax.tree.leaves(spg.load(tmp_path).kernels)} == {jnp.dtype("float32")}
