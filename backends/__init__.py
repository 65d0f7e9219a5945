"""The CAs that ca-bridge can ask, one package each; found by entry point, never imported by `bridge`."""
