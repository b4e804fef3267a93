"""The process that samples: upstream's own start-up builds and loads the model, then tokens are drawn one by one."""

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from harness.entry import failures, finetune, rank
from harness.generate import REQUEST_VARIABLE, Sampling


def main() -> None:
    """Answer the request in the folder that ``HARNESS_GENERATE`` names."""
    failures.die_with(os.getppid())
    folder = Path(os.environ[REQUEST_VARIABLE])
    sampling = Sampling(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    with failures.ended_at_once(None):
        found = rank.prepare()
        from megatron.training import training

        build = training.setup_model_and_optimizer

        def build_and_sample(*args, **kwargs) -> NoReturn:
            model = build(*args, **kwargs)[0]
            answer = sample(model[0], sampling)
            (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
            sys.exit(0)

        training.setup_model_and_optimizer = build_and_sample
        finetune.install(None)
        rank.train(found)
        rank.leave()


def sample(model, sampling: Sampling) -> dict[str, object]:
    """The prompt and what follows it. Where both outgrow the model's sequence, it sees the end of them.

    Returns ``text``, and how many tokens the prompt and the continuation have.
    """
    import torch
    from megatron.training import get_args, get_tokenizer

    args, tokenizer = get_args(), get_tokenizer()
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = list(tokenizer.tokenize(sampling.prompt))
    prompt_tokens = len(ids)
    model.eval()
    with torch.no_grad():
        for _ in range(sampling.tokens):
            seen = torch.tensor([ids[-args.seq_length :]], device="cuda")  # [1, s]
            positions = torch.arange(seen.shape[1], device="cuda")[None]
            logits = model(seen, positions, None)[0, -1, : tokenizer.vocab_size].float().cpu()
            ids.append(draw(logits, sampling, generator))
            if ids[-1] == getattr(tokenizer, "eod", None):
                break
    return {"text": tokenizer.detokenize(ids), "prompt_tokens": prompt_tokens, "tokens": len(ids) - prompt_tokens}


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
