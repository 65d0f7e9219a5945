"""Certificates, CSRs, bundles and checks on them, without files, network or clock; the time is an argument."""
