"""
The cluster's Kubernetes API: who asks (`client`), with whose rights and where (`access`), and the one client (`api`).

For a few requests about other nodes as well as for the gateway's thousands. Not here: what is asked.
"""
