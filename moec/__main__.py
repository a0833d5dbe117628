"""Run the command line: `moec`, and `python -m moec`."""

import os
import signal


def _leave(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(2)


def main() -> None:
    """Run `moec.cli.main`, and end the process at once where Ctrl-C has stopped it.

    Python itself would show a traceback while it imports the command line, and would take a second
    or two to unload torch at the end.
    """
    signal.signal(signal.SIGINT, _leave)
    from moec.cli import main as run
    from moec.cli.stopping import EXIT_CODE, stopped

    try:
        run()
    finally:
        if stopped.is_set():
            os._exit(EXIT_CODE)


if __name__ == "__main__":  # `bench` starts processes, which import this file again
    main()
