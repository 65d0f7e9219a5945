"""
From the project and its lock file to what a node without a network installs.

`wheels` reads wheels, `tree` lays them out, `bill` lists what is in them (CycloneDX), `offline`, `debian` and `rpm` each
wrap that one tree. `installer` is what runs on the node. Nothing here needs more than Python's own library, and nothing
of it is in the wheel.
"""
