"""Bodies of Brax whose masses, load, wind and size are drawn in every episode, and hidden."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from spg.limits import Range, check

LOADS = (0.0, 0.25, 0.5, 1.0)  # of the heaviest payload
NUM_SIZES = 4


class Hidden(NamedTuple):
    """What was drawn for an episode; None for what is switched off."""

    mass: Float[Array, " links"] | None  # relative change of each link's mass
    payload: Float[Array, ""] | None  # on the torso, in units of its mass
    wind: Float[Array, ""] | None  # sign of the force along x
    size: Float[Array, ""] | None = None  # k of the body, 1 as it is


@dataclass(frozen=True)
class HiddenBodies:
    """What an episode draws, all independent and uniform; 0 switches it off.

    | field | drawn | effect |
    | --- | --- | --- |
    | `mass_range` m | c_i in {-m, 0, m} of each link i | mass and inertia times 1 + c_i |
    | `payload` p | l in {0, p/4, p/2, p} | l times the torso's mass on the torso, link 0 |
    | `wind` F | sign s = ±1 | gravity is tilted along x by sF / total mass |
    | `smallest` k₁ | size k, one of four evenly from k₁ to 1 | actuators are 1/k as strong |

    Hidden masses follow S2PG (Al-Hafez et al., 2024, appendix E.4), m = .3. The authors scale mass
    and the radius of the body's geometry; here inertia goes with mass, and geometry stays. The
    observation and the reward stay those of the nominal masses, for the humanoids show inertias.
    (MuJoCo's softness of contacts stays nominal too.) The wind follows the authors' code, F = .5
    for Ant, 10 for Humanoid and 5 else; there it turns the forward direction too, here it does not.

    Sizes follow the humanoids of the paper's appendix E.5, k₁ = .4: a body k times as large weighs
    k³ as much, and its muscles are k² as strong. Lengths, which the authors scale as well, stay
    here. Then a body whose masses, inertias, springs and dampers are k³ times the nominal ones
    moves as the nominal body does under forces 1 / k³ as large, so actuators k² as strong are all
    that is felt of k: 1/k of the nominal strength.

    The spring and positional backends raise masses to a power before they use them, for Ant and
    Hopper to the power 0: every link of theirs weighs 1. What is changed here are the masses after
    that, so that 1 + c_i always is the ratio of what the physics uses. The total mass too is that
    of the physics and of the episode; for Ant it is about 9 in these backends and .88 elsewhere.
    The joints' stiffness stays nominal too, and light links on the spring backend fly apart under
    random actions: a halfcheetah's from m = .5 on, an ant's from .7, at m = .3 none that we tried.
    """

    mass_range: Annotated[Any, Range(0, 1, open="high", usual="0.3 is S2PG's")] = 0.0
    payload: Annotated[Any, Range(0, usual="0.5 adds up to half of the torso's mass")] = 0.0
    wind: Annotated[Any, Range(0, usual="its sign is drawn")] = 0.0
    smallest: Annotated[Any, Range(0, 1, usual="0.4 makes sizes of .4, .6, .8 and 1")] = 0.0

    def __post_init__(self) -> None:
        check(self)

    def draw(self, env: Any, *, key: PRNGKeyArray) -> Hidden:
        """What an episode of the Brax environment `env` hides."""
        mass_key, load_key, wind_key = jr.split(key, 3)
        size_key = jr.fold_in(key, 3)
        signs = jr.randint(mass_key, (env.sys.num_links(),), -1, 2)
        load = jr.choice(load_key, jnp.array(LOADS, jnp.float32))
        return Hidden(
            self.mass_range * signs.astype(jnp.float32) if self.mass_range else None,
            self.payload * load if self.payload else None,
            jr.rademacher(wind_key, (), jnp.float32) if self.wind else None,
            jr.choice(size_key, jnp.linspace(self.smallest, 1.0, NUM_SIZES, dtype=jnp.float32))
            if self.smallest
            else None,
        )

    def embody(self, env: Any, hidden: Hidden) -> Any:
        """`env` with the physics of the drawn bodies. What it shows and pays stays nominal."""
        physics, embodied = copy.copy(env), copy.copy(env)
        physics.sys = self.system(env, hidden)
        embodied.pipeline_init = physics.pipeline_init
        embodied.pipeline_step = physics.pipeline_step
        return embodied

    def system(self, env: Any, hidden: Hidden) -> Any:
        """The `System` of the drawn bodies."""
        nominal, inertia = masses(env)
        ratio = 1.0 if hidden.mass is None else 1 + hidden.mass
        mass = nominal * ratio
        inertia = (inertia.T * ratio).T  # links come first
        if hidden.payload is not None:
            mass = mass.at[0].add(hidden.payload * nominal[0])
        changes: dict[str, Any] = {
            "link.inertia.mass": mass,
            "link.inertia.i": inertia,
            "spring_mass_scale": 0.0,  # the power is taken already
            "spring_inertia_scale": 0.0,
        }
        if env.backend == "mjx":  # body 0 is the world
            body_mass = env.sys.body_mass.at[1:].set(mass)
            changes = {
                "body_mass": body_mass,
                "body_inertia": env.sys.body_inertia.at[1:].set(inertia),
            }
        if hidden.wind is not None:
            tilt = jnp.array([1.0, 0.0, 0.0]) * hidden.wind * self.wind / mass.sum()
            changes |= {
                "gravity": env.sys.gravity + tilt,
                "opt.gravity": env.sys.opt.gravity + tilt,
            }
        if hidden.size is not None:
            changes["actuator.gear"] = env.sys.actuator.gear / hidden.size
            if env.backend == "mjx":
                changes["actuator_gear"] = env.sys.actuator_gear / hidden.size
        return env.sys.tree_replace(changes)


FIELDS = [field.name for field in dataclasses.fields(HiddenBodies)]


def masses(env: Any) -> tuple[Float[Array, " links"], Float[Array, "links *axes"]]:
    """Mass and inertia of every link as the backend of the Brax environment `env` uses them."""
    sys = env.sys
    if env.backend == "mjx":
        return sys.body_mass[1:], sys.body_inertia[1:]
    mass, inertia = sys.link.inertia.mass, sys.link.inertia.i
    if env.backend in ("spring", "positional"):
        mass = mass ** (1 - sys.spring_mass_scale)
        diagonal = jax.vmap(jnp.diagonal)(inertia) ** (1 - sys.spring_inertia_scale)
        inertia = jax.vmap(jnp.diag)(diagonal)
    return jnp.asarray(mass), jnp.asarray(inertia)
