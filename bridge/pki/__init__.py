"""
Certificates, CSRs, bundles and the checks on them: pure rules.

No file, no network and no clock: the time is an argument. What is on a node is in `bridge.node`.
"""
