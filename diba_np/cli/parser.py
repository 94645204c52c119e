"""How the command line talks: help with examples, errors that suggest, tab completion."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from diba_np.cli.streams import drop, lost

SHELLS = ("bash", "zsh", "fish")


def examples(*lines: str) -> str:
    """Return the epilog of a help page: each line is a command that can be pasted."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean X?"`` for the most alike of the known words, or nothing."""
    bare = {name.lstrip("-"): name for name in known}  # the dashes are alike in all options
    matches = difflib.get_close_matches(word.lstrip("-"), list(bare), 1, 0.7)
    return f"; did you mean {bare[matches[0]]}?" if matches else ""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help pages that name the default of each option that has one and does not tell it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        names = bool(action.option_strings) and action.nargs != 0 and "default" not in text
        if names and action.default not in (None, [], argparse.SUPPRESS):
            text += " (default: %(default)s)"
        return text


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose errors suggest what was meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(*args, **options)

    def options(self) -> dict[str, argparse.Action]:
        """Return the long options, and those short ones that have no long name."""
        actions = {}
        for action in self._actions:
            if action.option_strings and action.help is not argparse.SUPPRESS:
                actions[action.option_strings[-1]] = action
        return actions

    def subparsers(self) -> dict[str, Parser]:
        """Return the subcommands by name; empty for a subcommand itself."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; an unknown option of a subcommand is told before what is missing."""
        if args is not None and not self.subparsers():
            known = [name for action in self._actions for name in action.option_strings]
            for word in args:
                if word == "--":
                    break
                name = word.partition("=")[0]
                if name.startswith("--") and not any(own.startswith(name) for own in known):
                    self.error(f"unknown option {name}{nearest(name, known)}")
        known_args, extras = super().parse_known_args(args, namespace)
        for action in self._actions:
            # as a shell's variable that is not set gives it; else it would count as not given
            if action.option_strings and getattr(known_args, action.dest, None) == "":
                self.error(f"argument {'/'.join(action.option_strings)}: must not be empty")
        for action in self._get_positional_actions():
            # older Pythons give it none of the words behind an option
            left = action.nargs == "?" and getattr(known_args, action.dest) is action.default
            if left and extras and not extras[0].startswith("-"):
                setattr(known_args, action.dest, extras.pop(0))
        return known_args, extras

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a help page or a complaint; argparse itself passes over a full disk in silence."""
        stream = file or sys.stderr
        if not message or stream is None:
            return
        try:
            stream.write(message)
            stream.flush()
        except OSError as error:
            if stream is sys.stdout:
                raise SystemExit(lost(error)) from None
            drop(stream)

    def error(self, message: str) -> NoReturn:
        """End with status 2; a wrong choice is answered with the nearest right one."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            message += nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2]))
        elif message.endswith("required: COMMAND"):
            message += f"; {self.prog} --help lists them"
        super().error(message)


class Parents(NamedTuple):
    """Options of every command, of those that write, and what those of a stored matrix read."""

    common: Parser
    writes: Parser
    reads: Parser


# -- completion ------------------------------------------------------------------------------------


def _choices(action: argparse.Action) -> str:
    return " ".join(map(str, action.choices or ()))


def completion(parser: Parser, shell: str) -> str:
    """Return a script that completes subcommands, options, choices and file names.

    Parameters
    ----------
    parser : Parser
    shell : {"bash", "zsh", "fish"}

    Returns
    -------
    str
        Static text, made from the parser; nothing of ours runs while one types.
    """
    program, commands = parser.prog, parser.subparsers()
    if shell == "fish":
        return _fish(parser, program, commands)
    cases = []
    for name, command in commands.items():
        for action in command._actions:
            values = _choices(action)
            for option in action.option_strings:
                if values:
                    cases.append(f'    "{name} {option}") words="{values}" ;;')
            if values and not action.option_strings:
                cases.append(f'    "{name} {name}") words="{values}" ;;')
    options = "\n".join(
        f'    {name}) words="{" ".join(command.options())}" ;;'
        for name, command in commands.items()
    )
    lines = _BASH if shell == "bash" else _ZSH
    return (
        lines.replace("@commands@", " ".join([*commands, *parser.options()]))
        .replace("@names@", "|".join(commands))
        .replace("@choices@", "\n".join(cases))
        .replace("@options@", options)
        .replace("@program@", program)
    )


_BASH = """# bash completion: source this file, or put it into
# ~/.local/share/bash-completion/completions/@program@
_diba_np() {
  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD - 1]}"
  local command="" word words=""
  COMPREPLY=()
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$word" in @names@) command="$word"; break ;; esac
  done
  case "$command $previous" in
@choices@
  esac
  if [ -z "$words" ]; then
    case "$command" in
    "") words="@commands@" ;;
@options@
    esac
    # a word that is no option is a file; readline's own completion finds it
    if [ -n "$command" ] && [ "${current#-}" = "$current" ]; then return; fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _diba_np @program@
"""

_ZSH = """#compdef @program@
# zsh completion: put this file as _@program@ into a folder of $fpath, or source it after compinit
_diba_np() {
  local current="${words[CURRENT]}" previous="${words[CURRENT-1]}" command="" word
  local -a typed=("${(@)words[2,CURRENT-1]}")
  for word in "${typed[@]}"; do
    case "$word" in @names@) command="$word"; break ;; esac
  done
  local words=""
  case "$command $previous" in
@choices@
  esac
  if [[ -z "$words" ]]; then
    case "$command" in
    "") words="@commands@" ;;
@options@
    esac
    if [[ -n "$command" && "$current" != -* ]]; then _files; return; fi
  fi
  compadd -- ${=words}
}
compdef _diba_np @program@
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish(parser: Parser, program: str, commands: dict[str, Parser]) -> str:
    lines = [f"# fish completion: put this file into ~/.config/fish/completions/{program}.fish"]
    for name, command in commands.items():
        lines.append(
            f"complete -c {program} -n __fish_use_subcommand -f -a {name} "
            f"-d {_quoted(command.description or '')}"
        )
    for name, command in commands.items():
        here = f"complete -c {program} -n '__fish_seen_subcommand_from {name}'"
        for own in command._actions:
            values = _choices(own)
            if not own.option_strings:
                if values:
                    lines.append(f"{here} -f -a {_quoted(values)}")
                continue
            line = here
            for option in own.option_strings:
                line += f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}"
            if own.nargs != 0:
                line += " -r" if not values else f" -x -a {_quoted(values)}"
            lines.append(f"{line} -d {_quoted((own.help or '').replace('%%', '%'))}")
    return "\n".join(lines) + "\n"
