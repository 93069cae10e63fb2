"""The section ``eval.generate`` of a config: answers that models write at the end of a run."""

from typing import Annotated, Literal

from pydantic import Field

from peerlora.config.base import Section

AnswerScore = Literal["exact-match", "rouge-l"]


class GenerateConfig(Section):
    """Which models write greedy answers to how many evaluation rows."""

    rows: Annotated[int, Field(ge=1, le=1000)] = 8
    """Evaluation rows to answer, a sample drawn once from the seed."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Tokens after which an answer ends, if it has not ended by itself."""
    client: Annotated[int, Field(ge=0)] = 0
    """The client whose own model answers, beside the averaged one; a real peer takes its own."""
    scores: list[AnswerScore] = []
    """Scores of the answers, means over these rows: exact-match, rouge-l."""
