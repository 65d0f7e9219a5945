"""The real programs, PKIs and nodes that the tests run against."""
