"""Tests of `bridge.kubernetes`."""
