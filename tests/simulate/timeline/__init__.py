"""Tests of simulate/timeline."""
