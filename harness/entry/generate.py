"""The process that samples text: upstream builds and loads the model, then tokens are drawn."""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from harness.entry import failures, finetune, rank
from harness.generate import REQUEST_VARIABLE, Sampling
from harness.system.orphans import end_with

LENGTHS = 64
"""Inputs are padded to a multiple of this: cuDNN builds an attention plan for each new length."""


def main() -> None:
    """Answer the request in the folder that ``HARNESS_GENERATE`` names."""
    end_with(os.getppid())
    folder = Path(os.environ[REQUEST_VARIABLE])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    sampling = Sampling(**request["sampling"])
    with failures.ended_at_once(None):
        tree = rank.prepare()
        from megatron.training import training

        build = training.setup_model_and_optimizer

        def build_and_sample(*args, **kwargs) -> NoReturn:
            model = build(*args, **kwargs)[0]
            pair = request["conversations"]
            answer = compare(model[0], Path(pair)) if pair else sample(model[0], sampling)
            (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
            sys.exit(0)

        training.setup_model_and_optimizer = build_and_sample
        finetune.install(None)
        rank.train(tree)
        rank.leave()


def sample(model, sampling: Sampling) -> dict[str, object]:
    """The prompt with its continuation as ``text``, and the numbers of tokens of both."""
    from megatron.training import get_tokenizer

    tokenizer = get_tokenizer()
    prompt = list(tokenizer.tokenize(sampling.prompt))
    answered = continuation(model, prompt, sampling)
    shown = answered[:-1] if answered[-1] == getattr(tokenizer, "eod", None) else answered
    return {
        "text": tokenizer.detokenize(prompt + shown),
        "prompt_tokens": len(prompt),
        "tokens": len(answered),
    }


def compare(model, pair: Path) -> dict[str, object]:
    """Compare the model's most likely answers with those of conversations, given all turns before.

    Returns the number of ``answers``, how many of the model's are the ``same`` token by token, and
    for the ``others`` the last question, the answer in the data and the model's.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.training import get_tokenizer

    tokenizer, data = get_tokenizer(), IndexedDataset(str(pair))
    bounds = data.document_indices.tolist()
    answers, others = 0, []
    for first, behind in pairwise(bounds):
        before: list[int] = []
        for read, answer in (
            (data[n].tolist(), data[n + 1].tolist()) for n in range(first, behind, 2)
        ):
            before += read
            answered = continuation(
                model, before, Sampling("", tokens=len(answer), temperature=0.0)
            )
            answers += 1
            if answered != answer:
                others.append(
                    [
                        tokenizer.detokenize(read),
                        tokenizer.detokenize(answer),
                        tokenizer.detokenize(answered),
                    ]
                )
            before += answer
    return {"answers": answers, "same": answers - len(others), "others": others}


def continuation(model, prompt: list[int], sampling: Sampling) -> list[int]:
    """The tokens that follow ``prompt``; the model sees the last ``seq_length`` tokens of both."""
    import torch
    from megatron.training import get_args, get_tokenizer

    args, tokenizer = get_args(), get_tokenizer()
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(sampling.tokens):
            seen = ids[-args.seq_length :]
            shown = min(-len(seen) // LENGTHS * -LENGTHS, args.seq_length)
            # [1, s]; attention is causal, so the padding behind is not seen
            tokens = torch.tensor([seen + [0] * (shown - len(seen))], device="cuda")
            positions = torch.arange(shown, device="cuda")[None]
            logits = (
                model(tokens, positions, None)[0, len(seen) - 1, : tokenizer.vocab_size]
                .float()
                .cpu()
            )
            ids.append(draw(logits, sampling, generator))
            if ids[-1] == getattr(tokenizer, "eod", None):
                break
    return ids[len(prompt) :]


def draw(logits, sampling: Sampling, generator) -> int:
    """The next token: logits [vocabulary], on the CPU."""
    import torch

    if sampling.temperature == 0 or sampling.top_k == 1:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
    if sampling.top_p:  # the fewest that together reach top_p (Holtzman et al. 2020)
        probabilities = probabilities[: int((probabilities.cumsum(-1) < sampling.top_p).sum()) + 1]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


if __name__ == "__main__":
    main()
