"""
Memory, and the replacement of files: the state directory, the audit log, installation, backups.

Which certificates are renewed, and whether they are good, is decided elsewhere.
"""
