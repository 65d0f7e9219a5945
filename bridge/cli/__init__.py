"""The command line: each command parses, calls one function of a room, and prints; only `bridge.entry` imports it."""
