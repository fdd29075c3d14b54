"""The parts of a stateful policy π(a, z' | o, z)."""
