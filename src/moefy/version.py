"""The version of the code that runs, also of an editable install made before."""

__version__ = "0.2.0"
