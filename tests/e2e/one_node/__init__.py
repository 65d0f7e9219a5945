"""Files that share one control-plane node, one after the other in one process (`tests.kit.plan`)."""
