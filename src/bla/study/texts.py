"""Everything that participants read, from one file: `texts.toml`, in any language."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from bla.files import check_keys
from bla.study.errors import StudyError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Texts:
    """Texts by "section.name"; `source` is the file as it was written."""

    source: str
    words: Mapping[str, str]

    @classmethod
    @cache
    def english(cls) -> Texts:
        """The texts that come with the package, and the measure of what a file must hold."""
        return cls.parsed((files("bla.study") / "texts.toml").read_text(encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> Texts:
        """Read a file of the same texts in other words; StudyError names those that are missing, unknown or wrong."""
        try:
            texts = cls.parsed(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
            raise StudyError(f"expected texts as TOML in {path}, got: {error}") from error
        known = cls.english().words
        check_keys(texts.words, known, f"the texts of a study in {path}", StudyError)
        for name, text in texts.words.items():
            if wrong := set(_PLACEHOLDER.findall(text)) - set(_PLACEHOLDER.findall(known[name])):
                raise StudyError(f"{path}: expected only English's placeholders in {name}, got {sorted(wrong)}")
        return texts

    @classmethod
    def parsed(cls, source: str) -> Texts:
        """From TOML: a table for each section."""
        words = {}
        for section, texts in tomllib.loads(source).items():
            for name, text in texts.items() if isinstance(texts, dict) else [("", texts)]:
                if not name or not isinstance(text, str):
                    raise StudyError(f"expected a text for {section}.{name}, got {text!r:.80}: put it in quotes")
                words[f"{section}.{name}"] = text.strip()
        return cls(source, words)

    def __getitem__(self, name: str) -> str:
        return self.words[name]

    def say(self, name: str, **values: object) -> str:
        """A text with its placeholders filled in."""
        return filled(self.words[name], **values)

    def paragraphs(self, name: str, **values: object) -> list[str]:
        """A text that empty lines divide."""
        return [part.strip() for part in re.split(r"\n\s*\n", self.say(name, **values)) if part.strip()]

    def digest(self) -> str:
        """SHA-256 of the file: the instructions are part of the study."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def filled(text: str, **values: object) -> str:
    """Placeholders {name} replaced; other braces stay.

    >>> filled("{a} {b} {", a=1)
    '1 {b} {'
    """
    return _PLACEHOLDER.sub(lambda found: str(values.get(found[1], found[0])), text)
