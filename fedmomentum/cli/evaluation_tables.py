"""Terminal tables of an evaluation: a tuned model next to its base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fedmomentum.cli.columns import name_column, number_columns
from fedmomentum.formats.scores import NO_EXAMPLES
from fedmomentum.results.formatting import number, with_interval
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.formats.scores import Score
    from fedmomentum.run.evaluate import ModelComparison
    from fedmomentum.run.saved_model import Result


def evaluation_title(result: Result, comparison: ModelComparison) -> str:
    """Describe what was scored: which model, on how many examples, and how."""
    how = ", answers generated" if comparison.by_generation else ""
    total = comparison.tuned.all.total
    measure = f"{total.measure} in % [95 % interval]"
    return f"{result.title}: {total.num_examples} examples{how}; {measure}"


def evaluation_table(comparison: ModelComparison) -> Table:
    """Return a table of base and tuned scores: on all examples, by client, and by category."""
    base = comparison.base
    tuned = comparison.tuned
    columns = number_columns("base", "tuned", "loss")
    # The content of the last column depends on what was scored.
    by_label = tuned.all.total.by_label
    last = "perplexity"
    if by_label:
        last = "F1"
    elif tuned.all.total.is_of_pairs:
        last = "margin"
    table = Table(name_column(), *columns, last)
    if by_label:
        table.caption = "F1: the tuned model's, %; for all and for a client the mean over labels"
    table.add_row("all", *_score_cells(base.all.total, tuned.all.total))
    # A single client or category would only repeat the overall scores.
    if len(base.by_client) > 1:
        table.add_section()
        for client in sorted(base.by_client):
            cells = _score_cells(base.by_client[client], tuned.by_client[client])
            table.add_row(Text(printable(client)), *cells)
    if len(base.all.by_category) > 1:
        table.add_section()
        for category in sorted(base.all.by_category.keys() | tuned.all.by_category.keys()):
            base_score = base.all.by_category.get(category, NO_EXAMPLES)
            tuned_score = tuned.all.by_category.get(category, NO_EXAMPLES)
            cells = _score_cells(base_score, tuned_score)
            if by_label:
                counts = by_label.get(category)
                cells[-1] = _short_percent(counts.f1 if counts else None)
            table.add_row(Text(printable(category)), *cells)
    return table


def evaluation_notes(comparison: ModelComparison) -> list[str]:
    """Explain which examples are left out or counted as wrong."""
    notes = []
    if comparison.tuned.all.total.by_label:
        notes.append("the base is the classifier with the head that training starts from")
    if comparison.num_lost:
        verb = "is" if comparison.num_lost == 1 else "are"
        notes.append(
            f"{comparison.num_lost} more {verb} left out: the prompt alone is too long for "
            f"{comparison.max_length} tokens"
        )
    if comparison.tuned.all.total.is_of_pairs:
        notes.append("the base is its own reference: it prefers no answer to another")
    if comparison.num_cut:
        effect = "compared so" if comparison.tuned.all.total.is_of_pairs else "never exact"
        notes.append(
            f"{comparison.num_cut} of the answers are cut at {comparison.max_length} tokens and "
            f"{effect}"
        )
    return notes


def _score_cells(base: Score, tuned: Score) -> list[str]:
    exact_matches = [with_interval(score.exact_match, score.interval) for score in (base, tuned)]
    if not base.num_tokens:
        return [*exact_matches, "-", "-"]
    loss = f"{number(base.loss)} -> {number(tuned.loss)}"
    if tuned.by_label:
        return [*exact_matches, loss, _short_percent(tuned.macro_f1)]
    if tuned.is_of_pairs:
        margins = f"{number(base.mean_margin)} -> {number(tuned.mean_margin)}"
        return [*exact_matches, loss, margins]
    perplexity = f"{base.perplexity:.3g} -> {tuned.perplexity:.3g}"
    return [*exact_matches, loss, perplexity]


def _short_percent(fraction: float | None) -> str:
    """Format a fraction in percent, for a column whose header says so."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"
