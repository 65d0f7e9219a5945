"""Policies of a desk for tests of what asks it, not of the policy."""

#: All of kubeadm's certificates with whatever names the conformance suite gives them, without proofs.
ALL_NAMES = """\
[desk]
name = "desk-1"

[allow]
clusters = ["kubernetes"]
nodes = ["cp-*"]
masters = ["super-admin.conf"]
proof = "optional"

[certificate.apiserver]
sans = ["{node}", "kubernetes", "kubernetes.default", ".default.svc", "kubernetes.default.svc", ".svc.cluster.local", ".example.com", "*.wild.example.com", "0.0.0.0/0", "::/0"]

[certificate.etcd-server]
sans = ["{node}", "localhost", "0.0.0.0/0", "::/0"]

[certificate.etcd-peer]
sans = ["{node}", "localhost", "0.0.0.0/0", "::/0"]

[certificate.kubelet-server]
sans = ["{node}", "0.0.0.0/0", "::/0"]

[certificate.controller-manager-server]
sans = ["{node}", "0.0.0.0/0", "::/0"]

[certificate.scheduler-server]
sans = ["{node}", "0.0.0.0/0", "::/0"]
"""
