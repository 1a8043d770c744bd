"""Hold a text to a JSON schema, token by token, by llguidance."""

import json
from collections.abc import Mapping
from typing import Any

from mpillm.infer.serve.http.forms.api_error import ApiError
from mpillm.system.extras import install_command, installed
from mpillm.tokens.tokenizer import Tokenizer

FIELD = "response_format"
# A model may indent a document, and not write white space without end.
WHITE_SPACE = r"(\r?\n)?[ \t]{0,16}"
LONGEST_SCHEMA = 1 << 16
"""Characters of a schema: compiling one of this size takes a second at most."""


class JsonConstraint:
    """The tokens that may follow by a grammar. One a text; the engine's thread alone uses it."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes | None:
        """Return a bit a token, the lowest bit first. Of a whole document, the end alone is."""
        mask: bytes = self._matcher.compute_bitmask()
        return mask

    def accept(self, token: int) -> None:
        """Take the token that was drawn."""
        self._matcher.consume_token(token)


class SchemaCompiler:
    """Compile schemas for the vocabulary of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        """Raises ApiError where llguidance is not installed."""
        if not installed("llguidance"):
            command = install_command("llguidance")
            raise ApiError(400, f"the server has no llguidance for schemas ({command})", FIELD)
        import llguidance

        self._llguidance = llguidance
        self._vocabulary = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=sorted(end_ids)
        )

    def compile(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """Compile a schema. Raises ApiError where it is none, or too complex."""
        text = json.dumps(schema)
        if len(text) > LONGEST_SCHEMA:
            rule = f"has {len(text):,} characters, and at most {LONGEST_SCHEMA:,} are taken"
            raise ApiError(400, f"the schema {rule}", FIELD)
        matching = self._llguidance.LLMatcher
        try:
            style: Any = {"whitespace_pattern": WHITE_SPACE}
            grammar = matching.grammar_from_json_schema(text, overrides=style)
            matcher = matching(self._vocabulary, grammar)
        except ValueError as failure:
            raise ApiError(400, f"the schema cannot be used: {failure}", FIELD) from failure
        if matcher.is_error():
            # A message of several lines shows where a parser was.
            reason = str(matcher.get_error()).splitlines()[0][:500]
            raise ApiError(400, f"the schema cannot be used: {reason}", FIELD)
        return JsonConstraint(matcher)

    def again(self, constraint: JsonConstraint) -> JsonConstraint:
        """Return the same constraint at its beginning, for another text."""
        return JsonConstraint(constraint._matcher.deep_copy())
