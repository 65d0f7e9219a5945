"""Programs that measure, and write what they measured into documents; `test_measure.py` runs each once in its smallest size."""
