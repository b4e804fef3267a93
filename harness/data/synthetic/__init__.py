"""Natural-looking text made on this machine: any size, several languages, planted duplicates and
defects.

A document is a walk over a language's words: real words at Zipf's frequencies (the lists of the
package wordfreq, data CC BY-SA 4.0), each with a few preferred successors, some favourites of the
document's own, sentences and paragraphs. So a small GPT learns it far below the entropy of single
words, and language identification takes it for what it is.

Everything follows from (seed, document number) by integer arithmetic alone: the same bytes on every
machine, any part by itself, and a duplicate of any earlier document at no cost.
"""

from harness.data.synthetic.corpus import (
    DAMAGED,
    DEFECTS,
    DUPLICATES,
    MENDABLE,
    PLAIN,
    Corpus,
    Label,
    Mixture,
)
from harness.data.synthetic.files import generate, labels
from harness.data.synthetic.language import LANGUAGES

__all__ = [
    "DAMAGED",
    "DEFECTS",
    "DUPLICATES",
    "LANGUAGES",
    "MENDABLE",
    "PLAIN",
    "Corpus",
    "Label",
    "Mixture",
    "generate",
    "labels",
]
