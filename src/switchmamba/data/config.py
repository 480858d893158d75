"""The ``data`` table of a configuration: how documents become samples (paths are arguments)."""

from pydantic import Field

from switchmamba.config import Config


class DataConfig(Config):
    """How a stream of documents is cut into samples.

    Attributes:
        context_length: targets per sample, L; a sample is L+1 tokens, of which L are inputs.
        reset_state: True: documents packed into one sample know nothing of each other, and the target that
            crosses from one to the next is masked. False: the sample is one stream in which every target
            counts, as in the paper.
    """

    context_length: int = Field(ge=1)
    reset_state: bool = True
