"""
Kubeconfigs for people and machines: short-lived client certificates of the cluster's CA, signed through its backend.

What may be signed is said by `policy`; a person's private key is made where the person is, and comes here as a CSR.
"""
