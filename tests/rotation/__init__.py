"""Tests of `bridge.rotation`."""
