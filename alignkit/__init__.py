"""From base weights to an aligned, measured language model with one recipe file.

Importing it loads nothing else. What programs may rely on: `__all__`, the command line, the keys of a recipe
and the files of a run directory; every other name may change.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
