"""Beliefs over hidden states, their linear forms, and how well the linear forms decode."""

from spg.filters.belief import (
    Filter,
    ForwardFilter,
    LinearFilter,
    LogForwardFilter,
    exact_filter,
    forward_filter,
    leaky_filter,
    log_forward_filter,
)
from spg.filters.decoding import Constants, constants

__all__ = [
    "Constants",
    "Filter",
    "ForwardFilter",
    "LinearFilter",
    "LogForwardFilter",
    "constants",
    "exact_filter",
    "forward_filter",
    "leaky_filter",
    "log_forward_filter",
]
