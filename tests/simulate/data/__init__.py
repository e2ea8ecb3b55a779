"""Tests of simulate/data."""
