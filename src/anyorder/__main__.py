"""`python -m anyorder`, as the command `anyorder`."""

import sys

from anyorder.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
