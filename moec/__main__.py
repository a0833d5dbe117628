"""Run the command line by `python -m moec`."""

from moec.cli import main

if __name__ == "__main__":  # `bench` starts processes, which import this file again
    main()
