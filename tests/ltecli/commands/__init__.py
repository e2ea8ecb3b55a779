"""Tests of each verb."""
