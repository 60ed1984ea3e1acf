"""How many tokens a text has for the text tower that is to be trained, and whether it fits its context.

CLIP's own encoding is counted by the `tokenizers` library from open_clip's vocabulary file. Other tokenizers are
open_clip's and transformers', which import torch: seconds, and hundreds of megabytes a process. All are loaded when a
text is long enough that it might not fit; most sub-captions are not.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.config import Tokenizer
from data_prep.errors import InputError

_HF, _PACKAGE = "hf:", "package:"
_NUM_CLIP_MERGES = 49152 - 256 - 2
_CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
#: Start token, end token, and the space that SentencePiece puts before a text, which can be a token of its own.
_MAX_ADDED_TOKENS = 3


class TokenCounter:
    """Counts as training does: start and end tokens included. `name` of the configuration is

    - "clip": open_clip's byte-pair encoding, which needs no download,
    - the name of an open_clip model: its tokenizer,
    - "hf:NAME_OR_FOLDER" of a transformers tokenizer, or "hf:package:NAME/folder" where a Python package carries it.

    A wrong name shows as InputError when the tokenizer is first needed, or by `load`.
    """

    def __init__(self, config: Tokenizer) -> None:
        self.name = config.name
        self.context_length = config.context_length

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_count"}

    def load(self) -> None:
        """Loads the tokenizer now. Raises InputError for a name that is unknown or cannot be loaded."""
        _ = self._count

    def count(self, text: str) -> int:
        """Tokens of the whole text, not cut at the context length. Raises InputError as `load`."""
        return self._count(text)

    def fits(self, text: str) -> bool:
        """Whether no token of the text is cut off. Raises InputError as `load`."""
        return _surely_fits(text, self.context_length) or self._count(text) <= self.context_length

    @cached_property
    def _count(self) -> Callable[[str], int]:
        if self.name == "clip":
            return _load_clip()
        if self.name.startswith(_HF):
            return _load_transformers(self.name.removeprefix(_HF))
        return _load_open_clip(self.name)


def _surely_fits(text: str, context_length: int) -> bool:
    """Whether a text fits for every tokenizer, by its length.

    Byte-pair encoding begins with one token a byte, and each merge makes two tokens one. WordPiece and SentencePiece
    cut a text into pieces of one character or more, and white space makes no more tokens than it has characters. So
    text that stays as long as it is has at most as many tokens as bytes, besides those that are added.

    It stays so only as ASCII without "&". Before they cut, tokenizers unescape HTML, normalise Unicode and lower the
    case, and any of these can lengthen a text: "İ" (two bytes) becomes three bytes, U+0958 (three) becomes six,
    "&nGt;" (five) becomes six. Thirty-eight "İ" are 76 bytes, and 78 tokens of CLIP's.
    """
    return len(text) <= context_length - _MAX_ADDED_TOKENS and text.isascii() and "&" not in text


def _load_clip() -> Callable[[str], int]:
    """Byte-pair encoding as in `open_clip.tokenizer.SimpleTokenizer`, without torch. Ids do not matter here."""
    import ftfy
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as RustTokenizer

    with gzip.open(_package_dir("open_clip/bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _NUM_CLIP_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(first + second for first, second in merges)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = RustTokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def count(text: str) -> int:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return len(tokenizer.encode(" ".join(text.split()).lower(), add_special_tokens=False)) + 2

    return count


def _load_open_clip(name: str) -> Callable[[str], int]:
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer, basic_clean, canonicalize_text

    if name not in open_clip.list_models():
        raise InputError(
            f'tokenizer.name: {name!r} is neither "clip" nor a model of open_clip (open_clip.list_models()) nor '
            "hf:NAME_OR_FOLDER"
        )
    try:
        tokenizer: Any = open_clip.get_tokenizer(name)
    except Exception as error:  # whatever the hub client, the file system or a missing dependency raises
        raise _cannot_load(name, error) from None
    if isinstance(tokenizer, SimpleTokenizer):
        return lambda text: len(tokenizer.encode(text)) + 2
    inner = tokenizer.tokenizer
    if getattr(tokenizer, "tokenizer_mode", "") == "clips":  # start, end and class token of open_clip's own
        return lambda text: len(inner(tokenizer.clean_fn(text), add_special_tokens=False, verbose=False).input_ids) + 3
    # SigLIP's tokenizer has no clean_fn and always cleans like this
    clean = getattr(tokenizer, "clean_fn", None) or (lambda text: canonicalize_text(basic_clean(text)))
    return lambda text: len(inner(clean(text), verbose=False).input_ids)


def _load_transformers(source: str) -> Callable[[str], int]:
    from open_clip.tokenizer import get_clean_fn
    from transformers import AutoTokenizer

    folder = str(_package_dir(source)) if source.startswith(_PACKAGE) else source
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and its hub client raise a dozen kinds
        raise _cannot_load(_HF + source, error) from None
    clean = get_clean_fn("whitespace")  # what open_clip does before a transformers tokenizer
    return lambda text: len(tokenizer(clean(text), verbose=False).input_ids)


def _package_dir(source: str) -> Path:
    package, _, folder = source.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None or ".." in Path(folder).parts:
        raise InputError(f"tokenizer.name: hf:{source}: no such package; install it, or correct the name")
    return Path(spec.origin).parent / folder


def _cannot_load(name: str, error: Exception) -> InputError:
    first_line = (str(error).splitlines() or [""])[0]
    return InputError(
        f"tokenizer.name: the tokenizer of {name!r} cannot be loaded ({type(error).__name__}: {first_line}); check the "
        "name, or where there is no network give hf:FOLDER with its files"
    )
