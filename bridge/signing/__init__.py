"""
Asking CAs (registry, retries, preflight), and being asked: the desk, our offline registration authority.

No key of the node comes here, and no file of the node is replaced.
"""
