"""`ca-bridge serve`, the door for all nodes: it signs bundles over HTTPS, as a CA desk signs files."""
