"""The current date as seen by chat templates.

Templates of Llama 3, Granite, SmolLM3, Mistral and others print the current date into the system
prompt. A run that is resumed the next day would train on different tokens, and so would clients in
other time zones. So each run has a fixed date, which replaces the clock in templates.
"""

from __future__ import annotations

import string
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from fedmomentum.errors import ConfigError

DEFAULT_DATE = "2024-07-26"
"""The date that Llama's templates print if they are given no clock."""

_ATTRIBUTE = "fedmomentum_chat_date"

# The clock that transformers gives to templates is a function, and functions cannot be passed as
# template arguments. Instead, a macro of the same name is prepended to the template. Its trailing
# line break is dropped, so that the template's own first line stays at the start of a line.
_CLOCK = """\
{%- macro strftime_now(format) -%}
{%- set date = namespace(text=format.replace('%%', '\ue000')) -%}
{%- for directive, value in fedmomentum_date.items() -%}
{%- set date.text = date.text.replace(directive, value) -%}
{%- endfor -%}
{{- date.text.replace('\ue000', '%') -}}
{%- endmacro %}
"""


def parse_date(text: str) -> datetime:
    """Parse an ISO 8601 date; return its midnight.

    Raises:
        ConfigError: If the text is not such a date.
    """
    try:
        day = datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        day = None
    if day is None or day.date().isoformat() != text:
        raise ConfigError(f"model.chat-date must be a date, YYYY-MM-DD; got {text!r}")
    return day


def set_chat_date(tokenizer: Any, date: str) -> None:
    """Set the date shown in all chats rendered with this tokenizer from now on.

    Raises:
        ConfigError: If it is not a date.
    """
    parse_date(date)
    setattr(tokenizer, _ATTRIBUTE, date)


def check_chat_date(tokenizer: Any, date: str) -> None:
    """Reject a run whose chats show a different date from those rendered with this tokenizer.

    Raises:
        ConfigError: If the chat template's output would differ with that date.
    """
    if tokenizer.chat_template is None:
        return
    own_date = getattr(tokenizer, _ATTRIBUTE, DEFAULT_DATE)
    if _template_arguments(tokenizer, date) != _template_arguments(tokenizer, own_date):
        raise ConfigError(
            f"the run's chats show the date {date}, and model.chat-date here is {own_date}: set it "
            "to the run's, for otherwise this client would train on other tokens than the others"
        )


def date_arguments(tokenizer: Any) -> dict[str, Any]:
    """Return the arguments of `apply_chat_template` that make it show the tokenizer's date.

    `strftime_now` is the clock that transformers gives to templates. `date_string` is a variable
    of some templates (Llama's), which fall back to their own fixed date: it is passed only if the
    run's date differs from the default. A template that uses neither gets no argument.
    """
    return _template_arguments(tokenizer, getattr(tokenizer, _ATTRIBUTE, DEFAULT_DATE))


def _template_arguments(tokenizer: Any, date: str) -> dict[str, Any]:
    """Return the arguments that make a tokenizer's template show a date."""
    template = tokenizer.get_chat_template()
    arguments: dict[str, Any] = {}
    if "strftime_now" in template:
        arguments["chat_template"] = _CLOCK + template
        arguments["fedmomentum_date"] = _format_directives(date)
    if "date_string" in template and date != DEFAULT_DATE:
        arguments["date_string"] = parse_date(date).strftime("%d %b %Y")
    return arguments


@lru_cache(maxsize=8)
def _format_directives(date: str) -> dict[str, str]:
    """Return the `strftime` output of each directive, including those like `%-d` without zeros."""
    day = parse_date(date)
    # Seconds since 1970 would depend on the machine's time zone.
    seconds = str(int(day.replace(tzinfo=UTC).timestamp()))
    formatted = {}
    for letter in string.ascii_letters:
        for flag in ("", "-", "_", "^"):
            directive = f"%{flag}{letter}"
            value = seconds if letter == "s" else day.strftime(directive)
            if value != directive:
                formatted[directive] = value
    return formatted
