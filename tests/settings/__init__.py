"""Tests of `bridge.settings`."""
