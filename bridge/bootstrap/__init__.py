"""
Day 0: everything that a new node needs before `kubeadm init` or `kubeadm join`, signed by a CA that lives elsewhere.

Keys and CSRs are made on the node (by kubeadm's own `certs generate-csr`, for a worker by us), signed through any
backend or carried to a desk, proven like those of a renewal, and put in place in one recoverable step.
Not here: renewing (`bridge.renewal`), and kubeadm itself, which the operator runs afterwards.
"""
