import sys

from examples.camvid.cli import main

if __name__ == "__main__":
    sys.exit(main())
