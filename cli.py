"""From a checkout: `python cli.py ...` is the command `moec ...`."""

from moec.cli import main

if __name__ == "__main__":  # the processes that `bench` starts import this file again
    main()
