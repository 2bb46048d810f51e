"""Compare methods, on shares of the images too, or search a method's settings: `study.py compare --help`."""

import sys

from study.command import main

if __name__ == "__main__":
    sys.exit(main())
