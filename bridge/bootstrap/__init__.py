"""
Day 0: all that a new node needs before `kubeadm init` or `kubeadm join`, signed by a CA elsewhere.

Keys and CSRs are made on the node (by `kubeadm certs generate-csr`; for a worker by us), signed through any backend or
by a desk, proven as in a renewal, and put in place in one recoverable step. The operator runs kubeadm afterwards.
"""
