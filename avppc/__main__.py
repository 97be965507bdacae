"""`python -m avppc` is `avppc`."""

import sys

from avppc.cli import main

sys.exit(main())
