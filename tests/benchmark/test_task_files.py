"""Task files are data: what could run code, download, or give wrong scores is refused by name."""

import pytest

from fedmomentum.benchmark.task_files import parse_task, read_task
from fedmomentum.benchmark.tasks import make_task
from fedmomentum.errors import ConfigError, DataError
from tests.benchmark.files import QUESTIONS, write_choices, write_programs, write_rows, write_sums
from tools.benchmark_tasks import GSM8K, HUMANEVAL, choice_yaml

CHOICE = choice_yaml("choices")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHOICE + "process_results: !function os.system\n", "line 17.*Python code.*pass_at_1"),
        (CHOICE + "doc_to_text: !function utils.text\n", "!function utils.text: a task file may"),
        (CHOICE.replace("metric: acc,", "metric: !function utils.mine,"), "!function utils.mine"),
        (CHOICE + "x: !!python/object/apply:os.system [ls]\n", "not valid YAML.*python/object"),
        (CHOICE + "include: other.yaml\n", "unknown field `include`"),
        (CHOICE + "class: mine\n", "unknown field `class`"),
        (CHOICE + "custom_dataset: mine\n", "unknown field `custom_dataset`"),
        (CHOICE.replace("path: json", "path: openai/gsm8k"), "dataset_path: Invalid enum value"),
        (CHOICE.replace("metric: acc,", "metric: acc, hf_evaluate: true,"), "hf_evaluate"),
        (CHOICE.replace("metric: acc,", "metric: f1,"), "Invalid enum value 'f1'"),
        (CHOICE.replace("metric: acc,", "metric: exact_match,"), "metric_list.*acc, acc_bytes"),
        (CHOICE.replace("aggregation: mean", "aggregation: median"), "Invalid enum value 'median'"),
        (CHOICE + "a: &x [1]\nb: *x\n", "line 18: no aliases"),
        (CHOICE + "description: '{{ 1 }}'\n", "description: no template"),
        (CHOICE.replace("doc_to_choice: choices\n", ""), "doc_to_choice: tasks of multiple_choice"),
        (GSM8K.replace("do_sample: false", "do_sample: true"), "do_sample: Invalid enum value"),
        (GSM8K.replace("temperature: 0.0", "temperature: 0.7"), "temperature: Expected `float` <="),
        (GSM8K.replace("      - {function: take_first}\n", "", 1), "strict-match must end in take"),
        (GSM8K.replace("function: take_first", "function: custom"), "Invalid enum value 'custom'"),
        (GSM8K.replace("####", "("), "no regular expression"),
        (HUMANEVAL.replace("unsafe_code: true", "unsafe_code: false"), "unsafe_code: true"),
        (HUMANEVAL.replace("pass_at_1, agg", "exact_match, agg"), "such a task has pass_at_1"),
        ("- a\n- b\n", "Expected `object`, got `array`"),
        ("a: [", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("{[1]: 2}", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML|unknown field|missing required"),
    ],
)
def test_what_is_not_of_the_declared_form_is_refused_by_name(text, message):
    with pytest.raises(DataError, match=message) as refusal:
        parse_task(text.encode(), "mine.yaml")
    assert str(refusal.value).startswith("mine.yaml")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ question.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('ls') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ nothing }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_reach_nothing_but_their_row(tmp_path, template):
    write_choices(tmp_path)
    file = tmp_path / "choices.yaml"
    file.write_text(file.read_text().replace(r'"Question: {{question}}\nAnswer:"', repr(template)))
    with pytest.raises(DataError, match="choices.yaml: doc_to_text: "):
        make_task(read_task(tmp_path, "choices"))


def test_names_lead_to_no_other_directory(tmp_path):
    write_choices(tmp_path / "a")
    write_choices(tmp_path)
    assert read_task(tmp_path, "choices").file.task == "choices"
    for name in ("a/choices", "../choices", "nothing", "", "choices.yaml"):
        with pytest.raises(ConfigError, match="no task .*its tasks are choices"):
            read_task(tmp_path, name)
    with pytest.raises(ConfigError, match="it has no task files.*docs/benchmarks.md"):
        read_task(tmp_path / "nowhere", "choices")
    (tmp_path / "other.yaml").write_text(CHOICE)
    with pytest.raises(DataError, match="task is 'choices'; it must be the file's name, 'other'"):
        read_task(tmp_path, "other")


def test_data_are_local_rows_with_the_same_columns(tmp_path):
    write_choices(tmp_path)
    yaml = tmp_path / "choices.yaml"
    text = yaml.read_text()
    yaml.write_text(text.replace("choices_test.jsonl", "https://example.com/x.jsonl"))
    with pytest.raises(DataError, match="there is no file .*local JSON Lines files"):
        read_task(tmp_path, "choices")
    yaml.write_text(text.replace("test_split: test", "test_split: dev"))
    with pytest.raises(DataError, match="data_files has no split 'dev'"):
        read_task(tmp_path, "choices")
    yaml.write_text(text)
    file = tmp_path / "choices_test.jsonl"
    file.write_text('{"question": "a", "choices": ["x", "y"], "answer": 0}\n{"question": "a"}\n')
    with pytest.raises(DataError, match="line 2: its columns are question; those of the first"):
        read_task(tmp_path, "choices")
    file.write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        read_task(tmp_path, "choices")
    file.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: Expected `object`, got `array`"):
        read_task(tmp_path, "choices")


def test_the_hash_is_over_the_file_and_its_data(tmp_path):
    write_choices(tmp_path)
    first = read_task(tmp_path, "choices").sha256
    assert read_task(tmp_path, "choices").sha256 == first
    write_rows(tmp_path / "choices_test.jsonl", QUESTIONS[1:])
    assert read_task(tmp_path, "choices").sha256 != first
    write_rows(tmp_path / "choices_test.jsonl", QUESTIONS)
    file = tmp_path / "choices.yaml"
    file.write_text(file.read_text() + "# more\n")
    assert read_task(tmp_path, "choices").sha256 != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "row 2 of test: the answer 3 is none of its 3 choices"),
        ({"answer": -1}, "the answer -1 is none"),
        ({"answer": 7}, "the answer 7 is none"),
        ({"choices": ["x"]}, "gives no list of two choices"),
        ({"choices": ["x", "", "y"]}, "a choice is no text, or empty"),
        ({"choices": ["x", "x", "y"]}, "two choices are the answer, 'x'"),
        ({"question": "  "}, None),
    ],
)
def test_rows_that_can_only_be_scored_wrong_are_refused(tmp_path, change, message):
    rows = [dict(QUESTIONS[0]), {**QUESTIONS[1], **change}, QUESTIONS[2]]
    write_choices(tmp_path, rows=rows)
    if message is None:
        make_task(read_task(tmp_path, "choices"))
        return
    with pytest.raises(DataError, match=message):
        make_task(read_task(tmp_path, "choices"))


def test_worked_examples_come_from_another_split(tmp_path):
    write_sums(tmp_path, num_fewshot=9)
    with pytest.raises(DataError, match="9 worked examples are wanted; train has 8"):
        make_task(read_task(tmp_path, "gsm8k"))
    make_task(read_task(tmp_path, "gsm8k"), 8)
    file = tmp_path / "gsm8k.yaml"
    file.write_text(file.read_text().replace("fewshot_split: train", "fewshot_split: test"))
    with pytest.raises(DataError, match="need fewshot_split, another one than test_split"):
        make_task(read_task(tmp_path, "gsm8k"), 1)
    make_task(read_task(tmp_path, "gsm8k"), 0)


def test_rows_of_programs_have_the_columns_that_are_run(tmp_path):
    write_programs(tmp_path)
    make_task(read_task(tmp_path, "humaneval"))
    write_rows(tmp_path / "humaneval_test.jsonl", [{"prompt": "x", "test": "y", "entry_point": 3}])
    with pytest.raises(DataError, match="row 1 has no text in column 'entry_point'"):
        make_task(read_task(tmp_path, "humaneval"))
