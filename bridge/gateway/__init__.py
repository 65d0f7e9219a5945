"""
The gateway: signing for the cluster's certificates API (CertificateSigningRequest and PodCertificateRequest objects).

`service` runs it; `watch` reads objects into the `queue`; `issue` judges each, asks the CA, and writes the answer.
`csrs` and `pods` judge and write one kind of object each, by the rules in `policy` and `pod_policy`.
`rules` has the policy's tables, `nodes` the cluster's nodes, `roots` the roots that pods trust.
"""
