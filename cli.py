"""From a checkout: `python cli.py ...` is the command `moec ...`."""

from moec.__main__ import main

if __name__ == "__main__":  # the processes that `bench` starts import this file again
    main()
