"""Which of the teacher's instructions are kept, and why the others are not.

In order: parse, length in words, keywords, first character, exact duplicate, ROUGE-L
near-duplicate. The first filter that objects gives the cause. They are Self-Instruct's (Wang et al.
2023, arXiv 2212.10560), as Montessori-Instruct uses them; the keyword list is ours.
"""

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field

from montessori_jax.config import FilterConfig
from montessori_jax.errors import UserError
from montessori_jax.generation.dedupe import NearDuplicateIndex
from montessori_jax.generation.parsing import CAUSES as PARSE_CAUSES
from montessori_jax.generation.parsing import Parsed

DEFAULT_KEYWORDS = (
    *("image", "images", "picture", "pictures", "photo", "photos", "photograph", "photographs"),
    *("screenshot", "screenshots", "graph", "graphs", "chart", "charts", "diagram", "diagrams"),
    *("map", "maps", "draw", "plot a", "plot the data", "video", "videos", "audio"),
    *("file", "files", "attached", "attachment", "click", "go to", "hyperlink"),
)
"""What a model that reads and writes only text cannot see, hear, open or make."""

CAUSES = {
    **PARSE_CAUSES,
    "too_short": "fewer words than min_words",
    "too_long": "more words than max_words",
    "keyword": "names something that a text model cannot do",
    "punctuation_start": "starts with punctuation",
    "non_ascii_start": "starts with a character outside ASCII",
    "exact_duplicate": "equal to an instruction already known",
    "near_duplicate": "too like an instruction already known",
}
"""Every cause of a rejection -> what it means, in the order of the filters."""

EXAMPLES = 3  # texts that a report holds for each cause


@dataclass(frozen=True)
class FilterSettings:
    """What an instruction has to be.

    Attributes:
        min_words, max_words: bounds on the white-space separated words, both included.
        keywords: words or phrases that may not occur, in any case, as whole words.
        allow_punctuation_start: keep instructions that start with ASCII punctuation.
        allow_non_ascii_start: keep instructions that start with a non-ASCII character; needed for
            most languages but English.
        rouge_threshold: ROUGE-L F1 above which two instructions are near-duplicates; 1 never.

    Raises:
        UserError: impossible bounds or an empty keyword.
    """

    min_words: int = 3
    max_words: int = 150
    keywords: tuple[str, ...] = DEFAULT_KEYWORDS
    allow_punctuation_start: bool = False
    allow_non_ascii_start: bool = False
    rouge_threshold: float = 0.7

    @classmethod
    def of(cls, config: FilterConfig) -> "FilterSettings":
        """The settings that a configuration asks for, the default keywords where it has none."""
        return cls(
            min_words=config.min_words,
            max_words=config.max_words,
            keywords=DEFAULT_KEYWORDS if config.keywords is None else config.keywords,
            allow_punctuation_start=config.allow_punctuation_start,
            allow_non_ascii_start=config.allow_non_ascii_start,
            rouge_threshold=config.rouge_threshold,
        )

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise UserError(
                f"min_words {self.min_words} and max_words {self.max_words} leave no length"
            )
        if not all(keyword.strip() for keyword in self.keywords):
            raise UserError("keywords holds an empty string, which every text contains; remove it")
        if not 0.0 <= self.rouge_threshold <= 1.0:
            raise UserError(
                f"rouge_threshold is {self.rouge_threshold}; it must lie between 0 and 1"
            )


@dataclass(frozen=True)
class Verdict:
    """What became of one sampled text.

    Attributes:
        text: the instruction, or the raw text where none was found.
        cause: why it was rejected (a key of ``CAUSES``); None when it is kept.
        detail: what exactly was objected to (the keyword, the length, the known instruction and
            its score); empty for parse failures and kept texts.
    """

    text: str
    cause: str | None
    detail: str = ""

    @property
    def kept(self) -> bool:
        return self.cause is None


class InstructionFilter:
    """The filters, with the memory of all instructions known so far.

    After an interruption, rebuild it from the seeds followed by the instructions kept.

    Args:
        settings: the bounds.
        known: instructions that count as known: the seeds, then those kept before.
    """

    def __init__(self, settings: FilterSettings, known: Iterable[str] = ()) -> None:
        self.settings = settings
        self._exact: set[str] = set()
        self._near = NearDuplicateIndex(threshold=settings.rouge_threshold)
        self._keywords = _keyword_pattern(settings.keywords)
        for text in known:
            self.keep(text)

    def __len__(self) -> int:
        """How many instructions are known."""
        return len(self._near)

    def keep(self, text: str) -> None:
        """Makes ``text`` known without judging it."""
        self._exact.add(_canonical(text))
        self._near.add(text)

    def judge(self, parsed: Parsed) -> Verdict:
        """Runs the filters in order. Changes nothing."""
        text = parsed.instruction
        if text is None:
            return Verdict(parsed.raw, parsed.cause)
        settings = self.settings
        words = len(text.split())
        if words < settings.min_words:
            return Verdict(text, "too_short", f"{words} words")
        if words > settings.max_words:
            return Verdict(text, "too_long", f"{words} words")
        if self._keywords is not None and (hit := self._keywords.search(text)):
            return Verdict(text, "keyword", hit[0])
        if text[0] in string.punctuation and not settings.allow_punctuation_start:
            return Verdict(text, "punctuation_start", text[0])
        if not text[0].isascii() and not settings.allow_non_ascii_start:
            return Verdict(text, "non_ascii_start", text[0])
        if _canonical(text) in self._exact:
            return Verdict(text, "exact_duplicate")
        if match := self._near.query(text):
            return Verdict(text, "near_duplicate", f"ROUGE-L {match.score:.3f} with: {match.text}")
        return Verdict(text, None)

    def offer(self, parsed: Parsed) -> Verdict:
        """Judges a text and, if it passes, makes it known to those that follow."""
        verdict = self.judge(parsed)
        if verdict.kept:
            self.keep(verdict.text)
        return verdict


@dataclass
class FilterReport:
    """Counts by cause with the first few examples of each.

    Rebuild it after an interruption by recording the stored verdicts again, in order.

    Attributes:
        kept: texts that passed.
        counts: cause -> number of texts.
        examples: cause -> the first ``EXAMPLES`` verdicts.
    """

    kept: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Verdict]] = field(default_factory=dict)

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> "FilterReport":
        """The report on some verdicts."""
        report = cls()
        for verdict in verdicts:
            report.record(verdict)
        return report

    @property
    def attempts(self) -> int:
        """Texts recorded, kept or not."""
        return self.kept + sum(self.counts.values())

    @property
    def yielded(self) -> float:
        """The teacher's yield: the share of attempts that were kept, 0 before the first."""
        return self.kept / self.attempts if self.attempts else 0.0

    def record(self, verdict: Verdict) -> None:
        """Counts one verdict."""
        if verdict.cause is None:
            self.kept += 1
            return
        self.counts[verdict.cause] = self.counts.get(verdict.cause, 0) + 1
        examples = self.examples.setdefault(verdict.cause, [])
        if len(examples) < EXAMPLES:
            examples.append(verdict)

    def ordered(self) -> list[tuple[str, int]]:
        """(cause, count), the most frequent first, ties in the order of the filters."""
        rank = {cause: place for place, cause in enumerate(CAUSES)}
        return sorted(self.counts.items(), key=lambda item: (-item[1], rank[item[0]]))

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON: attempts, kept, yield, counts and examples by cause."""
        return {
            "attempts": self.attempts,
            "kept": self.kept,
            "yield": self.yielded,
            "counts": dict(self.ordered()),
            "examples": {
                cause: [{"text": v.text, "detail": v.detail} for v in self.examples[cause]]
                for cause, _ in self.ordered()
            },
        }


def _canonical(text: str) -> str:
    """The form in which two texts are exact duplicates: one space for white space, no case."""
    return " ".join(text.split()).casefold()


def _keyword_pattern(keywords: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any keyword as whole words, in any case, with any white space between its words."""
    phrases = [r"\s+".join(map(re.escape, keyword.split())) for keyword in keywords]
    if not phrases:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)
