"""The command line: parse, call one function of a room, print; `bridge.entry` alone imports it, and no rule is here."""
