"""Texts for the tokenizer tests: hard ones, and those that the package ships."""

import json
from pathlib import Path

SHIPPED = Path(__file__).parents[3] / "montessori_jax" / "data" / "shipped"
HARD = [
    "",
    " ",
    "\n\n1. Go\n\n2. Stop\n   10 steps",
    "x   12 y  3",
    "½ cup, 10² m, ١٢٣ and Ⅷ, price $5, the 90's, 3.14",
    "don't I'll we've THEY'RE",
    "tabs\t\tand \r\n returns   ",
    "naïve façade, 日本語のテキスト, 한국어, Россия, עברית",
    "emoji 👍🏽 🇺🇸 ❤️, zero\u200bwidth, nbsp\xa0here",
    "def f(x):\n    return x ** 2  # comment\n\n\n\nprint(f(12))",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>x <|endoftext|>",
]


def shipped_texts() -> list[str]:
    rows = [
        json.loads(line)
        for name in ("seeds", "reference", "heldout")
        for line in (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return HARD + [text for row in rows for text in (row["instruction"], row["output"])]
