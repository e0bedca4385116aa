"""Templates that print the date of the day: one date for the whole run, whatever the clock says."""

import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import transformers.utils.chat_template_utils as templates

from fedmomentum.config.toml import load_config
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import prompt_token_ids, tokenize
from fedmomentum.errors import ConfigError
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.utils.chat_date import DEFAULT_DATE, date_arguments, set_chat_date
from tests.runs import chain, nudge, prepare, start, timeless, tiny_config
from tests.tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer

HEAD = "{%- for m in messages %}{%- if loop.first %}"
TAIL = (
    "{%- endif %}{{- '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] + '<|im_end|>' }}{%- "
    "endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
SYSTEM = "{{- '<|im_start|>system\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '<|im_end|>' }}"
TEMPLATES = {
    "Llama 3.1": (
        "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        + HEAD
        + SYSTEM
        + TAIL
    ),
    "Llama 3.2": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 "
        "Jul 2024' %}"
        "{%- endif %}{%- endif %}" + HEAD + SYSTEM + TAIL
    ),
    "Granite": (
        HEAD + "{%- set text = 'Knowledge Cutoff Date: April 2024.\\nToday\\'s Date: ' + "
        "strftime_now('%B %d, %Y') + "
        "'.\\nYou are Granite, developed by IBM.' %}{{- '<|im_start|>system' + text + "
        "'<|im_end|>\\n' }}" + TAIL
    ),
    "SmolLM3": (
        HEAD + "{%- set today = strftime_now('%d %B %Y') -%}{{- '<|im_start|>system\\n## "
        "Metadata\\n\\n' -}}"
        "{{- 'Knowledge Cutoff Date: June 2025\\n' -}}{{- 'Today Date: ' ~ today ~ '\\n' -}}{{- "
        "'<|im_end|>' -}}" + TAIL
    ),
}
SHOWN = {
    "Llama 3.1": "26 Jul 2024",
    "Llama 3.2": "26 Jul 2024",
    "Granite": "July 26, 2024",
    "SmolLM3": "26 July 2024",
}
READS_THE_CLOCK = ("Llama 3.2", "Granite", "SmolLM3")
CHAT = ({"role": "user", "content": "hi"},)


@pytest.fixture
def clock(monkeypatch):
    """Sets the day that transformers takes for today."""

    def set_day(day: datetime) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return day

        monkeypatch.setattr(templates, "datetime", Clock)

    return set_day


def ids_of(tokenizer):
    tokens = tokenize(
        [Example(CHAT, "yes")], tokenizer, max_length=500, max_truncated_fraction=0.0, owner="north"
    )
    return tokens.input_ids[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_of_training_and_generation_do_not_change_overnight(name, clock):
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    found, stock = [], []
    for day in (datetime(2031, 3, 5, 23, 59), datetime(2031, 3, 6)):
        clock(day)
        found.append((ids_of(tokenizer), prompt_token_ids(CHAT, tokenizer)))
        stock.append(tokenizer.apply_chat_template(list(CHAT), tokenize=False))
    assert found[0] == found[1] and found[0][0][: len(found[0][1])] == tuple(found[0][1])
    assert SHOWN[name] in tokenizer.decode(found[0][0])
    assert (stock[0] != stock[1]) == (name in READS_THE_CLOCK)  # what there would be without


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Llama 3.1", "01 Feb 2030"),
        ("Llama 3.2", "01 Feb 2030"),
        ("Granite", "February 01, 2030"),
        ("SmolLM3", "01 February 2030"),
    ],
)
def test_a_configured_date_is_shown(name, shown):
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    set_chat_date(tokenizer, "2030-02-01")
    assert shown in tokenizer.decode(ids_of(tokenizer))


def test_a_template_gets_only_the_variables_it_uses():
    tokenizer = tiny_tokenizer()
    set_chat_date(tokenizer, "2030-02-01")
    assert date_arguments(tokenizer) == {}
    llama = tiny_tokenizer(TEMPLATES["Llama 3.1"].replace("26 Jul 2024", "1 Jan 1990"))
    assert date_arguments(llama) == {} and "1 Jan 1990" in llama.decode(
        ids_of(llama)
    )  # its own fixed date stays


FORMATS = [
    "%Y-%m-%d",
    "%A %-d. %B %y",
    "100%% on %F at %H:%M:%S %p",
    "%j %U %w",
    "%D",
    "%d%%d",
    "no directive",
    "%",
]


@pytest.mark.parametrize("text", FORMATS)
def test_every_format_is_written_as_the_clock_would(text):
    template = "{{ '<|im_start|>' + strftime_now(" + repr(text) + ") }}{{ messages[-1].content }}"
    tokenizer = tiny_tokenizer(template)
    set_chat_date(tokenizer, "2029-01-07")
    found = tokenizer.apply_chat_template(list(CHAT), tokenize=False, **date_arguments(tokenizer))
    assert found == "<|im_start|>" + datetime(2029, 1, 7).strftime(text) + "hi"


@pytest.mark.parametrize(
    "head",
    [
        "",
        "\n",
        "\n\n",
        "  ",
        " \n",
        "x",
        "  {# note #}",
        "  {% if true %}y{% endif %}",
        "{%- if true %} y{% endif %}",
    ],
)
@pytest.mark.parametrize(
    "inner",
    [
        "{{ strftime_now('%Y') }}",
        "{% macro m() %}{{ strftime_now('%Y') | int + 1 }}{% endmacro %}{{ m() }}",
    ],
)
def test_nothing_else_of_a_template_changes(head, inner, clock):
    """Blanks and line ends at its head least of all."""
    tokenizer = tiny_tokenizer(
        head + inner + "{% for m in messages %} {{ m.content }}\n{% endfor %}"
    )
    clock(datetime(2024, 7, 26))
    stock = tokenizer.apply_chat_template(list(CHAT), tokenize=False)
    assert (
        tokenizer.apply_chat_template(list(CHAT), tokenize=False, **date_arguments(tokenizer))
        == stock
    )


@pytest.mark.parametrize(
    "date", ["", "today", "2024-13-01", "26 Jul 2024", "2024-7-26T10:00", "2024-07-26 "]
)
def test_an_invalid_date_is_refused(date, tmp_path):
    with pytest.raises(ConfigError, match="model.chat-date must be a date, YYYY-MM-DD; got"):
        tiny_config(tmp_path, model={"chat_date": date})


def test_a_run_resumed_the_next_day_gives_the_same_bits(tmp_path, clock):
    base = tiny_llama(tmp_path / "base", chat_template=TEMPLATES["SmolLM3"])
    config = tiny_config(
        tmp_path, model={"name": str(base)}, federation={"num_rounds": 2}, data={"max_length": 200}
    )
    clock(datetime(2031, 3, 5))
    start(config, tmp_path / "whole", function=None)

    class Killed(Exception):
        pass

    def killed_in_round_2(event, facts):
        if event == "round" and facts["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        start(config, tmp_path / "run", function=None, observer=killed_in_round_2)
    assert load_config(tmp_path / "run" / "config.toml").model.chat_date == DEFAULT_DATE
    clock(datetime(2031, 3, 5) + timedelta(days=400))
    start(config, tmp_path / "run", function=None, resume=True)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert json.dumps(chain(tmp_path / "run")) == json.dumps(chain(tmp_path / "whole"))


def test_a_run_keeps_its_date_and_refuses_another(tmp_path):
    base = tiny_llama(tmp_path / "base", chat_template=TEMPLATES["Granite"])
    model = {"name": str(base), "chat_date": "2030-02-01"}
    config = tiny_config(
        tmp_path, model=model, federation={"num_rounds": 1}, data={"max_length": 200}
    )
    run = start(config, tmp_path / "run")
    tokenizer = run.local.tokenizer
    assert all(
        "February 01, 2030" in tokenizer.decode(client.train.input_ids[0]) for client in run.clients
    )
    assert load_config(tmp_path / "run" / "config.toml").model.chat_date == "2030-02-01"
    other = tiny_config(
        tmp_path, model={**model, "chat_date": "2030-02-02"}, federation={"num_rounds": 2}
    )
    with pytest.raises(ConfigError, match="these differ: .*model.chat-date"):
        prepare(other, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "is_refused"), [("Granite", True), ("Llama 3.1", True), ("plain", False)]
)
def test_a_party_with_another_date_is_left_out_where_its_template_would_show_it(
    name, is_refused, tmp_path
):
    base = tiny_llama(tmp_path / "base", chat_template=TEMPLATES.get(name, CHAT_TEMPLATE))
    config = tiny_config(
        tmp_path, model={"name": str(base)}, federation={"num_rounds": 1}, data={"max_length": 200}
    )
    other = replace(config, model=replace(config.model, chat_date="2030-02-01"))
    steps = {}
    for client_id, settings in (("site0", config), ("site1", config), ("site2", other)):
        client = prepare_client(settings, client_id, tmp_path / client_id)
        client.training_function = nudge
        steps[client_id] = client.handle
    run_federation(InProcessTransport(steps), config, tmp_path / "run")
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site1"] + ["site2"] * (not is_refused)
    if is_refused:
        reason = "the run's chats show the date 2024-07-26, and model.chat-date here is 2030-02-01"
        assert reason in row["failures"]["site2"]
