"""The date that chat templates take for today's: part of the run, so that tokens do not change overnight.

Templates of Llama 3, Granite, SmolLM3, Mistral and others print the date of the day into the system prompt. A run
that is resumed the next day would train on other tokens, and so would clients in other time zones. So a run has one
date, and whatever a template would read from the clock is read from that.
"""

from __future__ import annotations

import string
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from fedmomentum.errors import ConfigError

DEFAULT_DATE = "2024-07-26"
"""The date which Llama's templates print where they are given no clock."""

_ATTRIBUTE = "fedmomentum_chat_date"

# The clock that transformers offers to templates is a function, and functions cannot be given to a template from
# outside. A macro of the same name at the template's head takes its place. The line break behind it belongs to it: it
# is dropped, and the template's own first line is at the start of a line, as it would be without.
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
    """Return the day in ISO 8601, at midnight.

    Raises:
        ConfigError: If the text is no such date.
    """
    try:
        day = datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        day = None
    if day is None or day.date().isoformat() != text:
        raise ConfigError(f"model.chat-date must be a date, YYYY-MM-DD; got {text!r}")
    return day


def set_chat_date(tokenizer: Any, date: str) -> None:
    """Have every chat that is written with this tokenizer from now on show this date.

    Raises:
        ConfigError: If it is no date.
    """
    parse_date(date)
    setattr(tokenizer, _ATTRIBUTE, date)


def check_chat_date(tokenizer: Any, date: str) -> None:
    """Refuse a run whose chats show another date than those that were written with this tokenizer.

    Raises:
        ConfigError: If its chat template would write other text at that date.
    """
    own = getattr(tokenizer, _ATTRIBUTE, DEFAULT_DATE)
    if tokenizer.chat_template is not None and _arguments(tokenizer, date) != _arguments(tokenizer, own):
        raise ConfigError(
            f"the run's chats show the date {date}, and model.chat-date here is {own}: set it to the run's, for "
            "otherwise this client would train on other tokens than the others"
        )


def date_arguments(tokenizer: Any) -> dict[str, Any]:
    """Return what `apply_chat_template` must be given so that the template shows the tokenizer's date.

    `strftime_now` is the clock that transformers offers to templates. `date_string` is a variable of some templates
    (Llama's), which have a fixed date of their own where it is not given: it is given only where a run sets a date of
    its own. A template that knows neither is given nothing.
    """
    return _arguments(tokenizer, getattr(tokenizer, _ATTRIBUTE, DEFAULT_DATE))


def _arguments(tokenizer: Any, date: str) -> dict[str, Any]:
    template = tokenizer.get_chat_template()
    arguments: dict[str, Any] = {}
    if "strftime_now" in template:
        arguments["chat_template"] = _CLOCK + template
        arguments["fedmomentum_date"] = _directives(date)
    if "date_string" in template and date != DEFAULT_DATE:
        arguments["date_string"] = parse_date(date).strftime("%d %b %Y")
    return arguments


@lru_cache(maxsize=8)
def _directives(date: str) -> dict[str, str]:
    """Return what `strftime` makes of each directive, those without zeros in front (`%-d`) included."""
    day = parse_date(date)
    found = {}
    for letter in string.ascii_letters:
        for flag in ("", "-", "_", "^"):
            directive = f"%{flag}{letter}"
            # Seconds since 1970 would depend on the machine's time zone.
            value = str(int(day.replace(tzinfo=UTC).timestamp())) if letter == "s" else day.strftime(directive)
            if value != directive:
                found[directive] = value
    return found
