"""ca-bridge: renews a kubeadm control plane's certificates through a CA that lives elsewhere."""
