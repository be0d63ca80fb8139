"""WILL it work: what can be known before any training.

Nothing here trains, writes outside a temporary directory, or goes to the network.
"""

from __future__ import annotations
