"""Tests of simulate.probe."""
