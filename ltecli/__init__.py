"""The command line: parse, call the engine, render. At module level it imports only the torch-free half of simulate."""

from importlib.metadata import version

__version__ = version("lte")
