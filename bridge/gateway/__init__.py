"""
The gateway: signing for the cluster's certificates API (CertificateSigningRequest and PodCertificateRequest objects).

`service` runs it; `watch` reads objects into the `queue`; `issue` takes each through `judge`, the CA and `write`.
`rules` has the policy's tables, `policy` the judgement, `nodes` the cluster's nodes.
For pods `pod_rules` has the tables, `pod_policy` the judgement, `pods` what is looked up and written, `roots` what pods trust.
"""
