"""
Kubeconfigs for people and machines: short-lived client certificates of the cluster's CA, signed through its backend.

`user_rules` says what may be signed; a person's private key stays where the person is, and only a CSR comes here.
"""
