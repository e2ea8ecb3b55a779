"""The networks: torch-free shapes for the planner, plain PyTorch modules for the engine."""
