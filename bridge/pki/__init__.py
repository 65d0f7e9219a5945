"""Certificates, CSRs, bundles and the checks on them: no file, no network and no clock; the time is an argument."""
