"""Tests of `bridge.bootstrap`."""
