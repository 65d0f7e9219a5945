"""Tests of `bridge.gateway`."""
