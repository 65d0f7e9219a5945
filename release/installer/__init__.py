"""
What the offline file does on a node: look, install or upgrade, and remove again.

It has nothing but Python's own library, asks no network, and runs no package manager.
"""
