"""The command line: parse, call the engine, render. At module level it imports only the torch-free half of simulate."""

PACKAGE = "lte"


def version() -> str:
    """Return the installed version."""
    from importlib.metadata import version as installed  # a tenth of the start-up time, and seldom needed

    return installed(PACKAGE)
