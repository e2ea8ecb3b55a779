"""Defaults of libraries that are read from the environment; `lte` and ltecli.api set them before torch is imported."""

import os

DEFAULTS = {
    # Kineto logs every trace.
    "KINETO_LOG_LEVEL": "99",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Pydantic's search for plugins reads the metadata of every installed package.
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
    # Threads that spin while they wait are tens of times slower beside other work on the same cores.
    "OMP_WAIT_POLICY": "passive",
}


def set_defaults_of_libraries() -> None:
    """Set what the environment does not say; a library that is imported already keeps its own."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
