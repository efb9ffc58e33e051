"""`python -m ossia`, the same as the command `ossia`."""

import sys

from ossia.cli import main

sys.exit(main())
