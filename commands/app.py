"""The `pgt-diag` application: its commands, and the one place where an error ends the process."""

import errno
from typing import Any

import typer
from typer.core import TyperGroup

import pgt_diag
from commands import bench, check, doctor, report, show, sweep, train, watch
from commands.streams import flush, make_safe
from commands.usage import PlainFlags, explain, without_types_of_flags
from pgt_diag.config import as_typed
from pgt_diag.errors import PgtDiagError
from pgt_diag.text import printable

USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""ClickException, base of the errors in how a command was typed; typer keeps it to itself."""

EPILOG = """\b
Examples:
  pgt-diag train --method pgt --run-dir runs/pgt    a minute on embedded digits
  pgt-diag train --run-dir runs/pgt --resume        go on after a crash
  pgt-diag report runs --open                       one HTML file, in the browser
  pgt-diag doctor                                   is this machine ready?
  pgt-diag train --help                             every option, with examples
"""


class _PlainHelp(TyperGroup):
    """The overview without rich, whose import alone would double the time it takes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Any) -> Any:
        return without_types_of_flags(super().get_params(ctx))


app = typer.Typer(
    name="pgt-diag",
    cls=_PlainHelp,
    help="Which filters die while a convolutional network trains without normalisation, when, "
    "why, and what helps.",
    epilog=EPILOG,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=train.EPILOG, cls=train.TrainCommand)(train.train)
for command in (sweep, report, show, watch, check, doctor, bench):
    name = command.__name__.rpartition(".")[2]
    app.command(epilog=command.EPILOG, cls=PlainFlags)(getattr(command, name))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pgt-diag {pgt_diag.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Show the overview when no command is given."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    make_safe()
    code = _run(arguments)
    error = flush()
    return _refused(error) if error and not code else code


def _run(arguments: list[str] | None) -> int:
    try:
        code = app(arguments, prog_name="pgt-diag", standalone_mode=False)
    except PgtDiagError as error:
        return _fail(as_typed(str(error)), error.exit_code)
    except USAGE_ERROR as error:
        return _fail(explain(error), 2)
    except OSError as error:
        # A path that the system refuses, wherever it is first touched.
        refused = error.filename is None and error.errno in _OF_OUTPUT
        told = f"{error.filename or 'system'}: {error.strerror or error}"
        return _refused(error) if refused else _fail(told, 3)
    except MemoryError:
        return _fail("out of memory", 3)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return int(code or 0)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_OUTPUT = (*_FULL, errno.EIO, errno.EBADF)
"""Errors without a file's name that only standard output is left for."""


def _refused(error: OSError) -> int:
    return _fail(f"standard output: {error.strerror}", 4 if error.errno in _FULL else 3)


def _fail(message: str, code: int) -> int:
    if not message:  # another process of the run has said it
        return code
    line = " ".join(message.split())
    from commands.terminal import say

    say(f"pgt-diag: error: {printable(line, 2000)}", stderr=True)
    return code
