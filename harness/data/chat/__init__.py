"""Conversations as a data set: text to read and text to answer, in turn.

``conversations``  out of JSON Lines, as spans of text to read and spans to answer
``byte_tokenizer`` for a machine without a network
``prepare``        ``make data-chat``
"""
