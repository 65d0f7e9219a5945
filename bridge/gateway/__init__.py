"""
The gateway's door for CertificateSigningRequest objects: watching them, writing what the policy and the CA say.

What may be signed is decided in `bridge.gateway.signer_policy`, so that another door can stand beside this one.
"""
