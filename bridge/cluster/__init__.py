"""
The cluster's Kubernetes API: who asks, with whose rights, and where (`access`), and the one client of it (`api`).

For a few requests about other nodes as well as for the gateway's thousands. Not here: what is asked.
"""
