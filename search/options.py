"""What several verbs take, and the console that they print to."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search.config import UserError

# A piped table is for a file or a pager: wide, not cut to the 80 columns that rich assumes.
console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


def home(path: Path | None) -> Path | None:
    """~ in an option such as --out=~/x is left to us by shells. An address is refused: it would become a folder s3:."""
    if path and re.match("[a-z][a-z0-9+.-]+:/", str(path)):
        raise UserError(f"{path} is an address; give a file or a folder of this machine")
    return path.expanduser() if path else path


Address = Annotated[
    str, typer.Option(metavar="ADDRESS", help="local starts a Ray here; auto or HOST:PORT joins one that runs.")
]
Name = Annotated[str | None, typer.Option(metavar="NAME", help="The run's name; its folder is STORAGE/NAME.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="A setting, as often as wanted; A.B+=VALUE appends to a list."),
]
