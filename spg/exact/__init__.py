"""Exact numbers of known models: values, gradients, and ascents that use them.

`ascent`, `conjugate`, `exchange`, `gamp`, `kstep`, `natural` and `pbvi` are modules; their entry
points are importable from here.
"""

from spg.exact import conjugate, exchange, natural
from spg.exact.ascent import (
    ascend,
    gap_bound,
    mirror_step,
    projected_step,
    rate_bound,
    smoothness,
    steps_needed,
)
from spg.exact.chain import share_states
from spg.exact.enumeration import (
    DiscountedValues,
    discounted_values,
    enumerate_mean,
    enumerate_return,
    expected_return,
    policy_gradient,
    stationary_distribution,
    trajectories,
)
from spg.exact.gamp import LongRun, direct_gradient, gamp_gradient, long_run
from spg.exact.kstep import (
    KStepValues,
    all_policies,
    joint_policies,
    kstep_values,
    policy_returns,
    product_weights,
    sighted_return,
)
from spg.exact.pbvi import PointBased, graph_kernel, point_based_bounds

__all__ = [
    "DiscountedValues",
    "KStepValues",
    "LongRun",
    "PointBased",
    "all_policies",
    "ascend",
    "conjugate",
    "direct_gradient",
    "discounted_values",
    "enumerate_mean",
    "enumerate_return",
    "exchange",
    "expected_return",
    "gamp_gradient",
    "gap_bound",
    "graph_kernel",
    "joint_policies",
    "kstep_values",
    "long_run",
    "mirror_step",
    "natural",
    "point_based_bounds",
    "policy_gradient",
    "policy_returns",
    "product_weights",
    "projected_step",
    "rate_bound",
    "share_states",
    "sighted_return",
    "smoothness",
    "stationary_distribution",
    "steps_needed",
    "trajectories",
]
