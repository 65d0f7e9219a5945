"""Looks at the control plane's components, here and on other nodes, and restarts them; `bridge.renewal` says when."""
