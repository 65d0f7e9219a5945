"""Tests of `bridge.state`."""
