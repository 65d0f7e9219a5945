"""`ca-bridge serve`: one door for all nodes. What a desk does with bundles in files, this does with bundles over HTTPS."""
