"""Conversations as a data set, in which prompts and answers alternate.

``conversations``  reads them and splits them into prompts and answers
``byte_tokenizer`` a tokenizer for machines without a network
``prepare``        ``make data-chat``
"""
