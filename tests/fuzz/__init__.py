"""What comes from outside, spoilt at random; see `targets.py`."""
