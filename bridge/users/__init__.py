"""Kubeconfigs for people and machines: short-lived client certificates of the cluster's CA."""
