"""Measuring a machine: what its kernels, memory and disk reach, as a hardware profile, and whether plans agree."""
