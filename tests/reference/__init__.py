"""Slow, obvious twins: plain modules, plain loops, plain autograd; only start weights and draws are the engine's."""
