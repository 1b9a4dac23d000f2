"""An analysis for the terminal: for 80 columns and more."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from dino.analysis.analyzer import Analysis

STYLES = {"learns": "bold green", "collapsed": "bold red", "diverged": "bold red", "does not learn": "bold red"}


def terminal_report(analysis: Analysis, name: str) -> Group:
    """State, numbers, verdicts, what stands out, the score with its reasons, and what to change."""
    parts: list[Any] = [
        Text.assemble(f"{name}: ", (analysis.answer, STYLES.get(analysis.learning, "bold")), f": {analysis.because}."),
        Text(analysis.state),
    ]
    if analysis.headline:
        table = Table(Column(), Column(overflow="fold"), show_header=False)
        for label, words in analysis.headline.items():
            table.add_row(escape(label), escape(words))
        parts.append(table)
    parts += _listed("verdicts", [f"{each.title} ({each.when}): {each.text}" for each in analysis.verdicts])
    parts += _listed("stands out", [each.text for each in analysis.anomalies])
    if analysis.score is not None:
        parts.append(Text(f"health score {analysis.score:.2f} of 1"))
        parts += [Text(f"  -{each.points:.2f}  {each.reason}") for each in analysis.deductions]
    parts += _listed("try", [str(each) for each in analysis.recommendations])
    return Group(*parts)


def _listed(title: str, lines: Sequence[str]) -> list[Text]:
    return [Text(title), *(Text(f"  {line}") for line in lines)] if lines else []
