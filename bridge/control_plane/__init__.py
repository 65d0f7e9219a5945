"""
Looking at the control plane's components, here and on other nodes, and restarting them.

Why something is restarted, and what a failure means for a renewal, is known in `bridge.renewal`.
"""
