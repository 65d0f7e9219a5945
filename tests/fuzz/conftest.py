"""atheris is in no dependency group: it pays over hours, and has wheels for some Pythons only."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("atheris") else ["test_atheris.py"]
