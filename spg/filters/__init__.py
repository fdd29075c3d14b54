"""Beliefs over hidden states and their linear forms."""
