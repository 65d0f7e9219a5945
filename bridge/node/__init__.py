"""
The machine as it is: certificates, kubeconfigs, manifests, the kubelet, processes. Looks only.

Nothing is written here, and nothing outside the machine is asked.
"""
