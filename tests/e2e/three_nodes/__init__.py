"""Files that share three control-plane nodes, one after the other in one process (`tests.kit.plan`)."""
