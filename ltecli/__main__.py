"""`python -m ltecli` is `lte`."""

import sys

from ltecli.app import main

sys.exit(main())
