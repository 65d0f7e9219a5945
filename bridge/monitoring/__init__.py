"""
For monitors: the metrics file of `renew`, and how the last runs ended.

What a metric is called and means is decided in `exposition`; `check-expiration -o prometheus` prints the same.
"""
