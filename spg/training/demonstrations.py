"""Demonstrations: whole episodes of an expert in one `.npz`, written, read and checked.

What can be recomputed is not stored: the successor of a step is the next step's observation, or,
where an episode ends, its entry of `last_obs`.
"""

import json
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spg.kernels.kernel import Kernel
from spg.training.records import write_arrays
from spg.types import Observation, Spec, Transition

LARGE = 1 << 28  # bytes of a file from which on its arrays are mapped, not read
WORLD = ("env", "backend", "env_params")  # what has to be the same, whatever is observed
SEEN = ("observe", "previous_action")
KINDS = {  # of NumPy's dtypes, and how many axes
    "obs": ("f2",), "critic": ("f2",), "action": ("f2", "i1"), "terminated": ("b1",),
    "truncated": ("b1",), "last_obs": ("f2",), "last_critic": ("f2",), "hidden": ("f2",),
    "returns": ("f1",),
}  # fmt: skip


class Demonstrations(NamedTuple):
    """N steps of E episodes, in order."""

    obs: np.ndarray  # [N, o] what the imitator sees
    critic: np.ndarray  # [N, s] the full state, for critics and discriminators
    action: np.ndarray  # [N, a] in [-1, 1], or [N] choices
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    last_obs: np.ndarray  # [E, o] after the last step of each episode
    last_critic: np.ndarray  # [E, s]
    hidden: np.ndarray  # [E, h] what an episode draws and shows to critics, see `experts.hidden`
    returns: np.ndarray  # [E] undiscounted
    made: dict[str, Any]  # how: see `experts.record`

    @property
    def ends(self) -> np.ndarray:
        return self.terminated | self.truncated

    def fraction(self, returns: Any) -> Any:
        """Returns as a fraction of the expert's: 0 is that of random actions, 1 the expert's.

        An expert that is worse than random actions has -1.
        """
        low, high = self.made["random_return"], self.made["expert_return"]
        return (returns - low) / abs(high - low)

    def steps(self, kernel: Kernel, *, oracle: bool, privileged: bool) -> Transition:
        """As recorded by `kernel`, `[N, ...]`, but that its z stay at z0, and rewards at 0.

        An oracle sees the state; without `privileged` so do no critics.
        """

        def view(seen, state):
            seen, state = jnp.asarray(state if oracle else seen), jnp.asarray(state)
            return Observation(seen, state) if privileged else seen

        following = lambda x, last: _following(x, last, self.ends)
        z = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.ends), *x.shape)), kernel.z0)
        return Transition(
            obs=view(self.obs, self.critic),
            z=z,
            action=jnp.asarray(self.action),
            z_next=z,
            reward=jnp.zeros(len(self.ends)),
            first=jnp.asarray(np.roll(self.ends, 1)),
            terminated=jnp.asarray(self.terminated),
            truncated=jnp.asarray(self.truncated),
            final_obs=view(
                following(self.obs, self.last_obs), following(self.critic, self.last_critic)
            ),
        )

    @property
    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the steps `[E, T]` of each episode, as long as the longest; which are its own."""
        last = np.flatnonzero(self.ends)
        first = np.concatenate([[0], last[:-1] + 1])
        rows = first[:, None] + np.arange((last - first).max() + 1)
        return np.minimum(rows, last[:, None]), rows <= last[:, None]


def save(path: Path, demonstrations: Demonstrations) -> None:
    """Write the file, whole or not at all."""
    made = np.array(json.dumps(demonstrations.made))
    write_arrays(path, demonstrations._asdict() | {"made": made})


def load(path: str | Path, *, episodes: int | None = None) -> Demonstrations:
    """Read the file, or its first `episodes` alone; a large one is mapped into memory.

    Raises ValueError, with one line, if the file is not there, is damaged, holds numbers that are
    not finite, or does not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; scripts/demonstrate.py records demonstrations, and without "
            "arguments those of the default runs"
        )
    try:
        read = _mapped if path.stat().st_size > LARGE else _read
        arrays: dict[str, Any] = read(path)
        found = Demonstrations(**arrays | {"made": json.loads(str(arrays["made"]))})
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no demonstrations: {error}") from error
    _check(path, found)
    found = _first(found, episodes)
    for name in ("obs", "critic", "action", "last_obs", "last_critic", "returns"):
        if not np.isfinite(array := found._asdict()[name]).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise ValueError(f"{path}: row {row} of {name} is not finite")
    return found


def check_world(
    path: str, made: dict[str, Any], other: str, view: dict[str, Any], *, oracle: bool = False
) -> None:
    """Raise ValueError, naming both sides, unless `path` and `other` have the same environment.

    An oracle may observe what it likes.
    """
    for name in WORLD if oracle else WORLD + SEEN:
        if made[name] != view[name]:
            raise ValueError(f"{path} has {name} {made[name]}, and {other} has {view[name]}")


def check_sizes(
    path: str, found: Demonstrations, spec: Spec, *, oracle: bool, privileged: bool, least: int
) -> None:
    """Raise ValueError, naming both sides, unless an imitator with this `spec` can learn.

    `least` is the number of steps that a gradient takes.
    """
    action = "discrete" if found.action.ndim == 1 else found.action.shape[1]
    policy = found.critic if oracle else found.obs
    critic = found.critic if privileged else policy
    sizes = {
        "observations of the policy": (policy.shape[1], spec.obs_size),
        "observations of the critic": (critic.shape[1], spec.critic_size),
        "actions": (action, "discrete" if spec.discrete else spec.num_actions),
    }
    for name, (there, here) in sizes.items():
        if there != here:
            raise ValueError(f"{name} have size {there} in {path}, and {here} in the training")
    if spec.discrete and not ((found.action >= 0) & (found.action < spec.num_actions)).all():
        raise ValueError(
            f"actions in {path} go from {found.action.min()} to {found.action.max()}, and those of "
            f"the training from 0 to {spec.num_actions - 1}"
        )
    if len(found.action) < least:
        raise ValueError(
            f"demonstrations {path} hold {len(found.action)} steps, and a gradient takes {least}"
        )


def references(found: Demonstrations) -> dict[str, float]:
    """Returns that an expert should be above: of random actions, of a policy without memory."""
    names = {"random actions": "random_return", "the memoryless policy": "memoryless_return"}
    return {name: found.made[key] for name, key in names.items() if key in found.made}


def weakness(found: Demonstrations) -> str | None:
    """A warning where the expert is no better than random actions, or a policy without memory."""
    expert = found.made["expert_return"]
    name, best = max(references(found).items(), key=lambda item: item[1])
    if expert > best:
        return None
    return f"the expert's return {expert:.4g} is no better than {best:.4g}, that of {name}"


def _check(path: Path, found: Demonstrations) -> None:
    if not isinstance(found.made, dict):
        raise ValueError(f"{path} does not tell how it was made")
    if absent := {*WORLD, *SEEN, "expert_return", "random_return"} - found.made.keys():
        raise ValueError(f"{path} does not tell {', '.join(sorted(absent))}")
    expert, random = found.made["expert_return"], found.made["random_return"]
    numbers = all(isinstance(x, float | int) and math.isfinite(x) for x in (expert, random))
    if not numbers or expert == random:
        raise ValueError(
            f"{path}: the expert's return {expert} and that of random actions {random} have to be "
            "two numbers that differ, since returns are told as fractions of the expert's"
        )
    for name, kinds in KINDS.items():
        array = found._asdict()[name]
        if f"{array.dtype.kind}{array.ndim}" not in kinds:
            raise ValueError(f"{path}: {name} is {array.dtype} with {array.ndim} axes")
    if found.action.ndim == 2 and not (np.abs(found.action) <= 1).all():
        row = int(np.argwhere(~(np.abs(found.action) <= 1))[0][0])
        raise ValueError(f"{path}: row {row} of action is not within [-1, 1]")
    lengths = {k: len(x) for k, x in found._asdict().items() if k != "made"}
    steps = {k: lengths[k] for k in ("obs", "critic", "action", "terminated", "truncated")}
    episodes = {k: lengths[k] for k in ("last_obs", "last_critic", "hidden", "returns")}
    for group in (steps, episodes):
        if len(set(group.values())) > 1:
            listed = ", ".join(f"{k} {n}" for k, n in group.items())
            raise ValueError(f"{path}: lengths have to be the same: {listed}")
    for name in ("obs", "critic"):
        one, last = found._asdict()[name], found._asdict()[f"last_{name}"]
        if one.ndim != 2 or one.shape[1:] != last.shape[1:]:
            raise ValueError(f"{path}: {name} {one.shape} and last_{name} {last.shape} differ")
    ends = int(found.ends.sum())
    if not ends or not found.ends[-1]:
        raise ValueError(
            f"{path} has no end of an episode at its last step: {ends} ends in {len(found.ends)} "
            "steps"
        )
    if ends != lengths["returns"]:
        raise ValueError(f"{path} has {ends} ends of episodes and {lengths['returns']} returns")


def _first(found: Demonstrations, episodes: int | None) -> Demonstrations:
    """The first so many episodes. Raises ValueError if there are fewer."""
    if episodes is None:
        return found
    if episodes > len(found.returns):
        raise ValueError(f"{episodes} episodes are asked for, and {len(found.returns)} are there")
    steps = int(np.flatnonzero(found.ends)[episodes - 1]) + 1
    of_steps = ("obs", "critic", "action", "terminated", "truncated")
    cut = lambda name, x: x[: steps if name in of_steps else episodes]
    return Demonstrations(
        **{k: x if k == "made" else cut(k, x) for k, x in found._asdict().items()}
    )


def _following(x: np.ndarray, last: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The successor of each row: the next one, or at an end the episode's `last`."""
    found = np.roll(x, -1, 0)
    found[ends] = last
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` that is not compressed, read from the disk where they are used."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed, so it cannot be mapped")
            file.seek(info.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # name, extra field
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file)
            place = file.tell()
            if np.prod(shape) > 1:  # there is no map of an empty array
                array = np.memmap(path, dtype, "r", place, shape, "F" if fortran else "C")
            else:
                array = np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
            found[info.filename.removesuffix(".npy")] = array
    return found
