"""
The gateway: signing for the cluster's certificates API (CertificateSigningRequest objects).

`service` runs it; `watch` reads objects into the `queue`; `issue` takes each through `judge`, the CA and `write`.
`rules` has the policy's tables, `policy` the judgement, `nodes` the cluster's nodes.
"""
