"""Tests of `bridge.cluster`."""
