"""`python -m recognition` is the command `recognition`. Nothing else happens here."""

import sys

from recognition.cli import main

if __name__ == "__main__":
    sys.exit(main())
