import sys

try:
    from examples.camvid.cli import main
except KeyboardInterrupt:  # imports take seconds
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
