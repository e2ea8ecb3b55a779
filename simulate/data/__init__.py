"""Training data: where the text comes from, and batches addressed by (seed, device, step)."""
