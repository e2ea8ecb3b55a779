"""Slow, obvious twins: plain modules, plain loops, plain autograd. They share start weights and draws with the engine."""
