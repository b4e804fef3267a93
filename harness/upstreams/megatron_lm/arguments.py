"""``make arguments``: upstream's arguments, from its parser."""

from __future__ import annotations

import argparse
import logging
import textwrap
import warnings

from harness.errors import UserError


def print_arguments(match: str | None = None) -> int:
    """Print every argument of ``pretrain_gpt.py`` by upstream's groups; the exit status.

    Args:
        match: print only arguments that contain it, with their help.

    Raises:
        UserError: none contains ``match``.
    """
    groups = [
        (title, [a for a in actions if not match or match in " ".join(a.option_strings)])
        for title, actions in _groups()
    ]
    total = sum(len(actions) for _, actions in groups)
    if not total:
        raise UserError(
            f"MATCH={match}: none of upstream's arguments contains it; make arguments lists all"
        )
    for title, actions in groups:
        if actions:
            print(f"\n{title} ({len(actions)})")
        for action in actions:
            values = "|".join(map(str, action.choices)) if action.choices else ""
            default = (
                ""
                if action.default in (None, False, argparse.SUPPRESS)
                else f"  [{action.default}]"
            )
            print(f"  {', '.join(action.option_strings)} {values}".rstrip() + default)
            if match and isinstance(action.help, str):
                print(textwrap.indent(textwrap.fill(" ".join(action.help.split()), 110), "      "))
    print(
        f"\n{total} arguments"
        + (f" contain {match}" if match else "")
        + f", in {sum(1 for _, a in groups if a)} groups. "
        'Pass any: make 101 ARGS="--lr 1e-4"'
    )
    return 0


def _groups() -> list[tuple[str, list[argparse.Action]]]:
    return [
        (group.title or "other", [a for a in group._group_actions if a.option_strings])
        for group in upstream_parser()._action_groups
    ]


def upstream_parser() -> argparse.ArgumentParser:
    """The parser of ``pretrain_gpt.py``, made without warnings about this machine."""
    import_upstream()
    from megatron.training.arguments import add_megatron_arguments

    with warnings.catch_warnings(action="ignore"):
        return add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))


def import_upstream() -> None:
    """Make upstream's modules importable, and import its arguments without their warnings."""
    from harness.machine.upstream import locate, put_on_path

    put_on_path(locate())
    # it warns that there is no GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        import megatron.training.arguments  # noqa: F401
