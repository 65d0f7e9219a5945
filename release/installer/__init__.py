"""
The offline file's program on a node: it checks, installs or upgrades, and uninstalls.

It needs only Python's own library, no network and no package manager.
"""
