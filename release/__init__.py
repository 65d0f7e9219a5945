"""
Builds, from the project and its lock file, the files that a node without a network installs.

`wheels` reads wheels, `tree` lays them out, `bill` lists their contents (CycloneDX), and `offline`, `debian` and `rpm`
each wrap this tree. `installer` runs on the node. All of this needs only Python's own library, and none of it is in the
wheel.
"""
