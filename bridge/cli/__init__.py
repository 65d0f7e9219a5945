"""
The command line: parse (`app`, `options`), call one function of the command's module, print (`printing`).

No rule is here; `bridge.entry` alone imports this package, and nothing below it prints on standard output.
"""
