"""Tests of `bridge.node`."""
