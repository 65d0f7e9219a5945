"""
The gateway: signing for the cluster's certificates API (CertificateSigningRequest objects).

`service` runs it; `watch` reads objects into the `queue`; `issue` takes each through `judge`, the CA and `write`. What may
be signed is in `rules` (the policy's tables) and `policy` (the judgement), and `nodes` knows the cluster's nodes.
"""
