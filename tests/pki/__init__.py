"""Tests of `bridge.pki`."""
