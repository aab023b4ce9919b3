"""What runs in the Python of a rival's own environment, and imports nothing of this package's.

`python workers/__main__.py NAME` answers one JSON line with another until its input ends; see `protocol`.
"""
