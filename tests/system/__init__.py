"""Tests of `bridge.system`."""
