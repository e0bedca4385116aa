"""Small task files in the forms that tools/benchmark_tasks.py writes."""

import json
from pathlib import Path

from tools.benchmark_tasks import GSM8K, HUMANEVAL, choice_yaml

QUESTIONS = [
    {
        "question": f"{word} {number}",
        "choices": [word[::-1], f"{word} or not", "b" * (number + 1)],
        "answer": number % 3,
    }
    for number, word in enumerate(("ab", "cde", "fg", "hijkl", "m", "nop", "qr", "st", "uv", "wx"))
]
SUMS = [
    {"question": f"{number} and {number}?", "answer": f"They are {2 * number}.\n#### {2 * number}"}
    for number in range(1, 9)
]
PROGRAM = {
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def write_rows(file: Path, rows: list) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_choices(folder: Path, name: str = "choices", rows=QUESTIONS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(choice_yaml(name))
    write_rows(folder / f"{name}_test.jsonl", rows)
    write_rows(folder / f"{name}_train.jsonl", rows)
    return folder


def write_sums(folder: Path, *, max_gen_toks: int = 16, num_fewshot: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = GSM8K.replace("num_fewshot: 5", f"num_fewshot: {num_fewshot}")
    text = text.replace("  do_sample", f"  max_gen_toks: {max_gen_toks}\n  do_sample")
    (folder / "gsm8k.yaml").write_text(text)
    write_rows(folder / "gsm8k_test.jsonl", SUMS)
    write_rows(folder / "gsm8k_train.jsonl", SUMS[::-1])
    return folder


def write_programs(folder: Path, num_rows: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "humaneval.yaml").write_text(HUMANEVAL.replace("1024", "16"))
    write_rows(folder / "humaneval_test.jsonl", [PROGRAM] * num_rows)
    return folder
