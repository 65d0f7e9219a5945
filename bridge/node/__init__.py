"""The machine as it is: certificates, kubeconfigs, manifests, the kubelet, processes; nothing is written here."""
