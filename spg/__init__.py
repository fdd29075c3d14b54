"""Policy gradients for stateful policies in partially observable environments.

The names below are those that most programs need. Every other one is importable from its package:
`spg.kernels`, `spg.estimators`, `spg.exact`, `spg.filters`, `spg.worlds`, `spg.envs`. Importing
`spg` loads no environment; `spg.envs` does, and importing Gymnax starts JAX's backend.
"""

from spg.estimators import (
    episodic_gpomdp,
    gae,
    ppo_surrogate,
    reinforce,
    returns_to_go,
    score_estimate,
)
from spg.kernels import Kernel, PolicyConfig, finite_kernel, make_kernel, random_controller
from spg.rollout import (
    Carry,
    Episodes,
    Evaluation,
    episode_returns,
    evaluate,
    evaluation,
    reset,
    rollout,
    watch,
)
from spg.scans import linear_scan, split_segments
from spg.training.policies import Run, load
from spg.types import Env, LogProb, Observation, Spec, Transition

__version__ = "0.2.0"

__all__ = [
    "Carry",
    "Env",
    "Episodes",
    "Evaluation",
    "Kernel",
    "LogProb",
    "Observation",
    "PolicyConfig",
    "Run",
    "Spec",
    "Transition",
    "__version__",
    "episode_returns",
    "episodic_gpomdp",
    "evaluate",
    "evaluation",
    "finite_kernel",
    "gae",
    "linear_scan",
    "load",
    "make_kernel",
    "ppo_surrogate",
    "random_controller",
    "reinforce",
    "reset",
    "returns_to_go",
    "rollout",
    "score_estimate",
    "split_segments",
    "watch",
]
