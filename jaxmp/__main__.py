"""`python -m jaxmp`: what the command line offers is in `jaxmp.cli`."""

import sys

from jaxmp.cli import main

if __name__ == "__main__":
    sys.exit(main())
