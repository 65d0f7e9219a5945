"""Tests of `bridge.desk`."""
