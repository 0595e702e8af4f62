import sys

from fastfuse.cli import main

sys.exit(main())
