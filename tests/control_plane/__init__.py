"""Tests of `bridge.control_plane`."""
