"""The cluster's Kubernetes API, for a node and for the gateway: rights and servers (`access`), requests (`api`)."""
