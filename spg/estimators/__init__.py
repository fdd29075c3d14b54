"""Estimators see recorded transitions, never an environment."""
