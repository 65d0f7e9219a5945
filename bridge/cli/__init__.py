"""
The command line: parse, call one function, print. Only here something is printed for people.

No rule is here; `bridge.entry` alone imports this package.
"""
