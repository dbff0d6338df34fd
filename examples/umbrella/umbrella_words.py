"""A tokenizer whose tokens are the words that answers are made of."""

from collections.abc import Iterable

from umbrella_scans import LEVELS, MODALITIES, NAMES

PAD, END = 0, 1
_WORDS = (
    *("<pad>", "<end>", "describe", "the", "scan", ":", ","),
    *MODALITIES,
    *(name for names in NAMES.values() for name in names),
    *LEVELS,
    *("left", "right", "early", "late", "x", "y", "z"),
)
VOCABULARY = {word: token for token, word in enumerate(_WORDS)}


def prompt_of(modality: str) -> str:
    """What the model is asked."""
    return f"describe the {modality} scan :"


def encode(text: str) -> list[int]:
    """Tokens of words with spaces between them.

    Raises:
        ValueError: A word is not in the vocabulary.
    """
    unknown = [word for word in text.split() if word not in VOCABULARY]
    if unknown:
        raise ValueError(f"The vocabulary lacks {unknown}; it has {', '.join(VOCABULARY)}.")
    return [VOCABULARY[word] for word in text.split()]


def decode(tokens: Iterable[int]) -> str:
    """The words up to the end."""
    words: list[str] = []
    for token in tokens:
        if token == END:
            break
        words.append(_WORDS[token])
    return " ".join(words)


def facts(text: str) -> dict[str, str]:
    """What an answer says: `{"intensity": "high", "brighter": "left"}`; `{}` if it is no answer."""
    pairs = [part.split() for part in text.split(" , ")]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
