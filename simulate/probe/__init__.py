"""What a few gradients and a short dense warm-up say of the rank, the heads and the batch that a run needs."""
