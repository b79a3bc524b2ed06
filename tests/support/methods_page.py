"""Draws the tables of docs/methods.md from the registry: python tests/support/methods_page.py"""

from pathlib import Path

from pyglobenc.methods.registry import METHODS, MODELS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
HEAD = ("`method`", "what it is", "explains", "takes", "defined for", "costs")


def tables() -> str:
    """Return the table of methods, and the list of the models that they take."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for m in METHODS.values():
        rows.append((f"`{m.name}`", m.summary, f"a {m.target}", m.models, m.defined_for, m.cost))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "The models, by the `model_type` of their configs:", ""]
    for words, types in MODELS.items():
        lines.append(f"- **{words}**: {', '.join(f'`{name}`' for name in types)}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(f"| {HEAD[0]}")] + tables(), encoding="utf-8")
