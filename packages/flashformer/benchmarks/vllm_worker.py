"""Answers requests of `peers.VLLMRunner`, a line of JSON each, with vLLM; not a command for users.

Runs in the environment that holds vLLM and imports nothing of this package.
"""

import json
import os
import sys
import time


def main(folder: str, room: int) -> None:
    """Load a model and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")  # vLLM prints to the standard output
    os.dup2(2, 1)
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=room,
        max_num_seqs=1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=True,
        disable_log_stats=True,
    )

    def run(prompt: list[int], tokens: int, logprobs: int | None = None):
        wanted = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        begun = time.perf_counter()
        found = model.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False)[0].outputs[0]
        return time.perf_counter() - begun, found

    answer = time.perf_counter() - start
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "time":
            prompt, steps = request["prompt"], request["steps"]
            first = run(prompt, 1)[0]
            answer = max(run(prompt, steps + 1)[0] - first, 0.0)
        elif request["do"] == "logits":
            found = run(request["prompt"], 1, -1)[1].logprobs[0]
            answer = [found[token].logprob for token in range(len(found))]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
