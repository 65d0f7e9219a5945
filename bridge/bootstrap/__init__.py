"""Day 0: what a new node needs before the operator runs `kubeadm init` or `kubeadm join`, signed by a CA elsewhere."""
