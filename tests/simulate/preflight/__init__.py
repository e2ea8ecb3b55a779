"""Tests of the preflight, with real sockets on loopback."""
