"""Tests of `bridge.renewal`."""
