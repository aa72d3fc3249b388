"""The version, and the versions of torch that it is tested with.

The build reads this without importing torch.
"""

__version__ = "0.1.0"

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)
