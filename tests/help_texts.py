"""`python -m help_texts MODULE...`: what `python -m MODULE --help` prints, as {MODULE: text} in
JSON. In one process, so that what the modules share is imported once.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys


def help_of(module: str) -> str:
    """SystemExit if the module ends with another code than 0."""
    out, sys.argv = io.StringIO(), [module, "--help"]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    return out.getvalue()


if __name__ == "__main__":
    print(json.dumps({module: help_of(module) for module in sys.argv[1:]}))
