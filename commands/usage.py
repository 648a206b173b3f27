"""What is wrong in how a command was typed, in the words that a configuration's mistakes have."""

import re
from typing import Any

from typer.core import TyperCommand

from pgt_diag.config import meant, must_be_one_of, shorten

_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number"}
_LIMITS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
_WORDINGS = {
    r"^Option '(.*)' requires an argument\.$": r"\1 needs a value",
    r"^Option '(.*)' does not take a value\.$": r"\1 takes no value",
    "Value error, ": "",  # pydantic's
}
_NAMED = {"runs": "name run directories", "run": "name a run directory"}


class PlainFlags(TyperCommand):
    """A command whose help says of a flag that it is there, and not `<bool>`."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters."""
        return without_types_of_flags(super().get_params(ctx))


def without_types_of_flags(params: Any) -> Any:
    """Take away what the help shows beside options that have no value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def explain(error: Any) -> str:
    """Return one line about a mistake that typer found: in its own words where it is a new kind."""
    kind, context, param = type(error).__name__, error.ctx, getattr(error, "param", None)
    message = str(error.format_message())
    if kind == "NoSuchOption":
        message = _no_such_option(error.option_name, context)
    elif kind == "MissingParameter" and param is not None:
        message = f"{param.name.upper()} is missing: {_NAMED.get(param.name, param.help)}"
    elif kind == "BadParameter" and param is not None:
        message = _bad_value(max(param.opts, key=len), error.__cause__) or message
    elif match := re.match(r"No such command '(.*?)'\.", message):
        near = meant(match[1], context.command.commands, quote="")
        message = f"no such command: {match[1]}{near or '; see pgt-diag --help'}"
    elif match := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        message = f"unexpected: {match[1]}; see {context.command_path} --help"
    for typers, ours in _WORDINGS.items():
        message = re.sub(typers, ours, message)
    return message


def _no_such_option(option: str, context: Any) -> str:
    names = [name for param in context.command.params for name in param.opts] if context else []
    by_key = {name.lstrip("-").replace("-", "_"): name for name in names if name.startswith("--")}
    near = meant(option.lstrip("-"), by_key, quote="", shown=by_key)
    path = context.command_path if context else "pgt-diag"
    return f"no such option: {option}{near or f'; see {path} --help'}"


def _bad_value(option: str, cause: Any) -> str | None:
    """Return what is wrong with an option's value, as pydantic found it; None if it is new here."""
    found = cause.errors()[0] if hasattr(cause, "errors") else {}
    kind, value = found.get("type"), found.get("input")
    if kind in _KINDS:
        return f"{option} is {value!r}; it must be {_KINDS[kind]}"
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"{option} is {shorten(value)}; it must be a number of {words} {found['ctx'][key]:g}"
    choices = re.findall(r"'([^']*)'", str(found.get("msg", "")).partition(" is not one of ")[2])
    return f"{option} is {value!r}; {must_be_one_of(choices)}" if choices else None
