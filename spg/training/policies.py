"""The policies of a run: saved while a training goes on, opened again by `spg.load`.

A run keeps the kernels of all seeds in `kernels.npz`, each array under its path in the kernel, as
`cell.location.inputs.weight`. The configuration, `config.json`, tells which kernel these arrays
belong to and which environment. So the script and the optimiser are not needed.
"""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.finite import expected_kernel
from spg.kernels.kernel import Kernel
from spg.training import controllers, options
from spg.training.records import write_arrays
from spg.types import Env


class Run(NamedTuple):
    """A run, opened again."""

    config: dict[str, Any]  # what `config.json` holds
    env: Env
    kernels: Kernel  # of all seeds: each array has a leading axis

    @property
    def seeds(self) -> list[int]:
        return [self.config["seed"] + i for i in range(self.config["num_seeds"])]

    def kernel(self, index: int) -> Kernel:
        """The kernel of one of the seeds, counted from 0."""
        return jax.tree.map(lambda x: x[index], self.kernels)


def save(out: Path, kernels: PyTree) -> None:
    """Write the kernels of all seeds, `kernels.npz`, whole or not at all."""
    write_arrays(out / "kernels.npz", {k: np.asarray(x) for k, x in _named(kernels).items()})


def load(run: str | Path, *, make: Callable[..., Kernel] = make_kernel) -> Run:
    """Open the directory that a script's run left: the configuration, environment, and kernels.

    If the script made kernels in another way than `make_kernel`, `make(config, spec, key=key)` is
    that way; only the shapes of the kernel are used. Raises ValueError if the directory holds no
    run, or if files are damaged or of another version of the code.
    """
    run = Path(run)
    for name, what in (("config.json", "run"), ("kernels.npz", "policies")):
        if not (run / name).is_file():
            raise ValueError(f"{run} holds no {what}: there is no {name}")
    try:
        config = json.loads((run / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{run / 'config.json'} is damaged: {error}") from error
    env, shapes = _open(config, make)
    return Run(config, env, _read(run / "kernels.npz", shapes, config["num_seeds"]))


C = TypeVar("C")


def _open(config: dict[str, Any], make: Callable[..., Kernel]) -> tuple[Env, PyTree]:
    """The environment, and the shapes of a kernel, that a configuration stands for."""
    if "problem" in config:
        from spg.envs import Tabular  # here: importing gymnax starts JAX's backend

        start = part(options.ProblemConfig, config)
        problem = options.open_problem(start)
        world = Tabular(problem)

        def kernel(key):
            kernel = controllers.make(start, problem, key=key)
            by_observations = config.get("estimator") == "exp-observations"
            return expected_kernel(kernel) if by_observations else kernel

        return Env(world, world.default_params), jax.eval_shape(kernel, jr.key(0))
    policy = part(PolicyConfig, config)
    env = options.make_env(part(options.EnvConfig, config), oracle=policy.memory == "oracle")
    return env, jax.eval_shape(lambda key: make(policy, env.spec, key=key), jr.key(0))


def part(kind: type[C], config: dict[str, Any]) -> C:
    """The fields that `kind` has. JSON has no tuples."""
    names = [f.name for f in dataclasses.fields(kind)]  # pyright: ignore
    if missing := ", ".join(name for name in names if name not in config):
        raise ValueError(
            f"the run is of another version of the code, or of a script that is not known here: "
            f"its configuration lacks {missing}"
        )
    values = {name: config[name] for name in names}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _read(path: Path, shapes: PyTree, num_seeds: int) -> Kernel:
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    like = _named(shapes)
    wanted = {name: (num_seeds, *x.shape) for name, x in like.items()}
    shape = {name: x.shape for name, x in found.items()}
    if wanted != shape:
        name = min(k for k in wanted | shape if wanted.get(k) != shape.get(k))
        raise ValueError(
            f"{path} is of another version of the code, or of another kernel: {name} has shape "
            f"{shape.get(name, 'none')} there, {wanted.get(name, 'none')} here"
        )
    leaves = [jnp.asarray(found[name], x.dtype) for name, x in like.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
