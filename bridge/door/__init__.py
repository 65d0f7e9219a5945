"""`ca-bridge serve`: one door for all nodes. It does with bundles over HTTPS what a desk does with files."""
