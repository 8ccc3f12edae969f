"""`fedcli` and `python -m fedcli`: so small that Ctrl-C during the imports is caught too."""

import gc
import os
import sys
from typing import NoReturn


def entry_point() -> NoReturn:
    """The console script."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some costs each command 20 ms
    try:
        gc.disable()  # imports make objects that stay: collections on the way find nothing
        from fedcli.cli import main

        gc.enable()
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may know ASCII only
        code = main()
    except KeyboardInterrupt:
        code = 130
    gc.freeze()  # nor is anything to be found at the end: the system takes the memory back
    sys.exit(code)


if __name__ == "__main__":
    entry_point()
