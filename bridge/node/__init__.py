"""Reads the machine's state: certificates, kubeconfigs, manifests, the kubelet, processes; nothing is written here."""
