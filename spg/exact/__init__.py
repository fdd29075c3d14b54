"""Exact numbers of known models."""
