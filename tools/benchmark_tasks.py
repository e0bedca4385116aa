"""Make task files for `fedmomentum benchmark` from local copies of public data sets.

    python tools/benchmark_tasks.py --data DIR --out benchmark-tasks

DIR holds any of these, and the others are left out:

    gsm8k/{train,test}.jsonl                openai/grade-school-math
    arc_easy/{train,test}.json              the LLM-Adapters layout
    arc_challenge, openbookqa, boolq
    humaneval/HumanEval.jsonl.gz            openai/human-eval

Each gives `<task>.yaml` in lm-evaluation-harness' format, with its prompts and metrics, and the
rows as JSON Lines. The multiple choice questions are taken apart into question and choices.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

GSM8K = r"""
# As lm-evaluation-harness' own gsm8k. strict-match: the number after ####; flexible-extract: the
# last number of the answer.
task: gsm8k
dataset_path: json
dataset_kwargs:
  data_files: {train: gsm8k_train.jsonl, test: gsm8k_test.jsonl}
training_split: train
fewshot_split: train
test_split: test
num_fewshot: 5
output_type: generate_until
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["Question:", "</s>", "<|im_end|>"]
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\$", "(?s).*#### ", "\\.$"]
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: "#### (\\-?[0-9\\.\\,]+)"}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
"""
CHOICE = r"""
# The log-likelihood of each choice; acc_norm divides it by the choice's length.
task: NAME
dataset_path: json
dataset_kwargs:
  data_files: {train: NAME_train.jsonl, test: NAME_test.jsonl}
training_split: train
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: "TEXT"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
HUMANEVAL = r"""
# The program must pass its tests; it runs in a sandbox, with --run-code only.
task: humaneval
dataset_path: json
dataset_kwargs:
  data_files: {test: humaneval_test.jsonl}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\ncheck({{entry_point}})"
generation_kwargs:
  until: ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
  max_gen_toks: 1024
  do_sample: false
unsafe_code: true
process_results: !function fedmomentum.benchmark.programs.pass_at_1
metric_list:
  - {metric: pass_at_1, aggregation: mean, higher_is_better: true}
"""


# ── rows ──


def gsm8k_rows(file: Path) -> list[Row]:
    """Read question and answer."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def choice_rows(file: Path) -> list[Row]:
    """Take the questions of a file in the LLM-Adapters layout apart."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [choice_row(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def choice_row(row: Row, where: str) -> Row:
    """Return question, choices and the right one's index; from 0.

    Raises:
        SystemExit: If the row has another layout, or its answer is none of its choices.
    """
    parts = re.fullmatch(r"(?s)[^:]*question: ?(.*?)\s*Answer format: (\S+)\s*", row["instruction"])
    if not parts:
        raise SystemExit(f"{where}: not the layout of LLM-Adapters: {row['instruction'][:200]!r}")
    question, labels = parts[1], parts[2].split("/")
    # Yes or no questions have no list of choices.
    choices = labels
    if labels != ["true", "false"]:
        question, *choices = re.split(r"\s*\bAnswer\d+: ?", question)
    choices = [choice.strip() for choice in choices]
    if len(choices) != len(labels) or row["answer"] not in labels or not all(choices):
        raise SystemExit(
            f"{where}: {len(choices)} choices for {'/'.join(labels)}, and the answer "
            f"{row['answer']!r}"
        )
    return {
        "question": question.strip(),
        "choices": choices,
        "answer": labels.index(row["answer"]),
    }


def humaneval_rows(file: Path) -> list[Row]:
    """Read the programs' beginnings and tests."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    columns = ("task_id", "prompt", "entry_point", "test")
    return [{name: row[name] for name in columns} for row in rows]


# ── tasks ──


def choice_yaml(name: str, text: str = r"Question: {{question}}\nAnswer:") -> str:
    """Return the task file of a set of multiple choice questions."""
    return CHOICE.replace("NAME", name).replace("TEXT", text)


# name: (task file, its data by split, how they are read)
TASKS: dict[str, tuple[str, dict[str, str], Callable[[Path], list[Row]]]] = {
    "gsm8k": (GSM8K, {"train": "train.jsonl", "test": "test.jsonl"}, gsm8k_rows),
    "arc_easy": (
        choice_yaml("arc_easy"),
        {"train": "train.json", "test": "test.json"},
        choice_rows,
    ),
    "arc_challenge": (
        choice_yaml("arc_challenge"),
        {"train": "train.json", "test": "test.json"},
        choice_rows,
    ),
    # the beginning of a sentence, which the choice completes
    "openbookqa": (
        choice_yaml("openbookqa", "{{question}}"),
        {"train": "train.json", "test": "test.json"},
        choice_rows,
    ),
    "boolq": (
        choice_yaml("boolq", r"Question: {{question}}\nAnswer (true or false):"),
        {"train": "train.json", "test": "test.json"},
        choice_rows,
    ),
    "humaneval": (HUMANEVAL, {"test": "HumanEval.jsonl.gz"}, humaneval_rows),
}


def make_tasks(data: Path, out: Path) -> list[str]:
    """Write the task files of the data sets that are there, and return what was written.

    Args:
        data: The copies.
        out: Where the task files go.
    """
    lines = []
    out.mkdir(parents=True, exist_ok=True)
    for name, (yaml, splits, read) in TASKS.items():
        if not all((data / name / file).is_file() for file in splits.values()):
            continue
        counts = []
        for split, file in splits.items():
            rows = read(data / name / file)
            write_rows(out / f"{name}_{split}.jsonl", rows)
            counts.append(f"{len(rows)} {split}")
        (out / f"{name}.yaml").write_text(yaml.lstrip(), encoding="utf-8")
        lines.append(f"{name}: {', '.join(counts)}")
    return lines


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write JSON Lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the copies")
    parser.add_argument("--out", type=Path, default=Path("benchmark-tasks"), help="where to write")
    arguments = parser.parse_args()
    lines = make_tasks(arguments.data, arguments.out)
    if not lines:
        raise SystemExit(f"{arguments.data} holds none of {', '.join(TASKS)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
