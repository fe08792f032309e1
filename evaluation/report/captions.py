"""The captions of texts, for people to read."""

from __future__ import annotations

from functools import cached_property

from data.text_db import Text, TextDatabase
from data.tokenizer import WordPieceTokenizer, load_tokenizer
from utils.errors import InputError


class Captions:
    """Captions by the place of their text: what the record keeps as ``raw`` or ``sentence``, or else its word pieces."""

    def __init__(self, text_db: TextDatabase) -> None:
        self._text_db = text_db
        self._first_of: dict[int, int] = {}
        for text, image in enumerate(text_db.image_of.tolist()):
            self._first_of.setdefault(image, text)

    @cached_property
    def _tokenizer(self) -> WordPieceTokenizer | None:
        try:
            tokenizer = load_tokenizer()
        except InputError:  # the vocabulary's package is not installed
            return None
        return tokenizer if len(tokenizer.pieces) == self._text_db.vocab_size else None

    def __getitem__(self, place: int) -> str:
        return self.of(self._text_db[self._text_db.ids[place]])

    def of_image(self, place: int) -> str:
        """The first caption of an image."""
        return self[self._first_of[place]]

    def of(self, text: Text) -> str:
        """The caption of ``text``; the numbers of its word pieces where nothing else is known."""
        caption = text.caption
        if caption is None:
            ids = text.input_ids.tolist()
            caption = self._tokenizer.decode(ids) if self._tokenizer else " ".join(map(str, ids))
        return displayable(caption)


def displayable(text: str) -> str:
    """``text`` with a question mark for each half of a surrogate pair, which UTF-8 cannot have."""
    return text.encode(errors="replace").decode()
