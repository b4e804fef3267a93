"""Generates natural-looking text of any size in several languages, with duplicates and defects.

A document is a random walk over a language's words: real words with Zipf's frequencies (the lists
of the package wordfreq, data CC BY-SA 4.0), each with a few preferred successors, some favourite
words of the document, sentences and paragraphs. So a small GPT learns it far below the entropy of
single words, and language identification recognises it.

Everything depends only on (seed, document number), by integer arithmetic: the bytes are the same on
every machine, each part can be generated alone, and a duplicate of any earlier document is cheap.
"""
