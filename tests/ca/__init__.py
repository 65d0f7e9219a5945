"""Tests of `bridge.ca`."""
