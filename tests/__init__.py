"""The tests; they run against the installed wheel, and import their own helpers as `tests.kit`."""
