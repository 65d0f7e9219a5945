"""Memory, and the replacement of files: the state directory, the audit log, installation, backups, static pods."""
