"""
The gateway: signing for the cluster's certificates API (CertificateSigningRequest and PodCertificateRequest objects).

`service` runs it; `watch` reads objects into the `queue`; `issue` takes each to its verdict, to the CA and to the write:
`csrs` and `pods` do the first and the last for each kind of object, by the judgement in `policy` and `pod_policy`.
`rules` has the policy's tables, `nodes` the cluster's nodes, `roots` what pods trust.
"""
