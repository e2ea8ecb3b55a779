"""`python -m ltecli` is `lte`."""

from ltecli.app import script

script()
