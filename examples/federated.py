"""Train between sites that keep their images, and compare: `federated.py --help`."""

import sys

from federated.command import main

if __name__ == "__main__":
    sys.exit(main())
