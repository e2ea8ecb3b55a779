"""Closed forms for memory, traffic, operations and time, shared by the planner and the clock; torch-free."""
