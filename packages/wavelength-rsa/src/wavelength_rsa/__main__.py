"""`python -m wavelength_rsa`: the same as the command `wavelength-rsa`."""

import sys

from wavelength_rsa.cli import main

if __name__ == "__main__":
    sys.exit(main())
