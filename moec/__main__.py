"""Run the command line: `moec`, and `python -m moec`."""

import os
import signal


def main() -> None:
    """Run `moec.cli.main`. Ctrl-C ends the process at once while the command line is imported."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(2))
    from moec.cli import main as run

    run()


if __name__ == "__main__":  # `bench` starts processes, which import this file again
    main()
